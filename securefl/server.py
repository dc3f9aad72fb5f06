"""The server's side of a round. It relays, adds and measures; it holds no key and no record."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from protocols.catalogue import PROTOCOLS, UPLOAD
from protocols.encoding import Aggregate, Encoding
from protocols.errors import MalformedMessageError, ProtocolError, RoundAbortedError
from protocols.identity import Roster
from protocols.messages import Begin
from protocols.rounds import Cohort, Outcome, Part
from securefl import agreement, replicas
from securefl.config import Experiment
from securefl.engines import Exchange
from securefl.messages import (
    MOST_HEADS,
    Answer,
    PinnedKey,
    Proposal,
    Refusal,
    Request,
    Task,
    parse_reply,
    printable,
)
from securefl.privacy import clipping
from securefl.privacy.ledger import SignedHead
from securefl.privacy.plan import Plan
from securefl.replicas import Standing, Whereabouts
from securefl.state import GlobalState

PROPOSE = "propose"
"""The phase, before any round, in which sites are asked to take part."""


@dataclass(slots=True)
class Traffic:
    """What one round moved and how long it took, by phase."""

    bytes_up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    upload_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Ended:
    """What a round's steps end with."""

    contributors: tuple[str, ...]
    result: Aggregate | Standing
    faults: Mapping[str, str]


