import pytest
import torch
from conftest import CPU
from made_up_requests import LAYERS, SRC, TASKS, captures_in, failing_in, weights_of

import awq_apply
from lance_quant.calibration import capture, token_weights
from lance_quant.calibration.decoder_calls import batched, requests, with_outputs
from lance_quant.calibration.gradients import Gradients, inside, layer_around, layers_of, output_heads_of
from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.formats import layout
from lance_quant.storage.tensor_file import Checkpoint


@pytest.fixture(scope="module")
def source():
    with Checkpoint(SRC) as source:
        yield source


def load(captured, tasks=TASKS, most=100):
    """Sizes, and the calls of at most so many requests."""
    config, calls, _ = capture.load_of(SRC, captures_in(captured, tasks))
    return config, batched([call for request in requests(calls)[:most] for call in request], 64)


def places(calls, expert):
    """DecoderCall and place in it of every token of an expert, in order."""
    return [(index, token) for index, call in enumerate(calls) if expert in call.streams
            for token in range(len(call.rows) * call.streams[expert].shape[1])]


LINEARS = {"x2t_image": [(0, "self_attn.k_proj"), (1, "mlp.down_proj")],
           "t2i": [(0, "self_attn.v_proj"), (1, "self_attn.o_proj_moe_gen")]}


