"""DP-SGD keeps what its plan promises: clipping, noise, secret samples, a public divisor."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from scipy import stats

from securefl import config, models
from securefl.data import Table
from securefl.privacy import integers
from securefl.privacy.plan import Cohort, Plan, RecordDistributed, RecordLocal, SiteDistributed
from securefl.privacy.rotation import Rotation
from securefl.privacy.training import Trainer

CPU = torch.device("cpu")
SILENT = 1e-6
"""A noise multiplier that leaves the gradients visible."""


def plan(noise: float = SILENT, rate: float = 1.0, batch: int = 8, clip: float = 1.0):
    return RecordLocal(1e9, 1e-3, clip, rate, batch, noise, 1, dimension=1000)


FINE = 1 << 20
"""A clip of that many grid units: noise of a few of them leaves the gradients visible."""
COHORT = Cohort(sites=3, minimum=3, tolerated=1)


def distributed(
    grid_clip: float = FINE,
    rate: float = 1.0,
    clip: float = 1.0,
    deviation: float = 2.0,
    dimension: int = 1000,
    beta: float = 1e-9,
) -> RecordDistributed:
    """A plan whose clip is `grid_clip` grid units."""
    units = round(grid_clip * (1 << integers.FINE_BITS))
    fields = (1e9, 1e-3, clip, rate, 8, COHORT, dimension, units, deviation, beta)
    return RecordDistributed(*fields)


def table(features, target, people=None) -> Table:
    features = np.asarray(features, np.float32)
    names = tuple(f"x{i}" for i in range(math.prod(features.shape[1:])))
    target = np.asarray(target)
    groups = {} if people is None else {"person": np.array([str(name) for name in people])}
    if target.dtype.kind == "f":
        return Table(features, target.astype(np.float32), names, "regression", (), groups)
    classes = tuple(str(i) for i in range(int(target.max()) + 1))
    return Table(features, target.astype(np.int64), names, "classification", classes, groups)


def random_table(rows: int, features: int, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features))
    return table(x, (np.arange(rows) % 2).astype(np.int64))


def trainer(records: Table, private=None, model=None, **training) -> tuple[Trainer, np.ndarray]:
    section = config.Model(**(model or {"name": "linear"}))
    module = models.build(section, records.shape, records.outputs, 0)
    settings = config.Training(**{"learning_rate": 1.0, **training})
    loss = models.loss(section, records.task)
    person = "person" if "person" in records.groups else None
    made = Trainer(module, loss, records, settings, private, CPU, person)
    return made, models.flatten(module)


def update(records: Table, private, randomness, model=None, mask=None, **training) -> np.ndarray:
    made, weights = trainer(records, private, model, **training)
    if mask is None:
        mask = np.ones(len(weights), np.bool_)
    return made.update(weights * mask, mask, randomness)


def noised_sum(
    records: Table, private: Plan, randomness, model=None, mask=None, weights=None, **training
) -> np.ndarray:
    made, start = trainer(records, private, model, **training)
    if weights is not None:
        start = np.full_like(start, weights)
    if mask is None:
        mask = np.ones(len(start), np.bool_)
    return made.noised_sum(start * mask, mask, randomness)


def norm(vector: np.ndarray) -> float:
    """The L2 norm of integers, from an exact sum of squares."""
    return math.sqrt(sum(int(x) ** 2 for x in vector))


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


class Reused(torch.nn.Module):
    """A layer that is used twice, and one that another is tied to."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 4), torch.nn.Linear(4, outputs)
        self.tied = torch.nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.tied(torch.tanh(self.inner(torch.tanh(self.inner(x)))))))


