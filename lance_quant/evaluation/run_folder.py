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
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import field_validator
from torch import Tensor

from lance_quant import __version__
from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.evaluation.sample_store import SampleStore
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.memory import peak_memory, reset_peak_memory
from lance_quant.inference.request import RunRequest
from lance_quant.inference.tasks import Answered, Drawn, answer_all, draw_all, force_one
from lance_quant.kernels.base import CALLS
from lance_quant.lance.config import LATENT_CHANNELS
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.media.video import read_video, write_video
from lance_quant.lance.media.vision import open_image
from lance_quant.lance.runtime import Answer, Runtime
from lance_quant.lance.settings import TASKS, Settings
from lance_quant.storage.atomic import read_json, write_json
from lance_quant.storage.schema import Count, Positive, Schema, parse, read
from lance_quant.storage.tensor_file import TensorFile, require_finite, write_tensors

log = logging.getLogger("lance_quant")

FORMAT = 1
LATENTS, LOGITS = "latents.safetensors", "logits.safetensors"
DONE, LATENT, TRACE = "done", "latent", "trace"  # parts of a finished sample, see SampleStore


@dataclass
class RunRecord:
    """What run.json says beside the settings: where the time went and what it ran on."""

    device: torch.device
    dtype: torch.dtype
    model: dict[str, Any]
    arguments: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, dict[str, int | None]] = field(default_factory=dict)
    kernels_before: Counter[str] = field(default_factory=CALLS.counts)
    compiled: dict[str, float] | None = None  # seconds of warming up each compiled step; None: nothing was compiled
    processes: int = 1
    resumed: int = 0  # samples that an earlier run had finished: `seconds` are of the others

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block's wall time and peak memory as those of a stage, which may have several blocks."""
        reset_peak_memory(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            peaks = peak_memory(self.device)
            self.peaks[name] = _highest([self.peaks[name], peaks]) if name in self.peaks else peaks

    def pool(self, team: Team) -> None:
        """Take the highest peaks among the processes of a team for one's own. The leader's times hold its waiting."""
        self.processes = team.size
        everyones = team.everyone(self.peaks)
        self.peaks = {name: _highest(peaks[name] for peaks in everyones) for name in self.peaks}

    def as_json(self, settings: Settings, samples: Sequence[Question | Prompt]) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "format": FORMAT,
            "settings": settings.as_json(),
            "samples": [describe(sample) for sample in samples],
            "model": self.model,
            "device": device_name(self.device),
            "processes": self.processes,
            **({"resumed": self.resumed} if self.resumed else {}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": CALLS.since(self.kernels_before),  # of packed linears: path -> calls
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "compile_seconds": self.compiled and {name: round(value, 3) for name, value in self.compiled.items()},
            "peak_memory_bytes": _highest(self.peaks.values()),
            "peak_memory_bytes_by_stage": self.peaks,
            "versions": versions(),
            "arguments": self.arguments,
        }


def describe(sample: Question | Prompt) -> dict[str, str]:
    """A sample as run.json lists it; runs on different samples do not compare."""
    if isinstance(sample, Prompt):
        source = {} if sample.visual is None else {"source": sample.visual.name}
        return {"key": sample.key, "prompt": sample.text, **source}
    return {"key": sample.key, sample.modality: sample.visual.name, "system": sample.system,
            "question": sample.question}


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    packages = ("transformers", "diffusers")
    return {"lance_quant": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in packages}}


def device_name(device: torch.device) -> str:
    """The hardware's name: of the GPU, or of the CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({device.type}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    """The CPU's name; Linux has it in /proc only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _highest(peaks: Iterable[Mapping[str, int | None]]) -> dict[str, int | None]:
    """The largest figure of each kind; None for a kind that is unknown anywhere."""
    peaks = list(peaks)
    known = {kind: [size for peak in peaks if (size := peak[kind]) is not None] for kind in peaks[0]}
    return {kind: max(sizes) if len(sizes) == len(peaks) else None for kind, sizes in known.items()}


