"""Attacks that succeed: what an adversary gets where the threat model makes no promise, or should.

What passes here shows a limit that docs/threat-model.md states, or that an attack which once
succeeded is stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from protocols import masks, secagg, shamir
from protocols.bitpacking import pack, unpack
from protocols.encoding import _pack
from protocols.errors import RoundAbortedError
from protocols.graph import INSECURE, SPARSE_ABOVE, Thresholds, insecurity, thresholds
from protocols.messages import (
    Confirmation,
    Confirmations,
    MaskAdvertisement,
    OpenedSum,
    ReleasedShares,
    SealedShares,
    SharedSecrets,
    Survivors,
    Upload,
)
from protocols.rounds import statement
from protocols.sealing import seal_shares
from protocols.shamir import Share

Small = Callable[..., Any]
SITES = tuple(f"s{i:03}" for i in range(SPARSE_ABOVE + 3))
T = 3


def peeled(game: Any, victim: str) -> NDArray[np.uint64]:
    """The victim's slots, by a server with nobody on its side that shows two halves two U3s."""
    uploads = game.replies()
    adverts = game.states[victim].shared.adverts
    graph = secagg.graph(game.begin, adverts)
    ring, near = graph._ring, {victim, *graph.neighbours(victim)}
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
        for site in near.intersection(group):
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
    peers = near - {victim}
    terms += [key.pair(victim, peer, adverts[peer].mask, context) for peer in peers]
    bits, count = game.encoding.plain_bits, game.encoding.slots(game.length)
    payload = np.frombuffer(Upload.from_bytes(uploads[victim]).payload, np.uint8)
    left_over = unpack(payload, count, bits) - masks.total(terms, count, bits)
    return left_over & np.uint64((1 << bits) - 1)


@pytest.mark.parametrize(
    "chosen", [thresholds(len(SITES), T), Thresholds(len(SITES) - 1, T + 1, 2 * (T + 2))]
)
def test_on_a_ring_an_active_server_alone_reads_one_update(
    chosen: Thresholds, small: Small
) -> None:
    """Two lists of survivors, one for each side of the victim: t signatures are found for both.

    That is why only the complete graph is claimed against an active server.
    """
    assert insecurity(len(SITES), T, chosen) <= INSECURE  # so that honest clients take part
    game = small("secagg", SITES, length=5, tolerated=T)
    game.begin = msgspec.structs.replace(
        game.begin,
        minimum=chosen.minimum,
        threshold=chosen.threshold,
        degree=chosen.degree,
    )
    game.states = {site: game.expected(site) for site in SITES}  # they agreed on this ring
    encoding, length = game.encoding, game.length
    game.server = secagg.server(game.begin, game.roster, encoding, length)
    game.requests = next(game.server)
    game.until("upload")
    assert np.array_equal(peeled(game, "s100"), np.concatenate(game.slots("s100")))


SIXTEEN = tuple("abcdefghijklmnop")


def signed(game: Any, site: str, phase: str, *said: bytes) -> bytes:
    """The signature of a malicious site under what it likes."""
    text = statement(game.begin.context, phase, site, *said)
    signature: bytes = game.identities[site].key.sign(text)
    return signature


def released(game: Any, site: str, reply: bytes) -> bytes:
    """The site's shares, each of them wrong."""
    said = ReleasedShares.from_bytes(reply)
    own, lost = (
        tuple(msgspec.structs.replace(item, share=bytes(33)) for item in items)
        for items in (said.own, said.mask)
    )
    signature = signed(game, site, "unmask", secagg._released(own, lost))
    return ReleasedShares(site, own, lost, signature).to_bytes()


def test_any_two_liars_of_sixteen_are_worked_around(small: Small) -> None:
    """T = 2, so ten of sixteen shares recover a secret, and fourteen right ones are there."""
    game = small("secagg", SIXTEEN, length=2, tolerated=2)
    game.until("unmask")
    replies = game.replies()
    for liar in "ai":
        replies[liar] = released(game, liar, replies[liar])
    game.assert_right(game.send(replies), SIXTEEN)


