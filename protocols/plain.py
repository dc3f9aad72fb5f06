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
from protocols.encoding import Aggregate, FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError
from protocols.identity import Roster
from protocols.keystream import Keystream, Randomness, Seed
from protocols.messages import Begin, Upload
from protocols.rounds import (
    Cohort,
    Expected,
    Outcome,
    Requests,
    ServerSide,
    Slots,
    make_identities,
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
    encoding: FixedPoint,
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
    identities = make_identities(vectors, randomness)
    roster = next(iter(identities.values())).roster
    length = len(next(iter(vectors.values())))
    begin = Begin(randomness(16), 1, tuple(sorted(vectors)), 2, bytes(32))
    steps = server(begin, roster, encoding, length, None if encoding.weight_slot else weights)

    # upload: everyone who is still there answers
    requests = next(steps)
    replies = {}
    for site, message in requests.messages.items():
        if dropouts and dropouts.get(site) == "upload":
            continue
        expected = Expected(identities[site], begin.session, 1, bytes(32), 2, encoding, length)
        rounding = Keystream(Seed.draw(randomness), "rounding")
        slots = encoding.encode(vectors[site], weights[site] if weights else 1, rounding)
        _, replies[site] = client_step1(expected, message, slots, randomness)
    try:
        steps.send(replies)
    except StopIteration as done:
        outcome: Outcome = done.value
    return outcome.aggregate
