"""Parity with the official code: both backends on the same samples, and how far apart everything is that they compute.

The official code runs first and is recorded; then the native runtime, from the noise and the condition latents that
the official run drew (they come from its global generator).
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lance_quant.evaluation.metrics import relative_error, step_errors
from lance_quant.inference.tasks import denoiser_of
from lance_quant.lance import generation
from lance_quant.lance.media import vision
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import RESOLUTIONS, Settings
from lance_quant.lance.tokens import Grid
from lance_quant.official.checkout import describe
from lance_quant.official.process import run
from lance_quant.official.request import OfficialRequest

_MEANING = {
    "noise": "own x_T from the seed, relative", "vit": "ViT tokens, relative",
    "random_crop": "source cut at a random offset there: its rows differ",
    "condition_mean": "source's latent mean, relative", "velocity_first": "velocity of the first step, relative",
    "velocity_worst": "velocity of the worst step, relative", "latent": "final latents, relative",
    "pixels_max": "pixels, largest difference of 255", "pixels_mean": "pixels, mean difference of 255",
    "logprobs": "log-probabilities, largest difference", "tokens": "official tokens",
    "tokens_native": "native tokens", "tokens_equal": "same tokens", "first_difference": "first other token at",
}

# Comparing




class FedRuntime(Runtime):
    """A native runtime that is given condition latents, and keeps what its ViT and VAE made of the source.

    tokens: [n, hidden], from `look`.
    mean: [48, t, h, w], that `encode` would have drawn around.
    """

    tokens: Tensor
    mean: Tensor

    def look(self, frames: Sequence[Image.Image], resolution: str) -> tuple[Tensor, Grid]:
        """As Runtime.look, [n, hidden] and their grid; the tokens are kept."""
        self.tokens, grid = super().look(frames, resolution)
        return self.tokens, grid

    def encode(self, frames: Sequence[Image.Image], resolution: str) -> Tensor:
        """The latents that were fed, [frames, rows, columns, 48]; the mean of its own is kept."""
        pixels = vision.unit_range(vision.vae_pixels(frames, resolution, self._crops()))
        with self.using("vae") as vae:
            self.mean = vae.encode(pixels).mean.permute(3, 0, 1, 2)
        return super().encode(frames, resolution)


def compare(request: OfficialRequest, device: torch.device) -> dict[str, Any]:
    """Run both backends on the same samples: dtype, versions, and per sample what differs by how much.

    Args:
        device: of the native run.
    """
    with tempfile.TemporaryDirectory(prefix="lance_official_") as scratch:
        done = run(request, Path(scratch), record=True, kept=Path(scratch))
        native = FedRuntime.load(request.paths, device, getattr(torch, done.reply["dtype"]))
        assert isinstance(native, FedRuntime)
        found = {one.key: _compare_one(native, one, request.settings, load_file(record))
                 for one, record in zip(request.samples, done.records, strict=True)}
    return {"task": request.settings.task, "dtype": done.reply["dtype"], "source": describe(request.checkout),
            "official": {"device": done.reply["device"] or "cpu", "versions": done.reply["versions"]},
            "native": {"device": str(device), "torch": str(torch.__version__)}, "samples": found}


def _compare_one(native: FedRuntime, sample: Question | Prompt, settings: Settings,
                 official: Mapping[str, Tensor]) -> dict[str, Any]:
    if isinstance(sample, Question):
        return _compare_answer(native, sample, settings, official)
    return _compare_drawn(native, sample, settings, official)


def _compare_answer(native: FedRuntime, question: Question, settings: Settings,
                    official: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tokens as both choose them, and log-probabilities in front of each official token."""
    sequence, tokens = native.prompt_of(question, settings.resolution)
    answer = native.answer(sequence, tokens, settings.max_new_tokens)
    theirs = official["ids"].tolist()
    forced = native.forced_logprobs(sequence, tokens, theirs).cpu()
    expected = official["logits"][:, :forced.shape[1]].log_softmax(-1)
    same = [a == b for a, b in zip(answer.ids, theirs, strict=False)]
    found = {"vit": relative_error(tokens.float().cpu(), official["vit"]),
             "logprobs": (forced - expected).abs().max().item(), "tokens": len(theirs),
             "tokens_native": len(answer.ids), "tokens_equal": answer.ids == theirs}
    return found if answer.ids == theirs else found | {"first_difference": [*same, False].index(False)}


def _compare_drawn(native: FedRuntime, prompt: Prompt, settings: Settings,
                   official: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything from the source's features to pixels; the native run gets the official x_T and condition latents."""
    steps: list[generation.Step] = []
    dtype = native.model.dtype
    with native.fed(official.get("condition", official.get("first"))):
        denoiser = denoiser_of(native, prompt, settings)
    found: dict[str, Any] = {} if prompt.visual is None or not _crops_at_random(native, prompt, settings) \
        else {"random_crop": True}
    found |= {"noise": relative_error(denoiser.noise(settings.seed).float(), official["x"][0])}
    latent = generation.sample(denoiser, official["x"][0].to(dtype), steps.append).float().cpu()
    if "vit" in official:
        found["vit"] = relative_error(native.tokens.float().cpu(), official["vit"])
    if "mean" in official:
        found["condition_mean"] = relative_error(native.mean.float().cpu(), official["mean"])
    velocities = torch.stack([step.velocity.float().cpu() for step in steps])
    errors = step_errors(velocities, official["velocity"])
    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in native.decode_frames(latent.to(dtype))])
    levels = (torch.from_numpy(frames).int() - official["pixels"].int()).abs()
    return found | {"velocity_first": errors[0], "velocity_worst": max(errors),
                    "latent": relative_error(latent, official["latent"]), "pixels_max": levels.max().item(),
                    "pixels_mean": levels.double().mean().item()}


def _crops_at_random(native: FedRuntime, prompt: Prompt, settings: Settings) -> bool:
    """Whether the official code cut the source at a random offset, which no recording holds."""
    assert prompt.visual is not None and settings.spec.takes is not None
    frame = native.frames(prompt.visual, settings.spec.takes)[0]
    return any(vision.crops_at_random(*frame.size, base) for base in RESOLUTIONS[settings.resolution])


def table(found: Mapping[str, Any]) -> str:
    """What `compare` found, for a person: a row per sample and quantity."""
    rows = [(key, _MEANING[name], f"{value:.2e}" if isinstance(value, float) else _word(value))
            for key, values in found["samples"].items() for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:<{widths[0]}}  {name:<{widths[1]}}  {value}" for key, name, value in rows)


def _word(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
