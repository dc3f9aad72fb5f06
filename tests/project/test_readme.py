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


def patients(rows: int, seed: int) -> pd.DataFrame:
    """Records with the columns of the README's table; disease follows age and cholesterol."""
    rng = np.random.default_rng(seed)
    age, cholesterol = rng.uniform(20, 90, rows), rng.normal(220, 60, rows).clip(60, 590)
    risk = (age - 55) / 15 + (cholesterol - 220) / 60 + rng.normal(0, 0.5, rows)
    systolic = rng.normal(130, 20, rows).round(1)
    return pd.DataFrame(
        {
            "patient": [f"p{seed}-{i}" for i in range(rows)],
            "age": age.round(1),
            "systolic": np.where(rng.uniform(size=rows) < 0.1, np.nan, systolic),
            "cholesterol": cholesterol.round(1),
            "smoker": rng.choice(["yes", "no"], rows),
            "disease": np.where(risk > 0, "yes", "no"),
        }
    )


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    """A folder with the README's experiment and a file a clinic, with the README's columns."""
    [block] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    [header] = re.findall(r"```csv\n(.*?)\n", README)
    (tmp_path / "clinics.toml").write_text(block)
    (tmp_path / "clinics").mkdir()
    for seed, name in enumerate(("north", "middle", "south")):
        table = patients(250, seed)
        assert ",".join(table.columns) == header
        table.to_csv(tmp_path / "clinics" / f"{name}.csv", index=False)
    return tmp_path


def commands() -> list[list[str]]:
    """The commands of the README's first block on own data, but for the one of the shell."""
    section = README.split("## Your own data")[1]
    [block] = re.findall(r"as they stand -->\n```\n(.*?)```", section, re.DOTALL)
    lines = [line.split("#")[0].split() for line in block.splitlines()]
    assert lines[0] == [".", ".venv/bin/activate"]
    assert all(line[0] == "securefl" for line in lines[1:])
    return [line[1:] for line in lines[1:]]


def corrected(clinics: Path) -> None:
    """The draft as a person corrects it: with ranges that are publicly plausible."""
    path = clinics / "clinics.schema.toml"
    text = re.sub(r"^# seen:.*\n", "", path.read_text(), flags=re.MULTILINE)
    for name, known in (("age", [0, 110]), ("systolic", [30, 300]), ("cholesterol", [30, 800])):
        text, found = re.subn(
            rf"(\[columns\.{name}\][^\[]*range = )\[.*?\]", rf"\g<1>{known}", text
        )
        assert found == 1
    path.write_text(text)


def test_own_data_block_and_its_commands_run_as_written(clinics: Path) -> None:
    draft, check, train, predict = commands()
    securefl(*draft, cwd=clinics)
    corrected(clinics)
    assert "Nothing was written" in securefl(*check, cwd=clinics)
    told = json.loads(securefl(*train, "--format", "json", cwd=clinics))
    assert told["summary"]["private"] is True
    assert set(told["summary"]["sites"]) == {"north", "middle", "south"}
    assert max(told["summary"]["epsilon"].values()) <= 3.0
    low, high = told["summary"]["intervals"]["test_accuracy"]
    assert 0 <= low < high <= 1
    assert high > 0.7
    securefl(*predict, cwd=clinics)
    predicted = pd.read_csv(clinics / "predicted.csv")
    held = pd.read_csv(clinics / "clinics/south.csv")
    assert (predicted["prediction"] == held["disease"]).mean() > 0.7
    assert "my-clinics" in securefl("show", "runs/latest", cwd=clinics)
    securefl("report", "runs/latest", cwd=clinics)
    assert "my-clinics" in (clinics / "runs/latest/report.html").read_text()


def test_python_block_runs_as_written(clinics: Path) -> None:
    securefl(*commands()[0], cwd=clinics)
    corrected(clinics)
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=clinics, check=True, capture_output=True, text=True
    )
    assert "test_accuracy" in done.stdout
    assert "runs/" in done.stdout
