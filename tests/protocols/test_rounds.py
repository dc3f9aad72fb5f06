"""What every protocol promises: whom a client refuses, and whom a server does without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from protocols.catalogue import PROTOCOLS, UPLOAD
from protocols.encoding import FixedPoint
from protocols.errors import ProtocolError, RefusedError, RoundAbortedError
from protocols.messages import Begin, Upload
from protocols.rounds import public_weight, statement

everywhere = pytest.mark.parametrize("protocol", PROTOCOLS)


def begun(game: Any, begin: Begin, site: str = "a", **expected: Any) -> None:
    """`site`, with the given expectations, is asked to begin `begin`."""
    phase = game.protocol.phases[0]
    slots = game.slots(site) if phase == UPLOAD else None
    state = game.expected(site, **expected)
    game.protocol.step(phase, state, begin.to_bytes(), slots, game.entropy(site))


@everywhere
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"binding": b"\1" * 32}, "another model"),
        ({"session": bytes(16)}, "another round"),
        ({"round": 2}, "another round"),
        ({"cohort": ("b", "c")}, "not in the cohort"),
        ({"cohort": ("a", "b", "stranger")}, "stranger"),
        ({"cohort": ("a", "b", "c", "d")}, "exceeds"),
    ],
)
def test_a_client_refuses_a_round_that_is_not_the_one_it_expects(
    protocol: str, small: Callable[..., Any], change: Mapping[str, Any], what: str
) -> None:
    """Another binding, session, round or cohort; a stranger; more sites than sums are exact for."""
    game = small(protocol, also_pinned=("d",))
    begin = game.begin
    fields = {name: getattr(begin, name) for name in begin.__struct_fields__}
    begun(game, begin)
    with pytest.raises(RefusedError, match=what):
        begun(game, Begin(**{**fields, **change}))


@everywhere
def test_a_client_refuses_a_smaller_minimum_than_its_own(
    protocol: str, small: Callable[..., Any]
) -> None:
    """A server may ask for more than a site's minimum, never for less."""
    game = small(protocol, minimum=2)
    with pytest.raises(RefusedError, match="below this site's 3"):
        begun(game, game.begin, minimum=3)
    stricter = small(protocol, minimum=3)
    begun(stricter, stricter.begin, minimum=2)


@everywhere
def test_every_phase_out_of_order_is_refused(protocol: str, small: Callable[..., Any]) -> None:
    """In each state, every phase but the one that comes now is a RefusedError; so is a name."""
    game = small(protocol)
    order = game.protocol.phases
    message = game.begin.to_bytes()
    for now in (*order, None):
        state = game.states["a"]
        for phase in (*order, "unknown", ""):
            # A client that is not asked in phase "share" is the same to itself before and after.
            either = ("share", "upload") if protocol in ("bfv", "ckks") else ()
            if phase == now or (now in either and phase in either):
                continue
            # Sites that are not asked for shares, as they did not confirm in time, may still open.
            if (protocol, now, phase) == ("masked-bfv", "unmask", "open"):
                continue
            with pytest.raises(RefusedError, match="does not come now"):
                game.protocol.step(phase, state, message, None, game.entropy("a"))
        if now is not None:
            game.send(game.replies())


@everywhere
def test_states_and_accepts_name_every_phase(protocol: str) -> None:
    """The catalogue is complete: a step and a state for each phase, the upload among them."""
    entry = PROTOCOLS[protocol]
    assert entry.name == protocol
    assert set(entry.phases) == set(entry.steps) == set(entry.accepts)
    assert UPLOAD in entry.phases


@everywhere
@pytest.mark.parametrize("sites", [2, 3, 16, 100, 1000])
def test_slot_bits_hold_sixteen_bit_updates(protocol: str, sites: int) -> None:
    """What a protocol offers in a slot is enough for an encoding at any usual cohort."""
    encoding = FixedPoint(16, 1.0, sites, PROTOCOLS[protocol].slot_bits(sites))
    assert encoding.fields >= 1


