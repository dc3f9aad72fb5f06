"""DP-SGD keeps what its plan promises: clipping, noise, secret samples, a public divisor."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from securefl import config, models
from securefl.data import Table
from securefl.privacy.plan import RecordLocal
from securefl.privacy.training import Trainer

CPU = torch.device("cpu")
SILENT = 1e-6
"""A noise multiplier that leaves the gradients visible."""


def plan(noise: float = SILENT, rate: float = 1.0, batch: int = 8, clip: float = 1.0):
    return RecordLocal(1e9, 1e-3, clip, rate, batch, noise, 1, dimension=1000)


def table(features, target) -> Table:
    features = np.asarray(features, np.float32)
    names = tuple(f"x{i}" for i in range(math.prod(features.shape[1:])))
    target = np.asarray(target)
    if target.dtype.kind == "f":
        return Table(features, target.astype(np.float32), names, "regression")
    classes = tuple(str(i) for i in range(int(target.max()) + 1))
    return Table(features, target.astype(np.int64), names, "classification", classes)


def random_table(rows: int, features: int, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features))
    return table(x, (np.arange(rows) % 2).astype(np.int64))


def trainer(records: Table, private=None, model=None, **training) -> tuple[Trainer, np.ndarray]:
    section = config.Model(**(model or {"name": "linear"}))
    module = models.build(section, records.shape, records.outputs, 0)
    settings = config.Training(**{"learning_rate": 1.0, **training})
    loss = models.loss(section, records.task)
    return Trainer(module, loss, records, settings, private, CPU), models.flatten(module)


def update(records: Table, private, randomness, model=None, mask=None, **training) -> np.ndarray:
    made, weights = trainer(records, private, model, **training)
    if mask is None:
        mask = np.ones(len(weights), np.bool_)
    return made.update(weights * mask, mask, randomness)


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("size", [1e2, 1e6, 1e15])
def test_one_record_moves_the_weights_by_at_most_the_clipped_step(randomness, clip, size):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=20)
    private = plan(batch=16, clip=clip)
    without = update(table(x, y), private, randomness("a"), learning_rate=0.5)
    hostile = table(np.vstack([x, np.full((1, 6), size)]), np.append(y, -size))
    with_it = update(hostile, private, randomness("a"), learning_rate=0.5)
    moved = np.linalg.norm((with_it - without).astype(np.float64))
    assert moved <= 0.5 * clip / 16 * (1 + 1e-4)
    if size < 1e9:  # beyond, the square of its norm overflows and it may be dropped
        assert moved >= 0.5 * clip / 16 * (1 - 1e-3)


@pytest.mark.parametrize("value", [1e30, 1e38])
def test_a_record_whose_gradient_overflows_cannot_break_out_of_the_clipped_step(randomness, value):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=20)
    private = plan(batch=16)
    without = update(table(x, y), private, randomness("a"))
    hostile = table(np.vstack([x, np.full((1, 6), value)]), np.append(y, -1.0))
    with_it = update(hostile, private, randomness("a"))
    assert np.isfinite(with_it).all()
    assert np.linalg.norm((with_it - without).astype(np.float64)) <= 1 / 16 * (1 + 1e-4)


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn"])
def test_the_step_is_the_sum_of_clipped_gradients_over_the_expected_batch(randomness, name):
    """Against gradients taken one record at a time."""
    rng = np.random.default_rng(2)
    shape = (5, 1, 8, 8) if name == "cnn" else (5, 4)
    records = table(rng.normal(size=shape), np.array([0, 1, 2, 1, 0]))
    section = config.Model(name=name, hidden=(4,))
    module = models.build(section, records.shape, records.outputs, 0)
    expected = np.zeros(models.layout(module).size)
    for i in range(5):
        module.zero_grad()
        output = module(torch.from_numpy(records.features[i : i + 1]))
        target = torch.from_numpy(records.target[i : i + 1])
        torch.nn.functional.cross_entropy(output, target).backward()
        gradient = np.concatenate([p.grad.numpy().ravel() for p in module.parameters()])
        gradient = gradient.astype(np.float64)
        expected -= gradient * min(1.0, 0.7 / np.linalg.norm(gradient))
    model = {"name": name, "hidden": (4,)}
    given = update(records, plan(batch=3, clip=0.7), randomness("a"), model)
    np.testing.assert_allclose(given, expected / 3, atol=2e-6)


def test_a_pruned_coordinate_does_not_use_up_a_records_norm(randomness):
    records = table([[1e6, 0.01]], np.array([1.0]))
    made, weights = trainer(records, plan(batch=1), model={"name": "linear"})
    mask = np.array([False, True, False])
    moved = made.update(weights * mask, mask, randomness("a"))
    # The gradient of the surviving weight is about 0.02, far below the clip: it stays whole.
    slope = float(weights[1])
    assert moved[1] == pytest.approx(-2 * (slope * 0.01 - 1.0) * 0.01, rel=1e-4)


# --- the divisor is public -----------------------------------------------------------------------


def test_the_divisor_is_the_expected_batch_and_not_the_number_of_records(randomness):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=10)
    once = update(table(x, y), plan(batch=16), randomness("a"))
    twice = update(table(np.vstack([x, x]), np.append(y, y)), plan(batch=16), randomness("a"))
    # Weights are float32, and the least noise that there is has deviation 1e-6 / 16.
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-6)
    wider = update(table(x, y), plan(batch=32), randomness("a"))
    np.testing.assert_allclose(wider, once / 2, rtol=1e-4, atol=1e-6)


def test_batch_size_is_not_read_under_a_plan(randomness):
    records = random_table(12, 3)
    one = update(records, plan(), randomness("a"), batch_size=1)
    other = update(records, plan(), randomness("a"), batch_size=100)
    np.testing.assert_array_equal(one, other)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "clip", "batch", "rate"),
    [(1.0, 1.0, 8, 1.0), (2.5, 0.4, 32, 0.5), (0.3, 3.0, 1, 2.0)],
)
def test_the_noise_is_gaussian_with_the_stated_standard_deviation(
    randomness, noise, clip, batch, rate
):
    """An empty sample leaves the noise alone: N(0, (learning_rate noise clip / batch)^2)."""
    private = plan(noise=noise, rate=1e-12, batch=batch, clip=clip)
    model = {"name": "mlp", "hidden": (128,)}
    given = update(random_table(30, 40), private, randomness("n"), model, learning_rate=rate)
    assert len(given) > 5000
    scale = rate * noise * clip / batch
    assert stats.kstest(given / scale, "norm").pvalue > 1e-3
    assert given.std() == pytest.approx(scale, rel=0.05)
    assert abs(np.corrcoef(given[:-1], given[1:])[0, 1]) < 0.06


def test_every_local_step_adds_its_own_noise(randomness):
    private = plan(noise=1.0, rate=1e-12)
    model = {"name": "mlp", "hidden": (128,)}
    given = update(random_table(30, 40), private, randomness("n"), model, local_steps=9)
    assert given.std() == pytest.approx(3 / 8, rel=0.05)


@pytest.mark.parametrize("model", [{"name": "linear"}, {"name": "mlp"}, {"name": "cnn"}])
def test_an_empty_sample_is_a_step_of_noise(randomness, model):
    rng = np.random.default_rng(4)
    shape = (6, 1, 8, 8) if model["name"] == "cnn" else (6, 5)
    records = table(rng.normal(size=shape), np.array([0, 1, 0, 1, 0, 1]))
    given = update(records, plan(noise=1.0, rate=1e-12), randomness("e"), model, local_steps=2)
    assert np.isfinite(given).all()
    assert (given != 0).all()


def test_no_two_updates_share_noise_or_sample():
    records = random_table(40, 5)
    made, weights = trainer(records, plan(noise=1.0, rate=0.5))
    mask = np.ones(len(weights), np.bool_)
    first, second = (made.update(weights, mask, os.urandom) for _ in range(2))
    assert (first != second).all()
    silent, _ = trainer(records, plan(rate=0.5))
    first, second = (silent.update(weights, mask, os.urandom) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_all_randomness_comes_from_the_source_that_is_given(randomness):
    records, private = random_table(40, 5), plan(noise=1.0, rate=0.5)
    torch.manual_seed(1)
    np.random.seed(1)
    one = update(records, private, randomness("same"), local_steps=3)
    torch.manual_seed(2)
    np.random.seed(2)
    same = update(records, private, randomness("same"), local_steps=3)
    other = update(records, private, randomness("other"), local_steps=3)
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


# --- sampling ------------------------------------------------------------------------------------


def test_samples_are_poisson_at_the_public_rate(randomness):
    """Each record's gradient sits in a coordinate of its own, so a sample can be read off."""
    rows, rate, calls = 300, 0.3, 60
    records = table(np.eye(rows), np.ones(rows))
    made, weights = trainer(records, plan(rate=rate, clip=100.0))
    weights = np.zeros_like(weights)
    mask = np.ones(len(weights), np.bool_)
    drawn = np.array(
        [made.update(weights, mask, randomness(f"call {i}"))[:rows] > 1e-3 for i in range(calls)]
    )
    total = rows * calls
    spread = math.sqrt(rate * (1 - rate) / total)
    assert drawn.mean() == pytest.approx(rate, abs=4 * spread)
    sizes = drawn.sum(axis=1)  # binomial, not fixed and not a shuffle
    assert 0.5 < sizes.var() / (rows * rate * (1 - rate)) < 1.7
    per_record = drawn.sum(axis=0)
    assert 0.75 < per_record.var() / (calls * rate * (1 - rate)) < 1.3


