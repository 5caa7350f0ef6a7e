"""Sample files: what a task is asked, in the official example format.

    t2i         {"000000.png": "a prompt", ...}
    x2t_image   {"0001": {"interleave_array": ["picture.png", ["system prompt", "question", "reference answer"]],
                          "element_dtype_array": ["image", "text"], "istarget_in_interleave": [0, 1]}, ...}

A text element that is a plain string is a captioning request with that reference. Files on one line work, and any
number of questions may name one picture.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_quant.errors import InputError
from lance_quant.files import read_json
from lance_quant.lance.tokens import CAPTION_SYSTEMS
from lance_quant.lance.vision import open_image

_CAPTION_SEED = 2025  # the official global seed; the draws themselves depend on everything that ran before


@dataclass(frozen=True)
class Question:
    """One x2t_image request."""

    key: str
    image: Path
    system: str
    question: str
    reference: str


@dataclass(frozen=True)
class Prompt:
    """One t2i request; `key` names the picture it makes, without extension."""

    key: str
    text: str


def load_prompts(path: Path) -> list[Prompt]:
    """Read a t2i sample file; InputError says which entry breaks which rule."""
    prompts = []
    for name, text in _entries(path).items():
        match = re.fullmatch(r"(\d+)(\.(png|jpe?g|mp4))?", name)
        if match is None or not isinstance(text, str):
            raise InputError(f"{path}: entry {name!r} must map a number such as \"000000.png\" to a prompt string")
        prompts.append(Prompt(f"{int(match[1]):06d}", text))
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise InputError(f"{path}: two entries have the same number and would be written to one file")
    return prompts


def load_questions(path: Path, fix_quirks: bool = False) -> list[Question]:
    """Read an x2t_image sample file and check that its pictures can be read.

    Args:
        fix_quirks: captioning requests all get the first system prompt, instead of a random one each.
    """
    draw = random.Random(_CAPTION_SEED)
    questions = []
    for key, entry in _entries(path).items():
        try:
            elements = dict(zip(entry["element_dtype_array"], entry["interleave_array"], strict=True))
            image, text = elements["image"], elements["text"]
            if isinstance(text, str):
                system = CAPTION_SYSTEMS[0] if fix_quirks else draw.choice(CAPTION_SYSTEMS)
                text = [system.format("image"), "", text]
            system, question, reference = text
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: entry {key!r} is no x2t_image sample (one \"image\", and one \"text\" of "
                             f"[system prompt, question, reference answer]): {error!r}") from error
        found = _find(Path(image), path)
        open_image(found)
        questions.append(Question(str(key), found, system, question, reference))
    return questions


def _entries(path: Path) -> Mapping[str, Any]:
    entries = read_json(Path(path), "sample file")
    if not isinstance(entries, dict):
        raise InputError(f"sample file {path} must be a JSON object, not a {type(entries).__name__}")
    if not entries:
        raise InputError(f"sample file {path} holds no samples")
    return entries


def _find(image: Path, manifest: Path) -> Path:
    """A picture by its path: as it stands, or below the sample file's folder or the folder above that."""
    folder = Path(manifest).resolve().parent
    tried = [image, folder / image, folder.parent / image]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise InputError(f"image {image} of {manifest} not found; looked at {', '.join(map(str, tried))}")
