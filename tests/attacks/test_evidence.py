"""attacks.evidence: its figures against other routes to them, and its promises by simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats
from sklearn.metrics import roc_auc_score, roc_curve

from attacks import evidence
from attacks.evidence import Guesses, Normal, Roc, TooFewError

RUNS = 500


def consistent(errors: int, runs: int, promised: float) -> bool:
    """Whether so many errors are no surprise where each run errs with at most this chance."""
    return float(stats.binom.sf(errors - 1, runs, promised)) > 1e-3


# Intervals


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (7, 900)])
def test_clopper_pearson_is_scipys(successes: int, n: int, confidence: float) -> None:
    ours = evidence.clopper_pearson(successes, n, confidence)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("q", [0.001, 0.1, 0.37, 0.5, 0.93])
def test_clopper_pearson_covers_every_proportion_summed_over_all_outcomes(q: float) -> None:
    n = 25
    chances = stats.binom.pmf(np.arange(n + 1), n, q)
    hits = [q in evidence.clopper_pearson(k, n, 0.9) for k in range(n + 1)]
    assert chances[hits].sum() >= 0.9


@pytest.mark.parametrize(("successes", "n"), [(2, 1), (-1, 4), (0, 0)])
def test_counts_that_cannot_be_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {n} trials"):
        evidence.clopper_pearson(successes, n)


def test_an_interval_cannot_be_upside_down() -> None:
    with pytest.raises(ValueError, match="low end"):
        evidence.Interval(0.6, 0.5, 0.95, "none")


def test_the_bootstrap_resamples_each_sample_by_itself_and_is_told_by_its_seed() -> None:
    ones, zeros = np.ones(7), np.zeros(3)
    sizes = set()

    def statistic(a: np.ndarray, b: np.ndarray) -> float:
        sizes.add((a.size, b.size, a.min(), b.max()))
        return float(a.mean() - b.mean())

    interval = evidence.bootstrap(statistic, ones, zeros, rng=np.random.default_rng(0))
    assert sizes == {(7, 3, 1.0, 0.0)}
    assert (interval.low, interval.high) == (1.0, 1.0)
    values = np.random.default_rng(1).normal(size=200)
    one, again, other = (
        evidence.bootstrap(np.mean, values, rng=np.random.default_rng(seed)) for seed in (2, 2, 3)
    )
    assert one == again != other


def test_the_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(5).normal(size=400)
    ours = evidence.bootstrap(np.mean, values, rng=np.random.default_rng(6), resamples=4000)
    reach = 1.96 * values.std() / 20
    assert ours.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert ours.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_the_bootstrap_refuses_what_gives_no_number() -> None:
    with pytest.raises(ValueError, match="no number"):
        evidence.bootstrap(lambda _: math.nan, np.ones(3), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs samples"):
        evidence.bootstrap(np.mean, np.ones(0), rng=np.random.default_rng(0))


# ROC


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60).filter(
        lambda rows: len({truth for _, truth in rows}) == 2
    )
)
def test_auc_and_curve_are_scikit_learns_with_ties_counted_half(rows: list) -> None:
    scores = np.array([score for score, _ in rows], dtype=float)
    member = np.array([truth for _, truth in rows])
    roc = Roc.of(scores, member)
    assert roc.auc == pytest.approx(roc_auc_score(member, scores), abs=1e-12)
    assert roc.auc in roc.auc_interval()
    curve = roc.curve()
    fpr, tpr, _ = roc_curve(member, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.fpr, fpr)
    np.testing.assert_allclose(curve.tpr, tpr)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(roc.auc)


def test_a_thinned_curve_keeps_its_ends_and_its_lowest_rates() -> None:
    rng = np.random.default_rng(4)
    whole = Roc(rng.normal(1, 1, 5000), rng.normal(0, 1, 5000)).curve()
    thin = whole.thinned(400)
    assert 200 < thin.fpr.size <= 400
    assert (thin.fpr[0], thin.tpr[0], thin.fpr[-1], thin.tpr[-1]) == (0, 0, 1, 1)
    assert {1 / 5000, 2 / 5000, 3 / 5000} <= set(thin.fpr.round(9))
    assert set(zip(thin.fpr, thin.tpr, strict=True)) <= set(zip(whole.fpr, whole.tpr, strict=True))
    assert np.interp(0.1, thin.fpr, thin.tpr) == pytest.approx(
        np.interp(0.1, whole.fpr, whole.tpr), abs=0.01
    )
    assert thin.thinned(400) is thin


@pytest.mark.parametrize("shift", [0.0, 0.8, 2.0])
def test_delong_covers_the_true_auc_as_often_as_it_says(shift: float) -> None:
    rng = np.random.default_rng(11)
    true = float(special.ndtr(shift / math.sqrt(2)))
    missed = sum(
        true not in Roc(rng.normal(shift, 1, 80), rng.normal(0, 1, 120)).auc_interval(0.9)
        for _ in range(400)
    )
    assert consistent(missed, 400, 0.12)  # asymptotic: two points more than it says
    assert missed >= 400 * 0.05  # and not by being wide


def test_delongs_interval_is_its_definition_over_all_pairs() -> None:
    rng = np.random.default_rng(12)
    members, others = rng.normal(1, 1, 20).round(1), rng.normal(0, 1, 300).round(1)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    error = math.sqrt(wins.mean(1).var(ddof=1) / 20 + wins.mean(0).var(ddof=1) / 300)
    interval = Roc(members, others).auc_interval()
    assert interval.method == "DeLong"
    assert interval.low == pytest.approx(wins.mean() - 1.959964 * error, abs=1e-6)
    assert interval.high == pytest.approx(wins.mean() + 1.959964 * error, abs=1e-6)


def test_perfect_separation_is_no_certainty() -> None:
    interval = Roc(np.arange(10, 30), np.arange(10)).auc_interval()
    assert interval.high == 1
    assert interval.low == evidence.clopper_pearson(10, 10).low < 0.75


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.05, 0.1, 0.5]), st.booleans())
def test_tpr_is_read_at_the_lowest_threshold_that_keeps_the_fpr(
    seed: int, fpr: float, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    members, others = rng.normal(1, 1, 200), rng.normal(0, 1, 400)
    if ties:
        members, others = members.round(), others.round()
    found = Roc(members, others).tpr_at(fpr)
    assert found.false_positives == (others > found.threshold).sum() <= fpr * 400
    assert found.positives == (members > found.threshold).sum()
    lower = others[others < found.threshold]
    assert lower.size == 0 or (others > lower.max()).sum() > fpr * 400
    assert found.rate in found.interval
    assert found.interval == evidence.clopper_pearson(found.positives, 200)


def test_a_tpr_that_the_non_members_cannot_support_is_refused_with_the_number_that_could() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(TooFewError, match=r"0\.001 FPR .* 2994 non-members: 2995 are needed"):
        Roc(rng.normal(size=50), rng.normal(size=2994)).tpr_at(0.001)
    found = Roc(rng.normal(size=50), rng.normal(size=2995)).tpr_at(0.001)
    assert found.false_positives == 2


@given(st.floats(1e-4, 0.9), st.floats(0.5, 0.999))
def test_with_the_number_needed_a_threshold_can_be_shown_to_keep_the_rate_and_not_with_one_less(
    fpr: float, confidence: float
) -> None:
    n = evidence.non_members_needed(fpr, confidence)
    assert 1 - (1 - confidence) ** (1 / n) <= fpr * (1 + 1e-9)
    assert n == 1 or 1 - (1 - confidence) ** (1 / (n - 1)) > fpr * (1 - 1e-9)


@pytest.mark.parametrize(
    ("scores", "member", "says"),
    [
        ([0.1, 0.2], [True, True], "no non-members"),
        ([0.1, math.nan], [True, False], "no number"),
        ([0.1, 0.2], [1, 0], "give booleans"),
        ([0.1, 0.2, 0.3], [True, False], "give two of"),
    ],
)
def test_scores_that_make_no_roc_are_refused(scores: list, member: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Roc.of(scores, np.array(member))


# The one-run bound

PUBLISHED = [  # m, r, v, delta, p, epsilon as printed
    (1000, 100, 75, 1e-4, 0.05, 0.673),  # Steinke, Nasr and Jagielski 2023, Appendix D
    (100_000, 1510, 1439, 1e-5, 0.05, 2.675),  # ibid., Section 7: truncated from 2.67585
]


@pytest.mark.parametrize(("m", "r", "v", "delta", "p", "printed"), PUBLISHED)
def test_the_bound_is_the_papers(
    m: int, r: int, v: int, delta: float, p: float, printed: float
) -> None:
    assert evidence.get_eps_audit(m, r, v, delta, p) == pytest.approx(printed, abs=1e-3)


def exact_p_value(m: int, r: int, v: int, odds: int, delta: Fraction) -> Fraction:
    """Theorem 5.2 in fractions, from the tails themselves, over every i up to m; e^eps = odds."""
    q = Fraction(odds, odds + 1)
    chances = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = [sum(chances[max(0, k) :], Fraction(0)) for k in range(v - m, v + 1)]  # from v - m
    gain = max((tail[m - i] - tail[m]) / i for i in range(1, m + 1))
    return min(Fraction(1), tail[m] + 2 * m * delta * gain)


@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
@pytest.mark.parametrize("odds", [1, 2, 7, 50])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (30, 12, 11), (40, 40, 29), (60, 25, 25)])
def test_p_values_are_the_theorems_in_exact_fractions(
    m: int, r: int, v: int, odds: int, delta: Fraction
) -> None:
    ours = evidence.p_value(m, r, v, math.log(odds), float(delta))
    assert ours == pytest.approx(float(exact_p_value(m, r, v, odds, delta)), rel=1e-9)


@given(st.integers(1, 400), st.data())
def test_p_value_is_the_theorems_worst_case_or_above_it(m: int, data: st.DataObject) -> None:
    """No mixture of randomised response and telling all with chance delta beats the p-value."""
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(1, r))
    eps, delta = data.draw(st.floats(0, 6)), data.draw(st.floats(0, 0.01))
    told = delta + (1 - delta) * stats.binom.sf(v - 1, r, special.expit(eps))
    assert evidence.p_value(m, r, v, eps, delta) >= told - 1e-9


counts = st.integers(1, 300).flatmap(
    lambda m: st.integers(1, m).flatmap(
        lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r))
    )
)


@settings(max_examples=60)
@given(counts, st.floats(0, 0.01), st.floats(0.001, 0.2))
def test_the_bound_rises_with_right_guesses_and_falls_with_delta_canaries_and_confidence(
    counts: tuple[int, int, int], delta: float, p: float
) -> None:
    m, r, v = counts
    bound = evidence.get_eps_audit(m, r, v, delta, p)
    slack = 1e-6
    if v < r:
        assert evidence.get_eps_audit(m, r, v + 1, delta, p) >= bound - slack
        assert evidence.get_eps_audit(m, r - 1, v, delta, p) >= bound - slack
    assert evidence.get_eps_audit(m, r, v, delta * 1.5, p) <= bound + slack
    assert evidence.get_eps_audit(m + 10, r, v, delta, p) <= bound + slack
    assert evidence.get_eps_audit(m, r, v, delta, p / 2) <= bound + slack
    assert bound <= evidence.largest_bound(m, r, delta, p) + slack
    assert bound == 0 or evidence.p_value(m, r, v, bound, delta) < p


@given(st.integers(1, 2000), st.floats(0, 6), st.floats(0, 0.01), st.floats(0.001, 0.3))
def test_the_bound_is_not_above_the_truth_when_as_many_are_right_as_expected(
    m: int, eps: float, delta: float, p: float
) -> None:
    v = math.floor(m * special.expit(eps))
    assert evidence.get_eps_audit(m, m, v, delta, p) <= eps + 1e-9


@pytest.mark.parametrize(("m", "r", "v"), [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_guesses_that_cannot_be_are_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(ValueError, match=f"v={v} correct of r={r} guesses on m={m}"):
        evidence.get_eps_audit(m, r, v, 1e-5, 0.05)


# What could have been seen


def test_the_detection_limit_is_all_guesses_right() -> None:
    # At delta 0 the bound solves q^r = p.
    expected = special.logit(0.05 ** (1 / 40))
    assert evidence.largest_bound(90, 40, 0.0, 0.05) == pytest.approx(expected, abs=1e-8)


@given(st.integers(1, 300), st.floats(0, 4), st.floats(0, 0.001), st.floats(0.01, 0.2))
def test_guesses_to_reject_is_the_first_count_that_does(
    m: int, eps: float, delta: float, p: float
) -> None:
    needed = evidence.guesses_to_reject(m, m, eps, delta, p)
    rejects = [v for v in range(m + 1) if evidence.p_value(m, m, v, eps, delta) < p]
    assert needed == (rejects[0] if rejects else None)


def test_power_is_how_often_randomised_response_is_caught() -> None:
    rng = np.random.default_rng(3)
    m, claimed, true = 200, 1.0, 2.0
    expected = evidence.power(m, m, claimed, true, 1e-5, 0.05)
    right = rng.binomial(m, special.expit(true), 2000)
    caught = sum(evidence.p_value(m, m, int(v), claimed, 1e-5) < 0.05 for v in right)
    assert expected > 0.2
    assert expected in evidence.clopper_pearson(caught, 2000, 0.999)


def test_the_detectable_epsilon_has_the_chance_asked_and_no_hope_is_infinite() -> None:
    least = evidence.detectable(500, 500, 1.0, 1e-5, 0.05, 0.8)
    assert 1.0 < least < 2.0
    assert evidence.power(500, 500, 1.0, least, 1e-5, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert evidence.detectable(4, 4, 3.0, 1e-5, 0.05) == math.inf
    assert evidence.power(4, 4, 3.0, 50.0, 1e-5, 0.05) == 0


# The Gaussian trade-off curve


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-5), (1.0, 1e-5), (4.0, 1e-9)])
def test_mu_epsilon_and_delta_agree_with_the_hockey_stick_by_quadrature(
    mu: float, delta: float
) -> None:
    eps = evidence.gaussian_epsilon(mu, delta)
    start = eps / mu + mu / 2  # where the likelihood ratio passes e^eps
    mass, _ = integrate.quad(
        lambda x: stats.norm.pdf(x, mu) - math.exp(eps) * stats.norm.pdf(x),
        start, start + 12, epsabs=0, epsrel=1e-10,
    )  # fmt: skip
    assert mass == pytest.approx(delta, rel=1e-6)
    assert evidence.gaussian_mu(eps, delta) == pytest.approx(mu, abs=1e-7)


def programmed_p_value(m: int, r: int, v: int, mu: float) -> float:
    """Most P[right >= v] under the theorem's constraints: a linear program of 400 tangents."""
    x = np.linspace(-8, 8, 400)
    at, value = special.ndtr(x), special.ndtr(x + mu)
    slope = np.exp(-mu * x - mu * mu / 2)
    j = np.arange(r + 1)
    rows = []
    for i in range(r):
        right = np.where(j > i, j / m, 0)
        wrong = np.where(j >= i, (r - j) / m, 0)
        rows.append(right[None] - slope[:, None] * wrong[None])
    limits = np.tile(value - slope * at, r)
    matrix = np.concatenate(rows)
    scale = np.maximum(1, np.abs(matrix).max(1))
    found = optimize.linprog(
        -(j >= v).astype(float), matrix / scale[:, None], limits / scale, np.ones((1, r + 1)), [1.0]
    )
    assert found.success
    return -float(found.fun)


