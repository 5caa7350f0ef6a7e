"""Batch inference: a task over a sample file, for calibration, the baseline run and the quantized run alike."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.inference.estimate import Estimate, costs_of
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Denoiser, Step
from lance_quant.lance.loader import TorchFile
from lance_quant.lance.media import samples
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Answer, Runtime
from lance_quant.lance.settings import TASKS, Settings
from lance_quant.lance.tokens import TextStream
from lance_quant.storage.tensor_file import TensorFile


def load_samples(path: Path, settings: Settings, limit: int | None = None) -> list[Question] | list[Prompt]:
    """The task's samples, the first `limit` of them."""
    return samples.load(settings.task, path, settings.fix_quirks)[:limit]


def _nothing() -> None:
    """What is called where nobody wants to know of work."""


class Answered(NamedTuple):
    """One finished x2t request."""

    question: Question
    answer: Answer


class Drawn(NamedTuple):
    """One finished generation request: latents [frames, rows, columns, 48] and, where asked for, the computed steps."""

    prompt: Prompt
    latent: Tensor
    steps: list[Step]


def answer_all(runtime: Runtime, questions: Sequence[Question], settings: Settings,
               on_text: Callable[[str], None] | None = None, look_every: int | None = None,
               on_work: Callable[[], object] = _nothing) -> Iterator[Answered]:
    """Answer every question; `on_text` gets questions and answers while they come, instead of a bar.

    Args:
        look_every: tokens after which the end is looked for; None: as suits the device.
        on_work: called after every token.
    """
    for question in progress(questions, desc="answer", unit="question", disable=on_text is not None):
        sequence, vit_tokens = runtime.prompt_of(question, settings.resolution)
        with _shown(runtime, question, settings, on_text) as shown:

            def on_token(token: int, shown: Callable[[int], object] = shown) -> None:
                shown(token)
                on_work()

            answer = runtime.answer(sequence, vit_tokens, settings.max_new_tokens, on_token, settings.token_sampling,
                                     settings.seed, look_every)
        yield Answered(question, answer)


def force_one(runtime: Runtime, answered: Answered, settings: Settings) -> Tensor:
    """Log-probabilities float32 [answer tokens, tokenizer size], on the CPU, of a finished answer's tokens."""
    question, answer = answered
    return runtime.forced_logprobs(*runtime.prompt_of(question, settings.resolution), answer.ids).cpu()


@contextlib.contextmanager
def _shown(runtime: Runtime, question: Question, settings: Settings,
           on_text: Callable[[str], None] | None) -> Iterator[Callable[[int], object]]:
    """What to call with every token of an answer: a bar, or its text."""
    if on_text is None:
        with progress(total=settings.max_new_tokens, desc="tokens", unit="token", leave=False) as bar:
            yield lambda _: bar.update()
    else:
        on_text(f"\n[{question.key}] {question.question}\n")
        yield TextStream(runtime.tokenizer, on_text).add
        on_text("\n")


def denoiser_of(runtime: Runtime, prompt: Prompt, settings: Settings) -> Denoiser:
    """The denoiser of any generation task's request."""
    takes = settings.spec.takes
    frames = [] if prompt.visual is None or takes is None else runtime.frames(prompt.visual, takes)
    return denoiser_for(runtime, prompt.text, frames, settings, prompt.named)


def denoiser_for(runtime: Runtime, text: str, frames: Sequence[Image.Image], settings: Settings,
                 named: str = "") -> Denoiser:
    """The denoiser of a request whose source is open already.

    Args:
        frames: none for t2i and t2v; the picture or the clip's frames for all others.
        named: the word for an edit's source in the system prompt; "": what it is.
    """
    sampling, resolution = settings.sampling, settings.resolution
    if settings.spec.takes is None:
        num_frames = settings.num_frames if settings.spec.makes == "video" else None
        return runtime.denoiser(text, settings.height, settings.width, sampling, num_frames)
    if settings.task == "i2v":
        return runtime.animator(text, frames[0], resolution, settings.num_frames, sampling)
    return runtime.editor(text, frames, resolution, named or settings.spec.takes, sampling)