class Recurrent(torch.nn.Module):
    """Opacus's LSTM over the features as a sequence."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.lstm, self.outer = DPLSTM(1, 3, batch_first=True), torch.nn.Linear(3, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.lstm(x[:, :, None])[0][:, -1])


def reused(shape, outputs):
    return Reused(outputs)


def recurrent(shape, outputs):
    return Recurrent(outputs)


@pytest.mark.parametrize(
    "name", ["linear", "mlp", "cnn", f"{__name__}:reused", f"{__name__}:recurrent"]
)
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


# --- distributed: what one record may move -------------------------------------------------------

ADDED = {
    "a usual one": (np.array([0.3, -1.2, 0.4, 0.9, -0.1, 0.5]), 1.0),
    "huge": (np.full(6, 1e15), -1e15),
    "one huge feature": (np.array([1e9, 0, 0, 0, 0, 0]), 3.0),
    "beyond float32's squares": (np.full(6, 1e30), -1.0),
    "beyond float32": (np.full(6, 3e38), -3e38),
    "tiny": (np.full(6, 1e-20), 1e-20),
    "halfway between grid points": (np.full(6, 0.5), 0.5),
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("pruned", [False, True])
def test_one_record_moves_the_sites_vector_by_at_most_the_sensitivity(
    randomness, added, rate, pruned
):
    """With the same sample of the others, dither and noise: what the accounting assumes."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(20, 6)) * 10, rng.normal(size=20)
    mask = np.ones(7, np.bool_)
    if pruned:
        mask[[0, 3]] = False
    private = distributed(3.3, rate, dimension=7)
    record, target = ADDED[added]
    with_it = table(np.vstack([x, record]), np.append(y, target))
    moved = []
    for i in range(12):
        before = noised_sum(table(x, y), private, randomness(f"{i}"), mask=mask)
        after = noised_sum(with_it, private, randomness(f"{i}"), mask=mask)
        assert len(before) == len(after) == mask.sum()
        moved.append(norm(after - before))
    assert max(moved) <= private.sensitivity
    if added in ("a usual one", "huge", "one huge feature"):
        assert max(moved) > 0.8 * 3.3  # it is drawn sometimes, and then counts
    if added == "huge" and rate < 1:
        assert min(moved) == 0


@pytest.mark.parametrize("beyond", [1e30, 3e38])
def test_a_record_whose_gradient_is_not_finite_adds_nothing_and_spoils_nothing(randomness, beyond):
    x, y = np.eye(6), np.ones(6)
    private = distributed()
    before = noised_sum(table(x, y), private, randomness("a"))
    spoilt = table(np.vstack([x, np.full((1, 6), beyond)]), np.append(y, -beyond))
    np.testing.assert_array_equal(noised_sum(spoilt, private, randomness("a")), before)


def test_records_that_pull_together_move_the_vector_by_their_number_of_clips(randomness):
    """Nothing is clipped after the sum: neither site nor coordinate has a bound of its own."""
    x, y = np.full((500, 6), 1e3), np.full(500, -1e6)
    private = distributed(64)
    empty = noised_sum(table(x, y), distributed(64, rate=1e-12), randomness("a"))
    full = noised_sum(table(x, y), private, randomness("a"))
    assert norm(full - empty) == pytest.approx(500 * 64, rel=1e-3)


def test_the_sum_is_of_clipped_gradients_against_their_direction(randomness):
    """Against gradients taken one record at a time: exact to the grid, the dither and the noise."""
    rng = np.random.default_rng(2)
    records = table(rng.normal(size=(5, 4)), np.array([0, 1, 2, 1, 0]))
    model = {"name": "mlp", "hidden": (4,)}
    each = gradients(records, model)
    clipped = each * np.minimum(1, 0.7 / np.linalg.norm(each, axis=1))[:, None]
    private = distributed(clip=0.7)
    given = noised_sum(records, private, randomness("a"), model)
    assert given.dtype == np.int64
    np.testing.assert_allclose(given * private.grid, -clipped.sum(0), atol=3e-5)


def gradients(records: Table, model) -> np.ndarray:
    """The gradient of every record, taken one at a time, float64[records, d]."""
    section = config.Model(**model)
    module = models.build(section, records.shape, records.outputs, 0)
    found = []
    for i in range(len(records)):
        module.zero_grad()
        output = module(torch.from_numpy(records.features[i : i + 1]))
        target = torch.from_numpy(records.target[i : i + 1])
        torch.nn.functional.cross_entropy(output, target).backward()
        found.append(np.concatenate([p.grad.numpy().ravel() for p in module.parameters()]))
    return np.array(found, np.float64)


