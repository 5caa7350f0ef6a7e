"""The decoder, call by call, against the recorded official activations."""

import pytest
import torch
from conftest import CPU, relative

from lance_quant.lance.cache import allocate
from lance_quant.lance.mot import Attention, LatentPositions, Rotary, TimestepEmbedder

# Norm-relative, float32: the recordings agree with an independent re-implementation to 9e-7; 1e-5 leaves room for
# other threads and instruction sets and is a hundredth of the smallest real deviation (rotary rounding: 1.6e-3).
CLOSE = 1e-5


def run_call(model, tensors, call, row, causal, vision_frame=False):
    """Feed a recorded call; return layer outputs and final hidden state in the official token order."""
    x, positions = tensors[f"s0.call{call}.x"], tensors[f"s0.call{call}.pos"][:, 0]
    outputs = []

    def joined(streams):
        und, gen = streams["und"][0], streams.get("gen")
        return und if gen is None else torch.cat([und[:1], gen[0], und[1:]])

    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(joined(out)))
             for layer in model.language_model.model.layers]
    streams, order = {"und": x[None]}, positions
    if vision_frame:
        streams = {"und": x[None, [0, -1]], "gen": x[None, 1:-1]}
        order = torch.cat([positions[:, [0, -1]], positions[:, 1:-1]], 1)
    with torch.no_grad():
        hidden = model.language_model.model(streams, model.rope(order), [row], causal)
    for hook in hooks:
        hook.remove()
    return outputs, joined(hidden)


def check_call(tensors, call, outputs, hidden):
    for index, output in enumerate(outputs):
        assert relative(output, tensors[f"s0.call{call}.layer{index}.out"]) < CLOSE, f"call {call} layer {index}"
    assert relative(hidden, tensors[f"s0.call{call}.hidden"]) < CLOSE


@pytest.mark.parametrize("variant", ["f32", "f32r"])
def test_understanding_calls_equal_the_official_ones(pipelines, x2t, variant):
    """Causal, bidirectional picture, causal with a past, single token."""
    model, tensors = pipelines[variant].model, x2t[variant].tensors
    if "s0.call0.x" not in tensors:
        pytest.skip("this recording has no activations")
    (row,) = allocate(model.config, [200], torch.float32, CPU)
    for call, causal in ((0, True), (1, False), (2, True), (3, True)):
        outputs, hidden = run_call(model, tensors, call, row, causal)
        check_call(tensors, call, outputs, hidden)
        row.commit(hidden.shape[0])


@pytest.mark.parametrize("variant", ["f32", "f32r"])
def test_denoise_calls_route_both_experts_as_officially(pipelines, t2i, variant):
    """The conditional and the unconditional call of step 0, behind their recorded prefixes."""
    model, tensors = pipelines[variant].model, t2i[variant].tensors
    rows = allocate(model.config, [200, 200], torch.float32, CPU)
    for row, prefix, denoise in ((rows[0], (0, 2, 3), 5), (rows[1], (1, 4), 6)):
        for call in prefix:
            _, hidden = run_call(model, tensors, call, row, True)
            row.commit(hidden.shape[0])
        check_call(tensors, denoise, *run_call(model, tensors, denoise, row, False, vision_frame=True))


def test_swapped_experts_are_noticed(pipelines, t2i):
    """The test above would fail if latents went through the understanding expert."""
    model, tensors = pipelines["f32"].model, t2i["f32"].tensors
    (row,) = allocate(model.config, [200], torch.float32, CPU)
    for call in (0, 2, 3):
        row.commit(run_call(model, tensors, call, row, True)[1].shape[0])
    _, hidden = run_call(model, tensors, 5, row, False)
    assert relative(hidden, tensors["s0.call5.hidden"]) > 0.1


@pytest.mark.parametrize("variant", ["f32", "f32r"])
def test_rotary_frequencies_are_rounded_as_the_recording_says(pipelines, t2i, variant):
    recorded = t2i[variant].meta["inv_freq"]["language_model.model.rotary_emb.inv_freq"]["values"]
    ours = pipelines[variant].model.language_model.model.rotary.inv_freq
    torch.testing.assert_close(ours, torch.tensor(recorded), rtol=2e-7, atol=0)  # one float32 rounding of a power


