"""bfv: uploads under one additive BFV key that the sites share and the server never sees.

1. advertise  C -> S  a fresh signed X25519 key
2. share      the lowest site -> S -> C  this round's HE seed, sealed end to end for every site
3. upload     C -> S  the encoded vector, encrypted; S adds ciphertexts
4. open       S -> k sites -> S  the sum, decrypted once by each; k = 1 unless asked otherwise

Stops an honest-but-curious server that colludes with no site. A site that colludes with the server
opens everything: that is what masked-bfv is for. The key is fresh in every round.

The steps do not know what encrypts: they take a `Scheme`, which is `BFV` here and CKKS in ckks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

from protocols.bfv import Parameters, SecretKey, Sum, largest_plain_bits
from protocols.bitpacking import pack, unpack
from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError, RefusedError, RoundAbortedError
from protocols.identity import Identity, Roster, digest
from protocols.keystream import Randomness, Seed
from protocols.messages import (
    HE_SEED_BYTES,
    Advertisement,
    Advertisements,
    Begin,
    OpenedSum,
    SealedSeed,
    SealedSeeds,
    SumToOpen,
    Upload,
)
from protocols.rounds import (
    Cohort,
    Expected,
    Outcome,
    Part,
    Party,
    Requests,
    ServerSide,
    Slots,
    Steps,
    in_turn,
    majority,
    public_weight,
    statement,
)
from protocols.sealing import ChannelKey, check_public, seal, unseal

PHASES = ("advertise", "share", "upload", "open")


def slot_bits(cohort: int) -> int:
    """Bits that a slot offers to a sum over `cohort` sites."""
    return largest_plain_bits(cohort)


class Key(Protocol):
    """A round's HE key at a site, as `protocols.bfv.SecretKey` is one."""

    def encrypt(self, chunks: Slots) -> bytearray:
        """An encoded vector as it crosses the wire."""

    def open(self, wire: bytes, slots: int, contributions: int) -> NDArray[np.uint64]:
        """The slots of a sum; ProtocolError where its bytes are malformed."""


class RunningSum(Protocol):
    """What a server adds encrypted vectors in, as `protocols.bfv.Sum` is one."""

    def add(self, wire: bytes) -> None:
        """Add one, or leave the sum as it was and raise ProtocolError."""

    def to_bytes(self) -> bytes:
        """The sum as it crosses the wire."""


@final
@dataclass(frozen=True, slots=True)
class Scheme:
    """Additive encryption of vectors of some length: the key of a seed, and an empty sum."""

    key: Callable[[Seed, Encoding, int], Key]
    empty: Callable[[Encoding, int], RunningSum]


def _bfv_key(seed: Seed, encoding: Encoding, length: int) -> SecretKey:
    del length
    return SecretKey(seed, Parameters(encoding.plain_bits, encoding.cohort))


def _bfv_sum(encoding: Encoding, length: int) -> Sum:
    return Sum(encoding.slots(length), Parameters(encoding.plain_bits, encoding.cohort))


BFV: Final = Scheme(_bfv_key, _bfv_sum)


def _sealing_context(begin: Begin, maker: str, public: bytes, to: str, to_public: bytes) -> bytes:
    return digest("he seed", begin.context, maker.encode(), public, to.encode(), to_public)


def _key_id(begin: Begin, seed: Seed) -> bytes:
    """Names a seed without telling anything of it."""
    return seed.derive("key id", begin.context)


@final
@dataclass(frozen=True, slots=True)
class Advertised:
    """A client that has offered its channel key."""

    expected: Expected
    begin: Begin
    channel: ChannelKey


@final
@dataclass(frozen=True, slots=True)
class Uploaded:
    """A client that has uploaded and holds the round's HE key."""

    expected: Expected
    begin: Begin
    key: Key


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A client that has opened the round's sum; it opens nothing more."""


