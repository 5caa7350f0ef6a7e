"""Requests to the official backend, and the flags that say them; what it cannot do is refused here."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lance_quant.errors import InputError
from lance_quant.official import checkout

if TYPE_CHECKING:  # the flags alone must stay light: --help shows them
    from lance_quant.lance.config import LancePaths
    from lance_quant.lance.media.samples import Prompt, Question
    from lance_quant.lance.settings import Settings

ENV_PYTHON = "LANCE_OFFICIAL_PYTHON"
# Flags of ours without a counterpart there, and their values that change nothing.
_OURS_ONLY = {"fix_quirks": False, "solver": "euler", "reuse": 0.0, "temperature": 0.0, "top_p": 1.0, "stream": False,
              "compile": False, "offload": "none", "vae_tiling": False, "sequential_guidance": False}


@dataclass(frozen=True)
class OfficialRequest:
    """A task over samples for ByteDance's code.

    device, dtype: as the flags have them; what "auto" means is for the child's torch to say.
    checkout: the source; python: the Python that runs it, None for the environment's or this one.
    arguments: the whole command line, for run.json.
    """

    settings: "Settings"
    samples: "Sequence[Question | Prompt]"
    paths: "LancePaths"
    device: str
    dtype: str
    checkout: checkout.Candidate
    python: Path | None
    arguments: Mapping[str, Any]


def add_official(to: argparse.ArgumentParser) -> None:
    """--official_src, --official_python."""
    to.add_argument("--official_src", type=Path,
                    help=f"checkout of ByteDance's Lance; default: {checkout.ENV_SOURCE}, else inside or beside this "
                         "repository, else the working directory")
    to.add_argument("--official_python", type=Path,
                    help=f"Python that its requirements are installed for; default: {ENV_PYTHON}, else this one")


def request_of(args: argparse.Namespace) -> OfficialRequest:
    """The request that a command line means (add_model, add_task and add_official).

    Raises:
        InputError: a value is out of range or a file missing; the official code has no such flag, would not find its
            files, or is not found itself.
    """
    from lance_quant.cli import requests

    settings, paths = requests.settings_of(args), requests.paths_of(args)
    samples = requests.load_samples(args.example_json, settings, args.limit)
    idle = [f"--{name}" for name, value in _OURS_ONLY.items() if getattr(args, name, value) != value]
    if idle:
        raise InputError(f"the official code knows nothing like {', '.join(idle)}: leave it away with the official "
                         "backend")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("the official backend runs in one process: start it without torchrun")
    if args.seed == 0:
        raise InputError("--seed 0: the official code takes that as no seed at all; use another")
    if args.device.startswith("mps"):
        raise InputError(f"--device {args.device}: the official code runs on CUDA and, through this bridge, on the CPU")
    _require_files(paths)
    return OfficialRequest(settings, samples, paths, args.device, args.dtype, checkout.find(args.official_src),
                           args.official_python, vars(args))


def _require_files(paths: "LancePaths") -> None:
    weights = [paths.model / name for name in ("model.safetensors", "ema.safetensors")]
    if not any(path.is_file() for path in weights):
        raise InputError(f"{paths.model} has no model.safetensors, the one file that the official code reads")
    for path in (paths.vit / "config.json", paths.vit / "vit.safetensors", paths.vae):
        if not path.is_file():
            raise InputError(f"{path} not found: the official code loads ViT and VAE for every task; give their paths "
                             "with --vit_path and --vae_path")
