"""bfv: the plain aggregate bit for bit, a server without a key, and clients that refuse."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import bfv, bfv_sum, plain
from protocols.bfv import Parameters, SecretKey, Sum
from protocols.encoding import FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError, RefusedError, RoundAbortedError
from protocols.keystream import Seed
from protocols.messages import (
    Advertisement,
    Advertisements,
    Begin,
    OpenedSum,
    SealedSeed,
    SealedSeeds,
    SumToOpen,
    Upload,
)
from protocols.rounds import statement
from protocols.sealing import ChannelKey

Small = Callable[..., Any]


def signed(game: Any, site: str, phase: str, *said: bytes) -> bytes:
    """A signature that `site` really made in this round."""
    signature: bytes = game.identities[site].key.sign(
        statement(game.begin.context, phase, site, *said)
    )
    return signature


def parameters_of(game: Any) -> Parameters:
    """The round's BFV parameters."""
    return Parameters(game.encoding.plain_bits, game.encoding.cohort)


# The same aggregate as plain


@given(st.integers(2, 8), st.integers(0, 40), st.data())
@settings(max_examples=60)
def test_run_is_plain_run_bit_for_bit_under_any_dropouts(
    count: int, length: int, data: st.DataObject
) -> None:
    """Whatever phase each site vanishes in: the same mean, or an abort; never another sum."""
    sites = "abcdefgh"[:count]
    phase = st.sampled_from([*bfv_sum.PHASES, None, None, None])
    dropouts = {site: data.draw(phase) for site in sites}
    dropouts = {site: phase for site, phase in dropouts.items() if phase}
    encoding = FixedPoint(bits=9, clip=1.5, cohort=count, slot_bits=bfv_sum.slot_bits(count))
    value = st.floats(-2, 2, width=32)
    vectors = {
        site: np.array(data.draw(st.lists(value, min_size=length, max_size=length)), np.float64)
        for site in sites
    }

    def same_for_all(size: int) -> bytes:  # so that both protocols round alike
        return b"\x2a" * size

    def encrypted() -> Any:
        return bfv_sum.run(vectors, encoding, dropouts=dropouts, randomness=same_for_all)

    left = [site for site in sites if dropouts.get(site, "open") == "open"]
    openers = [site for site in left if site not in dropouts]
    if len(left) < 2 or not openers:
        with pytest.raises(RoundAbortedError):
            encrypted()
        return
    gone = {site: "upload" for site in sites if site not in left}
    clear = plain.run(vectors, encoding, dropouts=gone, randomness=same_for_all)
    sealed = encrypted()
    assert sealed.contributors == clear.contributors == tuple(left)
    assert sealed.total_weight == clear.total_weight
    assert np.array_equal(sealed.mean, clear.mean)


@given(st.integers(2, 6), st.data())
@settings(max_examples=40)
def test_any_dropouts_leave_an_exact_sum_or_an_abort(
    small: Small, count: int, data: st.DataObject
) -> None:
    """The same with stricter minima, independent rounding a site, and the faults named."""
    sites = "abcdefgh"[:count]
    minimum = data.draw(st.integers(2, count))
    phase = st.sampled_from([*bfv_sum.PHASES, None, None])
    vanish = {site: at for site in sites if (at := data.draw(phase))}
    left = tuple(site for site in sites if vanish.get(site, "open") == "open")
    openers = [site for site in left if site not in vanish]
    game = small("bfv", sites, minimum=minimum)
    if len(left) < minimum or not openers:
        with pytest.raises(RoundAbortedError):
            game.play(vanish=vanish)
        return
    outcome = game.play(vanish=vanish)
    game.assert_right(outcome, left)
    silent_at_opening = {site for site in left if site < openers[0]}
    assert set(outcome.faults) == (set(sites) - set(left)) | silent_at_opening


def test_weighted_run_is_plain_run_bit_for_bit() -> None:
    """With the weights in a slot of their own."""
    encoding = FixedPoint(12, 1.0, 4, bfv_sum.slot_bits(4), weight_cap=9, weight_slot=True)
    vectors = {site: np.random.default_rng(ord(site)).uniform(-1, 1, 5000) for site in "abcd"}
    weights = {"a": 9, "b": 0, "c": 4, "d": 1}
    clear, sealed = (
        protocol.run(vectors, encoding, weights, randomness=lambda size: b"\7" * size)
        for protocol in (plain, bfv_sum)
    )
    assert sealed.total_weight == clear.total_weight == 14
    assert np.array_equal(sealed.mean, clear.mean)


