"""readable: do uploads look like anything but uniform bytes?

First an actual reading: every upload is decoded as if it were the plain encoding, and what is read
is compared with the round's aggregate. Then exact tests that uniform bits pass: how many are 1, how
many differ from the one before, how many are 1 in each place of a slot, and how many numbers have
the sign of the aggregate's. Under masks any n - 1 uploads of a round are independent of the
aggregate, so that the last site of each round is left out of all tests; a ciphertext's coefficients
are uniform modulo a prime that is a power of two but for less than one part in a million.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

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
from attacks.evidence import Interval
from attacks.rehearsal import Rehearsal, gaussian_updates, rehearse
from attacks.shared_key import (
    SURE,
    Contributions,
    Training,
    correlation,
    fields,
    trainings,
    uploads,
)
from attacks.view import Array, Given, ServerView
from protocols.bfv import DEGREE, Parameters
from protocols.bitpacking import packed_size, unpack
from securefl.config import Experiment

if TYPE_CHECKING:
    from attacks.case import Case

_MOST_BYTES: Final = 1 << 18
"""Of each upload, at most."""

_MOST_NAMED: Final = 10
"""Uploads of unlike lengths, at most."""


class Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an upload says when it is decoded as plain: float32[d], in the encoding's integers."""

    number: int
    site: str
    values: Array


class Counted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often something happened that happens to uniform bits with 1/2, n times independently.

    times: among how many such counts it is the most extreme one.
    """

    what: str
    seen: int
    n: int
    times: int = 1


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that was read. odd: uploads that are not as long as most of their round's, in words."""

    read: tuple[Read, ...]
    counted: tuple[Counted, ...]
    likeness: float
    odd: tuple[str, ...]


# --- the adversary --------------------------------------------------------------------------------


