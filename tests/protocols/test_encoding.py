"""FixedPoint: sums of encoded vectors are exact, unbiased, and never wrap."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocols.encoding import CHUNK_SLOTS, FixedPoint, Integers
from protocols.errors import ProtocolError
from protocols.keystream import Keystream, Seed


def rounding(number: int = 0) -> Keystream:
    """The rounding stream of site `number`."""
    return Keystream(Seed(number.to_bytes(32, "big")), "rounding")


def encoded(encoding: FixedPoint, values: object, weight: int = 1, site: int = 0) -> list[int]:
    """Every slot of one encoded vector, as Python integers."""
    array = np.asarray(values, np.float64)
    chunks = list(encoding.encode(array, weight, rounding(site)))
    return [int(slot) for chunk in chunks for slot in chunk]


def fields_of(encoding: FixedPoint, slots: Iterable[int], length: int) -> list[int]:
    """The signed fields of value slots: an oracle in Python integers, by the module's docstring."""
    fields: list[int] = []
    width = encoding.field_bits
    for slot in slots:
        rest = slot
        for _ in range(encoding.fields):
            low = rest % (1 << width)
            value = low - (1 << width) if low >> (width - 1) else low
            fields.append(value)
            rest = (rest - value) >> width
    return fields[:length]


def added(encoding: FixedPoint, vectors: Iterable[list[int]]) -> list[int]:
    """The slot-wise sum modulo 2^p."""
    return [sum(column) % (1 << encoding.plain_bits) for column in zip(*vectors, strict=True)]


