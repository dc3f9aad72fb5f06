"""What a run promises its records: a value from which every reported epsilon comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, Self, final

from securefl import config
from securefl.config import ConfigurationError
from securefl.privacy import accounting, clipping, integers

Unit = Literal["record", "person"]
"""What is added or removed: one record, or all rows of one person."""

_FINE_NOISE: Final = 1 << 22
"""Fine units in a deviation of local noise: what hardening costs is then nothing."""

RETRIED: Final = math.exp(-0.5)
"""beta of conditional rounding: at most how often an attempt fails. It costs no privacy."""


class Observer(Enum):
    """Whom a figure holds against."""

    OTHERS = "the server and the colluding sites"
    """They see every sum and know their own noise; with no collusion, one curious site."""
    PUBLIC = "whoever sees only the released models"
    """Nobody who took part speaks: every share of the noise is unknown to them."""


class _Promise:
    """What every plan says of its rounds, from what it says of one."""

    __slots__ = ()
    epsilon: float

    def cost(self, rounds: int, observer: Observer = Observer.OTHERS) -> accounting.Cost:
        """What `rounds` charged rounds cost at `delta`, and which accountant says so.

        With the statistics, where the plan has any, as often as they may ever be charged: whether a
        spare one was needed is the server's to choose, and must not move the figure.
        """
        raise NotImplementedError

    def spent(self, rounds: int, observer: Observer = Observer.OTHERS) -> float:
        """Epsilon at `delta` after `rounds` charged rounds, aborted ones included."""
        return self.cost(rounds, observer).epsilon

    def affords(self, rounds: int) -> bool:
        """Whether `rounds` charged rounds stay within the promised epsilon."""
        return self.spent(rounds) <= self.epsilon


class _Distributed(_Promise):
    """What the plans have in common whose noise only the sum has enough of."""

    __slots__ = ()
    delta: float
    clip: float
    units: int
    dimension: int
    counted: bool
    statistics: Statistics | None

    def event(
        self, observer: Observer
    ) -> accounting.PoissonDiscreteGaussianSum | accounting.DiscreteGaussianSum:
        """What one round costs against `observer`."""
        raise NotImplementedError

    @property
    def grid(self) -> float:
        """What one integer of the sum stands for, in the units of what is clipped."""
        return self.clip * (1 << integers.FINE_BITS) / self.units

    @property
    def count(self) -> int:
        """What a vector adds or takes where it tells if it was within the clip, in fine units."""
        return clipping.count(self.units) if self.counted else 0

    @property
    def coordinates(self) -> int:
        """Of the integer vector: `dimension`, and the count."""
        return self.dimension + self.counted

    @property
    def per_round(self) -> accounting.Repeated:
        """What one charged round costs against the server and the colluding sites."""
        return accounting.Repeated(self.event(Observer.OTHERS), 1)

    def cost(self, rounds: int, observer: Observer = Observer.OTHERS) -> accounting.Cost:
        """What `rounds` charged rounds cost at `delta`, and which accountant says so."""
        training = accounting.Repeated(self.event(observer), rounds)
        return accounting.cost([training, *_fitted(self.statistics)], self.delta)


@final
@dataclass(frozen=True, slots=True)
class Statistics:
    """What preprocessing is fitted from, before the first round: one noisy sum a stage.

    Every training record (or person) is in each of them. They are charged against `OTHERS`,
    whoever looks. times: how often each may be charged, spare ones included.
    """

    stages: tuple[accounting.PoissonDiscreteGaussianSum, ...]
    times: int = 1

    @classmethod
    def calibrate(
        cls,
        sums: Sequence[tuple[float, int]],
        shares: int,
        epsilon: float,
        delta: float,
        times: int = 1,
    ) -> Self:
        """The least noise at which all stages, as often as may be charged, cost `epsilon` at most.

        sums: the sensitivity and dimension of each; shares: of the noise, those that nobody else
        knows. Raises ConfigurationError where no noise that an integer holds reaches it.
        """

        def made(multiplier: float) -> Self:
            scale = multiplier / math.sqrt(shares)
            return cls(
                tuple(
                    accounting.PoissonDiscreteGaussianSum(
                        max(2.0, scale * sensitivity), shares, sensitivity, dimension, 1.0
                    )
                    for sensitivity, dimension in sums
                ),
                times,
            )

        try:
            return made(
                accounting.least(
                    lambda z: accounting.epsilon(made(z).cost, delta), epsilon, 0.05, 1.0
                )
            )
        except ValueError as error:
            raise ConfigurationError(
                f"statistics at epsilon {epsilon:.3g} would be noise alone ({error}): raise "
                "privacy.epsilon or preprocessing.share, or fit less"
            ) from None

    @property
    def cost(self) -> tuple[accounting.Repeated, ...]:
        """Every stage, as often as it may be charged."""
        return tuple(accounting.Repeated(event, self.times) for event in self.stages)


def _fitted(statistics: Statistics | None) -> tuple[accounting.Repeated, ...]:
    return statistics.cost if statistics is not None else ()


@final
@dataclass(frozen=True, slots=True)
class RecordLocal(_Promise):
    """DP-SGD at each site, on its own records, with its own noise (Abadi et al. 2016, algorithm 1).

    Every local step takes a secret Poisson sample at the public `rate`, clips each record's
    gradient to `clip` as integers (`integers.clipped_sum` with `units`), adds Gaussian noise of
    standard deviation noise_multiplier * clip to the sum (`integers.hardened`), and divides by the
    public `expected_batch`. dimension: of the dense model. counted: whether each vector tells in
    one more coordinate if it was within the clip (`clipping`); the noise is then noise_multiplier
    times the norm of both.

    Formal Guarantees: what a site sends in all the rounds it is charged for is
    (spent(rounds), delta)-differentially private under adding or removing one of its records (or
    people, where `unit` is "person" and all rows of one make one gradient), even
    if the aggregation is broken and every other site colludes. Nothing depends on the number of
    records. Norms are checked and noise is added in integers, so that nothing leaks through the
    low-order bits of floating-point numbers (Mironov 2012).
    """

    epsilon: float
    delta: float
    clip: float
    rate: float
    expected_batch: int
    noise_multiplier: float
    steps_per_round: int
    dimension: int
    unit: Unit = "record"
    counted: bool = False
    statistics: Statistics | None = None

    @classmethod
    def calibrate(
        cls,
        privacy: config.Privacy,
        rounds: int,
        steps_per_round: int,
        dimension: int,
        statistics: Statistics | None = None,
    ) -> Self:
        """The plan whose cost for `rounds` (and the spare ones) meets privacy.epsilon.

        Raises ConfigurationError, with what is reachable, when the noise in one coordinate would
        outweigh the clipped gradients of a whole expected batch pulling together.
        """
        steps = (rounds + privacy.spare_rounds) * steps_per_round
        beside = _fitted(statistics)
        _check_reachable(privacy, steps, privacy.delta, beside)
        counted = clipping.counted(privacy)
        distance = integers.hardening_distance(_FINE_NOISE / 2, dimension + counted)
        noise = accounting.noise_multiplier(
            privacy.epsilon, privacy.delta, privacy.rate, steps, distance, beside
        )
        return cls(
            privacy.epsilon,
            privacy.delta,
            privacy.clip,
            privacy.rate,
            privacy.expected_batch,
            noise,
            steps_per_round,
            dimension,
            privacy.unit,
            counted,
            statistics,
        )

    @property
    def units(self) -> int:
        """The clip in fine units: so many that the noise's deviation is about 2^22 of them."""
        return max(1, round(_FINE_NOISE / self.noise_multiplier))

    @property
    def count(self) -> int:
        """What a vector adds or takes where it tells if it was within the clip, in fine units."""
        return clipping.count(self.units) if self.counted else 0

    @property
    def deviation(self) -> float:
        """Of the noise, in fine units."""
        return self.noise_multiplier * _bound(self.units, self.count)

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets differ in."""
        return f"add or remove one {self.unit}"

    @property
    def per_round(self) -> accounting.Repeated:
        """What one charged round costs, against anyone but the site itself."""
        distance = integers.hardening_distance(self.deviation, self.dimension + self.counted)
        step = accounting.PoissonGaussian(self.noise_multiplier, self.rate, distance)
        return accounting.Repeated(step, self.steps_per_round)

    def cost(self, rounds: int, observer: Observer = Observer.OTHERS) -> accounting.Cost:
        """What `rounds` charged rounds cost at `delta`: against every observer the same."""
        del observer
        step, times = self.per_round.event, self.per_round.times
        training = accounting.Repeated(step, rounds * times)
        return accounting.cost([training, *_fitted(self.statistics)], self.delta)

    def share_error(self, sites: int) -> float:
        """The deviation of noise in a round's mean share of records within the clip."""
        told = 2 * self.count * self.expected_batch
        return self.deviation / told / math.sqrt(sites * self.steps_per_round)


