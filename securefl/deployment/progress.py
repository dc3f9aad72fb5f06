"""How far a run on a consortium's server is: what its folder says to those who look after it."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from securefl import store
from securefl.config import ConfigurationError
from securefl.records import SUMMARY
from securefl.store import CorruptStoreError

RUNS: Final = "runs"
PROGRESS: Final = "progress.json"
_STOPPED: Final = "stop"
AGAIN: Final = "securefl.again"
"""The command that ends a job after its round, so that the next one counts late sites in."""

_NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")

State = Literal["running", "waiting", "interrupted", "finished", "failed", "stopped"]
"""waiting: for enough sites. interrupted: its job ended; the next one goes on with it."""


class RunProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a run is.

    done: updates of at most `rounds`. names: its sites; least: how many of them a sum needs; sites:
    those that take part now. job: FLARE's, the last of `jobs`; deployed: the sites in it; silent:
    those of them whose process does not answer. reason: why it waits or failed.
    """

    version: Literal[1]
    state: State
    rounds: int
    done: int = 0
    round: int = 0
    phase: str = ""
    names: tuple[str, ...] = ()
    least: int = 0
    sites: tuple[str, ...] = ()
    deployed: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    job: str = ""
    jobs: int = 0
    reason: str = ""
    at: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing goes on with the run by itself."""
        return self.state in ("finished", "failed", "stopped")


STATUS: Final = "securefl.status"
"""The command that asks a running job how far it is."""

STOP: Final = "securefl.stop"
"""The command that ends a run after its round, for good."""


def read_progress(folder: Path) -> RunProgress | None:
    """How far the run in `folder` is; None where none was begun.

    A file that is damaged says no more than that somebody must go on: nothing depends on the rest.
    """
    try:
        return store.read(folder / PROGRESS, RunProgress)
    except CorruptStoreError as error:
        return RunProgress(version=1, state="interrupted", rounds=0, least=1, reason=str(error))


def stop(folder: Path) -> None:
    """Have the run in `folder` end after its round, for good, whoever conducts it then."""
    store.write(folder / _STOPPED, b"")


def is_stopped(folder: Path) -> bool:
    """Whether the run in `folder` is to end."""
    return (folder / _STOPPED).exists()


def write_progress(folder: Path, progress: RunProgress) -> None:
    """Say how far the run in `folder` is; durable on return."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    told = msgspec.structs.replace(progress, at=at)
    store.write(folder / PROGRESS, msgspec.json.encode(told))


def check_name(name: str) -> str:
    """`name`, where it can be a run's folder; ConfigurationError where it cannot."""
    if not _NAME.match(name):
        raise ConfigurationError(f"{name!r} is no name of a run: use letters, digits and . _ -")
    return name


def every_run(kit_folder: Path) -> dict[str, RunProgress]:
    """Every run of the consortium's server and how far it is, oldest first."""
    folders = sorted((kit_folder / RUNS).glob("*/" + PROGRESS), key=os.path.getmtime)
    found = {path.parent.name: read_progress(path.parent) for path in folders}
    return {
        name: msgspec.structs.replace(progress, state="finished")
        if (kit_folder / RUNS / name / SUMMARY).exists()
        else progress
        for name, progress in found.items()
        if progress is not None
    }
