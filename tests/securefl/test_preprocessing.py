"""Preprocessing from sums: what all rows together would give, wherever they lie."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from protocols.errors import MalformedMessageError
from protocols.keystream import Keystream, Seed
from protocols.noise import DiscreteGaussian
from securefl import schema
from securefl.config import Data, Preprocessing
from securefl.data.frames import Frame
from securefl.preprocessing import NOISY, Fitted, FittedNumber, Precision, Preprocessor
from securefl.sections import ConfigurationError

WARD = schema.parse(
    """
version = 1
name = "ward"
label = "outcome"
person = "patient"
[columns]
age = {type = "number", range = [0, 120], unit = "years"}
pressure = {type = "number", range = [-1e6, 1e6]}
job = {type = "category", categories = ["nurse", "clerk", "diver"], outside = "other"}
sex = {type = "category", categories = ["f", "m"]}
patient = {type = "text"}
outcome = {type = "category", categories = ["well", "ill", "dead"]}
"""
)
RANGES = {"age": (0.0, 120.0), "pressure": (-1e6, 1e6)}
STAY = schema.parse(
    """
version = 1
name = "stay"
label = "days"
[columns]
age = {type = "number", range = [0, 120]}
days = {type = "number", range = [0, 60]}
"""
)
SCAN = schema.parse(
    """
version = 1
name = "scan"
label = "finding"
[columns]
file = {type = "image", height = 2, width = 3, channels = 3}
finding = {type = "category", categories = ["no", "yes"]}
"""
)
EXACT = Precision.exact(44)
EVERYTHING = Preprocessing(
    clip_quantiles=(0.05, 0.95), impute="median", indicators=True, class_weights="balanced", bins=16
)


def make(said: Preprocessing, precision: Precision = EXACT, of=WARD, **data) -> Preprocessor:
    return Preprocessor(Data(source="table", agreed=of, **data), said, precision)


def draw(rng: np.random.Generator, rows: int) -> Frame:
    """Rows of a ward, with gaps everywhere."""
    age = np.clip(rng.normal(55, 15, rows), 0, 120)
    pressure = np.clip(rng.standard_t(2, rows) * 3e4 - 2e5, -1e6, 1e6)
    for column in (age, pressure):
        column[rng.random(rows) < 0.1] = np.nan
    codes = {
        "job": rng.choice([-1, 0, 1, 2, 3], rows, p=[0.1, 0.6, 0.2, 0.01, 0.09]),
        "sex": rng.integers(-1, 2, rows),
        "outcome": rng.choice([-1, 0, 1, 2], rows, p=[0.05, 0.7, 0.2, 0.05]),
    }
    return Frame(
        WARD,
        rows,
        {"age": age, "pressure": pressure},
        {name: code.astype(np.int32) for name, code in codes.items()},
        {"patient": np.array([f"p{n // 3}" for n in range(rows)], dtype=np.str_)},
    )


def fit(preprocessor: Preprocessor, *sites: Frame, noise=None, share=None) -> Fitted:
    """All stages, one after the other; `noise(stage, dimension)` is added to each sum."""
    fitted = preprocessor.start()
    for stage in range(preprocessor.stages):
        total = sum(preprocessor.encode(stage, fitted, site, share) for site in sites)
        if noise is not None:
            total = total + noise(stage, len(total))
        fitted = preprocessor.fit(stage, fitted, total, 0.0)
    return fitted


numbers = st.sampled_from([np.nan, 0.0, 120.0, 1e-9, 119.99999]) | st.floats(0, 120)
pressures = st.sampled_from([np.nan, -1e6, 1e6, 0.0]) | st.floats(-1e6, 1e6)


@st.composite
def frames(draw_, min_rows=0, max_rows=12) -> Frame:
    rows = draw_(st.integers(min_rows, max_rows))

    def column(values):
        return draw_(st.lists(values, min_size=rows, max_size=rows))

    def codes(values):
        return np.array(column(st.integers(-1, values)), np.int32)

    return Frame(
        WARD,
        rows,
        {
            "age": np.array(column(numbers), np.float64),
            "pressure": np.array(column(pressures), np.float64),
        },
        {"job": codes(3), "sex": codes(1), "outcome": codes(2)},
        {"patient": np.array(column(st.sampled_from("abc")), dtype=np.str_)},
    )


settings_ = st.builds(
    Preprocessing,
    scale=st.sampled_from(["standardise", "range"]),
    impute=st.sampled_from(["mean", "median", "middle"]),
    indicators=st.booleans(),
    clip_quantiles=st.sampled_from([None, (0.1, 0.9), (0.49, 0.51)]),
    bins=st.sampled_from([2, 7, 64]),
    required=st.sampled_from([(), ("age",), ("age", "pressure"), ("sex",)]),
    minimum_count=st.sampled_from([0, 1, 3]),
    class_weights=st.sampled_from(["none", "balanced"]),
)


# ------------------------------------------------------------------ federated is pooled


@settings(max_examples=60)
@given(frames(), settings_, st.lists(st.integers(0, 12), max_size=4), st.integers(24, 62))
def test_any_division_of_the_rows_fits_the_same_bit_for_bit(frame, said, cuts, slot_bits):
    """Sites of any size, empty ones among them: the fitted values are those of all rows."""
    preprocessor = make(said, Precision.exact(slot_bits))
    edges = [0, *sorted(min(cut, len(frame)) for cut in cuts), len(frame)]
    sites = [frame.take(np.arange(a, b)) for a, b in pairwise(edges)]
    assert fit(preprocessor, *sites).to_bytes() == fit(preprocessor, frame).to_bytes()


@pytest.mark.parametrize("rows", [1, 4095, 4096, 4097, 20_000])
def test_rows_beyond_one_chunk_fit_the_same_too(rows):
    rng = np.random.default_rng(rows)
    preprocessor = make(EVERYTHING)
    frame = draw(rng, rows)
    order = rng.permutation(rows)
    sites = [frame.take(part) for part in np.array_split(order, 3)]
    assert fit(preprocessor, *sites) == fit(preprocessor, frame)


@pytest.mark.parametrize("slot_bits", [24, 33, 37, 44, 62])
def test_sums_of_digits_stay_within_a_slot_and_join_exactly(slot_bits):
    """The largest sums of 2^31 rows at each of 2^16 sites: no digit's sum needs more bits."""
    precision = Precision.exact(slot_bits)
    rng = np.random.default_rng(slot_bits)
    for most in (2**81, 2**50, 1, 0):
        values = [most, -most, *(int(v * most) for v in rng.uniform(-1, 1, 20))]
        digits = precision.split(np.array(values, dtype=object))
        assert precision.join(digits) == values
        assert max(abs(int(d)) for d in digits) * 2**16 < 2 ** (slot_bits - 1)


