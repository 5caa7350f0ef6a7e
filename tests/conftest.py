"""The golden checkpoint and recordings, loaded once."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import Collector, model_fingerprint
from lance_quant.cli import script
from lance_quant.cpu import compile_c, rounding
from lance_quant.formats import layout
from lance_quant.inference import memory_plan
from lance_quant.kernels import cpu, cpu_w4a8
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media import samples
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.tensor_file import Checkpoint

GOLDENS = Path(__file__).parent / "goldens"
CPU = torch.device("cpu")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which any test may do first
torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # nor do processes that tests start take the cores of other tests


# Of compile_c.LEVELS, those that this CPU can run.
LEVELS = list(compile_c.LEVELS)[:list(compile_c.LEVELS).index(compile_c.level()) + 1]


def at_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C functions as they are compiled for CPUs of this level."""
    monkeypatch.setattr(compile_c, "level", lambda: level)
    for module, source in ((rounding, rounding._SOURCE), (cpu, cpu._SOURCE), (cpu_w4a8, cpu_w4a8._SOURCE)):
        library, reason = _libraries(source, level)
        if library is not None:
            module._declare(library)
        monkeypatch.setattr(module, "_library_or_reason", functools.partial(tuple, (library, reason)))


@functools.cache
def _libraries(source: Path, level: str) -> tuple[object | None, str | None]:
    return compile_c.load(source)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative error by norm, in float64."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def recording(task: str, variant: str) -> SimpleNamespace:
    """One golden recording: `tensors`, `meta`."""
    return SimpleNamespace(tensors=load_file(GOLDENS / f"{task}.{variant}.safetensors"),
                           meta=json.loads((GOLDENS / f"{task}.{variant}.meta.json").read_text()))


@pytest.fixture
def ended(capsys) -> Callable[..., tuple[int, str]]:
    """Call a script's `main` as its file does (cli.script.run): exit code, and what it said on stderr.

    In this process: a new one would import torch and transformers again, 6 s of CPU.
    """
    def run(main: Callable[[list[str]], None], *flags: str) -> tuple[int, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                script.run(functools.partial(main, list(flags)))
        finally:
            signal.signal(signal.SIGTERM, before)
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session", autouse=True)
def plans_made_once():
    """What a request's activations take is counted once for equal models: it is half of a small run's time."""
    compute, known = memory_plan._activations, {}

    def remembered(files, *request):
        key = (files.config, repr(files.vit_sizes), files.vae_widths, files.is_packed, len(files.tokenizer), request)
        return known[key] if key in known else known.setdefault(key, compute(files, *request))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "_activations", remembered)
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def paths() -> LancePaths:
    return LancePaths.find(GOLDENS / "checkpoint" / "Lance_3B")


@pytest.fixture(scope="session")
def pipelines(paths) -> dict[str, Runtime]:
    """f32: exact rotary frequencies. f32r: rounded through bfloat16, as the official code runs."""
    return {"f32": Runtime.load(paths, CPU, torch.float32),
            "f32r": Runtime.load(paths, CPU, torch.float32, rotary_rounding=torch.bfloat16)}


@pytest.fixture(scope="session")
def pipeline(pipelines) -> Runtime:
    return pipelines["f32"]


@pytest.fixture(scope="session")
def t2i() -> dict[str, SimpleNamespace]:
    return {variant: recording("t2i", variant) for variant in ("f32", "f32r")}


@pytest.fixture(scope="session")
def x2t() -> dict[str, SimpleNamespace]:
    return {variant: recording("x2t_image", variant) for variant in ("f32", "f32r")}


@pytest.fixture(scope="session")
def prompts():
    return samples.load("t2i", GOLDENS / "inputs" / "t2i.json")


@pytest.fixture(scope="session")
def questions():
    return samples.load("x2t_image", GOLDENS / "inputs" / "x2t_image.json")


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], SimpleNamespace]:
    """Task -> its f32 recording with sample 0 of its sample file: `tensors`, `meta`, `sample`."""

    @functools.cache
    def of(task: str) -> SimpleNamespace:
        found = recording(task, "f32")
        found.sample = samples.load(task, GOLDENS / "inputs" / f"{task}.json")[0]
        return found

    return of


@pytest.fixture(scope="session")
def captured(tmp_path_factory, pipeline):
    """Two captures, and the statistics of the same runs."""
    from made_up_requests import LAYERS, REQUESTS, SRC, TASKS, answer, draw

    folder, model = tmp_path_factory.mktemp("capture"), pipeline.model
    with Checkpoint(SRC) as source:
        fingerprint = model_fingerprint(source)
    for task, request in zip(TASKS, (draw, answer), strict=True):
        with Collector(model, layout.linears(LAYERS)) as collector, \
                capture.recording(model, folder / f"{task}.safetensors", task, fingerprint) as begin:
            for seed in range(REQUESTS):
                begin(seed)
                request(model, seed)
        collector.stats(task, {"model": fingerprint}).save(folder / f"{task}.pt")
    return folder
