"""What an attack is: what it needs, the adversary, the scorer, and two worlds with a known answer.

The adversary runs in a process of its own that gets a view, what it is given, and a seed; never
the truth, nor the place of any file. The scorer compares what it guessed with the truth. Before any
verdict the same adversary is tried where it must succeed (`undefended`) and where there is nothing
to find (`no_signal`).

Attacks are found by the entry-point group `securefl.attacks`: NAME = "module:ATTACK".
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, final

import msgspec

from attacks.evidence import Interval
from attacks.view import AnyView, Given, View
from protocols.identity import digest
from securefl.config import ConfigurationError, Experiment
from securefl.messages import printable

if TYPE_CHECKING:
    from attacks.case import Case

GROUP: Final = "securefl.attacks"

Guess = TypeVar("Guess", bound=msgspec.Struct)
Truth = TypeVar("Truth")
Progress = Callable[[float], None]
"""Told the fraction that is done, from 0 to 1."""


class Profile(StrEnum):
    """How much work an attack puts in."""

    quick = "quick"
    full = "full"


@final
@dataclass(frozen=True, slots=True)
class AttackResult:
    """One figure of merit of one attack. ValueError unless it is a finite number.

    baseline: what somebody who saw nothing would reach. n: of independent trials behind the figure.
    """

    metric: str
    value: float
    interval: Interval | None
    baseline: float
    n: int
    seed: int

    def __post_init__(self) -> None:
        # numpy's own numbers would not be written to JSON.
        for name, kind in (("value", float), ("baseline", float), ("n", int), ("seed", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if self.interval is not None:
            told = self.interval
            ends = float(told.low), float(told.high)
            object.__setattr__(self, "interval", Interval(*ends, told.confidence, told.method))
        # JSON has no other numbers: an audit.json that holds them is never read again.
        if not (math.isfinite(self.value) and math.isfinite(self.baseline)):
            raise ValueError(f"{self.metric} = {self.value} ({self.baseline}): give finite numbers")


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """A picture's line: x and y of equal length, in words what they are."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    label: str
    kind: Literal["roc", "histogram", "line"] = "roc"


@final
@dataclass(frozen=True, slots=True)
class Score:
    """What the scorer makes of a guess. The first of `results` is the headline.

    succeeded: whether the adversary found out more than one who saw nothing, as the results' own
    confidence has it. p: how likely evidence at least as strong is if the claim under attack were
    true; None where it tests no claim. limit: in one sentence, the least that it would have shown.
    """

    results: tuple[AttackResult, ...]
    succeeded: bool
    p: float | None
    limit: str
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a score has at least one result")
        object.__setattr__(self, "succeeded", bool(self.succeeded))
        if self.p is not None:
            object.__setattr__(self, "p", float(self.p))
            if not 0 <= self.p <= 1:
                raise ValueError(f"p = {self.p}: use 0 to 1")


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """What securefl says of a run that an attack could contradict.

    sentence: the claim. assumption: what remains to be believed, whatever the attack shows. made:
    whether it is claimed of this run at all; otherwise the attack shows what a choice costs.
    argument: where it holds by an argument: which.
    """

    sentence: str
    assumption: str
    made: bool = True
    argument: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Trial(Generic[Truth]):
    """One world to try an attack in. `truth` never leaves the scorer."""

    view: AnyView
    truth: Truth = field(repr=False)
    given: Given = field(default_factory=Given)


class UnavailableError(Exception):
    """Why an attack cannot be tried on a run, in one sentence: what is not recorded, or not so."""


class AttackFailedError(RuntimeError):
    """An adversary that stopped with an error, in one line."""


@final
@dataclass(frozen=True, slots=True)
class Attack(Generic[Guess, Truth]):
    """One attack.

    views: the kinds of view that it works on. given: what it must be given besides. guess: what
    the adversary returns. adversary: a function of a module, by whose name its process finds it.
    trial: the world of a recorded run; raises UnavailableError. undefended
    and no_signal: worlds in which it must succeed, and must not, made from a seed.
    """

    name: str
    title: str
    source: str
    """The paper, and where in it."""
    views: tuple[type[View], ...]
    guess: type[Guess]
    adversary: Callable[[Any, Given, int, Progress], Guess]
    score: Callable[[Guess, Truth, int], Score]
    claim: Callable[[Experiment], Claim]
    trial: Callable[[Case], Trial[Truth]]
    undefended: Callable[[int, Profile], Trial[Truth]]
    no_signal: Callable[[int, Profile], Trial[Truth]]
    given: frozenset[Literal["candidates", "auxiliary"]] = frozenset()

    def check(self, view: View, given: Given) -> None:
        """ConfigurationError unless the adversary sees and is given what it needs."""
        if not isinstance(view, self.views):
            needed = " or ".join(kind.__name__ for kind in self.views)
            raise ConfigurationError(
                f"{self.name} works on a {needed}, and this is a {type(view).__name__}"
            )
        for what in sorted(self.given):
            if getattr(given, what) is None:
                raise ConfigurationError(f"{self.name} must be given {what} records")


@final
@dataclass(frozen=True, slots=True)
class Tried(Generic[Truth]):
    """What became of an attack in one world."""

    score: Score
    seconds: float


