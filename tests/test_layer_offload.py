"""Layer offload: the same results with two layers on the device, each copied once a pass and never under one that runs.

No GPU measured it. On the CPU host memory is copied within host memory: what is on the device is counted in bytes.
"""

import pytest
import torch
from conftest import CPU, GOLDENS

from lance_nano import CHECKPOINT
from lance_quant.cli import command
from lance_quant.errors import InputError
from lance_quant.inference import request
from lance_quant.inference.device import device_of
from lance_quant.inference.layer_offload import HostBus, LayerStream, stream_layers
from lance_quant.inference.memory_plan import Files, How, language_bytes
from lance_quant.inference.pipeline import Pipeline
from lance_quant.lance.config import LancePaths
from lance_quant.lance.runtime import Runtime

MODEL = GOLDENS / "checkpoint" / "Lance_3B"
PACKED = {"float": None, "int4": GOLDENS / "published" / "int4_g64", "nvfp4": GOLDENS / "published" / "nvfp4"}
ALIGNMENT = 256 * 60  # bytes that the at most 60 tensors of a layer may lose


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the CPU be streamed to, as if it were a GPU."""
    monkeypatch.setattr(request, "STREAMS_TO", ("cuda", "cpu"))


def bytes_of(model):
    """Bytes that all tensors of a model keep alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["ondemand", "cached"])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.slow
def test_results_are_equal_and_two_layers_are_on_the_device(on_cpu, name, mode):
    if name == "float" and mode == "cached":
        return
    packed = PACKED[name]
    plain, streamed = (Pipeline.load(MODEL, packed=packed, device="cpu", mode=mode, offload=offload)
                       for offload in ("none", "layers"))
    how = {"height": 48, "width": 64, "num_timesteps": 3}
    picture = plain.draw("a boat", **how)
    assert streamed.draw("a boat", **how).tobytes() == picture.tobytes()
    asked = {"resolution": "image_112res", "max_new_tokens": 5}
    assert streamed.ask(picture, "What?", **asked) == plain.ask(picture, "What?", **asked)
    assert streamed.draw("a boat", **how).tobytes() == picture.tobytes()  # and again, behind another request
    weights = language_bytes(Files.open(LancePaths.find(MODEL), packed), How(torch.float32, False, mode))
    kept = weights.resident("layers")
    assert kept <= bytes_of(streamed.runtime.model) <= kept + 2 * ALIGNMENT
    assert bytes_of(plain.runtime.model) >= weights.total > kept


def test_every_pass_copies_the_layers_that_share_a_slot_once(paths, prompts):
    """3 layers in 2 slots: the first and the third take turns, the second one stays."""
    runtime = Runtime.load(paths, CPU, torch.float32)
    stream = stream_layers(runtime.model, CPU)
    layers, passes = runtime.model.layers(), []
    layers[0].register_forward_hook(lambda *_: passes.append(1))
    denoiser = runtime.denoiser(prompts[0].text, 48, 64, command.Sampling(num_timesteps=2))
    runtime.sample(denoiser)
    assert len(layers) == 3 and len(passes) >= 4
    assert stream.copies == 2 * len(passes) + 1
    assert stream.resident < stream.host


@pytest.mark.parametrize("count", [1, 2])
def test_layers_that_fit_into_the_slots_are_copied_once(paths, count):
    runtime = Runtime.load(paths, CPU, torch.float32)
    stream = LayerStream(runtime.model.layers()[:count], CPU, HostBus())
    x = torch.zeros(1, 3, runtime.model.config.hidden_size)
    for _ in range(3):
        for layer in runtime.model.layers()[:count]:
            with pytest.raises(TypeError):  # what a layer computes is not the point: its hooks run
                layer(x)
    assert stream.copies == count


class Recorder(HostBus):
    """A bus on which nothing is done before it must be: a copy happens at the wait, as late as a GPU may make it."""

    def __init__(self):
        self.said, self.pending, self.running = [], {}, set()

    def copy(self, slot, into, home):
        assert slot not in self.running, "a slot was overwritten while a layer ran on it"
        assert slot not in self.pending, "a copy was overtaken by another"
        self.pending[slot] = (into, home)
        self.said.append(("copy", slot))

    def wait(self, slot):
        if slot in self.pending:
            into, home = self.pending.pop(slot)
            into.copy_(home)
        self.running.add(slot)
        self.said.append(("wait", slot))

    def release(self, slot):
        self.running.discard(slot)
        self.said.append(("release", slot))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_slot_is_overwritten_while_it_is_used_and_the_next_layer_is_under_way(paths, count):
    """With a bus as lazy as may be: every layer still finds its own weights, one copy ahead of the layer that runs."""
    layers = [layer for _ in range(2) for layer in Runtime.load(paths, CPU, torch.float32).model.layers()][:count]
    for index, layer in enumerate(layers):
        layer.input_layernorm.weight.data.fill_(index)
    bus, seen = Recorder(), []
    LayerStream(layers, CPU, bus)
    for layer in layers:
        layer.forward = lambda layer=layer: seen.append((layer.input_layernorm.weight[0].item(), dict(bus.pending)))
    for _ in range(3):
        for layer in layers:
            layer()
    assert [weight for weight, _ in seen] == list(range(count)) * 3
    if count > 3:  # of fewer, one has a slot of its own
        odd = count % 2  # the first layer then shares its slot with the last, and is sent for when that is done
        assert [bool(pending) for _, pending in seen] == [not (odd and index % count == count - 1)
                                                          for index in range(3 * count)]


def test_a_request_that_ends_in_a_layer_leaves_its_slot_free(paths):
    layers = Runtime.load(paths, CPU, torch.float32).model.layers()
    bus = Recorder()
    LayerStream(layers, CPU, bus)
    with pytest.raises(TypeError):
        layers[0](1)
    assert bus.running == set()


@pytest.mark.parametrize("flags, message", [
    (["--device", "cpu"], "offload layers keeps weights in host memory and computes on a CUDA GPU; on cpu they are in "
                          "host memory anyway: leave it out")])
def test_on_a_cpu_it_is_refused(ended, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, err = ended(command.main, "draw", "x", "--offload", "layers", *flags)
    assert code == 2 and message in err and list(tmp_path.iterdir()) == []


def test_compiled_steps_are_refused(on_cpu):
    with pytest.raises(InputError, match="offload layers and compile do not go together"):
        Pipeline.load(CHECKPOINT, device="cpu", offload="layers", compile=True)


def test_a_kernel_by_name_is_checked_where_it_will_compute(on_cpu):
    with pytest.raises(InputError, match="triton"):
        Pipeline.load(MODEL, packed=PACKED["int4"], device="cpu", offload="layers", kernel="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_picture_is_that_of_resident_weights():
    device = str(device_of("cuda"))
    plain, streamed = (Pipeline.load(CHECKPOINT, device=device, offload=offload).draw(
        "a red circle", height=112, width=112, num_timesteps=4) for offload in ("none", "layers"))
    assert plain.tobytes() == streamed.tobytes()
