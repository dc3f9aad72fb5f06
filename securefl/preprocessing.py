"""Federated preprocessing: columns become features, fitted on all sites' rows, none of which moves.

What has to be fitted comes from sums: a site turns its own rows into one vector of integers
(`Preprocessor.encode`), the consortium's sum is opened, and everybody decodes the same `Fitted`
from it (`Preprocessor.fit`). `apply` then makes a site's own table of features. Nothing here knows
a socket, a file or torch.

A number's value v in its range [low, high] is summed as y = 2 (v - low) / (high - low) - 1 and as
y^2 - 1/2; together these have norm at most sqrt(5/4), where y and y^2 would have sqrt(2). Then

    mean = S_1 / known,    variance = S_2 / known + 1/2 - mean^2    (population variance)

over the rows in which the value is known: what scikit-learn's StandardScaler, and SimpleImputer
after it, make of all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final, Self, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocols.messages import Message
from securefl.config import Data, Preprocessing
from securefl.data.frames import MISSING, Frame
from securefl.data.tables import Table
from securefl.schema import CategoryColumn, ImageColumn, NumberColumn, Schema
from securefl.sections import ConfigurationError

FRACTION: Final = 50
"""Bits behind the point in a site's own sums: close to all that a float64 in [-1, 1] has."""

ROWS_BITS: Final = 31
"""Sums are laid out for up to 2^31 rows, and for up to 2^SITES_BITS sites."""

SITES_BITS: Final = 16

ENCODED_ROWS: Final = 1 << 12
"""Rows summed at a time: 2^12 values below 2^FRACTION fit an int64."""

APPLIED_ROWS: Final = 1 << 13

LOW_BITS: Final = 31
"""A running sum is kept as high * 2^31 + low, two int64."""

LEAST_DEVIATION: Final = 1e-6
"""Of y. Below it a column counts as constant where sums are exact: it is centred, not stretched."""

LEAST_NOISY_DEVIATION: Final = 2e-3
"""Of y, which spans 2: with noise a spread is at least a thousandth of the range."""

MOST_NOISY_WEIGHT: Final = 100.0
"""Of a class, where its count has noise."""