@pytest.mark.parametrize(
    ("m", "r", "v", "mu"),
    [(8, 8, 7, 0.5), (12, 12, 9, 0.3), (12, 12, 12, 1.0), (20, 8, 7, 0.5), (16, 10, 9, 0.2)],
)
def test_the_recursion_finds_what_a_linear_program_finds(m: int, r: int, v: int, mu: float) -> None:
    ours = evidence.gaussian_p_value(m, r, v, mu)
    theirs = programmed_p_value(m, r, v, mu)  # tangents lie above the curve
    assert ours <= theirs + 1e-6
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("r", "v"), [(10, 8), (30, 28)])
def test_independent_gaussian_answers_are_within_the_p_value(r: int, v: int, mu: float) -> None:
    told = stats.binom.sf(v - 1, r, special.ndtr(mu / 2))  # the best guess of one coin
    assert evidence.gaussian_p_value(r, r, v, mu) >= told


@pytest.mark.parametrize("delta", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("m", "r", "share"),
    [(100, 100, 0.65), (100, 100, 0.9), (1000, 1000, 0.6), (1000, 100, 0.9), (5000, 500, 1.0)],
)
def test_a_gaussian_hypothesis_gives_the_larger_bound(
    m: int, r: int, share: float, delta: float
) -> None:
    v = round(r * share)
    any_curve = evidence.get_eps_audit(m, r, v, delta, 0.05)
    assert evidence.get_gaussian_eps_audit(m, r, v, delta, 0.05) > any_curve > 0


