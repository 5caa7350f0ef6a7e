"""Flags of the scripts that run the model, and the `Settings` they mean. Flags keep the published spelling.

No torch in here, as in settings.py: --help shows the choices and defaults of both.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import require_whole
from lance_quant.kernels.choices import KERNEL_CHOICES
from lance_quant.lance.config import LATENT_STRIDE
from lance_quant.lance.settings import (
    GREEDY,
    MAX_NEW_TOKENS,
    OFFLOADS,
    RESOLUTIONS,
    TASKS,
    TIMED,
    Sampling,
    Settings,
    TokenSampling,
    latent_grid,
)

_LARGEST_FRAME = 2352  # latent cells of the largest official bucket
_DEFAULTS = {field.name: field.default for kind in (Sampling, Settings) for field in fields(kind)}


def add_model(to: argparse.ArgumentParser, packed: bool = False, required: bool = True) -> None:
    """--model_path, --vit_path, --vae_path, --device, --dtype, --offload; `packed`: 4-bit folders may be given, too,
    and --config_path for those that hold weights alone."""
    to.add_argument("--model_path", type=Path, required=required,
                    help="Lance folder: llm_config.json, tokenizer files and the float checkpoint"
                         + ("; or a packed folder" if packed else ""))
    if packed:
        to.add_argument("--config_path", type=Path,
                        help="folder with llm_config.json and tokenizer files, for a packed folder without them (a "
                             "published one)")
    to.add_argument("--vit_path", type=Path, help="Qwen2.5-VL-ViT folder; default: beside the Lance folder")
    to.add_argument("--vae_path", type=Path, help="Wan2.2_VAE.pth; default: beside the Lance folder")
    script.add_device(to)
    to.add_argument("--offload", choices=OFFLOADS, default="none",
                    help="where ViT and VAE are while not in use: none, on the device; cpu, in host memory; vae_vit, "
                         "on disk only, loaded anew each time; layers, in host memory, from where the language model's "
                         "layers stream to the GPU one ahead, too: where nothing else fits")


def add_lora(to: argparse.ArgumentParser) -> None:
    """--lora of everything that runs a model."""
    to.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", default=[],
                    help="LoRA file or PEFT folder, also on packed models: FILE, FILE:0.8, or per expert "
                         "FILE:und=0.8,gen=0.5; may be given several times (docs/lora.md)")


def add_resume(to: argparse.ArgumentParser) -> None:
    """--resume of the scripts that run samples."""
    to.add_argument("--resume", action="store_true",
                    help="go on with an unfinished run of the same command, whose finished samples are in "
                         "SAVE_PATH_GEN.work; begin one where there is none")


def add_task(to: argparse.ArgumentParser, more: Sequence[str] = ()) -> None:
    """What to run and how; `more` is what else --task takes."""
    to.add_argument("--task", choices=[*TASKS, *more], required=True, help="what to run")
    to.add_argument("--example_json", type=Path, required=True,
                    help="sample file in an official format: the examples' JSON, or a benchmark's JSON or JSONL")
    to.add_argument("--limit", type=int, help="take only this many samples")
    to.add_argument("--resolution", choices=RESOLUTIONS,
                    help="preset for input pictures and clips; default: image_768res for x2t_image and image_edit, "
                         "video_480p for i2v, x2t_video and video_edit")
    to.add_argument("--video_height", type=int, default=_DEFAULTS["height"],
                    help="height of what t2i and t2v make, floored to 16")
    to.add_argument("--video_width", type=int, default=_DEFAULTS["width"],
                    help="width of what t2i and t2v make, floored to 16")
    to.add_argument("--num_frames", type=int,
                    help="frames of what t2v and i2v make, at most 121, floored to 4 k + 1; default: "
                         f"{_DEFAULTS['num_frames']}")
    to.add_argument("--num_timesteps", "--validation_num_timesteps", type=int, default=_DEFAULTS["num_timesteps"],
                    help="denoising steps")
    to.add_argument("--validation_timestep_shift", type=float, default=_DEFAULTS["timestep_shift"],
                    help="how far the schedule leans towards noise")
    to.add_argument("--cfg_scale", type=float, default=_DEFAULTS["cfg_scale"],
                    help="guidance strength; 1 turns guidance off")
    to.add_argument("--seed", type=int, default=_DEFAULTS["seed"],
                    help="of the noise, and of drawn answers; all samples share it")
    _add_sampling(to)
    to.add_argument("--sequential_guidance", action="store_true",
                    help="run the two passes of guidance one after the other: less memory, same result")
    to.add_argument("--vae_tiling", action="store_true",
                    help="let the VAE go through large frames in overlapping tiles: half the memory at 768 x 768 for "
                         "twice the time, and not quite the same pixels")
    to.add_argument("--fix_quirks", action="store_true",
                    help="repair the official code's bugs instead of reproducing them (docs/runtime.md)")


def _add_sampling(to: argparse.ArgumentParser) -> None:
    """What the official scripts do not offer; the defaults are what they do."""
    to.add_argument("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                    default=[_DEFAULTS["cfg_low"], _DEFAULTS["cfg_high"]], help="guidance is on where LOW < t <= HIGH")
    to.add_argument("--cfg_renorm", choices=["global", "channel", "none"], default=_DEFAULTS["cfg_renorm"],
                    help="how a guided velocity is scaled back to the conditional one's length")
    to.add_argument("--solver", choices=["euler", "ab2"], default=_DEFAULTS["solver"],
                    help="ab2: second-order Adams-Bashforth, at the same cost per step (benchmarks/solvers.py)")
    to.add_argument("--reuse", type=float, default=_DEFAULTS["reuse"], metavar="SPAN",
                    help="let a velocity serve for so long in t, 0.1 for less than half of the passes, the first and "
                         "last three steps aside; 0 computes every step's (docs/experiments.md)")
    to.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer")
    to.add_argument("--temperature", type=float, default=GREEDY.temperature,
                    help="draw answers with this temperature; 0 takes the likeliest token")
    to.add_argument("--top_p", type=float, default=GREEDY.top_p,
                    help="draw from the likeliest tokens that together have this probability")


def add_compile(to: argparse.ArgumentParser) -> None:
    """--compile."""
    to.add_argument("--compile", action="store_true",
                    help="compile the decoding and denoising steps: faster from the second step on, after up to a few "
                         "minutes of warm-up that run.json keeps apart; needs a C++ compiler (CPU) or triton (CUDA)")


def add_stream(to: argparse.ArgumentParser) -> None:
    """--stream."""
    to.add_argument("--stream", action="store_true", help="show answers on the terminal (stderr) while they come")


def add_kernel(to: argparse.ArgumentParser) -> None:
    """--mode and --kernel."""
    to.add_argument("--mode", choices=["ondemand", "cached"], default="ondemand",
                    help="ondemand computes on the packed bytes; cached keeps linears in the compute dtype")
    to.add_argument("--kernel", choices=KERNEL_CHOICES, default="auto",
                    help="what computes packed linears; auto: native (C) on CPUs with AVX2, on CUDA triton, or for "
                         "INT4 comfy_kitchen where it is installed and faster, else the slow reference. native_w4a8: "
                         "on CPUs, activations rounded to 8 bits as well, faster where many tokens run. nvfp4_w4a4: "
                         "for NVFP4 on Blackwell, activations rounded to 4 bits as well. Both cost quality "
                         "(docs/kernels.md). run.json says which ran")


def settings_of(args: argparse.Namespace) -> Settings:
    """The run's settings; InputError for a value out of range."""
    _warn_of_idle_flags(args)
    low, high = args.cfg_interval
    sampling = Sampling(num_timesteps=args.num_timesteps, timestep_shift=args.validation_timestep_shift,
                        cfg_scale=args.cfg_scale, batch_guidance=not args.sequential_guidance, cfg_low=low,
                        cfg_high=high, cfg_renorm=args.cfg_renorm, solver=args.solver, reuse=args.reuse)
    if args.limit is not None:
        require_whole("limit", args.limit, 1)
    num_frames = Settings.num_frames if args.num_frames is None else args.num_frames
    settings = Settings(task=args.task, resolution=args.resolution or "", height=args.video_height,
                        width=args.video_width, num_frames=num_frames, seed=args.seed, sampling=sampling,
                        max_new_tokens=args.max_new_tokens, token_sampling=TokenSampling(args.temperature, args.top_p),
                        fix_quirks=args.fix_quirks, vae_tiling=args.vae_tiling)
    _say_what_is_floored(args, settings)
    return settings


