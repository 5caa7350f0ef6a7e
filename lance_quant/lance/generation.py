"""Rectified flow (arXiv:2209.03003) over latent tokens with classifier-free guidance (arXiv:2207.12598).

The language model is the denoiser: it says the velocity of latents x_t [cells, 48] at a timestep t, from 1 (noise) to 0
(data). A cell is 16 x 16 pixels of one latent frame, and a latent frame stands for 4 frames, the first one for 1.

The prompt, and for an edit its source, are read once into the cache. Each step sends <|vision_start|>, the latent
tokens and <|vision_end|> through the model, conditionally and, while guidance is on, unconditionally (without the
prompt), and moves x_t along the guided velocity, which points from data to noise. A velocity may serve several steps
(`computed_steps`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.lance.cache import CacheRow, allocate
from lance_quant.lance.config import LATENT_CHANNELS
from lance_quant.lance.mot import Lance, Rope, Streams
from lance_quant.lance.settings import Sampling
from lance_quant.lance.tokens import CONDITION, PROMPT, TARGET, VIT, TokenSequence


class Given(NamedTuple):
    """What a request shows the model beside its text.

    vit_tokens: [pads, hidden], an edit's source through the ViT.
    source: latents [frames, rows, columns, 48], an edit's source through the VAE.
    first: latents [1, rows, columns, 48], a clip's first frame, which is not denoised.
    """

    vit_tokens: Tensor | None = None
    source: Tensor | None = None
    first: Tensor | None = None


TEXT_ONLY = Given()
ALWAYS_COMPUTED = 3  # first, and last, steps


class Step(NamedTuple):
    """One denoising step: its number, the timestep, x_t [n, 48] that entered, and the guided velocity [n, 48].

    The velocity is 0 where a frame is given.
    computed: False where it is that of an earlier step, used again.
    """

    number: int
    t: float
    x: Tensor
    velocity: Tensor
    computed: bool = True


def timesteps(sampling: Sampling) -> Tensor:
    """The schedule, float32 [num_timesteps + 1] from 1 to 0: s u / (1 + (s - 1) u) for evenly spaced u and shift s, so
    that more steps are taken near the noise (SD3's resolution shift, arXiv:2403.03206)."""
    u = torch.linspace(1, 0, sampling.num_timesteps + 1)
    return sampling.timestep_shift * u / (1 + (sampling.timestep_shift - 1) * u)


def computed_steps(sampling: Sampling) -> frozenset[int]:
    """The numbers of the steps whose velocities are computed; the others use earlier ones (`_slope`).

    Along a straight flow the velocity hardly changes, so one may serve until t is `Sampling.reuse` away from where it
    was computed. Steps near the noise are short, and most are guided, so that is where passes are saved. Always
    computed are the first steps, which lay out the picture, the last ones, which a shift of the schedule makes the
    longest, and the first one behind a switch of guidance, where the velocity becomes another function.
    """
    times = timesteps(sampling).tolist()
    found: list[int] = []
    for number in range(sampling.num_timesteps):
        outer = not ALWAYS_COMPUTED <= number < sampling.num_timesteps - ALWAYS_COMPUTED
        if outer or times[found[-1]] - times[number + 1] > sampling.reuse \
                or sampling.guided(times[found[-1]]) != sampling.guided(times[number]):
            found.append(number)
    return frozenset(found)


def initial_noise(cells: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Noise x_T [cells, 48] on the CPU, so that a seed means the same picture on every device.

    Drawn in float32 and rounded to `dtype`, the explicit compute dtype; never derived from a weight.
    """
    noise = torch.randn(cells, LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return noise.to(dtype)


class Denoiser:
    """Guided velocity of one request at any (x_t, t): the prompt's cache, positions and embeddings, made once.

    It serves any number of seeds. `sampling` says how its trajectories are integrated.
    """

    @torch.no_grad()
    def __init__(self, model: Lance, sequence: TokenSequence, sampling: Sampling, given: Given = TEXT_ONLY):
        if not hasattr(model, "vae2llm"):
            raise InputError("this checkpoint is for understanding alone (it has no vae2llm, llm2vae, time_embedder): "
                             "take a task that answers, x2t_image or x2t_video, or the whole checkpoint")
        self._model, self._given, self.sampling = model, given, sampling
        self.grid = sequence.visuals[-1].grid
        self._source_cells = 0 if given.source is None else given.source[..., 0].numel()
        self._fixed = _cells(given.first, model)
        # The unconditional query counts its positions without the prompt, although the unconditional cache was
        # filled at the conditional positions: the official code does so, and the model is used that way.
        queries = [(whole, *whole.span(TARGET)) for whole in (sequence, sequence.without_prompt())]
        self._rows = allocate(model.config, [end for _, _, end in queries], model.dtype, model.device)
        self._read_context(sequence)
        ropes = [self._stream_rope(whole.positions[:, start:end]) for whole, start, end in queries]
        self._rope = tuple(torch.cat(parts) for parts in zip(*ropes, strict=True))
        self._places = model.latent_pos_embed(self.grid)
        start, end = sequence.span(TARGET)
        self._frame = model.embed(sequence.ids[[start, end - 1]])  # <|vision_start|> and <|vision_end|>

    def _read_context(self, sequence: TokenSequence) -> None:
        """Fill both rows with all that precedes the target: the unconditional one skips the prompt, nothing else."""
        x = self._model.embed(sequence.ids)
        for (start, end), split in zip(sequence.bounds(), sequence.splits, strict=True):
            if split.content == TARGET:
                return
            if split.content == VIT:
                assert self._given.vit_tokens is not None, "a sequence with a ViT span comes with its tokens"
                x[start + 1:end - 1] = self._given.vit_tokens
            positions = sequence.positions[:, start:end]
            for batch in self._batches(1 if split.content == PROMPT else len(self._rows)):
                if split.content == CONDITION:
                    self._read_source(x[[start, end - 1]], positions, self._rows[batch])
                else:
                    self._model.read(x[start:end], positions, self._rows[batch], split.mode == "causal")

    def _read_source(self, frame: Tensor, positions: Tensor, rows: Sequence[CacheRow]) -> None:
        """Read an edit's source latents, which are free of noise: t = 0."""
        assert self._given.source is not None, "a sequence with a condition span comes with its latents"
        source = _cells(self._given.source, self._model)
        latents = self._embed(source, 0.0, len(source), self._model.latent_pos_embed(self._given.source.shape[:3]))
        self._see(frame, latents, self._stream_rope(positions), rows)
        for row in rows:
            row.commit(positions.shape[1])

    def _stream_rope(self, positions: Tensor) -> Rope:
        """Rotary terms of a visual in stream order: both understanding tokens, then the latents."""
        return self._model.rope(torch.cat([positions[:, :1], positions[:, -1:], positions[:, 1:-1]], 1))

    def _batches(self, count: int) -> Iterator[slice]:
        """The first `count` rows in the batches that go through the model."""
        each = count if self.sampling.batch_guidance else 1
        return (slice(first, first + each) for first in range(0, count, each))

    def _embed(self, x: Tensor, t: float, fixed: int, places: Tensor) -> Tensor:
        """Latent tokens [n, hidden] of cells x [n, 48], the first `fixed` at time 0 and the others at t."""
        model = self._model
        # Filled on the device: a copy from the host would wait for all that is still to run there.
        times = torch.stack([torch.full((), value, device=model.device) for value in (0.0, t)])
        times = model.time_embedder(times, model.dtype)
        when = torch.cat([times[:1].expand(fixed, -1), times[1:].expand(len(x) - fixed, -1)])
        return model.vae2llm(x.to(model.device, model.dtype)) + when + places

    def _see(self, frame: Tensor, latents: Tensor, rope: Rope, rows: Sequence[CacheRow],
             steady: bool = False) -> Tensor:
        """One call on a visual: final hidden states [b, n, hidden] of its latent tokens."""
        streams: Streams = {"und": frame.expand(len(rows), -1, -1), "gen": latents.expand(len(rows), -1, -1)}
        parts = self._model.steps.layers if steady else None
        if parts is not None:  # as every layer but the first gets them: one compilation less
            streams = {expert: x.contiguous() for expert, x in streams.items()}
        return self._model.language_model.model(streams, rope, rows, False, parts)["gen"]

    def noise(self, seed: int) -> Tensor:
        """x_T [n, 48] on the CPU: a seed's noise, with the given first frame in its place.

        The official code draws noise for an edit's source too, in front of the target's, and drops it.
        """
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        noise = initial_noise(self._source_cells + cells, seed, self._model.dtype)[self._source_cells:]
        return torch.cat([self._fixed.to(noise), noise[len(self._fixed):]])

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Velocity [n, 48] at x_t [n, 48] and timestep t, guided where guidance is on; 0 in a given first frame."""
        latents = self._embed(x, t, len(self._fixed), self._places)
        count = 2 if self.sampling.guided(t) else 1
        passes = torch.cat([self._run(latents, batch) for batch in self._batches(count)])
        velocity = passes[0] if count == 1 else self._guide(*passes)
        velocity[:len(self._fixed)] = 0
        return velocity

    def _run(self, latents: Tensor, batch: slice) -> Tensor:
        rows, rope = self._rows[batch], (self._rope[0][batch], self._rope[1][batch])
        what = f"denoising step, {len(rows)} x {len(latents)} latents"
        with self._model.steps.first(what):
            return self._model.llm2vae(self._see(self._frame, latents, rope, rows, steady=True))

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance, scaled back where it made the velocity longer than the conditional one."""
        guided = unconditional + self.sampling.cfg_scale * (conditional - unconditional)
        if self.sampling.cfg_renorm == "none":
            return guided
        over = (0, 1) if self.sampling.cfg_renorm == "global" else 1
        lengths = [velocity.float().norm(dim=over, keepdim=True) for velocity in (conditional, guided)]
        shrink = lengths[0] / (lengths[1] + 1e-8)
        return guided * shrink.clamp(0, 1).to(guided.dtype)


def _cells(latents: Tensor | None, model: Lance) -> Tensor:
    """Latents [frames, rows, columns, 48] as cells [n, 48] for the model; none of them where there are no latents."""
    if latents is None:
        return torch.empty(0, LATENT_CHANNELS, dtype=model.dtype, device=model.device)
    return latents.reshape(-1, LATENT_CHANNELS).to(model.device, model.dtype)


def sample(denoiser: Denoiser, noise: Tensor, on_step: Callable[[Step], None] | None = None) -> Tensor:
    """Integrate the flow from noise x_T [n, 48] (Denoiser.noise) to latents [frames, rows, columns, 48].

    x_t stays in the dtype of `noise`, also in bfloat16, as in the official code, and where `noise` is: on the model's
    device no step waits for another.

    Args:
        on_step: called in every step, before x_t moves; an exception that it raises ends the request.
    """
    sampling, x = denoiser.sampling, noise
    times, computed = timesteps(sampling), computed_steps(sampling)
    known: list[Step] = []  # the last two steps whose velocities were computed
    for number in range(sampling.num_timesteps):
        t = times[number].item()
        if number in computed:
            step = Step(number, t, x, denoiser.velocity(x, t).to(x.device))
            known = [*known[-1:], step]
        else:
            step = known[-1]._replace(number=number, t=t, x=x, computed=False)
        if on_step is not None:
            on_step(step)
        x = x - _slope(number, known, times, sampling) * (times[number] - times[number + 1])
    return x.reshape(*denoiser.grid, LATENT_CHANNELS)


def _slope(number: int, known: Sequence[Step], times: Tensor, sampling: Sampling) -> Tensor:
    """The velocity [n, 48] that stands for a whole step.

    Euler's is that of the step's start, second-order Adams-Bashforth's that of its middle, on the line through the last
    two velocities that were computed. Where guidance was switched between the two, they lie on no common line, and the
    last one is taken as it is.
    """
    last, before = known[-1], known[0]
    own = number == last.number
    if last is before or sampling.guided(last.t) != sampling.guided(before.t) or (own and sampling.solver == "euler"):
        return last.velocity
    ends = times[number] + (times[number] if sampling.solver == "euler" else times[number + 1])
    ahead = (2 * times[last.number] - ends) / (2 * (times[before.number] - times[last.number]))
    return last.velocity + ahead * (last.velocity - before.velocity)
