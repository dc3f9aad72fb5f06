"""ckks-key: the secret key of CKKS from approximate decryptions and their ciphertexts.

Li and Micciancio, "On the Security of Homomorphic Encryption on Approximate Numbers", Eurocrypt
2021: whoever knows a ciphertext (c0, c1) and its exact approximate decryption m' has
s = (m' - c0) / c1 in the ring. Decoded numbers are re-encoded and rounded to the integers that they
came from; that s has coefficients -1, 0 and 1 alone says that it is the key.

SEAL decodes complex numbers, and one block gives the key. TenSEAL's `decrypt()` hands out real
parts, which fix m'(X) + m'(1/X) only: half of the equations, so that two blocks under one key are
taken, two equations for s(x) and s(1/x) at each point x. Vectors of more than 4096 values, or two
rounds, give them. Whoever releases float32, rounded or fewer numbers blurs the integers. What is
left of them is recovered by `_traces`: by rounding where the blur is far below half a unit; where
few slots are blurred, by decoding these from all the others; and where up to three are withheld, by
reduction of a lattice.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, Literal, final

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray
from scipy.stats import binomtest

from attacks import lattice, ring
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
from attacks.ring import Ring
from attacks.view import Array, Given, Public, ServerView
from protocols.bitpacking import packed_size, unpack
from protocols.framing import SEED_BYTES
from protocols.messages import OpenedSum, SumToOpen
from securefl import agreement
from securefl.config import Experiment
from securefl.messages import Answer, Request, parse_reply
from securefl.transcript import Crossing

if TYPE_CHECKING:
    from attacks.case import Case

DEGREE: Final = 8192
SLOTS: Final = DEGREE // 2
SCALE: Final = 2.0**40
PRIMES: Final = (60, 40, 40)
"""What TenSEAL's tutorials take."""

Floats = NDArray[np.float64]
_HEADER: Final = struct.Struct("<HBBBBHQ")  # SEAL's: magic, size, version, mode, total size
_C0_OFFSET: Final = 73 + _HEADER.size + 8


# --- the adversary --------------------------------------------------------------------------------


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ciphertext that was opened, as TenSEAL serialises it, and what was handed out of it.

    decrypted: float64[n] as `decrypt()` gives it, or complex128[n] as SEAL decodes; NaN where
    nothing was handed out.
    """

    ciphertext: bytes
    decrypted: Array


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one site's stored upload holds under the recovered key: float64[n]."""

    site: str
    values: Array


class KeyGuess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the adversary found.

    key: int8[N], empty where it found none. blocks: opened blocks that it had. blur: standard
    deviation, in units of the integers that must be exact, of what is not known of them, in the
    least blurred block that it could use. seconds: for the key alone.
    """

    key: Array
    blocks: int
    blur: float
    seconds: float
    opened: tuple[Opened, ...] = ()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block of an opened ciphertext.

    c0, c1: uint64[N], NTT form modulo the first prime. slots: 4096 numbers, NaN where unknown;
    widths: the standard deviation of what is unknown of each, at the scale, 0 where it is exact.
    """

    c0: NDArray[np.uint64]
    c1: NDArray[np.uint64]
    slots: NDArray[np.complex128] | Floats
    widths: Floats
    scale: float

    @property
    def blur(self) -> float:
        """Standard deviation of a coefficient of m'(X) + m'(1/X) for what is unknown."""
        return float(np.sqrt((self.widths**2).sum() / 2)) * 4 / DEGREE


def solve(one: Ring, blocks: list[Block], most_pairs: int) -> NDArray[np.int8] | None:
    """The ternary key int8[N] that fits the least blurred of `blocks`; None where none does."""
    for block in blocks:
        if np.iscomplexobj(block.slots) and not block.widths.any():
            exact = np.rint(ring.coefficients(block.slots) * block.scale).astype(np.int64)
            rest = one.difference(one.forward(one.residues(exact)), block.c0)
            found = _ternary(one, one.product(rest, one.inverse(block.c1)))
            if found is not None:
                return found
    halves = [half for block in blocks if (half := _half(one, block)) is not None]
    pairs = sorted(combinations(range(len(halves)), 2), key=sum)  # the least blurred first
    for i, j in pairs[:most_pairs]:
        found = _ternary(one, _pair(one, halves[i], halves[j]))
        if found is not None:
            return found
    return _chosen(one, blocks)


