"""mask-reuse: are masks fresh, and ciphertexts?

Two vectors under the same mask differ by the difference of two updates, which is small; under fresh
masks the difference is uniform modulo 2^p. So for each site every pair of rounds is compared, for
each round every pair of sites, and every vector with zero, by an exact test. First as uploaded;
then without what the server takes off by itself: the self-masks that sites release once they are in
the sum, and the masks that colluding sites share with the others. Where updates are encrypted, the
seeds of ciphertexts must not repeat, or two uploads of a round under one key give their difference
away. Fed-BioMed's LOM reused masks; the difference attack is as old as the two-time pad.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import TYPE_CHECKING, Final, Literal

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
from attacks.rehearsal import Rehearsal, gaussian_updates, rehearse
from attacks.shared_key import (
    KEYED,
    SURE,
    Contributions,
    Training,
    fields,
    leaked_seed,
    opened,
    trainings,
    uploads,
)
from attacks.view import Array, ColludingView, Given, Recording, ServerView, answer
from protocols import masks, secagg, shamir
from protocols.bfv import DEGREE, MODULUS, Parameters
from protocols.bitpacking import pack, packed_size, unpack
from protocols.catalogue import UPLOAD
from protocols.errors import ProtocolError
from protocols.framing import SEED_BYTES
from protocols.keystream import Seed
from protocols.masks import MaskKey
from protocols.messages import MaskAdvertisements, RelayedSecrets, ReleasedShares
from protocols.shamir import Share
from securefl.config import Experiment
from securefl.messages import Answer, Request
from securefl.transcript import Crossing

if TYPE_CHECKING:
    from attacks.case import Case

Seen = ServerView | ColludingView
Slots = NDArray[np.uint64]
CKKS_DEGREE: Final = 8192
_MOST_SLOTS: Final = 4096
"""Of each vector, at most: enough for any p."""


class Repeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two vectors of which the second may be zero, and their difference modulo 2^p.

    small: how many of its `fields` numbers lie in the middle quarter of their range.
    """

    kind: Literal["uploaded", "unmasked", "ciphertexts"]
    number: int
    site: str
    other_number: int
    other_site: str
    small: int
    fields: int
    difference: Array


class Repeats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was compared. worst: the pair least like fresh masks; seeds: of ciphertexts, all and
    those seen before."""

    compared: int
    vectors: int
    unmasked: int
    worst: Repeat | None
    seeds: int
    repeated_seeds: int


# --- the adversary --------------------------------------------------------------------------------


def adversary(view: Seen, given: Given, seed: int, progress: Progress) -> Repeats:
    """The pair of masked vectors that differs by the smallest numbers, and repeated seeds."""
    del given, seed
    protocol = str(view.public.parsed().protocol.name)
    rounds = trainings(view.public, view.crossings)
    vectors: dict[str, dict[tuple[int, str], Slots]] = {"uploaded": {}, "unmasked": {}}
    seeds, repeats = set[bytes](), 0
    ciphertexts, found = 0, list[Repeat]()
    for done, training in enumerate(rounds):
        said = uploads(view.crossings, training.number)
        parts = {site: item.payload for site, item in said.items()}
        if protocol in KEYED:
            told = _seeds(protocol, training, parts)
            for own in told.values():
                ciphertexts += len(own)
                repeats += sum(item in seeds for item in own)
                seeds.update(own)
            if protocol != "ckks":
                found += _same_seed(training, parts, told)
        plain = _masked(view, protocol, training, parts)
        for site, slots in plain.items():
            vectors["uploaded"][training.number, site] = slots[:_MOST_SLOTS]
        for site, slots in _unmasked(view, training, plain).items():
            vectors["unmasked"][training.number, site] = slots[:_MOST_SLOTS]
        progress(0.5 * (done + 1) / len(rounds))
    compared = len(found)
    for kind in ("uploaded", "unmasked"):
        for repeat in _compared(kind, rounds, vectors[kind]):
            compared += 1
            found.append(repeat)
            found = [min(found, key=_p)]
    worst = min(found, key=_p, default=None)
    return Repeats(
        compared, len(vectors["uploaded"]), len(vectors["unmasked"]), worst, ciphertexts, repeats
    )


def _p(repeat: Repeat) -> float:
    """How likely so many small numbers are in a uniform difference, on a log scale."""
    return float(binom.logsf(repeat.small - 1, repeat.fields, 0.25))


def _masked(
    view: Seen, protocol: str, training: Training, parts: Mapping[str, bytes]
) -> dict[str, Slots]:
    """A round's vectors as masks left them; none where they are encrypted and no key leaked."""
    bits, found = training.encoding.plain_bits, dict[str, Slots]()
    if protocol == "secagg":
        for site, data in parts.items():
            with suppress(ValueError):  # no packed vector: the server refused it too
                found[site] = unpack(np.frombuffer(data, np.uint8), training.slots, bits)
        return found
    if protocol != "masked-bfv" or not isinstance(view, ColludingView):
        return {}
    leaks = (leaked_seed(training.begin, item, view.crossings) for item in view.recordings)
    leaked = next((item for item in leaks if item is not None), None)
    if leaked is None:
        return {}
    friends = {item.site for item in view.recordings}
    for site in sorted(parts.keys() - friends):
        with suppress(ProtocolError):  # no ciphertext: the server refused it too
            found[site] = opened(protocol, leaked, training, parts[site])
    return found


