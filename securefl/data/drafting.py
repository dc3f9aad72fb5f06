"""A first schema from one site's file: the types that its columns seem to have, for a person to
correct and for the other sites to agree on.

A schema is public. So a draft never holds a least or greatest value of the file: ranges are widened
outward to 1, 2 or 5 times a power of ten. Texts that stand in few rows are left out of the
categories. What else was seen in the file stands in comments that one command takes off.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, final

import tomli_w

from securefl import schema as schemas
from securefl.data import reading
from securefl.data.images import FORMATS, SUFFIXES
from securefl.schema import Schema, canonical
from securefl.sections import ConfigurationError

RARE: Final = 5
"""A text that stands in fewer rows is not written into a draft: a public list would tell of it."""

FEW_NUMBERS: Final = 10
"""At most so many different whole numbers are taken for the codes of categories."""

FEW_TEXTS: Final = 30
"""At most so many different texts are taken for categories."""

KEPT: Final = 1000
"""So many different values of a column are counted; beyond, only numbers' extremes are known."""

# These mean in any column that a value is not known.
_UNKNOWN: Final = frozenset({"?", "NA", "N/A", "n/a", "NULL", "null", "NaN", "nan", "#N/A", "<NA>"})
# These do so among numbers: "none" can be a category, and -9 a temperature.
_WORDS: Final = frozenset({"-", "--", ".", "none", "None", "NONE", "na", "unknown"})
_BELOW_ZERO: Final = frozenset({"-9", "-99", "-999", "-9999"})

