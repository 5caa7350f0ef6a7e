import pytest
import torch
from conftest import CPU, relative
from made_up_requests import LAYERS, SRC, TASKS, captures_in, draw, failing_in, in_order, weights_of
from safetensors.torch import load_file

import awq_apply
import nvfp4_apply
from lance_quant.calibration import capture, hidden_states
from lance_quant.calibration import layer_inputs as layer_inputs_module
from lance_quant.calibration.activation_stats import ActStats, merge
from lance_quant.calibration.decoder_calls import batched, thinned
from lance_quant.calibration.gradients import Gradients, inside, layer_around
from lance_quant.calibration.layer_inputs import LIGHT_TOKENS, LayerInputs, Step, layer_inputs_of
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.loader import load_lance
from quantized_linear import swap_linears


def even_layer_inputs(captured, weigh=None):
    """All tokens count the same, unless they are weighed."""
    config, calls, _ = capture.load_of(SRC, captures_in(captured))
    return LayerInputs(config, calls, CPU, weigh=weigh)


def weighed(captured, weigh):
    layer_inputs = even_layer_inputs(captured, weigh)
    layer_inputs.weigh_tokens()
    return layer_inputs


def measured(layer_inputs, index, weights, groups=None):
    """Gram statistics of a layer whose linears all stay as they are, in order of its groups."""
    layer_inputs.begin_layer(index, weights)
    for group in groups or in_order(index):
        if group.place == "mlp_in" and layer_inputs._step is Step.ATTENTION:
            layer_inputs.pass_attention(weights)
        yield group, layer_inputs.gram_stats(group, weights)
    layer_inputs.end_layer(weights)


def test_layer_inputs_are_what_the_model_saw(captured):
    """Second moments of every linear's input, summed over both captures, are those of the collected statistics."""
    stats = merge([ActStats.load(captured / f"{task}.pt") for task in TASKS])
    layer_inputs = even_layer_inputs(captured)
    for index in range(LAYERS):
        for group, (moments, *others) in measured(layer_inputs, index, weights_of(index)):
            assert all(other is moments for other in others), "one Gram matrix serves them all"
            seen = stats.linears[group.linears[0]]
            assert moments.n_tokens + len(moments.held) == seen.n_tokens
            sums = moments.gram.diagonal() + moments.held.square().sum(0)
            assert relative(sums, seen.sum_sq) < 1e-5, group.name
            assert all(sums is None or not sums.any() for sums in (moments.cross, moments.cross_target))


def test_the_light_way_sees_the_float_model_alone(captured):
    """Whatever is packed changes nothing, and nothing is missing that could be made up for."""
    config, calls, _ = capture.load_of(SRC, captures_in(captured))
    found = []
    for factor in (1.0, 1.5):
        layer_inputs, seen = LayerInputs(config, calls, CPU, light=True), []
        layer_inputs.weigh_tokens()
        for index in range(LAYERS):
            weights = weights_of(index)
            packed = {name: w * factor if w.dim() == 2 else w for name, w in weights.items()}
            layer_inputs.begin_layer(index, weights)
            for group in in_order(index):
                if group.place == "mlp_in" and layer_inputs._step is Step.ATTENTION:
                    layer_inputs.pass_attention(packed)
                seen += layer_inputs.gram_stats(group, packed)
            layer_inputs.end_layer(packed)
        found.append(seen)
    full = LayerInputs(config, thinned(calls, LIGHT_TOKENS), CPU)
    wanted = [moments for index in range(LAYERS) for _, own in measured(full, index, weights_of(index))
              for moments in own]
    for one, other, even in zip(*found, wanted, strict=True):
        assert torch.equal(one.gram, other.gram) and one.cross is None and one.cross_target is None
        assert one.block == config.hidden_size and torch.equal(one.held, one.held_float)
        assert all(torch.equal(one.gram[span, span], even.gram[span, span]) for span in one.spans)