def test_every_round_has_a_fresh_key(small: Small) -> None:
    """Two rounds, and two runs of a round with other entropy, name other keys."""
    keys = set()
    for number in (1, 2, 3):
        game = small("bfv", number=number)
        game.until("upload")
        keys.add(Upload.from_bytes(game.replies()["a"]).key)
    assert len(keys) == 3


# The server holds no key


def reachable(root: Any) -> Iterator[Any]:
    """Everything that can be reached from `root` without passing through code and modules."""
    stop = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType)
    seen: set[int] = set()
    kept: list[Any] = []  # so that no identity is used twice
    heap = [root]
    while heap:
        item = heap.pop()
        if id(item) in seen or isinstance(item, stop):
            continue
        seen.add(id(item))
        kept.append(item)
        yield item
        if isinstance(item, types.GeneratorType):
            heap += [item.gi_frame.f_locals if item.gi_frame else None, item.gi_yieldfrom]
        elif isinstance(item, types.FunctionType):
            heap += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
        elif not isinstance(item, types.FrameType):
            heap += gc.get_referents(item)


def memory_of(root: Any) -> tuple[bytes, set[type]]:
    """All bytes held under `root`, joined, and the types of everything there."""
    found, kinds = [], set()
    for item in reachable(root):
        kinds.add(type(item))
        if isinstance(item, bytes | bytearray | memoryview):
            found.append(bytes(item))
        elif isinstance(item, np.ndarray):
            found.append(item.tobytes())
        elif isinstance(item, str):
            found.append(item.encode("utf-8", "replace"))
        elif isinstance(item, int):
            found.append(item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True))
    return b"\0|".join(found), kinds


SECRETS = (SecretKey, Seed, ChannelKey)


