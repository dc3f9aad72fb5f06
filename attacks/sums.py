"""Membership from the rounds' sums, which the server sees whatever hides their parts.

A round's sum holds the gradients of the records that were trained on in it. So, at the model of
each round, candidates' own gradients are laid beside what the sum moved by: members' shares in it
are above those of others (Nasr et al. 2019, section III: the passive global attacker on
gradients; Li et al. 2023: inner products with a gradient over rounds, as gradients of different
records are nearly orthogonal where weights are many).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from attacks import membership
from attacks.attack import Attack, Profile, Progress, Trial, UnavailableError
from attacks.case import Case
from attacks.membership import Candidates, Members, Scores
from attacks.view import Array, Given, Public, Records, Replayed, ServerView
from securefl import config, models, runs

Floats = NDArray[np.float64]

_MOST_NUMBERS: Final = 1 << 24
"""Of candidates' gradients at a time."""


def adversary(view: ServerView, given: Given, seed: int, progress: Progress) -> Scores:
    """The sum over rounds of each candidate's share, standardised over all candidates."""
    del seed
    assert given.candidates is not None  # noqa: S101 - Attack.check
    rounds = view.public.parsed().rounds
    total = np.zeros(len(given.candidates))
    seen = 0
    for item in view.rounds():
        share = shares(view.public, item, given.candidates)
        spread = share.std()
        if spread > 0:
            total += (share - share.mean()) / spread
        seen += 1
        progress(min(1.0, seen / rounds))
    return Scores(Array.of(total), (f"the sums of {seen} rounds were seen",))


def shares(public: Public, item: Replayed, candidates: Records) -> Floats:
    """How much each candidate's descent step and the round's mean update agree, float64[n].

    The coefficients of a ridge regression of the update on the candidates' steps, so that what the
    step of one has in common with those of others speaks for none of them. How much to shrink,
    which noise decides, is chosen anew by generalised cross-validation (Golub, Heath and Wahba
    1979). Steps are of the weights that survived, clipped as in training.
    """
    steps, update = -clipped_gradients(public, item, candidates), item.update[item.state.mask]
    values, vectors = np.linalg.eigh(steps @ steps.T)
    kept = values > values[-1] * 1e-9
    values, vectors = values[kept], vectors[:, kept]
    along = vectors.T @ (steps @ update)
    explained = along**2 / values
    rest = max(0.0, float(update @ update - explained.sum()))

    def validated(ridge: float) -> float:
        left = ridge / (values + ridge)
        freedom = len(update) - (1 - left).sum()
        return float((rest + (explained * left**2).sum()) / freedom**2)

    ridge = min(values.mean() * np.geomspace(1e-3, 1e3, 25), key=validated)
    solved: Floats = vectors @ (along / (values + ridge))
    return solved


def clipped_gradients(public: Public, item: Replayed, records: Records) -> Floats:
    """The gradient of each record at the round's model, float64[n, surviving weights].

    Clipped to the plan's norm where there is a plan for records.
    """
    module, loss = public.module(), public.loss()
    layout = models.layout(module)
    names = tuple(zip(layout.names, layout.slices(), layout.shapes, strict=True))

    def of_one(flat: Tensor, features: Tensor, target: Tensor) -> Tensor:
        parts = {name: flat[where].view(shape) for name, where, shape in names}
        return loss(functional_call(module, parts, (features[None],)), target[None])[0]

    flat = torch.from_numpy(item.state.weights.copy())
    features = torch.from_numpy(records.features.numpy().copy())
    target = torch.from_numpy(records.target.numpy().copy())
    each = vmap(grad(of_one), (None, 0, 0))
    step = max(1, _MOST_NUMBERS // layout.size)
    mask = item.state.mask
    found = np.concatenate(
        [
            each(flat, features[at : at + step], target[at : at + step]).numpy()[:, mask]
            for at in range(0, len(records), step)
        ]
    ).astype(np.float64)
    privacy = public.parsed().privacy
    if privacy is not None and privacy.unit != "site":
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        found *= np.minimum(1.0, privacy.clip * item.state.clip_scale / np.maximum(norms, 1e-30))
    return found


# --- worlds -------------------------------------------------------------------------------------


def trial(case: Case) -> Trial[Members]:
    """A recorded run, as its server saw it."""
    if case.experiment.protocol.reveal == "sites":
        raise UnavailableError('the server sees no sum: protocol.reveal = "sites"')
    view = case.server()
    if next(view.rounds(), None) is None:
        raise UnavailableError(
            "the transcript holds no whole round: every site must consent ([transcript] consent)"
        )
    asked = membership.candidates(case)
    return Trial(view, asked.truth, Given(asked.asked))


_WORLD: Final = """
version = 1
name = "sums-control"
rounds = {rounds}
[data]
source = "digits"
default_range = [0, 16]
test_fraction = 0.9
[sites]
count = 3
[model]
name = "logistic"
[training]
local_steps = 2
batch_size = 32
learning_rate = 0.2
[protocol]
name = "plain"
clip = 4.0
[transcript]
consent = ["site-1", "site-2", "site-3"]
"""


def undefended(seed: int, profile: Profile) -> Trial[Members]:
    """A run without noise, its messages in full view."""
    return _world(seed, profile, signal=True)


def no_signal(seed: int, profile: Profile) -> Trial[Members]:
    """The same, of records that no site held."""
    return _world(seed, profile, signal=False)


def _world(seed: int, profile: Profile, signal: bool) -> Trial[Members]:
    quick = profile is Profile.quick
    text = _WORLD.format(rounds=6 if quick else 20)
    experiment = config.parse(text, [f"seed={seed % 2**32}"])
    with tempfile.TemporaryDirectory() as folder:
        case = Case.open(runs.run(experiment, Path(folder) / "run", report=False).directory)
        view = case.server()
        held = [case.tables(site) for site in case.sites]
        trained = membership.gathered(table for table, _ in held)
        held_out = membership.gathered(table for _, table in held)
    each = min(len(trained), 100 if quick else 170)
    halves = np.array_split(np.random.default_rng([seed, 6]).permutation(len(held_out)), 2)
    others, strangers = (membership.taken(held_out, half) for half in halves)
    drawn = Candidates.drawn(trained if signal else strangers, others, each, seed)
    return Trial(view, drawn.truth, Given(drawn.asked))


ATTACK: Final = Attack(
    name="sums",
    title="Membership from the rounds' sums",
    source="Nasr, Shokri and Houmansadr 2019, Comprehensive Privacy Analysis of Deep Learning, "
    "section III; Li et al. 2023, Effective Passive Membership Inference Attacks in Federated "
    "Learning Against Overparameterized Models",
    views=(ServerView,),
    guess=Scores,
    adversary=adversary,
    score=membership.score,
    claim=membership.claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
    given=frozenset({"candidates"}),
)
