"""A loaded Lance: the language model, its tokenizer, and ViT and VAE when a request first needs them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.lance import generation, understanding, vision
from lance_quant.lance.config import LATENT_STRIDE, MAX_LATENT_SIZE, LanceConfig, LancePaths
from lance_quant.lance.loader import load_lance
from lance_quant.lance.mot import Lance
from lance_quant.lance.samples import Question
from lance_quant.lance.tokens import LanceTokenizer, Packed, pack_generation, pack_understanding
from lance_quant.tensorfile import Checkpoint

if TYPE_CHECKING:  # importing transformers' models and diffusers takes seconds: only when first used
    from lance_quant.lance.vae import Vae
    from lance_quant.lance.vit import Vit

_CROP_SEED = 2025  # the official global seed, which its random crops draw from


class Answer(NamedTuple):
    """Generated ids, and their text without special tokens' markers at the end."""

    ids: list[int]
    raw: str

    @property
    def text(self) -> str:
        return self.raw.replace("<|im_end|>", "").strip()


class Pipeline:
    """One model on one device. Use `Pipeline.load`.

    fix_quirks: False reproduces the official code's quirks on purpose; True takes the repaired variant of those that
        are mere bugs (README, "Quirks").
    """

    def __init__(self, model: Lance, source: Checkpoint, paths: LancePaths, rotary_rounding: torch.dtype,
                 fix_quirks: bool):
        self.model, self.paths, self.fix_quirks = model, paths, fix_quirks
        self.tokenizer = LanceTokenizer(paths.model)
        self._source, self._rotary_rounding = source, rotary_rounding
        self._crops = None if fix_quirks else torch.Generator().manual_seed(_CROP_SEED)

    @classmethod
    def load(cls, paths: LancePaths, device: torch.device, dtype: torch.dtype, checkpoint: Path | None = None,
             prepare: Callable[[Lance], object] | None = None, rotary_rounding: torch.dtype | None = None,
             fix_quirks: bool = False) -> "Pipeline":
        """Load the language model; ViT and VAE follow when first used.

        Args:
            checkpoint: file or folder of the weights; default `paths.model`. A packed file goes with `prepare`.
            prepare: swaps linears while the model is on meta (quantized_linear.swap_linears).
            rotary_rounding: see loader.load_lance.
        """
        config = LanceConfig.load(paths.model / "llm_config.json")
        source = Checkpoint(checkpoint or paths.model)
        rounding = rotary_rounding or dtype
        model = load_lance(source, config, device, dtype, rounding, prepare)
        return cls(model, source, paths, rounding, fix_quirks)

    @functools.cached_property
    def vit(self) -> "Vit":
        """The vision tower, loaded on first use."""
        from lance_quant.lance.vit import load_vit

        return load_vit(self._source, self.paths.vit, self.model.device, self.model.dtype, self._rotary_rounding)

    @functools.cached_property
    def vae(self) -> "Vae":
        """The autoencoder, loaded on first use."""
        from lance_quant.lance.vae import load_vae

        return load_vae(self.paths.vae, self.model.device, self.model.dtype)

    def ask(self, question: Question, resolution: str) -> tuple[Packed, Tensor]:
        """An x2t_image request as the model takes it: packed prompt, and ViT tokens [n, hidden]."""
        image = vision.open_image(question.image, exif=self.fix_quirks)
        patches, grid = vision.vit_patches(vision.vit_pixels(image, resolution, self._crops))
        merged = (grid[0], grid[1] // vision.MERGE, grid[2] // vision.MERGE)
        packed = pack_understanding(self.tokenizer, question.system, question.question, merged)
        return packed, self.vit(patches, grid)

    def answer(self, packed: Packed, vit_tokens: Tensor, max_new_tokens: int = understanding.MAX_NEW_TOKENS,
               on_token: Callable[[int], None] | None = None) -> Answer:
        """Answer a request made by `ask`."""
        ids = understanding.answer(self.model, self.tokenizer, packed, vit_tokens, max_new_tokens, on_token)
        return Answer(ids, self.tokenizer.decode(ids))

    def forced_logprobs(self, packed: Packed, vit_tokens: Tensor, answer_ids: list[int]) -> Tensor:
        """Log-probabilities float32 [answer tokens, tokenizer size] in front of each token of a given answer."""
        logits = understanding.forced_logits(self.model, self.tokenizer, packed, vit_tokens, answer_ids)
        return logits.log_softmax(-1)

    def denoiser(self, prompt: str, height: int, width: int, sampling: generation.Sampling) -> generation.Denoiser:
        """The denoiser of a t2i request; sides in pixels, floored to multiples of 16."""
        packed = pack_generation(self.tokenizer, prompt, latent_grid(height, width), self.fix_quirks)
        return generation.Denoiser(self.model, packed, sampling)

    def sample(self, denoiser: generation.Denoiser, sampling: generation.Sampling,
               on_step: Callable[[generation.Step], None] | None = None) -> Tensor:
        """Latents [frames, rows, columns, 48] of a request, from its seed's noise."""
        rows, columns = denoiser.grid[1:]
        noise = generation.initial_noise(denoiser.grid[0] * rows * columns, sampling.seed, self.model.dtype)
        return generation.sample(denoiser, noise, sampling, on_step)

    def decode(self, latent: Tensor) -> Image.Image:
        """The picture of latents [1, rows, columns, 48]."""
        return vision.to_image(self.vae.decode(latent)[:, 0])


def latent_grid(height: int, width: int) -> tuple[int, int, int]:
    """Latent cells (1, rows, columns) of a picture; sides are floored to multiples of 16 as officially.

    Raises:
        InputError: a side is below 16 or above 1024 pixels.
    """
    rows, columns = height // LATENT_STRIDE, width // LATENT_STRIDE
    if not (1 <= rows <= MAX_LATENT_SIZE and 1 <= columns <= MAX_LATENT_SIZE):
        raise InputError(f"picture size {height} x {width}: each side must be 16 to {MAX_LATENT_SIZE * LATENT_STRIDE} "
                         "pixels; change --video_height, --video_width")
    return 1, rows, columns