def test_a_liar_about_shares_is_named_although_the_sum_comes_out(small: Small) -> None:
    """Who dealt a share said which one it is, so a wrong one is known at once."""
    game = small("secagg", SIXTEEN, length=2, tolerated=2)
    game.until("unmask")
    replies = game.replies()
    replies["a"] = released(game, "a", replies["a"])
    assert set(game.send(replies).faults) == {"a"}


def test_a_site_that_deals_shares_of_nothing_is_named_alone(small: Small) -> None:
    """Its boxes open and its shares fit no secret: at unmask, after everyone paid for an upload."""
    game = small("secagg", SIXTEEN, length=2, tolerated=2)
    game.until("share")
    replies, state = game.replies(), game.states["c"]
    mine, boxes = state.adverts["c"], []
    for i, peer in enumerate(state.peers):
        context = secagg._box_context(game.begin.context, mine, state.adverts[peer])
        to = peer, state.adverts[peer].channel
        shares = Share(i), Share(i)
        box = seal_shares(shares, state.secrets.channel, to, context, game.entropy("c"))
        names = secagg._ids(game.begin.context, "c", peer, shares)
        boxes.append(SealedShares("c", peer, box, *names))
    dealt = tuple(boxes)
    kept = SharedSecrets.from_bytes(replies["c"]).kept
    signature = signed(game, "c", "share", secagg._sealed(dealt, kept))
    game.send({**replies, "c": SharedSecrets(dealt, kept, (), signature).to_bytes()})
    with pytest.raises(RoundAbortedError) as caught:
        game.play()
    assert caught.value.culprits == ("c",)


def test_a_fault_holds_no_escape_and_no_flood_of_the_peer(small: Small) -> None:
    """What a site sends is shown to whoever runs the server, in a terminal and in a report."""
    game = small("secagg", "abcde")
    replies = game.replies()
    advert = MaskAdvertisement.from_bytes(replies["b"])
    fields = [getattr(advert, name) for name in advert.__struct_fields__]
    message = msgspec.msgpack.encode(["\x1b]0;you were here\a" + "!" * 5000, *fields])
    outcome = game.send({**replies, "b": message}) or game.play()
    assert outcome.faults["b"].isprintable()
    assert len(outcome.faults["b"]) < 1000


@pytest.mark.parametrize("protocol", ["plain", "bfv", "ckks", "secagg", "masked-bfv"])
def test_a_malicious_site_is_not_bounded_by_the_clip(protocol: str, small: Small) -> None:
    """Fields of a slot are as wide as the sum: one site moves the mean by more than the clip."""
    game = small(protocol, "abcde", length=4)
    encoding, honest = game.encoding, game.slots
    levels, count = encoding.levels, len("abcde")
    worst = np.full(4, count * levels - 2 * levels, np.int64)

    def slots(site: str) -> list[NDArray[np.uint64]]:
        if site != "c":
            return list(honest(site))
        header = np.ones(encoding.header_slots, np.uint64)
        return [np.concatenate([header, _pack(worst, encoding.field_bits, encoding.fields)])]

    before = (game.truth(tuple("abde")) / levels / count).round(9)
    game.slots = slots
    moved = game.play().aggregate.mean - before
    assert (moved > encoding.clip / count * 2.9).all()


def test_an_opener_alone_announces_any_sum_it_likes(small: Small) -> None:
    """Another site each round is asked; `openers` = 2 makes two of them agree."""
    game = small("masked-bfv", "abcde", length=4, tolerated=1)
    encoding = game.encoding
    game.until("open")
    assert list(game.requests.messages) == ["a"]
    values = np.full(4, 5 * encoding.levels, np.int64)
    slots = np.concatenate(
        [np.array([5], np.uint64), _pack(values, encoding.field_bits, encoding.fields)]
    )
    payload = pack(slots, encoding.plain_bits).tobytes()
    reply = OpenedSum("a", payload, signed(game, "a", "open", payload)).to_bytes()
    outcome = game.send({"a": reply})
    assert not outcome.faults
    assert np.array_equal(outcome.aggregate.mean, np.full(4, encoding.clip))
