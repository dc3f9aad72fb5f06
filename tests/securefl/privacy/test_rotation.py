"""A rotation keeps what a vector is and spreads it over all coordinates, everywhere alike."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefl.privacy.rotation import Rotation, block

MATERIAL = bytes(range(32))
DIMENSIONS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1000, 1024, 2047]))


def drawn(name: int, dimension: int) -> Rotation:
    return Rotation(dimension, hashlib.sha256(name.to_bytes(8, "big")).digest())


@given(DIMENSIONS, st.integers(0, 1 << 40))
def test_the_inverse_gives_the_vector_back_and_norms_and_angles_stay(dimension, name):
    rng = np.random.default_rng(name)
    rotation = drawn(name, dimension)
    x, y = rng.normal(size=(2, dimension)) * 10.0 ** rng.integers(-3, 4)
    there = rotation.rotate(x)
    exact = {"rtol": 0, "atol": 1e-14 * 40 * float(np.linalg.norm(x))}
    np.testing.assert_allclose(rotation.restore(there), x, **exact)
    np.testing.assert_allclose(rotation.rotate(rotation.restore(x)), x, **exact)
    assert np.linalg.norm(there) == pytest.approx(np.linalg.norm(x), rel=1e-13)
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    assert there @ rotation.rotate(y) == pytest.approx(float(x @ y), abs=1e-13 * scale)


@pytest.mark.parametrize("dimension", [1, 2, 3, 12, 64, 100])
def test_it_is_an_orthogonal_matrix(dimension):
    """Of the whole space: its columns are the rotated unit vectors."""
    rotation = Rotation(dimension, MATERIAL)
    matrix = np.stack([rotation.rotate(unit) for unit in np.eye(dimension)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dimension), atol=1e-14)


@pytest.mark.parametrize("dimension", [64, 65, 100, 127, 128])
@pytest.mark.parametrize("where", ["first", "middle", "last", "spread"])
def test_every_coordinate_is_sub_gaussian_over_the_signs(dimension, where):
    """Whatever the vector: over 3,000 rotations no coordinate passes Hoeffding's bound, and the
    worst vectors, with all in one coordinate, do come near it.
    """
    vector = np.full(dimension, 1 / math.sqrt(dimension))
    if where != "spread":
        vector = np.eye(dimension)[{"first": 0, "middle": dimension // 2, "last": -1}[where]]
    turned = np.array([drawn(i, dimension).rotate(vector) for i in range(3000)])
    deviation = 1 / math.sqrt(block(dimension))
    for t in (1.0, 2.0, 3.0):
        beyond = (np.abs(turned) > t * deviation * (1 + 1e-12)).mean(0)
        bound = 2 * math.exp(-(t**2) / 2)
        assert beyond.max() <= bound + 4 * math.sqrt(bound / 3000)
    assert np.abs(turned.mean(0)).max() <= 5 * deviation / math.sqrt(3000)
    assert np.abs(turned).max() <= math.sqrt(2 * math.log(2 * turned.size * 1e6)) * deviation


def test_another_material_is_another_rotation_and_the_second_factor_has_signs_of_its_own():
    vector = np.ones(48)
    first, second = (Rotation(48, bytes([i]) * 32).rotate(vector) for i in (1, 2))
    assert (first != second).sum() > 30
    # With the same signs in both factors, the overlap would meet them twice.
    parts = Rotation(48, MATERIAL)._factors()
    assert [part for part, _ in parts] == [slice(0, 32), slice(16, 48)]
    assert 4 < (parts[0][1] != parts[1][1]).sum() < 28
    assert set(np.concatenate([signs for _, signs in parts])) == {-1.0, 1.0}


def transformed(values: list[float]) -> list[float]:
    """The same transform, one float after the other."""
    width = 1
    while width < len(values):
        for low in (i for i in range(len(values)) if not i & width):
            a, b = values[low], values[low + width]
            values[low], values[low + width] = a + b, a - b
        width *= 2
    return [value * math.sqrt(1 / len(values)) for value in values]


@pytest.mark.parametrize(
    ("dimension", "told"),
    [
        (5, "0661852e7cc264975cf08b8d2d6375d2"),
        (64, "3b1794ddecc76a45f7b91aed72992a5c"),
        (1000, "e1305c2a40d8615e3bd4574485eb5999"),
    ],
)
def test_the_bits_are_those_of_every_machine(dimension, told):
    """Sites that move their own models by the same sum must get the same bits: as IEEE 754 has
    them, without vector instructions, and as they were when this was written.
    """
    values = (np.arange(dimension, dtype=np.float64) * 0.7 - 3.1) / 7
    rotation = Rotation(dimension, MATERIAL)
    expected = values.tolist()
    for part, signs in rotation._factors():
        flipped = [x * sign for x, sign in zip(expected[part], signs.tolist(), strict=True)]
        expected[part] = transformed(flipped)
    turned = rotation.rotate(values)
    assert turned.tolist() == expected
    data = turned.astype("<f8").tobytes() + rotation.restore(turned).astype("<f8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:32] == told


def test_the_transform_is_that_of_walsh_and_hadamard():
    """Against the matrix by its definition: entry (i, j) is the parity of i & j."""
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
    rotation = Rotation(16, MATERIAL)
    [(_, flips)] = rotation._factors()
    vector = np.arange(16.0)
    np.testing.assert_allclose(rotation.rotate(vector), signs @ (flips * vector) / 4, rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad):
    """So that clipping leaves the update out, as without a rotation; and nothing warns."""
    vector = np.ones(20)
    vector[3] = bad
    assert not np.isfinite(Rotation(20, MATERIAL).rotate(vector)).any()


@pytest.mark.parametrize("bad", [0, -1])
def test_there_is_no_rotation_of_nothing(bad):
    with pytest.raises(ValueError, match="use at least 1"):
        Rotation(bad, MATERIAL)


def test_a_vector_of_another_length_and_short_material_are_refused():
    with pytest.raises(ValueError, match="this rotates 4"):
        Rotation(4, MATERIAL).rotate(np.zeros(5))
    with pytest.raises(ValueError, match="32"):
        Rotation(4, b"short")


def test_the_input_is_left_as_it_is():
    vector = np.arange(6.0)
    Rotation(6, MATERIAL).rotate(vector)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5]
