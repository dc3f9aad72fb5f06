"""masked-bfv: the sum of plain and secagg bit for bit; the server opens nothing by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols import bfv_sum, masked_bfv, plain, secagg
from protocols.bfv import Parameters, SecretKey, Sum
from protocols.bitpacking import pack
from protocols.encoding import Aggregate, FixedPoint, _pack
from protocols.errors import ProtocolError, RefusedError, RoundAbortedError
from protocols.identity import digest
from protocols.keystream import Keystream, Seed
from protocols.messages import (
    Confirmation,
    MaskAdvertisements,
    OpenedSum,
    OpeningTag,
    RelayedSecrets,
    ReleasedShares,
    SealedSeed,
    SharedSecrets,
    SumToOpen,
    Upload,
)
from protocols.rounds import Withheld, statement
from protocols.sealing import ChannelKey, unseal
from protocols.shamir import Share, combine

Small = Callable[..., Any]
Dropouts = Mapping[str, str]
BITS = 8
LEVELS = 2 ** (BITS - 1) - 1
# Multiples of the grid that survive the division by the clip and back: they round to themselves,
# whatever a protocol draws for its rounding.
GRID = [k for k in range(-LEVELS, LEVELS + 1) if float(k) / LEVELS * LEVELS == k]


def names(count: int) -> tuple[str, ...]:
    """Site names in order."""
    return tuple(f"s{i:02}" for i in range(count))


def on_the_grid(count: int, length: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """A vector a site, of integers that encode exactly."""
    draws = np.random.default_rng(seed)
    return {site: draws.choice(np.array(GRID, np.float64), length) for site in names(count)}


def contributors(
    sites: tuple[str, ...], dropouts: Dropouts, tolerated: int, he: bool
) -> tuple[str, ...] | None:
    """Who is in the sum, by the rules of DESIGN alone; None when the round must abort."""
    t = (len(sites) + tolerated) // 2 + 1
    m = max(2, t, tolerated + 2)
    phases = [*secagg.PHASES, *(["open"] if he else [])]
    left = {
        phase: [s for s in sites if dropouts.get(s) not in phases[: phases.index(phase) + 1]]
        for phase in phases
    }
    least = {"advertise": m, "share": m, "upload": m, "confirm": t, "unmask": t, "open": 1}
    if any(len(left[phase]) < least[phase] for phase in phases):
        return None
    if he and left["advertise"][0] not in left["share"]:
        return None
    return tuple(left["upload"])


def check(vectors: Mapping[str, NDArray[np.float64]], dropouts: Dropouts, tolerated: int) -> None:
    """Both protocols give plain's aggregate, as integers and as floats, or both abort as ruled."""
    sites = tuple(sorted(vectors))
    for protocol in (secagg, masked_bfv):
        if protocol is secagg and "open" in dropouts.values():
            continue  # to secagg the same as a site that stays
        gone = dict(dropouts)
        expected = contributors(sites, gone, tolerated, protocol is masked_bfv)
        encoding = FixedPoint(BITS, float(LEVELS), len(sites), protocol.slot_bits(len(sites)))

        def masked(protocol: Any = protocol, gone: Any = gone, encoding: Any = encoding) -> Any:
            return protocol.run(vectors, encoding, dropouts=gone, tolerated=tolerated)

        if expected is None:
            with pytest.raises(RoundAbortedError):
                masked()
            continue
        found: Aggregate = masked()
        assert found.contributors == expected
        late = {site: "upload" for site in sites if site not in expected}
        encoding = FixedPoint(BITS, float(LEVELS), len(sites), plain.slot_bits(len(sites)))
        clear = plain.run(vectors, encoding, dropouts=late)
        assert clear.contributors == expected
        assert found.total_weight == clear.total_weight == len(expected)
        assert np.array_equal(found.mean, clear.mean)
        integers = np.rint(found.mean * len(expected)).astype(int)
        truth = sum(vectors[site] for site in expected)
        assert np.array_equal(integers, truth)  # type: ignore[arg-type]


def test_the_grid_is_wide() -> None:
    """Most of the integers encode exactly; the extremes and zero are among them."""
    assert len(GRID) > LEVELS
    assert {-LEVELS, 0, LEVELS} <= set(GRID)


