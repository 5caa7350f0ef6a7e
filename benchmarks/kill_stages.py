#!/usr/bin/env python3
"""Crash test: every stage that writes is killed (SIGKILL) at random moments, and then run again, on lance-nano.

    python -m benchmarks.kill_stages --kills 100

Reads   lance_nano/checkpoint, lance_nano/lora
Writes  nothing that stays; prints a table, and as the last line on stdout JSON: per stage the kills, how often the
        stage had begun to write (`begun`), the output was already there (`published`) or in part finished beside it
        (`resumed`), files under their final names that were not whole (`half`), and runs that ended otherwise than an
        undisturbed one (`unequal`); exit code 1 if either is not 0
Needs   2 GB; 20 minutes for 100 kills on one CPU core

A stage is first run twice undisturbed: a file that is the same in both is compared byte for byte, and the others, which
say how long something took, by their presence. The moment of a kill is drawn from the time that such a run took.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import Died
from lance_nano import CHECKPOINT
from lance_quant.cli import script

LORA = CHECKPOINT.parents[1] / "lora" / "ring_und.safetensors"
# Imported once, in the process that all runs are forked from: a kill shall come while a stage works.
_PRELOADED = ["torch", "transformers", "lance_quant.evaluation.evaluate", "lance_quant.inference.calibrate",
              "lance_quant.inference.pipeline", "lance_quant.methods.convert"]


@dataclass(frozen=True)
class Stage:
    """A script with its flags; `outputs` are its flags with the names that it makes in a folder of the test's."""

    module: str
    flags: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]

    def command(self, out: Path) -> list[str]:
        """The whole command line."""
        return [*self.flags, *(word for flag, name in self.outputs for word in (flag, str(out / name)))]


@dataclass
class Count:
    """What became of the kills of a stage."""

    kills: int = 0
    begun: int = 0
    published: int = 0
    resumed: int = 0
    half: int = 0
    unequal: int = 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills, of all stages in turn")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which ones")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def stages(work: Path) -> dict[str, Stage]:
    """All stages, by name, with what they read in `work` (made by `prepare`)."""
    model = ("--model_path", str(CHECKPOINT), "--device", "cpu", "--resolution", "image_112res", "--num_timesteps", "4",
             "--video_height", "112", "--video_width", "112", "--max_new_tokens", "4")
    draw, ask = (("--task", task, *model, "--example_json", str(work / f"samples/test_{task}.json"), "--limit", "4")
                 for task in ("t2i", "x2t_image"))
    packed = ("--src", str(CHECKPOINT), "--stats", str(work / "all.pt"), "--device", "cpu", "--resume")
    return {
        "calibrate": Stage("awq_calibrate_single", ask, (("--out", "s.pt"), ("--capture", "c.safetensors"))),
        "merge": Stage("awq_merge_stats", ("--inputs", str(work / "t2i.pt"), str(work / "x2t_image.pt")),
                       (("--out", "all.pt"),)),
        "int4": Stage("awq_apply", packed, (("--out", "int4"),)),
        "nvfp4": Stage("nvfp4_apply", (*packed, "--slim"), (("--out", "nvfp4"),)),
        "baseline": Stage("run_baseline", (*draw, "--save_latents", "--resume"), (("--save_path_gen", "baseline"),)),
        "eval": Stage("run_quant_eval", (*draw, "--awq_dir", str(work / "int4"), "--resume"),
                      (("--save_path_gen", "eval"),)),
        "merge_lora": Stage("merge_lora", ("--src", str(CHECKPOINT), "--lora", str(LORA)), (("--out", "merged"),)),
        "export_vllm": Stage("export_vllm", ("--src", str(work / "int4"), "--model_path", str(CHECKPOINT), "--parts",
                                             "copy"), (("--out", "vllm"),)),
    }


