"""masked-bfv: masks that cancel in the sum, under BFV encryption. The default.

1. advertise  C -> S  two fresh X25519 keys, channel and mask; a commitment to a self-mask seed
2. share      C -> S -> C  sealed shares of that seed and of the mask secret; one site in U1,
              another each round, seals this round's HE seed for every site too
3. upload     C -> S  the encoded vector plus all masks, encrypted; S adds ciphertexts
4. confirm    C -> S  a signature under who is in the sum
5. unmask     C -> S  shares; S rebuilds the outstanding masks and takes them off without the HE key
6. open       S -> k sites -> S  the sum, decrypted once by each, after t signatures were checked;
              k = 1 unless asked otherwise

Formal Guarantees: as secagg. A leaked HE key opens masked vectors and sums only; broken masks leave
the encryption; and the server opens nothing by itself. The sum has no integrity against an active
server: BFV is malleable, and the count slot catches faults, not attacks.

Under reveal = "sites" every site that confirmed opens the sum in phase open and keeps it; the
server gets a tag from each (`OpeningTag`) and sees whether they opened the same. What is then
announced of the aggregate can be salted with 32 bytes that the sites alone derive (`Revealed`).

Formal Guarantees of reveal = "sites": a server that follows the protocol and colludes with no site
learns nothing of the aggregate. It holds nothing made from the HE seed but ciphertexts, the key id
and the tags, and these two are values of independent pseudorandom functions. One that sends sites
different sums learns whether they opened the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from protocols import bfv_sum, masks, secagg
from protocols.bfv import Parameters, SecretKey, Sum
from protocols.bitpacking import pack
from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.errors import ProtocolError, RefusedError, RoundAbortedError
from protocols.graph import thresholds
from protocols.identity import Roster, digest
from protocols.keystream import Randomness, Seed
from protocols.messages import (
    Begin,
    OpeningTag,
    RelayedSecrets,
    SealedSeed,
    SharedSecrets,
    SumToOpen,
    Upload,
)
from protocols.rounds import (
    BlindServerSide,
    Cohort,
    Outcome,
    Part,
    Party,
    Requests,
    ServerSide,
    Slots,
    Steps,
    Withheld,
    in_turn,
    majority,
    public_weight,
    statement,
)
from protocols.secagg import Advertised, Shared

PHASES = ("advertise", "share", "upload", "confirm", "unmask", "open")
slot_bits = bfv_sum.slot_bits
client_step1 = secagg.client_step1


@final
@dataclass(frozen=True, slots=True)
class Uploaded:
    """A client that has uploaded and holds the round's HE key.

    common: a secret that the round's sites derive from the HE seed, for tags and salts.
    """

    masked: secagg.Uploaded
    key: SecretKey
    common: Seed


@final
@dataclass(frozen=True, slots=True)
class Confirmed:
    """A client that has signed one U3."""

    masked: secagg.Confirmed
    key: SecretKey
    common: Seed


@final
@dataclass(frozen=True, slots=True)
class Released:
    """A client that has released its shares and may be asked to open the sum of U3."""

    masked: secagg.Confirmed
    key: SecretKey
    common: Seed


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A client that has opened the round's sum; it holds no key any more."""


@final
@dataclass(frozen=True, slots=True)
class Revealed:
    """A client that has opened the round's sum and keeps it; it holds no key any more.

    salt: 32 bytes that this round's sites derive alike and nobody else can.
    """

    aggregate: Aggregate = field(repr=False)
    salt: bytes = field(repr=False)


def client_step2(state: Advertised, message: bytes, randomness: Randomness) -> tuple[Shared, bytes]:
    """MaskAdvertisements -> SharedSecrets: shares for every peer; the maker adds the HE seed."""
    shared, boxes = secagg.share(state, message, randomness)
    seeds: tuple[SealedSeed, ...] = ()
    me = state.expected.identity
    if me.name == maker(state.begin, shared.adverts):
        secagg.check_adverts(state, shared.adverts.values())
        peers = {site: advert.channel for site, advert in shared.adverts.items()}
        seeds = bfv_sum.seal_seeds(me, state.begin, state.channel, peers, randomness)
    return shared, secagg.shared_secrets(shared, boxes, seeds)


def maker(begin: Begin, adverts: Iterable[str]) -> str:
    """The site in U1 that makes this round's HE seed: another one each round."""
    return in_turn(tuple(sorted(adverts)), begin.round)[0]


