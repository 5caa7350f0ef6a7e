"""Checkpoint and resume of a conversion: finished layers are journalled, so that a killed job can go on.

OUT.work holds the output folder as far as it is written, `job.json`, the arguments that decide the result, and
`journal.jsonl`, one line per finished layer, written after its tensors are on the disk. A layer that was not finished
is done again, from the same state, so the result is that of an uninterrupted run.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lance_quant.errors import InputError
from lance_quant.storage.atomic import move_folder, parse_json, read_json, whole_file, write_json
from lance_quant.storage.schema import parse

_ANEW = "remove it to start anew"


class ResumeJob:
    """The work folder of one job; made, or found where an earlier run left it.

    Args:
        out: the folder that the job makes; the work folder lies beside it.
        job: plain values that may not change between the runs of a job.

    Attributes:
        folder: the output as far as it is written.
        layers: what was journalled, one entry per finished layer, in order.

    Raises:
        InputError: an earlier run had another job; the first difference is named.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]):
        self.root = out.with_name(f"{out.name}.work")
        self.folder = self.root / "out"
        job = json.loads(json.dumps(job, default=os.fspath))
        if self.root.exists():
            self._require_same(read_json(self.root / "job.json", "work folder"), job)
        else:
            self.folder.mkdir(parents=True)
            write_json(self.root / "job.json", job)
        self._journal = self.root / "journal.jsonl"
        self.layers = self._read()

    def _require_same(self, earlier: Any, job: Mapping[str, Any]) -> None:
        known = parse(dict[str, Any], earlier, f"{self.root / 'job.json'}", _ANEW)
        different = [key for key in {**job, **known} if known.get(key) != job.get(key)]
        if different:
            raise InputError(f"{self.root} belongs to a job with another {different[0]}: give the same arguments, or "
                             "remove it to start anew")

    def _read(self) -> list[dict[str, Any]]:
        if not self._journal.exists():
            return []
        lines = self._journal.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # a line that the kill cut short has no end
        self._journal.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
        return [parse(dict[str, Any], parse_json(line.encode(), str(self._journal)), str(self._journal), _ANEW)
                for line in whole]

    def state_file(self, layers: int) -> Path:
        """Where the state after so many layers is kept."""
        return self.root / f"state-{layers}.safetensors"

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Plain values that an earlier run made and stored under this name; made and stored now if none did."""
        path = self.root / f"{name}.json"
        if not path.exists():
            with whole_file(path) as partial:
                write_json(partial, make())
        return read_json(path, "work folder")

    def finish_layer(self, entry: Mapping[str, Any]) -> None:
        """Journal a layer whose tensors and state are on the disk, and drop the state before it."""
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.state_file(len(self.layers)).unlink(missing_ok=True)
        self.layers.append(dict(entry))

    def publish(self, out: Path) -> None:
        """Move the finished output to its place and remove the rest."""
        move_folder(self.folder, out)
        shutil.rmtree(self.root)
