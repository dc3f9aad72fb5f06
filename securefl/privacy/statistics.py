"""What one private sum over all records costs, and the noise at which a budget affords it.

Each site turns its records into one vector of integers; the vectors are summed under secagg or
masked-bfv with a share of discrete Gaussian noise each. What is summed says how far one record, or
one person, moves the sum: `securefl.preprocessing` does, stage by stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final

from securefl.privacy import accounting


class Statistic(Protocol):
    """Anything that is released as a sum of `dimension` integers.

    sensitivity: L2, how far one record (or person) moves it.
    """

    @property
    def dimension(self) -> int: ...

    @property
    def sensitivity(self) -> float: ...


@final
@dataclass(frozen=True, slots=True)
class BoundedSum:
    """A sum of `dimension` integers that one record (or person) moves by at most `sensitivity`."""

    dimension: int
    sensitivity: float

    def __post_init__(self) -> None:
        if self.dimension < 1 or not 0 < self.sensitivity < math.inf:
            raise ValueError(
                f"dimension = {self.dimension}, sensitivity = {self.sensitivity}: a sum has at "
                "least one integer, and a record moves it by a finite amount"
            )


def event(
    released: Statistic, deviation: float, shares: int
) -> accounting.PoissonDiscreteGaussianSum:
    """What one release costs: every record is in it; each share is N_Z(0, deviation^2)."""
    return accounting.PoissonDiscreteGaussianSum(
        deviation, shares, released.sensitivity, released.dimension, 1.0
    )


def calibrate(released: Statistic, epsilon: float, delta: float, shares: int) -> float:
    """The least deviation of a share (to 0.1 %) at which one release costs at most `epsilon`.

    shares: those that the observer does not know, as `plan.Cohort.shares` says.
    """

    def cost(deviation: float) -> float:
        release = accounting.Repeated(event(released, deviation, shares), 1)
        return accounting.epsilon([release], delta)

    return accounting.least(cost, epsilon, 2.0, released.sensitivity / math.sqrt(shares) + 3)
