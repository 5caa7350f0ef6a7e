"""Vision transformer: the Qwen2.5-VL tower (arXiv:2502.13923) from transformers, whose keys and maths are Lance's."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lance_quant.errors import InputError
from lance_quant.formats.layout import VIT_PREFIX
from lance_quant.lance.loader import fill, require_nothing_on_meta
from lance_quant.storage.atomic import read_json
from lance_quant.storage.schema import Count, Schema, Size, read
from lance_quant.storage.tensor_file import Checkpoint, TensorFile


class _VitConfig(Schema):
    """config.json of the tower: what the model is built from."""

    depth: Annotated[int, Field(gt=0, lt=1000)]
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    out_hidden_size: Size
    patch_size: Literal[14] = 14
    spatial_merge_size: Literal[2] = 2
    temporal_patch_size: Literal[2] = 2
    in_channels: Literal[3] = 3
    window_size: Annotated[int, Field(ge=28, le=10_000)] = 112
    fullatt_block_indexes: list[Count] = []
    hidden_act: Literal["silu"] = "silu"

    @model_validator(mode="after")
    def _divide(self) -> Self:
        if self.hidden_size % (4 * self.num_heads):  # halves of a head turn in two directions
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads}")
        return self

    def require_depth(self, names: Iterable[str], what: str) -> None:
        """Raise InputError unless tensors of these names make this many blocks: none is built before."""
        blocks = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
        if blocks != self.depth:
            raise InputError(f"the ViT's config.json says depth {self.depth}, and {what} has {blocks} blocks: "
                             "configuration and weights are of different models")


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
    config_file = folder / "config.json"
    found = read(_VitConfig, config_file, "ViT configuration")
    config = Qwen2_5_VLVisionConfig.from_dict({key: value for key, value in read_json(config_file, "").items()
                                               if key != "model_type"})
    with contextlib.ExitStack() as opened:
        inside = {name: name.removeprefix(VIT_PREFIX) for name in checkpoint.specs if name.startswith(VIT_PREFIX)}
        source = checkpoint if inside else opened.enter_context(TensorFile(folder / "vit.safetensors"))
        names = inside or {name: name for name in source.specs}
        found.require_depth(names.values(), f"{source.path}")
        with torch.device("meta"):
            tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
        fill(tower, source, names, dtype, device, str(source.path))
    rotary = type(tower.rotary_pos_emb)(config)  # outside meta: its frequencies are in no checkpoint
    for name, frequencies in rotary.named_buffers():
        setattr(rotary, name, frequencies.to(rotary_rounding or dtype).float())
    tower.rotary_pos_emb = rotary.to(device)
    require_nothing_on_meta(tower)
    return Vit(tower.eval(), dtype, device)
