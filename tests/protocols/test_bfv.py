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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols.bfv import (
    DEGREE,
    MODULUS,
    MODULUS_BITS,
    SEED_BYTES,
    Parameters,
    SecretKey,
    Sum,
    _coefficients,
    _cut,
    largest_plain_bits,
)
from protocols.bitpacking import pack, unpack
from protocols.encoding import FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError
from protocols.keystream import Keystream, Seed
from protocols.messages import Upload

SEED = Seed(bytes(range(64)))
BITS = 40
EDGES = [1, 2, 3, DEGREE - 1, DEGREE, DEGREE + 1, 2 * DEGREE + 5]


def new_key(plain_bits: int = BITS, additions: int = 16) -> SecretKey:
    """The key of the tests' seed."""
    return SecretKey(SEED, Parameters(plain_bits, additions))


KEY = new_key()
PARAMETERS = KEY.parameters
UPLOAD_CUT, SUM_CUT = 9, 12  # of 40 bits and 16 additions; "The bound" below says why
UPLOAD_BITS, SUM_BITS = MODULUS_BITS - UPLOAD_CUT, MODULUS_BITS - SUM_CUT
BLOCK_BYTES = PARAMETERS.block_bytes


def random_slots(count: int, bits: int = BITS, seed: int = 0) -> NDArray[np.uint64]:
    """Uniform slots below 2^bits."""
    return np.random.default_rng(seed).integers(0, 1 << bits, count, np.uint64)


def encrypted(slots: NDArray[np.uint64], key: SecretKey = KEY) -> bytes:
    """One ciphertext as it crosses the wire."""
    return bytes(key.encrypt([slots]))


def opened(key: SecretKey, wires: list[bytes], slots: int) -> NDArray[np.uint64]:
    """What the key holder reads in the server's sum of `wires`."""
    total = Sum(slots, key.parameters)
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
    assert len(wire) == PARAMETERS.upload_bytes(len(slots))
    assert np.array_equal(opened(KEY, [wire], len(slots)), slots)


def test_more_blocks_than_are_worked_on_at_a_time() -> None:
    """A vector of many internal batches."""
    slots = random_slots(70 * DEGREE + 1)
    assert np.array_equal(
        opened(KEY, [encrypted(slots)] * 2, len(slots)),
        slots * np.uint64(2) & np.uint64(2**BITS - 1),
    )


def test_only_the_last_chunk_may_end_inside_a_block() -> None:
    """Otherwise blocks would shift: the caller's mistake."""
    with pytest.raises(ValueError, match="last chunk"):
        KEY.encrypt([random_slots(5), random_slots(DEGREE)])


def test_slots_beyond_the_plaintext_modulus_are_refused() -> None:
    """A slot of 2^p would wrap in silence."""
    with pytest.raises(ValueError, match=r"2\^40"):
        KEY.encrypt([np.array([1, 1 << BITS], np.uint64)])


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


@given(st.integers(2, 48), st.integers(1, 10**5))
def test_cuts_keep_the_bound_and_are_the_largest_that_do(bits: int, additions: int) -> None:
    """n(21.5 + 2^(d-1)) + 2^(d'-1) + 1 < q / 2^(p+1), and not for a bit more; at most 40 bits."""
    assume(bits <= largest_plain_bits(additions))
    parameters = Parameters(bits, additions)
    d, last = parameters.upload_cut, parameters.sum_cut

    def holds(d: int, last: int) -> bool:
        once, each = (Fraction(1 << cut, 2) if cut else 0 for cut in (last, d))
        return additions * (Fraction(43, 2) + each) + once + 1 < Fraction(MODULUS, 2 ** (bits + 1))

    assert holds(d, last)
    assert d == 40 or not holds(d + 1, 0)
    assert last == 40 or not holds(d, last + 1)
    assert parameters.upload_bits == MODULUS_BITS - d
    assert parameters.sum_bits == MODULUS_BITS - last


