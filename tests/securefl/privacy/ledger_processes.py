"""Processes that use a ledger and are killed, or use it at the same time; run by test_ledger.py.

    python ledger_processes.py statements FOLDER     killed between any two statements
    python ledger_processes.py kills FOLDER N        killed at N random instants
    python ledger_processes.py together FOLDER N     N processes charge one run, then two, at once
    python ledger_processes.py unwritable FOLDER     folders in it are not writable

Prints a line of JSON a child: what it told before it ended, and what the ledger holds afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from securefl.privacy.accounting import Curve, PoissonGaussian, Repeated
from securefl.privacy.ledger import Account, BudgetSpentError, Charged, Ledger

Tell = Callable[[int], None]
connect = sqlite3.connect


def child(work: Callable[[Tell], None]) -> tuple[int, int]:
    """Fork a process that does `work`; its id, and where to read what it tells."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    status = 1
    try:
        os.close(reader)
        work(lambda number: os.write(writer, number.to_bytes(8, "big")) and None)
        status = 0
    finally:
        os._exit(status)
    raise AssertionError


def told(reader: int) -> list[int]:
    """Everything a child told, when it has ended."""
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    return [int.from_bytes(data[i : i + 8], "big") for i in range(0, len(data), 8)]


def ended(process: int) -> bool:
    """Whether the child was killed; it must not have failed otherwise."""
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def held(path: Path) -> dict[str, Any]:
    """What a fresh reader finds; it checks the chain."""
    with Ledger(path) as ledger:
        return {
            "kinds": [type(entry).__name__ for entry in ledger.entries],
            "charged": [entry.round for entry in ledger.entries if isinstance(entry, Charged)],
        }


def step(noise: float) -> Repeated:
    return Repeated(PoissonGaussian(noise, 0.1), 1)


def opened(ledger: Ledger, run: str, epsilon: float, noise: float) -> Account:
    if "cohort" not in ledger.datasets:
        ledger.register("cohort", unit="record", epsilon=epsilon, delta=1e-5, purpose="a study")
    return ledger.open(
        "cohort",
        run,
        experiment="an experiment",
        promise=bytes(32),
        unit="record",
        per_round=step(noise),
        rounds=1_000_000,
        epsilon=epsilon,
    )


class Killing(sqlite3.Connection):
    """Kills its process before or after its `at`-th statement."""

    at = 0
    seen = 0

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return self._counted(super().execute, *arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return self._counted(super().executemany, *arguments)

    def _counted(self, call: Callable[..., sqlite3.Cursor], *arguments: Any) -> sqlite3.Cursor:
        self._perhaps()
        cursor = call(*arguments)
        self._perhaps()
        return cursor

    def _perhaps(self) -> None:
        Killing.seen += 1
        if Killing.seen == Killing.at:
            os.kill(os.getpid(), signal.SIGKILL)


def statements(folder: Path) -> Iterator[dict[str, Any]]:
    sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Killing)  # type: ignore[assignment]
    Curve.of([step(4.0)])  # computed once, for all children
    killed, at = True, 0
    while killed:
        at += 1
        path = folder / str(at) / "ledger.db"

        def work(tell: Tell, path: Path = path, at: int = at) -> None:
            Killing.at, Killing.seen = at, 0
            with Ledger(path) as ledger:
                account = opened(ledger, "run", 5.0, 4.0)
                ledger.observe("cohort", [b"Ann", b"Bob"])
                for number in (1, 2, 3):
                    account.charge(number)
                    tell(number)

        process, reader = child(work)
        killed = ended(process)
        yield {"killed": killed, "told": told(reader), **held(path)}


def kills(folder: Path, times: int) -> Iterator[dict[str, Any]]:
    path = folder / "ledger.db"
    instants = random.Random(5)
    with Ledger(path) as ledger:
        opened(ledger, "run", 50.0, 200.0)

    def work(tell: Tell) -> None:
        with Ledger(path) as ledger:
            account = opened(ledger, "run", 50.0, 200.0)
            last = [e.round for e in ledger.entries if isinstance(e, Charged)][-1:]
            number = last[0] if last else 0
            tell(0)
            while True:
                number += 1
                account.charge(number)
                tell(number)

    for _ in range(times):
        process, reader = child(work)
        os.read(reader, 8)  # it has opened the ledger
        time.sleep(instants.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        yield {"killed": ended(process), "told": told(reader), **held(path)}


def together(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    for runs in (1, 2):
        gate, start = os.pipe()

        def work(
            tell: Tell, i: int, runs: int = runs, gate: int = gate, start: int = start
        ) -> None:
            os.close(start)
            os.read(gate, 1)  # all at once, when the other end is closed
            with Ledger(folder / str(runs) / "ledger.db") as ledger:
                account, attempt = opened(ledger, f"run-{i % runs}", 1.0, 4.0), 0
                while True:
                    attempt += 1
                    try:
                        account.charge(attempt)
                    except BudgetSpentError:
                        return
                    except ValueError:
                        continue  # another one has charged this round
                    tell(attempt)
                    time.sleep(0.002)  # as a round takes its time

        children = [child(lambda tell, i=i: work(tell, i)) for i in range(number)]
        os.close(gate)
        os.close(start)
        for i, (process, reader) in enumerate(children):
            heard = told(reader)
            assert not ended(process)
            yield {"runs": runs, "run": f"run-{i % runs}", "told": heard}


def unwritable(folder: Path) -> Iterator[dict[str, Any]]:
    folder.chmod(0o755)
    places = sorted(folder.iterdir())
    for path in folder.rglob("ledger.*"):
        path.chmod(0o444)
    for place in places:
        place.chmod(0o555)
    if os.getuid() == 0:  # to whom modes say nothing
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for place in places:
        try:
            Ledger(place / "ledger.db")
        except Exception as error:
            yield {"kind": type(error).__name__, "error": str(error)}


if __name__ == "__main__":
    modes: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "statements": statements,
        "kills": kills,
        "together": together,
        "unwritable": unwritable,
    }
    for line in modes[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:])):
        print(json.dumps(line), flush=True)