def test_latent_positions_and_time_embedding_equal_the_official_ones(pipeline, t2i):
    model, tensors = pipeline.model, t2i["f32"].tensors
    assert relative(model.latent_pos_embed((1, 6, 8)), tensors["s0.latpos.0"]) < CLOSE
    with torch.no_grad():
        embedded = model.time_embedder(tensors["s0.t.1"], torch.float32)
    assert relative(embedded, tensors["s0.t_emb.1"]) < CLOSE


def test_latent_positions_by_hand():
    """Width 6: two per axis, [sin p, cos p] each at frequency 1."""
    table = LatentPositions(6)
    table.compute_buffers(torch.float32, CPU)
    row = table((1, 2, 3))[5]  # frame 0, row 1, column 2
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0])
    torch.testing.assert_close(row, torch.where(torch.arange(6) % 2 == 0, expected.sin(), expected.cos()))


def test_rotary_deals_its_frequencies_to_three_axes(pipeline):
    """Moving along one axis turns only that axis's section of every head."""
    rotary = Rotary(pipeline.model.config)
    rotary.compute_buffers(torch.float32, CPU)
    origin = rotary(torch.zeros(1, 3, 1, dtype=torch.long), torch.float32)[0][0, 0, 0]
    first = 0
    for axis, size in enumerate(pipeline.model.config.mrope_section):
        positions = torch.zeros(1, 3, 1, dtype=torch.long)
        positions[0, axis] = 1
        turned = (rotary(positions, torch.float32)[0][0, 0, 0] != origin).nonzero().flatten().tolist()
        half = len(origin) // 2
        section = set(range(first, first + size))
        # the slowest frequencies (about 3e-6) change a cosine by less than float32 can show
        assert set(turned) <= section | {half + index for index in section}
        assert first in turned or size == 0 or axis == 2
        first += size


def test_cache_refuses_to_overflow(pipeline):
    (row,) = allocate(pipeline.model.config, [2], torch.float32, CPU)
    kv = torch.zeros(pipeline.model.config.num_key_value_heads, 3, pipeline.model.config.head_dim)
    with pytest.raises(AssertionError, match="cache of 2 entries cannot hold 3"):
        row.extend(0, kv, kv)


def test_time_embedder_takes_t_between_0_and_1():
    """t is not multiplied by 1000: at the lowest frequency, 1 radian at t = 1."""
    embedder = TimestepEmbedder(4)
    seen = []
    embedder.mlp = torch.nn.Sequential(torch.nn.Identity())
    embedder.mlp.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    embedder(torch.tensor([1.0]), torch.float32)
    assert seen[0][0, 0].item() == pytest.approx(torch.tensor(1.0).cos().item())
    assert seen[0][0, 128].item() == pytest.approx(torch.tensor(1.0).sin().item())


@pytest.mark.parametrize("expert", ["und", "gen"])
def test_bfloat16_keeps_q_and_k_wide_in_calls_with_latents_only(pipeline, expert):
    """Official precision: with latent tokens, float32 from before the norm through the rotation, then one rounding;
    without, every step rounds. Worked out here for the keys."""
    config = pipeline.model.config
    attention = Attention(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
    streams = {"und": torch.randn(1, 3, config.hidden_size, generator=generator).to(torch.bfloat16)}
    if expert == "gen":
        streams["gen"] = torch.randn(1, 4, config.hidden_size, generator=generator).to(torch.bfloat16)
    count = sum(x.shape[1] for x in streams.values())
    rotary = Rotary(config)
    rotary.compute_buffers(torch.bfloat16, CPU)
    rope = rotary(torch.arange(count).expand(1, 3, count), torch.bfloat16)
    with torch.no_grad():
        _, ours, _ = attention.project(streams, rope)

        def keys(dtype):
            k = attention.k_proj(streams["und"]).unflatten(-1, (-1, config.head_dim)).transpose(1, 2).to(dtype)
            normed = k.float() * torch.rsqrt(k.float().square().mean(-1, keepdim=True) + config.rms_norm_eps)
            k = attention.k_norm.weight * normed.to(dtype)
            first, second = k.chunk(2, -1)
            cos, sin = (part[:, :, :3] for part in rope)
            return (k * cos + torch.cat([-second, first], -1) * sin).to(torch.bfloat16)[0]

    wide, narrow = keys(torch.float32), keys(torch.bfloat16)
    assert not torch.equal(wide, narrow)
    assert torch.equal(ours[0, :, :3], wide if expert == "gen" else narrow)
