"""The ring Z_p[X] / (X^N + 1) in numpy, as SEAL orders it, and CKKS's canonical embedding.

Residues are uint64 below a prime p < 2^62 with p = 1 modulo 2N. In NTT form index i holds the value
at psi^(2 rev(i) + 1), psi the least primitive 2N-th root of 1 and rev the reversal of bits, so that
i and N - 1 - i are inverse points. Slot j of a polynomial is its value at exp(i pi 3^j / N).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

Residues = NDArray[np.uint64]
Reals = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Ring:
    """Z_p[X] / (X^N + 1), N = `degree` a power of two, p = `prime`."""

    degree: int
    prime: int

    def __post_init__(self) -> None:
        if self.degree < 2 or self.degree & (self.degree - 1):
            raise ValueError(f"degree = {self.degree}: use a power of two")
        if self.prime >= 1 << 62 or self.prime % (2 * self.degree) != 1:
            raise ValueError(f"prime = {self.prime}: use one below 2^62 that is 1 mod 2N")

    def product(self, a: Residues, b: Residues | int) -> Residues:
        """a * b modulo p, element by element. The quotient in long doubles is off by at most 1."""
        right, p = np.asarray(b, np.uint64), np.uint64(self.prime)
        quotient = a.astype(np.longdouble) * right.astype(np.longdouble) / np.longdouble(self.prime)
        rest = (a * right - quotient.astype(np.uint64) * p).view(np.int64)
        rest = np.where(rest < 0, rest + np.int64(self.prime), rest)
        rest = np.where(rest >= np.int64(self.prime), rest - np.int64(self.prime), rest)
        return rest.view(np.uint64)

    def difference(self, a: Residues, b: Residues) -> Residues:
        """a - b modulo p."""
        return (a + (np.uint64(self.prime) - b)) % np.uint64(self.prime)

    def inverse(self, a: Residues) -> Residues:
        """1 / a modulo p, element by element; 0 where a is 0 (Fermat)."""
        found, power, exponent = np.ones_like(a), a, self.prime - 2
        while exponent:
            if exponent & 1:
                found = self.product(found, power)
            power, exponent = self.product(power, power), exponent >> 1
        return found

    def residues(self, coefficients: NDArray[np.int64]) -> Residues:
        """Signed integers modulo p."""
        return (coefficients % np.int64(self.prime)).view(np.uint64)

    def signed(self, residues: Residues) -> NDArray[np.int64]:
        """The representatives nearest to 0."""
        found = residues.view(np.int64)
        return np.where(found > self.prime // 2, found - np.int64(self.prime), found)

    def forward(self, residues: Residues) -> Residues:
        """Coefficients to NTT form (Longa and Naehrig 2016, algorithm 1)."""
        a, length, blocks = residues.reshape(1, -1), self.degree, 1
        while blocks < self.degree:
            length //= 2
            halves = a.reshape(blocks, 2, length)
            roots = np.broadcast_to(self._roots[blocks : 2 * blocks, None], (blocks, length))
            low, high = halves[:, 0], self.product(halves[:, 1], roots)
            plus = (low + high) % np.uint64(self.prime)
            a = np.stack([plus, self.difference(low, high)], axis=1)
            blocks *= 2
        return a.reshape(-1)

    def backward(self, values: Residues) -> Residues:
        """NTT form to coefficients (algorithm 2)."""
        a, length, blocks = values, 1, self.degree
        while blocks > 1:
            blocks //= 2
            halves = a.reshape(blocks, 2, length)
            roots = np.broadcast_to(self._inverses[blocks : 2 * blocks, None], (blocks, length))
            low, high = halves[:, 0], halves[:, 1]
            plus = (low + high) % np.uint64(self.prime)
            a = np.stack([plus, self.product(self.difference(low, high), roots)], axis=1)
            length *= 2
        return self.product(a.reshape(-1), pow(self.degree, -1, self.prime))

    @cached_property
    def _roots(self) -> Residues:
        """psi^rev(i), for i below N."""
        order = 2 * self.degree
        power = (self.prime - 1) // order
        root = next(
            found
            for found in (pow(base, power, self.prime) for base in range(2, 1000))
            if pow(found, self.degree, self.prime) == self.prime - 1
        )
        # The primitive roots are its odd powers; SEAL takes the least.
        step, least, now = root * root % self.prime, root, root
        for _ in range(self.degree - 1):
            now = now * step % self.prime
            least = min(least, now)
        powers, now = np.empty(self.degree, np.uint64), 1
        for i in range(self.degree):
            powers[i] = now
            now = now * least % self.prime
        return powers[reversed_bits(self.degree)]

    @cached_property
    def _inverses(self) -> Residues:
        return self.inverse(self._roots)


def reversed_bits(size: int) -> NDArray[np.int64]:
    """Where each index below `size`, a power of two, goes when its bits are read backwards."""
    found = np.zeros(1, np.int64)
    while len(found) < size:
        found = np.concatenate([2 * found, 2 * found + 1])
    return found


def slot_points(degree: int) -> NDArray[np.int64]:
    """3^j modulo 2N for each slot j below N / 2."""
    points, now = np.empty(degree // 2, np.int64), 1
    for j in range(degree // 2):
        points[j] = now
        now = now * 3 % (2 * degree)
    return points


def slots(coefficients: Reals) -> NDArray[np.complex128]:
    """The N / 2 slots of a polynomial of N real coefficients."""
    degree = len(coefficients)
    values = np.fft.ifft(coefficients, 2 * degree) * (2 * degree)
    return values[slot_points(degree)]


def coefficients(values: NDArray[np.complex128] | Reals) -> Reals:
    """The polynomial with these N / 2 slots, float64[N]; of real ones, that with a(1/X) = a(X)."""
    degree = 2 * len(values)
    points = slot_points(degree)
    spread = np.zeros(2 * degree, np.complex128)
    spread[points], spread[-points] = values, np.conj(values)
    return np.real(np.fft.fft(spread)[:degree]) / degree