def client_step1(
    expected: Expected, message: bytes, randomness: Randomness
) -> tuple[Advertised, bytes]:
    """Begin -> Advertisement: check the round, offer a fresh channel key."""
    begin = expected.check(message)
    me, channel = expected.identity, ChannelKey(randomness)
    signature = me.key.sign(statement(begin.context, "advertise", me.name, channel.public))
    reply = Advertisement(me.name, channel.public, signature)
    return Advertised(expected, begin, channel), reply.to_bytes()


def client_step2(
    state: Advertised, message: bytes, randomness: Randomness
) -> tuple[Advertised, bytes]:
    """Advertisements -> SealedSeeds: the maker draws the HE seed and seals it for everyone.

    It seals one for itself too and forgets the seed, so that all sites go on alike.
    """
    me, begin = state.expected.identity, state.begin
    items = Advertisements.from_bytes(message).items
    names = tuple(item.sender for item in items)
    state.expected.check_contributors(begin, names)
    if me.name != names[0]:
        raise RefusedError(f"{names[0]} makes the seed of this round, not {me.name}")
    for item in items:
        said = statement(begin.context, "advertise", item.sender, item.public)
        me.roster.verify(item.sender, item.signature, said)
    if items[0].public != state.channel.public:
        raise RefusedError(f"the server relays another channel key for {me.name}")
    peers = {item.sender: item.public for item in items}
    return state, SealedSeeds(seal_seeds(me, begin, state.channel, peers, randomness)).to_bytes()


def client_step3(
    state: Advertised, message: bytes, slots: Slots, randomness: Randomness
) -> tuple[Uploaded, bytes]:
    """SealedSeed -> Upload: open the seed, derive the key, encrypt the encoded vector."""
    del randomness  # SEAL draws encryption errors from the operating system
    return upload(BFV, state, message, slots)


def upload(
    scheme: Scheme, state: Advertised, message: bytes, slots: Slots
) -> tuple[Uploaded, bytes]:
    """`client_step3` under any scheme."""
    expected, begin = state.expected, state.begin
    me, sealed = expected.identity, SealedSeed.from_bytes(message)
    seed = open_seed(expected, begin, state.channel, sealed)
    key = scheme.key(seed, expected.encoding, expected.length)
    payload = bytes(key.encrypt(slots))
    signature = me.key.sign(statement(begin.context, "upload", me.name, sealed.key, payload))
    reply = Upload(me.name, sealed.key, payload, signature)
    return Uploaded(expected, begin, key), reply.to_bytes()


def client_step4(state: Uploaded, message: bytes, randomness: Randomness) -> tuple[Opened, bytes]:
    """SumToOpen -> OpenedSum: decrypt this round's sum, once.

    The count slot catches faults, not attacks: BFV and CKKS are malleable, and an opener cannot
    authenticate a ciphertext.
    """
    del randomness
    expected, begin = state.expected, state.begin
    request = SumToOpen.from_bytes(message)
    expected.check_contributors(begin, request.contributors)
    return Opened(), open_sum(expected, begin, state.key, request)


def seal_seeds(
    me: Identity,
    begin: Begin,
    channel: ChannelKey,
    peers: Mapping[str, bytes],
    randomness: Randomness,
) -> tuple[SealedSeed, ...]:
    """A fresh HE seed, sealed and signed for each of `peers` (name -> channel key)."""
    seed = Seed.draw(randomness, HE_SEED_BYTES)
    key, public = _key_id(begin, seed), channel.public
    sealed = []
    for peer, theirs in peers.items():
        context = _sealing_context(begin, me.name, public, peer, theirs)
        box = seal(seed, channel, (peer, theirs), context, randomness)
        said = statement(begin.context, "share", me.name, public, peer.encode(), key, box)
        sealed.append(SealedSeed(me.name, public, peer, key, box, me.key.sign(said)))
    return tuple(sealed)