@pytest.fixture(scope="module", params=LINEARS)
def probed(captured, source, request):
    """Two linears, sizes, calls of one task, and their token weights from 64 probes; chunks are small, so that there
    are several."""
    config, calls = load(captured, [request.param], 4 if request.param == "x2t_image" else 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PROBES", 64), ("CHUNK", 60), ("EVEN", 0.0)):
            patch.setattr(token_weights, name, value)
        assert len(list(token_weights._chunks(calls))) > 1
        return LINEARS[request.param], config, calls, token_weights.of_checkpoint(source, config, calls, CPU)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.slow
def test_a_token_weighs_what_an_error_there_does(probed, source, which):
    """Small errors of random sign in what a linear gives for one token, 24 draws, against 64 probes: each mean of
    dozens of effective squares is within 25 % or so of the truth."""
    linears, config, calls, weights = probed
    layer, inside_layer = linears[which]
    name = f"{layout.LAYERS}.{layer}.{inside_layer}"
    found, tokens = weights[name], places(calls, layout.expert_of(name))
    assert len(found) == len(tokens) and found.mean() == pytest.approx(1, abs=1e-3)
    gradients = Gradients(config, layers_of(source, CPU, calls), LAYERS, output_heads_of(source, config), calls,
                          with_outputs(calls), CPU, 0)
    outputs = Outputs(gradients, name, layer)
    exact = outputs.exact()
    chosen = found.sort().indices[torch.linspace(len(found) // 2, len(found) - 1, 5).long()]
    changes = torch.tensor([[float((outputs.with_error(*tokens[index], seed) - exact).square().sum())
                             for seed in range(24)] for index in chosen.tolist()]).mean(1)
    ratios = changes / changes.sum() / (found[chosen] / found[chosen].sum())
    assert ratios.log().abs().max() < 0.7, ratios  # a factor of two


class Outputs:
    """Everything that comes out, with an error in what a linear gives for one token of a call."""

    @torch.no_grad()
    def __init__(self, gradients, name, first):
        self.gradients, self.error = gradients, None
        layers = [layer_around(gradients.config, index, weights_of(index)) for index in range(LAYERS)]
        self.calls = [place for place, call in enumerate(gradients.calls) if layout.expert_of(name) in call.streams]
        layers[first].get_submodule(inside(name, first)).register_forward_hook(self.spoil)
        self.states = [call.streams for call in gradients.calls]  # in front of the linear's layer: no error there
        for layer in layers[:first]:
            self.states = list(gradients.run(layer, self.states))
        self.layers = layers[first:]

    def spoil(self, _, args, output):
        call = next(self.counted)
        if self.error is not None and self.error[0] == call:
            _, token, seed = self.error
            signs = torch.randint(2, output.shape[-1:], generator=torch.Generator().manual_seed(seed)) * 2 - 1
            output.flatten(0, -2)[token] += 1e-3 * signs

    @torch.no_grad()
    def exact(self):
        self.counted, states = iter(self.calls), self.states
        for layer in self.layers:
            states = list(self.gradients.run(layer, states))
        return torch.cat([self.gradients._output(place, states[place][expert]).flatten()
                          for place, expert in self.gradients.wanted.items()])

    def with_error(self, call, token, seed):
        self.error = call, token, seed
        return self.exact()


def test_in_the_last_layer_queries_and_mlps_count_where_something_is_read_off(captured, source):
    """Keys and values count everywhere, since other tokens look at them."""
    config, calls = load(captured)
    found = token_weights.of_checkpoint(source, config, calls, CPU)
    read_off = torch.tensor([bool(calls[index].decoded) and
                             token % calls[index].length >= calls[index].length - calls[index].decoded
                             for index, token in places(calls, "und")])
    assert 0 < read_off.sum() < len(read_off)
    for kind in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        counts = found[layout.linear(LAYERS - 1, "und", kind)]
        assert (counts[~read_off] == torch.tensor(token_weights.EVEN)).all(), kind
        assert (counts[read_off] > token_weights.EVEN).all()
    for kind in ("k_proj", "v_proj"):
        assert (found[layout.linear(LAYERS - 1, "und", kind)] > token_weights.EVEN).float().mean() > 0.9


def test_answers_and_latents_weigh_the_same(captured, source, monkeypatch):
    """The text in front of pictures counts beside that in front of answers, whatever the two are measured in."""
    monkeypatch.setattr(token_weights, "EVEN", 0.0)
    config, calls = load(captured)
    counts = token_weights.of_checkpoint(source, config, calls, CPU)[layout.linear(0, "und", "v_proj")]
    answer = torch.tensor([not any("gen" in other.streams for other in calls
                                   if set(other.rows) & set(calls[index].rows))
                           for index, _ in places(calls, "und")])
    share = counts[answer].sum() / counts.sum()
    assert 0.05 < share < 0.95, share
    heads = output_heads_of(source, config)
    louder = {**heads, "und": torch.nn.Sequential(heads["und"], torch.nn.Linear(64, 64, bias=False))}
    with torch.no_grad():
        louder["und"][1].weight.copy_(1000 * torch.eye(64))
    louder["und"].requires_grad_(False)
    # Hidden states wait in bfloat16 between layers, 3 digits.
    same = token_weights.measure(config, lambda needed: layers_of(source, CPU, needed), LAYERS, louder, calls, CPU)
    torch.testing.assert_close(same[layout.linear(0, "und", "v_proj")], counts, rtol=1e-2, atol=1e-3)


def test_every_linear_that_tokens_reach_has_a_count_for_each(captured, source):
    config, calls = load(captured, ["x2t_image"])
    found = token_weights.of_checkpoint(source, config, calls, CPU)
    assert set(found) == {name for name in layout.linears(LAYERS) if layout.expert_of(name) == "und"}
    assert {len(counts) for counts in found.values()} == {len(places(calls, "und"))}


def test_all_tokens_count_the_same_where_nothing_comes_out(captured, source):
    config, calls = load(captured, ["x2t_image"])
    prompts = [call for call in calls if not call.decoded]
    found = token_weights.of_checkpoint(source, config, prompts, CPU)
    assert len(found) == 7 * LAYERS and all((counts == 1).all() for counts in found.values())
    assert token_weights.of_checkpoint(source, config, [], CPU) == {}


def test_a_job_that_goes_on_does_not_weigh_again(captured, tmp_path, monkeypatch):
    common = ["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--device", "cpu", "--resume", "--capture",
              *map(str, captures_in(captured)), "--out", str(tmp_path / "out")]
    measure, weighed = token_weights.measure, []

    def counting(*args):
        weighed.append(args)
        return measure(*args)

    monkeypatch.setattr(token_weights, "measure", counting)

    with monkeypatch.context() as patch:
        patch.setattr(LayerInputs, "end_layer", failing_in(1))
        with pytest.raises(KeyboardInterrupt):
            awq_apply.main(common)
    awq_apply.main(common)
    assert len(weighed) == 1
