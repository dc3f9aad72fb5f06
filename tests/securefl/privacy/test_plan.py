"""A plan promises a whole run, and says what is reachable when it cannot."""

from __future__ import annotations

import re

import pytest

from securefl import agreement, simulation
from securefl.config import ConfigurationError, Privacy, parse
from securefl.privacy.plan import RecordLocal

DIMENSION = 1000


def privacy(**changes) -> Privacy:
    return Privacy(**{"epsilon": 5.0, "delta": 1e-3, "rate": 0.2, "expected_batch": 16, **changes})


@pytest.mark.parametrize("rounds", [1, 10, 40])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("spare", [0, 3])
def test_all_rounds_and_the_spare_ones_fit_into_the_promised_epsilon(rounds, steps, spare):
    plan = RecordLocal.calibrate(privacy(spare_rounds=spare), rounds, steps, DIMENSION)
    assert plan.spent(0) == 0
    assert plan.spent(rounds) <= plan.spent(rounds + spare) <= 5.0
    assert plan.spent(rounds + spare) >= 4.9  # nothing is wasted
    assert plan.affords(rounds + spare)
    assert plan.spent(rounds) > 0


@pytest.mark.parametrize("rounds", [5, 30])
def test_one_round_beyond_is_not_afforded(rounds):
    plan = RecordLocal.calibrate(privacy(spare_rounds=0), rounds, 1, DIMENSION)
    assert not plan.affords(rounds + 1)


def test_local_steps_are_charged_each():
    plan = RecordLocal.calibrate(privacy(), 10, 5, DIMENSION)
    single = RecordLocal(
        plan.epsilon,
        plan.delta,
        plan.clip,
        plan.rate,
        plan.expected_batch,
        plan.noise_multiplier,
        1,
        DIMENSION,
    )
    assert plan.spent(4) == single.spent(20)
    assert plan.spent(4) > single.spent(4)


@pytest.mark.parametrize("wanted", [0.001, 0.01, 0.05])
def test_an_epsilon_too_small_to_train_is_refused_with_one_that_works(wanted):
    with pytest.raises(ConfigurationError) as caught:
        RecordLocal.calibrate(privacy(epsilon=wanted, expected_batch=4), 30, 2, DIMENSION)
    message = str(caught.value)
    assert "\n" not in message
    assert f"privacy.epsilon = {wanted:g}" in message
    found = re.search(r"epsilon >= ([\d.e-]+) is reachable", message)
    assert found is not None, message
    reachable = float(found[1])
    plan = RecordLocal.calibrate(privacy(epsilon=reachable, expected_batch=4), 30, 2, DIMENSION)
    assert plan.spent(32) <= reachable


def test_the_plan_does_not_depend_on_how_many_records_a_site_holds():
    text = (
        "rounds = 4\n[data]\ndefault_range = [0, 100]\n[sites]\ncount = {count}\n"
        "[privacy]\nepsilon = 5.0\ndelta = 1e-3\nrate = 0.2\nexpected_batch = 16\n"
    )
    few, many = parse(text.format(count=18)), parse(text.format(count=3))
    first, second = (simulation.assemble(experiment) for experiment in (few, many))
    sizes = [len(next(iter(made.sites.values()))) for made in (first, second)]
    assert sizes[1] > 5 * sizes[0]
    assert first.plan == second.plan is not None


def test_without_a_privacy_section_there_is_no_plan():
    assert agreement.plan(parse("rounds = 3"), 3, 31) is None
    assert simulation.assemble(parse("rounds = 3")).plan is None


def test_a_plan_is_frozen():
    plan = RecordLocal.calibrate(privacy(), 3, 1, DIMENSION)
    with pytest.raises(AttributeError):
        plan.noise_multiplier = 0.0  # type: ignore[misc]
