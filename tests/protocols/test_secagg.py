"""Masks among sites: each rule that keeps an update secret, and the sum right or not at all.

What secagg and masked-bfv share is tested under both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from protocols import masks, secagg
from protocols.bitpacking import unpack
from protocols.encoding import FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError, RefusedError, RoundAbortedError
from protocols.identity import digest
from protocols.keystream import Keystream, Seed
from protocols.messages import (
    Begin,
    Confirmation,
    Confirmations,
    MaskAdvertisement,
    MaskAdvertisements,
    RelayedSecrets,
    ReleasedShare,
    ReleasedShares,
    SealedShares,
    SharedSecrets,
    Survivors,
    Upload,
)
from protocols.rounds import statement
from protocols.sealing import ChannelKey, unseal, unseal_shares
from protocols.shamir import Share, combine

Small = Callable[..., Any]
PROTOCOLS = ("secagg", "masked-bfv")
both = pytest.mark.parametrize("protocol", PROTOCOLS)


def changed(message: Any, **fields: Any) -> Any:
    """`message` with other fields."""
    return msgspec.structs.replace(message, **fields)


def signed(game: Any, site: str, phase: str, *said: bytes) -> bytes:
    """A signature that `site` really made in this round."""
    signature: bytes = game.identities[site].key.sign(
        statement(game.begin.context, phase, site, *said)
    )
    return signature


def readvertised(game: Any, advert: MaskAdvertisement, **fields: Any) -> MaskAdvertisement:
    """An advertisement with other keys, signed again by its sender."""
    item = changed(advert, **fields)
    said = (item.channel, item.mask, item.commitment)
    return changed(item, signature=signed(game, item.sender, "advertise", *said))


def adverts_of(game: Any, site: str = "a") -> tuple[MaskAdvertisement, ...]:
    """The honest request of phase share."""
    return MaskAdvertisements.from_bytes(game.until("share").messages[site]).items


def by(items: tuple[MaskAdvertisement, ...], **exchanged: MaskAdvertisement) -> bytes:
    """The advertisements with those of some sites exchanged."""
    return MaskAdvertisements(tuple(exchanged.get(i.sender, i) for i in items)).to_bytes()


def quorum(game: Any, signers: str, survivors: str) -> Confirmations:
    """Confirmations that these sites really would sign for U3."""
    said = [digest("survivors", *(site.encode() for site in survivors))]
    return Confirmations(
        tuple(Confirmation(site, signed(game, site, "confirm", *said)) for site in signers)
    )


def refuses(game: Any, site: str, phase: str, message: bytes) -> bool:
    """Whether `site` answers with a ProtocolError, and nothing else."""
    try:
        game.answer(site, phase, message)
    except ProtocolError:
        return True
    return False


def secrets_of(state: Any) -> Any:
    """The secrets that a client's state holds, in whichever phase it is."""
    for name in ("masked", "uploaded", "shared", "secrets"):
        state = getattr(state, name, state)
    return state


# Thresholds: every client enforces them


def test_a_client_takes_part_exactly_where_the_thresholds_hold(small: Small) -> None:
    """2t > n + T and m >= max(t, T + 2), for every n, t, m and T up to seven sites."""
    accepted = 0
    for n in range(2, 8):
        sites = "abcdefg"[:n]
        game = small("secagg", sites)
        for t, m, tolerated in itertools.product(range(1, n + 1), range(2, n + 1), range(n + 1)):
            begin = Begin(game.begin.session, 1, tuple(sites), m, t, bytes(32)).to_bytes()
            expected = game.expected("a", tolerated=tolerated)
            if 2 * t > n + tolerated and m >= max(t, tolerated + 2):
                secagg.client_step1(expected, begin, game.entropy("a"))
                accepted += 1
            else:
                with pytest.raises(RefusedError, match=r"threshold|minimum"):
                    secagg.client_step1(expected, begin, game.entropy("a"))
    assert accepted > 50


@pytest.mark.parametrize("n", range(2, 60))
def test_the_least_threshold_is_the_least(n: int) -> None:
    """2t > n + T holds at t and not at t - 1; t > n/2 follows."""
    for tolerated in range(n):
        t = secagg.least_threshold(n, tolerated)
        assert 2 * t > n + tolerated >= 2 * (t - 1)
        assert t > n / 2


@both
def test_a_site_that_tolerates_more_refuses_what_others_accept(protocol: str, small: Small) -> None:
    """T is each site's own: the server cannot talk it down."""
    game = small(protocol, "abcde")
    with pytest.raises(RefusedError, match="2t > n"):
        game.protocol.step(
            "advertise",
            game.expected("a", tolerated=2),
            game.begin.to_bytes(),
            None,
            game.entropy("a"),
        )