def test_the_steps_of_one_update_draw_new_samples(randomness):
    rows = 300
    records = table(np.eye(rows), np.ones(rows))
    made, weights = trainer(records, plan(rate=0.3, clip=100.0), local_steps=2)
    mask = np.ones(len(weights), np.bool_)
    moved = np.abs(made.update(np.zeros_like(weights), mask, randomness("steps"))[:rows]) > 1e-3
    assert moved.mean() == pytest.approx(1 - 0.7**2, abs=0.12)  # one sample twice would give 0.3


# --- pruned weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [None, plan(noise=1.0, rate=0.5)], ids=["plain", "dp"])
@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": (8,)}, {"name": "cnn"}])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"optimiser": "adam"},
        {"optimiser": "adam", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_pruned_weights_stay_exactly_zero(randomness, private, model, training):
    rng = np.random.default_rng(5)
    shape = (20, 1, 8, 8) if model["name"] == "cnn" else (20, 6)
    records = table(rng.normal(size=shape), np.arange(20) % 3)
    settings = {"learning_rate": 0.1, **training}
    made, weights = trainer(records, private, model, local_steps=4, batch_size=5, **settings)
    mask = rng.random(len(weights)) < 0.4
    start = (weights * mask).astype(np.float32)
    moved = made.update(start, mask, randomness("p"))
    assert (moved[~mask] == 0).all()
    assert np.isfinite(moved).all()
    if private is not None:
        assert (moved[mask] != 0).all()
    else:
        assert (moved[mask] != 0).any()


def test_a_site_carries_nothing_from_round_to_round(randomness):
    records = random_table(20, 5)
    made, weights = trainer(records, None, momentum=0.9, local_steps=5, batch_size=4)
    mask = np.ones(len(weights), np.bool_)
    first = made.update(weights, mask, randomness("r"))
    made.update(weights + first, mask, randomness("between"))
    np.testing.assert_array_equal(made.update(weights, mask, randomness("r")), first)


# --- without a plan ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [{}, {"momentum": 0.9}, {"weight_decay": 0.05}], ids=str)
def test_without_a_plan_full_batches_are_plain_gradient_descent(randomness, training):
    records = random_table(24, 6)
    made, weights = trainer(
        records, None, learning_rate=0.3, batch_size=24, local_steps=5, **training
    )
    mask = np.ones(len(weights), np.bool_)
    given = made.update(weights, mask, randomness("g"))

    module = models.build(config.Model(name="linear"), records.shape, records.outputs, 0)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3, **training)
    x, y = torch.from_numpy(records.features), torch.from_numpy(records.target)
    for _ in range(5):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimiser.step()
    np.testing.assert_allclose(given, models.flatten(module) - weights, atol=1e-6)


def test_without_a_plan_a_pass_visits_every_record_once(randomness):
    records = table(np.eye(12), np.ones(12))
    made, weights = trainer(records, None, learning_rate=0.1, batch_size=5, local_steps=3)
    weights = np.zeros_like(weights)
    moved = made.update(weights, np.ones(len(weights), np.bool_), randomness("pass"))
    assert (moved[:12] > 0).all()
