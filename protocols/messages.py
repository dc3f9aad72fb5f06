"""One frozen class per arrow on the wire.

`from_bytes` parses completely, once: lengths, ranges, names and uniqueness are checked there, and
nothing else checks them again. Whatever bytes come in, only MalformedMessageError comes out.
"""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError
from protocols.identity import digest
from protocols.sealing import box_bytes

SiteName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
HE_SEED_BYTES = 64
SealedBox = Annotated[
    bytes, Meta(min_length=box_bytes(HE_SEED_BYTES), max_length=box_bytes(HE_SEED_BYTES))
]


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
            raise MalformedMessageError(f"not a {cls.__name__}: {error}") from None
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
    """

    session: SessionId
    round: Annotated[int, Meta(ge=1, le=2**62)]
    cohort: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]
    minimum: Annotated[int, Meta(ge=2, le=1 << 16)]
    binding: Digest

    def __post_init__(self) -> None:
        if list(self.cohort) != sorted(set(self.cohort)):
            raise ValueError("the cohort is not in order, each site once")
        if self.minimum > len(self.cohort):
            raise ValueError(f"minimum {self.minimum} exceeds the cohort of {len(self.cohort)}")

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
        names = [item.sender for item in self.items]
        if names != sorted(set(names)):
            raise ValueError("the advertisements are not in order, one a site")


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
        names = [item.receiver for item in self.items]
        if names != sorted(set(names)):
            raise ValueError("the sealed seeds are not in order, one a site")
        if len({(item.maker, item.public, item.key) for item in self.items}) != 1:
            raise ValueError("the sealed seeds do not come from one maker and one seed")


class Upload(Message, frozen=True):
    """C -> S: one site's encoded vector; `payload` is ciphertext, or packed slots under plain.

    key: which HE key encrypted it; zero under plain.
    """

    sender: SiteName
    key: Digest
    payload: bytes
    signature: Signature


class SumToOpen(Message, frozen=True):
    """S -> the opener: the encrypted sum of `contributors`' uploads."""

    contributors: Annotated[tuple[SiteName, ...], Meta(min_length=2, max_length=1 << 16)]
    payload: bytes

    def __post_init__(self) -> None:
        if list(self.contributors) != sorted(set(self.contributors)):
            raise ValueError("the contributors are not in order, each site once")


class OpenedSum(Message, frozen=True):
    """The opener -> S: the decrypted sum, packed plain_bits to a slot."""

    sender: SiteName
    payload: bytes
    signature: Signature
