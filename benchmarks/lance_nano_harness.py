"""Evaluation harness of the lance-nano benchmarks: calibration, held-out samples, and distances from the float model.

What every benchmark on the small trained model shares. A seed decides which samples calibrate, which are held out, and
the noise of the pictures. Everything runs on the CPU in float32, on one thread per process.

Two distances, both teacher-forced, so that two models are compared on the same inputs: KL (nats per token) on the
float model's own answers, and velocity error (relative, not squared) on the float model's own trajectories, guidance
included.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lance_nano import evaluate, export, outliers, samples
from lance_nano.evaluate import RESOLUTION, Caption, Share
from lance_nano.questions import Question
from lance_nano.recognise import shows
from lance_nano.scenes import SIZE, Scene
from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats, Collector, merge, model_fingerprint
from lance_quant.calibration.layer_inputs import LayerInputs, layer_inputs_of
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import step_errors, token_divergence
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.tasks import Settings, load_samples, run_watched
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling, Step
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.tokens import TokenSequence
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint
from quantized_linear import swap_linears

MODEL = Path(__file__).parent.parent / "lance_nano" / "checkpoint" / "Lance_nano"
TASKS = ("x2t_image", "t2i")
# Outliers put in (lance_nano/outliers.py): its defaults, or as large as the published ones of Lance-3B.
VARIANTS: dict[str, list[str]] = {"plain": [], "outliers": [],
                                  "like_lance": ["--factor", "16", "--fed_factor", "0.125", "--share", "0.005"]}
# rtn: nearest rounding, nothing scaled. published: `--recipe published`. ours_diagonal: ours from statistics alone.
# ours: with captures. ours_even: the same, but all tokens count alike in GPTQ, with the damping that is for such.
# ours_light: with captures and `--gptq light`.
METHODS = ("rtn", "published", "ours_diagonal", "ours_light", "ours_even", "ours")
CPU = torch.device("cpu")


class Request(NamedTuple):
    """A question as the model takes it: token sequence of the prompt, ViT tokens [n, hidden]."""

    sequence: TokenSequence
    vit_tokens: Tensor


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    questions, captions: that calibrate
    n: held-out questions, and captions, that rates are counted over; a fourth as many descriptions
    traced: captions of those whose velocities are compared
    steps: denoising steps
    """

    questions: int
    captions: int
    n: int
    traced: int
    steps: int = 30

    @property
    def calibration(self) -> dict[str, int]:
        """Samples that calibrate, by task."""
        return dict(zip(TASKS, (self.questions, self.captions), strict=True))

    @property
    def sampling(self) -> Sampling:
        """The official sampler at that many steps."""
        return Sampling(num_timesteps=self.steps)


_HELP = {"questions": "that calibrate", "captions": "that calibrate",
         "n": "held-out questions, and captions, per seed; a fourth as many descriptions",
         "traced": "captions of those whose velocities are compared", "steps": "denoising steps"}


def add_model(to: argparse.ArgumentParser, variant: bool = True) -> None:
    """--model_path and, unless the benchmark has no use for it, --variant."""
    to.add_argument("--model_path", type=Path, default=MODEL, help="a lance-nano folder")
    if variant:
        to.add_argument("--variant", choices=VARIANTS, default="plain",
                        help="with outliers put in, see lance_nano/outliers.py: its defaults, or as large as Lance's")


def add_plan(to: argparse.ArgumentParser, default: Plan) -> None:
    """One flag for each number of a Plan."""
    for field in fields(Plan):
        to.add_argument(f"--{field.name}", type=int, default=getattr(default, field.name), help=_HELP[field.name])


def plan_of(args: argparse.Namespace) -> Plan:
    """What `add_plan`'s flags mean.

    Raises:
        InputError: a number below 1.
    """
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    for field in fields(Plan):
        require_some(field.name, getattr(plan, field.name))
    return plan


def require_some(name: str, value: int) -> None:
    """InputError unless a flag's number is at least 1."""
    if value < 1:
        raise InputError(f"--{name} {value}: at least one is needed")


# --- models ---------------------------------------------------------------------------------------------------------


def variant_of(model: Path, variant: str, work: Path) -> Path:
    """The model folder itself, or one of the VARIANTS, made in `work`."""
    if variant == "plain":
        return model
    outliers.main(["--model_path", str(model), "--out", str(work / variant), *VARIANTS[variant]])
    return work / variant / export.MODEL_FOLDER


