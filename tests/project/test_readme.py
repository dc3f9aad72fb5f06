"""What the README tells a newcomer to do works as it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def securefl(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "securefl.cli", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def patients(rows: int) -> pd.DataFrame:
    """Records with the columns of the README's experiment; disease follows age and cholesterol."""
    rng = np.random.default_rng(0)
    age, cholesterol = rng.uniform(20, 90, rows), rng.normal(220, 60, rows).clip(60, 590)
    risk = (age - 55) / 15 + (cholesterol - 220) / 60 + rng.normal(0, 0.5, rows)
    return pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(rows)],
            "clinic": rng.choice(["north", "middle", "south"], rows),
            "age": age,
            "systolic": rng.normal(130, 20, rows),
            "cholesterol": cholesterol,
            "disease": np.where(risk > 0, "yes", "no"),
        }
    )


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    """A folder with the README's experiment and a table with its columns."""
    [block] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    [header] = re.findall(r"```csv\n(.*?)\n", README)
    (tmp_path / "clinics.toml").write_text(block)
    table = patients(600)
    assert ",".join(table.columns) == header
    table.to_csv(tmp_path / "patients.csv", index=False)
    return tmp_path


def test_own_table_block_and_its_commands_run_as_written(clinics: Path) -> None:
    told = json.loads(securefl("run", "clinics.toml", "--format", "json", cwd=clinics))
    assert told["summary"]["private"] is True
    assert set(told["summary"]["sites"]) == {"north", "middle", "south"}
    assert max(told["summary"]["epsilon"].values()) <= 3.0
    assert told["summary"]["metric"]["test_accuracy"] > 0.7
    assert "my-clinics" in securefl("show", "runs/latest", cwd=clinics)
    securefl("report", "runs/latest", cwd=clinics)
    assert "my-clinics" in (clinics / "runs/latest/report.html").read_text()


def test_python_block_runs_as_written(clinics: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=clinics, check=True, capture_output=True, text=True
    )
    assert "test_accuracy" in done.stdout
    assert "runs/" in done.stdout