@final
@dataclass(frozen=True, slots=True)
class Cohort:
    """n sites, m = minimum contributions to any sum, T = colluding sites that are tolerated."""

    sites: int
    minimum: int
    tolerated: int

    def __post_init__(self) -> None:
        if not 0 <= self.tolerated < self.minimum <= self.sites or self.shares(Observer.OTHERS) < 1:
            raise ConfigurationError(
                f"{self.sites} sites, a minimum of {self.minimum} and {self.tolerated} colluding: "
                f"use a minimum from {max(self.tolerated, 1) + 1} to the number of sites"
            )

    def shares(self, observer: Observer) -> int:
        """H: shares of noise in any sum that the observer does not know, at least."""
        if observer is Observer.PUBLIC:
            return self.minimum
        return self.minimum - max(self.tolerated, 1)


@final
@dataclass(frozen=True, slots=True)
class RecordDistributed(_Distributed):
    """One Poisson-sampled step a round, summed over all sites, with noise that only the sum has.

    Each round every site takes a secret Poisson sample of its records (unit "record") or people
    (unit "person": all rows of one person make one gradient) at the public `rate`, clips each
    gradient to L2 norm `clip` as integers (`integers.clipped_sum` with `units`), rounds their sum
    to the grid with its secret keystream (`integers.dithered`), adds N_Z(0, deviation^2) to every
    coordinate, and uploads it under secagg or masked-bfv. The sum is divided by the public
    `expected_batch`, which counts the records of all sites.

    units: the clip in fine units; 2^16 of them are a grid unit. deviation: of one site's share, in
    grid units. beta: how likely one rounding may exceed `sensitivity`. dimension: of the dense
    model: pruning only takes coordinates away. counted: whether each gradient tells in one more
    coordinate if it was within the clip (`clipping`), which `sensitivity` counts.

    Formal Guarantees: against an observer who sees every opened sum, or the released models, and
    knows all but `cohort.shares(observer)` shares of the noise in each of them, all the rounds that
    a site is charged for, aborted ones included, are (spent(rounds, observer), delta)-
    differentially private under adding or removing one of its records (or people). No sum is over
    fewer than `cohort.minimum` sites, which secagg and masked-bfv enforce at every honest site;
    shares beyond those, and a sum that wraps, only look at what is already private. Nothing depends
    on the number of records. Nothing is promised against whoever sees one site's vector unmasked.
    """

    epsilon: float
    delta: float
    clip: float
    rate: float
    expected_batch: int
    cohort: Cohort
    dimension: int
    units: int
    deviation: float
    beta: float
    unit: Unit = "record"
    counted: bool = False
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        _positive(epsilon=self.epsilon, clip=self.clip, units=self.units, beta=self.beta)
        _positive(expected_batch=self.expected_batch)
        for observer in Observer:  # the event checks what it holds
            self.event(observer)

    @classmethod
    def calibrate(
        cls,
        privacy: config.Privacy,
        rounds: int,
        cohort: Cohort,
        dimension: int,
        inflation: float = 0.02,
        statistics: Statistics | None = None,
    ) -> Self:
        """The plan whose cost for `rounds` (and the spare ones) meets privacy.epsilon.

        The grid is the coarsest on which rounding inflates the sensitivity by at most `inflation`,
        and on which the noise is wide enough for the continuous Gaussian's accountant.

        Raises ConfigurationError, with what is reachable, when the noise in one coordinate would
        outweigh the clipped gradients of a whole expected batch pulling together.
        """
        total = rounds + privacy.spare_rounds
        beside = _fitted(statistics)
        delta = 0.97 * privacy.delta
        _check_reachable(privacy, total, delta, beside)
        multiplier = accounting.noise_multiplier(
            privacy.epsilon, delta, privacy.rate, total, beside=beside
        )
        beta = privacy.delta / (100 * total)
        shares = cohort.shares(Observer.OTHERS)
        sum_deviation = _wide_enough(privacy.epsilon, privacy.delta, total * dimension)
        sum_deviation = max(sum_deviation, 2.1 * math.sqrt(shares))
        counted = clipping.counted(privacy)
        units = _units(_grid_clip(dimension + counted, beta, inflation, sum_deviation / multiplier))

        def plan(deviation: float) -> Self:
            return cls(
                privacy.epsilon,
                privacy.delta,
                privacy.clip,
                privacy.rate,
                privacy.expected_batch,
                cohort,
                dimension,
                units,
                deviation,
                beta,
                privacy.unit,
                counted,
                statistics,
            )

        about = max(2.0, multiplier * plan(2.0).sensitivity / math.sqrt(shares))
        deviation = accounting.least(
            lambda x: plan(x).spent(total), privacy.epsilon, max(2.0, 0.9 * about), 1.002 * about
        )
        return plan(deviation)

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets differ in."""
        return f"add or remove one {self.unit}"

    @property
    def sensitivity(self) -> float:
        """How far one record moves the integer sum, L2, in grid units; `slip` says how surely."""
        return _sensitivity(_bound(self.units, self.count), self.coordinates, self.beta)

    @property
    def slip(self) -> float:
        """The probability that one rounding exceeds `sensitivity`; 0 where it always holds."""
        always = _sensitivity(_bound(self.units, self.count), self.coordinates, 0.0)
        return self.beta if self.sensitivity < always else 0.0

    def event(self, observer: Observer) -> accounting.PoissonDiscreteGaussianSum:
        """What one round costs against `observer`."""
        return accounting.PoissonDiscreteGaussianSum(
            self.deviation,
            self.cohort.shares(observer),
            self.sensitivity,
            self.coordinates,
            self.rate,
            self.slip,
        )

    def field_bits(self, signal: float, overflow: float) -> int:
        """Signed bits of one coordinate of the sum, wrapping with probability at most `overflow`.

        Per coordinate and round. signal: how far the clipped gradients of all sites together may
        move one coordinate, in clips; the sampled records at most, in practice far fewer. The count
        moves its coordinate by one for every `clipping.COUNT` of them: four deviations of a Poisson
        batch are held.
        """
        if self.counted and signal > 0:
            batch = self.expected_batch + 4 * math.sqrt(self.expected_batch)
            signal = max(signal, batch / clipping.COUNT)
        return _field_bits(signal, overflow, self.units, self.deviation, self.cohort.sites)

    @property
    def signal_to_noise(self) -> float:
        """An expected batch of clipped gradients, all alike, over the norm of all sites' noise."""
        noise = self.grid * self.deviation * math.sqrt(self.cohort.sites * self.dimension)
        return self.expected_batch * self.clip / noise

    def share_error(self, sites: int) -> float:
        """The deviation of noise in a round's share of records within the clip."""
        noise = self.deviation * math.sqrt(sites) * (1 << integers.FINE_BITS)
        return noise / (2 * self.count * self.expected_batch)


