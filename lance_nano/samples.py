"""Sample files for the scripts: scenes with questions, and captions, in the official example format.

    python -m lance_nano.samples --out samples --n 16

Writes  OUT/calibrate_x2t_image.json, OUT/calibrate_t2i.json: questions and captions as seen in training
        OUT/test_x2t_image.json, OUT/test_t2i.json: held-out ones
        OUT/pictures/: the scenes that the questions are about
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lance_nano.evaluate import held_out_captions, held_out_questions
from lance_nano.progress import generator_for
from lance_nano.questions import Question, description, questions
from lance_nano.scenes import Scene, held_out, picture_scene, question_scene, render
from lance_nano.tokenizer import UNDERSTANDING_SYSTEM
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.storage.atomic import whole_folder, write_json


def seen_questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """Questions as in training, every fourth one a full description: long answers calibrate more."""
    rng = generator_for(seed, 21)
    asked = []
    while len(asked) < count:
        scene = question_scene(rng)
        asked.append((scene, description(scene, rng) if len(asked) % 4 == 3 else questions(scene, rng)[0]))
    return asked


def seen_captions(count: int, seed: int) -> list[str]:
    """Different captions as in training."""
    rng, texts = generator_for(seed, 22), {}
    while len(texts) < count:
        text = picture_scene(rng)[1]
        if not held_out(text):
            texts[text] = None
    return list(texts)


def question_file(folder: Path, name: str, asked: list[tuple[Scene, Question]]) -> None:
    """Write an x2t_image sample file and its pictures."""
    (folder / "pictures").mkdir(exist_ok=True)
    entries = {}
    for index, (scene, question) in enumerate(asked):
        picture = f"pictures/{name}_{index:04d}.png"
        Image.fromarray(render(scene)).save(folder / picture)
        entries[f"{index:04d}"] = {
            "interleave_array": [picture, [UNDERSTANDING_SYSTEM, question.text, question.answer]],
            "element_dtype_array": ["image", "text"],
            "istarget_in_interleave": [0, 1],
        }
    write_json(folder / f"{name}_x2t_image.json", entries)


def caption_file(folder: Path, name: str, texts: list[str]) -> None:
    """Write a t2i sample file."""
    write_json(folder / f"{name}_t2i.json", {f"{index:06d}.png": text for index, text in enumerate(texts)})


def write(out: Path, count: int, seed: int) -> None:
    """Write all four sample files, `count` samples each."""
    with whole_folder(out) as folder:
        question_file(folder, "calibrate", seen_questions(count, seed))
        caption_file(folder, "calibrate", seen_captions(count, seed))
        question_file(folder, "test", held_out_questions(count, seed))
        caption_file(folder, "test", [caption.text for caption in held_out_captions(count, seed)])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--n", type=int, default=16, help="samples per file")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, questions and captions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    if args.n < 1:
        raise InputError(f"--n {args.n}: a sample file needs at least one sample")
    write(args.out, args.n, args.seed)
    print(args.out)


if __name__ == "__main__":
    script.run(main)