@settings(max_examples=40, deadline=None)
@given(counts, st.floats(0.01, 0.2), st.floats(0, 3))
def test_the_gaussian_p_value_and_bound_agree_and_are_monotone(
    counts: tuple[int, int, int], p: float, mu: float
) -> None:
    m, r, v = counts
    least = evidence.get_mu_audit(m, r, v, p)
    assert least == 0 or evidence.gaussian_p_value(m, r, v, least * (1 - 1e-6)) <= p * (1 + 1e-6)
    assert evidence.gaussian_p_value(m, r, v, least + 1e-6) >= p * (1 - 1e-6)
    here = evidence.gaussian_p_value(m, r, v, mu)
    assert 0 < here <= evidence.gaussian_p_value(m, r, v, mu + 0.1) + 1e-12
    if v < r:
        assert evidence.gaussian_p_value(m, r, v + 1, mu) <= here + 1e-9
        assert evidence.get_mu_audit(m, r, v + 1, p) >= least - 1e-6


# From scores to guesses, and calibration


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=40),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 99),
)
def test_the_highest_are_guessed_members_and_the_lowest_non_members(
    scores: list[int], top: int, bottom: int, seed: int
) -> None:
    if top + bottom == 0:
        with pytest.raises(ValueError, match="1 in all at least"):
            Guesses(top, bottom)
        return
    guesses = Guesses(top, bottom)
    if guesses.total > len(scores):
        with pytest.raises(TooFewError, match=f"{guesses.total} scores are needed"):
            evidence.guess(scores, guesses, np.random.default_rng(seed))
        return
    told = evidence.guess(scores, guesses, np.random.default_rng(seed))
    values = np.array(scores)
    assert ((told == 1).sum(), (told == -1).sum()) == (top, bottom)
    if top:
        assert values[told == 1].min() >= values[told != 1].max(initial=-9)
    if bottom:
        assert values[told == -1].max() <= values[told != -1].min(initial=9)


