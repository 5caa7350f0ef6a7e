"""ByteDance's own code as a witness: find a checkout, run a task through it, and compare it with this runtime.

    python -m lance_quant.official find
    python -m lance_quant.official compare --task t2i --model_path downloads/Lance_3B --example_json prompts.json

The checkout is never edited and never imported here: it runs in a child process (child.py), so that its
module names (`data`, `common`, `config`, `modeling`), global state and pins stay out of this one. Nothing else in the
project knows anything of it, and nothing needs it.

`compare` runs the official code first and records it; then the native runtime, from the noise and the condition
latents that the official run drew (they come from its global generator), and prints how far the two are apart.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lance_quant.errors import InputError
from lance_quant.inference.device import device_of

if TYPE_CHECKING:  # detection alone must stay light: other programs report it
    from torch import Tensor

    from lance_quant.inference.tasks import Settings
    from lance_quant.lance.config import LancePaths
    from lance_quant.lance.media.samples import Prompt, Question

log = logging.getLogger("lance_quant")

ENV_SOURCE, ENV_PYTHON = "LANCE_SRC_PATH", "LANCE_OFFICIAL_PYTHON"
MARKERS = ("inference_lance.py", "modeling/lance/lance.py")
NAMES = ("lance", "lance-main")  # folder names looked for, in any case: a clone and an unpacked download
REPOSITORY = "https://github.com/bytedance/Lance"
# sha256 of MARKERS at the commit that the child was written against.
KNOWN_COMMIT = "4baeee086648996f6ab12e673cbe461b0b149997"
KNOWN = ("7a0aab757e65a3b5e0b3fe4c8a8223db1f0fd6fc80ce743446a93530519079ed",
         "196dbb4b3bc8914f90f211ba7b1e8099804fb978c2c21196815f11f66efb418f")
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")  # how a traceback's last line begins
_CHILD = Path(__file__).with_name("child.py")
_HOME = Path(__file__).resolve().parent.parent.parent


class Looked(NamedTuple):
    """One place that was looked at: how it came up, and why it was rejected ("" if it is a checkout)."""

    via: str
    path: Path
    rejected: str


def look(explicit: Path | None = None, more: Iterable[tuple[str, Path]] = ()) -> Iterator[Looked]:
    """Every place in order, until one is a checkout: explicit, LANCE_SRC_PATH, this repository, `more`, working folder.

    A path that was given, by argument or environment, ends the search also where it is wrong.

    Args:
        more: (how to call it, folder) of a host program; folders inside it that are called like a checkout count.
    """
    given = ("--official_src", explicit) if explicit else (ENV_SOURCE, os.environ.get(ENV_SOURCE))
    if given[1]:
        path = Path(given[1]).expanduser()
        yield Looked(given[0], path, _rejected(path))
        return
    places = [("inside this repository", _inside(_HOME)), ("beside this repository", _inside(_HOME.parent)),
              *((via, _inside(folder)) for via, folder in more),
              ("working directory", [Path.cwd(), *_inside(Path.cwd())])]
    for via, paths in places:
        for path in paths:
            found = Looked(via, path, _rejected(path))
            yield found
            if not found.rejected:
                return


def _inside(folder: Path) -> list[Path]:
    """The folders in a folder that are called like a checkout; where one would be, if there is none."""
    try:
        named = sorted(path for path in folder.iterdir() if path.name.lower() in NAMES and path.is_dir())
    except OSError:  # gone, or not ours to read
        named = []
    return named or [folder / "Lance"]


def _rejected(path: Path) -> str:
    """Why a path is no checkout; "" if it is one."""
    if not path.is_dir():
        return "is a file" if path.exists() else "does not exist"
    missing = [name for name in MARKERS if not (path / name).is_file()]
    if not missing:
        return ""
    nearer = [inside for inside in _inside(path) if all((inside / name).is_file() for name in MARKERS)]
    return f"no {' and no '.join(missing)}" + (f"; did you mean {nearer[0]}?" if nearer else "")


def find(explicit: Path | None = None, more: Iterable[tuple[str, Path]] = ()) -> Looked:
    """The checkout to use.

    Raises:
        InputError: there is none, or a path that was given is none; lists the places and why each was rejected.
    """
    looked = list(look(explicit, more))
    last = looked[-1]
    if not last.rejected:
        return last._replace(path=last.path.resolve())
    if len(looked) == 1:
        raise InputError(f"{last.via} {last.path} is no checkout of {REPOSITORY}: {last.rejected}")
    places = "; ".join(f"{one.path} ({one.via}: {one.rejected})" for one in looked)
    raise InputError(f"official Lance source not found: say where a checkout of {REPOSITORY} lies with --official_src "
                     f"or {ENV_SOURCE}. Looked at {places}")


def describe(source: Looked) -> dict[str, Any]:
    """What run.json says of a checkout; `tested`: it is the commit that the child was written against."""
    digests = {name: hashlib.sha256((source.path / name).read_bytes()).hexdigest() for name in MARKERS}
    return {"path": str(source.path), "found": source.via, "sha256": digests,
            "tested": tuple(digests.values()) == KNOWN}


# Running it


class Run(NamedTuple):
    """A finished official run, in a temporary folder.

    made: what the official code wrote, NUMBER.png or .mp4, or prompt.json.
    records: per sample what went through the model (child.Recorder), where asked for.
    reply: device, dtype, versions, seconds, peak.
    """

    made: Path
    records: list[Path]
    reply: dict[str, Any]


def add_official(to: argparse.ArgumentParser) -> None:
    """--official_src, --official_python."""
    to.add_argument("--official_src", type=Path,
                    help=f"checkout of ByteDance's Lance; default: {ENV_SOURCE}, else inside or beside this "
                         "repository, else the working directory")
    to.add_argument("--official_python", type=Path,
                    help=f"Python that its requirements are installed for; default: {ENV_PYTHON}, else this one")


# Flags of ours without a counterpart there, and their values that change nothing.
_OURS_ONLY = {"fix_quirks": False, "solver": "euler", "temperature": 0.0, "top_p": 1.0, "stream": False,
              "compile": False, "offload": "none", "vae_tiling": False, "sequential_guidance": False}


def require_possible(args: argparse.Namespace, paths: "LancePaths") -> None:
    """Raise InputError if the official code has no such flag, or would not find its files."""
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
    weights = [paths.model / name for name in ("model.safetensors", "ema.safetensors")]
    if not any(path.is_file() for path in weights):
        raise InputError(f"{paths.model} has no model.safetensors, the one file that the official code reads")
    for path in (paths.vit / "config.json", paths.vit / "vit.safetensors", paths.vae):
        if not path.is_file():
            raise InputError(f"{path} not found: the official code loads ViT and VAE for every task; give their paths "
                             "with --vit_path and --vae_path")


def run(args: argparse.Namespace, source: Looked, settings: "Settings", samples: "Sequence[Question | Prompt]",
        paths: "LancePaths", folder: Path, record: bool) -> Run:
    """Run a task through the official code, in a child process, in an existing empty folder.

    Raises:
        InputError: the child failed; names its interpreter, and its last line. All it wrote has gone to stderr.
    """
    import torch

    python = _interpreter(args.official_python)
    if not describe(source)["tested"]:
        log.warning("%s is not the version this bridge was written for (commit %s)", source.path, KNOWN_COMMIT[:7])
    made, records, reply = folder / "made", folder / "records", folder / "reply.json"
    records.mkdir()
    request = {"source": str(source.path), "vae": str(paths.vae.resolve()), "dtype": args.dtype,
               "max_new_tokens": settings.max_new_tokens, "record": str(records) if record else None,
               "reply": str(reply), "threads": torch.get_num_threads()}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    asked = _write_samples(samples, settings, folder)
    command = [python, "-B", str(_CHILD), *official_arguments(settings, paths, asked, made)]
    status, last = _follow(command, folder, _environment(args.device, folder / "request.json"))
    answer = json.loads(reply.read_text(encoding="utf-8")) if reply.is_file() else {}
    if "cannot_import" in answer or last.startswith(("ModuleNotFoundError", "ImportError")):
        raise InputError(f"{source.path} cannot be imported by {python}: {answer.get('cannot_import', last)}. Install "
                         f"what it needs there (README, The official source), or choose its Python with "
                         f"--official_python or {ENV_PYTHON}")
    if "refused" in answer:
        raise InputError(f"official run of {paths.model}: {answer['refused']}")
    if status:
        raise InputError(f"the official code, run by {python}, failed with exit status {status}: {last}; its whole "
                         "output is above")
    return Run(made, sorted(records.iterdir()), answer)


def _interpreter(explicit: Path | None) -> str:
    """The child's Python: as given, or this one. Not resolved, since a venv's is a link that must stay one."""
    named = str(explicit or os.environ.get(ENV_PYTHON) or sys.executable)
    found = shutil.which(os.path.expanduser(named))
    if found is None:
        raise InputError(f"{named} is no program: give a Python with --official_python or {ENV_PYTHON}")
    return os.path.abspath(found)


def _follow(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run the child with its output on our stderr: exit status, and the last line, of an exception if there is one."""
    last = ""
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace") as child:
        try:
            for line in child.stdout:
                sys.stderr.write(line)
                if not _EXCEPTION.match(last) or _EXCEPTION.match(line):
                    last = line.strip() or last
        except BaseException:  # interrupted: the child must not outlive its folder
            child.kill()
            raise
    return child.returncode, last


