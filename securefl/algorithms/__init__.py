"""Server update rules, one file each, and how an experiment names one.

The client rule that both share is `local_steps` steps of the site's own optimiser from the global
weights (securefl.privacy.training); a site sends the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from securefl import config, models
from securefl.algorithms.fedadam import FedAdam
from securefl.algorithms.fedavg import FedAvg
from securefl.config import ConfigurationError

Moments = Mapping[str, NDArray[np.float64]]


class ServerRule(Protocol):
    """How an aggregate moves the global weights; elementwise, so that every site can repeat it."""

    def start(self, size: int) -> Moments:
        """The optimiser's state before the first round: named float64[size] arrays."""
        ...

    def step(
        self, weights: NDArray[np.float64], mean: NDArray[np.float64], moments: Moments
    ) -> tuple[NDArray[np.float64], Moments]:
        """New weights and state from the mean update (all float64[size])."""
        ...


def server_rule(aggregation: config.Aggregation) -> ServerRule:
    """The rule an experiment names; a `module:callable` is called with the aggregation section."""
    if aggregation.algorithm == "fedavg":
        return FedAvg(aggregation.learning_rate, aggregation.momentum)
    if aggregation.algorithm == "fedadam":
        rate, beta1, beta2 = aggregation.learning_rate, aggregation.beta1, aggregation.beta2
        return FedAdam(rate, beta1, beta2, aggregation.tau)
    rule = models.load_callable(aggregation.algorithm)(aggregation)
    if not (callable(getattr(rule, "start", None)) and callable(getattr(rule, "step", None))):
        raise ConfigurationError(
            f"aggregation.algorithm = {aggregation.algorithm!r} gives {type(rule).__name__}, "
            "which has no start(size) and step(weights, mean, moments)"
        )
    return rule  # type: ignore[no-any-return]
