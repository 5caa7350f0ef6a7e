"""lance-nano: a Lance small enough to train on a CPU and good enough to judge a quantizer by."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint" / "Lance_nano"
"""The trained model, in the official file layout; it is part of the wheel."""
