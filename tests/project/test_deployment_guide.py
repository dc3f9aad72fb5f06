"""The guide to a deployment: its commands are there, and lead from nothing to a model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer.main

from securefl.cli import app

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITES = ("north", "middle", "south")


def commands(text: str) -> list[list[str]]:
    """Every command of securefl in a page's blocks, without the program's name."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("securefl ")]
    return [words[1:] for words in found]


WALK = commands(GUIDE.split("these blocks as they stand")[1].split("## Seeing")[0])


@pytest.mark.parametrize("words", [*commands(GUIDE), *commands(README)], ids=" ".join)
def test_every_command_is_one_with_the_options_it_has(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context("securefl", list(words))


def test_every_command_in_its_tables_exists() -> None:
    cells = re.findall(r"`securefl ([a-z ]+?)(?: [A-Z-].*?)?`", GUIDE)
    assert len(cells) > 10
    for told in cells:
        command: Any = typer.main.get_command(app)
        for word in told.split():
            assert word in command.commands, told
            command = command.commands[word]
            if not hasattr(command, "commands"):
                break


def test_readme_and_guide_say_the_same_commands() -> None:
    real = commands(README.split("## Real sites")[1].split("\n## ")[0])
    assert [words for words in real if words[0] != "status"] == [
        words for words in WALK if words[:2] != ["site", "proposals"]
    ]


class Walk:
    """A newcomer's folder and shell, and what was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        (folder / "clinics").mkdir()
        for seed, name in enumerate(SITES):
            rng = np.random.default_rng(seed)
            age = rng.uniform(20, 90, 250).round(1)
            ill = np.where(age + rng.normal(0, 10, 250) > 55, "yes", "no")
            table = pd.DataFrame({"age": age, "disease": ill})
            table.to_csv(folder / "clinics" / f"{name}.csv", index=False)
        (folder / "clinics.schema.toml").write_text(
            'version = 1\nname = "clinics"\nlabel = "disease"\n[columns.age]\ntype = "number"\n'
            'range = [0, 110]\n[columns.disease]\ntype = "category"\ncategories = ["no", "yes"]\n'
        )
        [block] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
        block = re.sub(r"^(path|drop|partition) = .*\n", "", block, flags=re.MULTILINE)
        (folder / "clinics.toml").write_text(block.replace("rounds = 40", "rounds = 3"))

    def _command(self, words: list[str]) -> dict[str, Any]:
        return {
            "args": [sys.executable, "-P", "-m", "securefl.cli", *words],
            "cwd": self.folder,
            "env": {**os.environ, "PYTHONPATH": str(ROOT)},
            "stdin": subprocess.DEVNULL,
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            **self._command(list(words)), capture_output=True, text=True, timeout=150, check=False
        )

    def start(self, *words: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.started.append(subprocess.Popen(**self._command(list(words)), **quiet))

    def wait(self, kit: str, told: str) -> None:
        for _ in range(60):
            if told in self.run("status", kit).stdout:
                return
            time.sleep(1)
        pytest.fail(f"{kit} never says {told!r}: {self.run('status', kit).stdout}")


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    made = Walk(tmp_path)
    yield made
    for process in made.started:
        process.terminate()
    for process in made.started:
        process.wait(30)


@pytest.mark.slow
def test_its_commands_lead_from_nothing_to_a_model(walk: Walk) -> None:
    """As they stand, but for the port, and what is said of north is done by every site."""
    pytest.importorskip("nvflare", reason="the extra flare is not installed")
    new, serve, init, doctor, start, submit, proposals, agree = WALK
    assert walk.run(*new).returncode == 0
    walk.start(*serve)
    walk.wait("trial/kits/server", "listens")

    def everywhere(words: list[str]) -> Iterator[list[str]]:
        for site in SITES:
            yield [word.replace("north", site) for word in words]

    for words in everywhere(init):
        assert walk.run(*words).returncode == 0
    for words in everywhere(doctor):
        done = walk.run(*words)
        assert done.returncode == 0, done.stdout
    for words in everywhere(start):
        walk.start(*words)
    walk.wait("trial/kits/administrator", "connected: middle, north, south")

    refused = walk.run(*submit)
    assert refused.returncode == 1
    told = [line for line in GUIDE.splitlines() if line.startswith("securefl: ")]
    assert "too few sites take part: a sum needs 3" in refused.stderr
    assert "north refuses by policy.consent" in refused.stderr
    assert told[-2] in refused.stderr
    assert "waits for a person to agree" in " ".join(walk.run(*proposals).stdout.split())
    for words in everywhere(agree):
        assert walk.run(*words, "--yes").returncode == 0

    done = walk.run(*submit)
    assert done.returncode == 0, done.stderr
    assert "finished, update 3 of 3" in done.stderr
    finished = max((walk.folder / "trial/kits/server/runs").iterdir())
    shown = walk.run("show", "--format", "json", str(finished)).stdout
    assert '"private": true' in shown
    assert "simulation" not in shown
    rows = walk.run("predict", str(finished), "clinics/south.csv", "--output", "predicted.csv")
    assert rows.returncode == 0, rows.stderr
    assert len(pd.read_csv(walk.folder / "predicted.csv")) == 250
    for kit in ("server", *SITES):
        assert walk.run("stop", f"trial/kits/{kit}").returncode == 0
