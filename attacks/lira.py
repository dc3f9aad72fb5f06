"""The likelihood-ratio attack, LiRA: Carlini et al. 2022.

How sure a model is of a candidate's label is compared with how sure shadow models are that were
trained with it, and without it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attacks import membership, shadows
from attacks.attack import Attack, Profile, Progress, Trial
from attacks.case import Case
from attacks.membership import Members, Scores
from attacks.view import Array, Given, ReleasedModelView

Floats = NDArray[np.float64]

ENOUGH: Final = 64
"""Shadow models from which each candidate has a variance of its own (as in the paper)."""


def likelihood_ratio(
    observed: Floats, told: Floats, member: NDArray[np.bool_], enough: int = ENOUGH
) -> Floats:
    """log N(observed; in) - log N(observed; out) of each candidate, float64[n] (algorithm 1).

    observed: float64[n], the target's confidences. told: float64[models, n], the shadow models'.
    member: bool[models, n], true where the model was trained on the candidate; each of both kinds
    at least once. Below `enough` models all candidates share their variance.
    """
    parts = [_normal(np.where(which, told, np.nan), enough) for which in (member, ~member)]
    within, without = (np.asarray(stats.norm.logpdf(observed, *part), np.float64) for part in parts)
    return within - without


def one_sided(observed: Floats, told: Floats, enough: int = ENOUGH) -> Floats:
    """How far above what models without the candidate say, in deviations, float64[n].

    Monotone in the paper's 1 - P[Z > observed] (its offline attack), and never saturates.
    told: float64[models, n], of models that were trained on none of the candidates.
    """
    mean, deviation = _normal(told, enough)
    found: Floats = (observed - mean) / deviation
    return found


def _normal(told: Floats, enough: int) -> tuple[Floats, Floats]:
    """Mean and deviation of each column, without the NaNs in it; float64[n] both."""
    mean: Floats = np.nanmean(told, axis=0)
    variance: Floats = np.nanvar(told, axis=0)
    if len(told) < enough:
        variance = np.full_like(variance, np.nanmean(variance))
    deviation: Floats = np.sqrt(variance) + 1e-6
    return mean, deviation


def _observed(view: ReleasedModelView, given: Given) -> Floats:
    assert given.candidates is not None  # noqa: S101 - Attack.check
    weights = view.weights.numpy()[None]
    found: Floats = shadows.confidences(view.public, weights, given.candidates)[0]
    return found


def online(view: ReleasedModelView, given: Given, seed: int, progress: Progress) -> Scores:
    """Shadow models of all auxiliary records and half of the candidates each."""
    assert given.candidates is not None and given.auxiliary is not None  # noqa: S101, PT018
    rng = np.random.default_rng([seed, 3])
    made = shadows.with_and_without(
        view.public, given.candidates, given.auxiliary, given.shadows, rng, progress
    )
    told = shadows.confidences(view.public, made.weights, given.candidates)
    ratio = likelihood_ratio(_observed(view, given), told, made.member)
    return Scores(Array.of(ratio), _told(view, given))


def offline(view: ReleasedModelView, given: Given, seed: int, progress: Progress) -> Scores:
    """Shadow models of auxiliary records alone: one set of them serves any candidate."""
    assert given.candidates is not None and given.auxiliary is not None  # noqa: S101, PT018
    rng = np.random.default_rng([seed, 4])
    made = shadows.without(view.public, given.auxiliary, given.shadows, rng, progress)
    told = shadows.confidences(view.public, made, given.candidates)
    return Scores(Array.of(one_sided(_observed(view, given), told)), _told(view, given))


def _told(view: ReleasedModelView, given: Given) -> tuple[str, ...]:
    assert given.auxiliary is not None  # noqa: S101
    return (
        f"{given.shadows} shadow models",
        f"the adversary was given {len(given.auxiliary)} of the other training records",
        *shadows.differences(view.public),
    )


def trial(case: Case) -> Trial[Members]:
    """A recorded run's model, and the rest of the training records at hand."""
    return membership.released(case)


def undefended(seed: int, profile: Profile) -> Trial[Members]:
    """A model that has learnt wrong labels by heart."""
    return membership.overfitted(seed, profile)


def no_signal(seed: int, profile: Profile) -> Trial[Members]:
    """The same, of records that it never saw."""
    return membership.overfitted(seed, profile, signal=False)


_SOURCE: Final = (
    "Carlini, Chien, Nasr, Song, Terzis and Tramèr 2022, Membership Inference Attacks From First "
    "Principles"
)

ATTACK: Final = Attack(
    name="lira",
    title="Membership by likelihood ratio (LiRA)",
    source=f"{_SOURCE}, algorithm 1",
    views=(ReleasedModelView,),
    guess=Scores,
    adversary=online,
    score=membership.score,
    claim=membership.claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
    given=frozenset({"candidates", "auxiliary"}),
)

OFFLINE: Final = Attack(
    name="lira-offline",
    title="Membership by likelihood (LiRA offline)",
    source=f"{_SOURCE}, the offline attack",
    views=(ReleasedModelView,),
    guess=Scores,
    adversary=offline,
    score=membership.score,
    claim=membership.claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
    given=frozenset({"candidates", "auxiliary"}),
)
