"""Run requests from the flags of the scripts that run the model; everything cheap is checked, before a load."""

import argparse
from collections.abc import Callable

from lance_quant.cli import script
from lance_quant.cli.task_arguments import settings_of
from lance_quant.distributed import Team
from lance_quant.errors import InputError
from lance_quant.formats import lora_file
from lance_quant.formats.packed_folder import is_packed
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.inference.request import ModelSource, RunRequest
from lance_quant.inference.tasks import load_samples, require_parts
from lance_quant.lance.config import LancePaths


def request_of(args: argparse.Namespace, team: Team) -> RunRequest:
    """The request that flags mean (add_model, add_task, add_stream and add_compile of task_arguments.py).

    Raises:
        InputError: a value is out of range, a file is missing or cannot be read.
    """
    settings, paths = settings_of(args), paths_of(args)
    samples = load_samples(args.example_json, settings, args.limit)
    return RunRequest(settings, samples, source_of(args, paths), vars(args), stream_of(args, team))


def paths_of(args: argparse.Namespace, decodes: bool = True) -> LancePaths:
    """The model's paths, with the parts that the task needs checked for; `decodes`: latents become pixels."""
    config = getattr(args, "config_path", None)
    if config is not None and not is_packed(args.model_path):
        raise InputError(f"--config_path is for packed weights, and {args.model_path} has none")
    folder = config or args.model_path
    if is_packed(folder) and not (folder / "llm_config.json").is_file():
        raise InputError(f"{folder} has packed weights alone, without llm_config.json and tokenizer: name a folder "
                         "that has them, --config_path downloads/Lance_3B (its float weights are not needed)")
    paths = LancePaths.find(folder, args.vit_path, args.vae_path)
    require_parts(args.task, paths, decodes)
    return paths


def source_of(args: argparse.Namespace, paths: LancePaths) -> ModelSource:
    """How the flags want a model loaded; scripts without --compile never compile."""
    device = device_of(args.device)
    return ModelSource(paths, device, dtype_of(args.dtype, device), args.offload, args.fix_quirks,
                       args.vae_tiling, getattr(args, "compile", False),
                       tuple(map(lora_file.parse, getattr(args, "lora", ()))))


def stream_of(args: argparse.Namespace, team: Team) -> Callable[[str], None] | None:
    """What --stream means: where answers go while they come, None for nowhere."""
    if args.stream and team.size > 1:
        raise InputError(f"--stream shows one answer after the other, and {team.size} processes give several at once: "
                         "leave it out, or start one process")
    return script.show if args.stream else None