def client_step3(
    state: Shared, message: bytes, slots: Slots, randomness: Randomness
) -> tuple[Uploaded, bytes]:
    """RelayedSecrets -> Upload: open the HE seed, mask the encoded vector, encrypt it."""
    del randomness  # SEAL draws encryption errors from the operating system
    relayed = RelayedSecrets.from_bytes(message)
    if not relayed.seeds:
        raise RefusedError("the server relays no HE seed")
    [sealed] = relayed.seeds
    expected, begin = state.secrets.expected, state.secrets.begin
    making = maker(begin, state.adverts)
    if (sealed.maker, sealed.public) != (making, state.adverts[making].channel):
        raise RefusedError(f"{making} makes the seed of this round, not {sealed.maker}")
    seed = bfv_sum.open_seed(expected, begin, state.secrets.channel, sealed)
    key = SecretKey(seed, Parameters(expected.encoding.plain_bits, expected.encoding.cohort))
    common = opening_secret(seed, begin.context)
    uploaded, masked = secagg.mask(state, relayed, slots)
    payload = bytes(key.encrypt(masked))
    me = expected.identity
    signature = me.key.sign(statement(begin.context, "upload", me.name, sealed.key, payload))
    return Uploaded(uploaded, key, common), Upload(
        me.name, sealed.key, payload, signature
    ).to_bytes()


def client_step4(
    state: Uploaded, message: bytes, randomness: Randomness
) -> tuple[Confirmed, bytes]:
    """Survivors -> Confirmation, as in secagg."""
    confirmed, reply = secagg.client_step4(state.masked, message, randomness)
    return Confirmed(confirmed, state.key, state.common), reply


def client_step5(
    state: Confirmed, message: bytes, randomness: Randomness
) -> tuple[Released, bytes]:
    """Confirmations -> ReleasedShares, as in secagg; the HE key is kept for the opening."""
    del randomness
    released = Released(state.masked, state.key, state.common)
    return released, secagg.unmask(state.masked, message)


def client_step6(
    state: Released | Confirmed, message: bytes, randomness: Randomness
) -> tuple[Opened | Revealed, bytes]:
    """SumToOpen -> OpenedSum: after t sites confirmed this very U3, decrypt its sum, once.

    Under reveal = "sites" the sum stays here, and an OpeningTag goes out.
    """
    del randomness
    secrets = state.masked.uploaded.shared.secrets
    expected, begin = secrets.expected, secrets.begin
    request = SumToOpen.from_bytes(message)
    if request.contributors != state.masked.survivors:
        raise RefusedError("the sum counts other sites than those this site confirmed")
    secagg.check_quorum(state.masked, request.confirmations)
    if expected.reveal == "server":
        return Opened(), bfv_sum.open_sum(expected, begin, state.key, request)
    opened = bfv_sum.opened_slots(expected, state.key, request)
    names, encoding = request.contributors, expected.encoding
    try:
        aggregate = encoding.decode(
            opened, expected.length, names, public_weight(expected.weights, names)
        )
    except ProtocolError:  # what the slots hold stays here
        raise RefusedError("the opened sum cannot be averaged") from None
    tag = opening_tag(state.common, names, pack(opened, encoding.plain_bits).tobytes())
    salt = state.common.derive("salt")
    me = expected.identity
    signature = me.key.sign(statement(begin.context, "open", me.name, tag))
    return Revealed(aggregate, salt), OpeningTag(me.name, tag, signature).to_bytes()


def opening_secret(seed: Seed, context: bytes) -> Seed:
    """What the sites of a round derive from its HE seed for tags and salts."""
    return Seed(seed.derive("opening", context))


def opening_tag(common: Seed, contributors: tuple[str, ...], slots: bytes) -> bytes:
    """A MAC of an opened sum's packed slots: HKDF-SHA256 as a pseudorandom function, 32 bytes."""
    return common.derive("tag", digest("opened", *(site.encode() for site in contributors), slots))


