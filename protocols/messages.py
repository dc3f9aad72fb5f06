"""One frozen class per arrow on the wire.

`from_bytes` parses completely, once: lengths, ranges, names and uniqueness are checked there, and
nothing else checks them again. Whatever bytes come in, only MalformedMessageError comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError
from protocols.identity import digest
from protocols.sealing import box_bytes
from protocols.shamir import SHARE_BYTES

SiteName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
HE_SEED_BYTES = 64
SealedBox = Annotated[
    bytes, Meta(min_length=box_bytes(HE_SEED_BYTES), max_length=box_bytes(HE_SEED_BYTES))
]


SharesBox = Annotated[
    bytes, Meta(min_length=box_bytes(2 * SHARE_BYTES), max_length=box_bytes(2 * SHARE_BYTES))
]
ShareBytes = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]


def _in_order(names: Sequence[str], what: str) -> None:
    if list(names) != sorted(set(names)):
        raise ValueError(f"{what} are not in order, each site once")


class Message(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True, eq=True
):
    """A message: `to_bytes` and `from_bytes` are inverse to each other."""

    def to_bytes(self) -> bytes:
        """The one encoding of this message (MessagePack)."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The message in `data`; MalformedMessageError unless it is exactly one of this class."""
        try:
            message = msgspec.msgpack.decode(data, type=cls)
            canonical = msgspec.msgpack.encode(message) == data
        except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
            told = "".join(c if c.isprintable() else " " for c in str(error))[:200]
            raise MalformedMessageError(f"not a {cls.__name__}: {told}") from None
        if not canonical:
            raise MalformedMessageError(f"not a {cls.__name__}: not in its one encoding")
        return message

    def __repr__(self) -> str:
        shown = (
            f"{name}=<{len(value)} bytes>" if isinstance(value, bytes) else f"{name}={value!r}"
            for name, value in ((name, getattr(self, name)) for name in self.__struct_fields__)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class Begin(Message, frozen=True):
    """S -> C, first in every protocol: which round this is and who is in it.

    binding: SHA-256 of what all parties must agree on (weights, pruning mask, parameters).
    threshold: t, how many sites can take a mask off together; 1 in protocols without masks.
    degree: k, how many neighbours a site exchanges masks with; 0 for all others.
    """

    session: SessionId
    round: Annotated[int, Meta(ge=1, le=2**62)]
    cohort: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]
    minimum: Annotated[int, Meta(ge=2, le=1 << 16)]
    threshold: Annotated[int, Meta(ge=1, le=1 << 16)]
    binding: Digest
    degree: Annotated[int, Meta(ge=0, le=1 << 16)] = 0

    def __post_init__(self) -> None:
        _in_order(self.cohort, "the cohort's sites")
        if self.minimum > len(self.cohort):
            raise ValueError(f"minimum {self.minimum} exceeds the cohort of {len(self.cohort)}")
        if self.threshold > len(self.cohort):
            raise ValueError(f"threshold {self.threshold} exceeds the cohort")
        if self.degree % 2 or self.degree >= len(self.cohort):
            raise ValueError(f"degree {self.degree} is not even and below the cohort")

    @property
    def context(self) -> bytes:
        """SHA-256 of this round: goes into every signature, key and sealed box (32 bytes)."""
        return digest("round", self.to_bytes())


class Advertisement(Message, frozen=True):
    """C -> S: a fresh X25519 key for this round, signed by the site's pinned key."""

    sender: SiteName
    public: PublicKey
    signature: Signature


class Advertisements(Message, frozen=True):
    """S -> the maker: who will take part, with what key."""

    items: Annotated[tuple[Advertisement, ...], Meta(min_length=2, max_length=1 << 16)]

    def __post_init__(self) -> None:
        _in_order([item.sender for item in self.items], "the advertisements")


class SealedSeed(Message, frozen=True):
    """The maker -> one site, through S: this round's HE seed, sealed and signed.

    key: SHA-256 that identifies the seed; `maker` and `public` say whose channel key sealed it.
    """

    maker: SiteName
    public: PublicKey
    receiver: SiteName
    key: Digest
    box: SealedBox
    signature: Signature


class SealedSeeds(Message, frozen=True):
    """The maker -> S: one sealed seed for every advertised site."""

    items: Annotated[tuple[SealedSeed, ...], Meta(min_length=2, max_length=1 << 16)]

    def __post_init__(self) -> None:
        _in_order([item.receiver for item in self.items], "the sealed seeds")
        if len({(item.maker, item.public, item.key) for item in self.items}) != 1:
            raise ValueError("the sealed seeds do not come from one maker and one seed")


class MaskAdvertisement(Message, frozen=True):
    """C -> S: this round's channel and mask keys and the commitment to the self-mask seed, signed.

    Only the mask key's secret is ever shared out, so recovering it opens no sealed message.
    """

    sender: SiteName
    channel: PublicKey
    mask: PublicKey
    commitment: Digest
    signature: Signature


