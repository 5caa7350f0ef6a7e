"""Layer offload: the decoder's weights stay in host memory and stream to the GPU layer by layer, one ahead.

As ZeRO-Inference (arXiv:2206.01861, 2207.00032) and FlexGen (arXiv:2303.06865) do: while a layer computes, the next one
is copied from pinned memory on a stream of its own. On the device are two slots, each as large as the largest layer,
and what is in no layer: embedding, head, norms. Layer i always lives in slot i % 2, so that its tensors are views that
are made once, and a copy is one of plain bytes.

Every pass of the model copies every layer. Reading a prompt and denoising compute long enough to hide much of that;
decoding a token does not: a token then takes as long as the bus needs for all layers.

No GPU has run this yet. On a CPU the same code copies within host memory, which serves nothing but tests.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lance_quant.lance.mot import DecoderLayer, Lance

SLOTS = 2
_ALIGNED = 256  # bytes; every dtype and vector load is aligned in a slot


class Bus(Protocol):
    """What brings bytes into slots, in step with what computes on them."""

    def copy(self, slot: int, into: Tensor, home: Tensor) -> None:
        """Begin to copy the bytes [n] of `home` into a slot, once all that was released has run."""
        ...

    def wait(self, slot: int) -> None:
        """Let whatever computes next wait for the slot's copy."""
        ...

    def release(self, slot: int) -> None:
        """What computes on the slot has been sent for: the next copy into it may begin when that has run."""
        ...


class HostBus:
    """Copies that are done when they return."""

    def copy(self, slot: int, into: Tensor, home: Tensor) -> None:
        """See Bus; bytes [n]."""
        into.copy_(home)

    def wait(self, slot: int) -> None:
        """See Bus."""

    def release(self, slot: int) -> None:
        """See Bus."""


class CudaBus:
    """Copies from pinned memory on a stream of their own; events keep them in step with the current stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # slots may lie where something still computes
        self._copied, self._released = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))

    def copy(self, slot: int, into: Tensor, home: Tensor) -> None:
        """See Bus; bytes [n]."""
        self._stream.wait_event(self._released[slot])
        with torch.cuda.stream(self._stream):
            into.copy_(home, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """See Bus."""
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        """See Bus."""
        self._released[slot].record(torch.cuda.current_stream(self._device))


def stream_layers(model: Lance, device: torch.device) -> "LayerStream":
    """Let a model whose weights are in host memory run on a device; the last thing done to it.

    Its layers' tensors hold something only while their layer runs.

    Args:
        model: on the CPU, loaded and merged.
        device: where it is to run.
    """
    layers = model.layers()
    inside = {id(module) for layer in layers for module in layer.modules()}
    stream = LayerStream(layers, device, CudaBus(device) if device.type == "cuda" else HostBus())
    for module in model.modules():
        if id(module) not in inside and not list(module.children()):
            module.to(device)
    model.device = device
    return stream


class LayerStream:
    """Two slots on a device, and the layers that take turns in them.

    copies: layers that were copied so far. resident: bytes of the slots. host: bytes of all layers, in host memory.
    """

    def __init__(self, layers: Sequence[DecoderLayer], device: torch.device, bus: Bus):
        self.copies, self._bus = 0, bus
        sizes = [sum(_room(tensor) for _, _, tensor in _tensors(layer)) for layer in layers]
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in layers[:SLOTS]]
        self._holds: list[int | None] = [None] * len(self._slots)
        self._home = [self._moved(index, layer, size)
                      for index, (layer, size) in enumerate(zip(layers, sizes, strict=True))]
        self.resident, self.host = sum(slot.nbytes for slot in self._slots), sum(sizes)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(index))
            layer.register_forward_hook(self._after(index), always_call=True)

    def _moved(self, index: int, layer: DecoderLayer, size: int) -> Tensor:
        """A layer's bytes [n] in host memory; its tensors become views of its slot."""
        slot, end = self._slots[self._slot(index)], 0
        home = torch.empty(size, dtype=torch.uint8, pin_memory=slot.is_cuda)
        for owner, name, tensor in list(_tensors(layer)):
            here = slice(end, end + tensor.nbytes)
            home[here].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
            view = slot[here].view(tensor.dtype).view(tensor.shape)
            setattr(owner, name, nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view)
            end += _room(tensor)
        return home

    def _slot(self, index: int) -> int:
        return index % len(self._slots)

    def _before(self, index: int) -> Callable[..., None]:
        """A hook that lets a layer wait for its weights, and sends for the next one's."""
        following = (index + 1) % len(self._home)

        def hook(*_: object) -> None:
            self._fetch(index)
            self._bus.wait(self._slot(index))
            if self._slot(following) != self._slot(index):
                self._fetch(following)

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._bus.release(self._slot(index))

        return hook

    def _fetch(self, index: int) -> None:
        slot = self._slot(index)
        if self._holds[slot] != index:
            self._holds[slot], self.copies = index, self.copies + 1
            self._bus.copy(slot, self._slots[slot][:self._home[index].nbytes], self._home[index])


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor, of any shape, takes in a slot."""
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _tensors(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Owner, name and value of every parameter and buffer of a layer, in order."""
    for module in layer.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield module, name, tensor
