"""Sample files (manifests): what a task is asked, in the official example format, and what every task takes and makes.

    t2i, t2v                 {"000000.png": "a prompt", ...}
    i2v, image_edit,         {"0001": {"interleave_array": ["an instruction", "source.png"],
    video_edit                         "element_dtype_array": ["text", "image"],
                                       "istarget_in_interleave": [0, 0]}, ...}
    x2t_image, x2t_video     {"0001": {"interleave_array": ["picture.png", ["system prompt", "question", "answer"]],
                                       "element_dtype_array": ["image", "text"],
                                       "istarget_in_interleave": [0, 1]}, ...}

For x2t_video and video_edit the visual is a "video". A text element of x2t that is a plain string is a captioning
request with that reference. Files on one line work, and any number of questions may name one picture.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lance_quant.errors import InputError
from lance_quant.lance.media.video import read_video
from lance_quant.lance.media.vision import open_image
from lance_quant.lance.settings import TASKS, Modality
from lance_quant.lance.tokens import CAPTION_SYSTEMS
from lance_quant.storage.atomic import read_json

_CAPTION_SEED = 2025  # the official global seed; the draws themselves depend on everything that ran before


@dataclass(frozen=True)
class Question:
    """One x2t request about a picture or clip."""

    key: str
    visual: Path
    system: str
    question: str
    reference: str
    modality: Modality = "image"


@dataclass(frozen=True)
class Prompt:
    """One generation request; `key` names the file it makes, without extension.

    visual: the first frame (i2v) or the source (edits), None where the task takes none.
    named: the word for the source in an edit's system prompt.
    """

    key: str
    text: str
    visual: Path | None = None
    named: str = ""


def load(task: str, path: Path, fix_quirks: bool = False) -> list[Question] | list[Prompt]:
    """Read a task's sample file and check that its visuals can be read.

    Args:
        fix_quirks: captioning requests all get the first system prompt, instead of a random one each; an edit's
            system prompt names its visual also where the file lists the visual first (officially, it says "text").

    Raises:
        InputError: says which entry breaks which rule.
    """
    modality = TASKS[task].takes
    if modality is not None and TASKS[task].makes == "text":
        return _questions(task, modality, path, fix_quirks)
    prompts = _prompts(path) if modality is None else _instructions(task, modality, path, fix_quirks)
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise InputError(f"{path}: two entries have the same number and would be written to one file")
    return prompts


def open_visual(path: Path, modality: Modality, exif: bool = False) -> list[Image.Image]:
    """The frames that the model sees of a picture (one) or clip; `exif` turns pictures as their EXIF says."""
    return [open_image(path, exif)] if modality == "image" else read_video(path)


def _prompts(path: Path) -> list[Prompt]:
    prompts = []
    for name, text in _entries(path).items():
        if not isinstance(text, str):
            raise InputError(f"{path}: entry {name!r} must map a number to a prompt string")
        prompts.append(Prompt(_number(name, path), text))
    return prompts


def _number(name: str, path: Path) -> str:
    match = re.fullmatch(r"(\d+)(\.(png|jpe?g|mp4))?", name)
    if match is None:
        raise InputError(f"{path}: entry {name!r} must be a number such as \"0001\" or \"000000.png\": "
                         "it names the file that is made")
    return f"{int(match[1]):06d}"


def _instructions(task: str, modality: Modality, path: Path, fix_quirks: bool) -> list[Prompt]:
    prompts = []
    for key, entry in _entries(path).items():
        elements = _elements(entry, modality, f"{path}: entry {key!r} is no {task} sample (one {modality!r}, and one "
                                              "\"text\" with the instruction)")
        if not isinstance(elements["text"], str):
            raise InputError(f"{path}: entry {key!r} must give its instruction as one string")
        named = modality if fix_quirks else entry["element_dtype_array"][-1]
        prompts.append(Prompt(_number(key, path), elements["text"], _find(elements[modality], modality, path), named))
    return prompts


def _questions(task: str, modality: Modality, path: Path, fix_quirks: bool) -> list[Question]:
    draw = random.Random(_CAPTION_SEED)
    questions = []
    for key, entry in _entries(path).items():
        rule = (f"{path}: entry {key!r} is no {task} sample (one {modality!r}, and one \"text\" of [system prompt, "
                "question, reference answer])")
        elements = _elements(entry, modality, rule)
        text = elements["text"]
        if isinstance(text, str):
            system = CAPTION_SYSTEMS[0] if fix_quirks else draw.choice(CAPTION_SYSTEMS)
            text = [system.format(modality), "", text]
        if not (isinstance(text, list) and len(text) == 3 and all(isinstance(part, str) for part in text)):
            raise InputError(rule)
        system, question, reference = text
        visual = _find(elements[modality], modality, path)
        questions.append(Question(str(key), visual, system, question, reference, modality))
    return questions


def _elements(entry: Any, modality: Modality, rule: str) -> dict[str, Any]:
    """The entry's text and visual by their dtypes; exactly one of each."""
    try:
        dtypes, values = entry["element_dtype_array"], entry["interleave_array"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{rule}: {error!r}") from error
    if sorted(dtypes) != sorted(["text", modality]) or len(values) != 2:
        raise InputError(f"{rule}: it lists {len(values)} elements of {list(dtypes)}")
    return dict(zip(dtypes, values, strict=True))


def _entries(path: Path) -> Mapping[str, Any]:
    entries = read_json(Path(path), "sample file")
    if not isinstance(entries, dict):
        raise InputError(f"sample file {path} must be a JSON object, not a {type(entries).__name__}")
    if not entries:
        raise InputError(f"sample file {path} holds no samples")
    return entries


def _find(visual: str, modality: Modality, manifest: Path) -> Path:
    """A readable picture or clip by its path: as it stands, or below the sample file's folder or one of two above it.

    Two above, because the official sample files lie in config/examples and name files from the checkout's root.
    """
    folder = Path(manifest).resolve().parent
    tried = [Path(visual), *(base / visual for base in (folder, *folder.parents[:2]))]
    for candidate in tried:
        if candidate.is_file():
            open_visual(candidate, modality)
            return candidate
    raise InputError(f"{modality} {visual} of {manifest} not found; looked at {', '.join(map(str, tried))}")
