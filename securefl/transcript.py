"""What crossed each wire, recorded only for the sites that consented.

transcript/index.jsonl has a line a message, in order; the bytes lie beside it, one file a message.
They are exactly what an adversary on the server's side saw: no secret of a site, but the opened
sums, under plain the updates themselves, and what other sites sealed for a consenting one.
rosters.jsonl has the sites' public keys, a line a session: with them signatures can be checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from protocols.errors import MalformedMessageError
from protocols.identity import Roster
from securefl.config import ConfigurationError
from securefl.engines import Exchange
from securefl.messages import Request
from securefl.store import append_line, whole_lines, write

TRANSCRIPT = "transcript"
"""The folder of it in a run directory."""

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


def recorded(exchange: Exchange, folder: Path, consent: frozenset[str], roster: Roster) -> Exchange:
    """`exchange`, which also writes the messages of consenting sites under `folder`.

    roster: who the sites of this session are.
    """

    index, rosters = folder / "index.jsonl", folder / "rosters.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if index.exists():  # a line that a kill cut short would spoil the next one
        write(index, "".join(f"{line}\n" for line in whole_lines(index)).encode())
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


def crossings(folder: Path) -> tuple[Crossing, ...]:
    """The messages recorded under `folder`, in the order in which they crossed.

    Raises ConfigurationError that names the file, where one is missing, damaged or changed.
    """
    found = []
    for number, text in enumerate(whole_lines(folder / "index.jsonl"), start=1):
        where = f"{folder / 'index.jsonl'} line {number}"
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{where} is damaged: {error}: restore the folder") from None
        path = folder / Path(line.file).name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be read ({error.strerror}): restore the transcript from a copy"
            ) from None
        if hashlib.sha256(data).hexdigest() != line.sha256:
            raise ConfigurationError(
                f"{path} is not what was recorded (its SHA-256 differs from {where}): restore it "
                "from a copy"
            )
        found.append(Crossing(line.round, line.phase, line.site, line.direction, data))
    return tuple(found)


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
