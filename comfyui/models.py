"""Which Lance checkpoints there are, by what is in their folders, and which one a request means.

Reads folder listings and safetensors headers only; needs neither torch nor lance_quant, so that the loader can list
what it finds even where those are broken.
"""

import functools
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

from . import host, toolkit
from .toolkit import PackError

FLAVORS = ("Lance_3B", "Lance_3B_Video", "lance_nano")
NANO_LABEL = "lance-nano (built in)"
_DEPTH = 3  # of folders below a registered one: models/lance/downloads/Lance_3B is at two
_HIDDEN = 2048  # of Lance; anything else is a small relative
_IMAGE_POSITIONS = 4096  # rows of the image model's table of latent positions; the video model's is larger
_FLOAT = ("model.safetensors", "ema.safetensors", "model.safetensors.index.json")
_PACKED = {"awq_int4": ("awq_meta.json", "awq_state_dict.safetensors"),
           "nvfp4": ("nvfp4_meta.json", "nvfp4_state_dict.safetensors")}
_TOKENIZER = ("llm_config.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_BASE = "bytedance-research/Lance"
_GIGABYTES = {("Lance_3B", "bf16"): 24.74, ("Lance_3B_Video", "bf16"): 28.42, ("Lance_3B", "awq_int4"): 4.31,
              ("Lance_3B_Video", "awq_int4"): 6.15, ("Lance_3B", "nvfp4"): 5.09, ("Lance_3B_Video", "nvfp4"): 6.93}
PARTS_GIGABYTES = 1.34 + 2.82  # ViT and VAE
_PARTS = '--include "Qwen2.5-VL-ViT/*" --include "Wan2.2_VAE.pth"'


@dataclass(frozen=True)
class Found:
    """A checkpoint: what the loader calls it, its folder, how it is stored, and its (first) file."""

    label: str
    folder: Path
    precision: str
    weights: Path

    @property
    def flavor(self) -> str:
        """One of FLAVORS, from the file's header; "" for a file that cannot be read."""
        return _header_facts(self.weights, self.weights.stat().st_mtime_ns)[0]

    @property
    def hidden(self) -> int:
        return _header_facts(self.weights, self.weights.stat().st_mtime_ns)[1]

    @property
    def is_whole(self) -> bool:
        """Whether its files have all the bytes that their headers speak of: a download may have been cut off."""
        return all(file.is_file() and _is_whole(file, file.stat().st_mtime_ns) for file in _files(self.weights))


@dataclass(frozen=True)
class Choice:
    """What a loader's settings mean: a checkpoint, the parts it is completed with, and why this one."""

    found: Found
    config: Path
    vit: Path | None
    vae: Path | None
    reason: str = field(compare=False)


def scan() -> list[Found]:
    """All checkpoints in the registered folders, in their order, lance-nano last."""
    found: dict[str, Found] = {}
    for root in host.roots():
        for folder in _folders(root):
            for precision, weights in _weights_in(folder):
                label = folder.relative_to(root).as_posix() if folder != root else root.name
                label = label if label not in found else f"{label} ({precision})"
                found.setdefault(label, Found(label, folder, precision, weights))
    nano = toolkit.nano()
    if nano:
        found[NANO_LABEL] = Found(NANO_LABEL, nano, "bf16", nano / "model.safetensors")
    return list(found.values())


def labels() -> list[str]:
    """What the loader's checkpoint widget offers."""
    return ["auto", *(found.label for found in scan())]


def _folders(root: Path) -> list[Path]:
    """A registered folder and what is below it, sorted; hidden folders and links in a circle are left out."""
    reached, level, seen = [], [root] if root.is_dir() else [], set()
    for _ in range(_DEPTH + 1):
        level = [folder for folder in level if not (folder.resolve() in seen or seen.add(folder.resolve()))]
        reached += level
        level = [child for folder in level for child in sorted(folder.iterdir())
                 if child.is_dir() and not child.name.startswith(".")]
    return reached


def _weights_in(folder: Path) -> list[tuple[str, Path]]:
    """(precision, file) of every checkpoint in a folder."""
    found = [(precision, folder / state) for precision, (meta, state) in _PACKED.items()
             if (folder / meta).is_file() and (folder / state).is_file()]
    if (folder / "llm_config.json").is_file():
        found += [("bf16", folder / name) for name in _FLOAT if (folder / name).is_file()][:1]
    return found


@functools.lru_cache(maxsize=256)
def _header_facts(weights: Path, _mtime: int) -> tuple[str, int]:
    """Flavor and hidden size of a checkpoint, from its header; ("", 0) where it has none."""
    try:
        if weights.name.endswith(".json"):
            shards = json.loads(weights.read_text(encoding="utf-8"))["weight_map"]
            names = {name: _header(weights.parent / Path(shard).name).get(name, {}) for name, shard in shards.items()
                     if name.endswith(("norm.weight", "pos_embed")) or name.startswith("vit_model.")}
        else:
            names = _header(weights)
        hidden = names["language_model.model.norm.weight"]["shape"][0]
    except (OSError, ValueError, KeyError, IndexError, AttributeError, struct.error):
        return "", 0
    positions = names.get("latent_pos_embed.pos_embed", {}).get("shape", [0])[0]
    if hidden != _HIDDEN:
        return "lance_nano", hidden
    is_video = positions > _IMAGE_POSITIONS or any(name.startswith("vit_model.") for name in names)
    return ("Lance_3B_Video" if is_video else "Lance_3B"), hidden


@functools.lru_cache(maxsize=64)
def _header(file: Path) -> dict:
    """A safetensors header: name -> {"dtype", "shape", "data_offsets"}."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        return json.loads(opened.read(length))


def _files(weights: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if not weights.name.endswith(".json"):
        return [weights]
    shards = _json(weights).get("weight_map")
    return [weights.parent / Path(str(shard)).name for shard in sorted(set(shards.values()))] \
        if isinstance(shards, dict) else []


@functools.lru_cache(maxsize=256)
def _is_whole(file: Path, _mtime: int) -> bool:
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
        ends = [entry["data_offsets"][1] for name, entry in _header(file).items() if name != "__metadata__"]
        return file.stat().st_size >= 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return False


def choose(flavor: str, precision: str, checkpoint: str, blackwell: bool, memory: int | None = None) -> Choice:
    """The checkpoint that a loader's settings mean, with its parts.

    Args:
        blackwell: the device computes in NVFP4 natively, which `auto` prefers there.
        memory: bytes of the device; where bf16 does not fit, `auto` takes it last.

    Raises:
        PackError: it is not there, does not fit, or lacks configuration or tokenizer.
    """
    found, reason = _named(flavor, precision, checkpoint) if checkpoint != "auto" else \
        _automatic(flavor, precision, blackwell, memory)
    config = _config_for(found)
    return Choice(found, config, _vit_for(found, config), _vae_for(found, config), reason)


def _named(flavor: str, precision: str, checkpoint: str) -> tuple[Found, str]:
    everything = {found.label: found for found in scan()}
    if checkpoint not in everything:
        raise PackError(f"Checkpoint {checkpoint!r} is not in the lance folders. Choose another one, or auto. Found: "
                        f"{', '.join(everything) or 'none'}\n{_where()}")
    found = everything[checkpoint]
    if not found.flavor or not found.is_whole:
        raise PackError(f"{found.weights} cannot be read: it is no Lance checkpoint, or its download was cut off. "
                        "Download it again.")
    for what, wanted, actual in (("flavor", flavor, found.flavor), ("precision", precision, found.precision)):
        if wanted not in ("auto", actual):
            raise PackError(f"Checkpoint {checkpoint!r} is {actual}, and {what} says {wanted}. Set {what} to auto.")
    return found, "chosen by name"


def _automatic(flavor: str, precision: str, blackwell: bool, memory: int | None) -> tuple[Found, str]:
    readable = [found for found in scan() if found.flavor]
    everything = [found for found in readable if found.is_whole]
    for found in readable:
        if not found.is_whole:
            host.log.warning("Lance: %s was cut off while it was downloaded, and is passed over", found.weights)
    narrow = memory is not None and memory < 1.1e9 * _GIGABYTES["Lance_3B", "bf16"]
    order = ("nvfp4", "awq_int4", "bf16") if blackwell else \
        ("awq_int4", "nvfp4", "bf16") if narrow else ("awq_int4", "bf16", "nvfp4")
    flavors = FLAVORS if flavor == "auto" else (flavor,)
    candidates = [found for name in flavors for kind in order for found in everything
                  if found.flavor == name and found.precision == kind and precision in ("auto", kind)]
    if not candidates:
        raise PackError(_missing(flavor, precision))
    found = candidates[0]
    if found.flavor == "lance_nano" and flavor == "auto":
        command, size = download("Lance_3B", "awq_int4")
        return found, f"no Lance is installed, so this is a toy. To get Lance_3B ({size:.1f} GB): {command}"
    if precision != "auto":
        return found, f"precision {precision} was asked for"
    gpu = "the GPU computes in NVFP4 (SM 10 or newer)" if blackwell else "the device is no Blackwell GPU" + (
        ", and bf16 does not fit on it" if narrow else "")
    return found, f"precision auto took {found.precision}, first there is of {', '.join(order)}: {gpu}"


def _missing(flavor: str, precision: str) -> str:
    """What is not there, and the command that brings it."""
    flavor = "Lance_3B" if flavor == "auto" else flavor
    if flavor == "lance_nano" and precision not in ("auto", "bf16"):
        return f"lance-nano comes in bf16 alone, and precision says {precision}: set precision to auto."
    if flavor == "lance_nano":
        return "lance-nano is not in this copy of the pack: install the pack anew from a checkout of lance-quant."
    kind = "awq_int4" if precision == "auto" else precision
    command, size = download(flavor, kind)
    return (f"{flavor} ({kind}) is not installed. Download it ({size:.1f} GB), then queue again: {command}\n{_where()}")


def _where() -> str:
    return f"Looked in: {', '.join(map(str, host.roots())) or 'no folder is registered as lance'}"


def _home() -> Path:
    """Where downloads go."""
    return next(iter(host.roots()), Path("models/lance"))


def parts_command() -> str:
    """The command that downloads ViT and VAE."""
    return f'hf download {_BASE} --local-dir "{_home()}" {_PARTS}'


def download(flavor: str, precision: str) -> tuple[str, float]:
    """The command that downloads a checkpoint with all its parts, and its size in GB."""
    root = _home()
    size = _GIGABYTES[flavor, precision] + PARTS_GIGABYTES
    base = parts_command()
    if precision == "bf16":
        return f'{base} --include "{flavor}/*"', size
    name = f"{flavor.replace('_', '-')}-{'AWQ-INT4' if precision == 'awq_int4' else 'NVFP4'}"
    packed = f'hf download Reza2kn/{name} --local-dir "{root / name}"'
    return f'{packed} && {base} --include "{flavor}/*.json" --include "{flavor}/*.txt"', size


def _config_for(found: Found) -> Path:
    """The folder with configuration and tokenizer: the checkpoint's own, or that of a model of its size."""
    for folder in _candidates(found):
        if all((folder / name).is_file() for name in _TOKENIZER) and _json(folder / "llm_config.json").get(
                "hidden_size") == found.hidden:
            return folder
    root = _home()
    raise PackError(f"{found.label} has no llm_config.json or tokenizer, in its folder or elsewhere. Download them "
                    f'(a few MB): hf download {_BASE} --local-dir "{root}" --include "Lance_3B/*.json" --include '
                    f'"Lance_3B/*.txt"\n{_where()}')


def _vit_for(found: Found, config: Path) -> Path | None:
    """The ViT folder that fits the model; a ViT inside the checkpoint still needs the configuration there."""
    for folder in _candidates(found, config):
        facts = _json(folder / "config.json")
        if facts.get("out_hidden_size") == found.hidden and (
                (folder / "vit.safetensors").is_file() or found.flavor == "Lance_3B_Video"):
            return folder
    return None


def _vae_for(found: Found, config: Path) -> Path | None:
    return next((folder / "Wan2.2_VAE.pth" for folder in _candidates(found, config)
                 if (folder / "Wan2.2_VAE.pth").is_file()), None)


def _candidates(found: Found, config: Path | None = None) -> list[Path]:
    """Folders to complete a checkpoint from: its own, what lies beside it, then all others.

    lance-nano lies outside the registered folders, so its ViT and VAE never get into a real model.
    """
    near = [found.folder, found.folder.parent, *([config, config.parent] if config else [])]
    beside = [child for folder in (found.folder.parent, *([config.parent] if config else []))
              for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    return [*near, *beside, *(folder for root in host.roots() for folder in _folders(root))]


def _json(file: Path) -> dict:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