def _unmasked(view: Seen, training: Training, vectors: Mapping[str, Slots]) -> dict[str, Slots]:
    """`vectors` without self-masks, and without masks shared with colluding sites."""
    begin, bits, number = training.begin, training.encoding.plain_bits, training.number
    bodies = _bodies(view.crossings, number)
    offered = next(iter(bodies["share", "down"].values()), None)
    relayed = next(iter(bodies[UPLOAD, "down"].values()), None)
    if not vectors or offered is None or relayed is None:
        return {}
    adverts = {item.sender: item for item in MaskAdvertisements.from_bytes(offered).items}
    members = RelayedSecrets.from_bytes(relayed).members
    context = secagg.mask_context(begin, {site: adverts[site] for site in members})
    held: dict[str, dict[int, Share]] = defaultdict(dict)
    for site, body in bodies["unmask", "up"].items():
        with suppress(ProtocolError, ValueError):  # a site may have answered anything
            for item in ReleasedShares.from_bytes(body).own:
                held[item.owner][begin.cohort.index(site) + 1] = Share.parse(item.share)
    friends = view.recordings if isinstance(view, ColludingView) else ()
    keys = {item.site: key for item in friends if (key := _mask_key(item, number)) is not None}
    if len(set(members) - set(keys)) < 2:
        return {}  # a single honest site among friends is the sum less theirs: nothing hides that
    near = secagg.graph(begin, adverts)
    found = {}
    for site, slots in vectors.items():
        if len(held[site]) < begin.threshold or site in keys:
            continue
        some = dict(sorted(held[site].items())[: begin.threshold])
        try:
            terms = [masks.own(shamir.combine(some), site, context)]
        except ValueError:  # somebody gave a share of something else
            continue
        for friend, key in keys.items():
            if friend in near.neighbours(site):
                sign, stream = key.pair(friend, site, adverts[site].mask, context)
                terms.append((-sign, stream))
        total = masks.total(terms, len(slots), bits)
        found[site] = (slots - total) & np.uint64((1 << bits) - 1)
    return found


def _mask_key(recording: Recording, number: int) -> MaskKey | None:
    """A site's mask secret: what it draws second, after its channel key."""
    drawn = b"".join(
        item.data for item in recording.drawn if (item.number, item.phase) == (number, "advertise")
    )
    return MaskKey(Seed(drawn[32:64])) if len(drawn) >= 64 else None


def _bodies(crossings: Sequence[Crossing], number: int) -> dict[tuple[str, str], dict[str, bytes]]:
    """The protocol's messages of a round, by phase and direction, by site."""
    found: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
    for item in crossings:
        if item.number != number:
            continue
        if item.direction == "down":
            found[item.phase, "down"][item.site] = Request.from_bytes(item.data).body
        elif (said := answer(item.data)) is not None:
            found[item.phase, "up"][item.site] = said.body
    return found


def _compared(
    kind: str, rounds: Sequence[Training], vectors: Mapping[tuple[int, str], Slots]
) -> Iterator[Repeat]:
    """Every vector with zero, each site's rounds, and each round's sites."""
    by_round = {training.number: training for training in rounds}
    pairs: list[tuple[tuple[int, str], tuple[int, str] | None]] = [(one, None) for one in vectors]
    pairs += [(a, b) for a, b in combinations(vectors, 2) if a[0] == b[0] or a[1] == b[1]]
    for a, b in pairs:
        first = vectors[a]
        second = np.zeros_like(first) if b is None else vectors[b]
        size = min(len(first), len(second))
        difference = first[:size] - second[:size]
        training = by_round[a[0]]
        yield _repeat(kind, training, a, b or (0, ""), difference)


