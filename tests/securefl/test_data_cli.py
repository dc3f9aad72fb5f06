"""`securefl data`: a schema drafted, a file checked, and what a person sees of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from securefl import cli
from securefl import schema as schemas
from securefl.data_cli import STAYS

SCHEMA = """
version = 1
name = "clinic"
label = "sick"
[columns.age]
type = "number"
range = [0, 120]
unit = "years"
[columns."[bold]ward[/bold]"]
type = "category"
categories = ["[red]A", "B"]
[columns.sick]
type = "category"
categories = ["no", "yes"]
"""


def call(*arguments: object, columns: int = 80) -> Any:
    runner = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(cli.app, ["data", *map(str, arguments)])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sixty rows that are as SCHEMA, beside it, says."""
    lines = ["age,[bold]ward[/bold],sick"]
    wards, sick = ("[red]A", "B"), ("no", "yes")
    lines += [f"{20 + i * 0.7:.1f},{wards[i % 2]},{sick[i % 2]}" for i in range(60)]
    path = tmp_path / "records.csv"
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    return path


def test_schema_prints_a_schema_that_can_be_saved_as_it_is(table):
    shown = call("schema", table)
    assert shown.exit_code == 0
    found = schemas.parse(shown.stdout)
    assert list(found.columns) == ["age", "[bold]ward[/bold]", "sick"]
    assert found.label == "sick"


def test_schema_writes_a_file_but_never_over_another(table, tmp_path):
    path = tmp_path / "drafted.toml"
    first = call("schema", table, "--output", path, "--label", "[bold]ward[/bold]")
    assert first.exit_code == 0
    assert "3 columns" in first.stdout
    assert schemas.load(path).label == "[bold]ward[/bold]"
    text = path.read_text()
    again = call("schema", table, "--output", path)
    assert again.exit_code == 2
    assert "exists: name another file" in again.stderr
    assert path.read_text() == text
    nowhere = call("schema", table, "--output", tmp_path / "absent" / "s.toml")
    assert nowhere.exit_code == 2
    assert "cannot write" in nowhere.stderr


def test_schema_takes_names_for_a_file_without(tmp_path):
    path = tmp_path / "t.data"
    path.write_text("".join(f"{i / 7:.2f} {i % 2}\n" for i in range(40)))
    found = schemas.parse(call("schema", path, "--names", "dose, dead", "--no-header").stdout)
    assert list(found.columns) == ["dose", "dead"]
    assert not found.header
    wrong = call("schema", path, "--names", "dose")
    assert wrong.exit_code == 2
    assert wrong.stderr.count("\n") == 1


def test_a_clean_file_exits_with_0_and_tells_its_figures(table):
    shown = call("check", table, "--schema", table.parent / "schema.toml")
    assert shown.exit_code == 0, shown.stdout
    assert "records.csv: 60 rows" in shown.stdout
    assert "no 30 (50 %), yes 30 (50 %)" in shown.stdout
    assert "Nothing odd was found." in shown.stdout
    assert shown.stdout.rstrip().endswith(STAYS)
    assert "[bold]ward[/bold]" in shown.stdout
    assert "[red]A 30, B 30" in shown.stdout


def test_errors_come_first_and_exit_with_2(table):
    table.write_text(table.read_text().replace("20.0", "200.0").replace(",B,", ",,", 40))
    shown = call("check", table, "--schema", table.parent / "schema.toml")
    assert shown.exit_code == 2
    page = " ".join(shown.stdout.split())
    assert "1 value outside [0, 120] years, such as 200; first in row 1" in page
    assert page.index("1 error") < page.index("1 warning")
    assert shown.stdout.rstrip().endswith(STAYS)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_page_is_no_wider_than_the_terminal(table, width):
    table.write_text(table.read_text().replace("20.0", "2e40").replace(",B,", ",C,", 40))
    shown = call("check", table, "--schema", table.parent / "schema.toml", columns=width)
    lines = shown.stdout.splitlines()[1:]  # the path is never broken
    assert lines
    assert max(map(len, lines)) <= width


def test_json_has_the_findings_and_the_figures(table):
    table.write_text(table.read_text().replace("20.0", "old"))
    shown = call("check", table, "--schema", table.parent / "schema.toml", "--format", "json")
    assert shown.exit_code == 2
    told = json.loads(shown.stdout)
    assert told["rows"] == 60
    first = told["findings"][0]
    assert (first["severity"], first["column"]) == ("error", "age")
    assert "row 1: 'old' is not a number" in first["text"]
    assert [column["name"] for column in told["columns"]] == ["age", "[bold]ward[/bold]", "sick"]


def test_a_schema_that_is_none_is_one_line(table, tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text(SCHEMA.replace("range", "rage"))
    shown = call("check", table, "--schema", broken)
    assert shown.exit_code == 2
    assert "did you mean" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_a_file_that_is_absent_is_an_error(table, tmp_path):
    shown = call("check", tmp_path / "absent.csv", "--schema", table.parent / "schema.toml")
    assert shown.exit_code == 2
    assert "absent.csv" in shown.stdout
    assert call("schema", tmp_path / "absent.csv").exit_code == 2
