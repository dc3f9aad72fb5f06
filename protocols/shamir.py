"""Secret sharing over a prime field (Shamir 1979): t shares recover, t - 1 tell nothing.

Formal Guarantees: fewer than `threshold` shares of a secret are uniformly distributed, up to the
2^-128 bias of reducing 384 random bits modulo a 257-bit prime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NoReturn, final

from protocols.keystream import Randomness, Seed

PRIME: Final = 2**256 + 297
SHARE_BYTES: Final = 33


@final
class Share:
    """The value of a secret polynomial at one site's point. As secret as the secret itself."""

    __slots__ = ("_value",)

    def __init__(self, value: int) -> None:
        if not 0 <= value < PRIME:
            raise ValueError("a share is an element of the field")
        self._value = value

    @classmethod
    def parse(cls, data: bytes) -> Share:
        """The share in 33 bytes, big-endian; ValueError when it is not a field element."""
        if len(data) != SHARE_BYTES:
            raise ValueError(f"a share has {SHARE_BYTES} bytes")
        return cls(int.from_bytes(data, "big"))

    def reveal(self) -> bytes:
        """The 33 bytes: to be sealed for the site it belongs to, or released in phase unmask."""
        return self._value.to_bytes(SHARE_BYTES, "big")

    def __repr__(self) -> str:
        return "Share(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a share is not serialised")


def split(
    secret: Seed, threshold: int, points: Iterable[int], randomness: Randomness
) -> dict[int, Share]:
    """Shares of a 32-byte `secret` by point; any `threshold` of them recover it.

    Preconditions: points are distinct and >= 1, and there are at least `threshold` >= 1 of them.
    """
    places = set(points)
    if len(secret._material) != 32:
        raise ValueError("only a 32-byte secret fits into the field")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"threshold = {threshold} is outside 1 to {len(places)}")
    if min(places) < 1:
        raise ValueError("the secret itself lies at point 0: use points from 1 up")
    coefficients = [int.from_bytes(secret._material, "big")]
    coefficients += [int.from_bytes(randomness(48), "big") % PRIME for _ in range(threshold - 1)]
    shares = {}
    for x in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares[x] = Share(value)
    return shares


def combine(shares: Mapping[int, Share]) -> Seed:
    """The 32-byte secret from shares by point; ValueError when they are no shares of one.

    Interpolates at zero. Give exactly `threshold` shares; whether they were right is for the
    caller to check against a commitment.
    """
    secret = 0
    for x, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        secret = (secret + share._value * numerator * pow(denominator, -1, PRIME)) % PRIME
    if secret >= 1 << 256:
        raise ValueError("these are not shares of one secret")
    return Seed(secret.to_bytes(32, "big"))