def _repeat(
    kind: str, training: Training, a: tuple[int, str], b: tuple[int, str], difference: Slots
) -> Repeat:
    difference = difference & np.uint64((1 << training.encoding.plain_bits) - 1)
    numbers = fields(training.encoding, difference)
    quarter = 2.0 ** (training.encoding.field_bits - 3)
    small = int(((numbers >= -quarter) & (numbers < quarter)).sum())
    told: Literal["uploaded", "unmasked", "ciphertexts"] = (
        "uploaded" if kind == "uploaded" else "unmasked" if kind == "unmasked" else "ciphertexts"
    )
    return Repeat(told, *a, *b, small, len(numbers), Array.of(difference))


def _seeds(protocol: str, training: Training, parts: Mapping[str, bytes]) -> dict[str, list[bytes]]:
    """The seed of c1 of every block of every upload."""
    each = Parameters(training.encoding.plain_bits, training.encoding.cohort).block_bytes
    if protocol == "ckks":  # two residues of every coefficient, of 60 and of 40 bits
        each = SEED_BYTES + packed_size(CKKS_DEGREE, 60) + packed_size(CKKS_DEGREE, 40)
    return {
        site: [data[at : at + SEED_BYTES] for at in range(0, len(data) - SEED_BYTES + 1, each)]
        for site, data in parts.items()
    }


