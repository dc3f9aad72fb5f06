"""secagg: masks that cancel in the sum (Bonawitz et al. 2017, figure 4).

1. advertise  C -> S  two fresh X25519 keys, channel and mask; a commitment to a self-mask seed
2. share      C -> S -> C  shares of that seed and of the mask secret, sealed for every other site
3. upload     C -> S  the encoded vector plus pairwise and self masks, modulo 2^p; S adds
4. confirm    C -> S  a signature under who is in the sum
5. unmask     C -> S  for each peer one share: of its seed if it is in the sum, else of its secret

U1 advertised, U2 shared, U3 uploaded. n sites, any t of which can take masks off, T of which may
collude with the server: 2t > n + T, and a sum has at least m >= max(t, T + 2) contributions.

Formal Guarantees: a server and up to T sites learn of the honest sites' vectors no more than the
sum over the honest sites in U3. To take both masks off one of them takes t shares of either kind;
an honest site releases one kind, a colluding one both, n - T + 2T = n + T < 2t together.
Above graph.SPARSE_ABOVE sites masks, shares and confirmations go between neighbours only and t
counts in a neighbourhood; then the same holds against a server that follows the protocol, but with
probability graph.INSECURE a round (Bell et al. 2020).

The client functions below the steps serve masked-bfv too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from protocols import masks, shamir
from protocols.bitpacking import pack, unpack
from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.errors import (
    MalformedMessageError,
    ProtocolError,
    RefusedError,
    RoundAbortedError,
)
from protocols.graph import (
    INSECURE,
    SPARSE_ABOVE,
    Graph,
    Thresholds,
    insecurity,
    least_threshold,
    thresholds,
)
from protocols.identity import Roster, digest
from protocols.keystream import Randomness, Seed
from protocols.masks import MaskKey
from protocols.messages import (
    Begin,
    Confirmation,
    Confirmations,
    MaskAdvertisement,
    MaskAdvertisements,
    RelayedSecrets,
    ReleasedShare,
    ReleasedShares,
    SealedSeed,
    SealedShares,
    SharedSecrets,
    Survivors,
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
    public_weight,
    statement,
)
from protocols.sealing import ChannelKey, check_public, seal_shares, unseal_shares
from protocols.shamir import Share

PHASES = ("advertise", "share", "upload", "confirm", "unmask")
NO_KEY = bytes(32)

Adverts = Mapping[str, MaskAdvertisement]


def slot_bits(cohort: int) -> int:
    """Bits that a slot offers to a sum over `cohort` sites."""
    del cohort
    return 62


def check_thresholds(begin: Begin, tolerated: int) -> None:
    """RefusedError unless masks hold against the server and `tolerated` sites."""
    n, t, m = len(begin.cohort), begin.threshold, begin.minimum
    if begin.degree:
        if n <= SPARSE_ABOVE:
            raise RefusedError(f"{n} sites share with all others, not with {begin.degree}")
        risk = insecurity(n, tolerated, Thresholds(m, t, begin.degree))
        if risk > INSECURE:
            raise RefusedError(
                f"masks of {n} sites with {begin.degree} neighbours and threshold {t} fail with "
                f"probability {risk:.1e}, above {INSECURE:.1e}"
            )
    elif 2 * t <= n + tolerated:
        least = least_threshold(n, tolerated)
        raise RefusedError(f"threshold {t} of {n} sites: 2t > n + T needs at least {least}")
    if m < max(t, tolerated + 2):
        raise RefusedError(f"minimum {m} is below max(t, T + 2) = {max(t, tolerated + 2)}")


# --- the client -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Advertised:
    """A client that has offered its keys."""

    expected: Expected
    begin: Begin
    channel: ChannelKey
    mask: MaskKey
    seed: Seed


@final
@dataclass(frozen=True, slots=True)
class Shared:
    """A client that has shared its secrets with its neighbours in U1."""

    secrets: Advertised
    adverts: Adverts
    peers: tuple[str, ...]
    kept: Share


@final
@dataclass(frozen=True, slots=True)
class Uploaded:
    """A client that has uploaded; it knows U2 and keeps what each neighbour sealed for it."""

    shared: Shared
    members: frozenset[str]
    boxes: Mapping[str, SealedShares]


@final
@dataclass(frozen=True, slots=True)
class Confirmed:
    """A client that has signed one U3; it signs no other."""

    uploaded: Uploaded
    survivors: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Released:
    """A client that has released its shares; it releases no more."""


def client_step1(
    expected: Expected, message: bytes, randomness: Randomness
) -> tuple[Advertised, bytes]:
    """Begin -> MaskAdvertisement: check the round and its thresholds, offer fresh keys."""
    begin = expected.check(message)
    check_thresholds(begin, expected.tolerated)
    me, channel = expected.identity, ChannelKey(randomness)
    mask, seed = MaskKey.draw(randomness), Seed.draw(randomness)
    commitment = masks.commitment(seed, me.name, begin.context)
    said = (channel.public, mask.public, commitment)
    signature = me.key.sign(statement(begin.context, "advertise", me.name, *said))
    reply = MaskAdvertisement(me.name, *said, signature)
    return Advertised(expected, begin, channel, mask, seed), reply.to_bytes()


def client_step2(state: Advertised, message: bytes, randomness: Randomness) -> tuple[Shared, bytes]:
    """MaskAdvertisements -> SharedSecrets: seal shares of both secrets for each neighbour in U1."""
    shared, boxes = share(state, message, randomness)
    return shared, shared_secrets(shared, boxes, ())


def client_step3(
    state: Shared, message: bytes, slots: Slots, randomness: Randomness
) -> tuple[Uploaded, bytes]:
    """RelayedSecrets -> Upload: the encoded vector under all masks that U2 calls for."""
    del randomness
    relayed = RelayedSecrets.from_bytes(message)
    if relayed.seeds:
        raise RefusedError("secagg has no HE seed")
    uploaded, masked = mask(state, relayed, slots)
    expected, begin = state.secrets.expected, state.secrets.begin
    payload = b"".join(pack(chunk, expected.encoding.plain_bits).tobytes() for chunk in masked)
    me = expected.identity
    signature = me.key.sign(statement(begin.context, "upload", me.name, NO_KEY, payload))
    return uploaded, Upload(me.name, NO_KEY, payload, signature).to_bytes()


def client_step4(
    state: Uploaded, message: bytes, randomness: Randomness
) -> tuple[Confirmed, bytes]:
    """Survivors -> Confirmation: sign one U3, after checking that it is large and inside U2."""
    del randomness
    secrets = state.shared.secrets
    me, begin = secrets.expected.identity, secrets.begin
    survivors = Survivors.from_bytes(message).sites
    if len(survivors) < begin.minimum:
        raise RefusedError(f"a sum of {len(survivors)} is below the {begin.minimum} needed")
    if me.name not in survivors:
        raise RefusedError(f"the sum leaves out {me.name}")
    if not state.members.issuperset(survivors):
        raise RefusedError("the sum counts sites that have not shared their secrets")
    said = statement(begin.context, "confirm", me.name, _listed(survivors))
    signature = me.key.sign(said)
    return Confirmed(state, survivors), Confirmation(me.name, signature).to_bytes()


def client_step5(
    state: Confirmed, message: bytes, randomness: Randomness
) -> tuple[Released, bytes]:
    """Confirmations -> ReleasedShares: each peer's seed share or secret share, never both."""
    del randomness
    return Released(), unmask(state, message)


