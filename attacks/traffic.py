"""What the sizes of messages tell: who taps the wires ranks the sites by how much they upload.

Where a site sends only what its records touched, a longer upload means more records. securefl's
uploads have one length for all, which the public parameters fix.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice, permutations
from math import factorial
from typing import Final

import msgspec
import numpy as np
from scipy.stats import spearmanr

from attacks.attack import (
    Attack,
    AttackResult,
    Claim,
    Profile,
    Progress,
    Score,
    Trial,
    UnavailableError,
)
from attacks.case import Case
from attacks.view import Given, NetworkView, Passed, Public
from securefl.config import Experiment

_MOST_ORDERS: Final = 50_000


class Sizes(msgspec.Struct, frozen=True):
    """The adversary's guess: a number by site, larger where it believes in more records."""

    uploaded: dict[str, float]


def adversary(view: NetworkView, given: Given, seed: int, progress: Progress) -> Sizes:
    """Every site's mean size of an upload."""
    del given, seed, progress
    sizes: dict[str, list[int]] = defaultdict(list)
    for item in view.passed:
        if item.direction == "up" and item.phase == "upload":
            sizes[item.site].append(item.size)
    return Sizes({site: float(np.mean(found)) for site, found in sizes.items()})


def score(guess: Sizes, records: dict[str, int], seed: int) -> Score:
    """Rank correlation with the record counts; p over all orders of the sites, or many of them."""
    sites = sorted(set(guess.uploaded) & set(records))
    said = np.array([guess.uploaded[site] for site in sites])
    held = np.array([records[site] for site in sites])
    value, p = 0.0, 1.0
    if len(set(said)) > 1 and len(set(held)) > 1:
        value = float(spearmanr(said, held).statistic)
        orders: list[tuple[int, ...]]
        if factorial(len(sites)) <= _MOST_ORDERS:
            orders = list(permutations(range(len(sites))))
        else:
            rng = np.random.default_rng(seed)
            drawn = (tuple(rng.permutation(len(sites)).tolist()) for _ in iter(int, 1))
            orders = [tuple(range(len(sites))), *islice(drawn, 1999)]
        others = np.array([spearmanr(said[list(order)], held).statistic for order in orders])
        p = float(np.mean(others >= value - 1e-12))
    least = 1 / min(factorial(len(sites)), 2000)
    return Score(
        results=(AttackResult("rank correlation", value, None, 0.0, len(sites), seed),),
        succeeded=p <= 0.05,
        p=p,
        limit=f"Of {len(sites)} sites' orders even the right one has p = {least:.2g}.",
    )


def claim(experiment: Experiment) -> Claim:
    """Every protocol's uploads have one length."""
    del experiment
    return Claim(
        "The sizes of uploads tell nothing of how many records a site has.",
        "Times, and who takes part, are seen by whoever taps the wires; this attack reads neither.",
        argument="The length of an upload follows from the model, the protocol and the cohort.",
    )


def trial(case: Case) -> Trial[dict[str, int]]:
    """A recorded run, where the records of three sites at least are at hand."""
    if len(case.auditing) < 3:
        raise UnavailableError("it takes the record counts of three sites; one audits alone here")
    view = case.network()
    if len({item.site for item in view.passed}) < 3:
        raise UnavailableError("it takes the messages of three sites: [transcript] consent")
    return Trial(view, {site: len(case.tables(site)[0]) for site in case.auditing})


def undefended(seed: int, profile: Profile) -> Trial[dict[str, int]]:
    """Twelve sites that send the rows of an item table that their records touched."""
    rng = np.random.default_rng(seed)
    records = {f"site-{i:02}": int(rng.integers(50, 2000)) for i in range(12)}
    touched = {s: len(np.unique(rng.integers(0, 5000, n))) for s, n in records.items()}
    rounds = 3 if profile is Profile.quick else 20
    return _world({site: 40 + 12 * rows for site, rows in touched.items()}, records, rounds)


def no_signal(seed: int, profile: Profile) -> Trial[dict[str, int]]:
    """The same sites, sending one length."""
    records = undefended(seed, profile).truth
    return _world(dict.fromkeys(records, 60_040), records, 3)


def _world(sizes: dict[str, int], records: dict[str, int], rounds: int) -> Trial[dict[str, int]]:
    passed = tuple(
        Passed(number, "upload", site, "up", size)
        for number in range(1, rounds + 1)
        for site, size in sizes.items()
    )
    public = Public(Experiment().dump(), tuple(sizes), (1,), 2, "classification")
    return Trial(NetworkView(public, passed), records)


ATTACK = Attack(
    name="traffic",
    title="Record counts from the sizes of uploads",
    source="the packet-volume attack of Back, Möller and Stiglic 2001",
    views=(NetworkView,),
    guess=Sizes,
    adversary=adversary,
    score=score,
    claim=claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
)