def adversary(view: ServerView, given: Given, seed: int, progress: Progress) -> Reading:
    """Every upload as plain numbers, and how uniform its bits are."""
    del given, seed
    protocol = view.public.parsed().protocol.name
    rounds = trainings(view.public, view.crossings)
    means = {item.number: item.aggregate.mean for item in view.rounds()}
    read, bits, agree, signs = list[Read](), list[NDArray[np.uint8]](), 0, 0
    places: list[NDArray[np.int64]] = []
    likeness, rows, odd = list[float](), 0, list[str]()
    for done, training in enumerate(rounds):
        parts = {s: said.payload for s, said in uploads(view.crossings, training.number).items()}
        usual = Counter(map(len, parts.values())).most_common(1)[0][0] if parts else 0
        odd += [
            f"{site} sent {len(parts[site])} bytes in round {training.number}, and most {usual}"
            for site in sorted(parts)
            if len(parts[site]) != usual
        ]
        for site in sorted(parts):
            values = _decoded(training, parts[site])
            read.append(Read(training.number, site, Array.of(values.astype(np.float32))))
            mean = means.get(training.number)
            if mean is not None:
                likeness.append(correlation(values, mean[: len(values)]))
            if site == max(parts):
                continue
            if mean is not None:
                agree += int(((values < 0) == (mean[: len(values)] < 0)).sum())
                signs += len(values)
            for data, width in _runs(protocol, training, parts[site]):
                row = np.unpackbits(data[:_MOST_BYTES], bitorder="little")
                row = row[: len(row) // width * width]
                bits.append(row)
                places.append(row.reshape(-1, width).sum(axis=0, dtype=np.int64))
                rows += len(row) // width
        progress((done + 1) / len(rounds))
    counted = [Counted("signs like the aggregate's", agree, signs)] if signs else []
    total = sum(map(len, bits))
    counted.append(Counted("bits that are 1", sum(int(row.sum()) for row in bits), total))
    changes = sum(int((row[1:] != row[:-1]).sum()) for row in bits)
    counted.append(Counted("bits that differ from the last", changes, total - len(bits)))
    if places and len({len(row) for row in places}) == 1:
        sums = np.sum(places, axis=0)
        worst = int(np.argmax(np.abs(sums - rows / 2)))
        counted.append(Counted(f"bits at {worst} of a slot", int(sums[worst]), rows, len(sums)))
    mean_likeness = float(np.mean(likeness)) if likeness else 0.0
    return Reading(tuple(read), tuple(counted), mean_likeness, tuple(odd))


def _decoded(training: Training, data: bytes) -> NDArray[np.float64]:
    """The first numbers in `data`, read as packed slots."""
    encoding = training.encoding
    count = min(training.slots, len(data) * 8 // encoding.plain_bits)
    packed = np.frombuffer(data, np.uint8)[: packed_size(count, encoding.plain_bits)].copy()
    spare = len(packed) * 8 - count * encoding.plain_bits
    if spare:
        packed[-1] &= (1 << (8 - spare)) - 1
    return fields(encoding, unpack(packed, count, encoding.plain_bits))[: training.length]


def _runs(protocol: str, training: Training, data: bytes) -> list[tuple[NDArray[np.uint8], int]]:
    """The stretches of an upload that are to be uniform, each with the bits of one slot in it."""
    whole = np.frombuffer(data, np.uint8)
    encoding = training.encoding
    if protocol not in ("bfv", "masked-bfv"):
        # Whole bytes alone: the last one may end in bits that are always 0.
        return [(whole[:-1] if len(whole) > 1 else whole, encoding.plain_bits)]
    parameters = Parameters(encoding.plain_bits, encoding.cohort)
    each, found = parameters.block_bytes, []
    for block in range(-(-training.slots // DEGREE)):
        part = whole[block * each : (block + 1) * each]
        found.append((part[64:-1] if len(part) > 65 else part[64:], parameters.upload_bits))
    return found


# --- the scorer -----------------------------------------------------------------------------------


def score(guess: Reading, truth: Contributions, seed: int) -> Score:
    """How much of an update was read, and how unlike uniform bits the uploads are.

    p: two-sided binomial tails, times how many there are (Bonferroni); 0 where uploads of a round
    have different lengths.
    """
    likeness, lengths = list[float](), list[int]()
    for item in guess.read:
        true = truth.of(item.site, item.number)
        if true is None:
            continue
        read = item.values.numpy().astype(np.float64)
        likeness.append(correlation(read, fields(truth.encoding, true)[: len(read)]))
        lengths.append(len(read))
    about = "true update"
    mean = float(np.mean(likeness)) if likeness else guess.likeness
    if not likeness:
        about, lengths = "aggregate", [item.values.shape[0] for item in guess.read]
    # Of n independent numbers a correlation has variance 1/n; the mean counts all vectors alike.
    half = 1.96 * math.sqrt(sum(1 / max(n, 4) for n in lengths)) / max(1, len(lengths))
    p = min([1.0, *(_tail(item) * item.times for item in guess.counted)]) * len(guess.counted)
    p = 0.0 if guess.odd else min(1.0, p)
    results = (
        AttackResult(
            f"correlation of what was read with the {about}",
            mean,
            Interval(max(-1.0, mean - half), min(1.0, mean + half), 0.95, "normal"),
            0.0,
            len(guess.read),
            seed,
        ),
        *(
            AttackResult(item.what, item.seen / max(item.n, 1), None, 0.5, item.n, seed)
            for item in guess.counted
        ),
    )
    n = max((item.n for item in guess.counted), default=0)
    limit = f"{n} bits: would show where {0.5 + 2.5 / np.sqrt(max(n, 1)):.2%} of them are alike"
    return Score(results, p < SURE, p, limit, notes=guess.odd[:_MOST_NAMED])


def _tail(item: Counted) -> float:
    """Two-sided, exact."""
    seen = min(item.seen, item.n - item.seen)
    return min(1.0, 2 * float(binom.cdf(seen, item.n, 0.5)))


def claim(experiment: Experiment) -> Claim:
    """Made of every protocol but plain."""
    name = str(experiment.protocol.name)
    return Claim(
        "plain hides nothing" if name == "plain" else "One upload alone looks like uniform bytes",
        {
            "plain": "none",
            "secagg": "X25519, HKDF and AES-256",
            "masked-bfv": "X25519, HKDF and AES-256, or Ring-LWE at degree 2048 and 54 bits",
        }.get(name, "Ring-LWE at the scheme's parameters"),
        name != "plain",
    )


def trial(case: Case) -> Trial[Contributions]:
    """The server; what sites recorded of themselves is the truth, where they did."""
    view, recordings = case.server(), []
    for site in case.sites:
        try:
            recordings.append(case.recording(site))
        except UnavailableError:
            continue
    return _trial(view, [(item.site, item.contributed) for item in recordings])


def _trial(
    view: ServerView, by_site: Sequence[tuple[str, tuple[Any, ...]]]
) -> Trial[Contributions]:
    rounds = trainings(view.public, view.crossings)
    if not rounds:
        raise UnavailableError("no round of training was recorded")
    if all(len(uploads(view.crossings, training.number)) < 2 for training in rounds):
        raise UnavailableError("one upload of a round is left out, and no other was recorded")
    length = min(training.length for training in rounds)
    return Trial(view, Contributions(rounds[0].encoding, length, tuple(by_site)))


def rehearsed(protocol: str, seed: int, profile: Profile) -> Trial[Contributions]:
    """Rounds of `protocol`."""
    rounds, length = (2, 200) if profile == Profile.quick else (5, 2000)
    made: Rehearsal = rehearse(protocol, gaussian_updates(seed, rounds, 4, length), seed)
    return _trial(made.view, [(s, item.contributed) for s, item in made.recordings.items()])


def undefended(seed: int, profile: Profile) -> Trial[Contributions]:
    """plain."""
    return rehearsed("plain", seed, profile)


def no_signal(seed: int, profile: Profile) -> Trial[Contributions]:
    """masked-bfv."""
    return rehearsed("masked-bfv", seed, profile)


ATTACK: Final = Attack(
    "readable",
    "Reading uploads",
    "Rukhin et al., NIST SP 800-22 (2010), sections 2.1 and 2.3, as exact binomial tests",
    (ServerView,),
    Reading,
    adversary,
    score,
    claim,
    trial,
    undefended,
    no_signal,
)
