"""Distances between a run and its baseline: KL divergence, velocity error, PSNR, and bootstrap intervals of means.

Errors that do not drift come first: teacher-forced distributions over the baseline's own answer, and velocities at
the baseline's own points x_t. Free-running texts, latents and pictures are compared too, but are chaotic: one early
difference changes everything after it. All functions here are pure: texts, tensors and numbers in, numbers out.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_RESAMPLES, _CONFIDENCE = 2000, 0.95  # more draws would move an end by 1 to 2 % of the width


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
    """Per-token KL divergence float64 [tokens] in nats, baseline from run, and share of tokens with the same top
    choice."""

    kl: Tensor
    top1: float


def token_divergence(baseline_logprobs: Tensor, logprobs: Tensor) -> TokenDivergence:
    """Compare two models over the same, teacher-forced tokens.

    Args:
        baseline_logprobs: [tokens, vocabulary] natural logarithms of probabilities.
        logprobs: [tokens, vocabulary], of the run.
    """
    kl = (baseline_logprobs.exp() * (baseline_logprobs - logprobs)).double().sum(-1)
    same = baseline_logprobs.argmax(-1) == logprobs.argmax(-1)
    return TokenDivergence(kl.clamp(min=0), same.double().mean().item())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs|| of two tensors of one shape; 0 where both are zero, infinite where only theirs is.
    """
    difference, scale = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def step_errors(velocities: Tensor, baseline: Tensor) -> list[float]:
    """Relative error of each step's velocity; both are [steps, cells, 48]."""
    return [relative_error(ours, theirs) for ours, theirs in zip(velocities, baseline, strict=True)]


def psnr(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB over all frames of two RGB pictures or clips of one size; infinite if equal.

    Raises:
        ValueError: the clips differ in length.
    """
    total, count = 0.0, 0
    for pair in zip(ours, theirs, strict=True):
        a, b = (torch.from_numpy(np.array(frame.convert("RGB"))).double() for frame in pair)
        total, count = total + (a - b).square().sum().item(), count + a.numel()
    return 10 * math.log10(255**2 * count / total) if total else math.inf


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """sum(w x) / sum(w)."""
    return float(np.average(values, weights=weights))


def bootstrap(values: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """95 % percentile bootstrap interval of `weighted_mean`; None for fewer than two samples, or an
    infinite one.

    Samples are drawn with replacement, each with its weight, so that tokens of one answer stay together (Efron, 1979,
    "Bootstrap methods"). The draws are the same in every call: equal input, equal interval. With few samples such an
    interval is too narrow: of skewed errors about 80 % of them hold the true mean with 5 samples, 90 % with 20
    (tests/test_compare.py).
    """
    x, w = np.asarray(values, float), np.asarray(weights, float)
    if len(x) < 2 or not np.isfinite(x).all():
        return None
    drawn = np.random.default_rng(0).integers(len(x), size=(_RESAMPLES, len(x)))
    means = (w * x)[drawn].sum(1) / w[drawn].sum(1)
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(float(low), float(high))
