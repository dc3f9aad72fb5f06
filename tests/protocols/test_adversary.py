"""Attacks that succeed: what an adversary gets where the threat model makes no promise, or should.

A test here that passes shows a stated limit; one marked xfail shows a limit that is not stated, or
a rule that is not enforced, and turns red on the day it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols import masks, secagg, shamir
from protocols.bitpacking import unpack
from protocols.graph import SPARSE_ABOVE, Graph, Thresholds, insecurity
from protocols.keystream import Seed
from protocols.messages import (
    Confirmation,
    Confirmations,
    ReleasedShares,
    Survivors,
    Upload,
)
from protocols.shamir import Share

Small = Callable[..., Any]
SITES = tuple(f"s{i:03}" for i in range(SPARSE_ABOVE + 3))
T = 3


def peeled(game: Any, victim: str) -> np.ndarray[Any, Any]:
    """The victim's slots, by a server with nobody on its side that shows two halves two U3s."""
    uploads = game.replies()
    adverts = game.states[victim].shared.adverts
    ring = secagg.graph(game.begin, adverts)._ring
    at = ring.index(victim)
    left = [ring[(at - step) % len(ring)] for step in range(game.begin.degree + 1)]
    right = [ring[(at + step) % len(ring)] for step in range(1, game.begin.degree + 1)]
    rebuilt = []
    for group, survivors, kind in (
        (left, SITES, "own"),
        (right, tuple(s for s in SITES if s != victim), "mask"),
    ):
        shown = Survivors(survivors).to_bytes()
        signed = {s: Confirmation.from_bytes(game.answer(s, "confirm", shown)) for s in group}
        quorum = Confirmations(tuple(signed[s] for s in sorted(group))).to_bytes()
        shares: dict[int, Share] = {}
        for site in set(group) & {victim, *Graph.neighbours(secagg.graph(game.begin, adverts), victim)}:
            said = ReleasedShares.from_bytes(game.answer(site, "unmask", quorum))
            for item in getattr(said, kind):
                if item.owner == victim:
                    shares[game.begin.cohort.index(site) + 1] = Share.parse(item.share)
        points = sorted(shares)[: game.begin.threshold]
        rebuilt.append(shamir.combine({x: shares[x] for x in points}))
    seed, secret = rebuilt
    context = secagg.mask_context(game.begin, adverts)
    key = masks.MaskKey(secret)
    assert key.public == adverts[victim].mask
    terms = [masks.own(seed, victim, context)]
    near = secagg.graph(game.begin, adverts).neighbours(victim)
    terms += [key.pair(victim, peer, adverts[peer].mask, context) for peer in near]
    bits, count = game.encoding.plain_bits, game.encoding.slots(game.length)
    payload = np.frombuffer(Upload.from_bytes(uploads[victim]).payload, np.uint8)
    left_over = unpack(payload, count, bits) - masks.total(terms, count, bits)
    return left_over & np.uint64((1 << bits) - 1)


def test_on_a_ring_an_active_server_alone_reads_one_update(small: Small) -> None:
    """Two lists of survivors, one for each side of the victim: t signatures are found for both.

    That is why only the complete graph is claimed against an active server.
    """
    n, degree, threshold = len(SITES), 2 * (T + 2), T + 1
    assert insecurity(n, T, Thresholds(n - 1, threshold, degree)) == 0.0
    game = small("secagg", SITES, length=5, tolerated=T)
    game.begin = msgspec.structs.replace(
        game.begin, minimum=n - 1, threshold=threshold, degree=degree
    )
    encoding, length = game.encoding, game.length
    game.server = secagg.server(game.begin, game.roster, encoding, length)
    game.requests = next(game.server)
    game.until("upload")
    assert np.array_equal(peeled(game, "s100"), np.concatenate(game.slots("s100")))
