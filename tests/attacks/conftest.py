"""A small recorded run, which no test changes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], ModuleType]:
    """`benchmark("keys")`: the script of that name in benchmarks/attacks, as a module."""

    def load(name: str) -> ModuleType:
        place = Path(__file__).parents[2] / "benchmarks" / "attacks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"attacks_{name}", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(place.parent))  # as for a script there
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(place.parent))
        return module

    return load
