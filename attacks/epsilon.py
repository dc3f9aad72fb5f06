"""Epsilon from below: canaries that the run itself inserted, and how many coins can be guessed.

Every site trained on some of its candidates, chosen by fair coins that only it knows
(`securefl.canaries`). The adversary computes all candidates, and guesses from what it sees which
were in. How many coins (epsilon, delta)-differential privacy lets anyone guess is known (Steinke,
Nasr and Jagielski 2023, "Privacy auditing with one (1) training run"; Mahloujifar, Melis and
Chaudhuri 2024, "Auditing f-differential privacy in one run", for a whole trade-off curve), so right
guesses bound epsilon from below.

The white-box adversary (section 5.1 of the first; Nasr et al. 2023, "Tight auditing of
differentially private machine learning") knows the model of every round, so it knows each
candidate's clipped gradient g there, and sums or updates are such gradients with noise. It takes
the best linear estimate of all coins from all rounds (`_Evidence`): the inner product of g with
what it sees, over what else moves that direction: noise, other records, other canaries.
Where the real records are given it knows their gradients too: epsilon holds against who knows every
record but one.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from attacks import evidence
from attacks.attack import (
    Attack,
    AttackResult,
    Claim,
    Curve,
    Profile,
    Progress,
    Score,
    Trial,
    UnavailableError,
)
from attacks.case import Case
from attacks.view import (
    AnyView,
    Array,
    Given,
    OpenedView,
    Public,
    Records,
    ReleasedModelView,
    ServerView,
)
from securefl import agreement, canaries, config, models
from securefl.client import protected_by
from securefl.config import Experiment
from securefl.preprocessing import Fitted
from securefl.privacy import clipping
from securefl.privacy.gradients import PerSampleGradients
from securefl.privacy.plan import Observer, Plan, RecordDistributed, RecordLocal, SiteDistributed
from securefl.state import GlobalState

Floats = NDArray[np.float64]

_MOST_KNOWN: Final = 400
"""Real records whose gradients span what sampling does to a sum; all of them make its mean."""

_MOST_NUMBERS: Final = 4_000_000_000
"""Of gradients in all rounds together; beyond it only some rounds are read, evenly."""

_LEVELS: Final = 5
_SILENCE: Final = 1e-8
_SPREADS: Final = (1.0, 30.0, 1000.0)
"""Levels of noise that are tried, from next to none to all that is seen, and how much more than the
plan says sampling may move a vector: the likeliest is believed, not the plan. Without a plan a
site's batches are small, and its gradients are not clipped."""

_ENOUGH: Final = 8
"""Rounds from which the likeliest is chosen, evenly; all of them then make the estimate."""


class Guessed(msgspec.Struct, frozen=True):
    """The adversary's guess: for each candidate of each site how far it believes it was in."""

    scores: dict[str, list[float]]


@final
@dataclass(frozen=True, slots=True)
class Promised:
    """What a run claims of each record against the adversary of a view.

    epsilon: at delta; inf where nothing is claimed. curve: epsilon at other deltas, by the plan's
    own account, at most; together with the first they bound the trade-off curve.
    """

    epsilon: float
    delta: float
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """All (epsilon, delta) that hold."""
        return ((self.epsilon, self.delta), *self.curve)


@final
@dataclass(frozen=True, slots=True)
class Coins:
    """The truth: the coins of each site, bool[N], and what is claimed.

    apart: whether each site's canaries are also judged alone, as where each has noise of its own.
    """

    tossed: Mapping[str, NDArray[np.bool_]] = field(repr=False)
    promised: Promised
    apart: bool
    seen: str


# --- what one sum or update is made of ----------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Seen:
    """One opened vector: minus the sum over sites of their gradients times `share`, with noise.

    vector: float64[surviving], in units of a record's gradient. share: by site, how much a record
    of it counts. rate: how likely a record is in one step. clip: of a record's gradient; inf for
    none. noise: the variance that the plan says there is in a coordinate.
    """

    state: GlobalState
    vector: Floats
    share: Mapping[str, float]
    rate: Mapping[str, float]
    steps: int
    clip: float
    noise: float
    weights: tuple[float, ...] = ()


