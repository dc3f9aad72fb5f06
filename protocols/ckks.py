"""Additive CKKS over SEAL, as TenSEAL's users know it, opened only through noise flooding.

Ring degree 8192 and the primes of 60, 40 and 40 bits that TenSEAL's tutorials take; the last one is
SEAL's special prime and carries no data. "192-bit classical by the HomomorphicEncryption.org 2018
table" (up to 152 bits). A block carries 4096 slots, each an integer modulo 2^p as a real, by SEAL's
own encoder at scale 2^60. Ciphertexts are in NTT form, so that every block is shipped whole and no
low bits can be left out: (seed, residues of c0), bit-packed. A sum adds residues, with the list of
the seeds. What a peer sends is range-checked here and framed for SEAL with a header of our own, so
no peer's bytes reach SEAL's parser.

Why 2^60 and not the usual 2^40: whoever sees a raw decryption and its ciphertext has the key (Li
and Micciancio, Eurocrypt 2021). So noise that floods the error is added under the encryption before
anything is decoded, and what is left of it is rounded off: the grid of the slots is 1, the noise
in a slot stays below 1/2. At 2^40 noise that does both does not exist; the two data primes have
room for 2^60, where a million parameters of 16 sites are flooded at 60 bits and still sum exactly.
`Parameters` has the bounds.

This module and `protocols.bfv` are the only ones that import tenseal.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, final

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from protocols.bitpacking import pack, packed_size, unpack
from protocols.errors import MalformedMessageError, ProtocolError, RefusedError
from protocols.framing import C0_OFFSET, HEADER_BYTES, SEED_BYTES, Memory, framed
from protocols.identity import digest
from protocols.keystream import Keystream, Seed

DEGREE: Final = 8192
BLOCK_SLOTS: Final = DEGREE // 2
PRIME_BITS: Final = (60, 40)
PRIMES: Final = (1152921504606830593, 1099510890497)
SCALE: Final = 2.0**60
MOST_PLAIN_BITS: Final = 37
"""The largest p; what doubles carry decides it, not how many are added."""
LEAST_FLOODING_BITS: Final = 30

_CHAIN_BITS: Final = (*PRIME_BITS, 40)
_ROWS: Final = [packed_size(DEGREE, bits) for bits in PRIME_BITS]
_BLOCK_BYTES: Final = SEED_BYTES + sum(_ROWS)
_C0_BYTES: Final = 8 * DEGREE * len(PRIMES)
# After c0 in a seeded ciphertext's body: a header, and the generator's type.
_SEED_OFFSET: Final = C0_OFFSET + _C0_BYTES + HEADER_BYTES + 1
_MODULI: Final = np.array(PRIMES, np.uint64).reshape(-1, 1)

_VARIANCE: Final = 10.5  # of one coefficient of a fresh error: 42 coins of +-1/2
_MOST_ERROR: Final = 21
_DOUBLE: Final = 2.0**-46  # relative l2 error of a transform of 8192 points in doubles


@final
@dataclass(frozen=True, slots=True)
class Parameters:
    """Vectors of `slots` slots modulo 2^plain_bits, for sums of at most `additions` ciphertexts.

    A key is shared by `additions` sites at most, each of which opens one sum at most, so a key
    answers for tau = blocks * additions decryptions.

    Precondition of exactness: slots are integers v modulo 2^p with |v| <= 2^(p-1), and the largest
    of each vector, without one slot a block that may sum to 2^p, sum to 2^(p-1) at most. Encodings
    whose sums do not wrap keep it.

    Formal Guarantees.

    Exactness: with probability 1 - 2^-64 every slot of every sum opened under one key is the sum
    of what was encrypted modulo 2^p: the error beside a sum in clear is none. A slot holds its v at
    scale D = 2^60. What n = `additions` ciphertexts add to it, at scale D, is at most `_slack`:
    errors and roundings, n * 21.5 * N + N; and double arithmetic of the encoder and the decoder,
    2^-46 in l2 norm each (Higham 2002, theorem 24.2, with 13 levels), of polynomials whose l2 norms
    sum to 2^(p-1) * (1 + 1/32) * D, times sqrt(N) from coefficients to slots. `deviation` is the
    largest whose noise with this probability stays below D / 2 - slack in every slot, by the
    Gaussian tail and the union bound.

    Flooding: to every decrypted polynomial a Gaussian of standard deviation `deviation` in each of
    its N coefficients is added before it is decoded: sqrt(12 tau) * 2^(s/2) * t with s =
    `flooding_bits` >= 30 and t = `error_norm`, which is s bits of statistical security against
    whoever sees all that is opened, and ciphertexts made as the protocol says (Li, Micciancio,
    Schultz and Sorrell, Crypto 2022, on the Gaussian mechanism). Plaintexts are the encoder's
    polynomials, whose sum the scheme keeps exactly, so that its roundings are no error here; that
    these tell nothing of single summands either is due to exactness alone. The noise is drawn in
    doubles: the theorem speaks of real numbers.
    """

    plain_bits: int
    additions: int
    slots: int

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots = {self.slots}: use at least 1")
        if self.additions < 1:
            raise ValueError(f"additions = {self.additions}: use at least 1")
        if not 2 <= self.plain_bits <= MOST_PLAIN_BITS:
            raise ValueError(f"plain_bits = {self.plain_bits}: use 2 to {MOST_PLAIN_BITS}")
        if self.flooding_bits < LEAST_FLOODING_BITS:
            raise ValueError(
                f"CKKS sums of {self.slots} slots from {self.additions} sites are flooded at "
                f"{self.flooding_bits:.1f} bits, below {LEAST_FLOODING_BITS}: use a smaller model, "
                "fewer sites, or a protocol without this limit (masked-bfv)"
            )

    @property
    def blocks(self) -> int:
        """Ciphertexts that a vector takes."""
        return -(-self.slots // BLOCK_SLOTS)

    @property
    def decryptions(self) -> int:
        """tau: blocks opened under one key, by all its holders together."""
        return self.blocks * self.additions

    @property
    def error_norm(self) -> float:
        """t: the l2 norm that the error of a sum in any of tau decryptions stays below.

        Up to probability 2^-128. The N coefficients of the error are independent sums of 42 n
        coins of +-1/2, hence sub-Gaussian with v = 10.5 n, and Pr[|e|^2 > v (N + 2 sqrt(N x) +
        2 x)] <= e^-x (Hsu, Kakade and Zhang 2012, theorem 1). Additions add no error; nothing is
        rescaled, switched or cut.
        """
        x = 128 * math.log(2) + math.log(self.decryptions)
        return math.sqrt(_VARIANCE * self.additions * (DEGREE + 2 * math.sqrt(DEGREE * x) + 2 * x))

    @property
    def _slack(self) -> float:
        exact = self.additions * (_MOST_ERROR + 0.5) * DEGREE + DEGREE
        norms = 2.0 ** (self.plain_bits - 1) * (1 + 1 / 32) + 1  # the 1 is the noise
        return exact + 2 * _DOUBLE * math.sqrt(DEGREE) * norms * SCALE

    @property
    def deviation(self) -> float:
        """sigma: standard deviation of the flooding noise in a coefficient."""
        slots = self.slots * self.additions
        tail = math.sqrt(2 * math.log(2 * slots * 2.0**64))
        return (SCALE / 2 - self._slack) / (tail * math.sqrt(BLOCK_SLOTS))

    @property
    def flooding_bits(self) -> float:
        """s: bits of statistical security that the flooding leaves."""
        return 2 * math.log2(self.deviation / (math.sqrt(12 * self.decryptions) * self.error_norm))

    @property
    def upload_bytes(self) -> int:
        """Length on the wire of one encrypted vector."""
        return self.blocks * _BLOCK_BYTES

    def sum_bytes(self, contributions: int) -> int:
        """Length on the wire of the sum of `contributions` encrypted vectors."""
        return self.blocks * (sum(_ROWS) + contributions * SEED_BYTES)


def _context(seed_words: list[int] | None = None) -> Any:
    parms = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parms.set_poly_modulus_degree(DEGREE)
    parms.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(_CHAIN_BITS)))
    if tuple(prime.value() for prime in parms.coeff_modulus())[: len(PRIMES)] != PRIMES:
        raise RuntimeError("this SEAL chooses other primes: install tenseal 0.3.16")
    if seed_words is not None:
        parms.set_random_generator(seal.Blake2xbPRNGFactory(seed_words))
    context = seal.SEALContext(parms, True, seal.SEC_LEVEL_TYPE.TC192)
    if not context.parameters_set():
        raise RuntimeError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
    return context


@final
class SecretKey:
    """The CKKS secret of a round. Whoever holds the same seed and parameters holds the same key.

    It encrypts, and it opens one sum; it hands out no decryption that was not flooded and rounded.
    SEAL's own generator makes the key, under a generator seeded from `seed`, in a context used for
    nothing else; encryption draws its errors from the operating system. The flooding noise is a
    pseudorandom function of the sum under a secret from `seed`: one sum that several sites open
    is flooded alike, so no averaging takes the noise away.
    """

    __slots__ = (
        "_context",
        "_decryptor",
        "_encoder",
        "_encryptor",
        "_evaluator",
        "_flooding",
        "_memory",
        "_opened",
        "parameters",
    )

    def __init__(self, seed: Seed, parameters: Parameters) -> None:
        words = struct.unpack("<8Q", seed.derive("ckks secret key", size=64))
        secret = seal.KeyGenerator(_context(list(words))).secret_key()
        self.parameters = parameters
        self._context = _context()
        self._encoder = seal.CKKSEncoder(self._context)
        self._encryptor = seal.Encryptor(self._context, secret)
        self._decryptor = seal.Decryptor(self._context, secret)
        self._evaluator = seal.Evaluator(self._context)
        self._flooding = Seed(seed.derive("ckks flooding"))
        self._memory = Memory()
        self._opened = False

    def encrypt(self, chunks: Iterable[NDArray[np.uint64]]) -> bytearray:
        """The slots in `chunks` (uint64 < 2^plain_bits) as `upload_bytes` wire bytes.

        Every chunk but the last has a multiple of 4096 slots; `parameters.slots` together.
        """
        wire, plain, found, bits = bytearray(), seal.Plaintext(), 0, self.parameters.plain_bits
        for chunk in chunks:
            if found % BLOCK_SLOTS:
                raise ValueError(f"only the last chunk may end inside a block of {BLOCK_SLOTS}")
            if len(chunk) and int(chunk.max()) >> bits:
                raise ValueError(f"a slot is not below 2^{bits}")
            found += len(chunk)
            to_sign = np.uint64(64 - bits)
            signed = (chunk << to_sign).view(np.int64) >> np.int64(to_sign)
            for start in range(0, len(signed), BLOCK_SLOTS):
                block = signed[start : start + BLOCK_SLOTS].astype(np.float64)
                self._encoder.encode(block.tolist(), SCALE, plain)
                wire += self._encrypt(plain)
        if found != self.parameters.slots:
            raise ValueError(f"{found} slots to encrypt, the key is for {self.parameters.slots}")
        return wire

    def _encrypt(self, plain: Any) -> bytes:
        """One block on the wire: the seed of c1, and the residues of c0 prime by prime."""
        body = self._memory.saved(self._encryptor.encrypt_symmetric(plain))
        residues = np.frombuffer(body, "<u8", DEGREE * len(PRIMES), C0_OFFSET)
        return body[_SEED_OFFSET : _SEED_OFFSET + SEED_BYTES] + _packed(residues.reshape(2, -1))

    def open(self, wire: bytes, slots: int, contributions: int) -> NDArray[np.uint64]:
        """The plaintext slots (uint64[slots]) of a sum of `contributions` ciphertexts, once.

        `wire` is a `Sum`'s bytes and may come from a peer: MalformedMessageError unless it has the
        exact length and every residue is below its prime. RefusedError for a second sum: what the
        flooding proves is said for one. Decrypting is not authenticated: open only what the
        protocol says. Precondition: slots == parameters.slots.
        """
        if slots != self.parameters.slots:
            raise ValueError(f"{slots} slots to open, the key is for {self.parameters.slots}")
        if not 1 <= contributions <= self.parameters.additions:
            raise ProtocolError(
                f"a sum of {contributions} ciphertexts is outside 1 to {self.parameters.additions}"
            )
        size = self.parameters.sum_bytes(contributions)
        if len(wire) != size:
            raise MalformedMessageError(
                f"an encrypted sum of {contributions} has {size} bytes, not {len(wire)}"
            )
        blocks = self.parameters.blocks
        data, end = np.frombuffer(wire, np.uint8), blocks * sum(_ROWS)
        c0 = _residues(data[:end].reshape(blocks, -1))
        seeds = data[end:].reshape(contributions, blocks, SEED_BYTES)
        if self._opened:
            raise RefusedError("this key has opened its sum")
        self._opened = True
        noise = Keystream(self._flooding, "noise", digest("ckks sum", wire))
        total, plain = seal.Ciphertext(), seal.Plaintext()
        first, others = self._seeded_frame(), self._seeded_frame()
        found = np.empty((blocks, BLOCK_SLOTS))
        for block in range(blocks):
            self._load_sum(total, c0[block], seeds[:, block], first, others)
            self._flood(total, noise)
            self._decryptor.decrypt(total, plain)
            found[block] = self._encoder.decode_double(plain)
        integers = np.rint(found.reshape(-1)[:slots]).astype(np.int64).view(np.uint64)
        return integers & np.uint64((1 << self.parameters.plain_bits) - 1)

    def _load_sum(
        self,
        total: Any,
        c0: NDArray[np.uint64],
        seeds: NDArray[np.uint8],
        first: Memory,
        others: Memory,
    ) -> None:
        """One block of a sum as SEAL's ciphertext: c0, and what all seeds expand to, added."""
        first.write(c0.astype("<u8", copy=False).tobytes(), HEADER_BYTES + C0_OFFSET)
        first.write(seeds[0].tobytes(), HEADER_BYTES + _SEED_OFFSET)
        total.load(self._context, first.path)
        term = seal.Ciphertext()
        for seed in seeds[1:]:  # c0 is zero in these: only c1 is expanded and added
            others.write(seed.tobytes(), HEADER_BYTES + _SEED_OFFSET)
            term.load(self._context, others.path)
            self._evaluator.add_inplace(total, term)

    def _flood(self, total: Any, noise: Keystream) -> None:
        """Add Gaussian noise of `deviation` in every coefficient to what `total` decrypts to.

        Independent complex Gaussians in the slots are independent Gaussians in the coefficients,
        because the embedding is sqrt(N / 2) times an isometry.
        """
        plain = seal.Plaintext()
        size = self.parameters.deviation * math.sqrt(BLOCK_SLOTS) / SCALE
        self._encoder.encode((size * _gaussians(noise, BLOCK_SLOTS)).tolist(), SCALE, plain)
        self._evaluator.add_plain_inplace(total, plain)

    def _seeded_frame(self) -> Memory:
        """A seeded ciphertext with c0 = 0, of which callers overwrite c0 and the seed."""
        plain = seal.Plaintext()
        self._encoder.encode([1.0], SCALE, plain)
        body = bytearray(self._memory.saved(self._encryptor.encrypt_symmetric(plain)))
        body[C0_OFFSET : C0_OFFSET + _C0_BYTES] = bytes(_C0_BYTES)
        frame = Memory()
        frame.replace(framed(bytes(body)))
        return frame

    def __repr__(self) -> str:
        return f"SecretKey(<secret>, {self.parameters})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not serialised")