# Flags that say nothing to tasks which make text, and to tasks which make pictures or clips.
_DRAWING = {"num_timesteps": "num_timesteps", "validation_timestep_shift": "timestep_shift", "cfg_scale": "cfg_scale",
            "cfg_renorm": "cfg_renorm", "solver": "solver", "reuse": "reuse"}


def _warn_of_idle_flags(args: argparse.Namespace) -> None:
    """Say so where a flag was changed that the task does not use."""
    if TASKS[args.task].makes == "text":
        idle = [name for name, field_name in _DRAWING.items() if getattr(args, name) != _DEFAULTS[field_name]]
    else:
        idle = [name for name, value in (("max_new_tokens", MAX_NEW_TOKENS), ("temperature", GREEDY.temperature),
                                         ("top_p", GREEDY.top_p)) if getattr(args, name) != value]
    if idle:
        script.log.warning("of no effect on %s: %s", args.task, ", ".join(f"--{name}" for name in idle))


def _say_what_is_floored(args: argparse.Namespace, settings: Settings) -> None:
    """Say how the size of what is made is rounded, and that it is unusual."""
    if settings.task not in TIMED and args.num_frames is not None:
        script.log.warning("--num_frames has no effect on %s", settings.task)
    if settings.spec.takes is None:
        _, rows, columns = latent_grid(settings.height, settings.width)
        if (rows * 16, columns * 16) != (settings.height, settings.width):
            script.log.warning("size %d x %d is floored to %d x %d: sides are multiples of 16", settings.height,
                               settings.width, rows * 16, columns * 16)
        if rows * columns > _LARGEST_FRAME:
            script.log.warning("%d x %d is larger than anything that Lance was trained on (768 x 768, or as much in "
                               "another shape)", rows * 16, columns * 16)
    frames, _, _ = latent_grid(LATENT_STRIDE, LATENT_STRIDE, settings.num_frames)
    if 4 * frames - 3 != settings.num_frames:
        script.log.warning("%d frames are floored to %d: one more than a multiple of 4", settings.num_frames,
                           4 * frames - 3)