# ------------------------------------------------------------------ the pooled truth


@pytest.mark.parametrize("spread", [1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_standardising_is_scikit_learns_on_the_pooled_rows(spread, offset):
    """Mean and deviation to 1e-9 of the range, features to what float32 holds."""
    rng = np.random.default_rng(1)
    frame = draw(rng, 3000)
    for name, (low, high) in RANGES.items():
        y = np.clip(offset + spread * rng.standard_normal(3000), -1, 1)
        gaps = np.isnan(frame.numbers[name])
        frame.numbers[name][:] = np.where(gaps, np.nan, low + (y + 1) / 2 * (high - low))
    preprocessor = make(Preprocessing(minimum_count=0))
    sites = [frame.take(part) for part in np.array_split(np.arange(3000), [10, 900])]
    fitted = fit(preprocessor, *sites)

    kept = frame.take(preprocessor.usable(frame))
    pooled = np.stack([kept.numbers[name] for name in RANGES], axis=1)
    scaler, imputer = StandardScaler().fit(pooled), SimpleImputer().fit(pooled)
    for k, number in enumerate(fitted.numbers):
        tolerance = 1e-9 * (number.high - number.low)
        assert abs(number.centre - scaler.mean_[k]) < tolerance
        assert abs(number.fill - imputer.statistics_[k]) < tolerance
        assert abs(number.spread - scaler.scale_[k]) < tolerance
        assert number.known == (~np.isnan(pooled[:, k])).sum()
    expected = scaler.transform(imputer.transform(pooled))
    given_ = preprocessor.apply(fitted, frame).features[:, :2]
    np.testing.assert_allclose(given_, expected, atol=2e-5 + 1e-9 / spread, rtol=1e-5)


@settings(max_examples=60)
@given(frames(min_rows=1), st.sampled_from(["age", "pressure"]))
def test_means_of_any_values_are_numpys_to_a_billionth_of_the_range(frame, name):
    preprocessor = make(Preprocessing())
    values = frame.numbers[name][frame.labelled]
    assume(not np.isnan(values).all())
    fitted = {n.name: n for n in fit(preprocessor, frame).numbers}[name]
    low, high = RANGES[name]
    assert abs(fitted.centre - np.nanmean(values)) <= 1e-9 * (high - low)
    if np.nanstd(values) > 1e-6 * (high - low):
        assert abs(fitted.spread - np.nanstd(values)) <= 1e-9 * (high - low)


@settings(max_examples=60)
@given(
    npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 120)),
    st.sampled_from([2, 10, 256]),
    st.sampled_from([(0.05, 0.95), (0.25, 0.5), (0.001, 0.999)]),
)
def test_quantiles_are_within_a_bin_of_numpys(ages, bins, shares):
    """Clipping bounds hold the quantile in their bin and clip no more than was asked; the median
    is in the same bin as numpy's."""
    frame = Frame(STAY, len(ages), {"age": ages, "days": np.zeros(len(ages))})
    said = Preprocessing(clip_quantiles=shares, bins=bins, impute="median")
    (number,) = fit(make(said, of=STAY), frame).numbers
    low, high = np.quantile(ages, shares, method="inverted_cdf")
    one = 120 / bins * (1 + 1e-9)
    assert low - one <= number.low <= low + 1e-9
    assert high - 1e-9 <= number.high <= high + one
    median = np.quantile(ages, 0.5, method="inverted_cdf")
    assert abs(number.fill - median) <= one


