"""Does the audit see planted bugs? `python benchmarks/attacks/mutants.py [SEEDS] [NAME ...]`

Runs with one bug each, and clean ones, over many seeds; every attack that tests a claim and takes
no shadow models is tried on each, judged together as `securefl audit` does. What is counted: the
seeds in which any claim is contradicted. Without the two controls of each attack, which do not
depend on the run; adversaries get their view's bytes, but no process of their own.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
from scipy.stats import beta

from attacks import attack as attacks
from attacks.attack import Score, UnavailableError
from attacks.audit import LEVEL
from attacks.case import Case
from attacks.view import AnyView
from protocols import bfv_sum, ckks, masks, secagg
from protocols.identity import digest
from protocols.keystream import Keystream, Seed
from protocols.messages import OpenedSum
from protocols.noise import DiscreteGaussian
from protocols.rounds import statement
from securefl import client, config
from securefl.privacy import integers, training
from securefl.runs import run

TRIED = ("epsilon", "ckks-key", "mask-reuse", "readable", "shared-key", "sums", "traffic")

_EXPERIMENT = """
rounds = 12
[data]
source = "digits"
default_range = [0.0, 16.0]
[sites]
count = 3
[model]
name = "logistic"
[training]
learning_rate = 0.5
[privacy]
epsilon = 1.0
delta = 1e-5
rate = 0.5
expected_batch = 150
[protocol]
name = "secagg"
[audit]
canaries = 128
[transcript]
consent = ["site-1", "site-2", "site-3"]
own = ["site-1", "site-2", "site-3"]
"""


@dataclass(frozen=True)
class Mutant:
    """One bug. seen: whether any attack in the views can see it."""

    name: str
    planted: Callable[[], AbstractContextManager[None]]
    settings: tuple[str, ...] = ()
    seen: bool = True


@contextlib.contextmanager
def _clean() -> Iterator[None]:
    yield


@contextlib.contextmanager
def _noise_over_8() -> Iterator[None]:
    """Every site's noise has an eighth of its deviation, local or distributed."""
    hardened = integers.hardened

    def weak(total, deviation, noise):
        return hardened(total, deviation / 8, noise)

    with (
        mock.patch.object(training.integers, "hardened", weak),
        mock.patch.object(training, "DiscreteGaussian", lambda d: DiscreteGaussian(d / 8)),
    ):
        yield


@contextlib.contextmanager
def _no_plan_at_one_site() -> Iterator[None]:
    """The trainer of site-1 forgets its plan: no clipping, no sampling, no noise."""
    made = client.Client._made

    def careless(self, table, loss):
        trainer = made(self, table, loss)
        if self.name == "site-1":
            trainer.update = lambda weights, mask, randomness, clip_scale=1.0: trainer._trained(
                weights, mask, randomness
            )
        return trainer

    with mock.patch.object(client.Client, "_made", careless):
        yield


@contextlib.contextmanager
def _masks_reused() -> Iterator[None]:
    """Masks are made of a site's name alone: the same ones in every round."""
    own, pair, step1 = masks.own, masks.MaskKey.pair, secagg.STEPS["advertise"]

    def named(expected, message, randomness):
        del randomness
        seed = Seed(digest("mutant", expected.identity.name.encode()))
        return step1(expected, message, Keystream(seed, "mutant").bytes)

    with (
        mock.patch.object(masks, "own", lambda seed, me, context: own(seed, me, b"")),
        mock.patch.object(
            masks.MaskKey,
            "pair",
            lambda self, me, peer, key, context: pair(self, me, peer, key, b""),
        ),
        mock.patch.dict(secagg.STEPS, {"advertise": named}),
    ):
        yield


@contextlib.contextmanager
def _in_clear() -> Iterator[None]:
    """Nobody adds a mask, and the server takes none off."""
    with (
        mock.patch.object(masks, "add", lambda chunks, terms, bits: iter(chunks)),
        mock.patch.object(masks, "total", lambda terms, slots, bits: np.zeros(slots, np.uint64)),
    ):
        yield


