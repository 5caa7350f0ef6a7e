"""Running a task over a sample file: what calibration, the baseline run and the quantized run have in common."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lance_quant.errors import require_one_of, require_whole
from lance_quant.lance.config import LATENT_STRIDE, SEED
from lance_quant.lance.generation import Denoiser, Sampling, Step
from lance_quant.lance.media import samples
from lance_quant.lance.media.samples import TASKS, TIMED, Prompt, Question, TaskSpec
from lance_quant.lance.media.vision import RESOLUTIONS
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Answer, Runtime, latent_grid
from lance_quant.lance.tokens import TextStream
from lance_quant.lance.understanding import GREEDY, MAX_NEW_TOKENS, TokenSampling


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, given a model: two runs compare only if these agree.

    The defaults are the official ones; here and in `Sampling` is where they are defined.

    task: one of TASKS.
    resolution: preset for pictures and clips that are shown to the model; "": the task's own.
    height, width: pixels of what t2i and t2v make, floored to multiples of 16.
    num_frames: of what t2v and i2v make, floored to one more than a multiple of 4; 1 in all other tasks.
    seed: of the noise, and of tokens that are drawn; all samples share it.
    sampling: how pictures and clips are integrated. token_sampling: how the tokens of answers are chosen.
    fix_quirks: repair the official code's bugs instead of reproducing them.
    vae_tiling: see vae.load_vae.

    Raises:
        InputError: a value is out of range or of the wrong type.
    """

    task: str
    resolution: str = ""
    height: int = 768
    width: int = 768
    num_frames: int = 50
    seed: int = SEED
    sampling: Sampling = Sampling()
    max_new_tokens: int = MAX_NEW_TOKENS
    token_sampling: TokenSampling = GREEDY
    fix_quirks: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        require_one_of("task", self.task, tuple(TASKS))
        object.__setattr__(self, "resolution", self.resolution or self.spec.resolution)
        require_one_of("resolution", self.resolution, tuple(RESOLUTIONS))
        if self.task not in TIMED:
            object.__setattr__(self, "num_frames", 1)
        for name in ("height", "width", "num_frames", "seed", "max_new_tokens"):
            require_whole(name, getattr(self, name), 0 if name == "seed" else 1)
        if self.spec.takes is None:
            latent_grid(self.height, self.width, self.num_frames)
        else:  # the source says how large the result is
            latent_grid(LATENT_STRIDE, LATENT_STRIDE, self.num_frames)

    @property
    def spec(self) -> TaskSpec:
        """What the task takes and makes."""
        return TASKS[self.task]

    def as_json(self) -> dict[str, Any]:
        """The settings that matter to the task, for run.json. How guidance is batched changes no result."""
        given = {"task": self.task, "fix_quirks": self.fix_quirks}
        if self.spec.takes is not None:
            given["resolution"] = self.resolution
        if self.spec.makes == "text":
            drawn = asdict(self.token_sampling) | {"seed": self.seed}
            return given | {"max_new_tokens": self.max_new_tokens,
                            **(drawn if self.token_sampling.temperature else {"temperature": 0.0})}
        given["vae_tiling"] = self.vae_tiling
        if self.spec.takes is None:
            given |= {"height": self.height // 16 * 16, "width": self.width // 16 * 16}
        if self.task in TIMED:
            given["num_frames"] = (self.num_frames - 1) // 4 * 4 + 1
        sampling = asdict(self.sampling)
        first = {name: sampling.pop(name) for name in ("num_timesteps", "timestep_shift", "cfg_scale")}
        del sampling["batch_guidance"]
        return given | first | {"seed": self.seed} | sampling


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
