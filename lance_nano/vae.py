"""The picture codec: diffusers' `AutoencoderKLWan` in its Wan2.2 form, only narrow (16, not 160 and 256).

For one frame a causal 3-D convolution sees data in its last temporal tap only, so it is trained as the 2-D
convolution it then is (`frame_vae`) and inflated with zero taps for the file (`official_state`).

The official code normalises latents by constants. The statistics of this codec are folded exactly into the
encoder's last and the decoder's first 1x1 convolution instead, so that the constants apply to this file as
well.
"""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

WIDTH = 16
CHANNELS = 48
LOG_VARIANCE = -20.0  # the official edit path samples its condition with it; this makes that a no-op
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# diffusers name -> official name, applied in order
TO_OFFICIAL = (
    (r"(\.resnets\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\.resnets\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\.resnets\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\.resnets\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"(\.resnets\.\d+)\.conv_shortcut\.", r"\1.shortcut."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.downsamples.\1.downsamples.\2."),
    (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.upsamples.\1.upsamples.\2."),
)


class FrameConv(nn.Conv2d):
    """The causal convolution on a single frame, [batch, channels, 1, height, width]."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return super().forward(x[:, :, 0]).unsqueeze(2)


def wan_vae(width: int = WIDTH) -> AutoencoderKLWan:
    """The real class with the official architecture at another width, freshly initialised."""
    return AutoencoderKLWan(
        base_dim=width, decoder_base_dim=width, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        attn_scales=[], temperal_downsample=[False, True, True], is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
        latents_mean=list(LATENT_MEAN), latents_std=list(LATENT_STD),
    )  # fmt: skip


def frame_vae(width: int = WIDTH) -> AutoencoderKLWan:
    """`wan_vae` with every causal convolution but the temporal ones replaced by its single-frame form."""
    vae = wan_vae(width)
    for name, module in list(vae.named_modules()):
        if isinstance(module, WanCausalConv3d) and not name.endswith("time_conv"):
            size = module.kernel_size[1]
            parent, _, leaf = name.rpartition(".")
            twin = FrameConv(module.in_channels, module.out_channels, size, padding=size // 2)
            setattr(vae.get_submodule(parent), leaf, twin)
    return vae


def to_unit(pictures_u8: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> float [n, 3, 1, height, width] in -1..1."""
    return (pictures_u8.float() / 127.5 - 1).permute(0, 3, 1, 2).unsqueeze(2)


def to_picture(unit: Tensor) -> Tensor:
    """The inverse of `to_unit`, rounded and clamped."""
    return ((unit[:, :, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _constants(like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, CHANNELS, 1, 1, 1)
    return like.new_tensor(LATENT_MEAN).view(shape), like.new_tensor(LATENT_STD).view(shape)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pictures_u8: Tensor, batch: int = 16) -> Tensor:
    """Normalised latents [n, tokens, 48] of uint8 pictures [n, height, width, 3], tokens in raster order."""
    rows = []
    for part in pictures_u8.split(batch):
        latent = vae.encode(to_unit(part)).latent_dist.mean
        mean, std = _constants(latent)
        rows.append(((latent - mean) / std).flatten(2).transpose(1, 2))
    return torch.cat(rows)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor, grid: tuple[int, int], batch: int = 16) -> Tensor:
    """uint8 pictures [n, 16 h, 16 w, 3] of normalised latents [n, h * w, 48]; grid = (h, w)."""
    rows = []
    for part in latents.split(batch):
        latent = part.transpose(1, 2).reshape(-1, CHANNELS, 1, *grid)
        mean, std = _constants(latent)
        rows.append(to_picture(vae.decode(latent * std + mean).sample))
    return torch.cat(rows)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Make the official constants normalise this codec, whose raw latents have `mean` and `std` [48].

    Changes `quant_conv` and `post_quant_conv` only; decode(encode(x)) stays the same function.
    """
    target_mean, target_std = mean.new_tensor(LATENT_MEAN), mean.new_tensor(LATENT_STD)
    gain = target_std / std
    head = vae.quant_conv
    head.weight[:CHANNELS] *= gain.view(-1, *[1] * (head.weight.ndim - 1))
    head.bias[:CHANNELS] = (head.bias[:CHANNELS] - mean) * gain + target_mean
    head.weight[CHANNELS:] = 0
    head.bias[CHANNELS:] = LOG_VARIANCE
    foot = vae.post_quant_conv
    matrix = foot.weight.flatten(1)
    foot.bias += matrix @ (mean - target_mean / gain)
    foot.weight /= gain.view(1, -1, *[1] * (foot.weight.ndim - 2))


def official_name(name: str) -> str:
    """The name in `Wan2.2_VAE.pth` of a tensor of `AutoencoderKLWan`."""
    for pattern, replacement in TO_OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def video_state(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """The state of `frame_vae` for `wan_vae`: zero early taps, temporal convolutions that copy the frame."""
    shapes = {name: tensor.shape for name, tensor in wan_vae(vae.config.base_dim).state_dict().items()}
    state = {}
    for name, tensor in vae.state_dict().items():
        shape = shapes[name]
        if ".time_conv." in name:
            out, inputs = shape[0], shape[1] if len(shape) > 1 else 0
            copied = torch.zeros(shape)
            if inputs:
                copied[:, :, -1, 0, 0] = torch.eye(inputs).repeat(out // inputs, 1)
            tensor = copied
        elif tensor.ndim == 4 and len(shape) == 5:
            inflated = torch.zeros(shape)
            inflated[:, :, -1] = tensor
            tensor = inflated
        state[name] = tensor.detach().clone().contiguous()
    return state


def official_state(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """The content of `Wan2.2_VAE.pth`: the state of a trained `frame_vae` under official names."""
    return {official_name(name): tensor for name, tensor in video_state(vae).items()}