def open_seed(expected: Expected, begin: Begin, channel: ChannelKey, sealed: SealedSeed) -> Seed:
    """The round's HE seed that was sealed for this site, after all checks."""
    me = expected.identity
    if sealed.receiver != me.name:
        raise RefusedError(f"this seed is sealed for {sealed.receiver}, not {me.name}")
    if sealed.maker not in begin.cohort:
        raise RefusedError(f"{sealed.maker} made the seed but is not in the cohort")
    me.roster.verify(sealed.maker, sealed.signature, _shared(begin, sealed))
    context = _sealing_context(begin, sealed.maker, sealed.public, me.name, channel.public)
    seed = unseal(sealed.box, channel, (sealed.maker, sealed.public), context)
    if _key_id(begin, seed) != sealed.key:
        raise ProtocolError(f"{sealed.maker} sealed another seed than it named", [sealed.maker])
    return seed


def open_sum(expected: Expected, begin: Begin, key: Key, request: SumToOpen) -> bytes:
    """The OpenedSum; RefusedError when its count slot does not count the contributors."""
    opened = opened_slots(expected, key, request)
    payload = pack(opened, expected.encoding.plain_bits).tobytes()
    me = expected.identity
    signature = me.key.sign(statement(begin.context, "open", me.name, payload))
    return OpenedSum(me.name, payload, signature).to_bytes()


def opened_slots(expected: Expected, key: Key, request: SumToOpen) -> NDArray[np.uint64]:
    """The slots of the sum; RefusedError when the first does not count the contributors."""
    count = len(request.contributors)
    opened = key.open(request.payload, expected.encoding.slots(expected.length), count)
    if int(opened[0]) != count:
        # What it does count stays here: a decrypted slot of a ciphertext that the sender chose.
        raise RefusedError(f"the sum counts other updates than the {count} it names")
    return opened


def _shared(begin: Begin, sealed: SealedSeed) -> bytes:
    said = (sealed.public, sealed.receiver.encode(), sealed.key, sealed.box)
    return statement(begin.context, "share", sealed.maker, *said)


def server(
    begin: Begin,
    roster: Roster,
    encoding: Encoding,
    length: int,
    weights: Mapping[str, int] | None = None,
    openers: int = 1,
    scheme: Scheme = BFV,
) -> ServerSide:
    """The server's round. It relays the sealed seed, adds ciphertexts, and holds no key.

    openers: how many sites must open the sum, each by itself, and agree on every bit.
    Raises RoundAbortedError when fewer than the minimum cohort are left in any phase, or openers
    disagree.
    """
    cohort = Cohort(begin, roster)

    # advertise: everyone offers a fresh channel key
    def advertised(site: str, data: bytes) -> Advertisement:
        item = Advertisement.from_bytes(data)
        cohort.verify("advertise", item.sender, site, item.signature, item.public)
        check_public(site, item.public)
        return item

    requests = Requests("advertise", dict.fromkeys(begin.cohort, begin.to_bytes()))
    keys = cohort.accept(requests, (yield requests), advertised)
    cohort.require(len(keys), "sites advertised a key")

    # share: the lowest site draws the HE seed and seals it for every other; if it cannot, the next
    def shared(site: str, data: bytes) -> dict[str, SealedSeed]:
        items = SealedSeeds.from_bytes(data).items
        check_seeds(cohort, site, keys[site].public, items)
        if tuple(item.receiver for item in items) != tuple(keys):
            raise ProtocolError(f"{site} did not seal the seed for every site", [site])
        return {item.receiver: item for item in items}

    seeds: dict[str, SealedSeed] = {}
    while not seeds:
        cohort.require(len(keys), "sites are left to share a key")
        maker = next(iter(keys))
        message = Advertisements(tuple(keys.values())).to_bytes()
        requests = Requests("share", {maker: message})
        made = cohort.accept(requests, (yield requests), shared)
        seeds = made.get(maker, {})
        if not seeds:
            del keys[maker]
    key_id = next(iter(seeds.values())).key

    # upload: the encoded vectors, encrypted; a refused upload leaves the sum as it was
    total = scheme.empty(encoding, length)

    def added(site: str, data: bytes) -> None:
        upload = Upload.from_bytes(data)
        cohort.verify("upload", upload.sender, site, upload.signature, upload.key, upload.payload)
        if upload.key != key_id:
            raise ProtocolError(f"{site} encrypted under another key than this round's", [site])
        total.add(upload.payload)

    requests = Requests("upload", {site: item.to_bytes() for site, item in seeds.items()})
    contributors = tuple(cohort.accept(requests, (yield requests), added))
    cohort.require(len(contributors), "uploads")

    # open: key holders decrypt the sum; for one that does not answer, the next one is asked
    request = SumToOpen(contributors, (), total.to_bytes())
    weight = public_weight(weights, contributors)
    holders = in_turn(contributors, begin.round)
    aggregate = yield from opening(cohort, holders, request, encoding, length, weight, openers)
    return Outcome(aggregate, cohort.faults)


