#!/usr/bin/env python3
"""Measure the peak memory of a question and of a picture: real shapes, random weights made in place, every format.

    python -m benchmarks.peak_memory --formats int4 --tasks x2t --layers 36 --head_bits 8  # on the CPU: 7 GB, minutes
    python -m benchmarks.peak_memory                                              # 2 of 36 layers, 36 computed
    python -m benchmarks.peak_memory --device cuda --layers 36 --vae
    python -m benchmarks.peak_memory --device meta --layers 36 --vae              # computed, in seconds

Reads   nothing; weights are made in place
Writes  nothing; the last line on stdout is the result as JSON, all sizes in bytes
Needs   what it measures

Each task and format runs in a process of its own. There, each part of the request is a stage with its own peak: of the
resident memory of the process (CPU), or of what torch allocated (CUDA). `x2t` is a question about a picture of 672 x
672: "look", the ViT on 2304 patches; "answer", a prompt of 640 tokens and a few more. `t2i` is a picture of --height x
--width: "denoise", the prompt and a guided step; with --vae "decode", latents to pixels. What a stage needs beside the
language model is there while it runs; --offload says what stays afterwards: a ViT that is still there adds to
"answer".

With fewer than 36 layers, `peak_36` is computed: the missing layers' weights and cache entries, to the byte, are added
to the measured peak. Activations do not depend on the number of layers.

--device meta computes what a GPU would hold: the same code runs on tensors without values, and the bytes of all that
are alive at once are counted. Attention counts with its output alone, as flash attention does, and packed linears,
which then compute in bfloat16, with what the CUDA path allocates. Not counted: the libraries' workspaces, the CUDA
context, and the ViT's activations.
"""

import argparse
import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.child import in_child
from benchmarks.denoise import request
from benchmarks.random_lance import (
    FORMATS,
    REAL_LAYERS,
    compute_dtype,
    random_lance,
    random_values,
    real_config,
    weight_bytes,
)
from benchmarks.synthetic_lance import PRESETS, vit_tower
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.inference.live_bytes import Alive, Allocations, counted
from lance_quant.inference.memory import peak_memory, reset_peak_memory
from lance_quant.kernels import dispatch
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.generation import Denoiser
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.settings import OFFLOADS, Sampling, latent_grid
from lance_quant.lance.tokens import TARGET, TEMPLATE, VIT, Split, TokenSequence, Visual, mrope_positions
from lance_quant.lance.understanding import Decoding

