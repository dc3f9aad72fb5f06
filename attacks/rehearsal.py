"""Rounds of a protocol with vectors of one's own choice, as the transcript of a run has them.

Real client steps and the real server's, message by message, and what each site drew and
contributed: worlds with a known answer for attacks on keys, masks and ciphertexts. Nothing is
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from attacks.view import Array, ColludingView, Contributed, Public, Recording, ServerView
from protocols.catalogue import PROTOCOLS, UPLOAD
from protocols.encoding import FixedPoint
from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed
from protocols.messages import Begin
from protocols.rounds import Expected, make_identities
from securefl import agreement, config, models
from securefl.messages import Answer, Request
from securefl.state import GlobalState
from securefl.transcript import Crossing, Drawn

Updates = Mapping[str, NDArray[np.float64]]
"""A round's updates by site, float64[d]."""

_EXPERIMENT: Final = """
name = "rehearsal"
rounds = {rounds}
[data]
source = "diabetes"
default_range = [-1.0, 1.0]
target_range = [0.0, 1.0]
[sites]
count = {sites}
[model]
name = "linear"
[protocol]
name = "{protocol}"
bits = 16
clip = 1.0
"""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rehearsal:
    """What came of it: what the server saw, and what every site recorded of itself."""

    view: ServerView
    recordings: Mapping[str, Recording] = field(repr=False)

    def colluding(self, sites: Sequence[str], with_server: bool = True) -> ColludingView:
        """`sites`, which hand over their recordings."""
        crossings = tuple(item for item in self.view.crossings if with_server or item.site in sites)
        recordings = tuple(self.recordings[site] for site in sites)
        return ColludingView(self.view.public, self.view.keys, crossings, recordings, with_server)

    def with_crossings(self, crossings: Sequence[Crossing]) -> Rehearsal:
        """The same where other messages crossed."""
        view = ServerView(self.view.public, self.view.keys, tuple(crossings))
        return replace(self, view=view)


def stream(seed: int, *about: str | int) -> Randomness:
    """Bytes that are the same for the same arguments."""
    material = digest("rehearsal", repr((seed, *about)).encode())
    return Keystream(Seed(material), "rehearsal").bytes


def gaussian_updates(
    seed: int, rounds: int, sites: int, length: int, deviation: float = 0.05
) -> tuple[Updates, ...]:
    """Independent normal updates: for each round, by site, float64[length]."""
    rng = np.random.default_rng(seed)
    return tuple(
        {f"site-{i}": rng.normal(0, deviation, length) for i in range(1, sites + 1)}
        for _ in range(rounds)
    )


def rehearse(
    protocol: str,
    updates: Sequence[Updates],
    seed: int,
    drawn: Callable[[int, str, int], Randomness] = stream,
) -> Rehearsal:
    """One round of `protocol` for each of `updates`, all of one length >= 2, by the same sites.

    drawn: (seed, site, round) -> what the site draws from.
    """
    sites, length = tuple(sorted(updates[0])), len(next(iter(updates[0].values())))
    text = _EXPERIMENT.format(protocol=protocol, rounds=len(updates), sites=len(sites))
    experiment = config.parse(text)
    public = Public(experiment.dump(), sites, (length - 1,), 1, "regression")
    layout = models.layout(public.module())
    if layout.size != length:
        raise ValueError(f"a linear model has {layout.size} weights, not {length}")
    chosen, how = agreement.thresholds(experiment, len(sites)), PROTOCOLS[protocol]
    encoding = agreement.encoding(experiment, len(sites), None)
    assert isinstance(encoding, FixedPoint)  # noqa: S101 - there is no privacy plan
    identities = make_identities(sites, stream(seed, "identities"))
    roster, session = identities[sites[0]].roster, stream(seed, "session")(16)
    crossings: list[Crossing] = []
    draws: dict[str, list[Drawn]] = {site: [] for site in sites}
    contributions: dict[str, list[Contributed]] = {site: [] for site in sites}
    weights = models.flatten(public.module())
    for number, vectors in enumerate(updates, start=1):
        state = GlobalState(number - 1, weights, np.ones(length, np.bool_))
        binding = agreement.binding(experiment, state, encoding)
        begin = Begin(
            session, number, sites, chosen.minimum, chosen.threshold, binding, chosen.degree
        )
        states: dict[str, Any] = {
            site: Expected(
                identities[site],
                session,
                number,
                binding,
                chosen.minimum,
                encoding,
                length,
                agreement.tolerated(experiment),
                chosen.degree,
            )
            for site in sites
        }
        sources = {site: drawn(seed, site, number) for site in sites}
        serving = how.server(begin, roster, encoding, length, None)
        requests = next(serving)
        first = requests.phase
        while True:
            replies = {}
            for site, body in requests.messages.items():
                model = state.to_message() if requests.phase == first else b""
                asked = Request(session, number, requests.phase, body, model).to_bytes()
                slots = None
                if requests.phase == UPLOAD:
                    rounding = Keystream(Seed(stream(seed, site, number, "r")(32)), "rounding")
                    slots = list(encoding.encode(vectors[site], 1, rounding))
                    whole = Array.of(np.concatenate(slots))
                    contributions[site].append(Contributed(number, number - 1, whole))
                recorded = _Recorded(sources[site])
                states[site], replies[site] = how.step(
                    requests.phase, states[site], body, slots, recorded
                )
                draws[site].append(Drawn(number, requests.phase, recorded.data))
                said = Answer(replies[site]).to_bytes()
                crossings += [
                    Crossing(number, requests.phase, site, "down", asked),
                    Crossing(number, requests.phase, site, "up", said),
                ]
            try:
                requests = serving.send(replies)
            except StopIteration:
                break
    recordings = {s: Recording(s, tuple(draws[s]), tuple(contributions[s])) for s in sites}
    return Rehearsal(ServerView(public, (dict(roster.keys),), tuple(crossings)), recordings)


class _Recorded:
    """Bytes from `source`, and which they were."""

    def __init__(self, source: Randomness) -> None:
        self._source = source
        self.data = b""

    def __call__(self, size: int) -> bytes:
        found = self._source(size)
        self.data += found
        return found
