"""Model download: `lance-quant download`, from the Hugging Face hub into the layout that the loaders read.

    lance-quant download Lance_3B --format int4 --dry_run
    lance-quant download Lance_3B --format int4
    lance-quant draw "a paper boat" --model downloads/Lance-3B-AWQ-INT4

ByteDance's repository lies in the folder --to as it is: Lance_3B/, Lance_3B_Video/, Qwen2.5-VL-ViT/, Wan2.2_VAE.pth. A
published 4-bit folder lies beside them and gets copies of the configuration and tokenizer, so that it runs alone.
"""

import argparse
import fnmatch
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.storage.atomic import size_text
from lance_quant.storage.hub import Hub

MODELS, FORMATS = ("Lance_3B", "Lance_3B_Video"), ("float", "int4", "nvfp4")
BASE = "bytedance-research/Lance"
_PUBLISHED = {"int4": "Reza2kn/{}-AWQ-INT4", "nvfp4": "Reza2kn/{}-NVFP4"}
_PACKED_FILES = ("*_meta.json", "*_state_dict.safetensors", "README.md")
_VIT, _VAE = "Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"


@dataclass(frozen=True)
class Part:
    """Files of one repository: patterns, each of which must match, and the folder that they come into."""

    repo: str
    patterns: tuple[str, ...]
    folder: Path


def add(to: argparse.ArgumentParser) -> None:
    """The flags of `lance-quant download`."""
    to.add_argument("model", choices=MODELS, help="which model: pictures, or pictures and clips")
    to.add_argument("--format", choices=FORMATS, default="int4",
                    help="float: ByteDance's file. int4, nvfp4: those that Reza2kn published, without the float one")
    to.add_argument("--to", type=Path, default=Path("downloads"), help="folder; what is there already is not fetched")
    to.add_argument("--dry_run", action="store_true", help="print files and sizes, and fetch nothing")


def parts_of(model: str, form: str, to: Path) -> list[Part]:
    """What a model consists of."""
    # The video checkpoint has its ViT inside and needs that folder for the configuration only.
    vit = f"{_VIT}/*" if model == "Lance_3B" else f"{_VIT}/config.json"
    if form == "float":
        return [Part(BASE, (f"{model}/*", vit, _VAE), to)]
    repo = _PUBLISHED[form].format(model.replace("_", "-"))
    return [Part(repo, _PACKED_FILES, to / repo.partition("/")[2]),
            Part(BASE, (f"{model}/*.json", f"{model}/*.txt", vit, _VAE), to)]


def run(args: argparse.Namespace, hub: Hub) -> str:
    """Fetch a model, or say what would be fetched.

    Returns:
        The folder to give as --model; of a dry run, the files as a table.

    Raises:
        InputError: the hub cannot be reached, lacks a file, or the disk is too small.
    """
    parts = parts_of(args.model, args.format, args.to)
    wanted = [_matching(part, hub.files(part.repo)) for part in parts]
    missing = [{name: size for name, size in files.items() if not _is_there(part.folder / name, size)}
               for part, files in zip(parts, wanted, strict=True)]
    left = sum(sum(files.values()) for files in missing)
    if args.dry_run:
        return _table(parts, wanted, missing)
    _require_space(args.to, left)
    script.log.info("%s to fetch into %s; interrupted, the same command goes on", size_text(left), args.to)
    for part, files in zip(parts, missing, strict=True):
        if files:
            hub.fetch(part.repo, list(files), part.folder)
    _require_whole(parts, wanted)
    return str(_completed(args.model, parts, args.to))


def _matching(part: Part, files: Mapping[str, int]) -> dict[str, int]:
    """The files of a part, with their sizes."""
    found: dict[str, int] = {}
    for pattern in part.patterns:
        names = fnmatch.filter(files, pattern)
        if not names and pattern != "README.md":
            raise InputError(f"{part.repo} has no {pattern}: was it moved? See https://huggingface.co/{part.repo}")
        found |= {name: files[name] for name in names}
    return found


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _require_space(to: Path, needed: int) -> None:
    folder = next(folder for folder in (to, *to.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{size_text(needed)} are to fetch and {folder} has {size_text(free)} free: make room, or "
                         "take another folder with --to")


def _require_whole(parts: Sequence[Part], wanted: Sequence[Mapping[str, int]]) -> None:
    """Raise InputError unless every file has arrived in its size."""
    broken = [str(part.folder / name) for part, files in zip(parts, wanted, strict=True)
              for name, size in files.items() if not _is_there(part.folder / name, size)]
    if broken:
        raise InputError(f"{len(broken)} files did not arrive whole, first {broken[0]}: run the same command again")


def _completed(model: str, parts: Sequence[Part], to: Path) -> Path:
    """The folder that runs: a packed one gets what its model folder has beside the weights."""
    if len(parts) == 1:
        return to / model
    from lance_quant.methods import model_card  # late, as torch takes seconds to import: --help needs none

    folder = parts[0].folder
    for name, source in model_card.beside(to / model).items():
        if not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    return folder


def _table(parts: Sequence[Part], wanted: Sequence[Mapping[str, int]], missing: Sequence[Mapping[str, int]]) -> str:
    lines = []
    for part, files, absent in zip(parts, wanted, missing, strict=True):
        lines.append(f"{part.repo} into {part.folder}:")
        lines += [f"  {size_text(size):>10}  {name}{'' if name in absent else '  (there)'}"
                  for name, size in files.items()]
    total = sum(sum(files.values()) for files in wanted)
    left = sum(sum(files.values()) for files in missing)
    return "\n".join([*lines, f"{size_text(total)} in all, {size_text(left)} to fetch"])
