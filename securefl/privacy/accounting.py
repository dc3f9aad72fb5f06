"""What noisy steps cost: events as values, and the epsilon of their composition.

Two accountants answer, and the smaller figure holds, for both are upper bounds; what neither
answers raises (docs/adr/0008-two-accountants.md):

- Renyi differential privacy (RDP) from integer orders, for discrete Gaussians: `_by_renyi`;
- privacy loss distributions (dp-accounting), for continuous Gaussians, and for discrete ones so
  wide that they are rounded continuous ones but for a statistical distance:
  `_distance_from_rounded`.

**What is not exact is charged to delta.** Draws at statistical distance chi from the stated law,
all steps together, cost (1 + e^epsilon) chi: P'(A) <= P(A) + chi <= e^epsilon Q(A) + delta + chi
<= e^epsilon Q'(A) + delta + (1 + e^epsilon) chi. Where a sensitivity holds but for an event of
probability beta that neighbours share (the same rounding randomness), P(A) <= P(A, good) + beta.

**Adjacency**: add or remove one record (or person) for sampled events; replace one site's update
by zero for `DiscreteGaussianSum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from protocols.noise import CUT, LEAST_ROUNDED_VARIANCE, DiscreteGaussian, divergence_from_rounded

ACCOUNTANT: Final = "privacy loss distributions (dp-accounting)"
RENYI: Final = "Renyi differential privacy at integer orders"
ADJACENCY: Final = "add or remove one record"

_ORDERS: Final = np.unique(np.concatenate([np.arange(1, 129), 1.06 ** np.arange(83, 167)])).astype(
    np.int64
)
"""Integers from 1 to 128, then ever sparser up to 2^14."""

ORDERS: Final[tuple[float, ...]] = (
    *np.arange(1.125, 16, 0.125).tolist(),
    *map(float, _ORDERS[15:]),
)
"""Those at which costs are given: chords between integers, eight to a gap up to 16, without 1."""


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
    lets no site's update exceed (Kairouz, Liu and Steinke 2021, algorithm 1).
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


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """An upper bound on epsilon, and the accountant that gave it."""

    epsilon: float
    accountant: str


def epsilon(spent: Iterable[Repeated], delta: float) -> float:
    """Epsilon at `delta` of everything in `spent`, as `cost`.

    >>> epsilon([Repeated(PoissonGaussian(1.0, 0.2), 0)], 1e-3)
    0.0
    """
    return cost(spent, delta).epsilon


def cost(spent: Iterable[Repeated], delta: float) -> Cost:
    """What everything in `spent` costs at `delta` (0 < delta < 1), in any order.

    Epsilon is inf where none holds at this delta. Raises UnprovenError for a composition whose
    cost is not proven here: a site's update and records are different units.
    """
    _check(0 < delta < 1, "delta", delta, "above 0 and below 1")
    return _cost(tuple(r for r in spent if r.times), delta)


def least(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least x from `low` (to 0.1 %) with cost(x) <= `target`, where cost falls as x grows.

    Doubles `high` until it is enough; raises ValueError when even 2^20 * high is not.
    Preconditions: 0 < low < high, target > 0.
    """
    ceiling = high * (1 << 20)
    while (found := cost(high)) > target:
        low, high = high, high * 2
        if high > ceiling:
            raise ValueError(f"no noise reaches epsilon {target:g}")
    # The secant in logarithms from the last two costs, a little to the side that is still far off;
    # from the first one alone, as if the cost fell with the square. Where a cost has no logarithm,
    # and every fourth time, it is halving, whatever the curve.
    last, dear, slope, nudge, steps = high, found, -2.0, 1.0, 0
    while high > low * 1.001:
        steps += 1
        if steps % 4 and 0 < found < math.inf:
            middle = last * (target / dear) ** (1 / slope) * nudge
            middle = min(max(middle, low * 1.0004), high / 1.0004)
        else:
            middle = math.sqrt(low * high)
        found = cost(middle)
        if found <= target:
            high, nudge = middle, 0.9996
        else:
            low, nudge = middle, 1.0004
        if 0 < found < math.inf:
            if 0 < dear < math.inf and found != dear:
                slope = min(math.log(found / dear) / math.log(middle / last), -0.1)
            last, dear = middle, found
    return high