PHASES = st.sampled_from([None, None, None, None, *masked_bfv.PHASES])


@given(st.integers(3, 12), st.integers(0, 20), st.data())
@settings(max_examples=40)
def test_any_dropouts_give_the_sum_of_plain_or_an_abort(
    count: int, length: int, data: st.DataObject
) -> None:
    """3 to 12 sites, any tolerated number, each site vanishing in any phase or never."""
    tolerated = data.draw(st.integers(0, count - 2))
    drawn = {site: data.draw(PHASES) for site in names(count)}
    dropouts = {site: phase for site, phase in drawn.items() if phase}
    check(on_the_grid(count, length), dropouts, tolerated)


@given(st.integers(13, 40), st.data())
@example(40, None)
@settings(max_examples=3)
def test_any_dropouts_of_many_sites_give_the_sum_of_plain_or_an_abort(
    count: int, data: st.DataObject | None
) -> None:
    """Up to 40 sites, a few of them vanishing."""
    phase = st.sampled_from(masked_bfv.PHASES)
    few = st.dictionaries(st.sampled_from(names(count)), phase, max_size=count // 3)
    dropouts = data.draw(few) if data else {"s07": "upload", "s31": "share", "s39": "confirm"}
    tolerated = data.draw(st.integers(0, 3)) if data else 2
    check(on_the_grid(count, 7), dropouts, tolerated)


def patterns(count: int) -> list[dict[str, str]]:
    """Every way in which `count` sites can vanish."""
    choices = itertools.product([None, *masked_bfv.PHASES], repeat=count)
    return [{s: p for s, p in zip(names(count), choice, strict=True) if p} for choice in choices]


def test_every_dropout_pattern_of_three_sites() -> None:
    """All 343 of them."""
    vectors = on_the_grid(3, 3)
    for dropouts in patterns(3):
        check(vectors, dropouts, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tolerated"), [(3, 1), (4, 0), (4, 1), (5, 0)])
def test_every_dropout_pattern_of_three_to_five_sites(count: int, tolerated: int) -> None:
    """All 343, 2,401 and 16,807 of them."""
    vectors = on_the_grid(count, 3)
    for dropouts in patterns(count):
        check(vectors, dropouts, tolerated)


def test_sampled_dropout_patterns_of_four_and_five_sites() -> None:
    """A sample of what the slow test tries one and all."""
    phases = masked_bfv.PHASES
    for count in (4, 5):
        vectors = on_the_grid(count, 2)
        for seed in range(15):
            draws = np.random.default_rng(seed)
            chosen = draws.choice([None, *phases], count, p=[0.52, *[0.08] * 6])
            check(vectors, {s: p for s, p in zip(names(count), chosen, strict=True) if p}, 0)


@pytest.mark.parametrize("weight_slot", [False, True])
def test_weighted_runs_are_plain_bit_for_bit(weight_slot: bool) -> None:
    """With public weights, and with the weights in a slot of their own."""
    vectors = {site: np.random.default_rng(i).uniform(-1, 1, 3000) for i, site in enumerate("abcd")}
    weights = {"a": 9, "b": 1, "c": 4, "d": 1}
    means = []
    for protocol in (plain, secagg, masked_bfv):
        encoding = FixedPoint(12, 1.0, 4, protocol.slot_bits(4), 9, weight_slot)
        result = protocol.run(  # type: ignore[attr-defined]
            vectors, encoding, weights, randomness=lambda size: b"\7" * size
        )
        assert result.total_weight == 15
        means.append(result.mean)
    assert np.array_equal(means[0], means[1])
    assert np.array_equal(means[0], means[2])


# The HE seed: from the lowest site in U1, and nobody else


def changed(message: Any, **fields: Any) -> Any:
    """`message` with other fields."""
    return msgspec.structs.replace(message, **fields)


def signed(game: Any, site: str, phase: str, *said: bytes) -> bytes:
    """A signature that `site` really made in this round."""
    signature: bytes = game.identities[site].key.sign(
        statement(game.begin.context, phase, site, *said)
    )
    return signature


def resealed(game: Any, item: SealedSeed, by_site: str = "a", **fields: Any) -> SealedSeed:
    """A sealed seed changed, and signed again by its maker."""
    item = changed(item, **fields)
    said = (item.public, item.receiver.encode(), item.key, item.box)
    return changed(item, signature=signed(game, by_site, "share", *said))  # type: ignore[no-any-return]


def replacing(phase: str, site: str, forge: Callable[[bytes], bytes]) -> Any:
    """A wire on which the reply of `site` in `phase` is forged from its honest one."""

    def wire(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        if requests.phase == phase and site in replies:
            replies[site] = forge(replies[site])
        return replies

    return wire


def test_only_the_lowest_site_in_u1_makes_a_seed(small: Small) -> None:
    """Nobody else draws 64 bytes or seals a seed; without a, b is the lowest."""
    for gone, maker in (("", "a"), ("a", "b"), ("ab", "c")):
        game = small("masked-bfv", "abcde")
        while game.requests.phase != "share":
            game.send(game.replies(silent=frozenset(gone)))
        said = {s: SharedSecrets.from_bytes(r) for s, r in game.replies().items()}
        assert [site for site, secrets in said.items() if secrets.seeds] == [maker]
        assert len([draw for draw in game.drawn if len(draw) == 64]) == 1
        assert [item.receiver for item in said[maker].seeds] == sorted(said)


def relayed(game: Any, site: str) -> RelayedSecrets:
    """The honest request of phase upload."""
    return RelayedSecrets.from_bytes(game.until("upload").messages[site])


def test_a_client_refuses_a_seed_that_another_site_made(small: Small) -> None:
    """c, in U1 and not the lowest there, seals and signs a seed as well as a would."""
    game = small("masked-bfv", "abcde")
    items = MaskAdvertisements.from_bytes(game.until("share").messages["c"]).items
    state = game.states["c"]
    peers = {item.sender: item.channel for item in items}
    made = bfv_sum.seal_seeds(
        game.identities["c"], game.begin, state.channel, peers, game.entropy("c")
    )
    said = relayed(game, "b")
    [mine] = [item for item in made if item.receiver == "b"]
    with pytest.raises(RefusedError, match="a makes the seed"):
        game.answer("b", "upload", changed(said, seeds=(mine,)).to_bytes())
    in_its_name = changed(mine, maker="a")
    with pytest.raises(ProtocolError):
        game.answer("b", "upload", changed(said, seeds=(in_its_name,)).to_bytes())


def test_a_client_refuses_to_upload_without_a_seed(small: Small) -> None:
    """Nothing leaves without the second layer."""
    game = small("masked-bfv")
    with pytest.raises(RefusedError, match="no HE seed"):
        game.answer("b", "upload", changed(relayed(game, "b"), seeds=()).to_bytes())


@pytest.mark.parametrize(
    ("fields", "signer"),
    [
        ({"receiver": "c"}, "a"),
        ({"key": b"\1" * 32}, "a"),
        ({"box": bytes(92)}, "a"),
        ({"public": b"\1" * 32}, "a"),
        ({}, "c"),
    ],
    ids=["other receiver", "other seed than named", "other box", "other key", "other signer"],
)
def test_a_client_refuses_a_seed_that_is_not_what_it_says(
    small: Small, fields: dict[str, Any], signer: str
) -> None:
    """Signed by the maker or not: receiver, name, box and channel key belong together."""
    game = small("masked-bfv")
    said = relayed(game, "b")
    wrong = resealed(game, said.seeds[0], signer, **fields)
    with pytest.raises(ProtocolError):
        game.answer("b", "upload", changed(said, seeds=(wrong,)).to_bytes())


def test_a_maker_that_is_gone_before_u2_holds_the_seed_is_an_abort_that_names_it(
    small: Small,
) -> None:
    """Even though enough others are there; nothing was uploaded."""
    game = small("masked-bfv", "abcde")
    with pytest.raises(RoundAbortedError, match="a was to make the HE seed") as caught:
        game.play(vanish={"a": "share"})
    assert caught.value.culprits == ("a",)
    assert all(state.__class__.__name__ != "Uploaded" for state in game.states.values())


def test_a_maker_that_is_gone_later_does_not_matter(small: Small) -> None:
    """Everyone holds the seed by then."""
    for phase, left in (("upload", "bcde"), ("confirm", "abcde"), ("open", "abcde")):
        game = small("masked-bfv", "abcde")
        game.assert_right(game.play(vanish={"a": phase}), tuple(left))


@pytest.mark.parametrize("what", ["none", "one too few", "other key", "unsigned", "in c's name"])
def test_a_maker_that_seals_wrong_seeds_is_an_abort_that_names_it(small: Small, what: str) -> None:
    """The server checks what it can see, before anyone relies on it."""
    game = small("masked-bfv", "abcd")

    def forge(reply: bytes) -> bytes:
        said = SharedSecrets.from_bytes(reply)
        seeds = {
            "none": (),
            "one too few": said.seeds[:-1],
            "other key": tuple(resealed(game, s, public=b"\5" * 32) for s in said.seeds),
            "unsigned": tuple(changed(s, signature=bytes(64)) for s in said.seeds),
            "in c's name": tuple(resealed(game, s, "c", maker="c") for s in said.seeds),
        }[what]
        return bytes(changed(said, seeds=seeds).to_bytes())

    with pytest.raises(RoundAbortedError, match="a was to make") as caught:
        game.play(wire=replacing("share", "a", forge))
    assert caught.value.culprits == ("a",)


def test_a_site_that_makes_a_seed_uncalled_is_named(small: Small) -> None:
    """c seals seeds although a is there: c is out, and the sum is right without it."""
    game = small("masked-bfv", "abcd")
    other = small("masked-bfv", "abcd")
    seeds = SharedSecrets.from_bytes(
        {other.until("share").phase: other.replies()}["share"]["a"]
    ).seeds

    def forge(reply: bytes) -> bytes:
        return bytes(changed(SharedSecrets.from_bytes(reply), seeds=seeds).to_bytes())

    outcome = game.play(wire=replacing("share", "c", forge))
    assert set(outcome.faults) == {"c"}
    game.assert_right(outcome, tuple("abd"))


def test_every_round_has_a_fresh_he_key(small: Small) -> None:
    """Three rounds name three keys."""
    keys = set()
    for number in (1, 2, 3):
        game = small("masked-bfv", number=number)
        game.until("upload")
        keys |= {Upload.from_bytes(reply).key for reply in game.replies().values()}
    assert len(keys) == 3


# Opening


def to_open(game: Any) -> SumToOpen:
    """The honest request of phase open."""
    return SumToOpen.from_bytes(game.until("open").messages["a"])


def quorum(game: Any, signers: str, survivors: str) -> tuple[Confirmation, ...]:
    """Confirmations that these sites really would sign for U3."""
    said = [digest("survivors", *(site.encode() for site in survivors))]
    return tuple(Confirmation(site, signed(game, site, "confirm", *said)) for site in signers)


def refuses(game: Any, message: SumToOpen) -> bool:
    """Whether site a refuses to open, with a ProtocolError."""
    try:
        game.answer("a", "open", message.to_bytes())
    except ProtocolError:
        return True
    return False


def test_an_opener_wants_a_quorum_under_the_u3_that_it_confirmed(small: Small) -> None:
    """t valid signatures of sites in U3; another U3, even with a quorum, is not opened."""
    game = small("masked-bfv", "abcde")
    request = to_open(game)
    everyone = "abcde"
    for confirmations in (
        (),
        quorum(game, "ab", everyone),
        quorum(game, "abc", "abcd"),
        (*quorum(game, "ab", everyone), *quorum(game, "c", "abc")),
        (*quorum(game, "ab", everyone), Confirmation("c", bytes(64))),
    ):
        assert refuses(game, changed(request, confirmations=confirmations))
    # A sum of four that opens and counts right, confirmed by a quorum, but not by this site.
    key = game.states["a"].key
    total = Sum(game.encoding.slots(game.length), key.parameters)
    for site in "abcd":
        total.add(key.encrypt(game.slots(site)))
    smaller = SumToOpen(tuple("abcd"), quorum(game, "abc", "abcd"), total.to_bytes())
    assert refuses(game, smaller)
    twice = quorum(game, "a", everyone) * 3
    wire = ["SumToOpen", everyone, [["Confirmation", *msgspec.structs.astuple(c)] for c in twice]]
    with pytest.raises(ProtocolError):
        game.answer("a", "open", msgspec.msgpack.encode([*wire, request.payload]))
    game.answer(
        "a", "open", changed(request, confirmations=quorum(game, "cde", everyone)).to_bytes()
    )


def test_a_sum_is_opened_once(small: Small) -> None:
    """Not the same one again, not another, and by one that has not unmasked neither."""
    game = small("masked-bfv", "abcde")
    request = to_open(game)
    game.answer("a", "open", request.to_bytes())
    for again in (request, changed(request, confirmations=quorum(game, "cde", "abcde"))):
        with pytest.raises(RefusedError, match="does not come now"):
            game.answer("a", "open", again.to_bytes())
    game = small("masked-bfv", "abcde")
    unmask = game.until("unmask").messages["a"]
    late = game.states["a"]
    request = to_open(game)
    game.states["a"] = late
    game.answer("a", "open", request.to_bytes())
    for phase, message in (("open", request.to_bytes()), ("unmask", unmask)):
        with pytest.raises(RefusedError, match="does not come now"):
            game.answer("a", phase, message)


def test_an_opener_refuses_one_upload_dressed_as_the_sum(small: Small) -> None:
    """A single masked upload, and a sum with a mask left on it, do not count right."""
    game = small("masked-bfv", "abcd")
    game.until("upload")
    uploads = {s: Upload.from_bytes(r) for s, r in game.replies().items()}
    game.send({s: u.to_bytes() for s, u in uploads.items()})
    request = to_open(game)
    slots = game.encoding.slots(game.length)
    for parts in ("bbbb", "abcd"):
        total = Sum(slots, Parameters(game.encoding.plain_bits, game.encoding.cohort))
        for site in parts:
            total.add(uploads[site].payload)
        assert refuses(game, changed(request, payload=total.to_bytes()))


def test_a_refusal_to_open_does_not_say_what_was_decrypted(small: Small) -> None:
    """BFV is not safe against chosen ciphertexts: no slot leaves in an error."""
    game = small("masked-bfv", "abcd")
    request = to_open(game)
    seed = request.payload[-64:]
    wrong = changed(request, payload=request.payload[:-64] + bytes(reversed(seed)))
    with pytest.raises(RefusedError) as caught:
        game.answer("a", "open", wrong.to_bytes())
    assert str(caught.value) == "the sum counts other updates than the 4 it names"


@pytest.mark.parametrize("forge", ["nothing", "zeros", "short", "b's name"])
def test_a_wrong_opening_is_named_and_the_next_site_opens(small: Small, forge: str) -> None:
    """a counts in the sum, which b opens."""
    game = small("masked-bfv", "abcd")

    def wrong(reply: bytes) -> bytes:
        said = OpenedSum.from_bytes(reply)
        if forge == "b's name":
            return bytes(changed(said, sender="b").to_bytes())
        payload = {
            "nothing": b"",
            "zeros": bytes(len(said.payload)),
            "short": said.payload[:-1],
        }[forge]
        return OpenedSum("a", payload, signed(game, "a", "open", payload)).to_bytes()

    outcome = game.play(wire=replacing("open", "a", wrong))
    assert set(outcome.faults) == {"a"}
    game.assert_right(outcome, tuple("abcd"))


# Two layers


def test_a_leaked_he_key_opens_masked_vectors_only(small: Small) -> None:
    """With the key every upload decrypts, to slots that are uniform and unlike the vector."""
    length = 4000
    game = small("masked-bfv", "abcd", length=length)
    game.until("upload")
    replies = game.replies()
    key: SecretKey = game.states["b"].key
    encoding, slots = game.encoding, game.encoding.slots(length)
    for site, reply in replies.items():
        one = Sum(slots, key.parameters)
        one.add(Upload.from_bytes(reply).payload)
        opened = key.open(one.to_bytes(), slots, 1)
        vector = np.concatenate(game.slots(site))
        assert np.count_nonzero(opened == vector) < 5
        fields = (encoding.unpack(v[1:], length).astype(float) for v in (opened, vector))
        masked, true = fields
        cosine = masked @ true / np.linalg.norm(masked) / np.linalg.norm(true)
        assert abs(cosine) < 5 / length**0.5
        for bit in range(encoding.plain_bits):
            ones = int((opened >> np.uint64(bit) & np.uint64(1)).sum())
            assert abs(ones - slots / 2) < 5.5 * (slots / 4) ** 0.5


def test_broken_masks_leave_the_encryption(small: Small) -> None:
    """A server that could take masks off holds ciphertexts: what it sees looks random."""
    game = small("masked-bfv", "abc", length=4000)
    game.until("upload")
    payload = Upload.from_bytes(game.replies()["b"]).payload
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_no_secret_of_a_site_in_the_sum_crosses_the_wire(small: Small) -> None:
    """No HE seed, channel or mask secret; self-mask seeds only as shares."""
    game = small("masked-bfv", "abcde", length=50)
    outcome = game.play(vanish={"d": "upload"})
    seen = b"\0|".join([*game.sent, *game.received])
    assert game.begin.session in seen, "the search finds what is there"
    seeds = [draw for draw in game.drawn if len(draw) == 64]
    assert len(seeds) == 1
    secrets = [draw for draw in game.drawn if len(draw) == 32] + seeds
    assert len(secrets) == 3 * 5 + 1
    for secret in secrets:
        for start in range(0, len(secret), 16):
            assert secret[start : start + 16] not in seen
    game.assert_right(outcome, tuple("abce"))


# reveal = "sites"


def revealed(game: Any, site: str) -> Aggregate:
    """What `site` holds after it opened."""
    state = game.states[site]
    assert isinstance(state, masked_bfv.Revealed)
    return state.aggregate


def retagged(game: Any, site: str, tag: bytes) -> Callable[[bytes], bytes]:
    """A well-signed tag instead of the honest one."""
    signature = signed(game, site, "open", tag)
    return lambda reply: OpeningTag(site, tag, signature).to_bytes()


@given(st.integers(3, 6), st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sites_end_with_the_aggregate_that_the_server_would_have_got(
    small: Small, count: int, data: st.DataObject
) -> None:
    """Bit for bit, whoever vanishes in whichever phase; or both abort."""
    sites = "abcdef"[:count]
    phases = st.sampled_from(masked_bfv.PHASES)
    vanish = data.draw(st.dictionaries(st.sampled_from(sites), phases, max_size=2))
    weights = {s: i + 1 for i, s in enumerate(sites)} if data.draw(st.booleans()) else None
    cap = count if weights else 1
    encoding = FixedPoint(8, 1.0, count, masked_bfv.slot_bits(count), cap, data.draw(st.booleans()))
    options: Any = {"encoding": encoding, "weights": weights, "length": 5}
    blind = small("masked-bfv", sites, reveal="sites", **options)
    try:
        outcome = blind.play(vanish=vanish)
    except RoundAbortedError:
        left = count - len({s for s in vanish if s in sites})
        assert left < blind.begin.threshold or vanish.get("a") in ("advertise", "share")
        return
    assert isinstance(outcome, Withheld)
    assert len(outcome.holders) >= blind.begin.threshold
    game = small("masked-bfv", sites, **options)
    expected = game.play(vanish={s: p for s, p in vanish.items() if p != "open"}).aggregate
    assert outcome.contributors == expected.contributors
    salts = set()
    for site in outcome.holders:
        held = revealed(blind, site)
        assert held.contributors == expected.contributors
        assert held.total_weight == expected.total_weight
        assert np.array_equal(held.mean, expected.mean)
        salts.add(blind.states[site].salt)
    assert len(salts) == 1


def fields(message: Any) -> Iterator[bytes]:
    """Every byte string in a decoded message."""
    if isinstance(message, bytes):
        yield message
    elif isinstance(message, (list, tuple)):
        for item in message:
            yield from fields(item)


def test_nothing_that_the_server_sees_is_the_aggregate(small: Small) -> None:
    """Its slots, its integers, its floats and the salt: in no request and in no reply."""
    game = small("masked-bfv", "abcde", length=64, reveal="sites")
    outcome = game.play(vanish={"e": "upload"})
    assert not hasattr(outcome, "aggregate")
    seen = b"\0|".join([*game.sent, *game.received])
    truth = game.truth(tuple("abcd"))
    slots = _pack(truth, game.encoding.field_bits, game.encoding.fields)
    mean = revealed(game, "b").mean
    assert np.array_equal(mean, truth * (1 / (game.encoding.levels * 4)))
    bits = game.encoding.plain_bits
    secret = [
        pack(np.concatenate([np.array([4], np.uint64), slots]), bits).tobytes(),
        slots.tobytes(),
        truth.tobytes(),
        truth.astype(np.int32).tobytes(),
        mean.tobytes(),
        mean.astype(np.float32).tobytes(),
        game.states["b"].salt,
    ]
    for data in secret:
        for start in range(0, len(data) - 15, 8):
            assert data[start : start + 16] not in seen
    assert game.begin.session in seen, "the search finds what is there"
    assert b"OpeningTag" in seen
    assert b"OpenedSum" not in seen
    shown = repr(game.states["b"])
    assert shown == "Revealed()"


def test_a_server_that_tries_all_it_saw_opens_nothing(small: Small) -> None:
    """Every byte string on its wire and every secret it rebuilt, as HE seed and as channel key."""
    game = small("masked-bfv", "abcde", length=9, reveal="sites")
    game.play(vanish={"e": "upload"})
    heard = [msgspec.msgpack.decode(data) for data in [*game.sent, *game.received]]
    shares: dict[tuple[str, str], dict[int, Share]] = {}
    sealed, request = [], None
    for data in [*game.sent, *game.received]:
        match msgspec.msgpack.decode(data)[0]:
            case "ReleasedShares":
                said = ReleasedShares.from_bytes(data)
                point = game.begin.cohort.index(said.sender) + 1
                for kind in ("own", "mask"):
                    for item in getattr(said, kind):
                        held = shares.setdefault((kind, item.owner), {})
                        held[point] = Share.parse(item.share)
            case "RelayedSecrets":
                sealed += RelayedSecrets.from_bytes(data).seeds
            case "SumToOpen":
                request = SumToOpen.from_bytes(data)
    rebuilt = [combine(dict(list(s.items())[: game.begin.threshold])) for s in shares.values()]
    assert len(rebuilt) == 5
    assert len(sealed) == 5
    assert request is not None
    known = {seed._material for seed in rebuilt} | {f for m in heard for f in fields(m)}
    known = {k for k in known if len(k) >= 32}
    slots = game.encoding.slots(game.length)
    parameters = Parameters(game.encoding.plain_bits, game.encoding.cohort)

    def opens(material: bytes) -> bool:
        opened = SecretKey(Seed(material), parameters).open(request.payload, slots, 4)
        return int(opened[0]) == 4

    assert len(known) > 50
    for key in known:
        assert not any(opens(key[:size]) for size in (32, 64) if len(key) >= size)
        channel = ChannelKey(lambda size, key=key: key[:size])
        for item in sealed:
            context = bfv_sum._sealing_context(
                game.begin, item.maker, item.public, item.receiver, channel.public
            )
            with pytest.raises(ProtocolError):
                unseal(item.box, channel, (item.maker, item.public), context)
    [he_seed] = [drawn for drawn in game.drawn if len(drawn) == 64]
    assert opens(he_seed), "the trial would have noticed the right seed"


def test_a_tag_tests_no_guess_of_the_aggregate(small: Small) -> None:
    """The same vectors give the same aggregate and another tag in every round."""
    tags, means = set(), set()
    for number in (1, 2):
        game = small("masked-bfv", "abc", number=number, reveal="sites")
        game.until("open")
        replies = game.replies()
        tags |= {OpeningTag.from_bytes(reply).tag for reply in replies.values()}
        means.add(revealed(game, "a").mean.tobytes())
    assert len(means) == 1
    assert len(tags) == 2


def test_a_site_that_opened_otherwise_is_named_and_the_others_hold(small: Small) -> None:
    game = small("masked-bfv", "abcde", reveal="sites")
    outcome = game.play(wire=replacing("open", "b", retagged(game, "b", bytes(32))))
    assert outcome.holders == tuple("acde")
    assert outcome.contributors == tuple("abcde")
    assert outcome.faults == {"b": "open: opened another sum than the others"}


def test_fewer_than_the_threshold_that_agree_are_an_abort(small: Small) -> None:
    """Three of five agree where three are needed, and two do not suffice."""
    game = small("masked-bfv", "abcde", reveal="sites")
    assert game.begin.threshold == 3
    assert game.play(vanish={"a": "open", "b": "open"}).holders == tuple("cde")
    game = small("masked-bfv", "abcde", reveal="sites")
    with pytest.raises(RoundAbortedError, match="2 sites opened the sum, 3 needed"):
        game.play(vanish={"a": "open", "b": "open", "c": "open"})
    game = small("masked-bfv", "abcde", reveal="sites")

    def wire(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        for i, site in enumerate("abc" if requests.phase == "open" else ""):
            replies[site] = retagged(game, site, bytes([i]) * 32)(b"")
        return replies

    with pytest.raises(RoundAbortedError, match="0 sites opened the same sum, 3 needed") as caught:
        game.play(wire=wire)
    assert caught.value.culprits == tuple("abcde")


@pytest.mark.parametrize("forge", ["unsigned", "in b's name", "an opened sum"])
def test_a_tag_that_is_not_the_sites_own_does_not_count(small: Small, forge: str) -> None:
    game = small("masked-bfv", "abcd", reveal="sites")

    def wrong(reply: bytes) -> bytes:
        said = OpeningTag.from_bytes(reply)
        made = {
            "unsigned": changed(said, signature=bytes(64)),
            "in b's name": changed(said, sender="b"),
            "an opened sum": OpenedSum("a", b"", said.signature),
        }[forge]
        return bytes(made.to_bytes())

    outcome = game.play(wire=replacing("open", "a", wrong))
    assert outcome.holders == tuple("bcd")
    assert set(outcome.faults) == {"a"}


def test_a_holder_checks_quorum_and_count_and_opens_once(small: Small) -> None:
    """As an opener does, and it never sends what it opened, whatever the server asks."""
    game = small("masked-bfv", "abcd", reveal="sites")
    request = to_open(game)
    assert refuses(game, changed(request, confirmations=request.confirmations[:1]))
    assert refuses(game, changed(request, contributors=tuple("abc")))
    one = Sum(game.encoding.slots(game.length), game.states["a"].key.parameters)
    for _ in "abcd":
        one.add(game.states["a"].key.encrypt([np.zeros(one.slots, np.uint64)]))
    with pytest.raises(RefusedError, match="counts other updates") as caught:
        game.answer("a", "open", changed(request, payload=one.to_bytes()).to_bytes())
    assert caught.value.args == ("the sum counts other updates than the 4 it names",)
    game.answer("a", "open", request.to_bytes())
    with pytest.raises(RefusedError, match="does not come now"):
        game.answer("a", "open", request.to_bytes())


def test_a_sum_without_weight_is_refused_without_its_weight(small: Small) -> None:
    """The weight slot is a decrypted value too: it leaves in no error."""
    encoding = FixedPoint(8, 1.0, 3, masked_bfv.slot_bits(3), 5, weight_slot=True)
    weights = dict.fromkeys("abc", 0)
    game = small("masked-bfv", "abc", encoding=encoding, weights=weights, reveal="sites")
    request = to_open(game)
    with pytest.raises(RefusedError) as caught:
        game.answer("a", "open", request.to_bytes())
    assert str(caught.value) == "the opened sum cannot be averaged"


# Size


@pytest.mark.parametrize(("bits", "most"), [(16, 3.0), (8, 2.0)])
def test_a_real_upload_of_a_million_parameters(small: Small, bits: int, most: float) -> None:
    """At 16 sites: at most 3 bytes a parameter at 16 bits, 2 at 8, message and all."""
    length = 1_000_000
    encoding = FixedPoint(bits, 1.0, 16, masked_bfv.slot_bits(16))
    game = small("masked-bfv", "abcdefghijklmnop", length=2, encoding=encoding)
    game.vectors["a"] = Keystream(Seed(bytes(32)), "vector").uniform(length) * 2 - 1
    message = game.until("upload").messages["a"]
    assert len(game.answer("a", "upload", message)) <= most * length
