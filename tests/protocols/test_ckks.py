"""CKKS: flooded before it is decoded, exact all the same, and nothing unchecked reaches SEAL."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols import ckks, ckks_sum, plain
from protocols.bitpacking import pack
from protocols.ckks import (
    BLOCK_SLOTS,
    DEGREE,
    MOST_PLAIN_BITS,
    PRIME_BITS,
    PRIMES,
    SCALE,
    SEED_BYTES,
    Parameters,
    SecretKey,
    Sum,
    _packed,
    _residues,
)
from protocols.encoding import FixedPoint
from protocols.errors import MalformedMessageError, ProtocolError, RefusedError
from protocols.keystream import Keystream, Seed

SEED = Seed(bytes(range(64)))
BITS = 20
FIRST = slice(SEED_BYTES, SEED_BYTES + DEGREE * PRIME_BITS[0] // 8)


def new_key(slots: int, additions: int = 16, bits: int = BITS, seed: Seed = SEED) -> SecretKey:
    """A key of the tests' seed."""
    return SecretKey(seed, Parameters(bits, additions, slots))


def random_slots(count: int, bits: int = BITS, seed: int = 0) -> NDArray[np.uint64]:
    """Uniform slots below 2^bits."""
    return np.random.default_rng(seed).integers(0, 1 << bits, count, np.uint64)


def total_of(wires: list[bytes], parameters: Parameters) -> bytes:
    """The server's sum."""
    total = Sum(parameters)
    for wire in wires:
        total.add(wire)
    assert total.contributions == len(wires)
    return total.to_bytes()


@pytest.fixture(scope="module")
def small_wire() -> bytes:
    """One ciphertext of ten slots."""
    return bytes(new_key(10).encrypt([random_slots(10)]))


# Exactness: the error beside a sum in clear is none


@pytest.mark.parametrize("bits", [2, BITS, 32])
@pytest.mark.parametrize("slots", [1, BLOCK_SLOTS - 1, BLOCK_SLOTS, BLOCK_SLOTS + 1, 9000])
def test_sums_are_exact_modulo_the_plaintext_modulus(bits: int, slots: int) -> None:
    """Flooded, decoded and rounded: the sum of any slots, bit for bit."""
    key = new_key(slots, bits=bits)
    vectors = [random_slots(slots, bits, i) for i in range(5)]
    wires = [bytes(key.encrypt([vector])) for vector in vectors]
    truth = sum(vectors[1:], vectors[0].copy()) & np.uint64((1 << bits) - 1)
    assert np.array_equal(key.open(total_of(wires, key.parameters), slots, 5), truth)


def test_the_largest_slots_sum_exactly_in_the_worst_signs() -> None:
    """At p = 37 and as much as the precondition allows, in all slots alike and alternating."""
    bits, n = MOST_PLAIN_BITS, 4
    most = (1 << (bits - 1)) // n
    for signs in (np.ones(BLOCK_SLOTS, np.int64), np.resize([1, -1], BLOCK_SLOTS)):
        key = new_key(BLOCK_SLOTS, n, bits)
        slots = (most * signs).view(np.uint64) & np.uint64((1 << bits) - 1)
        wires = [bytes(key.encrypt([slots])) for _ in range(n)]
        opened = key.open(total_of(wires, key.parameters), BLOCK_SLOTS, n)
        assert np.array_equal(opened, (n * slots) & np.uint64((1 << bits) - 1))


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_a_round_is_the_round_in_clear_bit_for_bit(data: st.DataObject) -> None:
    """Real rounds with dropouts and weights: the mean of plain, no more and no less."""
    count, length = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5000))
    sites = "abcd"[:count]
    weights = data.draw(st.none() | st.just({site: i + 1 for i, site in enumerate("abcd")}))
    gone = data.draw(st.sampled_from([{}, {"b": "upload"}, {"a": "share"}])) if count > 2 else {}
    values = np.random.default_rng(length).normal(0, 0.7, (count, length))
    vectors = dict(zip(sites, values, strict=True))
    chosen = data.draw(st.integers(4, 24))

    def mean(protocol: Any) -> NDArray[np.float64]:
        encoding = FixedPoint(
            chosen, 1.0, count, ckks_sum.slot_bits(count), 4, weight_slot=weights is not None
        )
        same = Keystream(SEED, "every draw alike")
        drawn = same.bytes(64)
        dropouts = dict.fromkeys(gone, "upload") if protocol is plain else gone
        result = protocol.run(vectors, encoding, weights, dropouts, lambda size: drawn[:size])
        found: NDArray[np.float64] = result.mean
        return found

    assert np.array_equal(mean(ckks_sum), mean(plain))