def _environment(device: str, request: Path) -> dict[str, str]:
    """The child's environment: one process, and the GPU of the --device flag alone, or none."""
    distributed = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in distributed}
    environment |= {"LANCE_OFFICIAL_REQUEST": str(request), "PYTHONIOENCODING": "utf-8"}
    kind, _, index = device.partition(":")
    if kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(index)] if visible else index
    return environment


def official_arguments(settings: "Settings", paths: "LancePaths", asked: Path, made: Path) -> list[str]:
    """The command line of inference_lance.py, as inference_lance.sh spells it."""
    sampling = settings.sampling
    values = {
        "model_path": paths.model.resolve(), "vit_path": paths.vit.resolve(), "vit_type": "qwen_2_5_vl_original",
        "llm_qk_norm": True, "llm_qk_norm_und": True, "llm_qk_norm_gen": True, "tie_word_embeddings": False,
        "copy_init_moe": True, "max_num_frames": 121, "max_latent_size": 64, "latent_patch_size": (1, 1, 1),
        "visual_und": True, "visual_gen": True, "vae_model_type": "wan", "apply_qwen_2_5_vl_pos_emb": True,
        "apply_chat_template": False, "cfg_type": 0, "text_template": True, "use_KVcache": True,
        "enhance_prompt": False, "task": settings.task, "resolution": settings.resolution,
        "validation_num_timesteps": sampling.num_timesteps, "validation_timestep_shift": sampling.timestep_shift,
        "validation_data_seed": settings.seed, "cfg_text_scale": sampling.cfg_scale,
        "cfg_interval": (sampling.cfg_low, sampling.cfg_high), "cfg_renorm_type": sampling.cfg_renorm,
        "video_height": settings.height, "video_width": settings.width, "num_frames": settings.num_frames,
        "val_dataset_config_file": asked, "save_path_gen": made,
    }
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def _write_samples(samples: "Sequence[Question | Prompt]", settings: "Settings", folder: Path) -> Path:
    """An official sample file with our samples, numbered.

    On several lines, since one line is taken for JSONL there; and with the visuals under numbers, since answers are
    filed by base name there and two questions about one picture would overwrite each other.
    """
    entries: dict[str, Any] = {}
    for number, sample in enumerate(samples):
        if settings.spec.takes is None:
            entries[f"{number:06d}.png"] = sample.text
            continue
        visual = folder / f"{number:06d}{sample.visual.suffix}"
        shutil.copyfile(sample.visual, visual)
        elements = [(settings.spec.takes, str(visual), 0)]
        if settings.spec.makes == "text":
            elements.append(("text", [sample.system, sample.question, sample.reference], 1))
        else:  # an edit is told the kind of its last element
            elements.insert(1 if sample.named == "text" else 0, ("text", sample.text, 0))
        kinds, values, targets = zip(*elements, strict=True)
        entries[str(number)] = {"interleave_array": values, "element_dtype_array": kinds,
                                "istarget_in_interleave": targets}
    path = folder / "samples.json"
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def run_task(args: argparse.Namespace, source: Looked, settings: "Settings",
             samples: "Sequence[Question | Prompt]", paths: "LancePaths", model: dict[str, Any], folder: Path) -> None:
    """Run a task over its samples and write the results folder, as run_folder.run_task does natively.

    Args:
        model: what run.json says of the weights.
        folder: an existing, empty one.
    """
    from lance_quant.evaluation import run_folder
    from lance_quant.storage.atomic import write_json

    with tempfile.TemporaryDirectory(prefix="lance_official_") as scratch:
        done = run(args, source, settings, samples, paths, Path(scratch), args.save_latents)
        if settings.spec.makes == "text":
            _write_answers(done, samples, folder)
        else:
            for number, prompt in enumerate(samples):
                written = next(done.made.glob(f"{number:06d}.*"))  # one frame is a .png there, also of a clip
                shutil.copyfile(written, (folder / prompt.key).with_suffix(written.suffix))
            write_json(folder / "prompt.json", {run_folder.made(one, settings): one.text for one in samples})
        if args.save_latents:
            name = run_folder.LOGITS if settings.spec.makes == "text" else run_folder.LATENTS
            run_folder.save_traces(folder / name, _traces(done, samples, paths))
        write_json(folder / "run.json", _run_json(args, source, settings, samples, model, done.reply))


