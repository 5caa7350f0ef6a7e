import json

import pytest
import torch
from conftest import CPU, GOLDENS, relative
from safetensors.torch import load_file

import awq_apply
import nvfp4_apply
from lance_quant import capture, layout
from lance_quant.errors import InputError
from lance_quant.lance.cache import allocate
from lance_quant.lance.loader import load_lance
from lance_quant.ours import PLACES
from lance_quant.packed import PackedFolder
from lance_quant.stats import ActStats, Collector, merge, model_fingerprint
from lance_quant.tensorfile import Checkpoint
from quantized_linear import swap_linears

SRC = GOLDENS / "checkpoint" / "Lance_3B"
LAYERS, REQUESTS = 3, 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(start, count):
    return torch.arange(start, start + count).expand(3, -1)


@torch.no_grad()
def draw(model, seed=0, steps=4, latents=24):
    """A request like t2i: a prompt in one of two cache rows, then denoising steps on both; the last hidden states."""
    rows = allocate(model.config, [20 + latents, 20 + latents], model.dtype, CPU)
    ids = torch.randint(500, (15,), generator=torch.Generator().manual_seed(seed))
    model.read(model.embed(ids[:5]), positions(0, 5), rows, True)
    model.read(model.embed(ids[5:]), positions(5, 10), rows[:1], True)
    rope = model.rope(positions(15, latents + 2))
    rope = tuple(x.expand(2, -1, -1, -1) for x in rope)
    hidden = []
    for step in range(steps):
        streams = {"und": model.embed(ids[:2]).expand(2, -1, -1),
                   "gen": rand(latents, model.config.hidden_size, seed=seed * 100 + step).expand(2, -1, -1)}
        hidden.append(model.language_model.model(streams, rope, rows, causal=False)["gen"])
    return hidden


@torch.no_grad()
def answer(model, seed=0, tokens=6):
    """A request like x2t: a bidirectional picture between causal texts, then tokens one by one."""
    (row,) = allocate(model.config, [40], model.dtype, CPU)
    ids = torch.randint(500, (16 + tokens,), generator=torch.Generator().manual_seed(seed))
    model.read(model.embed(ids[:4]), positions(0, 4), [row], True)
    model.read(model.embed(ids[4:12]), positions(4, 8), [row], False)
    model.read(model.embed(ids[12:16]), positions(12, 4), [row], True)
    for place in range(16, 16 + tokens):
        model.read(model.embed(ids[place:place + 1]), positions(place, 1), [row], True)


@pytest.fixture(scope="module")
def captured(tmp_path_factory, pipeline):
    """Two captures, and the statistics of the same runs."""
    folder, model = tmp_path_factory.mktemp("capture"), pipeline.model
    with Checkpoint(SRC) as source:
        fingerprint = model_fingerprint(source)
    for task, request in (("t2i", draw), ("x2t_image", answer)):
        with Collector(model, layout.linears(LAYERS)) as collector, \
                capture.recording(model, folder / f"{task}.safetensors", task, fingerprint) as begin:
            for seed in range(REQUESTS):
                begin(seed)
                request(model, seed)
        collector.stats(task, {"model": fingerprint}).save(folder / f"{task}.pt")
    return folder


def weights_of(layer):
    with Checkpoint(SRC) as source:
        return {name: source.read(name, torch.float32) for name in layout.of_layer(source.specs, layer)}


def in_order(layer):
    """The groups as data flows."""
    return sorted(layout.groups(layer), key=lambda group: PLACES.index(group.place))


def paths(captured):
    return [captured / "t2i.safetensors", captured / "x2t_image.safetensors"]


def test_a_replay_sees_what_the_model_saw(captured):
    """Second moments of every linear's input, summed over both captures, are those of the collected statistics."""
    stats = merge([ActStats.load(captured / f"{task}.pt") for task in ("t2i", "x2t_image")])
    replay = capture.replay_of(SRC, paths(captured), CPU)
    for index in range(LAYERS):
        weights = weights_of(index)
        for group in in_order(index):
            moments = replay.moments(group, weights, weights)
            seen = stats.linears[group.linears[0]]
            assert moments.n_tokens + len(moments.held) == seen.n_tokens
            sums = moments.gram.diagonal() + moments.held.square().sum(0)
            assert relative(sums, seen.sum_sq) < 1e-5, group.name
            assert all(sums is None or not sums.any() for sums in (moments.cross, moments.pull))
        replay.advance(index, weights, weights)


def test_places_cannot_come_out_of_order(captured):
    """Behind the MLP's norm the states are those after attention."""
    replay, weights = capture.replay_of(SRC, paths(captured), CPU), weights_of(0)
    groups = in_order(0)
    replay.moments(groups[-1], weights, weights)
    with pytest.raises(AssertionError, match="attention of this layer"):
        replay.moments(groups[0], weights, weights)


