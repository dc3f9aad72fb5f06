"""What membership attacks share: which records are asked about, the score, and worlds to try in.

Candidates are as many members as non-members, shuffled. Members and non-members of one class are
paired at random, where neither the adversary nor the shadow models see it: where records were
divided at random into training and test records of each class, which of a pair was trained on is a
fair coin, independent of all other pairs', and exchanging the two leaves everything else as it was.
That is what the test of a promised epsilon stands on (`_against_promise`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Final, final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special

from attacks import evidence, shadows
from attacks.attack import AttackResult, Claim, Curve, Profile, Score, Trial, UnavailableError
from attacks.case import Case
from attacks.evidence import Roc, TooFewError
from attacks.view import Array, Given, Public, Records, ReleasedModelView
from protocols.identity import digest
from securefl import config, data
from securefl.config import Experiment
from securefl.data import Table

CONFIDENCE: Final = 0.99
"""Of "succeeded", over all figures together: of a hundred runs without a leak one may err."""

RATES: Final = (0.01, 0.001)
"""False-positive rates at which true positives are counted (Carlini et al. 2022)."""

_POINTS: Final = 400
_KINDS: Final = 1 + len(RATES)


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A score for each candidate, float64[n], the higher the likelier a member."""

    of: Array
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Promise:
    """(epsilon, delta)-differential privacy under adding or removing one record."""

    epsilon: float
    delta: float


@final
@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """The truth: who of the candidates was trained on, and with whom each is paired.

    member: bool[n]. pairs: int64[k, 2], a member and a non-member of the same class each, and none
    twice. seed: of the shuffling.
    promised: what holds of every record, if anything does.
    """

    member: NDArray[np.bool_] = field(repr=False)
    pairs: NDArray[np.int64] = field(repr=False)
    seed: int
    promised: Promise | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ins, outs = self.pairs.T
        if not (self.member[ins].all() and not self.member[outs].any()):
            raise ValueError("a pair is one member and one non-member, in this order")


# --- candidates ---------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Whom the adversary is asked about, who of them was trained on, and the training's rest."""

    asked: Records
    truth: Members
    rest: Records | None

    @classmethod
    def drawn(
        cls,
        trained: Records,
        held_out: Records,
        each: int,
        seed: int,
        promised: Promise | None = None,
        notes: tuple[str, ...] = (),
    ) -> Candidates:
        """`each` at random of those trained on, and as many of those that were held out."""
        rng = np.random.default_rng([seed, 8])
        chosen = rng.permutation(len(trained))
        ins, outs = chosen[:each], rng.permutation(len(held_out))[:each]
        both = shadows.joined(taken(trained, ins), taken(held_out, outs))
        order = rng.permutation(2 * each)
        asked = taken(both, order)
        pairs = _paired(order < each, asked, rng)
        truth = Members(order < each, pairs, seed, promised, notes)
        rest = taken(trained, chosen[each:]) if each < len(trained) else None
        return cls(asked, truth, rest)


