"""The discrete Gaussian over the integers, drawn from a keystream by inversion.

N_Z(0, sigma^2) has P(x) proportional to exp(-x^2 / (2 sigma^2)) on the integers (Canonne, Kamath
and Steinke 2020, definition 1). Adding it to an integer leaves no low-order bits through which a
rounding error could speak (Mironov 2012).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from protocols.keystream import Keystream

LEAST_ROUNDED_VARIANCE: Final = 250.0
"""From here on `divergence_from_rounded` is proven."""
CUT: Final = 2.0**-127
"""What a coordinate is charged, as statistical distance, for masses beyond 14 deviations."""

_CHUNK: Final = 1 << 14
_GUIDE_BITS: Final = 16
_BITS: Final = 127  # of one uniform: 63 drawn always, 64 more where those decide nothing
_ONE_TABLE: Final = 2048.0
_DIGITS: Final = Context(prec=60)


@final
@dataclass(frozen=True, slots=True)
class DiscreteGaussian:
    """N_Z(0, sigma^2), by a cumulative table of 127 bits and a guide into it.

    Precondition: 0.5 <= sigma <= 2^24, else ValueError.

    Formal Guarantees: draws from a uniform keystream are independent and each is within
    statistical (total variation) distance `tau` < 2^-100 of N_Z(0, sigma^2); they are symmetric
    about zero exactly. Time and memory accesses depend on what is drawn: not constant-time.

    Above sigma = 2048 a draw is x_1 + k x_2 with independent x_i from N_Z(0, sigma_i^2) and
    sigma_1^2 + k^2 sigma_2^2 = sigma^2 exactly. Completing the square, its mass at z is that of
    N_Z(0, sigma^2) times sum_j exp(-(j - c_z)^2 / (2 s^2)), s = sigma_1 sigma_2 / sigma, which by
    Poisson summation lies within a factor 1 +- 2 sum_{l>=1} exp(-2 pi^2 s^2 l^2) of a constant
    (Micciancio and Walter 2017, section 4; here s^2 > 5 and the factor is 1 +- 2^-140).

    >>> from protocols.keystream import Seed
    >>> DiscreteGaussian(50.0).sample(Keystream(Seed(bytes(32)), "doc"), 4)
    array([19,  7, 36, -2])
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0.5 <= self.sigma <= 1 << 24:
            raise ValueError(
                f"sigma = {self.sigma}: the sampler takes 0.5 to 2^24; "
                + ("use a finer grid" if self.sigma < 0.5 else "use a coarser grid")
            )

    @property
    def tau(self) -> float:
        """An upper bound on the statistical distance of one draw from N_Z(0, sigma^2)."""
        parts = _parts(self.sigma)
        return sum(table.tau for _, table in parts) + (2.0**-139 if len(parts) > 1 else 0.0)

    def sample(self, keystream: Keystream, count: int) -> NDArray[np.int64]:
        """`count` independent draws, int64[count]."""
        out = np.empty(count, np.int64)
        for start in range(0, count, _CHUNK):
            chunk = out[start : start + _CHUNK]
            chunk[:] = 0
            for scale, table in _parts(self.sigma):
                chunk += scale * table.invert(keystream.words(len(chunk)), keystream.words)
        return out


