"""Running a task over a sample file: what calibration, the baseline run and the quantized run have in common."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lance_quant.lance.generation import Denoiser, Sampling, Step
from lance_quant.lance.media import samples
from lance_quant.lance.media.samples import TASKS, TIMED, Prompt, Question, Task
from lance_quant.lance.pipeline import Answer, Pipeline
from lance_quant.lance.progress import progress
from lance_quant.lance.tokens import TextStream
from lance_quant.lance.understanding import Choice


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, given a model: two runs compare only if these agree."""

    task: str
    resolution: str
    height: int
    width: int
    num_frames: int
    sampling: Sampling
    max_new_tokens: int
    choice: Choice
    fix_quirks: bool
    vae_tiling: bool

    @property
    def kind(self) -> Task:
        """What the task takes and makes."""
        return TASKS[self.task]

    def as_json(self) -> dict[str, Any]:
        """The settings that matter to the task, for run.json. How guidance is batched changes no result."""
        given = {"task": self.task, "fix_quirks": self.fix_quirks}
        if self.kind.takes is not None:
            given["resolution"] = self.resolution
        if self.kind.makes == "text":
            choice = asdict(self.choice) if self.choice.temperature else {"temperature": 0.0}
            return given | {"max_new_tokens": self.max_new_tokens, **choice}
        given["vae_tiling"] = self.vae_tiling
        if self.kind.takes is None:
            given |= {"height": self.height // 16 * 16, "width": self.width // 16 * 16}
        if self.task in TIMED:
            given["num_frames"] = (self.num_frames - 1) // 4 * 4 + 1
        return given | {key: value for key, value in asdict(self.sampling).items() if key != "batch_guidance"}


def load_samples(path: Path, settings: Settings, limit: int | None = None) -> list[Question] | list[Prompt]:
    """The task's samples, the first `limit` of them."""
    return samples.load(settings.task, path, settings.fix_quirks)[:limit]


class Answered(NamedTuple):
    """One finished x2t request."""

    question: Question
    answer: Answer


class Drawn(NamedTuple):
    """One finished generation request: latents [frames, rows, columns, 48] and, where asked for, all steps."""

    prompt: Prompt
    latent: Tensor
    steps: list[Step]


def answer_all(pipeline: Pipeline, questions: list[Question], settings: Settings,
               on_text: Callable[[str], None] | None = None, look_every: int | None = None) -> Iterator[Answered]:
    """Answer every question; `on_text` gets questions and answers while they come, instead of a bar.

    Args:
        look_every: as in understanding.answer.
    """
    for question in progress(questions, desc="answer", unit="question", disable=on_text is not None):
        packed, vit_tokens = pipeline.ask(question, settings.resolution)
        with _shown(pipeline, question, settings, on_text) as on_token:
            answer = pipeline.answer(packed, vit_tokens, settings.max_new_tokens, on_token, settings.choice,
                                     look_every)
        yield Answered(question, answer)


def force_all(pipeline: Pipeline, answered: list[Answered], settings: Settings) -> Iterator[Tensor]:
    """Log-probabilities float32 [answer tokens, tokenizer size], on the CPU, of every finished answer's tokens."""
    for question, answer in progress(answered, desc="trace", unit="answer"):
        yield pipeline.forced_logprobs(*pipeline.ask(question, settings.resolution), answer.ids).cpu()


@contextlib.contextmanager
def _shown(pipeline: Pipeline, question: Question, settings: Settings,
           on_text: Callable[[str], None] | None) -> Iterator[Callable[[int], object]]:
    """What to call with every token of an answer: a bar, or its text."""
    if on_text is None:
        with progress(total=settings.max_new_tokens, desc="tokens", unit="token", leave=False) as bar:
            yield lambda _: bar.update()
    else:
        on_text(f"\n[{question.key}] {question.question}\n")
        yield TextStream(pipeline.tokenizer, on_text).add
        on_text("\n")


def denoiser_of(pipeline: Pipeline, prompt: Prompt, settings: Settings) -> Denoiser:
    """The denoiser of any generation task's request."""
    sampling, resolution = settings.sampling, settings.resolution
    if prompt.visual is None:
        num_frames = settings.num_frames if settings.kind.makes == "video" else None
        return pipeline.denoiser(prompt.text, settings.height, settings.width, sampling, num_frames)
    frames = pipeline.frames(prompt.visual, settings.kind.takes)
    if settings.task == "i2v":
        return pipeline.animator(prompt.text, frames[0], resolution, settings.num_frames, sampling)
    return pipeline.editor(prompt.text, frames, resolution, prompt.named, sampling)


def draw_all(pipeline: Pipeline, prompts: list[Prompt], settings: Settings,
             keep_trace: bool = False) -> Iterator[Drawn]:
    """Sample latents for every prompt, all from the same noise as officially; `keep_trace` keeps every step."""
    sampling = settings.sampling
    for prompt in progress(prompts, desc="draw", unit=settings.kind.makes):
        denoiser = denoiser_of(pipeline, prompt, settings)
        steps: list[Step] = []
        with progress(total=sampling.num_timesteps, desc="denoise", unit="step", leave=False) as bar:

            def on_step(step: Step, bar: Any = bar, steps: list[Step] = steps) -> None:
                bar.update()
                if keep_trace:
                    steps.append(step._replace(x=step.x.cpu(), velocity=step.velocity.cpu()))

            latent = pipeline.sample(denoiser, sampling, on_step)
        yield Drawn(prompt, latent, steps)


def run_watched(pipeline: Pipeline, samples: Sequence[Question] | Sequence[Prompt], settings: Settings,
                numbers: Sequence[int], begin: Callable[[int], None]) -> None:
    """Run a task for what hooks see of it; `begin` gets each sample's number before it runs."""
    if settings.kind.makes == "text":
        done = answer_all(pipeline, samples, settings, look_every=1)  # hooks must see no token behind an end
    else:
        done = draw_all(pipeline, samples, settings)
    for number in numbers:
        begin(number)
        next(done)
    deque(done, maxlen=0)  # ends the bar


@torch.no_grad()
def replay(pipeline: Pipeline, prompt: Prompt, settings: Settings, trajectory: Tensor, times: Tensor) -> Tensor:
    """Velocities [steps, n, 48] at given points x_t [steps, n, 48] and timesteps [steps], instead of its own path."""
    denoiser = denoiser_of(pipeline, prompt, settings)
    pairs = progress(zip(trajectory, times.tolist(), strict=True), desc="replay", unit="step", total=len(times),
                     leave=False)
    return torch.stack([denoiser.velocity(x.to(pipeline.model.dtype), t).float().cpu() for x, t in pairs])