def _gaussians(noise: Keystream, count: int) -> NDArray[np.complex128]:
    """`count` complex numbers whose two parts are standard normal (Box and Muller 1958)."""
    radius = np.sqrt(-2 * np.log1p(-noise.uniform(count)))
    gaussians: NDArray[np.complex128] = radius * np.exp(2j * np.pi * noise.uniform(count))
    return gaussians


def _packed(residues: NDArray[np.uint64]) -> bytes:
    """One block's residues, uint64[primes, N], as they cross the wire."""
    rows = zip(residues, PRIME_BITS, strict=True)
    return b"".join(pack(row, bits).tobytes() for row, bits in rows)


def _residues(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The inverse of `_packed` for several blocks, uint64[blocks, primes, N], range-checked."""
    found = np.empty((len(packed), len(PRIMES), DEGREE), np.uint64)
    for block, row in enumerate(packed):
        for i, part in enumerate(np.split(row, [_ROWS[0]])):
            found[block, i] = unpack(part, DEGREE, PRIME_BITS[i])
    if (found >= _MODULI).any():
        block = int(np.argmax((found >= _MODULI).any(axis=(1, 2))))
        raise MalformedMessageError(f"ciphertext: block {block} has a residue not below its prime")
    return found


@final
class Sum:
    """The running sum of encrypted vectors. Needs no key and no SEAL.

    add: all or nothing; a refused ciphertext leaves the sum as it was.
    """

    __slots__ = ("_c0", "_seeds", "parameters")

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self._c0 = np.zeros((parameters.blocks, len(PRIMES), DEGREE), np.uint64)
        self._seeds: list[bytes] = []

    @property
    def contributions(self) -> int:
        """How many ciphertexts were added."""
        return len(self._seeds)

    def add(self, wire: bytes | memoryview) -> None:
        """Add one ciphertext from the wire; MalformedMessageError unless it is well formed."""
        if self.contributions == self.parameters.additions:
            raise ProtocolError(f"a sum holds at most {self.contributions} ciphertexts")
        size = self.parameters.upload_bytes
        if len(wire) != size:
            raise MalformedMessageError(
                f"a ciphertext of {self.parameters.slots} slots has {size} bytes, not {len(wire)}"
            )
        rows = np.frombuffer(wire, np.uint8).reshape(self.parameters.blocks, -1)
        residues = _residues(rows[:, SEED_BYTES:])
        empty = np.flatnonzero(~residues.any(axis=(1, 2)))
        if empty.size:
            raise MalformedMessageError(f"block {int(empty[0])} of a ciphertext is all zero")
        self._c0 += residues
        # An unsigned x - q wraps to a huge number when x < q.
        np.minimum(self._c0, self._c0 - _MODULI, out=self._c0)
        self._seeds.append(rows[:, :SEED_BYTES].tobytes())

    def to_bytes(self) -> bytes:
        """The sum on the wire: `sum_bytes(contributions)` bytes."""
        return b"".join([*(_packed(block) for block in self._c0), *self._seeds])