def summed(cohort: Cohort, encoding: Encoding, length: int) -> Part[SumToOpen]:
    """The server's phases before open: it adds, takes masks off, and holds no HE key.

    Raises RoundAbortedError when too few are left in any phase, or the maker of the HE seed is gone
    before the others hold it.
    """
    begin = cohort.begin
    total = Sum(encoding.slots(length), Parameters(encoding.plain_bits, encoding.cohort))

    # advertise, share: U1 and U2, and the HE seed that this round's maker in U1 made
    adverts = yield from secagg.advertised(cohort)
    making = maker(begin, adverts)

    def check(site: str, said: SharedSecrets) -> None:
        if (site == making) != bool(said.seeds):
            raise ProtocolError(f"{making} makes the HE seed of this round", [site])
        if said.seeds:
            if [item.receiver for item in said.seeds] != list(adverts):
                raise ProtocolError(f"{site} did not seal the HE seed for every site", [site])
            bfv_sum.check_seeds(cohort, site, adverts[site].channel, said.seeds)

    secrets = yield from secagg.shared(cohort, adverts, check)
    if making not in secrets:
        raise RoundAbortedError(
            f"round {begin.round}: {making} was to make the HE seed and is gone "
            f"({cohort.faults[making]})",
            [making],
        )
    key_id = secrets[making].seeds[0].key

    # upload: masked and encrypted vectors; a refused upload leaves the sum as it was
    def added(site: str, data: bytes) -> None:
        upload = Upload.from_bytes(data)
        cohort.verify("upload", upload.sender, site, upload.signature, upload.key, upload.payload)
        if upload.key != key_id:
            raise ProtocolError(f"{site} encrypted under another key than this round's", [site])
        total.add(upload.payload)

    requests = Requests("upload", secagg.relayed(secrets))
    survivors = tuple(cohort.accept(requests, (yield requests), added))
    cohort.require(len(survivors), "uploads")

    # confirm, unmask: what did not cancel is rebuilt and taken off, under the encryption
    confirmations = yield from secagg.confirmed(cohort, survivors)
    terms = yield from secagg.outstanding(cohort, adverts, secrets, survivors, confirmations)
    total.subtract(masks.total(terms, total.slots, encoding.plain_bits))

    return SumToOpen(survivors, confirmations.items, total.to_bytes())


def server(
    begin: Begin,
    roster: Roster,
    encoding: Encoding,
    length: int,
    weights: Mapping[str, int] | None = None,
    openers: int = 1,
) -> ServerSide:
    """The server's round under reveal = "server".

    openers: how many sites must open the sum, each by itself, and agree on every bit.
    Raises RoundAbortedError as `summed` does, and when openers are too few or disagree.
    """
    cohort = Cohort(begin, roster)
    request = yield from summed(cohort, encoding, length)

    # open: key holders decrypt the sum, others each round; for one that does not answer, the next
    signers = in_turn(tuple(item.sender for item in request.confirmations), begin.round)
    weight = public_weight(weights, request.contributors)
    aggregate = yield from bfv_sum.opening(
        cohort, signers, request, encoding, length, weight, openers
    )
    return Outcome(aggregate, cohort.faults)


def blind_server(begin: Begin, roster: Roster, encoding: Encoding, length: int) -> BlindServerSide:
    """The server's round under reveal = "sites": it ends without an aggregate.

    Raises RoundAbortedError as `summed` does, and when fewer than t sites, or half of the cohort,
    opened the same sum.
    """
    cohort, least = Cohort(begin, roster), max(begin.threshold, len(begin.cohort) // 2 + 1)
    request = yield from summed(cohort, encoding, length)

    # open: every site that confirmed decrypts the sum and keeps it; their tags must agree
    def parse(site: str, data: bytes) -> bytes:
        answer = OpeningTag.from_bytes(data)
        cohort.verify("open", answer.sender, site, answer.signature, answer.tag)
        return answer.tag

    signers = (item.sender for item in request.confirmations)
    requests = Requests("open", dict.fromkeys(signers, request.to_bytes()))
    tags = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(tags), "sites opened the sum", least)
    holders, odd = majority(tags)
    cohort.faults |= dict.fromkeys(odd, "open: opened another sum than the others")
    cohort.require(len(holders), "sites opened the same sum", least)
    return Withheld(request.contributors, holders, cohort.faults)


def run(
    vectors: Mapping[str, NDArray[np.floating]],
    encoding: FixedPoint,
    weights: Mapping[str, int] | None = None,
    dropouts: Mapping[str, str] | None = None,
    randomness: Randomness = os.urandom,
    tolerated: int = 0,
) -> Aggregate:
    """Every party of one round in one process. `dropouts` maps a site to the phase it vanishes in.

    >>> encoding = FixedPoint(bits=8, clip=1.0, cohort=5, slot_bits=slot_bits(5))
    >>> run({s: np.ones(2) for s in "abcde"}, encoding, dropouts={"b": "upload"}).contributors
    ('a', 'c', 'd', 'e')
    """
    chosen = thresholds(len(vectors), tolerated)
    party = Party(vectors, encoding, weights, randomness, chosen, tolerated)
    return party.play(STEPS, server, dropouts or {})


STEPS: Steps = {
    "advertise": client_step1,
    "share": client_step2,
    "upload": client_step3,
    "confirm": client_step4,
    "unmask": client_step5,
    "open": client_step6,
}
