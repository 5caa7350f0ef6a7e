"""The C library by level of instructions: which one a CPU takes, one set of bits, and the library of a wheel first."""

import shutil
import subprocess

import pytest
import torch
from conftest import LEVELS, at_level
from test_kernels import CODECS, generator, random_weight

from lance_quant.cpu import compile_c, rounding
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.kernels import cpu

needs_c = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native: {cpu.unavailable()}")


def at_each_level(compute, levels=LEVELS):
    """What `compute` gives at each level."""
    results = {}
    for level in levels:
        with pytest.MonkeyPatch.context() as patch:
            at_level(level, patch)
            results[level] = compute()
    return results


def all_the_same(results):
    first, *others = results.values()
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for other in others
               for a, b in zip(first, other, strict=True))


@needs_c
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_have_the_same_bits_with_avx2_and_in_plain_c(codec, dtype):
    """Several parts of steps, three rows after a whole tile, values of all sizes, NaN and Inf. AVX-512's have one bit
    more, test_kernels.py holds them to the definition."""
    q, x = random_weight(codec, 19, 2304), torch.randn(7, 2304, generator=generator(1))
    x[1] *= torch.logspace(-30, 30, 2304)
    x[2, 7], x[3, 900], x[4] = float("nan"), float("inf"), 0
    weight, bias = cpu.weight_of(q, codec.group_size), torch.randn(19, generator=generator(2))
    assert all_the_same(at_each_level(lambda: [cpu.dot(x.to(dtype), weight, bias)],
                                      [level for level in LEVELS if level != "avx512"]))


@needs_c
def test_an_8_bit_head_has_the_same_bits_at_every_level():
    codes = torch.randint(-127, 128, (37, 320), generator=generator(), dtype=torch.int8)
    scale, x = torch.rand(37, generator=generator(1)).bfloat16(), torch.randn(5, 320, generator=generator(2))
    assert all_the_same(at_each_level(lambda: [cpu._int8_dot(x, codes, scale)]))


@needs_c
@pytest.mark.parametrize("codec", [Int4(64), Nvfp4()], ids=str)
def test_rounding_has_the_same_bits_at_every_level(codec, monkeypatch):
    """test_rounding.py compares one level with PyTorch; here it is one with the other."""
    w = torch.randn(37, 192, generator=generator()) * 0.02
    w[3], w[5], w[6] = 0, 0.25, 1e-30
    importance, quantizer = torch.rand(192, generator=generator(1)), codec.quantizer
    global_scale = quantizer.global_scale(float(w.abs().max()))

    def compute():
        assert rounding.serves(w, codec.group_size)
        found = quantizer.measured(w, importance, global_scale)
        return [part for part in found.q if isinstance(part, torch.Tensor)] + [found.sums]

    assert all_the_same(at_each_level(compute))


@pytest.mark.parametrize(
    ("machine", "capability", "has_512", "has_vnni", "level"),
    [
        ("x86_64", "DEFAULT", False, False, "plain"),
        ("x86_64", "NO AVX", False, False, "plain"),
        ("AMD64", "AVX2", False, False, "avx2"),
        ("x86_64", "AVX2", True, True, "avx2"),  # ATEN_CPU_CAPABILITY=avx2
        ("x86_64", "AVX512", True, False, "avx2"),  # Skylake
        ("x86_64", "AVX512", True, True, "avx512"),
        ("x86_64", "AVX10_2", True, True, "avx512"),
        ("aarch64", "DEFAULT", False, False, "plain"),
        ("arm64", "SVE256", False, False, "plain"),
        ("ARM64", "AVX2", True, True, "plain"),
    ],
)
def test_the_level_is_what_the_cpu_has(monkeypatch, machine, capability, has_512, has_vnni, level):
    monkeypatch.setattr(compile_c.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_512)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    assert compile_c.level.__wrapped__() == level


# The library of a wheel

@pytest.fixture
def wheel_library(tmp_path, monkeypatch):
    """A library of a wheel, of one function, in a package folder of its own."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    (tmp_path / "answer.c").write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    monkeypatch.setattr(compile_c, "SOURCES", (tmp_path / "answer.c",))
    monkeypatch.setattr(compile_c, "__file__", str(tmp_path / "compile_c.py"))
    monkeypatch.setattr(compile_c, "_just_in_time", lambda source: (None, "compiled here"))
    monkeypatch.setattr(compile_c, "_from_wheel", compile_c._from_wheel.__wrapped__)
    library = tmp_path / compile_c.wheel_name(compile_c.level())
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "answer.c"), "-o", str(library)], check=True)
    compile_c.write_digest(library)
    return library


def test_the_library_of_the_wheel_comes_before_any_compiler(wheel_library):
    library, reason = compile_c.load(*compile_c.SOURCES)
    assert reason is None and library.answer() == 42


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b""),
    lambda path: path.with_name(f"{path.name}.sha256").unlink(),
    lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff"),
], ids=["cut", "empty", "no hash", "hash is no text"])
def test_a_damaged_library_of_the_wheel_is_not_loaded_and_one_line_says_so(wheel_library, caplog, damage):
    damage(wheel_library)
    assert compile_c.load(*compile_c.SOURCES) == (None, "compiled here")
    (line,) = caplog.messages
    assert wheel_library.name in line and "is not used" in line


def test_what_is_no_library_for_this_system_is_passed_by(wheel_library, caplog):
    wheel_library.write_bytes(b"MZ" + b"\0" * 1000)
    compile_c.write_digest(wheel_library)
    assert compile_c.load(*compile_c.SOURCES) == (None, "compiled here")
    assert len(caplog.messages) == 1


def test_a_library_of_other_sources_is_not_found(wheel_library, caplog):
    compile_c.SOURCES[0].write_text("int answer(int of) { return of; }\n", encoding="utf-8")
    assert compile_c.load(*compile_c.SOURCES) == (None, "compiled here") and not caplog.messages