def test_clipped_values_are_what_the_second_sum_is_of():
    frame = draw(np.random.default_rng(2), 5000)
    preprocessor = make(Preprocessing(clip_quantiles=(0.1, 0.9)))
    fitted = fit(preprocessor, frame)
    assert preprocessor.stages == 2
    for number in fitted.numbers:
        values = frame.numbers[number.name][frame.labelled]
        values = np.clip(values[~np.isnan(values)], number.low, number.high)
        low, high = RANGES[number.name]
        assert low < number.low < number.high < high
        assert abs(number.centre - values.mean()) < 1e-9 * (high - low)
        assert abs(number.fill - values.mean()) < 1e-9 * (high - low)
        assert abs(number.spread - values.std()) < 1e-9 * (high - low)


def test_rare_categories_are_merged_and_classes_balanced_as_scikit_learn_does():
    frame = draw(np.random.default_rng(3), 4000)
    preprocessor = make(Preprocessing(class_weights="balanced", minimum_count=100))
    fitted = fit(preprocessor, frame)
    kept = frame.take(frame.labelled)
    for category in fitted.categories:
        counts = [(kept.codes[category.name] == c).sum() for c in range(len(category.merged))]
        assert category.merged == tuple(count < 100 for count in counts)
    assert fitted.categories[0].merged == (False, False, True)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=kept.target)
    np.testing.assert_allclose(fitted.weights, expected, rtol=1e-12)
    assert fitted.rows == len(kept)
    assert fitted.exact


# ------------------------------------------------------------------ what is fixed beforehand


@pytest.mark.parametrize(
    ("said", "stages"),
    [
        ({"scale": "range", "impute": "middle", "minimum_count": 0}, 0),
        ({"scale": "range", "impute": "middle", "minimum_count": 1}, 1),
        ({"scale": "range", "impute": "mean", "minimum_count": 0}, 1),
        ({"scale": "range", "impute": "mean", "minimum_count": 0, "required": list(RANGES)}, 0),
        ({"scale": "range", "impute": "median", "minimum_count": 0}, 1),
        ({"scale": "range", "impute": "middle", "clip_quantiles": (0.1, 0.9)}, 1),
        ({"scale": "range", "impute": "mean", "clip_quantiles": (0.1, 0.9)}, 2),
        ({}, 1),
        ({"clip_quantiles": (0.1, 0.9)}, 2),
    ],
)
def test_nothing_is_summed_that_the_configuration_does_not_need(said, stages):
    assert make(Preprocessing(**said)).stages == stages