@everywhere
@pytest.mark.parametrize("weight_slot", [False, True])
def test_weighted_rounds_are_exact(
    protocol: str, small: Callable[..., Any], weight_slot: bool
) -> None:
    """Public weights and weights in a slot of their own give the same exact weighted mean."""
    bits = PROTOCOLS[protocol].slot_bits(3)
    encoding = FixedPoint(10, 1.0, 3, bits, weight_cap=100, weight_slot=weight_slot)
    game = small(protocol, encoding=encoding, weights={"a": 100, "b": 7, "c": 1})
    game.assert_right(game.play(vanish={"c": UPLOAD}), ("a", "b"))


@everywhere
def test_a_silent_site_is_named_and_the_sum_is_right_without_it(
    protocol: str, small: Callable[..., Any]
) -> None:
    """A dropout is a fault with a reason, and no more than that."""
    game = small(protocol)
    outcome = game.play(vanish={"b": UPLOAD})
    assert set(outcome.faults) == {"b"}
    assert "no reply" in outcome.faults["b"]
    game.assert_right(outcome, ("a", "c"))


@everywhere
@pytest.mark.parametrize("minimum", [2, 3])
def test_below_the_minimum_the_round_aborts(
    protocol: str, small: Callable[..., Any], minimum: int
) -> None:
    """RoundAbortedError with the reasons and the culprits; there is no aggregate."""
    game = small(protocol, minimum=minimum)
    vanish = dict.fromkeys("bc"[: 4 - minimum], UPLOAD)
    with pytest.raises(RoundAbortedError, match=f"{minimum} needed") as caught:
        game.play(vanish=vanish)
    assert caught.value.culprits == tuple(sorted(vanish))


def forged(game: Any, site: str, key_of: str, upload: Upload, **changes: Any) -> bytes:
    """An upload changed, and signed with the key of `key_of` as a message of its sender."""
    fields = {name: getattr(upload, name) for name in upload.__struct_fields__}
    fields |= {"sender": site, **changes}
    said = statement(game.begin.context, UPLOAD, fields["sender"], fields["key"], fields["payload"])
    fields["signature"] = game.identities[key_of].key.sign(said)
    return Upload(**fields).to_bytes()


ATTACKS: dict[str, Callable[[Any, Mapping[str, bytes], Upload], bytes]] = {
    "the upload of another": lambda game, replies, own: replies["a"],
    "the upload of another, renamed": lambda game, replies, own: replace_sender(replies["a"], "b"),
    "its own upload in another's name": lambda game, replies, own: forged(game, "a", "b", own),
    "an unsigned upload": lambda game, replies, own: Upload(
        "b", own.key, own.payload, bytes(64)
    ).to_bytes(),
    "a payload it did not sign": lambda game, replies, own: Upload(
        "b", own.key, own.payload[:-1] + b"\0\0", own.signature
    ).to_bytes(),
    "an upload under another key": lambda game, replies, own: forged(
        game, "b", "b", own, key=b"\5" * 32
    ),
    "an empty payload": lambda game, replies, own: forged(game, "b", "b", own, payload=b""),
    "a payload cut short": lambda game, replies, own: forged(
        game, "b", "b", own, payload=own.payload[:-1]
    ),
    "a payload too long": lambda game, replies, own: forged(
        game, "b", "b", own, payload=own.payload + b"\0"
    ),
    "a payload of ones": lambda game, replies, own: forged(
        game, "b", "b", own, payload=b"\xff" * len(own.payload)
    ),
    "no message at all": lambda game, replies, own: b"",
    "a request instead of a reply": lambda game, replies, own: game.begin.to_bytes(),
}


def replace_sender(message: bytes, sender: str) -> bytes:
    """The same upload under another name."""
    upload = Upload.from_bytes(message)
    return Upload(sender, upload.key, upload.payload, upload.signature).to_bytes()