def run_task(runtime: Runtime, request: RunRequest, record: RunRecord, folder: Path, keep_trace: bool,
             store: SampleStore, team: Team = ALONE) -> None:
    """Run a task over its samples and write the results folder (an existing one), sample by sample.

    Args:
        record: of this run; what is measured here is added to it.
        keep_trace: also write every step, or every answer token's log-probabilities.
        store: what an earlier run finished, and where this one puts what it finishes.
        team: shares the samples; its leader's folder gets everything, the others' what they made themselves.
    """
    numbers = team.share(range(len(request.samples)))
    record.resumed = sum(store.has(number, DONE) for number in numbers)
    answers = request.settings.spec.makes == "text"
    for name in ("run", "decode") if not answers else ("run", "trace") if keep_trace else ("run",):
        with record.stage(name):  # also of a process that has no sample left
            pass
    if answers:
        _run_questions(runtime, request, record, folder, keep_trace, store, team)
    else:
        _run_prompts(runtime, request, record, folder, keep_trace, store, team)
    record.pool(team)
    record.compiled = runtime.model.steps.seconds
    write_json(folder / "run.json", record.as_json(request.settings, request.samples))


def _run_questions(runtime: Runtime, request: RunRequest, record: RunRecord, folder: Path, keep_trace: bool,
                   store: SampleStore, team: Team) -> None:
    settings, questions = request.settings, [one for one in request.samples if isinstance(one, Question)]
    numbers = team.share(range(len(questions)))
    todo = [number for number in numbers if not store.has(number, DONE)]
    answers = answer_all(runtime, [questions[number] for number in todo], settings, request.on_text)
    for number in todo:
        with record.stage("run"):
            one = next(answers)
        if keep_trace:
            with record.stage("trace"):
                store.put(number, TRACE, _answer_trace(one, force_one(runtime, one, settings)))
        store.put(number, DONE, {"ids": one.answer.ids, "raw": one.answer.raw})
    deque(answers, maxlen=0)  # ends the bar
    own = [Answered(questions[number], Answer(**store.values(number, DONE))) for number in numbers]
    write_answers(team.collect(own, len(questions)), folder)
    if keep_trace:
        _merge_traces(store, folder / LOGITS, len(questions), team)


def _run_prompts(runtime: Runtime, request: RunRequest, record: RunRecord, folder: Path, keep_trace: bool,
                 store: SampleStore, team: Team) -> None:
    """Draw each sample and turn it into pixels at once; where the VAE is on the disk while it is not used (--offload
    vae_vit), after all of them, since it would be loaded as often."""
    settings, prompts = request.settings, [one for one in request.samples if isinstance(one, Prompt)]
    numbers = team.share(range(len(prompts)))
    todo = [number for number in numbers if not store.has(number, LATENT)]
    drawn = draw_all(runtime, [prompts[number] for number in todo], settings, keep_trace)
    for number in numbers:
        if number in todo:
            with record.stage("run"):
                one = next(drawn)
            if keep_trace:
                store.put(number, TRACE, _trace(one))
            store.put(number, LATENT, {"latent": one.latent.cpu()})
        if runtime.offload != "vae_vit":
            _decode(runtime, number, prompts[number], request, record, folder, store)
    deque(drawn, maxlen=0)  # ends the bar
    with runtime.using("vae") if runtime.offload == "vae_vit" else contextlib.nullcontext():
        for number in numbers:
            _decode(runtime, number, prompts[number], request, record, folder, store)
    write_json(folder / "prompt.json", {made(prompt, settings): prompt.text for prompt in prompts})
    team.bring(folder, [made(prompts[number], settings) for number in numbers], len(prompts))
    if keep_trace:
        _merge_traces(store, folder / LATENTS, len(prompts), team)


