"""Statistics as private sums: bounded by what is declared, exact but for the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.keystream import Keystream, Seed
from protocols.noise import DiscreteGaussian
from securefl.privacy import accounting, statistics
from securefl.privacy.ledger import Ledger
from securefl.privacy.statistics import Histogram, Moments

AGES = Moments(((0.0, 100.0), (-1.0, 3.0)))
EDGES = tuple(float(edge) for edge in range(0, 101, 5))
ANY = st.floats(allow_nan=True, allow_infinity=True)


def norm_squared(vector) -> int:
    return sum(int(value) ** 2 for value in vector)


def people(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(55, 12, count), rng.uniform(-1, 3, count)], axis=1)


@given(st.tuples(ANY, ANY), st.integers(0, 5))
def test_one_record_moves_the_moments_by_at_most_the_sensitivity(record, others):
    without = people(others)
    with_it = np.vstack([without, record])
    moved = AGES.encode(with_it) - AGES.encode(without)
    assert norm_squared(moved) <= AGES.sensitivity**2 * (1 + 1e-12)
    assert np.array_equal(moved, AGES.encode(np.array([record])))


@given(ANY, st.lists(ANY, max_size=5))
def test_one_record_moves_the_histogram_by_at_most_the_sensitivity(record, others):
    histogram = Histogram(EDGES)
    moved = histogram.encode(np.array([*others, record])) - histogram.encode(np.array(others))
    assert norm_squared(moved) <= histogram.sensitivity**2
    assert (norm_squared(moved) == 0) == math.isnan(record)


def test_the_sensitivity_of_the_moments_is_reached():
    extreme = AGES.encode(np.array([[100.0, -1.0]]))
    assert norm_squared(extreme) == pytest.approx(AGES.sensitivity**2)


def test_without_noise_the_moments_are_those_of_all_sites_records():
    sites = [people(300, seed) for seed in range(4)]
    estimate = AGES.decode(sum(AGES.encode(site) for site in sites))
    clipped = np.clip(np.concatenate(sites), [0, -1], [100, 3])
    np.testing.assert_array_equal(estimate.count, [1200, 1200])
    np.testing.assert_allclose(estimate.mean, clipped.mean(0), atol=0.01)
    np.testing.assert_allclose(estimate.variance, clipped.var(0), rtol=0.01)


def test_a_missing_value_takes_no_part():
    estimate = AGES.decode(AGES.encode(np.array([[50.0, np.nan], [60.0, 2.0]])))
    np.testing.assert_array_equal(estimate.count, [2, 1])
    np.testing.assert_allclose(estimate.mean, [55, 2], atol=0.02)


def test_nothing_but_noise_decodes_to_something_finite():
    for total in (np.zeros(6, np.int64), np.full(6, -(10**9)), np.arange(6) * 10**9):
        estimate = AGES.decode(total)
        assert ((estimate.mean >= [0, -1]) & (estimate.mean <= [100, 3])).all()
        assert (estimate.variance >= 0).all()
    assert Histogram(EDGES).quantile(np.full(20, -5), 0.5) == 50.0


def test_histogram_and_quantiles_are_those_of_the_values():
    histogram = Histogram(EDGES)
    values = people(5000)[:, 0]
    total = histogram.encode(values)
    np.testing.assert_array_equal(histogram.decode(total), np.histogram(values, EDGES)[0])
    for share in (0.05, 0.25, 0.5, 0.9):
        assert histogram.quantile(total, share) == pytest.approx(
            np.quantile(values, share), abs=0.5
        )
    assert histogram.quantile(total, 0.0) <= values.min()
    assert histogram.quantile(total, 1.0) >= values.max()


@pytest.mark.parametrize("statistic", [AGES, Histogram(EDGES)], ids=["moments", "histogram"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_calibrated_noise_costs_the_epsilon_and_no_less(statistic, epsilon):
    deviation = statistics.calibrate(statistic, epsilon, 1e-5, 4)
    once = accounting.Repeated(statistics.event(statistic, deviation, 4), 1)
    assert 0.99 * epsilon <= accounting.epsilon([once], 1e-5) <= epsilon
    twice = accounting.epsilon([accounting.Repeated(once.event, 2)], 1e-5)
    assert twice > 1.3 * epsilon


def test_it_composes_with_training():
    release = statistics.event(AGES, 5000.0, 4)
    step = accounting.PoissonDiscreteGaussianSum(300.0, 4, 500.0, 100, 0.1)
    both = [accounting.Repeated(release, 1), accounting.Repeated(step, 50)]
    assert accounting.epsilon(both, 1e-4) > accounting.epsilon(both[1:], 1e-4)


def test_it_is_charged_to_the_ledger_that_training_is_charged_to(tmp_path):
    edges = Histogram(EDGES)
    deviation = statistics.calibrate(edges, 0.5, 1e-5, shares=3)
    release = accounting.Repeated(statistics.event(edges, deviation, 3), 1)
    step = accounting.Repeated(accounting.PoissonGaussian(2.0, 0.05), 1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.register("rows", unit="record", epsilon=6.0, delta=1e-4, purpose="a trial")
        costs = []
        for run, each, rounds in (("ages", release, 1), ("training", step, 20)):
            account = ledger.open(
                "rows",
                run,
                experiment=run,
                promise=bytes(32),
                unit="record",
                per_round=each,
                rounds=rounds,
                epsilon=1.0,
            )
            for number in range(rounds):
                account.charge(number + 1)
            costs.append(ledger.epsilon("rows"))
    assert 0.4 < costs[0] < costs[1] <= 6.0
    together = accounting.epsilon([release, accounting.Repeated(step.event, 20)], 1e-4)
    assert costs[1] >= together


def test_four_noisy_sites_estimate_the_truth_closely():
    """At epsilon 1 with 2000 records: means within the noise that the deviation states."""
    deviation = statistics.calibrate(AGES, 1.0, 1e-5, 3)
    noise = DiscreteGaussian(deviation)
    source = Keystream(Seed(bytes(32)), "tests")
    sites = [people(500, seed) for seed in range(4)]
    total = sum(AGES.encode(site) + noise.sample(source, AGES.dimension) for site in sites)
    estimate = AGES.decode(total)
    clipped = np.clip(np.concatenate(sites), [0, -1], [100, 3])
    spread = 2 * deviation / statistics.UNITS / 2000  # of y, with all four shares
    off = np.abs(estimate.mean - clipped.mean(0)) / (np.array([100.0, 4.0]) / 2)
    assert (off < 6 * spread).all()
    assert off.max() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Moments(()),
        lambda: Moments(((1.0, 1.0),)),
        lambda: Moments(((0.0, math.inf),)),
        lambda: Moments(((math.nan, 1.0),)),
        lambda: Histogram((1.0,)),
        lambda: Histogram((0.0, 2.0, 1.0)),
        lambda: Histogram((0.0, math.inf)),
    ],
)
def test_a_range_that_is_none_is_refused(make):
    with pytest.raises(ValueError, match="declare"):
        make()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        Histogram(EDGES).quantile(np.ones(20, np.int64), share)