def _write_answers(done: Run, samples: "Sequence[Question]", folder: Path) -> None:
    from lance_quant.evaluation import run_folder
    from lance_quant.inference.tasks import Answered
    from lance_quant.lance.runtime import Answer

    raw = json.loads((done.made / "prompt.json").read_text(encoding="utf-8"))
    run_folder.write_answers([Answered(one, Answer([], raw[f"{number:06d}{one.visual.suffix}"]))
                           for number, one in enumerate(samples)], folder)


def _traces(done: Run, samples: "Sequence[Question | Prompt]", paths: "LancePaths") -> "Iterator[dict[str, Tensor]]":
    """What --save_latents keeps, as the native run names it."""
    from safetensors.torch import load_file

    from lance_quant.lance.tokens import LanceTokenizer

    size = len(LanceTokenizer(paths.model))
    for path, sample in zip(done.records, samples, strict=True):
        found = load_file(path)
        if "ids" in found:
            found["logprobs"] = found["logits"][:, :size].log_softmax(-1)
        names = ("ids", "logprobs") if "ids" in found else ("latent", "x", "velocity", "t")
        yield {f"{sample.key}.{name}": found[name] for name in names}


def _run_json(args: argparse.Namespace, source: Looked, settings: "Settings",
              samples: "Sequence[Question | Prompt]", model: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json, with the native run's keys as far as they apply, and `backend` and `source`."""
    import torch

    from lance_quant.evaluation import run_folder

    return {"format": run_folder.FORMAT, "backend": "official", "source": describe(source),
            "settings": settings.as_json(),
            "samples": [run_folder.describe(sample) for sample in samples], "model": model,
            "device": reply["device"] or run_folder.device_name(torch.device("cpu")), "dtype": reply["dtype"],
            "seconds": {name: round(value, 3) for name, value in reply["seconds"].items()},
            "peak_memory_bytes": reply["peak"], "versions": reply["versions"], "arguments": vars(args)}


# Comparing


def compare(args: argparse.Namespace, source: Looked, settings: "Settings", samples: "Sequence[Question | Prompt]",
            paths: "LancePaths") -> dict[str, Any]:
    """Run both backends on the same samples: dtype, versions, and per sample what differs by how much."""
    import torch
    from safetensors.torch import load_file


    with tempfile.TemporaryDirectory(prefix="lance_official_") as scratch:
        done = run(args, source, settings, samples, paths, Path(scratch), record=True)
        dtype = getattr(torch, done.reply["dtype"])
        pipeline = _fed_pipeline(paths, device_of(args.device), dtype)
        measure = _compare_answer if settings.spec.makes == "text" else _compare_drawn
        found = {one.key: measure(pipeline, one, settings, load_file(record))
                 for one, record in zip(samples, done.records, strict=True)}
    return {"task": settings.task, "dtype": done.reply["dtype"], "source": describe(source),
            "official": {"device": done.reply["device"] or "cpu", "versions": done.reply["versions"]},
            "native": {"device": str(device_of(args.device)), "torch": str(torch.__version__)}, "samples": found}


def _fed_pipeline(paths: "LancePaths", device: Any, dtype: Any) -> Any:
    """A native pipeline that is given condition latents, and keeps what its ViT and VAE made of the source."""
    from lance_quant.lance.media import vision
    from lance_quant.lance.runtime import Runtime

    class Fed(Runtime):
        fed: "Tensor"  # [t, h, w, 48], the next answer of `encode`
        tokens: "Tensor"  # [n, hidden], from `look`
        mean: "Tensor"  # [48, t, h, w], that `encode` would have drawn around

        def look(self, frames: Any, resolution: str) -> Any:
            self.tokens, grid = super().look(frames, resolution)
            return self.tokens, grid

        def encode(self, frames: Any, resolution: str) -> "Tensor":
            pixels = vision.unit_range(vision.vae_pixels(frames, resolution, self._crops()))
            with self.using("vae") as vae:
                self.mean = vae.encode(pixels).mean.permute(3, 0, 1, 2)
            return self.fed

    return Fed.load(paths, device, dtype)


def _compare_answer(pipeline: Any, question: "Question", settings: "Settings",
                    official: "dict[str, Tensor]") -> dict[str, Any]:
    """Tokens as both choose them, and log-probabilities in front of each official token."""
    from lance_quant.evaluation.metrics import relative_error

    packed, tokens = pipeline.ask(question, settings.resolution)
    answer = pipeline.answer(packed, tokens, settings.max_new_tokens)
    theirs = official["ids"].tolist()
    forced = pipeline.forced_logprobs(packed, tokens, theirs).cpu()
    expected = official["logits"][:, :forced.shape[1]].log_softmax(-1)
    same = [a == b for a, b in zip(answer.ids, theirs, strict=False)]
    found = {"vit": relative_error(tokens.float().cpu(), official["vit"]),
             "logprobs": (forced - expected).abs().max().item(), "tokens": len(theirs),
             "tokens_native": len(answer.ids), "tokens_equal": answer.ids == theirs}
    return found if answer.ids == theirs else found | {"first_difference": [*same, False].index(False)}


def _compare_drawn(pipeline: Any, prompt: "Prompt", settings: "Settings",
                   official: "dict[str, Tensor]") -> dict[str, Any]:
    """Everything from the source's features to pixels; the native run gets the official x_T and condition latents."""
    import numpy as np
    import torch

    from lance_quant.evaluation.metrics import relative_error, step_errors
    from lance_quant.inference.tasks import denoiser_of
    from lance_quant.lance import generation

    steps: list[generation.Step] = []
    dtype = pipeline.model.dtype
    pipeline.fed = official.get("condition", official.get("first"))
    denoiser = denoiser_of(pipeline, prompt, settings)
    found = {"noise": relative_error(denoiser.noise(settings.seed).float(), official["x"][0])}
    latent = generation.sample(denoiser, official["x"][0].to(dtype), steps.append).float().cpu()
    if "vit" in official:
        found["vit"] = relative_error(pipeline.tokens.float().cpu(), official["vit"])
    if "mean" in official:
        found["condition_mean"] = relative_error(pipeline.mean.float().cpu(), official["mean"])
    velocities = torch.stack([step.velocity.float().cpu() for step in steps])
    errors = step_errors(velocities, official["velocity"])
    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in pipeline.decode_frames(latent.to(dtype))])
    levels = (torch.from_numpy(frames).int() - official["pixels"].int()).abs()
    return found | {"velocity_first": errors[0], "velocity_worst": max(errors),
                    "latent": relative_error(latent, official["latent"]), "pixels_max": levels.max().item(),
                    "pixels_mean": levels.double().mean().item()}