def test_a_distributed_step_prunes_before_it_clips(randomness):
    """A pruned coordinate takes no norm, and neither it nor its noise is in the vector."""
    records = table([[1e6, 0.01, 0.02]], np.array([1.0]))
    mask = np.array([False, True, True, False])
    private = distributed()
    moved = noised_sum(records, private, randomness("a"), mask=mask, weights=0.0)
    assert moved.shape == (2,)
    # The gradient of the surviving weights is (-0.02, -0.04), far below the clip: it stays whole.
    np.testing.assert_allclose(moved * private.grid, [0.02, 0.04], rtol=1e-3)
    alone = noised_sum(records, distributed(rate=1e-12), randomness("a"), mask=mask)
    assert alone.shape == (2,)


# --- distributed: nothing comes from the number of records ---------------------------------------


def test_the_sum_does_not_depend_on_how_many_records_there_are(randomness):
    """Neither a divisor nor the noise: twice the records are twice the sum, to a few units."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=10)
    once = noised_sum(table(x, y), distributed(), randomness("a"))
    twice = noised_sum(table(np.vstack([x, x]), np.append(y, y)), distributed(), randomness("b"))
    assert np.abs(once).max() > 1e5
    assert np.abs(twice - 2 * once).max() < 60  # two roundings and two draws of deviation 2


@pytest.mark.parametrize("rows", [60, 300])
def test_a_distributed_sample_is_poisson_at_the_public_rate(randomness, rows):
    """Each record's gradient sits in a coordinate of its own, so a sample can be read off."""
    rate, calls = 0.3, 60
    made, weights = trainer(table(np.eye(rows), np.ones(rows)), distributed(rate=rate))
    weights, mask = np.zeros_like(weights), np.ones(len(weights), np.bool_)
    drawn = np.array(
        [made.noised_sum(weights, mask, randomness(f"{i}"))[:rows] > 1000 for i in range(calls)]
    )
    assert drawn.mean() == pytest.approx(rate, abs=4 * math.sqrt(0.21 / (rows * calls)))
    sizes = drawn.sum(axis=1)  # binomial, not fixed and not a shuffle
    assert 0.4 < sizes.var() / (rows * rate * (1 - rate)) < 1.8


# --- distributed: noise --------------------------------------------------------------------------

WIDE = {"name": "mlp", "hidden": (128,)}
"""5,506 weights for 40 features."""


def test_an_empty_samples_sum_is_exactly_the_discrete_gaussian(randomness):
    """Chi-square against its mass function: the whole of a share, and nothing but the share."""
    deviation = 2.5
    private = distributed(rate=1e-12, deviation=deviation)
    records = random_table(30, 40)
    drawn = np.concatenate(
        [noised_sum(records, private, randomness(f"{i}"), WIDE) for i in range(4)]
    )
    edge = 8
    support = np.arange(-60, 61)
    mass = np.exp(-(support**2) / (2 * deviation**2))
    clamped = np.clip(support, -edge, edge)
    expected = np.bincount(clamped + edge, weights=mass / mass.sum()) * len(drawn)
    counts = np.bincount(np.clip(drawn, -edge, edge) + edge, minlength=2 * edge + 1)
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("sites", [2, 9])
def test_the_noise_of_the_sum_grows_with_the_root_of_the_sites(randomness, sites):
    """n independent shares: standard deviation sqrt(n) deviation, and Gaussian in shape."""
    deviation = 300.7
    private = distributed(rate=1e-12, deviation=deviation)
    records = random_table(30, 40)
    shares = [noised_sum(records, private, randomness(f"site {i}"), WIDE) for i in range(sites)]
    spread = math.sqrt(sites) * deviation
    total = np.sum(shares, axis=0)
    assert total.std() == pytest.approx(spread, rel=0.04)
    assert stats.kstest(total / spread, "norm").pvalue > 1e-3
    for one, other in itertools.pairwise(shares):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_noise_covers_every_surviving_coordinate_of_a_gradient_that_is_zero(randomness):
    """Coordinates that no record touches are noised like the others."""
    records = table(np.zeros((6, 40)), np.array([0, 1, 0, 1, 0, 1]))
    private = distributed(deviation=1000.0)
    given = noised_sum(records, private, randomness("z"), {"name": "linear"}, weights=0.0)
    assert given[:80].std() == pytest.approx(1000.0, rel=0.35)  # the weights; biases follow
    assert (given[:80] != 0).all()