def test_what_is_summed_is_no_longer_than_it_must_be():
    """Rows, two missing counts, five categories; means and deviations in `digits` integers each."""
    assert make(Preprocessing()).dimension(0) == 1 + 2 + 5 + 4 * EXACT.digits
    assert make(Preprocessing(), NOISY).dimension(0) == 1 + 2 + 5 + 4
    needed = Preprocessing(required=tuple(RANGES), minimum_count=0)
    assert make(needed, NOISY).dimension(0) == 1 + 4
    everything = make(EVERYTHING, NOISY)
    assert everything.dimension(0) == 1 + 2 + 2 * 16 + 5 + 3
    assert everything.dimension(1) == 4


@given(frames(), settings_)
@settings(max_examples=60)
def test_inputs_are_fixed_by_configuration_and_features_are_finite(frame, said):
    """Whatever was fitted from whatever rows: the same names, and what a table accepts."""
    preprocessor = make(said)
    names = preprocessor.inputs
    fitted = fit(preprocessor, frame)
    table = preprocessor.apply(fitted, frame)
    assert table.names == names == tuple(dict(preprocessor.described(fitted)))
    assert table.shape == preprocessor.shape == (len(names),)
    assert table.outputs == preprocessor.outputs == 3
    assert len(table) == preprocessor.usable(frame).sum()
    assert np.isfinite(table.features).all()
    for name, column in zip(names, table.features.T, strict=True):
        if "=" in name or name.endswith("(missing)"):
            assert set(column.tolist()) <= {0.0, 1.0}
    for prefix in ("job=", "sex="):
        lit = [k for k, name in enumerate(names) if name.startswith(prefix)]
        known = frame.codes[prefix[:-1]][preprocessor.usable(frame)] >= 0
        assert (table.features[:, lit].sum(1) == known).all()


def test_features_are_what_the_names_say():
    frame = Frame(
        WARD,
        5,
        {
            "age": np.array([0.0, 120.0, np.nan, 60.0, 30.0]),
            "pressure": np.array([-1e6, 1e6, 0.0, np.nan, 5e5]),
        },
        {
            "job": np.array([0, 1, 3, -1, 2], np.int32),
            "sex": np.array([0, 1, -1, 0, 1], np.int32),
            "outcome": np.array([0, 1, 2, -1, 1], np.int32),
        },
        {"patient": np.array(["a", "a", "b", "c", ""])},
    )
    said = Preprocessing(scale="range", impute="middle", indicators=True, minimum_count=0)
    preprocessor = make(said)
    table = preprocessor.apply(preprocessor.start(), frame)
    assert table.names == (
        *("age", "age (missing)", "pressure", "pressure (missing)"),
        *("job=nurse", "job=clerk", "job=diver", "job=(other)", "sex=f", "sex=m"),
    )
    np.testing.assert_array_equal(
        table.features,
        [  # the fourth row has no label
            [-1, 0, -1, 0, 1, 0, 0, 0, 1, 0],
            [1, 0, 1, 0, 0, 1, 0, 0, 0, 1],
            [0, 1, 0, 0, 0, 0, 0, 1, 0, 0],
            [-0.5, 0, 0.5, 0, 0, 0, 1, 0, 0, 1],
        ],
    )
    assert table.target.tolist() == [0, 1, 2, 1]
    assert table.groups["patient"].tolist() == ["a", "a", "b", ""]
    rare = replace_merged(preprocessor.start(), job=(False, False, True))
    merged = make(said.model_copy(update={"minimum_count": 5}))
    features = merged.apply(replace_sums(rare, 1), frame).features
    assert features[3, 4:8].tolist() == [0, 0, 0, 1]


def replace_merged(fitted: Fitted, **merged: tuple[bool, ...]) -> Fitted:
    categories = tuple(type(c)(c.name, merged.get(c.name, c.merged)) for c in fitted.categories)
    return Fitted(
        fitted.sums, fitted.exact, fitted.rows, fitted.numbers, categories, fitted.weights
    )


def replace_sums(fitted: Fitted, sums: int) -> Fitted:
    return Fitted(
        sums, fitted.exact, fitted.rows, fitted.numbers, fitted.categories, fitted.weights
    )


def test_a_row_without_a_required_value_is_left_out():
    frame = draw(np.random.default_rng(4), 500)
    preprocessor = make(Preprocessing(required=("age", "sex"), indicators=True))
    table = preprocessor.apply(fit(preprocessor, frame), frame)
    expected = frame.labelled & ~np.isnan(frame.numbers["age"]) & (frame.codes["sex"] >= 0)
    assert len(table) == expected.sum() < frame.labelled.sum()
    assert "age (missing)" not in table.names
    assert "pressure (missing)" in table.names


