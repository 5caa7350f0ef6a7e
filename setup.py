"""The wheel's C library: one for each level of instructions, without Python's ABI (compile_c.py loads it).

With a C compiler `pip wheel .` makes a wheel for the platform and any Python 3 (py3-none-PLATFORM); without, one for
all platforms, whose users need a compiler. Everything else is in pyproject.toml.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup  # first: it brings its own distutils
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, PlatformError

sys.path.insert(0, str(Path(__file__).parent))
from distutils.ccompiler import new_compiler  # noqa: E402
from distutils.sysconfig import customize_compiler  # noqa: E402

from lance_quant.cpu import compile_c  # noqa: E402

MSVC_LEVELS = {"plain": (), "avx2": ("/arch:AVX2",), "avx512": ("/arch:AVX512",)}
MSVC = ("/O2", "/fp:precise", "/std:c11", "/openmp:experimental")


def compile_library(level: str, folder: Path) -> None:
    """A library of all C sources, into `folder`; CCompilerError, PlatformError or OSError where that cannot be."""
    compiler: Any = new_compiler()
    customize_compiler(compiler)
    msvc = compiler.compiler_type == "msvc"
    with tempfile.TemporaryDirectory() as passing:
        objects = []
        for source in compile_c.SOURCES:
            flags = (*MSVC, *MSVC_LEVELS[level]) if msvc else compile_c.flags(source, level)
            objects += compiler.compile([str(source.relative_to(Path.cwd()))], output_dir=passing,
                                        macros=[(f"LEVEL_{level}", "1")] if msvc else [], extra_postargs=[*flags])
        # OpenMP is not linked on Linux and macOS: what PyTorch has loaded serves, see compile_c.py.
        target = folder / compile_c.wheel_name(level)
        compiler.link_shared_object(objects, str(target), extra_postargs=[*compile_c.LINK.get(sys.platform, ())])
    compile_c.write_digest(target)


class Build(build_py):
    """Copies what is Python, and compiles what is C."""

    def run(self) -> None:
        """Raises: what compile_library does, where the environment says LANCE_QUANT_NEEDS_C; else a pure wheel."""
        super().run()
        if self.editable_mode:
            return  # a checkout compiles what it needs when it needs it
        x86 = compile_c.is_x86(self.get_finalized_command("bdist_wheel").plat_name)
        try:
            for level in compile_c.LEVELS if x86 else ("plain",):
                compile_library(level, Path(self.build_lib) / "lance_quant/cpu")
        except (CCompilerError, PlatformError, OSError) as error:
            if os.environ.get("LANCE_QUANT_NEEDS_C"):
                raise
            logging.warning("no C library in this wheel: %s", error)


class Wheel(bdist_wheel):
    """Names the platform if there is a library, and no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI, platform."""
        self.root_is_pure = not any((Path(self.bdist_dir) / "lance_quant/cpu").glob("native-*"))
        return ("py3", "none", "any") if self.root_is_pure else ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
