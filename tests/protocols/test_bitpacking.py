"""Bit packing: gapless, least significant bit first, one packed form for every sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import bitpacking
from protocols.bitpacking import pack, packed_size, unpack


def as_one_integer(values: list[int], bits: int) -> bytes:
    """The oracle: the sequence as one little-endian integer."""
    number = sum(value << (i * bits) for i, value in enumerate(values))
    return number.to_bytes(-(-len(values) * bits // 8), "little")


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], int]:
    """Integers of one width."""
    bits = draw(st.integers(1, 64))
    value = st.one_of(st.integers(0, (1 << bits) - 1), st.sampled_from([0, (1 << bits) - 1]))
    return draw(st.lists(value, max_size=40)), bits


@given(sequences())
def test_packing_is_one_little_endian_integer_and_unpacking_its_inverse(
    case: tuple[list[int], int],
) -> None:
    """pack is gapless, lowest bit first; unpack(pack(x)) == x."""
    values, bits = case
    packed = pack(np.array(values, np.uint64), bits)
    assert packed.dtype == np.uint8
    assert len(packed) == packed_size(len(values), bits)
    assert packed.tobytes() == as_one_integer(values, bits)
    assert unpack(packed, len(values), bits).tolist() == values


@given(st.binary(max_size=60), st.integers(0, 70), st.integers(1, 64))
def test_any_bytes_are_one_sequence_or_refused(data: bytes, count: int, bits: int) -> None:
    """What is accepted packs back to the same bytes; everything else is a ValueError."""
    try:
        values = unpack(np.frombuffer(data, np.uint8), count, bits)
    except ValueError:
        number = int.from_bytes(data, "little")
        assert len(data) != packed_size(count, bits) or number >> (count * bits)
        return
    assert pack(values, bits).tobytes() == data


@pytest.mark.parametrize("bits", [1, 7, 8, 33, 54, 63, 64])
@pytest.mark.parametrize("off", [-1, 0, 1, 9])
def test_chunk_boundaries_lose_nothing(bits: int, off: int) -> None:
    """Sequences that end one value before, on, and after the end of an internal chunk."""
    count = bitpacking._CHUNK + off
    values = np.random.default_rng(bits).integers(0, 1 << bits, count, np.uint64, endpoint=False)
    packed = pack(values, bits)
    assert len(packed) == packed_size(count, bits)
    assert np.array_equal(unpack(packed, count, bits), values)
    lowest = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)[:, 0]
    assert np.array_equal(lowest, values & np.uint64(1))


@pytest.mark.parametrize("bits", [0, 65, -1])
def test_widths_outside_a_word_are_refused(bits: int) -> None:
    """The message names the width."""
    with pytest.raises(ValueError, match=rf"bits = {bits}"):
        pack(np.zeros(1, np.uint64), bits)
    with pytest.raises(ValueError, match=rf"bits = {bits}"):
        unpack(np.zeros(1, np.uint8), 1, bits)


@pytest.mark.parametrize("spare_bit", range(2, 8))
def test_every_spare_bit_must_be_zero(spare_bit: int) -> None:
    """One sequence has one packed form, so a message has one encoding."""
    data = pack(np.array([0x3FF], np.uint64), 10)
    data[-1] |= 1 << spare_bit
    with pytest.raises(ValueError, match="spare"):
        unpack(data, 1, 10)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_the_length_must_be_exact(size: int) -> None:
    """Too short and too long are refused alike."""
    with pytest.raises(ValueError, match=f"{size} bytes for 2 values of 8 bits"):
        unpack(np.zeros(size, np.uint8), 2, 8)


def test_packing_does_not_change_its_input() -> None:
    """The caller's slots are left as they were, and read-only input is fine."""
    values = np.arange(100, dtype=np.uint64)
    values.flags.writeable = False
    assert np.array_equal(unpack(pack(values, 11), 100, 11), np.arange(100))