def _chosen(one: Ring, blocks: list[Block]) -> NDArray[np.int8] | None:
    """The key where the server made what was opened: (0, C) and (0, C X^(N/2)), C a large number.

    They decrypt to C s and to C X^(N/2) s, whose real parts are C times the even and the odd part
    of s under X -> 1/X, so large that no rounding hides them.
    """
    parts: dict[int, Floats] = {}
    for block in blocks:
        multiplier = one.signed(one.backward(block.c1))
        [places] = np.nonzero(multiplier)
        if block.c0.any() or len(places) != 1 or np.isnan(block.slots.real).any():
            continue
        [place] = places
        real = ring.coefficients(block.slots.real) * block.scale / multiplier[place]
        parts[int(place)] = np.roll(real, -place) * np.where(
            np.arange(DEGREE) < DEGREE - place, 1, -1
        )
    if set(parts) != {0, SLOTS}:
        return None
    found = np.rint(parts[0] + parts[SLOTS])
    return found.astype(np.int8) if (np.abs(found) <= 1).all() else None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Half:
    """c1(x) s(x) + c1(1/x) s(1/x) = right, at each of the N / 2 points x of the first half."""

    here: NDArray[np.uint64]
    there: NDArray[np.uint64]
    right: NDArray[np.uint64]


def _half(one: Ring, block: Block) -> _Half | None:
    trace = _traces(block)
    if trace is None:
        return None
    both = one.forward(one.residues(trace))[:SLOTS]
    c0 = (block.c0[:SLOTS] + block.c0[: SLOTS - 1 : -1]) % np.uint64(one.prime)
    return _Half(block.c1[:SLOTS], block.c1[: SLOTS - 1 : -1], one.difference(both, c0))


