"""Numerical checks: every kernel that can run on this machine against the definition, in values.

What a linear, the 8-bit head and attention should give is computed in float64 on the CPU from the same packed bytes;
an error is relative, by norm. A whole guided step and a token go through the runtime, once with the reference kernel on
separate projections and once as users run it: merged, on the chosen kernels, compiled where that is asked for.

Limits: a result in float32 may be off by what float32 sums lose (2^-16; TensorFloat-32 loses 2^-11), in bfloat16 and
float16 by one rounding of the result and one of the weights (2^-8 and 2^-10). Kernels that round activations compute
something else: 4 bits in blocks of 16 are off by about a tenth, 8 bits per token and row by about a hundredth.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.comparison import Comparison
from benchmarks.decode import prompt
from benchmarks.denoise import request
from benchmarks.linear_kernels import FORMATS, random_weight
from benchmarks.random_lance import random_lance
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import relative_error
from lance_quant.formats import int8
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import dispatch
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.choices import KERNEL_CHOICES, KernelChoice
from lance_quant.kernels.quantized_linear import PackedLinear
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.config import LATENT_CHANNELS, LanceConfig
from lance_quant.lance.generation import Denoiser, Sampling
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.runtime import latent_grid
from lance_quant.lance.tokens import Grid
from lance_quant.lance.understanding import Decoding

LIMITS = {torch.float32: 2.0**-16, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ROUNDED_ACTIVATIONS = {"w4a4": 0.15, "w4a8": 0.03}  # by the end of a kernel's name
ROWS = (1, 5, 40, 300)  # each takes another path of some kernel
ZERO_ROW = 1  # an output whose weights are all zero
_TIME, _PROMPT, _TOKENS = 0.9, 32, 4  # a guided timestep; what is decoded
_CALLS = 5  # of a timed attention path


@dataclass(frozen=True)
class Check:
    """One comparison: `error` above `limit`, or none at all, is a failure.

    rows: of activations; paths: the paths of kernels that ran; ms: how long it took, where that is asked for
    note: what was wrong if nothing could be compared
    """

    what: str
    kernel: str
    format: str
    dtype: str
    rows: int
    error: float | None
    limit: float
    paths: str = ""
    note: str = ""
    ms: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the values are right."""
        return self.error is not None and self.error <= self.limit

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ok": self.ok}


@dataclass(frozen=True)
class LeftOut:
    """What cannot run here, and why."""

    what: str
    why: str

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {"left_out": self.what, "why": self.why}


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def checks(device: torch.device, n_in: int, n_out: int) -> Iterator[Check | LeftOut]:
    """Every kernel by name, and what auto takes: all formats and compute dtypes, then the 8-bit head."""
    torch.manual_seed(0)
    for kernel in KERNEL_CHOICES:
        for form, codec in FORMATS.items():
            q = with_zero_row(random_weight(codec, n_out, n_in, device))
            for dtype in LIMITS:
                yield from linear_checks(kernel, form, codec, q, dtype, device)
        for dtype in LIMITS:
            yield from head_checks(kernel, n_in, n_out, dtype, device)


def linear_checks(kernel: KernelChoice, form: str, codec: Codec, q: PackedWeight, dtype: torch.dtype,
                  device: torch.device) -> Iterator[Check | LeftOut]:
    """One kernel on one weight [out, in] with a bias, for every number of ROWS."""
    n_out, n_in = q.packed.shape[0], 2 * q.packed.shape[1]
    try:
        chosen = dispatch.choose(kernel, codec, n_in, dtype, device)
        dispatch.require_values(kernel, q, "the made-up weight")
    except InputError as error:
        yield LeftOut(f"{kernel}, {form}, {name_of(dtype)}", str(error))
        return
    weight = codec.dequantize(q).double().cpu()
    bias = torch.randn(n_out, device=device).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, n_in, device=device).to(dtype)
        wanted = x.double().cpu() @ weight.t() + bias.double().cpu()
        yield compared("linear", kernel, form, dtype, rows, wanted, lambda x=x: chosen.linear(x, q, codec, bias),
                       {ZERO_ROW: bias[ZERO_ROW].double().cpu()})


def head_checks(kernel: KernelChoice, n_in: int, n_out: int, dtype: torch.dtype,
                device: torch.device) -> Iterator[Check]:
    """The 8-bit head on what a kernel's choice means for it."""
    q = int8.quantize(torch.randn(n_out, n_in, device=device))
    chosen = dispatch.choose_int8(kernel, n_in, dtype, device)
    weight = int8.dequantize(q).double().cpu()
    for rows in ROWS[:2]:
        x = torch.randn(rows, n_in, device=device).to(dtype)
        yield compared("8-bit head", chosen.name, "int8", dtype, rows, x.double().cpu() @ weight.t(),
                       lambda x=x: chosen.int8_linear(x, q))