# --- the process of its own -----------------------------------------------------------------


class _Asked(msgspec.Struct, frozen=True):
    """What the adversary's process is told: nothing else."""

    module: str
    adversary: str
    view: AnyView
    given: Given
    seed: int


class _Told(msgspec.Struct, frozen=True, tag=True):
    fraction: float


class _Guessed(msgspec.Struct, frozen=True, tag=True):
    data: bytes


class _Failed(msgspec.Struct, frozen=True, tag=True):
    line: str


_LENGTH: Final = struct.Struct("<Q")
_MOST_BYTES: Final = 1 << 36


def guess(
    attack: Attack[Guess, Truth],
    trials: Sequence[Trial[Truth]],
    seed: int,
    progress: Progress = lambda _: None,
) -> list[Guess]:
    """What the adversary of `attack` guesses in each of `trials`, in a process of its own.

    The process gets one world after the other, each view's bytes alone, and starts in an empty
    folder; of `seed`, from which worlds are made, it gets a hash. Raises AttackFailedError with the
    adversary's own error in one line.
    """
    for trial in trials:
        attack.check(trial.view, trial.given)
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PATH": os.environ.get("PATH", ""),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "attacks.alone"]
    guesses: list[Guess] = []
    with (
        tempfile.TemporaryDirectory() as empty,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018
        try:
            for number, trial in enumerate(trials):
                drawn = int.from_bytes(digest("adversary", repr((seed, number)).encode())[:6])
                function = attack.adversary
                named = function.__module__, function.__qualname__
                asked = _Asked(*named, trial.view, trial.given, drawn)
                send(process.stdin, msgspec.msgpack.encode(asked))
                while True:
                    data = receive(process.stdout)
                    told = msgspec.msgpack.decode(data, type=_Told | _Guessed | _Failed)
                    if isinstance(told, _Failed):
                        raise AttackFailedError(f"{attack.name}: {told.line}")
                    if isinstance(told, _Guessed):
                        guesses.append(msgspec.msgpack.decode(told.data, type=attack.guess))
                        break
                    progress((number + told.fraction) / len(trials))
                progress((number + 1) / len(trials))
        except (EOFError, BrokenPipeError):
            code = stop(process)
            raise AttackFailedError(
                f"{attack.name}: its process ended with status {code}"
            ) from None
        except msgspec.MsgspecError as error:
            stop(process)
            raise AttackFailedError(
                f"{attack.name}: what it guessed is no {attack.guess.__name__}: {error}"
            ) from None
        except BaseException:
            stop(process)
            raise
        process.stdin.close()
    return guesses


def one_line(error: Exception) -> str:
    """An error in one line, and where it arose, without what a terminal would obey: an attack may
    say anything."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))[:450] + where


def send(stream: Any, data: bytes) -> None:
    """One message of the pipe between the two processes."""
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def stop(process: subprocess.Popen[bytes]) -> int:
    """Kill a process that is told through a pipe, whatever of that it has not read: its status."""
    process.kill()
    assert process.stdin is not None  # noqa: S101 - a pipe
    with suppress(BrokenPipeError):  # closing it writes what was not written yet
        process.stdin.close()
    return process.wait()


def receive(stream: Any) -> bytes:
    """The next message; EOFError where the other end is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    if size > _MOST_BYTES:  # nobody's message: something else was written between them
        raise EOFError
    data: bytes = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve(source: Any, sink: Any) -> None:
    """The adversary's process: answer until `source` ends."""
    import importlib

    while True:
        try:
            asked = msgspec.msgpack.decode(receive(source), type=_Asked)
        except EOFError:
            return

        def told(fraction: float) -> None:
            send(sink, msgspec.msgpack.encode(_Told(float(fraction))))

        answer: _Guessed | _Failed
        try:
            adversary = getattr(importlib.import_module(asked.module), asked.adversary)
            guessed = adversary(asked.view, asked.given, asked.seed, told)
            answer = _Guessed(msgspec.msgpack.encode(guessed))
        except Exception as error:
            answer = _Failed(one_line(error))
        send(sink, msgspec.msgpack.encode(answer))


# --- the attacks that are installed -----------------------------------------------------------


def installed() -> dict[str, Attack[Any, Any]]:
    """Every attack by its name; ConfigurationError for an entry point that gives none."""
    found = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        try:
            attack = entry.load()
        except Exception as error:
            raise ConfigurationError(
                f"the entry point {entry.name} = {entry.value!r} in {GROUP} cannot be loaded "
                f"({type(error).__name__}: {error}): mend or remove the package that has it"
            ) from error
        if not isinstance(attack, Attack) or attack.name != entry.name:
            raise ConfigurationError(
                f"the entry point {entry.name} = {entry.value!r} in {GROUP} is no attack of that "
                "name: give the module's Attack"
            )
        found[entry.name] = attack
    return found


def find(name: str) -> Attack[Any, Any]:
    """The attack called `name`; ConfigurationError that names those there are."""
    known = installed()
    if name not in known:
        raise ConfigurationError(f"no attack {name!r}: there are {', '.join(known) or 'none'}")
    return known[name]
