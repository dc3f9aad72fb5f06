"""Above 200 sites: neighbours on a ring, the same sums, and what a client insists on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols import masks, secagg
from protocols.catalogue import PROTOCOLS
from protocols.errors import ProtocolError, RefusedError
from protocols.graph import SPARSE_ABOVE, Graph, thresholds
from protocols.messages import (
    Confirmations,
    MaskAdvertisement,
    MaskAdvertisements,
    RelayedSecrets,
    ReleasedShares,
    SharedSecrets,
    Survivors,
)

Small = Callable[..., Any]
SITES = tuple(f"s{i:03}" for i in range(SPARSE_ABOVE + 3))
T = 3
CHOSEN = thresholds(len(SITES), T)


def changed(message: Any, **fields: Any) -> Any:
    """`message` with other fields."""
    return msgspec.structs.replace(message, **fields)


@pytest.mark.parametrize(("protocol", "seed"), [("secagg", 1), ("secagg", 2), ("masked-bfv", 3)])
def test_sums_over_neighbours_are_exact_whoever_vanishes(
    protocol: str, seed: int, small: Small
) -> None:
    """A third of the sites vanish, each in any phase: the integers are those of plain."""
    rng = random.Random(seed)
    game = small(protocol, SITES, length=5, tolerated=T)
    assert 0 < game.begin.degree < len(SITES) - 1
    lost = rng.sample(SITES[1:], len(SITES) - CHOSEN.minimum)  # the first makes the HE seed
    vanish = {site: rng.choice(PROTOCOLS[protocol].phases) for site in lost}
    outcome = game.play(vanish=vanish)
    early = {site for site, phase in vanish.items() if phase in ("advertise", "share", "upload")}
    game.assert_right(outcome, tuple(site for site in SITES if site not in early))
    assert not game.refusals


@pytest.fixture(scope="module")
def begun(small: Small) -> Any:
    """A round in which everyone has advertised."""
    game = small("secagg", SITES, length=5, tolerated=T)
    game.until("share")
    return game


def neighbours(game: Any, site: str) -> tuple[str, ...]:
    """The neighbours of `site`."""
    items = MaskAdvertisements.from_bytes(game.requests.messages[site]).items
    return secagg.graph(game.begin, {a.sender: a for a in items}).neighbours(site)


@pytest.mark.parametrize(
    ("sites", "tolerated", "degree", "threshold"),
    [
        (SITES[:SPARSE_ABOVE], T, CHOSEN.degree, CHOSEN.threshold),
        (SITES, T, CHOSEN.degree - 2, CHOSEN.threshold),
        (SITES, T, 2, 2),
        (SITES, T, CHOSEN.degree, 3),
        (SITES, 60, CHOSEN.degree, CHOSEN.threshold),
    ],
)
def test_a_client_refuses_a_ring_that_is_not_safe_for_its_own_t(
    sites: tuple[str, ...], tolerated: int, degree: int, threshold: int, small: Small
) -> None:
    """Whatever the server proposes: 200 sites or fewer, too few neighbours, too low a threshold."""
    game = small("secagg", sites, tolerated=T)
    begin = changed(game.begin, degree=degree, threshold=threshold, minimum=CHOSEN.minimum)
    expected = game.expected(sites[0], tolerated=tolerated, degree=degree)
    with pytest.raises(RefusedError, match=r"neighbours|share with all others"):
        secagg.client_step1(expected, begin.to_bytes(), game.entropy(sites[0]))


def test_the_graph_that_was_agreed_is_accepted_and_no_other(small: Small) -> None:
    """The ring where it was agreed, the complete graph where that was: the server cannot choose."""
    game = small("secagg", SITES, tolerated=T)
    m, t, _ = dataclasses.astuple(thresholds(len(SITES), T, complete=True))
    complete = changed(game.begin, minimum=m, threshold=t, degree=0)
    for begin in (game.begin, complete):
        for agreed in (game.begin.degree, 0):
            expected, randomness = game.expected("s000", degree=agreed), game.entropy("s000")
            if begin.degree == agreed:
                secagg.client_step1(expected, begin.to_bytes(), randomness)
                continue
            with pytest.raises(RefusedError, match="were agreed"):
                secagg.client_step1(expected, begin.to_bytes(), randomness)


def test_shares_go_to_neighbours_only_and_the_ring_depends_on_every_key(begun: Any) -> None:
    """One advertisement more or another key, and the neighbours are others."""
    message = begun.requests.messages["s007"]
    items = MaskAdvertisements.from_bytes(message).items
    near = neighbours(begun, "s007")
    assert len(near) == begun.begin.degree
    said = SharedSecrets.from_bytes(
        secagg.client_step2(begun.states["s007"], message, begun.entropy("s007"))[1]
    )
    assert tuple(box.receiver for box in said.shares) == near
    adverts = {a.sender: a for a in items}
    for field in ("channel", "mask", "commitment"):
        others = adverts | {"s100": changed(adverts["s100"], **{field: bytes(32)})}
        assert secagg.graph(begun.begin, others).neighbours("s007") != near
    later = changed(begun.begin, round=2)
    assert secagg.graph(later, adverts).neighbours("s007") != near


def test_a_client_checks_the_keys_of_its_neighbours(begun: Any) -> None:
    """An unsigned key of a neighbour is refused, whoever it is."""
    items = MaskAdvertisements.from_bytes(begun.requests.messages["s007"]).items
    near = neighbours(begun, "s007")

    def with_signature(site: str) -> bytes:
        signed = tuple(changed(a, signature=bytes(64)) if a.sender == site else a for a in items)
        return MaskAdvertisements(signed).to_bytes()

    for site in near[:5]:
        with pytest.raises(ProtocolError, match=f"signature of {site}"):
            secagg.client_step2(begun.states["s007"], with_signature(site), begun.entropy("s007"))


def test_a_maker_checks_the_keys_of_everyone(small: Small) -> None:
    """It seals the HE seed for all of them, neighbours or not."""
    game = small("masked-bfv", SITES, length=5, tolerated=T)
    message = game.until("share").messages["s000"]
    items = MaskAdvertisements.from_bytes(message).items
    far = next(s for s in SITES[1:] if s not in neighbours(game, "s000"))
    forged = tuple(changed(a, signature=bytes(64)) if a.sender == far else a for a in items)
    with pytest.raises(ProtocolError, match=f"signature of {far}"):
        game.answer("s000", "share", MaskAdvertisements(forged).to_bytes())


def test_a_client_far_into_the_round(small: Small) -> None:
    """Boxes of exactly its neighbours in U2; t confirmations of neighbours; their shares alone."""
    game = small("secagg", SITES, length=5, tolerated=T)
    game.until("share")
    near = neighbours(game, "s007")
    game.until("upload")
    relayed = RelayedSecrets.from_bytes(game.requests.messages["s007"])
    gone = near[3]
    for wrong in (
        changed(relayed, shares=relayed.shares[1:]),
        changed(relayed, members=tuple(s for s in SITES if s != gone)),
        changed(relayed, members=SITES[: CHOSEN.minimum - 1]),
    ):
        with pytest.raises(RefusedError):
            game.answer("s007", "upload", wrong.to_bytes())
    replies = game.replies()
    far = next(s for s in SITES if s != "s007" and s not in near)
    for site in (gone, far):
        del replies[site]
    game.send(replies)
    survivors = Survivors.from_bytes(game.requests.messages["s007"]).sites
    assert set(SITES) - set(survivors) == {gone, far}
    game.send(game.replies())
    confirmations = game.requests.messages["s007"]
    signed = Confirmations.from_bytes(confirmations).items
    nearby = [item for item in signed if item.sender in {"s007", *near}]
    few = Confirmations(tuple(i for i in signed if i not in nearby[CHOSEN.threshold - 1 :]))
    with pytest.raises(RefusedError, match="confirmed the sum"):
        game.answer("s007", "unmask", few.to_bytes())
    said = ReleasedShares.from_bytes(game.answer("s007", "unmask", confirmations))
    assert {s.owner for s in said.own} == {"s007", *near} - {gone}
    assert [s.owner for s in said.mask] == [gone]


def test_a_share_of_a_stranger_costs_the_site_its_place(small: Small) -> None:
    """The server takes shares of the sender's neighbours only."""
    game = small("secagg", SITES, length=5, tolerated=T)
    game.until("share")
    near = neighbours(game, "s007")
    far = next(s for s in SITES if s != "s007" and s not in near)
    game.until("unmask")
    replies = game.replies()
    said = ReleasedShares.from_bytes(replies["s007"])
    own = tuple(changed(s, owner=far) if s.owner == near[0] else s for s in said.own)
    own = tuple(sorted(own, key=lambda item: item.owner))
    forged = changed(said, own=own)
    about = secagg._released(forged.own, forged.mask)
    text = secagg.statement(game.begin.context, "unmask", "s007", about)
    signed = changed(forged, signature=game.identities["s007"].key.sign(text))
    outcome = game.send({**replies, "s007": signed.to_bytes()})
    assert set(outcome.faults) == {"s007"}
    game.assert_right(outcome, SITES)


def test_masks_lie_between_neighbours_alone(small: Small) -> None:
    """A site's upload is its vector, its own mask, and one of each neighbour in U2."""
    game = small("secagg", SITES, length=5, tolerated=T)
    game.until("upload")
    state = game.states["s007"]
    adverts: dict[str, MaskAdvertisement] = dict(state.adverts)
    context = secagg.mask_context(game.begin, adverts)
    near = Graph(adverts, 0, b"").neighbours("s007")
    assert set(state.peers) < set(near)
    terms = [masks.own(state.secrets.seed, "s007", context)]
    terms += [state.secrets.mask.pair("s007", s, adverts[s].mask, context) for s in state.peers]
    bits = game.encoding.plain_bits
    [expected] = masks.add([np.concatenate(game.slots("s007"))], terms, bits)
    payload = secagg.Upload.from_bytes(
        game.answer("s007", "upload", game.requests.messages["s007"])
    ).payload
    assert payload == secagg.pack(expected, bits).tobytes()
