"""The epsilon of Poisson-sampled Gaussian steps, by privacy loss distributions (dp-accounting).

Adjacency is add-or-remove-one. The pessimistic discretisation of Doroshenko et al. 2022 makes every
figure an upper bound; compositions of anything else are not answered here.
"""

from __future__ import annotations

from functools import lru_cache

import dp_accounting
from dp_accounting.pld import PLDAccountant

ACCOUNTANT = "privacy loss distributions (dp-accounting)"
ADJACENCY = "add or remove one record"


@lru_cache(maxsize=4096)
def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of `steps` Gaussian steps on Poisson samples at `rate`.

    Preconditions: noise_multiplier > 0, 0 < rate <= 1, steps >= 0, 0 < delta < 1.

    >>> epsilon(1.0, 0.2, 0, 1e-3)
    0.0
    """
    if steps == 0:
        return 0.0
    # Any interval gives an upper bound; losses are large where the noise is small, and there a
    # tenfold coarser grid costs less than 1e-3 of epsilon and is ten times as fast.
    accountant = PLDAccountant(value_discretization_interval=1e-4 if noise_multiplier > 2 else 1e-3)
    accountant.compose(_event(noise_multiplier, rate, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def noise_multiplier(target: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier (to 0.1 %) at which `steps` steps cost at most `target`.

    Raises ValueError when no multiplier up to 2^20 does.
    """
    low, high = 0.0, 1.0
    while epsilon(high, rate, steps, delta) > target:
        low, high = high, high * 2
        if high > 1 << 20:
            raise ValueError(f"no noise reaches epsilon {target:g} at delta {delta:g}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if middle < 0.05 or epsilon(middle, rate, steps, delta) > target:
            low = middle
        else:
            high = middle
    return high


def _event(noise: float, rate: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(step, steps)
