"""FedAvg adds the mean update, times the server's rate."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from securefl.algorithms.fedavg import FedAvg

vectors = arrays(np.float64, 5, elements=st.floats(-1e6, 1e6))


@given(vectors, vectors, st.floats(1e-3, 1e3))
def test_the_step_is_exactly_the_mean_update_times_the_rate(weights, mean, rate):
    before = weights.copy()
    moved, moments = FedAvg(rate).step(weights, mean, FedAvg(rate).start(5))
    np.testing.assert_array_equal(moved, before + rate * mean)
    np.testing.assert_array_equal(weights, before)
    assert moments == {}


def test_rate_one_is_the_papers_average_of_models():
    rng = np.random.default_rng(0)
    start, models = rng.normal(size=4), rng.normal(size=(3, 4))
    moved, _ = FedAvg().step(start, (models - start).mean(axis=0), {})
    np.testing.assert_allclose(moved, models.mean(axis=0), atol=1e-12)


def test_momentum_is_that_of_torchs_sgd():
    rule = FedAvg(0.3, 0.9)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=4)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    torchs = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    moments = rule.start(4)
    for _ in range(5):
        mean = rng.normal(size=4)
        weights, moments = rule.step(weights, mean, moments)
        parameter.grad = torch.tensor(-mean)
        torchs.step()
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-12)