_DOT: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_COMMA: Final = re.compile(r"[+-]?(\d+(,\d*)?|,\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_PADDED: Final = re.compile(r"0\d+", re.ASCII)  # a code such as 0071 is no quantity
_DATE: Final = re.compile(r"(\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4})\b.*", re.ASCII)
_ID: Final = re.compile(r"(.*[\W_])?(?i:id|nr|mrn|uuid|guid)|.*[a-z]I[dD]")

_LARGEST: Final = 1e29  # of a number, so that the bounds around it are within a schema's


@final
@dataclass(frozen=True)
class Draft:
    """A schema, and its TOML text with comments for who edits it: `text` parses to `schema`."""

    schema: Schema
    text: str


def draft(
    path: Path,
    *,
    header: bool | None = None,
    label: str | None = None,
    names: Sequence[str] = (),
) -> Draft:
    """A schema that accepts `path`: a table, or a folder of images FOLDER/CLASS/FILE.

    header: whether the first row names the columns; None looks. names: the columns' names where
    no row has them (else column_1, column_2, ...). label: what a model shall learn (else the last
    column that can be learnt).

    Raises ConfigurationError that says what is wrong with the file, with `label` or with `names`.
    """
    named, separator = True, None
    if path.is_dir():
        columns = _folder(path)
    elif path.suffix.lower() == ".parquet":
        columns = _parquet(path)
    else:
        columns, named, separator = _table(path, header, names)
    if names and named:
        raise ConfigurationError(f"{path} names its columns itself: leave --names out")
    if not columns or not columns[0].rows:
        raise ConfigurationError(f"{path} holds no rows: choose a file that does")
    for name, count in Counter(column.name for column in columns).items():
        if count > 1:
            raise ConfigurationError(f"{path} has {name!r} twice among its names: rename one")
        if not name.isprintable() or len(name) > 1000:
            raise ConfigurationError(
                f"{path}: {name[:60]!r} is no name of a column: write one line, or say --no-header"
            )
    for column in columns:
        column.settle(path)
    long = [column.name for column in columns if column.longest > reading.LONGEST_TEXT]
    if long and not named:
        raise ConfigurationError(
            f"{path}: {long[0]} holds text of more than {reading.LONGEST_TEXT} characters, which "
            f"no schema takes in: give the file a first row of names, and it can be left out"
        )
    columns = [column for column in columns if column.name not in long]
    decimal: Literal[".", ","] = "."
    if sum(c.numeric(",") for c in columns) > sum(c.numeric(".") for c in columns):
        decimal = ","
    text = _written(path, columns, named, decimal, label, long)
    schema = schemas.parse(text, f"the draft from {path}")
    if separator is not None and reading.find_separator(path, schema) != separator:
        raise ConfigurationError(
            f"{path}: stray quotes or signs hide what separates its fields: export it as CSV again"
        )
    return Draft(schema, text)


@dataclass
class _Seen:
    """What one column of the file holds, as far as a draft needs it."""

    name: str
    rows: int = 0
    values: Counter[str] = field(default_factory=Counter)  # by canonical code
    missing: Counter[str] = field(default_factory=Counter)
    doubtful: Counter[str] = field(default_factory=Counter)  # missing, if the others are numbers
    many: bool = False  # more than KEPT values: those beyond are not in `values`
    dots: bool = True  # every value is a number, with a point before a fraction
    commas: bool = True
    whole: bool = True
    padded: bool = False
    least: float = math.inf
    most: float = -math.inf
    dates: bool = True
    longest: int = 0
    image: tuple[int, int, int] | None = None  # height, width, channels

    def add(self, cells: Iterable[str]) -> None:
        """Take some rows' cells in."""
        for cell, count in Counter(map(str.strip, cells)).items():
            self.rows += count
            if not cell or cell in _UNKNOWN:
                self.missing[cell] += count
            elif cell in _WORDS or canonical(cell) in _BELOW_ZERO:
                self.doubtful[cell] += count
            else:
                self._add(cell, count)

    def _add(self, cell: str, count: int) -> None:
        code = canonical(cell)
        if self.dots or self.commas:
            self.dots = self.dots and _DOT.fullmatch(cell) is not None
            self.commas = self.commas and _COMMA.fullmatch(cell) is not None
        if self.dots or self.commas:
            number = float(cell.replace(",", "."))
            if abs(number) > _LARGEST:
                self.dots = self.commas = False
            self.whole = self.whole and number.is_integer()
            self.padded = self.padded or _PADDED.fullmatch(cell) is not None
            self.least, self.most = min(self.least, number), max(self.most, number)
        self.dates = self.dates and _DATE.fullmatch(cell) is not None
        self.longest = max(self.longest, len(cell))
        if code in self.values or len(self.values) < KEPT:
            self.values[code] += count
        else:
            self.many = True

    def settle(self, path: Path) -> None:
        """With all rows seen, decide what the doubtful codes mean, and whether it is an image."""
        numbers = bool(self.values) and (self.dots or self.commas)
        for cell, count in self.doubtful.items():
            if numbers and (cell in _WORDS or self.least >= 0):
                self.missing[cell] += count
            else:
                self._add(cell, count)
        self.doubtful.clear()
        if self.values and not self.many and not self.image and not path.is_dir():
            self._look_for_images(path.parent)

    def _look_for_images(self, folder: Path) -> None:
        if all(Path(code).suffix.lower() in SUFFIXES for code in self.values):
            self.image = _size(folder / code for code in self.values)

    def numeric(self, decimal: str) -> bool:
        """Whether every value is a number, with `decimal` before a fraction."""
        return bool(self.values) and (self.dots if decimal == "." else self.commas)

    @property
    def known(self) -> int:
        """Rows with a value."""
        return self.rows - self.missing.total()

    @property
    def different(self) -> bool:
        """Whether no two rows have one value, as far as was counted."""
        return self.known > 1 and max(self.values.values()) == 1

    @property
    def few(self) -> bool:
        """Whether so few values that each comes again."""
        most = FEW_NUMBERS if self.dots or self.commas else FEW_TEXTS
        kinds = len(self.values)
        return not self.many and kinds <= most and (kinds <= 2 or self.known >= 2 * kinds)

    @property
    def identifies(self) -> bool:
        """Whether it looks like a number or name of the row or of its person, and no measure."""
        if self.padded:
            return True
        running = self.most - self.least + 1 == self.known >= 20
        return (
            self.whole
            and not self.few
            and (_ID.fullmatch(self.name) is not None or (self.different and running))
        )


# The file: rows of text, whatever it is.


def _table(path: Path, header: bool | None, names: Sequence[str]) -> tuple[list[_Seen], bool, str]:
    """The columns of a text table, whether its first row names them, and what separates them."""
    separator, sample = _separator(path)
    named = _has_names(sample) if header is None else header
    records = reading.csv_records(path, separator, named)
    if named:
        _, first = next(records, (0, []))
        found = [name.strip() for name in _whole(first, len(first) - 1, separator)]
    else:
        width, _ = _commonest(map(len, sample))
        found = list(names) or [f"column_{number}" for number in range(1, width + 1)]
        if len(found) != width:
            raise ConfigurationError(
                f"{path} has {width} columns, and --names names {len(found)}: name each once"
            )
    columns = [_Seen(name) for name in found]
    row = 0
    while chunk := list(islice(records, reading.CHUNK)):
        rows = []
        for line, fields in chunk:
            row += 1
            whole = _whole(fields, len(columns), separator)
            if len(whole) != len(columns):
                raise ConfigurationError(
                    f"{path}: row {row} (line {line}) has {reading.count_of(len(whole), 'field')}, "
                    f"there are {reading.count_of(len(columns), 'column')}: quote fields that hold "
                    f"the separator, or fill the row up"
                )
            rows.append(whole)
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
            column.add(cells)
    return [column for column in columns if column.name], named, separator


def _separator(path: Path) -> tuple[str, list[list[str]]]:
    """The sign under which the first lines have most fields, and equally many; those fields."""
    with reading.open_file(path) as file:
        lines = [file.readline(1 << 20).decode("utf-8-sig", "replace") for _ in range(64)]
    best: tuple[float, int] = (-1.0, 0)
    chosen: tuple[str, list[list[str]]] = (",", [])
    for separator in reading.SEPARATORS:
        reader = csv.reader(filter(str.strip, lines), delimiter=separator, skipinitialspace=True)
        try:
            records = list(reader)
        except csv.Error:  # told, with its row, when the file is read
            continue
        if separator == " ":
            records = [_whole(record, len(record) - 1, " ") for record in records]
        width, often = _commonest(map(len, records))
        score = (often / len(records) if width > 1 else 0.0), width
        if score > best:
            best, chosen = score, (separator, records)
    return chosen


def _commonest(numbers: Iterable[int]) -> tuple[int, int]:
    """The number that comes most often, and how often; (0, 0) of none."""
    return next(iter(Counter(numbers).most_common(1)), (0, 0))


def _whole(fields: list[str], width: int, separator: str) -> list[str]:
    """A record without the empty field that blanks at a line's end make."""
    trailing = separator == " " and len(fields) == width + 1 and not fields[-1]
    return fields[:-1] if trailing else fields


def _has_names(sample: Sequence[Sequence[str]]) -> bool:
    """Whether a table's first record looks like names: no numbers, but numbers below; or nothing
    in it that is said twice."""
    if not sample:
        return True
    first, below = [cell.strip() for cell in sample[0]], sample[1:]
    names = [name for name in first if name]
    if any(_is_number(name) or name in _UNKNOWN for name in names):
        return False
    columns = [[r[i].strip() for r in below if i < len(r)] for i in range(len(first))]
    if any(column and all(map(_is_number, column)) for column in columns):
        return True
    again = any(name and name in column for name, column in zip(first, columns, strict=True))
    return bool(names) and len(set(names)) == len(names) and not again


def _is_number(cell: str) -> bool:
    return (_DOT.fullmatch(cell) or _COMMA.fullmatch(cell)) is not None


def _parquet(path: Path) -> list[_Seen]:
    """The columns of a Parquet file that a schema can describe."""
    pyarrow = reading.import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = {f.name: _Seen(f.name.strip()) for f in file.schema_arrow if _flat(f.type)}
            for batch in file.iter_batches(reading.CHUNK, columns=list(found)):
                for name, column in found.items():
                    column.add(map(reading.cell_text, batch.column(name).to_pylist()))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        told = str(error).partition("\n")[0]
        raise ConfigurationError(f"cannot read {path}: {told[:200]}: export it again") from None
    return list(found.values())


def _flat(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _folder(path: Path) -> list[_Seen]:
    """The two columns of FOLDER/CLASS/FILE."""
    images, classes = _Seen("image"), _Seen("class")
    files = []
    for folder in reading.entries_of(path):
        if not folder.is_dir():
            raise ConfigurationError(f"{folder} is in no class's folder: put it in one, or move it")
        found = list(reading.entries_of(folder))
        files += found
        classes.add([folder.name] * len(found))
        images.add(f"{folder.name}/{file.name}" for file in found)
    if files:
        images.image = _size(files)
    return [images, classes]


def _size(files: Iterable[Path]) -> tuple[int, int, int]:
    """Height, width and channels of images, from their first bytes."""
    from PIL import Image

    found: tuple[int, int] | None = None
    colour = False
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                size, mode = image.size, image.mode
        except (OSError, ValueError, Image.DecompressionBombError):
            raise ConfigurationError(f"{file} is no image: save it again") from None
        if found is not None and found != size:
            raise ConfigurationError(
                f"{file} is {size[0]} pixels wide and {size[1]} high, others {found[0]} and "
                f"{found[1]}: scale all to one size"
            )
        found, colour = size, colour or mode not in ("1", "L", "LA")
    width, height = found or (1, 1)
    return height, width, 3 if colour else 1


# The draft.

Kind = Literal["number", "category", "text", "image"]


def _kind(seen: _Seen, decimal: str, learnt: bool = False) -> Kind:
    """The type to draft. learnt: it is the label."""
    if seen.image:
        return "image"
    # A schema lists nothing that cannot be printed.
    shown = all(map(schemas.steers_nothing, seen.values)) and seen.longest <= reading.LONGEST_TEXT
    if not seen.values or not shown:
        return "text"
    if seen.numeric(decimal):
        if seen.identifies and not learnt:
            return "text"
        return "category" if seen.whole and seen.few else "number"
    if set(seen.values) == {"test", "train"} and not learnt:
        return "text"
    listed = seen.few or (learnt and not seen.many)
    return "category" if listed and (learnt or not seen.dates) else "text"


def _learnable(seen: _Seen, decimal: str, named: bool = False) -> bool:
    kind = _kind(seen, decimal, named)
    return kind == "number" or (kind == "category" and len(seen.values) > 1)


def _label(columns: Sequence[_Seen], decimal: str, label: str | None, path: Path) -> _Seen:
    if label is None:
        for seen in reversed(columns):
            if _learnable(seen, decimal):
                return seen
        raise ConfigurationError(
            f"{path}: no column has numbers or a few categories: name the label with --label"
        )
    for seen in columns:
        if seen.name == label:
            if _learnable(seen, decimal, True):
                return seen
            raise ConfigurationError(
                f"{path}: column {label!r} is no number and not a few categories: choose another "
                f"label"
            )
    names = [seen.name for seen in columns]
    near = difflib.get_close_matches(label, names, n=1, cutoff=0.5)
    raise ConfigurationError(
        f"{path} has no column {label!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}")
    )


def _written(
    path: Path,
    columns: Sequence[_Seen],
    named: bool,
    decimal: str,
    label: str | None,
    long: Sequence[str],
) -> str:
    """The schema as TOML with comments."""
    learnt = _label(columns, decimal, label, path)
    codes = sorted({code for c in columns for code in c.missing if code in _UNKNOWN})
    stem = path.name if path.is_dir() else path.with_name(path.name.removesuffix(".gz")).stem
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64]
    lines = [
        "# A draft from one file. Go through it line by line, then give it to the other sites.",
        '# Lines that begin with "# seen:" tell of this file\'s records: delete them before, with',
        "#   sed -i '/^# seen:/d' SCHEMA.toml",
        "version = 1",
        f"name = {_value(stem or 'records')}",
    ]
    if label is None:
        lines.append(
            "# Taken because it is the last column that a model can learn: is it the right one?"
        )
    lines += [f"label = {_value(learnt.name)}", *_persons(columns), *_tests(columns, learnt)]
    if not named:
        lines += [
            "# No row names the columns: they stand below in the file's order.",
            "header = false",
        ]
    if decimal == ",":
        lines.append('decimal = ","')
    lines.append("# What means, in any column, that a value is not known (as the empty one does).")
    lines.append(f"missing = {_value(codes)}")
    lines.append(f"# seen: {columns[0].rows} rows")
    for name in long:
        lines.append(f"# Column {name} holds long text: it is left out, and never read.")
    for seen in columns:
        lines += ["", f"[columns.{_key(seen.name)}]"]
        lines += _column(seen, _kind(seen, decimal, seen is learnt), seen is learnt)
    return "\n".join(lines) + "\n"


