"""Factors in blocks, against the definition in float64; sizes below, at, and across the block size."""

import pytest
import torch

from lance_quant.cpu import cholesky

SIZES = [1, 2, 7, 16, 33, 50]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    monkeypatch.setattr(cholesky, "PANEL", 24)


def gram(n):
    """Eigenvalues between 1/2 and about 4: a condition of 8 costs a decimal of float32's 7."""
    x = torch.randn(2 * n + 2, n, generator=torch.Generator().manual_seed(n))
    return x.t() @ x / len(x) + 0.5 * torch.eye(n)


@pytest.mark.parametrize("n", SIZES)
def test_the_factor_is_lower_triangular_and_multiplies_to_the_matrix(n):
    a = gram(n)
    factor = a.clone()
    factor[torch.triu(torch.ones(n, n), 1).bool()] = torch.nan  # what is above the diagonal is not read
    assert cholesky.cholesky_(factor)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.double() @ factor.double().t(), a.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_matrix_without_a_factor_is_said_to_have_none(n, bad):
    a = gram(n)
    a[-1, -1] = bad
    assert not cholesky.cholesky_(a)


@pytest.mark.parametrize("n", SIZES)
def test_the_inverse_of_a_factor_undoes_it(n):
    factor = torch.linalg.cholesky(gram(n))
    inverse = factor.clone()
    cholesky.invert_lower_(inverse)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse.double() @ factor.double(), torch.eye(n).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 5])
def test_a_solution_multiplied_by_the_factor_is_the_right_side(n, transposed, width):
    factor, b = torch.linalg.cholesky(gram(n)), torch.randn(n, width)
    x = b.clone()
    cholesky.solve_lower_(factor, x, transposed)
    whole = (factor.t() if transposed else factor).double()
    torch.testing.assert_close(whole @ x.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_turned_twice_is_as_before(n):
    a = torch.arange(n * n).view(n, n).float()
    turned = a.clone()
    cholesky.turn_(turned)
    assert torch.equal(turned, a.flip(0, 1))
