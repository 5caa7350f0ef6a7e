"""ComfyUI's side of the pack: folders, devices, model management, progress, cancelling, video objects.

The only file that imports ComfyUI, always inside functions: the pack can be imported without it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("lance")
FOLDER = "lance"


def register_folder() -> None:
    """Add models/lance to the folders called `lance`, behind what extra_model_paths.yaml says."""
    try:
        import folder_paths
    except ImportError:
        return
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def roots() -> list[Path]:
    """Every registered `lance` folder; none outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    return [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]


def lora_file(name: Path) -> Path:
    """A file of ComfyUI's `loras` folders by its name there; anything else is a path."""
    try:
        import folder_paths
    except ImportError:
        return name
    found = folder_paths.get_full_path("loras", str(name))
    return name if found is None else Path(found)


def source_places() -> list[tuple[str, Path]]:
    """Where a ComfyUI's user puts a checkout of the official source: (what the folder is called, folder)."""
    try:
        import folder_paths
    except ImportError:
        return []
    nodes = [("custom_nodes", Path(path)) for path in folder_paths.get_folder_paths("custom_nodes")]
    return [*nodes, ("ComfyUI folder", Path(folder_paths.base_path))]


def device_names() -> list[str]:
    """What the loader's device widget offers."""
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["auto", *names, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def device(name: str) -> "torch.device":
    """The device that a widget value means; auto is ComfyUI's own."""
    import comfy.model_management
    import torch

    return comfy.model_management.get_torch_device() if name == "auto" else torch.device(name)


def offload_device(load_device: "torch.device") -> "torch.device":
    """Where weights wait that are not in use."""
    import comfy.model_management
    import torch

    return torch.device("cpu") if load_device.type == "cpu" else comfy.model_management.unet_offload_device()


def managed(module: "torch.nn.Module", load_device: "torch.device") -> Any:
    """A module under ComfyUI's model management: it counts it, moves it, and may take its memory back.

    The module moves as a whole. ComfyUI's partial loading knows its own layers only and would leave ours on two
    devices.
    """
    import comfy.model_patcher

    class Whole(comfy.model_patcher.ModelPatcher):
        def partially_load(self, device_to: "torch.device", extra_memory: float = 0, **options: Any) -> int:
            return super().partially_load(device_to, 1e32, **options)

        def partially_unload(self, *_: object, **__: object) -> int:
            return 0  # ComfyUI then unloads it wholly

    return Whole(module, load_device=load_device, offload_device=offload_device(load_device))


def to_device(patchers: Iterable[Any], memory: int) -> None:
    """Bring modules to their device, with `memory` bytes left for activations; other models give way."""
    import comfy.model_management

    comfy.model_management.load_models_gpu(list(patchers), memory_required=memory, force_full_load=True)


def forget(patchers: Iterable[Any], to_ram: bool) -> None:
    """Take modules off the list of loaded ones: their weights go to RAM, or nowhere because their owner drops them."""
    import comfy.model_management as management

    dropped = {id(patcher) for patcher in patchers}
    for loaded in [loaded for loaded in management.current_loaded_models if id(loaded.model) in dropped]:
        loaded.model_unload(unpatch_weights=to_ram)
        management.current_loaded_models[:] = [other for other in management.current_loaded_models
                                               if other is not loaded]
    management.soft_empty_cache()


def raise_if_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user pressed Cancel."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def cancellable(modules: Iterable["torch.nn.Module"]) -> Iterator[None]:
    """Look for Cancel in front of every block of these modules: a step of a large model takes seconds."""
    blocks = [block for module in modules for block in module.modules() if any(True for _ in block.children())]
    hooks = [block.register_forward_pre_hook(lambda *_: raise_if_cancelled()) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def previewer(target: "torch.device") -> Callable[["torch.Tensor"], Any] | None:
    """ComfyUI's live preview of Wan 2.2 latents [1, 48, frames, rows, columns], as its setting says; None: it has none.

    The model's latents are normalised per channel as those of ComfyUI's own Wan 2.2, so its colours fit.
    """
    try:
        import comfy.latent_formats
        import latent_preview

        found = latent_preview.get_previewer(target, comfy.latent_formats.Wan22())
    except (ImportError, AttributeError):  # older than Wan 2.2
        return None
    return None if found is None else lambda latent: found.decode_latent_to_preview_image("JPEG", latent)


class Progress:
    """A node's progress bar, and its Cancel button.

    Args:
        preview: makes the picture shown on the node from what the runtime's callback is given.
    """

    def __init__(self, total: int, preview: Callable[[Any], Any] | None = None):
        import comfy.utils

        self._bar, self._total, self._done, self._preview = comfy.utils.ProgressBar(total), total, 0, preview

    def step(self, step: Any = None, *_: object) -> None:
        """One unit is done; `step` is what the runtime's callback was given."""
        raise_if_cancelled()
        self._done += 1
        if self._preview is None:
            self._bar.update_absolute(self._done, self._total)
        else:
            self._bar.update_absolute(self._done, self._total, self._preview(step))

    def reach(self, done: int) -> None:
        """So many units are done."""
        self._done = done
        self._bar.update_absolute(done, self._total)


def video(frames: "torch.Tensor", fps: float, audio: Any = None) -> Any:
    """ComfyUI's VIDEO of frames [n, height, width, 3]."""
    from comfy_api.latest import InputImpl, Types

    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, audio=audio, frame_rate=Fraction(fps)))


def total_memory(name: str) -> int | None:
    """Bytes that the device of a widget value has in all; None where ComfyUI does not say."""
    try:
        import comfy.model_management

        return comfy.model_management.get_total_memory(device(name))
    except (ImportError, AttributeError):  # outside ComfyUI
        return None


def say(text: str) -> None:
    """Tell the user something that is no error: in the log, and on the node that runs."""
    log.warning("Lance: %s", text)
    try:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, get_executing_context().node_id)
    except (ImportError, AttributeError):  # a ComfyUI that shows no text on a node: 0.3.47 and older
        return


def versions() -> dict[str, Callable[[], str]]:
    """What a report says of ComfyUI and its device; each may fail on its own."""
    def comfyui() -> str:
        import comfyui_version

        return comfyui_version.__version__

    def gpu() -> str:
        import torch

        found = [f"cuda:{index} {torch.cuda.get_device_name(index)} (SM "
                 f"{'.'.join(map(str, torch.cuda.get_device_capability(index)))})"
                 for index in range(torch.cuda.device_count())]
        return ", ".join(found) or "none"

    return {"ComfyUI": comfyui, "device": lambda: str(device("auto")), "CUDA GPUs": gpu}
