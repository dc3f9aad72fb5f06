"""`securefl status` says what is so, and ends with a status that a service manager can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from securefl import cli, config
from securefl.config import ConfigurationError
from securefl.deployment.authority import Consortium
from securefl.deployment.progress import RUNS, RunProgress, write_progress
from securefl.deployment_cli import _reasons

REFUSED = (
    "too few sites take part: a sum needs 2: a refuses by policy.consent: proposed is x; permitted "
    "is y; b refuses by data.schema: proposed is x; permitted is z"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kits of a consortium, which no test changes: keys of RSA-3072 take a while to make."""
    folder = tmp_path_factory.mktemp("made") / "trial"
    return Consortium.new(folder, "localhost:8002", ["a", "b"]).kit("a").parent


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    """A copy of them for one test."""
    return Path(shutil.copytree(made, tmp_path / "kits"))


def status(kit: Path, *options: str) -> Any:
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(cli.app, ["status", str(kit), *options])


@pytest.mark.parametrize("name", ["server", "a"])
def test_what_does_not_run_is_exit_status_1(kits: Path, name: str) -> None:
    pytest.importorskip("psutil", reason="the extra flare is not installed")
    shown = status(kits / name)
    assert (shown.exit_code, shown.stderr) == (1, "")
    assert f"{name} of trial: not running" in shown.stdout
    told = json.loads(status(kits / name, "--format", "json").stdout)
    assert told["running"] is False
    assert told.get("listens", told.get("service")) is False


def test_why_a_run_failed_is_told_site_by_site(kits: Path) -> None:
    pytest.importorskip("psutil", reason="the extra flare is not installed")
    run = RunProgress(1, "failed", 3, names=("a", "b"), least=2, reason=REFUSED)
    (kits / "server" / RUNS / "trial-1").mkdir(parents=True)
    write_progress(kits / "server" / RUNS / "trial-1", run)
    lines = status(kits / "server").stdout.splitlines()
    assert "trial-1 failed: too few sites take part: a sum needs 2" in lines
    assert [line.strip()[:12] for line in lines if line.startswith("  ")][-2:] == [
        "a refuses by",
        "b refuses by",
    ]


def test_reasons_are_cut_between_sites_and_nowhere_else() -> None:
    assert _reasons(RunProgress(1, "failed", 3, reason=REFUSED)) == [
        "too few sites take part: a sum needs 2",
        "a refuses by policy.consent: proposed is x; permitted is y",
        "b refuses by data.schema: proposed is x; permitted is z",
    ]
    assert _reasons(RunProgress(1, "failed", 3, reason="a; b: c")) == ["a; b: c"]


def test_an_experiment_that_names_no_sites_asks_those_of_the_consortium(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    (tmp_path / "schema.toml").write_text(
        'version = 1\nname = "ages"\nlabel = "ill"\n[columns.age]\ntype = "number"\n'
        'range = [0, 110]\n[columns.ill]\ntype = "category"\ncategories = ["no", "yes"]\n'
    )
    text = '[data]\nsource = "table"\nschema = "schema.toml"\n[preprocessing]\nscale = "range"\n'
    path.write_text(text)
    assert config.load(path, (), ("a", "b")).sites.names == ("a", "b")
    with pytest.raises(ConfigurationError, match="say sites"):
        config.load(path)
    path.write_text(text + '[sites]\nnames = ["c", "d"]\n')
    assert config.load(path, (), ("a", "b")).sites.names == ("c", "d")
