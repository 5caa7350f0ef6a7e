"""--help comes at once: nothing that takes seconds to import is imported before a command line was read."""

import subprocess
import sys
from pathlib import Path

import pytest

from lance_quant.lance.progress import progress

ROOT = Path(__file__).parent.parent
STARTED = [*(path.stem for path in sorted(ROOT.glob("[a-z]*.py")) if path.stem not in ("quantized_linear", "setup")),
           "lance_quant.official.__main__"]
SLOW = ("torch", "transformers", "diffusers", "numpy", "PIL", "av", "safetensors")
PROGRAM = """
import importlib, sys, time
started = time.process_time()
module = importlib.import_module(sys.argv[1])
try:
    module.parse_args(["--help"])
except SystemExit:
    print()
print(time.process_time() - started, *[name for name in sys.argv[2:] if name in sys.modules])
"""


@pytest.mark.parametrize("name", STARTED)
def test_help_imports_nothing_slow(name):
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, *SLOW], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    help_text, _, last = done.stdout.strip().rpartition("\n")
    seconds, *slow = last.split()
    assert "usage:" in help_text and slow == []
    assert float(seconds) < 0.5  # of one core's time; 0.1 on an EPYC core, where torch alone takes 4


def test_a_redirected_log_holds_no_bars(capfd):
    """Bars are drawn anew by carriage returns and escapes, which only a terminal understands."""
    for _ in progress(range(3), desc="outer"):
        with progress(total=2, desc="inner", leave=False) as bar:
            bar.update()
    assert capfd.readouterr() == ("", "")
