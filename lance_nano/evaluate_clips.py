"""Measure a lance-nano checkpoint, float or quantized, on the five tasks with edits and clips.

    python -m lance_nano.evaluate_clips --model_path lance_nano/checkpoint/Lance_nano --n 200 --seed 0
    python -m lance_nano.evaluate_clips --model_path ... --awq_dir nano-int4 --n 50 --tasks image_edit t2v

n held-out changes a task (clips.py), one noise seed each, official sampler at its defaults, through the project's own
runtime. Right means: the picture (image_edit), or every one of the 5 frames (t2v, i2v, video_edit), shows exactly the
things of the scene in their colours, as recognise.py reads it, which is no model; the answer is the expected one letter
by letter (x2t_video). Places and background count apart. evaluate.py measures the other two tasks. The last line on
stdout is the result as JSON, with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lance_nano import clips
from lance_nano.evaluate import MAX_ANSWER_TOKENS, RESOLUTION, Share, load
from lance_nano.progress import generator_for
from lance_nano.recognise import shows, shows_layout
from lance_nano.scenes import SIZE, Scene
from lance_quant.cli import script, task_arguments
from lance_quant.errors import InputError
from lance_quant.lance.generation import Denoiser, Sampling
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.tokens import QUESTION_SYSTEMS, understanding_sequence

TASKS = ("image_edit", "x2t_video", "t2v", "i2v", "video_edit")


class Request(NamedTuple):
    """A denoiser's request, and the scenes that its frames are to show."""

    denoiser: Denoiser
    wanted: list[Scene]


def scenes_of(change: clips.Change) -> list[Scene]:
    """The scene of every frame of a clip."""
    return [change.before] + [change.after] * (clips.FRAMES - 1)


def request(pipeline: Runtime, task: str, seed: int, index: int) -> Request:
    """Held-out request `index` of a generation task."""
    rng, sampling = generator_for(seed, 31, TASKS.index(task), index), Sampling()
    if task == "image_edit":
        change = clips.drawn(clips.edit, rng, kept_back=True)
        denoiser = pipeline.editor(change.instruction, clips.pictures(change)[:1], RESOLUTION, "image", sampling)
        return Request(denoiser, [change.after])
    if task == "video_edit":
        source, instruction, change = clips.clip_edit(rng, kept_back=True)
        return Request(
            pipeline.editor(instruction, clips.pictures(source), RESOLUTION, "video", sampling), scenes_of(change)
        )
    change = clips.drawn(clips.clip, rng, kept_back=True)
    if task == "t2v":
        denoiser = pipeline.denoiser(change.caption, SIZE, SIZE, sampling, clips.FRAMES)
    else:
        denoiser = pipeline.animator(change.caption, clips.pictures(change)[0], RESOLUTION, clips.FRAMES, sampling)
    return Request(denoiser, scenes_of(change))


def judged(frames: Sequence[Image.Image], wanted: Sequence[Scene]) -> tuple[bool, bool]:
    """Whether every frame shows its scene's things, and whether it does with places and background right as well."""
    pairs = [(scene, np.asarray(frame)) for scene, frame in zip(wanted, frames, strict=True)]
    return all(shows(*pair) for pair in pairs), all(shows_layout(*pair) for pair in pairs)


def measure_made(pipeline: Runtime, task: str, count: int, seed: int, keep: Path | None) -> tuple[Share, Share]:
    """Recognised results of a generation task, and those with places and background right; pictures kept on demand."""
    marks = []
    for index in tqdm(range(count), desc=task, disable=None):
        denoiser, wanted = request(pipeline, task, seed, index)
        frames = pipeline.decode_frames(pipeline.sample(denoiser, seed * 1_000_003 + index))
        marks.append(judged(frames, wanted))
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            strip = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames], 1))
            strip.save(keep / f"{task}_{index:06d}.png")
    return Share(sum(mark[0] for mark in marks), count), Share(sum(mark[1] for mark in marks), count)


def measure_answers(pipeline: Runtime, count: int, seed: int) -> tuple[Share, dict[str, Share]]:
    """Exact answers about held-out clips, in all and by kind of question, one question per clip."""
    marks: dict[str, list[bool]] = {kind: [] for kind in clips.CLIP_QUESTIONS}
    for index in tqdm(range(count), desc="x2t_video", disable=None):
        rng, kind = generator_for(seed, 32, index), clips.CLIP_QUESTIONS[index % len(clips.CLIP_QUESTIONS)]
        asked = []
        while not asked:
            change = clips.drawn(clips.clip, rng, kept_back=True)
            asked = [question for question in clips.clip_questions(change) if question.kind == kind]
        question = rng.choice(asked)
        seen, grid = pipeline.look(clips.pictures(change), RESOLUTION)
        prompt = understanding_sequence(pipeline.tokenizer, QUESTION_SYSTEMS["video"], question.text, grid)
        given = pipeline.answer(prompt, seen, MAX_ANSWER_TOKENS).text
        marks[kind].append(given == question.answer)
        if given != question.answer:
            script.log.info("%s | %s | %s, not %s", change.caption, question.text, given, question.answer)
    shares = {kind: Share(sum(rows), len(rows)) for kind, rows in marks.items()}
    return Share(sum(share.right for share in shares.values()), count), shares


def measure(pipeline: Runtime, task: str, count: int, seed: int, keep: Path | None) -> dict[str, object]:
    """The part of the result's JSON that is about one task."""
    if task == "x2t_video":
        share, kinds = measure_answers(pipeline, count, seed)
        more: dict[str, object] = {"by_kind": {kind: each.value for kind, each in kinds.items()}}
    else:
        share, placed = measure_made(pipeline, task, count, seed, keep)
        more = {"with_layout": placed.value}
    return {"right": share.value, "interval": share.interval(), "n": count, **more}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="folder with llm_config.json; ViT and VAE beside")
    add("--awq_dir", type=Path, help="quantized folder that replaces the float weights")
    task_arguments.add_kernel(parser)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure")
    add("--n", type=int, default=200, help="requests of each task")
    add("--seed", type=int, default=0, help="of scenes, words and noise")
    add("--pictures", type=Path, help="folder to keep what is made in, a clip as a strip of its frames")
    script.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    if args.n < 1:
        raise InputError(f"--n {args.n}: at least one request of each task is needed")
    pipeline = load(args.model_path, args.awq_dir, args.device, args.dtype, args.kernel)
    found = {task: measure(pipeline, task, args.n, args.seed, args.pictures) for task in dict.fromkeys(args.tasks)}
    print(json.dumps({**found, "seed": args.seed}))


if __name__ == "__main__":
    script.run(main)