def _sizes(public: Public, given: Given) -> dict[str, float]:
    """How many records each site trains on, about: those known, and half of its candidates."""
    known, half = given.known or {}, public.parsed().audit.canaries / 2
    sizes = {site: records.protected + half for site, records in known.items()}
    return {site: sizes.get(site, math.inf) for site in public.sites}


def _read(
    public: Public,
    given: Given,
    state: GlobalState,
    mean: Floats,
    contributors: Sequence[str],
    fitted: bytes = b"",
) -> _Seen:
    """The mean that `contributors` gave for the model `state`, as gradients.

    mean: as it was opened, float64[upload_length].
    """
    experiment, plan = public.parsed(), public.plan()
    training, steps = experiment.training, experiment.training.local_steps
    weights = agreement.public_weights(experiment)
    weigh = {site: float(weights[site] if weights else 1) for site in contributors}
    share = {site: weight / sum(weigh.values()) for site, weight in weigh.items()}
    told = tuple(Fitted.from_bytes(fitted).weights) if fitted else ()
    vector = mean[: state.surviving]
    if isinstance(plan, RecordDistributed):
        count, sites = len(contributors), len(public.sites)
        scale = state.clip_scale * plan.expected_batch * count / sites
        noise = count * (plan.deviation * plan.grid * state.clip_scale) ** 2
        ones, rate = dict.fromkeys(contributors, 1.0), dict.fromkeys(contributors, plan.rate)
        clip = plan.clip * state.clip_scale
        return _Seen(state, -vector * scale, ones, rate, 1, clip, noise, told)
    pulled = training.weight_decay * steps * state.weights[state.mask].astype(np.float64)
    descended = -vector / training.learning_rate - pulled
    if isinstance(plan, RecordLocal):
        rate = dict.fromkeys(contributors, plan.rate)
        each = (plan.deviation * plan.clip * state.clip_scale / plan.units) ** 2 * steps
        noise = each * sum(part**2 for part in share.values())
        clip, vector = plan.clip * state.clip_scale, descended * plan.expected_batch
        return _Seen(state, vector, share, rate, steps, clip, noise, told)
    sizes = _sizes(public, given)
    batch = {site: min(float(training.batch_size), sizes[site]) for site in contributors}
    rate = {
        site: batch[site] / sizes[site] if sizes[site] < math.inf else 1.0 for site in contributors
    }
    share = {site: part / batch[site] for site, part in share.items()}
    return _Seen(state, descended, share, rate, steps, math.inf, 0.0, told)


def _opened(view: OpenedView, given: Given) -> dict[str, list[_Seen]]:
    """What each site contributed, round by round."""
    public, plan = view.public, view.public.plan()
    experiment, size = public.parsed(), models.layout(public.module()).size
    encoding = agreement.encoding(experiment, len(public.sites), plan)
    weights = agreement.public_weights(experiment)
    found: dict[str, list[_Seen]] = {}
    for site, contributed in view.contributed.items():
        found[site] = []
        for item in contributed:
            state = GlobalState.from_message(view.models[item.update], size)
            length = clipping.upload_length(experiment, state.surviving)
            weight = weights[site] if weights else None
            alone = encoding.decode(item.slots.numpy(), length, (site,), weight)
            found[site] += [_read(public, given, state, alone.mean, (site,))]
    return found


def _summed(view: ServerView, given: Given) -> list[_Seen]:
    """The sums, round by round."""
    return [
        _read(
            view.public,
            given,
            item.state,
            item.aggregate.mean,
            item.aggregate.contributors,
            item.task.fitted,
        )
        for item in view.rounds()
    ]


# --- gradients ----------------------------------------------------------------------------------


