"""Test figures from sums over the sites: no test row leaves its site.

Every site turns what the model said of its own test rows into one vector of integers: counts, a
histogram of scores, sums of bounded amounts. The consortium opens the sum over the sites, and the
figures and their intervals are computed from it. The vector is a plain sum over rows, so any
division of the rows over sites gives the same sum bit for bit. One row (or person) moves it by at
most `Tally.sensitivity`, so Gaussian noise of one deviation on every integer protects it.

Intervals are of 95 %, for the figure of the population that the rows are drawn from. They cover the
sampling of rows and, where there is noise, the noise. They are computed, not resampled: by the
delta method a figure f of counts T has the variance sum_i T_i g_i^2 + s^2 sum_i g_i^2, with g the
gradient of f and s the deviation of the noise in each count. For the area under the ROC curve this
is the variance of DeLong, DeLong and Clarke-Pearson 1988 on the histogram.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, logit
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Curve = tuple[tuple[float, float], ...]

EXACT_BINS: Final = 4096
"""Bins of scores for sums without noise, where there are two classes.

The area under the ROC curve is then within 0.002 of that of the rows themselves, unless nearly all
scores lie in a few bins: their deviation must be at least 0.05 logits within 2 of the threshold, or
0.2 within 8 of it.
"""
NOISY_BINS: Final = 16
"""Bins of scores for sums with noise: more of them add more noise than resolution."""
CALIBRATION_BINS: Final = 256
"""Bins of scores where there are more classes, and they tell of calibration only."""
EXACT_BITS: Final = 20
NOISY_BITS: Final = 12

LOSS_CAP: Final = 8.0
"""A row's loss counts as at most this much: so does one row's weight in the mean."""
GROUPS: Final = 10
"""Groups of equal width in probability, in which calibration is measured, bin by bin."""

_MOST_POINTS = 128  # of a curve that goes into a record and a picture
_FAR = 1e9  # a logit beyond this says no more
_TOLD = 3.0  # a count is told from noise when it is this many of its deviations
_HIDDEN_MEAN = {"test_brier": 0.05, "test_loss": 0.25}  # not told where noise deviates more
_HIDDEN = 0.1  # a calibration error is not told when noise alone looks like this much
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution

# Powers (of half the error, of the target) whose sums make every figure of a regression, and the
# second moments of their influence. Each lies in [-1, 1]. The weights spend the noise where
# figures need it; powers that only intervals need get little.
_POWERS: Mapping[tuple[int, int], float] = {
    (0, 0): 1 / 4,
    (1, 0): 1 / 2,
    (2, 0): 1,
    (0, 1): 1 / 2,
    (0, 2): 1 / 2,
    (4, 0): 1 / 16,
    (2, 1): 1 / 16,
    (2, 2): 1 / 16,
    (0, 3): 1 / 16,
    (0, 4): 1 / 16,
}


def usual_bins(classes: int, exact: bool) -> int:
    """How many bins serve best, for sums with or without noise."""
    if not exact:
        return NOISY_BINS
    return EXACT_BINS if classes == 2 else CALIBRATION_BINS


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Test figures of one model. What cannot be told (no positives, say) is absent, never NaN.

    rows: test rows (or people) behind them; under noise an estimate.
    values: test_* -> figure, on the scale of its definition. intervals: test_* -> its 95 % interval
        (low, high), which holds the value. Expected calibration error has none: chance alone
        raises it.
    roc: (false positive rate, true positive rate), from (0, 0) to (1, 1); two classes only.
    calibration: (mean predicted probability, observed share, rows) of each group with rows: of the
        last class where there are two, else of the most probable class.
    recalls: of each class; None where it has no rows. Empty for regression.
    exact: whether the sums were opened without noise.

    Raises ValueError for figures that no sums give.
    """

    rows: float
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    roc: tuple[tuple[float, float], ...] = ()
    calibration: tuple[tuple[float, float, float], ...] = ()
    recalls: tuple[float | None, ...] = ()
    exact: bool = True

    def __post_init__(self) -> None:
        numbers = [self.rows, *self.values.values()]
        numbers += itertools.chain(*self.intervals.values(), *self.roc, *self.calibration)
        numbers += [recall for recall in self.recalls if recall is not None]
        if not all(math.isfinite(number) for number in numbers) or self.rows < 0:
            raise ValueError("a figure is not finite, or rows is below 0")
        for name, (low, high) in self.intervals.items():
            if name not in self.values or not low <= self.values[name] <= high:
                raise ValueError(f"the interval of {name} does not hold its value")
        shares = [*itertools.chain(*self.roc), *(s for p, o, _ in self.calibration for s in (p, o))]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("a point of a curve is not between 0 and 1")


