"""A round on a table: real clients and a real server, with a seam in every wire."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from protocols.catalogue import PROTOCOLS, UPLOAD
from protocols.encoding import FixedPoint
from protocols.errors import ProtocolError
from protocols.graph import Thresholds, thresholds
from protocols.keystream import Keystream, Seed
from protocols.messages import Begin
from protocols.rounds import Expected, Requests, Reveal, make_identities

Relay = Callable[[str, str, bytes], bytes]
"""(phase, site, message): what an active server sends to `site` instead."""
Wire = Callable[[Requests, dict[str, bytes]], Mapping[str, bytes]]
"""(requests, honest replies): what reaches the server instead."""


def stream(name: str) -> Keystream:
    """Bytes that look random and are the same in every run of the tests."""
    return Keystream(Seed(hashlib.sha256(name.encode()).digest()), "tests")


class Round:
    """One round of `protocol` over `vectors`, reproducible up to SEAL's own entropy.

    A client that raises ProtocolError stays silent and is noted in `refusals`; anything else that
    comes out of a client or of the server fails the test. `sent` and `received` are everything
    that crossed the server's wire. Where sites mask, the threshold is the least that holds against
    `tolerated` colluding sites, and the minimum is raised to what it asks for.
    """

    def __init__(
        self,
        protocol: str,
        vectors: Mapping[str, NDArray[np.float64]],
        encoding: FixedPoint,
        *,
        minimum: int = 2,
        tolerated: int = 0,
        weights: Mapping[str, int] | None = None,
        number: int = 1,
        also_pinned: tuple[str, ...] = (),
        openers: int = 1,
        reveal: Reveal = "server",
    ) -> None:
        self.protocol, self.encoding = PROTOCOLS[protocol], encoding
        self.vectors, self.weights = dict(vectors), weights
        self.length = len(next(iter(vectors.values())))
        self.identities = make_identities((*vectors, *also_pinned), stream("identities").bytes)
        self.roster = next(iter(self.identities.values())).roster
        self.tolerated, chosen, self.reveal = tolerated, Thresholds(minimum, 1), reveal
        if self.protocol.masked:
            chosen = thresholds(len(vectors), tolerated)
        m, t, k = max(minimum, chosen.minimum), chosen.threshold, chosen.degree
        cohort = tuple(sorted(vectors))
        self.begin = Begin(b"session of tests", number, cohort, m, t, bytes(32), k)
        self.drawn: list[bytes] = []
        self.random = {site: stream(f"{site} {number}") for site in self.identities}
        self.states: dict[str, Any] = {site: self.expected(site) for site in vectors}
        self.refusals: dict[str, ProtocolError] = {}
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        public = None if encoding.weight_slot else weights
        parts = (self.begin, self.roster, encoding, self.length)
        self.server: Any
        if reveal == "sites":
            assert self.protocol.blind_server is not None
            self.server = self.protocol.blind_server(*parts)
        elif openers > 1:
            self.server = self.protocol.server(*parts, public, openers)
        else:
            self.server = self.protocol.server(*parts, public)
        self.requests = self._sending(next(self.server))

    def _sending(self, requests: Requests) -> Requests:
        self.sent += requests.messages.values()
        return requests

    def expected(self, site: str, **changes: Any) -> Expected:
        """What `site` insists on."""
        values: dict[str, Any] = {
            "identity": self.identities[site],
            "session": self.begin.session,
            "round": self.begin.round,
            "binding": self.begin.binding,
            "minimum": 2,
            "encoding": self.encoding,
            "length": self.length,
            "tolerated": self.tolerated,
            "degree": self.begin.degree,
            "reveal": self.reveal,
            "weights": None if self.encoding.weight_slot else self.weights,
        }
        return Expected(**{**values, **changes})

    def entropy(self, site: str) -> Callable[[int], bytes]:
        """The randomness of `site`, every draw noted in `drawn`."""

        def draw(size: int) -> bytes:
            self.drawn.append(self.random[site].bytes(size))
            return self.drawn[-1]

        return draw

    def slots(self, site: str) -> list[NDArray[np.uint64]]:
        """The encoded vector of `site`: the same under every protocol."""
        weight = self.weights[site] if self.weights else 1
        rounding = stream(f"rounding of {site}")
        return list(self.encoding.encode(self.vectors[site], weight, rounding))

    def answer(self, site: str, phase: str, message: bytes) -> bytes:
        """The honest reply of `site`; ProtocolError where it refuses."""
        slots = self.slots(site) if phase == UPLOAD else None
        state, reply = self.protocol.step(
            phase, self.states[site], message, slots, self.entropy(site)
        )
        self.states[site] = state
        return reply

    def replies(self, relay: Relay | None = None, silent: frozenset[str] = frozenset()) -> Any:
        """What the sites answer to the pending requests."""
        phase, replies = self.requests.phase, {}
        for site, message in self.requests.messages.items():
            if site not in silent:
                try:
                    shown = relay(phase, site, message) if relay else message
                    replies[site] = self.answer(site, phase, shown)
                except ProtocolError as error:
                    self.refusals[site] = error
        return replies

    def send(self, replies: Mapping[str, bytes]) -> Any:
        """Give the server its replies; the Outcome (or Withheld) when the round is over."""
        self.received += replies.values()
        try:
            self.requests = self._sending(self.server.send(replies))
        except StopIteration as done:
            return done.value
        return None

    def until(self, phase: str) -> Requests:
        """Play honestly until the requests of `phase` are pending."""
        while self.requests.phase != phase:
            assert self.send(self.replies()) is None, f"the round ended before {phase}"
        return self.requests

    def play(
        self,
        vanish: Mapping[str, str] | None = None,
        relay: Relay | None = None,
        wire: Wire | None = None,
    ) -> Any:
        """Play to the end. `vanish` maps a site to the phase in which it falls silent for good."""
        gone: set[str] = set()
        while True:
            gone |= {s for s, phase in (vanish or {}).items() if phase == self.requests.phase}
            replies = self.replies(relay, frozenset(gone))
            outcome = self.send(wire(self.requests, replies) if wire else replies)
            if outcome is not None:
                return outcome

    def truth(self, contributors: tuple[str, ...]) -> NDArray[np.int64]:
        """The integer sum of the contributors' rounded vectors, without any protocol."""
        header = self.encoding.header_slots
        return sum(
            (
                self.encoding.unpack(np.concatenate(self.slots(site))[header:], self.length)
                for site in contributors
            ),
            np.zeros(self.length, np.int64),
        )

    def assert_right(self, outcome: Any, contributors: tuple[str, ...]) -> None:
        """The outcome's aggregate is the exact mean over exactly these contributors."""
        aggregate = outcome.aggregate
        assert aggregate.contributors == contributors
        assert aggregate.total_weight == sum((self.weights or {}).get(s, 1) for s in contributors)
        unit = (
            self.encoding.clip
            * self.encoding.weight_cap
            / (self.encoding.levels * aggregate.total_weight)
        )
        assert np.array_equal(aggregate.mean, self.truth(contributors) * unit)


@pytest.fixture(scope="session")
def table() -> type[Round]:
    """The class `Round`: shared here because test files are not importable from each other."""
    return Round


@pytest.fixture(scope="session")
def small() -> Callable[..., Round]:
    """A small round of sites a, b, c, ... with vectors of `length` values."""

    def make(protocol: str, sites: str = "abc", length: int = 9, **options: Any) -> Round:
        encoding = options.pop("encoding", None) or FixedPoint(
            bits=8, clip=1.0, cohort=len(sites), slot_bits=PROTOCOLS[protocol].slot_bits(len(sites))
        )
        vectors = {site: stream(f"vector of {site}").uniform(length) * 2.4 - 1.2 for site in sites}
        return Round(protocol, vectors, encoding, **options)

    return make
