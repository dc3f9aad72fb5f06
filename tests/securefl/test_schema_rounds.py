"""Rounds that fit and evaluate: cut, lost, and asked for by a server that does not keep to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols.catalogue import PROTOCOLS
from securefl import agreement, data, store
from securefl.client import Client
from securefl.config import Experiment
from securefl.data import Frame
from securefl.data.sources import load_frames
from securefl.engines import Exchange
from securefl.messages import Refusal, Request, Task, parse_reply
from securefl.preprocessing import Fitted
from securefl.records import EvaluationRecord, read_history
from securefl.runs import RunFailedError, resume, run
from securefl.state import GlobalState
from securefl.store import SiteStore

SITES = ("east", "north", "south")
SECAGG = PROTOCOLS["secagg"].phases

Alter = Callable[[str, Request], Request | None]
"""What a server sends to a site in place of a request; None: nothing."""


class Cut(BaseException):
    """The machine stops."""


class Kinds:
    """What every round of a run is for, as its first requests say."""

    def __init__(self) -> None:
        self.rounds: dict[int, str] = {}

    def of(self, request: Request) -> str:
        return self.rounds.setdefault(request.round, request.task.kind)


def cut_at(kind: str, phase: str, *, after: bool) -> Callable[[Exchange], Exchange]:
    """Stop before or after the first exchange of that phase in a round of that kind."""
    kinds = Kinds()

    def wrap(exchange: Exchange) -> Exchange:
        def cutting(asked: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            told = {kinds.of(Request.from_bytes(message)) for message in messages.values()}
            if told == {kind} and asked == phase:
                if after:
                    exchange(asked, messages)
                raise Cut
            return exchange(asked, messages)

        return cutting

    return wrap


def altering(alter: Alter) -> Callable[[Exchange], Exchange]:
    """A server that sends what `alter` makes of an honest one's requests."""

    def wrap(exchange: Exchange) -> Exchange:
        def sent(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            changed = {site: alter(site, Request.from_bytes(m)) for site, m in messages.items()}
            return exchange(phase, {s: m.to_bytes() for s, m in changed.items() if m is not None})

        return sent

    return wrap


def fitted(folder: Path) -> Fitted:
    told = json.loads((folder / "preprocessing.json").read_text())
    return msgspec.convert(told["values"], Fitted)


def evaluations(folder: Path) -> list[EvaluationRecord]:
    lines = store.whole_lines(folder / "evaluations.jsonl")
    return [EvaluationRecord.from_json(line) for line in lines]


def released(folder: Path, site: str) -> tuple[int, int, int]:
    kept = SiteStore(folder / "sites" / site)
    return kept.released("statistics-0"), kept.charged, kept.released("evaluation")


# --- a crash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["fit", "train", "evaluate"])
@pytest.mark.parametrize("phase", SECAGG)
def test_a_run_that_is_cut_in_any_phase_goes_on_and_charges_every_attempt(
    clinic, private, tmp_path, phase, kind, after
):
    experiment = clinic().experiment(*private, "rounds=2", "protocol.name=secagg")
    folder = tmp_path / "run"
    with pytest.raises(Cut):
        run(experiment, folder, exchange=cut_at(kind, phase, after=after), report=False)
    kept = folder / "preprocessing.json"
    before = kept.read_bytes() if kept.exists() else b""
    assert (before != b"") == (kind != "fit")
    done = resume(folder)
    assert done.summary.stopped == "round budget"
    assert "test_accuracy" in done.summary.metric
    if before:
        assert kept.read_bytes() == before
    # A site draws in its upload, and only there: an attempt that came so far was charged.
    drew = SECAGG.index(phase) > SECAGG.index("upload") or (phase == "upload" and after)
    lost = {k: int(drew and k == kind) for k in ("fit", "train", "evaluate")}
    for site in SITES:
        assert released(folder, site) == (1 + lost["fit"], 2 + lost["train"], 1 + lost["evaluate"])
        assert done.summary.epsilon[site] <= 5.0
    (last,) = evaluations(folder)
    assert last.update == 2
    rounds = [record.round for record in read_history(folder).rounds]
    fits = json.loads(kept.read_text())["rounds"]
    numbers = [*fits, *rounds, last.round]
    assert numbers == sorted(set(numbers))
    assert {*numbers, *done.summary.aborted_rounds} == set(range(1, last.round + 1))
    assert done.summary.aborted_rounds == ({"fit": 1, "train": 2, "evaluate": 4}[kind],)


# --- sites that fall out -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["advertise", "upload", "confirm"])
@pytest.mark.parametrize("kind", ["fit", "evaluate"])
def test_a_site_that_falls_out_of_a_sum_is_left_out_of_it(clinic, drawn, tmp_path, kind, phase):
    rows = {**drawn, "west": [row | {"patient": "w" + row["patient"]} for row in drawn["east"]]}
    experiment = clinic(rows).experiment("protocol.name=secagg", "protocol.minimum_cohort=3")
    kinds = Kinds()

    def losing(site: str, request: Request) -> Request | None:
        lost = kinds.of(request) == kind and site == "north"
        late = SECAGG.index(request.phase) >= SECAGG.index(phase)
        return None if lost and late else request

    folder = tmp_path / "run"
    done = run(experiment, folder, exchange=altering(losing), report=False)
    assert done.summary.aborted_rounds == ()
    # Who falls out after its upload is in the sum.
    out = ("north",) if phase != "confirm" else ()
    frames = {
        site: data.held_out(frame, experiment)
        for site, frame in load_frames(experiment.data).items()
    }
    left = [site for site in frames if kind != "fit" or site not in out]
    made = agreement.preprocessor(experiment, 4)
    everybody = Frame.concatenate([frames[site][0] for site in left])
    total = made.encode(0, made.start(), everybody, None)
    assert fitted(folder) == made.fit(0, made.start(), total, 0.0)
    (last,) = evaluations(folder)
    tested = [site for site in frames if kind != "evaluate" or site not in out]
    assert list(last.sites) == tested
    assert last.figures.rows == sum(len(frames[site][1]) for site in tested)