@final
@dataclass(frozen=True, slots=True)
class SiteDistributed(_Distributed):
    """Each site's whole update is protected, with noise that only the sum has.

    A site trains as it likes, clips its update to L2 norm `clip` (`integers.clipped_sum` of one
    row), rounds it to the grid until its norm is at most `sensitivity`
    (`integers.conditionally_rounded`), adds N_Z(0, deviation^2) to every coordinate, and uploads it
    under secagg or masked-bfv (Kairouz, Liu and Steinke 2021, algorithm 1). Where that narrows the
    fields, the update is rotated before it is clipped (`rotation.Rotation`), and the mean rotated
    back.

    units, deviation, dimension, counted: as in `RecordDistributed`. Where an update tells if it was
    within the clip, it is clipped together with that coordinate, to `bound` fine units.

    Formal Guarantees: against an observer as in `RecordDistributed`, all the rounds that a site is
    charged for are (spent(rounds, observer), delta)-differentially private under replacing its
    updates by zero: that a site takes part is no secret. This covers every record of the site. A
    public rotation is a map of a site's own update before its norm is bounded: nothing here rests
    on it.
    """

    epsilon: float
    delta: float
    clip: float
    cohort: Cohort
    dimension: int
    units: int
    deviation: float
    counted: bool = False
    statistics: None = None

    def __post_init__(self) -> None:
        _positive(epsilon=self.epsilon, clip=self.clip, units=self.units)
        for observer in Observer:
            self.event(observer)

    @classmethod
    def calibrate(
        cls,
        epsilon: float,
        delta: float,
        clip: float,
        rounds: int,
        cohort: Cohort,
        dimension: int,
        inflation: float = 0.02,
        counted: bool = False,
    ) -> Self:
        """The plan whose cost for `rounds` rounds, spare ones included, is epsilon at delta."""
        multiplier = accounting.noise_multiplier(epsilon, 0.99 * delta, 1.0, rounds)
        shares = cohort.shares(Observer.OTHERS)
        sum_deviation = _wide_enough(epsilon, delta, rounds * dimension)
        sum_deviation = max(sum_deviation, 2.1 * math.sqrt(shares))
        least = sum_deviation / multiplier
        units = _units(_grid_clip(dimension + counted, RETRIED, inflation, least))

        def plan(deviation: float) -> Self:
            return cls(epsilon, delta, clip, cohort, dimension, units, deviation, counted)

        about = max(2.0, multiplier * plan(2.0).sensitivity / math.sqrt(shares))
        deviation = accounting.least(
            lambda x: plan(x).spent(rounds), epsilon, max(2.0, 0.9 * about), 1.002 * about
        )
        return plan(deviation)

    @property
    def unit(self) -> Literal["site"]:
        """Whose contribution is protected."""
        return "site"

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets differ in."""
        return "replace one site's updates by zero"

    @property
    def bound(self) -> int:
        """What an update is clipped to together with the count, in fine units."""
        return _bound(self.units, self.count)

    @property
    def sensitivity(self) -> float:
        """The L2 norm that no rounded update exceeds, in grid units."""
        return _sensitivity(self.bound, self.coordinates, RETRIED)

    def event(self, observer: Observer) -> accounting.DiscreteGaussianSum:
        """What one round costs against `observer`."""
        shares = self.cohort.shares(observer)
        return accounting.DiscreteGaussianSum(
            self.deviation, shares, self.sensitivity, self.coordinates
        )

    def field_bits(self, overflow: float, spread: int | None = None) -> int:
        """Signed bits of one coordinate of the sum, wrapping with probability at most `overflow`.

        Per coordinate and round, even if every site puts its whole clip into one coordinate of its
        update. spread: over how many coordinates at least a public random rotation spreads each of
        them (`rotation.block`); None without one.
        """
        sites = self.cohort.sites
        if spread is None:
            return _field_bits(sites, overflow, self.bound, self.deviation, sites)
        return _rotated_field_bits(spread, overflow, self.bound, self.deviation, sites)

    @property
    def signal_to_noise(self) -> float:
        """All sites' clipped updates, all alike, over the norm of all sites' noise."""
        noise = self.grid * self.deviation * math.sqrt(self.cohort.sites * self.dimension)
        return self.cohort.sites * self.clip / noise

    def share_error(self, sites: int) -> float:
        """The deviation of noise in a round's share of updates within the clip."""
        noise = self.deviation * (1 << integers.FINE_BITS)
        return noise / (2 * self.count * math.sqrt(sites))


