"""Private sums cost what they are calibrated to, and compose with training."""

from __future__ import annotations

import math

import pytest

from securefl import schema
from securefl.config import Data, Preprocessing
from securefl.preprocessing import NOISY, Preprocessor
from securefl.privacy import accounting, statistics
from securefl.privacy.ledger import Ledger
from securefl.privacy.statistics import BoundedSum

AGES = BoundedSum(6, 10_000.0)
BINS = BoundedSum(20, 4096.0)


@pytest.mark.parametrize("statistic", [AGES, BINS], ids=["moments", "histogram"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_calibrated_noise_costs_the_epsilon_and_no_less(statistic, epsilon):
    deviation = statistics.calibrate(statistic, epsilon, 1e-5, 4)
    once = accounting.Repeated(statistics.event(statistic, deviation, 4), 1)
    assert 0.99 * epsilon <= accounting.epsilon([once], 1e-5) <= epsilon
    twice = accounting.epsilon([accounting.Repeated(once.event, 2)], 1e-5)
    assert twice > 1.3 * epsilon


def test_what_preprocessing_sums_is_calibrated_as_it_is():
    agreed = schema.parse(
        'version = 1\nname = "x"\nlabel = "y"\n[columns]\n'
        'y = {type = "number", range = [0, 1]}\nx = {type = "number", range = [0, 1]}\n'
    )
    made = Preprocessor(Data(source="table", agreed=agreed), Preprocessing(), NOISY)
    released = BoundedSum(made.dimension(0), made.sensitivity(0))
    deviation = statistics.calibrate(released, 1.0, 1e-5, 4)
    event = statistics.event(released, deviation, 4)
    assert (event.dimension, event.sensitivity) == (4, made.sensitivity(0))
    assert accounting.epsilon([accounting.Repeated(event, 1)], 1e-5) <= 1.0


def test_it_composes_with_training():
    release = statistics.event(AGES, 5000.0, 4)
    step = accounting.PoissonDiscreteGaussianSum(300.0, 4, 500.0, 100, 0.1)
    both = [accounting.Repeated(release, 1), accounting.Repeated(step, 50)]
    assert accounting.epsilon(both, 1e-4) > accounting.epsilon(both[1:], 1e-4)


def test_it_is_charged_to_the_ledger_that_training_is_charged_to(tmp_path):
    deviation = statistics.calibrate(BINS, 0.5, 1e-5, shares=3)
    release = accounting.Repeated(statistics.event(BINS, deviation, 3), 1)
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


@pytest.mark.parametrize(
    ("dimension", "sensitivity"), [(0, 1.0), (1, 0.0), (1, math.inf), (1, math.nan)]
)
def test_a_sum_that_nothing_bounds_is_refused(dimension, sensitivity):
    with pytest.raises(ValueError, match="finite"):
        BoundedSum(dimension, sensitivity)