def test_constant_and_unseen_columns_do_not_blow_up():
    """They give 0 for what was seen, and at most 2 for what was not."""
    rows = 40
    frame = draw(np.random.default_rng(5), rows)
    frame.numbers["age"][:] = 17.3
    frame.numbers["pressure"][:] = np.nan
    preprocessor = make(Preprocessing())
    fitted = fit(preprocessor, frame)
    table = preprocessor.apply(fitted, frame)
    np.testing.assert_allclose(table.features[:, 0], 0, atol=1e-6)
    np.testing.assert_array_equal(table.features[:, 1], 0)
    frame.numbers["age"][:] = 120.0
    frame.numbers["pressure"][:] = -1e6
    assert np.abs(preprocessor.apply(fitted, frame).features[:, :2]).max() <= 2


def test_a_regression_label_is_mapped_by_its_range():
    frame = Frame(STAY, 3, {"age": np.zeros(3), "days": np.array([0.0, np.nan, 45.0])})
    preprocessor = make(Preprocessing(), of=STAY)
    table = preprocessor.apply(fit(preprocessor, frame), frame)
    assert table.target.tolist() == [-1.0, 0.5]
    assert table.target_range == (0.0, 60.0)
    assert preprocessor.outputs == 1
    assert preprocessor.inputs == ("age",)


def test_images_are_mapped_onto_minus_one_to_one():
    images = np.arange(3 * 3 * 2 * 3).reshape(3, 3, 2, 3).astype(np.uint8)
    images[0] = 255
    codes = {"finding": np.array([0, -1, 1], np.int32)}
    frame = Frame(SCAN, 3, {}, codes, {}, images)
    preprocessor = make(Preprocessing(), of=SCAN)
    assert preprocessor.stages == 0
    table = preprocessor.apply(preprocessor.start(), frame)
    assert table.shape == preprocessor.shape == (3, 2, 3)
    assert table.names[0] == "red_0_0"
    assert table.names[-1] == "blue_1_2"
    expected = images[[0, 2]].astype(np.float64) / 255 * 2 - 1
    np.testing.assert_allclose(table.features, expected, atol=1e-6)
    assert (table.features[0] == 1).all()
    assert make(Preprocessing(class_weights="balanced"), of=SCAN).stages == 1


# ------------------------------------------------------------------ privacy


def norm(moved) -> float:
    return math.sqrt(sum(int(value) ** 2 for value in moved))


def befores(preprocessor: Preprocessor) -> list[Fitted]:
    """What each stage is encoded after."""
    fitted, found = preprocessor.start(), []
    rest = draw(np.random.default_rng(6), 200)
    for stage in range(preprocessor.stages):
        found.append(fitted)
        total = preprocessor.encode(stage, fitted, rest, None)
        fitted = preprocessor.fit(stage, fitted, total, 0.0)
    return found


@settings(max_examples=150)
@given(frames(max_rows=4), frames(min_rows=1, max_rows=1), settings_)
def test_a_record_moves_the_sum_by_at_most_the_sensitivity(others, record, said):
    """Extreme values, gaps and categories, added to whatever else a site has."""
    preprocessor = make(said, NOISY)
    both = joined(others, record)
    for stage, before in enumerate(befores(preprocessor)):
        moved = preprocessor.encode(stage, before, both, None) - preprocessor.encode(
            stage, before, others, None
        )
        assert norm(moved) <= preprocessor.sensitivity(stage)


@settings(max_examples=150)
@given(frames(max_rows=4), frames(min_rows=1), settings_)
def test_a_person_with_any_rows_moves_the_sum_by_at_most_the_sensitivity(others, rows, said):
    """All rows of one person together count as one, however many and whatever they hold."""
    preprocessor = make(said, NOISY)
    alone, share = np.ones(len(others)), np.full(len(rows), 1 / len(rows))
    for stage, before in enumerate(befores(preprocessor)):
        both = preprocessor.encode(
            stage, before, joined(others, rows), np.concatenate([alone, share])
        )
        moved = both - preprocessor.encode(stage, before, others, alone)
        assert norm(moved) <= preprocessor.sensitivity(stage)


