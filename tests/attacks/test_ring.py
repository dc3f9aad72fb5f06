"""The ring that the CKKS attack computes in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import ring
from attacks.ring import Ring

PRIME = 1152921504606830593


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(16, 97), (64, 257), (64, PRIME)]))
def test_products_are_those_of_polynomials_modulo_x_to_the_n_plus_1(seed, parts):
    one = Ring(*parts)
    a, b = np.random.default_rng(seed).integers(0, one.prime, (2, one.degree), dtype=np.uint64)
    product = one.backward(one.product(one.forward(a), one.forward(b)))
    expected = [0] * one.degree
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            place, sign = (i + j) % one.degree, -1 if i + j >= one.degree else 1
            expected[place] = (expected[place] + sign * x * y) % one.prime
    assert product.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, PRIME - 1), st.integers(0, PRIME - 1)), min_size=1))
def test_a_product_is_exact_whatever_the_factors(pairs):
    a, b = np.array(pairs, np.uint64).T
    found = Ring(8192, PRIME).product(a, b).tolist()
    assert found == [x * y % PRIME for x, y in pairs]


def test_an_inverse_times_its_number_is_1():
    one = Ring(64, PRIME)
    a = np.random.default_rng(0).integers(1, PRIME, 64, dtype=np.uint64)
    assert (one.product(a, one.inverse(a)) == 1).all()


def test_index_i_and_n_minus_1_minus_i_are_inverse_points():
    one = Ring(64, 257)
    monomial = np.zeros(64, np.uint64)
    monomial[1] = 1
    points = one.forward(monomial)
    assert (one.product(points, points[::-1].copy()) == 1).all()


def test_slots_and_coefficients_are_inverse():
    rng = np.random.default_rng(0)
    values = rng.normal(size=32) + 1j * rng.normal(size=32)
    np.testing.assert_allclose(ring.slots(ring.coefficients(values)), values, atol=1e-12)


def test_real_parts_alone_give_the_half_of_a_polynomial_that_1_over_x_keeps():
    whole = np.random.default_rng(0).normal(size=64)
    mirrored = np.concatenate([whole[:1], -whole[:0:-1]])
    found = ring.coefficients(ring.slots(whole).real)
    np.testing.assert_allclose(found, (whole + mirrored) / 2, atol=1e-12)


@pytest.mark.parametrize(("degree", "prime"), [(3, 97), (64, 97), (16, 2**62 + 1)])
def test_what_is_no_such_ring_is_refused(degree, prime):
    with pytest.raises(ValueError, match="use"):
        Ring(degree, prime)
