"""FedAdam is algorithm 2 of Reddi et al. 2021, line by line."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from securefl.algorithms.fedadam import FedAdam


@given(
    eta=st.floats(1e-3, 10),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    tau=st.floats(1e-6, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_several_steps_agree_with_a_literal_transcription(eta, beta1, beta2, tau, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=3)
    rule = FedAdam(eta, beta1, beta2, tau)
    moments = rule.start(3)
    m, v, reference = [0.0] * 3, [tau**2] * 3, list(x)  # m_0 = 0, v_{-1} >= tau^2
    for _ in range(6):
        delta = rng.normal(size=3)
        x, moments = rule.step(x, delta, moments)
        for i in range(3):
            m[i] = beta1 * m[i] + (1 - beta1) * delta[i]
            v[i] = beta2 * v[i] + (1 - beta2) * delta[i] ** 2
            reference[i] = reference[i] + eta * m[i] / (math.sqrt(v[i]) + tau)
        np.testing.assert_allclose(x, reference, rtol=1e-12, atol=1e-12)


def test_a_step_leaves_what_it_was_given_unchanged():
    rule = FedAdam(0.1)
    weights, mean, moments = np.ones(2), np.ones(2), rule.start(2)
    rule.step(weights, mean, moments)
    np.testing.assert_array_equal(weights, [1, 1])
    np.testing.assert_array_equal(mean, [1, 1])
    np.testing.assert_array_equal(moments["first"], [0, 0])