@everywhere
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_site_that_breaks_the_protocol_is_named_and_the_sum_is_right_without_it(
    protocol: str, small: Callable[..., Any], attack: str
) -> None:
    """Duplicates, forgeries, foreign keys and malformed payloads: site b is out, a and c count."""
    game = small(protocol)

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        if requests.phase == UPLOAD:
            own = Upload.from_bytes(replies["b"])
            replies["b"] = ATTACKS[attack](game, dict(replies), own)
        return replies

    outcome = game.play(wire=wire)
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


@everywhere
def test_a_reply_of_another_round_is_refused(protocol: str, small: Callable[..., Any]) -> None:
    """An upload recorded in round 1 is no upload of round 2, though the vector is the same."""
    first = small(protocol, number=1)
    first.until(UPLOAD)
    recorded = first.replies()["b"]
    second = small(protocol, number=2)

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        return {**replies, "b": recorded} if requests.phase == UPLOAD else replies

    outcome = second.play(wire=wire)
    assert set(outcome.faults) == {"b"}
    second.assert_right(outcome, ("a", "c"))


@everywhere
def test_a_reply_from_outside_the_cohort_is_named_and_not_added(
    protocol: str, small: Callable[..., Any]
) -> None:
    """Pinned or not, a site that was not asked does not get into the sum, in any phase."""
    game = small(protocol, also_pinned=("pinned",))

    def wire(requests: Any, replies: dict[str, bytes]) -> dict[str, bytes]:
        mine = next(iter(replies.values()))
        return {**replies, "pinned": mine, "stranger": mine}

    outcome = game.play(wire=wire)
    assert set(outcome.faults) == {"pinned", "stranger"}
    game.assert_right(outcome, ("a", "b", "c"))


@everywhere
def test_only_replies_from_outside_are_no_round(protocol: str, small: Callable[..., Any]) -> None:
    """A server that hears strangers only aborts, and blames them too."""
    game = small(protocol)
    with pytest.raises(RoundAbortedError) as caught:
        game.play(wire=lambda requests, replies: {"stranger": b""})
    assert "stranger" in caught.value.culprits


@everywhere
def test_the_outcome_does_not_depend_on_the_order_of_replies(
    protocol: str, small: Callable[..., Any]
) -> None:
    """Replies that come in another order give the same aggregate."""
    game = small(protocol)
    outcome = game.play(wire=lambda requests, replies: dict(reversed(replies.items())))
    game.assert_right(outcome, ("a", "b", "c"))


def test_expected_is_frozen_and_hides_the_key(small: Callable[..., Any]) -> None:
    """A client's expectations cannot be changed under it, nor do they show its key."""
    expected = small("plain").expected("a")
    assert "<secret>" in repr(expected)
    with pytest.raises(AttributeError):
        expected.minimum = 2
    assert replace(expected, minimum=3).minimum == 3


def test_public_weights_add_up_over_the_contributors() -> None:
    """Only who contributed weighs; without weights there is nothing to add."""
    assert public_weight({"a": 2, "b": 3, "c": 5}, ("a", "c")) == 7
    assert public_weight(None, ("a", "c")) is None


def test_errors_name_their_culprits_once_in_order() -> None:
    """Sorted, without repetition, empty when nobody can be blamed."""
    assert ProtocolError("x", ["b", "a", "b"]).culprits == ("a", "b")
    assert ProtocolError("x").culprits == ()


@everywhere
def test_an_empty_vector_is_a_round_too(protocol: str, small: Callable[..., Any]) -> None:
    """When everything is pruned the round still counts its contributors."""
    outcome = small(protocol, length=0).play()
    assert outcome.aggregate.mean.shape == (0,)
    assert outcome.aggregate.mean.dtype == np.float64
    assert outcome.aggregate.contributors == ("a", "b", "c")