def test_no_two_rounds_of_a_site_share_noise_or_sample():
    records = table(np.eye(40), np.ones(40))
    made, weights = trainer(records, distributed(rate=0.5, deviation=2.0))
    weights, mask = np.zeros_like(weights), np.ones(len(weights), np.bool_)
    first, second = (made.noised_sum(weights, mask, os.urandom) for _ in range(2))
    assert ((first > 1000) != (second > 1000)).any()
    loud, _ = trainer(records, distributed(rate=1e-12, deviation=1e6))
    first, second = (loud.noised_sum(weights, mask, os.urandom) for _ in range(2))
    assert (first != second).all()


def test_all_randomness_of_a_distributed_step_comes_from_the_source_that_is_given(randomness):
    records, private = random_table(40, 5), distributed(rate=0.5, deviation=1e6)
    torch.manual_seed(1)
    np.random.seed(1)
    one = noised_sum(records, private, randomness("same"))
    torch.manual_seed(2)
    np.random.seed(2)
    np.testing.assert_array_equal(noised_sum(records, private, randomness("same")), one)
    assert (noised_sum(records, private, randomness("other")) != one).all()


def test_sample_dither_and_noise_are_drawn_apart(randomness):
    """One seed, three keystreams: noise does not move when the sample or the dither does."""
    quiet = distributed(rate=1e-12, deviation=1e5)
    records = table(np.eye(6), np.ones(6))
    noise = noised_sum(records, quiet, randomness("a"), weights=0.0)
    with_sample = noised_sum(records, distributed(deviation=1e5), randomness("a"), weights=0.0)
    moved = with_sample - noise
    # Gradients are (-2, ..., -2) / sqrt(2) of the clip: the same noise in both cancels.
    np.testing.assert_allclose(moved[:6], FINE / math.sqrt(2), atol=2)
    np.testing.assert_allclose(moved[6], 6 * FINE / math.sqrt(2), atol=8)


# --- distributed: who may ask for what -----------------------------------------------------------


@pytest.mark.parametrize(
    "private", [distributed(), SiteDistributed(8.0, 1e-5, 1.0, COHORT, 7, 1 << 20, 9.0)], ids=type
)
def test_under_a_distributed_plan_no_update_without_noise_is_given(randomness, private):
    with pytest.raises(ValueError, match="only sums may be seen"):
        update(random_table(8, 3), private, randomness("a"))


@pytest.mark.parametrize("private", [None, plan()], ids=["no plan", "local"])
def test_without_a_distributed_plan_there_is_no_noised_sum(randomness, private):
    with pytest.raises(ValueError, match="only a distributed plan"):
        noised_sum(random_table(8, 3), private, randomness("a"))


# --- people --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("size", [1.0, 1e9])
def test_all_rows_of_a_person_move_the_vector_by_at_most_one_sensitivity(randomness, rows, size):
    rng = np.random.default_rng(7)
    x, y, who = rng.normal(size=(20, 6)), rng.normal(size=20), np.arange(20) // 3
    private = distributed(3.3, dimension=7)
    theirs = np.vstack([x, np.full((rows, 6), size)])
    with_them = table(theirs, np.append(y, np.full(rows, -size)), [*who, *["zoe"] * rows])
    for i in range(12):
        before = noised_sum(table(x, y, who), private, randomness(f"{i}"))
        after = noised_sum(with_them, private, randomness(f"{i}"))
        assert 0.3 * 3.3 < norm(after - before) <= private.sensitivity


@pytest.mark.parametrize("rows", [1, 40])
def test_all_rows_of_a_person_move_local_training_by_at_most_one_clipped_step(randomness, rows):
    rng = np.random.default_rng(7)
    x, y, who = rng.normal(size=(20, 6)), rng.normal(size=20), np.arange(20) // 3
    private = plan(batch=16)
    theirs = np.vstack([x, np.full((rows, 6), 1e6)])
    with_them = table(theirs, np.append(y, np.full(rows, -1e6)), [*who, *["zoe"] * rows])
    without = update(table(x, y, who), private, randomness("a"))
    moved = np.linalg.norm((update(with_them, private, randomness("a")) - without).astype(float))
    assert 0.99 / 16 <= moved <= 1 / 16 * (1 + 1e-4)