def _persons(columns: Sequence[_Seen]) -> list[str]:
    found = (c.name for c in columns if _ID.fullmatch(c.name) and not c.different and c.values)
    name = next(found, "COLUMN")
    return [
        '# Whose a row is, where a person can have several: a column of type = "text".',
        f"# person = {_value(name)}",
    ]


def _tests(columns: Sequence[_Seen], learnt: _Seen) -> list[str]:
    for seen in columns:
        if set(seen.values) == {"test", "train"} and seen is not learnt:
            return ['# Its rows with "test" are kept from training.', f"test = {_value(seen.name)}"]
    return []


def _column(seen: _Seen, kind: Kind, learnt: bool) -> list[str]:
    lines = [f"# seen: {line}" for line in _told(seen, kind)]
    if kind == "number":
        low, high = _bounds(seen.least, seen.most)
        lines += [
            'type = "number"',
            "# Widened from this file: replace it by what is publicly plausible.",
            f"range = [{_figure(low)}, {_figure(high)}]",
            '# unit = "..."',
        ]
    elif kind == "category":
        lines += ['type = "category"', *_categories(seen, learnt)]
    elif kind == "image":
        height, width, channels = seen.image or (0, 0, 0)
        lines += ['type = "image"', f"height = {height}", f"width = {width}"]
        lines.append(f"channels = {channels}")
    else:
        lines += [*_why_text(seen), 'type = "text"']
    own = sorted(code for code in seen.missing if code and code not in _UNKNOWN)
    if own:
        lines.append("# Read as no value: is that what these mean here?")
        lines.append(f"missing = {_value(own)}")
    return lines