@pytest.mark.parametrize("members_first", [True, False])
def test_a_file_sorted_by_membership_gains_nothing_from_equal_scores(members_first: bool) -> None:
    coins = (np.arange(400) < 200) == members_first
    rng = np.random.default_rng(8)
    audits = [evidence.audit(np.zeros(400), coins, 1e-5, 0.0, rng=rng) for _ in range(100)]
    assert consistent(sum(one.alarm for one in audits), 100, 0.05)


M = 300
WAYS = (Guesses.even(300), Guesses.even(90), Guesses(20, 0))


def test_no_training_at_all_raises_alarms_no_oftener_than_stated_over_500_runs() -> None:
    rng = np.random.default_rng(20)
    audits = [
        evidence.audit(
            rng.normal(size=M),
            rng.random(M) < 0.5,
            1e-5,
            0.0,
            rng=rng,
            confidence=0.9,
            guesses=WAYS,
        )
        for _ in range(RUNS)
    ]
    assert consistent(sum(one.bound > 0 for one in audits), RUNS, 0.1)
    assert consistent(sum(one.gaussian_bound > 0 for one in audits), RUNS, 0.1)
    assert sum(one.bound > 0 for one in audits) > 0  # an audit that cannot err shows nothing
    assert all(one.alarm == (one.bound > 0) for one in audits)
    p_values = np.sort([one.p_value for one in audits])
    for level in (0.01, 0.05, 0.2):
        assert consistent(int((p_values <= level).sum()), RUNS, level)


