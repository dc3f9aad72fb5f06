"""What the demonstration reaches, over ten splits of the patients. Slow: twenty whole runs."""

from __future__ import annotations

import importlib.resources

import numpy as np
import pytest
from scipy import stats

from securefl import config
from securefl.runs import run

SEEDS = range(10)


def demo(*overrides: str) -> config.Experiment:
    text = importlib.resources.files("securefl").joinpath("demo.toml").read_text(encoding="utf-8")
    return config.parse(text, overrides, origin="demo.toml")


def interval(values: list[float]) -> str:
    """The mean and its 95 % confidence interval (Student's t)."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


@pytest.mark.slow
def test_the_demonstration_is_accurate_private_and_loses_little_by_pruning(tmp_path):
    pruned, dense, epsilons = [], [], []
    for seed in SEEDS:
        summary = run(demo(f"seed={seed}"), tmp_path / f"pruned-{seed}").summary
        assert summary.private
        assert summary.delta == 1e-3
        assert len(summary.epsilon) == len(summary.sites) == 5
        assert summary.sparsity == pytest.approx(0.9, abs=0.002)
        epsilons += summary.epsilon.values()
        pruned.append(summary.metric["test_accuracy"])
        whole = demo(f"seed={seed}").model_copy(update={"pruning": None})
        dense.append(run(whole, tmp_path / f"dense-{seed}").summary.metric["test_accuracy"])
    print(f"\npruned {interval(pruned)}, dense {interval(dense)}, epsilon <= {max(epsilons):.4f}")
    assert np.mean(pruned) >= 0.94
    assert 0 < max(epsilons) <= 5.0
    assert np.mean(dense) - np.mean(pruned) <= 0.02
