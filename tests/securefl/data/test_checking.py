"""Checking a file: planted faults are found, clean files have none, and nothing is written."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefl import schema as schemas
from securefl.data.checking import Finding, Findings, check
from securefl.schema import Schema

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
ROWS = 2000

SCHEMA = """
version = 1
name = "clinic"
label = "sick"
missing = ["?"]
[columns.age]
type = "number"
range = [18, 100]
unit = "years"
[columns.weight]
type = "number"
range = [20, 2000]
unit = "kg"
[columns.sex]
type = "category"
categories = ["f", "m"]
[columns.sick]
type = "category"
categories = ["no", "yes"]
"""

Columns = dict[str, Sequence[object]]


def clean() -> Columns:
    """Two thousand plausible rows, the same in every run."""
    g = np.random.default_rng(7)
    return {
        "age": (18 + 60 * g.random(ROWS)).round(1).tolist(),
        "weight": g.normal(75, 9, ROWS).clip(45, 110).round(2).tolist(),
        "sex": g.choice(["f", "m"], ROWS).tolist(),
        "sick": g.choice(["no", "yes"], ROWS).tolist(),
    }


Checked = Callable[..., Findings]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """`checked(columns, more, top)`: the findings of a file of these columns.

    more, top: lines of the schema beside those of SCHEMA.
    """

    def run(columns: Columns, more: str = "", top: str = "") -> Findings:
        path = tmp_path / "records.csv"
        lines = [",".join(columns)]
        lines += [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(lines) + "\n")
        return check(
            path, schemas.parse(SCHEMA.replace('missing = ["?"]', f'missing = ["?"]\n{top}') + more)
        )

    return run


def the(findings: Findings, column: str | None, words: str) -> Finding:
    """The one finding on `column` that has these words."""
    found = [f for f in findings.findings if f.column == column and words in f.text]
    assert len(found) == 1, findings.findings
    return found[0]


def replaced(values: Sequence[object], rows: Sequence[int], value: object) -> list[object]:
    """`values` with `value` in these rows, counted from 1 as people do."""
    out = list(values)
    for row in rows:
        out[row - 1] = value
    return out


def test_a_clean_file_has_no_finding_and_its_figures_are_told(checked):
    columns = clean()
    found = checked(columns)
    assert found.findings == ()
    assert (found.rows, found.people) == (ROWS, None)
    age = next(c for c in found.columns if c.name == "age").numbers
    values = np.array(columns["age"])
    assert (age.least, age.most) == (values.min(), values.max())
    assert math.isclose(age.mean, values.mean())
    assert math.isclose(age.deviation, values.std())
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    assert np.abs(np.array(age.quartiles) - quartiles).max() <= 82 / 1000 + 0.1
    sex = next(c for c in found.columns if c.name == "sex").categories
    assert sex == {name: columns["sex"].count(name) for name in ("f", "m")}


def test_chunks_make_no_difference_to_the_moments(checked):
    """Forty thousand rows are three chunks; their moments are put together."""
    columns = {name: list(values) * 20 for name, values in clean().items()}
    columns["age"] = [float(i % 83 + 18) for i in range(ROWS * 20)]
    age = next(c for c in checked(columns).columns if c.name == "age").numbers
    values = np.array(columns["age"])
    assert math.isclose(age.mean, values.mean())
    assert math.isclose(age.deviation, values.std())
    assert age.quartiles == tuple(np.quantile(values, [0.25, 0.5, 0.75], method="lower"))


@pytest.mark.parametrize(
    ("factor", "offset", "words"),
    [
        (10, 0, "ten times too large"),
        (0.1, 0, "ten times too small"),
        (100, 0, "a hundred times too large"),
        (1000, 0, "a thousand times too large"),
        (0.001, 0, "a thousand times too small"),
        (38.67, 0, "mg/dl of cholesterol among mmol/l"),
        (1 / 38.67, 0, "mmol/l among mg/dl"),
        (88.42, 0, "µmol/l of creatinine"),
    ],
)
def test_three_percent_in_another_unit_are_found(checked, factor, offset, words):
    columns = clean()
    odd = range(10, ROWS, 33)
    weight = list(columns["weight"])
    for row in odd:
        weight[row - 1] = round(weight[row - 1] * factor + offset, 4)
    columns["weight"] = weight
    found = checked(columns, more="").findings
    told = next(f for f in found if f.column == "weight" and words in f.text)
    assert told.severity == "warning"
    count = int(told.text.split()[0].replace(",", ""))
    assert abs(count - len(odd)) <= 0.1 * len(odd)
    rows = told.text.partition("rows ")[2].partition(":")[0].split(", ")
    assert set(map(int, rows)) <= set(odd)
    assert told.text.endswith("write all in one unit")


@pytest.mark.parametrize(
    ("other", "there", "back"),
    [
        (lambda t: t * 1.8 + 32, "Fahrenheit among Celsius", "Celsius among Fahrenheit"),
        (lambda h: h * 2.54, "centimetres among inches", "inches among centimetres"),
        (lambda w: w * 2.2046, "pounds among kilograms", "kilograms among pounds"),
    ],
)
def test_the_usual_conversions_are_found_both_ways(checked, other, there, back):
    """A cluster of them stands apart where the values themselves lie close together."""
    g = np.random.default_rng(3)
    true = g.normal(37, 0.8, ROWS).round(2)
    odd = g.random(ROWS) < 0.04
    for mixed, words in (
        (np.where(odd, other(true), true), there),
        (np.where(odd, true, other(true)), back),
    ):
        found = checked(clean() | {"weight": mixed.round(2).tolist()})
        assert the(found, "weight", "look like").text.count(words) == 1


def test_tails_are_no_other_unit(checked):
    """Incomes and laboratory values have long tails without a gap."""
    g = np.random.default_rng(5)
    for deviation in (0.3, 0.6, 1.0, 1.5):
        values = (100 * np.exp(deviation * g.normal(size=ROWS))).clip(20, 2000).round(2)
        found = checked(clean() | {"weight": values.tolist()})
        assert not [f for f in found.findings if "one unit" in f.text], deviation


def test_outliers_are_named_with_their_rows(checked):
    columns = clean()
    weight = replaced(replaced(columns["weight"], [17], 400), [900], 4.5)
    found = checked(columns | {"weight": weight})
    told = the(found, "weight", "robust deviations")
    assert told.severity == "note"
    assert told.text.startswith(
        "2 values beyond 4 robust deviations of the median, in rows 17, 900"
    )


def test_values_outside_their_range_are_all_counted(checked):
    columns = clean()
    found = checked(columns | {"age": replaced(columns["age"], [3, 5, 1999], 175)})
    told = the(found, "age", "outside")
    assert told.severity == "error"
    assert told.text.startswith(
        "3 values outside [18, 100] years, such as 175; first in rows 3, 5, 1999: correct them"
    )


@pytest.mark.parametrize(
    ("outside", "words"), [("missing", "they count as missing"), ("clip", "as the nearest end")]
)
def test_values_outside_are_no_error_where_the_schema_takes_them(checked, outside, words):
    columns = clean()
    columns["dose"] = replaced([1.5, 2.5] * (ROWS // 2), [4], 11)
    more = f'[columns.dose]\ntype = "number"\nrange = [0, 10]\noutside = "{outside}"'
    found = checked(columns, more)
    assert the(found, "dose", words).severity == "note"
    assert not found.of("error")


def test_a_file_in_another_unit_throughout_is_told_as_one(checked):
    columns = clean()
    found = checked(columns | {"age": [round(a * 12, 1) for a in columns["age"]]})
    told = the(found, "age", "most of the file is outside")
    assert told.severity == "error"
    assert "another unit than years" in told.text


def test_unknown_categories_are_counted_and_the_first_is_named(checked):
    columns = clean()
    found = checked(columns | {"sex": replaced(columns["sex"], [8, 11, 12], "male")})
    told = the(found, "sex", "no category")
    assert told.severity == "error"
    assert told.text.startswith("3 values that no category has, first in row 8: 'male'")


def test_cells_that_are_no_numbers_are_told_for_every_column(checked):
    """The rest is read all the same, its figures too."""
    columns = clean()
    columns["age"] = replaced(columns["age"], [4], "forty")
    columns["weight"] = replaced(columns["weight"], [6, 7], "70 kg")
    found = checked(columns)
    assert the(found, "age", "row 4: 'forty' is not a number").severity == "error"
    assert "row 6: '70 kg' is not a number" in the(found, "weight", "not a number").text
    assert found.rows == ROWS
    assert next(c for c in found.columns if c.name == "sex").categories is not None


def test_a_file_that_ends_in_a_broken_row_is_checked_up_to_there(checked, tmp_path):
    checked(clean())
    path = tmp_path / "records.csv"
    path.write_text(path.read_text() + "30,70\n")
    found = check(path, schemas.parse(SCHEMA))
    assert [f.text.partition(":")[0] for f in found.of("error")] == [
        f"row {ROWS + 1} has 2 fields, the header has 4"
    ]
    assert found.rows == ROWS


def test_a_file_that_cannot_be_opened_is_an_error_among_the_findings(tmp_path):
    found = check(tmp_path / "absent.csv", schemas.parse(SCHEMA))
    assert found.rows == 0
    assert "absent.csv" in found.of("error")[0].text


def test_constant_columns_are_found(checked):
    found = checked(clean() | {"sex": ["f"] * ROWS, "age": [40] * ROWS})
    assert the(found, "sex", "every value is f").severity == "warning"
    assert the(found, "age", "every value is 40").severity == "warning"


def test_missing_values_are_counted(checked):
    columns = clean()
    columns["age"] = ["?" if i % 10 < 7 else a for i, a in enumerate(columns["age"])]
    columns["sex"] = ["" if i % 10 < 3 else s for i, s in enumerate(columns["sex"])]
    columns["sick"] = replaced(columns["sick"], [1, 2], "?")
    found = checked(columns)
    assert the(found, "age", "70 % of the values are missing").severity == "warning"
    assert the(found, "sex", "30 % of the values are missing").severity == "note"
    assert the(found, "sick", "2 rows (0.1 %) without a label").severity == "warning"
    assert {c.name: c.missing for c in found.columns}["age"] == 1400
    assert the(checked(clean() | {"age": ["?"] * ROWS}), "age", "no row has a value")
    more = '[columns.dose]\ntype = "number"\nrange = [0, 9]\noptional = true'
    assert the(checked(clean(), more), "dose", "no row has a value").severity == "note"
    nothing = checked(clean() | {"sick": ["?"] * ROWS})
    assert the(nothing, "sick", "no row has a value").severity == "error"


def test_a_zero_that_stands_for_missing_is_found(checked):
    columns = clean()
    more = '[columns.chol]\ntype = "number"\nrange = [0, 600]'
    chol = (200 + 60 * np.random.default_rng(2).normal(size=ROWS)).clip(90, 500).round()
    found = checked(columns | {"chol": replaced(chol.tolist(), [5, 50, 500], 0)}, more)
    assert the(found, "chol", "0 in 3 rows").severity == "warning"
    counts = np.random.default_rng(2).poisson(3, ROWS).tolist()
    more = '[columns.visits]\ntype = "number"\nrange = [0, 40]'
    found = checked(columns | {"visits": counts}, more)
    assert not [f for f in found.findings if "nothing was measured" in f.text]


def test_values_at_the_ends_of_a_range_are_found(checked):
    columns = clean()
    more = '[columns.ward]\ntype = "number"\nrange = [0, 60]'
    found = checked(columns | {"ward": [min(a, 60.0) for a in columns["age"]]}, more)
    assert "exactly 60, an end of the range" in the(found, "ward", "if they were cut off").text
    more = '[columns.ward]\ntype = "number"\nrange = [0, 60000]'
    assert the(checked(columns | {"ward": columns["age"]}, more), "ward", "a narrower one")


def test_an_unbalanced_label_and_unused_classes_are_found(checked):
    columns = clean()
    columns["sick"] = ["yes" if i % 50 == 0 else "no" for i in range(ROWS)]
    told = the(checked(columns), "sick", "class 'yes' has 40 rows of 2,000 (2 %)")
    assert told.severity == "warning"
    more = '[columns.ward]\ntype = "category"\ncategories = ["A", "B", "C"]'
    found = checked(clean() | {"ward": ["A", "C"] * (ROWS // 2)}, more)
    assert the(found, "ward", "no row has the category 'B'").severity == "note"


def test_equal_rows_are_found(checked):
    columns = {name: [*values, *values[:3]] for name, values in clean().items()}
    told = the(checked(columns), None, "equal to an earlier one")
    assert told.text.startswith("3 rows equal to an earlier one, first in rows 2001, 2002, 2003")
    assert "name the person column" in told.text


PERSON = '[columns.id]\ntype = "text"'
TEST = '[columns.split]\ntype = "text"'


def test_people_with_several_rows_are_counted(checked):
    columns = clean() | {"id": [f"p{i // 2 if i < 20 else i}" for i in range(ROWS)]}
    found = checked(columns, PERSON, 'person = "id"')
    assert found.people == ROWS - 10
    assert the(found, "id", "10 of 1,990 people have several rows").severity == "note"
    columns["id"] = replaced(columns["id"], [9], "")
    found = checked(columns, PERSON, 'person = "id"')
    assert the(found, "id", "1 row of nobody, in row 9").severity == "error"
    assert found.people == ROWS - 10


def test_people_in_training_and_in_tests_are_found(checked):
    columns = clean() | {
        "id": [f"p{i // 2}" for i in range(ROWS)],
        "split": ["test" if i // 2 % 5 == 0 else "" for i in range(ROWS)],
    }
    top = 'person = "id"\ntest = "split"'
    assert not checked(columns, PERSON + "\n" + TEST, top).of("error")
    columns["split"] = replaced(columns["split"], [3], "test")
    found = checked(columns, PERSON + "\n" + TEST, top)
    told = the(found, "id", "for tests and for training")
    assert told.severity == "error"
    assert told.text.startswith("1 person with rows for tests and for training, first in row 3:")


def test_equal_rows_in_training_and_in_tests_are_found_without_people(checked):
    columns = {name: [*values, *values[:2]] for name, values in clean().items()}
    columns["split"] = ["train"] * ROWS + ["test"] * 2
    found = checked(columns, TEST, 'test = "split"')
    told = the(found, "split", "equal to a row for training")
    assert told.text.startswith("2 test rows equal to a row for training, first in rows 2001, 2002")
    columns["split"] = ["train"] * (ROWS + 2)
    found = checked(columns, TEST, 'test = "split"')
    assert the(found, "split", 'no row is marked "test"').severity == "warning"


def test_blank_images_are_found(tmp_path):
    from PIL import Image

    for label in ("benign", "malignant"):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.full((4, 4), i, np.uint8)
            pixels[0, 0] = 0 if i < 2 else 200
            pixels[pixels == 1] = 0
            Image.fromarray(pixels).save(tmp_path / "scans" / label / f"{i:02}.png")
    schema = schemas.parse(
        'version = 1\nname = "scans"\nlabel = "kind"\n[columns.kind]\ntype = "category"\n'
        'categories = ["benign", "malignant"]\n[columns.scan]\ntype = "image"\nheight = 4\n'
        "width = 4"
    )
    found = check(tmp_path / "scans", schema)
    assert found.rows == 24
    assert "4 images of one even colour, first in rows 1, 2, 13, 14" in the(found, "scan", "").text


def listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.stat()
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return found


def test_nothing_is_written(checked, tmp_path, monkeypatch):
    """Neither beside the file, nor in the working folder, nor in the place for temporary files."""
    checked(clean())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("TMPDIR", "TEMP", "TMP", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(elsewhere))
    before = listing(tmp_path)
    opened: list[tuple[object, ...]] = []
    _AUDITED.append(opened)
    try:
        check(tmp_path / "records.csv", schemas.parse(SCHEMA))
    finally:
        _AUDITED.remove(opened)
    assert listing(tmp_path) == before
    assert opened
    assert not [call for call in opened if call[0] != "open" or call[2] & _WRITING]


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_AUDITED: list[list[tuple[object, ...]]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _AUDITED and event in {"open", "os.mkdir", "os.rename", "socket.connect", "shutil.move"}:
        for opened in _AUDITED:
            opened.append((event, arguments[0], arguments[2] if event == "open" else 0))


sys.addaudithook(_audit)


@st.composite
def files(draw: st.DrawFn) -> tuple[Schema, str]:
    """A schema and a file that is as it says."""
    count = draw(st.integers(1, 80))
    columns: dict[str, object] = {}
    cells: list[list[str]] = []
    for number in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            low = draw(st.floats(-1e6, 1e6))
            high = low + draw(st.floats(1e-3, 1e6))
            columns[f"n{number}"] = {"type": "number", "range": [low, max(high, low + 1)]}
            value = st.floats(low, max(high, low + 1)).map(repr)
        else:
            names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
            columns[f"c{number}"] = {"type": "category", "categories": names}
            value = st.sampled_from(names)
        value = st.one_of(value, st.sampled_from(["", "?"]))
        cells.append(draw(st.lists(value, min_size=count, max_size=count)))
    columns["label"] = {"type": "category", "categories": ["0", "1"]}
    cells.append(draw(st.lists(st.sampled_from("01"), min_size=count, max_size=count)))
    tree = {"version": 1, "name": "s", "label": "label", "missing": ["?"], "columns": columns}
    lines = [",".join(columns), *(",".join(row) for row in zip(*cells, strict=True))]
    return Schema.model_validate(tree), "\n".join(lines) + "\n"


@settings(max_examples=100)
@given(files())
def test_files_as_the_schema_says_have_no_errors(tmp_path_factory, made):
    schema, text = made
    path = tmp_path_factory.mktemp("clean") / "records.csv"
    path.write_text(text)
    found = check(path, schema)
    assert not found.of("error")
    assert found.rows == text.count("\n") - 1
    for one in found.findings:
        assert one.text.isprintable()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")
def test_what_is_known_of_the_heart_files_is_found():
    """Switzerland wrote 0 for every cholesterol; VA for 49 of them, and one blood pressure."""
    text = 'version = 1\nname = "heart"\nlabel = "num"\nheader = false\nmissing = ["?"]\n'
    names = (
        "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak",
        "slope", "ca", "thal", "num",
    )  # fmt: skip
    for name in names:
        if name in ("age", "trestbps", "chol", "thalach", "oldpeak"):
            text += f'[columns.{name}]\ntype = "number"\nrange = [-10, 700]\n'
        else:
            codes = ", ".join(f'"{code}"' for code in range(8))
            text += f'[columns.{name}]\ntype = "category"\ncategories = [{codes}]\n'
    schema = schemas.parse(text)
    va = check(SHARED / "heart_disease" / "processed.va.data", schema)
    assert not va.of("error")
    assert "0 in 49 rows, while other values begin near 100" in the(va, "chol", "0 in").text
    assert "0 in 1 row, " in the(va, "trestbps", "0 in").text
    swiss = check(SHARED / "heart_disease" / "processed.switzerland.data", schema)
    assert the(swiss, "chol", "every value is 0")
