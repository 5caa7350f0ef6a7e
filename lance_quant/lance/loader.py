"""Checkpoint loading: build on the meta device, demand exact agreement of keys, stream tensors one at a time.

Host memory beside the model itself stays at a few pieces of 16 MB, whatever the size of the checkpoint: tensors are
read by offsets and converted on the way to their final dtype and device. Packed linears are put in by `prepare` while
the model is still on meta, so that the float weights they replace never exist.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.formats.layout import IGNORED, VIT_PREFIX, understands_only
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance
from lance_quant.lance.progress import progress
from lance_quant.storage import torch_file
from lance_quant.storage.tensor_file import Checkpoint, TensorSpec, require_finite, require_written

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights outside the linears may have
_TOO_SMALL_FOR_A_BAR = 1 << 28  # bytes; smaller modules load in about a second


class Source(Protocol):
    """Where tensors come from: Checkpoint and TensorFile of storage/tensor_file.py, or TorchFile."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of the shape in `specs`, as `dtype` (None: as stored) on `device`."""
        ...


class TorchFile:
    """A `.pth` state dict as a Source; mapped into memory, so that only what is read is loaded."""

    def __init__(self, path: Path):
        found = torch_file.load(path, "torch state dict", "download it again", mmap=True)
        if not isinstance(found, dict) or not all(
                isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
                and not tensor.is_meta and not tensor.is_quantized for name, tensor in found.items()):
            raise InputError(f"{path} is no torch state dict: it must map names to plain tensors; download it again")
        self._tensors: dict[str, Tensor] = found
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of the shape in `specs`, as `dtype` (None: as stored) on `device`, copied out of the file."""
        return self._tensors[name].to(device=device, dtype=dtype, copy=True)


def load_lance(source: Checkpoint, config: LanceConfig, device: torch.device, dtype: torch.dtype,
               rotary_rounding: torch.dtype | None = None, prepare: Callable[[Lance], object] | None = None) -> Lance:
    """Build Lance's language model and fill it from a checkpoint, float or packed.

    Args:
        dtype: compute dtype, float32 or bfloat16; floating-point tensors are converted to it.
        rotary_rounding: dtype through which the rotary frequencies are rounded; default `dtype`, as the official
            code does. float32 keeps them exact.
        prepare: called with the model while it is on meta, to swap linears for packed ones and fill those.

    Raises:
        InputError: keys or shapes do not agree exactly; names the first offenders.
    """
    config.require_fits({name: spec.shape for name, spec in source.specs.items()}, str(source.path))
    with torch.device("meta"):
        model = Lance(config, dtype, device)
        if understands_only(source.specs):
            model.drop_latent_interface()
    if prepare is not None:
        prepare(model)
    wanted = {name: name for name in source.specs if name != IGNORED and not name.startswith(VIT_PREFIX)}
    fill(model, source, wanted, dtype, device, str(source.path))
    model.compute_buffers(rotary_rounding or dtype)
    require_nothing_on_meta(model)
    return model.eval()


def fill(module: nn.Module, source: Source, names: Mapping[str, str], dtype: torch.dtype, device: torch.device,
         what: str) -> None:
    """Stream tensors into a module's parameters and persistent buffers that are still on meta.

    Args:
        names: tensor name in `source` -> name in the module. Must cover the module exactly, less what its packed
            linears filled themselves (their `file_keys`).
        what: the source, as error messages name it.

    Raises:
        InputError: names or shapes do not agree, the first offenders are named; or a value is not finite.
    """
    empty = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta}
    filled = {key for prefix, part in module.named_modules() if hasattr(part, "file_keys")
              for key in part.file_keys(prefix)}
    missing, unexpected = set(empty) - set(names.values()), set(names.values()) - set(empty) - filled
    if missing or unexpected:
        raise InputError(f"{what} does not fit the model: {_first('missing', missing)}, "
                         f"{_first('unexpected', unexpected)}")
    todo = [(theirs, ours) for theirs, ours in names.items() if ours in empty]
    wrong = [f"{theirs} {list(source.specs[theirs].shape)} instead of {list(empty[ours].shape)}"
             for theirs, ours in todo if source.specs[theirs].shape != tuple(empty[ours].shape)]
    if wrong:
        raise InputError(f"{what} does not fit the model: {len(wrong)} tensors have a wrong shape, first {wrong[:5]}")
    odd = [f"{theirs} {str(source.specs[theirs].dtype).removeprefix('torch.')}" for theirs, ours in todo
           if source.specs[theirs].dtype not in FLOATS and empty[ours].dtype.is_floating_point]
    if odd:
        raise InputError(f"{what} does not fit the model: {len(odd)} tensors hold no floating-point numbers, first "
                         f"{odd[:5]}")
    size = sum(source.specs[theirs].nbytes for theirs, _ in todo)
    for theirs, ours in progress(todo, desc="load", unit="tensor", disable=size < _TOO_SMALL_FOR_A_BAR):
        tensor = source.read(theirs, dtype, device)
        require_finite(tensor, f"{what}: {theirs}")
        require_written(tensor, f"{what}: {theirs}")
        owner, _, attribute = ours.rpartition(".")
        _put(module.get_submodule(owner), attribute, tensor)


def _first(word: str, names: set[str]) -> str:
    return f"{len(names)} tensors {word}" + (f" (first {sorted(names)[:5]})" if names else "")


def _put(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in owner._parameters:
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, attribute, tensor)


def require_nothing_on_meta(module: nn.Module) -> None:
    """Assert that every parameter and buffer, persistent or not, is real."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never filled: {left[:5]}"