def _told(seen: _Seen, kind: Kind) -> Iterator[str]:
    count = f"more than {KEPT}" if seen.many else str(len(seen.values))
    lost = seen.missing.total()
    yield f"{count} different values; {lost} of {seen.rows} missing"
    if kind == "category":
        rare = sum(count < RARE for count in seen.values.values())
        if rare:
            yield f"{rare} of the categories stand in fewer than {RARE} rows"


def _categories(seen: _Seen, learnt: bool) -> Iterator[str]:
    numbers = seen.dots or seen.commas
    common = [code for code, count in seen.values.items() if count >= RARE]
    rare = len(seen.values) - len(common)
    if numbers:
        yield '# Whole numbers, taken for codes. For a quantity: type = "number" and its range.'
    if rare and not numbers and not learnt and len(common) > 1:
        yield f"# Texts in fewer than {RARE} rows are left out: a public list tells what exists."
        yield "# Add those that everybody knows of; the others are read as one further category."
        yield f"categories = {_value(sorted(common))}"
        yield 'outside = "other"'
        return
    if rare:
        yield "# A public list tells that each of these exists here: are they all publicly known?"
    order = (
        sorted(seen.values, key=lambda c: (float(c.replace(",", ".")), c))
        if numbers
        else (sorted(seen.values))
    )
    yield f"categories = {_value(order)}"


