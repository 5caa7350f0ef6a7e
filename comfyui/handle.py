"""LANCE_MODEL: a loaded Lance under ComfyUI's model management.

Nodes ask a handle for what they need, in a `with` block: weights are read if they are not there, brought to the device,
and can be cancelled meanwhile. ComfyUI may take them off the device at any time between two blocks ("unload models",
/free, other models), and Lance Unload frees them altogether; the next block brings them back.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import host, models
from .toolkit import PackError

if TYPE_CHECKING:
    import torch

    from lance_quant.lance.runtime import Runtime
    from lance_quant.storage.tensor_file import Checkpoint

Part = str  # "model", "vit" or "vae"


@dataclass(frozen=True)
class Spec:
    """Everything that decides what is loaded; `stamp` changes with the file."""

    choice: models.Choice
    stamp: str
    device: str
    mode: str
    keep_loaded: bool
    offload: str
    vae_tiling: bool
    kernel: str
    loras: tuple[str, ...] = ()


class LanceModel:
    """A checkpoint, and its weights while they are loaded. Get one from `handle_of`."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self._pipeline: Runtime | None = None
        self._managed: dict[Part, Any] = {}

    @property
    def flavor(self) -> str:
        return self.spec.choice.found.flavor

    @property
    def is_small(self) -> bool:
        """Whether this is a small relative of Lance, whose native pictures are 112 x 112."""
        return self.flavor == "lance_nano"

    @contextmanager
    def ready(self, *parts: Part, pixels: int = 0) -> Iterator["Runtime"]:
        """The pipeline with these parts on their device, for the length of the block.

        Args:
            pixels: of a frame that the VAE encodes or decodes; for the memory that is kept free.
        """
        import torch

        pipeline = self.load()
        with torch.inference_mode(False):  # weights made in ComfyUI's inference mode could not be moved outside it
            managed = [self._part(pipeline, part) for part in parts]
        host.to_device(managed, _activations(pixels))
        try:
            with host.cancellable(patcher.model for patcher in managed):
                yield pipeline
        finally:
            if self.spec.offload == "after_use":
                host.forget(managed, to_ram=True)

    def load(self) -> "Runtime":
        """Read the language model if it is not there."""
        if self._pipeline is None:
            import torch

            with torch.inference_mode(False):
                self._pipeline = _load(self.spec)
        return self._pipeline

    def release(self) -> None:
        """Free the weights, on the device and in RAM."""
        host.forget(self._managed.values(), to_ram=False)
        self._managed, self._pipeline = {}, None

    def _part(self, pipeline: "Runtime", part: Part) -> Any:
        if part not in self._managed:
            self.require(part)
            self._managed[part] = host.managed(getattr(pipeline, part), host.device(self.spec.device))
        return self._managed[part]

    def require(self, *parts: Part) -> None:
        """Raise PackError unless these parts are there: ViT and VAE may be absent until a node needs them."""
        choice = self.spec.choice
        there = {"vit": choice.vit, "vae": choice.vae}
        absent = [part for part in parts if part in there and there[part] is None]
        if absent:
            what = {"vit": "ViT", "vae": "VAE"}[absent[0]]
            raise PackError(f"{choice.found.label} has no {what} beside it, which this node needs. Download it "
                            f"({models.PARTS_GIGABYTES:.1f} GB), then queue again: {models.parts_command()}")


_HANDLES: weakref.WeakValueDictionary[Spec, LanceModel] = weakref.WeakValueDictionary()


def handle_of(spec: Spec) -> LanceModel:
    """The handle of a spec: loaders with equal settings share one.

    Weak, so that when ComfyUI drops a loader's cached output (RAM pressure, /free) the weights go with it.
    """
    handle = _HANDLES.get(spec)
    if handle is None:
        handle = _HANDLES[spec] = LanceModel(spec)
    return handle


