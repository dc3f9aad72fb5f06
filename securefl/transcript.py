"""What crossed each wire, recorded only for the sites that consented.

transcript/index.jsonl has a line a message, in order; the bytes lie in messages.bin beside it. They
are exactly what an adversary on the server's side saw: no secret of a site, but the opened sums,
under plain the updates themselves, and what other sites sealed for a consenting one. rosters.jsonl
has the sites' public keys, a line a session: with them signatures can be checked.

A site may also record itself, in a folder of its own that never leaves it: recording.jsonl and
recording.bin have what it drew at random in each phase, and what it contributed to each round of
training. Whoever has that folder, and the site's messages, opens its masks and its updates.

Both are kept until a day that retention.json names; after it they are to be deleted, and are read
no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError
from protocols.identity import Roster
from protocols.keystream import Randomness
from securefl.config import ConfigurationError
from securefl.engines import Exchange
from securefl.messages import Request
from securefl.store import (
    append,
    append_line,
    append_lines,
    private_folder,
    read,
    whole_lines,
    write,
    write_secret,
)

TRANSCRIPT: Final = "transcript"
"""The folder of it in a run directory."""

RECORDING: Final = "recording.jsonl"
"""The index of what a site records of itself, in what it keeps to itself."""

INDEX: Final = "index.jsonl"
"""What crossed the wires, in a transcript."""

_DATA: Final = {INDEX: "messages.bin", RECORDING: "recording.bin"}
"""Where the bytes of an index lie."""

ROSTERS: Final = "rosters.jsonl"
"""The sites' public keys, in a transcript."""

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


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where an item's bytes lie, and which they are; nowhere until it is added."""

    at: int = 0
    bytes: int = 0
    sha256: str = ""


class _Line(_Place, frozen=True, forbid_unknown_fields=True):
    """A line of the index."""

    round: int
    phase: str
    site: str
    direction: Direction


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


class _Own(_Place, frozen=True, forbid_unknown_fields=True):
    """A line of a site's recording. A model stands before what was made of it, once."""

    kind: Literal["drawn", "contributed", "model"]
    round: int
    phase: str
    update: int


_Item = TypeVar("_Item", bound=_Place)


@final
class _Journal(Generic[_Item]):
    """Bytes one after another in one file, and a line for each item in another.

    Both only grow. What a kill cut short has no line, and is not read.
    """

    def __init__(self, index: Path, line: type[_Item], secret: bool = False) -> None:
        self._index, self._data, self._line = index, index.with_name(_DATA[index.name]), line
        if secret and not index.exists():
            write_secret(self._data, b"")
            write_secret(index, b"")

    def add(self, items: Iterable[tuple[_Item, bytes]]) -> None:
        """Add items, durably; what each line says of its place is filled in here."""
        items = list(items)
        at = append(self._data, (data for _, data in items))
        lines = []
        for line, data in items:
            sha256 = hashlib.sha256(data).hexdigest()
            placed = msgspec.structs.replace(line, at=at, bytes=len(data), sha256=sha256)
            lines.append(msgspec.json.encode(placed).decode())
            at += len(data)
        append_lines(self._index, lines)

    def read(self) -> Iterator[tuple[_Item, bytes]]:
        """Every item; ConfigurationError that names the line where one is damaged or changed."""
        lines = _lines(self._index)
        if not lines:
            return
        try:
            everything = self._data.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"{self._data} cannot be read ({error.strerror}): restore it from a copy"
            ) from None
        for number, text in enumerate(lines, start=1):
            where = f"{self._index} line {number}"
            try:
                line = msgspec.json.decode(text, type=self._line)
            except msgspec.MsgspecError as error:
                raise ConfigurationError(
                    f"{where} is damaged: {error}: restore the folder from a copy"
                ) from None
            data = everything[line.at : line.at + line.bytes]
            if hashlib.sha256(data).hexdigest() != line.sha256:
                raise ConfigurationError(
                    f"{self._data} is not what was recorded (the SHA-256 of {where} differs): "
                    "restore it from a copy"
                )
            yield line, data