def compared(what: str, kernel: str, form: str, dtype: torch.dtype, rows: int, wanted: Tensor,
             compute: Callable[[], Tensor], exact: Mapping[int, Tensor] = MappingProxyType({}),
             limit: float | None = None) -> Check:
    """Run a kernel and compare what it gives with `wanted`, float64 on the CPU.

    Args:
        exact: last index -> values there, which must be equal to the bit.
        limit: None: that of the dtype, or of a kernel that rounds activations.
    """
    if limit is None:
        limit = next((limit for end, limit in ROUNDED_ACTIVATIONS.items() if kernel.endswith(end)), LIMITS[dtype])
    about = (what, kernel, form, name_of(dtype), rows)
    before = CALLS.counts()
    try:
        found = compute()
    except (RuntimeError, NotImplementedError, TypeError) as error:  # what libraries raise; the next check goes on
        return Check(*about, None, limit, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    paths = ", ".join(CALLS.since(before))
    got = found.double().cpu()
    if found.dtype != dtype or got.shape != wanted.shape:
        return Check(*about, None, limit, paths, f"gave {tuple(got.shape)} in {found.dtype}")
    if not torch.isfinite(got).all():
        return Check(*about, None, limit, paths, "not finite")
    for column, value in exact.items():
        if not (got[:, column] == value).all():
            return Check(*about, None, limit, paths, f"output {column}, of zero weights, is not its bias")
    return Check(*about, relative_error(got, wanted), limit, paths)


def with_zero_row(q: PackedWeight) -> PackedWeight:
    """The weight with codes that stand for 0 in the row ZERO_ROW."""
    if isinstance(q, Int4Weight):
        q.packed[ZERO_ROW], q.zero[ZERO_ROW] = 0x77, 7
    else:
        q.packed[ZERO_ROW] = 0x80  # 0 and -0
    return q


def attention_checks(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], width: int,
                     queries: int, keys: int) -> Iterator[Check | LeftOut]:
    """Scaled dot product attention as denoising calls it, on each of the library's paths.

    Args:
        heads: of queries, and of keys and values.
        width: of a head.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, count, length, width, device=device).to(dtype)
               for count, length in ((heads[0], queries), (heads[1], keys), (heads[1], keys)))
    wide = [part.double().cpu() for part in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, enable_gqa=True)
    for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.MATH):
        name = "chosen by torch" if backend is None else backend.name.lower()

        def compute(backend: SDPBackend | None = backend) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        found = compared("attention", name, "", dtype, queries, wanted, compute)
        if found.error is not None:
            yield replace(found, ms=_milliseconds(compute, device))
        elif any(words in found.note for words in ("No available kernel", "No viable backend")):
            yield LeftOut(f"attention, {name}", "torch has no such path for this call here")
        else:
            yield found


def _milliseconds(compute: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls; the first has been made."""
    plan = Comparison((), "float32", 1, _CALLS, device, torch.float32)
    return min(plan.seconds(compute) for _ in range(_CALLS)) * 1e3


def step_checks(plan: Comparison, config: LanceConfig, height: int, width: int) -> Iterator[Check | LeftOut]:
    """Models as users run them, beside the same weights in separate projections on the reference kernel."""
    grid = latent_grid(height, width)
    for form in plan.formats:
        dtype = plan.dtype_of(form)
        reference = random_lance(config, form, dtype, plan.device)
        for module in reference.modules():
            if isinstance(module, PackedLinear):
                module.kernel_choice = "reference"
        wanted = {what: run(reference, grid).double().cpu() for what, run in OUTCOMES.items()}
        del reference
        model = random_lance(config, form, dtype, plan.device)
        merge_projections(model)
        for way in ("merged", "compiled") if plan.compiled else ("merged",):
            if way == "compiled" and not compile_steps(model):
                yield LeftOut(f"compiled steps, {form}", "nothing can be compiled on this machine")
                continue
            for what, run in OUTCOMES.items():
                yield compared(what, way, form, dtype, len(wanted[what]), wanted[what],
                               functools.partial(run, model, grid), limit=OUTCOME_LIMITS[what, dtype])


@torch.no_grad()
def velocity_of(model: Lance, grid: Grid) -> Tensor:
    """A guided velocity [n, 48]."""
    x = torch.randn(math.prod(grid), LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
    return Denoiser(model, request(grid), Sampling()).velocity(x.to(model.device, model.dtype), _TIME).to(model.dtype)


@torch.no_grad()
def tokens_of(model: Lance, grid: Grid) -> Tensor:
    """What is decoded behind a prompt, as rows [tokens, vocabulary] that are 1 at the token."""
    valid = model.config.vocab_size

    def make(capacity: int, longest: int) -> Decoding:
        return Decoding(model, valid, capacity, longest)

    decoding, step = model.steps.loop(make, _PROMPT + _TOKENS, _TOKENS, "check")
    decoding.start(prompt(_PROMPT), torch.empty(0), _TOKENS, seed=0)
    for _ in range(_TOKENS):
        step()
    return F.one_hot(decoding.ids[:_TOKENS].long(), valid).to(model.dtype)


OUTCOMES: dict[str, Callable[[Lance, Grid], Tensor]] = {"guided step": velocity_of, "decoded tokens": tokens_of}
# A step may be off by what one layer's rounding does in the next. Of tokens up to half may differ (by norm, half of
# them is an error of 1): a near tie that falls the other way changes all that follow, wrong memory changes all.
OUTCOME_LIMITS = {("guided step", torch.float32): 1e-3, ("guided step", torch.bfloat16): 3e-2,
                  ("decoded tokens", torch.float32): 1.0, ("decoded tokens", torch.bfloat16): 1.0}
