"""Measure a lance-nano checkpoint, float or quantized, on held-out questions and captions.

    python -m lance_nano.evaluate --model_path lance_nano/checkpoint/Lance_nano --n 200 --seed 0
    python -m lance_nano.evaluate --model_path lance_nano/checkpoint/Lance_nano --awq_dir nano-int4 --n 200

Understanding: n short questions, the eight kinds in equal shares, greedy answers compared letter by letter,
and n / 4 full descriptions. Generation: n captions, one noise seed each, official sampler (30 steps, shift
3.5, guidance 4), decoded by the VAE and read by the recogniser of recognise.py, which is no model: right
means exactly the caption's shapes in their colours. Everything runs through the project's own runtime. No
scene layout and no caption occurs in training. The last line on stdout is the result as JSON, with 95 %
Wilson intervals.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lance_nano.progress import generator_for
from lance_nano.questions import DESCRIBE, SHORT_KINDS, Question, questions
from lance_nano.recognise import shows, shows_layout
from lance_nano.scenes import (
    SIZE,
    Scene,
    full_caption,
    held_out,
    layout_words,
    picture_scene,
    question_scene,
    render,
)
from lance_nano.tokenizer import UNDERSTANDING_SYSTEM
from lance_quant.cli import script, task_arguments
from lance_quant.errors import InputError
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.media import samples
from lance_quant.lance.runtime import Runtime
from quantized_linear import swap_linears

RESOLUTION = "image_112res"
MAX_ANSWER_TOKENS = 48


class Caption(NamedTuple):
    kind: str
    text: str
    scene: Scene


class Share(NamedTuple):
    """How many of how many were right."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return round(self.right / max(1, self.total), 4)

    def interval(self, z: float = 1.959964) -> list[float]:
        """The 95 % Wilson score interval, which is honest near 1 as well."""
        n, p = max(1, self.total), self.right / max(1, self.total)
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return [round(max(0.0, (centre + sign * spread) / (1 + z * z / n)), 4) for sign in (-1, 1)]


def held_out_scenes(rng: random.Random) -> Iterator[Scene]:
    """Question scenes with layouts that training never sees."""
    while True:
        scene = question_scene(rng)
        if held_out(layout_words(scene)):
            yield scene


def held_out_questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` short questions on held-out scenes, the kinds taking turns, one question per scene."""
    rng = generator_for(seed, 11)
    scenes, asked = held_out_scenes(rng), []
    while len(asked) < count:
        scene, kind = next(scenes), SHORT_KINDS[len(asked) % len(SHORT_KINDS)]
        fitting = [question for question in questions(scene, rng) if question.kind == kind]
        if fitting:
            asked.append((scene, fitting[0]))
    return asked


def held_out_descriptions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` held-out scenes to describe in full."""
    scenes = held_out_scenes(generator_for(seed, 12))
    drawn = [next(scenes) for _ in range(count)]
    return [(scene, Question("description", DESCRIBE, full_caption(scene))) for scene in drawn]


def held_out_captions(count: int, seed: int) -> list[Caption]:
    """`count` different captions that training never sees, by how many things they name."""
    rng, found = generator_for(seed, 13), {}
    while len(found) < count:
        scene, text = picture_scene(rng)
        if held_out(text):
            kinds = {thing.kind for thing in scene.things}
            kind = "one" if len(scene.things) == 1 else "alike" if len(kinds) == 1 else "pair"
            found.setdefault(text, Caption(kind, text, scene))
    return list(found.values())


def request(scene: Scene, question: Question, folder: Path) -> samples.Question:
    """A question about a scene as the runtime takes it; the picture passes through a PNG in `folder`."""
    path = folder / "scene.png"
    Image.fromarray(render(scene)).save(path)
    return samples.Question("0", path, UNDERSTANDING_SYSTEM, question.text, question.answer)


def answer(pipeline: Runtime, scene: Scene, question: Question, folder: Path) -> str:
    """The runtime's answer to a question about a scene."""
    packed, vit_tokens = pipeline.prompt_of(request(scene, question, folder), RESOLUTION)
    return pipeline.answer(packed, vit_tokens, MAX_ANSWER_TOKENS).text