def test_a_persons_gradient_is_the_mean_of_their_rows_clipped_once(randomness):
    rng = np.random.default_rng(8)
    who = np.array(["b", "a", "b", "c", "a", "b", "d"])  # not in order, and not the same number
    records = table(rng.normal(size=(7, 4)), np.arange(7) % 3, who)
    model = {"name": "mlp", "hidden": (4,)}
    each = gradients(records, model)
    means = np.array([each[who == name].mean(0) for name in "abcd"])
    clipped = means * np.minimum(1, 1.2 / np.linalg.norm(means, axis=1))[:, None]
    assert 0 < (np.linalg.norm(means, axis=1) > 1.2).sum() < 4  # some are clipped and some are not
    private = distributed(clip=1.2)
    given = noised_sum(records, private, randomness("p"), model)
    np.testing.assert_allclose(given * private.grid, -clipped.sum(0), atol=3e-5)


def test_people_are_drawn_whole_and_at_the_public_rate_however_many_rows_they_have(randomness):
    """Each row's gradient sits in a coordinate of its own; its person has one to five of them."""
    rng = np.random.default_rng(9)
    who = rng.permutation(np.repeat(np.arange(100), np.arange(100) % 5 + 1))
    rows, rate, calls = len(who), 0.3, 40
    made, weights = trainer(table(np.eye(rows), np.ones(rows), who), distributed(rate=rate))
    weights, mask = np.zeros_like(weights), np.ones(len(weights), np.bool_)
    taken = np.array(
        [made.noised_sum(weights, mask, randomness(f"{i}"))[:rows] > 1000 for i in range(calls)]
    )
    people = np.array([taken[:, who == name].mean(1) for name in range(100)])
    assert set(np.unique(people)) == {0.0, 1.0}
    assert people.mean() == pytest.approx(rate, abs=4 * math.sqrt(0.21 / (100 * calls)))
    few, many = people[::5].mean(), people[4::5].mean()  # one row, five rows
    assert abs(few - many) < 5 * math.sqrt(2 * 0.21 / (20 * calls))


def test_a_large_sample_of_people_is_summed_in_parts_without_splitting_anyone(
    randomness, monkeypatch
):
    """Per-sample gradients are taken some people at a time; their number changes no sum."""
    from securefl.privacy import training

    rng = np.random.default_rng(10)
    records = table(rng.normal(size=(60, 4)), np.arange(60) % 3, np.arange(60) % 17)
    whole = noised_sum(records, distributed(), randomness("a"))
    monkeypatch.setattr(training, "_MOST_NUMBERS", 60)  # four people of 15 weights
    np.testing.assert_allclose(noised_sum(records, distributed(), randomness("a")), whole, atol=30)


# --- a site's whole update -----------------------------------------------------------------------


def site_plan(grid_clip: float, dimension: int, deviation: float = 2.0) -> SiteDistributed:
    units = round(grid_clip * (1 << integers.FINE_BITS))
    return SiteDistributed(1e9, 1e-3, 1.0, COHORT, dimension, units, deviation)


def rounded_update(records: Table, private: SiteDistributed, randomness, name: str, **training):
    """The site's vector without its noise: what a site of nothing but zeros sends, taken away."""
    zeros = table(np.zeros_like(records.features), np.zeros(len(records)))
    noise = noised_sum(zeros, private, randomness(name), weights=0.0, **training)
    return noised_sum(records, private, randomness(name), weights=0.0, **training) - noise


@pytest.mark.parametrize("rate", [1e-3, 1e3])
@pytest.mark.parametrize("training", [{}, {"local_steps": 4, "momentum": 0.5}], ids=str)
def test_a_sites_rounded_update_never_exceeds_the_sensitivity(randomness, rate, training):
    """Half-way between grid points in 51 coordinates, one rounding in seven would exceed it."""
    records = table(np.ones((8, 50)), np.ones(8))
    private = site_plan(10.5 * math.sqrt(51), 51)
    for i in range(40):
        moved = rounded_update(
            records, private, randomness, f"{i}", learning_rate=rate, batch_size=8, **training
        )
        assert norm(moved) <= private.sensitivity
    if rate > 1:
        assert norm(moved) > 0.9 * private.units / (1 << integers.FINE_BITS)


