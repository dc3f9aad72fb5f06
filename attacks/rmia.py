"""The relative attack, RMIA: Zarifzadeh, Liu and Shokri 2024.

A candidate's likelihood under the model, over that under models in general, is compared with the
same ratio of other records of the population, one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from attacks import membership, shadows
from attacks.attack import Attack, Progress
from attacks.lira import no_signal, trial, undefended
from attacks.membership import Scores
from attacks.view import Array, Given, Records, ReleasedModelView

Floats = NDArray[np.float64]

GAMMA: Final = 2.0
"""By how much a candidate's ratio must exceed another's to dominate it (section 3)."""


def dominated(candidates: Floats, population: Floats, gamma: float = GAMMA) -> Floats:
    """The share of the population that each candidate dominates, float64[n].

    candidates: float64[n] and population: float64[k], log of p(x | model) / p(x). Ties, which a
    small population makes many of, are broken by the candidates' own ratios, by less than 1/k.
    """
    sorted_ = np.sort(population)
    count = np.searchsorted(sorted_, candidates - np.log(gamma), "right")
    found: Floats = (count + special.expit(candidates) * 0.5) / max(1, len(population))
    return found


def adversary(view: ReleasedModelView, given: Given, seed: int, progress: Progress) -> Scores:
    """Reference models of half of the candidates each; a fifth of the auxiliary is population.

    p(x) is the mean over reference models, of which half were trained on x; of the
    population none was.
    """
    assert given.candidates is not None and given.auxiliary is not None  # noqa: S101, PT018
    rng = np.random.default_rng([seed, 5])
    public, asked = view.public, given.candidates
    order = rng.permutation(len(given.auxiliary))
    apart = max(1, len(order) // 5)
    population, known = (
        membership.taken(given.auxiliary, rows) for rows in (order[:apart], order[apart:])
    )
    made = shadows.with_and_without(public, asked, known, given.shadows, rng, progress)
    both = shadows.joined(asked, population)
    target = _log_likelihoods(view, view.weights.numpy()[None], both)[0]
    told = _log_likelihoods(view, made.weights, both)
    ratio = target - (special.logsumexp(told, axis=0) - np.log(len(told)))
    notes = (
        f"{given.shadows} reference models, a population of {apart} records",
        f"the adversary was given {len(order)} of the other training records",
        *shadows.differences(public),
    )
    split = len(asked)
    return Scores(Array.of(dominated(ratio[:split], ratio[split:])), notes)


def _log_likelihoods(
    view: ReleasedModelView, weights: NDArray[np.float32], records: Records
) -> Floats:
    """log p(label | record) under each model; for regression that of a normal, but for a constant.

    Cross-entropy is -log p.
    """
    return -shadows.losses(view.public, weights, records)


ATTACK: Final = Attack(
    name="rmia",
    title="Membership by comparison (RMIA)",
    source="Zarifzadeh, Liu and Shokri 2024, Low-Cost High-Power Membership Inference Attacks, "
    "section 3",
    views=(ReleasedModelView,),
    guess=Scores,
    adversary=adversary,
    score=membership.score,
    claim=membership.claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
    given=frozenset({"candidates", "auxiliary"}),
)