def draw(pipeline: Runtime, text: str, seed: int) -> Image.Image:
    """The runtime's picture for a caption, at the official sampler's defaults."""
    return pipeline.decode(pipeline.sample(pipeline.denoiser(text, SIZE, SIZE, Sampling()), seed))


def load(
    model_path: Path, awq_dir: Path | None, device_name: str, dtype_name: str, kernel: str = "auto"
) -> Runtime:
    """The runtime on the float weights, or on those of a packed folder."""
    device = device_of(device_name)
    dtype = dtype_of(dtype_name, device)
    paths = LancePaths.find(model_path)
    if awq_dir is None:
        return Runtime.load(paths, device, dtype)
    packed = PackedFolder(awq_dir)
    prepare = functools.partial(swap_linears, folder=packed, dtype=dtype, device=device, kernel=kernel)
    return Runtime.load(paths, device, dtype, packed.checkpoint.path, prepare)


def measure_answers(pipeline: Runtime, asked: list[tuple[Scene, Question]]) -> dict[str, Share]:
    """Exact answers by kind of question."""
    marks = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for scene, question in tqdm(asked, desc="answers", disable=None):
            given = answer(pipeline, scene, question, Path(folder))
            marks[question.kind].append(given == question.answer)
            if given != question.answer:
                script.log.info(
                    "%s | %s | %s, not %s", layout_words(scene), question.text, given, question.answer
                )
    return {kind: Share(sum(rows), len(rows)) for kind, rows in marks.items()}


def measure_pictures(
    pipeline: Runtime, captions: list[Caption], seed: int, keep: Path | None
) -> tuple[dict[str, Share], Share]:
    """Recognised pictures by kind of caption, and those with places and background right as well."""
    marks, placed = defaultdict(list), 0
    for index, caption in enumerate(tqdm(captions, desc="pictures", disable=None)):
        image = draw(pipeline, caption.text, seed * 1_000_003 + index)
        picture = np.asarray(image)
        marks[caption.kind].append(shows(caption.scene, picture))
        placed += shows_layout(caption.scene, picture)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            image.save(keep / f"{index:06d}.png")
        if not marks[caption.kind][-1]:
            script.log.info("picture %d: %s", index, caption.text)
    return {kind: Share(sum(rows), len(rows)) for kind, rows in marks.items()}, Share(placed, len(captions))


def total(shares: dict[str, Share]) -> Share:
    """All kinds together."""
    return Share(sum(share.right for share in shares.values()), sum(share.total for share in shares.values()))


def result(
    answers: dict[str, Share], described: Share, pictures: dict[str, Share], placed: Share, seed: int
) -> dict:
    """The JSON of one evaluation."""
    return {
        "understanding_exact": total(answers).value,
        "understanding_interval": total(answers).interval(),
        "understanding_n": total(answers).total,
        "understanding_by_kind": {kind: share.value for kind, share in answers.items()},
        "description_exact": described.value,
        "description_interval": described.interval(),
        "description_n": described.total,
        "generation_recognised": total(pictures).value,
        "generation_interval": total(pictures).interval(),
        "generation_n": total(pictures).total,
        "generation_by_kind": {kind: share.value for kind, share in pictures.items()},
        "generation_with_layout": placed.value,
        "seed": seed,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--model_path", type=Path, required=True, help="folder with llm_config.json; ViT and VAE beside"
    )
    parser.add_argument("--awq_dir", type=Path, help="quantized folder that replaces the float weights")
    task_arguments.add_kernel(parser)
    parser.add_argument("--n", type=int, default=200, help="questions, and captions")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, questions, captions and noise")
    parser.add_argument("--pictures", type=Path, help="folder to keep the generated pictures in")
    script.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    if args.n < 1:
        raise InputError(f"--n {args.n}: at least one question and one caption are needed")
    pipeline = load(args.model_path, args.awq_dir, args.device, args.dtype, args.kernel)
    answers = measure_answers(pipeline, held_out_questions(args.n, args.seed))
    described = total(measure_answers(pipeline, held_out_descriptions(max(1, args.n // 4), args.seed)))
    pictures, placed = measure_pictures(
        pipeline, held_out_captions(args.n, args.seed), args.seed, args.pictures
    )
    print(json.dumps(result(answers, described, pictures, placed, args.seed)))


if __name__ == "__main__":
    script.run(main)
