"""Arguments of the scripts that run the model, and the objects they mean. Flags keep the published spelling."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lance_quant import cli
from lance_quant.errors import InputError
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.mot import Lance
from lance_quant.lance.pipeline import Pipeline, latent_grid
from lance_quant.lance.understanding import MAX_NEW_TOKENS
from lance_quant.lance.vision import RESOLUTIONS
from lance_quant.tasks import TASKS, Settings
from lance_quant.tensorfile import Checkpoint, TensorSpec, file_size

_DEFAULTS = {field.name: field.default for field in fields(Sampling)}


def add_model(to: argparse.ArgumentParser) -> None:
    """--model_path, --vit_path, --vae_path, --device, --dtype."""
    to.add_argument("--model_path", type=Path, required=True,
                    help="Lance folder: llm_config.json, tokenizer files and the float checkpoint")
    to.add_argument("--vit_path", type=Path, help="Qwen2.5-VL-ViT folder; default: beside the Lance folder")
    to.add_argument("--vae_path", type=Path, help="Wan2.2_VAE.pth; default: beside the Lance folder")
    cli.add_device(to)


def add_task(to: argparse.ArgumentParser, steps_flag: str = "--validation_num_timesteps") -> None:
    """What to run and how; `steps_flag` is the name of the number of denoising steps."""
    to.add_argument("--task", choices=TASKS, required=True, help="what to run")
    to.add_argument("--example_json", type=Path, required=True, help="sample file in the official example format")
    to.add_argument("--limit", type=int, help="take only this many samples")
    to.add_argument("--resolution", choices=RESOLUTIONS, default="image_768res", help="preset for input pictures")
    to.add_argument("--video_height", type=int, default=768, help="height of generated pictures, floored to 16")
    to.add_argument("--video_width", type=int, default=768, help="width of generated pictures, floored to 16")
    to.add_argument("--num_frames", type=int, help="for the video tasks; of no effect on pictures")
    to.add_argument(steps_flag, dest="num_timesteps", type=int, default=_DEFAULTS["num_timesteps"],
                    help="denoising steps")
    to.add_argument("--validation_timestep_shift", type=float, default=_DEFAULTS["timestep_shift"],
                    help="how far the schedule leans towards noise")
    to.add_argument("--cfg_scale", type=float, default=_DEFAULTS["cfg_scale"],
                    help="guidance strength; 1 turns guidance off")
    to.add_argument("--seed", type=int, default=_DEFAULTS["seed"], help="of the noise, which all samples share")
    to.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer")
    to.add_argument("--sequential_guidance", action="store_true",
                    help="run the two passes of guidance one after the other: less memory, same result")
    to.add_argument("--fix_quirks", action="store_true",
                    help="repair the official code's bugs instead of reproducing them (README, Quirks)")


def settings_of(args: argparse.Namespace) -> Settings:
    """The run's settings; InputError for a value out of range."""
    rules = (("num_timesteps", args.num_timesteps, 1), ("max_new_tokens", args.max_new_tokens, 1),
             ("limit", args.limit, 1), ("seed", args.seed, 0), ("cfg_scale", args.cfg_scale, 0),
             ("validation_timestep_shift", args.validation_timestep_shift, 1e-6))
    for name, value, lowest in rules:
        if value is not None and not value >= lowest:
            raise InputError(f"--{name} {value} must be at least {lowest}")
    if args.task == "t2i":
        _, rows, columns = latent_grid(args.video_height, args.video_width)
        if (rows * 16, columns * 16) != (args.video_height, args.video_width):
            cli.log.warning("size %d x %d is floored to %d x %d: sides are multiples of 16", args.video_height,
                            args.video_width, rows * 16, columns * 16)
    if args.num_frames is not None:
        cli.log.warning("--num_frames has no effect on %s", args.task)
    sampling = Sampling(num_timesteps=args.num_timesteps, timestep_shift=args.validation_timestep_shift,
                        cfg_scale=args.cfg_scale, seed=args.seed, batch_guidance=not args.sequential_guidance)
    return Settings(args.task, args.resolution, args.video_height, args.video_width, sampling, args.max_new_tokens,
                    args.fix_quirks)


def paths_of(args: argparse.Namespace, decodes: bool = True) -> LancePaths:
    """The model's paths, with the parts that the task needs checked for; `decodes`: pictures are made of latents."""
    paths = LancePaths.find(args.model_path, args.vit_path, args.vae_path)
    if args.task == "x2t_image" and not (paths.vit / "config.json").is_file():
        raise InputError(f"ViT not found: {paths.vit}/config.json; give its folder with --vit_path")
    if args.task == "t2i" and decodes:
        cli.require_file(paths.vae, "VAE (give it with --vae_path)")
    return paths


def load(args: argparse.Namespace, paths: LancePaths, checkpoint: Path | None = None,
         prepare: Callable[[Lance], object] | None = None) -> Pipeline:
    """The pipeline that the model and device arguments mean, from `checkpoint` or the float weights."""
    device = cli.device_of(args.device)
    return Pipeline.load(paths, device, cli.dtype_of(args.dtype, device), checkpoint, prepare,
                         fix_quirks=args.fix_quirks)


def float_facts(model_path: Path) -> dict[str, Any]:
    """What run.json says of float weights: path, bytes on disk, bits per weight of the decoder's linears."""
    with Checkpoint(model_path) as source:
        spec: TensorSpec = next(spec for name, spec in source.specs.items() if name.endswith(".q_proj.weight"))
        return {"path": str(source.path), "format": str(spec.dtype).removeprefix("torch."),
                "bytes": file_size(source.specs),
                "bits_per_weight": float(torch.finfo(spec.dtype).bits)}