def check_seeds(cohort: Cohort, site: str, public: bytes, items: tuple[SealedSeed, ...]) -> None:
    """ProtocolError unless `site` itself sealed and signed all of `items` with `public`."""
    for item in items:
        said = (item.public, item.receiver.encode(), item.key, item.box)
        cohort.verify("share", item.maker, site, item.signature, *said)
    if items[0].public != public:
        raise ProtocolError(f"{site} sealed with another key than it advertised", [site])


def opening(
    cohort: Cohort,
    holders: tuple[str, ...],
    request: SumToOpen,
    encoding: Encoding,
    length: int,
    weight: int | None,
    openers: int,
) -> Part[Aggregate]:
    """Phase open: ask `holders` of the key in turn until `openers` of them opened the sum.

    Raises RoundAbortedError when fewer do, or what they opened is not equal bit for bit: then the
    culprits are those outside the majority, and all of them where there is none.
    """
    slots, message = encoding.slots(length), request.to_bytes()

    def parse(site: str, data: bytes) -> tuple[bytes, Aggregate]:
        answer = OpenedSum.from_bytes(data)
        cohort.verify("open", answer.sender, site, answer.signature, answer.payload)
        try:
            packed = np.frombuffer(answer.payload, np.uint8)
            opened = unpack(packed, slots, encoding.plain_bits)
        except ValueError as error:
            raise MalformedMessageError(f"opened sum: {error}", [site]) from None
        return answer.payload, encoding.decode(opened, length, request.contributors, weight)

    answers: dict[str, tuple[bytes, Aggregate]] = {}
    waiting, number = list(holders), cohort.begin.round
    while len(answers) < openers and waiting:
        missing = openers - len(answers)
        requests = Requests("open", dict.fromkeys(waiting[:missing], message))
        del waiting[:missing]
        answers |= cohort.accept(requests, (yield requests), parse)
    if not answers:
        raise RoundAbortedError(f"round {number}: no site opened the sum", cohort.faults)
    cohort.require(len(answers), "sites opened the sum", openers)
    _, odd = majority({site: payload for site, (payload, _) in answers.items()})
    if odd:
        raise RoundAbortedError(
            f"round {number}: sites opened the sum differently ({', '.join(odd)})", odd
        )
    return next(aggregate for _, aggregate in answers.values())


def run(
    vectors: Mapping[str, NDArray[np.floating]],
    encoding: FixedPoint,
    weights: Mapping[str, int] | None = None,
    dropouts: Mapping[str, str] | None = None,
    randomness: Randomness = os.urandom,
) -> Aggregate:
    """Every party of one round in one process. `dropouts` maps a site to the phase it vanishes in.

    >>> encoding = FixedPoint(bits=8, clip=1.0, cohort=3, slot_bits=slot_bits(3))
    >>> run({name: np.ones(2) for name in "abc"}, encoding, dropouts={"a": "share"}).contributors
    ('b', 'c')
    """
    party = Party(vectors, encoding, weights, randomness)
    return party.play(STEPS, server, dropouts or {})


STEPS: Steps = {
    "advertise": client_step1,
    "share": client_step2,
    "upload": client_step3,
    "open": client_step4,
}