def load(model: Path, packed: Path | None = None, kernel: str = "auto") -> Runtime:
    """A model in float32, the linears of a packed folder computed by a kernel."""
    return evaluate.load(model, packed, "cpu", "float32", kernel)


def load_unpacked(model: Path, packed: Path) -> Runtime:
    """A packed model with its weights unpacked once: the same numbers, faster where many tokens run."""
    folder = PackedFolder(packed)
    prepare = functools.partial(swap_linears, folder=folder, dtype=torch.float32, device=CPU, mode="cached")
    return Runtime.load(LancePaths.find(model), CPU, torch.float32, folder.checkpoint.path, prepare)


# --- calibration ----------------------------------------------------------------------------------------------------


def calibrate(model: Path, work: Path, seed: int, counts: Mapping[str, int], sampling: Sampling,
              captured: bool = True, noise: int | None = None) -> ActStats:
    """Activation statistics on samples as in training, which `seed` draws.

    Args:
        counts: samples by task.
        noise: the seed of the pictures' noise; None: the same.
        captured: keep layer inputs too, in `captures_in(work)`.
    """
    if not (work / "samples").exists():
        samples.write(work / "samples", max(counts.values()), seed)
    runtime = Runtime.load(LancePaths.find(model), CPU, torch.float32)
    with Checkpoint(model) as source:
        fingerprint, names = model_fingerprint(source), layout.linears(layout.num_layers(source.specs))
    parts = []
    for (task, count), file in zip(counts.items(), captures_in(work, tuple(counts)), strict=True):
        settings = Settings(task, RESOLUTION, SIZE, SIZE, seed=seed if noise is None else noise, sampling=sampling)
        wanted = load_samples(work / f"samples/calibrate_{task}.json", settings, count)
        with Collector(runtime.model, names) as collector, \
                capture.recording(runtime.model, file if captured else None, task, fingerprint) as begin:
            run_watched(runtime, wanted, settings, range(len(wanted)), begin)
        parts.append(collector.stats(task, {"model": fingerprint}))
    return merge(parts)


def captures_in(work: Path, tasks: Sequence[str] = TASKS) -> list[Path]:
    """The captures that `calibrate` leaves in its folder."""
    return [work / f"{task}.safetensors" for task in tasks]


def pack(model: Path, out: Path, codec: Codec, method: str, stats: ActStats, captures: Sequence[Path] = ()) -> Path:
    """Quantize the model with one of the METHODS; the folder. rtn, published and ours_diagonal read no captures."""
    if method == "rtn":
        stats = ActStats({}, [], [{"run_id": "none"}], 0)
    layer_inputs = None
    if method in ("ours", "ours_light"):
        layer_inputs = layer_inputs_of(model, captures, CPU, light=method == "ours_light")
    if method == "ours_even":
        config, calls, facts = capture.load_of(model, captures)
        layer_inputs = LayerInputs(config, calls, CPU, facts)
    conversion = Conversion(codec, "published" if method == "published" else "ours", progress=False,
                            gptq="light" if method == "ours_light" else "full")
    with Checkpoint(model) as source:
        convert.quantize_checkpoint(source, stats, out, conversion, layer_inputs)
    return out


