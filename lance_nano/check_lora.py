"""Count what a LoRA of train_lora.py taught lance-nano, in floating point and in 4 bits.

    python -m lance_nano.check_lora --lora lance_nano/lora/*.safetensors

Reads   lance_nano/checkpoint, LoRA files
Writes  nothing; the last line on stdout is the counts as JSON
Needs   minutes; packed folders are made in a temporary place, with statistics that scale them everywhere

Of captions and questions that training never saw: pictures that show the caption's shapes with the new shape,
questions whose answer is the new shape, and the same for the old ones, which must not suffer. Without a LoRA, then
with.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lance_nano import CHECKPOINT
from lance_nano.questions import Question, questions
from lance_nano.recognise import shows
from lance_nano.scenes import SIZE, Scene, held_out, layout_words, picture_scene, question_scene, render
from lance_nano.tokenizer import UNDERSTANDING_SYSTEM
from lance_nano.train_lora import SHAPE, has_shape, new_shape
from lance_quant.calibration.activation_stats import Collector, model_fingerprint
from lance_quant.cli import script
from lance_quant.errors import require_whole
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.inference.pipeline import Pipeline
from lance_quant.inference.request import ModelSource
from lance_quant.lance.config import LancePaths
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint

FORMATS: dict[str, Codec | None] = {"float32": None, "INT4": Int4(64), "NVFP4": Nvfp4(slim=True)}
_CALIBRATE = 24  # captions and questions


def captions(new: bool, count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """Captions that training never saw, all or none with the new shape."""
    rng, found = random.Random(seed), set[str]()
    while len(found) < count:
        scene, text = picture_scene(rng)
        if held_out(text) and has_shape(scene) == new and text not in found:
            found.add(text)
            yield scene, text


def asked(new: bool, count: int, seed: int) -> Iterator[tuple[Scene, Question]]:
    """Questions for a shape on scenes that training never saw; the answer is the new shape, or another one."""
    rng, found = random.Random(seed), 0
    while found < count:
        scene = question_scene(rng)
        fitting = [one for one in questions(scene, rng) if one.kind == "shape" and (one.answer == SHAPE) == new]
        if held_out(layout_words(scene)) and fitting and has_shape(scene) == new:
            found += 1
            yield scene, fitting[0]


def count_of(pipeline: Pipeline, n: int, seed: int) -> dict[str, int]:
    """How many of n are right, by what was asked."""
    found = {}
    for name, new in (("new", True), ("old", False)):
        found[f"drawn_{name}"] = sum(
            shows(scene, np.asarray(pipeline.draw(text, height=SIZE, width=SIZE, seed=seed + index)))
            for index, (scene, text) in enumerate(captions(new, n, seed)))
        found[f"named_{name}"] = sum(
            pipeline.ask(Image.fromarray(render(scene)), question.text, system=UNDERSTANDING_SYSTEM,
                         resolution="image_112res", max_new_tokens=8) == question.answer
            for scene, question in asked(new, n, seed))
    return found


def packed_folders(place: Path) -> dict[str, Path | None]:
    """A packed folder by format; None is the float model. Calibrated on what lance-nano knows, without the shape."""
    with Checkpoint(CHECKPOINT) as source:
        fingerprint = model_fingerprint(source)
    source_of = ModelSource(LancePaths.find(CHECKPOINT), torch.device("cpu"), torch.float32)
    watched = Pipeline(source_of.load())  # unmerged, so that every linear can be watched
    with Collector(watched.runtime.model, layout.linears(watched.runtime.model.config.num_hidden_layers)) as collector:
        for index, (_, text) in enumerate(captions(False, _CALIBRATE, 99)):
            watched.draw(text, height=SIZE, width=SIZE, seed=index, num_timesteps=8)
        for scene, question in asked(False, _CALIBRATE, 99):
            watched.ask(Image.fromarray(render(scene)), question.text, resolution="image_112res", max_new_tokens=4)
    collector.stats("both", {"model": fingerprint}).save(place / "stats.pt")
    found: dict[str, Path | None] = {}
    for name, codec in FORMATS.items():
        found[name] = None if codec is None else place / name
        if codec is not None:
            convert.convert(CHECKPOINT, place / "stats.pt", place / name, Conversion(codec))
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__ or "")
    parser.add_argument("--lora", nargs="+", required=True, help="LoRA files, put on together")
    parser.add_argument("--n", type=int, default=50, help="captions and questions of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Count, and print a table."""
    args = parse_args(argv)
    require_whole("--n", args.n, 1, 10_000)
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lance-") as place, new_shape():
        for name, folder in packed_folders(Path(place)).items():
            load: Callable[..., Pipeline] = functools.partial(Pipeline.load, CHECKPOINT, packed=folder, device="cpu")
            for way, loras in (("without", []), ("with", args.lora)):
                counts[f"{name} {way}"] = count_of(load(lora=loras), args.n, args.seed)
                script.log.info("%s, %s LoRA, right of %d: %s", name, way, args.n, counts[f"{name} {way}"])
    script.result(json.dumps({"n": args.n, **counts}))


if __name__ == "__main__":
    script.run(main)
