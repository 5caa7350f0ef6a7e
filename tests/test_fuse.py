import copy

import pytest
import torch

from lance_quant.formats import layout
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer
from lance_quant.methods import fuse
from lance_quant.methods.fuse import fold_norm


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


# Proofs on the runtime's own layer in float64: two experts, 8 query heads on 2 key/value heads, biases, q/k norms, and
# a call that mixes tokens of both. An exact move leaves the rounding of float64; the wrong ones are off by percents.
CONFIG = LanceConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
                     intermediate_size=96, vocab_size=8, rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(1, 1, 2))
EXACT = 1e-12


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer():
    layer = DecoderLayer(CONFIG).double()
    for seed, (name, parameter) in enumerate(layer.named_parameters()):
        value = normal(*parameter.shape, seed=seed)
        parameter.data = value.abs() + 0.5 if "norm" in name else value / parameter.shape[-1] ** 0.5
    return layer


@torch.no_grad()
def outputs(layer):
    streams = {"und": normal(1, 5, 64, seed=90), "gen": normal(1, 12, 64, seed=91)}
    angles = normal(1, 1, 17, 8, seed=92)
    (row,) = allocate(CONFIG, [17], torch.float64, "cpu")
    out = layer(streams, (angles.cos(), angles.sin()), [row], 0, False)
    return torch.cat([out["und"], out["gen"]], 1)


def off(layer, changed):
    """How far a changed layer is from the original, relative."""
    return float((outputs(changed) - outputs(layer)).norm() / outputs(layer).norm())


def heads(attention):
    return fuse.heads_of(attention.q_norm.weight, attention.v_proj.weight, attention.o_proj.weight)


def scaled_values(layer, scales, spread=None, biases=True):
    """A copy with v_proj divided by a scale per expert and o_proj multiplied."""
    changed = copy.deepcopy(layer)
    attention = changed.self_attn
    spread = spread or heads(attention).spread
    for suffix, s in zip(layout.SUFFIX.values(), scales, strict=True):
        v, o = getattr(attention, f"v_proj{suffix}"), getattr(attention, f"o_proj{suffix}")
        fuse.divide_rows(v.weight.data, v.bias.data if biases else None, s)
        fuse.multiply_columns(o.weight.data, spread(s))
    return changed


def test_geometry_comes_from_shapes(layer):
    assert heads(layer.self_attn) == (2, 4, 8)
    with pytest.raises(ValueError, match="heads of width 5 do not fit"):
        fuse.heads_of(torch.ones(5), torch.ones(16, 3), torch.ones(3, 64))


def test_a_scale_goes_from_values_to_the_output_projection_of_both_experts(layer):
    s = normal(16, seed=5).exp()
    assert off(layer, scaled_values(layer, [s, s])) < EXACT


def test_wrong_ways_to_scale_the_values_are_wrong(layer):
    s, other = normal(16, seed=5).exp(), normal(16, seed=6).exp()
    assert off(layer, scaled_values(layer, [s, other])) > 0.01, "attention mixes the experts"
    assert off(layer, scaled_values(layer, [s, s], spread=lambda s: s.repeat(4))) > 0.01, "query heads come in blocks"
    assert off(layer, scaled_values(layer, [s, s], biases=False)) > 0.01, "biases are part of the values"


def test_a_scale_per_channel_does_not_pass_the_norm_of_the_queries(layer):
    changed, s = copy.deepcopy(layer), normal(64, seed=5).exp()
    q = changed.self_attn.q_proj
    fuse.divide_rows(q.weight.data, q.bias.data, s)
    changed.self_attn.q_norm.weight.data *= s.view(8, 8).mean(0)
    assert off(layer, changed) > 0.01


def test_a_scale_goes_from_up_to_down_in_each_expert(layer):
    changed = copy.deepcopy(layer)
    for seed, suffix in enumerate(layout.SUFFIX.values()):
        mlp, t = getattr(changed, f"mlp{suffix}"), normal(96, seed=seed).exp()
        fuse.divide_rows(mlp.up_proj.weight.data, None, t)
        fuse.multiply_columns(mlp.down_proj.weight.data, t)
    assert off(layer, changed) < EXACT


def test_a_scale_goes_from_norms_to_what_reads_them(layer):
    changed = copy.deepcopy(layer)
    for place in layout.groups(0):
        if place.norm:
            norm = changed.get_submodule(place.norm.removeprefix(f"{layout.LAYERS}.0."))
            folded = fold_norm(norm.weight.data, normal(64, seed=7).exp())
            norm.weight.data = folded.norm.double()
            for name in place.linears:
                fuse.multiply_columns(changed.get_submodule(name.removeprefix(f"{layout.LAYERS}.0.")).weight.data,
                                      folded.column)
    assert off(layer, changed) < EXACT


def test_gather_averages_what_spread_repeats():
    geometry, s = fuse.Heads(2, 3, 4), torch.arange(8.0)
    assert torch.equal(geometry.gather(geometry.spread(s)), s)
    assert torch.equal(geometry.spread(s)[:12], s[:4].repeat(3))
