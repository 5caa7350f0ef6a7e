"""Memory planning on the command line: `lance-quant plan`.

    lance-quant plan --model Lance_3B-AWQ-INT4
    lance-quant plan --model Lance_3B-AWQ-INT4 --task t2v --height 480 --width 832 --num_frames 49 --memory 8GB
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lance_quant.errors import InputError
from lance_quant.lance.settings import RESOLUTIONS, TASKS, Settings

if TYPE_CHECKING:  # torch takes seconds to import: --help does not wait for it
    import torch

    from lance_quant.inference.memory_plan import Files, How, Plan
    from lance_quant.lance.config import LancePaths

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Place(NamedTuple):
    """Where a model could run: a device, what it computes in there, bytes that are free (None: unknown), and bytes
    that the process takes before a model is there."""

    name: str
    device: "torch.device"
    dtype: "torch.dtype"
    free: int | None
    process: int


def add_request(to: argparse.ArgumentParser) -> None:
    """The flags of `lance-quant plan` beside those of loading a model."""
    to.add_argument("--task", choices=TASKS, default="t2i", help="what is to run")
    to.add_argument("--height", type=int, default=None, help="of what t2i and t2v make; default 768, 112 for the small "
                                                             "Lance")
    to.add_argument("--width", type=int, default=None, help="as --height")
    to.add_argument("--num_frames", "--frames", type=int,
                    help="of the clip that is made; of x2t_video and video_edit, of the clip that is shown; default: "
                         f"{Settings.num_frames}, and 69 of one that is shown, the most that the model sees")
    to.add_argument("--resolution", choices=RESOLUTIONS, help="preset of what is shown; default: the task's")
    to.add_argument("--max_new_tokens", type=int, default=Settings.max_new_tokens, help="longest answer")
    to.add_argument("--sequential_guidance", action="store_true", help="as for run_baseline.py")
    to.add_argument("--memory", help="plan for a GPU with so much, such as 8GB or 8GiB, in place of the devices here; "
                                     "with --device cpu: for so much free host memory")


def table(args: argparse.Namespace, paths: "LancePaths", packed: Path | None) -> str:
    """The answer of `lance-quant plan`: peaks by stage, and what to change where they do not fit.

    Args:
        packed: folder whose weights are taken.

    Raises:
        InputError: a value is out of range or a file is missing.
    """
    from lance_quant.inference.memory_plan import LONGEST_SOURCE, Files, describe, plan
    from lance_quant.storage.atomic import size_text

    files, places = Files.open(paths, packed), places_of(args.device, args.dtype, args.memory)
    settings, shown = settings_of(vars(args), files.config.is_small), args.num_frames or LONGEST_SOURCE
    hows = [how_of(args, place) for place in places]
    plans = [plan(files, settings, how, place.process, shown) for how, place in zip(hows, places, strict=True)]
    names = [f"{place.name}, {str(place.dtype).removeprefix('torch.')}" for place in places]
    rows = [["", *names]]
    rows += [[stage, *(size_text(one.stages[stage]) for one in plans)] for stage in plans[0].stages]
    rows += [["peak", *(size_text(one.peak) for one in plans)],
             ["free", *("unknown" if place.free is None else size_text(place.free) for place in places)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    said = [f"{name}: {_said(files, settings, how, place, found, shown)}"
            for name, how, place, found in zip(names, hows, places, plans, strict=True)]
    missing = [f"Not there, and planned as the official ones: {', '.join(files.missing)}."] if files.missing else []
    return "\n".join([f"{packed or paths.model}: {describe(settings, shown)}", "", *lines, "", *said, *missing])


def settings_of(given: Mapping[str, Any], small: bool) -> Settings:
    """The request that flags mean; small relatives of Lance have their own sizes."""
    side, preset = (112, "image_112res") if small else (Settings.height, "")
    spec = TASKS[given["task"]]
    frames = given.get("num_frames") if spec.makes == "video" and spec.takes != "video" else None
    return Settings(given["task"], given.get("resolution") or preset, given.get("height") or side,
                    given.get("width") or side, Settings.num_frames if frames is None else frames,
                    max_new_tokens=given.get("max_new_tokens") or Settings.max_new_tokens)


def how_of(args: argparse.Namespace, place: Place) -> "How":
    """How the flags want a model loaded and run at a place."""
    from lance_quant.inference.memory_plan import How

    return How(place.dtype, place.device.type == "cpu", args.mode, args.offload,
               not getattr(args, "sequential_guidance", False), args.vae_tiling)


def places_of(device: str, dtype: str, memory: str | None) -> list[Place]:
    """The devices to plan for: those that are there, one by name, or one of `memory`."""
    import torch

    from lance_quant.inference.device import device_of, dtype_of
    from lance_quant.inference.memory import free_memory, process_memory

    if memory is not None:
        on = torch.device("cpu" if device == "cpu" else "cuda")
        kind = "CPU" if device == "cpu" else "GPU"
        size = bytes_of(memory)
        return [Place(f"{kind} of {memory}", on, dtype_of(dtype, on), size, process_memory(on))]
    found = [torch.device("cpu")]
    if device != "auto":
        found = [device_of(device)]
    else:
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        found += [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [Place(str(one), one, dtype_of(dtype, one), free_memory(one), process_memory(one)) for one in found]


def bytes_of(text: str) -> int:
    """Bytes of a size such as 8GB, 8GiB or 8e9.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise InputError(f"--memory {text!r} must be a size such as 8GB or 8GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _said(files: "Files", settings: Settings, how: "How", place: Place, found: "Plan", shown: int) -> str:
    """Whether it fits, and what to change where it does not."""
    if place.free is None:
        return "how much is free is unknown here; say it with --memory"
    if found.fits(place.free):
        return "fits"
    change = _change(files, settings, how, place, shown)
    where = f"does not fit: {found.where} is the peak"
    if change is None:
        return f"{where}, and no option here brings it down far enough: take a smaller size or another device"
    names, better = change
    from lance_quant.storage.atomic import size_text

    return f"{where}. With {' and '.join(names)}: {size_text(better.peak)} ({better.where}), which fits"


def _change(files: "Files", settings: Settings, how: "How", place: Place,
            shown: int) -> "tuple[Iterable[str], Plan] | None":
    """The fewest changes with which it fits, and the plan with them."""
    from lance_quant.inference.memory_plan import choices, plan

    for names, changed in choices(how, files):
        found = plan(files, settings, changed, place.process, shown)
        if found.fits(place.free or 0):
            return names, found
    return None
