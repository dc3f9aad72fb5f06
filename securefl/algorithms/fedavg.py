"""FedAvg (McMahan et al. 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True, slots=True)
class FedAvg:
    """w <- w + learning_rate * mean update; 1 is the paper's plain average."""

    learning_rate: float = 1.0

    def start(self, size: int) -> Mapping[str, NDArray[np.float64]]:
        """No state."""
        del size
        return {}

    def step(
        self,
        weights: NDArray[np.float64],
        mean: NDArray[np.float64],
        moments: Mapping[str, NDArray[np.float64]],
    ) -> tuple[NDArray[np.float64], Mapping[str, NDArray[np.float64]]]:
        """One round's move."""
        return weights + self.learning_rate * mean, moments