def divergence_from_rounded(variance: float) -> float:
    """KL(g || f) in one coordinate, an upper bound: g is N_Z(0, v + 1/12), f is round(N(0, v)).

    v = `variance` >= 250, else ValueError. Both laws are cut at 14 deviations: charge `CUT` for it.

    With U uniform on [-1/2, 1/2], f(j) is exp(-j^2 / 2v) E[exp(-jU/v - U^2/2v)] up to a constant.
    The logarithm of the expectation is even in a = j / v. Its second derivative at 0 lies between
    1/12 - 1/(128 v) and 1/12; its fourth, the fourth cumulant of a variable in an interval of
    length 1, is at most 1/8 in size everywhere. And log g(j) is -j^2 / 2v + a^2 / 24 up to a
    constant and a^2 / (288 v). So log(f / g) is within X = (x^4 / 192 + x^2 / 135) / v^2 of a
    constant, x = j / sqrt(v). For |x| <= 14 and v >= 250, X < 1/100 and KL(g || f) <=
    E_g[X^2] exp(1/100) / 2 < 1 / (450 v^4), with the even moments 3, 15, 105 of the Gaussian.
    """
    if not variance >= LEAST_ROUNDED_VARIANCE:
        raise ValueError(f"variance = {variance}: use at least {LEAST_ROUNDED_VARIANCE:g}")
    return 1 / (450 * variance**4)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """One discrete Gaussian as cumulative masses of its magnitude.

    cumulative: floor(2^127 P(|X| <= j)) for j from 0; the largest magnitude has the rest.
    high: their upper 63 bits. guide: for each value of the upper 16 bits, how many lie below it.
    """

    cumulative: tuple[int, ...]
    high: NDArray[np.uint64]
    guide: NDArray[np.int32]
    tau: float

    def invert(
        self, words: NDArray[np.uint64], more: Callable[[int], NDArray[np.uint64]]
    ) -> NDArray[np.int64]:
        """One draw a word: its lowest bit is the sign; `more` gives words where 63 bits tie."""
        uniform = words >> np.uint64(1)
        bucket = (uniform >> np.uint64(63 - _GUIDE_BITS)).astype(np.int32)
        below = self.guide[bucket]
        magnitude = below.astype(np.int64)
        unsure = np.flatnonzero(self.guide[1:][bucket] != below)
        drawn = uniform[unsure]
        found = np.searchsorted(self.high, drawn, side="right")
        magnitude[unsure] = found
        for tie in unsure[self.high[found - 1] == drawn]:  # about once in 2^63 / sigma
            exact = int(uniform[tie]) << 64 | int(more(1)[0])
            magnitude[tie] = bisect_right(self.cumulative, exact)
        sign = (words & np.uint64(1)).view(np.int64)
        return (magnitude ^ -sign) + sign


def _table(variance: Fraction) -> _Table:
    """The table of N_Z(0, variance), to 60 decimal digits.

    Weights follow w_{j+1} = w_j r_j and r_{j+1} = r_j exp(-1 / variance), whose relative error
    grows to j^2 10^-59 < 2^-150: nothing beside the 2^-127 of the cumulative masses. `tau` counts
    2^-126 for each of them and bounds the tail that is cut off (below 2^-130 of the centre) by a
    geometric series.
    """
    with localcontext(_DIGITS):
        v = Decimal(variance.numerator) / Decimal(variance.denominator)
        weight, ratio, step = Decimal(1), (-1 / (2 * v)).exp(), (-1 / v).exp()
        partial, sums, cut = Decimal(0), list[Decimal](), Decimal(2) ** -130
        while weight > cut:
            partial += weight if not sums else 2 * weight
            sums.append(partial)
            weight *= ratio
            ratio *= step
        unit = Decimal(1 << _BITS) / partial
        cumulative = tuple(int(sums[j] * unit) for j in range(len(sums) - 1))
        tail = 2 * weight / (1 - ratio) / partial
        tau = float(tail + len(sums) * Decimal(2) ** -126)
    high = np.array([c >> 64 for c in cumulative], np.uint64)
    starts = np.arange(1 << _GUIDE_BITS, dtype=np.uint64) << np.uint64(63 - _GUIDE_BITS)
    guide = np.append(np.searchsorted(high, starts), len(high)).astype(np.int32)
    return _Table(cumulative, high, guide, tau)


@lru_cache(maxsize=32)
def _parts(sigma: float) -> tuple[tuple[np.int64, _Table], ...]:
    """The scale and the table of each independent part of a draw."""
    variance = Fraction(sigma) ** 2
    if sigma <= _ONE_TABLE:
        return ((np.int64(1), _table(variance)),)
    k = round(math.sqrt(sigma / math.sqrt(6)))  # balances the tables: s^2 = 6 (1 - 6 k^2/sigma^2)
    fine = Fraction(6 * k * k)
    coarse = (variance - fine) / (k * k)
    return ((np.int64(1), _table(fine)), (np.int64(k), _table(coarse)))
