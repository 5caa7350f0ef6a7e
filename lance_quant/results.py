"""The results folder of a run, and reading one back as a baseline.

    prompt.json           generation: {file made: prompt}; understanding: {visual: raw answer with special tokens}
    result.json           understanding: [{"image" or "video", "question", "answer", "key", "reference"}, ...]
    000000.png, .mp4 ...  pictures, clips
    latents.safetensors   with --save_latents, generation: KEY.latent, and KEY.x, KEY.velocity, KEY.t of every step
    logits.safetensors    with --save_latents, understanding: KEY.ids, KEY.logprobs of every answer token
    run.json              settings, model, device, versions, seconds and peak memory per stage
"""

import contextlib
import functools
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lance_quant import __version__
from lance_quant.errors import InputError
from lance_quant.files import read_json, write_json
from lance_quant.lance.pipeline import Pipeline
from lance_quant.lance.samples import TASKS, Prompt, Question
from lance_quant.lance.video import read_video, write_video
from lance_quant.packed import PackedFolder
from lance_quant.tasks import Answered, Drawn, Settings, answer_all, draw_all, force_all
from lance_quant.tensorfile import TensorFile, TensorFileWriter, TensorSpec

log = logging.getLogger("lance_quant")

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
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block's wall time and peak memory as those of a stage."""
        reset_peak_memory(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
            self.peaks[name] = peak_memory(self.device)

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
            "peak_memory_bytes": {kind: max(peak[kind] for peak in self.peaks.values())
                                  for kind in peak_memory(self.device)},
            "peak_memory_bytes_by_stage": self.peaks,
            "versions": versions(),
            "arguments": self.arguments,
        }


