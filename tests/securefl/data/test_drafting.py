"""Drafting a schema from a file: its types, what it never tells, and that it accepts the file."""

from __future__ import annotations

import gzip
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefl import schema as schemas
from securefl.data import reading
from securefl.data.drafting import Draft, _above, _bounds, draft
from securefl.schema import CategoryColumn, ImageColumn, NumberColumn, TextColumn
from securefl.sections import ConfigurationError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")


@pytest.fixture
def drafted(tmp_path: Path):
    """`drafted(text, **arguments)`: the draft from a file of that text."""

    def make(text: str, **arguments) -> Draft:
        path = tmp_path / "records.csv"
        path.write_text(text, encoding="utf-8")
        return draft(path, **arguments)

    return make


def rows(*columns: Sequence[object], count: int = 40) -> str:
    """A table with a header a,b,c,... and `count` rows: the values of each again and again."""
    lines = [",".join("abcdefgh"[: len(columns)])]
    lines += [",".join(str(column[i % len(column)]) for column in columns) for i in range(count)]
    return "\n".join(lines) + "\n"


def test_types_are_guessed_from_all_rows(drafted):
    ages = [20 + i for i in range(37)]
    found = drafted(
        rows(
            ages,
            [0, 1],
            ["red", "blue"],
            [0.5, 1.25, 9.5],
            ["2020-01-31", "2021-02-01"],
            "yn",
        )
    ).schema
    assert [column.type for column in found.columns.values()] == (
        ["number", "category", "category", "number", "text", "category"]
    )
    assert found.columns["b"].names == ("0", "1")
    assert found.columns["c"].names == ("blue", "red")
    assert found.label == "f"
    assert found.header


def test_the_text_is_the_schema_and_says_which_lines_tell_of_records(drafted):
    """What follows from taking the lines away that were seen is the same schema."""
    found = drafted(rows([1.5, 2.5, 77.0], ["x", "y"]))
    assert schemas.parse(found.text) == found.schema
    bare = "\n".join(line for line in found.text.splitlines() if not line.startswith("# seen:"))
    assert schemas.parse(bare) == found.schema
    assert "# seen: 40 rows" in found.text
    assert "40" not in bare
    assert "sed -i '/^# seen:/d'" in bare


@given(st.floats(-1e28, 1e28), st.floats(-1e28, 1e28))
def test_bounds_hold_the_numbers_and_are_never_theirs(one, other):
    """Zero is the one exception: that a quantity is not negative is no secret."""
    least, most = min(one, other), max(one, other)
    low, high = _bounds(least, most)
    assert low <= least <= most <= high
    assert low < high
    assert low < least or low == 0
    assert most < high or high == 0


@given(st.floats(1e-300, 1e300))
def test_a_step_above_is_one_two_or_five_times_a_power_of_ten(value):
    bound = _above(value)
    assert value < bound <= 2.5 * value * (1 + 1e-9)
    assert f"{bound:.3e}"[:5] in {"1.000", "2.000", "5.000"}


def test_texts_of_few_rows_are_not_told(drafted):
    """A public list of categories would tell that somebody in this file has each of them."""
    text = rows([0.5, 2.5, 9.5], ["common", "usual"], "yn", count=60)
    found = drafted(text.replace("usual", "Fabry disease", 2))
    assert "Fabry" not in found.text
    column = found.schema.columns["b"]
    assert isinstance(column, CategoryColumn)
    assert (column.names, column.outside) == (("common", "usual"), "other")
    assert "a public list tells what exists" in found.text


def test_rare_numbers_and_labels_are_listed_with_a_word_on_it(drafted):
    text = rows([0.5, 2.5, 9.5], [0, 1], "yn", count=60) + "1.5,2,maybe\n"
    found = drafted(text)
    assert found.schema.columns["b"].names == ("0", "1", "2")
    assert found.schema.classes == ("maybe", "n", "y")
    assert found.text.count("are they all publicly known?") == 2


@pytest.mark.parametrize("code", ["?", "NA", "n/a", "-9", "-", ".", "NULL", "none", "nan"])
def test_a_code_for_missing_is_listed_where_it_appears_and_only_there(drafted, code):
    with_code = drafted(rows([1.5, 2.5, code, 7.5], ["x", "y"]))
    assert code in with_code.schema.missing_codes("a")
    assert isinstance(with_code.schema.columns["a"], NumberColumn)
    assert with_code.schema.columns["a"].range == (0.0, 10.0)
    without = drafted(rows([1.5, 2.5, 7.5], ["x", "y"]))
    assert without.schema.missing_codes("a") == {""}


def test_a_doubtful_code_stays_a_value_where_it_can_be_one(drafted):
    """-9 among negative numbers is a temperature; "none" among texts is a category."""
    found = drafted(rows([-9, -3.5, 4.5, -20.5], ["none", "some"], "yn")).schema
    assert found.missing_codes("a") == {""}
    assert found.columns["a"].range[0] < -20.5
    assert found.columns["b"].names == ("none", "some")


