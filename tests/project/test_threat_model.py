"""The threat model names tests that exist, and treats every protocol and adversary it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from protocols.catalogue import PROTOCOLS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)


def functions(path: Path) -> set[str]:
    """The names of the functions that a file defines at its top level or in a class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_named_test_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions(ROOT / "tests" / file)


def sections() -> dict[str, str]:
    """Heading -> text, for every section but the last."""
    _, *parts = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    named = dict(part.split("\n", 1) for part in parts)
    named.pop("What is not covered")
    return named


@pytest.mark.parametrize("heading", list(sections()))
def test_every_adversary_has_what_is_stopped_what_is_not_why_and_tests(heading: str) -> None:
    text = sections()[heading]
    for part in ("*Stopped", "*Not stopped.*", "*Assumption.*", "*Tests.*"):
        assert text.count(part) == 1, part
    assert len(re.findall(r"`[\w/]+\.py::\w+`", text)) >= 3


def test_the_adversaries_are_those_of_the_table_and_every_protocol_is_a_column() -> None:
    header, _, *rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert re.findall(r"`([\w-]+)`", header) == list(PROTOCOLS)
    assert len(rows) >= len(sections()) == 9
    assert all(row.count("|") == header.count("|") for row in rows)


def test_no_test_is_named_in_a_form_that_is_not_checked() -> None:
    assert len(re.findall(r"test_\w+\.py", TEXT)) == len(NAMED)