@pytest.mark.parametrize("seed", range(3))
def test_doubles_lose_no_more_than_the_bound_says(seed: int) -> None:
    """The encoder's polynomial beside the same transform in extended precision, in l2 norm."""
    key, plain_text = new_key(BLOCK_SLOTS), ckks.seal.Plaintext()
    values = np.random.default_rng(seed).integers(-(2**36), 2**36, BLOCK_SLOTS).astype(float)
    scale = 2.0**30  # so that coefficients fit one word of 64 bits; errors are relative
    key._encoder.encode(values.tolist(), scale, plain_text)
    decoded = np.array(key._encoder.decode_double(plain_text))
    error = np.linalg.norm(decoded - values) / np.linalg.norm(values)
    assert error < 2 * ckks._DOUBLE
    assert error > 0, "doubles are not exact here, or nothing was measured"


# Flooding


def noise_of(key: SecretKey, blocks: int, label: str) -> NDArray[np.float64]:
    """The polynomials that flooding adds, from flooded slots of the key's own ciphertexts."""
    found, plain_text = [], ckks.seal.Plaintext()
    stream = Keystream(SEED, "test flooding", label.encode())
    for _ in range(blocks):
        key._encoder.encode([0.0], SCALE, plain_text)
        total = ckks.seal.Ciphertext()
        key._memory.saved(key._encryptor.encrypt_symmetric(plain_text))
        total.load(key._context, key._memory.path)
        key._flood(total, stream)
        key._decryptor.decrypt(total, plain_text)
        slots = np.array(key._encoder.decode_complex(plain_text)) * SCALE
        found.append(slots)
    return np.array(found)


