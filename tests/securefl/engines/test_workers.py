"""Clients in worker processes: the same run, and one that outlives a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from securefl import runs
from securefl.config import ConfigurationError, Engine
from securefl.engines.workers import Workers
from securefl.messages import Request
from securefl.records import read_history

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)


def workers() -> list[int]:
    """The process ids of this process's workers, the first that was started first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except (OSError, ProcessLookupError):
            continue
        if int(stat[1]) == os.getpid() and b"securefl.engines.workers" in command:
            found.append((int(stat[19]), int(entry.name)))  # started, in ticks: numbers wrap
    return [number for _, number in sorted(found)]


def at(round_number: int, phase: str, act):
    """An exchange that calls `act()` once, before that phase of that round."""

    def wrap(exchange):
        done = []

        def acting(asked: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            number = Request.from_bytes(next(iter(messages.values()))).round
            if asked == phase and number == round_number and not done:
                done.append(act())
            return exchange(asked, messages)

        return acting

    return wrap


def test_a_seeded_run_gives_the_same_model_in_process_and_over_workers(small, private, tmp_path):
    overrides = ("protocol.name=masked-bfv", "not_private_seed=3", "rounds=2", *private)
    models = set()
    for count, reveal in ((0, "server"), (2, "sites")):
        experiment = small(*overrides, f"engine.workers={count}", f"protocol.reveal={reveal}")
        done = run(experiment, tmp_path / f"{count} {reveal}")
        models.add((done.directory / "model.safetensors").read_bytes())
        assert all(len(r.survivors) == 3 for r in read_history(done.directory).rounds)
        assert len(done.summary.epsilon) == 3
        assert workers() == []
    assert len(models) == 1


def test_the_sites_of_a_killed_worker_fall_out_and_the_run_goes_on(small, private, tmp_path):
    def kill() -> None:
        os.kill(workers()[-1], signal.SIGKILL)

    experiment = small(
        "protocol.name=masked-bfv",
        "protocol.colluding_sites=0",  # three of five are enough
        "sites.count=5",
        "engine.workers=2",
        "rounds=3",
        *private,
    )
    done = run(experiment, tmp_path / "run", exchange=at(2, "upload", kill))
    first, *later = read_history(done.directory).rounds
    assert first.survivors == tuple(f"site-{i}" for i in range(1, 6))
    for record in later:
        assert record.survivors == ("site-1", "site-3", "site-5")
        assert set(record.dropouts) == {"site-2", "site-4"}
        assert all("no reply" in why for why in record.dropouts.values())
    assert done.summary.stopped == "round budget"
    assert all(value <= 5.0 for value in done.summary.epsilon.values())
    assert workers() == []


def test_sites_of_a_worker_killed_in_the_opening_are_brought_up_later(small, tmp_path):
    """They hold an older model than the others; the run ends as if no worker had died.

    It goes on in process: where clients run is no part of what sites agree on.
    """

    class StopError(Exception):
        pass

    class Stopping:
        def started(self, rounds: int, done: int) -> None: ...
        def phase(self, round_number: int, phase: str) -> None: ...
        def finished(self, record) -> None:
            if record.update == 2:
                raise StopError

    def kill() -> None:
        os.kill(workers()[-1], signal.SIGKILL)

    overrides = (
        "protocol.name=masked-bfv",
        "protocol.colluding_sites=0",
        "sites.count=5",
        "rounds=3",
        "not_private_seed=3",
        "pruning.sparsity=0.5",
    )
    whole = run(small(*overrides), tmp_path / "whole").directory
    experiment = small(*overrides, "protocol.reveal=sites", "engine.workers=2")
    folder = tmp_path / "run"
    with pytest.raises(StopError):
        run(experiment, folder, exchange=at(2, "open", kill), progress=Stopping())
    assert workers() == []
    here = experiment.model_copy(update={"engine": Engine()})
    (folder / "experiment.toml").write_text(here.dump())
    resume(folder)
    records = read_history(folder).rounds
    assert all(len(record.survivors) == 5 for record in records)
    assert ["borrow" in record.bytes_down for record in records] == [False, False, True]
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_deadline_drops_sites_that_are_too_slow_and_they_may_come_back(small, tmp_path):
    """Even when the model is larger than a pipe holds, so that sending it has to wait."""
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(workers()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    def go_on() -> None:
        os.kill(stopped[0], signal.SIGCONT)

    def both(exchange):
        return at(3, "upload", go_on)(at(2, "upload", stop)(exchange))

    experiment = small(
        "sites.count=4",
        "model.name=mlp",
        "model.hidden=[4000]",
        "engine.workers=2",
        "engine.deadline=12",  # a busy machine must not be taken for a stopped site
        "rounds=3",
    )
    done = run(experiment, tmp_path / "run", exchange=both)
    first, second, third = read_history(done.directory).rounds
    assert len(first.survivors) == 4
    assert second.survivors in (("site-1", "site-3"), ("site-2", "site-4"))
    assert all("no reply" in why for why in second.dropouts.values())
    assert len(third.survivors) == 4
    assert workers() == []


def test_a_users_mistake_inside_a_worker_comes_out_as_one_line(small, private, tmp_path):
    wrong = small(*private[:3], "privacy.expected_batch=400", "engine.workers=1")
    names = ("site-1", "site-2", "site-3")
    with pytest.raises(ConfigurationError, match="expected_batch = 400") as caught:
        Workers(wrong, names, b"session of tests", tmp_path)
    assert "\n" not in str(caught.value)
    assert workers() == []
    with pytest.raises(ConfigurationError) as again:
        run(wrong, tmp_path / "run")
    assert str(again.value) == str(caught.value)


def test_replacing_clients_needs_them_in_process(small, tmp_path):
    with pytest.raises(ConfigurationError, match=r"engine\.workers = 0"):
        run(
            small("engine.workers=1"),
            tmp_path / "run",
            clients={"site-1": lambda client: client},
        )
    assert not (tmp_path / "run").exists()
