"""The results folder of a run, and reading one back as a baseline.

    prompt.json           generation: {picture: prompt}; understanding: {picture: raw answer with special tokens}
    result.json           understanding: [{"image", "question", "answer", "key", "reference"}, ...], one per sample
    000000.png ...        pictures
    latents.safetensors   with --save_latents, generation: KEY.latent, and KEY.x, KEY.velocity, KEY.t of every step
    logits.safetensors    with --save_latents, understanding: KEY.ids, KEY.logprobs of every answer token
    run.json              settings, model, device, versions, seconds per stage, peak memory
"""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lance_quant import __version__
from lance_quant.errors import InputError
from lance_quant.files import read_json, write_json
from lance_quant.lance.pipeline import Pipeline
from lance_quant.lance.samples import Prompt, Question
from lance_quant.tasks import Answered, Drawn, Settings, answer_all, draw_all
from lance_quant.tensorfile import TensorFile

FORMAT = 1
LATENTS, LOGITS = "latents.safetensors", "logits.safetensors"


@dataclass
class RunRecord:
    """What run.json says beside the settings: where the time went and what it ran on."""

    device: torch.device
    dtype: torch.dtype
    model: dict[str, Any]
    arguments: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def as_json(self, settings: Settings, samples: list[Question] | list[Prompt]) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "format": FORMAT,
            "settings": settings.as_json(),
            "samples": [describe(sample) for sample in samples],
            "model": self.model,
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_bytes": peak_memory(self.device),
            "versions": versions(),
            "arguments": self.arguments,
        }


def describe(sample: Question | Prompt) -> dict[str, str]:
    """A sample as run.json lists it; runs on different samples do not compare."""
    if isinstance(sample, Prompt):
        return {"key": sample.key, "prompt": sample.text}
    return {"key": sample.key, "image": sample.image.name, "system": sample.system, "question": sample.question}


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    packages = ("torch", "transformers", "diffusers")
    return {"lance_quant": __version__, "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages}}


def device_name(device: torch.device) -> str:
    """The hardware's name: of the GPU, or of the CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({device.type}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    """The CPU's name; Linux has it in /proc only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest use so far: of the process on the host, and of torch on a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def run_task(pipeline: Pipeline, samples: list[Question] | list[Prompt], settings: Settings, record: RunRecord,
             folder: Path, keep_trace: bool) -> None:
    """Run a task over its samples and write the results folder (an existing, empty one)."""
    with record.stage("run"):
        if settings.task == "x2t_image":
            _write_answers(list(answer_all(pipeline, samples, settings, keep_trace)), folder)
        else:
            drawn = list(draw_all(pipeline, samples, settings, keep_trace))
            write_json(folder / "prompt.json", {f"{one.prompt.key}.png": one.prompt.text for one in drawn})
            if keep_trace:
                save_file(_trace(drawn), folder / LATENTS)
    if settings.task == "t2i":
        with record.stage("decode"):
            for one in drawn:
                pipeline.decode(one.latent).save(folder / f"{one.prompt.key}.png")
    write_json(folder / "run.json", record.as_json(settings, samples))


def _write_answers(answered: list[Answered], folder: Path) -> None:
    rows, raw, trace = [], {}, {}
    for one in answered:
        question = one.question
        rows.append({"image": str(question.image), "question": question.question, "answer": one.answer.text,
                     "key": question.key, "reference": question.reference})
        # The official file is keyed by picture; a second question about one picture gets its sample's key added.
        name = question.image.name
        raw[name if name not in raw else f"{name}#{question.key}"] = one.answer.raw
        if one.logprobs is not None:
            trace[f"{question.key}.ids"] = torch.tensor(one.answer.ids)
            trace[f"{question.key}.logprobs"] = one.logprobs.cpu()
    write_json(folder / "result.json", rows)
    write_json(folder / "prompt.json", raw)
    if trace:
        save_file(trace, folder / LOGITS)


def _trace(drawn: list[Drawn]) -> dict[str, Tensor]:
    trace = {}
    for one in drawn:
        trace[f"{one.prompt.key}.latent"] = one.latent.float().cpu()
        trace[f"{one.prompt.key}.x"] = torch.stack([step.x for step in one.steps]).float().cpu()
        trace[f"{one.prompt.key}.velocity"] = torch.stack([step.velocity for step in one.steps]).float().cpu()
        trace[f"{one.prompt.key}.t"] = torch.tensor([step.t for step in one.steps])
    return trace


def drop_traces(folder: Path) -> None:
    """Remove what --save_latents keeps from the results folders below `folder`."""
    for name in (LATENTS, LOGITS):
        for trace in folder.glob(f"*/{name}"):
            trace.unlink()


class Results:
    """A finished results folder, opened as a baseline.

    Raises:
        InputError: it is no results folder, or was made without --save_latents.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.run = read_json(self.folder / "run.json", "run.json of a results folder")
        if self.run.get("format") != FORMAT:
            raise InputError(f"{folder}/run.json has format {self.run.get('format')}, this version reads {FORMAT}")
        self.task = self.run["settings"]["task"]
        trace = self.folder / (LOGITS if self.task == "x2t_image" else LATENTS)
        if not trace.is_file():
            raise InputError(f"{folder} cannot be compared with: it has no {trace.name}; make it again with "
                             "run_baseline.py --save_latents, or leave --baseline out")
        self.trace = TensorFile(trace)

    def require_same(self, settings: Settings, samples: list[Question] | list[Prompt]) -> None:
        """Raise InputError unless the folder was made with these settings and samples."""
        asked, made = settings.as_json(), self.run["settings"]
        differing = [f"{name} {made.get(name)!r} there and {value!r} here" for name, value in asked.items()
                     if made.get(name) != value]
        if differing:
            raise InputError(f"baseline {self.folder} was made with other settings: {'; '.join(differing)}")
        if self.run["samples"] != [describe(sample) for sample in samples]:
            raise InputError(f"baseline {self.folder} was made from other samples; use its --example_json and --limit")

    def answers(self) -> dict[str, str]:
        """Sample key -> answer, of an x2t_image run."""
        return {row["key"]: row["answer"] for row in read_json(self.folder / "result.json", "result.json")}