def joined(first: Frame, second: Frame) -> Frame:
    def both(a, b):
        return {name: np.concatenate([a[name], b[name]]) for name in a}

    return replace(
        first,
        rows=len(first) + len(second),
        numbers=both(first.numbers, second.numbers),
        codes=both(first.codes, second.codes),
        texts=both(first.texts, second.texts),
    )


@pytest.mark.parametrize("said", [Preprocessing(), EVERYTHING], ids=["default", "everything"])
def test_the_sensitivity_is_close_to_what_the_worst_record_does(said):
    """The bound is no looser than 1 % beyond rounding: noise is not wasted."""
    preprocessor = make(said, NOISY)
    worst = Frame(
        WARD,
        1,
        {"age": np.array([120.0]), "pressure": np.array([-1e6])},
        {n: np.array([c], np.int32) for n, c in (("job", 0), ("sex", 1), ("outcome", 1))},
        {"patient": np.array(["x"])},
    )
    for stage, before in enumerate(befores(preprocessor)):
        moved = norm(preprocessor.encode(stage, before, worst, None))
        assert moved <= preprocessor.sensitivity(stage) <= 1.01 * moved


def test_people_count_once_however_many_rows_they_have():
    """One person with 10,000 rows and 99 with one: the mean is of people."""
    rows = 10_000 + 99
    ages = np.concatenate([np.full(10_000, 100.0), np.full(99, 40.0)])
    share = np.concatenate([np.full(10_000, 1 / 10_000), np.ones(99)])
    frame = Frame(STAY, rows, {"age": ages, "days": np.zeros(rows)})
    (number,) = fit(make(Preprocessing(), NOISY, STAY), frame, share=share).numbers
    assert number.known == pytest.approx(100, abs=0.01)
    assert number.centre == pytest.approx(40.6, abs=0.02)


def test_exact_sums_promise_no_sensitivity_and_take_no_shares():
    preprocessor = make(Preprocessing())
    with pytest.raises(ValueError, match="NOISY"):
        preprocessor.sensitivity(0)
    frame = draw(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="noise"):
        preprocessor.encode(0, preprocessor.start(), frame, np.ones(3))
    total = preprocessor.encode(0, preprocessor.start(), frame, None)
    with pytest.raises(ValueError, match="deviation"):
        preprocessor.fit(0, preprocessor.start(), total, 1.0)


@pytest.mark.parametrize("share", [[0.0, 1, 1], [1, 2, 1], [1, 1], [1, np.nan, 1]])
def test_shares_that_are_none_are_refused(share):
    preprocessor = make(Preprocessing(), NOISY)
    frame = draw(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="share"):
        preprocessor.encode(0, preprocessor.start(), frame, np.array(share, float))


integers = st.integers(-(2**62), 2**62) | st.integers(-10, 10) | st.integers(-(10**6), 10**6)


@settings(max_examples=100)
@given(settings_, st.sampled_from([0.0, 3.0, 1e6, 1e18]), st.data())
def test_totals_of_any_size_fit_something_finite_and_bounded(said, deviation, data):
    """With noise of any size a feature stays within 1,000, and every figure in its domain."""
    preprocessor = make(said, NOISY)
    fitted = preprocessor.start()
    for stage in range(preprocessor.stages):
        size = preprocessor.dimension(stage)
        total = data.draw(npst.arrays(np.int64, size, elements=integers, fill=integers))
        fitted = preprocessor.fit(stage, fitted, total, deviation)
    assert Fitted.from_bytes(fitted.to_bytes()) == fitted
    for number in fitted.numbers:
        low, high = RANGES[number.name]
        assert low <= number.low <= number.centre <= number.high <= high or said.scale == "range"
        assert number.spread * 1000.0001 >= number.high - number.low
    # Exact weights are one over the frequency, however small.
    most = 100 if deviation else np.inf
    assert all(0 < weight <= most and np.isfinite(weight) for weight in fitted.weights)
    frame = draw(np.random.default_rng(7), 50)
    features = preprocessor.apply(fitted, frame).features
    assert np.isfinite(features).all()
    assert np.abs(features).max() <= 1001


