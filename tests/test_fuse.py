import pytest
import torch

from lance_quant.fuse import fold_norm


def random(n, dtype=torch.float64, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 0.1


@pytest.mark.parametrize("s", [torch.ones(64).double(), random(64, seed=1), random(64, seed=2) * 1e3])
def test_the_fold_is_exact(s):
    """float64: the only rounding left is that of one division and one product, 2^-52."""
    norm = random(64)
    folded = fold_norm(norm, s)
    assert folded.norm.dtype == torch.bfloat16
    torch.testing.assert_close(folded.norm.double() * folded.column, norm, rtol=2**-52, atol=0)


def test_a_linear_behind_the_norm_computes_the_same():
    norm, s, x, w = random(32), random(32, seed=1), random(32, seed=3) - 1, random(32, seed=4) - 1
    folded = fold_norm(norm, s)
    torch.testing.assert_close((x * folded.norm.double()) @ (w * folded.column), (x * norm) @ w, rtol=1e-13, atol=0)


def test_the_rounding_of_the_norm_itself_goes_into_the_weights():
    folded = fold_norm(torch.tensor([1.001]), torch.ones(1))
    assert folded.norm.item() == 1.0 and folded.column.item() == pytest.approx(1.001, rel=1e-7)


def test_a_zero_norm_stays_zero_and_a_vanishing_one_is_not_divided():
    folded = fold_norm(torch.tensor([0.0, -0.5, 1e-39]), torch.tensor([2.0, 0.5, 1e10]))
    assert folded.norm[0] == 0 and folded.column[0] == 1
    assert folded.norm[1] == -1 and folded.column[1] == 0.5
    assert folded.norm[2] != 0 and torch.isfinite(folded.column).all()
    torch.testing.assert_close(folded.norm.float() * folded.column, torch.tensor([0.0, -0.5, 1e-39]), rtol=1e-5, atol=0)
