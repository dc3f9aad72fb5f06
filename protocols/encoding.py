"""Real vectors as integers, packed linearly, so that sums are exact.

`FixedPoint` rounds values and proves that their sum fits; `Integers` takes integers as they are,
with noise in them, and clamps nothing. A slot is an integer modulo 2^p. The first slot counts
contributions; a second one sums their weights where weights are secret; every further slot carries
k fields of w bits as sum_j 2^(w*j) * v_j mod 2^p over signed v_j. Adding slots adds every field,
and the fields of a sum are recovered with carries from the lowest up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from protocols.errors import ProtocolError
from protocols.keystream import Keystream

CHUNK_SLOTS: Final = 1 << 16
"""Slots that are encoded, encrypted and decoded at a time; a multiple of every ring degree."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What a round yields: the weighted mean of the contributions, and who contributed."""

    mean: NDArray[np.float64]
    contributors: tuple[str, ...]
    total_weight: int


@final
@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How a vector becomes integers, for at most `cohort` contributions to one sum.

    bits: signed bits of one value; values are scaled so that `clip` becomes 2^(bits-1) - 1.
    slot_bits: bits that the layer beneath offers in a slot.
    weight_cap: W, a public number that no weight exceeds; a site encodes (w_i / W) * x_i.
    weight_slot: whether the weight travels too, in a slot of its own; without it weights are
        public constants.

    Formal Guarantees: for any contributions that `encode` accepts, at most `cohort` of them, no
    field of the sum wraps: cohort * (2^(bits-1) - 1) <= 2^(w-1) - 1. The constructor proves it or
    raises ValueError with the numbers and the mend.
    """

    bits: int
    clip: float
    cohort: int
    slot_bits: int
    weight_cap: int = 1
    weight_slot: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24:
            raise ValueError(f"bits = {self.bits}: use 2 to 24")
        if not 1e-30 <= self.clip <= 1e30:  # so that no product below leaves float64
            raise ValueError(f"clip = {self.clip}: use a number from 1e-30 to 1e30")
        if self.cohort < 1:
            raise ValueError(f"cohort = {self.cohort}: use at least 1")
        if self.weight_cap < 1:
            raise ValueError(f"weight_cap = {self.weight_cap}: use at least 1")
        if not 1 <= self.slot_bits <= 63:
            raise ValueError(f"slot_bits = {self.slot_bits}: use 1 to 63")
        if self.fields < 1:
            raise ValueError(
                f"the sum of {self.cohort} values of {self.bits} bits needs a field of "
                f"{self.field_bits} bits, but a slot has {self.slot_bits}: "
                f"use bits <= {self.bits - (self.field_bits - self.slot_bits)} or a smaller cohort"
            )
        if self.weight_slot and self.cohort * self.weight_cap >= 1 << self.plain_bits:
            raise ValueError(
                f"{self.cohort} weights of up to {self.weight_cap} can sum to "
                f"{self.cohort * self.weight_cap}, beyond a slot of {self.plain_bits} bits: "
                f"use weight_cap <= {((1 << self.plain_bits) - 1) // self.cohort}"
            )

    @property
    def levels(self) -> int:
        """The integer that `clip` becomes, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def field_bits(self) -> int:
        """w: the fewest bits that hold any signed sum of `cohort` values."""
        return (self.cohort * self.levels).bit_length() + 1

    @property
    def fields(self) -> int:
        """k: fields that share a slot."""
        return self.slot_bits // self.field_bits

    @property
    def plain_bits(self) -> int:
        """p: slots are integers modulo 2^p, p = k * w."""
        return self.fields * self.field_bits

    @property
    def header_slots(self) -> int:
        """Slots before the first value: the count, and the weight where it travels."""
        return 2 if self.weight_slot else 1

    def slots(self, length: int) -> int:
        """Slots that a vector of `length` values takes, header included."""
        return self.header_slots - (-length // self.fields)

    def encode(
        self, values: NDArray[np.floating], weight: int, rounding: Keystream
    ) -> Iterator[NDArray[np.uint64]]:
        """`values` (float[d]) as slots, in chunks of CHUNK_SLOTS, uint64 < 2^plain_bits.

        Values are clipped to [-clip, clip], scaled by weight / weight_cap, and rounded up with
        the probability of their fraction (unbiased to 2^-53; Gupta et al. 2015, section 3).
        Precondition: 0 <= weight <= weight_cap; values are finite, else ValueError with the index.
        """
        if not 0 <= weight <= self.weight_cap:
            raise ValueError(
                f"weight = {weight} is outside 0 to weight_cap = {self.weight_cap}: "
                "raise weight_cap at every site"
            )
        finite = np.isfinite(values)
        if not finite.all():
            index = int(np.argmin(finite))
            raise ValueError(f"value {index} is {values[index]}: an update must be finite")
        return self._chunks(values, weight, rounding)

    def _chunks(
        self, values: NDArray[np.floating], weight: int, rounding: Keystream
    ) -> Iterator[NDArray[np.uint64]]:
        header = np.array([1, weight][: self.header_slots], np.uint64)

        def rounded(start: int, stop: int) -> NDArray[np.int64]:
            return self._round(values[start:stop], weight, rounding)

        return _in_chunks(header, rounded, len(values), self.field_bits, self.fields)

    def _round(
        self, values: NDArray[np.floating], weight: int, rounding: Keystream
    ) -> NDArray[np.int64]:
        # |x / clip| <= 1 and weight / W <= 1, so |scaled| <= levels exactly: rounding never
        # leaves the range, because at the bound the fraction is zero.
        scaled = np.clip(values.astype(np.float64), -self.clip, self.clip) / self.clip
        scaled *= weight / self.weight_cap
        scaled *= self.levels
        whole = np.floor(scaled)
        scaled -= whole
        integers = whole.astype(np.int64)
        integers += rounding.uniform(len(scaled)) < scaled
        return integers

    def unpack(self, slots: NDArray[np.uint64], length: int) -> NDArray[np.int64]:
        """The `length` signed fields of value slots (without header), int64[length]."""
        return _unpack(slots, self.field_bits, self.fields, length)

    def decode(
        self,
        total: NDArray[np.uint64],
        length: int,
        contributors: tuple[str, ...],
        public_weight: int | None = None,
    ) -> Aggregate:
        """The mean of `contributors`' vectors from the opened sum of their slots.

        total: uint64[slots(length)], modulo 2^plain_bits. public_weight: the sum of the
        contributors' weights where these are public constants, by default one each.
        Raises ProtocolError when the sum counts other contributions, or weighs nothing.
        """
        _check(total, self.slots(length), contributors)
        weight = len(contributors) if public_weight is None else public_weight
        if self.weight_slot:
            weight = int(total[1])
        if not 0 < weight <= self.cohort * self.weight_cap:
            raise ProtocolError(f"the contributions weigh {weight} together: nothing to average")
        mean = _fields(total[self.header_slots :], self.field_bits, self.fields, length)
        mean *= self.clip * self.weight_cap / (self.levels * weight)
        return Aggregate(mean, contributors, weight)


@final
@dataclass(frozen=True, slots=True)
class Integers:
    """Integer vectors with noise in them, for at most `cohort` contributions to one sum.

    field_bits: w, bits of one coordinate of the sum; slot_bits: bits that a slot offers.
    unit: what one integer stands for.

    Formal Guarantees: packing is linear modulo 2^p and nothing is clamped or refused, whatever the
    integers: a coordinate that leaves its field spoils itself and the field above it, and reads
    nothing else. Whoever chooses w states how likely that is.
    """

    field_bits: int
    unit: float
    cohort: int
    slot_bits: int
    weight_slot = False

    def __post_init__(self) -> None:
        if not 2 <= self.field_bits <= self.slot_bits <= 63:
            raise ValueError(
                f"field_bits = {self.field_bits}: a slot has {self.slot_bits} bits; use a coarser "
                "grid, a smaller signal bound or a smaller cohort"
            )
        if not 1e-300 <= self.unit <= 1e300:
            raise ValueError(f"unit = {self.unit}: use a number from 1e-300 to 1e300")
        if self.cohort < 1:
            raise ValueError(f"cohort = {self.cohort}: use at least 1")
        if self.cohort >= 1 << self.plain_bits:
            raise ValueError(
                f"a slot of {self.plain_bits} bits cannot count {self.cohort} contributions"
            )

    @property
    def fields(self) -> int:
        """k: fields that share a slot."""
        return self.slot_bits // self.field_bits

    @property
    def plain_bits(self) -> int:
        """p: slots are integers modulo 2^p, p = k * w."""
        return self.fields * self.field_bits

    def slots(self, length: int) -> int:
        """Slots that a vector of `length` integers takes, the count included."""
        return 1 - (-length // self.fields)

    def encode(self, integers: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
        """`integers` (int64[d]) as slots, in chunks of CHUNK_SLOTS, uint64 < 2^plain_bits."""
        count = np.ones(1, np.uint64)

        def given(start: int, stop: int) -> NDArray[np.int64]:
            return integers[start:stop]

        return _in_chunks(count, given, len(integers), self.field_bits, self.fields)

    def decode(
        self,
        total: NDArray[np.uint64],
        length: int,
        contributors: tuple[str, ...],
        public_weight: int | None = None,
    ) -> Aggregate:
        """The mean of `contributors`' vectors, times `unit`, from the opened sum of their slots.

        total: uint64[slots(length)]. Contributions weigh one each: `public_weight` is not read.
        Raises ProtocolError when the sum counts other contributions.
        """
        del public_weight
        _check(total, self.slots(length), contributors)
        mean = _fields(total[1:], self.field_bits, self.fields, length)
        mean *= self.unit / len(contributors)
        return Aggregate(mean, contributors, len(contributors))


Encoding = FixedPoint | Integers
"""How a vector becomes slots, and their sum a mean."""


def _check(total: NDArray[np.uint64], slots: int, contributors: tuple[str, ...]) -> None:
    if len(total) != slots:
        raise ProtocolError(f"the opened sum has {len(total)} slots, not {slots}")
    if int(total[0]) != len(contributors):
        raise ProtocolError(
            f"the opened sum counts {int(total[0])} updates, not {len(contributors)}"
        )


def _in_chunks(
    header: NDArray[np.uint64],
    integers: Callable[[int, int], NDArray[np.int64]],
    length: int,
    width: int,
    fields: int,
) -> Iterator[NDArray[np.uint64]]:
    """The header, then `integers(start, stop)` up to `length`, as slots, CHUNK_SLOTS at a time."""
    start = 0
    while header.size or start < length:
        stop = start + (CHUNK_SLOTS - header.size) * fields
        yield np.concatenate([header, _pack(integers(start, stop), width, fields)])
        header, start = header[:0], stop


def _pack(integers: NDArray[np.int64], width: int, fields: int) -> NDArray[np.uint64]:
    """sum_j 2^(width*j) * v_j mod 2^(width*fields) of each `fields` of `integers`."""
    spare = -len(integers) % fields
    if spare:
        integers = np.concatenate([integers, np.zeros(spare, np.int64)])
    columns = integers.view(np.uint64).reshape(-1, fields)
    slots = columns[:, 0].copy()
    for j in range(1, fields):
        slots += columns[:, j] << np.uint64(j * width)
    return slots & np.uint64((1 << (width * fields)) - 1)


def _unpack(slots: NDArray[np.uint64], width: int, fields: int, length: int) -> NDArray[np.int64]:
    """The first `length` signed fields of `slots`, int64[length]: with carries, lowest first."""
    rest = slots.copy()
    found = np.empty((len(slots), fields), np.int64)
    to_sign = np.uint64(64 - width)
    for j in range(fields):
        field = (rest << to_sign).view(np.int64) >> np.int64(to_sign)
        found[:, j] = field
        rest = (rest - field.view(np.uint64)) >> np.uint64(width)
    return found.reshape(-1)[:length]


def _fields(slots: NDArray[np.uint64], width: int, fields: int, length: int) -> NDArray[np.float64]:
    """All fields of value slots, float64[length], some slots at a time."""
    values = np.empty(length, np.float64)
    for start in range(0, len(slots), CHUNK_SLOTS):
        at = start * fields
        size = min(CHUNK_SLOTS * fields, length - at)
        values[at : at + size] = _unpack(slots[start : start + CHUNK_SLOTS], width, fields, size)
    return values
