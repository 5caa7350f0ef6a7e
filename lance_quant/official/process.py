"""The child process that runs ByteDance's code: its interpreter, its environment, its command line and its answer.

The checkout is never edited and never imported here: it runs in a process of its own (child.py), so that its module
names (`data`, `common`, `config`, `modeling`), global state and pins stay out of this one.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lance_quant.errors import InputError
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.settings import Settings
from lance_quant.official.checkout import KNOWN_COMMIT, describe
from lance_quant.official.request import ENV_PYTHON, OfficialRequest

log = logging.getLogger("lance_quant")

_CHILD = Path(__file__).with_name("child.py")
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")  # how a traceback's last line begins


class Finished(NamedTuple):
    """A finished official run.

    made: what the official code wrote, NUMBER.png or .mp4, or prompt.json.
    records: per sample what went through the model (child.Recorder), where asked for.
    reply: device, dtype, versions, seconds, peak.
    """

    made: Path
    records: list[Path]
    reply: dict[str, Any]


def run(request: OfficialRequest, folder: Path, record: bool, kept: Path) -> Finished:
    """Run a task through the official code, in a child process.

    Args:
        folder: an existing, empty one.
        record: keep what goes through the model.
        kept: an existing folder for what is made, sample by sample; samples that an earlier run has finished there are
            taken from it.

    Raises:
        InputError: the child failed; names its interpreter, and its last line. All it wrote has gone to stderr.
    """
    python = _interpreter(request.python)
    if not describe(request.checkout)["tested"]:
        log.warning("%s is not the version this bridge was written for (commit %s)", request.checkout.path,
                    KNOWN_COMMIT[:7])
    made, records, reply = kept / "made", kept / "records", folder / "reply.json"
    records.mkdir(exist_ok=True)
    asked = {"source": str(request.checkout.path), "vae": str(request.paths.vae.resolve()), "dtype": request.dtype,
             "max_new_tokens": request.settings.max_new_tokens, "record": str(records) if record else None,
             "kept": str(kept), "reply": str(reply), "threads": torch.get_num_threads()}
    (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
    samples = _write_samples(request, folder)
    command = [python, "-B", str(_CHILD), *official_arguments(request.settings, request.paths, samples, made)]
    status, last = _follow(command, folder, _environment(request.device, folder / "request.json"))
    answer = json.loads(reply.read_text(encoding="utf-8")) if reply.is_file() else {}
    _require_success(request, python, status, last, answer)
    return Finished(made, sorted(records.iterdir()), answer)


def _require_success(request: OfficialRequest, python: str, status: int, last: str, answer: dict[str, Any]) -> None:
    if "cannot_import" in answer or last.startswith(("ModuleNotFoundError", "ImportError")):
        raise InputError(f"{request.checkout.path} cannot be imported by {python}: "
                         f"{answer.get('cannot_import', last)}. Install what it needs there "
                         f"(docs/official_source.md), or choose its Python with --official_python or {ENV_PYTHON}")
    if "refused" in answer:
        raise InputError(f"official run of {request.paths.model}: {answer['refused']}")
    if status:
        raise InputError(f"the official code, run by {python}, failed with exit status {status}: {last}; its whole "
                         "output is above")


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
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace") as child:
        assert child.stdout is not None
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


def official_arguments(settings: Settings, paths: LancePaths, asked: Path, made: Path) -> list[str]:
    """The command line of inference_lance.py, as inference_lance.sh spells it.

    Args:
        asked: the sample file. made: the folder of the results.
    """
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


def _write_samples(request: OfficialRequest, folder: Path) -> Path:
    """An official sample file with our samples, numbered.

    On several lines, since one line is taken for JSONL there; and with the visuals under numbers, since answers are
    filed by base name there and two questions about one picture would overwrite each other.
    """
    entries: dict[str, Any] = {}
    for number, sample in enumerate(request.samples):
        if sample.visual is None:
            entries[f"{number:06d}.png"] = sample.text
            continue
        visual = folder / f"{number:06d}{sample.visual.suffix}"
        shutil.copyfile(sample.visual, visual)
        entries[str(number)] = _entry(sample, str(request.settings.spec.takes), str(visual))
    path = folder / "samples.json"
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _entry(sample: Question | Prompt, modality: str, visual: str) -> dict[str, Any]:
    """A sample about a visual in the official format."""
    elements: list[tuple[str, Any, int]] = [(modality, visual, 0)]
    if isinstance(sample, Question):
        elements.append(("text", [sample.system, sample.question, sample.reference], 1))
    else:  # an edit is told the kind of its last element
        elements.insert(1 if sample.named == "text" else 0, ("text", sample.text, 0))
    kinds, values, targets = zip(*elements, strict=True)
    return {"interleave_array": values, "element_dtype_array": kinds, "istarget_in_interleave": targets}
