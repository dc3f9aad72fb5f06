"""decryption-failures: can sums be brought to decrypt to something else?

A failure would tell of the key (D'Anvers, Guo, Johansson, Nilsson, Vercauteren and Verbauwhede, PKC
2019), and spoil a round. The server chooses what is worst: as many additions as there may be,
slots and masks at the ends of their range, and every dropped bit as wrong as it can be. It makes
sums of honest uploads, and sums whose every coefficient is pushed to what the proof allows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast, final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

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
from attacks.rehearsal import stream
from attacks.view import ActiveServer, Given, Public
from protocols.bfv import (
    DEGREE,
    MODULUS,
    MODULUS_BITS,
    Parameters,
    SecretKey,
    Sum,
    largest_plain_bits,
)
from protocols.bitpacking import packed_size
from protocols.framing import SEED_BYTES
from protocols.keystream import Seed
from securefl import agreement
from securefl.config import Experiment

if TYPE_CHECKING:
    from attacks.case import Case

_ERROR: Final = 3.24  # standard deviation of a fresh error: a centred binomial of 42 coins


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """What protocols.bfv.Parameters tells a key and a sum, without its proof."""

    plain_bits: int
    additions: int
    upload_cut: int
    sum_cut: int

    @property
    def upload_bits(self) -> int:
        return MODULUS_BITS - self.upload_cut

    @property
    def sum_bits(self) -> int:
        return MODULUS_BITS - self.sum_cut

    @property
    def block_bytes(self) -> int:
        return SEED_BYTES + packed_size(DEGREE, self.upload_bits)

    def upload_bytes(self, slots: int) -> int:
        blocks, rest = divmod(slots, DEGREE)
        last = SEED_BYTES + packed_size(rest, self.upload_bits) if rest else 0
        return blocks * self.block_bytes + last

    def sum_bytes(self, slots: int, contributions: int) -> int:
        return packed_size(slots, self.sum_bits) + contributions * SEED_BYTES * -(-slots // DEGREE)

    def unproved(self) -> Parameters:
        """The same, where Parameters is asked for."""
        return cast(Parameters, self)


class Probed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many slots of how many decrypted to something else."""

    honest_failures: int
    honest: int
    pushed_failures: int
    pushed: int


# --- the adversary --------------------------------------------------------------------------------


def adversary(view: ActiveServer, given: Given, seed: int, progress: Progress) -> Probed:
    """Sums at their worst, opened by the key that a site would have."""
    del given
    chosen, sums = _chosen(view.public)
    failures, tried = [0, 0], [0, 0]
    extremes = list(itertools.product(("low", "high", "half", "random"), ("low", "high", "random")))
    for number in range(sums):
        slots, mask = extremes[number % len(extremes)]
        pushed = number % 2
        failed = _failures(chosen, seed + number, slots, mask, pushed=bool(pushed))
        failures[pushed] += failed
        tried[pushed] += DEGREE
        progress((number + 1) / sums)
    return Probed(failures[0], tried[0], failures[1], tried[1])


def _chosen(public: Public) -> tuple[Chosen, int]:
    """The parameters under attack, and how many sums to try."""
    if public.experiment:
        experiment = public.parsed()
        encoding = agreement.encoding(experiment, len(public.sites), public.plan())
        told = Parameters(encoding.plain_bits, encoding.cohort)
        return Chosen(told.plain_bits, told.additions, told.upload_cut, told.sum_cut), 48
    plain_bits, additions, upload_cut, sum_cut, sums = public.shape  # a world outside a run
    return Chosen(plain_bits, additions, upload_cut, sum_cut), sums


