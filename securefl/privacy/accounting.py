"""What noisy steps cost: events as values, and the epsilon of their composition.

Two accountants, and nothing else is answered (docs/adr/0006-accountants.md):

- continuous Gaussian steps alone: privacy loss distributions (dp-accounting), whose pessimistic
  discretisation (Doroshenko et al. 2022) makes every figure an upper bound;
- anything with a discrete Gaussian: Renyi differential privacy (RDP), from integer orders only.

**Why integer orders.** Let P be N_Z(0, sigma^2 I) on Z^d and P_v its shift by an integer vector v.
For an integer k, E_P[(P_v / P)^k] = exp((k^2 - k) |v|^2 / (2 sigma^2)) * sum_x P_kv(x), and the
last sum is 1 because kv is an integer vector. So with L = P_v / P and a sampling rate q,

    E_P[((1 - q) + q L)^a] = sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) |v|^2 / (2 sigma^2))

at every integer a >= 2, exactly as for the continuous Gaussian (Mironov, Talwar and Zhang 2019,
section 3.3); it grows with |v|. That adding a record costs more than removing one is their theorem
5, whose only premise is an involution that swaps P and P_v: here x -> v - x. For other orders the
equality fails, but a -> log E_P[L^a] is convex and 0 at a = 1 (Wang, Balle and Kasiviswanathan
2019, corollary 10), so between integers a chord bounds it.

**Sums of shares.** The sum S of H independent N_Z(0, sigma^2) is not N_Z(0, H sigma^2), but their
masses differ by a factor within exp(+-tau), tau = 10 sum_{k<H} exp(-2 pi^2 sigma^2 k / (k + 1)), in
every coordinate (Kairouz, Liu and Steinke 2021, theorem 13 and its corollary). A mixture of
shifts of S is then within exp(+-tau d) of the mixture of shifts of N_Z(0, H sigma^2 I), and since
E_Q[(P / Q)^a] = sum P^a Q^(1-a), its logarithm moves by at most (2 a - 1) tau d.

**From RDP to (epsilon, delta)**: Canonne, Kamath and Steinke 2020, proposition 12.

**What is not exact is charged to delta.** Draws at statistical distance chi from the stated law, all
steps together, cost (1 + e^epsilon) chi: P'(A) <= P(A) + chi <= e^epsilon Q(A) + delta + chi <=
e^epsilon Q'(A) + delta + (1 + e^epsilon) chi. Where a sensitivity holds but for an event of
probability beta that neighbours share (the same rounding randomness), P(A) <= P(A, good) + beta.

Adjacency: add or remove one record (or person) for sampled events; replace one site's update by
zero for `DiscreteGaussianSum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, final

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from protocols.noise import DiscreteGaussian

ACCOUNTANT: Final = "privacy loss distributions (dp-accounting)"
RENYI: Final = "Renyi differential privacy at integer orders"
ADJACENCY: Final = "add or remove one record"

_ORDERS: Final = np.unique(np.concatenate([np.arange(1, 129), 1.06 ** np.arange(83, 167)])).astype(
    np.int64
)
"""Integers from 1 to 128, then ever sparser up to 2^14."""


class UnprovenError(Exception):
    """A mechanism or a composition whose cost nobody here has proven: it gets no epsilon."""


@final
@dataclass(frozen=True, slots=True)
class PoissonGaussian:
    """Gaussian noise of noise_multiplier * clip on a Poisson sample's sum of clipped vectors.

    distance: the statistical distance of what is drawn from what rounding the continuous Gaussian
    would give, all coordinates together (`integers.hardened` states its own).
    """

    noise_multiplier: float
    rate: float
    distance: float = 0.0

    def __post_init__(self) -> None:
        _check(self.noise_multiplier > 0, "noise_multiplier", self.noise_multiplier, "above 0")
        _check(0 < self.rate <= 1, "rate", self.rate, "above 0 and at most 1")
        _check(0 <= self.distance < 1, "distance", self.distance, "from 0 to below 1")


@final
@dataclass(frozen=True, slots=True)
class PoissonDiscreteGaussianSum:
    """Shares of N_Z(0, deviation^2) on a Poisson sample's integer sum; only the total is seen.

    deviation: of one share, in grid units; at least 2, so that sums of shares are close to one
        discrete Gaussian.
    shares: H, how many independent shares the observer does not know.
    sensitivity: L2, in grid units: how far one record (or person) moves the integer sum.
    dimension: d, the coordinates; rate: the Poisson sampling rate.
    slip: the probability that one step's rounding exceeds `sensitivity`.
    """

    deviation: float
    shares: int
    sensitivity: float
    dimension: int
    rate: float
    slip: float = 0.0

    def __post_init__(self) -> None:
        _check_shares(self.deviation, self.shares, self.sensitivity, self.dimension)
        _check(0 < self.rate <= 1, "rate", self.rate, "above 0 and at most 1")
        _check(0 <= self.slip < 1, "slip", self.slip, "from 0 to below 1")


@final
@dataclass(frozen=True, slots=True)
class DiscreteGaussianSum:
    """Shares of N_Z(0, deviation^2) on the sum of the sites' integer updates; no sampling.

    Fields as in `PoissonDiscreteGaussianSum`. sensitivity: the L2 norm that conditional rounding
    lets no site's update exceed (Kairouz, Liu and Steinke 2021, algorithm 1 and theorem 1).
    """

    deviation: float
    shares: int
    sensitivity: float
    dimension: int

    def __post_init__(self) -> None:
        _check_shares(self.deviation, self.shares, self.sensitivity, self.dimension)


Event = PoissonGaussian | PoissonDiscreteGaussianSum | DiscreteGaussianSum


@final
@dataclass(frozen=True, slots=True)
class Repeated:
    """`event`, `times` times over; each may depend on what the earlier ones gave."""

    event: Event
    times: int

    def __post_init__(self) -> None:
        if not isinstance(self.event, Event):
            raise UnprovenError(
                f"no cost is proven for {type(self.event).__name__}: "
                "use an event of securefl.privacy.accounting"
            )
        _check(self.times >= 0, "times", self.times, "at least 0")


def epsilon(spent: Iterable[Repeated], delta: float) -> float:
    """Epsilon at `delta` (0 < delta < 1) of everything in `spent`, in any order.

    inf where no epsilon holds at this delta. Raises UnprovenError for a composition whose cost is
    not proven here: a site's update and records are different units.

    >>> epsilon([Repeated(PoissonGaussian(1.0, 0.2), 0)], 1e-3)
    0.0
    """
    _check(0 < delta < 1, "delta", delta, "above 0 and below 1")
    return _epsilon(_nonempty(spent), delta)


def accountant(spent: Iterable[Repeated]) -> str:
    """Which accountant answers for `spent`."""
    continuous = all(isinstance(r.event, PoissonGaussian) for r in _nonempty(spent))
    return ACCOUNTANT if continuous else RENYI


def least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least x in [low, high] (to 0.1 %) that is `enough`; enough(high), and monotone."""
    if enough(low):
        return low
    while high - low > 1e-3 * high:
        middle = math.sqrt(low * high) if high > 2 * low else (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=256)
