"""What the servers and the first steps of all protocols share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.errors import ProtocolError, RefusedError, RoundAbortedError
from protocols.graph import Thresholds
from protocols.identity import Identity, Roster, SigningKey, digest
from protocols.keystream import Keystream, Randomness, Seed
from protocols.messages import Begin

T = TypeVar("T")
Slots = Iterable[NDArray[np.uint64]]
"""An encoded vector in chunks, as `FixedPoint.encode` gives it."""


class Requests(NamedTuple):
    """What a server's generator yields: one phase, and the message for each site in it."""

    phase: str
    messages: Mapping[str, bytes]


Replies = Mapping[str, bytes]
"""What it is sent back: the replies that came, by the site they came from."""

Reveal = Literal["server", "sites"]
"""Who learns the aggregate."""


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """An aggregate, and why each site that fell out of the round did."""

    aggregate: Aggregate
    faults: Mapping[str, str]


@final
@dataclass(frozen=True, slots=True)
class Withheld:
    """A round whose aggregate the server never saw, and why each site that fell out of it did.

    contributors: the sites in the aggregate. holders: the sites that hold one and the same
    aggregate, at least as many as the threshold.
    """

    contributors: tuple[str, ...]
    holders: tuple[str, ...]
    faults: Mapping[str, str]


Part = Generator[Requests, Replies, T]
"""Some phases of a server's round, to be delegated to with `yield from`."""

Steps = Mapping[str, Callable[..., tuple[Any, bytes]]]
"""A client's step for each phase: (state, message, [slots,] randomness) -> (state, reply)."""

ServerSide = Part[Outcome]
"""A server's whole round that ends with the aggregate."""

BlindServerSide = Part[Withheld]
"""A server's whole round under reveal = "sites"."""


@final
@dataclass(frozen=True, slots=True)
class Expected:
    """What a client insists on before it takes part in a round.

    binding: what it computed itself over the model it was shown and the parameters.
    minimum: the least cohort and the fewest contributions it accepts, >= 2.
    tolerated: T, how many sites may collude with the server without breaking masks.
    degree: k, the neighbours that the sites agreed on; 0 for the complete graph.
    reveal: "sites" to keep the sum that it opens instead of sending it.
    weights: the sites' weights where these are public constants; read under reveal = "sites".
    """

    identity: Identity
    session: bytes
    round: int
    binding: bytes
    minimum: int
    encoding: Encoding
    length: int
    tolerated: int = 0
    degree: int = 0
    reveal: Reveal = "server"
    weights: Mapping[str, int] | None = None

    def check(self, message: bytes) -> Begin:
        """The round that `message` begins; RefusedError when it is not what was expected."""
        begin = Begin.from_bytes(message)
        if (begin.session, begin.round) != (self.session, self.round):
            raise RefusedError(f"the server begins another round than {self.round}")
        if begin.binding != self.binding:
            raise RefusedError("the server binds the round to another model or other parameters")
        if begin.minimum < self.minimum:
            raise RefusedError(
                f"minimum cohort {begin.minimum} is below this site's {self.minimum}"
            )
        if begin.degree != self.degree:
            raise RefusedError(
                f"the server begins a round with {begin.degree or 'all'} neighbours a site, "
                f"{self.degree or 'all'} were agreed"
            )
        if self.identity.name not in begin.cohort:
            raise RefusedError(f"{self.identity.name} is not in the cohort")
        strangers = [site for site in begin.cohort if site not in self.identity.roster]
        if strangers:
            raise RefusedError(f"{strangers[0]} is in the cohort but not in the roster")
        if len(begin.cohort) > self.encoding.cohort:
            raise RefusedError(
                f"the cohort of {len(begin.cohort)} exceeds the {self.encoding.cohort} "
                "for which sums are proven exact"
            )
        return begin

    def check_contributors(self, begin: Begin, contributors: tuple[str, ...]) -> None:
        """RefusedError unless `contributors` are enough, and all of the cohort."""
        if len(contributors) < begin.minimum:
            raise RefusedError(f"a sum of {len(contributors)} is below the {begin.minimum} needed")
        if not set(contributors) <= set(begin.cohort):
            raise RefusedError("the sum counts sites outside the cohort")


