"""Vision transformer: the Qwen2.5-VL tower (arXiv:2502.13923) from transformers, whose keys and maths are Lance's."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lance_quant.formats.layout import VIT_PREFIX
from lance_quant.lance.loader import fill, require_nothing_on_meta
from lance_quant.storage.atomic import read_json
from lance_quant.storage.tensor_file import Checkpoint, TensorFile


class Vit(nn.Module):
    """Patches to language-model tokens."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.tower, self.dtype, self.device = tower, dtype, device

    def move(self, device: torch.device) -> None:
        """Go to a device and take inputs there from now on."""
        self.to(device)
        self.device = device

    @torch.no_grad()
    def forward(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Merged tokens [patches / 4, hidden of the language model], in raster order of the merged grid.

        Args:
            patches: [patches, 1176] from vision.vit_patches.
            grid: (frames, rows, columns) in single patches.
        """
        grid_thw = torch.tensor([grid], device=self.device)
        return self.tower(patches.to(self.device, self.dtype), grid_thw=grid_thw).pooler_output


def load_vit(checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype,
             rotary_rounding: torch.dtype | None = None) -> Vit:
    """Load the tower: from the checkpoint if that holds one (the video checkpoint does), else from `folder`.

    Args:
        rotary_rounding: dtype through which the rotary frequencies are rounded; None: `dtype`.

    Raises:
        InputError: a file is missing, or its keys or shapes do not agree exactly.
    """
    settings = read_json(folder / "config.json", "ViT configuration")
    config = Qwen2_5_VLVisionConfig.from_dict({key: value for key, value in settings.items() if key != "model_type"})
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    inside = {name: name.removeprefix(VIT_PREFIX) for name in checkpoint.specs if name.startswith(VIT_PREFIX)}
    if inside:
        fill(tower, checkpoint, inside, dtype, device, str(checkpoint.path))
    else:
        with TensorFile(folder / "vit.safetensors") as source:
            fill(tower, source, {name: name for name in source.specs}, dtype, device, str(folder / "vit.safetensors"))
    rotary = type(tower.rotary_pos_emb)(config)  # outside meta: its frequencies are in no checkpoint
    for name, frequencies in rotary.named_buffers():
        setattr(rotary, name, frequencies.to(rotary_rounding or dtype).float())
    tower.rotary_pos_emb = rotary.to(device)
    require_nothing_on_meta(tower)
    return Vit(tower.eval(), dtype, device)
