"""Shadow models: trained as a run trained its own, on records that the adversary chose.

Shokri et al. 2017, "Membership inference attacks against machine learning models", section V. The
same network from the same public seed, the same rounds, local optimiser, server rule, pruning,
clip and noise; only the sites' division is unknown, and replaced by a random one. There is no
protocol around it, because aggregation is exact but for the rounding of an update's numbers.

Networks whose records do not touch one another are trained all at once (`torch.func`); whatever
names code of its own is trained one by one, by the sites' own `Trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from attacks.view import Array, Public, Records
from protocols.encoding import Integers
from securefl import agreement, models
from securefl.algorithms import server_rule
from securefl.config import Experiment
from securefl.privacy import clipping
from securefl.privacy.plan import RecordDistributed, RecordLocal, SiteDistributed
from securefl.privacy.training import Trainer
from securefl.state import GlobalState, apply, first_state

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]
Progress = Callable[[float], None]

_MOST_NUMBERS: Final = 1 << 23
"""Of per-record gradients at a time."""

_AT_ONCE: Final = 1024
"""Records that a model is asked about at a time."""

DIFFERENCES: Final = (
    "shadow models divide their records among the sites at random, and in equal parts",
    "shadow models leave out the rounding of updates to integers, and rounds that were aborted",
)
"""What is not as in the run, for any shadow model."""


def differences(public: Public) -> tuple[str, ...]:
    """In what shadow models of this run are not trained as it was, a sentence each."""
    experiment = public.parsed()
    found = list(DIFFERENCES)
    if getattr(experiment.privacy, "unit", None) == "person":
        found.append("shadow models take every record for a person of its own")
    if experiment.preprocessing is not None and experiment.preprocessing.class_weights != "none":
        found.append("shadow models weigh all classes alike")
    if experiment.audit.canaries:
        found.append("shadow models are trained without canaries")
    return tuple(found)


def affordable(public: Public, records: int, operations: float, most: int) -> int:
    """How many shadow models of `records` records come to so many operations: even, 4 to `most`.

    A rough count, of which one processor core does about 10^10 a second.
    """
    experiment, module = public.parsed(), public.module()
    seen = 0

    def count(layer: torch.nn.Module, _: object, output: Tensor) -> None:
        nonlocal seen
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            seen += output[0].numel() * weight[0].numel()

    for layer in module.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.zeros(1, *public.shape))
    # Forwards, and twice that backwards, for weights and inputs; and what every step costs anyhow.
    plan, step = public.plan(), 10_000_000
    if isinstance(plan, RecordLocal | RecordDistributed):  # every record's gradient is written down
        size = models.layout(module).size
        step += math.ceil(plan.rate * records) * (60 * seen + 100 * size)
    else:
        batch = min(experiment.training.batch_size * len(public.sites), records)
        step += 6 * batch * seen
    one = experiment.rounds * experiment.training.local_steps * step
    return max(4, min(most, int(operations / one)) // 2 * 2)


def train(
    public: Public,
    records: Records,
    member: NDArray[np.bool_],
    rng: np.random.Generator,
    progress: Progress = lambda _: None,
) -> Weights:
    """One model for each row of `member` (bool[models, n]), of the `records` that it marks.

    float32[models, d]: what each would have released (averaged iterates, where the run averages).
    """
    experiment = public.parsed()
    named = experiment.model.name, experiment.model.loss, experiment.training.optimiser
    if any(":" in name for name in named):
        found = []
        for number, row in enumerate(member):
            found.append(train_alone(public, records, row, rng))
            progress((number + 1) / len(member))
        return np.stack(found)
    return _Together(public, records, member, rng).run(progress)


def train_alone(
    public: Public,
    records: Records,
    member: NDArray[np.bool_],
    rng: np.random.Generator,
    progress: Progress = lambda _: None,
) -> Weights:
    """One model, float32[d], by the code that sites themselves train with; member: bool[n]."""
    experiment, plan, table = public.parsed(), public.plan(), public.table(records)
    sites = len(public.sites)
    encoding = agreement.encoding(experiment, sites, plan)
    layout = models.layout(public.module())
    rule = server_rule(experiment.aggregation)
    state = first_state(public.module(), rule)
    divided = np.array_split(rng.permutation(np.flatnonzero(member)), sites)
    trainers = [
        Trainer(
            public.module(),
            public.loss(),
            table.take(rows),
            experiment.training,
            plan,
            torch.device("cpu"),
        )
        for rows in divided
    ]
    weighing = _weighing(experiment, public.sites, np.array([[len(rows) for rows in divided]]))[0]
    for number in range(experiment.rounds):
        if _stopped(experiment, state):
            break
        given = state.weights, state.mask, rng.bytes, state.clip_scale
        if isinstance(encoding, Integers):
            total = np.sum([trainer.noised_sum(*given) for trainer in trainers], axis=0)
            mean = total * (encoding.unit / sites)
        else:
            updates = np.stack([trainer.update(*given) for trainer in trainers])
            told = clipping.uploaded(experiment, updates[:, layout.size :])
            sent = np.hstack([updates[:, : layout.size][:, state.mask], told]).astype(np.float64)
            mean = weighing @ np.clip(sent, -encoding.clip, encoding.clip)
        state = apply(state, mean, rule, layout, experiment)
        progress((number + 1) / experiment.rounds)
    return state.released


def _stopped(experiment: Experiment, state: GlobalState) -> bool:
    stopping = experiment.stopping
    return stopping is not None and state.quiet >= stopping.patience


def _weighing(experiment: Experiment, sites: tuple[str, ...], counts: NDArray[np.int64]) -> Floats:
    """Each site's share of a mean, float64[models, sites], by its records' number where they ask.

    counts: int64[models, sites].
    """
    aggregation = experiment.aggregation
    raw = np.ones(counts.shape)
    if aggregation.weighting == "declared":
        raw *= [aggregation.weights[site] for site in sites]
    elif aggregation.weighting == "records":
        raw *= counts
    shares: Floats = raw / raw.sum(1, keepdims=True)
    return shares


class _Together:
    """Many models at once. A *line* is one model at one of its sites: models * sites of them."""

    def __init__(
        self,
        public: Public,
        records: Records,
        member: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> None:
        self._public, self._rng = public, rng
        self._experiment, self._plan = public.parsed(), public.plan()
        # Sums of independent samples are one sample: there is no need to tell the sites apart.
        pooled = isinstance(self._plan, RecordDistributed)
        self._sites = 1 if pooled else len(public.sites)
        self._models = len(member)
        self._module, self._loss = public.module(), public.loss()
        self._layout = models.layout(self._module)
        self._features = torch.from_numpy(records.features.numpy().copy())
        self._target = torch.from_numpy(records.target.numpy().copy())
        self._counts, self._rows = self._divided(member)
        by_line = (None, 0, 0)
        self._each = vmap(vmap(grad(self._of_one), by_line), (0, 0, 0))
        self._mean = vmap(grad(self._of_batch), (0, 0, 0, 0))

    def _divided(self, member: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many records each line has, int64[lines], and which, int64[lines, most]."""
        dealt = [
            part
            for row in member
            for part in np.array_split(self._rng.permutation(np.flatnonzero(row)), self._sites)
        ]
        counts = np.array([len(part) for part in dealt])
        rows = np.zeros((len(dealt), max(1, counts.max())), np.int64)
        for line, part in enumerate(dealt):
            rows[line, : len(part)] = part
        return counts, rows

    # --- the loss, of weights as one vector ---

    def _output(self, flat: Tensor, features: Tensor) -> Tensor:
        layout = self._layout
        parts = {
            name: flat[where].view(shape)
            for name, where, shape in zip(layout.names, layout.slices(), layout.shapes, strict=True)
        }
        given: Tensor = functional_call(self._module, parts, (features,))
        return given

    def _of_one(self, flat: Tensor, features: Tensor, target: Tensor) -> Tensor:
        return self._loss(self._output(flat, features[None]), target[None])[0]

    def _of_batch(self, flat: Tensor, features: Tensor, target: Tensor, share: Tensor) -> Tensor:
        return (self._loss(self._output(flat, features), target) * share).sum()

    # --- the run ---

    def run(self, progress: Progress) -> Weights:
        experiment, rule = self._experiment, server_rule(self._experiment.aggregation)
        states = [first_state(self._public.module(), rule) for _ in range(self._models)]
        for number in range(experiment.rounds):
            means = self._means(states)
            states = [
                state
                if _stopped(experiment, state)
                else apply(state, mean, rule, self._layout, experiment)
                for state, mean in zip(states, means, strict=True)
            ]
            progress((number + 1) / experiment.rounds)
        return np.stack([state.released for state in states])

    def _means(self, states: list[GlobalState]) -> list[Floats]:
        """The mean of every model's round, as its server decodes it."""
        plan = self._plan
        weights = torch.from_numpy(np.stack([state.weights for state in states]))
        kept = torch.from_numpy(np.stack([state.mask for state in states])).to(weights)
        scale = torch.tensor([state.clip_scale for state in states])
        start, kept, scale = (
            part.repeat_interleave(self._sites, 0) for part in (weights, kept, scale)
        )
        if isinstance(plan, RecordDistributed):
            mean = self._summed(plan, start, kept, scale)
        else:
            updates = self._trained(start, kept, scale)
            if isinstance(plan, SiteDistributed):
                mean = self._protected(plan, updates, scale)
            else:
                mean = self._averaged(updates)
        tail = np.ones(mean.shape[1] - self._layout.size, np.bool_)
        return [one[np.append(state.mask, tail)] for one, state in zip(mean, states, strict=True)]

    def _averaged(self, updates: Floats) -> Floats:
        """The mean of what sites send in fixed point, clamped as there."""
        size, clip = self._layout.size, self._experiment.protocol.clip
        told = updates[:, size:].astype(np.float32)
        updates[:, size:] = clipping.uploaded(self._experiment, told)
        shaped = np.clip(updates, -clip, clip).reshape(self._models, self._sites, -1)
        shares = _weighing(
            self._experiment,
            self._public.sites,
            self._counts.reshape(self._models, self._sites),
        )
        mean: Floats = np.einsum("msd,ms->md", shaped, shares)
        return mean

    def _protected(self, plan: SiteDistributed, updates: Floats, scale: Tensor) -> Floats:
        """The mean of clipped updates, with the noise of all sites, in the plan's first units."""
        scaled = updates / scale.numpy()[:, None]
        norms = np.linalg.norm(scaled, axis=1, keepdims=True)
        clipped = scaled * np.minimum(1.0, plan.clip / np.maximum(norms, 1e-30))
        if plan.counted:
            within = np.where(norms <= plan.clip, 1.0, -1.0)
            clipped = np.hstack([clipped, plan.clip * plan.count / plan.units * within])
        mean = clipped.reshape(self._models, self._sites, -1).mean(1)
        noise = plan.grid * plan.deviation / math.sqrt(self._sites)
        return np.asarray(mean + self._rng.normal(0, noise, mean.shape), np.float64)

    def _summed(
        self, plan: RecordDistributed, start: Tensor, kept: Tensor, scale: Tensor
    ) -> Floats:
        """The step that all sites' sums make together, in the plan's first units."""
        total, within = self._clipped(plan, start, kept, scale)
        total = -total / scale[:, None]
        if plan.counted:
            total = torch.hstack([total, plan.clip * plan.count / plan.units * within[:, None]])
        noise = plan.grid * plan.deviation * math.sqrt(len(self._public.sites))
        noised = total.double().numpy() + self._rng.normal(0, noise, tuple(total.shape))
        return np.asarray(noised / plan.expected_batch, np.float64)

    def _trained(self, start: Tensor, kept: Tensor, scale: Tensor) -> Floats:
        """The update of every line, and its count where the plan has one."""
        plan, training = self._plan, self._experiment.training
        weights = torch.nn.Parameter(start.clone())
        optimiser = models.optimiser(training, [weights])  # elementwise: lines do not mix
        local = plan if isinstance(plan, RecordLocal) else None
        batches = [] if local is not None else self._batches()
        told = torch.zeros(len(start))
        for step in range(training.local_steps):
            if local is not None:
                weights.grad, within = self._noised(local, weights.detach(), kept, scale)
                told += within
            else:
                weights.grad = self._gradient(weights.detach(), *batches[step]) * kept
            optimiser.step()
            with torch.no_grad():
                weights.mul_(kept)
        update = (weights.detach() - start).double().numpy()
        if local is None:
            update[self._counts == 0] = 0  # a site without records moves nothing
        elif local.counted:
            steps = 2 * local.expected_batch * training.local_steps
            update = np.hstack([update, (told / steps).double().numpy()[:, None]])
        return update

    # --- one step ---

    def _noised(
        self, plan: RecordLocal, weights: Tensor, kept: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """DP-SGD's gradient of every line, and how many records more were within the clip."""
        total, within = self._clipped(plan, weights, kept, scale)
        noise = plan.deviation / plan.units * plan.clip
        drawn = self._rng.normal(0, noise, (len(total), total.shape[1] + 1)).astype(np.float32)
        total += torch.from_numpy(drawn[:, :-1]) * scale[:, None]
        if plan.counted:
            within = within + torch.from_numpy(drawn[:, -1]) * plan.units / plan.clip / plan.count
        return total / plan.expected_batch * kept, within

    def _clipped(
        self, plan: RecordLocal | RecordDistributed, weights: Tensor, kept: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum over a Poisson sample of clipped gradients, float32[lines, d].

        And by how many the records within the clip outnumber those beyond it, float32[lines].
        """
        valid = np.arange(self._rows.shape[1]) < self._counts[:, None]
        drawn = (self._rng.random(self._rows.shape) < plan.rate) & valid
        most = max(1, int(drawn.sum(1).max()))
        first = np.argsort(~drawn, axis=1, kind="stable")[:, :most]
        chosen = torch.from_numpy(np.take_along_axis(self._rows, first, 1))
        share = torch.from_numpy(np.take_along_axis(drawn, first, 1)).float()
        total, within = torch.empty_like(weights), torch.empty(len(weights))
        step = max(1, _MOST_NUMBERS // (most * self._layout.size))
        for low, high in pairwise([*range(0, len(weights), step), len(weights)]):
            at = slice(low, high)
            rows = chosen[at]
            each = self._each(weights[at], self._features[rows], self._target[rows])
            each = each * kept[at, None]
            norms, clip = torch.linalg.vector_norm(each, dim=2), plan.clip * scale[at, None]
            factor = share[at] * torch.clamp(clip / norms.clamp(min=1e-30), max=1.0)
            total[at] = torch.einsum("lbd,lb->ld", each, factor)
            within[at] = (share[at] * torch.where(norms <= clip, 1.0, -1.0)).sum(1)
        return total, within

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        """Each local step's records of every line, and the share of each in the batch's mean."""
        training, counts = self._experiment.training, np.maximum(self._counts, 1)
        width = min(training.batch_size, self._rows.shape[1])
        a_pass = -(-counts // training.batch_size)
        passes = -(-training.local_steps // int(a_pass.min()))
        keys = self._rng.random((len(counts), passes, self._rows.shape[1]))
        keys[np.broadcast_to(np.arange(keys.shape[2]) >= counts[:, None, None], keys.shape)] = 2
        orders, lines = np.argsort(keys, axis=2), np.arange(len(counts))
        found = []
        for step in range(training.local_steps):
            at = (step % a_pass * training.batch_size)[:, None] + np.arange(width)
            there = at < counts[:, None]
            places = orders[lines, step // a_pass][lines[:, None], np.where(there, at, 0)]
            chosen = self._rows[lines[:, None], places]
            shares = there / there.sum(1, keepdims=True)
            found.append((torch.from_numpy(chosen), torch.from_numpy(shares).float()))
        return found

    def _gradient(self, weights: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """The gradient of every line's mean loss over a batch, float32[lines, d]."""
        # What layers keep for going backwards is many times what they are given.
        kept = 16 * rows.shape[1] * self._features[0].numel()
        step = max(1, _MOST_NUMBERS // (self._layout.size + kept))
        parts = [
            self._mean(
                weights[low:high],
                self._features[rows[low:high]],
                self._target[rows[low:high]],
                share[low:high],
            )
            for low, high in pairwise([*range(0, len(weights), step), len(weights)])
        ]
        return torch.cat(parts)


# --- what a model says of records ---------------------------------------------------------------


def losses(public: Public, weights: Weights, records: Records) -> Floats:
    """The loss of each record under each model, float64[models, n]; weights: float32[models, d]."""
    return _of_outputs(public, weights, records, public.loss())


def confidences(public: Public, weights: Weights, records: Records) -> Floats:
    """How sure each model is of each record's own target, float64[models, n], unbounded.

    Under cross-entropy log(p / (1 - p)) of the target's class, which is nearly normal over models,
    computed from the outputs z as z_y - log sum of exp(z_j) over j != y, so that nothing is lost
    where p is near 1 (Carlini et al. 2022, their logit scaling). Under another loss l, -log l.
    """
    if public.task != "classification" or ":" in public.parsed().model.loss:
        return -np.log(losses(public, weights, records) + 1e-12)
    return _of_outputs(public, weights, records, _log_odds)


def _log_odds(given: Tensor, target: Tensor) -> Tensor:
    given, at = given.double(), target[:, None]
    others = given.scatter(1, at, -math.inf)
    return given.gather(1, at)[:, 0] - others.logsumexp(1)


def _of_outputs(public: Public, weights: Weights, records: Records, told: models.Loss) -> Floats:
    module = public.module().eval()
    features = torch.from_numpy(records.features.numpy().copy())
    target = torch.from_numpy(records.target.numpy().copy())
    found = np.empty((len(weights), len(records)))
    with torch.no_grad():
        for row, one in zip(found, weights, strict=True):
            models.assign(module, one)
            for start in range(0, len(records), _AT_ONCE):
                at = slice(start, start + _AT_ONCE)
                row[at] = told(module(features[at]), target[at]).double().numpy()
    return found


# --- the shadow models of an attack -----------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class Shadows:
    """weights: float32[models, d]. member: bool[models, candidates], who was trained on whom."""

    weights: Weights
    member: NDArray[np.bool_]


def joined(first: Records, second: Records) -> Records:
    """Those of `first`, then those of `second`."""
    parts = [(one.features.numpy(), one.target.numpy()) for one in (first, second)]
    features, target = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    return Records(Array.of(features), Array.of(target))


def with_and_without(
    public: Public,
    candidates: Records,
    known: Records,
    count: int,
    rng: np.random.Generator,
    progress: Progress = lambda _: None,
) -> Shadows:
    """`count` models (an even number) of all `known` records and half of the candidates.

    Every candidate is in exactly half of the models: of each pair of them one has it.
    """
    halves = [np.argsort(rng.random(len(candidates))) < len(candidates) // 2]
    for number in range(1, count):
        drawn = np.argsort(rng.random(len(candidates))) < len(candidates) // 2
        halves.append(~halves[-1] if number % 2 else drawn)
    member = np.stack(halves)
    always = np.ones((count, len(known)), np.bool_)
    pool = joined(candidates, known)
    weights = train(public, pool, np.hstack([member, always]), rng, progress)
    return Shadows(weights, member)


def without(
    public: Public,
    known: Records,
    count: int,
    rng: np.random.Generator,
    progress: Progress = lambda _: None,
) -> Weights:
    """`count` models of no candidate, float32[count, d]: each of four fifths of the `known`.

    So that they differ as models of different records do.
    """
    member = np.stack([rng.permutation(len(known)) < 0.8 * len(known) for _ in range(count)])
    return train(public, known, member, rng, progress)