@lru_cache(maxsize=256)
def noise_multiplier(
    target: float,
    delta: float,
    rate: float,
    steps: int,
    distance: float = 0.0,
    beside: tuple[Repeated, ...] = (),
) -> float:
    """The least noise multiplier (to 0.1 %) at which `steps` Poisson steps cost at most `target`.

    beside: what else the same records are in, which counts against `target` too. Raises ValueError
    when no multiplier up to 2^20 does.
    """

    def events(noise: float) -> tuple[Repeated, ...]:
        return (Repeated(PoissonGaussian(noise, rate, distance), steps), *beside)

    # Renyi's bound is the cheaper one to evaluate, and never far above; but what is beside may take
    # all of the target by it alone.
    start = 1.0
    if not beside or _by_renyi(events(float(1 << 20)))(delta) <= target:
        start = least(lambda noise: _by_renyi(events(noise))(delta), target, 0.05, 1.0)
    return least(lambda noise: epsilon(events(noise), delta), target, 0.05, start)


def _check(holds: bool, name: str, value: float, use: str) -> None:
    if not holds:  # also for nan, of which nothing holds
        raise ValueError(f"{name} = {value}: use a number {use}")


def _check_shares(deviation: float, shares: int, sensitivity: float, dimension: int) -> None:
    _check(2 <= deviation <= 1 << 24, "deviation", deviation, "from 2 to 2^24: change the grid")
    _check(shares >= 1, "shares", shares, "at least 1")
    _check(0 < sensitivity < math.inf, "sensitivity", sensitivity, "above 0")
    _check(dimension >= 1, "dimension", dimension, "at least 1")


@lru_cache(maxsize=4096)
def _cost(spent: tuple[Repeated, ...], delta: float) -> Cost:
    if len({isinstance(r.event, DiscreteGaussianSum) for r in spent}) > 1:
        raise UnprovenError(
            "a site's update and a record are different units: account for them separately"
        )
    if not spent:
        return Cost(0.0, ACCOUNTANT)
    discrete = any(not isinstance(r.event, PoissonGaussian) for r in spent)
    delta -= sum(r.times * _slip(r.event) for r in spent)
    costs = [Cost(_solve(_by_renyi(spent), delta, _distance(spent)), RENYI)] if discrete else []
    if all(isinstance(r.event, PoissonGaussian) or _wide(r.event) for r in spent):
        distance = _distance(spent) + _distance_from_rounded(spent)
        costs.append(Cost(_solve(_by_loss_distributions(spent), delta, distance), ACCOUNTANT))
    return min(costs, key=lambda cost: cost.epsilon)


def _solve(curve: Callable[[float], float], delta: float, distance: float) -> float:
    """The least epsilon >= curve(delta - (1 + e^epsilon) distance), found from below; else inf."""
    found = before = 0.0
    for _ in range(100):
        left = delta - (1 + math.exp(min(found, 700.0))) * distance
        if left <= 0:
            return math.inf
        if left == before:
            return found
        needed, before = curve(left), left
        if needed <= found:
            return found
        found = needed * (1 + 1e-9)
    return math.inf


def _slip(event: Event) -> float:
    return event.slip if isinstance(event, PoissonDiscreteGaussianSum) else 0.0


def _distance(spent: Iterable[Repeated]) -> float:
    """The statistical distance of all draws from the laws that the events state."""
    total = 0.0
    for r in spent:
        if isinstance(r.event, PoissonGaussian):
            total += r.times * r.event.distance
        else:
            draws = r.times * r.event.dimension * r.event.shares
            total += draws * DiscreteGaussian(r.event.deviation).tau
    return total


def _variance(event: PoissonDiscreteGaussianSum | DiscreteGaussianSum) -> float:
    """v: that of the continuous Gaussian which, rounded, is nearly the sum of the shares."""
    return event.shares * event.deviation**2 - 1 / 12


def _wide(event: PoissonDiscreteGaussianSum | DiscreteGaussianSum) -> bool:
    return _variance(event) >= LEAST_ROUNDED_VARIANCE


def _distance_from_rounded(spent: Iterable[Repeated]) -> float:
    """The statistical distance of all sums of shares from rounded continuous Gaussians.

    For an integer S, S + round(Y) = round(S + Y): rounded Gaussian noise only looks at what the
    continuous mechanism gives, and so does whatever adds further shares.

    Divergences (`protocols.noise.divergence_from_rounded`) add up over coordinates and adaptive
    steps, and Pinsker's inequality makes a distance of the total.
    """
    divergence = distance = 0.0
    for r in spent:
        if not isinstance(r.event, PoissonGaussian):
            coordinates = r.times * r.event.dimension
            divergence += coordinates * divergence_from_rounded(_variance(r.event))
            apart = _sum_of_shares(r.event.deviation, r.event.shares)
            distance += coordinates * (math.expm1(apart) + CUT)
    return distance + math.sqrt(divergence / 2)