@given(st.integers(0, 40), st.lists(st.integers(0, MODULUS - 1), max_size=20))
def test_a_cut_coefficient_fits_its_bits_and_is_off_by_half_a_step_at_most(
    cut: int, values: list[int]
) -> None:
    """Modulo q, those that round up to 2^54 included."""
    values += [0, MODULUS - 1, MODULUS - (1 << cut >> 1), (1 << cut >> 1)]
    exact = np.array([value % MODULUS for value in values], np.uint64)
    packed = pack(_cut(exact, cut), MODULUS_BITS - cut)
    read = _coefficients(packed, len(exact), cut)
    assert int(read.max()) < MODULUS
    for was, now in zip(exact.tolist(), read.tolist(), strict=True):
        assert min((was - now) % MODULUS, (now - was) % MODULUS) <= 1 << cut >> 1


@pytest.mark.parametrize(
    ("bits", "additions", "cuts"),
    [(40, 16, (9, 12)), (44, 16, (4, 6)), (36, 16, (13, 16)), (47, 2, (4, 2)), (38, 1524, (0, 0))],
)
def test_known_cuts(bits: int, additions: int, cuts: tuple[int, int]) -> None:
    """Computed by hand from the inequality."""
    parameters = Parameters(bits, additions)
    assert (parameters.upload_cut, parameters.sum_cut) == cuts


@pytest.mark.parametrize("additions", [2, 3, 16, 100, 1000])
@pytest.mark.parametrize("less", [0, 1, 4, 9, 20])
def test_cut_sums_are_exact_after_masks_come_off(additions: int, less: int) -> None:
    """As many uploads as were proven, a mask taken off, both cuts made: exact modulo 2^p."""
    bits, count = largest_plain_bits(additions) - less, 40
    key, top = new_key(bits, additions), np.uint64((1 << bits) - 1)
    vectors = [random_slots(count, bits, i) for i in range(min(additions, 16))]
    wires = [encrypted(vector, key) for vector in vectors]
    total, truth = Sum(count, key.parameters), np.zeros(count, np.uint64)
    for i in range(additions):
        total.add(wires[i % len(wires)])
        truth += vectors[i % len(wires)]
    mask = random_slots(count, bits, 99)
    mask[:3] = 0, 1, top
    total.subtract(mask)
    opened_slots = key.open(total.to_bytes(), count, additions)
    assert np.array_equal(opened_slots, (truth - mask) & top)


@given(st.integers(2, 47), st.data())
@settings(max_examples=200)
def test_subtract_takes_the_nearest_multiple_off(bits: int, data: st.DataObject) -> None:
    """Whatever is taken off, c0 moves by round(q * m / 2^p) modulo q: at most 1/2 from exact."""
    parameters = Parameters(bits, 2)
    value = st.integers(0, 2**bits - 1)
    edge = st.sampled_from([0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1])
    masks = data.draw(st.lists(value | edge, min_size=1, max_size=8))
    total = Sum(len(masks), parameters)
    total.subtract(np.array(masks, np.uint64))
    for found, m in zip(total._c0.tolist(), masks, strict=True):
        moved = -found % MODULUS
        assert abs(moved - Fraction(MODULUS * m, 2**bits)) <= Fraction(1, 2)


def test_subtract_refuses_what_is_no_plaintext() -> None:
    """Another length, or a slot of 2^p: the caller's mistake."""
    for mask in (np.zeros(4, np.uint64), np.full(5, 1 << BITS, np.uint64)):
        with pytest.raises(ValueError, match="take off 5 slots"):
            Sum(5, PARAMETERS).subtract(mask)


def test_a_sum_holds_no_more_than_was_proven() -> None:
    """One ciphertext more than the bound allows is refused, and the sum stays."""
    key = new_key(20, 2)
    total, wire = Sum(3, key.parameters), encrypted(random_slots(3, 20), key)
    total.add(wire)
    total.add(wire)
    with pytest.raises(ProtocolError, match="at most 2"):
        total.add(wire)
    assert total.contributions == 2


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
        Sum(0, PARAMETERS)


