"""Where lance_quant comes from, and whether its neighbours are new enough.

The pack brings the package along (installed by install.py, or from the registry), lies in a checkout of it (linked), or
finds it installed; in this order. A package outside Python's path is imported from its file, so sys.path stays as
ComfyUI made it and nobody else's imports change.
"""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

from .host import log

PACK = Path(__file__).resolve().parent
NANO = "lance_nano/checkpoint/Lance_nano"
# As in requirements.txt; torch is ComfyUI's own. Lower bounds only: nothing here asks for an older package.
NEEDED = {"transformers": "5.17", "diffusers": "0.42", "safetensors": "0.8", "av": "14.2"}


class PackError(ValueError):
    """Something is missing or does not fit; the first line says what, and what to do."""


def home() -> Path | None:
    """The folder that holds lance_quant beside or in the pack; None where only an installed one can be had."""
    for folder in (PACK / "runtime", PACK.parent):
        if (folder / "lance_quant" / "__init__.py").is_file() and (folder / "quantized_linear.py").is_file():
            return folder
    return None


def nano() -> Path | None:
    """The built-in lance-nano checkpoint, if this copy of the pack has one."""
    folder = home()
    return folder / NANO if folder and (folder / NANO / "llm_config.json").is_file() else None


def require() -> None:
    """Make lance_quant importable and check what it needs.

    Raises:
        PackError: it is nowhere, or a package is missing or too old.
    """
    _require_versions()
    if "lance_quant" in sys.modules:
        return
    folder = home()
    if folder is not None:
        _adopt("lance_quant", folder / "lance_quant" / "__init__.py")
        _adopt("quantized_linear", folder / "quantized_linear.py")
        log.info("Lance: lance_quant from %s", folder)
    elif importlib.util.find_spec("lance_quant") is None:
        raise PackError("The lance_quant package is missing. In a checkout of lance-quant run: python -m "
                        f"comfyui.install --comfyui_path <your ComfyUI>\nLooked in {PACK / 'runtime'}, {PACK.parent} "
                        "and Python's installed packages.")


def _adopt(name: str, file: Path) -> None:
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _require_versions() -> None:
    for package, lowest in NEEDED.items():
        found = version_of(package)
        if found is None or _numbers(found) < _numbers(lowest):
            problem = f"finds {found}" if found else "does not find it"
            raise PackError(f"Lance needs {package} {lowest} or newer and {problem}. Run: \"{sys.executable}\" -m pip "
                            f"install \"{package}>={lowest}\"")


def version_of(package: str) -> str | None:
    """The installed version, None where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    numbers = []
    for part in version.split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not part or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


def origin() -> str:
    """Version and folder of the lance_quant in use."""
    import lance_quant

    return f"{lance_quant.__version__} from {Path(lance_quant.__file__).parent}"
