"""What crossed each wire, recorded only for the sites that consented.

transcript/index.jsonl has a line a message, in order; the bytes lie beside it, one file a message.
They are exactly what an adversary on the server's side saw: no secret of a site, but the opened
sums, under plain the updates themselves, and what other sites sealed for a consenting one.
rosters.jsonl has the sites' public keys, a line a session: with them signatures can be checked.

A site may also record itself, in a folder of its own that never leaves it: recording.jsonl has a
line for what it drew at random in each phase, and for what it contributed to each round of
training. Whoever has that folder, and the site's messages, opens its masks and its updates.

Both are kept until a day that retention.json names; after it they are to be deleted, and are read
no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Final, Literal, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError
from protocols.identity import Roster
from protocols.keystream import Randomness
from securefl.config import ConfigurationError
from securefl.engines import Exchange
from securefl.messages import Request
from securefl.store import append_line, private_folder, read, whole_lines, write, write_secret

TRANSCRIPT: Final = "transcript"
"""The folder of it in a run directory."""

RECORDING: Final = "recording.jsonl"
"""The index of what a site records of itself, in what it keeps to itself."""

RETENTION: Final = "retention.json"
"""Until when a transcript, or a recording, is kept: beside its index."""

Direction = Literal["down", "up"]
"""From the server to a site, or back."""


class Crossing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message as it crossed the wire between the server and `site`, in round `number`."""

    number: int
    phase: str
    site: str
    direction: Direction
    data: bytes


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the index."""

    round: int
    phase: str
    site: str
    direction: Direction
    bytes: int
    sha256: str
    file: str


class _Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of rosters.jsonl: hexadecimal keys by site."""

    keys: dict[str, str]


class Drawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site drew at random for one phase of one round, in the order of the draws."""

    number: int
    phase: str
    data: bytes

    def __repr__(self) -> str:
        return f"Drawn({self.number}, {self.phase!r}, <{len(self.data)} secret bytes>)"


@final
class Encoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site contributed to one round of training, before any mask or encryption.

    slots: uint64[slots], little-endian, as its encoding gave it. model: what was trained,
    `GlobalState.to_message()`, of update `update`.
    """

    number: int
    update: int
    slots: bytes
    model: bytes

    def __repr__(self) -> str:
        return f"Encoded({self.number}, {self.update}, <{len(self.slots)} secret bytes>)"


@final
class OwnRecording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one site recorded of itself: with the messages it got, all of its part in the run."""

    drawn: tuple[Drawn, ...]
    encoded: tuple[Encoded, ...]


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """retention.json: the last day."""

    version: Literal[1]
    keep_until: date


class _Own(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a site's recording. phase: of what was drawn; empty where it was contributed."""

    round: int
    phase: str
    update: int
    sha256: str
    file: str
    model: str = ""


@final
class Recorder:
    """What a site writes down of itself, under `folder`, for its owner's eyes only.

    keep_until: the last day on which it may be read; None in a simulation that names none.
    """

    def __init__(self, folder: Path, keep_until: date | None) -> None:
        self._folder = folder
        private_folder(folder)
        index = folder / RECORDING
        if not index.exists():
            write_secret(index, b"")
        else:  # a line that a kill cut short would spoil the next one
            _mend(index)
        keep(folder, keep_until)

    def drew(self, number: int, phase: str, data: bytes) -> None:
        """Write down what was drawn in one phase, durably."""
        name = f"{number:06d}-{phase}-drawn.bin"
        write_secret(self._folder / name, data)
        self._add(_Own(number, phase, 0, hashlib.sha256(data).hexdigest(), name))

    def contributed(
        self, number: int, update: int, slots: Iterable[NDArray[np.uint64]], model: bytes
    ) -> None:
        """Write down what was contributed to one round of training, durably."""
        data = b"".join(part.astype("<u8").tobytes() for part in slots)
        name, of = f"{number:06d}-contributed.bin", f"model-{update:06d}.bin"
        write_secret(self._folder / name, data)
        if not (self._folder / of).exists():  # a round before, which was aborted, had it too
            write_secret(self._folder / of, model)
        self._add(_Own(number, "", update, hashlib.sha256(data).hexdigest(), name, of))

    def _add(self, line: _Own) -> None:
        append_line(self._folder / RECORDING, msgspec.json.encode(line).decode())


@final
class Drawing:
    """Fresh bytes, and which they were."""

    def __init__(self, source: Randomness) -> None:
        self._source = source
        self._drawn: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        """`size` bytes from the source."""
        self._drawn += [self._source(size)]
        return self._drawn[-1]

    @property
    def data(self) -> bytes:
        """All that was drawn so far."""
        return b"".join(self._drawn)


