"""Batch inference by one command: its requests, from the command line or a sample file, and where their results go."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_quant.errors import InputError, require_whole
from lance_quant.lance.settings import Modality
from lance_quant.storage.output_place import require_free

TELLERS = ("ask", "caption")  # commands that make text
_TASKS = {"draw": "t2i", "edit": "image_edit", "edit-video": "video_edit"}
_CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")  # what ask and caption take for a clip


@dataclass(frozen=True)
class Job:
    """One request.

    key: of the sample; "" of the command line's. task: one of settings.TASKS.
    prompt: prompt, instruction or question. system: the system prompt of a question, None for the usual one.
    source: picture or clip, None where there is none; `clip`: which of them.
    outputs: seed -> file; none of text.
    """

    key: str
    task: str
    prompt: str
    source: Path | None
    outputs: dict[int, Path]
    system: str | None = None
    clip: bool = False


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What a command line asks for; everything cheap is checked.

    Raises:
        InputError: prompt or file are missing or given beside --example_json; a file is missing, or an output exists.
    """
    given = vars(args)
    asked = [name for name in ("source", "prompt") if given.get(name) is not None]
    if args.example_json is None:
        if args.limit is not None:
            raise InputError(f"--limit {args.limit} is for --example_json")
        return [_single(args)]
    if asked:
        raise InputError(f"{given[asked[0]]!s} and --example_json {args.example_json}: give one or the other")
    if args.limit is not None:
        require_whole("limit", args.limit, 1)
    return _many(args)


def _single(args: argparse.Namespace) -> Job:
    """The request of a command line without a sample file."""
    source, prompt = getattr(args, "source", None), getattr(args, "prompt", "")
    if prompt is None or (source is None and args.command not in ("draw", "animate")):
        raise InputError(f"lance-quant {args.command}: what is asked for is missing; see lance-quant {args.command} "
                         "--help, or give --example_json for many")
    if source is not None and not source.is_file():
        raise InputError(f"{source} is no file: give a picture or a clip")
    found = {} if args.command in TELLERS else outputs(args.out, prompt, args.seed, args.number, _suffix(args.command))
    clip = source is not None and source.suffix.lower() in _CLIPS
    shown: Modality | None = None if source is None else "video" if clip else "image"
    return Job("", task_of(args.command, shown), prompt, source, found, clip=clip)


def task_of(command: str, shown: Modality | None) -> str:
    """The task that a command runs on what it is shown."""
    if command in TELLERS:
        return f"x2t_{shown or 'image'}"
    return ("t2v" if shown is None else "i2v") if command == "animate" else _TASKS[command]


def _many(args: argparse.Namespace) -> list[Job]:
    """The requests of a sample file."""
    from lance_quant.lance.media import samples  # late, as torch takes seconds to import: --help needs none

    task = task_of(args.command, samples.modality_of(args.example_json))
    if args.command in TELLERS:
        return [_question(one, task, args.command) for one in samples.load(task, args.example_json)[:args.limit]]
    folder, suffix = Path() if args.out is None else args.out, _suffix(args.command)
    if folder.suffix or (folder.exists() and not folder.is_dir()):
        raise InputError(f"--out {folder} must be a folder with --example_json: it gets a file per sample")
    found = []
    for one in samples.load(task, args.example_json)[:args.limit]:
        base = folder / f"{one.key}{suffix}"
        found.append(Job(one.key, task, getattr(one, "text", ""), one.visual,
                         _by_seed(base, args.seed, args.number, args.number > 1)))
    return found


def _question(sample: Any, task: str, command: str) -> Job:
    """A sample of x2t; of a caption, the question that it may have is left out."""
    told = command == "caption"
    return Job(sample.key, task, "" if told else sample.question, sample.visual, {}, None if told else sample.system,
               sample.modality == "video")


def _suffix(command: str) -> str:
    return ".png" if command in ("draw", "edit") else ".mp4"


def outputs(out: Path | None, prompt: str, first: int, number: int, suffix: str) -> dict[int, Path]:
    """Where the result of each seed goes: named by the prompt unless `out` says otherwise.

    Raises:
        InputError: `out` has another ending, or one of the files exists.
    """
    if out is not None and out.suffix.lower() != suffix:
        raise InputError(f"--out {out} must end with {suffix}")
    named = Path("-".join(re.findall(r"\w+", prompt.lower()))[:60].rstrip("-") or "lance")
    base = named.with_name(f"{named.name}{suffix}") if out is None else out
    return _by_seed(base, first, number, number > 1 or out is None)


def _by_seed(base: Path, first: int, number: int, several: bool) -> dict[int, Path]:
    require_whole("seed", first, 0)
    seeds: Sequence[int] = range(first, first + require_whole("number", number, 1))
    found = {seed: base.with_name(f"{base.stem}_{seed}{base.suffix}") if several else base for seed in seeds}
    for path in found.values():
        require_free(path)
    return found