def _why_text(seen: _Seen) -> Iterator[str]:
    if not seen.values:
        yield "# No row has a value. Other sites' may: then say what it holds."
    elif seen.dates:
        yield "# Dates are no feature: let your file say what matters, such as an age in years."
    elif _DOT.fullmatch(next(iter(seen.values))) and seen.identifies:
        yield "# It seems to name the row or its person, so no model reads it."
    elif set(seen.values) != {"test", "train"}:
        yield "# Text that differs from row to row is no feature. Delete it if nothing needs it."


def _bounds(least: float, most: float) -> tuple[float, float]:
    """Public-looking bounds around what was seen, never equal to it unless at zero.

    >>> _bounds(29.0, 77.0), _bounds(0.0, 6.2), _bounds(35.1, 41.5), _bounds(-2.6, 200.0)
    ((0.0, 100.0), (0.0, 10.0), (30.0, 50.0), (-5.0, 500.0))
    """
    span = most - least
    if 0 < span < abs(most + least) / 6:  # far from zero, such as a temperature or a year
        step = _above(span)
        low, high = math.floor(least / step) * step, math.ceil(most / step) * step
        return (low - step if low == least else low), (high + step if high == most else high)
    low = 0.0 if least >= 0 else -_above(-least)
    high = _above(most) if most > 0 else 0.0
    return (low, high) if low < high else (low, 1.0)


def _above(value: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that exceeds `value` > 0."""
    power = math.floor(math.log10(value)) if value > 0 else 0
    for exponent in (power, power + 1):
        for digit in (1, 2, 5):
            if (bound := float(f"{digit}e{exponent}")) > value:
                return bound
    raise AssertionError(value)


def _figure(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII) else _value(name)


def _value(value: str | list[str]) -> str:
    """A string or a list of strings as TOML."""
    if isinstance(value, str):
        return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
    line = "[" + ", ".join(map(_value, value)) + "]"
    return line if len(line) < 85 else tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
