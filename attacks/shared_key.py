"""shared-key: one holder of the HE key hands it to the server.

Every site of a round derives the key from one seed, so one that colludes is enough. What it drew,
with the messages that it got, is its channel key and what was sealed for it: the seed follows.
Under bfv and ckks the key opens every single upload; under masked-bfv it opens masked vectors,
which are uniform but for their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

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
from attacks.rehearsal import gaussian_updates, rehearse
from attacks.view import Array, ColludingView, Contributed, Given, Public, Recording, answer
from protocols import ckks
from protocols.bfv import Parameters, SecretKey, Sum
from protocols.catalogue import PROTOCOLS, UPLOAD
from protocols.encoding import Encoding, FixedPoint
from protocols.errors import ProtocolError
from protocols.identity import digest
from protocols.keystream import Seed
from protocols.messages import Begin, RelayedSecrets, SealedSeed, Upload
from protocols.sealing import ChannelKey, unseal
from securefl import agreement, models
from securefl.config import Experiment
from securefl.messages import Request
from securefl.privacy import clipping
from securefl.replicas import Standing
from securefl.state import GlobalState
from securefl.transcript import Crossing

if TYPE_CHECKING:
    from attacks.case import Case

SURE: Final = 1e-3
"""Above this p nothing is said to be found where nothing was read exactly."""

KEYED: Final = ("bfv", "ckks", "masked-bfv")
"""The protocols in which sites share a key."""


class OpenedUpload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site's upload of one round under the leaked key: uint64[slots]."""

    number: int
    site: str
    slots: Array


class Openings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every upload that the key opens. keys: of how many rounds it was derived."""

    keys: int
    opened: tuple[OpenedUpload, ...]


# --- the adversary --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Training:
    """A round of training as its messages have it."""

    number: int
    begin: Begin
    encoding: Encoding
    length: int

    @property
    def slots(self) -> int:
        """Of an upload."""
        return self.encoding.slots(self.length)


def trainings(public: Public, crossings: Sequence[Crossing]) -> tuple[Training, ...]:
    """The rounds of training of which a first request was recorded, in order."""
    experiment, plan, sites = public.parsed(), public.plan(), len(public.sites)
    first = PROTOCOLS[experiment.protocol.name].phases[0]
    encoding, size = (
        agreement.encoding(experiment, sites, plan),
        models.layout(public.module()).size,
    )
    found: dict[int, Training] = {}
    for item in crossings:
        if item.direction == "up" or item.phase != first or item.number in found:
            continue
        request = Request.from_bytes(item.data)
        if request.task.kind == "train":
            if experiment.protocol.reveal == "sites":
                surviving = Standing.from_bytes(request.model).surviving
            else:
                surviving = GlobalState.from_message(request.model, size).surviving
            length = clipping.upload_length(experiment, surviving)
            begin = Begin.from_bytes(request.body)
            found[item.number] = Training(item.number, begin, encoding, length)
    return tuple(found[number] for number in sorted(found))


def uploads(crossings: Sequence[Crossing], number: int) -> dict[str, Upload]:
    """Each site's upload of round `number`; what is none, which the server refused, is left out."""
    found = {}
    for item in crossings:
        if (item.number, item.phase, item.direction) == (number, UPLOAD, "up"):
            with suppress(ProtocolError):
                if (said := answer(item.data)) is not None:
                    found[item.site] = Upload.from_bytes(said.body)
    return found


def leaked_seed(begin: Begin, recording: Recording, crossings: Sequence[Crossing]) -> Seed | None:
    """The HE seed of a round, as it was sealed for one site; None where that is not recorded."""
    drawn = b"".join(
        item.data
        for item in recording.drawn
        if (item.number, item.phase) == (begin.round, "advertise")
    )
    asked = next(
        (
            Request.from_bytes(item.data).body
            for item in crossings
            if (item.number, item.phase, item.site, item.direction)
            == (begin.round, UPLOAD, recording.site, "down")
        ),
        None,
    )
    if asked is None or len(drawn) < 32:
        return None
    channel = ChannelKey(lambda size: drawn[:size])  # the first thing that a site draws
    try:
        sealed = SealedSeed.from_bytes(asked)
    except ProtocolError:
        [sealed] = RelayedSecrets.from_bytes(asked).seeds
    names = (sealed.maker.encode(), sealed.public, sealed.receiver.encode(), channel.public)
    context = digest("he seed", begin.context, *names)
    try:
        return unseal(sealed.box, channel, (sealed.maker, sealed.public), context)
    except ProtocolError:
        return None