def recording(folder: Path, today: date | None = None) -> OwnRecording:
    """What a site recorded of itself in `folder`; nothing where it did not.

    today: by default the date here. Raises ConfigurationError that names the file, where one is
    missing, damaged or changed, or was to be kept until an earlier day.
    """
    check_kept(folder, today)
    drawn: list[Drawn] = []
    encoded: list[Encoded] = []
    for where, text in _index(folder / RECORDING):
        try:
            line = msgspec.json.decode(text, type=_Own)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{where} is damaged: {error}: restore the folder") from None
        data = _read(folder / Path(line.file).name, line.sha256, where)
        if line.phase:
            drawn += [Drawn(line.round, line.phase, data)]
        else:
            model = _read(folder / Path(line.model).name, None, where)
            encoded += [Encoded(line.round, line.update, data, model)]
    return OwnRecording(tuple(drawn), tuple(encoded))


def keep(folder: Path, until: date | None) -> None:
    """Write into `folder` until when it is kept; an earlier day that stands there stays."""
    if until is None:
        return
    before = read(folder / RETENTION, _Kept)
    day = until if before is None else min(until, before.keep_until)
    write(folder / RETENTION, msgspec.json.encode(_Kept(1, day)))


def check_kept(folder: Path, today: date | None = None) -> None:
    """ConfigurationError where what is in `folder` was to be kept until an earlier day only."""
    kept = read(folder / RETENTION, _Kept)
    if kept is not None and (today or date.today()) > kept.keep_until:
        raise ConfigurationError(
            f"{folder} was to be kept until {kept.keep_until.isoformat()} and is read no more: "
            "delete it, `securefl transcript delete RUN`"
        )


def delete(run: Path) -> tuple[Path, ...]:
    """Delete the transcript in the run directory `run`, and what sites there recorded of
    themselves: what was deleted. The coins of canaries stay."""
    found = [path for path in (run / TRANSCRIPT).glob("*") if path.is_file()]
    for index in run.glob(f"sites/*/own/{RECORDING}"):
        own = (RECORDING, RETENTION)
        found += [path for path in index.parent.glob("*.bin") if path.is_file()]
        found += [index.parent / name for name in own if (index.parent / name).exists()]
    for path in found:
        path.unlink()
    if (run / TRANSCRIPT).exists() and not any((run / TRANSCRIPT).iterdir()):
        (run / TRANSCRIPT).rmdir()
    return tuple(sorted(found))


def recorded(
    exchange: Exchange,
    folder: Path,
    consent: frozenset[str],
    roster: Roster,
    keep_until: date | None = None,
) -> Exchange:
    """`exchange`, which also writes the messages of consenting sites under `folder`.

    roster: who the sites of this session are. keep_until: the last day of what is written.
    """

    index, rosters = folder / "index.jsonl", folder / "rosters.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if index.exists():  # a line that a kill cut short would spoil the next one
        _mend(index)
    keep(folder, keep_until)
    keys = {site: key.hex() for site, key in roster.keys.items()}
    append_line(rosters, msgspec.json.encode(_Session(keys)).decode())

    def record(site: str, direction: Direction, phase: str, number: int, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        name = f"{number:06d}-{phase}-{site}-{direction}-{digest[:8]}.bin"
        write(folder / name, data)
        line = _Line(number, phase, site, direction, len(data), digest, name)
        append_line(index, msgspec.json.encode(line).decode())

    def recording(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = exchange(phase, messages)
        for site in sorted(consent & set(messages)):
            number = _round(messages[site])
            record(site, "down", phase, number, messages[site])
            if site in replies:
                record(site, "up", phase, number, replies[site])
        return replies

    return recording


def crossings(folder: Path, today: date | None = None) -> tuple[Crossing, ...]:
    """The messages recorded under `folder`, in the order in which they crossed.

    today: by default the date here. Raises ConfigurationError that names the file, where one is
    missing, damaged or changed, or was to be kept until an earlier day.
    """
    check_kept(folder, today)
    found = []
    for where, text in _index(folder / "index.jsonl"):
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{where} is damaged: {error}: restore the folder") from None
        data = _read(folder / Path(line.file).name, line.sha256, where)
        found.append(Crossing(line.round, line.phase, line.site, line.direction, data))
    return tuple(found)


def _index(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line of an index stands, and the line."""
    for number, text in enumerate(whole_lines(path), start=1):
        yield f"{path} line {number}", text


def _read(path: Path, sha256: str | None, where: str) -> bytes:
    """What `where` says is in `path`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}): restore the transcript from a copy"
        ) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ConfigurationError(
            f"{path} is not what was recorded (its SHA-256 differs from {where}): restore it "
            "from a copy"
        )
    return data


def _mend(index: Path) -> None:
    """Leave out a last line that a kill cut short."""
    mode = index.stat().st_mode
    write(index, "".join(f"{line}\n" for line in whole_lines(index)).encode())
    index.chmod(mode)


def rosters(folder: Path) -> tuple[Roster, ...]:
    """The sites' public keys in each session of the run, oldest first."""
    lines = whole_lines(folder / "rosters.jsonl")
    told = [msgspec.json.decode(line, type=_Session) for line in lines]
    return tuple(
        Roster({site: bytes.fromhex(key) for site, key in item.keys.items()}) for item in told
    )


def _round(request: bytes) -> int:
    """The round of a request, 0 where it is none: an active server may send anything."""
    try:
        return Request.from_bytes(request).round
    except MalformedMessageError:
        return 0
