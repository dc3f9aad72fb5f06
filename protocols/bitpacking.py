"""Integers of any width, packed without gaps, least significant bit first."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 18  # values at a time, a multiple of 8: bounds the working memory


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def _group(bits: int) -> tuple[int, int, int]:
    """Values, bytes, and 64-bit words of the shortest run that ends on a byte boundary."""
    if not 1 <= bits <= 64:
        raise ValueError(f"bits = {bits}: use 1 to 64")
    values = 8 // math.gcd(bits, 8)
    return values, values * bits // 8, values * bits // 64 + 2


def pack(values: NDArray[np.uint64], bits: int) -> NDArray[np.uint8]:
    """`values` (uint64[n], each < 2^bits) as uint8[ceil(n*bits/8)]; spare bits are zero.

    >>> pack(np.array([1, 2, 3], np.uint64), 4).tobytes().hex()
    '2103'
    """
    group, group_bytes, words = _group(bits)
    out = np.empty(packed_size(-(-len(values) // group) * group, bits), np.uint8)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        rows = -(-len(part) // group)
        if len(part) < rows * group:
            part = np.concatenate([part, np.zeros(rows * group - len(part), np.uint64)])
        columns = part.reshape(rows, group)
        run = np.zeros((rows, words), "<u8")
        for i in range(group):
            word, shift = divmod(i * bits, 64)
            run[:, word] |= columns[:, i] << np.uint64(shift)
            if shift + bits > 64:
                run[:, word + 1] |= columns[:, i] >> np.uint64(64 - shift)
        at = start * bits // 8
        out[at : at + rows * group_bytes].reshape(rows, group_bytes)[:] = run.view(np.uint8)[
            :, :group_bytes
        ]
    return out[: packed_size(len(values), bits)]


def unpack(data: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint64]:
    """The `count` values of `bits` bits in `data`, as uint64[count].

    Raises ValueError unless `data` has exactly the right length and its spare bits are zero, so
    that every sequence has one packed form.

    >>> unpack(np.frombuffer(bytes.fromhex("2103"), np.uint8), 3, 4).tolist()
    [1, 2, 3]
    """
    group, group_bytes, words = _group(bits)
    if len(data) != packed_size(count, bits):
        raise ValueError(f"{len(data)} bytes for {count} values of {bits} bits")
    spare = len(data) * 8 - count * bits
    if spare and int(data[-1]) >> (8 - spare):
        raise ValueError("spare bits after the last value are not zero")
    mask = np.uint64((1 << bits) - 1)
    out = np.empty(count, np.uint64)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        rows = -(-size // group)
        at = start * bits // 8
        part = data[at : at + rows * group_bytes]
        if len(part) < rows * group_bytes:
            part = np.concatenate([part, np.zeros(rows * group_bytes - len(part), np.uint8)])
        padded = np.zeros((rows, words * 8), np.uint8)
        padded[:, :group_bytes] = part.reshape(rows, group_bytes)
        run = padded.view("<u8")
        columns = np.empty((rows, group), np.uint64)
        for i in range(group):
            word, shift = divmod(i * bits, 64)
            value = run[:, word] >> np.uint64(shift)
            if shift + bits > 64:
                value |= run[:, word + 1] << np.uint64(64 - shift)
            columns[:, i] = value & mask
        out[start : start + size] = columns.reshape(-1)[:size]
    return out