def _same_seed(
    training: Training, parts: Mapping[str, bytes], seeds: Mapping[str, list[bytes]]
) -> list[Repeat]:
    """The difference of two uploads of a round whose first blocks share a seed: c1 cancels."""
    encoding = training.encoding
    parameters = Parameters(encoding.plain_bits, encoding.cohort)
    found = []
    for a, b in combinations(sorted(parts), 2):
        if seeds[a][:1] != seeds[b][:1] or not seeds[a] or len(parts[a]) != len(parts[b]):
            continue
        size = min(training.slots, DEGREE)
        end = SEED_BYTES + packed_size(size, parameters.upload_bits)
        first, second = (
            unpack(
                np.frombuffer(parts[site][SEED_BYTES:end], np.uint8), size, parameters.upload_bits
            ).astype(object)
            for site in (a, b)
        )
        exact = (first - second) * (1 << parameters.upload_cut) % MODULUS
        scaled = (exact * (1 << encoding.plain_bits) + MODULUS // 2) // MODULUS
        difference = (scaled % (1 << encoding.plain_bits)).astype(np.uint64)
        number = training.number
        found.append(_repeat("ciphertexts", training, (number, a), (number, b), difference))
    return found


# --- the scorer -----------------------------------------------------------------------------------


def score(guess: Repeats, truth: Contributions, seed: int) -> Score:
    """Whether masks repeat, and whether the difference of two updates was read.

    p: of fresh masks every difference is uniform, its numbers are independent and each lies in the
    middle quarter with 1/4: a binomial tail, times how many pairs were compared (Bonferroni). A
    repeated seed of 64 bytes has p = 0.
    """
    worst, right = guess.worst, 0.0
    p = 1.0
    if worst is not None:
        p = min(1.0, float(np.exp(_p(worst))) * guess.compared)
        right = _right(worst, truth)
    if guess.repeated_seeds:
        p = 0.0
    results = (
        AttackResult("masks used twice", float(p < SURE), None, 0.0, guess.compared, seed),
        AttackResult("difference of two updates read", right, None, 0.0, 1, seed),
        AttackResult(
            "ciphertext seeds seen before",
            float(guess.repeated_seeds),
            None,
            0.0,
            guess.seeds,
            seed,
        ),
    )
    count = worst.fields if worst is not None else 0
    seeds = f"{guess.seeds} seeds of ciphertexts: one that is used twice would show"
    limit = (
        f"any mask used twice among {guess.compared} pairs of {count} numbers would show"
        if guess.vectors
        else seeds
    )
    return Score(results, p < SURE, p, limit)


def _right(worst: Repeat, truth: Contributions) -> float:
    """1.0 where the numbers are exactly the difference of what the two contributed."""
    first = truth.of(worst.site, worst.number)
    second = truth.of(worst.other_site, worst.other_number)
    if first is None or (second is None and worst.other_site):
        return 0.0
    read: Slots = worst.difference.numpy()
    whole = first[: len(read)] - (second[: len(read)] if second is not None else np.uint64(0))
    whole &= np.uint64((1 << truth.encoding.plain_bits) - 1)
    return float((read == whole).mean())


def claim(experiment: Experiment) -> Claim:
    """Made wherever there are masks or ciphertexts."""
    name = str(experiment.protocol.name)
    masked = name in ("secagg", "masked-bfv")
    return Claim(
        "No mask is used twice, and what is left of an upload without the server's masks is uniform"
        if masked
        else "No ciphertext's randomness is used twice",
        f"at most {experiment.protocol.colluding_sites} sites collude; X25519, HKDF and AES-256"
        if masked
        else "the generators of the operating system and of SEAL",
        name != "plain",
    )


def trial(case: Case) -> Trial[Contributions]:
    """The server, with one site's HE key where vectors are encrypted and a site recorded itself."""
    name = str(case.experiment.protocol.name)
    if name == "plain":
        raise UnavailableError("plain has no masks and no ciphertexts")
    recordings = []
    for site in case.sites:
        try:
            recordings.append(case.recording(site))
        except UnavailableError:
            continue
    view: Seen = case.server()
    if name == "masked-bfv" and recordings:
        view = case.colluding((recordings[0].site,), with_server=True)
    rounds = trainings(view.public, view.crossings)
    if not rounds:
        raise UnavailableError("no round of training was recorded")
    contributed = tuple((item.site, item.contributed) for item in recordings)
    length = min(training.length for training in rounds)
    return Trial(view, Contributions(rounds[0].encoding, length, contributed))


def _trial(made: Rehearsal, leaked: bool) -> Trial[Contributions]:
    view: Seen = made.colluding(("site-1",)) if leaked else made.view
    rounds = trainings(view.public, view.crossings)
    contributed = tuple((site, item.contributed) for site, item in made.recordings.items())
    return Trial(view, Contributions(rounds[0].encoding, rounds[0].length, contributed))


def reusing(made: Rehearsal, site: str, first: int, then: int) -> Rehearsal:
    """A round of secagg again in which `site` puts the mask of round `first` on round `then`."""
    slots = {item.number: item.slots.numpy() for item in made.recordings[site].contributed}
    [training] = [x for x in trainings(made.view.public, made.view.crossings) if x.number == then]
    bits = training.encoding.plain_bits
    before = uploads(made.view.crossings, first)[site]
    masked = unpack(np.frombuffer(before.payload, np.uint8), training.slots, bits)
    masked = (masked - slots[first] + slots[then]) & np.uint64((1 << bits) - 1)
    now = msgspec.structs.replace(
        uploads(made.view.crossings, then)[site], payload=pack(masked, bits).tobytes()
    )
    return made.with_crossings(
        [
            msgspec.structs.replace(x, data=Answer(now.to_bytes()).to_bytes())
            if (x.number, x.phase, x.site, x.direction) == (then, UPLOAD, site, "up")
            else x
            for x in made.view.crossings
        ]
    )


def rehearsed(protocol: str, seed: int, profile: Profile) -> Rehearsal:
    """Rounds of `protocol` with fresh masks."""
    rounds, length = (3, 100) if profile == Profile.quick else (8, 1000)
    return rehearse(protocol, gaussian_updates(seed, rounds, 4, length), seed)


def undefended(seed: int, profile: Profile) -> Trial[Contributions]:
    """secagg where one site uses one mask twice."""
    return _trial(reusing(rehearsed("secagg", seed, profile), "site-2", 1, 3), leaked=False)


def no_signal(seed: int, profile: Profile) -> Trial[Contributions]:
    """secagg as it is."""
    return _trial(rehearsed("secagg", seed, profile), leaked=False)


ATTACK: Final = Attack(
    "mask-reuse",
    "Masks and ciphertexts that are used twice",
    "Bonawitz et al. 2017, section 4: masks are one-time pads",
    (ServerView, ColludingView),
    Repeats,
    adversary,
    score,
    claim,
    trial,
    undefended,
    no_signal,
)
