"""Pairwise and self masks: uniform vectors modulo 2^p that cancel in a sum.

Bonawitz et al. 2017, section 4. The site with the lower name adds a pair's mask and the other takes
it off. Each site adds one mask more, its own, which only t sites together can take off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NoReturn, final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed

Term = tuple[int, Keystream]
"""+1 or -1, and the stream of the mask that is added or taken off."""


@final
class MaskKey:
    """One site's X25519 mask secret of one round: the only secret of which others hold shares."""

    __slots__ = ("_private", "_seed")

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self._private = X25519PrivateKey.from_private_bytes(seed._material)

    @classmethod
    def draw(cls, randomness: Randomness) -> MaskKey:
        """A fresh key."""
        return cls(Seed.draw(randomness))

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    @property
    def seed(self) -> Seed:
        """The secret, to be shared out."""
        return self._seed

    def pair(self, me: str, peer: str, peer_public: bytes, context: bytes) -> Term:
        """The mask that `me` shares with `peer` in `context`, with my sign.

        Precondition: `peer_public` is a usable key (sealing.check_public).
        """
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(peer_public))
        low, high = sorted((me, peer))
        about = digest("pair mask", context, low.encode(), high.encode())
        return (1 if me == low else -1), Keystream(Seed(shared), "pair mask", about)

    def __repr__(self) -> str:
        return "MaskKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a mask key is not serialised")


def own(seed: Seed, me: str, context: bytes) -> Term:
    """The mask that `me` adds for itself."""
    return 1, Keystream(seed, "self mask", digest("self mask", context, me.encode()))


def commitment(seed: Seed, me: str, context: bytes) -> bytes:
    """What `me` says of its self-mask seed before anyone holds a share of it (32 bytes)."""
    return seed.derive("self mask commitment", digest("commitment", context, me.encode()))


def add(
    chunks: Iterable[NDArray[np.uint64]], terms: Iterable[Term], bits: int
) -> Iterator[NDArray[np.uint64]]:
    """Each chunk (uint64 modulo 2^bits) with the next stretch of every mask added."""
    streams = list(terms)
    for chunk in chunks:
        masked = chunk.astype(_word(bits))
        for start in range(0, len(masked), _CHUNK):
            part = masked[start : start + _CHUNK]
            for term in streams:
                _put(term, part)
        yield _modulo(masked, bits)


def total(terms: Iterable[Term], slots: int, bits: int) -> NDArray[np.uint64]:
    """The sum of whole masks, uint64[slots] modulo 2^bits. One stream is held at a time."""
    result = np.zeros(slots, _word(bits))
    for term in terms:
        for start in range(0, slots, _CHUNK):
            _put(term, result[start : start + _CHUNK])
    return _modulo(result, bits)


_CHUNK = 1 << 16  # words at a time: they stay in the processor's cache


def _word(bits: int) -> type[np.unsignedinteger]:
    """The words that masks are drawn and added in: they wrap modulo a multiple of 2^bits."""
    return np.uint32 if bits <= 32 else np.uint64


def _put(term: Term, part: NDArray[np.unsignedinteger]) -> None:
    """Add the next stretch of a mask to `part`, or take it off, in place."""
    sign, stream = term
    words = stream.words32(len(part)) if part.dtype == np.uint32 else stream.words(len(part))
    if sign > 0:
        part += words
    else:
        part -= words


def _modulo(words: NDArray[np.unsignedinteger], bits: int) -> NDArray[np.uint64]:
    return words.astype(np.uint64, copy=False) & np.uint64((1 << bits) - 1)
