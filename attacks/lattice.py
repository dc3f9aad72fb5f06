"""Reduction of small lattices: Lenstra, Lenstra and Lovasz 1982."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DELTA = 0.99


def reduced(basis: NDArray[np.int64]) -> NDArray[np.int64]:
    """An LLL-reduced basis of the lattice of the independent rows of `basis`, int64[n, m].

    Precondition: dimensions of some tens and entries below 2^50, so that Gram and Schmidt's numbers
    hold in doubles; they are recomputed from the integers for every row.
    """
    b = basis.astype(np.int64, copy=True)
    count = len(b)
    stars, mu, norms = np.zeros(b.shape), np.eye(count), np.zeros(count)

    def orthogonalise(k: int) -> None:
        rest = b[k].astype(np.float64)
        mu[k, :k] = 0
        for _ in range(2):  # twice is enough
            part = stars[:k] @ rest / norms[:k]
            mu[k, :k] += part
            rest = rest - part @ stars[:k]
        stars[k], norms[k] = rest, rest @ rest

    orthogonalise(0)
    k = 1
    while k < count:
        orthogonalise(k)
        for j in range(k - 1, -1, -1):
            times = np.rint(mu[k, j])
            if times:
                b[k] -= np.int64(times) * b[j]
                mu[k, : j + 1] -= times * mu[j, : j + 1]
        orthogonalise(k)
        if norms[k] >= (DELTA - mu[k, k - 1] ** 2) * norms[k - 1]:
            k += 1
        else:
            b[[k - 1, k]] = b[[k, k - 1]]
            orthogonalise(k - 1)
            k = max(k - 1, 1)
    return b