# --- the float model, and how far another one is from it -------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """What the float model did on the held-out samples of a seed.

    asked: short questions, then descriptions; answers: its answers' token ids, texts, and the log-probabilities in
    front of each token
    traces: all steps of the first pictures
    """

    asked: list[tuple[Scene, Question]]
    ids: list[list[int]]
    texts: list[str]
    logprobs: list[Tensor]
    captions: list[Caption]
    traces: list[list[Step]]


@torch.no_grad()
def baseline_of(runtime: Runtime, seed: int, plan: Plan) -> Baseline:
    """Run the float model on the held-out samples."""
    asked = [*evaluate.held_out_questions(plan.n, seed), *evaluate.held_out_descriptions(max(1, plan.n // 4), seed)]
    ids, logprobs, texts = [], [], []
    for request in requests_of(runtime, asked):
        answer = runtime.answer(*request, evaluate.MAX_ANSWER_TOKENS)
        ids.append(answer.ids)
        texts.append(answer.text)
        logprobs.append(runtime.forced_logprobs(*request, answer.ids))
    captions = evaluate.held_out_captions(plan.n, seed)
    traces = [trajectory(runtime, caption.text, plan.sampling, seed) for caption in captions[:plan.traced]]
    return Baseline(asked, ids, texts, logprobs, captions, traces)


def requests_of(runtime: Runtime, asked: list[tuple[Scene, Question]]) -> list[Request]:
    """Questions about scenes as the model takes them."""
    with tempfile.TemporaryDirectory() as folder:
        return [Request(*runtime.prompt_of(evaluate.request(scene, question, Path(folder)), RESOLUTION))
                for scene, question in asked]


def trajectory(runtime: Runtime, text: str, sampling: Sampling, seed: int) -> list[Step]:
    """All steps of a picture that the model draws on its own."""
    steps: list[Step] = []
    runtime.sample(runtime.denoiser(text, SIZE, SIZE, sampling), seed, steps.append)
    return steps


def token_kl(runtime: Runtime, requests: list[Request], ids: list[list[int]], logprobs: list[Tensor]) -> Tensor:
    """KL in nats of every token of all answers, float64 [tokens]."""
    return torch.cat([token_divergence(theirs, runtime.forced_logprobs(*request, answer)).kl
                      for request, answer, theirs in zip(requests, ids, logprobs, strict=True)])


@torch.no_grad()
def velocity_errors(runtime: Runtime, texts: Sequence[str], traces: list[list[Step]],
                    sampling: Sampling) -> list[list[float]]:
    """By trace, the relative error of the velocity at each of its steps."""
    errors = []
    for text, trace in zip(texts, traces, strict=True):
        denoiser = runtime.denoiser(text, SIZE, SIZE, sampling)
        velocity = torch.stack([denoiser.velocity(step.x, step.t) for step in trace])
        errors.append(step_errors(velocity, torch.stack([step.velocity for step in trace])))
    return errors


@dataclass(frozen=True)
class Distance:
    """A model beside the float one on a seed's held-out samples.

    answers, pictures: right ones; same: answers equal to the float model's; kl: nats per token; velocity: relative
    error by step, mean over the traces
    """

    answers: Share
    same: Share
    pictures: Share
    kl: float
    velocity: list[float]


@torch.no_grad()
def distance(runtime: Runtime, baseline: Baseline, seed: int, plan: Plan) -> Distance:
    """Rates of a model, and how far it is from the baseline on the baseline's own tokens and trajectories."""
    requests = requests_of(runtime, baseline.asked)
    texts = [runtime.answer(*request, evaluate.MAX_ANSWER_TOKENS).text for request in requests]
    right = [text == question.answer for text, (_, question) in zip(texts, baseline.asked, strict=True)][:plan.n]
    same = [ours == theirs for ours, theirs in zip(texts, baseline.texts, strict=True)]
    drawn = [shows(caption.scene, np.asarray(draw(runtime, caption.text, plan.sampling, seed * 1_000_003 + index)))
             for index, caption in enumerate(baseline.captions)]
    traced = [caption.text for caption in baseline.captions[:plan.traced]]
    return Distance(Share(sum(right), len(right)), Share(sum(same), len(same)), Share(sum(drawn), len(drawn)),
                    token_kl(runtime, requests, baseline.ids, baseline.logprobs).mean().item(),
                    mean_by_step(velocity_errors(runtime, traced, baseline.traces, plan.sampling)))


def draw(runtime: Runtime, text: str, sampling: Sampling, seed: int) -> Image.Image:
    """A picture for a caption."""
    return runtime.decode(runtime.sample(runtime.denoiser(text, SIZE, SIZE, sampling), seed))


# --- results --------------------------------------------------------------------------------------------------------


def mean_by_step(rows: Sequence[Sequence[float]]) -> list[float]:
    """Means over the rows, step by step."""
    return [statistics.fmean(step) for step in zip(*rows, strict=True)]


def pooled(shares: Sequence[Share]) -> dict[str, Any]:
    """A rate over several seeds, with its 95 % Wilson interval."""
    share = Share(sum(each.right for each in shares), sum(each.total for each in shares))
    return {"rate": share.value, "interval": share.interval(), "n": share.total}


def machine(model: Path) -> dict[str, str]:
    """What stands in every result: model, processor, version of torch."""
    return {"model": model.name, "cpu": device_name(CPU), "torch": str(torch.__version__)}