def _decode(runtime: Runtime, number: int, prompt: Prompt, request: RunRequest, record: RunRecord, folder: Path,
            store: SampleStore) -> None:
    if store.has(number, DONE):
        return
    path = folder / made(prompt, request.settings)
    with record.stage("decode"):
        latent = store.tensors(number, LATENT)["latent"].to(runtime.model.device)
        partial = path.with_name(f".{path.name}")
        _write_frames(runtime.decode_frames(latent), partial, path.suffix)
        os.replace(partial, path)
    store.put(number, DONE, {"file": path.name})


def _merge_traces(store: SampleStore, path: Path, total: int, team: Team) -> None:
    """The file of all samples' traces, on the leader; of a team, those of the others are brought first."""
    if team.size > 1:
        own = (store.tensors(number, TRACE) for number in team.share(range(total)))
        for number, trace in zip(range(total) if team.leads else team.share(range(total)), team.collect(own, total),
                                 strict=True):
            if not store.has(number, TRACE):
                store.put(number, TRACE, trace)
    store.merge(path, range(total) if team.leads else team.share(range(total)), TRACE)


def save_traces(path: Path, traces: Iterable[Mapping[str, Tensor]]) -> None:
    """A safetensors file of these tensors, of any shape."""
    write_tensors(path, {name: tensor for trace in traces for name, tensor in trace.items()})


def made(prompt: Prompt, settings: Settings) -> str:
    """Name of the file that a request makes."""
    return f"{prompt.key}.{'mp4' if settings.spec.makes == 'video' else 'png'}"


def open_made(path: Path) -> Sequence[Image.Image]:
    """The frames of a file that a request made; one of a picture."""
    return read_video(path, every=True) if path.suffix == ".mp4" else [open_image(path)]


