"""One consortium for a module's tests: keys of RSA-3072 take a while to make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from securefl.deployment.authority import Consortium, enrol


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `trial` (sites a and b, and c with its own keys) and `c`, where c enrolled."""
    folder = tmp_path_factory.mktemp("made")
    request, _ = enrol(folder / "c", "c")
    Consortium.new(folder / "trial", "127.0.0.1:18021", ["a", "b"], requests=[request])
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of `made` that a test may change."""

    def copied() -> Path:
        return Path(shutil.copytree(made, tmp_path / "copy"))

    return copied
