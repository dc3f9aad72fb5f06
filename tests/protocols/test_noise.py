"""The discrete Gaussian sampler: the exact mass function, in both tails, and how far it is off."""

from __future__ import annotations

from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from protocols import noise
from protocols.keystream import Keystream, Seed
from protocols.noise import DiscreteGaussian

SIGMAS = [0.5, 0.9, 2.0, 3.7, 50.0, 700.0]
DRAWS = 400_000


def stream(name: str) -> Keystream:
    return Keystream(Seed(name.encode().ljust(32, b"\0")), "tests")


def masses(sigma: float, reach: int) -> np.ndarray:
    """P(X = x) for |x| <= reach, by the definition."""
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()


def chi_square(drawn: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of integers drawn around zero against masses; rare values are pooled by tail."""
    reach = len(expected) // 2
    counts = np.bincount(np.clip(drawn + reach, 0, 2 * reach), minlength=len(expected))
    cumulated = np.cumsum(expected) * len(drawn)
    # Cells of at least 20 expected draws each, cut at quantiles of the exact distribution.
    cells = (cumulated / max(20.0, len(drawn) / 500)).astype(np.int64)
    size = cells.max() + 1
    observed = np.bincount(cells, counts, size)
    wanted = np.bincount(cells, expected * len(drawn), size)
    filled = wanted > 0
    observed, wanted = observed[filled], wanted[filled]
    if wanted[-1] < 20:
        observed = np.append(observed[:-2], observed[-2:].sum())
        wanted = np.append(wanted[:-2], wanted[-2:].sum())
    return float(stats.chisquare(observed, wanted, sum_check=False).pvalue)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_draws_have_the_exact_mass_function(sigma):
    drawn = DiscreteGaussian(sigma).sample(stream(f"mass {sigma}"), DRAWS)
    assert chi_square(drawn, masses(sigma, int(14 * sigma) + 1)) > 1e-4


@pytest.mark.parametrize("wrong", [1.02, 0.98])
def test_the_chi_square_test_notices_two_percent_of_sigma(wrong):
    drawn = DiscreteGaussian(50.0 * wrong).sample(stream("wrong"), DRAWS)
    assert chi_square(drawn, masses(50.0, 701)) < 1e-9


@pytest.mark.parametrize("sigma", [2048.5, 5e4, 2.0**20, 2.0**24])
def test_draws_of_two_parts_have_the_mass_function_of_one(sigma):
    """Of their values beside the continuous Gaussian, and of their low bits beside uniform."""
    drawn = DiscreteGaussian(sigma).sample(stream(f"parts {sigma}"), DRAWS)
    assert stats.kstest((drawn + 0.25) / sigma, "norm").pvalue > 1e-4
    for modulus in (2, 7, round((sigma / 6**0.5) ** 0.5)):
        residues = np.bincount(drawn % modulus, minlength=modulus)
        assert stats.chisquare(residues).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [2.0, 50.0, 1e5])
def test_both_tails_are_there_and_alike(sigma):
    drawn = DiscreteGaussian(sigma).sample(stream(f"tails {sigma}"), DRAWS)
    for z in (1.0, 2.0, 3.0):
        at = int(np.ceil(z * sigma))
        above, below = int((drawn >= at).sum()), int((drawn <= -at).sum())
        beyond = masses(sigma, int(14 * sigma) + 1)[: int(14 * sigma) + 2 - at].sum()
        spread = 5 * (beyond * DRAWS) ** 0.5
        assert abs(above - beyond * DRAWS) < spread
        assert abs(below - beyond * DRAWS) < spread
    assert drawn.max() > 4 * sigma
    assert drawn.min() < -4 * sigma
    assert abs(drawn.mean()) < 5 * sigma / DRAWS**0.5


@pytest.mark.parametrize(("shares", "sigma"), [(2, 0.8), (5, 2.0), (16, 3.3)])
def test_sums_of_shares_follow_the_exact_convolution(shares, sigma):
    one = masses(sigma, int(14 * sigma) + 1)
    law = np.ones(1)
    for _ in range(shares):
        law = np.convolve(law, one)
    total = sum(DiscreteGaussian(sigma).sample(stream(f"share {i}"), DRAWS) for i in range(shares))
    assert chi_square(total, law) > 1e-4


@given(st.floats(0.5, 1e5), st.integers(0, 40_000))
def test_a_seed_gives_the_same_draws_again(sigma, count):
    first, again = (DiscreteGaussian(sigma).sample(stream("seed"), count) for _ in range(2))
    assert first.shape == (count,)
    assert first.dtype == np.int64
    assert np.array_equal(first, again)


def test_draws_of_one_seed_are_not_those_of_another():
    one, other = (DiscreteGaussian(50.0).sample(stream(name), 10_000) for name in "ab")
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.05


# --- how far it is off ---------------------------------------------------------------------------


def distance(table, variance: Fraction) -> Decimal:
    """The statistical distance of what the table yields from N_Z(0, variance), to 100 digits."""
    with localcontext() as context:
        context.prec = 100
        two_v = 2 * Decimal(variance.numerator) / Decimal(variance.denominator)
        reach = int((two_v * 400).sqrt()) + 2  # exp(-400) < 10^-173
        weights = [(-Decimal(j * j) / two_v).exp() for j in range(reach + 1)]
        total = weights[0] + 2 * sum(weights[1:])
        bounds = [0, *table.cumulative, 1 << 127]
        off = Decimal(0)
        for j in range(reach + 1):
            ours = Decimal(0)
            if j < len(bounds) - 1:
                ours = Decimal(bounds[j + 1] - bounds[j]) / Decimal(1 << 127)
            off += abs(ours - weights[j] * (1 if j == 0 else 2) / total)
        return off / 2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 10.3, 150.0])
def test_tau_bounds_the_true_distance_and_is_tiny(sigma):
    gaussian = DiscreteGaussian(sigma)
    ((scale, table),) = noise._parts(sigma)
    assert scale == 1
    assert distance(table, Fraction(sigma) ** 2) <= Decimal(gaussian.tau)
    assert gaussian.tau < 2.0**-100


@pytest.mark.parametrize("sigma", [2048.5, 123_456.789, 2.0**20, 2.0**24])
def test_two_parts_have_exactly_the_variance_and_enough_overlap(sigma):
    (one, fine), (k, coarse) = noise._parts(sigma)
    variance = Fraction(sigma) ** 2
    v_fine = Fraction(6 * int(k) ** 2)
    v_coarse = (variance - v_fine) / int(k) ** 2
    assert one == 1
    assert v_fine * v_coarse / variance > 5  # s^2 of the docstring
    assert DiscreteGaussian(sigma).tau < 2.0**-100
    if sigma < 1e5:  # the tables are those of the two variances
        assert distance(fine, v_fine) <= Decimal(fine.tau)
        assert distance(coarse, v_coarse) <= Decimal(coarse.tau)


def test_the_law_of_two_parts_is_the_gaussian_as_closely_as_the_docstring_says():
    """By convolution with a small s^2, where the error can be seen in float64."""
    k, v_fine, v_coarse = 3, 0.9, 30.0
    sigma = (v_fine + k * k * v_coarse) ** 0.5
    s2 = v_fine * v_coarse / sigma**2
    fine, coarse = masses(v_fine**0.5, 40), masses(v_coarse**0.5, 90)
    spread = np.zeros(2 * 270 + 1)
    spread[::k] = coarse
    law = np.convolve(fine, spread)
    true = masses(sigma, len(law) // 2)
    likely = true > 1e-8
    off = np.abs(law[likely] / true[likely] - 1).max()
    bound = 2 * 2 * np.exp(-2 * np.pi**2 * s2) / (1 - 4 * np.exp(-2 * np.pi**2 * s2))
    assert 1e-3 < off <= bound


# --- the edge of a 63-bit uniform ----------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 50.0, 2000.0])
def test_every_boundary_is_decided_by_all_127_bits(sigma):
    """Just below, at, and just above each cumulative mass, with either sign."""
    ((_, table),) = noise._parts(sigma)
    step = max(1, len(table.cumulative) // 200)
    for boundary in (*table.cumulative[::step], *table.cumulative[-5:]):
        for uniform in (boundary - 1, boundary, boundary + 1):
            if not 0 <= uniform < 1 << 127:
                continue
            high, low = uniform >> 64, uniform & (1 << 64) - 1
            expected = bisect_right(table.cumulative, uniform)
            for sign in (0, 1):
                word, more = np.array([high << 1 | sign], np.uint64), np.array([low], np.uint64)
                drawn = table.invert(word, lambda _, more=more: more)
                assert drawn[0] == (-expected if sign else expected)


def test_the_guide_changes_nothing():
    """Against a plain search, on uniform words and on the ends of every bucket."""
    for sigma in (0.7, 33.0, 2048.0):
        ((_, table),) = noise._parts(sigma)
        starts = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
        words = np.concatenate(
            [starts, starts - np.uint64(1), stream("guide").words(50_000)]
        ) | np.uint64(1)
        drawn = table.invert(words, stream("ties").words)
        plain = np.searchsorted(table.high, words >> np.uint64(1), side="right")
        ties = np.isin(words >> np.uint64(1), table.high)
        assert np.array_equal(-drawn[~ties], plain[~ties])


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.49, 2.0**24 + 1, float("nan"), float("inf")])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError, match=r"the sampler takes 0\.5 to 2\^24"):
        DiscreteGaussian(sigma)


def test_the_value_is_frozen_and_shows_no_draw():
    gaussian = DiscreteGaussian(3.0)
    with pytest.raises(AttributeError):
        gaussian.sigma = 1.0  # type: ignore[misc]
    assert repr(gaussian) == "DiscreteGaussian(sigma=3.0)"