def _pair(one: Ring, a: _Half, b: _Half) -> NDArray[np.uint64]:
    """s in NTT form by Cramer's rule at each point."""

    def determinant(
        w: NDArray[np.uint64], x: NDArray[np.uint64], y: NDArray[np.uint64], z: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        return one.difference(one.product(w, z), one.product(x, y))

    over = one.inverse(determinant(a.here, a.there, b.here, b.there))
    first = one.product(determinant(a.right, a.there, b.right, b.there), over)
    second = one.product(determinant(a.here, a.right, b.here, b.right), over)
    return np.concatenate([first, second[::-1]])


def _ternary(one: Ring, values: NDArray[np.uint64]) -> NDArray[np.int8] | None:
    """The coefficients, where they are -1, 0 and 1 alone: by chance with (3 / p)^N."""
    found = one.signed(one.backward(values))
    return found.astype(np.int8) if (np.abs(found) <= 1).all() and found.any() else None


def _traces(block: Block) -> NDArray[np.int64] | None:
    """m'(X) + m'(1/X), int64[N], from the real parts of its slots; None where too blurred.

    Where few slots are blurred, all N / 2 coefficients together tell what these are: what is known
    of a coefficient modulo 1 gives the mean of what is missing in it (a wrapped Gaussian), the
    means are projected on the few slots that are missing, and so on until nothing moves.
    """
    known = np.where(np.isnan(block.slots.real), 0.0, block.slots.real)
    trace = 2 * block.scale * ring.coefficients(known)
    loose = np.flatnonzero(block.widths * 4 / DEGREE > 1e-3)
    if block.blur > _MOST_BLUR:
        if not 1 <= len(loose) <= _MOST_WITHHELD:
            return None
        trace += _withheld(trace[:SLOTS], loose, block.widths[loose])
    elif block.blur > _ROUNDS_OFF and len(loose) <= _MOST_LOOSE:
        trace += _missing(trace[:SLOTS], loose, block.widths[loose])
    return np.rint(trace).astype(np.int64)


_ROUNDS_OFF: Final = 0.05
_MOST_BLUR: Final = 1.5
_MOST_LOOSE: Final = 256
_MOST_WITHHELD: Final = 3


def _withheld(trace: Floats, loose: NDArray[np.int64], widths: Floats) -> Floats:
    """The same where nothing is known of few slots: by reduction of a lattice.

    Some coefficients are integers k = t + sum_j c_j x_j, with t and c known and each x up to 2^36:
    the closest vector to -t in the lattice of the c, modulo 1, tells the x (Kannan's embedding).
    """
    grid, fine, most = 8.0, 2.0**44, 6 * widths.max()
    picked = np.random.default_rng(0).permutation(SLOTS)[: 20 * len(loose)]
    columns = _columns(loose)
    size, small = len(picked), 0.01
    basis = np.zeros((size + len(loose) + 1, size + len(loose) + 1))
    basis[:size, :size] = fine * np.eye(size)
    basis[size:-1, :size] = fine * grid * columns[picked].T
    basis[size:-1, size:-1] = fine * small * grid / most * np.eye(len(loose))
    basis[-1, :size] = fine * (trace[picked] - np.rint(trace[picked]))
    basis[-1, -1] = fine * small
    whole = lattice.reduced(np.rint(basis).astype(np.int64))
    best, least = np.zeros(len(loose)), np.inf
    for row in whole:
        if abs(abs(int(row[-1])) - round(fine * small)) > 0:
            continue
        unit = np.rint(basis[size, size])
        found = grid * np.rint(row[size:-1] / unit) * np.sign(row[-1])
        here = trace + columns @ found
        rest = float(np.abs(here - np.rint(here)).mean())
        if rest < least:
            best, least = found, rest
    full = np.zeros(SLOTS)
    full[loose] = best
    first = 2 * ring.coefficients(full)
    return first + _missing(trace + first[:SLOTS], loose, np.full(len(loose), 2 * grid))


def _columns(loose: NDArray[np.int64]) -> Floats:
    """What one unit in each of these slots adds to N / 2 coefficients, float64[N/2, slots]."""
    angles = np.outer(np.arange(SLOTS), ring.slot_points(DEGREE)[loose]) * (np.pi / DEGREE)
    columns: Floats = 4 / DEGREE * np.cos(angles)
    return columns


def _missing(trace: Floats, loose: NDArray[np.int64], widths: Floats) -> Floats:
    """What `loose` slots of these widths add to `trace` float64[N/2]; as float64[N].

    From several first guesses of the spread, what leaves all coefficients nearest to integers.
    """
    columns = _columns(loose)
    blur = float(np.sqrt((widths**2).sum() / 2)) * 4 / DEGREE
    best, least = np.zeros(len(loose)), np.inf
    for spread in (min(blur, 0.4), 0.3, 0.2):
        found = _projected(trace, columns, widths, spread)
        here = trace + columns @ found
        rest = float(np.abs(here - np.rint(here)).mean())
        if rest < least:
            best, least = found, rest
        if least < 0.05:  # of wrong ones it is a quarter
            break
    full = np.zeros(SLOTS)
    full[loose] = best
    return 2 * ring.coefficients(full)


def _projected(trace: Floats, columns: Floats, widths: Floats, spread: float) -> Floats:
    """What is missing in each slot; a coefficient lacks about `spread` (standard deviation)."""
    found, wraps, square = (
        np.zeros(columns.shape[1]),
        np.arange(-2, 3)[:, None],
        columns.T @ columns,
    )
    for _ in range(40):
        # The distances to the nearest integers, each as likely as its Gaussian has it.
        here = trace + columns @ found
        offsets = np.rint(here) - here + wraps
        weight = np.exp(-(offsets**2) / (2 * spread**2))
        weight /= weight.sum(axis=0)
        mean = (offsets * weight).sum(axis=0)
        left = float(((offsets - mean) ** 2 * weight).sum(axis=0).mean())
        slope = max(0.05, 1 - left / spread**2)  # of the mean, in what is missing
        # What is explained already keeps its prior: a ridge.
        ridge = left / slope**2 / widths**2
        step = np.linalg.solve(square + np.diag(ridge), columns.T @ mean / slope - ridge * found)
        found += step
        moved = float(np.sqrt((columns @ step).var()))
        spread = max(0.04, 0.6 * spread + 0.4 * min(moved, spread))
        if moved < 1e-4:
            break
    return found


def widths(decrypted: Floats | NDArray[np.complex128], unknown: float, scale: float) -> Floats:
    """How far each number may be from the one that was decoded (standard deviation, at the scale).

    Seen from the numbers themselves: whether all are float32, or end after some decimals. unknown:
    for those that were withheld.
    """
    withheld = np.isnan(decrypted.real)
    given = decrypted.real[~withheld]
    found = np.full(len(decrypted), unknown)
    found[~withheld] = 0.0
    if not len(given):
        return found
    for decimals in range(13):
        if np.abs(given - np.round(given, decimals)).max() < 1e-14:
            found[~withheld] = scale * 10.0**-decimals / np.sqrt(12)
            return found
    if (given == given.astype(np.float32)).all():
        unit = np.spacing(np.abs(given).astype(np.float32)).astype(np.float64)
        found[~withheld] = scale * unit / np.sqrt(12)
    return found


def adversary(view: ServerView, given: Given, seed: int, progress: Progress) -> KeyGuess:
    """The key from what was opened, and with it every upload that was stored."""
    del given, seed
    if view.public.experiment:
        return _against_securefl(view, progress)
    import tenseal as ts

    context = ts.context(ts.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(PRIMES))
    one = Ring(DEGREE, _first_prime())
    one.forward(np.zeros(DEGREE, np.uint64))  # the tables of roots
    opened = [
        msgspec.msgpack.decode(item.data, type=Opening)
        for item in view.crossings
        if item.phase == OPEN
    ]
    started = time.perf_counter()
    blocks = [block for item in opened for block in _blocks(context, item, len(view.public.sites))]
    blocks.sort(key=lambda block: block.blur)
    key = solve(one, blocks, 200)
    seconds = time.perf_counter() - started
    progress(0.5)
    blur = min((block.blur for block in blocks), default=0.0)
    if key is None:
        return KeyGuess(Array.of(np.zeros(0, np.int8)), len(blocks), blur, seconds)
    secret = one.forward(one.residues(key.astype(np.int64)))
    stored = [item for item in view.crossings if item.phase == UPLOAD]
    read = tuple(Opened(item.site, _decrypted(context, one, secret, item.data)) for item in stored)
    return KeyGuess(Array.of(key), len(blocks), blur, seconds, read)


def _blocks(context: Any, item: Opening, additions: int) -> Iterator[Block]:
    """The blocks of an opening, of a sum of `additions` ciphertexts."""
    values = item.decrypted.numpy()
    # An encryption under the public key is brought from three primes to two: rounding c0 and c1
    # adds (1 + 2N/3) / 12 to the variance of a coefficient, and half of it times N to a slot's.
    fresh = float(np.sqrt(additions * (1 + 2 * DEGREE / 3) / 12 * DEGREE / 2))
    for number, (scale, c0, c1) in enumerate(_parsed(context, item.ciphertext)):
        part = values[number * SLOTS : (number + 1) * SLOTS]
        unknown = max(fresh, scale * float(np.nanstd(values.real)))
        # TenSEAL fills a block by repeating it: the copies differ by their errors.
        spread = np.resize(widths(part, unknown, scale), SLOTS)
        spread[len(part) :] = np.hypot(spread[len(part) :], np.sqrt(2) * fresh)
        yield Block(c0, c1, np.resize(part, SLOTS), spread, scale)


def _decrypted(context: Any, one: Ring, secret: NDArray[np.uint64], data: bytes) -> Array:
    """What a stored upload holds, float64, to the last slot of its last block."""
    found = []
    for scale, c0, c1 in _parsed(context, data):
        plain = (c0 + one.product(c1, secret)) % np.uint64(one.prime)
        found.append(ring.slots(one.signed(one.backward(plain)) / scale).real)
    return Array.of(np.concatenate(found))


def _against_securefl(view: ServerView, progress: Progress) -> KeyGuess:
    """The same on a run: what was opened of each round's sum, with the sum, under a key a round.

    A sum crosses the wire as residues of c0, bit-packed prime by prime, block by block, and the
    seeds of c1 of all contributions.
    """
    experiment = view.public.parsed()
    encoding = agreement.encoding(experiment, len(view.public.sites), view.public.plan())
    one, expand = Ring(DEGREE, _first_prime()), _Expander()
    asked = {x.number: x.data for x in view.crossings if (x.phase, x.direction) == (OPEN, "down")}
    told = [x for x in view.crossings if (x.phase, x.direction) == (OPEN, "up")]
    seconds, number, blurs = 0.0, 0, list[float]()
    for done, item in enumerate(told):
        answer, request = parse_reply(item.data), Request.from_bytes(asked[item.number])
        if request.task.kind != "train" or not isinstance(answer, Answer):
            continue
        total = SumToOpen.from_bytes(request.body)
        payload = OpenedSum.from_bytes(answer.body).payload
        ciphertexts = list(expand(total.payload, len(total.contributors)))
        started = time.perf_counter()
        blocks = _integers(payload, encoding.plain_bits, ciphertexts, len(total.contributors))
        key = solve(one, blocks, 10)
        for scale in (SECUREFL_SCALE, SCALE) if key is None else ():
            key = key if key is not None else solve(one, _raw(payload, ciphertexts, scale), 10)
        seconds += time.perf_counter() - started
        number, blurs = number + len(blocks), blurs + [block.blur for block in blocks]
        progress((done + 1) / len(told))
        if key is not None:
            return KeyGuess(Array.of(key), number, min(blurs, default=0.0), seconds)
    blur = min(blurs, default=0.0)
    return KeyGuess(Array.of(np.zeros(0, np.int8)), number, blur, seconds)


SECUREFL_SCALE: Final = 2.0**60
_Ciphertexts = list[tuple[NDArray[np.uint64], NDArray[np.uint64]]]


def _integers(
    payload: bytes, bits: int, ciphertexts: _Ciphertexts, contributors: int
) -> list[Block]:
    """The blocks of whole numbers handed out: at least the error of encryption is unknown."""
    packed = np.frombuffer(payload, np.uint8)
    try:
        integers = unpack(packed, len(packed) * 8 // bits, bits)
    except ValueError:  # something else was handed out
        return []
    to_sign = np.uint64(64 - bits)
    values = ((integers << to_sign).view(np.int64) >> np.int64(to_sign)).astype(np.float64)
    fresh = np.full(SLOTS, float(np.sqrt(_VARIANCE * contributors * DEGREE / 2)))
    blocks = []
    for number, (c0, c1) in enumerate(ciphertexts):
        part = values[number * SLOTS : (number + 1) * SLOTS]
        if len(part):
            full = np.zeros(SLOTS)
            full[: len(part)] = part  # what is beyond a vector's end was 0
            blocks.append(Block(c0, c1, full, fresh, SECUREFL_SCALE))
    return blocks


def _raw(payload: bytes, ciphertexts: _Ciphertexts, scale: float) -> list[Block]:
    """The blocks where SEAL's decoded doubles are handed out as they are, as many peers do."""
    if len(payload) != 8 * SLOTS * len(ciphertexts):
        return []
    slots = np.frombuffer(payload, "<f8").reshape(len(ciphertexts), SLOTS)
    if not np.isfinite(slots).all():
        return []
    exact = np.zeros(SLOTS)
    return [Block(*pair, part, exact, scale) for pair, part in zip(ciphertexts, slots, strict=True)]


_VARIANCE: Final = 10.5  # of a coefficient of a fresh error: 42 coins of +-1/2


class _Expander:
    """c0 and c1 modulo the first prime of each block of a sum on securefl's wire, by SEAL."""

    def __init__(self) -> None:
        import tenseal.sealapi as seal

        parms = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parms.set_poly_modulus_degree(DEGREE)
        parms.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(PRIMES)))
        self._context, self._seal = seal.SEALContext(parms, True, seal.SEC_LEVEL_TYPE.TC128), seal
        plain = seal.Plaintext()
        seal.CKKSEncoder(self._context).encode([1.0], SCALE, plain)
        secret = seal.KeyGenerator(self._context).secret_key()
        # Any ciphertext, under a key of the adversary's own, to put c0 and a seed into.
        fresh = seal.Encryptor(self._context, secret).encrypt_symmetric(plain)
        self._body = bytearray(_saved(fresh))

    def __call__(
        self, payload: bytes, contributions: int
    ) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        data, bits = np.frombuffer(payload, np.uint8), PRIMES[:2]
        sizes = [packed_size(DEGREE, width) for width in bits]
        blocks = len(data) // (sum(sizes) + SEED_BYTES * contributions)
        seeds = data[blocks * sum(sizes) :].reshape(contributions, blocks, SEED_BYTES)
        for block in range(blocks):
            row = data[block * sum(sizes) : (block + 1) * sum(sizes)]
            c1 = np.zeros(DEGREE, np.uint64)
            for seed in seeds[:, block]:
                c1 = (c1 + self._expanded(seed.tobytes())) % np.uint64(_first_prime())
            yield unpack(row[: sizes[0]], DEGREE, bits[0]), c1

    def _expanded(self, seed: bytes) -> NDArray[np.uint64]:
        at = _C0_OFFSET + 2 * 8 * DEGREE + _HEADER.size + 1
        self._body[at : at + SEED_BYTES] = seed
        loaded, file = self._seal.Ciphertext(), os.memfd_create("seal", os.MFD_CLOEXEC)
        try:
            os.pwrite(file, _framed(bytes(self._body)), 0)
            loaded.load(self._context, f"/proc/self/fd/{file}")
        finally:
            os.close(file)
        found = np.frombuffer(_saved(loaded), np.uint64, 4 * DEGREE, _C0_OFFSET)
        expanded: NDArray[np.uint64] = found.reshape(2, 2, DEGREE)[1, 0]
        return expanded