def share(
    state: Advertised, message: bytes, randomness: Randomness
) -> tuple[Shared, tuple[SealedShares, ...]]:
    """Check U1 and seal this site's shares for each of its neighbours in it."""
    me, begin = state.expected.identity, state.begin
    adverts = {item.sender: item for item in MaskAdvertisements.from_bytes(message).items}
    state.expected.check_contributors(begin, tuple(adverts))
    mine = adverts.get(me.name)
    if mine is None or (mine.channel, mine.mask) != (state.channel.public, state.mask.public):
        raise RefusedError(f"the server relays other keys for {me.name}")
    peers = graph(begin, adverts).neighbours(me.name)
    check_adverts(state, [adverts[peer] for peer in peers])
    if len(peers) + 1 < begin.threshold:
        raise RefusedError(f"{len(peers) + 1} sites cannot hold {begin.threshold} shares")
    round_, points = begin.context, {s: begin.cohort.index(s) + 1 for s in (me.name, *peers)}
    seeds = shamir.split(state.seed, begin.threshold, points.values(), randomness)
    secrets = shamir.split(state.mask.seed, begin.threshold, points.values(), randomness)
    boxes = []
    for peer in peers:
        context, to = _box_context(round_, mine, adverts[peer]), (peer, adverts[peer].channel)
        pair = (seeds[points[peer]], secrets[points[peer]])
        box = seal_shares(pair, state.channel, to, context, randomness)
        boxes.append(SealedShares(me.name, peer, box, *_ids(round_, me.name, peer, pair)))
    return Shared(state, adverts, peers, seeds[points[me.name]]), tuple(boxes)


