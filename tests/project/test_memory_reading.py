"""A million rows of fifty columns are read in the memory of their numbers and little more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS, COLUMNS = 1_000_000, 50

SCRIPT = """
import sys
from pathlib import Path
from securefl.data.reading import load
from securefl.schema import load as load_schema

frame = load(Path(sys.argv[1]), load_schema(sys.argv[2]))
status = Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(frame.rows, len(frame.numbers), frame.numbers["c7"][-1], peak)
"""


@pytest.mark.slow
def test_a_million_rows_of_fifty_columns_stay_below_900_mib(tmp_path: Path) -> None:
    """The numbers alone are 382 MiB; the whole process counts, its libraries among them."""
    table, schema = tmp_path / "table.csv", tmp_path / "schema.toml"
    names = [f"c{number}" for number in range(COLUMNS)]
    columns = "".join(f'{name} = {{type = "number", range = [-9, 9]}}\n' for name in names)
    schema.write_text(f'version = 1\nname = "large"\nlabel = "c0"\n[columns]\n{columns}')
    some = np.random.default_rng(1).uniform(-9, 9, (1000, COLUMNS)).tolist()
    block = "".join(",".join(map(repr, row)) + "\n" for row in some)
    with table.open("w") as file:
        file.write(",".join(names) + "\n")
        file.writelines(block for _ in range(ROWS // len(some)))
    command = [sys.executable, "-c", SCRIPT, str(table), str(schema)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    table.unlink()
    rows, numbers, last, peak = told.stdout.split()
    assert (int(rows), int(numbers), float(last)) == (ROWS, COLUMNS, some[-1][7])
    assert int(peak) < 900 * 1024