def _framed(body: bytes) -> bytes:
    """A body as SEAL loads it."""
    return _HEADER.pack(0xA15E, _HEADER.size, 4, 3, 0, 0, _HEADER.size + len(body)) + body


def _parsed(
    context: Any, data: bytes
) -> Iterator[tuple[float, NDArray[np.uint64], NDArray[np.uint64]]]:
    """Scale, c0 and c1 modulo the first prime, NTT form, of each block of a TenSEAL vector."""
    import tenseal as ts

    for block in ts.ckks_vector_from(context, data).ciphertext():
        body = _saved(block)
        moduli = block.coeff_modulus_size()
        residues = np.frombuffer(body, "<u8", 2 * moduli * DEGREE, _C0_OFFSET)
        polynomials = residues.reshape(2, moduli, DEGREE)
        yield float(block.scale), polynomials[0, 0], polynomials[1, 0]


def _saved(item: Any) -> bytes:
    """The body of what SEAL saves, from memory alone."""
    file = os.memfd_create("seal", os.MFD_CLOEXEC)
    try:
        item.save(f"/proc/self/fd/{file}")
        data = os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)
    body = data[_HEADER.size :]
    compressed = _HEADER.unpack_from(data)[4]
    return zstandard.ZstdDecompressor().decompressobj().decompress(body) if compressed else body