def graph(begin: Begin, adverts: Adverts) -> Graph:
    """The neighbours of every site in U1, on a ring that all of its keys decide together."""
    said = (digest("advert", *_said(a), a.sender.encode()) for a in adverts.values())
    return Graph(adverts, begin.degree, digest("ring", begin.context, *said))


def check_adverts(state: Advertised, adverts: Iterable[MaskAdvertisement]) -> None:
    """ProtocolError unless their senders signed them and their keys are usable."""
    context, roster = state.begin.context, state.expected.identity.roster
    for item in adverts:
        said = statement(context, "advertise", item.sender, *_said(item))
        roster.verify(item.sender, item.signature, said)
        check_public(item.sender, item.channel)
        check_public(item.sender, item.mask)


def _said(advert: MaskAdvertisement) -> tuple[bytes, bytes, bytes]:
    return advert.channel, advert.mask, advert.commitment


def share_id(context: bytes, kind: str, owner: str, holder: str, share: Share) -> bytes:
    """Names the share of one of `owner`'s two secrets that `holder` gets; tells nothing of it."""
    said = (kind.encode(), owner.encode(), holder.encode(), share.reveal())
    return digest("share", context, *said)


_KINDS = ("seed", "secret")


def _ids(context: bytes, owner: str, holder: str, pair: tuple[Share, Share]) -> tuple[bytes, bytes]:
    of_seed, of_secret = pair
    return (
        share_id(context, "seed", owner, holder, of_seed),
        share_id(context, "secret", owner, holder, of_secret),
    )


def shared_secrets(
    state: Shared, boxes: tuple[SealedShares, ...], seeds: tuple[SealedSeed, ...]
) -> bytes:
    """The signed SharedSecrets; the seeds are signed one by one already."""
    me, context = state.secrets.expected.identity, state.secrets.begin.context
    kept = share_id(context, "seed", me.name, me.name, state.kept)
    signature = me.key.sign(statement(context, "share", me.name, _sealed(boxes, kept)))
    return SharedSecrets(boxes, kept, seeds, signature).to_bytes()


def mask(
    state: Shared, relayed: RelayedSecrets, slots: Slots
) -> tuple[Uploaded, Iterator[NDArray[np.uint64]]]:
    """Check U2, keep its boxes, and put this site's masks over its slots."""
    secrets = state.secrets
    me, begin = secrets.expected.identity.name, secrets.begin
    boxes = {item.sender: item for item in relayed.shares}
    if any(item.receiver != me for item in relayed.shares):
        raise RefusedError(f"the server relays shares that were not sealed for {me}")
    members = frozenset(relayed.members)
    if me not in members or not members <= state.adverts.keys():
        raise RefusedError("shares come from sites that have not advertised")
    if boxes.keys() != members.intersection(state.peers):
        raise RefusedError("the server does not relay the shares of exactly those who shared")
    secrets.expected.check_contributors(begin, relayed.members)
    context = mask_context(begin, {site: state.adverts[site] for site in relayed.members})
    terms = [masks.own(secrets.seed, me, context)]
    terms += [secrets.mask.pair(me, peer, state.adverts[peer].mask, context) for peer in boxes]
    masked = masks.add(slots, terms, secrets.expected.encoding.plain_bits)
    return Uploaded(state, members, boxes), masked


