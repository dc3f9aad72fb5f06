"""Lattice reduction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import lattice


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8))
def test_a_reduced_basis_is_of_the_same_lattice_and_as_short_as_promised(seed, count):
    basis = np.random.default_rng(seed).integers(-(2**20), 2**20, (count, count))
    if abs(np.linalg.slogdet(basis.astype(float))[0]) < 0.5:
        return
    found = lattice.reduced(basis)
    times = found @ np.linalg.inv(basis.astype(float))
    np.testing.assert_allclose(times, np.rint(times), atol=1e-4)
    assert abs(abs(np.linalg.det(np.rint(times))) - 1) < 1e-6
    # Lenstra, Lenstra and Lovasz 1982, proposition 1.9, at delta = 0.99.
    volume = np.exp(np.linalg.slogdet(basis.astype(float))[1])
    bound = (1 / (lattice.DELTA - 0.25)) ** ((count - 1) / 4) * volume ** (1 / count)
    assert np.linalg.norm(found[0].astype(float)) <= bound * 1.001


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_short_vector_is_found(seed):
    rng = np.random.default_rng(seed)
    short = rng.integers(-3, 4, 12)
    rows = rng.integers(-(2**30), 2**30, (12, 12))
    rows[0] = short
    hidden = rows.copy()
    for i in range(1, 12):
        hidden[i] += rng.integers(-5, 6) * rows[0]
    hidden[0] += 7 * hidden[5] + 3 * hidden[9]
    found = lattice.reduced(hidden)[0]
    assert (found == short).all() or (found == -short).all()