@final
class Recorder:
    """What a site writes down of itself, under `folder`, for its owner's eyes only.

    keep_until: the last day on which it may be read; None in a simulation that names none.
    """

    def __init__(self, folder: Path, keep_until: date | None) -> None:
        private_folder(folder)
        self._journal = _Journal(folder / RECORDING, _Own, secret=True)
        self._models = {line.update for line, _ in self._journal.read() if line.kind == "model"}
        keep(folder, keep_until)

    def drew(self, number: int, phase: str, data: bytes) -> None:
        """Write down what was drawn in one phase, durably."""
        line = _Own("drawn", number, phase, 0)
        self._journal.add([(line, data)])

    def contributed(
        self, number: int, update: int, slots: Iterable[NDArray[np.uint64]], model: bytes
    ) -> None:
        """Write down what was contributed to one round of training, durably."""
        data = b"".join(part.astype("<u8").tobytes() for part in slots)
        line = _Own("contributed", number, "", update)
        items = [(line, data)]
        if update not in self._models:  # a round before, which was aborted, may have had it
            of = _Own("model", number, "", update)
            items.insert(0, (of, model))
        self._journal.add(items)
        self._models.add(update)


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
    trained: dict[int, bytes] = {}
    for line, data in _Journal(folder / RECORDING, _Own).read():
        if line.kind == "model":
            trained[line.update] = data
        elif line.kind == "drawn":
            drawn.append(Drawn(line.round, line.phase, data))
        elif line.update in trained:
            encoded.append(Encoded(line.round, line.update, data, trained[line.update]))
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


def delete(folder: Path, others: Iterable[Path] = ()) -> tuple[Path, ...]:
    """Delete the transcript in a run's directory, and what sites recorded of themselves in it, in a
    site's own folder, or in `others`: what was deleted. The coins of canaries stay."""
    places = [folder / TRANSCRIPT, folder, *others]
    places += [*folder.glob("sites/*/own"), *folder.glob("runs/*/sites/*/own")]
    if (folder / "own").is_dir():
        places.append(folder / "own")
    ours = (*_DATA, *_DATA.values(), ROSTERS, RETENTION)
    found = [place / name for place in places for name in ours if (place / name).is_file()]
    for path in found:
        path.unlink()
    if (folder / TRANSCRIPT).exists() and not any((folder / TRANSCRIPT).iterdir()):
        (folder / TRANSCRIPT).rmdir()
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

    folder.mkdir(parents=True, exist_ok=True)
    keep(folder, keep_until)
    keys = {site: key.hex() for site, key in roster.keys.items()}
    append_line(folder / ROSTERS, msgspec.json.encode(_Session(keys)).decode())
    journal = _Journal(folder / INDEX, _Line)

    def recording(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = exchange(phase, messages)
        items: list[tuple[_Line, bytes]] = []

        def crossed(site: str, direction: Direction, data: bytes) -> None:
            items.append((_Line(_round(messages[site]), phase, site, direction), data))

        for site in sorted(consent & set(messages)):
            crossed(site, "down", messages[site])
            if site in replies:
                crossed(site, "up", replies[site])
        if items:
            journal.add(items)
        return replies

    return recording


def crossings(folder: Path, today: date | None = None) -> tuple[Crossing, ...]:
    """The messages recorded under `folder`, in the order in which they crossed.

    today: by default the date here. Raises ConfigurationError that names the file, where one is
    missing, damaged or changed, or was to be kept until an earlier day.
    """
    check_kept(folder, today)
    return tuple(
        Crossing(line.round, line.phase, line.site, line.direction, data)
        for line, data in _Journal(folder / INDEX, _Line).read()
    )


def rosters(folder: Path) -> tuple[Roster, ...]:
    """The sites' public keys in each session of the run, oldest first.

    Raises ConfigurationError that names the file and the line, where one is damaged or missing.
    """
    path = folder / ROSTERS
    lines, found = _lines(path), list[Roster]()
    if not lines and (folder / INDEX).exists():
        raise ConfigurationError(f"{path} is missing or empty: restore the folder from a copy")
    for number, line in enumerate(lines, start=1):
        try:
            told = msgspec.json.decode(line, type=_Session)
            found.append(Roster({site: bytes.fromhex(key) for site, key in told.keys.items()}))
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigurationError(
                f"{path} line {number} is damaged: {error}: restore the folder from a copy"
            ) from None
    return tuple(found)


def _lines(path: Path) -> list[str]:
    try:
        return whole_lines(path)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is damaged ({error}): restore the folder from a copy"
        ) from None


def _round(request: bytes) -> int:
    """The round of a request, 0 where it is none: an active server may send anything."""
    try:
        return Request.from_bytes(request).round
    except MalformedMessageError:
        return 0