_Result = TypeVar("_Result", _Ended, Outcome)


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round. `result`: the aggregate, or what is known of the model it became."""

    number: int
    contributors: tuple[str, ...]
    result: Aggregate | Standing
    faults: Mapping[str, str]
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Summed:
    """A finished round of any other task: the opened sum, int64[length]."""

    number: int
    contributors: tuple[str, ...]
    total: NDArray[np.int64]
    faults: Mapping[str, str]
    traffic: Traffic


class BudgetsSpentError(RoundAbortedError):
    """Too few sites have privacy budget left for another round."""


class Server:
    """Drives the protocol of an experiment over an exchange, one round at a time."""

    def __init__(
        self,
        experiment: Experiment,
        roster: Roster,
        session: bytes,
        exchange: Exchange,
        entered: Callable[[int, str], None],
        plan: Plan | None = None,
    ) -> None:
        self._experiment = experiment
        self._roster = roster
        self._session = session
        self._exchange = exchange
        self._entered = entered
        self._heads: dict[str, SignedHead] = {}
        self._plan = plan
        self._encoding = agreement.encoding(experiment, len(roster), plan)
        self._thresholds = agreement.thresholds(experiment, len(roster))
        bound = replicas.context(session, experiment.digest())
        quorum = agreement.quorum(experiment, len(roster))
        lenders = experiment.protocol.colluding_sites + 1
        self._whereabouts = Whereabouts(roster, bound, quorum, lenders)

    def propose(self, run: bytes, parameters: int) -> dict[str, str]:
        """Ask every site to take part; why those that refuse do, by site.

        run: 16 bytes, what this run is called for ever. parameters: of the dense model. A site that
        refused refuses every request, so that rounds go on without it while enough are left.
        """
        pinned = tuple(PinnedKey(site, key) for site, key in self._roster.keys.items())
        text = self._experiment.dump()
        data = Proposal(self._session, run, text, parameters, pinned).to_bytes()
        self._entered(0, PROPOSE)
        answers = self._exchange(PROPOSE, dict.fromkeys(self._roster, data))
        refusals = {}
        for site in self._roster:
            try:
                reply = parse_reply(answers[site]) if site in answers else None
            except MalformedMessageError as error:
                reply = Refusal("request", printable(str(error)))
            if isinstance(reply, Refusal):
                refusals[site] = reply.reason
            elif reply is None or reply.body != self._experiment.digest():
                refusals[site] = "no answer" if reply is None else "agreed to another experiment"
        return refusals

    def round(self, number: int, state: GlobalState | Standing, fitted: bytes = b"") -> Round:
        """One round on `state`: what came of it, who fell out and why, and what it moved.

        fitted: what preprocessing was fitted to, where there is any. `entered(number, phase)` is
        called as each phase begins. Raises RoundAbortedError when too few sites answered,
        BudgetsSpentError when that is because their budgets are spent.
        """
        task = Task(fitted=fitted)
        begin = self._begin(
            number, agreement.binding(self._experiment, state, self._encoding, task)
        )
        if isinstance(state, Standing):
            steps = self._withheld(begin, state)
        else:
            steps = self._opened(begin, state)
        ended, faults, traffic = self._drive(begin, steps, task, state.to_message())
        return Round(number, ended.contributors, ended.result, faults, traffic)

    def sum(self, number: int, task: Task, length: int, model: GlobalState | None = None) -> Summed:
        """One round for another task than training: the sum of the sites' vectors of `length`.

        model: what is evaluated. Raises as `round` does.
        """
        encoding = agreement.sum_encoding(self._experiment, len(self._roster))
        begin = self._begin(number, agreement.binding(self._experiment, model, encoding, task))
        steps = self._serve(begin, encoding, length)
        told = model.to_message() if model is not None else b""
        outcome, faults, traffic = self._drive(begin, steps, task, told)
        aggregate = outcome.aggregate
        total = np.rint(aggregate.mean * len(aggregate.contributors)).astype(np.int64)
        return Summed(number, aggregate.contributors, total, faults, traffic)

    def _begin(self, number: int, binding: bytes) -> Begin:
        return Begin(
            session=self._session,
            round=number,
            cohort=tuple(self._roster),
            minimum=self._thresholds.minimum,
            threshold=self._thresholds.threshold,
            binding=binding,
            degree=self._thresholds.degree,
        )

    def _drive(
        self, begin: Begin, steps: Part[_Result], task: Task, model: bytes
    ) -> tuple[_Result, dict[str, str], Traffic]:
        """A whole round: what its steps end with, who fell out and why, and what it moved."""
        first = PROTOCOLS[self._experiment.protocol.name].phases[0]
        traffic, refusals = Traffic(), dict[str, Refusal]()
        try:
            requests = next(steps)
            while True:
                shown = (model, task) if requests.phase == first else None
                replies = self._ask(begin.round, requests.phase, requests.messages, shown, traffic)
                refusals |= {s: r for s, r in replies.items() if isinstance(r, Refusal)}
                bodies = {s: r.body for s, r in replies.items() if isinstance(r, Answer)}
                started = time.perf_counter()
                try:
                    requests = steps.send(bodies)
                finally:
                    traffic.seconds["aggregate"] += time.perf_counter() - started
        except StopIteration as done:
            ended: _Result = done.value
            faults = {**ended.faults}
            faults |= {s: f"refused: {r.reason}" for s, r in refusals.items() if s in faults}
            return ended, faults, traffic
        except ProtocolError as error:
            spent = [site for site, r in refusals.items() if r.kind == "budget"]
            reasons = "; ".join(f"{s}: {r.reason}" for s, r in sorted(refusals.items()))
            message = f"{error}" + (f" [{reasons}]" if reasons else "")
            if len(self._roster) - len(spent) < begin.minimum:
                raise BudgetsSpentError(message, error.culprits) from None
            raise RoundAbortedError(message, error.culprits) from None

    def _serve(
        self,
        begin: Begin,
        encoding: Encoding,
        length: int,
        weights: Mapping[str, int] | None = None,
    ) -> Part[Outcome]:
        """The protocol's round, where the server gets the aggregate."""
        protocol, openers = self._experiment.protocol.name, self._experiment.protocol.openers
        parts = (begin, self._roster, encoding, length, weights)
        serve = PROTOCOLS[protocol].server
        return serve(*parts, openers) if openers > 1 else serve(*parts)

    def _opened(self, begin: Begin, state: GlobalState) -> Part[_Ended]:
        """A round of training, where the server gets the aggregate, and rotates it back."""
        weights = agreement.public_weights(self._experiment)
        length = clipping.upload_length(self._experiment, state.surviving)
        outcome = yield from self._serve(begin, self._encoding, length, weights)
        aggregate = outcome.aggregate
        rotation = agreement.rotation(self._experiment, self._plan, state.update, length)
        if rotation is not None:
            aggregate = replace(aggregate, mean=rotation.restore(aggregate.mean))
        return _Ended(aggregate.contributors, aggregate, outcome.faults)

    def _withheld(self, begin: Begin, standing: Standing) -> Part[_Ended]:
        """The protocol's round, where the sites keep the aggregate and move their own models."""
        serve = PROTOCOLS[self._experiment.protocol.name].blind_server
        if serve is None:
            raise ValueError(f"{self._experiment.protocol.name} has no round that hides the sum")
        cohort = Cohort(begin, self._roster)
        yield from self._whereabouts.bring_up(cohort, standing)
        length = clipping.upload_length(self._experiment, standing.surviving)
        outcome = yield from serve(begin, self._roster, self._encoding, length)
        cohort.faults |= outcome.faults
        update = standing.update + 1
        reached = yield from self._whereabouts.reached(cohort, outcome.holders, update)
        return _Ended(outcome.contributors, reached, cohort.faults)

    def _ask(
        self,
        number: int,
        phase: str,
        messages: Mapping[str, bytes],
        shown: tuple[bytes, Task] | None,
        traffic: Traffic,
    ) -> dict[str, Answer | Refusal]:
        """Send one phase's messages, in the first phase with model and task; the replies."""
        self._entered(number, phase)
        wire = {}
        for site, body in messages.items():
            request = Request(self._session, number, phase, body)
            if shown is not None:
                model, task = shown
                heads = self._witnessed(site)
                request = Request(self._session, number, phase, body, model, heads, task)
            wire[site] = request.to_bytes()
        started = time.perf_counter()
        answers = self._exchange(phase, wire)
        traffic.seconds[phase] += time.perf_counter() - started
        traffic.bytes_down[phase] += sum(map(len, wire.values()))
        replies: dict[str, Answer | Refusal] = {}
        for site, data in answers.items():
            traffic.bytes_up[phase] += len(data)
            if phase == UPLOAD:
                traffic.upload_bytes[site] = len(data)
            try:
                reply = parse_reply(data)
                if isinstance(reply, Answer) and reply.head is not None:
                    reply.head.check(site, self._roster)
                    self._heads[site] = reply.head
            except ProtocolError as error:
                reply = Refusal("request", printable(str(error)))
            replies[site] = reply
        return replies

    def _witnessed(self, site: str) -> dict[str, SignedHead]:
        """The heads that `site` is to keep: the newest of those who follow it in the roster."""
        names = tuple(self._roster)
        after = names.index(site) + 1
        peers = (*names[after:], *names[: after - 1])[:MOST_HEADS]
        return {peer: self._heads[peer] for peer in peers if peer in self._heads}