def fit_line(choice: models.Choice, device: str, mode: str = "ondemand", offload: str = "auto",
             vae_tiling: bool = False) -> str:
    """What a request of the usual size needs beside what is free, in the words of `lance-quant plan`."""
    import torch

    from lance_quant.inference.memory_plan import How, fit_line
    from lance_quant.lance.config import LanceConfig, LancePaths
    from lance_quant.lance.settings import Settings

    target = host.device(device)
    paths = LancePaths.find(choice.config, choice.vit, choice.vae)
    side = 112 if LanceConfig.load(choice.config / "llm_config.json").is_small else Settings.height
    how = How(torch.float32 if target.type == "cpu" else torch.bfloat16, target.type == "cpu", mode,
              "cpu" if offload == "after_use" else "none", vae_tiling=vae_tiling)
    return fit_line(paths, choice.found.weights if choice.found.precision == "bf16" else choice.found.folder,
                    Settings("t2i", height=side, width=side), how, target)


def _activations(pixels: int) -> int:
    """Bytes to keep free beside the weights: a working floor, and what the VAE's widest layers hold.

    Those have 256 bfloat16 channels for each 2 x 2 pixels of the 4 frames that are decoded at once, and about six such
    tensors alive: reckoned, not measured.
    """
    return (1 << 30) + pixels * 256 * 2 * 6


def _load(spec: Spec) -> "Runtime":
    """Read the language model to where ComfyUI keeps idle weights, with progress and Cancel per tensor."""
    import torch

    from lance_quant.lance.config import LanceConfig, LancePaths
    from lance_quant.lance.loader import load_lance
    from lance_quant.lance.runtime import Runtime

    choice, target = spec.choice, host.device(spec.device)
    host.log.info("Lance: %s", fit_line(choice, spec.device, spec.mode, spec.offload, spec.vae_tiling))
    paths = LancePaths.find(choice.config, choice.vit, choice.vae)
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    rest = host.offload_device(target)
    source = _watched(choice.found.weights)
    progress = host.Progress(len(source.specs))
    source.on_read = progress.step
    prepare = None
    if choice.found.precision != "bf16":
        prepare = _packed(choice.found.folder, dtype, rest, spec, progress.step)
    try:
        model = load_lance(source, LanceConfig.load(paths.model / "llm_config.json"), rest, dtype, dtype, prepare)
        _put_loras(model, spec)
    except BaseException:
        source.close()
        raise
    progress.reach(len(source.specs))
    source.on_read = host.raise_if_cancelled  # a ViT inside the checkpoint is read later, without a bar
    return Runtime(model, source, paths, dtype, fix_quirks=True, vae_tiling=spec.vae_tiling)


def _put_loras(model: "torch.nn.Module", spec: Spec) -> None:
    """The loader's LoRAs, on float or packed weights."""
    if not spec.loras:
        return
    from dataclasses import replace

    from lance_quant.formats.lora_file import parse
    from lance_quant.formats.packed_folder import PackedFolder
    from lance_quant.inference.lora import attach, scales_of

    uses = [replace(use, path=host.lora_file(use.path)) for use in map(parse, spec.loras)]
    scales = None
    if spec.choice.found.precision != "bf16":
        with PackedFolder(spec.choice.found.folder) as packed:
            scales = scales_of(packed, spec.choice.config)
    host.log.info("Lance: LoRA on %d linears", attach(model, uses, scales))


def _watched(weights: Path) -> "Checkpoint":
    from lance_quant.storage.tensor_file import Checkpoint

    class Watched(Checkpoint):
        """A checkpoint that tells of every tensor it reads."""

        on_read: Callable[[], None] | None = None

        def read(self, *args: Any, **options: Any) -> "torch.Tensor":
            if self.on_read is not None:
                self.on_read()
            return super().read(*args, **options)

    return Watched(weights)


def _packed(folder: Path, dtype: "torch.dtype", device: "torch.device", spec: Spec,
            on_read: Callable[[], None]) -> Callable[["torch.nn.Module"], object]:
    """What puts a packed folder's linears into a model that is still on meta."""
    from lance_quant.formats.packed_folder import PackedFolder
    from quantized_linear import swap_linears

    class Watched(PackedFolder):
        """A packed folder that tells of every weight it reads."""

        def read_weight(self, *args: Any, **options: Any) -> Any:
            on_read()
            return super().read_weight(*args, **options)

    def prepare(model: "torch.nn.Module") -> None:
        with Watched(folder) as packed:
            swap_linears(model, packed, dtype, device, spec.mode, spec.kernel)

    return prepare
