"""FedAdam (Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True, slots=True)
class FedAdam:
    """m <- b1 m + (1-b1) d;  v <- b2 v + (1-b2) d^2;  w <- w + learning_rate m / (sqrt(v) + tau).

    As in the paper there is no bias correction, and v starts at tau^2.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def start(self, size: int) -> Mapping[str, NDArray[np.float64]]:
        """First and second moments."""
        return {"first": np.zeros(size), "second": np.full(size, self.tau**2)}

    def step(
        self,
        weights: NDArray[np.float64],
        mean: NDArray[np.float64],
        moments: Mapping[str, NDArray[np.float64]],
    ) -> tuple[NDArray[np.float64], Mapping[str, NDArray[np.float64]]]:
        """One round's move."""
        first = self.beta1 * moments["first"] + (1 - self.beta1) * mean
        second = self.beta2 * moments["second"] + (1 - self.beta2) * mean**2
        moved = weights + self.learning_rate * first / (np.sqrt(second) + self.tau)
        return moved, {"first": first, "second": second}
