"""Sample files (manifests): what a task is asked, in the official example format, and what every task takes and makes.

    t2i, t2v                 {"000000.png": "a prompt", ...}
    i2v, image_edit,         {"0001": {"interleave_array": ["an instruction", "source.png"],
    video_edit                         "element_dtype_array": ["text", "image"],
                                       "istarget_in_interleave": [0, 0]}, ...}
    x2t_image, x2t_video     {"0001": {"interleave_array": ["picture.png", ["system prompt", "question", "answer"]],
                                       "element_dtype_array": ["image", "text"],
                                       "istarget_in_interleave": [0, 1]}, ...}

For x2t_video and video_edit the visual is a "video". A text element of x2t that is a plain string is a captioning
request with that reference. Files on one line work, and any number of questions may name one picture. Visuals whose
"istarget_in_interleave" is 1 are left out: GEdit_en.json lists the target picture of every edit. JSONL works as well,
one {"index": 0, "data": ...} a line, as in GenEVAL.jsonl and DPG.jsonl.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from PIL import Image
from pydantic import Field

from lance_quant.errors import InputError
from lance_quant.lance.media.video import read_video
from lance_quant.lance.media.vision import open_image
from lance_quant.lance.settings import TASKS, Modality
from lance_quant.lance.tokens import CAPTION_SYSTEMS
from lance_quant.storage.atomic import parse_json, read_json
from lance_quant.storage.schema import Schema, parse

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


class _Interleaved(Schema):
    """An entry of a sample file with visuals: three lists of one length."""

    element_dtype_array: list[Literal["text", "image", "video"]]
    interleave_array: list[str | list[str]]
    istarget_in_interleave: list[Annotated[int, Field(ge=0, le=1)] | bool] = []


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


def modality_of(path: Path) -> Modality | None:
    """What the first entry of a sample file shows the model, None where it is a prompt alone."""
    entry = next(iter(_entries(path)[0].values()))
    shown = entry.get("element_dtype_array", []) if isinstance(entry, dict) else []
    return next((modality for modality in get_args(Modality) if modality in shown), None)


def content_hash(samples: Sequence[Question | Prompt]) -> str:
    """SHA-256 of what the samples ask and show, wherever their files lie: the same keys may stand for other prompts."""
    digest = hashlib.sha256()
    for sample in samples:
        fields = {name: value for name, value in asdict(sample).items() if name != "visual"}
        digest.update(json.dumps(fields, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
        if sample.visual is not None:
            with open(sample.visual, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def open_visual(path: Path, modality: Modality, exif: bool = False) -> Sequence[Image.Image]:
    """The frames that the model sees of a picture (one) or clip; `exif` turns pictures as their EXIF says."""
    return [open_image(path, exif)] if modality == "image" else read_video(path)


def _prompts(path: Path) -> list[Prompt]:
    prompts = []
    entries, of_lines = _entries(path)
    for name, text in entries.items():
        if not isinstance(text, str):
            raise InputError(f"{path}: entry {name!r} must map a number to a prompt string")
        prompts.append(Prompt(_file_name(name, path, of_lines), text))
    return prompts


def _file_name(name: str, path: Path, of_lines: bool) -> str:
    """The key of an entry: its number or, in JSONL, a word that can name a file (DPG has COCOval2014000000010363)."""
    match = re.fullmatch(r"(\d+)(\.(png|jpe?g|mp4))?", name)
    if match is None and of_lines and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        return name
    if match is None:
        raise InputError(f"{path}: entry {name!r} must be a number such as \"0001\" or \"000000.png\": "
                         "it names the file that is made")
    return f"{int(match[1]):06d}"


def _instructions(task: str, modality: Modality, path: Path, fix_quirks: bool) -> list[Prompt]:
    prompts = []
    entries, of_lines = _entries(path)
    for key, entry in entries.items():
        elements = _elements(entry, modality, f"{path}: entry {key!r} is no {task} sample (one {modality!r}, and one "
                                              "\"text\" with the instruction)")
        if not isinstance(elements["text"], str):
            raise InputError(f"{path}: entry {key!r} must give its instruction as one string")
        named = modality if fix_quirks else entry["element_dtype_array"][-1]
        prompts.append(Prompt(_file_name(key, path, of_lines), elements["text"],
                              _find(elements[modality], modality, path), named))
    return prompts


def _questions(task: str, modality: Modality, path: Path, fix_quirks: bool) -> list[Question]:
    draw = random.Random(_CAPTION_SEED)
    questions = []
    for key, entry in _entries(path)[0].items():
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
    """The entry's text and visual by their dtypes; exactly one of each beside visuals that are the target.

    Evaluation manifests of edits list a target picture, which the official code leaves out, too. A text that is the
    target is the reference answer, and stays.
    """
    given = parse(_Interleaved, entry, f"{rule}: it")
    dtypes, values = given.element_dtype_array, given.interleave_array
    said = "istarget_in_interleave" in given.model_fields_set
    targets = given.istarget_in_interleave if said else [0] * len(values)
    if not len(dtypes) == len(values) == len(targets):
        raise InputError(f"{rule}: its lists differ in length")
    shown = [(dtype, value) for dtype, value, target in zip(dtypes, values, targets, strict=True)
             if dtype == "text" or not target]
    if sorted(dtype for dtype, _ in shown) != sorted(["text", modality]):
        raise InputError(f"{rule}: beside targets it lists {', '.join(dtype for dtype, _ in shown) or 'nothing'}")
    found: dict[str, Any] = dict(shown)
    if not isinstance(found[modality], str):
        raise InputError(f"{rule}: it names its {modality} by a list")
    return found


def _entries(path: Path) -> tuple[Mapping[str, Any], bool]:
    """Entries by key, or by index where the file is JSONL: every line is {"index": ..., "data": ...}; whether it is."""
    path = Path(path)
    entries = _lines(path) if path.is_file() else None
    if entries is not None:
        return entries, True
    entries = read_json(path, "sample file")
    if not isinstance(entries, dict):
        raise InputError(f"sample file {path} must be a JSON object, not a {type(entries).__name__}")
    if not entries:
        raise InputError(f"sample file {path} holds no samples")
    return entries, False


def _lines(path: Path) -> dict[str, Any] | None:
    """The entries of a JSONL file; None if the first line shows that it is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line.encode(), f"sample file {path}, line {number}")
        except InputError:
            if entries:
                raise
            found = None
        if not isinstance(found, dict) or not {"index", "data"} <= found.keys():
            if not entries:
                return None
            raise InputError(f"sample file {path}, line {number}: must be a JSON object with \"index\" and \"data\", "
                             "as the lines before")
        if str(found["index"]) in entries:
            raise InputError(f"sample file {path}, line {number}: index {found['index']} is there already")
        entries[str(found["index"])] = found["data"]
    return entries or None


def _find(visual: str, modality: Modality, manifest: Path) -> Path:
    """A readable picture or clip by its path: as it stands, or below the sample file's folder or one of three above it.

    Official files name pictures from the root of the checkout: two folders above config/examples, three above
    benchmarks/image_gen/GEdit.
    """
    folder = Path(manifest).resolve().parent
    tried = [Path(visual), *(base / visual for base in (folder, *folder.parents[:3]))]
    for candidate in tried:
        if candidate.is_file():
            open_visual(candidate, modality)
            return candidate
    raise InputError(f"{modality} {visual} of {manifest} not found; looked at {', '.join(map(str, tried))}")
