"""One command for all seven tasks: inference with a float or packed model, from a prompt to a file.

    lance-quant draw "a paper boat on a quiet lake" --model downloads/Lance_3B --packed Lance_3B-int4 --out boat.png
    lance-quant edit boat.png "make the boat red" --model downloads/Lance_3B
    lance-quant animate "the boat drifts to the right" --picture boat.png --model downloads/Lance_3B_Video
    lance-quant edit-video boat.mp4 "make the boat red" --model downloads/Lance_3B_Video
    lance-quant ask boat.png "What floats on the water?" --model downloads/Lance_3B
    lance-quant caption boat.png --model downloads/Lance_3B
    lance-quant download Lance_3B --format int4
    lance-quant plan --model Lance_3B-int4 --task t2i --memory 8GB
    lance-quant draw --example_json examples/samples/t2i.json --limit 4 --model Lance_3B-int4 --out boats

Reads   --model: a Lance folder, or a packed folder that holds configuration and tokenizer; without it the small Lance
        of the package is used, which knows shapes and digits at 112 x 112
Writes  draw and edit a PNG, with its settings inside; animate and edit-video an MP4; ask and caption print their
        answer, of many a JSON object a line; plan prints what memory a request needs, stage by stage
Needs   what docs/memory.md says of the task, the format and the size
Next    run_baseline.py and run_quant_eval.py, for many samples and for comparisons

It is a page over lance_quant.Pipeline. No torch is imported before the command line was read.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance_quant
from lance_nano import CHECKPOINT
from lance_quant.cli import download, plan, script
from lance_quant.cli.jobs import TELLERS, Job, jobs_of
from lance_quant.cli.task_arguments import add_lora
from lance_quant.errors import require_whole
from lance_quant.kernels.choices import KERNEL_CHOICES
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.progress import progress
from lance_quant.lance.settings import GREEDY, MAX_NEW_TOKENS, OFFLOADS, RESOLUTIONS, SEED, Sampling, Settings
from lance_quant.storage.atomic import whole_file
from lance_quant.storage.hub import HuggingFace

if TYPE_CHECKING:
    from PIL import Image

    from lance_quant.inference.pipeline import Clip, Pipeline, Progress
    from lance_quant.lance.config import LancePaths

_SMALL_SIDE, _SMALL_PRESET = 112, "image_112res"  # of lance-nano, whose hidden size is below every Lance's
_DRAWN = Sampling()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: one subcommand, its flags and those of loading a model."""
    parser = script.parser(__doc__)
    parser.add_argument("--version", action="version", version=f"lance-quant {lance_quant.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    draw = _command(commands, "draw", "draw pictures for a prompt")
    draw.add_argument("prompt", nargs="?", help="what is to be seen")
    _add_size(draw)
    edit = _command(commands, "edit", "change a picture as an instruction says")
    edit.add_argument("source", type=Path, nargs="?", metavar="picture", help="picture file")
    edit.add_argument("prompt", nargs="?", metavar="instruction", help="what to change")
    animate = _command(commands, "animate", "make a clip for a prompt, from a picture if one is given")
    animate.add_argument("prompt", nargs="?", help="what happens in the clip")
    animate.add_argument("--picture", dest="source", type=Path, help="the first frame; it decides the size")
    animate.add_argument("--num_frames", type=int, default=Settings.num_frames,
                         help="length, 12 a second; floored to one more than a multiple of 4")
    _add_size(animate)
    edit_video = _command(commands, "edit-video", "change a clip as an instruction says")
    edit_video.add_argument("source", type=Path, nargs="?", metavar="clip", help="clip file")
    edit_video.add_argument("prompt", nargs="?", metavar="instruction", help="what to change")
    for maker in (draw, edit, animate, edit_video):
        _add_making(maker)
    ask = _command(commands, "ask", "answer a question about a picture or clip")
    ask.add_argument("source", type=Path, nargs="?", metavar="file", help="picture or clip")
    ask.add_argument("prompt", nargs="?", metavar="question", help="the question")
    ask.add_argument("--temperature", type=float, default=GREEDY.temperature, help="0 takes the likeliest token")
    ask.add_argument("--seed", type=int, default=SEED, help="of the draws, at a temperature above 0")
    caption = _command(commands, "caption", "describe a picture or clip")
    caption.add_argument("source", type=Path, nargs="?", metavar="file", help="picture or clip")
    for teller in (ask, caption):
        teller.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer")
    for watcher in (edit, animate, edit_video, ask, caption):
        watcher.add_argument("--resolution", choices=RESOLUTIONS,
                             help="preset that a source is brought to; default: the task's, or 112 for the small Lance")
    got = commands.add_parser("download", help="fetch a model from the Hugging Face hub",
                              description="Fetch a model from the Hugging Face hub.", allow_abbrev=False)
    download.add(got)
    planned = commands.add_parser("plan", help="say what memory a request needs, and what to change where it does not "
                                               "fit", description="Peak memory by stage, from headers alone.",
                                  allow_abbrev=False)
    plan.add_request(planned)
    _add_load(planned)
    return parser.parse_args(argv)


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """A subcommand, with the flags that load a model."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.",
                                                        allow_abbrev=False)
    made.add_argument("--example_json", type=Path, help="many requests, in place of the one: a sample file "
                                                          "(docs/formats.md)")
    made.add_argument("--limit", type=int, help="take only this many of its samples")
    _add_load(made)
    add_lora(made)
    return made


def _add_load(to: argparse.ArgumentParser) -> None:
    """The flags that load a model."""
    load = to.add_argument_group("model")
    load.add_argument("--model", type=Path, help="Lance folder, or packed folder with configuration and tokenizer; "
                                                 "default: the small Lance of the package")
    load.add_argument("--packed", type=Path, help="packed folder whose weights are taken")
    load.add_argument("--vit_path", type=Path, help="ViT folder; default: in the model folder or beside it")
    load.add_argument("--vae_path", type=Path, help="VAE file; default: in the model folder or beside it")
    load.add_argument("--kernel", choices=KERNEL_CHOICES, default="auto", help="what computes packed linears "
                                                                                 "(docs/kernels.md)")
    load.add_argument("--mode", choices=["ondemand", "cached"], default="ondemand",
                      help="of packed linears: compute on the packed bytes, or unpack them once")
    load.add_argument("--offload", choices=OFFLOADS, default="none",
                      help="where ViT and VAE are while not in use; layers: the language model's layers stream from "
                           "host memory, too (docs/memory.md)")
    load.add_argument("--vae_tiling", action="store_true", help="decode large frames in tiles: less memory")
    load.add_argument("--fix_quirks", action="store_true", help="repair the official code's bugs (docs/runtime.md)")
    load.add_argument("--compile", action="store_true", help="compile the steps that recur")
    script.add_device(to)


def _add_size(to: argparse.ArgumentParser) -> None:
    to.add_argument("--height", type=int, help="pixels, floored to a multiple of 16; default 768, 112 for the small "
                                               "Lance")
    to.add_argument("--width", type=int, help="as --height")


def _add_making(to: argparse.ArgumentParser) -> None:
    to.add_argument("--out", type=Path, help="file to write; default: named by prompt and seed, in this folder. Of "
                                             "several, the seed is put before the ending. With --example_json: folder "
                                             "for files named by their samples")
    to.add_argument("--seed", type=int, default=SEED, help="of the noise")
    to.add_argument("--number", type=int, default=1, help="how many, with seeds that count up")
    to.add_argument("--num_timesteps", type=int, default=_DRAWN.num_timesteps, help="denoising steps")
    to.add_argument("--timestep_shift", type=float, default=_DRAWN.timestep_shift,
                    help="how far the schedule leans towards noise")
    to.add_argument("--cfg_scale", type=float, default=_DRAWN.cfg_scale,
                    help="guidance strength; 1 turns guidance off")
    to.add_argument("--solver", choices=["euler", "ab2"], default=_DRAWN.solver, help="see docs/runtime.md")
    to.add_argument("--reuse", type=float, default=_DRAWN.reuse, metavar="SPAN", help="see docs/runtime.md")


def main(argv: list[str] | None = None) -> None:
    """Check what was asked for, load the model, answer."""
    args = parse_args(argv)
    if args.command == "plan":
        script.result(_planned(args))
        return
    if args.command == "download":
        script.result(download.run(args, HuggingFace()))
        return
    if args.command in TELLERS:
        require_whole("max_new_tokens", args.max_new_tokens, 1)
        _tell(args)
        return
    sampling = {name: getattr(args, name) for name in ("num_timesteps", "timestep_shift", "cfg_scale", "solver",
                                                       "reuse")}
    Sampling(**sampling)  # refused before a model is loaded
    jobs = jobs_of(args)
    pipeline = _loaded(args, jobs[0])
    for job in jobs:
        for seed, path in job.outputs.items():
            made = _made(pipeline, args.command, job, vars(args), {"seed": seed, **sampling})
            _save(made, path, {"command": args.command, "prompt": job.prompt, "seed": seed, **sampling,
                               "model": str(args.packed or args.model or CHECKPOINT),
                               "lance_quant": lance_quant.__version__})
            script.result(path)


def _tell(args: argparse.Namespace) -> None:
    """Answer, or describe; of a sample file, an object of JSON for every sample."""
    jobs = jobs_of(args)
    pipeline = _loaded(args, jobs[0])
    for job in jobs:
        told = _told(pipeline, args.command, job, vars(args))
        if args.example_json is not None:
            told = json.dumps({"key": job.key, "file": str(job.source), "question": job.prompt, "answer": told},
                              ensure_ascii=False)
        script.result(told)


def _loaded(args: argparse.Namespace, first: Job) -> "Pipeline":
    """The model that the flags mean; what the first request will need is said before."""
    if args.model is None and args.packed is None:
        script.log.info("no --model: the small Lance of this package, which knows shapes and digits at 112 x 112")
    model = args.model or args.packed or CHECKPOINT
    script.log.info("%s", _fit_line(args, first))
    return lance_quant.Pipeline.load(
        model, packed=args.packed if args.model is not None else None, vit=args.vit_path, vae=args.vae_path,
        device=args.device, dtype=args.dtype, mode=args.mode, kernel=args.kernel, compile=args.compile,
        offload=args.offload, vae_tiling=args.vae_tiling, fix_quirks=args.fix_quirks, lora=args.lora)


def _fit_line(args: argparse.Namespace, job: Job) -> str:
    """What a request will need beside what is free."""
    from lance_quant.inference.device import device_of, dtype_of
    from lance_quant.inference.memory_plan import fit_line

    paths, packed = _located(args)
    device = device_of(args.device)
    place = plan.Place(str(device), device, dtype_of(args.dtype, device), None, 0)
    small = LanceConfig.load(paths.model / "llm_config.json").is_small
    return fit_line(paths, packed, plan.settings_of(vars(args) | {"task": job.task}, small),
                    plan.how_of(args, place), device)


def _located(args: argparse.Namespace) -> "tuple[LancePaths, Path | None]":
    """Where the model's parts lie."""
    from lance_quant.inference.pipeline import located

    return located(args.model or args.packed or CHECKPOINT, args.packed if args.model is not None else None,
                   args.vit_path, args.vae_path)


def _planned(args: argparse.Namespace) -> str:
    """What `plan` prints."""
    paths, packed = _located(args)
    return plan.table(args, paths, packed)


def _is_small(pipeline: "Pipeline") -> bool:
    return pipeline.runtime.model.config.is_small


def _preset(pipeline: "Pipeline", given: str | None) -> str:
    """The resolution preset to ask for; "" is the task's own."""
    return given or (_SMALL_PRESET if _is_small(pipeline) else "")


def _told(pipeline: "Pipeline", command: str, job: Job, given: dict[str, Any]) -> str:
    """The answer to a question, or the caption."""
    preset, length = _preset(pipeline, given["resolution"]), given["max_new_tokens"]
    source, clip = job.source, job.clip
    assert source is not None  # jobs_of
    with progress(total=length, desc="tokens", unit="token", leave=False) as bar:
        common = {"resolution": preset, "max_new_tokens": length, "on_step": _counter(bar)}
        if command == "caption":
            return pipeline.caption_video(source, **common) if clip else pipeline.caption(source, **common)
        common |= {"temperature": given["temperature"], "seed": given["seed"]}
        if job.system is not None:
            common["system"] = job.system
        return pipeline.ask_video(source, job.prompt, **common) if clip else pipeline.ask(source, job.prompt, **common)


def _made(pipeline: "Pipeline", command: str, job: Job, given: dict[str, Any],
          sampling: dict[str, Any]) -> "Image.Image | Clip":
    """The picture or clip of one seed."""
    named = f"{job.key} seed {sampling['seed']}".lstrip()
    with progress(total=sampling["num_timesteps"], desc=named, unit="step", leave=False) as bar:
        common = {**sampling, "on_step": _counter(bar)}
        if command == "draw":
            height, width = _size(pipeline, given)
            return pipeline.draw(job.prompt, height=height, width=width, **common)
        if command == "animate":
            common |= {"num_frames": given["num_frames"]}
            if job.source is None and not given["resolution"]:
                height, width = _size(pipeline, given)
                return pipeline.animate(None, job.prompt, height=height, width=width, **common)
            return pipeline.animate(job.source, job.prompt, height=given["height"], width=given["width"],
                                    resolution=_preset(pipeline, given["resolution"]), **common)
        edit: Callable[..., Any] = pipeline.edit if command == "edit" else pipeline.edit_video
        made: Image.Image | Clip = edit(job.source, job.prompt,
                                        resolution=_preset(pipeline, given["resolution"]), **common)
        return made


def _size(pipeline: "Pipeline", given: dict[str, Any]) -> tuple[int, int]:
    """Height and width to ask for."""
    height, width = (_SMALL_SIDE, _SMALL_SIDE) if _is_small(pipeline) else (Settings.height, Settings.width)
    return height if given["height"] is None else given["height"], width if given["width"] is None else given["width"]


def _counter(bar: Any) -> "Callable[[Progress], object]":
    return lambda _: bar.update()


def _save(made: "Image.Image | Clip", path: Path, settings: dict[str, Any]) -> None:
    """Write a picture with its settings as the PNG text `lance`, or a clip; whole or not at all."""
    if isinstance(made, list):
        made.save(path)
        return
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("lance", json.dumps(settings, ensure_ascii=False))
    with whole_file(path) as partial:
        made.save(partial, format="PNG", pnginfo=text)


def command(argv: Sequence[str] | None = None) -> None:
    """What the console script and `python -m lance_quant` start."""
    script.run(lambda: main(None if argv is None else list(argv)))