def coefficients(slots: NDArray[np.complex128]) -> NDArray[np.float64]:
    """The N coefficients of polynomials from their N / 2 slots: the inverse embedding."""
    powers = np.ones(BLOCK_SLOTS, np.int64)
    for i in range(1, BLOCK_SLOTS):
        powers[i] = powers[i - 1] * 3 % (2 * DEGREE)
    # values at zeta^(2k+1), k = 0..N-1, zeta = exp(i pi / N): an FFT of the twisted coefficients
    values = np.zeros((len(slots), DEGREE), np.complex128)
    values[:, (powers - 1) // 2] = slots
    values[:, (2 * DEGREE - powers - 1) // 2] = slots.conj()
    twisted = np.fft.fft(values, axis=1) / DEGREE
    untwist = np.exp(-1j * np.pi * np.arange(DEGREE) / DEGREE)
    result = twisted * untwist
    assert abs(result.imag).max() < 1e-6 * abs(result.real).max()
    real: NDArray[np.float64] = result.real
    return real


def test_opened_coefficients_carry_noise_of_the_stated_deviation() -> None:
    """Measured in SEAL's decryption: mean, deviation and independence of 81,920 coefficients."""
    key = new_key(100_000)
    noise = coefficients(noise_of(key, 10, "deviation")) / key.parameters.deviation
    count = noise.size
    assert abs(noise.mean()) < 6 / math.sqrt(count)
    assert abs(noise.std() - 1) < 6 / math.sqrt(2 * count)
    assert abs((noise**4).mean() - 3) < 6 * math.sqrt(96 / count)
    for lag in (1, 2, BLOCK_SLOTS):
        assert abs((noise * np.roll(noise, lag, axis=1)).mean()) < 6 / math.sqrt(count)


def test_without_flooding_coefficients_are_far_below_the_stated_deviation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the test above measures is the flooding: take it out, and only the error is left."""
    monkeypatch.setattr(SecretKey, "_flood", lambda *_: None)
    key = new_key(100_000)
    error = coefficients(noise_of(key, 4, "none"))
    assert 2 < error.std() < 5, "a fresh error has deviation sqrt(10.5)"
    assert key.parameters.deviation > 2**48


def test_errors_of_sums_stay_below_the_norm_that_flooding_covers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 16 additions, each block: near sqrt(10.5 n N), below t."""
    monkeypatch.setattr(SecretKey, "_flood", lambda *_: None)
    key = new_key(100)
    fresh = coefficients(noise_of(key, 64, "errors"))
    norms = np.linalg.norm(fresh.reshape(4, 16, DEGREE).sum(axis=1), axis=1)
    usual = math.sqrt(10.5 * 16 * DEGREE)
    assert (abs(norms / usual - 1) < 0.05).all()
    assert (norms < key.parameters.error_norm).all()
    assert key.parameters.error_norm < 1.2 * usual


@given(st.integers(2, 37), st.integers(1, 200), st.integers(1, 10**7))
def test_flooding_is_the_formula_of_the_theorem(bits: int, additions: int, slots: int) -> None:
    """sigma = sqrt(12 tau) 2^(s/2) t, s >= 30, and noise beyond 1/2 less likely than 2^-64."""
    p = Parameters(bits, additions, slots)
    assert p.decryptions == -(-slots // BLOCK_SLOTS) * additions
    s = p.flooding_bits
    assert s >= 30
    sigma = math.sqrt(12 * p.decryptions) * 2 ** (s / 2) * p.error_norm
    assert math.isclose(sigma, p.deviation, rel_tol=1e-9)
    tail = (SCALE / 2 - p._slack) / (sigma * math.sqrt(BLOCK_SLOTS))
    assert 2 * slots * additions * math.exp(-(tail**2) / 2) <= 2**-64 * (1 + 1e-9)
    assert p._slack < SCALE / 4


def test_a_million_parameters_of_tens_of_sites_are_flooded_at_sixty_bits() -> None:
    """The design's figures."""
    assert Parameters(20, 16, 10**6).flooding_bits > 62
    assert Parameters(21, 30, 10**6).flooding_bits > 60
    assert Parameters(MOST_PLAIN_BITS, 100, 10**7).flooding_bits > 52


def test_parameters_with_too_little_room_are_refused_with_the_mend() -> None:
    """Below 30 bits nothing is opened."""
    with pytest.raises(ValueError, match="below 30: use a smaller model, fewer sites"):
        Parameters(20, 1000, 10**14)
    for bits in (1, MOST_PLAIN_BITS + 1):
        with pytest.raises(ValueError, match="use 2 to 37"):
            Parameters(bits, 2, 1)
    for additions, slots in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="use at least 1"):
            Parameters(20, additions, slots)


def test_one_sum_is_flooded_alike_and_another_one_otherwise() -> None:
    """Averaging over openers takes no noise away; a changed sum has fresh noise."""
    drawn: list[bytes] = []

    def watch(key: SecretKey, total: Any, noise: Keystream) -> None:
        drawn.append(noise.bytes(64))

    keys = [new_key(10) for _ in range(4)]
    wire = bytes(keys[0].encrypt([random_slots(10)]))
    other = bytes(keys[0].encrypt([random_slots(10)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecretKey, "_flood", watch)
        for key, sent in zip(keys, (wire, wire, other, wire), strict=True):
            key.open(total_of([sent], key.parameters), 10, 1)
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]


# What a key does, and does not


def test_a_key_opens_one_sum() -> None:
    """A second opening is refused, of the same sum too; a malformed one does not count."""
    key = new_key(10)
    wire = total_of([bytes(key.encrypt([random_slots(10)]))], key.parameters)
    with pytest.raises(MalformedMessageError):
        key.open(wire[:-1], 10, 1)
    key.open(wire, 10, 1)
    with pytest.raises(RefusedError, match="has opened its sum"):
        key.open(wire, 10, 1)


def test_the_only_way_to_decrypt_floods_and_rounds() -> None:
    """No public name of the module decrypts but `open`, which gives integers."""
    public = {name for name in dir(SecretKey) if not name.startswith("_")}
    assert public == {"encrypt", "open", "parameters"}
    assert not [name for name in dir(Sum) if "open" in name or "decrypt" in name]
    key = new_key(10)
    opened = key.open(total_of([bytes(key.encrypt([random_slots(10)]))], key.parameters), 10, 1)
    assert opened.dtype == np.uint64
    assert int(opened.max()) < 1 << BITS


def test_a_secret_key_is_never_shown_nor_serialised() -> None:
    """Redacted repr; no pickle, no copy, no bytes."""
    key = new_key(10)
    assert "<secret>" in repr(key)
    assert bytes(range(64)).hex()[:16] not in repr(key)
    assert not hasattr(key, "to_bytes")
    assert not hasattr(key, "__dict__")
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        copy.deepcopy(key)


def test_keys_from_one_seed_interoperate_and_others_do_not() -> None:
    """The seed is the key."""
    slots = random_slots(1000)
    wire = total_of([bytes(new_key(1000).encrypt([slots]))], Parameters(BITS, 16, 1000))
    assert np.array_equal(new_key(1000).open(wire, 1000, 1), slots)
    stranger = new_key(1000, seed=Seed(bytes(64)))
    assert np.count_nonzero(stranger.open(wire, 1000, 1) == slots) < 10


def test_what_is_not_as_agreed_is_the_callers_mistake() -> None:
    """Another length, a slot of 2^p, a chunk that ends inside a block."""
    key = new_key(5000)
    for chunks, what in (
        ([random_slots(4999)], "4999 slots"),
        ([random_slots(4999), random_slots(1)], "last chunk"),
        ([np.full(5000, 1 << BITS, np.uint64)], r"2\^20"),
    ):
        with pytest.raises(ValueError, match=what):
            key.encrypt(chunks)
    with pytest.raises(ValueError, match="4999 slots"):
        key.open(b"", 4999, 1)


def test_chunks_encrypt_like_the_whole_vector() -> None:
    """Chunks of whole blocks, an empty one among them, then a partial last one."""
    slots = random_slots(3 * BLOCK_SLOTS + 5)
    key = new_key(len(slots))
    cuts = np.split(slots, [BLOCK_SLOTS, BLOCK_SLOTS, 3 * BLOCK_SLOTS])
    wire = total_of([bytes(key.encrypt(iter(cuts)))], key.parameters)
    assert np.array_equal(key.open(wire, len(slots), 1), slots)


# Bytes on the wire


@pytest.mark.parametrize("slots", [1, BLOCK_SLOTS, BLOCK_SLOTS + 1])
def test_sizes_on_the_wire_are_the_stated_ones(slots: int) -> None:
    """A seed and 100 bits a coefficient in every block: 25 bytes a slot and nothing else."""
    key, blocks = new_key(slots), -(-slots // BLOCK_SLOTS)
    wire = bytes(key.encrypt([random_slots(slots)]))
    assert len(wire) == key.parameters.upload_bytes == blocks * (64 + DEGREE * 100 // 8)
    for n in (1, 3):
        assert len(total_of([wire] * n, key.parameters)) == key.parameters.sum_bytes(n)
        assert key.parameters.sum_bytes(n) == blocks * (DEGREE * 100 // 8 + 64 * n)


def test_residues_round_trip_and_the_first_refused_one_is_the_prime() -> None:
    """For both primes: q - 1 is read, q is refused."""
    for prime in range(len(PRIMES)):
        residues = np.zeros((len(PRIMES), DEGREE), np.uint64)
        residues[prime, 77] = PRIMES[prime] - 1
        packed = np.frombuffer(_packed(residues), np.uint8).reshape(1, -1)
        assert np.array_equal(_residues(packed)[0], residues)
        residues[prime, 77] += 1
        packed = np.frombuffer(_packed(residues), np.uint8).reshape(1, -1)
        with pytest.raises(MalformedMessageError, match="block 0 has a residue"):
            _residues(packed)


def with_prime(wire: bytes) -> bytes:
    """Its first prime's first residues replaced by the prime itself."""
    row = np.full(DEGREE, PRIMES[0], np.uint64)
    return wire[: FIRST.start] + pack(row, PRIME_BITS[0]).tobytes() + wire[FIRST.stop :]


@pytest.mark.parametrize(
    ("forge", "what"),
    [
        (lambda wire: b"", "bytes, not 0"),
        (lambda wire: wire[:-1], "bytes, not"),
        (lambda wire: wire + b"\0", "bytes, not"),
        (lambda wire: wire * 2, "bytes, not"),
        (with_prime, "not below its prime"),
        (lambda wire: wire[:64] + bytes(len(wire) - 64), "all zero"),
        (lambda wire: b"\xff" * len(wire), "not below its prime"),
    ],
    ids=["empty", "cut", "trailing", "twice", "prime", "zero", "ones"],
)
def test_malformed_ciphertexts_are_refused_and_leave_the_sum(
    small_wire: bytes, forge: Callable[[bytes], bytes], what: str
) -> None:
    """Before anything is added."""
    total = Sum(Parameters(BITS, 16, 10))
    total.add(small_wire)
    before = total.to_bytes()
    with pytest.raises(MalformedMessageError, match=what):
        total.add(forge(small_wire))
    assert total.to_bytes() == before


@pytest.mark.parametrize(
    ("forge", "contributions", "error"),
    [
        (lambda wire: wire[:-1], 1, MalformedMessageError),
        (lambda wire: wire + b"\0", 1, MalformedMessageError),
        (lambda wire: wire, 2, MalformedMessageError),
        (lambda wire: b"\xff" * len(wire), 1, MalformedMessageError),
        (lambda wire: wire, 0, ProtocolError),
        (lambda wire: wire + bytes(64 * 16), 17, ProtocolError),
    ],
    ids=["cut", "trailing", "seed missing", "ones", "nobody", "too many"],
)
def test_malformed_sums_are_not_opened(
    small_wire: bytes, forge: Callable[[bytes], bytes], contributions: int, error: type[Exception]
) -> None:
    """Parsed and checked here, before SEAL sees a byte."""
    key = new_key(10)
    with pytest.raises(error) as caught:
        key.open(forge(total_of([small_wire], key.parameters)), 10, contributions)
    assert caught.type is error


def test_a_sum_holds_no_more_than_was_stated(small_wire: bytes) -> None:
    """One ciphertext more than the flooding counts is refused."""
    total = Sum(Parameters(BITS, 1, 10))
    total.add(small_wire)
    with pytest.raises(ProtocolError, match="at most 1"):
        total.add(small_wire)


def test_encryption_is_randomised() -> None:
    """The same vector twice gives unrelated ciphertexts, in every block."""
    key = new_key(2 * BLOCK_SLOTS)
    zeros = np.zeros(2 * BLOCK_SLOTS, np.uint64)
    rows = [
        row
        for _ in range(2)
        for row in np.frombuffer(bytes(key.encrypt([zeros])), np.uint8).reshape(2, -1)
    ]
    assert len({row[:SEED_BYTES].tobytes() for row in rows}) == 4, "a seed of c1 is used once"
    for row in rows[1:]:
        differing = int(np.unpackbits(rows[0] ^ row).sum())
        assert abs(differing - 4 * len(row)) < 6 * math.sqrt(2 * len(row))
