"""A site's file is read exactly as its schema says, or refused in one line that says where."""

from __future__ import annotations

import csv
import gzip
import io
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securefl.data.frames import MISSING, Frame
from securefl.data.reading import FileError, load, read
from securefl.schema import Schema, canonical, parse
from securefl.sections import ConfigurationError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"

WARD = """
version = 1
name = "ward"
label = "disease"
person = "who"
missing = ["NA"]
[columns]
who = {type = "text"}
age = {type = "number", range = [0, 120], unit = "years"}
chol = {type = "number", range = [50, 600], missing = ["-9"]}
sex = {type = "category", categories = {male = ["m", "1"], female = ["f", "0"]}}
disease = {type = "category", categories = ["absent", "present"]}
note = {type = "text", optional = true}
"""
GOOD = b"who,age,chol,sex,disease\np1,63,233,m,absent\np2,41.5,NA,f,present\np3,56,-9.0,1.0,\n"


def ward(**changes: str) -> Schema:
    text = WARD
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse(text)


def written(folder: Path, content: bytes, name: str = "ward.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path, schema: Schema) -> str:
    """The one line that `read` refuses the file with."""
    with pytest.raises(ConfigurationError) as caught:
        load(path, schema)
    told = str(caught.value)
    assert "\n" not in told
    assert str(path) in told
    return told


def test_a_good_file_is_read_by_name_with_its_missing_values(tmp_path: Path) -> None:
    """-9.0 is the code -9, 1.0 the code 1; an empty label is missing; a column that may be absent
    is all missing."""
    frame = load(written(tmp_path, GOOD), ward())
    assert frame.rows == 3
    np.testing.assert_array_equal(frame.numbers["age"], [63, 41.5, 56])
    np.testing.assert_array_equal(frame.numbers["chol"], [233, np.nan, np.nan])
    assert frame.codes["sex"].tolist() == [0, 1, 0]
    assert frame.codes["disease"].tolist() == [0, 1, MISSING]
    assert frame.texts["who"].tolist() == ["p1", "p2", "p3"]
    assert frame.texts["note"].tolist() == ["", "", ""]
    assert frame.labelled.tolist() == [True, True, False]
    assert (frame.codes["sex"].dtype, frame.numbers["age"].dtype) == (np.int32, np.float64)


SAME = {
    "semicolons": GOOD.replace(b",", b";"),
    "tabs": GOOD.replace(b",", b"\t"),
    "bars": GOOD.replace(b",", b"|"),
    "CRLF": GOOD.replace(b"\n", b"\r\n"),
    "no last line end": GOOD.rstrip(b"\n"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a byte order mark before a quote": b'\xef\xbb\xbf"who"' + GOOD[3:],
    "blanks around everything": GOOD.replace(b",", b" , ").replace(b"\n", b" \n "),
    "quotes around everything": b'"' + GOOD[:-1].replace(b",", b'","').replace(b"\n", b'"\n"')
    + b'"\n',
    "blank lines": b"\n\n" + GOOD.replace(b"\n", b"\n\n   \n"),
    "gzip": gzip.compress(GOOD),
    "gzip in two members": gzip.compress(GOOD[:30]) + gzip.compress(GOOD[30:]),
    "a column nobody asked for": GOOD.replace(b"\n", b",\xc3\xa4\n"),
    "that column first": b"".join(b"x," + line for line in GOOD.splitlines(keepends=True)),
    "columns without a name": GOOD.replace(b"\n", b",,\n"),
    "another order": b"age,who,disease,chol,sex\n63,p1,absent,233,m\n41.5,p2,present,NA,f\n"
    b"56,p3,,-9.0,1.0\n",
    "runs of blanks": b"who age  chol   sex disease \np1  63 233 m absent\n p2 41.5 NA f present \n"
    b'p3 56 -9.0 1.0 ""\n',
    "numbers in other words": GOOD.replace(b"63", b"+6.3e1").replace(b"56", b"056."),
    "blanks that are not ASCII": GOOD.replace(b"63", "\u00a063\u2009".encode()),
}  # fmt: skip


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_how_a_table_is_written_changes_nothing(tmp_path: Path, content: bytes) -> None:
    expected = load(written(tmp_path, GOOD), ward())
    for name in ("ward.data", "ward.txt.gz", "WARD"):
        assert_equal(load(written(tmp_path, content, name), ward()), expected)


def assert_equal(got: Frame, expected: Frame) -> None:
    assert got.rows == expected.rows
    for one, other in (
        (got.numbers, expected.numbers),
        (got.codes, expected.codes),
        (got.texts, expected.texts),
    ):
        assert list(one) == list(other)
        for name in other:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# Each: what is in the file, and what the message must say of where, what and the mend.
BROKEN: Mapping[str, tuple[bytes, Sequence[str]]] = {
    "empty": (b"", ["empty", "header"]),
    "only blanks": (b"  \n\n", ["empty"]),
    "only a byte order mark": (b"\xef\xbb\xbf", ["empty"]),
    "header only": (b"who,age,chol,sex,disease\n", ["no rows", "add records"]),
    "no header": (GOOD.split(b"\n", 1)[1], ["no column 'who'", "'p1'", "header = false"]),
    "wrong separator": (
        GOOD.replace(b",", b"^"), ["no column 'who'", "'who^age", "between fields"]),
    "lacks a column": (GOOD.replace(b"age", b"zzz"), ["no column 'age'", "optional = true"]),
    "a name misspelt": (GOOD.replace(b"chol", b"cholo"), ["no column 'chol'", "mean 'cholo'?"]),
    "a name in capitals": (GOOD.replace(b"age", b"AGE"), ["no column 'age'", "did you mean 'AGE'"]),
    "all names in capitals, semicolons": (
        GOOD.upper().replace(b",", b";"), ["no column 'who'", "did you mean 'WHO'"]),
    "a name twice": (GOOD.replace(b"chol", b"age"), ["header", "'age' twice", "rename"]),
    "an unlisted name twice": (
        GOOD.replace(b"\n", b",x,x\n"), ["header", "'x' twice", "rename"]),
    "too few fields": (GOOD.replace(b",f,", b","), ["row 2 has 4 fields", "has 5", "add"]),
    "too many fields": (GOOD.replace(b"p3,", b"p3,7,"), ["row 3 has 6 fields", "has 5", "quote"]),
    "one field": (GOOD + b"total\n", ["row 4 has 1 field,", "has 5"]),
    "a decimal comma unquoted": (GOOD.replace(b"41.5", b"41,5"), ["row 2 has 6 fields"]),
    "a quote never closed": (GOOD.replace(b"p2", b'"p2'), ["row 2:", "line 3", "close it"]),
    "a quote never closed in a long file": (
        GOOD.replace(b"p2", b'"p2') + b"p4,1,100,m,\n" * 20000, ["row 2:", "131,072", "close"]),
    "text after a quote": (GOOD.replace(b"p2", b'"p"2'), ["row 2:", "closing quote", "double"]),
    "a field beyond csv's limit": (
        GOOD.replace(b"p2", b"p" * 200_000), ["row 2:", "131,072", "shorten"]),
    "a header never closed": (b'"' + GOOD, ["header", "never closed"]),
    "a NUL": (GOOD.replace(b"p2", b"p\0"), ["row 2:", "NUL", "UTF-8"]),
    "Latin-1": (GOOD.replace(b"p2", b"p\xe4"), ["row 2:", "byte 2", "0xe4", "save", "UTF-8"]),
    "Latin-1 in the header": (GOOD.replace(b"who", b"wh\xf6"), ["the header", "0xf6", "UTF-8"]),
    "UTF-16": (GOOD.decode().encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), ["header", "NUL", "UTF-8"]),
    "bare carriage returns": (GOOD.replace(b"\n", b"\r"), ["header", "carriage return", "save"]),
    "gzip cut short": (
        gzip.compress(GOOD + b"p4,1,100,m,\n" * 50)[:-20], ["gzip", "cut short", "copy"]),
    "gzip with a wrong bit": (
        gzip.compress(GOOD)[:-8] + b"\0" * 8, ["gzip", "damaged", "copy"]),
    "a gzip header only": (b"\x1f\x8b\x08", ["gzip", "copy"]),
    "Excel": (b"PK\x03\x04" + bytes(100), ["Excel", "CSV"]),
    "old Excel": (b"\xd0\xcf\x11\xe0" + bytes(100), ["Excel", "CSV"]),
    "PDF": (b"%PDF-1.7\n", ["PDF", "CSV"]),
    "a web page": (b"<!DOCTYPE html><p>Log in", ["web page", "download"]),
    "Parquet under another name": (b"PAR1" + bytes(20), ["Parquet", "rename"]),
    "an image": (b"\x89PNG\r\n\x1a\n", ["image", "table"]),
    "an SQLite file": (b"SQLite format 3\0", ["SQLite", "CSV"]),
    "JSON": (b'[{"who": "p1", "age": 3}]', ["JSON", "CSV"]),
    "text for a number": (
        GOOD.replace(b"41.5", b"old"),
        ["column 'age', row 2", "'old' is not a number", "columns.age.missing"]),
    "a unit": (GOOD.replace(b"233", b"233 mg/dl"), ["column 'chol', row 1", "write 233", "unit"]),
    "per cent": (GOOD.replace(b"233", b"60%"), ["column 'chol', row 1", "write 60", "unit"]),
    "a decimal comma": (
        GOOD.replace(b"41.5", b'"41,5"'), ["column 'age', row 2", "write 41.5", 'decimal = ","']),
    "thousands": (
        GOOD.replace(b"233", b"1'233"), ["column 'chol', row 1", "write 1233", "thousands"]),
    "thousands, or a fraction": (
        GOOD.replace(b"233", b'"1,233"'), ["column 'chol', row 1", "write 1233", "or 1.233"]),
    "thousands and a fraction": (
        GOOD.replace(b"233", b'"1.233.000,5"'), ["column 'chol', row 1", "write 1233000.5,"]),
    "below detection": (
        GOOD.replace(b"233", b"<50"), ["column 'chol', row 1", "'<50'", "columns.chol.missing"]),
    "a date for a number": (
        GOOD.replace(b"41.5", b"2020-01-31"), ["column 'age', row 2", "'2020-01-31'", "correct"]),
    "a missing code of another column": (
        GOOD.replace(b"41.5", b"?"), ["column 'age', row 2", "'?'", "list it"]),
    "nan": (GOOD.replace(b"41.5", b"nan"), ["column 'age', row 2", "'nan'", "list it"]),
    "inf": (GOOD.replace(b"41.5", b"-inf"), ["column 'age', row 2", "'-inf'", "list it"]),
    "beyond all floats": (GOOD.replace(b"41.5", b"1e999"), ["column 'age', row 2", "'1e999'"]),
    "an underscore": (GOOD.replace(b"41.5", b"4_1"), ["column 'age', row 2", "'4_1'"]),
    "digits that are not ASCII": (
        GOOD.replace(b"41.5", "٤١".encode()), ["column 'age', row 2", "not a number"]),
    "hexadecimal": (GOOD.replace(b"41.5", b"0x29"), ["column 'age', row 2", "'0x29'"]),
    "too large": (
        GOOD.replace(b"41.5", b"212"),
        ["column 'age', row 2", "'212'", "0 to 120 years", "list it", "outside ="]),
    "too small": (GOOD.replace(b"233", b"5.9"), ["column 'chol', row 1", "'5.9'", "50 to 600"]),
    "an unknown category": (
        GOOD.replace(b",f,", b",diverse,"),
        ["column 'sex', row 2", "'diverse'", "'m', '1', 'f', '0'", "columns.sex"]),
    "a category misspelt": (
        GOOD.replace(b"present", b"presnt"), ["column 'disease', row 2", "did you mean 'present'"]),
    "a category in capitals": (
        GOOD.replace(b"absent", b"ABSENT"), ["column 'disease', row 1", "did you mean 'absent'"]),
    "a very long category": (
        GOOD.replace(b",f,", b"," + b"x" * 5000 + b","), ["column 'sex', row 2", "xxx...'"]),
    "a category of several lines": (
        GOOD.replace(b",f,", b',"f\nm",'), ["column 'sex', row 2", r"'f\nm'"]),
    "nobody": (GOOD.replace(b"p2", b" "), ["column 'who', row 2", "nobody", "take the row out"]),
    "somebody unknown": (GOOD.replace(b"p2", b"NA"), ["column 'who', row 2", "nobody"]),
    "an endless name": (GOOD.replace(b"p2", b"p" * 201), ["column 'who', row 2", "200", "shorten"]),
    "a fault below blank lines": (
        GOOD.replace(b"41.5", b"old").replace(b"p2", b"\n\np2"),
        ["column 'age', row 2 (line 5)"]),
    "a fault below a field of two lines": (
        GOOD.replace(b"p1", b'"p\n1"').replace(b"41.5", b"old"),
        ["column 'age', row 2 (line 4)"]),
    "ragged below a fault": (
        GOOD.replace(b"41.5", b"old") + b"ragged\n", ["column 'age', row 2", "'old'"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_with_where_and_how_to_mend_it(
    tmp_path: Path, content: bytes, told: Sequence[str]
) -> None:
    said = refusal(written(tmp_path, content), ward())
    assert [part for part in told if part not in said] == [], said
    assert len(said) < 600 + len(str(tmp_path))


def test_all_kinds_of_broken_files_are_at_least_fifty() -> None:
    """A floor under the list above, which is what the promise rests on."""
    assert len(BROKEN) >= 50


def test_paths_that_are_no_file_are_refused(tmp_path: Path) -> None:
    assert "check the path" in refusal(tmp_path / "absent.csv", ward())
    assert "check the path" in refusal(written(tmp_path, GOOD) / "ward.csv", ward())
    assert "is a folder" in refusal(tmp_path, ward())
    os.mkfifo(tmp_path / "pipe.csv")
    assert "no regular file" in refusal(tmp_path / "pipe.csv", ward())
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    refusal(loop, ward())


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    path.chmod(0)
    assert "let this user read it" in refusal(path, ward())


def test_a_chunk_tells_the_first_fault_of_every_column_the_first_row_first(tmp_path: Path) -> None:
    content = b"who,age,chol,sex,disease\np1,63,1,m,absent\np2,300,7,x,present\np3,old,60,m,y\n"
    with pytest.raises(FileError) as caught:
        load(written(tmp_path, content), ward())
    places = [fault.split(": ")[1] for fault in caught.value.faults]
    rows = [f"column {name!r}, row {row}" for name, row in
            (("chol", 1), ("age", 2), ("sex", 2), ("disease", 3))]  # fmt: skip
    assert places == rows
    assert str(caught.value) == caught.value.faults[0]


def test_what_is_outside_becomes_what_the_schema_says(tmp_path: Path) -> None:
    outside = {
        '"years"}': '"years", outside = "clip"}',
        'missing = ["-9"]}': 'missing = ["-9"], outside = "missing"}',
        '"0"]}}': '"0"]}, outside = "other"}',
        '"present"]}': '"present"], outside = "missing"}',
    }
    content = b"who,age,chol,sex,disease\np1,-3,1e300,x,y\np2,121,-9,NA,absent\np3,7,60,m,present"
    frame = load(written(tmp_path, content), ward(**outside))
    np.testing.assert_array_equal(frame.numbers["age"], [0, 120, 7])
    np.testing.assert_array_equal(frame.numbers["chol"], [np.nan, np.nan, 60])
    assert frame.codes["sex"].tolist() == [2, MISSING, 0]
    assert frame.codes["disease"].tolist() == [MISSING, 0, 1]
    infinite = written(tmp_path, content.replace(b"-3", b"inf"))
    assert "'inf' is not a number" in refusal(infinite, ward(**outside))


def test_a_decimal_comma_is_read_where_it_is_declared(tmp_path: Path) -> None:
    schema = ward(**{'person = "who"': 'person = "who"\ndecimal = ","'})
    content = GOOD.replace(b",", b";").replace(b"41.5", b"41,5").replace(b"-9.0", b"-9,0")
    frame = load(written(tmp_path, content), schema)
    np.testing.assert_array_equal(frame.numbers["age"], [63, 41.5, 56])
    np.testing.assert_array_equal(frame.numbers["chol"], [233, np.nan, np.nan])
    told = refusal(written(tmp_path, content.replace(b"41,5", b"41.5")), schema)
    assert "column 'age', row 2" in told
    assert 'write 41,5, or set decimal = "."' in told


def test_without_a_header_columns_are_in_the_order_of_the_schema(tmp_path: Path) -> None:
    schema = ward(**{"version = 1": "version = 1\nheader = false"})
    content = b"p1,63,233,m,absent,\np2,41.5,NA,f,present,x\n"
    frame = load(written(tmp_path, content), schema)
    assert frame.texts["note"].tolist() == ["", "x"]
    told = refusal(written(tmp_path, content + b"p3,1,60,m,absent\n"), schema)
    assert "row 3 has 5 fields, the schema lists 6" in told
    told = refusal(written(tmp_path, content.replace(b"63", b"old")), schema)
    assert "column 'age', row 1:" in told
    assert "no rows" in refusal(written(tmp_path, b""), schema)


def test_chunks_follow_one_another_and_end_where_rows_do(tmp_path: Path) -> None:
    rows = b"".join(b"p%d,%d,60,m,absent\n" % (row, row % 100) for row in range(10))
    path = written(tmp_path, b"who,age,chol,sex,disease\n" + rows)
    for chunk, sizes in ((3, [3, 3, 3, 1]), (5, [5, 5]), (100, [10])):
        frames = list(read(path, ward(), chunk=chunk))
        assert [frame.rows for frame in frames] == sizes
        ages = np.concatenate([frame.numbers["age"] for frame in frames])
        assert ages.tolist() == list(range(10))
    late = written(tmp_path, path.read_bytes() + b"p,old,60,m,absent\n")
    taken = read(late, ward(), chunk=4)
    assert [next(taken).rows, next(taken).rows] == [4, 4]
    with pytest.raises(FileError, match="row 11"):
        next(taken)


# Any table, written in any way.

MISSING_CODES = ("", "?", "NA", "-9")
WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=12
).map(str.strip)


@dataclass(frozen=True)
class Written:
    """A table and the file that says the same."""

    schema: Schema
    content: bytes
    columns: Mapping[str, Sequence[Any]]  # None where missing


@st.composite
def tables(draw: st.DrawFn) -> Written:
    header, decimal = draw(st.booleans()), draw(st.sampled_from(".,"))
    separator = draw(st.sampled_from(",;\t| "))
    code = draw(st.sampled_from(MISSING_CODES))
    kinds = [
        "category",
        *draw(st.lists(st.sampled_from(["number", "category", "text"]), max_size=4)),
    ]
    kinds.append("number")
    rows = draw(st.integers(1, 12))
    forbidden = {"", *MISSING_CODES}
    # Where only a file's look tells its separator, texts are kept from looking like two of them.
    plain = st.text(string.ascii_letters + '"äß漢', min_size=1, max_size=8)
    words = (WORDS if header else plain).filter(lambda word: canonical(word) not in forbidden)
    values: dict[str, list[Any]] = {}
    told: dict[str, list[str]] = {}
    declared: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        name = f"c{number}"
        if kind == "number":
            some = st.floats(-1e6, 1e6).filter(lambda value: value != -9)
            column = draw(st.lists(st.none() | some, min_size=rows, max_size=rows))
            written_ = [None if v is None else repr(v).replace(".", decimal) for v in column]
            declared[name] = {"type": kind, "range": [-1e6, 1e6]}
        elif kind == "category":
            codes = draw(st.lists(words, min_size=2, max_size=4, unique_by=canonical))
            column = draw(st.lists(st.none() | st.sampled_from(range(len(codes))),
                                   min_size=rows, max_size=rows))  # fmt: skip
            written_ = [None if v is None else codes[v] for v in column]
            declared[name] = {"type": kind, "categories": codes}
        else:
            column = draw(st.lists(st.none() | words, min_size=rows, max_size=rows))
            written_ = list(column)
            declared[name] = {"type": kind}
        values[name] = column
        told[name] = [code if text is None else text for text in written_]
    schema = Schema.model_validate({
        "version": 1, "name": "any", "label": "c0", "header": header, "decimal": decimal,
        "missing": [code], "columns": declared,
    })  # fmt: skip
    order = list(told)
    if header:
        told["not listed"] = draw(st.lists(WORDS, min_size=rows, max_size=rows))
        order = draw(st.permutations([*told]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    if separator == " ":
        quoting = csv.QUOTE_ALL  # an empty field between blanks is none
    text = io.StringIO()
    end = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end)
    if header:
        writer.writerow(order)
    writer.writerows(zip(*(told[name] for name in order), strict=True))
    content = text.getvalue().encode("utf-8-sig" if draw(st.booleans()) else "utf-8")
    return Written(schema, gzip.compress(content) if draw(st.booleans()) else content, values)


@given(table=tables(), chunk=st.integers(1, 6))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_table_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, table: Written, chunk: int
) -> None:
    """Whatever separates and quotes its fields, wherever its chunks end."""
    path = written(tmp_path_factory.mktemp("any"), table.content, "any.data")
    frames = list(read(path, table.schema, chunk=chunk))
    whole = load(path, table.schema)
    assert sum(frame.rows for frame in frames) == whole.rows
    for name, column in table.columns.items():
        for kind, nothing in (("numbers", np.nan), ("codes", MISSING), ("texts", "")):
            if name in getattr(whole, kind):
                expected = np.array([nothing if value is None else value for value in column])
                pieces = np.concatenate([getattr(frame, kind)[name] for frame in frames])
                np.testing.assert_array_equal(pieces, expected)
                np.testing.assert_array_equal(getattr(whole, kind)[name], expected)


@given(
    content=st.binary(max_size=300)
    | st.builds(
        lambda at, cut, junk: GOOD[:at] + junk + GOOD[at + cut :],
        st.integers(0, len(GOOD)), st.integers(0, 20), st.binary(max_size=20),
    ),
    name=st.sampled_from(["a.csv", "a.gz", "a.parquet"]),
    start=st.sampled_from([b"", b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf", b"who,age\n"]),
)  # fmt: skip
@settings(max_examples=200)
def test_bytes_are_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, start: bytes
) -> None:
    """No other error than ConfigurationError, and in one line."""
    path = written(tmp_path_factory.mktemp("bytes"), start + content, name)
    read_ = attempt(path)
    if isinstance(read_, ConfigurationError):
        assert str(path) in str(read_)
        assert len(str(read_).splitlines()) == 1


def attempt(path: Path, chunk: int = 5) -> int | ConfigurationError:
    """How many rows the ward's schema reads, or the refusal."""
    try:
        return sum(frame.rows for frame in read(path, ward(), chunk=chunk))
    except ConfigurationError as error:
        return error


@given(
    row=st.integers(0, 9),
    column=st.integers(0, 4),
    cell=WORDS | st.floats().map(str) | st.integers(-10, 700).map(str),
    chunk=st.integers(1, 11),
)
@settings(max_examples=200)
def test_a_cell_changed_is_legal_or_named(
    tmp_path_factory: pytest.TempPathFactory, row: int, column: int, cell: str, chunk: int
) -> None:
    """The message names exactly the row and the column that was changed."""
    names = ["who", "age", "chol", "sex", "disease"]
    rows = [["p", "50", "200", "m", "absent"] for _ in range(10)]
    rows[row][column] = cell
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    path = written(tmp_path_factory.mktemp("cell"), text.getvalue().encode())
    name = names[column]
    read_ = attempt(path, chunk)
    if legal(name, cell.strip()):
        assert read_ == 10
    else:
        assert isinstance(read_, FileError)
        assert f": column {name!r}, row {row + 1}: " in str(read_)


def legal(name: str, cell: str) -> bool:
    """Whether the ward's schema permits the cell, said in another way than the reader's."""
    missing = cell in {"", "NA"}
    if name == "who":
        return not missing and len(cell) <= 200
    if name in {"age", "chol"}:
        low, high = (0, 120) if name == "age" else (50, 600)
        try:
            number = float(cell) if cell.isascii() and "_" not in cell else float("nan")
        except ValueError:
            return missing
        return missing or low <= number <= high or (name == "chol" and number == -9)
    permitted = {"m", "f", "0", "1"} if name == "sex" else {"absent", "present"}
    return missing or cell in permitted or (name == "sex" and canonical(cell) in permitted)


# Parquet.


def parquet(folder: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    path = folder / "ward.parquet"
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def columns() -> dict[str, Any]:
    return {
        "unlisted": [[1], [2], [3]],
        "sex": pa.array([True, False, None]).dictionary_encode(),
        "who": [1, 2, 3],
        "age": pa.array([Decimal("63.0"), Decimal("41.5"), None]),
        "chol": [233.0, float("nan"), -9.0],
        "disease": pa.array(["absent", "present", None]).dictionary_encode(),
    }


def test_parquet_is_read_by_what_its_values_are(tmp_path: Path) -> None:
    """Decimals, whole numbers, dictionaries and truth values; null and NaN are missing."""
    schema = ward(**{'["m", "1"]': '["True"]', '["f", "0"]': '["False"]'})
    for options in ({}, {"row_group_size": 2}):
        frame = load(parquet(tmp_path, columns(), **options), schema)
        np.testing.assert_array_equal(frame.numbers["age"], [63, 41.5, np.nan])
        np.testing.assert_array_equal(frame.numbers["chol"], [233, np.nan, np.nan])
        assert frame.codes["sex"].tolist() == [0, 1, MISSING]
        assert frame.codes["disease"].tolist() == [0, 1, MISSING]
        assert frame.texts["who"].tolist() == ["1", "2", "3"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["63", " 41.5", "NA"]),
        pa.array(["63", "41.5", None], pa.large_string()),
        pa.array([63, 41.5, None], pa.float32()),
        pa.array(np.array([63, 41.5, np.nan], np.float16)),
        pa.array(["63", "41.5", None]).dictionary_encode(),
        pa.array([63, 41.5, None]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_numbers_may_be_stored_in_any_way(tmp_path: Path, values: Any) -> None:
    schema = ward(**{'["m", "1"]': '["True"]', '["f", "0"]': '["False"]'})
    frame = load(parquet(tmp_path, {**columns(), "age": values}), schema)
    np.testing.assert_array_equal(frame.numbers["age"], [63, 41.5, np.nan])


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("age", pa.array([0, 1, 2], pa.date64()), ["column 'age' holds date", "number"]),
        ("age", pa.array([0, 1, 2], pa.timestamp("s")), ["column 'age' holds timestamp"]),
        ("sex", [[1], [2], [3]], ["column 'sex' holds list", "category"]),
        ("who", [b"a", b"b", b"c"], ["column 'who' holds binary", "text"]),
        ("age", [1.0, 200.0, 3.0], ["column 'age', row 2", "200", "0 to 120 years"]),
        ("age", [1.0, 2.0, float("inf")], ["column 'age', row 3", "inf is no finite number"]),
        ("age", ["1", "2", "3 y"], ["column 'age', row 3", "'3 y'", "write 3"]),
        ("sex", [1.0, 2.0, None], ["column 'sex', row 2", "'2'"]),
        ("who", ["a", None, "c"], ["column 'who', row 2", "nobody"]),
        ("who", ["a", "b\0", "c"], ["column 'who', row 2", "NUL"]),
    ],
)  # fmt: skip
def test_parquet_that_is_not_as_the_schema_says_is_refused(
    tmp_path: Path, name: str, values: Any, told: Sequence[str]
) -> None:
    good = {**columns(), "sex": ["m", "f", "m"], name: values}
    for options in ({}, {"row_group_size": 1}):
        said = refusal(parquet(tmp_path, good, **options), ward())
        assert [part for part in told if part not in said] == [], said


def test_parquet_that_is_none_or_lacks_a_column_is_refused(tmp_path: Path) -> None:
    assert "no whole Parquet file" in refusal(written(tmp_path, GOOD, "a.parquet"), ward())
    whole = parquet(tmp_path, columns()).read_bytes()
    assert "no whole Parquet file" in refusal(written(tmp_path, whole[:-9], "a.parquet"), ward())
    assert "no whole Parquet file" in refusal(written(tmp_path, b"", "a.parquet"), ward())
    lacking = {name: values for name, values in columns().items() if name != "age"}
    told = refusal(parquet(tmp_path, {**lacking, "Age": [1, 2, 3]}), ward())
    assert "no column 'age': did you mean 'Age'" in told
    assert "'sex' twice" in refusal(parquet(tmp_path, {**columns(), " sex": [1, 2, 3]}), ward())
    nothing = {name: pa.array([], pa.string()) for name in columns()}
    assert "no rows" in refusal(parquet(tmp_path, nothing), ward())


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.bool_(), pa.decimal128(25, 2)], ids=str
)
def test_whole_and_truth_values_of_a_parquet_file_are_numbers(tmp_path: Path, kind: Any) -> None:
    values = pa.array([1, 0, None]).cast(kind)
    good = {**columns(), "sex": ["m", "f", "m"], "age": values}
    np.testing.assert_array_equal(
        load(parquet(tmp_path, good), ward()).numbers["age"], [1, 0, np.nan]
    )


def test_dates_of_a_parquet_file_are_texts(tmp_path: Path) -> None:
    days = pa.array([0, 1, None], pa.date32())
    good = {**columns(), "sex": ["m", "f", "m"], "note": days}
    frame = load(parquet(tmp_path, good), ward())
    assert frame.texts["note"].tolist() == ["1970-01-01", "1970-01-02", ""]


# Files of the world.

HEART = """
version = 1
name = "heart"
label = "num"
header = false
missing = ["?"]
[columns]
age = {type = "number", range = [0, 120], unit = "years"}
sex = {type = "category", categories = {female = ["0"], male = ["1"]}}
cp = {type = "category", categories = ["1", "2", "3", "4"]}
trestbps = {type = "number", range = [0, 300], unit = "mm Hg"}
chol = {type = "number", range = [1, 1000], unit = "mg/dl", outside = "missing"}
fbs = {type = "category", categories = ["0", "1"]}
restecg = {type = "category", categories = ["0", "1", "2"]}
thalach = {type = "number", range = [0, 300]}
exang = {type = "category", categories = ["0", "1"]}
oldpeak = {type = "number", range = [-10, 10]}
slope = {type = "category", categories = ["1", "2", "3"]}
ca = {type = "number", range = [0, 9]}
thal = {type = "category", categories = ["3", "6", "7"]}
num = {type = "category", categories = {absent = ["0"], present = ["1", "2", "3", "4"]}}
"""


@pytest.mark.skipif(not (SHARED / "heart_disease").is_dir(), reason="the data is not here")
@pytest.mark.parametrize(
    ("hospital", "rows", "ill", "without_ca"),
    [("cleveland", 303, 139, 4), ("hungarian", 294, 106, 291), ("switzerland", 123, 115, 118),
     ("va", 200, 149, 198)],
)  # fmt: skip
def test_the_four_hospitals_of_the_heart_disease_data(
    hospital: str, rows: int, ill: int, without_ca: int
) -> None:
    """Figures of the data set's description: records, diseased, and values of ca that lack."""
    path = SHARED / "heart_disease" / f"processed.{hospital}.data"
    frame = load(path, parse(HEART))
    assert (frame.rows, int(frame.codes["num"].sum())) == (rows, ill)
    assert int(np.isnan(frame.numbers["ca"]).sum()) == without_ca
    if hospital == "switzerland":  # all of its cholesterol is written as 0
        assert np.isnan(frame.numbers["chol"]).all()


@pytest.mark.skipif(not (SHARED / "german_credit").is_dir(), reason="the data is not here")
def test_german_credit_whose_fields_are_separated_by_blanks() -> None:
    numbers = {1: 100, 4: 20_000, 7: 4, 10: 4, 12: 120, 15: 10, 17: 10}
    columns = "\n".join(
        f'a{n} = {{type = "number", range = [0, {numbers[n]}]}}' if n in numbers else
        f'a{n} = {{type = "text"}}' for n in range(20)
    )  # fmt: skip
    schema = parse(
        f'version = 1\nname = "credit"\nlabel = "risk"\nheader = false\n[columns]\n{columns}\n'
        'risk = {type = "category", categories = {good = ["1"], bad = ["2"]}}'
    )
    frame = load(SHARED / "german_credit" / "german.data", schema)
    assert (frame.rows, frame.codes["risk"].tolist().count(1)) == (1000, 300)
    assert frame.numbers["a4"][:3].tolist() == [1169, 5951, 2096]
