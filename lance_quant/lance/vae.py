"""Causal 3-D video VAE: Wan2.2's (arXiv:2503.20314), diffusers' AutoencoderKLWan under the official file's key names.

diffusers' own single-file conversion knows the older Wan2.1 names only; the class itself is right once its keys are
renamed and its configuration is given. The latents of the model are normalised per channel with the constants below.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.lance.config import LATENT_CHANNELS
from lance_quant.lance.loader import TorchFile, fill, require_nothing_on_meta

# Per channel, from the official model; 48 each.
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
_WIDEST = 4096  # channels; the official widths are 160 and 256
# (official, diffusers) beginnings and middles of names; "#" stands for a number. Parts that are not listed agree.
_NAMES = (
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."),
    ("decoder.head.0.", "decoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."),
    ("decoder.head.2.", "decoder.conv_out."),
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    ("encoder.middle.0.", "encoder.mid_block.resnets.0."),
    ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
    ("encoder.middle.1.", "encoder.mid_block.attentions.0."),
    ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
    ("encoder.middle.2.", "encoder.mid_block.resnets.1."),
    ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
    ("encoder.downsamples.#.downsamples.2.", "encoder.down_blocks.#.downsampler."),
    ("encoder.downsamples.#.downsamples.#.", "encoder.down_blocks.#.resnets.#."),
    ("decoder.upsamples.#.upsamples.3.", "decoder.up_blocks.#.upsampler."),
    ("decoder.upsamples.#.upsamples.#.", "decoder.up_blocks.#.resnets.#."),
)
# Inside a residual block, after one of the beginnings above.
_BLOCK_NAMES = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)


def diffusers_name(official: str) -> str:
    """The name in AutoencoderKLWan of a tensor in Wan2.2_VAE.pth."""
    return _renamed(official, _NAMES, _BLOCK_NAMES)


def official_name(diffusers: str) -> str:
    """The inverse of diffusers_name."""
    return _renamed(diffusers, *([(new, old) for old, new in table] for table in (_NAMES, _BLOCK_NAMES)))


def _renamed(name: str, beginnings: Iterable[tuple[str, str]], rest: Iterable[tuple[str, str]]) -> str:
    for old, new in beginnings:
        match = re.match(re.escape(old).replace(re.escape("#"), r"(\d+)"), name)
        if match:
            numbers = iter(match.groups())
            head, tail = "".join(next(numbers) if letter == "#" else letter for letter in new), name[match.end():]
            for old_part, new_part in rest:
                if tail.startswith(old_part):
                    tail = new_part + tail.removeprefix(old_part)
                    break
            return head + tail
    return name


def build_autoencoder(encoder_width: int, decoder_width: int) -> AutoencoderKLWan:
    """The Wan2.2 architecture; the official file's widths are 160 and 256."""
    return AutoencoderKLWan(
        base_dim=encoder_width, decoder_base_dim=decoder_width, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4],
        num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True], latents_mean=list(MEAN),
        latents_std=list(STD), is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_temporal=4, scale_factor_spatial=16)


class Encoded(NamedTuple):
    """What the encoder says of pixels, float32 [t, h, w, 48] each: normalised mean, log-variance NOT normalised."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """A sample [t, h, w, 48] by the official formula, which adds the raw latents' noise to the normalised mean.

        Drawn on the CPU, so that a seed means the same on every device.
        """
        frames, rows, columns, channels = self.mean.shape
        noise = torch.randn(channels, frames, rows, columns, generator=generator).permute(1, 2, 3, 0)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.to(self.mean.device)


class Vae(nn.Module):
    """Pixels to latents and back."""

    def __init__(self, autoencoder: AutoencoderKLWan, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.autoencoder, self.dtype, self.device = autoencoder, dtype, device

    def move(self, device: torch.device) -> None:
        """Go to a device and take inputs there from now on."""
        self.to(device)
        self.device = device

    def _constants(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=self.device) for values in (MEAN, STD))
        return mean, std

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Encoded:
        """Latents of pixels float [3, frames, height, width] in -1..1; frames beyond 4k + 1 are not seen."""
        posterior = self.autoencoder.encode(pixels[None].to(self.device, self.dtype)).latent_dist
        mean, std = self._constants()
        raw, log_variance = (part[0].float().permute(1, 2, 3, 0) for part in (posterior.mean, posterior.logvar))
        return Encoded((raw - mean) / std, log_variance)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Pixels float32 [3, frames, height, width] in -1..1 of normalised latents [t, h, w, 48]."""
        mean, std = self._constants()
        raw = (latent.to(self.device).float() * std + mean).permute(3, 0, 1, 2)[None]
        return self.autoencoder.decode(raw.to(self.dtype)).sample[0].float().clamp(-1, 1)


def widths_of(source: TorchFile, path: Path) -> tuple[int, int]:
    """Encoder and decoder width, from the shapes in Wan2.2_VAE.pth.

    Raises:
        InputError: it is another file.
    """
    try:
        encoder_width, *_ = source.specs["encoder.conv1.weight"].shape
        decoder_width, *_ = source.specs["decoder.head.0.gamma"].shape
    except KeyError as error:
        raise InputError(f"{path} is no Wan2.2 VAE: it has no tensor {error}") from error
    except ValueError:
        raise InputError(f"{path} is no Wan2.2 VAE: a tensor that gives its width has no dimensions") from None
    if not all(0 < width <= _WIDEST for width in (encoder_width, decoder_width)):
        raise InputError(f"{path} is no Wan2.2 VAE: widths {encoder_width} and {decoder_width}, must be 1 to {_WIDEST}")
    return encoder_width, decoder_width


def load_vae(path: Path, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> Vae:
    """Load Wan2.2_VAE.pth; the widths are read from its shapes.

    Both directions go through time in chunks of one latent frame, which is exact and always so: memory grows with the
    size of a frame, not with the number of frames.

    Args:
        tiling: also go through large frames (decoding above 256 pixels, encoding above 512) in overlapping, blended
            tiles, diffusers' own. Not exact: attention inside the VAE sees one tile at a time. With lance-nano's VAE
            tiles and whole are 49 dB apart on a picture like those that it was trained on, and 23 to 29 dB on others.

    Raises:
        InputError: the file is no torch state dict, or not one of this architecture.
    """
    source = TorchFile(path)
    with torch.device("meta"):
        autoencoder = build_autoencoder(*widths_of(source, path))
    fill(autoencoder, source, {name: diffusers_name(name) for name in source.specs}, dtype, device, str(path))
    require_nothing_on_meta(autoencoder)
    if tiling:
        autoencoder.enable_tiling()
    return Vae(autoencoder.eval(), dtype, device)