def unmask(state: Confirmed, message: bytes) -> bytes:
    """Check that t sites confirmed this very U3, then release one share of each peer in U2."""
    uploaded, secrets = state.uploaded, state.uploaded.shared.secrets
    me, begin, adverts = secrets.expected.identity.name, secrets.begin, uploaded.shared.adverts
    check_quorum(state, Confirmations.from_bytes(message).items)
    survivors, round_ = frozenset(state.survivors), begin.context
    own, lost = [ReleasedShare(me, uploaded.shared.kept.reveal())], []
    for peer, sealed in sorted(uploaded.boxes.items()):
        context = _box_context(round_, adverts[peer], adverts[me])
        try:
            sender = (peer, adverts[peer].channel)
            pair = unseal_shares(sealed.box, secrets.channel, sender, context)
        except ProtocolError:
            continue  # t other sites hold a share of this peer's secrets, or the round aborts
        if _ids(round_, peer, me, pair) != (sealed.of_seed, sealed.of_secret):
            continue  # to release a share that the peer does not own to would look like a lie
        of_seed, of_secret = pair
        if peer in survivors:
            own.append(ReleasedShare(peer, of_seed.reveal()))
        else:
            lost.append(ReleasedShare(peer, of_secret.reveal()))
    shares = tuple(sorted(own, key=lambda item: item.owner)), tuple(lost)
    said = statement(begin.context, "unmask", me, _released(*shares))
    return ReleasedShares(me, *shares, secrets.expected.identity.key.sign(said)).to_bytes()


def check_quorum(state: Confirmed, confirmations: tuple[Confirmation, ...]) -> None:
    """RefusedError or ProtocolError unless t of this site and its neighbours signed U3."""
    shared, listed = state.uploaded.shared, _listed(state.survivors)
    me, begin = shared.secrets.expected.identity, shared.secrets.begin
    strangers = {item.sender for item in confirmations}.difference(state.survivors)
    around = {me.name, *shared.peers}
    near = [item for item in confirmations if item.sender in around]
    if strangers or len(near) < begin.threshold:
        raise RefusedError(f"{len(near)} sites confirmed the sum, {begin.threshold} are needed")
    for item in near:
        said = statement(begin.context, "confirm", item.sender, listed)
        me.roster.verify(item.sender, item.signature, said)


def mask_context(begin: Begin, members: Adverts) -> bytes:
    """What a mask is bound to: the round and its model, and U2 with all keys."""
    said = (digest("advert", a.sender.encode(), a.channel, a.mask) for a in members.values())
    return digest("masks", begin.context, *said)


def _box_context(round_: bytes, sender: MaskAdvertisement, receiver: MaskAdvertisement) -> bytes:
    names = (sender.sender.encode(), receiver.sender.encode())
    return digest("shares", round_, *names, sender.channel, receiver.channel)


def _sealed(boxes: tuple[SealedShares, ...], kept: bytes) -> bytes:
    said = (digest("box", b.receiver.encode(), b.box, b.of_seed, b.of_secret) for b in boxes)
    return digest("sealed", kept, *said)


def _listed(survivors: tuple[str, ...]) -> bytes:
    return digest("survivors", *(site.encode() for site in survivors))


def _released(own: tuple[ReleasedShare, ...], lost: tuple[ReleasedShare, ...]) -> bytes:
    said = [digest("own", s.owner.encode(), s.share) for s in own]
    said += [digest("mask", s.owner.encode(), s.share) for s in lost]
    return digest("released", *said)


# --- the server -----------------------------------------------------------------------------------


def advertised(cohort: Cohort) -> Part[dict[str, MaskAdvertisement]]:
    """Phase advertise: U1, by name."""
    begin = cohort.begin

    def parse(site: str, data: bytes) -> MaskAdvertisement:
        item = MaskAdvertisement.from_bytes(data)
        cohort.verify("advertise", item.sender, site, item.signature, *_said(item))
        check_public(site, item.channel)
        check_public(site, item.mask)
        return item

    requests = Requests("advertise", dict.fromkeys(begin.cohort, begin.to_bytes()))
    adverts = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(adverts), "sites advertised their keys")
    return adverts


