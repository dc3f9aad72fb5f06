"""A table holds only arrays that fit together, and frames become one without fitting anything."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefl.config import ConfigurationError, Data
from securefl.data import Table
from securefl.data.tables import from_frames, scale


def declare(**keys):
    return Data(source="table", path="unread.csv", label="sick", **keys)


def frame(**columns):
    plain = {"age": [30, 40, 50], "dose": [0.5, 1.5, 2.5], "sick": ["no", "yes", "no"]}
    return pd.DataFrame(plain | columns)


def table(**changes):
    parts = {
        "features": np.zeros((3, 2), np.float32),
        "target": np.array([0, 1, 0]),
        "names": ("a", "b"),
        "task": "classification",
        "classes": ("no", "yes"),
    }
    return Table(**(parts | changes))


def test_a_table_tells_its_shape_and_outputs():
    images = table(features=np.zeros((3, 1, 1, 2), np.float32))
    assert (len(images), images.shape, images.outputs) == (3, (1, 1, 2), 2)
    measured = table(task="regression", classes=(), target=np.zeros(3, np.float32))
    assert measured.outputs == 1


def test_take_keeps_records_together_whether_by_number_or_by_truth():
    whole = table(
        features=np.arange(6, dtype=np.float32).reshape(3, 2),
        groups={"ward": np.array(["x", "y", "z"])},
    )
    for part in (whole.take([2, 0]), whole.take(np.array([True, False, True])).take([1, 0])):
        assert part.features.tolist() == [[4, 5], [0, 1]]
        assert part.target.tolist() == [0, 0]
        assert part.groups["ward"].tolist() == ["z", "x"]
    assert len(whole.take([])) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((3, 2))}, "features are float64"),
        ({"features": np.zeros(3, np.float32)}, "features have shape"),
        ({"features": np.full((3, 2), np.nan, np.float32)}, "features hold NaN"),
        ({"target": np.array([0, 1])}, "one target a record"),
        ({"target": np.array([0, 1, 2])}, "class outside 0 to 1"),
        ({"target": np.array([0, -1, 0])}, "class outside 0 to 1"),
        ({"target": np.zeros(3, np.float32)}, "make it int64"),
        ({"names": ("a",)}, "1 names for 2 features"),
        ({"names": ("a", "a")}, "comes twice"),
        ({"classes": ("no",)}, "two or more"),
        ({"groups": {"ward": np.array(["x"])}}, "group column"),
        ({"target_range": (0.0, 1.0)}, "target_range is for regression"),
        ({"task": "regression", "target": np.zeros(3, np.float32)}, "regression has no classes"),
        (
            {"task": "regression", "classes": (), "target": np.full(3, np.inf, np.float32)},
            "target holds NaN or infinity",
        ),
    ],
)
def test_arrays_that_do_not_fit_make_no_table(changes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        table(**changes)


def test_declared_ranges_scale_features_and_clamp_what_lies_outside():
    made = from_frames(
        {"f": frame(age=[0, 50, 200])},
        "sick",
        declare(ranges={"age": (0, 100)}, default_range=(0.5, 2.5)),
    )
    assert made.features.tolist() == [[-1, -1], [0, 0], [1, 1]]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    st.floats(-1e3, 1e3),
    st.floats(0.1, 1e3),
)
def test_scaling_a_value_never_depends_on_the_other_rows(values, low, width):
    together = scale(np.array(values), low, low + width)
    alone = [scale(np.array([value]), low, low + width)[0] for value in values]
    assert together.tolist() == alone


def test_without_declared_ranges_features_stay_as_they_are():
    made = from_frames({"f": frame()}, "sick", declare())
    assert made.features.tolist() == [[30, 0.5], [40, 1.5], [50, 2.5]]
    assert (made.names, made.classes, made.target.tolist()) == (
        ("age", "dose"),
        ("no", "yes"),
        [0, 1, 0],
    )


def test_a_declared_target_range_scales_the_target_but_never_clamps_it():
    made = from_frames({"f": frame(sick=[0.0, 5.0, 20.5])}, "sick", declare(target_range=(0, 10)))
    assert made.task == "regression"
    assert made.target.tolist() == pytest.approx([-1, 0, 3.1])
    assert made.target_range == (0, 10)


def test_the_person_is_no_feature_but_remains_as_a_group():
    made = from_frames({"f": frame(who=[7, 7, 12])}, "sick", declare(person="who"))
    assert made.names == ("age", "dose")
    assert made.groups["who"].tolist() == ["7", "7", "12"]
    dropped = from_frames({"f": frame()}, "sick", declare(person="age", drop=("age",)))
    assert dropped.names == ("dose",)
    assert dropped.groups["age"].tolist() == ["30", "40", "50"]


def test_dropped_columns_are_no_features_but_remain_as_groups():
    made = from_frames({"f": frame(ward=["007", "7", None])}, "sick", declare(drop=("ward",)))
    assert made.names == ("age", "dose")
    assert made.groups["ward"].tolist() == ["007", "7", ""]


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ([1, 0, 10], ("0", "1", "10")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([True, False, True], ("False", "True")),
        (["b", "a", "b"], ("a", "b")),
    ],
)
def test_class_names_come_in_the_order_of_numbers_or_letters(label, classes):
    assert from_frames({"f": frame(sick=label)}, "sick", declare()).classes == classes


def test_declared_classes_fix_the_class_numbers():
    made = from_frames({"f": frame()}, "sick", declare(classes=("yes", "maybe", "no")))
    assert made.classes == ("yes", "maybe", "no")
    assert made.target.tolist() == [2, 0, 2]


def test_numbers_with_fractions_are_taken_for_regression():
    made = from_frames({"f": frame(sick=[0.5, 1.0, 2.0])}, "sick", declare())
    assert (made.task, made.classes, made.target.dtype) == ("regression", (), np.float32)


def test_a_label_of_many_values_is_not_guessed_at():
    many = pd.DataFrame({"age": range(30), "sick": range(30)})
    with pytest.raises(ConfigurationError, match=r"30 distinct values: say data\.task"):
        from_frames({"f": many}, "sick", declare())
    made = from_frames({"f": many}, "sick", declare(task="regression"))
    assert made.target.tolist() == list(range(30))


@pytest.mark.parametrize(
    ("columns", "keys", "message"),
    [
        ({"age": [1, "old", 3]}, {}, "f: column 'age', row 2: 'old' is not a number"),
        ({"age": [1, None, 3]}, {}, "f: column 'age', row 2: no value"),
        ({"age": [1, np.nan, 3]}, {}, "f: column 'age', row 2: no value"),
        ({"age": [1, 2, -np.inf]}, {}, "f: column 'age', row 3: -inf is beyond"),
        ({"age": [1, 1e200, 3]}, {}, "f: column 'age', row 2: 1e+200 is beyond"),
        ({"age": [[1], [2, 3], [4]]}, {}, "f: column 'age', row 1: '[1]' is not a number"),
        ({"age": pd.to_datetime(["2020-01-01"] * 3)}, {}, "row 1: '2020-01-01 00:00:00' is not"),
        ({"sick": ["no", "", "yes"]}, {}, "f: column 'sick', row 2: no value"),
        ({"sick": [0.5, None, 1.5]}, {}, "f: column 'sick', row 2: no value"),
        ({"sick": [1, "x", 2]}, {"task": "regression"}, "column 'sick', row 2: 'x' is not a num"),
        ({"sick": ["no"] * 3}, {}, "label 'sick' has one class only, 'no'"),
        ({"sick": ["no"] * 3}, {"classes": ("no", "yes")}, "has one class only, 'no'"),
        ({}, {"classes": ("no", "ja")}, "f: column 'sick', row 2: 'yes' is not in data.classes"),
        ({}, {"ranges": {"age": (0, 9)}}, "no range declared for 'dose': add each to"),
        ({}, {"ranges": {"aeg": (0, 9)}}, "data.ranges names no column: 'aeg'; did you mean 'age'"),
        ({}, {"drop": ("doze",)}, "no column 'doze' (data.drop); did you mean 'dose'?"),
        ({}, {"drop": ("sick",)}, "data.drop lists the label 'sick'"),
        ({}, {"drop": ("age", "dose")}, "no feature left"),
        ({}, {"person": "doze"}, "f has no column 'doze' (data.person); did you mean 'dose'?"),
        ({}, {"person": "sick"}, "data.person names the label 'sick'"),
        ({}, {"person": "age", "drop": ("dose",)}, "no feature left"),
        ({"who": [1, None, 2]}, {"person": "who"}, "f: column 'who', row 2: no value"),
        ({"who": ["a", "b", " "]}, {"person": "who"}, "f: column 'who', row 3: no value"),
        ({"sick": [1, 2, 1]}, {"task": "classification", "target_range": (0, 1)}, "target_range"),
        ({"sick": [1, 2, 1]}, {"task": "regression", "classes": ("1", "2")}, "data.classes is for"),
    ],
)
def test_a_wrong_value_or_key_is_named_in_one_line(columns, keys, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        from_frames({"f": frame(**columns)}, "sick", declare(**keys))
    assert "\n" not in str(caught.value)


def test_a_misspelt_label_is_refused_with_the_nearest_column():
    with pytest.raises(ConfigurationError, match="did you mean 'sick'"):
        from_frames({"f": frame()}, "Sick", declare())


def test_columns_that_come_twice_or_have_no_name_are_refused():
    twice = frame().rename(columns={"dose": "age"})
    with pytest.raises(ConfigurationError, match="column 'age' comes twice"):
        from_frames({"f": twice}, "sick", declare())
    with pytest.raises(ConfigurationError, match="column 1 has no name"):
        from_frames({"f": frame().rename(columns={"age": " "})}, "sick", declare())


def test_frames_must_agree_on_their_columns():
    more = frame(weight=[1, 2, 3])
    with pytest.raises(ConfigurationError, match="g has no column 'weight', but f has"):
        from_frames({"f": more, "g": frame()}, "sick", declare())
    with pytest.raises(ConfigurationError, match="f has no column 'weight', but g has"):
        from_frames({"f": frame(), "g": more}, "sick", declare())


def test_rows_are_counted_within_their_own_frame():
    with pytest.raises(ConfigurationError, match=r"^g: column 'age', row 1: 'x'"):
        from_frames({"f": frame(), "g": frame(age=["x", 1, 2])}, "sick", declare())