def opened(protocol: str, seed: Seed, training: Training, payload: bytes) -> NDArray[np.uint64]:
    """One upload alone, under the key that `seed` becomes."""
    bits, cohort = training.encoding.plain_bits, training.encoding.cohort
    if protocol == "ckks":
        parameters = ckks.Parameters(bits, cohort, training.slots)
        flooded = ckks.Sum(parameters)
        flooded.add(payload)
        return ckks.SecretKey(seed, parameters).open(flooded.to_bytes(), training.slots, 1)
    total = Sum(training.slots, Parameters(bits, cohort))
    total.add(payload)
    key = SecretKey(seed, Parameters(bits, cohort))
    return key.open(total.to_bytes(), training.slots, 1)


def adversary(view: ColludingView, given: Given, seed: int, progress: Progress) -> Openings:
    """Every upload of the sites that do not collude, opened with what one that does holds."""
    del given, seed
    protocol = view.public.parsed().protocol.name
    [*rounds], keys, found = trainings(view.public, view.crossings), 0, []
    friends = {item.site for item in view.recordings}
    for done, training in enumerate(rounds):
        leaks = (leaked_seed(training.begin, item, view.crossings) for item in view.recordings)
        leaked = next((item for item in leaks if item is not None), None)
        if leaked is not None:
            keys += 1
            for site, upload in uploads(view.crossings, training.number).items():
                if site in friends:
                    continue
                with suppress(ProtocolError):  # no ciphertext: the server refused it too
                    slots = opened(protocol, leaked, training, upload.payload)
                    found.append(OpenedUpload(training.number, site, Array.of(slots)))
        progress((done + 1) / len(rounds))
    return Openings(keys, tuple(found))


# --- the scorer -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Contributions:
    """What sites really contributed, and how many rounds were there to attack."""

    encoding: Encoding
    length: int
    by_site: tuple[tuple[str, tuple[Contributed, ...]], ...]

    def of(self, site: str, number: int) -> NDArray[np.uint64] | None:
        """uint64[slots]; None where the site recorded nothing of itself."""
        for name, items in self.by_site:
            for item in items:
                if (name, item.number) == (site, number):
                    found: NDArray[np.uint64] = item.slots.numpy()
                    return found
        return None