Plan = RecordLocal | RecordDistributed | SiteDistributed


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value}: use a number above 0")


def _check_reachable(
    privacy: config.Privacy, steps: int, delta: float, beside: tuple[accounting.Repeated, ...]
) -> None:
    least = accounting.PoissonGaussian(float(privacy.expected_batch), privacy.rate)
    reachable = accounting.epsilon([accounting.Repeated(least, steps), *beside], delta)
    if reachable > privacy.epsilon and beside:
        raise ConfigurationError(
            f"privacy.epsilon = {privacy.epsilon:g} leaves too little to train: beside statistics, "
            f"{steps} steps at rate {privacy.rate:g} would need noise above the whole batch of "
            f"{privacy.expected_batch}: lower preprocessing.share, raise epsilon, or use fewer "
            "rounds, a lower rate or a larger expected_batch"
        )
    if reachable > privacy.epsilon:
        raise ConfigurationError(
            f"privacy.epsilon = {privacy.epsilon:g} is too small to train at all: "
            f"{steps} steps at rate {privacy.rate:g} would need noise above the whole batch of "
            f"{privacy.expected_batch}; epsilon >= {reachable:.3g} is reachable, or use fewer "
            "rounds, a lower rate or a larger expected_batch"
        )


def _units(grid_clip: float) -> int:
    """At least `grid_clip` in fine units, so many that the count is a whole part of them."""
    return clipping.COUNT * math.ceil(grid_clip * (1 << integers.FINE_BITS) / clipping.COUNT)