@contextlib.contextmanager
def _raw_ckks() -> Iterator[None]:
    """CKKS at the tutorials' scale, without flooding; the opener hands out what SEAL decoded."""
    decoded: list[list[float]] = []

    class Encoder(ckks.seal.CKKSEncoder):
        def decode_double(self, plain):
            decoded.append(super().decode_double(plain))
            return decoded[-1]

    def open_sum(expected, begin, key, request):
        decoded.clear()
        bfv_sum.opened_slots(expected, key, request)
        payload, me = np.array(decoded).tobytes(), expected.identity
        signature = me.key.sign(statement(begin.context, "open", me.name, payload))
        return OpenedSum(me.name, payload, signature).to_bytes()

    def unpack(packed, count, bits):
        integers = np.rint(np.frombuffer(packed.tobytes(), "<f8"))[:count].astype(np.int64)
        return integers.view(np.uint64) & np.uint64((1 << bits) - 1)

    with (
        mock.patch.object(ckks, "SCALE", 2.0**40),
        mock.patch.object(ckks.Parameters, "flooding_bits", 64.0),
        mock.patch.object(ckks.SecretKey, "_flood"),
        mock.patch.object(ckks.seal, "CKKSEncoder", Encoder),
        mock.patch.object(bfv_sum, "open_sum", open_sum),
        mock.patch.object(bfv_sum, "unpack", unpack),
    ):
        yield


@contextlib.contextmanager
def _share_missing() -> Iterator[None]:
    """site-1 leaves its share of the distributed noise out."""
    made = client.Client._made

    def careless(self, table, loss):
        trainer = made(self, table, loss)
        if self.name == "site-1":
            noised = trainer.noised_sum

            def without(*parts):
                with mock.patch.object(training, "DiscreteGaussian", _Silent):
                    return noised(*parts)

            trainer.noised_sum = without
        return trainer

    with mock.patch.object(client.Client, "_made", careless):
        yield


class _Silent:
    def __init__(self, deviation: float) -> None:
        del deviation

    def sample(self, stream: Keystream, count: int):
        del stream
        return np.zeros(count, np.int64)


DISTRIBUTED = ("privacy.noise=distributed", "rounds=20")

CKKS = (
    "protocol.name=ckks",
    "sites.count=5",
    "model.name=mlp",
    "model.hidden=[64]",
    "rounds=3",
    "audit.canaries=0",
)  # more than one block of 4096 numbers: a block's real parts are half of the equations

MUTANTS = (
    Mutant("clean, local noise", _clean),
    Mutant("clean, distributed noise", _clean, DISTRIBUTED),
    Mutant("noise / 8, local", _noise_over_8),
    Mutant("noise / 8, distributed", _noise_over_8, DISTRIBUTED),
    Mutant("no plan at one site", _no_plan_at_one_site),
    Mutant("masks reused", _masks_reused),
    Mutant("weights in clear", _in_clear),
    Mutant("clean, ckks", _clean, CKKS),
    Mutant("raw CKKS decryption released", _raw_ckks, CKKS),
    Mutant("a share of the noise missing", _share_missing, DISTRIBUTED, seen=False),
)


def alarms(case: Case, seed: int) -> dict[str, float]:
    """The attacks that contradict a claim of the run, with their p."""
    found: dict[str, float] = {}
    known = attacks.installed()
    for name in TRIED:
        if name not in known:
            continue
        attack = known[name]
        if not attack.claim(case.experiment).made:
            continue
        try:
            trial = attack.trial(case)
        except UnavailableError:
            continue
        attack.check(trial.view, trial.given)
        view = msgspec.msgpack.decode(msgspec.msgpack.encode(trial.view), type=AnyView)
        guessed = attack.adversary(view, trial.given, seed, lambda _: None)
        score: Score = attack.score(guessed, trial.truth, seed)
        if score.p is not None:
            found[name] = score.p
    return {name: p for name, p in found.items() if p <= LEVEL / len(found)}


def flagged(mutant: Mutant, seed: int) -> dict[str, float]:
    """The alarms of one run with the bug."""
    experiment = config.parse(_EXPERIMENT, [*mutant.settings, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        with mutant.planted():
            done = run(experiment, Path(folder) / "run", report=False)
        return alarms(Case.open(done.directory), seed)


def main() -> None:
    """A line a mutant: in how many seeds it was flagged, with the Clopper-Pearson interval."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    named = sys.argv[2:]
    for mutant in MUTANTS:
        if named and not any(name in mutant.name for name in named):
            continue
        started, seen = time.perf_counter(), []
        by: set[str] = set()
        for seed in range(seeds):
            found = flagged(mutant, seed)
            seen.append(bool(found))
            by |= set(found)
        k = int(np.sum(seen))
        low = beta.ppf(0.025, k, seeds - k + 1) if k else 0.0
        high = beta.ppf(0.975, k + 1, seeds - k) if k < seeds else 1.0
        print(
            f"{mutant.name}: flagged in {k} of {seeds} ({low:.2f} to {high:.2f})"
            f"{' by ' + ', '.join(sorted(by)) if by else ''};"
            f" {(time.perf_counter() - started) / seeds:.1f} s a seed",
            flush=True,
        )


if __name__ == "__main__":
    main()