def noise_multiplier(
    target: float, delta: float, rate: float, steps: int, distance: float = 0.0
) -> float:
    """The least noise multiplier (to 0.1 %) at which `steps` Poisson steps cost at most `target`.

    Raises ValueError when no multiplier up to 2^20 does.
    """

    def enough(noise: float) -> bool:
        step = PoissonGaussian(noise, rate, distance)
        return epsilon([Repeated(step, steps)], delta) <= target

    high = 1.0
    while not enough(high):
        high *= 2
        if high > 1 << 20:
            raise ValueError(f"no noise reaches epsilon {target:g} at delta {delta:g}")
    return least(enough, max(0.05, high / 2 if high > 1 else 0.0), high)


def _check(holds: bool, name: str, value: float, use: str) -> None:
    if not holds:  # also for nan, of which nothing holds
        raise ValueError(f"{name} = {value}: use a number {use}")


def _check_shares(deviation: float, shares: int, sensitivity: float, dimension: int) -> None:
    _check(2 <= deviation <= 1 << 24, "deviation", deviation, "from 2 to 2^24: change the grid")
    _check(shares >= 1, "shares", shares, "at least 1")
    _check(0 < sensitivity < math.inf, "sensitivity", sensitivity, "above 0")
    _check(dimension >= 1, "dimension", dimension, "at least 1")


def _nonempty(spent: Iterable[Repeated]) -> tuple[Repeated, ...]:
    return tuple(r for r in spent if r.times)


