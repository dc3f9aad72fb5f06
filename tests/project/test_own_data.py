"""The guide for a site's data engineer: its files are read, and its commands are there and work."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer.main

from securefl import config, reference
from securefl.cli import app

GUIDE = (Path(__file__).parents[2] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("securefl")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the guide's files, and the schema that the reference has as its example."""
    for block in re.findall(r"```toml\n(.*?)```", GUIDE + reference.schema(), re.DOTALL):
        [name] = re.findall(r"\A# (\S+\.toml)\b", block)
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


def test_its_files_are_read_as_they_stand(folder: Path) -> None:
    experiment = config.load(folder / "clinics.toml")
    site = config.load_site(folder / "site.toml")
    assert experiment.data.agreed is not None
    assert experiment.data.agreed == site.data.agreed
    assert experiment.data.person_column == site.data.person
    assert experiment.privacy is not None
    assert experiment.privacy.epsilon <= site.maximum_epsilon


def test_every_command_and_option_in_it_exists() -> None:
    assert len(COMMANDS) == 4
    for _, *words in COMMANDS:
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def clinic(rows: int, seed: int) -> pd.DataFrame:
    """Made-up records with the columns of the schema; disease follows age and cholesterol."""
    rng = np.random.default_rng(seed)
    age, cholesterol = rng.integers(18, 100, rows), rng.integers(120, 320, rows)
    risk = (age - 59) / 15 + (cholesterol - 220) / 60 + rng.normal(0, 0.5, rows)
    return pd.DataFrame(
        {
            "patient": [f"p{seed}-{i}" for i in range(rows)],
            "split": rng.choice(["train", "test"], rows, p=[0.8, 0.2]),
            "age": age,
            "cholesterol": np.where(rng.uniform(size=rows) < 0.05, 0, cholesterol),
            "smoker": rng.choice(["no", "former", "yes", "NA"], rows),
            "pain": rng.integers(1, 5, rows),
            "disease": np.where(risk > 0, "yes", "no"),
        }
    )


@pytest.mark.slow
def test_its_commands_run_as_written(folder: Path) -> None:
    (folder / "clinics").mkdir()
    for seed, name in enumerate(("north", "south", "west")):
        clinic(300, seed).to_csv(folder / "clinics" / f"{name}.csv", index=False)
    clinic(300, 0).to_csv(folder / "north.csv", index=False)
    clinic(40, 9).drop(columns=["disease", "split"]).to_csv(folder / "new.csv", index=False)
    agreed = folder / "clinics.schema.toml"
    ours = agreed.read_text(encoding="utf-8")
    agreed.unlink()
    for command in COMMANDS:
        asked = [sys.executable, "-m", "securefl.cli", *command[1:]]
        subprocess.run(asked, cwd=folder, check=True, capture_output=True)
        agreed.write_text(ours, encoding="utf-8")  # once it is drafted, people correct it
    with (folder / "predicted.csv").open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 41)]
    truth = clinic(40, 9)["disease"]
    assert np.mean([row["prediction"] for row in rows] == truth) > 0.7
    for row in rows:
        shares = [float(value) for name, value in row.items() if name.startswith("probability")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