@st.composite
def encodings(draw: st.DrawFn, max_bits: int = 24) -> FixedPoint:
    """Any encoding that its constructor accepts."""
    cohort = draw(st.one_of(st.integers(1, 12), st.integers(1, 1000)))
    bits = draw(st.integers(2, max_bits))
    needed = (cohort * ((1 << (bits - 1)) - 1)).bit_length() + 1
    assume(needed <= 63)
    slot_bits = draw(st.integers(needed, 63))
    weight_slot = draw(st.booleans())
    room = ((1 << (slot_bits // needed * needed)) - 1) // cohort
    cap = draw(st.integers(1, min(10**6, room) if weight_slot else 10**6))
    clip = draw(st.floats(1e-6, 1e6, allow_subnormal=False))
    return FixedPoint(bits, clip, cohort, slot_bits, cap, weight_slot)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[FixedPoint, list[tuple[list[float], int]]]:
    """An encoding, and at most `cohort` contributions (values, weight) to one sum."""
    encoding = draw(encodings())
    edge = 3 * encoding.fields + 1
    length = draw(st.one_of(st.integers(0, edge), st.sampled_from([encoding.fields, edge - 1])))
    count = draw(st.integers(1, min(encoding.cohort, 6)))
    value = st.one_of(
        st.floats(-2 * encoding.clip, 2 * encoding.clip),
        st.sampled_from([-encoding.clip, 0.0, encoding.clip]),
    )
    vector = st.lists(value, min_size=length, max_size=length)
    weight = st.integers(0, encoding.weight_cap)
    return encoding, draw(
        st.lists(st.tuples(vector, weight), min_size=count, max_size=count),
    )


@given(cohorts())
def test_decoded_sum_is_the_exact_sum_of_the_rounded_integers(
    case: tuple[FixedPoint, list[tuple[list[float], int]]],
) -> None:
    """For any n, bits, clip, weights and dimension: integer-exact sums, and their plain mean."""
    encoding, contributions = case
    length, head = len(contributions[0][0]), encoding.header_slots
    vectors = [encoded(encoding, v, w, i) for i, (v, w) in enumerate(contributions)]
    assert all(len(vector) == encoding.slots(length) for vector in vectors)
    assert all(0 <= slot < 1 << encoding.plain_bits for vector in vectors for slot in vector)
    integers = [fields_of(encoding, vector[head:], length) for vector in vectors]

    for (values, weight), rounded in zip(contributions, integers, strict=True):
        for value, integer in zip(values, rounded, strict=True):
            clipped = min(max(value, -encoding.clip), encoding.clip)
            exact = clipped / encoding.clip * encoding.levels * weight / encoding.weight_cap
            assert abs(integer - exact) < 1 + 1e-9
            assert abs(integer) <= encoding.levels

    total = added(encoding, vectors)
    sums = [sum(column) for column in zip(*integers, strict=True)] if length else []
    assert fields_of(encoding, total[head:], length) == sums
    assert encoding.unpack(np.array(total[head:], np.uint64), length).tolist() == sums

    names = tuple(f"site{i}" for i in range(len(vectors)))
    weights = [weight for _, weight in contributions]
    assert total[0] == len(vectors)
    if encoding.weight_slot:
        assert total[1] == sum(weights)
    if sum(weights) == 0:
        with pytest.raises(ProtocolError, match="weigh"):
            encoding.decode(np.array(total, np.uint64), length, names, sum(weights))
        return
    result = encoding.decode(
        np.array(total, np.uint64), length, names, None if encoding.weight_slot else sum(weights)
    )
    unit = encoding.clip * encoding.weight_cap / (encoding.levels * sum(weights))
    assert result.contributors == names
    assert result.total_weight == sum(weights)
    assert result.mean.dtype == np.float64
    assert np.array_equal(result.mean, np.array(sums, np.float64) * unit)


@given(encodings(), st.sampled_from([-1.0, 1.0, None]))
def test_extreme_vectors_of_the_whole_cohort_never_wrap(
    encoding: FixedPoint, side: float | None
) -> None:
    """All n sites at +clip, all at -clip, or neighbours in a slot at opposite ends."""
    length = 2 * encoding.fields
    signs = np.where(np.arange(length) % 2, 1.0, -1.0) if side is None else np.full(length, side)
    vector = encoded(encoding, signs * encoding.clip, encoding.weight_cap)
    total = [slot * encoding.cohort % (1 << encoding.plain_bits) for slot in vector]
    expected = [int(sign) * encoding.levels * encoding.cohort for sign in signs]
    assert fields_of(encoding, total[encoding.header_slots :], length) == expected
    names = tuple(f"site{i:04}" for i in range(encoding.cohort))
    weight = encoding.cohort * encoding.weight_cap
    mean = encoding.decode(np.array(total, np.uint64), length, names, weight).mean
    assert np.allclose(mean, signs * encoding.clip, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [1, 3])
def test_rounding_is_unbiased(weight: int) -> None:
    """The mean of many roundings lies within five standard errors of the value."""
    encoding = FixedPoint(bits=4, clip=1.0, cohort=1, slot_bits=60, weight_cap=3)
    count = 200_000
    for number, value in enumerate((0.1, -0.1, 1 / 3, -0.77, 0.999)):
        chunks = encoding.encode(np.full(count, value), weight, rounding(number))
        slots = np.concatenate(list(chunks))[encoding.header_slots :]
        exact = value * encoding.levels * weight / encoding.weight_cap
        # A rounding up with probability f has variance f(1 - f) <= 1/4.
        error = encoding.unpack(slots, count).mean() - exact
        assert abs(error) < 5 * 0.5 / np.sqrt(count)


def test_roundings_of_one_value_are_independent() -> None:
    """Neighbouring coordinates do not share their rounding: lag-one correlation is noise."""
    encoding = FixedPoint(bits=4, clip=1.0, cohort=1, slot_bits=60)
    count = 100_000
    slots = np.concatenate(list(encoding.encode(np.full(count, 0.5 / 7), 1, rounding())))[1:]
    ups = encoding.unpack(slots, count) - 0.5
    assert abs(np.mean(ups[1:] * ups[:-1])) < 5 * 0.25 / np.sqrt(count)


def test_the_same_stream_rounds_alike_and_another_does_not() -> None:
    """Rounding depends on the keystream alone, so that it can be reproduced in tests."""
    encoding = FixedPoint(bits=8, clip=1.0, cohort=2, slot_bits=40)
    values = np.linspace(-1, 1, 501)
    assert encoded(encoding, values, site=1) == encoded(encoding, values, site=1)
    assert encoded(encoding, values, site=1) != encoded(encoding, values, site=2)


@pytest.mark.parametrize(
    "values", [[0.25, -0.5, 1.0], np.array([0.25, -0.5, 1.0], np.float32)], ids=["f64", "f32"]
)
def test_grid_values_are_encoded_exactly(values: object) -> None:
    """A value on the grid has nothing to round: float32 and float64 give the same integers."""
    encoding = FixedPoint(bits=2, clip=1.0, cohort=1, slot_bits=60)
    slots = encoded(encoding, np.sign(np.asarray(values)))
    assert fields_of(encoding, slots[1:], 3) == [1, -1, 1]


@given(
    st.integers(-1, 26),
    st.integers(-1, 5000),
    st.integers(-1, 66),
    st.integers(-1, 2**40),
    st.booleans(),
)
def test_constructor_accepts_exactly_what_cannot_wrap(
    bits: int, cohort: int, slot_bits: int, cap: int, weight_slot: bool
) -> None:
    """Whatever is accepted satisfies the inequality; whatever is refused says a number."""
    refusal = ""
    try:
        encoding = FixedPoint(bits, 1.0, cohort, slot_bits, cap, weight_slot)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert re.fullmatch(r".*\d.*use .*\d.*", refusal), "one line: the numbers, then the mend"
        return
    levels = 2 ** (bits - 1) - 1
    assert encoding.levels == levels
    assert cohort * levels <= 2 ** (encoding.field_bits - 1) - 1
    assert cohort * levels > 2 ** (encoding.field_bits - 2) - 1, "a narrower field would do"
    assert encoding.plain_bits == encoding.fields * encoding.field_bits <= slot_bits
    assert encoding.fields >= 1
    assert cohort < 2**encoding.plain_bits, "the count slot could wrap"
    if weight_slot:
        assert cohort * cap < 2**encoding.plain_bits, "the weight slot could wrap"


def test_constructor_names_the_numbers_and_the_mend_when_a_field_could_wrap() -> None:
    """The message carries the cohort, the widths, and bits that do fit."""
    with pytest.raises(ValueError, match="1000 values of 24 bits") as caught:
        FixedPoint(bits=24, clip=1.0, cohort=1000, slot_bits=30)
    assert "34 bits" in str(caught.value)
    assert "30" in str(caught.value)
    mend = re.search(r"bits <= (\d+)", str(caught.value))
    assert mend is not None
    assert FixedPoint(int(mend[1]), clip=1.0, cohort=1000, slot_bits=30).fields == 1
    with pytest.raises(ValueError, match="bits <="):
        FixedPoint(int(mend[1]) + 1, clip=1.0, cohort=1000, slot_bits=30)


def test_constructor_names_the_mend_when_the_weights_could_wrap() -> None:
    """The weight cap it proposes is the largest that is accepted."""
    with pytest.raises(ValueError, match="weight_cap <=") as caught:
        FixedPoint(8, 1.0, 10, 16, weight_cap=10**6, weight_slot=True)
    cap = int(re.findall(r"weight_cap <= (\d+)", str(caught.value))[0])
    assert FixedPoint(8, 1.0, 10, 16, weight_cap=cap, weight_slot=True).weight_cap == cap
    with pytest.raises(ValueError, match="weight_cap <="):
        FixedPoint(8, 1.0, 10, 16, weight_cap=cap + 1, weight_slot=True)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_constructor_refuses_a_clip_that_is_no_positive_number(clip: float) -> None:
    """Zero, negative, NaN and infinite clips are refused."""
    with pytest.raises(ValueError, match="clip"):
        FixedPoint(8, clip, 3, 40)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 7, 19])
def test_non_finite_values_are_refused_with_their_index(bad: float, index: int) -> None:
    """Refused at the call, before any chunk could have left; the first index is named."""
    encoding = FixedPoint(8, 1.0, 3, 40)
    values = np.zeros(20)
    values[index] = values[-1] = bad
    with pytest.raises(ValueError, match=rf"value {index} is"):
        encoding.encode(values, 1, rounding())


@pytest.mark.parametrize("weight", [-1, 11])
def test_weights_outside_the_cap_are_refused(weight: int) -> None:
    """A weight over W would break the proof; the message names both."""
    encoding = FixedPoint(8, 1.0, 3, 40, weight_cap=10)
    with pytest.raises(ValueError, match=rf"weight = {weight} .*10"):
        encoding.encode(np.zeros(2), weight, rounding())


def test_weighted_mean_is_the_weighted_mean() -> None:
    """sum (w_i/W) x_i over sum w_i is the weighted mean, to within the rounding of n sites."""
    encoding = FixedPoint(16, 2.0, 4, 60, weight_cap=1000, weight_slot=True)
    weights, rows = [1000, 10, 333, 0], np.random.default_rng(1).uniform(-2, 2, (4, 50))
    slots = [encoded(encoding, rows[i], weights[i], i) for i in range(4)]
    total = np.array(added(encoding, slots), np.uint64)
    result = encoding.decode(total, 50, ("a", "b", "c", "d"))
    assert result.total_weight == sum(weights)
    grid = encoding.clip * encoding.weight_cap / (encoding.levels * sum(weights))
    truth = np.average(rows, axis=0, weights=weights)
    assert np.abs(result.mean - truth).max() <= 4 * grid


def test_no_weight_slot_means_no_weight_on_the_wire() -> None:
    """Under public weights the header is the count alone, and the weights are the caller's."""
    encoding = FixedPoint(8, 1.0, 2, 40, weight_cap=10)
    assert encoding.header_slots == 1
    slots = [encoded(encoding, [1.0], 5, 1), encoded(encoding, [1.0], 10, 2)]
    total = np.array(added(encoding, slots), np.uint64)
    result = encoding.decode(total, 1, ("a", "b"), public_weight=15)
    grid = encoding.clip * encoding.weight_cap / (encoding.levels * 15)
    assert result.mean[0] == pytest.approx(1.0, abs=grid)


@pytest.mark.parametrize("weight_slot", [False, True])
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
def test_chunk_boundaries_lose_nothing(weight_slot: bool, off: int, chunks: int) -> None:
    """Vectors that end one value before, on, and after the end of a chunk."""
    encoding = FixedPoint(24, 1.0, 2, 26, weight_slot=weight_slot)
    room = CHUNK_SLOTS * chunks - encoding.header_slots
    length = room * encoding.fields + off
    values = np.random.default_rng(0).uniform(-1, 1, length)
    parts = list(encoding.encode(values, 1, rounding()))
    assert [len(part) for part in parts[:-1]] == [CHUNK_SLOTS] * (len(parts) - 1)
    assert 1 <= len(parts[-1]) <= CHUNK_SLOTS
    total = np.concatenate(parts)
    assert len(total) == encoding.slots(length)
    mean = encoding.decode(total, length, ("a",)).mean
    assert np.abs(mean - values).max() < encoding.clip / encoding.levels


def test_decoding_works_across_chunks_of_value_slots() -> None:
    """decode reads CHUNK_SLOTS at a time; a value just behind the boundary is not shifted."""
    encoding = FixedPoint(2, 1.0, 1, 4)
    length = (CHUNK_SLOTS + 1) * encoding.fields
    values = np.zeros(length)
    values[[0, CHUNK_SLOTS * encoding.fields - 1, CHUNK_SLOTS * encoding.fields, -1]] = 1, -1, 1, -1
    total = np.concatenate(list(encoding.encode(values, 1, rounding())))
    assert np.array_equal(encoding.decode(total, length, ("a",)).mean, values)


def slots_of_two(encoding: FixedPoint) -> NDArray[np.uint64]:
    """The sum of two contributions of five values."""
    return np.array(added(encoding, [encoded(encoding, np.ones(5), 1, i) for i in (1, 2)]), "u8")


def test_decode_refuses_a_sum_that_counts_other_contributions() -> None:
    """The count slot must equal the number of contributors."""
    encoding = FixedPoint(8, 1.0, 3, 20)
    with pytest.raises(ProtocolError, match="counts 2 updates, not 3"):
        encoding.decode(slots_of_two(encoding), 5, ("a", "b", "c"))


@pytest.mark.parametrize("length", [0, 4, 7, 1000])
def test_decode_refuses_a_sum_of_another_length(length: int) -> None:
    """A sum with the wrong number of slots is not read at all."""
    encoding = FixedPoint(8, 1.0, 3, 12)
    assert encoding.slots(5) != encoding.slots(length)
    with pytest.raises(ProtocolError, match="slots"):
        encoding.decode(slots_of_two(encoding), length, ("a", "b"))


@pytest.mark.parametrize("weight", [0, -1, 7])
def test_decode_refuses_weights_that_cannot_be(weight: int) -> None:
    """Nothing to average, or more than n * W: refused."""
    encoding = FixedPoint(8, 1.0, 3, 12, weight_cap=2)
    with pytest.raises(ProtocolError, match="weigh"):
        encoding.decode(slots_of_two(encoding), 5, ("a", "b"), public_weight=weight)


@st.composite
def noised(draw: st.DrawFn) -> tuple[Integers, list[list[int]]]:
    """An encoding and vectors for it whose sum may or may not fit its fields."""
    width, cohort = draw(st.integers(4, 30)), draw(st.integers(1, 6))
    encoding = Integers(width, 0.5, cohort, draw(st.integers(width, 63)))
    length, top = draw(st.integers(0, 2 * encoding.fields + 1)), 1 << width
    vector = st.lists(st.integers(-top, top), min_size=length, max_size=length)
    return encoding, draw(st.lists(vector, min_size=1, max_size=cohort))


def summed(encoding: Integers, vectors: list[list[int]]) -> NDArray[np.uint64]:
    """The sum of the vectors' slots, modulo 2^p."""
    slots = [np.concatenate(list(encoding.encode(np.array(v, np.int64)))) for v in vectors]
    assert {len(each) for each in slots} == {encoding.slots(len(vectors[0]))}
    return np.sum(slots, axis=0, dtype=np.uint64) & np.uint64((1 << encoding.plain_bits) - 1)


@given(noised())
def test_sums_of_integers_are_exact_where_they_fit_and_wrap_where_they_do_not(
    made: tuple[Integers, list[list[int]]],
) -> None:
    """Nothing is clamped: each field is the sum modulo 2^w, but for a carry out of one beneath."""
    encoding, vectors = made
    w, names = encoding.field_bits, tuple("abcdef"[: len(vectors)])
    length = len(vectors[0])
    aggregate = encoding.decode(summed(encoding, vectors), length, names)
    truth = [sum(column) for column in zip(*vectors, strict=True)]
    found = (aggregate.mean * len(vectors) / encoding.unit).round().astype(int).tolist()
    carry = 0
    for i, (total, read) in enumerate(zip(truth, found, strict=True)):
        carry = 0 if i % encoding.fields == 0 else carry
        assert (total + carry - read) % (1 << w) == 0
        assert -(1 << (w - 1)) <= read < 1 << (w - 1)
        carry = (total + carry - read) >> w
    assert aggregate.total_weight == len(vectors)


@pytest.mark.parametrize("width", [2, 7, 20, 31])
def test_integers_work_across_chunks(width: int) -> None:
    """encode and decode go CHUNK_SLOTS at a time."""
    encoding = Integers(width, 2.0, 3, 62)
    length = (CHUNK_SLOTS + 5) * encoding.fields
    values = np.zeros(length, np.int64)
    values[[0, CHUNK_SLOTS * encoding.fields - 1, CHUNK_SLOTS * encoding.fields, -1]] = 1, -2, 1, -1
    total = np.concatenate(list(encoding.encode(values)))
    assert np.array_equal(encoding.decode(total, length, ("a",)).mean, values * 2.0)


@pytest.mark.parametrize(
    ("fields", "telling"),
    [
        ((63, 1.0, 3, 44), "a slot has 44 bits"),
        ((1, 1.0, 3, 44), "field_bits = 1"),
        ((10, 0.0, 3, 44), "unit = 0.0"),
        ((10, float("nan"), 3, 44), "unit = nan"),
        ((10, 1.0, 0, 44), "cohort = 0"),
        ((2, 1.0, 9, 3), "cannot count 9"),
    ],
)
def test_integers_that_cannot_be_carried_are_refused(fields: Any, telling: str) -> None:
    """With the numbers and the mend."""
    with pytest.raises(ValueError, match=telling):
        Integers(*fields)


def test_integers_count_their_contributions() -> None:
    """The count slot must equal the number of contributors, the length that of the vector."""
    encoding = Integers(10, 1.0, 3, 44)
    total = summed(encoding, [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ProtocolError, match="counts 2 updates, not 3"):
        encoding.decode(total, 3, ("a", "b", "c"))
    with pytest.raises(ProtocolError, match="slots"):
        encoding.decode(total, 30, ("a", "b"))
