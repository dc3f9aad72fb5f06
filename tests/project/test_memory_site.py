"""A site of a million rows and fifty columns takes part in a whole run in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS, COLUMNS, MOST = 1_000_000, 50, 3 << 29

SCRIPT = """
import json, sys
from pathlib import Path
from securefl import load, run

done = run(load(sys.argv[1]), Path(sys.argv[2]), report=False)
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
told = {"trained": done.summary.trained_on, "auc": done.summary.metric["test_auc"], "peak": peak}
print(json.dumps(told))
"""

EXPERIMENT = """
version = 1
name = "large"
rounds = 2

[data]
source = "table"
schema = "large.schema.toml"
path = "large-*.csv"

[sites]
partition = "file"

[preprocessing]
impute = "median"
clip_quantiles = [0.01, 0.99]
class_weights = "balanced"

[training]
local_steps = 50
batch_size = 128
"""


@pytest.mark.slow
def test_preprocessing_training_and_evaluation_of_a_million_rows_in_one_and_a_half_gibibytes(
    tmp_path: Path,
) -> None:
    """The whole process counts: torch, the other sites and the server are in it too."""
    names = [f"c{i}" for i in range(COLUMNS - 1)]
    told = "".join(f"{name} = {{type = 'number', range = [-9, 9]}}\n" for name in names)
    (tmp_path / "large.schema.toml").write_text(
        'version = 1\nname = "large"\nlabel = "y"\n[columns]\n'
        f"{told}y = {{type = 'category', categories = ['no', 'yes']}}\n"
    )
    (tmp_path / "large.toml").write_text(EXPERIMENT)
    header = (",".join([*names, "y"]) + "\n").encode()
    for site, rows in (("a", ROWS), ("b", 2000), ("c", 3000)):
        generator = np.random.default_rng(len(site) + rows)
        with (tmp_path / f"large-{site}.csv").open("wb") as file:
            file.write(header)
            for _ in range(rows // 1000):
                values = generator.normal(size=(1000, COLUMNS - 1)).clip(-9, 9)
                yes = values[:, 0] + generator.normal(size=1000) > 0
                lines = (",".join(f"{v:.4g}" for v in row) for row in values.tolist())
                pairs = zip(lines, np.where(yes, "yes", "no"), strict=True)
                file.writelines(f"{line},{word}\n".encode() for line, word in pairs)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "large.toml"), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True)
    for file in tmp_path.glob("large-*.csv"):
        file.unlink()
    figures = json.loads(done.stdout)
    assert 0.79 * ROWS < figures["trained"] < 0.82 * ROWS
    assert figures["auc"] > 0.7
    assert figures["peak"] < MOST, figures
