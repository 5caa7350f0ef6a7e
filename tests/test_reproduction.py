"""The commands of docs/reproduction.md, as they stand there, on a small model in the places that they name."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import GOLDENS

from lance_quant.formats.packed_folder import PackedFolder

PAGE = Path(__file__).parent.parent / "docs" / "reproduction.md"


def official_checkout(folder):
    """What a checkout of ByteDance's code has: sample files two folders down, which name pictures from the root."""
    cases, examples = folder / "assets/image-understanding/cases", folder / "config/examples"
    cases.mkdir(parents=True)
    examples.mkdir(parents=True)
    questions = json.loads((GOLDENS / "inputs/x2t_image.json").read_text())
    for entry in questions.values():
        picture = Path(entry["interleave_array"][0]).name
        shutil.copy(GOLDENS / "inputs" / picture, cases)
        entry["interleave_array"][0] = f"assets/image-understanding/cases/{picture}"
    first = dict(list(questions.items())[:1])
    (examples / "x2t_image_example.json").write_text(json.dumps(first))
    (examples / "t2i_example.json").write_text(json.dumps({"000000.png": "a paper boat"}))


@pytest.mark.slow
def test_the_chapter_runs_as_written(tmp_path, monkeypatch, capsys):
    work = tmp_path / "lance-quant"
    work.mkdir()
    official_checkout(tmp_path / "Lance")
    shutil.copytree(GOLDENS / "checkpoint", work / "downloads")
    monkeypatch.chdir(work)
    commands = re.findall(r"^python (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(commands) == 5
    for command in commands:
        script, *flags = shlex.split(command)
        importlib.import_module(script.removesuffix(".py")).main(flags)
    for name, form in (("Lance-3B-AWQ-INT4", "int4"), ("Lance-3B-NVFP4", "nvfp4")):
        with PackedFolder(work / name) as folder:
            assert folder.format == form and folder.meta["recipe"] == "published"
            assert sorted(folder.meta["tasks_calibrated"]) == ["t2i", "x2t_image"]
