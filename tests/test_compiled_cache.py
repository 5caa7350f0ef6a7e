"""The cache of compiled libraries: what is loaded runs, so only what was compiled here, unchanged, is."""

import ctypes
import os
import shutil

import pytest

from lance_quant.cpu import compile_c

COMPILER = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
FLAGS = ["-shared", "-fPIC", "-O1"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "answer.c").write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    return tmp_path / "cache" / "lance-quant"


def answer(cache):
    library, reason = compile_c.load(cache.parents[1] / "answer.c")
    return reason if library is None else library.answer()


def libraries(cache):
    return [path for path in cache.iterdir() if path.suffix in (".so", ".dll")]


def compiled_once(cache):
    assert answer(cache) == 42
    (library,) = libraries(cache)
    return library


def test_a_library_is_compiled_once_and_its_hash_is_beside_it(cache, caplog):
    library = compiled_once(cache)
    before = library.stat().st_mtime_ns
    assert library.with_name(f"{library.name}.sha256").is_file()
    assert answer(cache) == 42 and library.stat().st_mtime_ns == before
    assert len(list(cache.iterdir())) == 2


def other_library(path):
    """A library that has no `answer`, in place of the one that was compiled."""
    source = path.with_name("other.c")
    source.write_text("int other(void) { return 0; }\n", encoding="utf-8")
    path.unlink()
    compile_c._run([COMPILER, *FLAGS, str(source), "-o", str(path)])
    source.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(b"\x7fELF" + b"\0" * 100),
        lambda path: path.write_bytes(b"x"),
        other_library,
        lambda path: path.unlink(),
        lambda path: path.with_name(f"{path.name}.sha256").unlink(),
        lambda path: path.with_name(f"{path.name}.sha256").write_text("0" * 64),
        lambda path: path.chmod(0o777),
        lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff"),
        lambda path: path.with_name(f"{path.name}.sha256").chmod(0o666),
    ],
    ids=range(12),
)
def test_what_is_not_what_was_compiled_is_compiled_anew(cache, damage):
    """In a process of its own a damaged library would have ended it with a bus error; here it is never loaded."""
    made = cache.parents[1] / "made.so"
    library = compiled_once(cache)
    whole = library.read_bytes()
    # Loaded libraries are mapped: damage another file of the name, not the one that this process has loaded.
    shutil.copy(library, made)
    library.unlink()
    shutil.copy(made, library)
    damage(library)
    assert answer(cache) == 42
    assert library.read_bytes() == whole and ctypes.CDLL(str(library)).answer() == 42


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps the cache by user")
def test_a_cache_that_others_may_write_to_is_not_used(cache, caplog):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert answer(cache) == 42
    assert not list(cache.iterdir()) and "others may write to it" in caplog.text


@pytest.mark.parametrize(
    ("cc", "reason"),
    [
        ("'gcc", "CC is no command"),
        ('gcc "', "CC is no command"),
        ("no-such-compiler", "cannot be compiled or loaded"),
        ("false", "false failed"),
    ],
)
def test_a_compiler_that_is_none_is_a_reason_and_no_traceback(cache, monkeypatch, cc, reason):
    monkeypatch.setenv("CC", cc)
    assert reason in answer(cache)


def test_no_compiler_is_a_reason(cache, monkeypatch):
    monkeypatch.setattr(compile_c.shutil, "which", lambda name: None)
    assert answer(cache) == "there is no C compiler; install gcc or clang"


def test_a_source_that_does_not_compile_is_a_reason(cache):
    (cache.parents[1] / "answer.c").write_text("int answer(void) { return }\n", encoding="utf-8")
    assert "error" in answer(cache)
