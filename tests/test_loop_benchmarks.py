"""The benchmarks of the loops: what they restate computes the same, and their last line is the result."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CPU, relative
from made_up_work import ends_badly

from benchmarks import child, decode, denoise, peak_memory, random_lance
from lance_quant.inference.live_bytes import Alive
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LanceConfig

TINY = LanceConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   intermediate_size=256, vocab_size=2048, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(4, 6, 6))
CLOSE = 1e-5  # float32, two layers: the restated ways differ in the order of sums only


@pytest.fixture
def tiny(monkeypatch):
    for module in (decode, denoise, peak_memory):
        monkeypatch.setattr(module, "real_config", lambda layers: replace(TINY, num_hidden_layers=layers))


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@torch.no_grad()
def test_the_growing_cache_reads_as_ours_does():
    model = random_lance.random_lance(TINY, "float32", torch.float32, CPU)
    packed = decode.prompt(9)
    (row,) = allocate(TINY, [9], torch.float32, CPU)
    hidden = []
    for one in (row, decode.GrowingRow(2)):
        for start, end in ((0, 5), (5, 8), (8, 9)):
            last = model.read(model.embed(packed.ids[start:end]), packed.positions[:, start:end], [one], True)
        hidden.append(last)
    assert relative(*hidden) < CLOSE


def test_the_restated_denoising_step_is_ours():
    """Routing by gathering and scattering, two passes, growing caches: the same velocity."""
    model = random_lance.random_lance(TINY, "float32", torch.float32, CPU)
    packed = denoise.request((1, 4, 6))
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    theirs = denoise.official("official", model, packed)
    expected = denoise.ours("ours", model, packed).step(x)
    assert relative(theirs.step(x), expected) < CLOSE
    assert relative(theirs.step(x), expected) < CLOSE  # a step leaves nothing behind


@pytest.mark.parametrize("form", random_lance.FORMATS)
def test_random_weights_are_of_the_right_size_and_width(form):
    """Every format stands for weights of the same deviation, or one of them would run on other numbers."""
    model = random_lance.random_lance(TINY, form, torch.float32, CPU)
    linear = model.language_model.model.layers[0].mlp.gate_proj
    weight = linear.dequantize() if hasattr(linear, "dequantize") else linear.weight.float()
    assert 0.015 < weight.std() < 0.025 and weight.shape == (256, 128)


def test_bytes_of_a_model_are_those_of_its_tensors_once():
    table = torch.zeros(2048, 128)
    model = random_lance.random_lance(TINY, "float32", torch.float32, CPU, ["und"], table)
    own = sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers())
              if not tensor.is_meta)
    assert random_lance.weight_bytes(model) == own  # parameters() knows the shared table once too
    both = random_lance.weight_bytes(random_lance.random_lance(TINY, "float32", torch.float32, CPU, vocabulary=table))
    assert both > own


def test_an_8_bit_vocabulary_takes_a_byte_a_weight():
    sizes = [random_lance.weight_bytes(random_lance.random_lance(TINY, "int4", torch.float32, CPU, head_bits=bits))
             for bits in (16, 8)]
    assert sizes[0] - sizes[1] == 2 * 2048 * (128 * (4 - 1) - 2)  # less a bfloat16 scale per row


def test_decoding_is_timed_for_every_way(tiny, capsys):
    decode.main(["--layers", "2", "--past", "4", "--tokens", "2", "--rounds", "1", "--formats", "float32", "int4",
                 "--head_bits", "16", "8", "--device", "cpu"])
    result = last(capsys)
    assert list(result["rows"]) == ["bfloat16 eager", "bfloat16 official caching", "bfloat16 merged", "float32 merged",
                                    "int4 merged", "int4, 8-bit head, merged"]
    assert result["whole_token"] == "computed: head + 36 x layer"
    row = result["rows"]["int4 merged"]
    assert row["whole_token_ms"] == pytest.approx(row["head_ms"] + 36 * row["layer_ms"])


def test_denoising_is_timed_for_every_way(tiny, capsys):
    denoise.main(["--height", "64", "--width", "64", "--rounds", "1", "--formats", "nvfp4", "--baseline", "float32",
                  "--device", "cpu"])
    result = last(capsys)
    assert list(result["rows"]) == ["float32 batched", "float32 sequential",
                                    "float32 official caching and routing", "float32 merged", "nvfp4 merged"]
    assert result["latents"] == 16 and result["rows"]["float32 batched"]["times_baseline"] == 1


def test_bytes_alive_are_counted_by_hand():
    """Two tensors of 400 bytes, one freed before a third comes; a view and a result in place are no new memory."""
    with Alive() as alive:
        first = torch.empty(100, device="meta")
        second = first + 1
        first.view(10, 10).mul_(2)
        assert (alive.now, alive.peak) == (800, 800)
        del first
        third = second * second
        assert (alive.now, alive.peak) == (800, 800)
        del second, third
    assert (alive.now, alive.peak) == (0, 800)


def case(*flags: str) -> peak_memory.Case:
    (found,) = peak_memory.cases_of(peak_memory.parse_args(["--tasks", "t2i", "--formats", "int4", *flags]))
    return found


def test_what_a_gpu_would_hold_is_weights_and_a_little_more():
    flags = ["--height", "256", "--width", "256", "--device", "meta"]
    found = peak_memory.measure(case(*flags), TINY)
    tokens = 2 * 258  # of both passes; a layer holds gate, up and their product of them at once
    assert found["weights"] + tokens * 3 * 256 * 2 < found["peak"]["denoise"] < 4 * found["weights"]
    batched = found["peak"]["denoise"]
    found = peak_memory.measure(case(*flags, "--sequential_guidance"), TINY)
    assert found["peak"]["denoise"] < batched


def test_a_peak_is_computed_for_all_layers_from_one_layer_s_bytes():
    """A picture of 64 x 64: (85 + 18) entries in two rows of the cache."""
    found = peak_memory.measure(case("--height", "64", "--width", "64", "--device", "cpu"),
                                replace(TINY, num_hidden_layers=1))
    assert found["cache_per_layer"] == 2 * 103 * 2 * 2 * 32 * 4
    assert found["peak_36"]["denoise"] - found["peak"]["denoise"] == 35 * (found["layer"] + found["cache_per_layer"])
    assert found["weights_36"] - found["weights"] == 35 * found["layer"]
    assert found["peak"]["denoise"] > found["weights"]


def test_each_case_of_memory_has_a_line_and_a_row(tiny, capsys):
    peak_memory.main(["--device", "meta", "--tasks", "t2i", "--formats", "bfloat16", "int4", "--layers", "2",
                      "--height", "64", "--width", "64"])
    rows = last(capsys)["rows"]
    assert [(row["format"], row["offload"]) for row in rows] == [("bfloat16", "any"), ("int4", "any")]
    assert rows[1]["weights"] < rows[0]["weights"]


@pytest.mark.parametrize("ending, message", [("raise", "ValueError: as told"), ("exit", "ended with code 3"),
                                             ("sleep", "stopped after 3 s")])
@pytest.mark.slow
def test_work_that_ends_badly_in_a_process_of_its_own_keeps_what_it_gave(ending, message):
    seen = []
    with pytest.raises(child.Died, match=message):
        for value in child.stream(ends_badly, ending, seconds=3 if ending == "sleep" else None):
            seen.append(value)
    assert seen == ["first"]