@both
@pytest.mark.parametrize("phase", ["advertise", "share", "upload", "confirm", "unmask"])
def test_below_the_threshold_an_abort_in_every_phase(
    protocol: str, phase: str, small: Small
) -> None:
    """Five sites, three needed: two left in any phase is no round; three left is one."""
    game = small(protocol, "abcde")
    with pytest.raises(RoundAbortedError, match="3 needed") as caught:
        game.play(vanish=dict.fromkeys("cde", phase))
    assert caught.value.culprits == ("c", "d", "e")
    game = small(protocol, "abcde")
    outcome = game.play(vanish=dict.fromkeys("de", phase))
    in_time = phase in ("confirm", "unmask")
    game.assert_right(outcome, tuple("abcde" if in_time else "abc"))
    assert set(outcome.faults) == {"d", "e"}


# Phase share: whom a client gives its shares to


@both
@pytest.mark.parametrize("field", ["channel", "mask", "commitment"])
@pytest.mark.parametrize("site", ["b", "c"])
def test_a_client_refuses_what_a_peer_did_not_sign(
    protocol: str, field: str, site: str, small: Small
) -> None:
    """A server's own keys in place of a peer's: named, and not a share is made."""
    game = small(protocol)
    items = adverts_of(game)
    drawn = len(game.drawn)
    wrong = {i.sender: changed(i, **{field: b"\x07" * 32}) for i in items if i.sender == site}
    with pytest.raises(ProtocolError) as caught:
        game.answer("a", "share", by(items, **wrong))
    assert caught.value.culprits == (site,)
    assert len(game.drawn) == drawn


@both
@pytest.mark.parametrize("field", ["channel", "mask"])
def test_a_client_refuses_other_keys_under_its_own_name(
    protocol: str, field: str, small: Small
) -> None:
    """Though correctly signed: they are not what this client just offered."""
    game = small(protocol)
    items = adverts_of(game)
    with pytest.raises(RefusedError, match="other keys for a"):
        game.answer("a", "share", by(items, a=readvertised(game, items[0], **{field: b"\7" * 32})))
    with pytest.raises(RefusedError, match="other keys for a"):
        game.answer("a", "share", MaskAdvertisements(items[1:]).to_bytes())


@both
def test_a_client_refuses_advertisements_of_another_round(protocol: str, small: Small) -> None:
    """Session and round are in the signature."""
    earlier = adverts_of(small(protocol, number=1))
    game = small(protocol, number=2)
    with pytest.raises(ProtocolError) as caught:
        game.answer("a", "share", by(adverts_of(game), b=earlier[1]))
    assert caught.value.culprits == ("b",)


@both
def test_a_client_refuses_a_small_u1_and_strangers(protocol: str, small: Small) -> None:
    """U1 has the minimum, and is inside the cohort: pinned in the roster is not enough."""
    game = small(protocol, "abcde", also_pinned=("pinned",))
    items = adverts_of(game)
    with pytest.raises(RefusedError, match="below the 3"):
        game.answer("a", "share", MaskAdvertisements(items[:2]).to_bytes())
    pinned = readvertised(game, items[1], sender="pinned")
    with pytest.raises(RefusedError, match="outside the cohort"):
        game.answer("a", "share", MaskAdvertisements((*items, pinned)).to_bytes())
    game.answer("a", "share", MaskAdvertisements(items[:3]).to_bytes())


@both
@pytest.mark.parametrize("field", ["channel", "mask"])
def test_unusable_keys_are_refused_by_clients_and_by_the_server(
    protocol: str, field: str, small: Small
) -> None:
    """A signed X25519 key of low order: its sender is named, and the round goes on."""
    game = small(protocol)
    items = adverts_of(game)
    weak = readvertised(game, items[1], **{field: bytes(32)})
    with pytest.raises(ProtocolError) as caught:
        game.answer("a", "share", by(items, b=weak))
    assert caught.value.culprits == ("b",)
    game = small(protocol)

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == "advertise":
            honest = MaskAdvertisement.from_bytes(replies["b"])
            replies["b"] = readvertised(game, honest, **{field: bytes(32)}).to_bytes()
        return replies

    outcome = game.play(wire=wire)
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


# Phase upload: under which masks a client puts its vector


def relayed_to(game: Any, site: str) -> RelayedSecrets:
    """The honest request of phase upload."""
    return RelayedSecrets.from_bytes(game.until("upload").messages[site])


