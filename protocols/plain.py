"""plain: encoded vectors in clear. Stops nothing; the oracle that every protocol is tested against.

1. upload   C -> S  the encoded vector
The server adds modulo 2^p and decodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from protocols.bitpacking import pack, unpack
from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError
from protocols.identity import Roster
from protocols.keystream import Randomness
from protocols.messages import Begin, Upload
from protocols.rounds import (
    Cohort,
    Expected,
    Outcome,
    Party,
    Requests,
    ServerSide,
    Slots,
    Steps,
    public_weight,
    statement,
)

PHASES = ("upload",)
NO_KEY = bytes(32)


def slot_bits(cohort: int) -> int:
    """Bits that a slot offers to a sum over `cohort` sites."""
    del cohort
    return 62


@final
@dataclass(frozen=True, slots=True)
class Uploaded:
    """A client that has uploaded; the round holds nothing more for it."""


def client_step1(
    expected: Expected, message: bytes, slots: Slots, randomness: Randomness
) -> tuple[Uploaded, bytes]:
    """Begin -> Upload: send the encoded vector, in clear."""
    del randomness
    begin = expected.check(message)
    me = expected.identity
    payload = b"".join(pack(chunk, expected.encoding.plain_bits).tobytes() for chunk in slots)
    signature = me.key.sign(statement(begin.context, "upload", me.name, NO_KEY, payload))
    return Uploaded(), Upload(me.name, NO_KEY, payload, signature).to_bytes()


def server(
    begin: Begin,
    roster: Roster,
    encoding: Encoding,
    length: int,
    weights: Mapping[str, int] | None = None,
) -> ServerSide:
    """The server's round: ask everyone for an upload, add what comes, decode.

    Raises RoundAbortedError below the minimum cohort.
    """
    cohort = Cohort(begin, roster)
    slots = encoding.slots(length)

    def parse(site: str, data: bytes) -> NDArray[np.uint64]:
        upload = Upload.from_bytes(data)
        said = (upload.key, upload.payload)
        cohort.verify("upload", upload.sender, site, upload.signature, *said)
        if upload.key != NO_KEY:
            raise ProtocolError(f"{site} sent a ciphertext to a protocol without a key", [site])
        try:
            packed = np.frombuffer(upload.payload, np.uint8)
            vector = unpack(packed, slots, encoding.plain_bits)
        except ValueError as error:
            raise MalformedMessageError(f"upload: {error}", [site]) from None
        if int(vector[0]) != 1:
            raise ProtocolError(f"{site} counts as {int(vector[0])} contributions", [site])
        return vector

    # upload: the encoded vectors, in clear
    requests = Requests("upload", dict.fromkeys(begin.cohort, begin.to_bytes()))
    uploads = cohort.accept(requests, (yield requests), parse)
    cohort.require(len(uploads), "uploads")

    total = np.zeros(slots, np.uint64)
    for vector in uploads.values():
        total += vector
    total &= np.uint64((1 << encoding.plain_bits) - 1)
    contributors = tuple(uploads)
    aggregate = encoding.decode(total, length, contributors, public_weight(weights, contributors))
    return Outcome(aggregate, cohort.faults)


def run(
    vectors: Mapping[str, NDArray[np.floating]],
    encoding: FixedPoint,
    weights: Mapping[str, int] | None = None,
    dropouts: Mapping[str, str] | None = None,
    randomness: Randomness = os.urandom,
) -> Aggregate:
    """Every party of one round in one process. `dropouts` maps a site to the phase it vanishes in.

    >>> from protocols.encoding import FixedPoint
    >>> ones = {"a": np.ones(3), "b": np.ones(3)}
    >>> run(ones, FixedPoint(bits=8, clip=1.0, cohort=2, slot_bits=62)).mean
    array([1., 1., 1.])
    """
    party = Party(vectors, encoding, weights, randomness)
    return party.play(STEPS, server, dropouts or {})


STEPS: Steps = {"upload": client_step1}