def fields(encoding: Encoding, slots: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The signed numbers of all value slots, float64[k * slots], spare ones included."""
    header = encoding.header_slots if isinstance(encoding, FixedPoint) else 1
    rest, width, found = slots[header:].copy(), encoding.field_bits, []
    to_sign = np.uint64(64 - width)
    for _ in range(encoding.fields):
        field = (rest << to_sign).view(np.int64) >> np.int64(to_sign)
        found.append(field)
        rest = (rest - field.view(np.uint64)) >> np.uint64(width)
    return np.stack(found, axis=1).reshape(-1).astype(np.float64)


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's, 0 where one of both does not vary, or is empty."""
    if not len(a):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def score(guess: Openings, truth: Contributions, seed: int) -> Score:
    """How many updates were read exactly; and whether what was opened tells their signs.

    p: were what was opened uniform modulo 2^p, as masks make all but one upload of a round, its
    fields would be independent and uniform, and their signs fair coins, whatever the updates: an
    exact binomial test of the signs that agree. The last site of each round is left out of it.
    """
    exact, tried, agree, signs, likeness = 0, 0, 0, 0, []
    last = {item.number: item.site for item in guess.opened}
    for item in guess.opened:
        true = truth.of(item.site, item.number)
        if true is None:
            continue
        found: NDArray[np.uint64] = item.slots.numpy()
        tried += 1
        exact += bool((found == true).all())
        read, real = fields(truth.encoding, found), fields(truth.encoding, true)
        read, real = read[: truth.length], real[: truth.length]
        likeness.append(correlation(read, real))
        if item.site != last[item.number]:
            agree += int(((read < 0) == (real < 0)).sum())
            signs += truth.length
    low, high = (0.0, 1.0)
    if tried:
        told = binomtest(exact, tried).proportion_ci(0.95, "exact")
        low, high = float(told.low), float(told.high)
    mean = float(np.mean(likeness)) if likeness else 0.0
    # An update of uniform slots is hit with 2^-(p * slots): never.
    p = 0.0 if exact else float(binomtest(agree, signs).pvalue) if signs else 1.0
    results = (
        AttackResult(
            "updates read exactly",
            exact / tried if tried else 0.0,
            Interval(low, high, 0.95, "Clopper-Pearson"),
            0.0,
            tried,
            seed,
        ),
        AttackResult("correlation with the update", mean, None, 0.0, tried, seed),
        AttackResult("HE keys derived", float(guess.keys), None, 0.0, guess.keys, seed),
    )
    needed = 1.3 / np.sqrt(signs) if signs else 1.0
    limit = (
        f"signs of {signs} numbers: would show where {0.5 + needed:.1%} of them can be told"
        if signs
        else "no other site recorded what it contributed: nothing to compare with"
    )
    return Score(results, exact > 0 or p < SURE, p, limit)


def claim(experiment: Experiment) -> Claim:
    """Made of masked-bfv; under bfv and ckks a leaked key is declared to open everything."""
    name = str(experiment.protocol.name)
    made = name == "masked-bfv"
    tolerated = experiment.protocol.colluding_sites
    sentence = (
        "A leaked HE key opens masked vectors and their sum, and no update of a single site"
        if made
        else f"{name} says that one site in league with the server opens every update"
        if name in KEYED
        else f"{name} has no HE key"
    )
    return Claim(sentence, f"at most {tolerated} sites collude; X25519, HKDF and AES-256", made)


def trial(case: Case) -> Trial[Contributions]:
    """The first site that recorded itself colludes; what the others recorded is the truth."""
    name = str(case.experiment.protocol.name)
    if name not in KEYED:
        raise UnavailableError(
            "plain needs no key: everything is read without one"
            if name == "plain"
            else f"{name} has no HE key that could leak"
        )
    recordings = []
    reason = UnavailableError("no site recorded itself")
    for site in case.sites:
        try:
            recordings.append(case.recording(site))
        except UnavailableError as error:
            reason = error
    if not recordings:
        raise reason
    view = case.colluding((recordings[0].site,), with_server=True)
    seen = {item.site for item in view.crossings}
    if not any(item.site in seen for item in recordings[1:]):
        raise UnavailableError(
            "no other site's updates and messages were recorded, to compare with: [transcript] "
            "consent and own take two sites at least"
        )
    return Trial(view, contributions(view, recordings[1:]))


def contributions(view: ColludingView, recordings: Sequence[Recording]) -> Contributions:
    """The truth of rounds of training; UnavailableError where there was none."""
    rounds = trainings(view.public, view.crossings)
    if not rounds:
        raise UnavailableError("no round of training was recorded")
    return Contributions(
        rounds[0].encoding,
        min(training.length for training in rounds),
        tuple((item.site, item.contributed) for item in recordings),
    )


def rehearsed(protocol: str, seed: int, profile: Profile) -> Trial[Contributions]:
    """Rounds of `protocol` in which site-1 colludes with the server."""
    rounds, length = (2, 200) if profile == Profile.quick else (5, 1000)
    made = rehearse(protocol, gaussian_updates(seed, rounds, 4, length), seed)
    view = made.colluding(("site-1",))
    others = [item for site, item in made.recordings.items() if site != "site-1"]
    return Trial(view, contributions(view, others))


def undefended(seed: int, profile: Profile) -> Trial[Contributions]:
    """bfv, which declares that it does not stop this."""
    return rehearsed("bfv", seed, profile)


def no_signal(seed: int, profile: Profile) -> Trial[Contributions]:
    """bfv with every upload moved to another round, so that the key that leaks is not its own."""
    trial = rehearsed("bfv", seed, profile)
    view = trial.view
    assert isinstance(view, ColludingView)  # noqa: S101 - made above
    rounds = 1 + max(item.number for item in view.crossings)
    moved = {
        (1 + item.number % (rounds - 1), item.site): item.data
        for item in view.crossings
        if (item.phase, item.direction) == (UPLOAD, "up")
    }
    crossings = tuple(
        Crossing(x.number, x.phase, x.site, x.direction, moved[x.number, x.site])
        if (x.phase, x.direction) == (UPLOAD, "up")
        else x
        for x in view.crossings
    )
    return Trial(msgspec.structs.replace(view, crossings=crossings), trial.truth)


ATTACK: Final = Attack(
    "shared-key",
    "One site hands the HE key to the server",
    "Bonawitz et al. 2017, section 4, on what masks leave to collusion; NVFlare's and FedML's "
    "shared CKKS key as the example",
    (ColludingView,),
    Openings,
    adversary,
    score,
    claim,
    trial,
    undefended,
    no_signal,
)