def test_the_server_never_holds_the_key_nor_sees_it_on_its_wire(small: Small) -> None:
    """All bytes on the wire, and all the server's memory in every phase, miss every secret."""
    game = small("bfv", "abcd", length=5000)
    memories, kinds = [], set()

    def look(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        memory, found = memory_of(game.server)
        memories.append(memory)
        kinds.update(found)
        return replies

    outcome = game.play(wire=look, vanish={"a": "share"})
    memories.append(memory_of(outcome)[0])
    assert len(memories) == 6, "advertise, two makers, upload, open, outcome"

    seeds = [draw for draw in game.drawn if len(draw) == 64]
    assert len(seeds) == 1, "the maker drew one HE seed"
    channel_secrets = [draw for draw in game.drawn if len(draw) == 32]
    assert len(channel_secrets) == 4
    derived = Seed(seeds[0]).derive("bfv secret key", size=64)
    seen = b"\0|".join([*memories, *game.sent, *game.received])
    assert game.begin.session in seen, "the search finds what is there"
    assert all(upload[-40:] in seen for upload in game.received)
    for secret in (*seeds, *channel_secrets, derived):
        for start in range(0, len(secret), 16):
            assert secret[start : start + 16] not in seen
            assert secret[start : start + 16].hex().encode() not in seen
    assert not kinds & set(SECRETS)
    assert not [kind for kind in kinds if "sealapi" in kind.__module__]


def test_the_search_would_find_a_key_that_leaked() -> None:
    """The walker reaches locals, closures, containers and slots of a suspended generator."""
    seed = Seed(bytes(range(64)))

    def leaks_seed() -> Iterator[None]:
        holder = {"deep": [(seed,)]}
        yield
        del holder

    def leaks_key() -> Iterator[None]:
        key = SecretKey(seed, Parameters(8, 2))

        def closure() -> SecretKey:
            return key

        yield
        del closure

    for leak, kind in ((leaks_seed(), Seed), (leaks_key(), SecretKey)):
        next(leak)
        assert kind in memory_of(leak)[1]
    found = leaks_seed()
    next(found)
    assert bytes(range(16)) in memory_of(found)[0]


def test_an_upload_shows_nothing_of_the_vector(small: Small) -> None:
    """The plain packing of a constant vector is nowhere in the upload, which looks random."""
    game = small("bfv", length=4000)
    game.vectors["b"] = np.ones(4000)
    game.until("upload")
    payload = Upload.from_bytes(game.replies()["b"]).payload
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


# Refusals of step 2: the maker


def advertised(game: Any) -> Advertisements:
    """The honest request of phase share."""
    return Advertisements.from_bytes(game.until("share").messages["a"])


def by(items: tuple[Advertisement, ...], **changed: Advertisement) -> bytes:
    """The advertisements with those of some sites exchanged."""
    return Advertisements(tuple(changed.get(i.sender, i) for i in items)).to_bytes()


def test_the_maker_refuses_a_swapped_channel_key(small: Small) -> None:
    """A server that puts its own key in place of b's cannot sign for b."""
    game = small("bfv")
    items = advertised(game).items
    servers_own = ChannelKey(lambda size: b"\3" * size).public
    swapped = by(items, b=Advertisement("b", servers_own, items[1].signature))
    with pytest.raises(ProtocolError) as caught:
        game.answer("a", "share", swapped)
    assert caught.value.culprits == ("b",)
    assert not [draw for draw in game.drawn if len(draw) == 64], "no seed was drawn"


def test_the_maker_refuses_the_key_of_one_site_under_the_name_of_another(small: Small) -> None:
    """c's signed key does not pass as b's."""
    game = small("bfv")
    items = advertised(game).items
    crossed = by(items, b=Advertisement("b", items[2].public, items[2].signature))
    with pytest.raises(ProtocolError):
        game.answer("a", "share", crossed)


def test_the_maker_refuses_another_key_under_its_own_name(small: Small) -> None:
    """Though correctly signed: it is not the key that this client just offered."""
    game = small("bfv")
    items = advertised(game).items
    other = ChannelKey(lambda size: b"\3" * size).public
    mine = Advertisement("a", other, signed(game, "a", "advertise", other))
    with pytest.raises(RefusedError, match="another channel key for a"):
        game.answer("a", "share", by(items, a=mine))


def test_the_maker_refuses_an_advertisement_replayed_from_another_round(small: Small) -> None:
    """Session and round are in the signature."""
    earlier = advertised(small("bfv", number=1)).items
    game = small("bfv", number=2)
    replayed = by(advertised(game).items, b=earlier[1])
    with pytest.raises(ProtocolError) as caught:
        game.answer("a", "share", replayed)
    assert caught.value.culprits == ("b",)


def test_the_maker_refuses_too_few_and_strange_sites(small: Small) -> None:
    """Fewer than the minimum, or a pinned site that is not of this cohort."""
    game = small("bfv", minimum=3, also_pinned=("d",))
    items = advertised(game).items
    with pytest.raises(RefusedError, match="below the 3"):
        game.answer("a", "share", Advertisements(items[:2]).to_bytes())
    public = ChannelKey(lambda size: b"\3" * size).public
    d = Advertisement("d", public, signed(game, "d", "advertise", public))
    with pytest.raises(RefusedError, match="outside the cohort"):
        game.answer("a", "share", Advertisements((*items, d)).to_bytes())


def test_only_the_lowest_site_makes_the_seed(small: Small) -> None:
    """Asked to make the seed although a is there, b refuses."""
    game = small("bfv")
    with pytest.raises(RefusedError, match="a makes the seed"):
        game.answer("b", "share", advertised(game).to_bytes())


# Refusals of step 3: the receivers of the seed


def sealed_for(game: Any, site: str) -> SealedSeed:
    """The honest request of phase upload."""
    return SealedSeed.from_bytes(game.until("upload").messages[site])


def resealed(game: Any, item: SealedSeed, by_site: str = "a", **changes: Any) -> bytes:
    """A sealed seed changed, and signed again by its maker."""
    fields = {name: getattr(item, name) for name in item.__struct_fields__} | changes
    said = (fields["public"], fields["receiver"].encode(), fields["key"], fields["box"])
    fields["signature"] = signed(game, by_site, "share", *said)
    return SealedSeed(**fields).to_bytes()


def test_a_client_refuses_a_seed_sealed_for_someone_else(small: Small) -> None:
    """c's seed sent to b; also with the name exchanged, by the server and by the maker."""
    game = small("bfv")
    item = sealed_for(game, "c")
    with pytest.raises(RefusedError, match="sealed for c, not b"):
        game.answer("b", "upload", item.to_bytes())
    renamed = SealedSeed(item.maker, item.public, "b", item.key, item.box, item.signature)
    with pytest.raises(ProtocolError):
        game.answer("b", "upload", renamed.to_bytes())
    with pytest.raises(ProtocolError, match="does not open"):
        game.answer("b", "upload", resealed(game, item, receiver="b"))


@pytest.mark.parametrize("at", [0, 11, 12, 50, 75, 76, 91])
def test_a_client_refuses_a_tampered_box(small: Small, at: int) -> None:
    """A byte changed by the server breaks the signature; by the maker, the box."""
    game = small("bfv")
    item = sealed_for(game, "b")
    box = bytearray(item.box)
    box[at] ^= 1
    changed = SealedSeed(
        item.maker, item.public, item.receiver, item.key, bytes(box), item.signature
    )
    for message in (changed.to_bytes(), resealed(game, item, box=bytes(box))):
        with pytest.raises(ProtocolError) as caught:
            game.answer("b", "upload", message)
        assert caught.value.culprits == ("a",)


def test_a_client_refuses_a_seed_that_is_not_the_one_named(small: Small) -> None:
    """A maker that names one seed to all and seals another to one is found out."""
    game = small("bfv")
    message = resealed(game, sealed_for(game, "b"), key=b"\1" * 32)
    with pytest.raises(ProtocolError, match="another seed than it named") as caught:
        game.answer("b", "upload", message)
    assert caught.value.culprits == ("a",)


def test_a_client_refuses_a_seed_from_outside_the_cohort(small: Small) -> None:
    """Pinned in the roster is not enough to make this round's key."""
    game = small("bfv", also_pinned=("d",))
    message = resealed(game, sealed_for(game, "b"), by_site="d", maker="d")
    with pytest.raises(RefusedError, match="not in the cohort"):
        game.answer("b", "upload", message)


def test_a_client_refuses_a_seed_signed_by_another_than_its_maker(small: Small) -> None:
    """c cannot make the key in a's name."""
    game = small("bfv")
    item = sealed_for(game, "b")
    said = (item.public, b"b", item.key, item.box)
    signature = game.identities["c"].key.sign(statement(game.begin.context, "share", "a", *said))
    forged = SealedSeed("a", item.public, "b", item.key, item.box, signature)
    with pytest.raises(ProtocolError):
        game.answer("b", "upload", forged.to_bytes())


def test_a_client_refuses_a_seed_of_another_round(small: Small) -> None:
    """Replayed whole, from a round whose maker was the same."""
    recorded = sealed_for(small("bfv", number=1), "b").to_bytes()
    game = small("bfv", number=2)
    game.until("upload")
    with pytest.raises(ProtocolError):
        game.answer("b", "upload", recorded)


def test_a_client_uploads_once(small: Small) -> None:
    """A noised vector enters one upload only: asked again, the client refuses."""
    game = small("bfv")
    message = game.until("upload").messages["b"]
    game.answer("b", "upload", message)
    with pytest.raises(RefusedError):
        game.answer("b", "upload", message)


# Refusals of step 4: the opener


def to_open(game: Any) -> SumToOpen:
    """The honest request of phase open."""
    return SumToOpen.from_bytes(game.until("open").messages["a"])


def test_a_client_opens_once(small: Small) -> None:
    """The second opening is refused, be it of the same sum or of another."""
    game = small("bfv")
    message = to_open(game).to_bytes()
    game.answer("a", "open", message)
    with pytest.raises(RefusedError):
        game.answer("a", "open", message)


def test_an_opener_refuses_a_sum_of_fewer_than_the_minimum(small: Small) -> None:
    """A sum of two, correctly added, where three are the minimum."""
    game = small("bfv", minimum=3)
    game.until("upload")
    replies = game.replies()
    total = Sum(game.encoding.slots(game.length), parameters_of(game))
    for site in "ab":
        total.add(Upload.from_bytes(replies[site]).payload)
    with pytest.raises(RefusedError, match="below the 3"):
        game.answer("a", "open", SumToOpen(("a", "b"), (), total.to_bytes()).to_bytes())


def test_an_opener_refuses_one_upload_dressed_as_a_sum(small: Small) -> None:
    """The server names two contributors but sends one upload: the count slot tells."""
    game = small("bfv")
    game.until("upload")
    replies = game.replies()
    slots = game.encoding.slots(game.length)
    one = Sum(slots, parameters_of(game))
    one.add(Upload.from_bytes(replies["b"]).payload)
    with pytest.raises(MalformedMessageError):
        SumToOpen.from_bytes(SumToOpen(("b",), (), one.to_bytes()).to_bytes())
    padded = one.to_bytes() + bytes(64)
    with pytest.raises(RefusedError, match="than the 2 it names"):
        game.answer("a", "open", SumToOpen(("b", "c"), (), padded).to_bytes())


def test_an_opener_refuses_a_sum_that_counts_otherwise(small: Small) -> None:
    """A site that counts itself five times is noticed, and nothing of the sum leaves."""
    game = small("bfv")
    honest = game.slots

    def slots(site: str) -> Any:
        chunks = honest(site)
        if site == "b":
            chunks[0][0] = 5
        return chunks

    game.slots = slots
    message = to_open(game).to_bytes()
    with pytest.raises(RefusedError, match="than the 3 it names") as caught:
        game.answer("a", "open", message)
    assert "7" not in str(caught.value)


def test_an_opener_refuses_contributors_outside_the_cohort(small: Small) -> None:
    """The right sum under a stranger's name."""
    game = small("bfv", also_pinned=("d",))
    payload = to_open(game).payload
    for name in ("d", "stranger"):
        with pytest.raises(RefusedError, match="outside the cohort"):
            game.answer("a", "open", SumToOpen(("a", "b", name), (), payload).to_bytes())


def test_an_opener_refuses_a_sum_of_another_length(small: Small) -> None:
    """Fewer seeds than contributors, a coefficient of q, a byte less: malformed."""
    game = small("bfv")
    payload = to_open(game).payload
    for broken in (payload[:-64], payload[:-1], payload + b"\0", b"\xff" * len(payload), b""):
        with pytest.raises(MalformedMessageError):
            game.answer("a", "open", SumToOpen(("a", "b", "c"), (), broken).to_bytes())


# The server goes on without whoever breaks the protocol


def replacing(phase: str, site: str, forge: Callable[[bytes], bytes]) -> Any:
    """A wire on which the reply of `site` in `phase` is forged from its honest one."""

    def wire(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        if requests.phase == phase and site in replies:
            replies[site] = forge(replies[site])
        return replies

    return wire


def test_a_site_with_an_unusable_channel_key_is_named_and_left_out(small: Small) -> None:
    """A signed X25519 key of low order must not make honest makers fail one after the other."""
    game = small("bfv")

    def low_order(reply: bytes) -> bytes:
        del reply
        public = bytes(32)
        return Advertisement("b", public, signed(game, "b", "advertise", public)).to_bytes()

    outcome = game.play(wire=replacing("advertise", "b", low_order))
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


@pytest.mark.parametrize(
    "forge",
    [
        lambda game, reply: b"",
        lambda game, reply: reply[:-1],
        lambda game, reply: game.begin.to_bytes(),
        lambda game, reply: Advertisement(
            "c", Advertisement.from_bytes(reply).public, Advertisement.from_bytes(reply).signature
        ).to_bytes(),
        lambda game, reply: Advertisement("b", bytes(32), bytes(64)).to_bytes(),
    ],
    ids=["empty", "cut", "other class", "other name", "unsigned"],
)
def test_a_broken_advertisement_costs_its_sender_the_round(
    small: Small, forge: Callable[[Any, bytes], bytes]
) -> None:
    """b is named; a and c go on."""
    game = small("bfv")
    outcome = game.play(wire=replacing("advertise", "b", lambda reply: forge(game, reply)))
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


def test_an_advertisement_of_another_round_costs_its_sender_the_round(small: Small) -> None:
    """Replayed from round 1 in round 2."""
    recorded = advertised(small("bfv", number=1)).items[1].to_bytes()
    game = small("bfv", number=2)
    outcome = game.play(wire=replacing("advertise", "b", lambda reply: recorded))
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


def remade(game: Any, reply: bytes, **changes: Any) -> bytes:
    """The maker's reply with every sealed seed changed and signed again."""
    items = SealedSeeds.from_bytes(reply).items
    made = [SealedSeed.from_bytes(resealed(game, item, **changes)) for item in items]
    return SealedSeeds(tuple(made)).to_bytes()


@pytest.mark.parametrize(
    "forge",
    [
        lambda game, reply: b"",
        lambda game, reply: SealedSeeds(SealedSeeds.from_bytes(reply).items[:2]).to_bytes(),
        lambda game, reply: SealedSeeds(SealedSeeds.from_bytes(reply).items[1:]).to_bytes(),
        lambda game, reply: remade(game, reply, public=b"\5" * 32),
        lambda game, reply: remade(game, reply, maker="b"),
        lambda game, reply: reply[:-64] + bytes(64),
    ],
    ids=["empty", "one too few", "none for itself", "other key", "other maker", "unsigned"],
)
def test_a_broken_maker_is_named_and_the_next_site_makes_the_seed(
    small: Small, forge: Callable[[Any, bytes], bytes]
) -> None:
    """a is out, b makes the seed, b and c are summed."""
    game = small("bfv")
    outcome = game.play(wire=replacing("share", "a", lambda reply: forge(game, reply)))
    assert set(outcome.faults) == {"a"}
    game.assert_right(outcome, ("b", "c"))


def upload_of(game: Any, site: str, key: bytes, payload: bytes) -> bytes:
    """A well-signed upload of any content."""
    return Upload(site, key, payload, signed(game, site, "upload", key, payload)).to_bytes()


def test_an_upload_under_a_key_of_its_own_is_refused(small: Small) -> None:
    """A foreign ciphertext, well formed, signed, and honest about its key."""
    game = small("bfv")
    seed = Seed(b"\1" * 64)
    key = SecretKey(seed, Parameters(game.encoding.plain_bits, 3))
    payload = bytes(key.encrypt(game.slots("b")))

    def foreign(reply: bytes) -> bytes:
        return upload_of(game, "b", seed.derive("key id", game.begin.context), payload)

    outcome = game.play(wire=replacing("upload", "b", foreign))
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_wrong_number_of_blocks_is_refused(small: Small, blocks: int) -> None:
    """A block less and a block more than the round's length, signed."""
    game = small("bfv", length=2 * bfv.DEGREE * 4)
    assert game.encoding.slots(game.length) > 2 * bfv.DEGREE
    size = blocks * parameters_of(game).block_bytes
    wrong = bytes(range(1, 251)) * (size // 250 + 1)

    def forge(reply: bytes) -> bytes:
        key = Upload.from_bytes(reply).key
        return upload_of(game, "b", key, wrong[:size])

    outcome = game.play(wire=replacing("upload", "b", forge))
    assert set(outcome.faults) == {"b"}
    game.assert_right(outcome, ("a", "c"))


def test_a_foreign_ciphertext_under_this_rounds_name_gives_an_abort_and_no_sum(
    small: Small,
) -> None:
    """It cannot be told from others before the opening; then the count slot is noise."""
    game = small("bfv")
    key = SecretKey(Seed(b"\1" * 64), Parameters(game.encoding.plain_bits, 3))
    payload = bytes(key.encrypt(game.slots("b")))

    def foreign(reply: bytes) -> bytes:
        return upload_of(game, "b", Upload.from_bytes(reply).key, payload)

    with pytest.raises(RoundAbortedError):
        game.play(wire=replacing("upload", "b", foreign))
    assert all(isinstance(error, RefusedError) for error in game.refusals.values())
    assert set(game.refusals) == set("abc")


@pytest.mark.parametrize(
    "forge",
    [
        lambda game, reply: b"",
        lambda game, reply: reply[:-1],
        lambda game, reply: OpenedSum("b", *rest_of(reply)).to_bytes(),
        lambda game, reply: signed_sum(game, "a", OpenedSum.from_bytes(reply).payload[:-1]),
        lambda game, reply: signed_sum(game, "a", OpenedSum.from_bytes(reply).payload + b"\0"),
        lambda game, reply: signed_sum(game, "a", b""),
        lambda game, reply: signed_sum(game, "a", bytes(len(OpenedSum.from_bytes(reply).payload))),
    ],
    ids=["empty", "cut", "other name", "short", "long", "nothing", "zeros"],
)
def test_a_broken_opening_is_named_and_the_next_site_opens(
    small: Small, forge: Callable[[Any, bytes], bytes]
) -> None:
    """a still counts in the sum, which b opens."""
    game = small("bfv")
    outcome = game.play(wire=replacing("open", "a", lambda reply: forge(game, reply)))
    assert set(outcome.faults) == {"a"}
    game.assert_right(outcome, ("a", "b", "c"))


def rest_of(reply: bytes) -> tuple[bytes, bytes]:
    """Payload and signature of an opened sum."""
    message = OpenedSum.from_bytes(reply)
    return message.payload, message.signature


def signed_sum(game: Any, site: str, payload: bytes) -> bytes:
    """A well-signed opened sum of any content."""
    return OpenedSum(site, payload, signed(game, site, "open", payload)).to_bytes()


def test_a_server_that_forwards_another_cohort_gets_nothing(small: Small) -> None:
    """Sites that were begun with different cohorts do not verify each other's messages."""
    game = small("bfv", "abcd")
    two = Begin(game.begin.session, 1, ("a", "b", "c"), 2, 1, bytes(32)).to_bytes()

    def relay(phase: str, site: str, message: bytes) -> bytes:
        return two if phase == "advertise" and site == "c" else message

    outcome = game.play(relay=relay)
    assert set(outcome.faults) == {"c"}
    game.assert_right(outcome, ("a", "b", "d"))


# Several openers

OPENED = pytest.mark.parametrize("protocol", ["bfv", "ckks", "masked-bfv"])


def otherwise(game: Any, *liars: str, alike: bool = False) -> Any:
    """A wire on which each of `liars` announces a sum that counts right and is not the sum."""

    def wire(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        if requests.phase == "open":
            for site in sorted(set(liars) & set(replies)):
                payload = bytearray(OpenedSum.from_bytes(replies[site]).payload)
                payload[game.encoding.plain_bits // 8 + 2] ^= 1 if alike else 1 << liars.index(site)
                signature = signed(game, site, "open", bytes(payload))
                replies[site] = OpenedSum(site, bytes(payload), signature).to_bytes()
        return replies

    return wire


def asked_to_open(game: Any, wire: Any = None, vanish: str = "") -> list[tuple[str, ...]]:
    """Play to the end; who was asked to open, request after request."""
    asked: list[tuple[str, ...]] = []

    def watch(requests: Any, replies: dict[str, bytes]) -> Mapping[str, bytes]:
        if requests.phase == "open":
            asked.append(tuple(requests.messages))
        return wire(requests, replies) if wire else replies  # type: ignore[no-any-return]

    game.assert_right(game.play(wire=watch, vanish=dict.fromkeys(vanish, "open")), tuple("abcde"))
    return asked


@OPENED
def test_as_many_sites_open_as_are_asked_for(small: Small, protocol: str) -> None:
    """Each by itself, and for one that is silent the next one."""
    assert asked_to_open(small(protocol, "abcde")) == [("a",)]
    assert asked_to_open(small(protocol, "abcde", openers=3)) == [("a", "b", "c")]
    game = small(protocol, "abcde", openers=3)
    assert asked_to_open(game, vanish="bd") == [("a", "b", "c"), ("d",), ("e",)]


@OPENED
@pytest.mark.parametrize(
    ("openers", "liars", "alike", "culprits"),
    [
        (2, "a", False, "ab"),
        (3, "b", False, "b"),
        (3, "ab", False, "abc"),
        (3, "ab", True, "c"),
        (4, "ab", True, "abcd"),
        (5, "ce", False, "ce"),
    ],
)
def test_openers_that_disagree_are_an_abort_that_names_the_minority(
    small: Small, protocol: str, openers: int, liars: str, alike: bool, culprits: str
) -> None:
    """Where there is no majority all are named: nobody can tell who is right."""
    game = small(protocol, "abcde", openers=openers)
    with pytest.raises(RoundAbortedError, match="opened the sum differently") as caught:
        game.play(wire=otherwise(game, *liars, alike=alike))
    assert caught.value.culprits == tuple(culprits)


@OPENED
def test_a_lone_opener_can_lie_and_two_cannot(small: Small, protocol: str) -> None:
    """What several openers are for."""
    game = small(protocol, "abcde")
    outcome = game.play(wire=otherwise(game, "a"))
    with pytest.raises(AssertionError):
        game.assert_right(outcome, tuple("abcde"))
    game = small(protocol, "abcde", openers=2)
    with pytest.raises(RoundAbortedError):
        game.play(wire=otherwise(game, "a"))


@OPENED
def test_fewer_openers_than_asked_for_are_an_abort(small: Small, protocol: str) -> None:
    """Two of five are left to open where three must."""
    game = small(protocol, "abcde", openers=3)
    with pytest.raises(RoundAbortedError, match="2 sites opened the sum, 3 needed") as caught:
        game.play(vanish=dict.fromkeys("abc", "open"))
    assert caught.value.culprits == ("a", "b", "c")