def response(
    rng: np.random.Generator, coins: np.ndarray, eps: float, delta: float = 0.0
) -> np.ndarray:
    """Randomised response of every coin; with chance delta the truth about all of them at once."""
    honest = rng.random(coins.size) < (1.0 if rng.random() < delta else special.expit(eps))
    return np.where(coins == honest, 1.0, -1.0)


@pytest.mark.parametrize(
    ("eps", "delta"), [(0.5, 0.0), (1.0, 1e-5), (2.0, 1e-3), (4.0, 1e-5), (1.0, 0.02)]
)
def test_randomised_response_at_a_known_epsilon_is_not_overstated_oftener_than_stated(
    eps: float, delta: float
) -> None:
    rng = np.random.default_rng(21)
    bounds = []
    for _ in range(RUNS):
        coins = rng.random(M) < 0.5
        scores = response(rng, coins, eps, delta)
        # One way, and one that abstains; ties among the answers are broken by rng.
        one = evidence.audit(scores, coins, delta, eps, rng=rng, confidence=0.9, guesses=WAYS[:2])
        assert one.alarm == (one.bound > eps)
        bounds.append(one.bound)
    assert consistent(sum(bound > eps for bound in bounds), RUNS, 0.1)
    if delta <= 1e-5:  # and it is near: 300 canaries show more than half of it
        assert np.median(bounds) > 0.5 * eps


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_a_gaussian_mechanism_of_known_mu_is_not_overstated_oftener_than_stated(mu: float) -> None:
    rng = np.random.default_rng(22)
    delta = 1e-5
    eps = evidence.gaussian_epsilon(mu, delta)
    audits = []
    for _ in range(RUNS):
        coins = rng.random(M) < 0.5
        scores = rng.normal(mu * coins, 1)
        audits.append(
            evidence.audit(scores, coins, delta, eps, rng=rng, confidence=0.9, guesses=WAYS)
        )
    assert consistent(sum(one.gaussian_bound > eps + 1e-6 for one in audits), RUNS, 0.1)
    assert consistent(sum(one.gaussian_p_value <= 0.1 for one in audits), RUNS, 0.1)
    assert consistent(sum(one.bound > eps for one in audits), RUNS, 0.1)
    ours = np.array([one.gaussian_bound for one in audits])
    assert (ours >= [one.bound for one in audits]).all()
    assert np.median(ours) > 0.25 * eps  # and not by saying nothing