_MEANING = {
    "noise": "own x_T from the seed, relative", "vit": "ViT tokens, relative",
    "condition_mean": "source's latent mean, relative", "velocity_first": "velocity of the first step, relative",
    "velocity_worst": "velocity of the worst step, relative", "latent": "final latents, relative",
    "pixels_max": "pixels, largest difference of 255", "pixels_mean": "pixels, mean difference of 255",
    "logprobs": "log-probabilities, largest difference", "tokens": "official tokens",
    "tokens_native": "native tokens", "tokens_equal": "same tokens", "first_difference": "first other token at",
}


def table(found: dict[str, Any]) -> str:
    """What `compare` found, for a person: a row per sample and quantity."""
    rows = [(key, _MEANING[name], f"{value:.2e}" if isinstance(value, float) else str(value))
            for key, values in found["samples"].items() for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:<{widths[0]}}  {name:<{widths[1]}}  {value}" for key, name, value in rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    from lance_quant.cli import script, task_arguments

    parser = script.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    finder = commands.add_parser("find", help="say where the official source was looked for, and found",
                                 allow_abbrev=False)
    add_official(finder)
    comparer = commands.add_parser("compare", help="run both on one sample file, and measure the differences",
                                   allow_abbrev=False)
    task_arguments.add_model(comparer)
    task_arguments.add_task(comparer)
    add_official(comparer)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Find, or compare; results on stdout."""
    args = parse_args(argv)
    if args.command == "find":
        source = find(args.official_src)
        rejected = [f"{one.path} ({one.via}): {one.rejected}\n" for one in look(args.official_src) if one.rejected]
        sys.stdout.write("".join(rejected) + f"{source.path} ({source.via})\n")
        return
    from lance_quant.cli import task_arguments
    from lance_quant.inference.tasks import load_samples

    settings, paths = task_arguments.settings_of(args), task_arguments.paths_of(args)
    samples = load_samples(args.example_json, settings, args.limit)
    require_possible(args, paths)
    found = compare(args, find(args.official_src), settings, samples, paths)
    sys.stdout.write(f"{table(found)}\n{json.dumps(found)}\n")
