"""What observed counts and scores prove: intervals, ROC curves, lower bounds on epsilon.

Statistics alone: nothing here trains, attacks or reads a transcript. A *bound* holds with its
stated confidence whatever the data; an `Estimate` has no such promise and is a type of its own.
Scores rise with the belief that a row was a member; coins are True where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CONFIDENCE = 0.95


class TooFewError(ValueError):
    """There are too few samples for what was asked; its one line says how many would do."""


def _probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}: give a number between 0 and 1, both excluded")


# Intervals


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval.

    Raises:
        ValueError: unless low <= high and 0 < confidence < 1.
    """

    low: float
    high: float
    confidence: float
    method: str

    def __post_init__(self) -> None:
        _probability("confidence", self.confidence)
        if not self.low <= self.high:
            raise ValueError(f"the interval's low end {self.low} is not below its high {self.high}")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact interval of a binomial proportion (Clopper and Pearson 1934).

    Formal Guarantees: for successes ~ Binomial(n, q), each end errs with probability at most
    (1 - confidence)/2 at every q.

    >>> interval = clopper_pearson(0, 10)
    >>> interval.low, round(interval.high, 4)
    (0.0, 0.3085)

    Raises:
        ValueError: unless 0 <= successes <= n, n >= 1 and 0 < confidence < 1.
    """
    _probability("confidence", confidence)
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"{successes} successes of {n} trials: need 0 <= successes <= n, n >= 1")
    tail = (1 - confidence) / 2
    low = special.betaincinv(successes, n - successes + 1, tail) if successes else 0.0
    high = special.betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return Interval(float(low), float(high), confidence, "Clopper-Pearson")


def bootstrap(
    statistic: Callable[..., float],
    *samples: npt.NDArray[np.generic],
    rng: np.random.Generator,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap (Efron and Tibshirani 1993, chapter 13), stratified by sample.

    statistic: called with as many arrays as samples. Each sample (first axis: independent units)
    is resampled by itself, so members and non-members keep their numbers.

    Raises:
        ValueError: where a sample is empty, none is given, or a resample gives no number.
    """
    _probability("confidence", confidence)
    if not samples or any(len(sample) == 0 for sample in samples):
        raise ValueError("a bootstrap needs samples, each with a row at least")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 at least")
    values = np.array(
        [
            statistic(*(sample[rng.integers(len(sample), size=len(sample))] for sample in samples))
            for _ in range(resamples)
        ]
    )
    if np.isnan(values).any():
        raise ValueError("the statistic is no number on a resample: it needs more distinct rows")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence, "percentile bootstrap, stratified")


# Membership scores


def non_members_needed(fpr: float, confidence: float = CONFIDENCE) -> int:
    """The fewest non-members that support a statement at this false-positive rate.

    With n non-members, the strictest threshold (above all of them) is shown by Clopper-Pearson,
    one-sided, to have a rate of at most 1 - (1 - confidence)^(1/n). Below that number no
    threshold whatever could be shown to reach `fpr`, so a TPR "at" it would be a guess. At 95 %
    that is the rule of three: 3/fpr, three times the bare minimum at which an empirical quantile
    exists (1/fpr, where the true rate may well be five times the one printed).

    >>> non_members_needed(0.01), non_members_needed(0.001)
    (299, 2995)
    """
    _probability("fpr", fpr)
    _probability("confidence", confidence)
    return math.ceil(math.log(1 - confidence) / math.log1p(-fpr))


