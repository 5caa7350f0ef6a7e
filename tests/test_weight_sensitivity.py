import pytest
import torch
from conftest import CPU
from made_up_requests import LAYERS, SRC, TASKS, captures_in, weights_of

import awq_apply
from lance_quant.calibration import weight_sensitivity
from lance_quant.calibration.activation_stats import ActStats, merge, model_fingerprint
from lance_quant.calibration.capture import load
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.calibration.gradients import layer_around
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import awq, gptq
from lance_quant.storage.tensor_file import Checkpoint


def captured_sensitivity(captured, tasks=TASKS):
    return weight_sensitivity.sensitivity_of(SRC, captures_in(captured, tasks), CPU)


@torch.no_grad()
def outputs(sensitivity, changed):
    """What comes out of the wanted calls, by expert, with some weights changed."""
    gradients = sensitivity._gradients
    states = [call.streams for call in gradients.calls]
    for index in range(LAYERS):
        weights = weights_of(index)
        weights.update({name: weight for name, weight in changed.items() if name in weights})
        states = list(gradients.run(layer_around(gradients.config, index, weights), states))
    return {expert: torch.cat([gradients._output(place, states[place][expert]).flatten() for place, other in
                               gradients.wanted.items() if other == expert]) for expert in ("und", "gen")}