def _by_loss_distributions(spent: tuple[Repeated, ...]) -> Callable[[float], float]:
    """Epsilon as a function of delta, with a continuous Gaussian in each event's place."""
    gaussians = sorted((*_gaussian(r.event), r.times) for r in spent)
    # Without sampling, many Gaussians are one.
    gaussians = [(m / math.sqrt(n), q, 1) if q == 1 else (m, q, n) for m, q, n in gaussians]
    interval = min(_interval(multiplier, rate) for multiplier, rate, _ in gaussians)
    losses = reduce(
        lambda ours, theirs: ours.compose(theirs),
        (_loss(m, q, interval).self_compose(n) for m, q, n in gaussians),
    )
    return lambda delta: float(losses.get_epsilon_for_delta(delta))


def _interval(multiplier: float, rate: float) -> float:
    """The grid on which one step's loss is rounded: any gives an upper bound.

    A thirtieth of the loss's deviation, about rate * sqrt(e^(1 / multiplier^2) - 1), costs 1e-4 of
    epsilon; where losses are large, so does a coarser grid.
    """
    deviation = rate * math.sqrt(math.expm1(min(multiplier**-2, 100.0)))
    return min(max(deviation / 30, 2e-5), max(5e-3, 2.5e-4 / multiplier**2))


@lru_cache(maxsize=16)
def _loss(multiplier: float, rate: float, interval: float) -> Any:
    """The loss distribution of one step (Doroshenko et al. 2022: never below the true curve)."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        multiplier, value_discretization_interval=interval, sampling_prob=rate
    )


def _gaussian(event: Event) -> tuple[float, float]:
    """The noise multiplier and rate of the continuous Gaussian in the event's place."""
    if isinstance(event, PoissonGaussian):
        return event.noise_multiplier, event.rate
    rate = event.rate if isinstance(event, PoissonDiscreteGaussianSum) else 1.0
    return math.sqrt(_variance(event)) / event.sensitivity, rate


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """What something costs at every order: numbers that simply add up, as a ledger stores them.

    moments: log E_Q[(P / Q)^a] at each of ORDERS, upper bounds. slip: what is charged to delta.
    distance: the statistical distance of its draws from their law. All zero: it costs nothing.
    """

    moments: tuple[float, ...]
    slip: float
    distance: float

    def __post_init__(self) -> None:
        _check(len(self.moments) == len(ORDERS), "moments", len(self.moments), "for each order")
        least = min(*self.moments, self.slip, self.distance)
        _check(least >= 0, "a cost", least, "at least 0")

    @classmethod
    def of(cls, spent: Iterable[Repeated]) -> Curve:
        """The curve of everything in `spent`; by RDP alone (`_by_renyi`)."""
        spent = tuple(r for r in spent if r.times)
        slip = sum(r.times * _slip(r.event) for r in spent)
        return cls(tuple(_moments(spent).tolist()), slip, _distance(spent))

    @classmethod
    def total(cls, curves: Iterable[tuple[Curve, float]]) -> Curve:
        """The sum of curves, each so many times."""
        moments, slip, distance = np.zeros(len(ORDERS)), 0.0, 0.0
        for curve, times in curves:
            moments += times * np.array(curve.moments)
            slip += times * curve.slip
            distance += times * curve.distance
        return cls(tuple(moments.tolist()), slip, distance)

    @classmethod
    def either(cls, one: Curve, other: Curve) -> Curve:
        """What costs as `one` or as `other`, nobody knows which: the larger at every order."""
        moments = np.maximum(one.moments, other.moments).tolist()
        return cls(tuple(moments), max(one.slip, other.slip), max(one.distance, other.distance))

    def epsilon(self, delta: float, order: float) -> float:
        """Epsilon at `delta` by the one `order` (of ORDERS); inf where none holds."""
        at = ORDERS.index(order)

        def least(left: float) -> float:
            return max(0.0, float(_converted(np.array(self.moments), left)[at]))

        if not any(self.moments):
            return 0.0
        return _solve(least, delta - self.slip, self.distance)

    def best_order(self, delta: float) -> float:
        """The order whose `epsilon` is least."""
        found = _converted(np.array(self.moments), max(delta - self.slip, delta / 2))
        return ORDERS[int(found.argmin())]


