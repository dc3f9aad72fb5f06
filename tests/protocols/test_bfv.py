"""BFV: exact sums by proof, our own wire format, and nothing of a peer's reaches SEAL unchecked."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols.bfv import (
    BLOCK_BYTES,
    DEGREE,
    MODULUS,
    MODULUS_BITS,
    SEED_BYTES,
    Parameters,
    SecretKey,
    Sum,
    ciphertext_bytes,
    largest_plain_bits,
    sum_bytes,
)
from protocols.bitpacking import pack, unpack
from protocols.encoding import FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError
from protocols.keystream import Keystream, Seed
from protocols.messages import Upload

SEED = Seed(bytes(range(64)))
EDGES = [1, 2, 3, DEGREE - 1, DEGREE, DEGREE + 1, 2 * DEGREE + 5]


def new_key(plain_bits: int = 33, additions: int = 16) -> SecretKey:
    """The key of the tests' seed."""
    return SecretKey(SEED, Parameters(plain_bits, additions))


KEY = new_key()


def random_slots(count: int, bits: int = 33, seed: int = 0) -> NDArray[np.uint64]:
    """Uniform slots below 2^bits."""
    return np.random.default_rng(seed).integers(0, 1 << bits, count, np.uint64)


def encrypted(slots: NDArray[np.uint64], key: SecretKey = KEY) -> bytes:
    """One ciphertext as it crosses the wire."""
    return bytes(key.encrypt([slots]))


def opened(key: SecretKey, wires: list[bytes], slots: int) -> NDArray[np.uint64]:
    """What the key holder reads in the server's sum of `wires`."""
    total = Sum(slots)
    for wire in wires:
        total.add(wire)
    assert total.contributions == len(wires)
    return key.open(total.to_bytes(), slots, len(wires))


# Correctness


