"""`make demo`: the whole pipeline on lance-nano, and the picture that the README shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import demo

ROOT = Path(__file__).parent.parent
SHOWN = Image.open(ROOT / "docs" / "images" / "side_by_side.png")


@pytest.mark.slow
def test_the_demo_ends_with_a_report_and_the_picture_of_the_readme(tmp_path, capsys):
    """With fewer samples and steps than by default: two columns instead of six."""
    out = tmp_path / "demo"
    demo.main(["--out", str(out), "--calibrate", "2", "--test", "2", "--steps", "2"])
    assert "INT4" in (out / "report.html").read_text(encoding="utf-8").upper()
    picture = Image.open(out / "side_by_side.png")
    assert (picture.size, picture.mode) == (demo.corner(3, 2), SHOWN.mode)
    assert SHOWN.size == demo.corner(3, demo.COLUMNS)
    printed = capsys.readouterr().out
    assert all(f"python {name}.py" in printed for name in ("awq_calibrate_single", "awq_apply", "run_quant_eval"))


def test_the_shown_pictures_are_drawn_and_4_bits_keep_them():
    """Row by row: no picture of a model is blank, and neither format is far from the float model, nor equal to it."""
    pixels = np.asarray(SHOWN.convert("RGB"), dtype=float)
    corners = [[demo.corner(row, column) for column in range(demo.COLUMNS)] for row in range(3)]
    cells = [[pixels[top:top + demo.SIZE, left:left + demo.SIZE] for left, top in row] for row in corners]
    baseline, *packed = cells
    assert all(cell.std() > 10 for row in cells for cell in row)
    for row in packed:
        differences = [np.abs(cell - float_cell).mean() for cell, float_cell in zip(row, baseline, strict=True)]
        assert 0.1 < np.mean(differences) < 12  # of 255