def test_a_sites_update_within_the_clip_is_sent_as_it_is(randomness):
    records = table([[0.1, 0.2]] * 4, np.full(4, 0.5))
    private = site_plan(FINE, 3)
    moved = rounded_update(records, private, randomness, "a", learning_rate=0.25, batch_size=4)
    # One full-batch step of squared error from zero: 0.25 * 2 * 0.5 * (x, 1).
    np.testing.assert_allclose(moved * private.grid, [0.025, 0.05, 0.25], atol=1e-5)
    far = rounded_update(records, private, randomness, "a", learning_rate=250.0, batch_size=4)
    length = math.hypot(0.1, 0.2, 1.0)
    expected = np.array([0.1, 0.2, 1.0]) / length
    np.testing.assert_allclose(far * private.grid, expected, atol=1e-5)


def test_a_sites_vector_has_the_stated_noise_and_only_the_surviving_weights(randomness):
    rng = np.random.default_rng(11)
    records = random_table(10, 40)
    private = site_plan(50.0, 5506, deviation=700.3)
    made, weights = trainer(records, private, WIDE)
    mask = rng.random(len(weights)) < 0.7
    weights = weights * mask
    given = made.noised_sum(weights, mask, randomness("s"))
    assert len(given) == mask.sum()
    assert given.std() == pytest.approx(700.3, rel=0.05)
    assert stats.kstest(given / 700.3, "norm").pvalue > 1e-3
    again = made.noised_sum(weights, mask, randomness("t"))
    assert (given != again).mean() > 0.99
    assert abs(np.corrcoef(given, again)[0, 1]) < 0.06


def test_a_site_whose_training_diverged_sends_its_noise_alone(randomness):
    """That an update was not finite is a secret of the site: it may not show as a refusal."""
    records = table(np.full((8, 50), 1e6), np.full(8, 1e6))
    private = site_plan(100.0, 51)
    zeros = table(np.zeros((8, 50)), np.zeros(8))
    settings = {"learning_rate": 1e30, "local_steps": 6, "batch_size": 8}
    noise = noised_sum(zeros, private, randomness("d"), weights=0.0, **settings)
    given = noised_sum(records, private, randomness("d"), weights=0.0, **settings)
    np.testing.assert_array_equal(given, noise)


def test_the_noise_of_a_share_is_that_of_the_sampler_at_the_plans_deviation(randomness):
    """A change of the plan's deviation changes the share's, and nothing else does."""
    records = random_table(30, 40)
    spread = [
        noised_sum(records, distributed(rate=1e-12, deviation=d), randomness("n"), WIDE).std()
        for d in (10.0, 1000.0)
    ]
    assert spread == pytest.approx([10.0, 1000.0], rel=0.05)


# --- what is within an adaptive clip -------------------------------------------------------------


def slopes(norms: list[float], people=None) -> Table:
    """Records whose squared-error gradients at zero have these norms, all along the bias."""
    features = np.zeros((len(norms), 2))
    return table(features, np.array(norms) / 2, people)


NORMS = [0.5] * 7 + [1.5] * 3 + [6.0] * 2


@pytest.mark.parametrize(("scale", "within"), [(0.25, 0), (1.0, 7), (2.0, 10), (8.0, 12)])
def test_a_sum_counts_the_records_within_the_clip_of_the_round(randomness, scale, within):
    private = dataclasses.replace(distributed(dimension=3), counted=True)
    made, _ = trainer(slopes(NORMS), private)
    zeros, mask = np.zeros(3, np.float32), np.ones(3, np.bool_)
    given = made.noised_sum(zeros, mask, randomness("c"), scale)
    assert len(given) == 4
    count = private.count / (1 << integers.FINE_BITS)
    assert given[3] == pytest.approx(count * (2 * within - 12), abs=30)
    clipped = sum(min(norm, scale) for norm in NORMS)
    assert given[2] * private.grid * scale == pytest.approx(clipped, rel=1e-4)
    mask[0] = False  # no pruning takes the count
    fewer = made.noised_sum(zeros, mask, randomness("c"), scale)
    assert len(fewer) == 3
    assert fewer[2] == pytest.approx(count * (2 * within - 12), abs=30)


