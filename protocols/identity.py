"""Who a site is: a long-lived Ed25519 key, pinned by every other site in a roster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocols.errors import ProtocolError
from protocols.keystream import Randomness


def digest(domain: str, *fields: bytes) -> bytes:
    """SHA-256 of `fields`, each after its length (8 bytes, big-endian): no two lists collide.

    >>> digest("x", b"ab", b"c") == digest("x", b"a", b"bc")
    False
    """
    sha = hashlib.sha256(b"securefl/1\0" + domain.encode("ascii") + b"\0")
    for field in fields:
        sha.update(len(field).to_bytes(8, "big"))
        sha.update(field)
    return sha.digest()


@final
class SigningKey:
    """A site's Ed25519 secret."""

    __slots__ = ("_private",)

    def __init__(self, randomness: Randomness) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(randomness(32))

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes: what a roster pins."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._private.sign(statement)

    def __repr__(self) -> str:
        return "SigningKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key is not serialised")


@final
@dataclass(frozen=True, slots=True)
class Roster:
    """The sites of a consortium and their pinned public keys, in name order."""

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for site, key in self.keys.items():
            if len(key) != 32:
                raise ValueError(f"the public key of {site} has {len(key)} bytes, not 32")
        object.__setattr__(self, "keys", MappingProxyType(dict(sorted(self.keys.items()))))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def __contains__(self, site: object) -> bool:
        return site in self.keys

    def __len__(self) -> int:
        return len(self.keys)

    def verify(self, site: str, signature: bytes, statement: bytes) -> None:
        """Raise ProtocolError unless `site` is pinned and signed `statement`."""
        if site not in self.keys:
            raise ProtocolError(f"{site} is not in the roster", [site])
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[site]).verify(signature, statement)
        except (InvalidSignature, ValueError):
            raise ProtocolError(f"the signature of {site} is not valid", [site]) from None


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """One site: its name, its key, and the roster it trusts."""

    name: str
    key: SigningKey
    roster: Roster

    def __post_init__(self) -> None:
        if self.roster.keys.get(self.name) != self.key.public:
            raise ValueError(f"the roster does not pin the key of {self.name}")