@both
def test_a_client_refuses_a_small_u2_and_boxes_that_are_not_from_u1(
    protocol: str, small: Small
) -> None:
    """U2 has the minimum, lies inside U1, and every box is for this site."""
    game = small(protocol, "abcde")

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == "advertise":
            del replies["e"]
        return replies

    while game.requests.phase != "upload":
        game.send(wire(game.requests, game.replies()))
    said = RelayedSecrets.from_bytes(game.requests.messages["b"])
    first, *rest = said.shares
    wrong = {
        "below the 3": said.shares[:1],
        "not sealed for b": (changed(first, receiver="c"), *rest),
        "have not advertised": (*said.shares, changed(first, sender="e")),
    }
    for why, shares in wrong.items():
        members = tuple(sorted({"b", *(item.sender for item in shares)}))
        with pytest.raises(RefusedError, match=why):
            game.answer("b", "upload", changed(said, members=members, shares=shares).to_bytes())
    own = sorted((*said.shares, changed(first, sender="b")), key=lambda item: item.sender)
    for shares, members in (
        (tuple(own), said.members),
        (said.shares[1:], said.members),
        (said.shares, said.members[:-1]),
        (said.shares[1:], tuple(sorted({*said.members} - {"b"}))),
    ):
        with pytest.raises(RefusedError):
            game.answer("b", "upload", changed(said, members=members, shares=shares).to_bytes())
    game.answer("b", "upload", said.to_bytes())


@both
def test_a_client_uploads_once(protocol: str, small: Small) -> None:
    """A noised vector enters one upload only: no second answer, with whatever U2."""
    game = small(protocol, "abcde")
    said = relayed_to(game, "b")
    game.answer("b", "upload", said.to_bytes())
    for shares in (said.shares, said.shares[:-1]):
        with pytest.raises(RefusedError):
            game.answer("b", "upload", changed(said, shares=shares).to_bytes())


def test_secagg_takes_no_he_seed(small: Small) -> None:
    """A seed that the protocol does not have is refused, by clients and by the server."""
    other = small("masked-bfv")
    seeds = relayed_to(other, "b").seeds
    game = small("secagg")
    said = relayed_to(game, "b")
    with pytest.raises(RefusedError, match="no HE seed"):
        game.answer("b", "upload", changed(said, seeds=seeds).to_bytes())


# Phase confirm: what a client signs


