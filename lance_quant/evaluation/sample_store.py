"""Finished samples of a run, on the disk as they come, so that what is done survives whatever ends the run.

OUT.work holds `job.json` (what decides the results), the output folder as far as it is made, and per model of the run a
store: NUMBER.PART.safetensors and NUMBER.PART.json for what is known of a sample, each whole or not there. A run that
goes on takes finished samples from there, so its results are those of an uninterrupted one.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lance_quant.distributed import Team
from lance_quant.errors import InputError
from lance_quant.storage.atomic import parse_json
from lance_quant.storage.output_place import reserved
from lance_quant.storage.resume import ResumeJob
from lance_quant.storage.tensor_file import TensorFile, TensorFileWriter, write_tensors

log = logging.getLogger("lance_quant")


class SampleStore:
    """The samples of one model's run, by their number; `folder` is made."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int, part: str) -> bool:
        """Whether a part of a sample is finished."""
        return self._path(number, part, "safetensors").is_file() or self._path(number, part, "json").is_file()

    def put(self, number: int, part: str, value: Mapping[str, Tensor] | list[Any] | dict[str, Any]) -> None:
        """Keep tensors of any shape by name, or plain values; not both under one part."""
        tensors = isinstance(value, dict) and value and all(isinstance(one, Tensor) for one in value.values())
        path = self._path(number, part, "safetensors" if tensors else "json")
        partial = path.with_suffix(".partial")
        if tensors:
            write_tensors(partial, value)  # type: ignore[arg-type] # all are, as was looked at
        else:
            partial.write_text(json.dumps(value), encoding="utf-8")
        os.replace(partial, path)

    def values(self, number: int, part: str) -> Any:
        """Plain values of a part; infinities come back as they were put."""
        path = self._path(number, part, "json")
        return parse_json(path.read_bytes(), str(path))

    def tensors(self, number: int, part: str) -> dict[str, Tensor]:
        """Tensors of a part, by name, of the shapes that they had."""
        with TensorFile(self._path(number, part, "safetensors")) as file:
            return {name: file.read(name) for name in file.specs}

    def merge(self, path: Path, numbers: Iterable[int], part: str) -> None:
        """One safetensors file of the tensors of a part of all these samples, one tensor in memory at a time."""
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(TensorFile(self._path(number, part, "safetensors"))) for number in numbers]
            specs = {name: spec for file in files for name, spec in file.specs.items()}
            with TensorFileWriter(path, specs) as writer:
                for file in files:
                    for name in file.specs:
                        writer.write(name, file.read(name))

    def _path(self, number: int, part: str, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{part}.{suffix}"


class RunWork:
    """What a run of one or several models has finished.

    folder: the output as far as it is made. On all processes of a team but the leader it is a place of their own.
    """

    def __init__(self, folder: Path, stores: Path):
        self.folder, self._stores = folder, stores

    def store(self, name: str) -> SampleStore:
        """Of the model of this name; made where there is none."""
        return SampleStore(self._stores / name)

    def finished(self) -> int:
        """How many samples were finished, of all models."""
        return sum(1 for _ in self._stores.glob("*/*.done.json"))


@contextlib.contextmanager
def run_work(out: Path, job: Mapping[str, Any], resume: bool, team: Team) -> Iterator[RunWork]:
    """Where a run puts what it finishes; `out` appears when the block ends well.

    Otherwise what is finished stays in OUT.work, and one line says how to go on; where nothing is, nothing stays.

    Args:
        job: plain values that decide the results: an unfinished run of another job is not gone on with.
        resume: go on with an unfinished run, or begin one.

    Raises:
        InputError: `out` exists, cannot be made or is being made; an unfinished run is there, and is not to be resumed
            or is another one; --resume with several processes.
    """
    if not team.leads:
        with tempfile.TemporaryDirectory(prefix="lance-quant-") as folder:
            (Path(folder) / "out").mkdir()
            yield RunWork(Path(folder) / "out", Path(folder) / "samples")
        return
    with reserved(out):
        root = _unfinished(out, resume)
        kept = ResumeJob(out, job)
        work = RunWork(kept.folder, root / "samples")
        if before := work.finished():
            log.info("%s: going on behind %d finished samples", root, before)
        try:
            yield work
        except BaseException:
            if not work.finished():
                shutil.rmtree(root, ignore_errors=True)
            else:
                log.error("%d finished samples are kept in %s: the same command with --resume goes on with the rest",
                          work.finished(), root)
            raise
        kept.publish(out)


def require_resumable(out: Path, resume: bool, team: Team) -> None:
    """Raise InputError if `run_work` would refuse the place, before anything is loaded."""
    if resume and team.size > 1:
        raise InputError(f"--resume goes on in one process, and there are {team.size}: start without torchrun")
    if team.leads:
        _unfinished(out, resume)


def _unfinished(out: Path, resume: bool) -> Path:
    """Where an interrupted run to `out` has its samples; InputError if one is there that is not to be resumed."""
    root = out.with_name(f"{out.name}.work")
    if root.exists() and not resume:
        raise InputError(f"{root} holds an unfinished run: add --resume to go on with it, or remove it")
    return root