def test_steps_out_of_order_are_refused(captured, tmp_path):
    """Each in the state that it would spoil; nothing of a layer is stored."""
    weights, (first, *_, last) = weights_of(0), in_order(0)
    unweighed = even_layer_inputs(captured, lambda calls: {})
    with pytest.raises(RuntimeError, match="before weigh_tokens, not between two layers"):
        unweighed.begin_layer(0, weights)
    layer_inputs = even_layer_inputs(captured)
    for early in (lambda: layer_inputs.gram_stats(first, weights), lambda: layer_inputs.pass_attention(weights),
                  lambda: layer_inputs.end_layer(weights)):
        with pytest.raises(RuntimeError, match="layer inputs are between two layers, not"):
            early()
    layer_inputs.begin_layer(0, weights)
    for early in (lambda: layer_inputs.gram_stats(last, weights), lambda: layer_inputs.end_layer(weights),
                  lambda: layer_inputs.begin_layer(1, weights), lambda: layer_inputs.save(tmp_path / "state")):
        with pytest.raises(RuntimeError, match="in front of a layer's attention, not"):
            early()
    layer_inputs.pass_attention(weights)
    with pytest.raises(RuntimeError, match="between a layer's attention and its MLPs, not"):
        layer_inputs.gram_stats(first, weights)
    assert not list(tmp_path.iterdir())


def test_every_token_counts_as_it_was_weighed(captured, monkeypatch):
    """Random counts, others for each linear, against the inputs that hooks see when the same calls are run."""
    monkeypatch.setattr(hidden_states, "PIECE", 7)
    generator, weights, seen, known = torch.Generator().manual_seed(0), weights_of(0), {}, {}

    def weigh(calls):
        known["calls"] = calls
        for name in layout.linears(1):
            expert = layout.expert_of(name)
            tokens = sum(call.streams[expert].shape[:2].numel() for call in calls if expert in call.streams)
            known[name] = torch.rand(tokens, generator=generator) * 2
        return known

    layer_inputs = weighed(captured, weigh)
    found = list(measured(layer_inputs, 0, weights))
    config, *_ = capture.load_of(SRC, captures_in(captured))
    layer = layer_around(config, 0, weights)
    for name in layout.linears(1):
        layer.get_submodule(inside(name, 0)).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
    with torch.no_grad():
        list(Gradients(config, lambda _: weights, 0, {}, known["calls"], {}, CPU, 0).run(
            layer, [call.streams for call in known["calls"]]))
    for group, moments in found:
        for name, own in zip(group.linears, moments, strict=True):
            x = torch.cat(seen[name])
            torch.testing.assert_close(own.gram + own.held.t() @ own.held, x.t() @ (x * known[name][:, None]),
                                       rtol=1e-3, atol=1e-3)


def test_calls_that_run_together_see_the_same(captured, monkeypatch):
    """Requests side by side, and denoising steps, which share their rows' past and overwrite what they leave behind."""
    weights, seen = weights_of(0), {}
    for batch in (1, 4096):
        monkeypatch.setattr(layer_inputs_module, "BATCH", batch)
        layer_inputs = even_layer_inputs(captured)
        seen[batch] = len(list(layer_inputs.hidden())), [found[0] for _, found in measured(layer_inputs, 0, weights)]
    assert seen[4096][0] < 0.3 * seen[1][0]
    for one, many in zip(seen[1][1], seen[4096][1], strict=True):
        sums = [moments.gram + moments.held.t() @ moments.held for moments in (one, many)]  # held back are others
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("room", [0, 4 * 300 * 64, hidden_states.ROOM])
def test_what_is_not_kept_is_made_again(captured, monkeypatch, room):
    """No room, room for what attention makes of 300 tokens of 64 channels, room for all: the states are those of the
    layers run as a whole, here of a model whose o_proj and down_proj change after they were measured."""
    monkeypatch.setattr(hidden_states, "ROOM", room)
    config, calls, _ = capture.load_of(SRC, captures_in(captured))
    layer_inputs = LayerInputs(config, calls, CPU)
    weights = weights_of(0)
    changed = {name: w * 1.1 if "o_proj" in name or "down_proj" in name else w for name, w in weights.items()}
    layer_inputs.begin_layer(0, weights)
    for group in in_order(0):
        if group.place == "mlp_in" and layer_inputs._step is Step.ATTENTION:
            layer_inputs.pass_attention(changed)
        layer_inputs.gram_stats(group, weights)
    layer_inputs.end_layer(changed)
    together = batched(calls, layer_inputs_module.BATCH)
    with torch.no_grad():
        gradients = Gradients(config, lambda _: weights, 0, {}, together, {}, CPU, 0)
        wanted = [list(gradients.run(layer_around(config, 0, own), [call.streams for call in together]))
                  for own in (weights, changed)]
    for (exact, packed), *streams in zip(layer_inputs.hidden(), *wanted, strict=True):
        for call, found in zip((exact, packed), streams, strict=True):
            for expert, x in found.items():
                torch.testing.assert_close(call.streams[expert], x.expand(call.streams[expert].shape), rtol=1e-5,
                                           atol=1e-5)


