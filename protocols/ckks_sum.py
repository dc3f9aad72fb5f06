"""ckks: uploads under one CKKS key that the sites share and the server never sees.

1. advertise  C -> S  a fresh signed X25519 key
2. share      the lowest site -> S -> C  this round's HE seed, sealed end to end for every site
3. upload     C -> S  the encoded vector, encrypted; S adds ciphertexts
4. open       S -> k sites -> S  the sum, flooded and decrypted once by each; k = 1 unless asked
              otherwise

What users of TenSEAL know, with the steps of bfv and what bfv stops: an honest-but-curious server
that colludes with no site, and no more. That what a site opens does not tell the key, and so every
update, depends on flooding and rounding (`protocols.ckks.Parameters`); under bfv, whose decryptions
are exact by themselves, there is nothing to flood, and uploads are an eighth as long.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocols import bfv_sum
from protocols.ckks import MOST_PLAIN_BITS, Parameters, SecretKey, Sum
from protocols.encoding import Aggregate, Encoding, FixedPoint
from protocols.identity import Roster
from protocols.keystream import Randomness, Seed
from protocols.messages import Begin
from protocols.rounds import Party, ServerSide, Slots, Steps

PHASES = bfv_sum.PHASES
client_step1 = bfv_sum.client_step1
client_step2 = bfv_sum.client_step2
client_step4 = bfv_sum.client_step4


def slot_bits(cohort: int) -> int:
    """Bits that a slot offers to a sum over `cohort` sites."""
    del cohort
    return MOST_PLAIN_BITS


def parameters(encoding: Encoding, length: int) -> Parameters:
    """CKKS for vectors of `length` values; ValueError, with the mend, where flooding fails."""
    return Parameters(encoding.plain_bits, encoding.cohort, encoding.slots(length))


def _key(seed: Seed, encoding: Encoding, length: int) -> SecretKey:
    return SecretKey(seed, parameters(encoding, length))


def _empty(encoding: Encoding, length: int) -> Sum:
    return Sum(parameters(encoding, length))


CKKS: Final = bfv_sum.Scheme(_key, _empty)


def client_step3(
    state: bfv_sum.Advertised, message: bytes, slots: Slots, randomness: Randomness
) -> tuple[bfv_sum.Uploaded, bytes]:
    """SealedSeed -> Upload: open the seed, derive the key, encrypt the encoded vector."""
    del randomness  # SEAL draws encryption errors from the operating system
    return bfv_sum.upload(CKKS, state, message, slots)


def server(
    begin: Begin,
    roster: Roster,
    encoding: Encoding,
    length: int,
    weights: Mapping[str, int] | None = None,
    openers: int = 1,
) -> ServerSide:
    """The server's round, as under bfv."""
    return bfv_sum.server(begin, roster, encoding, length, weights, openers, CKKS)


def run(
    vectors: Mapping[str, NDArray[np.floating]],
    encoding: FixedPoint,
    weights: Mapping[str, int] | None = None,
    dropouts: Mapping[str, str] | None = None,
    randomness: Randomness = os.urandom,
) -> Aggregate:
    """Every party of one round in one process. `dropouts` maps a site to the phase it vanishes in.

    >>> encoding = FixedPoint(bits=16, clip=1.0, cohort=3, slot_bits=slot_bits(3))
    >>> run({name: np.ones(2) for name in "abc"}, encoding, dropouts={"a": "share"}).mean
    array([1., 1.])
    """
    party = Party(vectors, encoding, weights, randomness)
    return party.play(STEPS, server, dropouts or {})


STEPS: Steps = {
    "advertise": client_step1,
    "share": client_step2,
    "upload": client_step3,
    "open": client_step4,
}
