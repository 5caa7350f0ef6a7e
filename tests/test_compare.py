"""The comparison metrics, on values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lance_quant.evaluation.metrics import (
    bootstrap,
    psnr,
    relative_error,
    step_errors,
    text_similarity,
    token_divergence,
    weighted_mean,
)


def test_equal_texts_are_equal_even_when_empty():
    assert text_similarity("", "") == (1.0, 1.0, 1.0)
    assert text_similarity("two red circles", "two red circles") == (1.0, 1.0, 1.0)


def test_text_similarity_by_hand():
    """"ab" in "abcd": 2 * 2 / 6 characters; one of one and two words: 2 * 0 / 2, then 2 * 1 / 3."""
    assert text_similarity("ab", "abcd") == (0.0, pytest.approx(2 / 3), 0.0)
    assert text_similarity("ab", "ab cd").words == pytest.approx(2 / 3)


def test_kl_by_hand():
    """Fair coin against 1/4, 3/4: 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) = 1/2 ln(4/3)."""
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    divergence = token_divergence(fair, biased)
    assert divergence.kl.tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    assert token_divergence(fair, fair).kl.tolist() == [0.0]
    assert divergence.top1 == 0.0  # argmax of a tie is the first, of the biased coin the second
    assert token_divergence(biased, biased).top1 == 1.0


def test_relative_error_by_hand():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1 / 5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_step_errors_come_one_per_step():
    baseline = torch.ones(2, 3, 48)
    assert step_errors(baseline * torch.tensor([1.0, 1.5])[:, None, None], baseline) == pytest.approx([0.0, 0.5])


def test_psnr_by_hand():
    """All levels off by 5.1 = 255 / 50: 20 log10(50) dB."""
    black, dark = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), (5, 5, 5))
    assert psnr([black], [black]) == math.inf
    assert psnr([black], [dark]) == pytest.approx(20 * math.log10(255 / 5))
    # one of two frames is equal: half the squared error, 3 dB more
    assert psnr([black, black], [dark, black]) == pytest.approx(20 * math.log10(255 / 5) + 10 * math.log10(2))


def test_bootstrap_by_hand():
    """Two samples of weight 1: 0, 1/2 and 1 come with chances 1/4, 1/2, 1/4, so that 95 % reach from 0 to 1."""
    assert bootstrap([0.0, 1.0], [1, 1]) == (0.0, 1.0)
    assert bootstrap([3.0] * 4, [1, 2, 3, 4]) == (3.0, 3.0)
    assert bootstrap([1.0, 2.0, 4.0], [1, 1, 1]) == bootstrap([1.0, 2.0, 4.0], [5, 5, 5])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.inf], [1.0, math.nan]])
def test_there_is_no_interval_of_less_than_two_finite_samples(values):
    assert bootstrap(values, [1] * len(values)) is None


def test_tokens_of_an_answer_stay_together():
    """A long answer decides alone whether it is drawn: the ends are means without it and with nothing else."""
    low, high = bootstrap([1.0, 0.0, 0.0, 0.0], [97, 1, 1, 1])
    assert low == 0.0 and high == pytest.approx(1.0, abs=0.01)
    assert weighted_mean([1.0, 0.0, 0.0, 0.0], [97, 1, 1, 1]) == pytest.approx(0.97)


@pytest.mark.parametrize(("samples", "low", "high"), [(5, 0.74, 0.86), (20, 0.85, 0.95)])
def test_how_often_an_interval_holds_the_mean(samples, low, high):
    """The figures in bootstrap's docstring: of lognormal(0, 1/2), whose mean is exp(1/8). 0.80 and 0.90 measured; three
    standard deviations of a share of 400 are 0.06 and 0.045."""
    draw = np.random.default_rng(1)
    intervals = [bootstrap(list(draw.lognormal(0, 0.5, samples)), [1] * samples) for _ in range(400)]
    assert low < sum(one.low <= math.exp(0.125) <= one.high for one in intervals) / 400 < high
