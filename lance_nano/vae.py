"""The picture codec: diffusers' `AutoencoderKLWan` in its Wan2.2 form, only narrow (16, not 160 and 256).

For one frame a causal 3-D convolution sees data in its last temporal tap only, so it is trained as the 2-D
convolution it then is (`frame_vae`) and inflated with zero taps for the file (`official_state`).

The official code normalises latents by constants. The statistics of this codec are folded exactly into the
encoder's last and the decoder's first 1x1 convolution instead, so that the constants apply to this file as
well.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from lance_quant.lance.vae import MEAN, STD, build_autoencoder, official_name

WIDTH = 16
CHANNELS = 48
LOG_VARIANCE = -20.0  # the official edit path samples its condition with it; this makes that a no-op


class FrameConv(nn.Conv2d):
    """The causal convolution on a single frame, [batch, channels, 1, height, width]."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return super().forward(x[:, :, 0]).unsqueeze(2)


def wan_vae(width: int = WIDTH) -> AutoencoderKLWan:
    """The real class with the official architecture at another width, freshly initialised."""
    return build_autoencoder(encoder_width=width, decoder_width=width)


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
    return like.new_tensor(MEAN).view(shape), like.new_tensor(STD).view(shape)


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
    target_mean, target_std = mean.new_tensor(MEAN), mean.new_tensor(STD)
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