@pytest.mark.parametrize("script, flags", [(awq_apply, ["--group_size", "32"]), (nvfp4_apply, ["--slim"])],
                         ids=["int4", "nvfp4"])
@pytest.mark.slow
def test_gptq_on_captured_inputs_is_closer_to_the_float_model(captured, tmp_path, pipelines, script, flags):
    """Through the command line. Judged on a captured request: inputs of random weights and random tokens have no
    structure that would carry over to others (trained ones: benchmarks/fidelity_nano.py)."""
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", *flags]
    script.main([*common, "--out", str(tmp_path / "plain")])
    script.main([*common, "--out", str(tmp_path / "gptq"), "--capture", *map(str, captures_in(captured))])
    wanted, error = draw(pipelines["f32"].model, seed=3), {}
    for name in ("plain", "gptq"):
        with PackedFolder(tmp_path / name) as folder:
            model = load_lance(folder.checkpoint, pipelines["f32"].model.config, CPU, torch.float32, torch.float32,
                               lambda model, folder=folder: swap_linears(model, folder, torch.float32, CPU))
        error[name] = sum(relative(a, b) ** 2 for a, b in zip(draw(model, seed=3), wanted, strict=True))
    assert error["gptq"] < 0.8 * error["plain"], error
    with PackedFolder(tmp_path / "gptq") as folder:
        entries = folder.meta["per_weight"].values()
        assert {entry["rounding"] for entry in entries} <= {"gptq", "nearest"}
        assert sum(entry["rounding"] == "gptq" for entry in entries) > len(entries) / 2


@pytest.mark.parametrize("flags", [[], ["--gptq", "light"]], ids=["full", "light"])
@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_stored_states(captured, tmp_path, monkeypatch, flags):
    """The second run ends with the bytes of a run that was not interrupted."""
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--capture",
              str(captured / "t2i.safetensors"), *flags]
    awq_apply.main([*common, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(LayerInputs, "end_layer", failing_in(1))
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main([*common, "--out", str(tmp_path / "out"), "--resume"])
    monkeypatch.undo()
    awq_apply.main([*common, "--out", str(tmp_path / "out"), "--resume"])
    first, second = (load_file(tmp_path / name / "awq_state_dict.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_light_way_is_asked_for_with_captures_and_noted(captured, tmp_path, ended):
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--gptq", "light"]
    code, said = ended(awq_apply.main, *common, "--out", str(tmp_path / "out"))
    assert code == 2 and "give --capture" in said and not (tmp_path / "out").exists()
    awq_apply.main([*common, "--out", str(tmp_path / "out"), "--capture", *map(str, captures_in(captured))])
    with PackedFolder(tmp_path / "out") as folder:
        assert folder.meta["gptq"] == "light" and len(folder.meta["captures"]) == len(TASKS)
        assert any(entry["rounding"] == "gptq" for entry in folder.meta["per_weight"].values())


def test_states_of_another_version_are_refused(captured, tmp_path):
    """Unweighed ones, and other shapes."""
    even_layer_inputs(captured).save(tmp_path / "state")
    with pytest.raises(InputError, match="another version"):
        layer_inputs_of(SRC, captures_in(captured), CPU).load(tmp_path / "state")
    with pytest.raises(InputError, match="another version"):
        layer_inputs_of(SRC, captures_in(captured, ["t2i"]), CPU).load(tmp_path / "state")


def test_an_expert_without_captured_tokens_says_so(captured, tmp_path):
    awq_apply.main(["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--capture",
                    str(captured / "x2t_image.safetensors"), "--out", str(tmp_path / "out")])
    with PackedFolder(tmp_path / "out") as folder:
        for name, entry in folder.meta["per_weight"].items():
            gen = layout.expert_of(name) == "gen"
            assert (entry.get("reason") == "no captured tokens") == gen
            assert (entry["rounding"] == "searched") == gen