@final
@dataclass(frozen=True)
class Tally:
    """How test rows become integers, and their sum figures; made of public values alone.

    classes: how many; 0 for regression. target_range: the target's, mapped onto [-1, 1]; None for
    classification. bins: of the histograms of scores, even; see `usual_bins`. threshold: the
    probability from which the last class is predicted, where there are two. bits: one row counts as
    2^bits, and amounts are rounded to 2^-bits of their bound, or to up to 16 times that where they
    weigh less.

    Raises ValueError on construction for values that do not fit together.
    """

    classes: int
    target_range: tuple[float, float] | None = None
    bins: int = EXACT_BINS
    threshold: float = 0.5
    bits: int = EXACT_BITS

    def __post_init__(self) -> None:
        if self.classes < 0 or self.classes == 1:
            raise ValueError(f"classes = {self.classes}: use 0 for regression, or 2 or more")
        if (self.classes == 0) != (self.target_range is not None):
            raise ValueError("target_range belongs to regression, and regression needs it")
        if self.target_range is not None and not (
            -math.inf < self.target_range[0] < self.target_range[1] < math.inf
        ):
            raise ValueError(f"target_range = {self.target_range}: put the lower bound first")
        if not 2 <= self.bins <= 1 << 16 or self.bins % 2:
            raise ValueError(f"bins = {self.bins}: use an even number from 2 to 65,536")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold = {self.threshold}: use a probability between 0 and 1")
        if not 8 <= self.bits <= 32:
            raise ValueError(f"bits = {self.bits}: use 8 to 32")

    @property
    def dimension(self) -> int:
        """Integers in the sum."""
        return sum(part.length for part in self._parts)

    @property
    def sensitivity(self) -> float:
        """How far one row (or one person, with shares) moves the sum at most, L2."""
        return (1 << self.bits) * math.sqrt(sum(part.norm**2 for part in self._parts))

    def rows(self, slot_bits: int) -> int:
        """How many rows (or people) a sum may have before an integer leaves `slot_bits` bits."""
        return (1 << (slot_bits - 1)) - 1 >> self.bits

    def encode(
        self,
        outputs: NDArray[np.floating],
        losses: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
        share: Floats | None = None,
    ) -> Integers:
        """The sum over a site's test rows, int64[dimension]; of no rows it is zero.

        Batches of rows may be encoded one by one and added up.

        outputs: [n, classes] logits, or [n, 1] on the target's scale. losses: [n]; each counts as
        at most LOSS_CAP. target: [n], class numbers, or on [-1, 1]. share: [n], 1 over the rows of
        the row's person where people are protected; None where rows are. A row whose outputs are
        not finite counts as wrong as can be.

        Formal Guarantees: a row without a share (or a person, whose rows have shares that add up to
        at most 1) moves the result by at most `sensitivity`, L2, whatever the model said of it:
        every amount is bounded by an integer, rounding never crosses that bound, and with shares
        it is towards zero. Of two divisions of the rows the sums are equal.
        """
        n = len(target)
        given = outputs.astype(np.float64)
        if given.shape != (n, self.classes or 1) or losses.shape != (n,):
            raise ValueError(
                f"outputs {given.shape} and losses {losses.shape} do not fit {n} targets"
            )
        if share is not None and (share.shape != (n,) or not ((share > 0) & (share <= 1)).all()):
            raise ValueError("share is one number in (0, 1] a row")
        capped = np.clip(np.nan_to_num(losses, nan=LOSS_CAP), 0, LOSS_CAP) / LOSS_CAP
        rows = _Rows(1 << self.bits, share)
        if self.classes:
            parts = self._classified(rows, given, target.astype(np.int64))
        else:
            parts = _measured(rows, given[:, 0], target.astype(np.float64))
        return np.concatenate([*parts, rows.add(_LOSS, None, np.stack([capped, capped**2], 1))])

    def figures(self, total: Integers, deviation: float = 0.0) -> Figures:
        """What the sum over all sites tells. `deviation`: of the noise in each integer, 0 if exact.

        Classification: test_accuracy, test_balanced_accuracy (the mean recall), test_brier (half
        the squared distance from the probabilities to the truth), test_calibration_error (expected,
        of GROUPS groups), test_loss; with two classes also test_auc and, where exact,
        test_average_precision (both within the resolution of the bins), test_sensitivity (recall of
        the last class) and test_specificity (of the first) at the threshold. Regression: test_mse,
        test_rmse, test_mae, test_r2 and test_bias (the mean error) in the target's own units, an
        error beyond the width of its range counted as that width; test_loss. test_loss is of losses
        capped at LOSS_CAP.

        Under noise sums are read as they are, negative counts included, so that they stay unbiased;
        a figure is moved into its domain only at the end. The calibration error is an exception:
        noise raises it, and only its expectation is taken off.
        """
        if total.shape != (self.dimension,):
            raise ValueError(f"total has shape {total.shape}, not ({self.dimension},)")
        if not 0 <= deviation < math.inf:
            raise ValueError(f"deviation = {deviation}: use a finite number of at least 0")
        sums: dict[_Part, _Sum] = {}
        start = 0
        for part in self._parts:
            unit = part.weight * (1 << self.bits)
            values = total[start : start + part.length].astype(np.float64) / unit
            sums[part] = _Sum(values, deviation / unit)
            start += part.length
        if self.classes:
            return self._classification(sums)
        low, high = self.target_range or (-1.0, 1.0)
        return _regression(sums, high - low)

    def local(
        self,
        outputs: NDArray[np.floating],
        losses: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
    ) -> Figures:
        """The same figures of one site's own test rows, exactly, for its own eyes.

        Arguments as for `encode`. They read the rows without noise: they must not leave the site.
        """
        fine = replace(self, bins=1 << 14, bits=30)
        found = fine.figures(fine.encode(outputs, losses, target))
        if self.classes == 2 and "test_auc" in found.values:
            # Of few rows one tie more shows.
            area = area_under_roc(outputs[:, 1] - outputs[:, 0], target == 1)
            if area is not None:
                found = msgspec.structs.replace(found, values=found.values | {"test_auc": area})
        return found

    @property
    def _parts(self) -> tuple[_Part, ...]:
        if not self.classes:
            return (*_MOMENTS, _ABSOLUTE, _LOSS)
        return (self._cells, self._scores, _BRIER, _LOSS)

    @property
    def _cells(self) -> _Part:
        """[classes, (wrong, right)]: how many rows of each class are recognised."""
        return _Part("cells", 2 * self.classes, 1, 1 / 2)

    @property
    def _scores(self) -> _Part:
        """[2, bins]: histograms of log odds, beyond those of the threshold.

        Of the last class, for rows of the first and of the last, where there are two classes; else
        of the likeliest class, for rows where it is wrong and where it is right.
        """
        return _Part("scores", 2 * self.bins, 1, 1)

    @property
    def _edge(self) -> float:
        """The log odds at the middle edge of the histograms."""
        return float(logit(self.threshold)) if self.classes == 2 else 0.0

    def _classified(self, rows: _Rows, outputs: Floats, target: Integers) -> list[Integers]:
        if len(target) and not 0 <= target.min() <= target.max() < self.classes:
            raise ValueError(f"target names a class outside 0 to {self.classes - 1}")
        truth = np.arange(self.classes) == target[:, None]
        lost = np.where(truth, -_FAR, 0.0)
        sound = np.isfinite(outputs).all(1, keepdims=True)
        outputs = np.clip(np.where(sound, outputs, lost), -_FAR, _FAR)
        odds = np.exp(outputs - outputs.max(1, keepdims=True, initial=-math.inf))
        chance = odds / odds.sum(1, keepdims=True)
        brier = np.clip(((chance - truth) ** 2).sum(1) / 2, 0, 1)
        if self.classes == 2:
            margin = outputs[:, 1] - outputs[:, 0] - self._edge
            right = (margin >= 0) == target
            hit = target
        else:
            margin = np.clip(logit(chance.max(1)), -_FAR, _FAR)
            right = outputs.argmax(1) == target
            hit = right.astype(np.int64)
        one = np.ones((len(target), 1))
        return [
            rows.add(self._cells, 2 * target + right, one),
            rows.add(self._scores, hit * self.bins + _bin(margin, self.bins), one),
            rows.add(_BRIER, None, np.stack([brier, brier**2], 1)),
        ]

    def _classification(self, sums: Mapping[_Part, _Sum]) -> Figures:
        cells, scores = sums[self._cells], sums[self._scores]
        counts = cells.values.reshape(self.classes, 2)
        n = float(counts.sum())
        noise = cells.noise * math.sqrt(counts.size)
        exact = cells.noise == 0
        if not _told(np.array(n), noise):
            return Figures(max(n, 0.0), {}, {}, exact=exact)
        of_class = counts.sum(1)
        known = _told(of_class, cells.noise * math.sqrt(2))
        # Uncertain as if a row were shared out among all cells, so that no interval of a figure at
        # the end of its scale shrinks to a point.
        smooth = np.maximum(counts, 0) + 1 / (2 * self.classes)
        recalls = [
            _recall(counts[[c]], smooth[[c]], cells.noise) if known[c] else None
            for c in range(self.classes)
        ]
        told: dict[str, _Estimate | None] = {
            "test_accuracy": _accuracy(counts, smooth, cells.noise),
            "test_balanced_accuracy": _recall(counts, smooth, cells.noise) if known.all() else None,
            "test_brier": _mean(sums[_BRIER], n, noise, 1.0),
            "test_loss": _mean(sums[_LOSS], n, noise, LOSS_CAP),
        }
        for name, part, bound in (("test_brier", _BRIER, 1.0), ("test_loss", _LOSS, LOSS_CAP)):
            if bound * sums[part].noise > _HIDDEN_MEAN[name] * n:
                told[name] = None
        roc: Curve = ()
        if self.classes == 2:
            told["test_specificity"], told["test_sensitivity"] = recalls
            both = _told(scores.values.reshape(2, -1).sum(1), scores.noise * math.sqrt(self.bins))
            if (known & both).all():
                told |= _ranking(scores, of_class)
                roc = _roc(scores, of_class)
        error, calibration = _calibration(
            scores, expit(self._edge + _margin(np.arange(self.bins), self.bins)), n
        )
        values = {"test_calibration_error": error} if error is not None else {}
        return Figures(
            n,
            values | {name: estimate.value for name, estimate in told.items() if estimate},
            {name: (estimate.low, estimate.high) for name, estimate in told.items() if estimate},
            roc=roc,
            calibration=calibration,
            recalls=tuple(recall.value if recall else None for recall in recalls),
            exact=exact,
        )


