"""Ten million parameters are encrypted and added in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.parametrize("side", ["site", "server"])
def test_peak_is_at_most_three_vectors_and_one_upload(side: str) -> None:
    """Everything above the idle process counts: the vector, the chunks, the message."""
    told = subprocess.run([sys.executable, str(SCRIPT), side], check=True, capture_output=True)
    figures = json.loads(told.stdout)
    assert figures["bound"] == 3 * figures["vector"] + figures["upload"]
    assert figures["vector"] < figures["peak"] <= figures["bound"]