@final
@dataclass(frozen=True, slots=True)
class Precision:
    """How a site's sum becomes integers.

    With one digit it is that sum in units of 2^-bits, rounded down: for sums with noise. With more,
    the site's sum in units of 2^-FRACTION is split into `digits` balanced digits of `bits` bits
    each, most significant first. Digits add up over sites, so every sum is exact, and so small that
    none leaves the integers of a protocol. Whoever opens the digits' sums learns a little more than
    the sum: what the sites carried between digits. Counts are one integer each.
    """

    bits: int
    digits: int

    def __post_init__(self) -> None:
        least = FRACTION + ROWS_BITS + 2
        if self.digits == 1 and not 1 <= self.bits <= FRACTION - LOW_BITS:
            raise ValueError(f"bits = {self.bits}: one digit has 1 to {FRACTION - LOW_BITS}")
        if self.digits < 1 or (self.digits > 1 and self.digits * self.bits < least):
            raise ValueError(f"{self.digits} digits of {self.bits} bits: exact sums take {least}")
        if not 1 <= self.bits <= 62 - SITES_BITS:
            raise ValueError(f"bits = {self.bits}: use at most {62 - SITES_BITS}")

    @classmethod
    def exact(cls, slot_bits: int) -> Self:
        """For protocols whose sums are signed integers of `slot_bits` bits (24 or more).

        No sum of digits of up to 2^16 sites and 2^31 rows leaves them; a count does not as long as
        there are fewer than 2^(slot_bits - 1) rows.
        """
        if slot_bits < 24:
            raise ValueError(f"slot_bits = {slot_bits}: exact sums take 24 or more")
        bits = min(slot_bits, 63) - 1 - SITES_BITS
        return cls(bits, -(-(FRACTION + ROWS_BITS + 2) // bits))

    @property
    def is_exact(self) -> bool:
        """Whether sums lose nothing."""
        return self.digits > 1

    def split(self, totals: NDArray[np.object_]) -> NDArray[np.int64]:
        """The digits of exact integers |t| < 2^(bits digits - 1): int64[len(totals) * digits].

        Each is in [-2^(bits-1), 2^(bits-1)); the first of an integer's holds what is left over.

        >>> Precision(30, 3).split(np.array([-1, 2**60 + 5], object)).tolist()
        [0, 0, -1, 1, 0, 5]
        """
        base, half = 1 << self.bits, 1 << (self.bits - 1)
        digits = np.empty((len(totals), self.digits), np.int64)
        for place in range(self.digits - 1, 0, -1):
            digit = (totals + half) % base - half
            totals = (totals - digit) // base
            digits[:, place] = digit
        digits[:, 0] = totals
        return digits.reshape(-1)

    def join(self, digits: NDArray[np.int64]) -> list[int]:
        """The integers whose digits, or sums of digits, these are: the inverse of `split`."""
        joined = np.zeros(len(digits) // self.digits, object)
        for column in digits.reshape(-1, self.digits).T:
            joined = joined * (1 << self.bits) + column.astype(object)
        return [int(value) for value in joined]


NOISY: Final = Precision(12, 1)
"""For sums with noise: one record's rounding is far below any noise that protects it."""


class FittedNumber(Message, frozen=True):
    """What becomes of one number v: (clip(v, low, high) - centre) / spread; `fill` if missing.

    All but `known` in the column's own unit. known: in how many rows (or people) it has a value,
    as far as it was counted.
    """

    name: str
    known: float
    low: float
    high: float
    fill: float
    centre: float
    spread: float

    def __post_init__(self) -> None:
        figures = (self.known, self.low, self.high, self.fill, self.centre, self.spread)
        if not all(map(math.isfinite, figures)):
            raise ValueError(f"number {self.name!r}: a figure is not finite")
        if not (self.known >= 0 and self.spread > 0):
            raise ValueError(f"number {self.name!r}: a negative count, or a spread of 0")
        if not (self.low < self.high and self.low <= self.fill <= self.high):
            raise ValueError(f"number {self.name!r}: fill is not between low and high")


class FittedCategory(Message, frozen=True):
    """Which categories of one column are too rare to stand alone, in the schema's order."""

    name: str
    merged: tuple[bool, ...]


class Fitted(Message, frozen=True):
    """Everything that preprocessing took from the records: part of the model, and public with it.

    sums: from how many of the consortium's sums; exact: whether all of them were.
    rows: usable training rows (or people) of all sites; 0 where nothing was counted.
    weights: of each class's loss; empty where all weigh 1.
    """

    sums: int
    exact: bool
    rows: float
    numbers: tuple[FittedNumber, ...]
    categories: tuple[FittedCategory, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.sums <= 2:
            raise ValueError(f"sums = {self.sums}: there are 0 to 2")
        if not (math.isfinite(self.rows) and self.rows >= 0):
            raise ValueError(f"rows = {self.rows}: a count is 0 or more")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError("a class weight is not above 0")


@final
@dataclass(frozen=True, eq=False)
class _Sum:
    """What one sum holds, in this order. Numbers are named by their place among the numbers.

    rows: 1 where rows are counted; missing: numbers whose missing values are; histograms: numbers
    whose values are, in `bins` each; categories, classes: how many of each are. `moments`: numbers
    whose y is summed, and y^2 - 1/2 if `squares`.
    """

    numbers: int
    bins: int
    rows: int = 0
    missing: tuple[int, ...] = ()
    histograms: tuple[int, ...] = ()
    categories: tuple[int, ...] = ()
    classes: int = 0
    moments: tuple[int, ...] = ()
    squares: bool = False

    @property
    def whole(self) -> int:
        """Counts in which a record is 1."""
        return self.rows + len(self.missing) + len(self.histograms) * self.bins

    @property
    def halved(self) -> int:
        """Counts in which a record is 1/2 under noise: they tell rare from common, no more."""
        return sum(self.categories) + self.classes

    @property
    def values(self) -> int:
        """Sums of values in [-1, 1]."""
        return len(self.moments) * (1 + self.squares)

    @property
    def norm(self) -> float:
        """The most that one record adds, L2, before rounding."""
        known, absent = np.zeros((2, self.numbers))
        known[list(self.histograms)] += 1
        known[list(self.moments)] += 1.25 if self.squares else 1
        absent[list(self.missing)] = 1
        halves = (len(self.categories) + (self.classes > 0)) / 4
        return math.sqrt(self.rows + float(np.maximum(known, absent).sum()) + halves)


@final
class Preprocessor:
    """From a site's frame to features and back to nobody: fixed by public values alone.

    data: with a schema; `precision`: `Precision.exact(...)`, or NOISY under a privacy plan.

    inputs: the model's inputs by name. A number is one, after it `NAME (missing)` with
    `indicators` unless it is required. A category is one for every declared NAME=CATEGORY, 1 or 0,
    and `NAME=(other)` where rare categories are merged or `outside = "other"`; a missing one lights
    none. An image's pixels are mapped from 0..255 onto [-1, 1].
    stages: how many sums are to be opened before `apply`: counts, histograms and, unless numbers
    are clipped at quantiles, moments first; the moments of the clipped values second.

    Raises ConfigurationError when two inputs would bear one name.
    """

    def __init__(self, data: Data, preprocessing: Preprocessing, precision: Precision) -> None:
        if data.agreed is None:
            raise ValueError("preprocessing needs data.schema")
        self.schema: Schema = data.agreed
        self._settings = preprocessing
        self._precision = precision
        columns = {name: self.schema.columns[name] for name in data.features}
        self._numbers = {n: c for n, c in columns.items() if isinstance(c, NumberColumn)}
        self._categories = {n: c for n, c in columns.items() if isinstance(c, CategoryColumn)}
        images = [c for c in columns.values() if isinstance(c, ImageColumn)]
        self._image = images[0] if images else None
        self._features = data.features
        self._sums = self._planned()
        if self._image is None:
            seen: set[str] = set()
            for name in self.inputs:
                if name in seen:
                    raise ConfigurationError(
                        f"two inputs of the model would be called {name!r}: rename a column or a "
                        "category in the schema"
                    )
                seen.add(name)

    def _planned(self) -> tuple[_Sum, ...]:
        """The sums that the configuration needs, and nothing else in them."""
        said, columns = self._settings, list(self._numbers)
        everyone = tuple(range(len(columns)))
        imputed = tuple(k for k in everyone if columns[k] not in said.required)
        clips = said.clip_quantiles is not None
        standardised = said.scale == "standardise"
        moments = everyone if standardised else imputed if said.impute == "mean" else ()
        histograms = everyone if clips else imputed if said.impute == "median" else ()
        sizes = tuple(len(c.categories) for c in self._categories.values())
        counted = bool(moments or histograms)
        first = _Sum(
            len(columns),
            said.bins,
            rows=1,
            missing=imputed if counted else (),
            histograms=histograms,
            categories=sizes if said.minimum_count > 0 else (),
            classes=len(self.schema.classes) if said.class_weights == "balanced" else 0,
            moments=() if clips else moments,
            squares=standardised and not clips,
        )
        second = _Sum(
            len(columns),
            said.bins,
            moments=moments if clips else (),
            squares=standardised and clips,
        )
        found = [first] if first.whole + first.halved + first.values > 1 else []
        return tuple([*found, second] if second.values else found)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that features are made of."""
        return self._features

    @property
    def revealed(self) -> str:
        """What the sums tell of all sites' rows, in words."""
        said, parts = self._settings, []
        if self._sums and self._sums[0].missing:
            parts.append("how many values are missing")
        if any(part.moments for part in self._sums):
            parts.append("means" + (" and deviations" if said.scale == "standardise" else ""))
        if self._sums and self._sums[0].histograms:
            parts.append(f"histograms of {said.bins} bins")
        if self._sums and self._sums[0].categories:
            parts.append("how many records are in each category")
        if self._sums and self._sums[0].classes:
            parts.append("how many records are in each class")
        return ", ".join(["how many records there are", *parts])

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the model's inputs, in row-major order of `shape`."""
        return tuple(name for name, _ in self._named(self.start()))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one record's features."""
        if self._image is not None:
            return self._image.channels, self._image.height, self._image.width
        return (len(self.inputs),)

    @property
    def outputs(self) -> int:
        """How many numbers a model has to give for one record."""
        return len(self.schema.classes) or 1

    @property
    def stages(self) -> int:
        """How many sums are to be opened, one after the other: 0, 1 or 2."""
        return len(self._sums)

    def dimension(self, stage: int) -> int:
        """Integers in the sum."""
        part = self._sums[stage]
        return part.whole + part.halved + part.values * self._precision.digits

    def sensitivity(self, stage: int) -> float:
        """How far one record, or one person, moves the sum, L2: an upper bound.

        Formal Guarantees: let x be what a record adds before rounding, x = share * (its counts, y
        and y^2 - 1/2), norm at most `_Sum.norm`; a person's rows have shares that add up to at
        most 1, so their sum has no greater norm. A site rounds its whole sum down once: what moves
        the exact sum by x moves the rounded one by at most |x| 2^bits + 1 in each coordinate.
        Hence 2^bits norm + sqrt(dimension).

        Raises ValueError with exact sums, which protect nobody.
        """
        if self._precision.is_exact:
            raise ValueError("exact sums have digits, whose move nothing bounds: use NOISY")
        part = self._sums[stage]
        return float(1 << self._precision.bits) * part.norm + math.sqrt(self.dimension(stage))

    def usable(self, frame: Frame) -> NDArray[np.bool_]:
        """Which rows have a label, and a value in every required column, bool[n]."""
        usable = frame.labelled.copy()
        for name in self._settings.required:
            if name in self._numbers:
                usable &= ~np.isnan(frame.numbers[name])
            elif name in self._categories:
                usable &= frame.codes[name] != MISSING
        return usable

    def start(self) -> Fitted:
        """What is known before any sum, from declared values alone."""
        numbers = []
        for name, column in self._numbers.items():
            low, high = column.range
            middle, half = (low + high) / 2, (high - low) / 2
            numbers.append(FittedNumber(name, 0.0, low, high, middle, middle, _positive(half)))
        categories = tuple(
            FittedCategory(name, (False,) * len(column.categories))
            for name, column in self._categories.items()
        )
        balanced = self._settings.class_weights == "balanced"
        weights = (1.0,) * len(self.schema.classes) if balanced else ()
        return Fitted(0, True, 0.0, tuple(numbers), categories, weights)

    def encode(
        self, stage: int, before: Fitted, frame: Frame, share: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """What the usable rows of `frame` add to the sum of `stage`, int64[dimension(stage)].

        before: `start()`, or what the stage before was fitted to.
        share: where people are protected, float64[n], 1 over the number of rows that the row's
            person has in `frame`; None where a row counts as one. Only for sums with noise.
        """
        self._check_frame(frame)
        self._check(before, stage)
        if stage == 0 and before != self.start():
            raise ValueError("the first sum is of declared ranges, and others are given")
        part, exact = self._sums[stage], self._precision.is_exact
        if exact and share is not None:
            raise ValueError("shares of people go with noise: exact sums count rows")
        shares = _shares(share, len(frame))
        usable = self.usable(frame)
        low, high = np.array([(n.low, n.high) for n in before.numbers]).reshape(-1, 2).T
        upper, lower = np.zeros((2, part.whole + part.halved + part.values), np.int64)
        step = max(1, min(ENCODED_ROWS, (1 << 20) // (1 + len(self._numbers))))
        for start in range(0, len(frame), step):
            rows = start + np.flatnonzero(usable[start : start + step])
            counted = np.ones(len(rows), np.int64) if exact else shares[rows]
            added = self._added(part, frame, rows, counted, shares[rows], low, high)
            upper += added >> LOW_BITS
            lower += added & ((1 << LOW_BITS) - 1)
        return self._rounded(part, upper, lower)

    def _added(
        self,
        part: _Sum,
        frame: Frame,
        rows: NDArray[np.int64],
        counted: NDArray[np.int64],
        weight: NDArray[np.int64],
        low: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """What `rows` (at most ENCODED_ROWS) add: `counted` to counts, `weight` times y to sums."""
        numbers = np.empty((len(rows), len(self._numbers)))
        if part.missing or part.histograms or part.moments:
            for k, name in enumerate(self._numbers):
                numbers[:, k] = frame.numbers[name][rows]
        known = ~np.isnan(numbers)
        # From 0 to 1 within the range; a value beyond it, which a frame never holds, counts as the
        # nearest end.
        place = np.clip((np.where(known, numbers, low) - low) / (high - low), 0.0, 1.0)
        added = [np.atleast_1d(counted.sum())[: part.rows]]
        if part.missing:
            absent = ~known[:, list(part.missing)]
            added.append((absent * counted[:, None]).sum(0))
        for k in part.histograms:
            chosen = known[:, k]
            bins = np.minimum((place[chosen, k] * part.bins).astype(np.int64), part.bins - 1)
            added.append(_tally(bins, counted[chosen], part.bins))
        if part.categories:
            for name, column in self._categories.items():
                added.append(_tally(frame.codes[name][rows], counted, len(column.categories)))
        if part.classes:
            added.append(_tally(frame.codes[self.schema.label][rows], counted, part.classes))
        if part.moments:
            chosen = known[:, list(part.moments)]
            y = place[:, list(part.moments)] * 2 - 1
            scale = weight[:, None].astype(np.float64)
            # Truncated, so that no integer is further from 0 than what it stands for.
            added.append(np.where(chosen, np.trunc(y * scale), 0).astype(np.int64).sum(0))
            if part.squares:
                second = np.trunc((y * y - 0.5) * scale)
                added.append(np.where(chosen, second, 0).astype(np.int64).sum(0))
        return np.concatenate(added)

    def _rounded(
        self, part: _Sum, upper: NDArray[np.int64], lower: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The sums upper * 2^LOW_BITS + lower as integers of this precision."""
        counts = part.whole + part.halved
        if self._precision.is_exact:
            whole = (upper[:counts] << LOW_BITS) + lower[:counts]
            values = upper[counts:].astype(object) * (1 << LOW_BITS) + lower[counts:].astype(object)
            return np.concatenate([whole, self._precision.split(values)])
        # Rounded down: floor(floor(s / 2^LOW_BITS) / 2^more) is floor(s / 2^(LOW_BITS + more)).
        more = np.full(len(upper), FRACTION - LOW_BITS - self._precision.bits)
        more[part.whole : counts] += 1
        rounded: NDArray[np.int64] = (upper + (lower >> LOW_BITS)) >> more
        return rounded

    def fit(self, stage: int, before: Fitted, total: NDArray[np.int64], deviation: float) -> Fitted:
        """What everybody decodes from the sum of `stage`; the same for any division of the rows.

        total: int64[dimension(stage)]. deviation: of the noise in each integer, all sites'
            together; 0 where the sum is exact.

        Exact: mean and deviation are off by less than 1e-9 of the range from those of the values,
        quantiles by at most one bin. With noise every figure is finite and in its domain, whatever
        the integers: counts at least 0 (1 in a quotient), fills between `low` and `high`, spreads
        at least LEAST_NOISY_DEVIATION and at least the noise in them, class weights at most
        MOST_NOISY_WEIGHT. Raises ValueError for a total of another length.
        """
        self._check(before, stage)
        part, precision = self._sums[stage], self._precision
        if total.shape != (self.dimension(stage),):
            raise ValueError(f"a sum of {total.shape} integers, not of {self.dimension(stage)}")
        if not 0 <= deviation < math.inf or (deviation > 0 and precision.is_exact):
            raise ValueError(f"deviation = {deviation}: exact sums have 0, others a finite one")
        unit = 1 if precision.is_exact else 1 << precision.bits
        counts, halved, sums = np.split(total, [part.whole, part.whole + part.halved])
        reader = _Reader(counts / unit)
        numbers = {n.name: n for n in before.numbers}
        rows = max(0.0, float(reader.take(1)[0])) if part.rows else before.rows
        if part.rows:
            known = np.full(len(numbers), rows)
            known[list(part.missing)] -= reader.take(len(part.missing))
            for (name, number), count in zip(numbers.items(), known, strict=True):
                numbers[name] = _replaced(number, known=max(0.0, float(count)))
        names = list(numbers)
        for k in part.histograms:
            name = names[k]
            numbers[name] = self._clipped(numbers[name], reader.take(part.bins))
        if part.moments:
            integers = precision.join(sums)
            fraction = FRACTION if precision.is_exact else precision.bits
            count = len(part.moments)
            for place, k in enumerate(part.moments):
                number, first = numbers[names[k]], Fraction(integers[place], 1 << fraction)
                second = Fraction(integers[count + place], 1 << fraction) if part.squares else None
                numbers[names[k]] = self._moments(number, first, second, deviation / 2**fraction)
        reader = _Reader(halved / (1 if precision.is_exact else unit / 2))
        categories = before.categories
        if part.categories:
            least = self._settings.minimum_count
            categories = tuple(
                FittedCategory(c.name, tuple((reader.take(len(c.merged)) < least).tolist()))
                for c in categories
            )
        weights = before.weights
        if part.classes:
            weights = _balanced(reader.take(part.classes), deviation / (unit / 2))
        exact = before.exact and precision.is_exact
        return Fitted(stage + 1, exact, rows, tuple(numbers.values()), categories, weights)

    def _clipped(self, number: FittedNumber, histogram: NDArray[np.float64]) -> FittedNumber:
        """`number` with the quantiles that its histogram over the declared range tells."""
        if number.known <= 0:
            return number
        edges = np.linspace(number.low, number.high, len(histogram) + 1)
        below = _cumulated(histogram, number.known)
        low, high = number.low, number.high
        if self._settings.clip_quantiles is not None:
            # The outer edges of the bins that hold the quantiles: never tighter than was asked.
            first, last = (_bin_of(below, share) for share in self._settings.clip_quantiles)
            if edges[first] < edges[last + 1]:
                low, high = float(edges[first]), float(edges[last + 1])
        fill = number.fill
        if self._settings.impute == "median":
            within = _bin_of(below, 0.5)
            held = below[within + 1] - below[within]
            part = (below[-1] / 2 - below[within]) / held if held > 0 else 0.5
            fill = float(edges[within] + (edges[within + 1] - edges[within]) * min(1, max(0, part)))
        return _replaced(number, low=low, high=high, fill=min(high, max(low, fill)))

    def _moments(
        self, number: FittedNumber, first: Fraction, second: Fraction | None, noise: float
    ) -> FittedNumber:
        """`number` with the mean, and from `second` the spread, that its sums tell.

        noise: the deviation of the noise in each sum.
        """
        low, high = Fraction(number.low), Fraction(number.high)
        half = (high - low) / 2
        known = Fraction(number.known if self._precision.is_exact else max(1.0, number.known))
        seen = known > 0
        mean = _bounded(first / known, -1, 1) if seen else Fraction(0)
        centre = float(_bounded(low + (mean + 1) * half, low, high))
        if self._settings.impute == "mean":
            number = _replaced(number, fill=centre)
        if second is None:
            return number
        variance = float(_bounded(second / known + Fraction(1, 2) - mean**2, 0, 1)) if seen else 0.0
        if self._precision.is_exact:
            deviation = math.sqrt(variance)
            stretch = deviation if deviation >= LEAST_DEVIATION else 1.0
        else:
            told = noise * math.sqrt(1 + 4 * float(mean) ** 2) / float(known)
            stretch = math.sqrt(min(1.0, max(variance, told, LEAST_NOISY_DEVIATION**2)))
        return _replaced(number, centre=centre, spread=_positive(float(half) * stretch))

    def apply(self, fitted: Fitted, frame: Frame) -> Table:
        """The features and targets of the usable rows of `frame`, in order.

        features: float32[usable, *shape]; target: the class number, int64, or the label mapped from
        its range onto [-1, 1], float32. Columns of text are the table's groups. Works through some
        rows at a time, so that it takes little more memory than the table it gives.
        """
        self._check_frame(frame)
        self._check(fitted, None)
        usable = self.usable(frame)
        everyone = bool(usable.all())
        features = np.empty((int(usable.sum()), *self.shape), np.float32)
        pixels = math.prod(self.shape) if self._image is not None else 1
        step = max(1, min(APPLIED_ROWS, (1 << 22) // pixels))
        done = 0
        for start in range(0, len(frame), step):
            rows = start + np.flatnonzero(usable[start : start + step])
            block = features[done : done + len(rows)]
            done += len(rows)
            if self._image is not None:
                self._show(frame, rows, block)
            else:
                self._fill(fitted, frame, rows, block)
        label = frame.target[usable]
        target_range = self.schema.target_range
        if target_range is None:
            target: NDArray[np.int64] | NDArray[np.float32] = label.astype(np.int64)
        else:
            low, high = target_range
            target = ((label - low) / (high - low) * 2 - 1).astype(np.float32)
        return Table(
            features=features,
            target=target,
            names=self.inputs,
            task=self.schema.task,
            classes=self.schema.classes,
            groups={n: t if everyone else t[usable] for n, t in frame.texts.items()},
            target_range=target_range,
        )

    def _show(self, frame: Frame, rows: NDArray[np.int64], block: NDArray[np.float32]) -> None:
        """The images of `rows`, mapped onto [-1, 1], into `block`."""
        if frame.images is None:
            raise ValueError("the frame holds no images")
        np.multiply(frame.images[rows], np.float32(2 / 255), out=block, dtype=np.float32)
        block -= 1

    def _fill(
        self, fitted: Fitted, frame: Frame, rows: NDArray[np.int64], block: NDArray[np.float32]
    ) -> None:
        """The inputs of `rows`, into `block` (float32[len(rows), inputs])."""
        numbers = {n.name: n for n in fitted.numbers}
        categories = {c.name: c for c in fitted.categories}
        at = 0
        for name in self._features:
            if name in numbers:
                number = numbers[name]
                values = frame.numbers[name][rows]
                missing = np.isnan(values)
                np.clip(values, number.low, number.high, out=values)
                values[missing] = number.fill
                values -= number.centre
                values /= number.spread
                block[:, at] = values
                at += 1
                if self._indicated(name):
                    block[:, at] = missing
                    at += 1
            else:
                merged, column = categories[name].merged, self._categories[name]
                size, width = len(merged), len(merged) + self._has_other(column)
                lit = np.where(merged, size, np.arange(size))
                codes = frame.codes[name][rows]
                lights = np.append(lit, size)[np.clip(codes, 0, size)]
                shown = (codes != MISSING) & (lights < width)
                block[:, at : at + width] = 0
                block[np.flatnonzero(shown), at + lights[shown]] = 1
                at += width

    def described(self, fitted: Fitted) -> Iterator[tuple[str, str]]:
        """Every input of the model and what it is, in words; one line for all of an image."""
        self._check(fitted, None)
        if self._image is not None:
            height, width = self._image.height, self._image.width
            yield "image", f"{height} x {width} pixels, from 0..255 onto -1..1"
            return
        yield from self._named(fitted)

    def _named(self, fitted: Fitted) -> Iterator[tuple[str, str]]:
        """The name of each input, and what was fitted for it."""
        if self._image is not None:
            kinds = ("pixel",) if self._image.channels == 1 else ("red", "green", "blue")
            height, width = self._image.height, self._image.width
            for kind in kinds:
                for i in range(height):
                    yield from ((f"{kind}_{i}_{j}", "") for j in range(width))
            return
        numbers = {n.name: n for n in fitted.numbers}
        categories = {c.name: c for c in fitted.categories}
        for name in self._features:
            if name in numbers:
                yield name, self._told(numbers[name])
                if self._indicated(name):
                    yield f"{name} (missing)", f"1 where {name} is missing, else 0"
                continue
            column, merged = self._categories[name], categories[name].merged
            for category, rare in zip(column.names, merged, strict=True):
                told = "always 0: too rare, counted as (other)" if rare else "1 or 0"
                yield f"{name}={category}", told
            if self._has_other(column):
                rare_ones = [c for c, rare in zip(column.names, merged, strict=True) if rare]
                yield f"{name}=(other)", "1 for " + ", ".join([*rare_ones, "any other"])

    def _told(self, number: FittedNumber) -> str:
        unit = self._numbers[number.name].unit
        told = f"minus {number.centre:.6g}, divided by {number.spread:.6g}"
        if (number.low, number.high) != self._numbers[number.name].range:
            told = f"clipped to {number.low:.6g} .. {number.high:.6g}, {told}"
        if number.name not in self._settings.required:
            told += f"; {number.fill:.6g} where missing"
        return told + (f" (in {unit})" if unit else "")

    def _indicated(self, name: str) -> bool:
        """Whether a number has an input that tells where it is missing: never a required one."""
        return self._settings.indicators and name not in self._settings.required

    def _has_other(self, column: CategoryColumn) -> bool:
        return self._settings.minimum_count > 0 or column.outside == "other"

    def _check_frame(self, frame: Frame) -> None:
        if frame.schema is not self.schema and frame.schema.digest() != self.schema.digest():
            raise ValueError("the frame was read with another schema")

    def _check(self, fitted: Fitted, sums: int | None) -> None:
        """ValueError unless `fitted` is of these columns, and of `sums` sums (None: of all)."""
        categories = {c.name: len(c.merged) for c in fitted.categories}
        expected = {name: len(c.categories) for name, c in self._categories.items()}
        balanced = self._settings.class_weights == "balanced"
        if (
            [n.name for n in fitted.numbers] != list(self._numbers)
            or list(categories.items()) != list(expected.items())
            or len(fitted.weights) != (len(self.schema.classes) if balanced else 0)
        ):
            raise ValueError("the fitted values are of other columns")
        if fitted.sums != (self.stages if sums is None else sums):
            raise ValueError(f"the fitted values come from {fitted.sums} of {self.stages} sums")


@final
class _Reader:
    """Takes figures off the front of an array, some at a time."""

    def __init__(self, figures: NDArray[np.float64]) -> None:
        self._figures = figures

    def take(self, count: int) -> NDArray[np.float64]:
        taken, self._figures = self._figures[:count], self._figures[count:]
        return taken


def _replaced(number: FittedNumber, **figures: float) -> FittedNumber:
    return msgspec.structs.replace(number, **figures)


def _positive(spread: float) -> float:
    """`spread`, or the least normal float where a range is so narrow that it vanishes."""
    return max(spread, float(np.finfo(np.float64).tiny))


def _bounded(value: Fraction, low: Fraction | int, high: Fraction | int) -> Fraction:
    return Fraction(min(max(value, low), high))


def _shares(share: NDArray[np.float64] | None, rows: int) -> NDArray[np.int64]:
    """Each row's share in units of 2^-FRACTION, int64[rows], rounded down.

    n floor(2^FRACTION fl(1/n)) never exceeds 2^FRACTION: where 2^FRACTION / n is no integer it is
    1/n away from one, and fl(1/n) is off by 2^(FRACTION - 53) / n at most.
    """
    if share is None:
        return np.full(rows, 1 << FRACTION)
    if share.shape != (rows,) or (rows and not (share.min() > 0 and share.max() <= 1)):
        raise ValueError("share: give one number above 0 and at most 1 for each row")
    return np.floor(share * float(1 << FRACTION)).astype(np.int64)


def _tally(
    places: NDArray[np.integer[Any]], counted: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """How much of `counted` is at each place 0..size-1; what is elsewhere is nowhere."""
    tally = np.zeros(size, np.int64)
    within = (places >= 0) & (places < size)
    np.add.at(tally, places[within], counted[within])
    return tally


def _cumulated(histogram: NDArray[np.float64], known: float) -> NDArray[np.float64]:
    """How many of `known` values lie below each edge, ascending from 0: float64[bins + 1].

    With noise the sum over all bins misses `known`, which is told more precisely. The gap is spread
    evenly, which halves the deviation in the middle (a Brownian bridge); then the nearest ascending
    sequence from above and the one from below are averaged. Exact counts stay as they are.
    """
    sums = np.concatenate([[0.0], np.cumsum(histogram)])
    sums -= np.linspace(0, 1, len(sums)) * (sums[-1] - known)
    rising = np.maximum.accumulate(sums)
    falling = np.minimum.accumulate(sums[::-1])[::-1]
    return np.clip((rising + falling) / 2, 0, known)


def _bin_of(below: NDArray[np.float64], share: float) -> int:
    """The bin that holds the smallest value that at least `share` of the values do not exceed."""
    found = int(np.searchsorted(below, share * below[-1], side="left")) - 1
    return min(max(found, 0), len(below) - 2)


def _balanced(counts: NDArray[np.float64], noise: float) -> tuple[float, ...]:
    """n / (classes n_c) for each class, as scikit-learn's "balanced"; n_c at least 1 and the noise.

    noise: its deviation, in records; with any, weights are at most MOST_NOISY_WEIGHT.
    """
    held = np.maximum(counts, max(1.0, noise))
    weights = held.sum() / (len(held) * held)
    return tuple((np.minimum(weights, MOST_NOISY_WEIGHT) if noise else weights).tolist())