def _paired(
    member: NDArray[np.bool_], asked: Records, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Members and non-members of the same class at random, as many as there are of both."""
    target = asked.target.numpy()
    strata = target if target.dtype == np.int64 else np.zeros(len(target), np.int64)
    pairs = []
    for stratum in np.unique(strata):
        ins, outs = (
            rng.permutation(np.flatnonzero((strata == stratum) & which))
            for which in (member, ~member)
        )
        many = min(len(ins), len(outs))
        pairs.append(np.stack([ins[:many], outs[:many]], axis=1))
    return np.concatenate(pairs)


def taken(records: Records, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Records:
    """Those of `records` at `rows`."""
    return Records(Array.of(records.features.numpy()[rows]), Array.of(records.target.numpy()[rows]))


def gathered(tables: Iterable[Table]) -> Records:
    """The records of several tables, each table once."""
    once = list({id(table): table for table in tables}.values())
    features = np.concatenate([table.features for table in once])
    return Records(Array.of(features), Array.of(np.concatenate([table.target for table in once])))


def candidates(case: Case) -> Candidates:
    """Of a recorded run: training and held-out records of all sites whose records are at hand.

    At most half of the training records, for the rest is what the adversary may know.
    """
    held = [case.tables(site) for site in case.auditing]
    if not held:
        raise UnavailableError("no site's records are at hand: a site audits with --site FOLDER")
    trained, held_out = gathered(x for x, _ in held), gathered(x for _, x in held)
    most = 500 if case.profile is Profile.quick else 10_000
    each = min(most, len(trained) // 2, len(held_out))
    if each < 2:
        raise UnavailableError(
            f"{len(trained)} training and {len(held_out)} held-out records are at hand: "
            "membership takes 4 and 2 at least"
        )
    # Whoever has the experiment alone must not be able to shuffle them again.
    held_by_sites = trained.features.data, trained.target.data
    seed = int.from_bytes(digest("candidates", case.experiment.digest(), *held_by_sites)[:6])
    promised, notes = _promised(case.experiment)
    if len(case.auditing) < len(case.sites):
        notes = (*notes, f"candidates are of {', '.join(case.auditing)} only")
    return Candidates.drawn(trained, held_out, each, seed, promised, notes)


def _promised(experiment: Experiment) -> tuple[Promise | None, tuple[str, ...]]:
    """What is promised of any record of a run; and why that is not tested, where it is not."""
    privacy, schema = experiment.privacy, experiment.data.agreed
    if privacy is None:
        return None, ()
    if privacy.unit == "person":
        why = "it is a person's, and candidates are single records"
    elif schema is None and experiment.data.test_column is None:
        if experiment.sites.partition != "column":
            return Promise(privacy.epsilon, privacy.delta), ()
        why = "test records were drawn at each site apart"
    elif schema is None or schema.test is not None:
        why = "test records were not drawn at random"
    elif schema.person is None or privacy.unit == "record":
        return Promise(privacy.epsilon, privacy.delta), ()
    else:
        why = "test records were drawn a person at a time"
    return None, (f"the promised epsilon is not tested: {why}",)


def released(case: Case, auxiliary: bool = True) -> Trial[Members]:
    """Whoever gets the model, and is asked about records of the case.

    auxiliary: whether the adversary is given the rest of the training records at hand, as
    differential privacy grants it.
    """
    asked = candidates(case)
    view = case.released()
    count = len(asked.rest or ()) + len(asked.asked) // 2
    quick = case.profile is Profile.quick
    afforded = shadows.affordable(view.public, count, *((2e11, 32) if quick else (6e12, 256)))
    given = Given(asked.asked, asked.rest if auxiliary else None, afforded)
    return Trial(view, asked.truth, given)


def claim(experiment: Experiment) -> Claim:
    """What a run promises of any one record."""
    privacy = experiment.privacy
    if privacy is None:
        return Claim(
            "nothing is promised of what the model tells of the records it was trained on",
            "nothing",
            made=False,
        )
    assumed = {
        "record": "one record is protected: of a person with several, the epsilons add up",
        "person": "all records of one person are protected: a relative's may still tell of them",
        "site": "all that a site contributes is protected, and with it each of its records",
    }
    return Claim(
        f"what the model tells of any one {privacy.unit} is bounded by an epsilon of at most "
        f"{privacy.epsilon:g} at delta {privacy.delta:g}",
        assumed[privacy.unit],
    )


# --- the score ------------------------------------------------------------------------------------


def score(guess: Scores, truth: Members, seed: int) -> Score:
    """AUC, and true positives at few false ones, of scores against who was a member."""
    scores = np.asarray(guess.of.numpy(), np.float64)
    if scores.shape != truth.member.shape:
        raise ValueError(f"{scores.shape} scores of {truth.member.shape} candidates: one each")
    roc = Roc.of(np.nan_to_num(scores, nan=-np.inf), truth.member)
    strict = 1 - (1 - CONFIDENCE) / _KINDS
    results = [AttackResult("AUC", roc.auc, roc.auc_interval(strict), 0.5, len(scores), seed)]
    notes = [*truth.notes, *guess.notes, f"candidates were shuffled with seed {truth.seed}"]
    found = roc.auc_interval(strict).low > 0.5
    for rate in RATES:
        try:
            at = roc.tpr_at(rate)
        except TooFewError as error:
            notes.append(str(error))
            continue
        right, wrong = (
            evidence.clopper_pearson(count, n, strict)
            for count, n in (
                (at.positives, at.members),
                (at.false_positives, at.non_members),
            )
        )
        name = f"TPR at {rate * 100:g} % FPR"
        results.append(AttackResult(name, at.rate, right, rate, at.members, seed))
        found = found or right.low > max(rate, wrong.high)
    p = None
    if truth.promised is not None:
        p, told = _against_promise(scores, truth, seed)
        notes.append(told)
    return Score(
        results=tuple(results),
        succeeded=found,
        p=p,
        limit=_limit(len(roc.members), len(roc.non_members), strict),
        curves=(_drawn(roc),),
        notes=tuple(notes),
    )


def _against_promise(scores: NDArray[np.float64], truth: Members, seed: int) -> tuple[float, str]:
    """How likely so many right guesses are, if each record were promised (epsilon, delta).

    In every pair the one with the higher score is guessed to be the member. Exchanging the two is
    removing one record and adding another, so that pairs' coins are protected with 2 epsilon and
    (1 + e^epsilon) delta (two steps of group privacy); one run's many guesses are bounded by
    Steinke, Nasr and Jagielski 2023, theorem 5.2. How many of the clearest pairs to guess is chosen
    on one half of them, and tested once on the other.

    Formal Guarantees: where records were divided at random into training and test records, and the
    promise holds, the result is at most x with probability at most x, for every x.
    """
    assert truth.promised is not None  # noqa: S101
    rng = np.random.default_rng([seed, 9])
    epsilon = 2 * truth.promised.epsilon
    delta = (1 + exp(min(truth.promised.epsilon, 700.0))) * truth.promised.delta  # beyond: no float
    delta = min(1.0, delta)
    ins, outs = np.nan_to_num(scores, nan=-np.inf)[rng.permutation(truth.pairs)].T
    with np.errstate(invalid="ignore"):
        margin = np.nan_to_num(ins - outs)
    margin = np.where(margin == 0, rng.choice([-1e-300, 1e-300], len(margin)), margin)
    half = len(margin) // 2

    def tested(margin: NDArray[np.float64], share: float) -> tuple[float, int, int]:
        r = max(1, int(share * len(margin)))
        clearest = margin[np.argsort(-np.abs(margin), kind="stable")[:r]]
        v = int((clearest > 0).sum())
        return evidence.p_value(len(margin), r, v, epsilon, delta), r, v

    if half < 1:
        return 1.0, "there are too few candidates to test the promised epsilon"
    share = min((1.0, 1 / 3, 1 / 10), key=lambda x: tested(margin[:half], x)[0])
    p, r, v = tested(margin[half:], share)
    return p, (
        f"of {len(margin) - half} pairs of a member and a non-member the clearest {r} were guessed,"
        f" {v} of them rightly; exchanging the two is bounded by twice the promised epsilon"
    )


def _limit(members: int, non_members: int, confidence: float) -> str:
    """The least AUC that would have been found with 80 % power, by its spread without a signal."""
    spread = sqrt((members + non_members + 1) / (12 * members * non_members))
    least = 0.5 + (special.ndtri((1 + confidence) / 2) + special.ndtri(0.8)) * spread
    return f"an AUC of {min(1.0, least):.2f} would have shown with a chance of 80 %"


def _drawn(roc: Roc) -> Curve:
    """The ROC curve, at no more than so many points, evenly on a logarithmic axis."""
    curve = roc.curve()
    wanted = np.concatenate([[0.0], np.geomspace(1 / len(roc.non_members), 1.0, _POINTS - 1)])
    at = np.unique(np.searchsorted(curve.fpr, wanted, "right") - 1)
    return Curve(tuple(curve.fpr[at].tolist()), tuple(curve.tpr[at].tolist()), "ROC")


# --- worlds with a known answer ---------------------------------------------------------------

_WORLD: Final = """
version = 1
name = "membership-control"
rounds = {rounds}
[data]
source = "digits"
default_range = [0, 16]
[sites]
count = 2
[model]
name = "mlp"
hidden = [64]
[training]
local_steps = 20
batch_size = 32
learning_rate = 0.5
momentum = 0.5
[protocol]
name = "plain"
clip = 16.0
"""

NOISE: Final = 0.2
"""The share of labels that are wrong: whoever knows them has learnt them by heart."""


def noisy_digits(seed: int) -> Records:
    """scikit-learn's 1,797 digits in random order, NOISE of them with another label."""
    table = data.load(digits_run(1).parsed().data)
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(table))
    target = table.target[order].astype(np.int64)
    wrong = rng.random(len(target)) < NOISE
    target[wrong] = (target[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return Records(Array.of(table.features[order]), Array.of(target))


def digits_run(rounds: int) -> Public:
    """What everybody knows of a run without privacy that learns digits by heart."""
    experiment = config.parse(_WORLD.format(rounds=rounds))
    return Public(experiment.dump(), ("site-1", "site-2"), (1, 8, 8), 10, "classification")


def overfitted(
    seed: int, profile: Profile, auxiliary: bool = True, signal: bool = True
) -> Trial[Members]:
    """A model that has learnt wrong labels by heart, trained without privacy by sites' own code.

    Without `signal` it has never seen those of whom it is asked, members or not: others were in
    their place.
    """
    quick = profile is Profile.quick
    each, known, count = (150, 150, 16) if quick else (350, 350, 64)
    rows = np.split(np.arange(3 * each + known), [each, 2 * each, 3 * each])
    pool = noisy_digits(seed)
    members, others, strangers, rest = (taken(pool, row) for row in rows)
    public = digits_run(20 if quick else 60)
    trained = members if signal else strangers
    of = shadows.joined(trained, rest)
    rng = np.random.default_rng([seed, 2])
    weights = shadows.train_alone(public, of, np.ones(len(of), np.bool_), rng)
    drawn = Candidates.drawn(members, others, each, seed)
    view = ReleasedModelView(public, Array.of(weights))
    given = Given(drawn.asked, rest if auxiliary else None, count)
    return Trial(view, drawn.truth, given)