def test_whole_numbers_that_run_on_and_padded_codes_are_no_features(drafted):
    running = list(range(1000, 1060))
    found = drafted(rows(running, ["007", "008", "019"], [0.1, 0.2], "yn", count=60))
    assert isinstance(found.schema.columns["a"], TextColumn)
    assert isinstance(found.schema.columns["b"], TextColumn)
    assert "It seems to name the row or its person" in found.text


def test_a_column_that_names_people_is_proposed(drafted):
    lines = ["patient_id,x,sick"]
    lines += [f"{4000 + i // 2 * 7},{i / 3:.3f},{'yn'[i % 2]}" for i in range(60)]
    found = drafted("\n".join(lines))
    assert isinstance(found.schema.columns["patient_id"], TextColumn)
    assert '# person = "patient_id"' in found.text
    assert found.schema.person is None


def test_rows_marked_for_tests_are_kept_from_training(drafted):
    found = drafted(rows([0.5, 1.5, 7.5], ["train", "train", "test"], "yn"))
    assert found.schema.test == "b"


def test_the_label_can_be_named(drafted):
    text = rows(["u", "v"], [0.5, 1.25, 9.5], [0.5, 1.25])
    assert drafted(text).schema.label == "c"
    assert drafted(text, label="a").schema.classes == ("u", "v")
    assert "last column" not in drafted(text, label="a").text
    with pytest.raises(ConfigurationError, match=r"no column 'aa'; did you mean 'a'\?"):
        drafted(text, label="aa")


def test_a_label_that_cannot_be_learnt_is_refused(drafted):
    text = rows([f"t{i}" for i in range(2000)], [0.5, 1.5], count=2000)
    with pytest.raises(ConfigurationError, match="column 'a' is no number and not a few"):
        drafted(text, label="a")
    with pytest.raises(ConfigurationError, match="name the label with --label"):
        drafted(rows([f"t{i}" for i in range(40)]))


def test_a_file_without_names_gets_some(drafted):
    text = "".join(f"{i / 7:.2f};{i % 2}\n" for i in range(40))
    found = drafted(text).schema
    assert list(found.columns) == ["column_1", "column_2"]
    assert not found.header
    assert list(drafted(text, names=("dose", "dead")).schema.columns) == ["dose", "dead"]
    with pytest.raises(ConfigurationError, match="has 2 columns, and --names names 1"):
        drafted(text, names=("dose",))
    with pytest.raises(ConfigurationError, match="leave --names out"):
        drafted(rows([0.5], "yn"), names=("dose", "dead"))


def test_whether_the_first_row_names_columns_can_be_said(drafted):
    text = "\n".join("uv"[i % 2] + "," + "yn"[i % 2] for i in range(40))
    assert not drafted(text).schema.header  # its values come again further down
    assert list(drafted(text, header=True).schema.columns) == ["u", "y"]
    named = rows(["u", "v"], "yn")
    assert drafted(named).schema.header
    assert drafted(named, header=False).schema.columns["column_1"].type == "category"


def test_a_decimal_comma_is_seen(drafted):
    found = drafted("a;b\n" + "".join(f"{i},5;{'yn'[i % 2]}\n" for i in range(40))).schema
    assert found.decimal == ","
    assert found.columns["a"].range == (0.0, 50.0)


def test_long_text_is_left_out_since_no_reader_takes_it(drafted, tmp_path):
    found = drafted(rows(["z" * 300 + str(i) for i in range(40)], [0.5, 7.5], "yn"))
    assert "a" not in found.schema.columns
    assert "# Column a holds long text" in found.text
    assert len(reading.load(tmp_path / "records.csv", found.schema)) == 40


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no rows"),
        ("a,b\n", "holds no rows"),
        ("a,a,b\n1.5,y,u\n2.5,n,v\n", "'a' twice"),
        ("a,b\n1.5,y\n2.5,n,7\n", r"row 2 \(line 3\) has 3 fields, there are 2 columns"),
        ('a,b\n1.5,"y\n2.5,n\n', "never closed"),
    ],
)
def test_a_broken_file_is_one_line(drafted, text, told):
    with pytest.raises(ConfigurationError, match=told) as caught:
        drafted(text)
    assert "\n" not in str(caught.value)


@needs_shared
@pytest.mark.parametrize("hospital", ["cleveland", "hungarian", "switzerland", "va"])
def test_the_heart_files_are_accepted_by_their_drafts(hospital):
    path = SHARED / "heart_disease" / f"processed.{hospital}.data"
    found = draft(path)
    assert len(found.schema.columns) == 14
    assert not found.schema.header
    assert set(found.schema.classes) <= {"0", "1", "2", "3", "4"}
    assert "?" in found.schema.missing
    assert len(reading.load(path, found.schema)) == len(path.read_text().split())


@needs_shared
@pytest.mark.parametrize("name", ["german.data", "german.data-numeric"])
def test_german_credit_is_accepted_by_its_draft(name):
    path = SHARED / "german_credit" / name
    found = draft(path).schema
    assert found.classes == ("1", "2")
    frame = reading.load(path, found)
    assert np.bincount(frame.codes[found.label]).tolist() == [700, 300]
    if name == "german.data":
        assert len(found.columns) == 21
        assert isinstance(found.columns["column_1"], CategoryColumn)
        assert isinstance(found.columns["column_5"], NumberColumn)