class MaskAdvertisements(Message, frozen=True):
    """S -> C: U1, everyone who advertised."""

    items: Annotated[tuple[MaskAdvertisement, ...], Meta(min_length=2, max_length=1 << 16)]

    def __post_init__(self) -> None:
        _in_order([item.sender for item in self.items], "the advertisements")


class SealedShares(Message, frozen=True):
    """One site -> another, through S: shares of its self-mask seed and of its mask secret.

    of_seed, of_secret: SHA-256 that identify each share, so that a wrong one can be traced.
    """

    sender: SiteName
    receiver: SiteName
    box: SharesBox
    of_seed: Digest
    of_secret: Digest


class SharedSecrets(Message, frozen=True):
    """C -> S: one box of shares for every neighbour in U1; the maker's HE seeds too.

    Receivers trust the seal of each box; the signature lets S refuse a reply that is not from this
    site and round before anyone relies on it. kept: identifies the share of its own seed.
    """

    shares: Annotated[tuple[SealedShares, ...], Meta(min_length=1, max_length=1 << 16)]
    kept: Digest
    seeds: Annotated[tuple[SealedSeed, ...], Meta(max_length=1 << 16)]
    signature: Signature

    def __post_init__(self) -> None:
        _in_order([item.receiver for item in self.shares], "the sealed shares")
        if len({item.sender for item in self.shares}) != 1:
            raise ValueError("the sealed shares do not come from one site")
        if self.seeds:
            SealedSeeds(self.seeds)


class RelayedSecrets(Message, frozen=True):
    """S -> C: U2, who shared their secrets, and what this site's neighbours in it sealed for it."""

    members: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]
    shares: Annotated[tuple[SealedShares, ...], Meta(min_length=1, max_length=1 << 16)]
    seeds: Annotated[tuple[SealedSeed, ...], Meta(max_length=1)]

    def __post_init__(self) -> None:
        _in_order(self.members, "the members")
        _in_order([item.sender for item in self.shares], "the sealed shares")


class Survivors(Message, frozen=True):
    """S -> C: U3, the sites whose uploads are in the sum."""

    sites: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]

    def __post_init__(self) -> None:
        _in_order(self.sites, "the survivors")


class Confirmation(Message, frozen=True):
    """C -> S: a signature under U3."""

    sender: SiteName
    signature: Signature


class Confirmations(Message, frozen=True):
    """S -> C: who confirmed U3."""

    items: Annotated[tuple[Confirmation, ...], Meta(min_length=1, max_length=1 << 16)]

    def __post_init__(self) -> None:
        _in_order([item.sender for item in self.items], "the confirmations")


class ReleasedShare(Message, frozen=True):
    """A share of one site's self-mask seed or mask secret, no longer secret."""

    owner: SiteName
    share: ShareBytes


class ReleasedShares(Message, frozen=True):
    """C -> S: a share of itself and every neighbour in U2: `own` if in U3, else `mask`."""

    sender: SiteName
    own: Annotated[tuple[ReleasedShare, ...], Meta(max_length=1 << 16)]
    mask: Annotated[tuple[ReleasedShare, ...], Meta(max_length=1 << 16)]
    signature: Signature

    def __post_init__(self) -> None:
        own, mask = [s.owner for s in self.own], [s.owner for s in self.mask]
        _in_order(own, "the shares of self-mask seeds")
        _in_order(mask, "the shares of mask secrets")
        if set(own) & set(mask):
            raise ValueError("both shares of one site: never")


class Upload(Message, frozen=True):
    """C -> S: one site's encoded vector; `payload` is ciphertext, or packed slots under plain.

    key: which HE key encrypted it; zero under plain.
    """

    sender: SiteName
    key: Digest
    payload: bytes
    signature: Signature


class OpenedSum(Message, frozen=True):
    """The opener -> S: the decrypted sum, packed plain_bits to a slot."""

    sender: SiteName
    payload: bytes
    signature: Signature


class OpeningTag(Message, frozen=True):
    """A holder -> S, instead of an OpenedSum: a MAC of the slots it opened.

    Its key comes from the HE seed, so that the server sees whether sites opened the same and can
    test no guess.
    """

    sender: SiteName
    tag: Digest
    signature: Signature


class SumToOpen(Message, frozen=True):
    """S -> an opener: the encrypted sum of `contributors`' uploads, and who confirmed them."""

    contributors: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]
    confirmations: Annotated[tuple[Confirmation, ...], Meta(max_length=1 << 16)]
    payload: bytes

    def __post_init__(self) -> None:
        _in_order(self.contributors, "the contributors")
        _in_order([item.sender for item in self.confirmations], "the confirmations")
