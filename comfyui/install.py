"""Put the pack into a ComfyUI, as a copy that needs nothing of this checkout, or as a link to it.

    python -m comfyui.install --comfyui_path ~/ComfyUI
    python -m comfyui.install --comfyui_path ~/ComfyUI --link
    python -m comfyui.install --zip lance-quant-nodes.zip

Reads   this checkout: comfyui/, lance_quant/, quantized_linear.py, lance_nano/checkpoint
Writes  COMFYUI_PATH/custom_nodes/lance-quant, whole or not at all; nothing else
Needs   25 MB; Python without any package
Next    the pip command it prints, if ComfyUI's Python lacks a package; then restart ComfyUI
"""

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from lance_quant.errors import InputError
from lance_quant.storage import atomic
from lance_quant.storage.output_place import require_free

from .toolkit import NANO, NEEDED, PACK

NAME = "lance-quant"
_DEVELOPMENT = ("build.py", "chinese.py", "install.py", "runtime", "__pycache__")
MARK = ".installed-by-lance-quant"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
_PARTS = ("lance_quant", "quantized_linear.py", str(Path(NANO).parent), "LICENSE")  # the checkpoint with its neighbours


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--comfyui_path", type=Path, help="folder of a ComfyUI: it holds custom_nodes")
    where.add_argument("--out", type=Path, help="only assemble the pack into this new folder, as it is published")
    where.add_argument("--zip", type=Path, help="the same as one zip file, which a user unpacks into custom_nodes")
    parser.add_argument("--link", action="store_true", help="link to this checkout instead of copying it")
    parser.add_argument("--update", action="store_true", help="replace an earlier installation of this pack")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Install, and print where."""
    args = parse_args(argv)
    if args.link and not args.comfyui_path:
        raise InputError("--out and --zip assemble files, --link makes none: give one of them")
    if args.zip:
        _release(args.zip)
        print(args.zip)
        return
    target = args.out or _target(args.comfyui_path)
    if args.update and _is_ours(target):
        _remove(target)
    require_free(target)
    if args.link:
        _link(target)
    else:
        with atomic.whole_folder(target) as folder:
            assemble(folder)
    print(target)
    packages = " ".join(f'"{package}>={lowest}"' for package, lowest in NEEDED.items())
    print(f"If ComfyUI's Python lacks one of them: python -m pip install {packages}", file=sys.stderr)


def _is_ours(target: Path) -> bool:
    """Whether a folder is an installation of this pack, which --update may replace: a link to it, or marked as one (or,
    of installations from before the mark, with this pack's runtime in it). Nothing else is ever removed."""
    if target.is_symlink():  # only the link goes
        return True
    runtime = target / "runtime" / "lance_quant" / "__init__.py"
    return (target / MARK).is_file() or ((target / "table.py").is_file() and runtime.is_file())


def assemble(folder: Path) -> None:
    """Copy the pack, and the runtime beneath it, into a folder."""
    (folder / MARK).write_text("python -m comfyui.install --update replaces this folder.\n", encoding="utf-8")
    root = PACK.parent
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for entry in PACK.iterdir():
        if entry.name not in _DEVELOPMENT:
            _copy(entry, folder / entry.name, ignored)
    _copy(root / "LICENSE", folder / "LICENSE", ignored)  # where registries look for it
    for name in _PARTS:
        if (root / name).exists():
            _copy(root / name, folder / "runtime" / name, ignored)


def _release(file: Path) -> None:
    """The pack as a zip, one folder inside; the same bytes whenever it is made from the same files."""
    require_free(file)
    with atomic.whole_file(file) as partial, tempfile.TemporaryDirectory() as work:
        folder = Path(work) / NAME
        folder.mkdir()
        assemble(folder)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(work).as_posix(), _EPOCH)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def _copy(source: Path, target: Path, ignored: object) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _target(comfyui: Path) -> Path:
    nodes = comfyui.expanduser() / "custom_nodes"
    if not nodes.is_dir():
        raise InputError(f"{comfyui} is no ComfyUI: it has no custom_nodes folder")
    return nodes / NAME


def _link(target: Path) -> None:
    try:
        target.symlink_to(PACK, target_is_directory=True)
    except OSError as error:
        raise InputError(f"cannot link {target}: {error.strerror}; on Windows that needs developer mode: leave --link "
                         "away to copy") from error


def _remove(target: Path) -> None:
    if target.is_symlink():
        target.unlink()
    else:
        shutil.rmtree(target)


if __name__ == "__main__":
    try:
        main()
    except InputError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