def test_calls_replayed_together_see_the_same(captured, monkeypatch):
    """Denoising steps share their rows' past and overwrite what they leave behind it."""
    weights, seen = weights_of(0), {}
    for batch in (1, 4096):
        monkeypatch.setattr(capture, "_BATCH", batch)
        replay = capture.replay_of(SRC, paths(captured), CPU)
        seen[batch] = len(replay._exact), [replay.moments(group, weights, weights) for group in in_order(0)]
    assert seen[4096][0] < 0.7 * seen[1][0]
    for one, many in zip(seen[1][1], seen[4096][1], strict=True):
        torch.testing.assert_close(one.gram, many.gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.held, many.held, rtol=1e-4, atol=1e-5)


def test_tokens_decoded_one_by_one_are_one_causal_call(pipeline):
    with capture.Recorder(pipeline.model) as recorder:
        answer(pipeline.model, tokens=6)
    assert [(call.causal, call.length, call.lengths) for call in recorder.calls] == \
        [(True, 4, (0,)), (False, 8, (4,)), (True, 10, (12,))]


def test_rows_that_read_the_same_are_stored_once(captured):
    with Checkpoint(captured / "t2i.safetensors") as file:
        facts = json.loads(file.read("capture").numpy().tobytes())
        steps = [index for index, call in enumerate(facts["calls"]) if not call["causal"]]
        assert len(steps) == 4 * REQUESTS
        assert all(file.specs[f"call.{index}.gen"].shape == (1, 24, 64) for index in steps)


@pytest.mark.parametrize("limit", [800, 250, 70])
def test_subsampling_keeps_what_later_calls_read_and_spreads_evenly(pipeline, limit):
    with capture.Recorder(pipeline.model, limit) as recorder:
        for seed in range(4):
            recorder.begin(seed)
            draw(pipeline.model, seed, steps=10)
    calls = recorder.calls
    assert sum(call.tokens for call in calls) <= max(limit, 90)
    for index, call in enumerate(calls):
        before = calls[:index]
        for row, length in zip(call.rows, call.lengths, strict=True):
            past = sum(other.length for other in before if row in other.rows and other.causal)
            assert past == length, "a call lost its past"
    if limit == 800:
        assert len({call.rows for call in calls if not call.causal}) == 4, "every request has some steps left"


@pytest.mark.parametrize("script, flags", [(awq_apply, ["--group_size", "32"]), (nvfp4_apply, ["--slim"])],
                         ids=["int4", "nvfp4"])
def test_gptq_on_replayed_inputs_is_closer_to_the_float_model(captured, tmp_path, pipelines, script, flags):
    """Through the command line. Judged on a captured request: inputs of random weights and random tokens have no
    structure that would carry over to others (trained ones: benchmarks/fidelity_nano.py)."""
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", *flags]
    script.main([*common, "--out", str(tmp_path / "plain")])
    script.main([*common, "--out", str(tmp_path / "gptq"), "--capture", *map(str, paths(captured))])
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
        assert sum(entry["rounding"] == "gptq" for entry in entries) > 30


def test_an_interrupted_run_goes_on_from_its_stored_states(captured, tmp_path, monkeypatch):
    """The second run ends with the bytes of a run that was not interrupted."""
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--capture",
              str(captured / "t2i.safetensors")]
    awq_apply.main([*common, "--out", str(tmp_path / "whole")])
    advance = capture.Replay.advance

    def failing(self, layer, target, current):
        if layer == 1:
            raise KeyboardInterrupt
        advance(self, layer, target, current)

    monkeypatch.setattr(capture.Replay, "advance", failing)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main([*common, "--out", str(tmp_path / "out"), "--resume"])
    monkeypatch.undo()
    awq_apply.main([*common, "--out", str(tmp_path / "out"), "--resume"])
    first, second = (load_file(tmp_path / name / "awq_state_dict.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_expert_without_captured_tokens_says_so(captured, tmp_path):
    awq_apply.main(["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--capture",
                    str(captured / "x2t_image.safetensors"), "--out", str(tmp_path / "out")])
    with PackedFolder(tmp_path / "out") as folder:
        for name, entry in folder.meta["per_weight"].items():
            gen = layout.expert_of(name) == "gen"
            assert (entry.get("reason") == "no captured tokens") == gen
            assert (entry["rounding"] == "searched") == gen


def test_mistakes_are_named(captured, tmp_path):
    with pytest.raises(InputError, match="captured from another model"):
        capture.load(captured / "t2i.safetensors", "0" * 64)
    with pytest.raises(InputError, match="is not a capture"):
        capture.load(SRC / "model.safetensors", "")
    with pytest.raises(InputError, match="no place in the published recipe"):
        awq_apply.main(["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--out", str(tmp_path / "out"),
                        "--recipe", "published", "--capture", str(captured / "t2i.safetensors")])
    with pytest.raises(InputError, match="exists already"), \
            capture.recording(None, captured / "t2i.safetensors", "t2i", ""):
        pass


def test_nothing_is_recorded_without_a_path_and_nothing_run_is_a_mistake(pipeline, tmp_path):
    with capture.recording(pipeline.model, None, "t2i", ""):
        draw(pipeline.model, steps=1)
    with pytest.raises(InputError, match="nothing to capture"), \
            capture.recording(pipeline.model, tmp_path / "x", "t2i", ""):
        pass
    assert not list(tmp_path.iterdir())
