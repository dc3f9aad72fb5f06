"""Secret seeds and the streams they become: HKDF-SHA256 (RFC 5869) and AES-256-CTR."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import NoReturn, final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Randomness = Callable[[int], bytes]
"""`randomness(n)` gives n fresh bytes: `os.urandom`, or a `Keystream`'s `bytes` in tests."""

_ZEROS = memoryview(bytes(1 << 18))


def hkdf(secret: bytes, purpose: str, context: bytes, size: int) -> bytes:
    """HKDF-SHA256 of `secret`; distinct (purpose, context) give independent outputs."""
    info = b"securefl/1\0" + purpose.encode("ascii") + b"\0" + context
    return HKDF(hashes.SHA256(), size, None, info).derive(secret)


@final
class Seed:
    """32 or 64 secret bytes. Never shown, never serialised, never pickled.

    >>> Seed(bytes(32))
    Seed(<secret>)
    """

    __slots__ = ("_material",)

    def __init__(self, material: bytes) -> None:
        if len(material) not in (32, 64):
            raise ValueError(f"a seed has 32 or 64 bytes, not {len(material)}")
        self._material = bytes(material)

    @classmethod
    def draw(cls, randomness: Randomness, size: int = 32) -> Seed:
        """A fresh seed of `size` bytes."""
        return cls(randomness(size))

    def derive(self, purpose: str, context: bytes = b"", size: int = 32) -> bytes:
        """`size` secret bytes for one purpose in one context; reveals nothing of the seed."""
        return hkdf(self._material, purpose, context, size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seed) and hmac.compare_digest(self._material, other._material)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Seed(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a seed is not serialised")


@final
class Keystream:
    """AES-256-CTR under a key derived from (seed, purpose, context): read it once, forwards.

    Formal Guarantees: streams with different (seed, purpose, context) are computationally
    independent; reading n bytes and then m gives the same bytes as reading n + m.
    """

    __slots__ = ("_encryptor",)

    def __init__(self, seed: Seed, purpose: str, context: bytes = b"") -> None:
        key = seed.derive(purpose, context, 32)
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def bytes(self, size: int) -> bytes:
        """The next `size` bytes."""
        return self._next(size).tobytes()

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` uniform 64-bit integers, uint64[count]."""
        return self._next(8 * count).view("<u8").astype(np.uint64, copy=False)

    def words32(self, count: int) -> NDArray[np.uint32]:
        """The next `count` uniform 32-bit integers, uint32[count]."""
        return self._next(4 * count).view("<u4").astype(np.uint32, copy=False)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """The next `count` uniform multiples of 2^-53 in [0, 1), float64[count]."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _next(self, size: int) -> NDArray[np.uint8]:
        out = np.empty(size + 15, np.uint8)  # update_into wants a block of room
        view = out.data
        for at in range(0, size, len(_ZEROS)):
            step = min(len(_ZEROS), size - at)
            self._encryptor.update_into(_ZEROS[:step], view[at : at + step + 15])
        return out[:size]

    def __repr__(self) -> str:
        return "Keystream(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keystream is not serialised")
