"""Running a task over a sample file: what calibration, the baseline run and the quantized run have in common."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lance_quant.lance.generation import Denoiser, Step
from lance_quant.lance.media import samples
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Answer, Runtime
from lance_quant.lance.settings import Settings
from lance_quant.lance.tokens import TextStream


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


def answer_all(pipeline: Runtime, questions: list[Question], settings: Settings,
               on_text: Callable[[str], None] | None = None, look_every: int | None = None) -> Iterator[Answered]:
    """Answer every question; `on_text` gets questions and answers while they come, instead of a bar.

    Args:
        look_every: as in understanding.answer.
    """
    for question in progress(questions, desc="answer", unit="question", disable=on_text is not None):
        sequence, vit_tokens = pipeline.ask(question, settings.resolution)
        with _shown(pipeline, question, settings, on_text) as on_token:
            answer = pipeline.answer(sequence, vit_tokens, settings.max_new_tokens, on_token, settings.token_sampling,
                                     settings.seed, look_every)
        yield Answered(question, answer)


def force_all(pipeline: Runtime, answered: list[Answered], settings: Settings) -> Iterator[Tensor]:
    """Log-probabilities float32 [answer tokens, tokenizer size], on the CPU, of every finished answer's tokens."""
    for question, answer in progress(answered, desc="trace", unit="answer"):
        yield pipeline.forced_logprobs(*pipeline.ask(question, settings.resolution), answer.ids).cpu()


@contextlib.contextmanager
def _shown(pipeline: Runtime, question: Question, settings: Settings,
           on_text: Callable[[str], None] | None) -> Iterator[Callable[[int], object]]:
    """What to call with every token of an answer: a bar, or its text."""
    if on_text is None:
        with progress(total=settings.max_new_tokens, desc="tokens", unit="token", leave=False) as bar:
            yield lambda _: bar.update()
    else:
        on_text(f"\n[{question.key}] {question.question}\n")
        yield TextStream(pipeline.tokenizer, on_text).add
        on_text("\n")


def denoiser_of(pipeline: Runtime, prompt: Prompt, settings: Settings) -> Denoiser:
    """The denoiser of any generation task's request."""
    sampling, resolution = settings.sampling, settings.resolution
    if prompt.visual is None:
        num_frames = settings.num_frames if settings.spec.makes == "video" else None
        return pipeline.denoiser(prompt.text, settings.height, settings.width, sampling, num_frames)
    frames = pipeline.frames(prompt.visual, settings.spec.takes)
    if settings.task == "i2v":
        return pipeline.animator(prompt.text, frames[0], resolution, settings.num_frames, sampling)
    return pipeline.editor(prompt.text, frames, resolution, prompt.named, sampling)


def draw_all(pipeline: Runtime, prompts: list[Prompt], settings: Settings,
             keep_trace: bool = False) -> Iterator[Drawn]:
    """Sample latents for every prompt, all from the same noise as officially; `keep_trace` keeps every step."""
    for prompt in progress(prompts, desc="draw", unit=settings.spec.makes):
        denoiser = denoiser_of(pipeline, prompt, settings)
        steps: list[Step] = []
        with progress(total=settings.sampling.num_timesteps, desc="denoise", unit="step", leave=False) as bar:

            def on_step(step: Step, bar: Any = bar, steps: list[Step] = steps) -> None:
                bar.update()
                if keep_trace:
                    steps.append(step._replace(x=step.x.cpu(), velocity=step.velocity.cpu()))

            latent = pipeline.sample(denoiser, settings.seed, on_step)
        yield Drawn(prompt, latent, steps)


def run_watched(pipeline: Runtime, samples: Sequence[Question] | Sequence[Prompt], settings: Settings,
                numbers: Sequence[int], begin: Callable[[int], None]) -> None:
    """Run a task for what hooks see of it; `begin` gets each sample's number before it runs."""
    if settings.spec.makes == "text":
        done = answer_all(pipeline, samples, settings, look_every=1)  # hooks must see no token behind an end
    else:
        done = draw_all(pipeline, samples, settings)
    for number in numbers:
        begin(number)
        next(done)
    deque(done, maxlen=0)  # ends the bar


@torch.no_grad()
def forced_velocities(pipeline: Runtime, prompt: Prompt, settings: Settings, trajectory: Tensor,
                      times: Tensor) -> Tensor:
    """Velocities [steps, n, 48] at given points x_t [steps, n, 48] and timesteps [steps], instead of its own path."""
    denoiser = denoiser_of(pipeline, prompt, settings)
    pairs = progress(zip(trajectory, times.tolist(), strict=True), desc="forced", unit="step", total=len(times),
                     leave=False)
    return torch.stack([denoiser.velocity(x.to(pipeline.model.dtype), t).float().cpu() for x, t in pairs])