@both
def test_a_client_signs_only_a_u3_that_is_large_and_inside_u2_and_has_it(
    protocol: str, small: Small
) -> None:
    """Exhaustively over the subsets of five sites of which d has advertised and not shared."""
    game = small(protocol, "abcde")

    def without_d(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        return {s: r for s, r in replies.items() if requests.phase != "share" or s != "d"}

    while game.requests.phase != "confirm":
        game.send(without_d(game.requests, game.replies()))
    state = game.states["a"]
    for size in range(2, 6):
        for sites in itertools.combinations("abcde", size):
            message = Survivors(sites).to_bytes()
            game.states["a"] = state
            if size >= 3 and "a" in sites and "d" not in sites:
                game.answer("a", "confirm", message)
            else:
                with pytest.raises(RefusedError):
                    game.answer("a", "confirm", message)
    for sites in (("a", "b", "x"), ("a", "b", "c", "x")):
        game.states["a"] = state
        with pytest.raises(RefusedError, match="have not shared"):
            game.answer("a", "confirm", Survivors(sites).to_bytes())


@both
def test_a_client_signs_one_u3(protocol: str, small: Small) -> None:
    """Neither another U3 nor the same one again."""
    game = small(protocol, "abcde")
    game.until("confirm")
    game.answer("a", "confirm", Survivors(tuple("abcde")).to_bytes())
    for sites in ("abcde", "abcd", "abc"):
        with pytest.raises(RefusedError, match="does not come now"):
            game.answer("a", "confirm", Survivors(tuple(sites)).to_bytes())


# Phase unmask: when a share leaves, and which


@both
def test_no_share_leaves_without_a_quorum_under_this_very_u3(protocol: str, small: Small) -> None:
    """t signatures, by sites in U3, under the U3 that this site signed, of this round and phase."""
    game = small(protocol, "abcde", also_pinned=("pinned",))
    game.until("confirm")
    game.answer("a", "confirm", Survivors(tuple("abcd")).to_bytes())
    good = quorum(game, "abc", "abcd")
    other_phase = Confirmation(
        "c", signed(game, "c", "unmask", digest("survivors", *(s.encode() for s in "abcd")))
    )
    in_its_name = Confirmation("c", good.items[1].signature)
    refused = {
        "too few": quorum(game, "ab", "abcd"),
        "one alone": quorum(game, "a", "abcd"),
        "another U3": quorum(game, "abc", "abc"),
        "a larger U3": quorum(game, "abc", "abcde"),
        "one of another U3": Confirmations((*good.items[:2], quorum(game, "c", "abc").items[0])),
        "outside U3": quorum(game, "abe", "abcd"),
        "three and one outside U3": quorum(game, "abce", "abcd"),
        "outside the cohort": Confirmations(
            (*good.items[:2], *quorum(game, ["pinned"], "abcd").items)  # type: ignore[arg-type]
        ),
        "another phase": Confirmations((*good.items[:2], other_phase)),
        "another's signature": Confirmations((*good.items[:2], in_its_name)),
        "no signature": Confirmations((*good.items[:2], Confirmation("c", bytes(64)))),
    }
    for what, confirmations in refused.items():
        assert refuses(game, "a", "unmask", confirmations.to_bytes()), what
    twice = msgspec.msgpack.encode(["Confirmations", [good.items[0]] * 3])
    with pytest.raises(MalformedMessageError):
        game.answer("a", "unmask", twice)
    game.answer("a", "unmask", good.to_bytes())


@both
def test_confirmations_of_another_round_release_nothing(protocol: str, small: Small) -> None:
    """The same sites, the same U3, one round earlier."""
    earlier = small(protocol, number=1)
    recorded = earlier.until("unmask").messages["a"]
    game = small(protocol, number=2)
    game.until("unmask")
    with pytest.raises(ProtocolError):
        game.answer("a", "unmask", recorded)


@both
def test_a_client_answers_unmask_once(protocol: str, small: Small) -> None:
    """Neither the same request nor another quorum gets a second answer."""
    game = small(protocol, "abcde")
    message = game.until("unmask").messages["a"]
    game.answer("a", "unmask", message)
    for again in (message, quorum(game, "bcd", "abcde").to_bytes()):
        with pytest.raises(RefusedError, match="does not come now"):
            game.answer("a", "unmask", again)


@both
def test_each_peer_is_released_one_kind_of_share_the_right_one(protocol: str, small: Small) -> None:
    """Seeds of U3, mask secrets of U2 without U3, nothing of who never shared; all right."""
    game = small(protocol, "abcdefg")
    vanish = {"c": "share", "e": "upload", "f": "upload"}
    gone: set[str] = set()
    while game.requests.phase != "unmask":
        gone |= {site for site, phase in vanish.items() if phase == game.requests.phase}
        game.send(game.replies(silent=frozenset(gone)))
    secrets = {site: secrets_of(state) for site, state in game.states.items()}
    answers = {site: ReleasedShares.from_bytes(reply) for site, reply in game.replies().items()}
    assert set(answers) == set("abdg")
    for said in answers.values():
        assert [item.owner for item in said.own] == list("abdg")
        assert [item.owner for item in said.mask] == list("ef")
    for owner in "abdgef":
        held = {
            "abcdefg".index(site) + 1: Share.parse(item.share)
            for site, said in answers.items()
            for item in (*said.own, *said.mask)
            if item.owner == owner
        }
        true = secrets[owner]
        assert combine(held) == (true.mask.seed if owner in vanish else true.seed)


@both
def test_a_site_that_holds_no_share_of_a_peer_releases_the_others(
    protocol: str, small: Small
) -> None:
    """A box that does not open costs one share; others recover the secret, and the sum is right."""
    game = small(protocol, "abcde")

    def relay(phase: str, site: str, message: bytes) -> bytes:
        if phase == "upload" and site == "b":
            said = RelayedSecrets.from_bytes(message)
            first, *rest = said.shares
            return bytes(changed(said, shares=(changed(first, box=bytes(94)), *rest)).to_bytes())
        return message

    game.assert_right(game.play(relay=relay), tuple("abcde"))
    assert not game.refusals


# What a recovered mask secret opens


@both
def test_a_recovered_mask_secret_opens_no_sealed_message(protocol: str, small: Small) -> None:
    """Nothing on the wire opens with any mask secret or seed; with the channel key it does."""
    game = small(protocol, "abcd")
    adverts = {item.sender: item for item in adverts_of(game)}
    game.until("upload")
    boxes = [
        (item, site)
        for site, message in game.requests.messages.items()
        for item in RelayedSecrets.from_bytes(message).shares
    ]
    assert len(boxes) == 12
    for item, site in boxes:
        sender, receiver = adverts[item.sender], adverts[site]
        names = (item.sender.encode(), site.encode())
        context = digest("shares", game.begin.context, *names, sender.channel, receiver.channel)
        mine, theirs = secrets_of(game.states[site]), secrets_of(game.states[item.sender])
        with_key = (item.sender, sender.channel)
        assert unseal_shares(item.box, mine.channel, with_key, context)
        for state in (mine, theirs):
            for seed in (state.mask.seed, state.seed):
                key = ChannelKey(lambda size, seed=seed: seed._material[:size])
                for peer, public in ((item.sender, sender), (site, receiver)):
                    for half in (public.channel, public.mask):
                        with pytest.raises(ProtocolError):
                            unseal_shares(item.box, key, (peer, half), context)
    if protocol == "masked-bfv":
        for site, message in game.requests.messages.items():
            [sealed] = RelayedSecrets.from_bytes(message).seeds
            names = (b"a", sealed.public, site.encode(), adverts[site].channel)
            context = digest("he seed", game.begin.context, *names)
            channel = secrets_of(game.states[site]).channel
            assert unseal(sealed.box, channel, ("a", sealed.public), context)
            for owner in ("a", site):
                seed = secrets_of(game.states[owner]).mask.seed
                key = ChannelKey(lambda size, seed=seed: seed._material[:size])
                for public in (adverts["a"], adverts[site]):
                    for half in (public.channel, public.mask):
                        with pytest.raises(ProtocolError):
                            unseal(sealed.box, key, ("a", half), context)


@both
def test_the_keys_of_a_round_are_all_different_and_all_fresh(protocol: str, small: Small) -> None:
    """Channel key, mask key and commitment: no two equal among sites, kinds or rounds."""
    seen = []
    for number in (1, 2, 3):
        for item in adverts_of(small(protocol, number=number)):
            seen += [item.channel, item.mask, item.commitment]
    assert len(set(seen)) == len(seen) == 27


# The server: what it accepts, and what it makes of wrong shares


def replacing(phase: str, site: str, forge: Callable[[bytes], bytes]) -> Any:
    """A wire on which the reply of `site` in `phase` is forged from its honest one."""

    def wire(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        if requests.phase == phase and site in replies:
            replies[site] = forge(replies[site])
        return replies

    return wire


def released(game: Any, site: str, own: Any, mask: Any) -> bytes:
    """Well-signed shares of any content."""
    said = [digest("own", s.owner.encode(), s.share) for s in own]
    said += [digest("mask", s.owner.encode(), s.share) for s in mask]
    signature = signed(game, site, "unmask", digest("released", *said))
    return ReleasedShares(site, tuple(own), tuple(mask), signature).to_bytes()


WRONG_SHARES: dict[str, Callable[[ReleasedShare], bytes]] = {
    "zero": lambda item: bytes(33),
    "one off": lambda item: item.share[:-1] + bytes([item.share[-1] ^ 1]),
    "outside the field": lambda item: b"\xff" * 33,
}


@both
@pytest.mark.parametrize("wrong", WRONG_SHARES)
@pytest.mark.parametrize("liars", ["a", "e", "ac", "bd"])
def test_wrong_shares_are_found_out_and_others_used(
    protocol: str, wrong: str, liars: str, small: Small
) -> None:
    """Seven sites of which four recover: one or two that lie about every share change nothing."""
    game = small(protocol, "abcdefg")

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == "upload":
            replies.pop("g")
        if requests.phase == "unmask":
            for site in liars:
                said = ReleasedShares.from_bytes(replies[site])
                own, mask = (
                    [changed(item, share=WRONG_SHARES[wrong](item)) for item in items]
                    for items in (said.own, said.mask)
                )
                replies[site] = released(game, site, own, mask)
        return replies

    game.assert_right(game.play(wire=wire), tuple("abcdef"))


@pytest.mark.parametrize("liar", [0, 11, 19])
def test_one_liar_among_twenty_is_worked_around(liar: int, small: Small) -> None:
    """Whichever site it is: a round is not lost to the order in which shares are tried."""
    sites = "abcdefghijklmnopqrst"
    game = small("secagg", sites, length=2)

    def lie(reply: bytes) -> bytes:
        said = ReleasedShares.from_bytes(reply)
        own = [changed(item, share=bytes(33)) for item in said.own]
        return released(game, sites[liar], own, said.mask)

    game.assert_right(game.play(wire=replacing("unmask", sites[liar], lie)), tuple(sites))


@both
def test_too_many_wrong_shares_are_an_abort_with_culprits(protocol: str, small: Small) -> None:
    """Five sites of which three recover, and three lie: no sum, and the suspects by name."""
    game = small(protocol, "abcde")

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == "unmask":
            for site in "bcd":
                said = ReleasedShares.from_bytes(replies[site])
                own = [changed(i, share=bytes(33)) if i.owner == "a" else i for i in said.own]
                replies[site] = released(game, site, own, said.mask)
        return replies

    with pytest.raises(RoundAbortedError, match="2 sites released shares, 3 needed") as caught:
        game.play(wire=wire)
    assert caught.value.culprits == tuple("bcd")


@both
def test_a_site_that_shares_garbage_is_named_and_nothing_is_opened(
    protocol: str, small: Small
) -> None:
    """Its boxes are signed and do not open: its mask cannot come off, and the abort blames it."""
    game = small(protocol, "abcde")

    def garbage(reply: bytes) -> bytes:
        said = SharedSecrets.from_bytes(reply)
        boxes = tuple(changed(item, box=bytes(94)) for item in said.shares)
        signature = signed(game, "c", "share", secagg._sealed(boxes, said.kept))
        return SharedSecrets(boxes, said.kept, said.seeds, signature).to_bytes()

    with pytest.raises(RoundAbortedError, match="c gave others shares") as caught:
        game.play(wire=replacing("share", "c", garbage))
    assert caught.value.culprits == ("c",)


@both
def test_shares_of_the_wrong_kind_or_both_kinds_are_refused(protocol: str, small: Small) -> None:
    """Of a site in the sum no mask secret, of one outside no seed; both never even parse."""
    for kind in ("mask secret of a survivor", "seed of a lost site", "both"):
        game = small(protocol, "abcdef")

        def forge(reply: bytes, kind: str = kind, game: Any = game) -> bytes:
            said = ReleasedShares.from_bytes(reply)
            own, mask = list(said.own), list(said.mask)
            if kind == "mask secret of a survivor":
                mask = [own.pop(2), *mask]
            elif kind == "seed of a lost site":
                own.append(mask.pop())
            else:
                wire: list[Any] = msgspec.msgpack.decode(reply)
                wire[3] = [wire[2][0], *wire[3]]
                return msgspec.msgpack.encode(wire)
            return released(game, "b", own, mask)

        def wire(requests: Any, replies: Any, forge: Any = forge) -> Mapping[str, bytes]:
            if requests.phase == "upload":
                del replies["f"]
            return replacing("unmask", "b", forge)(requests, replies)

        outcome = game.play(wire=wire)
        assert set(outcome.faults) == {"b", "f"}, kind
        game.assert_right(outcome, tuple("abcde"))


def record(protocol: str, small: Small, number: int = 1) -> dict[str, dict[str, bytes]]:
    """Every honest reply of a whole round, by phase and site."""
    game, found = small(protocol, "abcd", number=number), {}

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        found.setdefault(requests.phase, {}).update(replies)
        return replies

    game.play(wire=wire)
    return found


PHASES = [("secagg", phase) for phase in secagg.PHASES]
PHASES += [("masked-bfv", phase) for phase in (*secagg.PHASES, "open")]


@pytest.mark.parametrize(("protocol", "phase"), PHASES)
@pytest.mark.parametrize(
    "what", ["another round", "another session", "another site", "another phase", "cut", "nothing"]
)
def test_a_wrong_reply_costs_its_sender_the_round_and_nobody_else(
    protocol: str, phase: str, what: str, small: Small
) -> None:
    """Replayed, crossed, out of order or malformed: named, and the sum is right without it."""
    site = "b" if phase == "open" else "c"
    game = small(protocol, "abcd", number=2)
    earlier = record(protocol, small)
    other = {"another session": Begin(bytes(16), *msgspec.structs.astuple(game.begin)[1:])}
    before = dict(zip(game.protocol.phases[1:], game.protocol.phases, strict=False))

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        sent.setdefault(requests.phase, {}).update(replies)
        if requests.phase == phase and site in replies:
            honest = replies[site]
            if what == "another round":
                replies[site] = earlier[phase].get(site) or earlier[phase]["a"]
            elif what == "another session":
                replies[site] = foreign[phase][site]
            elif what == "another site":
                replies[site] = replies["d"] if "d" in replies else sent["upload"]["d"]
            elif what == "another phase":
                replies[site] = sent.get(before.get(phase, ""), earlier["upload"])[site]
            else:
                replies[site] = honest[:-1] if what == "cut" else b""
        return replies

    sent: dict[str, dict[str, bytes]] = {}
    foreign: dict[str, dict[str, bytes]] = {}
    if what == "another session":
        twin = small(protocol, "abcd", number=2)
        twin.begin = other["another session"]
        twin.states = {s: twin.expected(s) for s in "abcd"}
        twin.server = twin.protocol.server(twin.begin, twin.roster, twin.encoding, twin.length)
        twin.requests = next(twin.server)

        def keep(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
            foreign.setdefault(requests.phase, {}).update(replies)
            return replies

        twin.play(wire=keep)
    outcome = game.play(wire=wire)
    assert set(outcome.faults) == {site}
    in_time = phase in ("confirm", "unmask", "open")
    game.assert_right(outcome, tuple("abcd" if in_time else "abd"))


@pytest.mark.parametrize(("protocol", "phase"), PHASES)
def test_a_wrong_request_is_refused_and_the_right_one_still_answered(
    protocol: str, phase: str, small: Small
) -> None:
    """Requests of another round, phase or receiver, and malformed ones: the state stays."""
    site = "b" if phase == "open" else "a"  # the opener of round 2
    earlier, game = small(protocol, "abcd", number=1), small(protocol, "abcd", number=2)
    asked = earlier.until(phase).messages
    replayed = asked.get(site) or asked["a"]
    wrong = [b"", b"\xc1", replayed[:-1]]
    # A U3 is only names, signed under the round; boxes of another round are found useless when they
    # are opened, and the server is short of shares.
    if (protocol, phase) not in (
        ("secagg", "confirm"),
        ("masked-bfv", "confirm"),
        ("secagg", "upload"),
    ):
        wrong.append(replayed)
    for before in game.protocol.phases:
        if before == phase:
            break
        wrong.append(game.requests.messages.get(site, b""))
        game.send(game.replies())
    if phase == "upload":
        wrong.append(game.requests.messages["b"])
    state = game.states[site]
    for message in wrong:
        assert refuses(game, site, phase, message)
        assert game.states[site] is state
    game.answer(site, phase, game.requests.messages[site])


@both
def test_no_share_is_sent_of_an_upload_that_was_refused(protocol: str, small: Small) -> None:
    """A site whose upload is broken is outside U3: its mask secret comes off, its seed stays."""
    game = small(protocol, "abcd")
    outcome = game.play(wire=replacing("upload", "b", lambda reply: reply[:-1]))
    answers = []
    for data in game.received:
        try:
            answers.append(ReleasedShares.from_bytes(data))
        except MalformedMessageError:
            continue
    assert len(answers) == 3
    for said in answers:
        assert [item.owner for item in said.own] == list("acd")
        assert [item.owner for item in said.mask] == ["b"]
    game.assert_right(outcome, tuple("acd"))


@both
def test_a_site_that_counts_twice_gives_an_abort(protocol: str, small: Small) -> None:
    """The count slot tells a fault after the masks are off: no sum comes out."""
    game = small(protocol, "abcd")
    honest = game.slots

    def slots(site: str) -> Any:
        chunks = honest(site)
        if site == "b":
            chunks[0][0] = 2
        return chunks

    game.slots = slots
    with pytest.raises(ProtocolError):
        game.play()


# A server that shows one site something else


@both
@pytest.mark.parametrize("field", ["binding", "session", "round", "cohort", "minimum", "threshold"])
def test_a_site_that_was_shown_another_round_gets_no_further_than_its_keys(
    protocol: str, field: str, small: Small
) -> None:
    """Another model, pruning mask, session, round, cohort or threshold, which it takes for true.

    It signs another context: the others refuse its keys and it refuses theirs. It never uploads.
    """
    game = small(protocol, "abcde", tolerated=0)
    values = {
        "binding": b"\1" * 32,
        "session": b"\2" * 16,
        "round": 9,
        "cohort": tuple("abce"),
        "minimum": 4,
        "threshold": 4,
    }
    shown = changed(game.begin, **{field: values[field]})
    if field == "threshold":
        shown = changed(shown, minimum=4)
    if field in ("binding", "session", "round"):
        game.states["e"] = game.expected("e", **{field: values[field]})
    first = game.answer("e", "advertise", shown.to_bytes())
    others = {s: game.answer(s, "advertise", game.requests.messages[s]) for s in "abcd"}
    items = {s: MaskAdvertisement.from_bytes(r) for s, r in {**others, "e": first}.items()}
    everyone = MaskAdvertisements(tuple(items[s] for s in "abcde")).to_bytes()
    for site in "abcde":
        with pytest.raises(ProtocolError):
            game.answer(site, "share", everyone)
    alone = [item for site, item in items.items() if site != "d" or field != "cohort"]
    with pytest.raises(ProtocolError):
        game.answer("e", "share", MaskAdvertisements(tuple(alone)).to_bytes())
    outcome = game.send({**others, "e": first})
    assert outcome is None
    assert "e" not in game.requests.messages
    game.assert_right(game.play(), tuple("abcd"))


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The cosine of two vectors."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize("shown", ["abe", "ade", "bcde", "abce"])
def test_a_server_that_hides_peers_from_one_site_gets_garbage(shown: str, small: Small) -> None:
    """Site e is relayed the shares of some of its peers only, and all others go on as usual.

    The server takes off whatever it can: the sum without e, e's own mask under either context.
    What is left has a cosine with e's update like any unrelated vector's: below 5 / sqrt(d).
    """
    length = 4000
    game = small("secagg", "abcde", length=length)
    full = {item.sender: item for item in adverts_of(game)}
    # Everyone's self-mask seed is recovered, as all are in U3.
    seeds = {site: game.states[site].seed for site in "abcde"}
    key = game.states["e"].mask

    def relay(phase: str, site: str, message: bytes) -> bytes:
        if phase == "upload" and site == "e":
            said = RelayedSecrets.from_bytes(message)
            kept = tuple(item for item in said.shares if item.sender in shown)
            members = tuple(sorted(shown))
            return bytes(changed(said, members=members, shares=kept).to_bytes())
        return message

    uploads: dict[str, bytes] = {}

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == "upload":
            uploads.update(replies)
        return replies

    with pytest.raises(ProtocolError, match="counts"):
        game.play(relay=relay, wire=wire)
    assert set(game.refusals) == {"e"}, "e signs no U3 that goes beyond its U2; the others do"

    encoding, slots = game.encoding, game.encoding.slots(length)
    keep = np.uint64((1 << encoding.plain_bits) - 1)
    target = np.concatenate(game.slots("e"))

    def fields(vector: NDArray[np.uint64]) -> NDArray[np.int64]:
        return encoding.unpack((vector & keep)[1:], length)

    def upload_of(site: str) -> NDArray[np.uint64]:
        payload = Upload.from_bytes(uploads[site]).payload
        return unpack(np.frombuffer(payload, np.uint8), slots, encoding.plain_bits)

    contexts = {
        members: secagg.mask_context(game.begin, {s: full[s] for s in members})
        for members in ("abcde", shown)
    }
    guesses = []
    for context in contexts.values():
        own = masks.total([masks.own(seeds["e"], "e", context)], slots, encoding.plain_bits)
        guesses.append(upload_of("e") - own)
        total = sum((upload_of(site) for site in "abcde"), np.zeros(slots, np.uint64))
        rest = [masks.own(seeds[s], s, contexts["abcde"]) for s in "abcd"]
        total -= masks.total(rest, slots, encoding.plain_bits) + own
        guesses += [total, total - sum(np.concatenate(game.slots(s)) for s in "abcd")]
    limit = 5 / length**0.5
    unrelated = Keystream(Seed(bytes(32)), "unrelated").uniform(length) - 0.5
    assert abs(cosine(unrelated, fields(target))) < limit
    for guess in guesses:
        assert abs(cosine(fields(guess), fields(target))) < limit
    # The measure does see an update when all masks of e are off.
    terms = [masks.own(seeds["e"], "e", contexts[shown])]
    terms += [key.pair("e", s, full[s].mask, contexts[shown]) for s in shown if s != "e"]
    bare = upload_of("e") - masks.total(terms, slots, encoding.plain_bits)
    assert cosine(fields(bare), fields(target)) == pytest.approx(1)


@pytest.mark.parametrize("what", ["weights", "keys of a peer", "members"])
def test_whatever_a_mask_is_bound_to_changes_it(what: str, small: Small) -> None:
    """The round and its model, who is in U2, and every key in it."""
    game = small("secagg", "abcd")
    items = {item.sender: item for item in adverts_of(game)}
    honest = secagg.mask_context(game.begin, items)
    begin, members = game.begin, dict(items)
    if what == "weights":
        begin = changed(begin, binding=b"\1" * 32)
    elif what == "members":
        del members["d"]
    others = [secagg.mask_context(begin, members)]
    if what == "keys of a peer":
        others = [
            secagg.mask_context(begin, {**items, "b": changed(items["b"], **{field: b"\1" * 32})})
            for field in ("channel", "mask")
        ]
    assert honest not in others


# Size


@pytest.mark.parametrize(("sites", "bits"), [(5, 8), (16, 8), (16, 16), (20, 12), (100, 16)])
def test_an_upload_is_within_five_per_cent_of_what_the_sum_needs(sites: int, bits: int) -> None:
    """(b + ceil(log2 n)) / 8 bytes a parameter, at 10^5 parameters, message and all."""
    names = tuple(f"site-{i:03}" for i in range(sites))
    encoding = FixedPoint(bits, 1.0, sites, secagg.slot_bits(sites))
    length = 100_000
    slots = encoding.encode(np.zeros(length), 1, Keystream(Seed(bytes(32)), "rounding"))
    own = masks.own(Seed(bytes(32)), names[0], b"")
    payload = b"".join(
        np.packbits(np.zeros(len(chunk) * encoding.plain_bits, np.uint8)).tobytes()
        for chunk in masks.add(slots, [own], encoding.plain_bits)
    )
    wire = Upload(names[0], bytes(32), payload, bytes(64)).to_bytes()
    needed = (bits + (sites - 1).bit_length()) / 8 * length
    assert len(wire) <= 1.05 * needed


def test_the_upload_of_a_real_round_has_that_size(small: Small) -> None:
    """Three sites, 8 bits, 50,000 parameters: what really crosses the wire."""
    game = small("secagg", length=50_000)
    game.until("upload")
    assert len(game.replies()["a"]) <= 1.05 * (8 + 2) / 8 * 50_000


# Secrets


@both
def test_states_show_no_secret(protocol: str, small: Small) -> None:
    """Keys, seeds and shares stay out of every repr of every state."""
    game = small(protocol, "abc")
    while True:
        for site, state in game.states.items():
            text = repr(state)
            for draw in game.drawn:
                assert draw[:8].hex() not in text, site
                assert repr(draw[:6])[2:-1] not in text, site
        if game.send(game.replies()) is not None:
            return


def test_boxes_are_bound_to_both_ends_and_the_round(small: Small) -> None:
    """A box moved to another receiver, sender or round does not open."""
    game, other = small("secagg", number=1), small("secagg", number=2)
    adverts = {item.sender: item for item in adverts_of(game)}
    said = {item.sender: item for item in relayed_to(game, "a").shares}
    channel = secrets_of(game.states["a"]).channel

    def opens(box: SealedShares, sender: str, receiver: str, begin: Begin) -> bool:
        ends = (adverts[sender].channel, adverts[receiver].channel)
        context = digest("shares", begin.context, sender.encode(), receiver.encode(), *ends)
        try:
            unseal_shares(box.box, channel, (sender, ends[0]), context)
        except ProtocolError:
            return False
        return True

    assert opens(said["b"], "b", "a", game.begin)
    assert not opens(said["b"], "b", "a", other.begin)
    assert not opens(said["b"], "c", "a", game.begin)
    assert not opens(said["b"], "b", "c", game.begin)
    assert not opens(said["c"], "b", "a", game.begin)