def _failures(chosen: Chosen, seed: int, slots: str, mask: str, pushed: bool) -> int:
    """How many of a block's slots decrypt to something else than their sum without the mask."""
    rng = np.random.default_rng(seed)
    secret = Seed(stream(seed, "key")(64))
    # What is pushed leaves nothing to the roundings of uploads: the push stands for them.
    cut = Chosen(chosen.plain_bits, chosen.additions, 0, chosen.sum_cut) if pushed else chosen
    key, total = SecretKey(secret, cut.unproved()), Sum(DEGREE, cut.unproved())
    expected = np.zeros(DEGREE, np.uint64)
    for _ in range(chosen.additions):
        plain = _extreme(slots, chosen.plain_bits, rng)
        total.add(bytes(key.encrypt([plain])))
        expected += plain
    taken = _extreme(mask, chosen.plain_bits, rng)
    total.subtract(taken)
    expected -= taken
    if pushed:
        n = chosen.additions
        each = n * ((1 << chosen.upload_cut) >> 1) + max(0, int(21.5 * n - 6 * _ERROR * n**0.5))
        signs = rng.integers(0, 2, DEGREE)
        pushes = np.where(signs == 1, each, MODULUS - each).astype(np.uint64)
        total._c0 = (total._c0 + pushes) % np.uint64(MODULUS)
    found = key.open(total.to_bytes(), DEGREE, chosen.additions)
    return int((found != expected & np.uint64((1 << chosen.plain_bits) - 1)).sum())


def _extreme(kind: str, bits: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    if kind == "random":
        return rng.integers(0, 1 << bits, DEGREE, dtype=np.uint64)
    value = {"low": 0, "high": (1 << bits) - 1, "half": 1 << (bits - 1)}[kind]
    return np.full(DEGREE, value, np.uint64)


# --- the scorer -----------------------------------------------------------------------------------


def score(guess: Probed, truth: None, seed: int) -> Score:
    """The failures, with what they could be at most: by Clopper and Pearson, 3 / n where none.

    p: the claim is that nothing fails, so one failure has p = 0.
    """
    del truth

    def result(metric: str, failed: int, n: int) -> AttackResult:
        told = binomtest(failed, n).proportion_ci(0.95, "exact")
        interval = Interval(float(told.low), float(told.high), 0.95, "Clopper-Pearson")
        return AttackResult(metric, failed / n, interval, 0.0, n, seed)

    results = (
        result("slots of honest sums that fail", guess.honest_failures, guess.honest),
        result("slots pushed to the proof's bound that fail", guess.pushed_failures, guess.pushed),
    )
    any_ = guess.honest_failures + guess.pushed_failures > 0
    limit = f"would show failures of more than one slot in {guess.honest // 3} of honest sums"
    return Score(results, any_, 0.0 if any_ else 1.0, limit)


BOUND: Final = (
    "an error is a centred binomial of at most 21, so a sum of n decrypts exactly while "
    "n (21.5 + 2^(d-1)) + 2^(d'-1) + 1 < q / 2^(p+1), d and d' being the bits that are cut; "
    "protocols.bfv.Parameters refuses anything else"
)


def claim(experiment: Experiment) -> Claim:
    """Made of the protocols that encrypt by BFV; by an argument."""
    made = experiment.protocol.name in ("bfv", "masked-bfv")
    return Claim(
        "No sum decrypts to anything else, whatever is summed",
        "SEAL draws errors as it says",
        made,
        BOUND if made else None,
    )


def trial(case: Case) -> Trial[None]:
    """The run's parameters, with a key made for the purpose."""
    if case.experiment.protocol.name not in ("bfv", "masked-bfv"):
        raise UnavailableError(f"{case.experiment.protocol.name} has no BFV sums to decrypt")
    return Trial(ActiveServer(case.public), None)


def _world(chosen: Chosen, profile: Profile) -> Trial[None]:
    sums = 8 if profile == Profile.quick else 48
    shape = (chosen.plain_bits, chosen.additions, chosen.upload_cut, chosen.sum_cut, sums)
    return Trial(ActiveServer(Public("", (), shape, 1, "regression")), None)


def undefended(seed: int, profile: Profile) -> Trial[None]:
    """A plaintext modulus five bits beyond the bound, and nothing cut."""
    del seed
    return _world(Chosen(largest_plain_bits(64) + 5, 64, 0, 0), profile)


def no_signal(seed: int, profile: Profile) -> Trial[None]:
    """The largest parameters that the proof admits."""
    del seed
    told = Parameters(largest_plain_bits(64), 64)
    return _world(Chosen(told.plain_bits, 64, told.upload_cut, told.sum_cut), profile)


ATTACK: Final = Attack(
    "decryption-failures",
    "BFV sums that decrypt to something else",
    "D'Anvers, Guo, Johansson, Nilsson, Vercauteren and Verbauwhede, PKC 2019, on what failures "
    "tell of a key",
    (ActiveServer,),
    Probed,
    adversary,
    score,
    claim,
    trial,
    undefended,
    no_signal,
)
