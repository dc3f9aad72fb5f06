"""A small recorded run, which no test changes."""

from __future__ import annotations

import pytest

from attacks.case import Case
from securefl import config
from securefl.runs import run

SMALL = """
rounds = 3
[data]
source = "diabetes"
default_range = [-1.0, 1.0]
target_range = [0.0, 400.0]
[sites]
count = 4
[protocol]
name = "secagg"
[transcript]
consent = ["site-1", "site-2", "site-3", "site-4"]
own = ["site-1", "site-2", "site-3", "site-4"]
"""


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Case:
    """Four sites, three rounds of secagg, everything recorded."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return Case.open(run(config.parse(SMALL), folder, report=False).directory)


@pytest.fixture(scope="session")
def small_run() -> str:
    """Its experiment."""
    return SMALL