@settings(max_examples=50)
@given(settings_, st.data())
def test_exact_sums_of_nonsense_fit_something_finite_too(said, data):
    """A faulty protocol cannot make a site fail, or its features infinite."""
    preprocessor = make(said)
    fitted = preprocessor.start()
    for stage in range(preprocessor.stages):
        size = preprocessor.dimension(stage)
        total = data.draw(npst.arrays(np.int64, size, elements=integers, fill=integers))
        fitted = preprocessor.fit(stage, fitted, total, 0.0)
    frame = draw(np.random.default_rng(7), 50)
    assert np.isfinite(preprocessor.apply(fitted, frame).features).all()


def test_with_noise_figures_are_as_close_as_the_noise_allows():
    """Four sites, noise of 20 records: means and deviations within six of its deviations."""
    sites = [draw(np.random.default_rng(seed), 5000) for seed in range(4)]
    source = Keystream(Seed(bytes(32)), "tests")
    for said in (Preprocessing(), Preprocessing(clip_quantiles=(0.01, 0.99), impute="median")):
        noisy, exact = make(said, NOISY), make(said)
        deviation = 20.0 * 4096

        def noise(stage: int, size: int, deviation=deviation) -> np.ndarray:
            return DiscreteGaussian(deviation).sample(source, size)

        told, true = fit(noisy, *sites, noise=noise), fit(exact, *sites)
        assert not told.exact
        assert told.rows == pytest.approx(true.rows, abs=6 * 20)
        for ours, theirs in zip(told.numbers, true.numbers, strict=True):
            low, high = RANGES[ours.name]
            one = (high - low) / 2 * 20 / true.rows  # of a mean
            if said.clip_quantiles is None:
                assert abs(ours.centre - theirs.centre) < 12 * one
                assert abs(ours.spread**2 - theirs.spread**2) < 24 * one * (high - low) / 2
            else:
                assert abs(ours.low - theirs.low) < (high - low) * 0.1
                assert abs(ours.high - theirs.high) < (high - low) * 0.1
            assert abs(ours.fill - theirs.fill) < (high - low) * 0.02


def test_noise_moves_a_quantile_by_few_ranks():
    """Noise of 20 records in each of 256 bins is worth 16 * 20 / 2 ranks, not a thousand."""
    rng = np.random.default_rng(9)
    ages = np.clip(rng.gamma(2, 6, 20_000), 0, 120)  # most bins are empty
    frame = Frame(STAY, len(ages), {"age": ages, "days": np.zeros(len(ages))})
    said = Preprocessing(clip_quantiles=(0.05, 0.95), impute="median")
    noisy = make(said, NOISY, STAY)
    worst = 6 * 20 * math.sqrt(256) / 2
    source = Keystream(Seed(bytes(32)), "quantiles")

    def noise(_: int, size: int) -> np.ndarray:
        return DiscreteGaussian(20.0 * 4096).sample(source, size)

    for _ in range(20):
        (number,) = fit(noisy, frame, noise=noise).numbers
        bin_ = 120 / 256
        for value, share in ((number.low, 0.05), (number.fill, 0.5), (number.high, 0.95)):
            assert (ages <= value - bin_).sum() <= share * len(ages) + worst
            assert (ages <= value + bin_).sum() >= share * len(ages) - worst


# ------------------------------------------------------------------ the fitted values


@given(frames(), settings_)
@settings(max_examples=30)
def test_fitted_values_round_trip(frame, said):
    fitted = fit(make(said), frame)
    assert Fitted.from_bytes(fitted.to_bytes()) == fitted


@given(st.binary(max_size=60) | st.integers(0, 2**31))
@settings(max_examples=200)
def test_bad_bytes_are_refused(fault):
    """Anything but the one encoding of fitted values: MalformedMessageError, nothing else."""
    good = fit(make(EVERYTHING), draw(np.random.default_rng(0), 20)).to_bytes()
    if isinstance(fault, bytes):
        bad = fault
    else:
        at = fault % len(good)
        bad = good[:at] + bytes([good[at] ^ (1 + fault % 255)]) + good[at + 1 :]
    try:
        assert Fitted.from_bytes(bad).to_bytes() == bad
    except MalformedMessageError:
        return


