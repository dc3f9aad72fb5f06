"""A site's file as its schema says: text tables, Parquet and folders of images, in chunks of rows.

Everything that is not as the schema says is refused with one line that names the file, the column,
the row and the value, and says how to mend it. Nothing is guessed but a text table's separator.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from securefl.data.frames import MISSING, Frame
from securefl.data.images import SUFFIXES, ImageError, read_image
from securefl.schema import (
    CategoryColumn,
    ImageColumn,
    NumberColumn,
    Schema,
    TextColumn,
    canonical,
)
from securefl.sections import ConfigurationError

CHUNK: Final = 16384
"""Rows that are held at a time; fewer where a row is wide."""

CELLS: Final = 1 << 19
"""Cells that are held at a time."""

PIXELS: Final = 1 << 26
"""Bytes of images that are held at a time."""

LONGEST_LINE: Final = 1 << 26
"""Bytes; a longer line is no row of a table, and would fill the memory."""

LONGEST_TEXT: Final = 200
"""Characters of a text column's cell, as of a code."""

SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}

FOREIGN: Final = {
    b'[{"': ("JSON", "export the table as CSV"),
    b'{"': ("JSON", "export the table as CSV"),
    b"PK\x03\x04": ("an Excel workbook or a ZIP archive", "export the table as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "export the table as CSV"),
    b"%PDF-": ("a PDF document", "export the table as CSV"),
    b"<!DOCTYPE": ("a web page", "download the table itself"),
    b"<html": ("a web page", "download the table itself"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"BZh91AY&SY": ("a bzip2 archive", "unpack it, or compress it with gzip"),
    b"\xfd7zXZ": ("an xz archive", "unpack it, or compress it with gzip"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", "unpack it, or compress it with gzip"),
    b"\x89PNG": ("an image", "give the table that names it, or the folder above its class"),
    b"\xff\xd8\xff": ("an image", "give the table that names it, or the folder above its class"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}
"""What a file that is no table begins with, what it looks like then, and the mend."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WITH_UNIT = re.compile(r"([+-]?\d+(?:[.,]\d+)?)\s*(?:[^\W\d_]|[%°])\D{0,20}[23]?")
_REFUSED = -2

Cells = Sequence[str] | NDArray[np.float64]
"""One column of a chunk as it was read: text, or numbers with NaN where there is none."""

Value = TypeVar("Value", bound=np.generic)


class FileError(ConfigurationError):
    """Cells that are not as the schema says. `faults`: the first of each column in the same chunk,
    by row; the message is the first of all."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults[0])
        self.faults = tuple(faults)


def read(path: Path, schema: Schema, *, chunk: int = CHUNK) -> Iterator[Frame]:
    """The rows of the file `path` in their order, at most `chunk` >= 1 of them at a time.

    A text table in UTF-8, gzipped or not, may separate its fields with `,` `;` `|`, tabs or runs of
    blanks; fields are quoted with `"`; blank lines are no rows. A file called .parquet is Parquet.
    A folder is read where the schema has an image column: FOLDER/CLASS/FILE, the label being
    CLASS. With `schema.header` (and in Parquet) columns are found by name, in any order, and those
    that the schema does not list are not read; without, they come in the schema's order. Cells are
    compared without the blanks around them; in a column of numbers a missing code that is a number
    stands for all ways to write it.

    Raises, as rows are taken, ConfigurationError, of the kind FileError where single cells are
    wrong, in one line that names the file, the column, the row (counted from 1 below the header)
    and the value.
    """
    columns = {name: _column(path, schema, name) for name in schema.columns}
    nobody = True
    for rows in _rows(path, schema, _most_rows(schema, chunk)):
        yield _frame(path, schema, rows, columns)
        nobody = False
    if nobody:
        raise ConfigurationError(f"{path} holds no rows: add records")


def load(path: Path, schema: Schema) -> Frame:
    """All rows of the file `path` in one Frame; see `read` for formats and errors.

    Needs the memory of the Frame, an eighth more, and one chunk.
    """
    # A bytearray grows in place, where a list of arrays would be held twice when it is joined.
    grown: dict[str, bytearray] = {name: bytearray() for name in schema.columns}
    texts: dict[str, list[NDArray[np.str_]]] = {}
    rows = 0
    for frame in read(path, schema):
        rows += frame.rows
        for name, numbers_ in frame.numbers.items():
            grown[name] += numbers_.tobytes()
        for name, codes_ in frame.codes.items():
            grown[name] += codes_.tobytes()
        for name, text in frame.texts.items():
            texts.setdefault(name, []).append(text)
        if schema.image is not None and frame.images is not None:
            grown[schema.image] += frame.images.tobytes()
    numbers: dict[str, NDArray[np.float64]] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    images: NDArray[np.uint8] | None = None
    for name, column in schema.columns.items():
        match column:
            case NumberColumn():
                numbers[name] = np.frombuffer(grown[name], np.float64)
            case CategoryColumn():
                codes[name] = np.frombuffer(grown[name], np.int32)
            case ImageColumn():
                shape = (rows, column.channels, column.height, column.width)
                images = np.frombuffer(grown[name], np.uint8).reshape(shape)
            case TextColumn():
                pass
    joined = {name: np.concatenate(texts.pop(name)) for name in list(texts)}
    return Frame(schema, rows, numbers, codes, joined, images)


# Rows: where they come from.


@dataclass(frozen=True)
class _Rows:
    """Some rows as they were read; `where` names one of them in a message."""

    count: int
    cells: Mapping[str, Cells]
    where: Callable[[int], str]


def _rows(path: Path, schema: Schema, most: int) -> Iterator[_Rows]:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if is_folder:
        return _folder_rows(path, schema, most)
    if not is_file:
        raise ConfigurationError(f"{path} is no regular file: copy the table into one")
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, schema, most)
    return _text_rows(path, schema, most)


def _frame(path: Path, schema: Schema, rows: _Rows, columns: Mapping[str, _Column]) -> Frame:
    numbers: dict[str, NDArray[np.float64]] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    texts: dict[str, NDArray[np.str_]] = {}
    images: NDArray[np.uint8] | None = None
    nothing = ("",) * rows.count
    faults: list[tuple[int, str]] = []
    for name, column in columns.items():
        cells = rows.cells.get(name, nothing)
        try:
            match column:
                case _Numbers():
                    numbers[name] = column.read(cells)
                case _Codes():
                    codes[name] = column.read(_texts(cells))
                case _Texts():
                    texts[name] = column.read(_texts(cells))
                case _Images():
                    images = column.read(_texts(cells))
        except _CellError as fault:
            where = f"{path}: column {name!r}, {rows.where(fault.row)}"
            faults.append((fault.row, f"{where}: {fault}"))
    if faults:
        raise FileError([text for _, text in sorted(faults, key=lambda fault: fault[0])])
    return Frame(schema, rows.count, numbers, codes, texts, images)


def _texts(cells: Cells) -> Sequence[str]:
    assert not isinstance(cells, np.ndarray)  # noqa: S101 (only columns of numbers hold numbers)
    return cells


def _text_rows(path: Path, schema: Schema, most: int) -> Iterator[_Rows]:
    separator = find_separator(path, schema)
    records = csv_records(path, separator, schema.header)
    if schema.header:
        _, header = next(records, (0, []))
        if not header:
            raise ConfigurationError(f"{path} is empty: it needs a header and records")
        if separator == " " and not header[-1]:
            header.pop()
        names = [name.strip() for name in header]
        positions = _found(path, schema, names, separator)
    else:
        names = list(schema.columns)
        positions = {name: position for position, name in enumerate(names)}
    limit = max(1, min(most, CELLS // len(names)))
    before = 0
    while True:
        rows: list[list[str]] = []
        lines: list[int] = []
        fault: ConfigurationError | None = None
        try:
            for line, fields in islice(records, limit):
                if separator == " ":
                    _drop_end(fields, len(names))
                if len(fields) != len(names):
                    row = before + len(rows) + 1
                    raise _ragged(
                        path, schema, _place(row, line, schema.header), len(fields), names
                    )
                rows.append(fields)
                lines.append(line)
        except ConfigurationError as error:
            fault = error  # what is wrong further up is told first
        if rows:
            cells = {name: [row[at] for row in rows] for name, at in positions.items()}
            yield _Rows(len(rows), cells, _placing(before, lines, schema.header))
        if fault is not None:
            raise fault
        if len(rows) < limit:
            return
        before += len(rows)


def _placing(before: int, lines: Sequence[int], header: bool) -> Callable[[int], str]:
    return lambda index: _place(before + index + 1, lines[index], header)


def _place(row: int, line: int, header: bool) -> str:
    """What to call a row; its line is told where lines and rows have parted."""
    if row == 0:
        return "the header"
    return f"row {row}" if line == row + header else f"row {row} (line {line})"


def _ragged(
    path: Path, schema: Schema, place: str, fields: int, names: Sequence[str]
) -> ConfigurationError:
    told = "the header has" if schema.header else "the schema lists"
    mend = "quote fields that hold the separator" if fields > len(names) else "add what is missing"
    return ConfigurationError(
        f"{path}: {place} has {count_of(fields, 'field')}, {told} {len(names)}: {mend}"
    )


def count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def find_separator(path: Path, schema: Schema) -> str:
    """The sign between fields: under it most columns are found by name or, without a header, most
    of the first records have a field for each column."""
    sample: list[str] = []
    left = LONGEST_LINE
    with open_file(path) as file:
        while len(sample) < 32 and left > 0 and (line := file.readline(left)):
            sample.append(line.decode("utf-8-sig", errors="replace"))
            left -= len(line)

    def fitting(separator: str) -> tuple[int, bool, int]:
        found = fields = 0
        reader = csv.reader(sample, delimiter=separator, skipinitialspace=True)
        try:
            for record in reader:
                if _is_blank(record):
                    continue
                if separator == " ":
                    _drop_end(record, len(schema.columns))
                fields = max(fields, len(record))
                if schema.header:
                    found = len({name.strip() for name in record} & schema.columns.keys())
                    break
                found += len(record) == len(schema.columns)
        except csv.Error:  # told, with its row, when the file is read
            pass
        # Where several fit, or none: names and texts hold blanks more often than other signs.
        return found, fields > 1 and separator != " ", fields

    candidates = sorted(SEPARATORS, key=lambda separator: separator == schema.decimal)
    return max(candidates, key=fitting)


def csv_records(path: Path, separator: str, header: bool) -> Iterator[tuple[int, list[str]]]:
    """Every record of a text table but blank lines, and the line that it starts on, from 1."""
    row, line = (0 if header else 1), 1
    with open_file(path) as file:
        reader = csv.reader(_lines(file), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            for fields in reader:
                if not _is_blank(fields):
                    yield line, fields
                    row += 1
                line = reader.line_num + 1
        except _LineError as error:
            raise ConfigurationError(f"{path}: {_place(row, line, header)}: {error}") from None
        except csv.Error as error:
            fault = f"{_place(row, line, header)}: {_csv_fault(str(error), line)}"
            raise ConfigurationError(f"{path}: {fault}") from None


def _drop_end(fields: list[str], width: int) -> None:
    """Blanks at a line's end are no field."""
    if len(fields) == width + 1 and not fields[-1]:
        fields.pop()


def _is_blank(fields: Sequence[str]) -> bool:
    return not fields or (len(fields) == 1 and not fields[0].strip())


def _csv_fault(told: str, line: int) -> str:
    if "unexpected end of data" in told:
        return f"a quote opened at line {line} is never closed: close it, or double a lone quote"
    if "field limit" in told:
        return (
            f"a field has more than {csv.field_size_limit():,} characters: close its quote, or "
            "shorten it"
        )
    if "new-line character" in told:
        return "a bare carriage return ends a line: save the file with line feeds"
    return "text follows a closing quote: double the quotes within a field"


class _LineError(Exception):
    """A line that is no text, and the mend."""


def _lines(file: BinaryIO) -> Iterator[str]:
    first = True
    while line := file.readline(LONGEST_LINE):
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        if len(line) == LONGEST_LINE:
            raise _LineError(f"a line of more than {LONGEST_LINE >> 20} MiB: is this a table?")
        if b"\0" in line:
            raise _LineError(
                "a NUL byte: the file is damaged, or is not UTF-8 (save it as UTF-8 text)"
            )
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise _LineError(
                f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8: "
                "save the file as UTF-8"
            ) from None


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The bytes of the file `path`, unzipped; ConfigurationError when it cannot be read."""
    try:
        with path.open("rb") as plain:
            start = plain.read(16)
            plain.seek(0)
            for sign, (kind, mend) in FOREIGN.items():
                if start.startswith(sign):
                    raise ConfigurationError(f"{path} looks like {kind}: {mend}")
            if start.startswith(b"PAR1"):
                raise ConfigurationError(f"{path} looks like Parquet: rename it to .parquet")
            if start.startswith(b"\x1f\x8b"):
                with gzip.open(plain) as unzipped:
                    yield cast(BinaryIO, unzipped)
            else:
                yield plain
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ConfigurationError(
            f"{path}: the gzip stream is cut short or damaged: copy the file again"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigurationError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        mend = "check the path"
    else:
        mend = "let this user read it" if isinstance(error, PermissionError) else "copy it again"
    told = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ConfigurationError(f"cannot read {path}: {told}: {mend}")


def _found(
    path: Path, schema: Schema, names: Sequence[str], separator: str | None = None
) -> dict[str, int]:
    """Where each of the schema's columns is among `names`; columns that are lacking and may be are
    left out."""
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        if name and name in positions:
            raise ConfigurationError(f"{path}: the header has {_shown(name)} twice: rename one")
        positions[name] = position
    lacking = [
        name
        for name, column in schema.columns.items()
        if name not in positions
        and (not column.optional or name == schema.person or isinstance(column, ImageColumn))
    ]
    if lacking:
        name = lacking[0]
        near = _nearest(name, [other for other in names if other not in schema.columns])
        if near is not None:
            mend = f"did you mean {_shown(near)}? Rename it there or in the schema"
        elif not positions.keys() & schema.columns.keys():
            apart = f", read with {SEPARATORS[separator]} between fields" if separator else ""
            begins = ", ".join(_shown(other) for other in names[:3])
            mend = (
                f"its header begins {begins}{apart}: mend it, or set header = false in the schema"
            )
        else:
            mend = "add it, or let it be absent with optional = true in the schema"
        raise ConfigurationError(f"{path} has no column {name!r}: {mend}")
    return {name: positions[name] for name in schema.columns if name in positions}


def import_pyarrow(path: Path) -> Any:
    """pyarrow with its Parquet part; ConfigurationError, for the file `path`, without the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigurationError(
            f"{path}: reading Parquet needs an extra: pip install 'securefl[parquet]'"
        ) from None
    return pyarrow


def _parquet_rows(path: Path, schema: Schema, most: int) -> Iterator[_Rows]:
    pyarrow = import_pyarrow(path)
    try:
        # Without these, Arrow holds a whole row group, which may be the whole file.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            fields = file.schema_arrow
            names = {name.strip(): name for name in fields.names}
            wanted = list(_found(path, schema, [name.strip() for name in fields.names]))
            for name in wanted:
                _check_type(path, schema, name, fields.field(names[name]).type)
            limit = max(1, min(most, CELLS // len(wanted)))
            before = 0
            for batch in file.iter_batches(limit, columns=[names[name] for name in wanted]):
                cells = {
                    name: _arrow_cells(batch.column(names[name]), schema.columns[name])
                    for name in wanted
                }
                if batch.num_rows:
                    yield _Rows(batch.num_rows, cells, _counting(before))
                before += batch.num_rows
    except ConfigurationError:
        raise
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} holds text that is not UTF-8: export it again") from None
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            raise _unreadable(path, error) from None
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"{path} is no whole Parquet file ({told[:200]}): export it again"
        ) from None


def _counting(before: int) -> Callable[[int], str]:
    return lambda index: f"row {before + index + 1}"


def _check_type(path: Path, schema: Schema, name: str, kind: Any) -> None:
    """Refuses a Parquet column that cannot be what the schema says."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
    number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    if text or number or types.is_decimal(kind):
        return
    column = schema.columns[name]
    if types.is_temporal(kind) and not isinstance(column, NumberColumn | ImageColumn):
        return
    raise ConfigurationError(
        f"{path}: column {name!r} holds {kind}, the schema says {column.type}: convert it, or mend "
        "the schema"
    )


def _arrow_cells(array: Any, column: object) -> Cells:
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    text = types.is_string(array.type) or types.is_large_string(array.type)
    if isinstance(column, NumberColumn) and not text:
        values = array.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
        return cast(NDArray[np.float64], values)
    return [cell_text(value) for value in array.to_pylist()]


def cell_text(value: object) -> str:
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return ""
    return canonical(str(value)) if isinstance(value, float) else str(value)


def _folder_rows(path: Path, schema: Schema, most: int) -> Iterator[_Rows]:
    """FOLDER/CLASS/FILE in the order of their names."""
    if schema.image is None:
        raise ConfigurationError(
            f"{path} is a folder, and the schema has no image column: give one file of it"
        )
    needed = [
        name
        for name, column in schema.columns.items()
        if name not in {schema.label, schema.image}
        and (not column.optional or name == schema.person)
    ]
    if needed or not isinstance(schema.columns[schema.label], CategoryColumn):
        lacking = needed[0] if needed else schema.label
        raise ConfigurationError(
            f"{path}: a folder of images says nothing of column {lacking!r}: write a table that "
            f"names each image in a column {schema.image!r}, and give that"
        )
    images: list[tuple[str, str]] = []
    try:
        for folder in entries_of(path):
            if not folder.is_dir():
                raise ConfigurationError(
                    f"{folder} is in no class's folder: put it in one, or move it away"
                )
            for image in entries_of(folder):
                if image.suffix.lower() not in SUFFIXES:
                    raise ConfigurationError(
                        f"{image} is none of {', '.join(SUFFIXES)}: convert it, or move it away"
                    )
                images.append((folder.name, f"{folder.name}/{image.name}"))
    except OSError as error:
        raise _unreadable(path, error) from None
    for start in range(0, len(images), most):
        chunk = images[start : start + most]
        classes, names = [label for label, _ in chunk], [name for _, name in chunk]
        yield _Rows(len(chunk), {schema.label: classes, schema.image: names}, _naming(names))


def entries_of(folder: Path) -> Iterable[Path]:
    return sorted(found for found in folder.iterdir() if not found.name.startswith("."))


def _naming(names: Sequence[str]) -> Callable[[int], str]:
    return lambda index: f"file {_shown(names[index])}"


def _most_rows(schema: Schema, chunk: int) -> int:
    """How many rows are held at a time: fewer where their images are large."""
    column = schema.columns[schema.image] if schema.image is not None else None
    if not isinstance(column, ImageColumn):
        return chunk
    return max(1, min(chunk, PIXELS // (column.channels * column.height * column.width)))


# Columns: what their cells mean.


class _CellError(Exception):
    """A cell that is not as the schema says; `row` counts from 0 in its chunk."""

    def __init__(self, row: int, told: str) -> None:
        super().__init__(told)
        self.row = row


class _Numbers:
    def __init__(self, schema: Schema, name: str, column: NumberColumn) -> None:
        self.column = column
        self.decimal = schema.decimal
        self.missing = schema.missing_codes(name)
        numbers = (_number(code, self.decimal) for code in self.missing)
        self.missing_numbers = np.array([number for number in numbers if number is not None])
        self.mend = f"correct it, or list it in columns.{name}.missing of the schema"

    def read(self, cells: Cells) -> NDArray[np.float64]:
        fault: _CellError | None = None
        if isinstance(cells, np.ndarray):
            values = cells
        else:
            values, fault = self._parsed(cells)
        if self.missing_numbers.size:
            values = np.where(np.isin(values, self.missing_numbers), np.nan, values)
        endless = np.isinf(values)
        if endless.any():
            row = int(np.argmax(endless))
            raise _CellError(row, f"{values[row]} is no finite number: {self.mend}")
        low, high = self.column.range
        outside = (values < low) | (values > high)
        if self.column.outside == "refuse" and outside.any():
            row = int(np.argmax(outside))
            cell = cells[row]
            told = _shown(cell) if isinstance(cell, str) else f"{cell:.12g}"
            unit = f" {self.column.unit}" if self.column.unit else ""
            raise _CellError(
                row,
                f"{told} is not within {low:.12g} to {high:.12g}{unit}: {self.mend}, or say there "
                'what to do: outside = "missing" or "clip"',
            )
        if fault is not None:
            raise fault
        if self.column.outside == "clip":
            return np.clip(values, low, high)
        return np.where(outside, np.nan, values) if outside.any() else values

    def _parsed(self, cells: Sequence[str]) -> tuple[NDArray[np.float64], _CellError | None]:
        """The cells' values, up to the first that is none."""
        try:
            return self._parsed_plainly(cells), None
        except ValueError:
            pass
        values = np.empty(len(cells))
        for row, cell in enumerate(map(str.strip, cells)):
            number = math.nan if cell in self.missing else _number(cell, self.decimal)
            if number is None:
                told = f"{_shown(cell)} is not a number: {self._mend(cell)}"
                return values[:row], _CellError(row, told)
            values[row] = number
        return values, None

    def _parsed_plainly(self, cells: Sequence[str]) -> NDArray[np.float64]:
        """The values of cells that Python's `float` reads as `_number` would, and much faster;
        ValueError where it may not."""
        text = "".join(cells)
        if not text.isascii() or "_" in text:
            raise ValueError
        if self.decimal == ",":
            if "." in text:
                raise ValueError
            cells = [cell.replace(",", ".") for cell in cells]
        missing, nan = self.missing, math.nan
        values = np.array([nan if cell in missing else float(cell) for cell in cells])
        if not missing.issuperset(cells[int(row)] for row in np.flatnonzero(~np.isfinite(values))):
            raise ValueError
        return values

    def _mend(self, cell: str) -> str:
        """The mend of the likeliest cause."""
        other = "," if self.decimal == "." else "."
        plain = cell.replace(other, self.decimal)[:60]
        if re.fullmatch(r"[+-]?\d{1,3}([ ',.\u00a0\u2019]\d{3})+([.,]\d*)?", cell, re.ASCII):
            whole = re.sub(r"[ ',.\u00a0\u2019](?=\d{3}(?!\d))", "", cell).replace(
                other, self.decimal
            )
            or_else = (
                "" if _number(plain, self.decimal) is None else f" (or {plain}, if it is that)"
            )
            return f"write {whole[:60]}, without separators of thousands{or_else}"
        if _number(plain, self.decimal) is not None:
            return f'write {plain}, or set decimal = "{other}" in the schema'
        if found := _WITH_UNIT.fullmatch(plain):
            return f"write {found.group(1)}, without the unit"
        return self.mend


def _number(cell: str, decimal: str) -> float | None:
    """The finite number that a cell is, if it is one."""
    if decimal == ",":
        if "." in cell:
            return None
        cell = cell.replace(",", ".")
    if not _NUMBER.fullmatch(cell):
        return None
    number = float(cell)
    return number if math.isfinite(number) else None


class _Codes:
    def __init__(self, schema: Schema, name: str, column: CategoryColumn) -> None:
        self.missing = {canonical(code) for code in schema.missing_codes(name)}
        self.codes = {canonical(code): number for code, number in column.codes.items()}
        self.permitted = tuple(column.codes)
        otherwise = {"refuse": _REFUSED, "missing": MISSING, "other": len(column.categories)}
        self.otherwise = otherwise[column.outside]
        self.key = f"columns.{name}"

    def read(self, cells: Sequence[str]) -> NDArray[np.int32]:
        known = {cell: self._code(cell) for cell in set(cells)}
        codes = np.fromiter(map(known.__getitem__, cells), np.int32, len(cells))
        refused = codes == _REFUSED
        if refused.any():
            row = int(np.argmax(refused))
            raise _CellError(row, self._told(cells[row].strip()))
        return codes

    def _code(self, cell: str) -> int:
        code = canonical(cell)
        return MISSING if code in self.missing else self.codes.get(code, self.otherwise)

    def _told(self, cell: str) -> str:
        near = _nearest(cell, self.permitted)
        listed = ", ".join(_shown(code) for code in self.permitted[:12])
        more = len(self.permitted) - 12
        return (
            f"{_shown(cell)} is none of {listed}{f' and {more} more' if more > 0 else ''}: "
            + (f"did you mean {_shown(near)}? Correct it" if near is not None else "correct it")
            + f", or add it to {self.key} of the schema as a category or as missing"
        )


class _Texts:
    def __init__(self, schema: Schema, name: str, column: TextColumn) -> None:
        self.missing = schema.missing_codes(name)
        self.canonical = {canonical(code) for code in self.missing}
        self.person = name == schema.person

    def read(self, cells: Sequence[str]) -> NDArray[np.str_]:
        texts = []
        for row, text in enumerate(map(str.strip, cells)):
            missing = text in self.missing or canonical(text) in self.canonical
            if missing and self.person:
                raise _CellError(
                    row,
                    "nobody is named, and rows of people unknown would count as one person's: "
                    "name the person, or take the row out",
                )
            if "\0" in text:
                raise _CellError(row, f"{_shown(text)} holds a NUL: take it out")
            if len(text) > LONGEST_TEXT:
                raise _CellError(
                    row,
                    f"{_shown(text)} has {len(text)} characters: shorten it to {LONGEST_TEXT}, or "
                    "leave the column out of the schema",
                )
            texts.append("" if missing else text)
        return np.array(texts, np.str_)


class _Images:
    def __init__(self, folder: Path, schema: Schema, name: str, column: ImageColumn) -> None:
        self.folder, self.column = folder, column
        self.missing = schema.missing_codes(name)

    def read(self, cells: Sequence[str]) -> NDArray[np.uint8]:
        column = self.column
        images = np.empty((len(cells), column.channels, column.height, column.width), np.uint8)
        for row, name in enumerate(map(str.strip, cells)):
            if name in self.missing:
                raise _CellError(row, "no image is named: name it, or take the row out")
            try:
                images[row] = read_image(
                    self.folder, name, column.height, column.width, column.channels
                )
            except ImageError as error:
                raise _CellError(row, f"{_shown(name)} {error}") from None
        return images


_Column = _Numbers | _Codes | _Texts | _Images


def _column(path: Path, schema: Schema, name: str) -> _Column:
    match schema.columns[name]:
        case NumberColumn() as column:
            return _Numbers(schema, name, column)
        case CategoryColumn() as column:
            return _Codes(schema, name, column)
        case TextColumn() as column:
            return _Texts(schema, name, column)
        case ImageColumn() as column:
            return _Images(path if path.is_dir() else path.parent, schema, name, column)


def _shown(text: str) -> str:
    """A value in a message: in quotes, in one line, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _nearest(text: str, known: Sequence[str]) -> str | None:
    text = text[:60]
    folded = {other.casefold(): other for other in known}
    if text.casefold() in folded:
        return folded[text.casefold()]
    return next(iter(difflib.get_close_matches(text, known, n=1, cutoff=0.6)), None)