@dataclass(frozen=True)
class _Part:
    """A stretch of the vector: `length` integers, of which a row fills `filled`.

    A row adds amounts in [-1, 1], times `weight` (a power of two).
    """

    name: str
    length: int
    filled: int
    weight: float

    @property
    def norm(self) -> float:
        """The largest L2 norm of what one row adds."""
        return self.weight * math.sqrt(self.filled)


_BRIER = _Part("brier", 2, 2, 1 / 4)
_LOSS = _Part("loss", 2, 2, 1 / 4)
_MOMENTS = tuple(_Part(f"moment {p}", 1, 1, weight) for p, weight in _POWERS.items())
_ABSOLUTE = _Part("absolute error", 1, 1, 1 / 2)


@dataclass(frozen=True)
class _Rows:
    """Rows on their way into integers: `one` is what a whole row counts as."""

    one: int
    share: Floats | None

    def add(self, part: _Part, where: Integers | None, amounts: Floats) -> Integers:
        """The sum of `amounts` [n, filled] over the rows, each at its place `where` [n] in `part`.

        Amounts are rounded to the nearest integer, which stays within the integer that bounds
        them; with shares towards zero, as many roundings upwards could add up.
        """
        scaled = amounts * (self.one * part.weight)
        if self.share is None:
            integers = np.rint(scaled).astype(np.int64)
        else:
            integers = np.trunc(scaled * self.share[:, None]).astype(np.int64)
        total = np.zeros((part.length // part.filled, part.filled), np.int64)
        if where is None:
            total[0] = integers.sum(0)
        else:
            np.add.at(total, where, integers)
        return total.reshape(-1)


@dataclass(frozen=True, eq=False)
class _Sum:
    """A part of the opened sum in rows, and the deviation of the noise in each of its numbers."""

    values: Floats
    noise: float


class _Estimate(NamedTuple):
    """A figure and its 95 % interval, low <= value <= high."""

    value: float
    low: float
    high: float


def _bin(margin: Floats, bins: int) -> Integers:
    """The bin of u = 1/2 + m / (2 (reach + |m|)) among `bins` equal ones of [0, 1], int64[n].

    u is computed from the middle outwards, so that no margin is rounded across the middle edge.
    """
    half = bins // 2
    size = np.abs(margin)
    out = np.minimum((size / (_reach(bins) + size) * half).astype(np.int64), half - 1)
    return np.asarray(np.where(margin >= 0, half + out, half - 1 - out), np.int64)


def _measured(rows: _Rows, outputs: Floats, target: Floats) -> list[Integers]:
    """What a regression adds but its losses."""
    y = np.clip(target, -1, 1)
    worst = np.where(y < 0, y + 2, y - 2)  # as far away as an error counts
    half = np.clip(np.where(np.isfinite(outputs), outputs, worst) - y, -2, 2) / 2
    powers = [half**a * y**b for a, b in _POWERS]
    return [
        rows.add(part, None, amount[:, None])
        for part, amount in zip((*_MOMENTS, _ABSOLUTE), [*powers, np.abs(half)], strict=True)
    ]


def _margin(bins: Integers, of: int) -> Floats:
    """The margin in the middle of each of the bins numbered `bins` among `of`, float64[n]."""
    half = of // 2
    out = np.where(bins >= half, bins - half, half - 1 - bins) + 1 / 2
    size = _reach(of) * out / (half - out)
    return np.asarray(np.where(bins >= half, size, -size), np.float64)


def _reach(bins: int) -> float:
    """The margin up to which half of the bins lie: 1 for 16 of them, 4 for 4,096."""
    return float((bins / 16) ** (1 / 4))


def _told(counts: Floats, noise: float) -> NDArray[np.bool_]:
    """Which counts are told from none."""
    return np.asarray((counts > 0) & (counts >= _TOLD * noise), np.bool_)


def _proportion(
    value: float, centre: float, gradient: Floats, counts: Floats, noise: float, more: float = 0.0
) -> _Estimate | None:
    """A figure between 0 and 1 of `counts`, with its interval; None where noise hides it.

    centre, gradient: the figure and its gradient at `counts`, none of which is 0. It must not
    change when all counts are scaled, so its sampling variance is sum_i T_i g_i^2. The interval of
    the sampling is Jeffreys' for a proportion of so many rows that it is as uncertain: exactly that
    one for a proportion (Brown, Cai and DasGupta 2001). Noise, which is symmetric, of variance
    s^2 sum_i g_i^2 + `more`, is joined to either side by square and add (Zou and Donner 2008).
    """
    centre = min(max(centre, 1e-9), 1 - 1e-9)
    rows = centre * (1 - centre) / max(float((counts * gradient**2).sum()), 1e-300)
    reach = _Z * math.sqrt(noise**2 * float((gradient**2).sum()) + more)
    if not math.isfinite(value) or reach >= 1 / 2:
        return None
    value = min(max(value, 0.0), 1.0)
    low, high = betaincinv(value * rows + 0.5, (1 - value) * rows + 0.5, [0.025, 0.975])
    below, above = max(value - float(low), 0.0), max(float(high) - value, 0.0)
    return _Estimate(
        value,
        max(value - math.hypot(below, reach), 0.0),
        min(value + math.hypot(above, reach), 1.0),
    )


def _accuracy(counts: Floats, smooth: Floats, noise: float) -> _Estimate | None:
    """Right over all, of counts [classes, (wrong, right)]."""
    n = counts.sum()
    smooth = smooth * (n / smooth.sum())
    share = float(smooth[:, 1].sum() / n)
    gradient = np.broadcast_to(np.array([-share, 1 - share]) / n, counts.shape)
    value = float(counts[:, 1].sum() / counts.sum())
    return _proportion(value, share, gradient, smooth, noise)


def _recall(counts: Floats, smooth: Floats, noise: float) -> _Estimate | None:
    """The mean over classes of right over all, of counts [classes, (wrong, right)]."""
    n = counts.sum(1)
    smooth = smooth * (n / smooth.sum(1))[:, None]
    recall = smooth[:, 1] / n
    gradient = np.stack([-recall, 1 - recall], 1) / n[:, None] / len(n)
    value = float(np.mean(counts[:, 1] / counts.sum(1)))
    return _proportion(value, float(recall.mean()), gradient, smooth, noise)


def _ranking(scores: _Sum, of_class: Floats) -> dict[str, _Estimate | None]:
    """The area under the ROC curve, and where exact average precision.

    The figures read the counts as they are, their uncertainty the likely ones. of_class: rows of
    each class.
    """
    given, likely = scores.values.reshape(2, -1), _likely(scores, of_class)
    pooled = likely.sum(0)
    # Half a row more of each class, placed as all rows are: see `_classification`.
    smooth = likely + pooled / pooled.sum() / 2
    smooth *= (of_class / smooth.sum(1))[:, None]
    counts = smooth.reshape(-1)
    # Noise meets noise: sum_ij (K_ij - 1/2)^2 of the kernel is an upper bound.
    bins = len(pooled)
    meeting = bins * (bins - 1) / 4 * scores.noise**4 / float(of_class.prod()) ** 2
    area, _ = _area(*given)
    told = {"test_auc": _proportion(area, *_area(*smooth), counts, scores.noise, meeting)}
    if scores.noise == 0:  # so few bins as noise allows would not resolve the highest scores
        precision, _ = _precision(*given)
        told["test_average_precision"] = _proportion(precision, *_precision(*smooth), counts, 0.0)
    return told


def _likely(scores: _Sum, of_class: Floats) -> Floats:
    """The nearest two histograms without a negative count, float64[2, bins]; rows of each > 0."""
    given = scores.values.reshape(2, -1)
    return np.stack([_nonnegative(*one) for one in zip(given, of_class, strict=True)])


def _area(negatives: Floats, positives: Floats) -> tuple[float, Floats]:
    """The chance that a positive outranks a negative, ties half, and its gradient [2 bins]."""
    n, p = negatives.sum(), positives.sum()
    below = (np.cumsum(negatives) - negatives / 2) / n
    above = 1 - (np.cumsum(positives) - positives / 2) / p
    area = float((positives * below).sum() / p)
    return area, np.concatenate([(above - area) / n, (below - area) / p])


def _precision(negatives: Floats, positives: Floats) -> tuple[float, Floats]:
    """The mean over positives of the precision from their bin upwards, and its gradient [2 bins]"""
    p = positives.sum()
    # Rows of one bin stand in random order: above a positive are half of the others.
    true = np.cumsum(positives[::-1])[::-1] - positives / 2 + 1 / 2
    false = np.cumsum(negatives[::-1])[::-1] - negatives / 2
    named = np.where(true + false > 0, true + false, math.inf)
    precision = np.clip(true / named, 0, 1)
    average = float((positives * precision).sum() / p)
    # A row counts for the precision of the bins below it, and half for that of its own.
    gain, loss = (
        (np.cumsum(amount) - amount / 2) / p
        for amount in (positives * false / named**2, positives * true / named**2)
    )
    return average, np.concatenate([-loss, (precision - average) / p + gain])


def _nonnegative(counts: Floats, total: float) -> Floats:
    """The nearest counts (L2) that are at least 0 and add up to `total` > 0."""
    falling = np.sort(counts)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(counts) + 1)
    last = int(np.flatnonzero(falling > excess)[-1])
    return np.asarray(np.maximum(counts - excess[last], 0.0), np.float64)


def _roc(scores: _Sum, of_class: Floats) -> Curve:
    """The ROC curve of two histograms, at most _MOST_POINTS points of it; it never falls."""
    negatives, positives = _likely(scores, of_class)
    filled = np.flatnonzero(negatives + positives > 0)[::-1]
    x, y = (
        np.concatenate([[0.0], np.cumsum(counts[filled])]) / counts.sum()
        for counts in (negatives, positives)
    )
    if len(x) > _MOST_POINTS:  # evenly along the curve, whose length is at most 2
        along = np.linspace(0, 2, _MOST_POINTS)
        kept = np.unique(np.minimum(np.searchsorted(x + y, along), len(x) - 1))
        x, y = x[kept], y[kept]
    points = np.clip(np.round(np.stack([x, y], 1), 6), 0, 1)
    points[-1] = 1.0
    return tuple((float(a), float(b)) for a, b in points)


def _calibration(
    scores: _Sum, chance: Floats, n: float
) -> tuple[float | None, tuple[tuple[float, float, float], ...]]:
    """The expected calibration error (Naeini, Cooper and Hauskrecht 2015), and the curve.

    chance: the probability in the middle of each bin, which stands for all rows in it.
    """
    missed, hit = scores.values.reshape(2, -1)
    # Counts that a group shares are summed before anything else, so that noise averages out.
    group = np.minimum((chance * GROUPS).astype(np.int64), GROUPS - 1)
    rows, came, gap, variance = (
        np.bincount(group, amount, GROUPS)
        for amount in (
            missed + hit,
            hit,
            missed * chance - hit * (1 - chance),
            scores.noise**2 * (chance**2 + (1 - chance) ** 2),
        )
    )
    error = None
    if np.sqrt(variance).sum() < _HIDDEN * n:
        # What is left of the squares without the noise in them.
        error = min(float(np.sqrt(np.maximum(gap**2 - variance, 0)).sum() / n), 1.0)
    noise = scores.noise * np.sqrt(2 * np.bincount(group, minlength=GROUPS))
    told = np.flatnonzero((rows > 0) & (rows >= _TOLD * noise))
    share = np.clip(came[told] / rows[told], 0, 1)
    predicted = (came + gap)[told] / rows[told]  # the gap is what was predicted less what came
    predicted = np.clip(predicted, told / GROUPS, (told + 1) / GROUPS)
    points = np.round(np.stack([predicted, share, rows[told]], 1), 6)
    return error, tuple((float(p), float(o), float(r)) for p, o, r in points)


def _mean(sums: _Sum, n: float, noise: float, scale: float) -> _Estimate:
    """A mean of amounts in [0, 1], times `scale`, of their sum and sum of squares over n rows."""
    mean = min(max(float(sums.values[0]) / n, 0.0), 1.0)
    spread = max(float(sums.values[1]) / n - mean**2, 0.0)
    variance = spread / n + (sums.noise**2 + mean**2 * noise**2) / n**2
    return _normal(mean * scale, math.sqrt(variance) * scale, 0.0, scale)


def _normal(value: float, deviation: float, least: float, most: float) -> _Estimate:
    value = min(max(value, least), most)
    reach = _Z * deviation
    return _Estimate(value, max(value - reach, least), min(value + reach, most))


def _regression(sums: Mapping[_Part, _Sum], unit: float) -> Figures:
    """All figures of a regression. `unit`: the width of the target's range, the largest error."""
    total = {
        power: float(sums[part].values[0]) for power, part in zip(_POWERS, _MOMENTS, strict=True)
    }
    noise = {power: sums[part].noise for power, part in zip(_POWERS, _MOMENTS, strict=True)}
    n = total[0, 0]
    exact = noise[0, 0] == 0
    if not _told(np.array(n), noise[0, 0]):
        return Figures(max(n, 0.0), {}, {}, exact=exact)
    mean = {power: amount / n for power, amount in total.items()}
    # Fourth powers of small errors are lost in rounding: at least those of normal errors count.
    mean[4, 0] = max(mean[4, 0], 3 * mean[2, 0] ** 2)

    def deviation(influence: Mapping[tuple[int, int], float]) -> float:
        """Of a figure whose influence of a row is this polynomial in half the error and y."""
        square = sum(
            c * d * mean[a + e, b + f]
            for (a, b), c in influence.items()
            for (e, f), d in influence.items()
        )
        added = sum((c * noise[power]) ** 2 for power, c in influence.items())
        return math.sqrt(max(square, 0.0) / n + added / n**2)

    squared = min(max(mean[2, 0], 0.0), 1.0)
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}

    def tell(name: str, estimate: _Estimate) -> None:
        values[name], intervals[name] = estimate.value, (estimate.low, estimate.high)

    y, spread = mean[0, 1], mean[0, 2] - mean[0, 1] ** 2
    of_spread = {(0, 2): 1.0, (0, 1): -2 * y, (0, 0): 2 * y**2 - mean[0, 2]}
    if spread > max(_TOLD * _noise(of_spread, noise) / n, 1e-9):
        ratio = 4 * mean[2, 0] / spread
        of_r2 = {p: ratio / spread * c for p, c in of_spread.items()} | {(2, 0): -4 / spread}
        tell("test_r2", _normal(1 - ratio, deviation(of_r2), -math.inf, 1.0))
    of_squared = {(2, 0): 1.0, (0, 0): -squared}
    mse = _normal(squared, deviation(of_squared), 0.0, 1.0)
    tell("test_rmse", _Estimate(*(math.sqrt(part) * unit for part in mse)))
    absolute = sums[_ABSOLUTE]
    squares = _Sum(np.array([absolute.values[0], total[2, 0]]), absolute.noise)
    tell("test_mae", _mean(squares, n, noise[0, 0], unit))
    tell("test_mse", _Estimate(*(part * unit**2 for part in mse)))
    error = min(max(mean[1, 0], -1.0), 1.0)
    of_error = {(1, 0): 1.0, (0, 0): -error}
    bias = _normal(error, deviation(of_error), -1.0, 1.0)
    tell("test_bias", _Estimate(*(part * unit for part in bias)))
    tell("test_loss", _mean(sums[_LOSS], n, noise[0, 0], LOSS_CAP))
    return Figures(n, values, intervals, exact=exact)


def _noise(
    influence: Mapping[tuple[int, int], float], noise: Mapping[tuple[int, int], float]
) -> float:
    """The deviation of a sum of noisy sums, each times its coefficient."""
    return math.sqrt(sum((c * noise[power]) ** 2 for power, c in influence.items()))


def area_under_roc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """The area under the ROC curve: the chance that a positive outranks a negative, ties half."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or not np.isfinite(scores).all():
        return None
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))