@lru_cache(maxsize=4096)
def _epsilon(spent: tuple[Repeated, ...], delta: float) -> float:
    if not spent:
        return 0.0
    units = {isinstance(r.event, DiscreteGaussianSum) for r in spent}
    if len(units) > 1:
        raise UnprovenError(
            "a site's update and a record are different units: account for them separately"
        )
    if accountant(spent) == ACCOUNTANT:
        curve = _by_loss_distributions(spent)
    else:
        curve = _by_renyi(spent)
    slips = sum(r.times * _slip(r.event) for r in spent)
    distance = sum(r.times * _distance(r.event) for r in spent)
    # The least fixed point of epsilon = curve(delta - slips - (1 + e^epsilon) distance), from below.
    found = 0.0
    for _ in range(100):
        left = delta - slips - (1 + math.exp(min(found, 700.0))) * distance
        if left <= 0:
            return math.inf
        needed = curve(left)
        if needed <= found:
            return found
        found = needed if distance == 0 else needed * (1 + 1e-12)
        if distance == 0:
            return found
    return math.inf


def _slip(event: Event) -> float:
    return event.slip if isinstance(event, PoissonDiscreteGaussianSum) else 0.0


def _distance(event: Event) -> float:
    """The statistical distance of one step's draws from their law, all coordinates and shares."""
    if isinstance(event, PoissonGaussian):
        return event.distance
    return DiscreteGaussian(event.deviation).tau * event.dimension * event.shares


def _by_loss_distributions(spent: tuple[Repeated, ...]) -> Callable[[float], float]:
    """Epsilon as a function of delta, of continuous Gaussian steps."""
    steps = [(r.event, r.times) for r in spent if isinstance(r.event, PoissonGaussian)]
    # Any interval gives an upper bound; losses are large where the noise is small, and there a
    # tenfold coarser grid costs less than 1e-3 of epsilon and is ten times as fast.
    fine = all(step.noise_multiplier > 2 for step, _ in steps)
    losses = PLDAccountant(value_discretization_interval=1e-4 if fine else 1e-3)
    for step, times in steps:
        gaussian = dp_accounting.GaussianDpEvent(step.noise_multiplier)
        losses.compose(dp_accounting.PoissonSampledDpEvent(step.rate, gaussian), times)
    return lambda delta: float(losses.get_epsilon(delta))


def _by_renyi(spent: tuple[Repeated, ...]) -> Callable[[float], float]:
    """Epsilon as a function of delta: the best order of the tight conversion."""
    moments = np.zeros(len(_ORDERS))
    for r in spent:
        moments += r.times * _log_moments(r.event)
    # Chords between neighbouring integers, eight to a gap up to order 16; order 1 itself is left out.
    orders = np.concatenate([np.arange(1.125, 16, 0.125), _ORDERS[15:]])
    bounds = np.interp(orders, _ORDERS, moments)

    def least_epsilon(delta: float) -> float:
        logs = math.log(delta) + np.log(orders)
        found = (bounds - logs) / (orders - 1) + np.log1p(-1 / orders)
        return max(0.0, float(found.min()))

    return least_epsilon


@lru_cache(maxsize=1024)
def _log_moments(event: Event) -> NDArray[np.float64]:
    """log E_Q[(P / Q)^a] at each of the integer `_ORDERS`, an upper bound; 0 at order 1."""
    if isinstance(event, PoissonGaussian):
        return _sampled(event.noise_multiplier, event.rate)
    multiplier = math.sqrt(event.shares) * event.deviation / event.sensitivity
    rate = event.rate if isinstance(event, PoissonDiscreteGaussianSum) else 1.0
    apart = _sum_of_shares(event.deviation, event.shares) * event.dimension
    return np.where(_ORDERS > 1, _sampled(multiplier, rate) + (2 * _ORDERS - 1) * apart, 0.0)


def _sampled(multiplier: float, rate: float) -> NDArray[np.float64]:
    """The sum of the module's docstring at each order, in logarithms."""
    orders = _ORDERS.astype(np.float64)
    if rate == 1:
        return (orders**2 - orders) / (2 * multiplier**2)
    moments = np.zeros(len(orders))
    for i, a in enumerate(orders):
        k = np.arange(a + 1)
        terms = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
        terms += (a - k) * math.log1p(-rate) + k * math.log(rate)
        moments[i] = logsumexp(terms + (k * k - k) / (2 * multiplier**2))
    moments[0] = 0.0
    return np.maximum(moments, 0.0)


def _sum_of_shares(deviation: float, shares: int) -> float:
    """tau of Kairouz, Liu and Steinke 2021: how far H shares are from one discrete Gaussian."""
    k = np.arange(1, shares)
    return float(10 * np.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)).sum())