def test_parquet_is_accepted_by_its_draft(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from datetime import date

    path = tmp_path / "t.parquet"
    table = pyarrow.table(
        {
            "age": [20.5 + i for i in range(39)] + [None],
            "smokes": [i % 2 == 0 for i in range(40)],
            "when": [date(2020, 1, 1 + i % 28) for i in range(40)],
            "blob": [b"x"] * 40,
            "sick": ["yes", "no"] * 20,
        }
    )
    parquet.write_table(table, path)
    found = draft(path).schema
    kinds = {name: column.type for name, column in found.columns.items()}
    assert kinds == {"age": "number", "smokes": "category", "when": "text", "sick": "category"}
    assert np.isnan(reading.load(path, found).numbers["age"][-1])


def test_a_folder_of_images_is_accepted_by_its_draft(tmp_path):
    from PIL import Image

    for label in ("benign", "malignant"):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (6, 4), (i, 0, 9)).save(tmp_path / "scans" / label / f"{i}.png")
    found = draft(tmp_path / "scans").schema
    column = found.columns["image"]
    assert isinstance(column, ImageColumn)
    assert (column.height, column.width, column.channels) == (4, 6, 3)
    assert found.classes == ("benign", "malignant")
    assert len(reading.load(tmp_path / "scans", found)) == 6
    Image.new("L", (5, 5)).save(tmp_path / "scans" / "benign" / "odd.png")
    with pytest.raises(ConfigurationError, match="scale all to one size"):
        draft(tmp_path / "scans")


def test_a_table_of_images_is_accepted_by_its_draft(tmp_path):
    from PIL import Image

    lines = ["file,age,sick"]
    for i in range(12):
        Image.new("L", (3, 3), i).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i / 3:.2f},{'yn'[i % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = draft(tmp_path / "t.csv").schema
    assert isinstance(found.columns["file"], ImageColumn)
    assert len(reading.load(tmp_path / "t.csv", found)) == 12


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
cells = st.one_of(
    st.integers(-10, 10).map(str),
    st.floats(allow_nan=True, allow_infinity=True).map(str),
    st.sampled_from(["", "?", "-9", "none", "NA", ".", "1,5", "007", "1e400", "2020-01-01"]),
    words,
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Names and columns; the last column can be learnt."""
    count = draw(st.integers(2, 60))
    kinds = [cells, st.integers(0, 3).map(str), st.floats(-1e3, 1e3).map(str), words]
    kind = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    columns = [draw(st.lists(one, min_size=count, max_size=count)) for one in kind]
    label = [str(i % 2) for i in range(count)]
    return [f"col{i}" for i in range(len(columns) + 1)], [*columns, label]


@settings(max_examples=150)
@given(tables(), st.booleans(), st.booleans(), st.sampled_from(",;\t|"))
def test_a_draft_accepts_the_very_file_it_was_drafted_from(
    tmp_path_factory, table, header, zipped, separator
):
    """Whatever stands in the columns: numbers, codes, dates, infinities, stray signs."""
    import csv
    import io

    names, columns = table
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="\n")
    if header:
        writer.writerow(names)
    writer.writerows(zip(*columns, strict=True))
    path = tmp_path_factory.mktemp("draft") / ("t.csv.gz" if zipped else "t.csv")
    data = out.getvalue().encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    found = draft(path, header=header)
    frame = reading.load(path, found.schema)
    assert len(frame) == len(columns[0])
    assert tomllib.loads(found.text)["label"] == found.schema.label


def accepted_or_told(path: Path, header: bool | None) -> None:
    """Draft; the file is accepted, or one line said what is wrong with it."""
    told, found = "", None
    try:
        found = draft(path, header=header)
    except ConfigurationError as error:
        told = str(error)
    assert "\n" not in told
    if found is not None:
        assert len(reading.load(path, found.schema)) >= 1


@settings(max_examples=150)
@given(st.binary(max_size=200), st.sampled_from([None, True, False]))
def test_any_bytes_give_a_draft_or_one_line(tmp_path_factory, data, header):
    """And the draft accepts them."""
    path = tmp_path_factory.mktemp("bytes") / "t.csv"
    path.write_bytes(data)
    accepted_or_told(path, header)


@settings(max_examples=150)
@given(
    st.lists(st.lists(cells, min_size=1, max_size=4), min_size=1, max_size=20),
    st.sampled_from([",", ";", "\t", "|", " ", "  "]),
    st.sampled_from([None, True, False]),
)
def test_any_lines_give_a_draft_that_accepts_them_or_one_line(
    tmp_path_factory, lines, separator, header
):
    """Ragged rows, stray quotes, separators within fields: nothing quoted, nothing escaped."""
    path = tmp_path_factory.mktemp("lines") / "t.csv"
    path.write_bytes("\n".join(separator.join(line) for line in lines).encode())
    accepted_or_told(path, header)
