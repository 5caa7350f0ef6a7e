"""Inference runtime: a loaded Lance, that is the language model, its tokenizer, and ViT and VAE when first needed."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from PIL import Image
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.lance import generation, understanding
from lance_quant.lance.config import LATENT_STRIDE, MAX_LATENT_SIZE, LanceConfig, LancePaths
from lance_quant.lance.loader import load_lance
from lance_quant.lance.media import vision
from lance_quant.lance.media.samples import Question, open_visual
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.settings import SEED, Modality, Offload, latent_grid
from lance_quant.lance.tokens import (
    CONDITION,
    EDIT_SYSTEM,
    T2I_SYSTEM,
    VIDEO_SYSTEM,
    VIT,
    Grid,
    LanceTokenizer,
    TokenSequence,
    generation_sequence,
    understanding_sequence,
)
from lance_quant.storage.tensor_file import Checkpoint

if TYPE_CHECKING:  # importing transformers' models and diffusers takes seconds: only when first used
    from lance_quant.lance.vae import Vae
    from lance_quant.lance.vit import Vit

# The official global seed, which random crops and the encoder's noise draw from. Here every request starts anew, so
# that it does not depend on what ran before.
_GLOBAL_SEED = 2025


class Answer(NamedTuple):
    """Generated ids, and their text without special tokens' markers at the end."""

    ids: list[int]
    raw: str

    @property
    def text(self) -> str:
        """The answer as a person reads it."""
        return self.raw.replace("<|im_end|>", "").strip()