@dataclass(frozen=True, slots=True)
class TruePositives:
    """The true-positive rate at a threshold that the non-members alone chose.

    The threshold is read from the non-members, so given it the members' counts are binomial and
    `interval` is exact. `fpr` is what was asked, `false_positives` of `non_members` what was seen
    and `fpr_interval` what that says about the threshold's own rate.
    """

    fpr: float
    threshold: float
    positives: int
    members: int
    false_positives: int
    non_members: int
    interval: Interval
    fpr_interval: Interval

    @property
    def rate(self) -> float:
        return self.positives / self.members


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A ROC curve: rates float64[n] from (0, 0) to (1, 1), one point a distinct threshold.

    For log axes start at 1/n_out: below it nothing was measured.
    """

    fpr: Floats
    tpr: Floats

    def thinned(self, points: int = 400) -> Curve:
        """At most so many of the points, both ends among them, spread for log and linear axes.

        Raises:
            ValueError: for less than 4 points.
        """
        if points < 4:
            raise ValueError(f"points is {points}: give 4 or more")
        if self.fpr.size <= points:
            return self
        first = self.fpr[np.searchsorted(self.fpr, 0.0, "right")]  # the curve ends at 1
        even = np.linspace(0, self.fpr.size - 1, points // 2).round().astype(np.intp)
        steps = np.searchsorted(self.fpr, np.geomspace(first, 1.0, points // 2))
        kept = np.union1d(even, steps)
        return Curve(self.fpr[kept], self.tpr[kept])


@dataclass(frozen=True, eq=False)
class Roc:
    """Scores of members and of non-members, each float64[n], sorted.

    Raises:
        TooFewError: unless there is a member and a non-member.
        ValueError: where a score is no number.
    """

    members: Floats
    non_members: Floats

    def __post_init__(self) -> None:
        for name in ("members", "non_members"):
            scores = np.sort(np.asarray(getattr(self, name), dtype=np.float64).ravel())
            if scores.size == 0:
                raise TooFewError(f"no {name.replace('_', '-')} are scored: 1 at least is needed")
            if np.isnan(scores).any():
                raise ValueError(f"a score of the {name.replace('_', '-')} is no number (NaN)")
            scores.setflags(write=False)
            object.__setattr__(self, name, scores)

    @classmethod
    def of(cls, scores: npt.ArrayLike, member: npt.ArrayLike) -> Roc:
        """scores: float64[n], member: bool[n], in the same order."""
        values, truth = _paired(scores, member)
        return cls(values[truth], values[~truth])

    @cached_property
    def auc(self) -> float:
        """P[member's score > non-member's] + P[equal]/2 (Mann and Whitney 1947)."""
        below = np.searchsorted(self.non_members, self.members, "left")
        up_to = np.searchsorted(self.non_members, self.members, "right")
        return float((below + up_to).sum() / (2 * self.members.size * self.non_members.size))

    def auc_interval(self, confidence: float = CONFIDENCE) -> Interval:
        """DeLong, DeLong and Clarke-Pearson 1988: no assumption on the scores' shape, no seed.

        Where its variance is nought (perfect separation, or one score for all), Clopper-Pearson
        over min(members, non-members) disjoint pairs, each a fair trial of the AUC: conservative,
        and not the point that DeLong and the bootstrap would both print.
        """
        _probability("confidence", confidence)
        n_in, n_out = self.members.size, self.non_members.size
        if min(n_in, n_out) > 1:
            ranks = stats.rankdata(np.concatenate([self.members, self.non_members]))
            by_member = (ranks[:n_in] - stats.rankdata(self.members)) / n_out
            by_other = 1 - (ranks[n_in:] - stats.rankdata(self.non_members)) / n_in
            variance = by_member.var(ddof=1) / n_in + by_other.var(ddof=1) / n_out
            if variance > 0:
                reach = special.ndtri((1 + confidence) / 2) * math.sqrt(variance)
                low, high = max(0.0, self.auc - reach), min(1.0, self.auc + reach)
                return Interval(float(low), float(high), confidence, "DeLong")
        pairs = min(n_in, n_out)
        exact = clopper_pearson(round(self.auc * pairs), pairs, confidence)
        return Interval(exact.low, exact.high, confidence, "Clopper-Pearson over disjoint pairs")

    def tpr_at(self, fpr: float, confidence: float = CONFIDENCE) -> TruePositives:
        """The share of members above the lowest threshold whose empirical FPR is at most fpr.

        Raises:
            TooFewError: where there are fewer than `non_members_needed(fpr, confidence)`.
        """
        n_out, needed = self.non_members.size, non_members_needed(fpr, confidence)
        if n_out < needed:
            raise TooFewError(
                f"TPR at {fpr:.4g} FPR cannot be told from {n_out} non-members: {needed} are needed"
            )
        allowed = math.floor(n_out * fpr + 1e-9)  # 0.29 * 100 is 28.999999999999996
        threshold = float(self.non_members[n_out - 1 - allowed])
        positives = int(self.members.size - np.searchsorted(self.members, threshold, "right"))
        wrong = int(n_out - np.searchsorted(self.non_members, threshold, "right"))
        return TruePositives(
            fpr,
            threshold,
            positives,
            self.members.size,
            wrong,
            n_out,
            clopper_pearson(positives, self.members.size, confidence),
            clopper_pearson(wrong, n_out, confidence),
        )

    def curve(self) -> Curve:
        """Every point the scores give, by falling threshold."""
        thresholds = np.unique(np.concatenate([self.members, self.non_members]))[::-1]
        rates = [
            np.concatenate([[0.0], 1 - np.searchsorted(s, thresholds, "left") / s.size])
            for s in (self.non_members, self.members)
        ]
        return Curve(rates[0], rates[1])


def _paired(scores: npt.ArrayLike, truth: npt.ArrayLike) -> tuple[Floats, Bools]:
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if coins.dtype != np.bool_:
        raise ValueError(f"membership is {coins.dtype}: give booleans")
    if values.ndim != 1 or values.shape != coins.shape:
        raise ValueError(f"scores {values.shape} and membership {coins.shape}: give two of [n]")
    return values, coins


# The one-run bound


def _counts(m: int, r: int, v: int) -> None:
    if not 0 <= v <= r <= m:
        raise ValueError(f"v={v} correct of r={r} guesses on m={m} examples: need 0 <= v <= r <= m")


def p_value(m: int, r: int, v: int, eps: float, delta: float) -> float:
    """The chance of v or more correct guesses if training were (eps, delta)-DP.

    m examples, each included by an independent fair coin; r guesses, the rest abstained; v right.
    Steinke, Nasr and Jagielski 2023, Theorem 5.2 and Appendix D (p_value_DP_audit).

    Formal Guarantees: under (eps, delta)-DP with respect to one example, for guesses that are a
    function of the output and of randomness apart from the coins, P[p_value <= p] <= p.

    Raises:
        ValueError: unless 0 <= v <= r <= m, eps >= 0 and 0 <= delta <= 1.
    """
    _counts(m, r, v)
    if not (eps >= 0 and 0 <= delta <= 1):
        raise ValueError(f"eps={eps}, delta={delta}: need eps >= 0 and 0 <= delta <= 1")
    if v == 0:
        return 1.0
    q = special.expit(eps)  # randomised response tells the truth this often
    beta = float(special.betainc(v, r - v + 1, q))  # P[Binomial(r, q) >= v]
    if delta == 0:
        return beta
    below = np.arange(v - 1, -1, -1)
    # P[v > Binomial(r, q) >= v - i] / i, i = 1 ... v: what a failure of delta buys per example.
    alpha = float((np.cumsum(stats.binom.pmf(below, r, q)) / np.arange(1, v + 1)).max())
    return min(1.0, beta + 2 * m * delta * alpha)


def _largest_rejected(p_of: Callable[[float], float], p: float) -> float:
    """The largest x >= 0 with p_of(x) < p, from below and to 1e-9; 0 where there is none."""
    if p_of(0.0) >= p:
        return 0.0
    low, high = 0.0, 1.0
    while p_of(high) < p:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if p_of(middle) < p else (low, middle)
    return low


@lru_cache(maxsize=1 << 14)  # a calibration asks the same few counts often
def get_eps_audit(m: int, r: int, v: int, delta: float, p: float) -> float:
    """A lower bound on epsilon with confidence 1 - p: training is not (eps, delta)-DP below it.

    m examples, each included by an independent fair coin; r guesses; v of them right.
    Steinke, Nasr and Jagielski 2023, Appendix D; the value is itself a rejected one.

    >>> round(get_eps_audit(1000, 100, 75, 1e-4, 0.05), 3)
    0.673

    Raises:
        ValueError: unless 0 <= v <= r <= m, 0 <= delta <= 1 and 0 < p < 1.
    """
    _counts(m, r, v)
    _probability("p", p)
    return _largest_rejected(lambda eps: p_value(m, r, v, eps, delta), p)


def largest_bound(m: int, r: int, delta: float, p: float) -> float:
    """What r guesses could show at most, all of them right: the detection limit of an audit."""
    return get_eps_audit(m, r, r, delta, p)


def guesses_to_reject(m: int, r: int, eps: float, delta: float, p: float) -> int | None:
    """The fewest right guesses of r that reject (eps, delta)-DP at level p; None where none do."""
    _probability("p", p)
    _counts(m, r, 0)
    if p_value(m, r, r, eps, delta) >= p:
        return None
    low, high = 0, r  # v = low does not reject, v = high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(m, r, middle, eps, delta) < p else (middle, high)
    return high


def power(m: int, r: int, claimed: float, true: float, delta: float, p: float) -> float:
    """The chance that a leak of `true` epsilon is shown to exceed the `claimed` one, at level p.

    For the leakiest (true, 0)-DP training there is, randomised response of every guessed
    example: what really trains leaks less to guesses, so this is what can be hoped for at most.
    """
    if not true >= 0:
        raise ValueError(f"true epsilon is {true}: give 0 or more")
    needed = guesses_to_reject(m, r, claimed, delta, p)
    return 0.0 if needed is None else float(stats.binom.sf(needed - 1, r, special.expit(true)))


def detectable(
    m: int, r: int, claimed: float, delta: float, p: float, chance: float = 0.8
) -> float:
    """The least true epsilon that `power` gives this chance of being seen; inf where none has."""
    _probability("chance", chance)
    if guesses_to_reject(m, r, claimed, delta, p) is None:
        return math.inf
    return _largest_rejected(lambda true: power(m, r, claimed, true, delta, p), chance)


# The one-run bound of a Gaussian trade-off curve


def gaussian_delta(mu: float, eps: float) -> float:
    """The delta of mu-GDP at eps (Dong, Roth and Su 2022, Corollary 1)."""
    if not (mu >= 0 and eps >= 0):
        raise ValueError(f"mu={mu}, eps={eps}: need both 0 or more")
    if mu == 0:
        return 0.0
    up, down = mu / 2 - eps / mu, -mu / 2 - eps / mu
    return float(special.ndtr(up) - math.exp(eps + float(special.log_ndtr(down))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of mu-GDP at delta, rounded down by at most 1e-9."""
    _probability("delta", delta)
    return _largest_rejected(lambda eps: -gaussian_delta(mu, eps), -delta)