def test_a_person_is_counted_once(randomness):
    """By the norm of the mean of all rows: here 0.5, 1.5 and 6 for seven, two and three rows."""
    private = dataclasses.replace(distributed(dimension=3), counted=True, unit="person")
    rows = [0.1, 0.9, 0.5, 0.5, 0.2, 0.8, 0.5, 1.0, 2.0, 6.0, 5.0, 7.0]
    made, _ = trainer(slopes(rows, [*"aaaaaaabbccc"]), private)
    given = made.noised_sum(np.zeros(3, np.float32), np.ones(3, np.bool_), randomness("p"), 2.0)
    count = private.count / (1 << integers.FINE_BITS)
    assert given[3] == pytest.approx(count * (2 - 1), abs=30)


@pytest.mark.parametrize(("scale", "within"), [(0.25, 0), (1.0, 7), (8.0, 12)])
def test_local_noise_tells_the_mean_share_of_its_steps(randomness, scale, within):
    private = dataclasses.replace(plan(batch=16), counted=True, steps_per_round=3)
    records = slopes(NORMS)
    made, _ = trainer(records, private, local_steps=3, learning_rate=1e-9)  # stays where it is
    given = made.update(np.zeros(3, np.float32), np.ones(3, np.bool_), randomness("l"), scale)
    assert given.dtype == np.float32
    assert len(given) == 4
    assert given[3] == pytest.approx((within - 12 / 2) / 16, abs=1e-4)
    clipped = sum(min(norm, scale) for norm in NORMS)
    assert given[2] == pytest.approx(3e-9 * clipped / 16, rel=1e-3)


def test_the_noise_of_a_local_share_is_the_plans(randomness):
    """One coordinate of many: an empty sample tells it alone."""
    private = dataclasses.replace(plan(2.0, rate=1e-12, batch=16), counted=True)
    made, weights = trainer(slopes(NORMS), private)
    mask = np.ones(len(weights), np.bool_)
    told = [made.update(weights, mask, randomness(f"{i}"))[3] for i in range(600)]
    assert np.std(told) == pytest.approx(private.share_error(1), rel=0.12)
    assert stats.kstest(np.array(told) / private.share_error(1), "norm").pvalue > 1e-3


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("scale", "within"), [(0.1, -1), (0.21, 1), (1.0, 1)])
def test_a_sites_update_tells_if_it_was_within_the_clip(randomness, scale, within, rotated):
    """Its norm is 0.2: clipped with the count, rotated with it, and found again."""
    private = dataclasses.replace(site_plan(FINE, 3), counted=True)
    records = table(np.zeros((4, 2)), np.full(4, 0.5))
    made, _ = trainer(records, private, learning_rate=0.2, batch_size=4)
    rotation = Rotation(4, bytes(32)) if rotated else None
    zeros, mask = np.zeros(3, np.float32), np.ones(3, np.bool_)
    given = made.noised_sum(zeros, mask, randomness("u"), scale, rotation)
    assert norm(given) <= private.sensitivity + 40
    found = given * private.grid * scale
    if rotation is not None:
        found = rotation.restore(found)
    expected = [0.0, 0.0, min(0.2, scale), within * scale / 8]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_diverged_site_is_not_counted(randomness):
    """Neither within nor beyond: what it sends is noise alone."""
    private = dataclasses.replace(site_plan(100.0, 51), counted=True)
    settings = {"learning_rate": 1e30, "local_steps": 6, "batch_size": 8}
    spoilt = table(np.full((8, 50), 1e6), np.full(8, 1e6))
    given = noised_sum(spoilt, private, randomness("d"), weights=0.0, **settings)
    assert len(given) == 52
    assert np.abs(given).max() < 20  # the count is 12.5 grid units and noise 2
    zeros = table(np.zeros((8, 50)), np.zeros(8))
    calm = noised_sum(zeros, private, randomness("d"), weights=0.0, **settings)
    assert calm[-1] - given[-1] == pytest.approx(12.5, abs=1)
    np.testing.assert_allclose(calm[:-1], given[:-1], atol=1)
