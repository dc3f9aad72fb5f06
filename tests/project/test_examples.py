"""The examples can be read and assembled, and the smallest does what its first line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from securefl import config, schema, simulation
from securefl.records import read_history
from securefl.runs import run

FOLDER = Path(__file__).parents[2] / "examples"
SCHEMAS = sorted(FOLDER.glob("*.schema.toml"))
EXAMPLES = sorted(set(FOLDER.glob("*.toml")) - set(SCHEMAS))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_experiment_on_data_at_hand(path: Path) -> None:
    experiment = config.load(path)
    if experiment.data.path is not None and not experiment.data.path.exists():
        pytest.skip(f"{path.name} needs data to be downloaded: its first lines say from where")
    consortium = simulation.assemble(experiment)
    assert len(consortium.sites) >= 3
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_survives_being_written_and_is_used_by_an_example(path: Path) -> None:
    read = schema.load(path)
    assert schema.parse(read.dump()) == read
    assert read.digest() in {
        agreed.digest() for e in EXAMPLES if (agreed := config.load(e).data.agreed) is not None
    }


DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "files", "separator", "rows"),
    [
        ("german-credit", "german_credit/german.data", None, 1000),
        ("heart-disease", "heart_disease/processed.*.data", ",", 920),
    ],
)
def test_a_schema_permits_every_value_of_the_data_set(
    name: str, files: str, separator: str | None, rows: int
) -> None:
    paths = sorted(DATA.glob(files))
    if not paths:
        pytest.skip(f"no {files} beside this checkout")
    said, seen = schema.load(FOLDER / f"{name}.schema.toml"), 0
    for line in "\n".join(path.read_text() for path in paths).split("\n"):
        values = [schema.canonical(value) for value in line.split(separator)]
        if values in ([], [""]):
            continue
        seen += 1
        for (column, declared), value in zip(said.columns.items(), values, strict=True):
            if value in said.missing_codes(column):
                continue
            if isinstance(declared, schema.NumberColumn):
                inside = declared.range[0] <= float(value) <= declared.range[1]
                assert inside or declared.outside == "clip", (column, value)
            else:
                assert isinstance(declared, schema.CategoryColumn)
                assert value in {schema.canonical(code) for code in declared.codes}, column
    assert seen == rows


def test_the_model_of_sites_only_is_good_and_only_at_the_sites(tmp_path: Path) -> None:
    done = run(config.load(FOLDER / "sites-only.toml"), tmp_path / "run")
    assert done.summary.metric["test_accuracy"] > 0.8
    assert {path.suffix for path in (done.directory / "checkpoints").iterdir()} == {".json"}
    history = read_history(done.directory)
    assert history.rounds[-1].parameters < history.rounds[0].parameters
    page = (done.directory / "report.html").read_text(encoding="utf-8")
    assert "every site opened the sum and kept it" in " ".join(page.split())
