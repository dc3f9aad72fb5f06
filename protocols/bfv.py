"""Additive BFV over SEAL: coefficient packing, plaintext modulus 2^p, seeded ciphertexts.

Ring degree 2048 and one 54-bit prime, "128-bit classical by the HomomorphicEncryption.org 2018
table". A block carries 2048 slots as (c0, seed): c1 is expanded from the seed. Blocks cross the
wire in our own format, the seed and the high bits of the coefficients, and the last one ships only
the coefficients in use. A sum is the sum of the c0 with the list of the seeds: additions are plain
arithmetic modulo q that needs neither SEAL nor a key, and the opener expands the seeds. What a peer
sends is range-checked here and only then framed for SEAL, so no peer's bytes reach SEAL's parser.

This module and `protocols.ckks` are the only ones that import tenseal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn, final

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from protocols.bitpacking import pack, packed_size, unpack
from protocols.errors import MalformedMessageError, ProtocolError
from protocols.framing import C0_OFFSET, HEADER_BYTES, SEED_BYTES, Memory, framed
from protocols.keystream import Seed

DEGREE: Final = 2048
MODULUS: Final = 18014398509404161
MODULUS_BITS: Final = 54
_BLOCKS_AT_A_TIME: Final = 32
_CHUNK: Final = _BLOCKS_AT_A_TIME * DEGREE

# Where the seed lies in a seeded ciphertext's body: after c0, a header, and the generator's type.
_SEED_OFFSET: Final = C0_OFFSET + 8 * DEGREE + HEADER_BYTES + 1


def largest_plain_bits(additions: int) -> int:
    """The largest p for which a sum of `additions` fresh ciphertexts always decrypts."""
    if additions < 1:
        raise ValueError(f"additions = {additions}: use at least 1")
    return ((MODULUS - 1) // (43 * additions + 2)).bit_length() - 1


@final
@dataclass(frozen=True, slots=True)
class Parameters:
    """Plaintext modulus 2^plain_bits, for sums of at most `additions` ciphertexts.

    A c0 is shipped without its lowest bits, rounded modulo q: `upload_cut` of them in an upload,
    `sum_cut` in a sum. Both are as large as exactness allows.

    Formal Guarantees: no decryption failure. A fresh error is a centred binomial, |e| <= 21,
    scaling the plaintext rounds by at most 1/2, cutting d bits by at most 2^(d-1), and taking a
    mask off by at most 1/2, so a sum decrypts exactly while
    additions * (21.5 + 2^(d-1)) + 2^(d'-1) + 1 < q / 2^(plain_bits + 1),
    d = upload_cut, d' = sum_cut. The constructor checks it for d = d' = 0; the cuts keep it.
    """

    plain_bits: int
    additions: int

    def __post_init__(self) -> None:
        if self.plain_bits < 2:
            raise ValueError(f"plain_bits = {self.plain_bits}: use at least 2")
        if self.additions < 1:
            raise ValueError(f"additions = {self.additions}: use at least 1")
        if not self._decrypts(0, 0):
            raise ValueError(
                f"a sum of {self.additions} ciphertexts modulo 2^{self.plain_bits} could fail to "
                f"decrypt: use plain_bits <= {largest_plain_bits(self.additions)}"
            )

    def _decrypts(self, upload_cut: int, sum_cut: int) -> bool:
        # Twice the bound above, in integers; a cut of no bits rounds nothing.
        each = 43 + (1 << upload_cut if upload_cut else 0)
        once = 2 + (1 << sum_cut if sum_cut else 0)
        return (self.additions * each + once) << self.plain_bits < MODULUS

    @property
    def upload_cut(self) -> int:
        """Low bits of every c0 coefficient that an upload leaves out."""
        return max(d for d in range(_MOST_CUT + 1) if self._decrypts(d, 0))

    @property
    def sum_cut(self) -> int:
        """Low bits of every c0 coefficient that a sum leaves out."""
        return max(d for d in range(_MOST_CUT + 1) if self._decrypts(self.upload_cut, d))

    @property
    def upload_bits(self) -> int:
        """Bits of a coefficient in an upload."""
        return MODULUS_BITS - self.upload_cut

    @property
    def sum_bits(self) -> int:
        """Bits of a coefficient in a sum."""
        return MODULUS_BITS - self.sum_cut

    @property
    def block_bytes(self) -> int:
        """Length on the wire of a whole block of an upload."""
        return SEED_BYTES + packed_size(DEGREE, self.upload_bits)

    def upload_bytes(self, slots: int) -> int:
        """Length on the wire of one encrypted vector of `slots` slots."""
        blocks, rest = divmod(slots, DEGREE)
        last = SEED_BYTES + packed_size(rest, self.upload_bits) if rest else 0
        return blocks * self.block_bytes + last

    def sum_bytes(self, slots: int, contributions: int) -> int:
        """Length on the wire of the sum of `contributions` encrypted vectors of `slots` slots."""
        return packed_size(slots, self.sum_bits) + contributions * SEED_BYTES * _blocks(slots)


_MOST_CUT: Final = 40


def _blocks(slots: int) -> int:
    return -(-slots // DEGREE)


def _context(parameters: Parameters, seed_words: list[int] | None = None) -> Any:
    parms = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parms.set_poly_modulus_degree(DEGREE)
    parms.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [MODULUS_BITS]))
    parms.set_plain_modulus(seal.Modulus(1 << parameters.plain_bits))
    if parms.coeff_modulus()[0].value() != MODULUS:
        raise RuntimeError("this SEAL chooses another 54-bit prime: install tenseal 0.3.16")
    if seed_words is not None:
        parms.set_random_generator(seal.Blake2xbPRNGFactory(seed_words))
    context = seal.SEALContext(parms, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise RuntimeError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
    return context


@final
class SecretKey:
    """The BFV secret of a round. Whoever holds the same seed and parameters holds the same key.

    SEAL's own generator makes the key, under a generator seeded from `seed`, in a context used for
    nothing else; encryption draws its errors from the operating system.
    """

    __slots__ = ("_context", "_decryptor", "_encryptor", "_evaluator", "_memory", "parameters")

    def __init__(self, seed: Seed, parameters: Parameters) -> None:
        words = struct.unpack("<8Q", seed.derive("bfv secret key", size=64))
        secret = seal.KeyGenerator(_context(parameters, list(words))).secret_key()
        self.parameters = parameters
        self._context = _context(parameters)
        self._encryptor = seal.Encryptor(self._context, secret)
        self._decryptor = seal.Decryptor(self._context, secret)
        self._evaluator = seal.Evaluator(self._context)
        self._memory = Memory()

    def encrypt(self, chunks: Iterable[NDArray[np.uint64]]) -> bytearray:
        """The slots in `chunks` (uint64 < 2^plain_bits) as `upload_bytes(slots)` wire bytes.

        Every chunk but the last has a multiple of 2048 slots. Works a chunk at a time.
        """
        wire = bytearray()
        plain = seal.Plaintext()
        for chunk in chunks:
            if wire and len(wire) % self.parameters.block_bytes:
                raise ValueError(f"only the last chunk may end inside a block of {DEGREE} slots")
            if len(chunk) and int(chunk.max()) >> self.parameters.plain_bits:
                raise ValueError(f"a slot is not below 2^{self.parameters.plain_bits}")
            for start in range(0, len(chunk), DEGREE * _BLOCKS_AT_A_TIME):
                wire += self._encrypt_blocks(
                    chunk[start : start + DEGREE * _BLOCKS_AT_A_TIME], plain
                )
        return wire

    def _encrypt_blocks(self, slots: NDArray[np.uint64], plain: Any) -> bytes:
        blocks = _blocks(len(slots))
        c0 = np.empty((blocks, DEGREE), "<u8")
        bits, cut = self.parameters.upload_bits, self.parameters.upload_cut
        rows = np.empty((blocks, self.parameters.block_bytes), np.uint8)
        for i in range(blocks):
            self._load_plaintext(plain, slots[i * DEGREE : (i + 1) * DEGREE])
            body = self._memory.saved(self._encryptor.encrypt_symmetric(plain))
            c0[i] = np.frombuffer(body, "<u8", DEGREE, C0_OFFSET)
            rows[i, :SEED_BYTES] = np.frombuffer(body, np.uint8, SEED_BYTES, _SEED_OFFSET)
        c0 = _cut(c0, cut)
        rows[:, SEED_BYTES:] = pack(c0.reshape(-1), bits).reshape(blocks, -1)
        wire = rows.reshape(-1)[: self.parameters.upload_bytes(len(slots))]
        rest = len(slots) % DEGREE
        if rest:  # cut inside the last block: repack, so that the spare bits are zero
            last = pack(c0[-1, :rest], bits)
            wire[len(wire) - len(last) :] = last
        return wire.tobytes()

    def _load_plaintext(self, plain: Any, slots: NDArray[np.uint64]) -> None:
        count = len(slots)
        body = bytes(32) + struct.pack("<Qd", count, 1.0)
        body += framed(struct.pack("<Q", count) + slots.astype("<u8", copy=False).tobytes())
        self._memory.replace(framed(body))
        plain.load(self._context, self._memory.path)

    def open(self, wire: bytes, slots: int, contributions: int) -> NDArray[np.uint64]:
        """The `slots` plaintext slots (uint64[slots]) of a sum of `contributions` ciphertexts.

        `wire` is a `Sum`'s bytes and may come from a peer: MalformedMessageError unless it has the
        exact length and every coefficient is below q. Decrypting is not authenticated: open only
        what the protocol says, once.
        """
        if not 1 <= contributions <= self.parameters.additions:
            raise ProtocolError(
                f"a sum of {contributions} ciphertexts is outside 1 to {self.parameters.additions}"
            )
        size = self.parameters.sum_bytes(slots, contributions)
        if len(wire) != size:
            raise MalformedMessageError(
                f"an encrypted sum of {contributions} has {size} bytes, not {len(wire)}"
            )
        blocks = _blocks(slots)
        end = packed_size(slots, self.parameters.sum_bits)
        data = np.frombuffer(wire, np.uint8)
        c0 = _coefficients(data[:end], slots, self.parameters.sum_cut)
        seeds = data[end:].reshape(contributions, blocks, SEED_BYTES)
        out = np.empty(slots, np.uint64)
        total, term, plain = seal.Ciphertext(), seal.Ciphertext(), seal.Plaintext()
        first, others = self._seeded_frame(), self._seeded_frame()
        for block in range(blocks):
            part = slice(block * DEGREE, min((block + 1) * DEGREE, slots))
            size = part.stop - part.start
            padded = np.zeros(DEGREE, "<u8")
            padded[:size] = c0[part]
            first.write(padded.tobytes(), HEADER_BYTES + C0_OFFSET)
            first.write(seeds[0, block].tobytes(), HEADER_BYTES + _SEED_OFFSET)
            total.load(self._context, first.path)
            for seed in seeds[1:, block]:  # c0 is zero in these: only c1 is expanded and added
                others.write(seed.tobytes(), HEADER_BYTES + _SEED_OFFSET)
                term.load(self._context, others.path)
                self._evaluator.add_inplace(total, term)
            self._decryptor.decrypt(total, plain)
            body = self._memory.saved(plain)
            (count,) = struct.unpack_from("<Q", body, 48 + HEADER_BYTES)
            found = np.zeros(DEGREE, np.uint64)
            found[:count] = np.frombuffer(body, "<u8", count, 56 + HEADER_BYTES)
            out[part] = found[:size]
        return out

    def _seeded_frame(self) -> Memory:
        """A seeded ciphertext with c0 = 0, of which callers overwrite c0 and the seed."""
        plain = seal.Plaintext()
        self._load_plaintext(plain, np.zeros(1, np.uint64))
        body = bytearray(self._memory.saved(self._encryptor.encrypt_symmetric(plain)))
        body[C0_OFFSET : C0_OFFSET + 8 * DEGREE] = bytes(8 * DEGREE)
        frame = Memory()
        frame.replace(framed(bytes(body)))
        return frame

    def __repr__(self) -> str:
        return f"SecretKey(<secret>, {self.parameters})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not serialised")


def _cut(c0: NDArray[np.uint64], cut: int) -> NDArray[np.uint64]:
    """Coefficients below q, rounded to multiples of 2^cut modulo q, without those zero bits.

    One that rounds up to 2^54 becomes 0, which is nearer to it modulo q than 2^(cut-1).
    """
    rounded = (c0 + np.uint64((1 << cut) >> 1)) >> np.uint64(cut)
    return rounded & np.uint64((1 << (MODULUS_BITS - cut)) - 1)


def _coefficients(packed: NDArray[np.uint8], count: int, cut: int) -> NDArray[np.uint64]:
    """The inverse of `_cut`, from packed bytes, range-checked; MalformedMessageError."""
    try:
        values = unpack(packed, count, MODULUS_BITS - cut)
    except ValueError as error:
        raise MalformedMessageError(f"ciphertext: {error}") from None
    if len(values) and int(values.max()) > (MODULUS - 1 + ((1 << cut) >> 1)) >> cut:
        raise MalformedMessageError(f"ciphertext: coefficient {int(values.argmax())} is not < q")
    values <<= np.uint64(cut)
    return _reduce(values)


def _reduce(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`values` < 2q modulo q, in place: an unsigned x - q wraps to a huge number when x < q."""
    np.minimum(values, values - np.uint64(MODULUS), out=values)
    return values


@final
class Sum:
    """The running sum of encrypted vectors of `slots` slots. Needs no key and no SEAL.

    Masks that lie under the encryption come off with `subtract`, which needs no key either.

    add: all or nothing; a refused ciphertext leaves the sum as it was.
    """

    __slots__ = ("_c0", "_seeds", "parameters", "slots")

    def __init__(self, slots: int, parameters: Parameters) -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots}: use at least 1")
        self.slots = slots
        self.parameters = parameters
        self._c0 = np.zeros(slots, np.uint64)
        self._seeds: list[NDArray[np.uint8]] = []

    @property
    def contributions(self) -> int:
        """How many ciphertexts were added."""
        return len(self._seeds)

    def add(self, wire: bytes | memoryview) -> None:
        """Add one ciphertext from the wire; MalformedMessageError unless it is well formed."""
        if self.contributions == self.parameters.additions:
            raise ProtocolError(f"a sum holds at most {self.contributions} ciphertexts")
        size = self.parameters.upload_bytes(self.slots)
        if len(wire) != size:
            raise MalformedMessageError(
                f"a ciphertext of {self.slots} slots has {size} bytes, not {len(wire)}"
            )
        data = np.frombuffer(wire, np.uint8)
        whole, each = self.slots // DEGREE, self.parameters.block_bytes
        seeds = np.empty((_blocks(self.slots), SEED_BYTES), np.uint8)
        seeds[:whole] = data[: whole * each].reshape(-1, each)[:, :SEED_BYTES]
        if self.slots % DEGREE:
            seeds[whole] = data[whole * each :][:SEED_BYTES]
        # Parsed twice, so that nothing is added before everything is known to be sound and no
        # second vector has to be held.
        for start, c0 in self._parse(data):
            starts = np.arange(0, len(c0), DEGREE)
            empty = np.flatnonzero(~np.logical_or.reduceat(c0 != 0, starts))
            if empty.size:
                block = start // DEGREE + int(empty[0])
                raise MalformedMessageError(f"block {block} of a ciphertext is all zero")
        for start, c0 in self._parse(data):
            total = self._c0[start : start + len(c0)]
            total += c0
            _reduce(total)
        self._seeds.append(seeds)

    def _parse(self, data: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """The coefficients of a ciphertext, some blocks at a time, each with its first slot."""
        whole, each, cut = (
            self.slots // DEGREE,
            self.parameters.block_bytes,
            self.parameters.upload_cut,
        )
        rows = data[: whole * each].reshape(whole, each)
        for block in range(0, whole, _BLOCKS_AT_A_TIME):
            part = rows[block : block + _BLOCKS_AT_A_TIME, SEED_BYTES:]
            yield block * DEGREE, _coefficients(part.reshape(-1), len(part) * DEGREE, cut)
        if self.slots % DEGREE:
            last = data[whole * each + SEED_BYTES :]
            yield whole * DEGREE, _coefficients(last, self.slots % DEGREE, cut)

    def subtract(self, plain: NDArray[np.uint64]) -> None:
        """Take `plain` (uint64[slots] below 2^plain_bits) off what the sum decrypts to.

        Subtracts round(q * m / 2^p) from c0. With q = 2^54 - g that is
        m * 2^(54-p) - floor((g * m + 2^(p-1) - 1) / 2^p), exact in 64 bits because g < 2^17 and
        p <= 47 wherever two ciphertexts can be added. Precondition: parameters.additions >= 2.
        """
        if len(plain) != self.slots or int(plain.max()) >> self.parameters.plain_bits:
            raise ValueError(f"take off {self.slots} slots below 2^{self.parameters.plain_bits}")
        p, gap = self.parameters.plain_bits, (1 << MODULUS_BITS) - MODULUS
        for start in range(0, self.slots, _CHUNK):
            m = plain[start : start + _CHUNK]
            low = (np.uint64(gap) * m + np.uint64((1 << (p - 1)) - 1)) >> np.uint64(p)
            scaled = (m << np.uint64(MODULUS_BITS - p)) - low
            part = self._c0[start : start + _CHUNK]
            part += np.uint64(MODULUS) - _reduce(scaled)
            _reduce(part)

    def to_bytes(self) -> bytes:
        """The sum on the wire: `sum_bytes(slots, contributions)` bytes."""
        packed = pack(_cut(self._c0, self.parameters.sum_cut), self.parameters.sum_bits)
        return packed.tobytes() + b"".join(seeds.tobytes() for seeds in self._seeds)
