"""The reference pages say what the code reads today, and their examples are read by it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from securefl import config, reference, schema
from securefl.reference import ABOVE
from securefl.sections import Section

DOCS = Path(__file__).parents[2] / "docs"
WRITTEN = {
    "experiment": reference.experiment,
    "site": reference.site,
    "schema": reference.schema,
}
ROOTS: dict[str, type[Section]] = {
    "experiment": config.Experiment,
    "site": config.Site,
    "schema": schema.Schema,
}
pages = pytest.mark.parametrize("page", WRITTEN)


def rows(section: str) -> list[list[str]]:
    """The rows of a section's table, a text a cell."""
    found = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [row.split(" | ") for row in found]


def sections(page: str) -> list[str]:
    """A page's tables of a file, each from its heading on."""
    _, *found = re.split(r"^(?=## )", WRITTEN[page](), flags=re.MULTILINE)
    return found[1:]  # after the examples


def kinds(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from kinds(part)


def below(root: type[Section]) -> Iterator[type[Section]]:
    """A section and all that it can hold, but for the schema, which has a page of its own."""
    yield root
    for info in root.model_fields.values():
        for kind in kinds(info.annotation):
            if kind is not schema.Schema:
                yield from below(kind)


@pages
def test_committed_page_is_what_the_code_says(page: str) -> None:
    committed = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
    assert committed == WRITTEN[page](), "run `make reference` and commit docs/reference"


@pages
def test_every_key_of_every_table_stands_in_its_table(page: str) -> None:
    told = [[row[0].strip("`") for row in rows(section)] for section in sections(page)]
    held = [
        [info.alias or name for name, info in kind.model_fields.items()]
        for kind in below(ROOTS[page])
    ]
    assert told == held


@pages
def test_every_key_is_explained_in_its_row_or_in_the_text_above_it(page: str) -> None:
    policy = (DOCS / "site-policy.md").read_text(encoding="utf-8")
    for section in sections(page):
        prose = section.partition("| key |")[0]
        if "(../site-policy.md) says what each key means" in prose:
            prose = policy
        for key, _, _, meaning in rows(section):
            assert meaning != ABOVE or key in prose, f"{key} is explained nowhere: {section[:40]}"


@pages
def test_links_lead_somewhere(page: str) -> None:
    text = WRITTEN[page]()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"\]\(([^)]*)\)", text)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (DOCS / "reference" / target).exists(), target


def test_a_row_tells_type_default_and_meaning() -> None:
    [data] = [section for section in sections("experiment") if section.startswith("## `[data]`")]
    told = {row[0]: row[1:] for row in rows(data)}
    assert told["`test_fraction`"] == ["number above 0, below 1", "`0.2`", ABOVE]
    assert told["`drop`"] == ["list of texts", "(none)", ABOVE]
    assert told["`task`"][0] == '`"classification"` or `"regression"`'
    number = next(part for part in sections("schema") if part.startswith("## `[columns.NAME]`"))
    told = {row[0]: row[1:] for row in rows(number)}
    assert told["`range`"][:2] == ["lowest and highest value", "required"]


def test_examples_are_read_as_they_stand(tmp_path: Path) -> None:
    """All of them side by side, each under the name in its first line: they name one another."""
    names = []
    for write in WRITTEN.values():
        for block in re.findall(r"```toml\n(.*?)```", write(), re.DOTALL):
            [name] = re.findall(r"\A# (\S+\.toml)\b", block)
            names.append(name)
            (tmp_path / name).write_text(block, encoding="utf-8")
    assert len(set(names)) == len(names) == 5
    experiment = config.load(tmp_path / "clinics.toml")
    site = config.load_site(tmp_path / "site.toml")
    assert experiment.data.agreed is not None
    assert (
        experiment.data.agreed == site.data.agreed == schema.load(tmp_path / "clinics.schema.toml")
    )
    readings = schema.load(tmp_path / "readings.schema.toml")
    assert (readings.header, readings.task) == (False, "regression")
    assert schema.load(tmp_path / "images.schema.toml").image == "image"