def _by_renyi(spent: tuple[Repeated, ...]) -> Callable[[float], float]:
    """Epsilon as a function of delta, by RDP: the best order.

    Let P be N_Z(0, sigma^2 I) on Z^d and P_v its shift by an integer vector v. For an integer k,
    E_P[(P_v / P)^k] = exp((k^2 - k) |v|^2 / (2 sigma^2)) * sum_x P(x - kv), and that sum is 1
    because kv is an integer vector. So with L = P_v / P and a sampling rate q

        E_P[((1 - q) + qL)^a] = sum_k C(a, k) (1-q)^(a-k) q^k exp((k^2 - k) |v|^2 / (2 sigma^2))

    at every integer a >= 2, exactly as for the continuous Gaussian (Mironov, Talwar and Zhang
    2019, section 3.3); it grows with |v|. Removing a record costs no more than adding one by their
    theorem 5, whose premise is an involution that swaps P and P_v: here x -> v - x. At other orders
    the equality fails, but a -> log E_P[L^a] is convex and 0 at a = 1 (Wang, Balle and
    Kasiviswanathan 2019, corollary 10), so a chord between integers bounds it.

    From RDP to (epsilon, delta) by Canonne, Kamath and Steinke 2020, proposition 12.
    """
    moments = _moments(spent)

    def least_epsilon(delta: float) -> float:
        return max(0.0, float(_converted(moments, delta).min()))

    return least_epsilon


def _moments(spent: Iterable[Repeated]) -> NDArray[np.float64]:
    """log E_Q[(P / Q)^a] of everything in `spent` at each of ORDERS, upper bounds."""
    moments = np.zeros(len(_ORDERS))
    for r in spent:
        moments += r.times * _log_moments(r.event)
    return np.asarray(np.interp(ORDERS, _ORDERS, moments), np.float64)


def _converted(moments: NDArray[np.float64], delta: float) -> NDArray[np.float64]:
    """Epsilon at `delta` by each of ORDERS."""
    orders = np.array(ORDERS)
    logs = math.log(delta) + np.log(orders)
    return np.asarray((moments - logs) / (orders - 1) + np.log1p(-1 / orders), np.float64)


@lru_cache(maxsize=1024)
def _log_moments(event: Event) -> NDArray[np.float64]:
    """log E_Q[(P / Q)^a] at each of the integer `_ORDERS`, an upper bound; 0 at order 1.

    Where all masses are known up to a factor exp(+-t), t = tau d for a sum of shares, those of
    both mixtures are, and log sum P^a Q^(1-a) moves by at most (2a - 1) t.
    """
    if isinstance(event, PoissonGaussian):
        return _sampled(event.noise_multiplier, event.rate)
    multiplier = math.sqrt(event.shares) * event.deviation / event.sensitivity
    rate = event.rate if isinstance(event, PoissonDiscreteGaussianSum) else 1.0
    apart = _sum_of_shares(event.deviation, event.shares) * event.dimension
    return np.where(_ORDERS > 1, _sampled(multiplier, rate) + (2 * _ORDERS - 1) * apart, 0.0)


def _sampled(multiplier: float, rate: float) -> NDArray[np.float64]:
    """The logarithm of the sum in `_by_renyi`'s docstring at each order, |v| / sigma inverted."""
    orders = _ORDERS.astype(np.float64)
    if rate == 1:
        return (orders**2 - orders) / (2 * multiplier**2)
    rest, k, starts, binomials = _terms()
    terms = binomials + rest * math.log1p(-rate) + k * math.log(rate)
    terms += (k * k - k) / (2 * multiplier**2)
    largest = np.maximum.reduceat(terms, starts)
    terms -= np.repeat(largest, _ORDERS + 1)
    moments = largest + np.log(np.add.reduceat(np.exp(terms, out=terms), starts))
    moments[0] = 0.0
    return np.asarray(np.maximum(moments, 0.0), dtype=np.float64)


@lru_cache(maxsize=1)
def _terms() -> tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]
]:
    """The terms k = 0..a of all orders a in one row: a - k, k, each order's first, log C(a, k)."""
    starts = (np.cumsum(_ORDERS + 1) - (_ORDERS + 1)).astype(np.intp)
    a = np.repeat(_ORDERS, _ORDERS + 1)
    k = np.arange(len(a)) - np.repeat(starts, _ORDERS + 1)
    binomials: NDArray[np.float64] = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
    return (a - k).astype(np.float64), k.astype(np.float64), starts, binomials


def _sum_of_shares(deviation: float, shares: int) -> float:
    """tau: every mass of the sum of H shares is within exp(+-tau) of one discrete Gaussian's.

    Share by share: N_Z(0, k sigma^2) + N_Z(0, sigma^2) has the masses of N_Z(0, (k+1) sigma^2)
    times sum_j exp(-(j - c)^2 / (2 s^2)), s^2 = sigma^2 k / (k+1), which varies with c by less than
    a factor exp(10 exp(-2 pi^2 s^2)) for sigma >= 1/2 (Kairouz, Liu and Steinke 2021, section 3;
    the Poisson summation in `protocols.noise`).
    """
    k = np.arange(1, shares)
    return float(10 * np.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)).sum())
