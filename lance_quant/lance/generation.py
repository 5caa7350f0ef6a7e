"""Text to image: rectified flow over latent tokens, the language model being the denoiser.

The prompt is read once into the cache. Each step sends <|vision_start|>, the latent tokens and <|vision_end|> through
the model, conditionally and, while guidance is on, unconditionally (without the prompt), and moves x_t along the
guided velocity, which points from data to noise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.lance.cache import CacheRow, allocate
from lance_quant.lance.config import LATENT_CHANNELS
from lance_quant.lance.mot import Lance, Rope, Streams
from lance_quant.lance.tokens import PROMPT, TARGET, Packed, Visual, mrope_positions


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled; the defaults are the official ones.

    batch_guidance: run both passes of guidance as one batch (same result, more memory) or one after the other.
    """

    num_timesteps: int = 30
    timestep_shift: float = 3.5
    cfg_scale: float = 4.0
    seed: int = 42
    batch_guidance: bool = True

    # Guidance is on where low < t <= high; part of the official defaults that no script exposes.
    cfg_low: float = 0.4
    cfg_high: float = 1.0

    def guided(self, t: float) -> bool:
        """Whether the unconditional pass runs at timestep t."""
        return self.cfg_scale > 1 and self.cfg_low < t <= self.cfg_high


class Step(NamedTuple):
    """One denoising step: x_t [n, 48] that entered, timestep, guided velocity [n, 48]."""

    index: int
    t: float
    x: Tensor
    velocity: Tensor


def timesteps(sampling: Sampling) -> Tensor:
    """The schedule: num_timesteps + 1 values float32 from 1 to 0, shifted towards noise."""
    u = torch.linspace(1, 0, sampling.num_timesteps + 1)
    return sampling.timestep_shift * u / (1 + (sampling.timestep_shift - 1) * u)


def initial_noise(cells: int, seed: int, dtype: torch.dtype) -> Tensor:
    """x_T [cells, 48] on the CPU, so that a seed means the same picture on every device.

    Drawn in float32 and rounded to `dtype`, the explicit compute dtype; never derived from a weight.
    """
    noise = torch.randn(cells, LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return noise.to(dtype)


class Denoiser:
    """Guided velocity of one request at any (x_t, t): the prompt's cache, positions and embeddings, made once."""

    @torch.no_grad()
    def __init__(self, model: Lance, packed: Packed, sampling: Sampling):
        self._model, self._sampling = model, sampling
        self.grid = packed.visuals[-1].grid
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        prompt_length = sum(split.length for split in packed.splits if split.content == PROMPT)
        (start, end), = [bounds for bounds, split in zip(packed.bounds(), packed.splits, strict=True)
                         if split.content == TARGET]
        self._rows = allocate(model.config, [end, end - prompt_length], model.dtype, model.device)
        self._read_prompt(packed)
        # The unconditional query counts its positions without the prompt, although the unconditional cache was
        # filled at the conditional positions: the official code does so, and the model is used that way.
        shifted = Visual(packed.visuals[-1].start - prompt_length, self.grid)
        unconditional = mrope_positions(len(packed.ids) - prompt_length, [*packed.visuals[:-1], shifted])
        queries = [packed.positions[:, start:end],
                   unconditional[:, start - prompt_length:end - prompt_length]]
        self._ropes = [self._stream_rope(positions) for positions in queries]
        self._frame = model.embed(packed.ids[[start, end - 1]])  # <|vision_start|> and <|vision_end|>
        self._places = model.latent_pos_embed(self.grid)
        assert self._places.shape[0] == cells

    def _read_prompt(self, packed: Packed) -> None:
        """Fill both rows: the unconditional one skips the prompt and nothing else."""
        x = self._model.embed(packed.ids)
        for (start, end), split in zip(packed.bounds(), packed.splits, strict=True):
            if split.content == TARGET:
                return
            rows = self._rows[:1] if split.content == PROMPT else self._rows
            for batch in self._batches(rows):
                self._model.read(x[start:end], packed.positions[:, start:end], batch, split.mode == "causal")

    def _stream_rope(self, positions: Tensor) -> Rope:
        """Rotary terms of the query in stream order: both understanding tokens, then the latents."""
        return self._model.rope(torch.cat([positions[:, :1], positions[:, -1:], positions[:, 1:-1]], 1))

    def _batches(self, rows: Sequence[CacheRow]) -> Iterator[Sequence[CacheRow]]:
        if self._sampling.batch_guidance:
            yield rows
        else:
            yield from ([row] for row in rows)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Velocity [n, 48] at x_t [n, 48] and timestep t, guided where guidance is on."""
        model = self._model
        when = model.time_embedder(torch.tensor([t], device=model.device), model.dtype)
        latents = model.vae2llm(x.to(model.device, model.dtype)) + when + self._places
        rows = self._rows if self._sampling.guided(t) else self._rows[:1]
        passes = torch.cat([self._run(latents, batch) for batch in self._batches(rows)])
        return passes[0] if len(rows) == 1 else self._guide(*passes)

    def _run(self, latents: Tensor, rows: Sequence[CacheRow]) -> Tensor:
        ropes = [self._ropes[self._rows.index(row)] for row in rows]
        rope = tuple(torch.cat(parts) for parts in zip(*ropes, strict=True))
        streams: Streams = {"und": self._frame.expand(len(rows), -1, -1),
                            "gen": latents.expand(len(rows), -1, -1)}
        hidden = self._model.language_model.model(streams, rope, rows, causal=False)
        return self._model.llm2vae(hidden["gen"])

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance, scaled back where it made the velocity longer than the conditional one."""
        guided = unconditional + self._sampling.cfg_scale * (conditional - unconditional)
        shrink = conditional.float().norm() / (guided.float().norm() + 1e-8)
        return guided * shrink.clamp(0, 1).to(guided.dtype)


def sample(denoiser: Denoiser, noise: Tensor, sampling: Sampling,
           on_step: Callable[[Step], None] | None = None) -> Tensor:
    """Integrate from noise x_T [n, 48] to latents [frames, rows, columns, 48] with Euler steps.

    x_t stays in the dtype of `noise`, also in bfloat16, as in the official code.

    Args:
        on_step: called after every velocity; an exception that it raises ends the request.
    """
    times, x = timesteps(sampling), noise
    for index in range(sampling.num_timesteps):
        velocity = denoiser.velocity(x, times[index].item()).to(x.device)
        if on_step is not None:
            on_step(Step(index, times[index].item(), x, velocity))
        x = x - velocity * (times[index] - times[index + 1])
    return x.reshape(*denoiser.grid, LATENT_CHANNELS)