# Keys


def test_keys_from_one_seed_interoperate_and_others_do_not() -> None:
    """The seed is the key: equal seeds open each other's sums, unequal ones open noise."""
    slots = random_slots(100)
    wire = encrypted(slots, SecretKey(Seed(bytes(range(64))), Parameters(BITS, 16)))
    assert np.array_equal(opened(KEY, [wire], 100), slots)
    flipped = bytearray(range(64))
    flipped[63] ^= 1
    stranger = SecretKey(Seed(bytes(flipped)), Parameters(BITS, 16))
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
    """One seed a block and the bits that are left of each slot in use, and nothing else."""
    blocks = -(-slots // DEGREE)
    wire = encrypted(random_slots(slots))
    assert len(wire) == PARAMETERS.upload_bytes(slots)
    total = Sum(slots, PARAMETERS)
    for contributions in (1, 2, 3):
        total.add(wire)
        assert len(total.to_bytes()) == PARAMETERS.sum_bytes(slots, contributions)
        size = -(-SUM_BITS * slots // 8) + 64 * blocks * contributions
        assert PARAMETERS.sum_bytes(slots, contributions) == size
    whole, rest = divmod(slots, DEGREE)
    last = 64 + -(-UPLOAD_BITS * rest // 8)
    assert BLOCK_BYTES == 64 + 256 * UPLOAD_BITS
    assert PARAMETERS.upload_bytes(slots) == whole * BLOCK_BYTES + last * (rest > 0)


def test_the_last_block_ships_only_what_is_in_use() -> None:
    """One slot more than a block costs a seed and six bytes, not a block."""
    assert len(encrypted(random_slots(DEGREE + 1))) - len(encrypted(random_slots(DEGREE))) == 70


@pytest.mark.parametrize(("width", "most"), [(16, 3.0), (8, 2.0)])
def test_bytes_per_parameter_at_16_sites(width: int, most: float) -> None:
    """10^6 parameters: at most 3 or 2 bytes each in a whole Upload; a tenth costs at most 0.11x."""
    encoding = FixedPoint(bits=width, clip=1.0, cohort=16, slot_bits=largest_plain_bits(16))
    key = SecretKey(SEED, Parameters(encoding.plain_bits, 16))

    def upload(parameters: int) -> int:
        values = np.random.default_rng(0).normal(0, 0.3, parameters)
        payload = key.encrypt(encoding.encode(values, 1, Keystream(SEED, "rounding")))
        return len(Upload("a" * 64, bytes(32), bytes(payload), bytes(64)).to_bytes())

    dense, sparse = upload(1_000_000), upload(100_000)
    assert dense <= most * 1_000_000
    assert sparse <= 0.11 * dense


# What a peer may send


def with_coefficient(wire: bytes, slots: int, index: int, value: int) -> bytes:
    """`wire` (at most one block) with one coefficient of c0 replaced."""
    c0 = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), slots, UPLOAD_BITS)
    c0[index] = value
    return wire[:SEED_BYTES] + pack(c0, UPLOAD_BITS).tobytes()


def largest(cut: int) -> int:
    """The largest coefficient on the wire: q - 1 rounded to its high bits, or all of them set."""
    return min(round(Fraction(MODULUS - 1, 1 << cut)), (1 << (MODULUS_BITS - cut)) - 1)


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
    "coefficient q in the first block": with_coefficient(
        GOOD[:BLOCK_BYTES], DEGREE, 17, largest(UPLOAD_CUT) + 1
    )
    + GOOD[BLOCK_BYTES:],
    "coefficient of ones in the second block": GOOD[:BLOCK_BYTES]
    + with_coefficient(GOOD[BLOCK_BYTES : 2 * BLOCK_BYTES], DEGREE, 0, 2**UPLOAD_BITS - 1)
    + LAST,
    "coefficient q in the last block": GOOD[: 2 * BLOCK_BYTES]
    + with_coefficient(LAST, 5, 4, largest(UPLOAD_CUT) + 1),
    "spare bit set": GOOD[:-1] + bytes([GOOD[-1] | 0x80]),
    "first block all zero": GOOD[:SEED_BYTES]
    + bytes(BLOCK_BYTES - SEED_BYTES)
    + GOOD[BLOCK_BYTES:],
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
    good, total = encrypted(slots), Sum(SLOTS, PARAMETERS)
    for _ in range(before):
        total.add(good)
    earlier = total.to_bytes()
    with pytest.raises(MalformedMessageError):
        total.add(BROKEN[what])
    assert total.contributions == before
    assert total.to_bytes() == earlier
    total.add(good)
    truth = slots * np.uint64(before + 1) & np.uint64(2**BITS - 1)
    assert np.array_equal(KEY.open(total.to_bytes(), SLOTS, before + 1), truth)


def test_the_largest_coefficient_is_accepted_and_reduced() -> None:
    """q - 1, rounded, is a coefficient; sums are modulo q, and rounded when they leave."""
    wire = with_coefficient(encrypted(random_slots(5)), 5, 2, largest(UPLOAD_CUT))
    total = Sum(5, PARAMETERS)
    for _ in range(4):
        total.add(memoryview(wire))
    size = len(total.to_bytes()) - 4 * SEED_BYTES
    c0 = unpack(np.frombuffer(total.to_bytes()[:size], np.uint8), 5, SUM_BITS)
    own = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), 5, UPLOAD_BITS)
    exact = [4 * (int(value) << UPLOAD_CUT) % MODULUS for value in own]
    assert c0.tolist() == [(value + 2 ** (SUM_CUT - 1)) >> SUM_CUT for value in exact]