class Runtime:
    """One model on one device. Use `Runtime.load`.

    fix_quirks: False reproduces the official code's quirks on purpose; True takes the repaired variant of those that
        are mere bugs (docs/runtime.md, Quirks).
    offload: where ViT and VAE are while they are not used. "none": on the device, once they were needed; "cpu": in
        host memory; "vae_vit": nowhere, they are loaded anew; "layers": as "cpu", for a language model whose layers
        wait there, too (inference/layer_offload.py).
    vae_tiling: let the VAE go through large frames in overlapping tiles (vae.load_vae).
    """

    def __init__(self, model: Lance, source: Checkpoint, paths: LancePaths, rotary_rounding: torch.dtype,
                 fix_quirks: bool, offload: Offload = "none", vae_tiling: bool = False):
        self.model, self.paths, self.fix_quirks = model, paths, fix_quirks
        self.offload, self.vae_tiling = offload, vae_tiling
        self._used: set[str] = set()
        self._fed: Tensor | None = None
        self.tokenizer = LanceTokenizer(paths.model)
        self._source, self._rotary_rounding = source, rotary_rounding

    @classmethod
    def load(cls, paths: LancePaths, device: torch.device, dtype: torch.dtype, checkpoint: Path | None = None,
             prepare: Callable[[Lance], object] | None = None, rotary_rounding: torch.dtype | None = None,
             fix_quirks: bool = False, offload: Offload = "none", vae_tiling: bool = False,
             merged: bool = False) -> "Runtime":
        """Load the language model; ViT and VAE follow when first used.

        Args:
            checkpoint: file or folder of the weights; default `paths.model`. A packed file goes with `prepare`.
            prepare: swaps linears while the model is on meta (quantized_linear.swap_linears).
            rotary_rounding: dtype through which the rotary frequencies are rounded; None: `dtype`.
            merged: run q/k/v and gate/up as one matmul each (merge.py); not for models whose linears are still to be
                watched or swapped.
        """
        config = LanceConfig.load(paths.model / "llm_config.json")
        source = Checkpoint(checkpoint or paths.model)
        rounding = rotary_rounding or dtype
        model = load_lance(source, config, device, dtype, rounding, prepare)
        if merged:
            merge_projections(model)
        return cls(model, source, paths, rounding, fix_quirks, offload, vae_tiling)

    @functools.cached_property
    def vit(self) -> "Vit":
        """The vision tower, loaded on first use."""
        from lance_quant.lance.vit import load_vit

        return load_vit(self._source, self.paths.vit, self._home, self.model.dtype, self._rotary_rounding)

    @functools.cached_property
    def vae(self) -> "Vae":
        """The autoencoder, loaded on first use."""
        from lance_quant.lance.vae import load_vae

        return load_vae(self.paths.vae, self._home, self.model.dtype, self.vae_tiling)

    @property
    def _home(self) -> torch.device:
        return torch.device("cpu") if self.offload in ("cpu", "layers") else self.model.device

    @overload
    def using(self, name: Literal["vit"]) -> contextlib.AbstractContextManager["Vit"]: ...

    @overload
    def using(self, name: Literal["vae"]) -> contextlib.AbstractContextManager["Vae"]: ...

    @contextlib.contextmanager
    def using(self, name: Literal["vit", "vae"]) -> Iterator[Any]:
        """The ViT or VAE on the model's device for a block; after it, it goes where `offload` says. May be nested."""
        part = getattr(self, name)
        if name in self._used or self.offload == "none":
            yield part
            return
        self._used.add(name)
        part.move(self.model.device)
        try:
            yield part
        finally:
            self._used.remove(name)
            part.move(self._home)
            if self.offload == "vae_vit":
                delattr(self, name)

    def frames(self, visual: Path, modality: Modality) -> Sequence[Image.Image]:
        """The frames that the model sees of a picture or clip."""
        return open_visual(visual, modality, exif=self.fix_quirks)

    def look(self, frames: Sequence[Image.Image], resolution: str) -> tuple[Tensor, Grid]:
        """Frames through the ViT: tokens [n, hidden], and their grid."""
        patches, (pairs, rows, columns) = vision.vit_patches(vision.vit_pixels(frames, resolution, self._crops()))
        with self.using("vit") as vit:
            return vit(patches, (pairs, rows, columns)), (pairs, rows // vision.MERGE, columns // vision.MERGE)

    def encode(self, frames: Sequence[Image.Image], resolution: str) -> Tensor:
        """Frames through the VAE: latents [t, rows, columns, 48], random around the mean as in the official code.

        Raises:
            InputError: the frames' bucket is wider or higher than the model's table of positions.
        """
        if self._fed is not None:
            return self._fed
        pixels = vision.unit_range(vision.vae_pixels(frames, resolution, self._crops()))
        if max(pixels.shape[2:]) > MAX_LATENT_SIZE * LATENT_STRIDE:
            raise InputError(f"a source of {frames[0].width} x {frames[0].height} becomes {pixels.shape[3]} x "
                             f"{pixels.shape[2]} at {resolution}, and {MAX_LATENT_SIZE * LATENT_STRIDE} is the "
                             "longest side that the model has positions for; use a smaller resolution")
        with self.using("vae") as vae:
            encoded = vae.encode(pixels)
        return encoded.mean if self.fix_quirks else encoded.draw(torch.Generator().manual_seed(_GLOBAL_SEED))

    @contextlib.contextmanager
    def fed(self, condition: Tensor | None) -> Iterator[None]:
        """In the block, `encode` gives these latents [t, rows, columns, 48] of a source that another run encoded, whose
        crop and noise may have been others; None: its own."""
        self._fed = condition
        try:
            yield
        finally:
            self._fed = None

    def _crops(self) -> torch.Generator | None:
        return None if self.fix_quirks else torch.Generator().manual_seed(_GLOBAL_SEED)

    def prompt_of(self, question: Question, resolution: str) -> tuple[TokenSequence, Tensor]:
        """An x2t request as the model takes it: sequence prompt, and ViT tokens [n, hidden]."""
        tokens, grid = self.look(self.frames(question.visual, question.modality), resolution)
        return understanding_sequence(self.tokenizer, question.system, question.question, grid), tokens

    def answer(self, sequence: TokenSequence, vit_tokens: Tensor, max_new_tokens: int = understanding.MAX_NEW_TOKENS,
               on_token: Callable[[int], object] | None = None,
               sampling: understanding.TokenSampling = understanding.GREEDY, seed: int = SEED,
               look_every: int | None = None) -> Answer:
        """Answer a request made by `prompt_of`.

        Args:
            sequence: the prompt. vit_tokens: [pads of the prompt, hidden].
            max_new_tokens: longest answer.
            on_token: called with every new id; an exception that it raises ends the request.
            sampling: how tokens are chosen. seed: of tokens that are drawn.
            look_every: tokens after which the end is looked for; None: as suits the device.
        """
        ids = understanding.answer(self.model, self.tokenizer, sequence, vit_tokens, max_new_tokens, on_token, sampling,
                                   seed, look_every)
        return Answer(ids, self.tokenizer.decode(ids))

    def forced_logprobs(self, sequence: TokenSequence, vit_tokens: Tensor, answer_ids: list[int]) -> Tensor:
        """Log-probabilities float32 [answer tokens, tokenizer size] in front of each token of a given answer."""
        logits = understanding.forced_logits(self.model, self.tokenizer, sequence, vit_tokens, answer_ids)
        return logits.log_softmax(-1)

    def denoiser(self, prompt: str, height: int, width: int, sampling: generation.Sampling,
                 num_frames: int | None = None) -> generation.Denoiser:
        """The denoiser of a t2i request or, with a number of frames, of a t2v one; for sizes see `latent_grid`."""
        system = T2I_SYSTEM if num_frames is None else VIDEO_SYSTEM
        sequence = generation_sequence(self.tokenizer, system, prompt, latent_grid(height, width, num_frames or 1),
                                 fix_quirks=self.fix_quirks)
        return generation.Denoiser(self.model, sequence, sampling)

    def animator(self, prompt: str, image: Image.Image, resolution: str, num_frames: int,
                 sampling: generation.Sampling) -> generation.Denoiser:
        """The denoiser of an i2v request: a clip that begins with a picture, in the size of the picture's bucket."""
        first = self.encode([image], resolution)
        rows, columns = first.shape[1:3]
        grid = latent_grid(rows * LATENT_STRIDE, columns * LATENT_STRIDE, num_frames)
        sequence = generation_sequence(self.tokenizer, VIDEO_SYSTEM, prompt, grid, fix_quirks=self.fix_quirks)
        return generation.Denoiser(self.model, sequence, sampling, generation.Given(first=first))

    def editor(self, instruction: str, frames: Sequence[Image.Image], resolution: str, named: str,
               sampling: generation.Sampling) -> generation.Denoiser:
        """The denoiser of an edit, whose result has its source's size and length.

        Args:
            frames: one for image_edit; for video_edit what `frames` gives.
            named: the word for the source in the system prompt, "image" or "video".
        """
        tokens, merged = self.look(frames, resolution)
        source = self.encode(frames, resolution)
        times, rows, columns = source.shape[:3]
        grid = (times, rows, columns)
        sequence = generation_sequence(self.tokenizer, EDIT_SYSTEM.format(named), instruction, grid,
                                 [(VIT, merged), (CONDITION, grid)], self.fix_quirks)
        return generation.Denoiser(self.model, sequence, sampling, generation.Given(tokens, source))

    def sample(self, denoiser: generation.Denoiser, seed: int = SEED,
               on_step: Callable[[generation.Step], None] | None = None) -> Tensor:
        """Latents [frames, rows, columns, 48] of a request, on the CPU, from a seed's noise.

        A denoiser serves any number of seeds: its prompt was read when it was made.
        """
        return generation.sample(denoiser, denoiser.noise(seed).to(self.model.device), on_step).cpu()

    def decode(self, latent: Tensor) -> Image.Image:
        """The picture of latents [1, rows, columns, 48]."""
        return self.decode_frames(latent)[0]

    def decode_frames(self, latent: Tensor) -> list[Image.Image]:
        """The 4 t - 3 frames of latents [t, rows, columns, 48]."""
        with self.using("vae") as vae:
            return [vision.to_image(frame) for frame in vae.decode(latent).unbind(1)]