def shared(
    cohort: Cohort, adverts: Adverts, check: Callable[[str, SharedSecrets], None]
) -> Part[dict[str, SharedSecrets]]:
    """Phase share: U2, by name, with what each sealed. `check` raises for what else is wrong."""
    near = graph(cohort.begin, adverts)

    def parse(site: str, data: bytes) -> SharedSecrets:
        said = SharedSecrets.from_bytes(data)
        receivers = [item.receiver for item in said.shares]
        sealed = _sealed(said.shares, said.kept)
        cohort.verify("share", said.shares[0].sender, site, said.signature, sealed)
        if tuple(receivers) != near.neighbours(site):
            raise ProtocolError(f"{site} did not seal its shares for all neighbours", [site])
        check(site, said)
        return said

    message = MaskAdvertisements(tuple(adverts.values())).to_bytes()
    requests = Requests("share", dict.fromkeys(adverts, message))
    secrets = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(secrets), "sites shared their secrets")
    return secrets


def relayed(secrets: Mapping[str, SharedSecrets]) -> dict[str, bytes]:
    """What each site in U2 is sent of what the others sealed for it."""
    inbox: dict[str, list[SealedShares]] = {site: [] for site in secrets}
    for said in secrets.values():
        for item in said.shares:
            if item.receiver in inbox:
                inbox[item.receiver].append(item)
    seeds = {item.receiver: (item,) for said in secrets.values() for item in said.seeds}
    members = tuple(secrets)
    return {
        site: RelayedSecrets(members, tuple(items), seeds.get(site, ())).to_bytes()
        for site, items in inbox.items()
    }


def confirmed(cohort: Cohort, survivors: tuple[str, ...]) -> Part[Confirmations]:
    """Phase confirm: at least t signatures under U3."""
    begin, listed = cohort.begin, _listed(survivors)

    def parse(site: str, data: bytes) -> Confirmation:
        item = Confirmation.from_bytes(data)
        cohort.verify("confirm", item.sender, site, item.signature, listed)
        return item

    requests = Requests("confirm", dict.fromkeys(survivors, Survivors(survivors).to_bytes()))
    items = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(items), "sites confirmed the sum", begin.threshold)
    return Confirmations(tuple(items.values()))


def outstanding(
    cohort: Cohort,
    adverts: Adverts,
    secrets: Mapping[str, SharedSecrets],
    survivors: tuple[str, ...],
    confirmations: Confirmations,
) -> Part[list[masks.Term]]:
    """Phase unmask: the masks still on the sum of `survivors`' uploads, with their signs."""
    begin, near, summed = cohort.begin, graph(cohort.begin, adverts), frozenset(survivors)
    lost = frozenset(secrets) - summed
    named = {
        (box.sender, box.receiver): (box.of_seed, box.of_secret)
        for said in secrets.values()
        for box in said.shares
    } | {(site, site): (said.kept, b"") for site, said in secrets.items()}

    def parse(site: str, data: bytes) -> dict[str, Share]:
        said = ReleasedShares.from_bytes(data)
        cohort.verify("unmask", said.sender, site, said.signature, _released(said.own, said.mask))
        around = {site, *near.neighbours(site)}
        if not {s.owner for s in said.own} <= around & summed:
            raise ProtocolError(f"{site} released seeds of sites outside the sum", [site])
        if not {s.owner for s in said.mask} <= around & lost:
            raise ProtocolError(f"{site} released secrets of sites inside the sum", [site])
        held = {}
        for i, kind in enumerate(_KINDS):
            for item in (said.own, said.mask)[i]:
                try:
                    share = Share.parse(item.share)
                except ValueError as error:
                    raise MalformedMessageError(str(error), [site]) from None
                told = named[item.owner, site][i]
                if share_id(cohort.context, kind, item.owner, site, share) != told:
                    raise ProtocolError(
                        f"{site} released a wrong share of {item.owner}'s {kind}", [site]
                    )
                held[item.owner] = share
        return held

    signers = [item.sender for item in confirmations.items]
    requests = Requests("unmask", dict.fromkeys(signers, confirmations.to_bytes()))
    released = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(released), "sites released shares", begin.threshold)

    context = mask_context(begin, {site: adverts[site] for site in secrets})
    held: dict[str, dict[int, Share]] = {site: {} for site in secrets}
    for releaser, shares in released.items():
        point = begin.cohort.index(releaser) + 1
        for owner, share in shares.items():
            held[owner][point] = share
    terms = []
    for site in secrets:
        advert = adverts[site]
        if site in summed:
            seed = _recover(cohort, site, held[site], partial(_is_seed, advert, cohort.context))
            terms.append(masks.own(seed, site, context))
        else:
            key = MaskKey(_recover(cohort, site, held[site], partial(_is_secret, advert)))
            for peer in summed.intersection(near.neighbours(site)):
                sign, stream = key.pair(site, peer, adverts[peer].mask, context)
                terms.append((-sign, stream))
    return terms


