"""The examples can be read and assembled, and the smallest does what its first line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from securefl import config, simulation
from securefl.records import read_history
from securefl.runs import run

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_experiment_on_data_at_hand(path: Path) -> None:
    experiment = config.load(path)
    if experiment.data.path is not None and not experiment.data.path.exists():
        pytest.skip(f"{path.name} needs data to be downloaded: its first lines say from where")
    consortium = simulation.assemble(experiment)
    assert len(consortium.sites) >= 3
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_model_of_sites_only_is_good_and_only_at_the_sites(tmp_path: Path) -> None:
    done = run(config.load(FOLDER / "sites-only.toml"), tmp_path / "run")
    assert done.summary.metric["test_accuracy"] > 0.8
    assert {path.suffix for path in (done.directory / "checkpoints").iterdir()} == {".json"}
    history = read_history(done.directory)
    assert history.rounds[-1].parameters < history.rounds[0].parameters
    page = (done.directory / "report.html").read_text(encoding="utf-8")
    assert "every site opened the sum and kept it" in " ".join(page.split())