def require_parts(task: str, paths: LancePaths, decodes: bool = True) -> None:
    """Refuse a task whose ViT or VAE is not there, before anything is loaded.

    Args:
        decodes: latents become pixels.

    Raises:
        InputError: names the file that is missing, or no torch file.
    """
    spec = TASKS[task]
    looks = spec.takes is not None and task != "i2v"  # i2v's picture goes through the VAE only
    if looks and not (paths.vit / "config.json").is_file():
        raise InputError(f"ViT not found: {paths.vit}/config.json; say where its folder is (--vit_path, vit=)")
    if looks and (paths.vit / "vit.safetensors").is_file():  # absent is fine where the checkpoint has its own
        TensorFile(paths.vit / "vit.safetensors").close()
    if spec.makes != "text" and (decodes or spec.takes is not None):
        if not paths.vae.is_file():
            raise InputError(f"VAE not found: {paths.vae}; say where its file is (--vae_path, vae=)")
        TorchFile(paths.vae)


def draw_all(runtime: Runtime, prompts: Sequence[Prompt], settings: Settings, keep_trace: bool = False,
             on_work: Callable[[], object] = _nothing) -> Iterator[Drawn]:
    """Sample latents for every prompt, all from the same noise as officially.

    keep_trace: keep every step whose velocity was computed. on_work: called after each of those.
    """
    for prompt in progress(prompts, desc="draw", unit=settings.spec.makes):
        denoiser = denoiser_of(runtime, prompt, settings)
        steps: list[Step] = []
        with progress(total=settings.sampling.num_timesteps, desc="denoise", unit="step", leave=False) as bar:

            def on_step(step: Step, bar: Any = bar, steps: list[Step] = steps) -> None:
                bar.update()
                if step.computed:
                    on_work()
                if keep_trace and step.computed:
                    steps.append(step._replace(x=step.x.cpu(), velocity=step.velocity.cpu()))

            latent = runtime.sample(denoiser, settings.seed, on_step)
        yield Drawn(prompt, latent, steps)


def run_watched(runtime: Runtime, samples: Sequence[Question | Prompt], settings: Settings,
                numbers: Sequence[int], begin: Callable[[int], None]) -> None:
    """Run a task for what hooks see of it; `begin` gets each sample's number before it runs.

    How long all of it will take is said after the first steps or tokens, if that is long.
    """
    done: Iterator[object]
    wait = torch.cuda.synchronize if runtime.model.device.type == "cuda" else _nothing
    estimate = Estimate(settings, len(samples), costs_of(settings), wait=wait)
    if settings.spec.makes == "text":  # hooks must see no token behind an end
        done = answer_all(runtime, cast(Sequence[Question], samples), settings, look_every=1,
                          on_work=estimate.step)
    else:
        done = draw_all(runtime, cast(Sequence[Prompt], samples), settings, on_work=estimate.step)
    for number in numbers:
        begin(number)
        estimate.begin()
        next(done)
    deque(done, maxlen=0)  # ends the bar


@torch.no_grad()
def forced_velocities(runtime: Runtime, prompt: Prompt, settings: Settings, trajectory: Tensor,
                      times: Tensor, condition: Tensor | None = None) -> Tensor:
    """Velocities [steps, n, 48] at given points x_t [steps, n, 48] and timesteps [steps], instead of its own path.

    Args:
        condition: latents [t, rows, columns, 48] of the source as the trajectory's run encoded it; None: encoded here.
    """
    with runtime.fed(condition):
        denoiser = denoiser_of(runtime, prompt, settings)
    pairs = progress(zip(trajectory, times.tolist(), strict=True), desc="forced", unit="step", total=len(times),
                     leave=False)
    return torch.stack([denoiser.velocity(x.to(runtime.model.dtype), t).float().cpu() for x, t in pairs])
