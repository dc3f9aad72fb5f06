"""What crossed each wire, recorded only for the sites that consented.

transcript/index.jsonl has a line a message, in order; the bytes lie beside it, one file a message.
They are exactly what an adversary on the server's side saw: no secret of a site, but the opened
sums, under plain the updates themselves, and what other sites sealed for a consenting one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from protocols.errors import MalformedMessageError
from securefl.engines import Exchange
from securefl.messages import Request
from securefl.store import append_line, whole_lines, write


def recorded(exchange: Exchange, folder: Path, consent: frozenset[str]) -> Exchange:
    """`exchange`, which also writes the messages of consenting sites under `folder`."""

    index = folder / "index.jsonl"
    if index.exists():  # a line that a kill cut short would spoil the next one
        write(index, "".join(f"{line}\n" for line in whole_lines(index)).encode())

    def record(site: str, direction: str, phase: str, number: int, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        name = f"{number:06d}-{phase}-{site}-{direction}-{digest[:8]}.bin"
        write(folder / name, data)
        entry = {"round": number, "phase": phase, "site": site, "direction": direction}
        entry |= {"bytes": len(data), "sha256": digest, "file": name}
        append_line(index, json.dumps(entry))

    def recording(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = exchange(phase, messages)
        for site in sorted(consent & set(messages)):
            number = _round(messages[site])
            record(site, "down", phase, number, messages[site])
            if site in replies:
                record(site, "up", phase, number, replies[site])
        return replies

    return recording


def _round(request: bytes) -> int:
    """The round of a request, 0 where it is none: an active server may send anything."""
    try:
        return Request.from_bytes(request).round
    except MalformedMessageError:
        return 0