def coefficients(data: bytes, slots: int, bits: int, cut: int) -> list[int] | None:
    """The coefficients in `data`, or None where they are none: a second, plain parser."""
    number = int.from_bytes(data, "little")
    c0 = [number >> (bits * i) & (2**bits - 1) for i in range(slots)]
    return c0 if number < 1 << (bits * slots) and max(c0) <= largest(cut) else None


@given(st.data(), st.integers(1, 20), st.sampled_from([-1, 0, 0, 0, 1]))
def test_any_bytes_are_a_ciphertext_or_malformed(data: st.DataObject, slots: int, off: int) -> None:
    """Accepted exactly when the length is right and every coefficient below q is in its place."""
    size = PARAMETERS.upload_bytes(slots) + off
    wire = data.draw(st.binary(min_size=size, max_size=size))
    c0 = None if off else coefficients(wire[SEED_BYTES:], slots, UPLOAD_BITS, UPLOAD_CUT)
    total = Sum(slots, PARAMETERS)
    if c0 and any(c0):
        total.add(wire)
        exact = [(value << UPLOAD_CUT) % MODULUS for value in c0]
        rounded = np.array([(v + 2 ** (SUM_CUT - 1)) >> SUM_CUT for v in exact], np.uint64)
        assert total.to_bytes() == pack(rounded, SUM_BITS).tobytes() + wire[:SEED_BYTES]
    else:
        with pytest.raises(MalformedMessageError):
            total.add(wire)


@given(st.data(), st.integers(1, 20), st.sampled_from([-1, 0, 0, 0, 1]))
def test_any_bytes_are_a_sum_or_malformed(data: st.DataObject, slots: int, off: int) -> None:
    """Opened exactly when the length is right and every coefficient below q is in its place."""
    size = PARAMETERS.sum_bytes(slots, 1) + off
    wire = data.draw(st.binary(min_size=size, max_size=size))
    if off == 0 and coefficients(wire[:-SEED_BYTES], slots, SUM_BITS, SUM_CUT):
        assert len(KEY.open(wire, slots, 1)) == slots
    else:
        with pytest.raises(MalformedMessageError):
            KEY.open(wire, slots, 1)


