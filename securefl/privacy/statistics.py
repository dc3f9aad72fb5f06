"""Private statistics as sums: mean, variance, histogram and quantiles over all sites' records.

A statistic turns a site's records into one integer vector. The sites' vectors are summed under
secagg or masked-bfv with a share of discrete Gaussian noise each, and whoever has the sum decodes
it. What a record may add is bounded by ranges that are declared, never looked up in the data; a
value outside is moved to the nearest end, and one that is missing adds nothing. What is protected
is a row: where people are to be, give each of them one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from securefl.privacy import accounting

UNITS: Final = 1 << 12
"""The integer that 1 becomes: fine beside any noise worth adding."""


@final
@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and variance of each of k columns, in declared ranges.

    ranges: (low, high) of each column. A record adds (1, y, y^2) a column, y its value mapped from
    [low, high] to [-1, 1]: integers of L2 norm at most `sensitivity` = UNITS sqrt(3 k).
    """

    ranges: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("ranges = (): declare the range of at least one column")
        for low, high in self.ranges:
            _check_range(low, high)

    @property
    def dimension(self) -> int:
        """Integers in the sum."""
        return 3 * len(self.ranges)

    @property
    def sensitivity(self) -> float:
        """How far one record moves the sum, L2."""
        return UNITS * math.sqrt(self.dimension)

    def encode(self, records: NDArray[np.floating]) -> NDArray[np.int64]:
        """The sum over `records` (float[n, k]) of what each adds, int64[3 k]."""
        low, high = np.array(self.ranges, np.float64).T
        values = np.clip(np.asarray(records, np.float64), low, high)
        known = ~np.isnan(values)
        y = np.where(known, np.clip((values - low) / (high - low) * 2 - 1, -1, 1), 0.0)
        each = np.stack([known, y, np.square(y)])
        total = np.rint(each * UNITS).astype(np.int64).sum(1)
        return np.ascontiguousarray(total.reshape(-1))

    def decode(self, total: NDArray[np.int64]) -> MomentsEstimate:
        """Count, mean and variance (population) of each column from the noisy sum."""
        low, high = np.array(self.ranges, np.float64).T
        count, first, second = total.reshape(3, -1) / UNITS
        known = np.maximum(count, 1.0)
        y = np.clip(first / known, -1, 1)
        half = (high - low) / 2
        variance = np.clip(second / known - y**2, 0, 1) * half**2
        return MomentsEstimate(count, low + (y + 1) * half, variance)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MomentsEstimate:
    """Noisy count, mean and population variance of each column, float[k] each."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values of one column fall between neighbouring, ascending, declared edges.

    The last bin has its upper edge. A record adds UNITS to one bin: that is `sensitivity`.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) < 2:
            raise ValueError(f"edges = {self.edges}: declare at least two")
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            _check_range(low, high)

    @property
    def dimension(self) -> int:
        """Integers in the sum."""
        return len(self.edges) - 1

    @property
    def sensitivity(self) -> float:
        """How far one record moves the sum, L2."""
        return float(UNITS)

    def encode(self, values: NDArray[np.floating]) -> NDArray[np.int64]:
        """The counts of `values` (float[n]) in units, int64[bins]."""
        known = np.asarray(values, np.float64)
        known = np.clip(known[~np.isnan(known)], self.edges[0], self.edges[-1])
        return np.histogram(known, np.array(self.edges))[0].astype(np.int64) * UNITS

    def decode(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """The noisy count of each bin, float[bins]; it may be negative."""
        return np.asarray(total / UNITS, np.float64)

    def quantile(self, total: NDArray[np.int64], share: float) -> float:
        """The value below which `share` (0 to 1) of the values lie, linear within a bin.

        From the noisy counts, negative ones taken as zero; the middle of the range if none is left.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share = {share}: use 0 to 1")
        counts = np.maximum(self.decode(total), 0)
        if not counts.any():
            return (self.edges[0] + self.edges[-1]) / 2
        below = np.concatenate([[0.0], np.cumsum(counts)])
        return float(np.interp(share * below[-1], below, self.edges))


Statistic = Moments | Histogram


def event(
    statistic: Statistic, deviation: float, shares: int
) -> accounting.PoissonDiscreteGaussianSum:
    """What one release costs: every record is in it; each share is N_Z(0, deviation^2)."""
    return accounting.PoissonDiscreteGaussianSum(
        deviation, shares, statistic.sensitivity, statistic.dimension, 1.0
    )


def calibrate(statistic: Statistic, epsilon: float, delta: float, shares: int) -> float:
    """The least deviation of a share (to 0.1 %) at which one release costs at most `epsilon`.

    shares: those that the observer does not know, as `plan.Cohort.shares` says.
    """

    def cost(deviation: float) -> float:
        release = accounting.Repeated(event(statistic, deviation, shares), 1)
        return accounting.epsilon([release], delta)

    return accounting.least(cost, epsilon, 2.0, statistic.sensitivity / math.sqrt(shares) + 3)


def _check_range(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"range {low} to {high}: declare finite ends, the lower one first")