def _bound(units: int, count: int) -> int:
    """The least integer that the norm of a vector of norm `units`, and the count, stays within."""
    return math.isqrt(units**2 + count**2 - 1) + 1


def _sensitivity(units: int, dimension: int, beta: float) -> float:
    return integers.sensitivity(units / (1 << integers.FINE_BITS), dimension, beta)


def _wide_enough(epsilon: float, delta: float, coordinates: int) -> float:
    """The deviation of a sum from which its distance from a rounded Gaussian costs delta / 100.

    Solves (1 + e^epsilon) sqrt(D) / (30 v^2) = delta / 100 for sqrt(v); at most 4096, for wider
    fields cost more than the tighter accountant gives.
    """
    factor = 1 + math.exp(min(epsilon, 100.0))
    return min(4096.0, math.sqrt(math.sqrt(factor * math.sqrt(coordinates) / (0.3 * delta))))


def _grid_clip(dimension: int, beta: float, inflation: float, least: float) -> float:
    """The clip in grid units: at least `least`, and rounding costs at most `inflation`."""

    def inflated(clip: float) -> float:
        return integers.sensitivity(clip, dimension, beta) / clip - 1

    _positive(inflation=inflation)
    return accounting.least(inflated, inflation, min(least, 1.0) / 2, max(least, 1.0))


