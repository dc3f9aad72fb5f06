"""Test figures are what their textbook definitions say, in the target's own units."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score
from torch import nn

from securefl.config import ConfigurationError, Model
from securefl.data import Table
from securefl.evaluation import BATCH, evaluate
from securefl.models import loss


def classified(scores, target, kinds=2):
    """A table whose features are the logits themselves."""
    return Table(
        features=np.array(scores, np.float32),
        target=np.array(target, np.int64),
        names=tuple(f"logit {k}" for k in range(kinds)),
        task="classification",
        classes=tuple(f"class {k}" for k in range(kinds)),
    )


def measured(values, target, target_range=None):
    return Table(
        features=np.array(values, np.float32)[:, None],
        target=np.array(target, np.float32),
        names=("value",),
        task="regression",
        target_range=target_range,
    )


def figures(table):
    return evaluate(nn.Identity(), loss(Model(), table.task), table, "cpu")


def test_two_classes_give_loss_accuracy_and_auc():
    got = figures(classified([[0, 1], [0, -1], [0, 2], [0, 3]], [1, 0, 0, 1]))
    assert list(got) == ["test_loss", "test_accuracy", "test_auc"]
    assert all(type(value) is float for value in got.values())
    assert got["test_accuracy"] == 0.75
    assert got["test_auc"] == 0.75
    expected = np.mean(np.log1p(np.exp([-1, -1, 2, -3])))
    assert got["test_loss"] == pytest.approx(expected)


def test_more_classes_have_no_auc():
    got = figures(classified(np.eye(3), [0, 1, 1], kinds=3))
    assert list(got) == ["test_loss", "test_accuracy"]
    assert got["test_accuracy"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=30))
def test_auc_agrees_with_scikit_learn_ties_included(records):
    scores, target = zip(*records, strict=True)
    got = figures(classified([[0, score] for score in scores], target))
    if len(set(target)) == 2:
        assert got["test_auc"] == pytest.approx(roc_auc_score(target, scores))
    else:
        assert "test_auc" not in got


def test_a_diverged_model_gets_figures_without_an_auc():
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, float("nan"))
    table = classified([[0, 1], [1, 0]], [1, 0])
    got = evaluate(network, loss(Model(), "classification"), table, "cpu")
    assert "test_auc" not in got
    assert np.isnan(got["test_loss"])


def test_regression_figures_are_in_the_targets_own_units():
    truth, guess = np.array([10.0, 20, 40]), np.array([12.0, 17, 41])
    got = figures(measured(guess / 25 - 1, truth / 25 - 1, target_range=(0, 50)))
    assert list(got) == ["test_loss", "test_mse", "test_mae", "test_r2"]
    assert got["test_mse"] == pytest.approx((4 + 9 + 1) / 3, rel=1e-5)
    assert got["test_mae"] == pytest.approx(2, rel=1e-5)
    assert got["test_r2"] == pytest.approx(r2_score(truth, guess), rel=1e-5)
    assert got["test_loss"] == pytest.approx(got["test_mse"] / 25**2, rel=1e-5)


def test_without_a_declared_range_the_units_are_those_of_training():
    got = figures(measured([1, 2], [2, 4]))
    assert got["test_mse"] == got["test_loss"] == 2.5
    assert "test_r2" not in figures(measured([1, 2], [3, 3]))


def test_batches_change_nothing():
    rng = np.random.default_rng(0)
    count = 2 * BATCH + 7
    scores, target = rng.normal(size=(count, 2)), rng.integers(0, 2, count)
    got = figures(classified(scores, target))
    assert got["test_accuracy"] == (scores.argmax(axis=1) == target).mean()
    assert got["test_auc"] == pytest.approx(roc_auc_score(target, scores[:, 1] - scores[:, 0]))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_weights_and_gradients_alone(training):
    """Dropout is off while testing, and back as it was afterwards."""
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2)).train(training)
    before = network[1].weight.clone()
    table = classified(np.ones((8, 2)), [0, 1] * 4)
    per_sample = loss(Model(), "classification")
    once, twice = (evaluate(network, per_sample, table, torch.device("cpu")) for _ in range(2))
    assert once == twice
    assert network.training is training
    assert network[1].weight.grad is None
    assert torch.equal(network[1].weight, before)


def test_no_held_out_records_are_refused():
    with pytest.raises(ConfigurationError, match=r"raise data\.test_fraction"):
        figures(classified([[0, 1]], [1]).take([]))