@final
@dataclass(slots=True)
class Cohort:
    """A server's view of who is still in the round."""

    begin: Begin
    roster: Roster
    faults: dict[str, str] = field(default_factory=dict)
    context: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.context = self.begin.context

    def accept(
        self, requests: Requests, replies: Replies, parse: Callable[[str, bytes], T]
    ) -> dict[str, T]:
        """The replies that `parse(site, data)` accepts, in site order; the others become faults."""
        accepted: dict[str, T] = {}
        for site in sorted(requests.messages):
            if site not in replies:
                self.faults[site] = f"no reply in phase {requests.phase}"
                continue
            try:
                accepted[site] = parse(site, replies[site])
            except ProtocolError as error:
                self.faults[site] = f"{requests.phase}: {error}"
        for site in replies:
            if site not in requests.messages:
                self.faults[site] = f"replied in phase {requests.phase} without being asked"
        return accepted

    def require(self, count: int, what: str, least: int | None = None) -> None:
        """RoundAbortedError, with the faults so far, unless `count` reaches the minimum."""
        least = self.begin.minimum if least is None else least
        if count < least:
            reasons = "; ".join(f"{site}: {why}" for site, why in sorted(self.faults.items()))
            raise RoundAbortedError(
                f"round {self.begin.round}: {count} {what}, {least} needed"
                + (f" ({reasons})" if reasons else ""),
                self.faults,
            )

    def verify(self, phase: str, sender: str, site: str, signature: bytes, *said: bytes) -> None:
        """ProtocolError unless `site` itself is the `sender` and signed what it said."""
        if sender != site:
            raise ProtocolError(f"{site} sent a message in the name of {sender}", [site])
        self.roster.verify(site, signature, statement(self.context, phase, sender, *said))


def in_turn(sites: tuple[str, ...], round_number: int) -> tuple[str, ...]:
    """`sites` from another one on each round, so that no name decides who is asked first."""
    first = (round_number - 1) % len(sites)
    return sites[first:] + sites[:first]


def statement(context: bytes, phase: str, sender: str, *said: bytes) -> bytes:
    """What a site signs: (session, round) through `context`, phase, sender, and the content."""
    return digest("statement", context, phase.encode(), sender.encode(), *said)


def make_identities(names: Iterable[str], randomness: Randomness) -> dict[str, Identity]:
    """Fresh identities that pin each other: for simulations and tests."""
    keys = {name: SigningKey(randomness) for name in sorted(names)}
    roster = Roster({name: key.public for name, key in keys.items()})
    return {name: Identity(name, key, roster) for name, key in keys.items()}


def public_weight(weights: Mapping[str, int] | None, contributors: tuple[str, ...]) -> int | None:
    """The contributors' total weight where weights are public constants."""
    return None if weights is None else sum(weights[site] for site in contributors)


def majority(answers: Mapping[str, bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that more than half of all agree with, and the others; without a majority, nobody
    and everyone.

    >>> majority({"a": b"1", "b": b"1", "c": b"2"})
    (('a', 'b'), ('c',))
    >>> majority({"a": b"1", "b": b"2"})
    ((), ('a', 'b'))
    """
    [(answer, count)] = Counter(answers.values()).most_common(1)
    agreeing = tuple(sorted(s for s, said in answers.items() if said == answer))
    if 2 * count <= len(answers):
        agreeing = ()
    return agreeing, tuple(sorted(set(answers) - set(agreeing)))


@final
class Party:
    """Every client of one round in one process, for `run`, tests and demonstrations."""

    def __init__(
        self,
        vectors: Mapping[str, NDArray[np.floating]],
        encoding: FixedPoint,
        weights: Mapping[str, int] | None,
        randomness: Randomness,
        thresholds: Thresholds | None = None,
        tolerated: int = 0,
    ) -> None:
        self.identities = make_identities(vectors, randomness)
        self.roster = next(iter(self.identities.values())).roster
        m, t, k = dataclasses.astuple(thresholds or Thresholds(2, 1))
        self.begin = Begin(randomness(16), 1, tuple(sorted(vectors)), m, t, bytes(32), k)
        self.length = len(next(iter(vectors.values())))
        self._vectors, self._encoding, self._weights = vectors, encoding, weights
        self._randomness = randomness
        self._states: dict[str, Any] = {
            site: Expected(
                identity,
                self.begin.session,
                1,
                bytes(32),
                m,
                encoding,
                self.length,
                tolerated,
                k,
            )
            for site, identity in self.identities.items()
        }

    def slots(self, site: str) -> Slots:
        """The site's encoded vector."""
        rounding = Keystream(Seed.draw(self._randomness), "rounding")
        weight = self._weights[site] if self._weights else 1
        return self._encoding.encode(self._vectors[site], weight, rounding)

    def play(
        self,
        steps: Steps,
        server: Callable[..., ServerSide],
        dropouts: Mapping[str, str],
    ) -> Aggregate:
        """The whole round: every phase goes to every site that has not vanished by then."""
        weights = None if self._encoding.weight_slot else self._weights
        serving = server(self.begin, self.roster, self._encoding, self.length, weights)
        requests, gone = next(serving), set[str]()
        while True:
            gone |= {site for site, phase in dropouts.items() if phase == requests.phase}
            replies = {}
            for site, message in requests.messages.items():
                if site not in gone:
                    slots = (self.slots(site),) if requests.phase == "upload" else ()
                    step = steps[requests.phase]
                    self._states[site], replies[site] = step(
                        self._states[site], message, *slots, self._randomness
                    )
            try:
                requests = serving.send(replies)
            except StopIteration as done:
                outcome: Outcome = done.value
                return outcome.aggregate
