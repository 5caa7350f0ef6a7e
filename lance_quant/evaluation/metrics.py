"""How far a run is from its baseline: pure functions on texts and tensors.

Errors that do not drift come first: teacher-forced distributions over the baseline's own answer, and velocities at
the baseline's own points x_t. Free-running texts, latents and pictures are compared too, but are chaotic: one early
difference changes everything after it.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class TextSimilarity(NamedTuple):
    """Equality, and matching share (0..1) of characters and of words (difflib's ratio)."""

    exact: float
    characters: float
    words: float


def text_similarity(ours: str, theirs: str) -> TextSimilarity:
    """Compare two answers; two empty ones are equal."""

    def ratio(a: str | list[str], b: str | list[str]) -> float:
        return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()

    return TextSimilarity(float(ours == theirs), ratio(ours, theirs), ratio(ours.split(), theirs.split()))


class TokenDivergence(NamedTuple):
    """Per-token KL divergence in nats, baseline from run, and share of tokens with the same top choice."""

    kl: Tensor
    top1: float


def token_divergence(baseline_logprobs: Tensor, logprobs: Tensor) -> TokenDivergence:
    """Compare log-probabilities [tokens, vocabulary] over the same, teacher-forced tokens."""
    kl = (baseline_logprobs.exp() * (baseline_logprobs - logprobs)).double().sum(-1)
    same = baseline_logprobs.argmax(-1) == logprobs.argmax(-1)
    return TokenDivergence(kl.clamp(min=0), same.double().mean().item())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||; 0 where both are zero."""
    difference, scale = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def step_errors(velocities: Tensor, baseline: Tensor) -> list[float]:
    """Relative error of each step's velocity [steps, n, 48]."""
    return [relative_error(ours, theirs) for ours, theirs in zip(velocities, baseline, strict=True)]


def psnr(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB over all frames of two RGB pictures or clips of one size; infinite if equal."""
    total, count = 0.0, 0
    for pair in zip(ours, theirs, strict=True):
        a, b = (torch.from_numpy(np.array(frame.convert("RGB"))).double() for frame in pair)
        total, count = total + (a - b).square().sum().item(), count + a.numel()
    return 10 * math.log10(255**2 * count / total) if total else math.inf