def _first_prime() -> int:
    return _chain()[0]


# --- worlds: TenSEAL as its users run it ----------------------------------------------------------

UPLOAD: Final = "upload"
OPEN: Final = "open"


@final
@dataclass(frozen=True, slots=True, eq=False)
class KeyTruth:
    """The key, int8[N], and what each site's stored upload held; None where the scorer has none."""

    key: NDArray[np.int8] | None
    uploads: tuple[tuple[str, Floats], ...]


@final
@dataclass(frozen=True, slots=True)
class World:
    """Sites that share one CKKS key for some rounds; a key holder opens each round's sum.

    magnitude: standard deviation of an update's values. length: of an update, at most 4096.
    loud: how many values of an update are 100 times as large.
    released: what the key holder hands out of a decryption. complex_: SEAL's decoder instead of
    TenSEAL's `decrypt()`. chosen: the server has ciphertexts of its own making opened.
    """

    rounds: int = 2
    sites: int = 3
    magnitude: float = 0.01
    length: int = SLOTS
    released: Callable[[Floats, np.random.Generator], Floats] = lambda values, _: values
    loud: int = 0
    complex_: bool = False
    chosen: bool = False

    def trial(self, seed: int) -> Trial[KeyTruth]:
        """One key, and all that the server sees under it."""
        import tenseal as ts

        rng = np.random.default_rng(seed)
        context = ts.context(ts.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(PRIMES))
        context.global_scale = SCALE
        names = tuple(f"site-{number}" for number in range(1, self.sites + 1))
        crossings, stored = [], []
        for number in range(1, self.rounds + 1):
            total = None
            for name in names:
                update = self._update(rng)
                vector = ts.ckks_vector(context, update.tolist())
                crossings.append(Crossing(number, UPLOAD, name, "up", vector.serialize()))
                stored.append((name, update))
                total = vector if total is None else total + vector
            assert total is not None  # noqa: S101 - there are sites
            if self.chosen:
                total = _own_making(context, total, SLOTS * (1 - number % 2))
            opening = Opening(total.serialize(), self._opened(context, total, rng))
            data = msgspec.msgpack.encode(opening)
            crossings.append(Crossing(number, OPEN, names[0], "up", data))
        public = Public("", names, (self.length,), 1, "regression")
        view = ServerView(public, (), tuple(crossings))
        return Trial(view, KeyTruth(_secret(context), tuple(stored)))

    def _update(self, rng: np.random.Generator) -> Floats:
        update = rng.normal(0, self.magnitude, self.length)
        update[: self.loud] *= 100
        return update

    def _opened(self, context: Any, total: Any, rng: np.random.Generator) -> Array:
        if not self.complex_:
            return Array.of(self.released(np.array(total.decrypt()), rng))
        import tenseal.sealapi as seal

        inner = context.data.seal_context()
        plain = seal.Plaintext()
        seal.Decryptor(inner, context.secret_key().data).decrypt(total.ciphertext()[0], plain)
        return Array.of(np.array(seal.CKKSEncoder(inner).decode_complex(plain)))