TASKS = ("x2t", "t2i")
_LOOKED, _MERGED = (1, 48, 48), (1, 24, 24)  # patches and tokens of a picture of 672 x 672
_TEXT = (20, 44)  # tokens around the picture of an ordinary question
_ANSWER = 4
_OFFLOADS = [offload for offload in OFFLOADS if offload != "layers"]  # which needs a model that is loaded from files


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what runs")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bfloat16", "int4", "nvfp4_slim"],
                        help="of the linears; packed ones compute in --dtype")
    parser.add_argument("--offload", nargs="+", choices=_OFFLOADS, default=list(_OFFLOADS),
                        help="as for run_baseline.py; of effect on x2t, whose ViT runs before the model")
    parser.add_argument("--head_bits", type=int, choices=[8, 16], default=16,
                        help="of output head and embedding; 16: the compute dtype")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers, of 36")
    parser.add_argument("--height", type=int, default=768, help="of the picture that t2i makes")
    parser.add_argument("--width", type=int, default=768, help="of the picture that t2i makes")
    parser.add_argument("--sequential_guidance", action="store_true", help="as for run_baseline.py")
    parser.add_argument("--vae", action="store_true", help="also decode the picture: minutes on the CPU")
    parser.add_argument("--vae_tiling", action="store_true", help="as for run_baseline.py")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    script.add_device(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Case:
    """One request to one model; the flags explain the fields.

    device: of the model; meta: computed for a GPU
    dtype: what packed linears compute in
    offload: "any" where it makes no difference
    """

    task: str
    format: str
    offload: str
    head_bits: int
    height: int
    width: int
    sequential_guidance: bool
    vae: bool
    vae_tiling: bool
    device: torch.device
    dtype: torch.dtype


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What the flags ask for; offload makes no difference to t2i."""
    device = torch.device("meta") if args.device == "meta" else device_of(args.device)
    dtype = torch.bfloat16 if device.type == "meta" else dtype_of(args.dtype, device)
    return [Case(task, form, offload, args.head_bits, args.height, args.width, args.sequential_guidance, args.vae,
                 args.vae_tiling, device, dtype)
            for task, form in itertools.product(args.tasks, args.formats)
            for offload in (args.offload if task == "x2t" else ["any"])]


class Stages:
    """Peaks by stage, in bytes."""

    def __init__(self, device: torch.device, alive: "Alive | None"):
        self.device, self.alive = device, alive
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block's peak, from what is there when it begins."""
        if self.alive is not None:
            self.alive.peak = self.alive.now
            yield
            self.peaks[name] = self.alive.peak
            return
        reset_peak_memory(self.device)
        yield
        found = peak_memory(self.device)
        self.peaks[name] = found.get("cuda", found["host"]) or 0


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    cases, rows = cases_of(args), []
    computed = cases[0].device.type == "meta"
    name = "computed for a GPU" if computed else device_name(cases[0].device)
    print(f"{name}; GB with {args.layers} layers, and computed for {REAL_LAYERS}")
    for case in cases:
        # Nothing is measured on meta, so that a process of its own would serve nothing.
        found = (measure if computed else functools.partial(in_child, measure))(case, real_config(args.layers),
                                                                                args.threads)
        rows.append({"task": case.task, "format": case.format, "offload": case.offload, **found})
        text = "  ".join(f"{stage} {peak / 1e9:.2f} -> {found['peak_36'][stage] / 1e9:.2f}"
                         for stage, peak in found["peak"].items())
        print(f"{case.task} {case.format:<11}{case.offload:<8}{text}", flush=True)
    print(json.dumps({"device": name, "layers": args.layers, "rows": rows, "versions": versions()}))


def measure(case: Case, config: LanceConfig, threads: int = 1) -> dict[str, Any]:
    """Bytes in this process: `peak` by stage, `weights`, those of one `layer` and of its `cache_per_layer`, and what
    both of the former would be with 36 layers (`peak_36`, `weights_36`)."""
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        alive = None
        if case.device.type == "meta":
            stack.enter_context(mock.patch.object(dispatch, "choose", lambda *_: Allocations()))
            alive = stack.enter_context(counted())
        return _measured(case, config, Stages(case.device, alive))


def _measured(case: Case, config: LanceConfig, stages: Stages) -> dict[str, Any]:
    dtype = compute_dtype(case.format, case.dtype)
    model = random_lance(config, case.format, dtype, case.device, head_bits=case.head_bits)
    merge_projections(model)
    entries = RUNS[case.task](case, model, stages)
    layer = weight_bytes(model.language_model.model.layers[0])
    cache = entries * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    missing = REAL_LAYERS - config.num_hidden_layers
    computed = {name: peak + missing * (layer + (cache if name in ("answer", "denoise") else 0))
                for name, peak in stages.peaks.items()}
    return {"head_bits": case.head_bits, "dtype": str(dtype).removeprefix("torch."), "peak": stages.peaks,
            "peak_36": computed, "weights": weight_bytes(model), "weights_36": weight_bytes(model) + missing * layer,
            "layer": layer, "cache_per_layer": cache}


def question(case: Case, model: Lance, stages: Stages) -> int:
    """x2t; cache entries per layer."""
    tower = random_part(vit_tower(PRESETS["real"]), model)
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config).to(model.device)  # not filled by the above
    with stages.stage("look"):
        patches = random_values((_LOOKED[1] * _LOOKED[2], 1176), model.dtype, model.device)
        if model.device.type == "meta":  # the tower looks at values of its grid
            seen = torch.empty(_MERGED[1] * _MERGED[2], model.config.hidden_size, dtype=model.dtype, device="meta")
        else:
            with torch.no_grad():
                seen = tower(patches, grid_thw=torch.tensor([_LOOKED], device=model.device)).pooler_output
        if case.offload == "vae_vit" or (case.offload == "cpu" and model.device.type == "meta"):
            del tower  # off the device either way
        elif case.offload == "cpu":
            tower.to("cpu")
    before, after = _TEXT
    pads = _MERGED[1] * _MERGED[2]
    visuals = (Visual(before + 1, _MERGED),)
    length = before + pads + 2 + after
    prompt = TokenSequence(torch.arange(1000, 1000 + length), mrope_positions(length, visuals),
                           (Split(before, "causal", TEMPLATE), Split(pads + 2, "full", VIT),
                            Split(after, "causal", TEMPLATE)), visuals)
    with stages.stage("answer"):
        decoding = Decoding(model, model.config.vocab_size, length + _ANSWER, _ANSWER)
        decoding.start(prompt, seen, _ANSWER, seed=0)
        for _ in range(_ANSWER):
            decoding.step()
    return length + _ANSWER


def picture(case: Case, model: Lance, stages: Stages) -> int:
    """t2i; cache entries per layer."""
    grid = latent_grid(case.height, case.width)
    sequence = request(grid)
    with stages.stage("denoise"):
        denoiser = Denoiser(model, sequence, Sampling(batch_guidance=not case.sequential_guidance))
        x = torch.zeros(grid[1] * grid[2], 48, dtype=model.dtype, device=model.device)
        velocity = denoiser.velocity(x, 0.9)
    del denoiser
    if case.vae:
        from lance_quant.lance.vae import Vae, build_autoencoder

        with torch.device("meta"):
            autoencoder = build_autoencoder(160, 256)
        vae = Vae(random_part(autoencoder, model), model.dtype, model.device)
        if case.vae_tiling:
            vae.autoencoder.enable_tiling()
        with stages.stage("decode"):
            vae.decode(velocity.reshape(*grid, -1))
    return 2 * sequence.span(TARGET)[1]


def random_part(part: nn.Module, model: Lance) -> nn.Module:
    """A module on meta, filled at the model's device in its dtype."""
    for name, parameter in list(part.named_parameters()):
        owner, _, last = name.rpartition(".")
        values = random_values(parameter.shape, model.dtype, model.device).mul_(0.02)
        setattr(part.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))
    return part.eval()


RUNS: dict[str, Callable[[Case, Lance, Stages], int]] = {"x2t": question, "t2i": picture}


if __name__ == "__main__":
    script.run(main)
