"""A public random rotation, after which no coordinate of a vector stands out.

Kairouz, Liu and Steinke 2021, section 5 and algorithm 1, without padding. A field of the sum must
hold whatever one coordinate may reach: n times the clip, were all sites to put everything into it.
Rotated, a coordinate is about the clip over the square root of the dimension, and the field is
narrower by bits. Privacy does not rest on it: the norm is bounded after the rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from protocols.keystream import Keystream, Seed


def block(dimension: int) -> int:
    """2^k, the largest power of two that is at most `dimension` >= 1.

    >>> [block(d) for d in (1, 2, 3, 8, 26_010)]
    [1, 2, 2, 8, 16384]
    """
    if dimension < 1:
        raise ValueError(f"dimension = {dimension}: use at least 1")
    return 1 << (dimension.bit_length() - 1)


@final
@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal map of R^dimension that public `material` (32 bytes) decides.

    Random signs, then the orthonormal Walsh-Hadamard transform, on the first 2^k = block(dimension)
    coordinates; then, unless these are all, fresh signs and the transform on the last 2^k. The two
    overlap, for 2^(k+1) > dimension.

    Formal Guarantees, for uniform signs that are independent of x:
    - each factor is orthogonal, hence so is the map: norms and inner products stay;
    - each coordinate of the rotated x is sub-Gaussian with variance |x|^2 / 2^k: its moments
      E exp(s y) are at most exp(s^2 |x|^2 / (2 * 2^k)), so P(|y| > t) <= 2 exp(-t^2 2^k /
      (2 |x|^2)). For a coordinate of the last 2^k is a sum of z_i / sqrt(2^k) with fresh signs, z
      what the first factor left there, |z| <= |x| whatever it was (Hoeffding's lemma, given z); a
      coordinate before them is such a sum over the first 2^k of x;
    - the same bits everywhere: additions and subtractions of float64 in a fixed order, and one
      correctly rounded factor.

    >>> turned = Rotation(3, bytes(32)).rotate(np.array([1.0, 0.0, 0.0]))
    >>> np.round(np.abs(turned), 3).tolist()
    [0.707, 0.5, 0.5]
    """

    dimension: int
    material: bytes

    def __post_init__(self) -> None:
        block(self.dimension)
        Seed(self.material)

    def rotate(self, vector: NDArray[np.floating]) -> NDArray[np.float64]:
        """The rotated `vector` (float[dimension]); not finite where that is not."""
        out = self._copied(vector)
        for part, signs in self._factors():
            out[part] *= signs
            _transform(out[part])
        return out

    def restore(self, rotated: NDArray[np.floating]) -> NDArray[np.float64]:
        """The inverse of `rotate`, to rounding."""
        out = self._copied(rotated)
        for part, signs in reversed(self._factors()):
            _transform(out[part])
            out[part] *= signs
        return out

    def _copied(self, vector: NDArray[np.floating]) -> NDArray[np.float64]:
        if vector.shape != (self.dimension,):
            raise ValueError(f"a vector of shape {vector.shape}: this rotates {self.dimension}")
        return vector.astype(np.float64)

    def _factors(self) -> list[tuple[slice, NDArray[np.float64]]]:
        """Where each factor acts, and its signs."""
        size = block(self.dimension)
        starts = (0,) if size == self.dimension else (0, self.dimension - size)
        stream = Keystream(Seed(self.material), "rotation")
        return [(slice(start, start + size), _signs(stream, size)) for start in starts]


def _signs(stream: Keystream, size: int) -> NDArray[np.float64]:
    drawn = np.frombuffer(stream.bytes(-(-size // 8)), np.uint8)
    bits = np.unpackbits(drawn, bitorder="little")[:size]
    return 1.0 - 2.0 * bits.astype(np.float64)


def _transform(values: NDArray[np.float64]) -> None:
    """The orthonormal Walsh-Hadamard transform of float64[2^k], in place; its own inverse."""
    width = 1
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is left out later
        while width < len(values):
            pairs = values.reshape(-1, 2, width)
            both = pairs[:, 0] + pairs[:, 1]
            pairs[:, 1] = pairs[:, 0] - pairs[:, 1]
            pairs[:, 0] = both
            width *= 2
        values *= math.sqrt(1 / len(values))