def _field_bits(signal: float, overflow: float, units: int, deviation: float, sites: int) -> int:
    """Rounding adds at most one a site; n shares are sub-Gaussian with variance n deviation^2.

    (Canonne, Kamath and Steinke 2020, section 2: so is one, and sub-Gaussians add up.)
    """
    if not (signal > 0 and 0 < overflow < 1):
        raise ValueError(
            f"signal = {signal}, overflow = {overflow}: use signal > 0 and 0 < overflow < 1"
        )
    noise = deviation * math.sqrt(2 * sites * math.log(2 / overflow))
    reach = signal * units / (1 << integers.FINE_BITS) + sites + noise
    return math.ceil(reach).bit_length() + 1


def _rotated_field_bits(
    spread: int, overflow: float, units: int, deviation: float, sites: int
) -> int:
    """As `_field_bits`, where a rotation spreads n updates of norm `units` over `spread`.

    Rotations are linear: a coordinate of the rotated sum, whose norm is n clips at most, is
    sub-Gaussian with variance (n clip)^2 / spread (`rotation.Rotation`), and independent of the
    noise, so that variances add up. A site's rounding adds less than 1, the fine grid 2^-16, and
    float64 far less.
    """
    if not (spread >= 1 and 0 < overflow < 1):
        raise ValueError(
            f"spread = {spread}, overflow = {overflow}: use spread >= 1 and 0 < overflow < 1"
        )
    clips = sites * units / (1 << integers.FINE_BITS)
    variance = clips**2 / spread + sites * deviation**2
    reach = math.sqrt(2 * variance * math.log(2 / overflow)) + sites * (1 + 2.0**-15)
    return math.ceil(reach).bit_length() + 1