STAGES = tuple(stages(Path()))


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, counts = random.Random(args.seed), {name: Count() for name in args.stages}
    with tempfile.TemporaryDirectory(prefix="lance_kills_") as folder:
        work = Path(folder)
        prepare(work)
        tests = {name: Test(work / name, stage) for name, stage in stages(work).items() if name in counts}
        for kill in range(args.kills):
            name = args.stages[kill % len(args.stages)]
            tests[name].kill_once(draw.random(), counts[name])
            print(f"{kill + 1}: {name} {counts[name]}", file=sys.stderr)
    print("| stage | kills | begun | published | resumed | half | unequal |\n|---|---|---|---|---|---|---|")
    for name, count in counts.items():
        print("|", " | ".join(map(str, [name, *asdict(count).values()])), "|")
    print(json.dumps({name: asdict(count) for name, count in counts.items()}))
    if any(count.half or count.unequal for count in counts.values()):
        raise SystemExit(1)


def prepare(work: Path) -> None:
    """Samples, statistics and a packed folder, which stages read."""
    made = stages(work)
    to_end("lance_nano.samples", ["--out", str(work / "samples"), "--n", "4"])
    for task in ("t2i", "x2t_image"):
        flags = [word.replace("x2t_image", task) for word in made["calibrate"].flags]
        to_end("awq_calibrate_single", [*flags, "--out", str(work / f"{task}.pt")])
    to_end("awq_merge_stats", made["merge"].command(work))
    to_end("awq_apply", made["int4"].command(work))


class Test:
    """The kills of one stage; two undisturbed runs say what it makes and how long it takes.

    Args:
        folder: made, with one folder for every run that is looked at.
    """

    def __init__(self, folder: Path, stage: Stage):
        self._folder, self._stage = folder, stage
        first, second = folder / "first", folder / "second"
        for whole in (first, second):
            whole.mkdir(parents=True)
            start = time.perf_counter()
            to_end(stage.module, stage.command(whole))
            self._seconds = time.perf_counter() - start
        one, other = contents(first), contents(second)
        assert one.keys() == other.keys()
        self._wanted = {name: data if data == other[name] else None for name, data in one.items()}
        assert any(self._wanted.values())

    def kill_once(self, moment: float, count: Count) -> None:
        """Kill a run after this share of its time (a run that was faster is repeated), look, and run it again."""
        out = self._folder / "out"
        while not self._killed(out, moment * self._seconds):
            moment *= 0.9
        count.kills += 1
        count.begun += any(out.iterdir())
        there = [name for _, name in self._stage.outputs if (out / name).exists()]
        left = self._of(contents(out), there)
        count.half += left != self._of(self._wanted, there)
        if len(there) == len(self._stage.outputs):
            count.published += 1
        else:
            for name in there:  # one of two; the script says that it is there, and the user removes it
                (out / name).unlink()
            count.resumed += any(out.glob("*.work"))
            to_end(self._stage.module, self._stage.command(out))
        count.unequal += self._of(contents(out), [name for _, name in self._stage.outputs]) != self._wanted
        shutil.rmtree(out)

    def _killed(self, out: Path, seconds: float) -> bool:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        process = started(self._stage.module, self._stage.command(out))
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode != 0

    def _of(self, found: dict[str, bytes | None], outputs: list[str]) -> dict[str, bytes | None]:
        """The part of `found` in these outputs; files that say times, by name alone."""
        return {name: data if self._wanted.get(name, b"") is not None else None for name, data in found.items()
                if name.split("/")[0] in outputs}


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files, by their paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(module: str, flags: list[str]) -> multiprocessing.process.BaseProcess:
    """A script's main in a process of its own, its words in the folder's log."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)  # its types have no Process
    context.set_forkserver_preload(_PRELOADED)
    process: multiprocessing.process.BaseProcess = context.Process(target=_run, args=(module, flags))
    process.start()
    return process


def to_end(module: str, flags: list[str]) -> None:
    """Run a script undisturbed; Died with its command line if it failed."""
    process = started(module, flags)
    process.join()
    if process.exitcode:
        raise Died(f"{module} {' '.join(flags)}: exit code {process.exitcode}")


def _run(module: str, flags: list[str]) -> None:
    run: Callable[[list[str]], None] = importlib.import_module(module).main
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # stdout is the benchmark's result; a failure's traceback is seen
        run(flags)


if __name__ == "__main__":
    script.run(main)