def describe(sample: Question | Prompt) -> dict[str, str]:
    """A sample as run.json lists it; runs on different samples do not compare."""
    if isinstance(sample, Prompt):
        source = {} if sample.visual is None else {"source": sample.visual.name}
        return {"key": sample.key, "prompt": sample.text, **source}
    return {"key": sample.key, sample.kind: sample.visual.name, "system": sample.system, "question": sample.question}


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


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew (for the host on Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest use since reset_peak_memory: of the process on the host, and of torch on a CUDA device."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        peak = {"host": int(line.split()[1]) * 1024}
    else:
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def run_task(pipeline: Pipeline, samples: list[Question] | list[Prompt], settings: Settings, record: RunRecord,
             folder: Path, keep_trace: bool, on_text: Callable[[str], None] | None = None) -> None:
    """Run a task over its samples and write the results folder (an existing, empty one); `on_text`: see answer_all."""
    if settings.kind.makes == "text":
        with record.stage("run"):
            answered = list(answer_all(pipeline, samples, settings, on_text))
            _write_answers(answered, folder)
        if keep_trace:
            with record.stage("trace"):
                _save(folder / LOGITS, _answer_trace(answered, force_all(pipeline, answered, settings)))
    else:
        with record.stage("run"):
            drawn = list(draw_all(pipeline, samples, settings, keep_trace))
            write_json(folder / "prompt.json", {made(one.prompt, settings): one.prompt.text for one in drawn})
            if keep_trace:
                _save(folder / LATENTS, _trace(drawn))
        with record.stage("decode"), pipeline.using("vae"):
            for one in tqdm(drawn, desc="decode", unit=settings.kind.makes):
                _write_frames(pipeline.decode_frames(one.latent), folder / made(one.prompt, settings))
    write_json(folder / "run.json", record.as_json(settings, samples))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of these tensors."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def made(prompt: Prompt, settings: Settings) -> str:
    """Name of the file that a request makes."""
    return f"{prompt.key}.{'mp4' if settings.kind.makes == 'video' else 'png'}"


def open_made(path: Path) -> list[Image.Image]:
    """The frames of a file that a request made; one of a picture."""
    return read_video(path, every=True) if path.suffix == ".mp4" else [Image.open(path)]


def _write_frames(frames: list[Image.Image], path: Path) -> None:
    if path.suffix == ".mp4":
        write_video(path, frames)
    else:
        frames[0].save(path)


def _write_answers(answered: list[Answered], folder: Path) -> None:
    rows, raw = [], {}
    for one in answered:
        question = one.question
        rows.append({question.kind: str(question.visual), "question": question.question, "answer": one.answer.text,
                     "key": question.key, "reference": question.reference})
        # The official file is keyed by visual; a second question about one visual gets its sample's key added.
        name = question.visual.name
        raw[name if name not in raw else f"{name}#{question.key}"] = one.answer.raw
    write_json(folder / "result.json", rows)
    write_json(folder / "prompt.json", raw)


def _answer_trace(answered: list[Answered], logprobs: Iterable[Tensor]) -> dict[str, Tensor]:
    trace = {}
    for (question, answer), forced in zip(answered, logprobs, strict=True):
        trace[f"{question.key}.ids"] = torch.tensor(answer.ids)
        trace[f"{question.key}.logprobs"] = forced
    return trace


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
        InputError: it is no results folder of this version.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.run = read_json(self.folder / "run.json", "run.json of a results folder")
        found = self.run.get("format") if isinstance(self.run, dict) else None
        if found != FORMAT or not {"settings", "samples", "model", "dtype"} <= self.run.keys():
            raise InputError(f"{folder}/run.json is none that this version wrote (format {found}, not {FORMAT}, or "
                             "incomplete); make the baseline again with run_baseline.py")
        self.text = TASKS[self.run["settings"]["task"]].makes == "text"

    @functools.cached_property
    def trace(self) -> TensorFile:
        """What --save_latents kept; InputError if the run kept nothing."""
        path = self.folder / (LOGITS if self.text else LATENTS)
        if not path.is_file():
            raise InputError(f"{self.folder} cannot be compared with: it has no {path.name}; make it again with "
                             "run_baseline.py --save_latents, or leave --baseline out")
        return TensorFile(path)

    def require_same(self, settings: Settings, samples: list[Question] | list[Prompt], dtype: torch.dtype) -> None:
        """Raise InputError unless the folder was made with these settings, samples and dtype, and is complete.

        The dtype belongs to it: it rounds the noise, which must be the same bit for bit.
        """
        _ = self.trace
        asked = {**settings.as_json(), "dtype": str(dtype).removeprefix("torch.")}
        there = {**self.run["settings"], "dtype": self.run["dtype"]}
        differing = [f"{name} {there.get(name)!r} there and {value!r} here" for name, value in asked.items()
                     if there.get(name) != value]
        if differing:
            raise InputError(f"baseline {self.folder} was made with other settings: {'; '.join(differing)}")
        if self.run["samples"] != [describe(sample) for sample in samples]:
            raise InputError(f"baseline {self.folder} was made from other samples; use its --example_json and --limit")
        files = ["result.json"] if self.text else [made(sample, settings) for sample in samples]
        gone = [name for name in files if not (self.folder / name).is_file()]
        if gone:
            raise InputError(f"baseline {self.folder} lacks {len(gone)} of its files, first {gone[:5]}; make it again")

    def answers(self) -> dict[str, str]:
        """Sample key -> answer, of an x2t run."""
        return {row["key"]: row["answer"] for row in read_json(self.folder / "result.json", "result.json")}


def require_source(packed: PackedFolder, fingerprint: str | None, what: str) -> None:
    """Raise InputError if a packed folder was made from other weights than these; warn where one of them is silent.

    Published folders do not say what they were made from.

    Args:
        fingerprint: of the float weights that `what` names (stats.model_fingerprint), None if unknown.
    """
    source = packed.meta.get("source_fingerprint")
    if source is None or fingerprint is None:
        log.warning("%s does not say which weights it was made from; make sure that %s has the same", packed.path, what)
    elif source != fingerprint:
        raise InputError(f"{packed.path} was made from other weights (fingerprint {source[:12]}) than {what} "
                         f"({fingerprint[:12]})")
