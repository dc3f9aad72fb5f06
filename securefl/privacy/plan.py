"""What a run promises its records: a value from which every reported epsilon comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

from securefl import config
from securefl.config import ConfigurationError
from securefl.privacy import accounting


@final
@dataclass(frozen=True, slots=True)
class RecordLocal:
    """DP-SGD at each site, on its own records, with its own noise (Abadi et al. 2016, algorithm 1).

    Every local step takes a secret Poisson sample at the public `rate`, clips each record's
    gradient to `clip`, adds Gaussian noise of standard deviation noise_multiplier * clip, and
    divides by the public `expected_batch`.

    Formal Guarantees: what a site sends in all the rounds it is charged for is
    (spent(rounds), delta)-differentially private under adding or removing one of its records, even
    if the aggregation is broken and every other site colludes. Nothing depends on the number of
    records. Arithmetic is in floating point: the noise is not yet hardened against its rounding
    (Mironov 2012).
    """

    epsilon: float
    delta: float
    clip: float
    rate: float
    expected_batch: int
    noise_multiplier: float
    steps_per_round: int

    @classmethod
    def calibrate(cls, privacy: config.Privacy, rounds: int, steps_per_round: int) -> Self:
        """The plan whose cost for `rounds` (and the spare ones) meets privacy.epsilon.

        Raises ConfigurationError, with what is reachable, when the noise in one coordinate would
        outweigh the clipped gradients of a whole expected batch pulling together.
        """
        steps = (rounds + privacy.spare_rounds) * steps_per_round
        most = float(privacy.expected_batch)
        least = accounting.PoissonGaussian(most, privacy.rate)
        reachable = accounting.epsilon([accounting.Repeated(least, steps)], privacy.delta)
        if reachable > privacy.epsilon:
            raise ConfigurationError(
                f"privacy.epsilon = {privacy.epsilon:g} is too small to train at all: "
                f"{steps} steps at rate {privacy.rate:g} would need noise above the whole batch of "
                f"{privacy.expected_batch}; epsilon >= {reachable:.3g} is reachable, or use fewer "
                "rounds, a lower rate or a larger expected_batch"
            )
        noise = accounting.noise_multiplier(privacy.epsilon, privacy.delta, privacy.rate, steps)
        return cls(
            privacy.epsilon,
            privacy.delta,
            privacy.clip,
            privacy.rate,
            privacy.expected_batch,
            noise,
            steps_per_round,
        )

    def spent(self, rounds: int) -> float:
        """Epsilon at `delta` after `rounds` charged rounds, aborted ones included."""
        step = accounting.PoissonGaussian(self.noise_multiplier, self.rate)
        steps = accounting.Repeated(step, rounds * self.steps_per_round)
        return accounting.epsilon([steps], self.delta)

    def affords(self, rounds: int) -> bool:
        """Whether `rounds` charged rounds stay within the promised epsilon."""
        return self.spent(rounds) <= self.epsilon
