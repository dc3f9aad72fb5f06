"""LiRA beside the loss attack on overfitted digits with wrong labels, and beside the papers.

Digits has 1,797 records: no single model has the 2,995 non-members that a true-positive rate at
0.1 % false positives takes. So many target models are attacked, as in the papers: every model is
trained on a random half of 600 records, which it learns by heart, wrong labels too; each is the
target in turn, the others are its shadow models, and the scores of all targets are pooled. A
record's scores under different targets are not independent: intervals are bootstrapped over
records, each with all its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from row import Row

from attacks import lira, membership, shadows
from attacks.evidence import Interval, Roc, bootstrap

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """Scores of one attack on every target, float64[targets, n], and who was a member."""

    scores: Floats
    member: NDArray[np.bool_]

    def roc(self) -> Roc:
        """Over all targets."""
        return Roc.of(self.scores.ravel(), self.member.ravel())

    def shuffled(self, rng: np.random.Generator) -> Roc:
        """With membership exchanged at random within every target."""
        return Roc.of(self.scores.ravel(), rng.permuted(self.member, axis=1).ravel())

    def interval(self, fpr: float, rng: np.random.Generator, resamples: int = 200) -> Interval:
        """Of the true-positive rate, over records."""

        def rate(rows: NDArray[np.int64]) -> float:
            member = self.member[:, rows].ravel()
            return Roc.of(self.scores[:, rows].ravel(), member).tpr_at(fpr).rate

        return bootstrap(rate, np.arange(self.member.shape[1]), rng=rng, resamples=resamples)


def attacked(models: int, records: int, rounds: int, seed: int) -> dict[str, Pooled]:
    """The attacks "lira" and "loss" on each of `models` (even) models, in turn the target.

    The target's twin, trained on the other half, is no shadow model of it: with it, who has one
    shadow model more than others would be known to be a non-member.
    """
    rng = np.random.default_rng([seed, 7])
    public = membership.digits_run(rounds)
    pool = membership.taken(membership.noisy_digits(seed), np.arange(records))
    none = membership.taken(pool, np.arange(0))
    made = shadows.with_and_without(public, pool, none, models, rng)
    told = shadows.confidences(public, made.weights, pool)
    ratios = []
    for target in range(models):
        others = [k for k in range(models) if k // 2 != target // 2]
        ratios.append(lira.likelihood_ratio(told[target], told[others], made.member[others]))
    losses = shadows.losses(public, made.weights, pool)
    return {
        "lira": Pooled(np.stack(ratios), made.member),
        "loss": Pooled(-losses, made.member),
    }


def rows(models: int, seed: int = 0) -> Iterator[Row]:
    """LiRA and the loss attack on `models` targets of ours."""
    found = attacked(models, records=600, rounds=30, seed=seed)
    rng = np.random.default_rng([seed, 8])
    rates = {}
    for name, title in (("lira", "LiRA online"), ("loss", "loss (Yeom et al. 2018)")):
        rates[name] = found[name].roc().tpr_at(0.001).rate
        interval = found[name].interval(0.001, rng)
        note = (
            f"digits, {membership.NOISE:.0%} wrong labels, {models} models; "
            f"{interval.low:.4f} to {interval.high:.4f} over records"
        )
        yield Row(f"{title}: TPR at 0.1 % FPR", "ours alone", None, round(rates[name], 4), note)
    source = "Carlini et al. 2022, abstract"
    ratio = rates["lira"] / max(rates["loss"], 1e-9)
    yield Row("LiRA over the loss attack, TPR at 0.1 % FPR", source, 10, round(ratio, 1))
    for name in found:
        auc = found[name].roc().auc
        yield Row(f"{name}: AUC", "ours alone", None, round(auc, 4))
        auc = found[name].shuffled(rng).auc
        yield Row(f"{name}: AUC with membership shuffled", "by definition", 0.5, round(auc, 4))
