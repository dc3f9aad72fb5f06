"""Tallies: figures of pooled test rows from sums, bounded by what one row may add."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import beta, binom, norm
from sklearn import metrics

from securefl.tallies import GROUPS, LOSS_CAP, NOISY_BINS, NOISY_BITS, Figures, Tally, usual_bins

NOISY = Tally(2, bins=usual_bins(2, exact=False), bits=NOISY_BITS)
SEEDS = st.integers(0, 2**32 - 1)
TALLIES = (
    Tally(2, threshold=0.3),
    NOISY,
    Tally(3, bits=NOISY_BITS),
    Tally(10),
    Tally(0, target_range=(0.0, 40.0)),
    Tally(0, target_range=(-1.0, 1.0), bits=NOISY_BITS),
)


def logits(margin: Any) -> Any:
    margin = np.asarray(margin, np.float64)
    return np.stack([np.zeros_like(margin), margin], 1)


def cross_entropy(margin: Any, target: Any) -> Any:
    return np.logaddexp(0, -np.asarray(margin) * (2 * np.asarray(target) - 1))


def tallied(tally: Tally, margin: Any, target: Any) -> Any:
    """The sum of two-class rows."""
    return tally.encode(logits(margin), cross_entropy(margin, target), np.asarray(target))


def drawn(tally: Tally, rows: int, seed: int) -> tuple[Any, Any, Any]:
    """Outputs, losses and targets of any task, far-off ones among them."""
    random = np.random.default_rng(seed)
    outputs = random.normal(0, 10.0 ** random.uniform(-2, 2), (rows, tally.classes or 1))
    losses = random.exponential(2, rows)
    if tally.classes:
        return outputs, losses, random.integers(0, tally.classes, rows)
    return outputs, losses, random.uniform(-1, 1, rows)


# What sums tell is what pooled rows tell.


@pytest.mark.parametrize("tally", TALLIES)
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_division_of_the_rows_gives_the_same_sum(
    tally: Tally, seed: int, cuts: list[int]
) -> None:
    """Bit for bit, sites without rows included."""
    outputs, losses, target = drawn(tally, 60, seed)
    edges = [0, *sorted(cuts), 60]
    shares = np.full(60, 1 / 3)
    for share in (None, shares):
        pooled = tally.encode(outputs, losses, target, share)
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        sites = [
            tally.encode(outputs[p], losses[p], target[p], None if share is None else share[p])
            for p in parts
        ]
        assert pooled.shape == (tally.dimension,)
        assert pooled.dtype == np.int64
        assert (np.sum(sites, 0) == pooled).all()


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.83])
@settings(max_examples=25)
@given(seed=SEEDS, rate=st.floats(0.1, 0.9))
def test_two_classes_give_scikit_learns_figures_of_the_pooled_rows(
    threshold: float, seed: int, rate: float
) -> None:
    random = np.random.default_rng(seed)
    target = np.concatenate([[0, 1], random.random(298) < rate]).astype(np.int64)
    margin = random.normal(target * random.uniform(0, 4), 1)
    tally = Tally(2, threshold=threshold)
    got = tally.figures(tallied(tally, margin, target)).values
    chance = expit(margin)
    chosen = chance >= threshold
    assert got["test_auc"] == pytest.approx(metrics.roc_auc_score(target, margin), abs=0.002)
    exact = {
        "test_accuracy": metrics.accuracy_score(target, chosen),
        "test_sensitivity": metrics.recall_score(target, chosen),
        "test_specificity": metrics.recall_score(1 - target, ~chosen),
        "test_balanced_accuracy": metrics.balanced_accuracy_score(target, chosen),
    }
    for name, figure in exact.items():
        assert got[name] == pytest.approx(figure, abs=1e-12), name
    assert got["test_brier"] == pytest.approx(metrics.brier_score_loss(target, chance), abs=4e-6)
    assert got["test_loss"] == pytest.approx(metrics.log_loss(target, chance), abs=3e-5)
    precision = metrics.average_precision_score(target, margin)
    assert got["test_average_precision"] == pytest.approx(precision, abs=0.01)


@settings(max_examples=25)
@given(SEEDS, st.integers(3, 6))
def test_more_classes_give_scikit_learns_figures_of_the_pooled_rows(seed: int, kinds: int) -> None:
    random = np.random.default_rng(seed)
    target = np.concatenate([np.arange(kinds), random.integers(0, kinds, 3000)])
    outputs = random.normal(0, 1, (len(target), kinds)) + 1.5 * np.eye(kinds)[target]
    tally = Tally(kinds, bins=usual_bins(kinds, exact=True))
    figures = tally.figures(tally.encode(outputs, np.zeros(len(target)), target))
    chosen = outputs.argmax(1)
    assert figures.values["test_accuracy"] == pytest.approx((chosen == target).mean(), abs=1e-12)
    recalls = metrics.recall_score(target, chosen, average=None)
    assert figures.recalls == pytest.approx(tuple(recalls), abs=1e-12)
    assert figures.values["test_balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-12)
    assert "test_auc" not in figures.values
    assert not figures.roc
    chance = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    error = calibration_error(chance.max(1), chosen == target)
    assert figures.values["test_calibration_error"] == pytest.approx(error, abs=6e-3)


@settings(max_examples=25)
@given(SEEDS)
def test_the_calibration_curve_is_that_of_the_pooled_rows(seed: int) -> None:
    """But for the few rows in the bins that two groups divide."""
    random = np.random.default_rng(seed)
    margin = random.normal(0, 2, 4000)
    target = (random.random(4000) < expit(0.6 * margin)).astype(np.int64)
    figures = Tally(2).figures(tallied(Tally(2), margin, target))
    chance = expit(margin)
    error = calibration_error(chance, target)
    assert figures.values["test_calibration_error"] == pytest.approx(error, abs=2e-3)
    group = np.minimum((chance * GROUPS).astype(int), GROUPS - 1)
    expected = [
        (chance[group == g].mean(), target[group == g].mean(), (group == g).mean())
        for g in range(GROUPS)
    ]
    got = np.array(figures.calibration) / [1, 1, 4000]
    assert got == pytest.approx(np.array(expected), abs=0.01)


def calibration_error(chance: Any, hit: Any) -> float:
    """By its definition, row by row."""
    group = np.minimum((chance * GROUPS).astype(int), GROUPS - 1)
    return sum(abs(chance[group == g].sum() - hit[group == g].sum()) for g in range(GROUPS)) / len(
        chance
    )


@settings(max_examples=25)
@given(SEEDS)
def test_regression_gives_scikit_learns_figures_in_the_targets_own_units(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.uniform(-0.9, 0.9, 300)
    guess = 0.7 * target + random.normal(0.1, 0.2, 300)
    tally = Tally(0, target_range=(10.0, 50.0))
    losses = (guess - target) ** 2
    figures = tally.figures(tally.encode(guess[:, None], losses, target))
    truth, said = 30 + 20 * target, 30 + 20 * guess
    expected = {
        "test_mse": metrics.mean_squared_error(truth, said),
        "test_rmse": metrics.root_mean_squared_error(truth, said),
        "test_mae": metrics.mean_absolute_error(truth, said),
        "test_r2": metrics.r2_score(truth, said),
        "test_bias": float((said - truth).mean()),
        "test_loss": float(losses.mean()),
    }
    assert set(figures.values) == set(expected)
    for name, figure in expected.items():
        assert figures.values[name] == pytest.approx(figure, rel=1e-3, abs=1e-3), name


LAWS = {
    "normal": lambda random, n: random.normal(size=n),
    "skewed": lambda random, n: random.exponential(size=n) - 1,
    "skewed downwards": lambda random, n: 1 - random.exponential(size=n),
    "heavy-tailed": lambda random, n: random.standard_t(2, size=n),
    "two humps": lambda random, n: random.normal(3 * random.integers(0, 2, n) - 1.5, 0.3),
}


@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=25)
@given(SEEDS, st.floats(0.05, 5), st.floats(-1, 1), st.floats(0, 3), st.floats(0.3, 0.7))
def test_the_area_under_the_curve_is_within_two_thousandths(
    law: str, seed: int, scale: float, offset: float, apart: float, threshold: float
) -> None:
    """Of the exact one, whatever the scores look like, and wherever they lie."""
    random = np.random.default_rng(seed)
    target = random.integers(0, 2, 2000)
    far = offset * min(6, 1 + 20 * scale)
    margin = far + scale * (LAWS[law](random, 2000) + apart * target)
    tally = Tally(2, threshold=threshold)
    got = tally.figures(tallied(tally, margin, target)).values["test_auc"]
    assert got == pytest.approx(metrics.roc_auc_score(target, margin), abs=0.002)


@settings(max_examples=25)
@given(SEEDS, st.floats(0.01, 0.99))
def test_a_site_alone_has_the_same_figures_on_a_finer_grid(seed: int, threshold: float) -> None:
    random = np.random.default_rng(seed)
    target = np.concatenate([[0, 1], random.integers(0, 2, 100)])
    margin = random.normal(target, 1)
    tally = Tally(2, bins=NOISY_BINS, bits=NOISY_BITS, threshold=threshold)
    losses = cross_entropy(margin, target)
    own = tally.local(logits(margin), losses, target)
    shared = tally.figures(tally.encode(logits(margin), losses, target))
    assert set(own.values) == set(shared.values)
    assert own.exact
    assert own.values["test_auc"] == pytest.approx(metrics.roc_auc_score(target, margin), abs=2e-3)
    assert own.values["test_loss"] == pytest.approx(losses.mean(), abs=1e-7)
    assert own.values["test_accuracy"] == pytest.approx(shared.values["test_accuracy"], abs=1e-12)


# What one row, or one person, may add.


def extremes(tally: Tally) -> tuple[Any, Any, Any]:
    """Rows as far out as floats go, in every combination."""
    wild = np.array([0.0, 1e-9, -3.0, 1e300, -1e300, 1.8e308, math.inf, -math.inf, math.nan])
    kinds = tally.classes or 1
    outputs = np.array(list(itertools.product(wild, repeat=min(kinds, 3))))
    outputs = np.pad(outputs, ((0, 0), (0, kinds - outputs.shape[1])))
    goals = np.arange(kinds) if tally.classes else np.array([-1.0, -0.3, 0.0, 1.0, 1e9])
    hurt = np.array([0.0, 3.3, LOSS_CAP, -1.0, 1e308, math.inf, -math.inf, math.nan])
    places = np.array(list(itertools.product(range(len(outputs)), range(len(goals)), range(8))))
    return outputs[places[:, 0]], hurt[places[:, 2]], goals[places[:, 1]]


@pytest.mark.parametrize("tally", TALLIES)
def test_no_row_however_wild_moves_the_sum_by_more_than_the_sensitivity(tally: Tally) -> None:
    """Nor does it make a figure that is no number; and some row comes near the bound."""
    outputs, losses, target = extremes(tally)
    most = 0.0
    for row in range(0, len(target), max(1, len(target) // 1500)):
        one = slice(row, row + 1)
        moved = tally.encode(outputs[one], losses[one], target[one])
        most = max(most, float(np.linalg.norm(moved.astype(np.float64))))
    assert 0.85 * tally.sensitivity < most <= tally.sensitivity
    assert tally.figures(tally.encode(outputs, losses, target)).rows == len(target)


@pytest.mark.parametrize("tally", TALLIES)
@given(seed=SEEDS, rows=st.integers(1, 40), alike=st.booleans())
def test_no_person_moves_the_sum_by_more_than_the_sensitivity(
    tally: Tally, seed: int, rows: int, alike: bool
) -> None:
    """However many rows a person has, and however alike they are."""
    outputs, losses, target = drawn(tally, rows, seed)
    if alike:
        outputs, losses, target = (
            np.repeat(part[:1], rows, 0) for part in (outputs, losses, target)
        )
        losses = np.full(rows, LOSS_CAP)
    moved = tally.encode(outputs, losses, target, np.full(rows, 1 / rows))
    assert np.linalg.norm(moved.astype(np.float64)) <= tally.sensitivity


@pytest.mark.parametrize("tally", TALLIES)
def test_the_rows_that_fit_a_slot_never_leave_it(tally: Tally) -> None:
    outputs, losses, target = (part[:1] for part in extremes(tally))
    most = np.abs(tally.encode(outputs, losses, target)).max()
    fit = tally.rows(46)
    assert fit * int(most) < 1 << 45
    assert (fit + 1) * (1 << tally.bits) > (1 << 45) - 1


def test_people_count_once_each() -> None:
    """Three rows of one person and one of another weigh the same."""
    tally = Tally(2)
    margin, target = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1, 1, 1, 0])
    share = np.array([1 / 3, 1 / 3, 1 / 3, 1.0])
    total = tally.encode(logits(margin), cross_entropy(margin, target), target, share)
    figures = tally.figures(total)
    assert figures.rows == pytest.approx(2, abs=1e-4)
    assert figures.values["test_accuracy"] == pytest.approx(0.5, abs=1e-4)


# Intervals.


def test_the_interval_of_a_share_is_jeffreys() -> None:
    """Checked against the beta quantiles of Brown, Cai and DasGupta 2001, here for 27 of 30."""
    target = np.ones(30, np.int64)
    margin = np.where(np.arange(30) < 27, 1.0, -1.0)
    low, high = Tally(2).figures(tallied(Tally(2), margin, target)).intervals["test_accuracy"]
    assert (low, high) == pytest.approx(tuple(beta(27.5, 3.5).ppf([0.025, 0.975])), abs=1e-9)


def test_the_interval_of_the_area_agrees_with_a_bootstrap_of_the_rows() -> None:
    random = np.random.default_rng(3)
    target = np.repeat([0, 1], [140, 60])
    margin = random.normal(1.2 * target, 1)
    low, high = Tally(2).figures(tallied(Tally(2), margin, target)).intervals["test_auc"]
    beaten = margin[target == 1][:, None] > margin[target == 0]
    drawn = [
        beaten[random.integers(0, 60, 60)][:, random.integers(0, 140, 140)].mean()
        for _ in range(2000)
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_no_interval_of_a_share_shrinks_to_a_point() -> None:
    """Twenty rows, all of them right and well apart, prove no perfection."""
    target = np.repeat([0, 1], 10)
    figures = Tally(2).figures(tallied(Tally(2), 8.0 * target - 4, target))
    for name in ("test_auc", "test_accuracy", "test_sensitivity", "test_balanced_accuracy"):
        low, high = figures.intervals[name]
        assert figures.values[name] == high == 1
        assert 0.6 < low < 0.95, name


@pytest.mark.parametrize("deviations", [0.0, 1.5])
@pytest.mark.parametrize("apart", [0.5, 1.5])
def test_intervals_hold_the_truth_in_about_95_of_100_consortia(
    apart: float, deviations: float
) -> None:
    """Of 300 simulated ones: so few as this only in one of 10,000 tests if 94 % is right."""
    random = np.random.default_rng(int(10 * (apart + deviations)))
    tally = NOISY if deviations else Tally(2, bins=1024)
    deviation = deviations * tally.sensitivity
    truth = {
        "test_auc": norm.cdf(apart / math.sqrt(2)),
        "test_sensitivity": norm.cdf(apart / 2),
        "test_specificity": norm.cdf(apart / 2),
        "test_balanced_accuracy": norm.cdf(apart / 2),
        "test_accuracy": norm.cdf(apart / 2),
    }
    held = dict.fromkeys(truth, 0)
    for _ in range(300):
        target = (random.random(600) < 0.3).astype(np.int64)
        margin = random.normal(apart * (target - 0.5), 1)
        noise = np.rint(random.normal(0, deviation, tally.dimension)).astype(np.int64)
        figures = tally.figures(tallied(tally, margin, target) + noise, deviation)
        for name, figure in truth.items():
            low, high = figures.intervals[name]
            held[name] += low <= figure <= high
    for name, count in held.items():
        assert binom.cdf(count, 300, 0.94) > 1e-4, (name, count)
        assert count < 300 or deviations, name


@pytest.mark.parametrize("deviations", [0.0, 1.5])
def test_intervals_of_a_regression_hold_the_truth_in_about_95_of_100(deviations: float) -> None:
    random = np.random.default_rng(9)
    tally = Tally(0, target_range=(0.0, 2.0), bits=NOISY_BITS)
    deviation = deviations * tally.sensitivity
    truth = {"test_mse": 0.05, "test_bias": 0.1, "test_r2": 1 - 0.05 / (0.25 / 3), "test_loss": 0.5}
    held = dict.fromkeys(truth, 0)
    for _ in range(300):
        target = random.uniform(-0.5, 0.5, 2000)
        guess = target + 0.1 + random.normal(0, 0.2, 2000)
        losses = random.uniform(0, 1, 2000)
        noise = np.rint(random.normal(0, deviation, tally.dimension)).astype(np.int64)
        figures = tally.figures(tally.encode(guess[:, None], losses, target) + noise, deviation)
        for name, figure in truth.items():
            low, high = figures.intervals[name]
            held[name] += low <= figure <= high
    for name, count in held.items():
        assert binom.cdf(count, 300, 0.94) > 1e-4, (name, count)


# Figures of noise, and of nothing.


@pytest.mark.parametrize("tally", TALLIES)
@given(seed=SEEDS, size=st.floats(0, 12), deviation=st.floats(0, 1e9))
def test_whatever_the_sum_there_is_no_figure_that_is_no_number(
    tally: Tally, seed: int, size: float, deviation: float
) -> None:
    """Nor one outside its domain: `Figures` refuses what is not finite."""
    random = np.random.default_rng(seed)
    total = random.normal(0, 10.0**size, tally.dimension).astype(np.int64)
    figures = tally.figures(total, deviation)
    for name, value in figures.values.items():
        if name not in ("test_r2", "test_bias"):
            assert value >= 0, name
        if tally.classes and name != "test_loss":
            assert value <= 1, name
    assert msgspec.json.decode(msgspec.json.encode(figures), type=Figures) == figures


@given(SEEDS)
def test_what_noise_hides_is_absent(seed: int) -> None:
    """Forty rows under noise of hundreds: no area, no recalls."""
    random = np.random.default_rng(seed)
    target = random.integers(0, 2, 40)
    deviation = 300 * NOISY.sensitivity
    noise = np.rint(random.normal(0, deviation, NOISY.dimension)).astype(np.int64)
    figures = NOISY.figures(tallied(NOISY, random.normal(target, 1), target) + noise, deviation)
    assert "test_auc" not in figures.values
    assert not figures.roc


@pytest.mark.parametrize("tally", TALLIES)
def test_no_rows_give_no_figures(tally: Tally) -> None:
    outputs, losses, target = drawn(tally, 0, 1)
    total = tally.encode(outputs, losses, target)
    assert not total.any()
    assert tally.figures(total) == Figures(0.0, {}, {})


def test_a_class_without_rows_leaves_out_what_needs_it() -> None:
    figures = Tally(2).figures(tallied(Tally(2), [1.0, -1.0], [1, 1]))
    assert figures.values["test_sensitivity"] == 0.5
    assert not {"test_auc", "test_specificity", "test_balanced_accuracy"} & set(figures.values)
    assert figures.recalls == (None, 0.5)


def test_without_spread_in_the_target_no_share_of_it_is_explained() -> None:
    tally = Tally(0, target_range=(0.0, 1.0))
    figures = tally.figures(tally.encode(np.full((9, 1), 0.5), np.zeros(9), np.full(9, 0.25)))
    assert "test_r2" not in figures.values
    assert figures.values["test_mae"] == pytest.approx(0.125, abs=1e-6)


def test_noise_is_told_from_none() -> None:
    target = np.tile([0, 1], 500)
    total = tallied(NOISY, np.where(target, 1.0, -1.0), target)
    assert NOISY.figures(total).exact
    assert not NOISY.figures(total, 1.0).exact


def test_rows_that_cannot_be_predicted_count_as_wrong_as_can_be() -> None:
    """A diverged model must not look better than one that always errs."""
    target = np.array([0, 1, 0, 1])
    lost = np.full((4, 2), math.nan)
    figures = Tally(2).figures(Tally(2).encode(lost, np.full(4, math.nan), target))
    assert figures.values["test_accuracy"] == figures.values["test_auc"] == 0
    assert figures.values["test_brier"] == 1
    assert figures.values["test_loss"] == LOSS_CAP


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"classes": 1}, "classes = 1"),
        ({"classes": 2, "target_range": (0.0, 1.0)}, "belongs to regression"),
        ({"classes": 0}, "needs it"),
        ({"classes": 0, "target_range": (1.0, 0.0)}, "lower bound first"),
        ({"classes": 2, "bins": 15}, "even number"),
        ({"classes": 2, "threshold": 1.0}, "threshold = 1"),
        ({"classes": 2, "bits": 60}, "bits = 60"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tally(**values)


def test_arrays_that_do_not_fit_are_refused() -> None:
    tally = Tally(2)
    two = np.zeros(2)
    with pytest.raises(ValueError, match="do not fit 2 targets"):
        tally.encode(np.zeros((2, 3)), two, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="a class outside 0 to 1"):
        tally.encode(np.zeros((2, 2)), two, np.array([0, 2]))
    with pytest.raises(ValueError, match=r"one number in \(0, 1\]"):
        tally.encode(np.zeros((2, 2)), two, np.zeros(2, np.int64), two)
    with pytest.raises(ValueError, match="total has shape"):
        tally.figures(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="deviation = nan"):
        tally.figures(np.zeros(tally.dimension, np.int64), math.nan)


@pytest.mark.parametrize(
    "values",
    [
        {"rows": math.inf},
        {"rows": -1.0},
        {"values": {"test_auc": math.nan}},
        {"intervals": {"test_auc": (0.1, 0.2)}},
        {"values": {"test_auc": 0.3}, "intervals": {"test_auc": (0.1, 0.2)}},
        {"roc": ((0.0, 1.5),)},
    ],
)
def test_figures_that_no_sums_give_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"finite|hold|between"):
        Figures(**{"rows": 1.0, "values": {}, "intervals": {}} | values)
