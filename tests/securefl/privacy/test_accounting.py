"""The reported epsilon is neither too small nor wastefully large."""

from __future__ import annotations

import warnings

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from securefl.privacy import accounting

MECHANISMS = [
    (0.8, 0.05, 40, 1e-3),
    (1.0, 0.2, 60, 1e-3),
    (2.0, 0.2, 320, 1e-3),
    (4.0, 0.5, 100, 1e-5),
    (1.5, 0.01, 1000, 1e-6),
    (3.0, 1.0, 20, 1e-4),
]


def opacus(accountant, noise: float, rate: float, steps: int, delta: float) -> float:
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimal order at the edge of the orders: still a bound
        return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_epsilon_is_at_most_what_opacus_bounds_by_renyi_divergences(mechanism):
    assert accounting.epsilon(*mechanism) <= opacus(RDPAccountant(), *mechanism)


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if m[1] < 1])
def test_epsilon_is_within_one_percent_of_opacus_numerical_composition(mechanism):
    # Opacus's figure is an upper bound with an error of up to 0.01, which is 1 % only above 1.
    reference = opacus(PRVAccountant(), *mechanism)
    assert accounting.epsilon(*mechanism) == pytest.approx(reference, rel=0.01, abs=0.011)


def test_no_step_costs_nothing():
    assert accounting.epsilon(1.0, 0.2, 0, 1e-3) == 0.0


@pytest.mark.parametrize("mechanism", MECHANISMS[:4])
def test_more_steps_a_higher_rate_less_noise_or_a_smaller_delta_never_cost_less(mechanism):
    noise, rate, steps, delta = mechanism
    cost = accounting.epsilon(noise, rate, steps, delta)
    assert cost > 0
    assert accounting.epsilon(noise, rate, steps + 1, delta) > cost
    assert accounting.epsilon(noise, rate * 1.1, steps, delta) > cost
    assert accounting.epsilon(noise * 1.1, rate, steps, delta) < cost
    assert accounting.epsilon(noise, rate, steps, delta / 2) > cost


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.5, 0.05, 50), (5.0, 0.2, 32), (1.0, 0.5, 20), (40.0, 0.1, 10)]
)
def test_the_calibrated_noise_meets_the_target_and_hardly_more(target, rate, steps):
    noise = accounting.noise_multiplier(target, 1e-3, rate, steps)
    assert accounting.epsilon(noise, rate, steps, 1e-3) <= target
    assert accounting.epsilon(noise * 0.995, rate, steps, 1e-3) > target


def test_an_unreachable_target_is_refused():
    with pytest.raises(ValueError, match="no noise reaches epsilon"):
        accounting.noise_multiplier(1e-9, 1e-9, 1.0, 10_000)