@final
class _Gradients:
    """Gradients of single records at any model, clipped as in training."""

    def __init__(self, public: Public) -> None:
        self._public = public
        self._module = PerSampleGradients(public.module(), loss_reduction="sum")
        self._loss = public.loss()

    def of(self, records: Records, seen: _Seen, most: int = 1 << 24) -> Floats:
        """Each record's (or person's), float64[n, surviving], clipped to seen.clip."""
        features = torch.from_numpy(records.features.numpy().copy())
        target = torch.from_numpy(records.target.numpy().copy())
        weights, mask = seen.state.weights, torch.from_numpy(seen.state.mask)
        models.assign(self._module._module, weights)
        loss = models.weighted(self._loss, seen.weights)
        parts, step = [], max(1, most // len(weights))
        for start in range(0, len(target), step):
            rows = slice(start, start + step)
            self._module.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                told = loss(self._module(features[rows]), target[rows]).sum()
                told.backward()  # type: ignore[no-untyped-call]
            given = [part.grad_sample for part in self._module.parameters()]
            each = torch.cat([part.reshape(len(part), -1) for part in given], dim=1)
            parts += [each[:, mask].double().numpy()]
        found = np.concatenate(parts)
        if records.whose is not None:  # a person's gradient is the mean of the rows'
            whose = records.whose.numpy()
            people = np.zeros((records.protected, found.shape[1]))
            np.add.at(people, whose, found)
            found = people / np.bincount(whose)[:, None]
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        scaled: Floats = found * np.minimum(1.0, seen.clip / np.maximum(norms, 1e-30))
        return scaled


# --- the best linear estimate of the coins ------------------------------------------------------


@final
@dataclass(frozen=True)
class _Round:
    """One vector in the directions that records can move it in.

    coins: float64[m, k], what each candidate adds on average, if in. left: float64[k], what is seen
    less all that is expected. spread: float64[k], the variance that sampling makes. beyond: the
    energy in the other `rest` directions, which only noise moves.
    """

    coins: Floats
    left: Floats
    spread: Floats
    beyond: float
    rest: int


@final
class _Evidence:
    """What all rounds say of m coins.

    A vector is sum_c (b_c s_c) g_c + sum_r s_r g_r + noise: s is how often the sample has it, b the
    coin. Given the level of noise v the least squares estimate of the coins, less one half, is
    (A + 4I)^-1 h with A = sum_t M^T C^-1 M, h = sum_t M^T C^-1 (what is left), M the candidates'
    mean gradients and C = v + k times what sampling does; 1/4 is a coin's variance. v and k are the
    likeliest of a grid, so that noise that is not there is not believed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rounds: list[_Round] = []
        self._planned: list[float] = []

    def add(self, seen: _Seen, candidates: Sequence[tuple[str, Floats]], known: _Known) -> None:
        """candidates: by site, float64[N, d], in the order of the coins."""
        gradients = np.concatenate([part for _, part in candidates])
        share = np.concatenate([np.full(len(g), seen.share.get(s, 0.0)) for s, g in candidates])
        rate = np.concatenate([np.full(len(g), seen.rate.get(s, 0.0)) for s, g in candidates])
        step = gradients * share[:, None]
        coins = step * (rate * seen.steps)[:, None]
        sampled = step * np.sqrt(rate * (1 - rate) * seen.steps / 2)[:, None]
        basis = _basis(np.concatenate([step, known.sampled]))
        left = seen.vector - known.mean - coins.sum(axis=0) / 2
        inside = basis.T @ left
        others = np.concatenate([sampled, known.sampled]) @ basis
        spread, turn = np.linalg.eigh(others.T @ others)
        beyond = max(0.0, float(left @ left - inside @ inside))
        rest = len(left) - basis.shape[1]
        self._rounds += [
            _Round(coins @ basis @ turn, turn.T @ inside, np.maximum(spread, 0.0), beyond, rest)
        ]
        self._planned += [seen.noise]

    def estimate(self) -> Floats:
        """Each coin less one half, float64[m]; nought where nothing was seen."""
        if not self._rounds:
            return np.zeros(self._count)
        energy = max(
            (float(r.left @ r.left) + r.beyond) / max(1, len(r.left) + r.rest) for r in self._rounds
        )
        top = 2 * max(energy, *self._planned, 1e-300)
        some = self._rounds[:: -(-len(self._rounds) // _ENOUGH)]
        spreads = _SPREADS if any(item.spread.any() for item in some) else (1.0,)
        levels = np.geomspace(_SILENCE * top, top, _LEVELS).tolist()
        tried = [(self._at(some, x, k)[0], x, k) for x in levels for k in spreads]
        _, level, spread = max(tried)
        between = math.sqrt(levels[1] / levels[0])
        near = (level / between, level * between)
        tried += [(self._at(some, x, spread)[0], x, spread) for x in near]
        _, level, spread = max(tried)
        return self._at(self._rounds, level, spread)[1]

    def _at(self, rounds: Sequence[_Round], level: float, spread: float) -> tuple[float, Floats]:
        """The log likelihood of a level of noise and of spread, and the estimate under them."""
        matrix, told, likelihood = 4 * np.eye(self._count), np.zeros(self._count), 0.0
        for item in rounds:
            precision = 1 / (spread * item.spread + level)
            weighed = item.coins * precision
            matrix += weighed @ item.coins.T
            told += weighed @ item.left
            likelihood += float(np.log(precision).sum() - (item.left**2 * precision).sum())
            likelihood -= item.rest * math.log(level) + item.beyond / level
        estimate = np.linalg.solve(matrix, told)
        _, size = np.linalg.slogdet(matrix / 4)
        return likelihood - float(size) + float(told @ estimate), estimate.astype(np.float64)


def _basis(rows: Floats) -> Floats:
    """Orthonormal columns that span `rows` (float64[n, d]): float64[d, k]."""
    count, size = rows.shape
    if size <= count:
        return np.eye(size)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    keep = values > 1e-12 * max(float(values[-1]), 1e-300)
    basis: Floats = rows.T @ (vectors[:, keep] / np.sqrt(values[keep]))
    return basis


@final
@dataclass(frozen=True)
class _Known:
    """What records that are known add: float64[d] on average, and vectors whose squares make the
    covariance that sampling has, float64[k, d]."""

    mean: Floats
    sampled: Floats


def _known(
    gradients: _Gradients, public: Public, seen: _Seen, given: Given, rng: np.random.Generator
) -> _Known:
    """What each site's known records add. Those of other sites stand in for a site of which none
    are known: as many of them as its expected batch, and how far they are off is left to k."""
    held = {
        site: gradients.of(records, seen)
        for site, records in (given.known or {}).items()
        if len(records)
    }
    size, plan = len(seen.vector), public.plan()
    mean, sampled = np.zeros(size), [np.zeros((0, size))]
    for site, share in seen.share.items():
        if not held:
            continue
        rate = seen.rate[site]
        each = held[site] if site in held else np.concatenate(list(held.values()))
        total = rate * seen.steps * len(each)  # records that are in the sum, on average
        if site not in held and isinstance(plan, RecordLocal | RecordDistributed):
            sites = len(seen.share) if isinstance(plan, RecordDistributed) else 1
            total = plan.expected_batch / sites * seen.steps
        middle = each.mean(axis=0) * total * share
        mean += middle
        some = each[rng.permutation(len(each))[:_MOST_KNOWN]]
        if site not in held:
            sampled += [middle[None], some * (share * math.sqrt(total / len(some)))]
        elif rate < 1:
            sampled += [some * (share * math.sqrt((1 - rate) * total / len(some)))]
    return _Known(mean, np.concatenate(sampled))


def adversary(
    view: ReleasedModelView | ServerView | OpenedView, given: Given, seed: int, progress: Progress
) -> Guessed:
    """How far it believes of each candidate that it was trained on."""
    public, rng = view.public, np.random.default_rng(seed)
    made = {site: _candidates(public, site) for site in public.sites}
    if isinstance(view, ReleasedModelView):
        return Guessed({site: _losses(view, records) for site, records in made.items()})
    if isinstance(view, OpenedView):
        opened = _opened(view, given)
        groups: list[tuple[tuple[str, ...], list[_Seen]]] = [((s,), opened[s]) for s in opened]
    else:
        groups = [(public.sites, _summed(view, given))]
    gradients = _Gradients(public)
    rounds = sum(len(seen) for _, seen in groups)
    scores: dict[str, list[float]] = {}
    done = 0
    for sites, seen in groups:
        chosen = _affordable(seen, sum(len(made[site]) for site in sites), given)
        found = _Evidence(sum(len(made[site]) for site in sites))
        for item in chosen:
            each = [(site, gradients.of(made[site], item)) for site in sites]
            found.add(item, each, _known(gradients, public, item, given, rng))
            done += 1
            progress(0.9 * done / rounds)
        estimate = iter(found.estimate().tolist())
        scores |= {site: [next(estimate) for _ in range(len(made[site]))] for site in sites}
    return Guessed(scores)


def _affordable(seen: list[_Seen], count: int, given: Given) -> list[_Seen]:
    """All rounds, or as many as can be afforded, evenly."""
    if not seen:
        return seen
    rows = count + sum(len(records) for records in (given.known or {}).values())
    most = max(8, _MOST_NUMBERS // (rows * len(seen[0].vector)))
    return seen[:: -(-len(seen) // most)]


def _candidates(public: Public, site: str) -> Records:
    experiment = public.parsed()
    classes = public.outputs if public.task == "classification" else 0
    features, target = canaries.candidates(experiment, site, public.shape, classes)
    return Records(Array.of(features), Array.of(target))


def _losses(view: ReleasedModelView, records: Records) -> list[float]:
    """How much lower each record's loss is under the released model than before training."""
    loss, module = view.public.loss(), view.public.module()
    features = torch.from_numpy(records.features.numpy().copy())
    target = torch.from_numpy(records.target.numpy().copy())
    told = []
    with torch.no_grad():
        for weights in (models.flatten(module), view.weights.numpy()):
            models.assign(module.eval(), weights)
            told += [loss(module(features), target).double().numpy()]
    return [float(x) for x in told[0] - told[1]]


# --- what guesses prove --------------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)  # a calibration asks the same few counts often
def curve_p_value(m: int, r: int, v: int, pairs: tuple[tuple[float, float], ...]) -> float:
    """The chance of v or more right of r guesses on m coins, bounded above, if training is
    (epsilon, delta)-DP for each of `pairs` at once.

    The recursion of Mahloujifar, Melis and Chaudhuri 2024, section 3 (`evidence.gaussian_p_value`
    has it for Gaussian curves), for the trade-off curve that `pairs` bound: of an event that one
    coin gives probability x at least, the other gives at most
    min_i min(delta_i + e^epsilon_i x, 1 - e^-epsilon_i (1 - delta_i - x)).

    >>> round(curve_p_value(10, 10, 10, ((0.0, 0.0),)) * 1024, 3)
    1.0
    """
    epsilons, deltas = (np.array(part) for part in zip(*pairs, strict=True))
    kept = epsilons < 700  # e to more is no number, and says nothing
    epsilons, deltas = epsilons[kept], deltas[kept]
    if v == 0 or not len(epsilons):
        return 1.0
    up, down, more = np.exp(epsilons), np.exp(-epsilons), np.expm1(epsilons) + deltas

    def least(right: float) -> float:
        """Of the wrong side, where the right one has `right`."""
        found = max(((right - deltas) * down).max(), (right * up - more).max())
        return max(0.0, float(found))

    def possible(tau: float) -> bool:
        right, wrong, whole = tau * v / m, tau * (r - v) / m, r / m * (1 + 1e-12)
        for i in range(v - 1, -1, -1):
            if right + wrong > whole:
                return False
            other = least(right)
            if other > wrong:
                right += i / (r - i) * (other - wrong)
                wrong = other
        return right + wrong <= whole

    if possible(1.0):
        return 1.0
    low, high = -745.0, 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if possible(math.exp(middle)) else (low, middle)
    return math.exp(high)


@final
@dataclass(frozen=True)
class _Judged:
    """The canaries of some sites, against what is claimed.

    p: of the claim, over the ways to guess; nothing where nothing is claimed.
    """

    scores: Floats
    coins: NDArray[np.bool_]
    promised: Promised
    seed: int
    confidence: float

    @cached_property
    def audit(self) -> evidence.Audit:
        rng = np.random.default_rng(self.seed)
        claimed, delta = self.promised.epsilon, self.promised.delta
        told = self.scores, self.coins, delta, claimed
        chosen = ways(len(self.coins))
        return evidence.audit(*told, rng=rng, confidence=self.confidence, guesses=chosen)

    def _p(self, pairs: tuple[tuple[float, float], ...], perfect: bool = False) -> float:
        rng, m, found = np.random.default_rng(self.seed), len(self.coins), []
        chosen = ways(m)
        for way in chosen:
            told = evidence.guess(self.scores, way, rng)
            right = ((told == 1) & self.coins).sum() + ((told == -1) & ~self.coins).sum()
            v = way.total if perfect else int(right)
            single = min(evidence.p_value(m, way.total, v, *pair) for pair in pairs)
            found += [min(single, curve_p_value(m, way.total, v, pairs))]
        return min(1.0, len(chosen) * min(found))

    @cached_property
    def p(self) -> float | None:
        """Both bound the chance of so many right guesses, so the lesser one does."""
        return self._p(self.promised.pairs) if self.promised.epsilon < math.inf else None

    @cached_property
    def least(self) -> float | None:
        """p if every coin were guessed."""
        told = self.promised
        return self._p(told.pairs, perfect=True) if told.epsilon < math.inf else None

    @cached_property
    def nothing(self) -> float:
        """p of the claim that nothing at all is told, but for delta."""
        return self._p(((0.0, self.promised.delta),))


def ways(m: int) -> tuple[evidence.Guesses, ...]:
    """How m coins are guessed, fixed before any is looked at: evenly all, a third and a tenth; and
    a fifth as heads alone. A site that forgot its plan, and trains on a few of its records at a
    time, shows which these are, and of no other that it was out."""
    return *evidence.standard_guesses(m), evidence.Guesses(max(1, m // 5), 0)


def score(guess: Guessed, truth: Coins, seed: int) -> Score:
    """The lower bound, and p of what is claimed, corrected for the groups that are judged."""
    sites = [site for site in truth.tossed if site in guess.scores]
    groups = [tuple(sites)]
    if truth.apart and len(sites) > 1:
        groups += [(site,) for site in sites]
    confidence = 1 - (1 - evidence.CONFIDENCE) / len(groups)
    judged = [
        _Judged(
            np.concatenate([np.array(guess.scores[site]) for site in group]),
            np.concatenate([truth.tossed[site] for site in group]),
            truth.promised,
            seed,
            confidence,
        )
        for group in groups
    ]
    best = max(judged, key=lambda one: one.audit.bound)
    total, m = judged[0], len(judged[0].coins)
    promised = truth.promised
    p = None
    if promised.epsilon < math.inf:
        p = min(1.0, len(groups) * min(one.p for one in judged if one.p is not None))
    nothing = min(1.0, len(groups) * min(one.nothing for one in judged))
    found, delta = best.audit, promised.delta
    right, n = total.audit.v, total.audit.r
    results = [
        AttackResult("epsilon, lower bound at 95 %", found.bound, None, 0.0, m, seed),
    ]
    if promised.epsilon < math.inf:
        results += [AttackResult("epsilon, as claimed", promised.epsilon, None, 0.0, m, seed)]
    results += [
        AttackResult(
            "epsilon, lower bound at 95 % if the trade-off curve is Gaussian",
            max(one.audit.gaussian_bound for one in judged),
            None,
            0.0,
            m,
            seed,
        ),
        AttackResult("coins guessed right", right / n, total.audit.accuracy, 0.5, n, seed),
    ]
    results += _estimated(total, seed)
    notes = [
        f"{m} canaries at {len(sites)} sites, delta {delta:g}; seen by {truth.seen}.",
        f"{right} of {n} guesses were right; that all is chance has p = {nothing:.2g}.",
    ]
    if len(groups) > 1:
        notes += [
            f"Judged together and site by site, {len(groups)} times; all figures are corrected for "
            "that."
        ]
    limit = f"with every coin guessed right the lower bound would be {total.audit.limit:.2f}"
    least = [one.least for one in judged if one.least is not None]
    if least:
        limit += (
            f", and p of the claim, which counts the plan's whole account, "
            f"{min(1.0, len(groups) * min(least)):.2g}"
        )
    return Score(
        results=tuple(results),
        succeeded=nothing <= 0.01,
        p=p,
        limit=f"{limit}.",
        curves=(_roc(total),),
        notes=tuple(notes),
    )


def _estimated(total: _Judged, seed: int) -> list[AttackResult]:
    """The estimate of Andrew et al. 2023: no bound, and named so."""
    inside, outside = total.scores[total.coins], total.scores[~total.coins]
    if min(len(inside), len(outside)) < 2 or not np.ptp(outside) or not np.ptp(inside):
        return []
    null = evidence.Normal.fit(outside)
    told = evidence.estimate_epsilon(inside, null, total.promised.delta)
    if not math.isfinite(told.epsilon):
        return []
    name = "epsilon, an estimate and no bound (Andrew et al. 2023)"
    return [AttackResult(name, told.epsilon, None, 0.0, told.n, seed)]


def _roc(total: _Judged) -> Curve:
    curve = evidence.Roc.of(total.scores, total.coins).curve()
    return Curve(tuple(curve.fpr.tolist()), tuple(curve.tpr.tolist()), "which canaries were in")


# --- worlds --------------------------------------------------------------------------------------


def claim(experiment: Experiment) -> Claim:
    """What the plan promises of each record."""
    privacy = experiment.privacy
    made = experiment.private and privacy is not None and privacy.unit != "site"
    told = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}" if privacy else "any epsilon"
    unit = privacy.unit if privacy is not None and made else "record"
    return Claim(
        f"Whatever is concluded from the run, one {unit} changes its odds by no more than {told} "
        "allows, by the plan's own account.",
        "Records like the canaries are the hardest to protect; guesses bound epsilon from below "
        "only: better ones may exist.",
        made=made,
    )


def trial(case: Case) -> Trial[Coins]:
    """A recorded run with canaries: the strongest view that its promise holds against."""
    experiment = case.experiment
    if not experiment.audit.canaries:
        raise UnavailableError(
            "no canaries were trained on: say [audit] canaries = N in the experiment"
        )
    tossed = dict(_tossed(case))
    view, seen, observer = _view(case, tuple(tossed))
    if isinstance(view, OpenedView):
        tossed = {site: coins for site, coins in tossed.items() if site in view.contributed}
    promised = _promised(case, tuple(tossed), observer)
    person = protected_by(experiment)
    known = {s: Records.of(case.tables(s)[0], person) for s in case.sites if s in case.auditing}
    seen += ", who knows every real record"
    seen += " but other sites'" if len(known) < len(case.sites) else ""
    truth = Coins(tossed, promised, isinstance(view, OpenedView), seen)
    return Trial(view, truth, Given(known=known))


def _tossed(case: Case) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    found = False
    for site in case.sites:
        try:
            coins = case.coins(site)
        except UnavailableError:
            continue
        found = True
        yield site, coins
    if not found:
        raise UnavailableError(
            "no site's coins are at hand: each site audits with its own, --site FOLDER"
        )


def _view(case: Case, sites: Sequence[str]) -> tuple[AnyView, str, Observer]:
    """The view, who has it in words, and against whom the figure is."""
    privacy = case.experiment.privacy
    if privacy is None or privacy.noise == "local":
        held = []
        for site in sites:
            try:
                case.recording(site)
            except UnavailableError:
                continue
            held += [site]
        if held:
            return case.opened(*held), "whoever opens each single contribution", Observer.OTHERS
    try:
        server = case.server()
        if next(server.rounds(), None) is not None:
            return server, "the server, sum by sum", Observer.OTHERS
    except UnavailableError:
        pass
    return case.released(), "whoever has the trained model only", Observer.PUBLIC


def _promised(case: Case, sites: Sequence[str], observer: Observer) -> Promised:
    """What the run claims to have spent, by its plan, at the site that spent most."""
    plan, summary = case.public.plan(), case.summary
    if plan is None or isinstance(plan, SiteDistributed):
        return Promised(math.inf, summary.delta or 1e-5)
    spent = max(summary.epsilon[site] for site in sites)
    if observer is Observer.PUBLIC and summary.epsilon_public is not None:
        spent = summary.epsilon_public
    rounds = summary.rounds + len(summary.aborted_rounds)
    return Promised(spent, plan.delta, curve(plan, rounds, observer))


def curve(
    plan: Plan, rounds: int, observer: Observer = Observer.OTHERS
) -> tuple[tuple[float, float], ...]:
    """(epsilon, delta) of `rounds` rounds by the plan's own account, at several deltas."""
    deltas = [delta for delta in np.geomspace(1e-7, 0.9, 16).tolist() if delta != plan.delta]
    found = [(replace(plan, delta=delta).spent(rounds, observer), delta) for delta in deltas]
    return tuple(pair for pair in found if math.isfinite(pair[0]))


_WORLD: Final = """
name = "undefended"
rounds = 8
[data]
source = "digits"
default_range = [0.0, 16.0]
[sites]
count = 2
[model]
name = "logistic"
[training]
batch_size = 100000
learning_rate = 0.5
[protocol]
name = "plain"
[transcript]
consent = ["site-1", "site-2"]
"""


def undefended(seed: int, profile: Profile) -> Trial[Coins]:
    """A run like any other, but without a plan: the server opens exact sums. All is of `seed`."""
    from securefl.runs import run

    count = 60 if profile is Profile.quick else 200
    drawn = seed % (1 << 32)
    overrides = f"audit.canaries={count}", f"seed={drawn}", f"not_private_seed={drawn}"
    experiment = config.parse(_WORLD, overrides)
    with tempfile.TemporaryDirectory() as folder:
        return trial(Case.open(run(experiment, Path(folder) / "run", report=False).directory))


def no_signal(seed: int, profile: Profile) -> Trial[Coins]:
    """The same run, and coins that were tossed after it."""
    world = undefended(seed, profile)
    material = agreement.reproducible_randomness(seed, "epsilon", "no signal")
    tossed = {
        site: np.frombuffer(material(len(coins)), np.uint8) < 128
        for site, coins in world.truth.tossed.items()
    }
    return replace(world, truth=replace(world.truth, tossed=tossed))


ATTACK = Attack(
    name="epsilon",
    title="Epsilon from below, by canaries",
    source="Steinke, Nasr and Jagielski 2023, algorithm 1 and section 5; Mahloujifar et al. 2024",
    views=(OpenedView, ServerView, ReleasedModelView),
    guess=Guessed,
    adversary=adversary,
    score=score,
    claim=claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
)