@pytest.mark.parametrize(
    "change",
    [
        {"spread": 0.0},
        {"spread": math.nan},
        {"fill": 200.0},
        {"low": 120.0},
        {"known": -1.0},
        {"centre": math.inf},
    ],
    ids=str,
)
def test_a_number_holds_no_wrong_figure(change):
    good = {"known": 1.0, "low": 0.0, "high": 120.0, "fill": 3.0, "centre": 4.0, "spread": 5.0}
    FittedNumber("age", **good)
    with pytest.raises(ValueError, match="age"):
        FittedNumber("age", **{**good, **change})
    tree = msgspec.msgpack.decode(FittedNumber("age", **good).to_bytes())
    tree[2:] = {**good, **change}.values()
    with pytest.raises(MalformedMessageError):
        FittedNumber.from_bytes(msgspec.msgpack.encode(tree))


def test_fitted_values_of_other_columns_or_stages_are_refused():
    frame = draw(np.random.default_rng(0), 30)
    one, two, other = make(Preprocessing()), make(EVERYTHING), make(Preprocessing(), of=STAY)
    with pytest.raises(ValueError, match="0 of 1 sums"):
        one.apply(one.start(), frame)
    with pytest.raises(ValueError, match="0 of 2 sums"):
        two.encode(1, two.start(), frame, None)
    with pytest.raises(ValueError, match="other columns"):
        one.apply(fit(two, frame), frame)
    with pytest.raises(ValueError, match="other columns"):
        make(Preprocessing(), drop=("age",)).apply(fit(one, frame), frame)
    with pytest.raises(ValueError, match="another schema"):
        other.encode(0, other.start(), frame, None)
    with pytest.raises(ValueError, match="integers"):
        one.fit(0, one.start(), np.zeros(3, np.int64), 0.0)


def test_two_inputs_of_one_name_are_refused_with_the_mend():
    clash = schema.parse(
        'version = 1\nname = "x"\nlabel = "y"\n[columns]\n'
        '"a=b" = {type = "number", range = [0, 1]}\n'
        'a = {type = "category", categories = ["b", "c"]}\n'
        'y = {type = "number", range = [0, 1]}\n'
    )
    with pytest.raises(ConfigurationError, match="'a=b': rename"):
        make(Preprocessing(), of=clash)


def test_the_report_says_what_each_input_is():
    frame = draw(np.random.default_rng(8), 2000)
    said = EVERYTHING.model_copy(update={"minimum_count": 50})
    preprocessor = make(said)
    told = dict(preprocessor.described(fit(preprocessor, frame)))
    assert told["age"].startswith("clipped to ")
    assert "where missing (in years)" in told["age"]
    assert told["job=nurse"] == "1 or 0"
    assert told["job=diver"].startswith("always 0: too rare")
    assert told["job=(other)"] == "1 for diver, any other"


# ------------------------------------------------------------------ memory

MEASURE = """
import numpy as np
from pathlib import Path
from securefl import schema
from securefl.config import Data, Preprocessing
from securefl.data.frames import Frame
from securefl.preprocessing import Precision, Preprocessor

rows, columns = 1_000_000, 50
spoken = 'version = 1\\nname = "m"\\nlabel = "y"\\n[columns]\\n' + "".join(
    f'c{k} = {{type = "number", range = [-10, 10]}}\\n' for k in range(columns)
) + 'y = {type = "category", categories = ["a", "b"]}\\n'
agreed = schema.parse(spoken)
rng = np.random.default_rng(0)
numbers = {}
for k in range(columns):
    numbers[f"c{k}"] = np.clip(rng.standard_normal(rows), -10, 10)
    numbers[f"c{k}"][rng.integers(0, rows, rows // 50)] = np.nan
label = rng.integers(0, 2, rows).astype(np.int32)
frame = Frame(agreed, rows, numbers, {"y": label})
preprocessor = Preprocessor(
    Data(source="table", agreed=agreed), Preprocessing(), Precision.exact(44)
)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
idle = status("VmRSS")
fitted = preprocessor.fit(0, preprocessor.start(), preprocessor.encode(
    0, preprocessor.start(), frame, None), 0.0)
fitting = status("VmHWM") - idle
table = preprocessor.apply(fitted, frame)
print(fitting, status("VmHWM") - idle, table.features.nbytes)
"""


@pytest.mark.slow
def test_a_million_rows_of_fifty_columns_take_little_more_than_their_features():
    """Fitting takes less than 64 MiB, features what they weigh and less than 64 MiB more."""
    told = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True)
    fitting, peak, features = map(int, told.stdout.split())
    assert features == 200_000_000
    assert 0 < fitting <= 64 << 20
    assert features < peak <= features + (64 << 20)