def _is_seed(advert: MaskAdvertisement, context: bytes, seed: Seed) -> bool:
    return masks.commitment(seed, advert.sender, context) == advert.commitment


def _is_secret(advert: MaskAdvertisement, seed: Seed) -> bool:
    return MaskKey(seed).public == advert.mask


def _recover(
    cohort: Cohort, owner: str, held: Mapping[int, Share], is_right: Callable[[Seed], bool]
) -> Seed:
    """The secret of `owner` from t shares by point; RoundAbortedError when they give none.

    The shares are those that `owner` itself identified, so the fault is its own.
    """
    least = cohort.begin.threshold
    if len(held) >= least:
        try:
            seed = shamir.combine({x: held[x] for x in sorted(held)[:least]})
        except ValueError:
            pass
        else:
            if is_right(seed):
                return seed
    raise RoundAbortedError(
        f"round {cohort.begin.round}: {owner} gave others shares that do not recover its secret: "
        f"{len(held)} of them open, {least} right ones are needed",
        [owner],
    )


def server(
    begin: Begin,
    roster: Roster,
    encoding: Encoding,
    length: int,
    weights: Mapping[str, int] | None = None,
) -> ServerSide:
    """The server's round. Raises RoundAbortedError when too few are left in any phase."""
    cohort, slots, bits = Cohort(begin, roster), encoding.slots(length), encoding.plain_bits

    def no_seeds(site: str, said: SharedSecrets) -> None:
        if said.seeds:
            raise ProtocolError(f"{site} sealed an HE seed, which secagg has not", [site])

    total = np.zeros(slots, np.uint64)

    def added(site: str, data: bytes) -> None:
        nonlocal total
        upload = Upload.from_bytes(data)
        cohort.verify("upload", upload.sender, site, upload.signature, upload.key, upload.payload)
        if upload.key != NO_KEY:
            raise ProtocolError(f"{site} sent a ciphertext to a protocol without a key", [site])
        try:
            total += unpack(np.frombuffer(upload.payload, np.uint8), slots, bits)
        except ValueError as error:
            raise MalformedMessageError(f"upload: {error}", [site]) from None

    # advertise, share: U1 and U2
    adverts = yield from advertised(cohort)
    secrets = yield from shared(cohort, adverts, no_seeds)

    # upload: masked vectors; U3 are those whose uploads are sound
    requests = Requests("upload", relayed(secrets))
    survivors = tuple(cohort.accept(requests, (yield requests), added))
    cohort.require(len(survivors), "uploads")

    # confirm, unmask: what did not cancel is rebuilt and taken off
    confirmations = yield from confirmed(cohort, survivors)
    terms = yield from outstanding(cohort, adverts, secrets, survivors, confirmations)
    total -= masks.total(terms, slots, bits)
    total &= np.uint64((1 << bits) - 1)
    try:
        aggregate = encoding.decode(total, length, survivors, public_weight(weights, survivors))
    except ProtocolError as error:
        raise RoundAbortedError(f"round {begin.round}: {error}", cohort.faults) from None
    return Outcome(aggregate, cohort.faults)


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
    >>> run({s: np.ones(2) for s in "abcde"}, encoding, dropouts={"a": "upload"}).contributors
    ('b', 'c', 'd', 'e')
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
}