@pytest.mark.parametrize("additions", [1, 2, 16, 100])
@pytest.mark.parametrize("worst", [False, True], ids=["random", "worst"])
def test_sums_are_exact_at_the_largest_plaintext_modulus(additions: int, worst: bool) -> None:
    """n ciphertexts at the largest p that the bound allows open to the exact sum modulo 2^p."""
    bits, count = largest_plain_bits(additions), DEGREE + 7
    key = new_key(bits, additions)
    top = (1 << bits) - 1
    extremes = np.resize(np.array([top, 0, 1, top // 2, top // 2 + 1, top - 1], np.uint64), count)
    vectors = [extremes if worst else random_slots(count, bits, i) for i in range(additions)]
    total = opened(key, [encrypted(vector, key) for vector in vectors], count)
    truth = sum(vectors[1:], vectors[0].copy()) & np.uint64(top)
    assert np.array_equal(total, truth)


@given(st.integers(1, 3 * DEGREE), st.integers(1, 5), st.integers(2, 41), st.integers(0, 1000))
@settings(max_examples=25)
def test_any_number_of_slots_sums_exactly(count: int, sites: int, bits: int, seed: int) -> None:
    """Any length, cohort and modulus."""
    key = SecretKey(SEED, Parameters(bits, 5))
    vectors = [random_slots(count, bits, seed + i) for i in range(sites)]
    total = opened(key, [encrypted(vector, key) for vector in vectors], count)
    assert np.array_equal(total, sum(vectors[1:], vectors[0].copy()) & np.uint64((1 << bits) - 1))


def test_chunks_encrypt_like_the_whole_vector() -> None:
    """Chunks of whole blocks, an empty one among them, then a partial last one."""
    slots = random_slots(5 * DEGREE + 3)
    cuts = np.split(slots, [DEGREE, DEGREE, 3 * DEGREE, 5 * DEGREE])
    wire = bytes(KEY.encrypt(iter(cuts)))
    assert len(wire) == ciphertext_bytes(len(slots))
    assert np.array_equal(opened(KEY, [wire], len(slots)), slots)


def test_more_blocks_than_are_worked_on_at_a_time() -> None:
    """A vector of many internal batches."""
    slots = random_slots(70 * DEGREE + 1)
    assert np.array_equal(
        opened(KEY, [encrypted(slots)] * 2, len(slots)), slots * np.uint64(2) & np.uint64(2**33 - 1)
    )


def test_only_the_last_chunk_may_end_inside_a_block() -> None:
    """Otherwise blocks would shift: the caller's mistake."""
    with pytest.raises(ValueError, match="last chunk"):
        KEY.encrypt([random_slots(5), random_slots(DEGREE)])


def test_slots_beyond_the_plaintext_modulus_are_refused() -> None:
    """A slot of 2^p would wrap in silence."""
    with pytest.raises(ValueError, match=r"2\^33"):
        KEY.encrypt([np.array([1, 1 << 33], np.uint64)])


def test_encryption_is_randomised() -> None:
    """The same vector twice gives unrelated ciphertexts, in every block."""
    slots = np.zeros(2 * DEGREE, np.uint64)
    one, other = (np.frombuffer(encrypted(slots), np.uint8).reshape(2, -1) for _ in range(2))
    rows = [*one, *other]
    assert len({row[:SEED_BYTES].tobytes() for row in rows}) == 4, "a seed of c1 is used once"
    for row in rows[1:]:
        differing = int(np.unpackbits(rows[0] ^ row).sum())
        assert abs(differing - 4 * BLOCK_BYTES) < 6 * np.sqrt(2 * BLOCK_BYTES)


# The bound


@pytest.mark.parametrize("additions", [1, 2, 3, 5, 16, 64, 100, 1000, 65536])
def test_the_largest_modulus_is_the_largest_that_the_bound_allows(additions: int) -> None:
    """n * 21.5 + 1 < q / 2^(p+1) in exact arithmetic: accepted at p, refused at p + 1."""

    def decrypts(bits: int) -> bool:
        return additions * Fraction(43, 2) + 1 < Fraction(MODULUS, 2 ** (bits + 1))

    bits = largest_plain_bits(additions)
    assert decrypts(bits)
    assert not decrypts(bits + 1)
    assert Parameters(bits, additions).plain_bits == bits
    with pytest.raises(ValueError, match=f"plain_bits <= {bits}"):
        Parameters(bits + 1, additions)


@pytest.mark.parametrize("bits", range(2, 49))
def test_the_cohort_at_each_modulus_is_the_largest_that_the_bound_allows(bits: int) -> None:
    """For each p the last n that the inequality admits is accepted, and the next refused."""
    room = (Fraction(MODULUS, 2 ** (bits + 1)) - 1) / Fraction(43, 2)
    most = -(-room.numerator // room.denominator) - 1  # the largest integer strictly below
    assert Parameters(bits, most).additions == most
    assert largest_plain_bits(most) >= bits > largest_plain_bits(most + 1)
    with pytest.raises(ValueError, match=f"sum of {most + 1} ciphertexts"):
        Parameters(bits, most + 1)


@given(st.integers(2, 60), st.integers(1, 10**6))
def test_parameters_hold_the_bound_or_are_refused(bits: int, additions: int) -> None:
    """The constructor is the inequality, both ways."""
    holds = additions * Fraction(43, 2) + 1 < Fraction(MODULUS, 2 ** (bits + 1))
    if holds:
        assert Parameters(bits, additions).additions == additions
    else:
        with pytest.raises(ValueError, match=f"sum of {additions} ciphertexts"):
            Parameters(bits, additions)


@pytest.mark.parametrize(("additions", "bits"), [(16, 44), (64, 42), (100, 41), (1000, 38)])
def test_known_largest_moduli(additions: int, bits: int) -> None:
    """The design's table."""
    assert largest_plain_bits(additions) == bits


@pytest.mark.parametrize("additions", [0, -1, -(10**6)])
def test_sums_of_nothing_are_refused(additions: int) -> None:
    """A number of additions below one is no parameter."""
    with pytest.raises(ValueError, match=rf"additions = {additions}"):
        largest_plain_bits(additions)
    with pytest.raises(ValueError, match=rf"additions = {additions}"):
        Parameters(33, additions)


@pytest.mark.parametrize("bits", [-1, 0, 1])
def test_moduli_below_four_are_refused(bits: int) -> None:
    """SEAL wants a plaintext modulus of at least two bits."""
    with pytest.raises(ValueError, match="plain_bits"):
        Parameters(bits, 2)


def test_an_empty_sum_is_refused() -> None:
    """A vector has at least its count slot."""
    with pytest.raises(ValueError, match="slots"):
        Sum(0)


# Keys


def test_keys_from_one_seed_interoperate_and_others_do_not() -> None:
    """The seed is the key: equal seeds open each other's sums, unequal ones open noise."""
    slots = random_slots(100)
    wire = encrypted(slots, SecretKey(Seed(bytes(range(64))), Parameters(33, 16)))
    assert np.array_equal(opened(KEY, [wire], 100), slots)
    flipped = bytearray(range(64))
    flipped[63] ^= 1
    stranger = SecretKey(Seed(bytes(flipped)), Parameters(33, 16))
    assert np.count_nonzero(opened(stranger, [wire], 100) == slots) == 0


def test_a_secret_key_is_never_shown_nor_serialised() -> None:
    """Redacted repr; no pickle, no copy, no bytes."""
    assert "<secret>" in repr(KEY)
    assert bytes(range(64)).hex()[:16] not in repr(KEY)
    assert not hasattr(KEY, "to_bytes")
    assert not hasattr(KEY, "__dict__")
    with pytest.raises(TypeError):
        pickle.dumps(KEY)
    with pytest.raises(TypeError):
        copy.deepcopy(KEY)


# Bytes on the wire


@pytest.mark.parametrize("slots", EDGES)
def test_sizes_on_the_wire_are_the_stated_ones(slots: int) -> None:
    """One seed a block, 54 bits a slot in use, and nothing else."""
    blocks = -(-slots // DEGREE)
    wire = encrypted(random_slots(slots))
    assert len(wire) == ciphertext_bytes(slots)
    total = Sum(slots)
    for contributions in (1, 2, 3):
        total.add(wire)
        assert len(total.to_bytes()) == sum_bytes(slots, contributions)
        assert sum_bytes(slots, contributions) == -(-54 * slots // 8) + 64 * blocks * contributions
    whole, rest = divmod(slots, DEGREE)
    assert ciphertext_bytes(slots) == whole * (64 + 13824) + (64 + -(-54 * rest // 8)) * (rest > 0)


def test_the_last_block_ships_only_what_is_in_use() -> None:
    """One slot more than a block costs a seed and seven bytes, not a block."""
    assert len(encrypted(random_slots(DEGREE + 1))) - len(encrypted(random_slots(DEGREE))) == 71


def test_bytes_per_parameter_at_16_sites_and_16_bits() -> None:
    """10^6 parameters: at most 3.5 bytes each in a whole Upload; a tenth costs at most 0.11x."""
    encoding = FixedPoint(bits=16, clip=1.0, cohort=16, slot_bits=largest_plain_bits(16))
    key = SecretKey(SEED, Parameters(encoding.plain_bits, 16))

    def upload(parameters: int) -> int:
        values = np.random.default_rng(0).normal(0, 0.3, parameters)
        payload = key.encrypt(encoding.encode(values, 1, Keystream(SEED, "rounding")))
        return len(Upload("a" * 64, bytes(32), bytes(payload), bytes(64)).to_bytes())

    dense, sparse = upload(1_000_000), upload(100_000)
    assert dense <= 3.5 * 1_000_000
    assert sparse <= 0.11 * dense


# What a peer may send


def with_coefficient(wire: bytes, slots: int, index: int, value: int) -> bytes:
    """`wire` (at most one block) with one coefficient of c0 replaced."""
    c0 = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), slots, MODULUS_BITS)
    c0[index] = value
    return wire[:SEED_BYTES] + pack(c0, MODULUS_BITS).tobytes()


SLOTS = 2 * DEGREE + 5
GOOD = encrypted(random_slots(SLOTS))
LAST = GOOD[2 * BLOCK_BYTES :]
BROKEN = {
    "empty": b"",
    "truncated by a byte": GOOD[:-1],
    "truncated by a block": GOOD[:BLOCK_BYTES] + LAST,
    "extended by a byte": GOOD + b"\0",
    "extended by a block": GOOD[:BLOCK_BYTES] + GOOD,
    "last block filled up": GOOD + bytes(3 * BLOCK_BYTES - len(GOOD)),
    "coefficient q in the first block": with_coefficient(GOOD[:BLOCK_BYTES], DEGREE, 17, MODULUS)
    + GOOD[BLOCK_BYTES:],
    "coefficient 2^54-1 in the second block": GOOD[:BLOCK_BYTES]
    + with_coefficient(GOOD[BLOCK_BYTES : 2 * BLOCK_BYTES], DEGREE, 0, 2**54 - 1)
    + LAST,
    "coefficient q in the last block": GOOD[: 2 * BLOCK_BYTES]
    + with_coefficient(LAST, 5, 4, MODULUS),
    "spare bit set": GOOD[:-1] + bytes([GOOD[-1] | 0x80]),
    "first block all zero": GOOD[:SEED_BYTES] + bytes(13824) + GOOD[BLOCK_BYTES:],
    "last block all zero": GOOD[: 2 * BLOCK_BYTES + SEED_BYTES] + bytes(len(LAST) - SEED_BYTES),
    "everything zero": bytes(len(GOOD)),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("before", [0, 2])
def test_a_broken_ciphertext_is_refused_and_leaves_the_sum_as_it_was(
    what: str, before: int
) -> None:
    """MalformedMessageError; all or nothing; the sum goes on and opens right."""
    slots = random_slots(SLOTS, seed=1)
    good, total = encrypted(slots), Sum(SLOTS)
    for _ in range(before):
        total.add(good)
    earlier = total.to_bytes()
    with pytest.raises(MalformedMessageError):
        total.add(BROKEN[what])
    assert total.contributions == before
    assert total.to_bytes() == earlier
    total.add(good)
    truth = slots * np.uint64(before + 1) & np.uint64(2**33 - 1)
    assert np.array_equal(KEY.open(total.to_bytes(), SLOTS, before + 1), truth)


def test_the_largest_coefficient_is_accepted_and_reduced() -> None:
    """q - 1 is a coefficient; sums are modulo q."""
    wire = with_coefficient(encrypted(random_slots(5)), 5, 2, MODULUS - 1)
    total = Sum(5)
    for _ in range(4):
        total.add(memoryview(wire))
    c0 = unpack(np.frombuffer(total.to_bytes()[:34], np.uint8), 5, MODULUS_BITS)
    own = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), 5, MODULUS_BITS)
    assert c0.tolist() == [4 * int(value) % MODULUS for value in own]


@given(st.data(), st.integers(1, 20), st.sampled_from([-1, 0, 0, 0, 1]))
def test_any_bytes_are_a_ciphertext_or_malformed(data: st.DataObject, slots: int, off: int) -> None:
    """Accepted exactly when the length is right and every coefficient below q is in its place."""
    size = ciphertext_bytes(slots) + off
    wire = data.draw(st.binary(min_size=size, max_size=size))
    number = int.from_bytes(wire[SEED_BYTES:], "little")
    c0 = [number >> (54 * i) & (2**54 - 1) for i in range(slots)]
    fits = off == 0 and number < 1 << (54 * slots) and max(c0) < MODULUS
    total = Sum(slots)
    if fits and any(c0):
        total.add(wire)
        assert total.to_bytes() == wire[SEED_BYTES:] + wire[:SEED_BYTES]
    else:
        with pytest.raises(MalformedMessageError):
            total.add(wire)
    swapped = wire[SEED_BYTES:] + wire[:SEED_BYTES]
    if fits:
        assert len(KEY.open(swapped, slots, 1)) == slots
    else:
        with pytest.raises(MalformedMessageError):
            KEY.open(swapped, slots, 1)


TWICE = Sum(SLOTS)
TWICE.add(GOOD)
TWICE.add(GOOD)
OPENABLE = TWICE.to_bytes()
COEFFICIENTS = -(-SLOTS * MODULUS_BITS // 8)


def broken_sum(change: Callable[[NDArray[np.uint64]], None]) -> bytes:
    """The sum of two with changed coefficients."""
    c0 = unpack(np.frombuffer(OPENABLE[:COEFFICIENTS], np.uint8), SLOTS, MODULUS_BITS)
    change(c0)
    return pack(c0, MODULUS_BITS).tobytes() + OPENABLE[COEFFICIENTS:]


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        OPENABLE[:-1],
        OPENABLE + b"\0",
        OPENABLE[:-SEED_BYTES],
        OPENABLE + bytes(SEED_BYTES),
        GOOD,
        broken_sum(lambda c0: c0.__setitem__(0, MODULUS)),
        broken_sum(lambda c0: c0.__setitem__(-1, 2**54 - 1)),
        OPENABLE[: COEFFICIENTS - 1]
        + bytes([OPENABLE[COEFFICIENTS - 1] | 0x80])
        + OPENABLE[COEFFICIENTS:],
    ],
    ids=["empty", "short", "long", "seed less", "seed more", "upload", "q", "2^54-1", "spare"],
)
def test_a_broken_sum_is_not_opened(wire: bytes) -> None:
    """Exact length, zero spare bits, every coefficient below q, before SEAL sees any of it."""
    with pytest.raises(MalformedMessageError):
        KEY.open(wire, SLOTS, 2)


@pytest.mark.parametrize("contributions", [-1, 0, 17, 10**6])
def test_sums_beyond_the_bound_are_not_opened(contributions: int) -> None:
    """More additions than were proven, or none, are refused whatever the bytes."""
    wire = bytes(max(0, sum_bytes(1, max(contributions, 0))))
    with pytest.raises(ProtocolError, match="16"):
        KEY.open(wire, 1, contributions)


# Against an independent decryption in pure Python, without SEAL

WORD = (1 << 64) - 1
IV = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
SIGMA = [
    [int(digit, 16) for digit in row]
    for row in (
        "0123456789abcdef",
        "ea489fd61c02b753",
        "b8c052fdae367194",
        "7931dcbe265a40f8",
        "905724afe1bc683d",
        "2c6a0b834d75fe19",
        "c51fed4a0763928b",
        "db7ec13950f4862a",
        "6fe9b308c2d714a5",
        "a2847615fb9e3cd0",
    )
]
MIXES = [
    (i, 4 + (i + k) % 4, 8 + (i + 2 * k) % 4, 12 + (i + 3 * k) % 4)
    for k in (0, 1)
    for i in range(4)
]


def compress(state: list[int], block: bytes, count: int, final: bool) -> list[int]:
    """BLAKE2b's compression function (RFC 7693, section 3.2)."""
    m = struct.unpack("<16Q", block.ljust(128, b"\0"))
    v = [*state, *IV]
    v[12] ^= count
    v[14] ^= WORD if final else 0
    for i in range(12):
        order = SIGMA[i % 10]
        for j, (a, b, c, d) in enumerate(MIXES):
            for word, turn_d, turn_b in ((2 * j, 32, 24), (2 * j + 1, 16, 63)):
                v[a] = (v[a] + v[b] + m[order[word]]) & WORD
                x = v[d] ^ v[a]
                v[d] = (x >> turn_d | x << (64 - turn_d)) & WORD
                v[c] = (v[c] + v[d]) & WORD
                x = v[b] ^ v[c]
                v[b] = (x >> turn_b | x << (64 - turn_b)) & WORD
    return [h ^ v[i] ^ v[i + 8] for i, h in enumerate(state)]


def blake2b(parameters: bytes, *blocks: bytes, size: int) -> bytes:
    """BLAKE2b of `size` bytes in `blocks` under a 64-byte parameter block."""
    words = struct.unpack("<8Q", parameters.ljust(64, b"\0"))
    state = [a ^ b for a, b in zip(IV, words, strict=True)]
    for i, block in enumerate(blocks, 1):
        final = i == len(blocks)
        state = compress(state, block, size if final else 128 * i, final)
    return struct.pack("<8Q", *state)


def expand(seed: bytes) -> list[int]:
    """c1 from its seed: SEAL fills 4096 bytes at a time with BLAKE2Xb(key seed, counter)."""
    data = b""
    for counter in range(8 * DEGREE // 4096):
        root = struct.pack("<BBBBIII", 64, 64, 1, 1, 0, 0, 4096)
        inner = blake2b(root, seed.ljust(128, b"\0"), struct.pack("<Q", counter), size=136)
        for node in range(64):
            leaf = struct.pack("<BBBBIIIBB", 64, 0, 0, 0, 64, node, 4096, 0, 64)
            data += blake2b(leaf, inner, size=64)
    # SEAL rejects words above the last multiple of q: one in 2^37, so never here.
    return [word % MODULUS for word in struct.unpack(f"<{DEGREE}Q", data)]


def transform(values: list[int], root: int) -> list[int]:
    """The discrete Fourier transform modulo q, plainly."""
    if len(values) == 1:
        return values
    square = root * root % MODULUS
    even, odd = transform(values[::2], square), transform(values[1::2], square)
    low, high, power = [], [], 1
    for a, b in zip(even, odd, strict=True):
        low.append((a + power * b) % MODULUS)
        high.append((a - power * b) % MODULUS)
        power = power * root % MODULUS
    return low + high


PSI = next(
    root
    for base in range(2, 100)
    if pow(root := pow(base, (MODULUS - 1) // (2 * DEGREE), MODULUS), DEGREE, MODULUS) != 1
)


def forwards(values: list[int]) -> list[int]:
    """A polynomial modulo x^N + 1 at the odd powers of a 2N-th root of one."""
    twisted = [v * pow(PSI, i, MODULUS) % MODULUS for i, v in enumerate(values)]
    return transform(twisted, PSI * PSI % MODULUS)


def backwards(values: list[int]) -> list[int]:
    """The inverse of `forwards`."""
    twisted = transform(values, pow(PSI, -2, MODULUS))
    scale, turn = pow(DEGREE, -1, MODULUS), pow(PSI, -1, MODULUS)
    return [v * scale * pow(turn, i, MODULUS) % MODULUS for i, v in enumerate(twisted)]


def product(a: list[int], b: list[int]) -> list[int]:
    """a * b modulo (x^N + 1, q)."""
    pairs = zip(forwards(a), forwards(b), strict=True)
    return backwards([x * y % MODULUS for x, y in pairs])


def test_the_oracle_computes_blake2b_and_products() -> None:
    """The pure-Python oracle against hashlib and against schoolbook multiplication."""
    parameters = struct.pack("<BBBB", 64, 0, 1, 1)
    assert blake2b(parameters, b"abc", size=3) == hashlib.blake2b(b"abc").digest()
    a, b = [0] * DEGREE, list(range(DEGREE))
    a[0], a[1], a[2047] = 3, MODULUS - 1, 2
    expected = [
        (3 * b[i] - (b[i - 1] if i else -b[-1]) + 2 * (b[0] if i == DEGREE - 1 else -b[i + 1]))
        % MODULUS
        for i in range(DEGREE)
    ]
    assert product(a, b) == expected


def secret_of(key: SecretKey) -> list[int]:
    """The secret polynomial, found by opening chosen sums: why an opener opens only once.

    At p = 48 a plaintext is round(2^48 * v / q) with v = c0 + c1 * s; sliding c0 through one step
    of q / 2^48 = 64 finds where each coefficient of c1 * s turns over, hence c1 * s, hence s.
    """
    seed = bytes(range(100, 164))
    rows = []
    for offset in range(65):
        c0 = pack(np.full(DEGREE, offset, np.uint64), MODULUS_BITS).tobytes()
        rows.append(key.open(c0 + seed, DEGREE, 1))
    exact = []
    for found in np.array(rows).T.tolist():
        turn = next(i for i in range(1, 65) if found[i] != found[0])
        # The least v that rounds to m is ceil((2m - 1) * q / 2^(p + 1)).
        first = -(-(2 * found[turn] - 1) * MODULUS // 2**49)
        exact.append((first - turn) % MODULUS)
    pairs = zip(forwards(exact), forwards(expand(seed)), strict=True)
    secret = backwards([v * pow(a, -1, MODULUS) % MODULUS for v, a in pairs])
    return [s - MODULUS if s > MODULUS // 2 else s for s in secret]


def test_an_independent_decryption_agrees_and_the_noise_is_within_its_bound() -> None:
    """Pure Python reads a fresh ciphertext and a sum right, and finds |e| <= 21.5 a ciphertext."""
    secret = secret_of(new_key(48, 1))
    assert set(secret) == {-1, 0, 1}, "the secret is ternary"
    bits = 44
    key = new_key(bits, 16)  # the same seed gives the same secret under other parameters
    vectors = [random_slots(DEGREE, bits, i) for i in range(3)]
    total, c0_sum, c1_sum = Sum(DEGREE), [0] * DEGREE, [0] * DEGREE
    for vector in vectors:
        wire = encrypted(vector, key)
        total.add(wire)
        c1 = expand(wire[:SEED_BYTES])
        c0 = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), DEGREE, MODULUS_BITS).tolist()
        c0_sum = [(a + b) % MODULUS for a, b in zip(c0_sum, c0, strict=True)]
        c1_sum = [(a + b) % MODULUS for a, b in zip(c1_sum, c1, strict=True)]
        read_and_bound(c0, product(c1, secret), vector.tolist(), bits, 1)
    truth = [sum(map(int, column)) % 2**bits for column in zip(*vectors, strict=True)]
    read_and_bound(c0_sum, product(c1_sum, secret), truth, bits, 3)
    assert key.open(total.to_bytes(), DEGREE, 3).tolist() == truth


def read_and_bound(
    c0: list[int], rotated: list[int], plain: list[int], bits: int, additions: int
) -> None:
    """c0 + c1 * s rounds to `plain`, and lies within `additions` * 21.5 of its multiple of q/t."""
    phase = [(a + b) % MODULUS for a, b in zip(c0, rotated, strict=True)]
    assert [((v << (bits + 1)) + MODULUS) // (2 * MODULUS) % 2**bits for v in phase] == plain
    errors = [
        Fraction(v * 2**bits - MODULUS * m, 2**bits) for v, m in zip(phase, plain, strict=True)
    ]
    centred = [min(abs(e), MODULUS - abs(e)) for e in errors]
    assert max(centred) <= additions * Fraction(43, 2)
    assert max(centred) > 5, "fresh noise of standard deviation 3.2 is there"
