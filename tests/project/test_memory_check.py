"""Checking a file of a million rows and fifty columns takes bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS, COLUMNS = 1_000_000, 50

SCRIPT = """
import json, sys
from pathlib import Path
from securefl import schema as schemas
from securefl.data.checking import check

columns = {f"c{i}": {"type": "number", "range": [-100, 100]} for i in range(int(sys.argv[2]))}
tree = {"version": 1, "name": "big", "label": "c0", "columns": columns}
found = check(Path(sys.argv[1]), schemas.Schema.model_validate(tree))
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
errors = [finding.text for finding in found.of("error")]
print(json.dumps({"rows": found.rows, "peak": peak, "errors": errors}))
"""


@pytest.mark.slow
def test_a_million_rows_of_fifty_columns_are_checked_in_a_gibibyte(
    tmp_path: Path,
) -> None:
    """The whole process counts, libraries included."""
    path = tmp_path / "big.csv"
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write((",".join(f"c{i}" for i in range(COLUMNS)) + "\n").encode())
        for _ in range(ROWS // 1000):
            np.savetxt(file, generator.normal(size=(1000, COLUMNS)), fmt="%.6g", delimiter=",")
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(COLUMNS)], check=True, capture_output=True
    )
    path.unlink()
    figures = json.loads(told.stdout)
    assert figures["rows"] == ROWS
    assert figures["errors"] == []
    assert figures["peak"] < 1 << 30