def _write_frames(frames: list[Image.Image], path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        write_video(path, frames)
    else:
        frames[0].save(path, "PNG")


def write_answers(answered: Iterable[Answered], folder: Path) -> None:
    """result.json and prompt.json of an understanding run."""
    rows, raw = [], {}
    for one in answered:
        question = one.question
        rows.append({question.modality: str(question.visual), "question": question.question, "answer": one.answer.text,
                     "key": question.key, "reference": question.reference})
        # The official file is keyed by visual; a second question about one visual gets its sample's key added.
        name = question.visual.name
        raw[name if name not in raw else f"{name}#{question.key}"] = one.answer.raw
    write_json(folder / "result.json", rows)
    write_json(folder / "prompt.json", raw)


def _answer_trace(one: Answered, logprobs: Tensor) -> dict[str, Tensor]:
    return {f"{one.question.key}.ids": torch.tensor(one.answer.ids), f"{one.question.key}.logprobs": logprobs}


def _trace(drawn: Drawn) -> dict[str, Tensor]:
    key, steps = drawn.prompt.key, drawn.steps
    return {f"{key}.latent": drawn.latent.float().cpu(), f"{key}.x": torch.stack([step.x for step in steps]).float(),
            f"{key}.velocity": torch.stack([step.velocity for step in steps]).float(),
            f"{key}.t": torch.tensor([step.t for step in steps])}


def drop_traces(folder: Path) -> None:
    """Remove what --save_latents keeps from the results folders below `folder`."""
    for name in (LATENTS, LOGITS):
        for trace in folder.glob(f"*/{name}"):
            trace.unlink()


class _Model(Schema):
    """What run.json says of the weights."""

    path: str
    bytes: Count
    bits_per_weight: Positive
    fingerprint: str | None = None


class _RunFile(Schema):
    """run.json as far as later runs and reports go by it."""

    format: Literal[1]
    settings: dict[str, Any]
    samples: list[dict[str, str]]
    model: _Model
    dtype: str
    device: str
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, Count | None]
    versions: dict[str, str]

    @field_validator("settings")
    @classmethod
    def _task(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("task") not in list(TASKS):
            raise ValueError(f"the task must be one of {', '.join(TASKS)}")
        return settings


class _Answer(Schema):
    """A row of result.json."""

    key: str
    answer: str


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json of a results folder.

    Raises:
        InputError: it is none that this version wrote.
    """
    path, what = folder / "run.json", "run.json of a results folder"
    run: dict[str, Any] = read_json(path, what)
    parse(_RunFile, run, f"{what}: {path}", "make the folder again with run_baseline.py")
    return run


class Results:
    """A finished results folder, opened as a baseline.

    Raises:
        InputError: it is no results folder of this version.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.run = read_run(self.folder)
        self.text = TASKS[self.run["settings"]["task"]].makes == "text"

    @functools.cached_property
    def trace(self) -> TensorFile:
        """What --save_latents kept; InputError if the run kept nothing."""
        path = self.folder / (LOGITS if self.text else LATENTS)
        if not path.is_file():
            raise InputError(f"{self.folder} cannot be compared with: it has no {path.name}; make it again with "
                             "run_baseline.py --save_latents, or leave --baseline out")
        return TensorFile(path)

    def read(self, key: str, part: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """What --save_latents kept of a sample: "latent", "x", "velocity", "t", or "ids" and "logprobs" of an answer.

        Args:
            shape: that it must have; None for a size that may be any but 0.

        Raises:
            InputError: it is not there, of another shape, or holds NaN or Inf.
        """
        name, advice = f"{key}.{part}", "make the baseline again with run_baseline.py --save_latents"
        if name not in self.trace.specs:
            raise InputError(f"{self.trace.path} lacks {name}: {advice}")
        value = self.trace.read(name)
        if shape is not None and (value.dim() != len(shape) or not value.numel() or any(
                size not in (None, found) for size, found in zip(shape, value.shape, strict=True))):
            raise InputError(f"{self.trace.path}: {name} is {list(value.shape)}, not "
                             f"[{', '.join('any' if size is None else str(size) for size in shape)}]: {advice}")
        require_finite(value, f"{self.trace.path}: {name}")
        return value

    def condition(self, key: str) -> Tensor | None:
        """Latents [t, rows, columns, 48] of a sample's source as that run encoded it; None where it has none, or where
        encoding it again gives the same (the native runtime draws it from a seed, the official code from a global
        generator)."""
        name = f"{key}.condition"
        return self.read(key, "condition", (None, None, None, LATENT_CHANNELS)) if name in self.trace.specs else None

    def require_same(self, request: RunRequest) -> None:
        """Raise InputError unless the folder was made with these settings, samples and dtype, and is complete.

        The dtype belongs to it: it rounds the noise, which must be the same bit for bit.
        """
        lacking = [sample.key for sample in request.samples if f"{sample.key}.condition" not in self.trace.specs]
        if self.run.get("backend") == "official" and not self.text and request.settings.spec.takes and lacking:
            raise InputError(f"baseline {self.folder} does not hold the latents of its sources (first of sample "
                             f"{lacking[0]}), which the official code draws at random: make it again with "
                             "run_baseline.py --backend official --save_latents")
        asked = {**request.settings.as_json(), "dtype": str(request.source.dtype).removeprefix("torch.")}
        there = {**self.run["settings"], "dtype": self.run["dtype"]}
        differing = [f"{name} {there.get(name)} there and {value} here" for name, value in asked.items()
                     if there.get(name) != value]
        if differing:
            raise InputError(f"baseline {self.folder} was made with other settings: {'; '.join(differing)}")
        if self.run["samples"] != [describe(sample) for sample in request.samples]:
            raise InputError(f"baseline {self.folder} was made from other samples; use its --example_json and --limit")
        files = ["result.json"] if self.text else [made(sample, request.settings) for sample in request.samples
                                                   if isinstance(sample, Prompt)]
        gone = [name for name in files if not (self.folder / name).is_file()]
        if gone:
            raise InputError(f"baseline {self.folder} lacks {len(gone)} of its files, first {', '.join(gone[:5])}; "
                             "make it again")

    def answers(self) -> dict[str, str]:
        """Sample key -> answer, of an x2t run."""
        rows = read(list[_Answer], self.folder / "result.json", "result.json")
        return {row.key: row.answer for row in rows}

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the trace: Windows moves and removes no file that is open."""
        if "trace" in self.__dict__:
            self.trace.close()
            del self.trace


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