def gaussian_mu(eps: float, delta: float) -> float:
    """The largest mu whose mu-GDP implies (eps, delta)-DP, rounded down by at most 1e-9."""
    _probability("delta", delta)
    if eps == math.inf:
        return math.inf
    return _largest_rejected(lambda mu: gaussian_delta(mu, eps), delta)


def _possible(m: int, r: int, v: int, mu: float, tau: float) -> bool:
    """Whether v or more right guesses may have probability tau under mu-GDP."""
    right, wrong, whole = tau * v / m, tau * (r - v) / m, r / m * (1 + 1e-12)
    for i in range(v - 1, -1, -1):
        if right + wrong > whole:
            return False
        least = float(special.ndtr(special.ndtri(right) - mu))  # (1 - f)^-1
        if least > wrong:
            right += i / (r - i) * (least - wrong)
            wrong = least
    return right + wrong <= whole


@lru_cache(maxsize=1 << 14)
def gaussian_p_value(m: int, r: int, v: int, mu: float) -> float:
    """The chance of v or more correct guesses, bounded above, if training were mu-GDP.

    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run" (arXiv
    2410.22235), the recursion over r and h of the authors' PrivacyGuard (rh_with_cap), for the
    trade-off curve f of N(0, 1) against N(mu, 1). With p_j the chance of j right
    guesses, flipping one guessed coin turns "j right, this one too" into "j - 1 right, this one
    wrong", so for every i the sum of j p_j/m over j > i is at most 1 - f of the sum of
    (r - j) p_j/m over j >= i. The recursion finds the least total mass such p_j can have when
    p_v is tau; where that passes 1, tau is impossible.

    Formal Guarantees: as `p_value`, under mu-GDP.

    Raises:
        ValueError: unless 0 <= v <= r <= m and mu >= 0.
    """
    _counts(m, r, v)
    if not mu >= 0:
        raise ValueError(f"mu is {mu}: give 0 or more")
    if v == 0 or mu == math.inf or _possible(m, r, v, mu, 1.0):
        return 1.0
    low, high = -745.0, 0.0  # in logarithms: the tail may be very small
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _possible(m, r, v, mu, math.exp(middle)) else (low, middle)
    return math.exp(high)


