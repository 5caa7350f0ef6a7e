"""The results folder of an official run, in the form of a native one, so that it serves as a baseline."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lance_quant.distributed import ALONE
from lance_quant.evaluation import run_folder
from lance_quant.evaluation.sample_store import require_resumable, run_work
from lance_quant.inference.request import float_facts
from lance_quant.inference.tasks import Answered
from lance_quant.lance.media.samples import Prompt, Question, content_hash
from lance_quant.lance.media.video import write_video
from lance_quant.lance.media.vision import open_image
from lance_quant.lance.runtime import Answer
from lance_quant.lance.settings import Settings
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.official.checkout import describe
from lance_quant.official.process import Finished, run
from lance_quant.official.request import OfficialRequest
from lance_quant.storage.atomic import write_json


def run_official(request: OfficialRequest, out: Path, keep_trace: bool, resume: bool = False) -> None:
    """Run a task over its samples and write the results folder, as run_folder.run_task does natively.

    Args:
        out: the folder, made whole or not at all; finished samples are kept beside it (sample_store.run_work).
        keep_trace: also write what run_quant_eval.py compares with.
        resume: go on with an unfinished run, or begin one.

    Raises:
        InputError: `out` exists, an unfinished run is there that is not to be resumed or is another one, or the
            official code failed.
    """
    require_resumable(out, resume, ALONE)
    model = float_facts(request.paths.model)
    job = {"backend": "official", "source": describe(request.checkout), "settings": request.settings.as_json(),
           "samples": [run_folder.describe(sample) for sample in request.samples],
           "content": content_hash(request.samples), "model": model, "device": request.device, "dtype": request.dtype,
           "save_latents": keep_trace}
    with run_work(out, job, resume, ALONE) as work:
        _run_into(request, model, work.folder, keep_trace, work.store("run").folder)


def _run_into(request: OfficialRequest, model: Mapping[str, Any], folder: Path, keep_trace: bool, kept: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lance_official_") as scratch:
        done = run(request, Path(scratch), keep_trace, kept)
        questions = [one for one in request.samples if isinstance(one, Question)]
        prompts = [one for one in request.samples if isinstance(one, Prompt)]
        if questions:
            _write_answers(done, questions, folder)
        else:
            _copy_drawn(done, prompts, request.settings, folder)
            write_json(folder / "prompt.json", {run_folder.made(one, request.settings): one.text for one in prompts})
        if keep_trace:
            run_folder.save_traces(folder / (run_folder.LOGITS if questions else run_folder.LATENTS),
                                   _traces(done, request))
        write_json(folder / "run.json", _run_json(request, model, done.reply))


def _copy_drawn(done: Finished, prompts: Sequence[Prompt], settings: Settings, folder: Path) -> None:
    for number, prompt in enumerate(prompts):
        written, out = next(done.made.glob(f"{number:06d}.*")), folder / run_folder.made(prompt, settings)
        if written.suffix == out.suffix:
            shutil.copyfile(written, out)
        else:  # a clip of one frame is a .png there
            write_video(out, [open_image(written)])


def _write_answers(done: Finished, questions: Sequence[Question], folder: Path) -> None:
    raw = json.loads((done.made / "prompt.json").read_text(encoding="utf-8"))
    run_folder.write_answers([Answered(one, Answer([], raw[f"{number:06d}{one.visual.suffix}"]))
                              for number, one in enumerate(questions)], folder)


def _traces(done: Finished, request: OfficialRequest) -> Iterator[dict[str, Tensor]]:
    """What --save_latents keeps, as the native run names it."""
    size = len(LanceTokenizer(request.paths.model))
    for path, sample in zip(done.records, request.samples, strict=True):
        found = load_file(path)
        if "ids" in found:
            found["logprobs"] = found["logits"][:, :size].log_softmax(-1)
        if "first" in found:  # the fixed frame of i2v
            found["condition"] = found["first"]
        names = ("ids", "logprobs") if "ids" in found else ("latent", "x", "velocity", "t", "condition")
        yield {f"{sample.key}.{name}": found[name] for name in names if name in found}


def _run_json(request: OfficialRequest, model: Mapping[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json, with the native run's keys as far as they apply, and `backend` and `source`."""
    return {"format": run_folder.FORMAT, "backend": "official", "source": describe(request.checkout),
            "settings": request.settings.as_json(),
            "samples": [run_folder.describe(sample) for sample in request.samples], "model": model,
            "device": reply["device"] or run_folder.device_name(torch.device("cpu")), "dtype": reply["dtype"],
            "seconds": {name: round(value, 3) for name, value in reply["seconds"].items()},
            **({"resumed": reply["resumed"]} if reply["resumed"] else {}),
            "peak_memory_bytes": reply["peak"], "versions": reply["versions"], "arguments": request.arguments}