def _own_making(context: Any, like: Any, place: int) -> Any:
    """The ciphertext (0, 2^50 X^place) as a TenSEAL vector."""
    import tenseal as ts

    block = like.ciphertext()[0]
    body, moduli = bytearray(_saved(block)), block.coeff_modulus_size()
    residues = np.zeros((2, moduli, DEGREE), "<u8")
    for i, prime in enumerate(_chain()[:moduli]):
        one, monomial = Ring(DEGREE, prime), np.zeros(DEGREE, np.int64)
        monomial[place] = (1 << 50) % prime
        residues[1, i] = one.forward(one.residues(monomial))
    body[_C0_OFFSET : _C0_OFFSET + residues.nbytes] = residues.tobytes()
    data = _framed(bytes(body))
    # TenSEAL's protobuf: 1 = packed sizes, 2 = SEAL's ciphertexts, 3 = the scale.
    told = like.serialize()
    sizes, rest = told[: 2 + told[1]], told[2 + told[1] :]
    length, start = _varint(rest, 1)
    return ts.ckks_vector_from(
        context, sizes + b"\x12" + _varint_bytes(len(data)) + data + rest[start + length :]
    )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _varint_bytes(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _chain() -> list[int]:
    import tenseal.sealapi as seal

    return [prime.value() for prime in seal.CoeffModulus.Create(DEGREE, list(PRIMES))]


def _secret(context: Any) -> NDArray[np.int8]:
    body = _saved(context.secret_key().data)
    one = Ring(DEGREE, _first_prime())
    values = np.frombuffer(body, "<u8", DEGREE, 48 + _HEADER.size + 8).astype(np.uint64)
    return one.signed(one.backward(values)).astype(np.int8)


# --- the scorer -----------------------------------------------------------------------------------

_LIMIT: Final = (
    "finds the key where all {n} integers of two blocks are known but for a standard deviation of "
    "0.12 each; where few numbers are blurred, up to 0.4; and where up to 3 are withheld. Stronger "
    "lattice reduction would reach further"
)


def score(guess: KeyGuess, truth: KeyTruth, seed: int) -> Score:
    """Whether the key was found; with it, how near every site's stored upload was read."""
    key = guess.key.numpy()
    found = len(key) == DEGREE and bool((np.abs(key) <= 1).all() and key.any())
    if truth.key is not None:
        found = found and bool((key == truth.key).all())
    results = [
        AttackResult("key recovered", float(found), None, 0.0, 1, seed),
        AttackResult("seconds for the key", guess.seconds, None, 0.0, 1, seed),
        AttackResult("what is unknown of an integer", guess.blur, None, 0.5, guess.blocks, seed),
    ]
    errors, spread = [], []
    for opened, (_, original) in zip(guess.opened, truth.uploads, strict=False):
        read = opened.values.numpy()[: len(original)]
        errors.append(float(np.abs(read - original).max()))
        spread.append(float(np.abs(original).max()))
    if errors:
        results.append(
            AttackResult(
                "largest error in a victim's update",
                max(errors),
                None,
                max(spread),  # of one who guesses 0
                len(errors),
                seed,
            )
        )
    # By chance all coefficients of a wrong one are ternary with (3 / p)^N, below 2^-400000.
    return Score(
        tuple(results), found, 0.0 if found else 1.0, _LIMIT.format(n=DEGREE // 2), notes=()
    )


FLOODING: Final = (
    "every opened polynomial carries Gaussian noise of deviation sqrt(12 tau) 2^(s/2) t in each "
    "coefficient, where t bounds the l2 norm of the error and tau counts what one key opens: "
    "then whoever sees all that was opened of ciphertexts made as the protocol says has no more "
    "than s bits of statistical advantage (Li, Micciancio, Schultz and Sorrell, Crypto 2022)"
)


def claim(experiment: Experiment) -> Claim:
    """Made of runs under ckks alone: the others open nothing approximate."""
    made = str(experiment.protocol.name) == "ckks"
    return Claim(
        "What is opened of a round's sum does not give its CKKS key away",
        "Ring-LWE at degree 8192 and 100 bits; every ciphertext was made as the protocol says",
        made,
        FLOODING if made else None,
    )


def trial(case: Case) -> Trial[KeyTruth]:
    """The sums of a run under ckks, and what was opened of them."""
    if str(case.experiment.protocol.name) != "ckks":
        raise UnavailableError(
            f"the run's protocol is {case.experiment.protocol.name}, which opens exact sums: only "
            "ckks has approximate decryptions"
        )
    return Trial(case.server(), KeyTruth(None, ()))


def undefended(seed: int, profile: Profile) -> Trial[KeyTruth]:
    """TenSEAL as its users run it, with what `decrypt()` gives, for two rounds."""
    del profile
    return World().trial(seed)


def no_signal(seed: int, profile: Profile) -> Trial[KeyTruth]:
    """The same, with fresh random numbers in the place of what was decrypted."""
    del profile
    return World(released=lambda values, rng: rng.normal(0, 0.01, len(values))).trial(seed)


ATTACK: Final = Attack(
    "ckks-key",
    "The CKKS key from what was opened",
    "Li and Micciancio, Eurocrypt 2021",
    (ServerView,),
    KeyGuess,
    adversary,
    score,
    claim,
    trial,
    undefended,
    no_signal,
)


# --- the mitigations ------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Mitigation:
    """What a key holder does to what it hands out. active: the server opens what it made itself.

    argument: the theorem, where one applies.
    """

    name: str
    world: World
    argument: str | None = None

    @property
    def active(self) -> bool:
        """Whether the server does not follow the protocol."""
        return self.world.chosen


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the attack against one mitigation, for `keys` independent keys.

    "proved" where a theorem excludes the attack, "this attack fails" where nothing more is known.
    interval: of the probability that a key is found.
    """

    mitigation: str
    outcome: Literal["broken", "this attack fails", "proved"]
    found: int
    keys: int
    interval: Interval
    seconds: float
    blur: float
    shown: str


def _float32(values: Floats, _: np.random.Generator) -> Floats:
    return values.astype(np.float32).astype(np.float64)


def _rounded(decimals: int) -> Callable[[Floats, np.random.Generator], Floats]:
    return lambda values, _: np.round(values, decimals)


def _first(count: int) -> Callable[[Floats, np.random.Generator], Floats]:
    return lambda values, _: np.where(np.arange(len(values)) < count, values, np.nan)


FLOODING_BITS: Final = 30


def _flooded(values: Floats, rng: np.random.Generator) -> Floats:
    """Noise as the theorem has it for three ciphertexts a sum and two openings.

    t: the errors of three encryptions under the public key, 21.4 in a coefficient each, times 1.1.
    """
    error_norm = 1.1 * np.sqrt(3 * (1 + 2 * DEGREE / 3) / 12 * DEGREE)
    deviation = np.sqrt(12 * 2) * 2 ** (FLOODING_BITS / 2) * error_norm
    return values + rng.normal(0, deviation * np.sqrt(DEGREE / 2) / SCALE, len(values))


MITIGATIONS: Final = (
    Mitigation("none: decrypt() of two rounds", World()),
    Mitigation("none: SEAL's complex decoding of one block", World(rounds=1, complex_=True)),
    Mitigation("one decrypt() of one block, ever", World(rounds=1)),
    Mitigation("float32, updates of 1e-5", World(released=_float32, magnitude=1e-5)),
    Mitigation(
        "float32, updates of 1e-4, 16 rounds",
        World(released=_float32, magnitude=1e-4, rounds=16),
    ),
    Mitigation(
        "float32, updates of 1e-5 but 16 of 1e-3",
        World(released=_float32, magnitude=1e-5, loud=16),
    ),
    Mitigation("float32, updates of 1e-3", World(released=_float32, magnitude=1e-3, rounds=16)),
    Mitigation("float32, updates of 1e-2", World(released=_float32, rounds=16)),
    Mitigation("11 decimals", World(released=_rounded(11))),
    Mitigation("6 decimals", World(released=_rounded(6), rounds=16)),
    Mitigation("4 decimals", World(released=_rounded(4), rounds=16)),
    Mitigation("2 decimals", World(released=_rounded(2), rounds=16)),
    Mitigation("updates of 4095 numbers, all of them", World(length=SLOTS - 1, sites=1, rounds=16)),
    Mitigation("updates of 4000 numbers, all of them", World(length=4000, sites=1, rounds=16)),
    Mitigation("the first 4095 of 4096 slots", World(released=_first(SLOTS - 1))),
    Mitigation("the first 4094 of 4096 slots", World(released=_first(SLOTS - 2))),
    Mitigation("the first 4032 of 4096 slots", World(released=_first(SLOTS - 64), rounds=16)),
    Mitigation("the first 2048 of 4096 slots", World(released=_first(SLOTS // 2), rounds=16)),
    Mitigation("float32, the server makes two ciphertexts", World(released=_float32, chosen=True)),
    Mitigation(
        "2 decimals, the server makes two ciphertexts", World(released=_rounded(2), chosen=True)
    ),
    Mitigation(
        f"noise flooding at {FLOODING_BITS} bits", World(released=_flooded), argument=FLOODING
    ),
)
"""Against TenSEAL with degree 8192, primes of 60, 40 and 40 bits, scale 2^40."""


def verdict(mitigation: Mitigation, seed: int, keys: int = 3) -> Verdict:
    """What becomes of the attack against `mitigation`, in this process, for `keys` keys."""
    found, seconds, blurs, wrong = 0, [], [], []
    for number in range(keys):
        world = mitigation.world.trial(seed + number)
        guess = adversary(_server(world.view), Given(), seed, lambda _: None)
        told = score(guess, world.truth, seed)
        found += told.succeeded
        seconds.append(guess.seconds)
        blurs.append(guess.blur)
        wrong += [item.value for item in told.results if item.metric.startswith("largest error")]
    low, high = binomtest(found, keys).proportion_ci(0.95, "exact")
    interval = Interval(float(low), float(high), 0.95, "Clopper-Pearson")
    middle, blur = float(np.median(seconds)), float(np.median(blurs))
    if found:
        shown = (
            f"{found} of {keys} keys in {middle:.2g} s each; every stored update was then read to "
            f"within {max(wrong):.0e}"
        )
        return Verdict(mitigation.name, "broken", found, keys, interval, middle, blur, shown)
    shown = f"0 of {keys} keys (at most {interval.high:.0%} with 95 % confidence)"
    if blur and mitigation.argument is None:
        shown += f"; each integer that must be exact is unknown by {blur:.2g} (standard deviation)"
    outcome: Literal["proved", "this attack fails"] = "this attack fails"
    if mitigation.argument is not None:
        outcome, shown = "proved", f"{shown}; {mitigation.argument}"
    return Verdict(mitigation.name, outcome, found, keys, interval, middle, blur, shown)


def _server(view: object) -> ServerView:
    assert isinstance(view, ServerView)  # noqa: S101 - made here
    return view