@lru_cache(maxsize=1 << 14)
def get_mu_audit(m: int, r: int, v: int, p: float) -> float:
    """A lower bound on mu with confidence 1 - p: training is not mu-GDP below it."""
    _counts(m, r, v)
    _probability("p", p)
    if v == 0:
        return 0.0
    return _largest_rejected(lambda mu: float(_possible(m, r, v, mu, p)), 0.5)


def get_gaussian_eps_audit(m: int, r: int, v: int, delta: float, p: float) -> float:
    """A lower bound on epsilon at delta for a Gaussian trade-off curve, with confidence 1 - p.

    The larger of `get_mu_audit` told as an epsilon and `get_eps_audit`: both bound the same tail
    of v, so the larger needs no correction. Near chance the recursion is the looser of the two
    (it bounds the tail by its first term); from an epsilon of about 1 on it shows far more.

    It is a lower bound where the mechanism's curve is Gaussian: Gaussian noise on what the
    canary adds in full, once or composed. For another curve it is none: read `get_eps_audit`.
    """
    told = gaussian_epsilon(get_mu_audit(m, r, v, p), delta)
    return max(told, get_eps_audit(m, r, v, delta, p))


# From scores to guesses


@dataclass(frozen=True, slots=True)
class Guesses:
    """How many of the highest scores are guessed members, of the lowest non-members."""

    members: int
    non_members: int

    def __post_init__(self) -> None:
        if min(self.members, self.non_members) < 0 or self.total == 0:
            raise ValueError(f"{self.members} and {self.non_members} guesses: 1 in all at least")

    @property
    def total(self) -> int:
        return self.members + self.non_members

    @classmethod
    def even(cls, count: int) -> Guesses:
        """count guesses, half of each kind (the odd one: member)."""
        return cls(count - count // 2, count // 2)


def guess(
    scores: npt.ArrayLike, guesses: Guesses, rng: np.random.Generator
) -> npt.NDArray[np.int8]:
    """int8[m]: 1 guessed member, -1 guessed non-member, 0 abstained (Steinke et al., Algorithm 1).

    Ties are broken by rng: by the order of the rows, a file sorted by membership would win.

    Raises:
        ValueError: where a score is no number; `TooFewError` where guesses outnumber scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"scores {values.shape}: give [m] numbers, none of them NaN")
    if guesses.total > values.size:
        raise TooFewError(
            f"{guesses.total} guesses of {values.size} scores: {guesses.total} scores are needed"
        )
    shuffled = rng.permutation(values.size)
    order = shuffled[np.argsort(values[shuffled], kind="stable")]
    told = np.zeros(values.size, dtype=np.int8)
    told[order[: guesses.non_members]] = -1
    told[order[values.size - guesses.members :]] = 1
    return told


def standard_guesses(m: int) -> tuple[Guesses, ...]:
    """All m examples, a third and a tenth of them, evenly: the spread of one choice of m alone.

    Many guesses see a small leak; few see a large one that touches few examples.
    """
    return tuple(Guesses.even(k) for k in sorted({max(1, m), max(1, m // 3), max(1, m // 10)}))


@dataclass(frozen=True, slots=True)
class Audit:
    """What one run's canaries show. Every figure is corrected for the `tried` ways to guess.

    bound: lower bound on epsilon at delta with `confidence`, for any mechanism.
    gaussian_bound: the same where the trade-off curve is Gaussian (`get_gaussian_eps_audit`);
        not corrected for standing beside `bound`: name beforehand which of the two is read.
    p_value: of the claim that training is (claimed, delta)-DP; gaussian_p_value: of the same
        claim where the trade-off curve is Gaussian.
    limit: the largest bound these guesses could have shown.
    m, r, v: canaries, guesses and right guesses of the way that gave the bound.
    """

    bound: float
    gaussian_bound: float
    claimed: float
    p_value: float
    gaussian_p_value: float
    limit: float
    delta: float
    confidence: float
    m: int
    r: int
    v: int
    guesses: Guesses
    tried: int

    @property
    def alarm(self) -> bool:
        """Whether the claim is refuted with the stated confidence."""
        return self.p_value < 1 - self.confidence

    @property
    def accuracy(self) -> Interval:
        """Of the guesses that gave the bound; uncorrected, to describe and not to decide."""
        return clopper_pearson(self.v, self.r, self.confidence)


def audit(
    scores: npt.ArrayLike,
    coins: npt.ArrayLike,
    delta: float,
    claimed: float,
    *,
    rng: np.random.Generator,
    confidence: float = CONFIDENCE,
    guesses: Sequence[Guesses] = (),
) -> Audit:
    """The one-run audit of scores float64[m] against the coins bool[m] that chose the canaries.

    claimed: the ledger's epsilon at delta; math.inf where nothing is claimed.
    guesses: the ways to guess, fixed before anything is looked at; `standard_guesses(m)` where
    none is given. Each gets an equal share of 1 - confidence (Bonferroni).

    Formal Guarantees: if training is (eps, delta)-DP in each canary, the coins are independent
    and fair and the scores know nothing of them but the run's output, then bound > eps with
    probability at most 1 - confidence; so is an alarm where eps <= claimed.

    Raises:
        ValueError: for scores or coins that do not fit; `TooFewError` for too few of them.
    """
    _probability("confidence", confidence)
    values, truth = _paired(scores, coins)
    m = values.size
    if m == 0:
        raise TooFewError("no canaries are scored: 1 at least is needed")
    ways = tuple(guesses) or standard_guesses(m)
    p = (1 - confidence) / len(ways)
    mu = gaussian_mu(claimed, delta) if delta else 0.0
    found = []
    for way in ways:
        told = guess(values, way, rng)
        r, v = way.total, int(((told == 1) & truth).sum() + ((told == -1) & ~truth).sum())
        found.append(
            (
                get_eps_audit(m, r, v, delta, p),
                -p_value(m, r, v, claimed, delta),
                get_gaussian_eps_audit(m, r, v, delta, p) if delta else 0.0,
                -min(p_value(m, r, v, claimed, delta), gaussian_p_value(m, r, v, mu))
                if delta
                else -1.0,
                largest_bound(m, r, delta, p),
                v,
                way,
            )
        )
    best = max(found, key=lambda one: one[:2])
    return Audit(
        bound=best[0],
        gaussian_bound=max(one[2] for one in found),
        claimed=claimed,
        p_value=min(1.0, -len(ways) * max(one[1] for one in found)),
        gaussian_p_value=min(1.0, -len(ways) * max(one[3] for one in found)),
        limit=max(one[4] for one in found),
        delta=delta,
        confidence=confidence,
        m=m,
        r=best[6].total,
        v=best[5],
        guesses=best[6],
        tried=len(ways),
    )


# Estimates


@dataclass(frozen=True, slots=True)
class Estimate:
    """A guess at epsilon from n canaries. It is no bound: it may lie above the truth or below.

    With few canaries it lies above: the fitted deviation's error is read as leakage. Where 3 is
    true (sigma 1.54, delta 1e-6), the mean over 60 simulations was 5.7 of 50 canaries, 3.9 of
    250, 3.4 of 1,000 and 3.2 of 4,000.
    """

    epsilon: float
    delta: float
    n: int
    method: str


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution.

    Raises:
        ValueError: unless both are finite and deviation > 0.
    """

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.deviation < math.inf):
            raise ValueError(f"N({self.mean}, {self.deviation}^2): need finite, deviation > 0")

    @classmethod
    def fit(cls, samples: npt.ArrayLike) -> Normal:
        """The sample's mean and standard deviation (n - 1).

        Raises:
            TooFewError: for less than two samples.
        """
        values = np.asarray(samples, dtype=np.float64)
        if values.size < 2:
            raise TooFewError(f"{values.size} samples fix no spread: 2 at least are needed")
        return cls(float(values.mean()), float(values.std(ddof=1)))

    @classmethod
    def of_random_cosines(cls, dimension: int) -> Normal:
        """Cosines of a fixed vector with uniform ones: N(0, 1/dimension), for many dimensions."""
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}: give 1 or more")
        return cls(0.0, 1 / math.sqrt(dimension))


