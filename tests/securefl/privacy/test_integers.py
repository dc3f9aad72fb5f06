"""No record moves the integers that are summed by more than the stated sensitivity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from protocols import noise
from protocols.keystream import Keystream, Seed
from securefl.privacy import integers
from securefl.privacy.integers import (
    clipped_sum,
    conditionally_rounded,
    dithered,
    hardened,
    hardening_distance,
    sensitivity,
)

FINE = 1 << integers.FINE_BITS


def stream(name: str) -> Keystream:
    return Keystream(Seed(name.encode().ljust(32, b"\0")), "tests")


def norm_squared(vector: np.ndarray) -> int:
    """The exact squared norm of integers, without any float."""
    return sum(int(value) ** 2 for value in vector)


def single(row) -> list[torch.Tensor]:
    return [torch.tensor(np.asarray(row)[None])]


# --- clipping on the fine grid -------------------------------------------------------------------

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    st.lists(st.one_of(ANY_FLOAT, st.floats(-2, 2, width=32)), min_size=1, max_size=40),
    st.sampled_from([1, 7, 1000, FINE, FINE * 300, 1 << 40]),
    st.sampled_from([1e-3, 1.0, 17.5]),
)
def test_whatever_a_record_holds_its_integers_have_at_most_the_norm_of_the_clip(row, units, clip):
    added = clipped_sum([torch.tensor([row], dtype=torch.float32)], clip, units)
    assert norm_squared(added) <= units**2
    if not np.isfinite(np.float32(row)).all():
        assert not added.any()


@pytest.mark.parametrize("dimension", [1, 3, 1000, 30_000])
@pytest.mark.parametrize("units", [1 << 16, 12_345_678, 1 << 40])
def test_vectors_that_just_reach_the_clip_are_neither_above_nor_lost(dimension, units):
    rng = np.random.default_rng(dimension)
    for scale in (1.0, 1 + 1e-7, 1 - 1e-7, 1e3, 1e30):
        row = rng.normal(size=dimension)
        row *= scale / np.linalg.norm(row)
        for kind in (np.float32, np.float64):
            added = clipped_sum(single(row.astype(kind)), 1.0, units)
            exact = norm_squared(added)
            assert exact <= units**2
            assert math.sqrt(exact) >= units * (1 - 2e-7) - math.sqrt(dimension)


def test_the_sum_is_of_the_clipped_rows_over_all_parameters():
    rng = np.random.default_rng(1)
    parts = [torch.tensor(rng.normal(size=(9, *shape))) for shape in ((4, 3), (5,), (2, 2, 2))]
    flat = np.concatenate([part.reshape(9, -1).numpy() for part in parts], axis=1)
    factors = np.minimum(1, 2.0 / np.linalg.norm(flat, axis=1))
    units = 1 << 30
    total = clipped_sum(parts, 2.0, units)
    assert total.dtype == np.int64
    expected = (flat * factors[:, None]).sum(0)
    np.testing.assert_allclose(total * (2.0 / units), expected, atol=9 * 2.0 / units + 1e-12)


def test_a_record_adds_the_same_integers_whatever_stands_beside_it():
    """Sums of floats depend on their neighbours; these do not (Mironov 2012)."""
    rng = np.random.default_rng(2)
    rows = torch.tensor(rng.normal(size=(50, 30)) * 10.0 ** rng.integers(-6, 7, (50, 1)))
    units = 1 << 36
    whole = clipped_sum([rows], 1.0, units)
    for i in (0, 17, 49):
        rest = torch.cat([rows[:i], rows[i + 1 :]])
        alone = clipped_sum([rows[i : i + 1]], 1.0, units)
        assert np.array_equal(whole - clipped_sum([rest], 1.0, units), alone)
    assert np.array_equal(whole, clipped_sum([rows.flip(0)], 1.0, units))


@given(
    st.lists(st.one_of(ANY_FLOAT, st.floats(-2, 2, width=32)), min_size=1, max_size=40),
    st.sampled_from([8, 1000, FINE, FINE * 300, 1 << 40]),
    st.sampled_from([1e-3, 1.0, 17.5]),
    st.floats(0.5, 2),
)
def test_whatever_a_record_holds_it_adds_the_count_or_takes_it_and_no_more(row, units, clip, near):
    """The exact norm of its whole vector, also of rows that just reach the clip."""
    array = np.array(row, np.float32)
    finite = bool(np.isfinite(array).all())
    length = np.linalg.norm(array.astype(np.float64))
    if finite and 1e-30 < length < 1e30:
        array = (array.astype(np.float64) * (near * clip / length)).astype(np.float32)
    count = units // 8
    added = clipped_sum([torch.tensor(array[None])], clip, units, count)
    assert len(added) == len(row) + 1
    assert norm_squared(added) <= units**2 + count**2
    norm = math.sqrt(math.fsum(float(x) ** 2 for x in array)) if finite else math.nan
    if not finite:
        assert not added.any()
    elif norm < clip * (1 - 1e-12):
        assert added[-1] == count
    elif norm > clip * (1 + 1e-12):
        assert added[-1] == -count
    assert np.array_equal(added[:-1], clipped_sum([torch.tensor(array[None])], clip, units))


def test_counts_add_up_over_rows_and_chunks():
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(3000, 100))
    rows[17, 4], rows[2900, 0] = np.nan, -np.inf  # left out, and not counted
    norms = np.linalg.norm(rows, axis=1)
    norms = norms[np.isfinite(norms)]
    added = clipped_sum([torch.tensor(rows)], 10.0, 1 << 20, 1 << 17)
    assert added[-1] == (1 << 17) * (int((norms <= 10).sum()) - int((norms > 10).sum()))
    assert abs(int((norms <= 10).sum()) - 1500) < 200
    assert np.array_equal(clipped_sum([torch.zeros(0, 3)], 1.0, 8, 1), np.zeros(4, np.int64))
    for count in (-1, 9):
        with pytest.raises(ValueError, match="count from 0 to units"):
            clipped_sum([torch.zeros(1, 3)], 1.0, 8, count)


def test_no_rows_add_nothing():
    assert np.array_equal(clipped_sum([torch.zeros(0, 3, 2)], 1.0, 100), np.zeros(6, np.int64))


@pytest.mark.parametrize(("clip", "units", "rows"), [(0.0, 8, 1), (1.0, 0, 1), (1.0, 1 << 50, 8)])
def test_what_the_exactness_rests_on_is_enforced(clip, units, rows):
    with pytest.raises(ValueError, match="use clip > 0 and 1 <= units"):
        clipped_sum([torch.zeros(rows, 2)], clip, units)


# --- rounding to the grid ------------------------------------------------------------------------


@given(st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=20), st.text(max_size=5))
def test_dithering_moves_each_coordinate_by_less_than_one_grid_unit(total, name):
    total = np.array(total, np.int64)
    rounded = dithered(total, Keystream(Seed(bytes(32)), "tests", name.encode()))
    assert (np.abs(rounded * FINE - total) < FINE).all()


def test_dithering_rounds_up_with_the_probability_of_the_fraction():
    count = 200_000
    for fine in (0, 1, FINE // 3, FINE // 2, FINE - 1, -1, -FINE // 4, 7 * FINE + 5):
        drawn = dithered(np.full(count, fine), stream(f"dither {fine}"))
        low = fine // FINE
        share = (fine - low * FINE) / FINE
        up = int((drawn == low + 1).sum())
        assert up + int((drawn == low).sum()) == count
        assert stats.binomtest(up, count, share).pvalue > 1e-4 if share > 0 else up == 0


@given(
    st.integers(1, 12),
    st.integers(1, 1 << 20),
    st.integers(0, 10_000),
    st.sampled_from(["spread", "axis", "halves", "tiny"]),
)
def test_neighbours_with_the_same_rounding_differ_by_at_most_the_sure_bound(d, units, seed, kind):
    """The whole path of a record: float gradient, clip, integer sum, shared dither."""
    rng = np.random.default_rng(seed)
    others = rng.normal(size=(5, d)) * rng.choice([1e-3, 1.0, 1e3])
    record = {
        "spread": rng.normal(size=d) * 10,
        "axis": np.eye(d)[0] * 1e9,
        "halves": np.full(d, (np.floor(units / FINE / math.sqrt(d)) + 0.5) * FINE / units),
        "tiny": rng.choice([-1, 1], d) * 1.5 / units,
    }[kind]
    without = clipped_sum([torch.tensor(others)], 1.0, units)
    with_it = clipped_sum([torch.tensor(np.vstack([others, record]))], 1.0, units)
    moved = dithered(with_it, stream("same")) - dithered(without, stream("same"))
    bound = sensitivity(units / FINE, d, 0.0)
    assert norm_squared(moved) <= bound**2 * (1 + 1e-12)


def test_the_sure_bound_is_nearly_reached():
    """A record of ones and a bit, met by an unlucky dither, moves every coordinate by two."""
    d = 3
    fine = np.full(d, FINE + 1)
    draws = np.frombuffer(stream("unlucky").bytes(2 * d), "<u2").astype(np.int64)
    base = FINE - 1 - draws  # with its dither one fine unit below the next grid unit
    moved = dithered(base + fine, stream("unlucky")) - dithered(base, stream("unlucky"))
    assert moved.tolist() == [2] * d
    clip = math.sqrt(norm_squared(fine)) / FINE
    assert math.sqrt(norm_squared(moved)) >= sensitivity(clip, d, 0.0) * (1 - 1e-4)


def exceeding(x: np.ndarray, bound: float) -> float:
    """P(|R(x)| > bound), by listing every outcome of the stochastic rounding."""
    low, share = np.floor(x), x - np.floor(x)
    law = np.ones(1)
    squares = np.zeros(1)
    for n, p in zip(low, share, strict=True):
        law = np.concatenate([law * (1 - p), law * p])
        squares = np.concatenate([squares + n * n, squares + (n + 1) ** 2])
    return float(law[squares > bound**2 * (1 + 1e-12)].sum())


@pytest.mark.parametrize("dimension", [1, 2, 5, 10])
@pytest.mark.parametrize("clip", [0.3, 1.0, 3.7, 25.0])
@pytest.mark.parametrize("beta", [0.6, 0.1, 1e-3])
def test_no_record_exceeds_the_sensitivity_more_often_than_beta(dimension, clip, beta):
    """By climbing over clipped vectors towards the worst, each with its exact probability."""
    bound = sensitivity(clip, dimension, beta)
    rng = np.random.default_rng(dimension)
    worst = 0.0
    for start in range(6):
        x = rng.normal(size=dimension) if start else np.ones(dimension)
        x *= clip / np.linalg.norm(x)
        value, step = exceeding(x, bound), 0.5
        for _ in range(60):
            y = x + rng.normal(size=dimension) * step * clip / math.sqrt(dimension)
            y *= min(1, clip / np.linalg.norm(y))
            found = exceeding(y, bound)
            if found >= value:
                x, value = y, found
            else:
                step *= 0.93
        worst = max(worst, value)
    assert worst <= beta
    assert exceeding(np.zeros(dimension), bound) == 0


def test_a_bound_that_forgets_the_rounding_would_be_exceeded():
    """The search above is one that finds: the clip itself is no bound for most roundings."""
    x = np.full(10, 1 / math.sqrt(10))
    assert exceeding(x, 1.0) > 0.8
    assert exceeding(x, sensitivity(1.0, 10, 0.1)) <= 0.1


@pytest.mark.parametrize("beta", [0.0, 1e-9, 0.5])
def test_the_sensitivity_approaches_the_clip_on_finer_grids(beta):
    ratios = [sensitivity(c, 10_000, beta) / c for c in (100.0, 1000.0, 10_000.0, 1e5)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.01
    assert all(ratio > 1 for ratio in ratios)
    assert sensitivity(50.0, 10_000, beta) <= sensitivity(50.0, 10_000, 0.0) == 150.0


@pytest.mark.parametrize(
    ("clip", "dimension", "beta"), [(0.0, 1, 0.1), (1.0, 0, 0.1), (1.0, 1, 1.0), (1.0, 1, -0.1)]
)
def test_an_impossible_sensitivity_is_refused(clip, dimension, beta):
    with pytest.raises(ValueError, match="use clip > 0"):
        sensitivity(clip, dimension, beta)


# --- conditional rounding ------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 10_000), st.sampled_from([0.5, 2.0, 50.0]))
def test_conditional_rounding_never_exceeds_its_bound(d, seed, clip):
    rng = np.random.default_rng(seed)
    row = rng.normal(size=d) * rng.choice([0.01, 1, 100])
    fine = clipped_sum([torch.tensor(row[None])], 1.0, math.ceil(clip * FINE))
    bound = sensitivity(math.ceil(clip * FINE) / FINE, d, math.exp(-0.5))
    rounded = conditionally_rounded(fine, bound, stream(str(seed)))
    assert norm_squared(rounded) <= bound**2
    assert (np.abs(rounded * FINE - fine) < FINE).all()


def test_rounding_that_never_fits_falls_back_to_zero_wards():
    fine = np.array([FINE + FINE // 2, -3 * FINE - 1, FINE // 2])
    rounded = conditionally_rounded(fine, 1e-9, stream("never"))
    assert rounded.tolist() == [1, -3, 0]


def test_conditional_rounding_hardly_ever_needs_more_than_a_few_attempts():
    d, clip = 400, 20.0
    row = np.random.default_rng(3).normal(size=(1, d))
    fine = clipped_sum([torch.tensor(row)], 1.0, round(clip * FINE))
    bound = sensitivity(clip, d, math.exp(-0.5))
    source = stream("attempts")
    norms = np.array([norm_squared(dithered(fine, source)) for _ in range(400)])
    assert (norms > bound**2).mean() <= math.exp(-0.5)


# --- hardened noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [16.0, 1000.0, 2.0**18 + 0.3, 2.0**22])
def test_hardened_noise_is_gaussian_and_its_low_bits_are_uniform(deviation):
    total = np.full(200_000, 1 << 40)
    drawn = hardened(total, deviation, stream(f"hard {deviation}")) - total
    assert drawn.std() == pytest.approx(math.sqrt(deviation**2 + 1 / 12), rel=0.01)
    smooth = drawn + stream("between").uniform(len(drawn)) - 0.5
    assert stats.kstest(smooth / deviation, "norm").pvalue > 1e-4
    for modulus in (2, 3, 16):
        assert stats.chisquare(np.bincount(drawn % modulus, minlength=modulus)).pvalue > 1e-4


@pytest.mark.parametrize("variance", [250.0, 1e3, 1e4, 1e6])
def test_the_divergence_from_a_rounded_gaussian_is_within_its_bound(variance):
    """KL(g || f), numerically: twice the variance under g of the logarithm of their ratio / 4."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u, weights = nodes / 2, weights / 2
    j = np.arange(-int(14 * math.sqrt(variance)), int(14 * math.sqrt(variance)) + 1)
    j = j[:: max(1, len(j) // 20_000)].astype(np.float64)
    inside = np.expm1(-j[:, None] * u / variance - u**2 / (2 * variance))
    ratio = np.log1p(inside @ weights) - j**2 / (24 * variance**2) / (1 + 1 / (12 * variance))
    g = np.exp(-(j**2) / (2 * (variance + 1 / 12)))
    g /= g.sum()
    ratio -= ratio @ g
    # KL(g || f) = log E_g[f / g] - E_g[log(f / g)] for f / g = exp(ratio) up to its mass.
    divergence = float(np.log1p(np.expm1(ratio) @ g))
    assert divergence <= noise.divergence_from_rounded(variance)
    x = j / math.sqrt(variance)
    bound = (x**4 / 192 + x**2 / 135) / variance**2
    middle = len(j) // 2
    assert (np.abs(ratio - ratio[middle]) <= bound + 1e-14).all()


def test_a_divergence_is_not_claimed_where_it_is_not_proven():
    with pytest.raises(ValueError, match="use at least 250"):
        noise.divergence_from_rounded(249.0)


def test_hardening_costs_next_to_nothing_where_the_units_are_fine():
    assert hardening_distance(2.0**18, 1_000_000) < 1e-18
    assert hardening_distance(2.0**18, 100) < hardening_distance(2.0**18, 1000)
    assert hardening_distance(100.0, 100) > hardening_distance(200.0, 100)


@pytest.mark.parametrize("deviation", [0.0, 15.9, 2.0**23 + 1, math.nan])
def test_a_deviation_that_cannot_be_hardened_is_refused(deviation):
    with pytest.raises(ValueError, match=r"use 16 to 2\^23"):
        hardened(np.zeros(1, np.int64), deviation, stream("x"))


def test_all_noise_and_rounding_come_from_the_keystream():
    total = np.arange(1000) * 12_345
    for work in (
        lambda s: dithered(total, s),
        lambda s: hardened(total, 1e5, s),
        lambda s: conditionally_rounded(total, 1e9, s),
    ):
        assert np.array_equal(work(stream("a")), work(stream("a")))
        assert not np.array_equal(work(stream("a")), work(stream("b")))