TWICE = Sum(SLOTS, PARAMETERS)
TWICE.add(GOOD)
TWICE.add(GOOD)
OPENABLE = TWICE.to_bytes()
COEFFICIENTS = -(-SLOTS * SUM_BITS // 8)


def broken_sum(change: Callable[[NDArray[np.uint64]], None]) -> bytes:
    """The sum of two with changed coefficients."""
    c0 = unpack(np.frombuffer(OPENABLE[:COEFFICIENTS], np.uint8), SLOTS, SUM_BITS)
    change(c0)
    return pack(c0, SUM_BITS).tobytes() + OPENABLE[COEFFICIENTS:]


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        OPENABLE[:-1],
        OPENABLE + b"\0",
        OPENABLE[:-SEED_BYTES],
        OPENABLE + bytes(SEED_BYTES),
        GOOD,
        broken_sum(lambda c0: c0.__setitem__(0, largest(SUM_CUT) + 1)),
        broken_sum(lambda c0: c0.__setitem__(-1, 2**SUM_BITS - 1)),
        OPENABLE[: COEFFICIENTS - 1]
        + bytes([OPENABLE[COEFFICIENTS - 1] | 0x80])
        + OPENABLE[COEFFICIENTS:],
    ],
    ids=["empty", "short", "long", "seed less", "seed more", "upload", "q", "ones", "spare"],
)
def test_a_broken_sum_is_not_opened(wire: bytes) -> None:
    """Exact length, zero spare bits, every coefficient below q, before SEAL sees any of it."""
    with pytest.raises(MalformedMessageError):
        KEY.open(wire, SLOTS, 2)


@pytest.mark.parametrize("contributions", [-1, 0, 17, 10**6])
def test_sums_beyond_the_bound_are_not_opened(contributions: int) -> None:
    """More additions than were proven, or none, are refused whatever the bytes."""
    wire = bytes(max(0, PARAMETERS.sum_bytes(1, max(contributions, 0))))
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


