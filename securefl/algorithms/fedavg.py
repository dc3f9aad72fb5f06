"""FedAvg (McMahan et al. 2017, algorithm 1), with server momentum (Hsu, Qi and Brown 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True, slots=True)
class FedAvg:
    """v <- momentum * v + mean update; w <- w + learning_rate * v.

    Learning rate 1 without momentum is the paper's plain average.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0

    def start(self, size: int) -> Mapping[str, NDArray[np.float64]]:
        """The velocity, where there is momentum."""
        return {"velocity": np.zeros(size)} if self.momentum else {}

    def step(
        self,
        weights: NDArray[np.float64],
        mean: NDArray[np.float64],
        moments: Mapping[str, NDArray[np.float64]],
    ) -> tuple[NDArray[np.float64], Mapping[str, NDArray[np.float64]]]:
        """One round's move."""
        if self.momentum:
            mean = self.momentum * moments["velocity"] + mean
            moments = {"velocity": mean}
        return weights + self.learning_rate * mean, moments