def _hockey_stick(p: Normal, q: Normal, eps: float) -> float:
    """sup over sets of P(set) - e^eps Q(set), exactly: the set where log p/q > eps."""
    s, shift = p.deviation / q.deviation, (p.mean - q.mean) / q.deviation  # q becomes N(0, 1)
    # log p/q - eps = a x^2 + b x + c
    a, b = (1 - 1 / s**2) / 2, shift / s**2
    c = -(shift**2) / (2 * s**2) - math.log(s) - eps
    disc = b * b - 4 * a * c
    if disc <= 0:
        return 0.0
    half = -(b + math.copysign(math.sqrt(disc), b)) / 2
    ends = sorted([half / a, c / half] if a else [c / half])

    def between(low: float, high: float) -> float:
        def mass(low: float, high: float) -> float:
            if low > 0:
                low, high = -high, -low
            return float(special.ndtr(high) - special.ndtr(low))

        rest = mass(low, high)
        inside = mass((low - shift) / s, (high - shift) / s)
        return inside - (math.exp(min(0.0, eps + math.log(rest))) if rest > 0 else 0.0)

    if a == 0:
        return between(ends[0], math.inf) if b > 0 else between(-math.inf, ends[0])
    if a < 0:
        return between(ends[0], ends[1])
    return between(-math.inf, ends[0]) + between(ends[1], math.inf)


def normal_epsilon(p: Normal, q: Normal, delta: float) -> float:
    """The least epsilon at which p and q are (epsilon, delta)-indistinguishable, both ways."""
    _probability("delta", delta)
    return _largest_rejected(
        lambda eps: -max(_hockey_stick(p, q, eps), _hockey_stick(q, p, eps)), -delta
    )


def estimate_epsilon(observed: npt.ArrayLike, null: Normal, delta: float) -> Estimate:
    """Epsilon as the cosines of inserted canaries with the model's change suggest it.

    observed: float64[n] cosines of the canaries that were inserted. null: what canaries that
    were not inserted give: `Normal.of_random_cosines(d)`, or `Normal.fit` of held-out canaries'
    cosines. Andrew et al. 2023, "One-shot empirical privacy estimation for federated learning"
    (arXiv 2302.03098), Algorithm 1: a normal is fitted to the observed; asymptotically right for
    the Gaussian mechanism with canaries uniform on the sphere, a guess for anything else.

    Raises:
        TooFewError: for less than two canaries.
    """
    values = np.asarray(observed, dtype=np.float64)
    epsilon = normal_epsilon(Normal.fit(values), null, delta)
    return Estimate(epsilon, delta, values.size, "Andrew et al. 2023, fitted normals")
