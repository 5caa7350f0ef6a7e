"""Running a task over a sample file: what calibration, the baseline run and the quantized run have in common."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lance_quant.lance.generation import Sampling, Step
from lance_quant.lance.pipeline import Answer, Pipeline
from lance_quant.lance.samples import Prompt, Question, load_prompts, load_questions

TASKS = ("x2t_image", "t2i")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, given a model: two runs compare only if these agree."""

    task: str
    resolution: str
    height: int
    width: int
    sampling: Sampling
    max_new_tokens: int
    fix_quirks: bool

    def as_json(self) -> dict[str, Any]:
        """The settings that matter to the task, for run.json. How guidance is batched changes no result."""
        common = {"task": self.task, "fix_quirks": self.fix_quirks}
        if self.task == "x2t_image":
            return common | {"resolution": self.resolution, "max_new_tokens": self.max_new_tokens}
        sampling = {key: value for key, value in asdict(self.sampling).items() if key != "batch_guidance"}
        return common | {"height": self.height // 16 * 16, "width": self.width // 16 * 16, **sampling}


def load_samples(path: Path, settings: Settings, limit: int | None = None) -> list[Question] | list[Prompt]:
    """The task's samples, the first `limit` of them."""
    if settings.task == "x2t_image":
        return load_questions(path, settings.fix_quirks)[:limit]
    return load_prompts(path)[:limit]


class Answered(NamedTuple):
    """One finished x2t_image request; `logprobs` float32 [answer tokens, tokenizer size] where asked for."""

    question: Question
    answer: Answer
    logprobs: Tensor | None


class Drawn(NamedTuple):
    """One finished t2i request: latents [1, rows, columns, 48] and, where asked for, all steps."""

    prompt: Prompt
    latent: Tensor
    steps: list[Step]


def answer_all(pipeline: Pipeline, questions: list[Question], settings: Settings,
               keep_trace: bool = False) -> Iterator[Answered]:
    """Answer every question; `keep_trace` adds the log-probabilities of each answer's tokens."""
    for question in tqdm(questions, desc="answer", unit="question"):
        packed, vit_tokens = pipeline.ask(question, settings.resolution)
        with tqdm(total=settings.max_new_tokens, desc="tokens", unit="token", leave=False) as bar:
            answer = pipeline.answer(packed, vit_tokens, settings.max_new_tokens, lambda _, bar=bar: bar.update())
        logprobs = pipeline.forced_logprobs(packed, vit_tokens, answer.ids) if keep_trace else None
        yield Answered(question, answer, logprobs)


def draw_all(pipeline: Pipeline, prompts: list[Prompt], settings: Settings,
             keep_trace: bool = False) -> Iterator[Drawn]:
    """Sample latents for every prompt, all from the same noise as officially; `keep_trace` keeps every step."""
    sampling = settings.sampling
    for prompt in tqdm(prompts, desc="draw", unit="picture"):
        denoiser = pipeline.denoiser(prompt.text, settings.height, settings.width, sampling)
        steps: list[Step] = []
        with tqdm(total=sampling.num_timesteps, desc="denoise", unit="step", leave=False) as bar:

            def on_step(step: Step, bar: tqdm = bar, steps: list[Step] = steps) -> None:
                bar.update()
                if keep_trace:
                    steps.append(step)

            latent = pipeline.sample(denoiser, sampling, on_step)
        yield Drawn(prompt, latent, steps)


@torch.no_grad()
def replay(pipeline: Pipeline, prompt: Prompt, settings: Settings, trajectory: Tensor, times: Tensor) -> Tensor:
    """Velocities [steps, n, 48] at given points x_t [steps, n, 48] and timesteps [steps], instead of its own path."""
    denoiser = pipeline.denoiser(prompt.text, settings.height, settings.width, settings.sampling)
    pairs = tqdm(zip(trajectory, times.tolist(), strict=True), desc="replay", unit="step", total=len(times),
                 leave=False)
    return torch.stack([denoiser.velocity(x.to(pipeline.model.dtype), t).float().cpu() for x, t in pairs])