def secret_of(seed: Seed) -> list[int]:
    """The secret polynomial, found by opening chosen sums: why an opener opens only once.

    A plaintext is round(2^38 * v / q) with v = c0 + c1 * s; raising c0 by up to one step of
    q / 2^38, just under 2^16, finds where each coefficient turns over, hence c1 * s, hence s.
    With these parameters nothing can be cut, so that c0 is heard to the last bit.
    """
    key, fixed = SecretKey(seed, Parameters(38, 1524)), bytes(range(100, 164))
    assert (key.parameters.upload_cut, key.parameters.sum_cut) == (0, 0)

    def read(c0: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return key.open(pack(c0, MODULUS_BITS).tobytes() + fixed, DEGREE, 1)

    start = read(np.zeros(DEGREE, np.uint64))
    low, high = np.zeros(DEGREE, np.uint64), np.full(DEGREE, 1 << 16, np.uint64)
    while (high - low).max() > 1:  # the reading at `high` has turned over, the one at `low` not
        middle = (low + high) // np.uint64(2)
        turned = read(middle) != start
        low, high = np.where(turned, low, middle), np.where(turned, middle, high)
    # The least v that rounds to m is ceil((2m - 1) * q / 2^(p + 1)).
    exact = [
        (-(-(2 * m + 1) * MODULUS // 2**39) - turn) % MODULUS
        for m, turn in zip(start.tolist(), high.tolist(), strict=True)
    ]
    pairs = zip(forwards(exact), forwards(expand(fixed)), strict=True)
    secret = backwards([v * pow(a, -1, MODULUS) % MODULUS for v, a in pairs])
    return [s - MODULUS if s > MODULUS // 2 else s for s in secret]


SECRET = secret_of(SEED)


@pytest.mark.parametrize(("bits", "additions"), [(44, 16), (40, 16), (30, 3)])
def test_an_independent_decryption_agrees_and_the_noise_is_within_its_bound(
    bits: int, additions: int
) -> None:
    """Pure Python reads an upload and a sum right, and finds the errors that the bound states."""
    assert set(SECRET) == {-1, 0, 1}, "the secret is ternary"
    key = new_key(bits, additions)  # one seed gives one secret under all parameters
    cut, sum_cut = key.parameters.upload_cut, key.parameters.sum_cut
    vectors = [random_slots(DEGREE, bits, i) for i in range(3)]
    total, rotated = Sum(DEGREE, key.parameters), [0] * DEGREE
    each = Fraction(43, 2) + Fraction(1 << cut, 2)
    for vector in vectors:
        wire = encrypted(vector, key)
        total.add(wire)
        c0 = unpack(np.frombuffer(wire[SEED_BYTES:], np.uint8), DEGREE, MODULUS_BITS - cut)
        c1 = product(expand(wire[:SEED_BYTES]), SECRET)
        rotated = [(a + b) % MODULUS for a, b in zip(rotated, c1, strict=True)]
        read_and_bound([v << cut for v in c0.tolist()], c1, vector.tolist(), bits, each)
    truth = [sum(map(int, column)) % 2**bits for column in zip(*vectors, strict=True)]
    sent = np.frombuffer(total.to_bytes()[: -3 * SEED_BYTES], np.uint8)
    c0 = unpack(sent, DEGREE, MODULUS_BITS - sum_cut)
    once = Fraction(1 << sum_cut, 2)
    read_and_bound([v << sum_cut for v in c0.tolist()], rotated, truth, bits, 3 * each + once)
    assert key.open(total.to_bytes(), DEGREE, 3).tolist() == truth


@pytest.mark.parametrize(("bits", "additions"), [(47, 2), (44, 16), (40, 16), (33, 3), (36, 1000)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_worst_sum_that_the_bound_allows_opens_right(
    bits: int, additions: int, sign: int
) -> None:
    """Every fresh error, every rounding and both cuts at their extreme, in every slot."""
    key = new_key(bits, additions)
    cut, sum_cut = key.parameters.upload_cut, key.parameters.sum_cut
    worst = additions * (Fraction(43, 2) + (Fraction(1 << cut, 2) if cut else 0)) + 1
    worst += Fraction(1 << sum_cut, 2) if sum_cut else 0
    plain, seed = random_slots(DEGREE, bits), bytes(range(64))
    rotated = product(expand(seed), SECRET)
    step = 1 << sum_cut
    c0, slack = [], []
    for m, turned in zip(plain.tolist(), rotated, strict=True):
        ideal = (Fraction(MODULUS * m, 2**bits) - turned) % MODULUS
        value = (ideal + sign * worst) / step  # the last multiple of a step within the worst error
        whole = value.numerator // value.denominator if sign > 0 else -(-value // 1)
        whole %= largest(sum_cut) + 1
        c0.append(int(whole))
        slack.append(worst - abs((whole * step - ideal + MODULUS // 2) % MODULUS - MODULUS // 2))
    assert min(slack) < max(4, step // 100), "some slot has all but the worst error"
    wire = pack(np.array(c0, np.uint64), MODULUS_BITS - sum_cut).tobytes() + seed
    assert np.array_equal(key.open(wire, DEGREE, 1), plain)


def read_and_bound(
    c0: list[int], rotated: list[int], plain: list[int], bits: int, most: Fraction
) -> None:
    """c0 + c1 * s rounds to `plain`, and lies within `most` of its multiple of q / 2^p."""
    phase = [(a + b) % MODULUS for a, b in zip(c0, rotated, strict=True)]
    assert [((v << (bits + 1)) + MODULUS) // (2 * MODULUS) % 2**bits for v in phase] == plain
    errors = [
        Fraction(v * 2**bits - MODULUS * m, 2**bits) for v, m in zip(phase, plain, strict=True)
    ]
    centred = [min(abs(e), MODULUS - abs(e)) for e in errors]
    assert max(centred) <= most
    assert max(centred) > 5, "fresh noise of standard deviation 3.2 is there"