@pytest.fixture(scope="module")
def sensitivity(captured):
    """Few tokens, and F of every linear beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_sensitivity, "PROBES", 16)
        patch.setattr(weight_sensitivity, "TOKENS", 60)
        made = captured_sensitivity(captured)
        made.found = {name: fisher for index in reversed(range(LAYERS))
                      for name, fisher in made.of_layer(index, weights_of(index)).items()}
    return made


@pytest.mark.parametrize("layer, expert, kind", [(2, "gen", "down_proj"), (0, "gen", "up_proj"), (0, "und", "k_proj")])
@pytest.mark.slow
def test_sensitivity_predicts_what_an_error_does(sensitivity, layer, expert, kind):
    """Small errors of random sign, whose squares add up. 8 draws of them and 16 of r, each a mean of dozens of
    effective squares, agree within 20 % or so; twice that is allowed. The understanding expert's keys reach the latents
    through the cache alone."""
    name, weights = layout.linear(layer, expert, kind), weights_of(layer)
    weight = weights[f"{name}.weight"]
    scale = 1e-3 * float(weight.square().mean().sqrt())
    exact, generator, changes = outputs(sensitivity, {}), torch.Generator().manual_seed(1), []
    for _ in range(8):
        signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
        changed = outputs(sensitivity, {f"{name}.weight": weight + scale * signs})
        changes.append(sum(float((changed[key] - exact[key]).square().sum() / exact[key].square().sum())
                           for key in exact))
    assert float(sensitivity.found[name].sum()) * scale**2 == pytest.approx(sum(changes) / len(changes), rel=0.4)


def test_what_is_never_read_has_no_sensitivity(captured, monkeypatch):
    """The last layer's down_proj of the prompt's tokens does nothing where only latents are wanted."""
    monkeypatch.setattr(weight_sensitivity, "TOKENS", 60)
    sensitivity = captured_sensitivity(captured)
    sensitivity._wanted = {place: expert for place, expert in sensitivity._wanted.items() if expert == "gen"}
    last = sensitivity.of_layer(LAYERS - 1, weights_of(LAYERS - 1))
    assert last[layout.linear(LAYERS - 1, "und", "down_proj")].abs().max() == 0
    assert last[layout.linear(LAYERS - 1, "gen", "down_proj")].min() > 0


@pytest.mark.parametrize("task, message", [("x2t_image", "no latents"), ("t2i", "no answers")])
def test_captures_of_one_expert_are_refused(captured, task, message):
    with pytest.raises(InputError, match=message):
        captured_sensitivity(captured, [task])


def call(rows, length, tokens, gen=False):
    streams = {"und": torch.zeros(len(rows), tokens, 2)} | ({"gen": torch.zeros(len(rows), 4, 2)} if gen else {})
    return DecoderCall(rows, (length,) * len(rows), not gen, streams, (torch.zeros(1),) * 2, decoded=0 if gen else 1)


def test_requests_are_taken_evenly_with_everything_they_read(monkeypatch):
    """Four prompts of 5 tokens with three steps each, two of them with a second prompt call; and one answer."""
    calls = [call((9,), 0, 6)]
    for row in range(4):
        calls += [call((row,), 0, 5)] + ([call((row,), 5, 3)] if row % 2 else [])
        calls += [call((row,), 8 if row % 2 else 5, 1, gen=True) for _ in range(3)]
    monkeypatch.setattr(weight_sensitivity, "TOKENS", 30)  # 12 steps of 5 tokens: every second
    kept, wanted = weight_sensitivity.selected(calls)
    steps = [place for place, expert in wanted.items() if expert == "gen"]
    assert len(steps) == 6 and list(wanted.values()).count("und") == 1
    for place in steps:
        read = {(other.rows, other.lengths) for other in kept[:place]}
        (row,), (length,) = kept[place].rows, kept[place].lengths
        assert ((row,), (0,)) in read and (length == 5 or ((row,), (5,)) in read)
    assert len(kept) == 1 + 6 + sum(2 if row % 2 else 1 for row in {kept[place].rows[0] for place in steps})


def test_every_captured_call_reads_what_is_kept(captured):
    with Checkpoint(SRC) as source:
        fingerprint = model_fingerprint(source)
    for task in TASKS:
        _, calls = load(captured / f"{task}.safetensors", fingerprint)
        ends = {}
        for found in calls:
            assert all(ends.get(row, 0) >= length for row, length in zip(found.rows, found.lengths, strict=True))
            ends |= {row: length + found.length for row, length in zip(found.rows, found.lengths, strict=True)}


@pytest.mark.slow
def test_a_budget_with_captures_takes_their_word(captured, tmp_path, monkeypatch):
    """The same budget, but other choices."""
    monkeypatch.setattr(awq, "ALPHA_STEPS", 2)
    rest = ["--src", str(SRC), "--stats", str(captured / "all.pt"), "--device", "cpu", "--bits_budget", "4.6"]
    captures = ["--capture", *map(str, captures_in(captured))]
    merge([ActStats.load(captured / f"{task}.pt") for task in TASKS]).save(captured / "all.pt")
    chosen = {}
    monkeypatch.setattr(weight_sensitivity, "TOKENS", 60)
    monkeypatch.setattr(gptq, "SWEEPS", 0)  # the choice is the subject here, not the rounding
    for name, flags in (("stats", []), ("captures", captures)):
        awq_apply.main([*rest, "--out", str(tmp_path / name), *flags])
        with PackedFolder(tmp_path / name) as folder:
            chosen[name] = {linear: spec.group_size for linear, spec in folder.linears.items()}
            assert folder.bits_per_weight <= 4.6
            assert folder.meta["harm"] == ("relative output error" if name == "stats" else "captures")
    assert chosen["captures"] != chosen["stats"]


def test_measuring_asks_from_the_last_layer_to_the_first(captured, monkeypatch):
    monkeypatch.setattr(weight_sensitivity, "TOKENS", 60)
    sensitivity = captured_sensitivity(captured)
    with pytest.raises(AssertionError, match="from the last"):
        sensitivity.of_layer(0, weights_of(0))


def test_the_checkpoint_is_closed_again(captured, monkeypatch):
    monkeypatch.setattr(weight_sensitivity, "TOKENS", 60)
    opened = []

    class Watched(Checkpoint):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(weight_sensitivity, "Checkpoint", Watched)
    sensitivity = captured_sensitivity(captured)
    for index in reversed(range(LAYERS)):
        sensitivity.of_layer(index, weights_of(index))
    assert len(opened) == 1
    with pytest.raises(ValueError, match="closed"):
        opened[0].read(layout.VOCABULARY[0] + ".weight")
