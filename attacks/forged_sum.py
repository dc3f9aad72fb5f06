"""A server that asks for another sum than the round's: one site's upload, once for every site.

An opener checks that what it opens counts as many updates as are named, and a count can be forged:
one ciphertext added to itself n times counts n, and gives n times that site's update. Under bfv and
ckks, whose sites hold one key, this opens any update; under masked-bfv what comes out is masked,
and its count with it. The attack runs live, through `securefl.run(experiment, exchange=...)`,
against the sites' own steps.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from attacks.view import ActiveServer, Array, Given, Public, answer
from protocols import bfv_sum, ckks_sum
from protocols.bitpacking import unpack
from protocols.catalogue import OPEN, UPLOAD
from protocols.encoding import Encoding
from protocols.messages import OpenedSum, SumToOpen, Upload
from securefl import agreement, config, models
from securefl.config import Experiment
from securefl.engines import Exchange
from securefl.messages import Request
from securefl.runs import RunFailedError, run
from securefl.store import SiteStore
from securefl.transcript import recording

VICTIM: Final = "site-1"

_WORLD: Final = """
name = "forged-sum"
rounds = 1
[data]
source = "digits"
default_range = [0.0, 16.0]
[sites]
count = 5
[training]
local_steps = 5
[transcript]
own = ["site-1"]
"""


class Forged(msgspec.Struct, frozen=True):
    """The guess: the victim's update, float64[d], and what openers were asked for."""

    update: Array
    asked: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """The truth: what the victim contributed, float64[d]."""

    values: NDArray[np.float64]


@final
class _Forging:
    """The wire, between a server that goes by the protocol and one that does not."""

    def __init__(self, public: Public) -> None:
        self._experiment = public.parsed()
        self._encoding, self._length = _encoded(public)
        self._upload = b""
        self.asked = 0
        self.opened: NDArray[np.float64] = np.zeros(0)

    def wrap(self, exchange: Exchange) -> Exchange:
        """`exchange`, whose openers are asked for the victim's upload alone."""

        def forging(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            if phase == OPEN:
                messages = {site: self._forged(data) for site, data in messages.items()}
            replies = exchange(phase, messages)
            if phase == UPLOAD and VICTIM in replies:
                said = answer(replies[VICTIM])
                if said is not None:
                    self._upload = Upload.from_bytes(said.body).payload
            if phase == OPEN:
                for site, data in replies.items():
                    self._read(messages[site], data)
            return replies

        return forging

    def _forged(self, data: bytes) -> bytes:
        request = Request.from_bytes(data)
        asked = SumToOpen.from_bytes(request.body)
        scheme = ckks_sum.CKKS if self._experiment.protocol.name == "ckks" else bfv_sum.BFV
        total = scheme.empty(self._encoding, self._length)
        for _ in asked.contributors:
            total.add(self._upload)
        self.asked += 1
        body = msgspec.structs.replace(asked, payload=total.to_bytes()).to_bytes()
        return msgspec.structs.replace(request, body=body).to_bytes()

    def _read(self, asked: bytes, data: bytes) -> None:
        said = answer(data)
        if said is None:
            return  # the opener refused
        contributors = SumToOpen.from_bytes(Request.from_bytes(asked).body).contributors
        packed = np.frombuffer(OpenedSum.from_bytes(said.body).payload, np.uint8)
        slots = unpack(packed, self._encoding.slots(self._length), self._encoding.plain_bits)
        self.opened = self._encoding.decode(slots, self._length, contributors).mean


def _encoded(public: Public) -> tuple[Encoding, int]:
    experiment, sites = public.parsed(), len(public.sites)
    return agreement.encoding(experiment, sites, None), models.layout(public.module()).size


def adversary(view: ActiveServer, given: Given, seed: int, progress: Progress) -> Forged:
    """One round with the forging server; what an opener gave out, divided by its count."""
    del given, seed
    forging = _Forging(view.public)
    progress(0.1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RunFailedError):
        run(view.public.parsed(), Path(folder) / "run", exchange=forging.wrap, report=False)
    return Forged(Array.of(forging.opened), forging.asked)


def score(guess: Forged, truth: Update, seed: int) -> Score:
    """Whether the victim's update was read exactly."""
    found, real = guess.update.numpy(), truth.values
    close = np.zeros(len(real), np.bool_)
    if found.shape == real.shape:
        close = np.isclose(found, real, rtol=0, atol=1e-9)
    whole = bool(close.all()) and len(np.unique(real)) > 1
    share = float(close.mean()) if len(real) else 0.0
    return Score(
        results=(
            AttackResult("share of an update read exactly", share, None, 0.0, len(real), seed),
            AttackResult("sums that openers were asked for", guess.asked, None, 0.0, 1, seed),
        ),
        succeeded=whole,
        p=0.0 if whole else 1.0,
        limit="an update that an opener gives out would show",
    )


def claim(experiment: Experiment) -> Claim:
    """Made where masks lie under the encryption."""
    made = experiment.protocol.name == "masked-bfv"
    return Claim(
        "a server that asks a site to open a sum of its own making learns no update of one site",
        "at most T sites collude with the server; X25519, HKDF and AES-256",
        made=made,
    )


def trial(case: Case) -> Trial[Update]:
    """One round of the run's protocol, live, on records that are nobody's secret."""
    protocol = case.experiment.protocol
    if protocol.name in ("plain", "secagg"):
        raise UnavailableError(f"under {protocol.name} no site opens a sum")
    if protocol.reveal == "sites":
        raise UnavailableError("sites keep the sums that they open")
    return _world(protocol.name, 0, other=False)


def undefended(seed: int, profile: Profile) -> Trial[Update]:
    """bfv, whose key every site holds."""
    del profile
    return _world("bfv", seed, other=False)


def no_signal(seed: int, profile: Profile) -> Trial[Update]:
    """The same, compared with an update of another run."""
    del profile
    return _world("bfv", seed, other=True)


def _world(protocol: str, seed: int, other: bool) -> Trial[Update]:
    """A seeded run, so that the scorer can repeat what the victim contributes in it."""

    def seeded(number: int) -> Experiment:
        return config.parse(
            _WORLD, [f"protocol.name={protocol}", f"not_private_seed={number % (1 << 62)}"]
        )

    experiment = seeded(seed)
    sites = tuple(f"site-{i}" for i in range(1, 6))
    told = experiment.model_copy(update={"transcript": config.Transcript()})
    public = Public(told.dump(), sites, (64,), 10, "classification")
    encoding, length = _encoded(public)
    with tempfile.TemporaryDirectory() as folder:
        done = run(seeded(seed + 1) if other else experiment, Path(folder) / "run", report=False)
        store = SiteStore(done.directory / "sites" / VICTIM)
        [contributed] = recording(store.private).encoded
    slots = np.frombuffer(contributed.slots, "<u8")
    return Trial(ActiveServer(public), Update(encoding.decode(slots, length, (VICTIM,)).mean))


ATTACK = Attack(
    name="forged-sum",
    title="A sum of one site's upload, opened by another",
    source="that additive encryption is malleable; docs/threat-model.md, an active server",
    views=(ActiveServer,),
    guess=Forged,
    adversary=adversary,
    score=score,
    claim=claim,
    trial=trial,
    undefended=undefended,
    no_signal=no_signal,
)