def test_noise_divided_by_eight_is_an_alarm() -> None:
    rng = np.random.default_rng(23)
    claimed = evidence.gaussian_epsilon(0.5, 1e-5)
    alarms = 0
    for _ in range(20):
        coins = rng.random(M) < 0.5
        one = evidence.audit(rng.normal(4 * coins, 1), coins, 1e-5, claimed, rng=rng)
        alarms += one.alarm
    assert alarms >= 19


def test_an_audit_says_what_it_could_have_seen_and_is_corrected_for_what_it_tried() -> None:
    rng = np.random.default_rng(1)
    coins = rng.random(M) < 0.5
    scores = coins + rng.normal(0, 0.3, M)
    one = evidence.audit(scores, coins, 1e-5, 1.0, rng=rng, guesses=WAYS[:1])
    three = evidence.audit(scores, coins, 1e-5, 1.0, rng=rng, guesses=WAYS[:1] * 3)
    assert (one.m, one.r, one.tried, three.tried) == (M, M, 1, 3)
    assert one.v == ((scores >= np.sort(scores)[M // 2]) == coins).sum()
    assert one.p_value == evidence.p_value(M, M, one.v, 1.0, 1e-5)
    assert one.bound == evidence.get_eps_audit(M, M, one.v, 1e-5, 1 - 0.95)
    assert three.p_value == pytest.approx(3 * one.p_value)
    mu = evidence.gaussian_mu(1.0, 1e-5)
    assert one.gaussian_p_value == evidence.gaussian_p_value(M, M, one.v, mu) < one.p_value
    assert three.gaussian_p_value == pytest.approx(3 * one.gaussian_p_value)
    assert one.gaussian_bound == evidence.get_gaussian_eps_audit(M, M, one.v, 1e-5, 1 - 0.95)
    assert three.bound == evidence.get_eps_audit(M, M, one.v, 1e-5, (1 - 0.95) / 3) < one.bound
    assert one.limit == evidence.largest_bound(M, M, 1e-5, 1 - 0.95) > one.bound


def test_where_nothing_is_claimed_nothing_is_alarmed() -> None:
    coins = np.random.default_rng(2).random(50) < 0.5
    one = evidence.audit(coins * 1.0, coins, 1e-5, math.inf, rng=np.random.default_rng(0))
    assert (one.p_value, one.gaussian_p_value, one.alarm) == (1, 1, False)
    assert one.bound > 1


@pytest.mark.parametrize(
    ("scores", "coins", "says"),
    [
        ([], np.zeros(0, bool), "no canaries"),
        ([0.5, math.nan], np.array([True, False]), "NaN"),
        ([0.5], np.array([1]), "give booleans"),
    ],
)
def test_canaries_that_cannot_be_scored_are_refused(
    scores: list, coins: np.ndarray, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        evidence.audit(scores, coins, 1e-5, 1.0, rng=np.random.default_rng(0))


# Estimates


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 3), st.floats(0.3, 3), st.floats(0, 3))
def test_the_hockey_stick_of_normals_is_its_integral(
    mean: float, deviation: float, eps: float
) -> None:
    p, q = Normal(mean, deviation), Normal(0.0, 1.0)
    x = np.linspace(-40, 40, 400_001)
    gap = stats.norm.pdf(x, mean, deviation) - math.exp(eps) * stats.norm.pdf(x)
    expected = np.maximum(gap, 0).sum() * (x[1] - x[0])
    assert evidence._hockey_stick(p, q, eps) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_equal_normals_apart_by_mu_are_mu_gdp(mu: float) -> None:
    null = Normal(0.2, 0.01)
    found = evidence.normal_epsilon(Normal(0.2 + 0.01 * mu, 0.01), null, 1e-5)
    assert found == pytest.approx(evidence.gaussian_epsilon(mu, 1e-5), abs=1e-5)
    assert evidence.normal_epsilon(null, null, 1e-5) == 0


# sigma of the Gaussian mechanism and its epsilon at delta 1e-6
SIGMAS = [(4.22, 1.0), (1.54, 3.0), (0.541, 10.0)]


@pytest.mark.parametrize(("sigma", "analytical"), SIGMAS)
def test_the_estimate_tends_to_the_gaussian_mechanisms_epsilon(
    sigma: float, analytical: float
) -> None:
    rng = np.random.default_rng(9)
    assert evidence.gaussian_epsilon(1 / sigma, 1e-6) == pytest.approx(analytical, rel=0.003)
    null = Normal(0.0, 0.01)
    told = evidence.estimate_epsilon(rng.normal(0.01 / sigma, 0.01, 400_000), null, 1e-6)
    assert (told.n, told.delta) == (400_000, 1e-6)
    assert told.epsilon == pytest.approx(analytical, rel=0.04)
    fitted = Normal.fit(rng.normal(0, 0.01, 400_000))
    assert evidence.normal_epsilon(Normal(0.01 / sigma, 0.01), fitted, 1e-6) == pytest.approx(
        analytical, rel=0.04
    )


def test_random_canaries_cosines_with_a_noised_sum_are_the_normals_that_are_fitted() -> None:
    """What Andrew et al. rest on, in small: 10,000 dimensions, 200 canaries, 200 held out."""
    rng = np.random.default_rng(9)
    dimension, n, sigma = 10_000, 200, 0.541
    canaries = rng.normal(size=(2 * n, dimension))
    canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
    released = canaries[:n].sum(0) + sigma * rng.normal(size=dimension)
    cosines = canaries @ released / np.linalg.norm(released)
    null = Normal.of_random_cosines(dimension)
    assert stats.kstest(cosines[n:], "norm", (null.mean, null.deviation)).pvalue > 0.01
    share = math.sqrt(dimension) / math.hypot(sigma * math.sqrt(dimension), math.sqrt(n))
    there = (share * null.deviation, null.deviation)
    assert stats.kstest(cosines[:n], "norm", there).pvalue > 0.01
    told = evidence.estimate_epsilon(cosines[:n], null, 1e-6)
    assert 8 < told.epsilon < 15


def test_an_estimate_is_no_bound_with_few_canaries_it_lies_above_the_truth() -> None:
    rng = np.random.default_rng(10)
    told = [
        evidence.estimate_epsilon(rng.normal(1 / 1.54, 1, 50), Normal(0.0, 1.0), 1e-6).epsilon
        for _ in range(40)
    ]
    assert np.median(told) > 4  # 3 is true


def test_one_canary_makes_no_estimate() -> None:
    with pytest.raises(TooFewError, match="2 at least"):
        evidence.estimate_epsilon([0.3], Normal.of_random_cosines(10), 1e-6)
