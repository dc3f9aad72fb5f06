"""Members have the smaller loss: Yeom et al. 2018."""

from __future__ import annotations

from typing import Final

from attacks import membership, shadows
from attacks.attack import Attack, Profile, Progress, Trial
from attacks.case import Case
from attacks.membership import Members, Scores
from attacks.view import Array, Given, ReleasedModelView


def adversary(view: ReleasedModelView, given: Given, seed: int, progress: Progress) -> Scores:
    """The score is the negative loss; a threshold on it is the paper's adversary 2."""
    del seed
    assert given.candidates is not None  # noqa: S101 - Attack.check
    loss = shadows.losses(view.public, view.weights.numpy()[None], given.candidates)[0]
    progress(1.0)
    return Scores(Array.of(-loss))


def trial(case: Case) -> Trial[Members]:
    """A recorded run's model, and nothing besides."""
    return membership.released(case, auxiliary=False)


def undefended(seed: int, profile: Profile) -> Trial[Members]:
    """A model that has learnt wrong labels by heart."""
    return membership.overfitted(seed, profile, auxiliary=False)


def no_signal(seed: int, profile: Profile) -> Trial[Members]:
    """The same, of records that it never saw."""
    return membership.overfitted(seed, profile, auxiliary=False, signal=False)


ATTACK: Final = Attack(
    name="loss",
    title="Membership by the loss",
    source="Yeom, Giacomelli, Fredrikson and Jha 2018, Privacy Risk in Machine Learning: "
    "Analyzing the Connection to Overfitting, section 3",
    views=(ReleasedModelView,),
    guess=Scores,
    adversary=adversary,
    score=membership.score,
    claim=membership.claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
    given=frozenset({"candidates"}),
)
