"""What is wrong, odd or worth knowing in one site's file, before anything is trained on it.

The file is read once, a chunk at a time, into counts: nothing is kept of a row but 8-byte hashes,
and nothing is written anywhere. The findings are for the site's own people. They are figures of
private records, and no other site and no server may see them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from securefl.data.frames import MISSING, Frame
from securefl.data.reading import FileError, read
from securefl.schema import CategoryColumn, Column, NumberColumn, Schema, TextColumn
from securefl.sections import ConfigurationError

Severity = Literal["error", "warning", "note"]

SHOWN: Final = 5
"""So many rows are named for a finding."""

BINS: Final = 1000
"""Of the histogram on a column's range, from which quartiles are read."""

RATIO: Final = 1.02
"""Between neighbouring bins of the other histogram, which has all magnitudes."""

DISTINCT: Final = 100
"""Different values of a number are counted up to so many."""

UNREAD: Final = 8
"""The file is read anew without a column that has unreadable cells, for so many columns."""

FAR: Final = 4.0
"""Robust deviations (interquartile range / 1.349) beyond which a number is an outlier."""


@final
@dataclass(frozen=True)
class Finding:
    """One sentence on what is wrong or odd, with its mend. `column`: None for whole rows."""

    severity: Severity
    column: str | None
    text: str


@final
@dataclass(frozen=True)
class Numbers:
    """A column's numbers as they stand in the file, in the column's unit, those outside its range
    among them. quartiles: to one bin, a thousandth of the range (or 2 % where that is finer)."""

    least: float
    most: float
    mean: float
    deviation: float
    quartiles: tuple[float, float, float]
    outside: int
    at_low_end: float
    at_high_end: float
    outliers: int


@final
@dataclass(frozen=True)
class Summary:
    """One column: how many values are missing, how many differ (None: more than were counted)."""

    name: str
    type: str
    rows: int
    missing: int
    distinct: int | None
    numbers: Numbers | None = None
    categories: Mapping[str, int] | None = None

    @property
    def missing_share(self) -> float:
        """Of the rows, 0 to 1."""
        return self.missing / self.rows if self.rows else 0.0


@final
@dataclass(frozen=True)
class Findings:
    """All that was found. people: None where the schema names no person."""

    file: str
    rows: int
    people: int | None
    columns: tuple[Summary, ...]
    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(found for found in self.findings if found.severity == severity)


def check(path: Path, schema: Schema) -> Findings:
    """What there is to know of the file (or folder of images) `path` under `schema`.

    Numbers outside a range and unknown categories are errors only where the schema refuses them;
    they are counted to the end of the file. A file of which nothing can be read is an error among
    the findings too. Writes nothing.
    """
    unread: dict[str, str] = {}  # columns with cells that cannot be read, and the first of those
    while True:  # once for all columns, and again for the others where one cannot be read
        done = _Reading(schema, unread)
        stopped: tuple[str, ...] = ()
        try:
            for frame in read(path, done.lenient):
                done.add(frame)
        except ConfigurationError as error:
            stopped = error.faults if isinstance(error, FileError) else (str(error),)
        found = {
            name: fault
            for fault in stopped
            for name, column in done.columns.items()
            if fault.startswith(f"{path}: column {name!r}, ") and name not in unread
            if isinstance(column, _Numbers)
        }
        if not found or len(found) < len(stopped) or len(unread) >= UNREAD:
            return done.findings(path, [fault.removeprefix(f"{path}: ") for fault in stopped])
        unread |= {
            name: fault.removeprefix(f"{path}: column {name!r}, ") for name, fault in found.items()
        }


def _first_fault(path: Path, lenient: Schema, name: str, column: Column) -> str:
    """What the reader says of the first cell that it refuses in `column`."""
    strict = lenient.model_copy(update={"columns": {**lenient.columns, name: column}})
    try:
        for _ in read(path, strict):
            pass
    except FileError as error:
        return str(error).removeprefix(f"{path}: column {name!r}, ")
    return "a row that is gone: the file has changed meanwhile; check it again"


class _Reading:
    """All that is counted while the file is read; columns `unread` are taken for text."""

    def __init__(self, schema: Schema, unread: Mapping[str, str]) -> None:
        self._schema, self._unread = schema, unread
        self.lenient = _lenient(schema, unread)
        self.columns = {
            name: _started(name, TextColumn(type="text") if name in unread else column)
            for name, column in schema.columns.items()
        }
        self._rows = _Rows(schema)

    def add(self, frame: Frame) -> None:
        """Take a chunk in."""
        for name, column in self.columns.items():
            column.add(_values(frame, name), self._rows.count)
        self._rows.add(frame)

    def findings(self, path: Path, stopped: Sequence[str]) -> Findings:
        """What was found; `stopped`: why reading ended before the file did."""
        rows = self._rows.count
        found = [Finding("error", None, fault) for fault in stopped]
        if stopped and rows:
            found.append(Finding("note", None, f"reading ended after row {rows}: more may follow"))
        for name, fault in self._unread.items():
            found.append(Finding("error", name, f"{fault}; other cells may have the same fault"))
        if rows:
            for name, column in self.columns.items():
                found += column.findings(rows, name == self._schema.label)
                if isinstance(column, _Categories) and column.refused:
                    fault = _first_fault(path, self.lenient, name, column.column)
                    found.append(column.refusal(fault))
            found += self._rows.findings(self.columns)
        order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
        return Findings(
            str(path),
            rows,
            self._rows.people,
            tuple(column.summary(rows) for column in self.columns.values()) if rows else (),
            tuple(sorted(found, key=lambda one: order[one.severity])),
        )


def _lenient(schema: Schema, unread: Collection[str]) -> Schema:
    """`schema`, with every number in range, every category known as one more, and rows of nobody;
    columns `unread` are text."""
    columns: dict[str, Column] = {}
    for name, column in schema.columns.items():
        if name in unread:
            columns[name] = TextColumn(type="text", missing=column.missing, optional=True)
        elif isinstance(column, NumberColumn):
            columns[name] = column.model_copy(
                update={"range": (-math.inf, math.inf), "outside": "refuse"}
            )
        elif isinstance(column, CategoryColumn):
            columns[name] = column.model_copy(update={"outside": "other"})
        else:
            columns[name] = column
    return schema.model_copy(update={"columns": columns, "person": None})


def _values(frame: Frame, name: str) -> NDArray[Any]:
    for columns in (frame.numbers, frame.codes, frame.texts):
        if name in columns:
            return columns[name]
    if frame.images is None:
        raise KeyError(name)
    return frame.images


class _Bins:
    """How many values fell into each bin, and the first of them with its row: only bins in use are
    kept. The first value stands for its bin, which is exact where values are few."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._first: dict[int, tuple[float, int]] = {}

    def add(
        self, bins: NDArray[np.int16], values: NDArray[np.float64], rows: NDArray[np.int64]
    ) -> None:
        found, first, counts = np.unique(bins, return_index=True, return_counts=True)
        for number, at, count in zip(found.tolist(), first, counts.tolist(), strict=True):
            self._counts[number] += count
            if number not in self._first:
                self._first[number] = float(values[at]), int(rows[at])

    def histogram(self) -> _Histogram:
        """What was counted so far, by value."""
        held = sorted((*self._first[number], count) for number, count in self._counts.items())
        values, rows, counts = zip(*held, strict=True) if held else ((), (), ())
        return _Histogram(
            np.array(values, np.float64), np.array(counts, np.int64), np.array(rows, np.int64)
        )


@dataclass(frozen=True)
class _Histogram:
    """The first value of each bin in use, in order, how many the bin has, and the first's row."""

    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    rows: NDArray[np.int64]

    def quantile(self, share: float) -> float:
        """The first value of the bin that holds the quantile; needs a value."""
        total = np.cumsum(self.counts)
        return float(self.values[np.searchsorted(total, share * (total[-1] - 1), side="right")])

    def quartiles(self) -> tuple[float, float, float]:
        return self.quantile(0.25), self.quantile(0.5), self.quantile(0.75)

    def within(self, low: float, high: float) -> tuple[int, int]:
        """How many values lie in [low, high], and in how many bins."""
        part = self.part(low, high)
        return int(part.counts.sum()), len(part.counts)

    def part(self, low: float, high: float) -> _Histogram:
        """The part of it in [low, high]."""
        kept = (self.values >= low) & (self.values <= high)
        return _Histogram(self.values[kept], self.counts[kept], self.rows[kept])


@dataclass
class _Numbers:
    """A column of numbers, as it is read."""

    name: str
    column: NumberColumn
    missing: int = 0
    known: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean
    least: float = math.inf
    most: float = -math.inf
    at_low_end: int = 0
    at_high_end: int = 0
    outside: int = 0
    outside_rows: list[int] = field(default_factory=list)
    distinct: set[float] = field(default_factory=set)
    on_range: _Bins = field(default_factory=_Bins)
    magnitudes: _Bins = field(default_factory=_Bins)

    def add(self, values: NDArray[np.float64], before: int) -> None:
        known = ~np.isnan(values)
        rows = np.flatnonzero(known) + before + 1
        x = values[known]
        self.missing += len(values) - len(x)
        if not len(x):
            return
        self._moments(x)
        low, high = self.column.range
        self.at_low_end += int(np.sum(x == low))
        self.at_high_end += int(np.sum(x == high))
        beyond = (x < low) | (x > high)
        if beyond.any():
            self.outside += int(beyond.sum())
            self.outside_rows += rows[beyond][: SHOWN - len(self.outside_rows)].tolist()
        if len(self.distinct) <= DISTINCT:
            self.distinct.update(np.unique(x)[: DISTINCT + 1].tolist())
        place = np.floor((x - low) / (high - low) * BINS)
        place[x == high] = BINS - 1
        self.on_range.add(np.clip(place, -1, BINS).astype(np.int16), x, rows)
        with np.errstate(divide="ignore"):
            size = np.round(np.log(np.abs(x)) / math.log(RATIO))
        signed = np.sign(x) * (np.clip(size, -_SIZES, _SIZES) + _SIZES + 1)
        self.magnitudes.add(np.where(x == 0, 0, signed).astype(np.int16), x, rows)

    def _moments(self, x: NDArray[np.float64]) -> None:
        """Chan, Golub and LeVeque 1983: means and sums of squares of two parts, put together."""
        mean = float(x.mean())
        apart, total = mean - self.mean, self.known + len(x)
        self.squares += float(np.sum((x - mean) ** 2)) + apart**2 * self.known * len(x) / total
        self.mean += apart * len(x) / total
        self.known = total
        self.least, self.most = min(self.least, float(x.min())), max(self.most, float(x.max()))

    def histogram(self) -> _Histogram:
        """On the range where that tells values apart, else by their magnitudes."""
        fine = self.on_range.histogram()
        low, _, high = fine.quartiles()
        width = (self.column.range[1] - self.column.range[0]) / BINS
        coarse = high - low < 10 * width and self.least < self.most
        return self.magnitudes.histogram() if coarse or self.outside > self.known / 10 else fine

    def _far(self) -> tuple[int, list[int]]:
        """How many values are outliers, and in which rows the first of them are.

        Skewed values, such as incomes, are judged by their logarithms.
        """
        shape = self.histogram()
        values, quartiles = shape.values, np.array(shape.quartiles())
        if self.least > 0 and quartiles[0] < quartiles[2]:
            skew, log_skew = (abs(np.diff(q, 2)[0]) for q in (quartiles, np.log(quartiles)))
            if log_skew / np.ptp(np.log(quartiles)) < skew / np.ptp(quartiles):
                values, quartiles = np.log(values), np.log(quartiles)
        reach = FAR * float(np.ptp(quartiles)) / 1.349
        if not reach:
            return 0, []
        far = np.abs(values - quartiles[1]) > reach
        return int(shape.counts[far].sum()), sorted(shape.rows[far].tolist())[:SHOWN]

    def summary(self, rows: int) -> Summary:
        numbers = None
        if self.known:
            numbers = Numbers(
                self.least,
                self.most,
                self.mean,
                math.sqrt(self.squares / self.known),
                self.histogram().quartiles(),
                self.outside,
                self.at_low_end / self.known,
                self.at_high_end / self.known,
                self._far()[0],
            )
        distinct = len(self.distinct) if len(self.distinct) <= DISTINCT else None
        return Summary(self.name, "number", rows, self.missing, distinct, numbers)

    def findings(self, rows: int, label: bool) -> Iterator[Finding]:
        yield from _missing(self.name, self.column, self.missing, rows, label)
        if not self.known:
            return
        if self.least == self.most and self.known > 1:
            yield _constant(self.name, _figure(self.least), label)
            return
        yield from self._outside()
        yield from self._ends()
        yield from self._zeros()
        units = list(self._units())
        yield from units
        count, where = self._far()
        if count and not units:
            yield Finding(
                "note",
                self.name,
                f"{_count(count, 'value')} beyond {FAR:g} robust deviations of the median, "
                f"{_among(count, where)}: look whether they are typing errors or codes like 999",
            )

    def _outside(self) -> Iterator[Finding]:
        if not self.outside:
            return
        low, high = self.column.range
        unit = f" {self.column.unit}" if self.column.unit else ""
        extreme = self.most if self.most > high else self.least
        told = (
            f"{_count(self.outside, 'value')} outside [{_figure(low)}, {_figure(high)}]{unit}, "
            f"such as {_figure(extreme)}; first in {_in_rows(self.outside_rows)}"
        )
        if self.outside > self.known / 2:
            told += f"; most of the file is outside: is it in another unit than{unit or ' agreed'}?"
            yield Finding("error", self.name, told)
            return
        if self.column.outside == "refuse":
            mend = (
                "correct them, list codes under missing, or agree on a wider range or on outside = "
                '"missing" or "clip"'
            )
            yield Finding("error", self.name, f"{told}: {mend}")
            return
        as_what = "missing" if self.column.outside == "missing" else "the nearest end"
        share = self.outside / self.known
        yield Finding(
            "warning" if share > 0.01 else "note",
            self.name,
            f"{told}: they count as {as_what}; a wider range would keep them",
        )

    def _ends(self) -> Iterator[Finding]:
        low, high = self.column.range
        for end, count in ((low, self.at_low_end), (high, self.at_high_end)):
            if end and count > max(self.known / 100, 2):
                yield Finding(
                    "note",
                    self.name,
                    f"{_percent(count / self.known)} of the values are exactly {_figure(end)}, an "
                    f"end of the range: if they were cut off there, agree on a wider range",
                )
        used = (min(self.most, high) - max(self.least, low)) / (high - low)
        if 0 < used < 0.02:
            yield Finding(
                "note",
                self.name,
                f"the values take {_percent(used)} of the range [{_figure(low)}, {_figure(high)}]: "
                f"agree on a narrower one, or scaling by it presses them together",
            )

    def _zeros(self) -> Iterator[Finding]:
        """A zero far below all other values is often a code for a missing one."""
        zeros, _ = self.magnitudes.histogram().within(0, 0)
        others = self.magnitudes.histogram().part(_TINY, math.inf)
        if not zeros or self.least < 0 or len(others.values) < 5:
            return
        steps = float(np.median(np.diff(others.values)))  # 1 for counts, where 0 is one of them
        near = others.quantile(0.01) <= 0.3 * others.quantile(0.5)
        if not near and others.values[0] > 5 * steps:
            yield Finding(
                "warning",
                self.name,
                f"0 in {_count(zeros, 'row')}, while other values begin near "
                f"{_figure(float(others.values[0]))}: if it means that nothing was measured, list "
                f'missing = ["0"]',
            )

    def _units(self) -> Iterator[Finding]:
        """A cluster of values where the bulk would be in another unit.

        It has at least three times the density of the gap between the two: tails have none.
        """
        shape = self.magnitudes.histogram().part(_TINY, math.inf)
        total = int(shape.counts.sum())
        if total < 0.9 * (self.known - self.magnitudes.histogram().within(0, 0)[0]) or total < 20:
            return
        low, middle, high = shape.quartiles()
        width = max(math.log(high / low), 5 * math.log(RATIO))
        core = middle * math.exp(-width), middle * math.exp(width)
        if shape.within(*core)[1] < 5:
            return  # a few codes or counts, where a gap says nothing
        best: tuple[float, str, _Histogram] | None = None
        for factor, offset, what in _CONVERSIONS:
            ends = [factor * end + offset for end in (*core, middle)]
            if min(ends) <= 0:
                continue
            away = abs(math.log(ends[2] / middle))
            if away < max(1.5 * width, 0.5) or (core[0] < ends[2] < core[1]):
                continue
            count, bins = shape.within(ends[0], ends[1])
            spread = math.log(ends[1] / ends[0])
            gap = min(spread, away / 3) / 2
            centre = math.sqrt(ends[2] * middle)
            between, _ = shape.within(centre * math.exp(-gap), centre * math.exp(gap))
            thin = (between + 1) / (2 * gap) * 3 < count / spread
            if bins < 3 or not max(5, total / 500) <= count <= total / 2 or not thin:
                continue
            there = shape.part(ends[0], ends[1])
            distance = abs(math.log((there.quantile(0.5) - offset) / factor / middle))
            if best is None or distance < best[0]:
                low, high = ends[0] * math.exp(-2 * width), ends[1] * math.exp(2 * width)
                beyond = (centre, high) if ends[2] > middle else (low, centre)
                best = distance, what, shape.part(*beyond)
        if best is not None:
            _, what, cluster = best
            count, where = int(cluster.counts.sum()), sorted(cluster.rows.tolist())[:SHOWN]
            yield Finding(
                "warning",
                self.name,
                f"{_count(count, 'value')} ({_percent(count / total)}) {what}, "
                f"{_among(count, where)}: write all in one unit",
            )


_TINY: Final = float(np.finfo(np.float64).tiny)
_SIZES: Final = 3500  # bins of each sign on either side of 1: to RATIO ** 3500 > 1e30


def _both(factor: float, offset: float, there: str, back: str) -> list[tuple[float, float, str]]:
    return [
        (factor, offset, f"look {there}"),
        (1 / factor, -offset / factor, f"look {back}"),
    ]


_CONVERSIONS: Final = (
    *_both(10, 0, "ten times too large", "ten times too small"),
    *_both(100, 0, "a hundred times too large", "a hundred times too small"),
    *_both(1000, 0, "a thousand times too large", "a thousand times too small"),
    *_both(2.54, 0, "like centimetres among inches", "like inches among centimetres"),
    *_both(2.2046, 0, "like pounds among kilograms", "like kilograms among pounds"),
    *_both(12, 0, "like months among years", "like years among months"),
    *_both(38.67, 0, "like mg/dl of cholesterol among mmol/l", "like mmol/l among mg/dl"),
    *_both(18.016, 0, "like mg/dl of glucose among mmol/l", "like mmol/l among mg/dl of glucose"),
    *_both(88.42, 0, "like µmol/l of creatinine among mg/dl", "like mg/dl among µmol/l"),
    *_both(1.8, 32, "like Fahrenheit among Celsius", "like Celsius among Fahrenheit"),
)
"""factor, offset: what multiplies and is added where a value is in the other unit; in words."""


@dataclass
class _Categories:
    """A column of categories, as it is read."""

    name: str
    column: CategoryColumn
    counts: NDArray[np.int64] = field(init=False)  # one more: none of those declared
    missing: int = 0
    other_rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.column.names) + 1, np.int64)

    def add(self, codes: NDArray[np.int32], before: int) -> None:
        known = codes[codes != MISSING]
        self.missing += len(codes) - len(known)
        self.counts += np.bincount(known, minlength=len(self.counts))
        if len(self.other_rows) < SHOWN:
            others = np.flatnonzero(codes == len(self.counts) - 1) + before + 1
            self.other_rows += others[: SHOWN - len(self.other_rows)].tolist()

    @property
    def known(self) -> int:
        return int(self.counts.sum())

    @property
    def other(self) -> int:
        return int(self.counts[-1])

    def summary(self, rows: int) -> Summary:
        held = dict(zip(self.column.names, self.counts[:-1].tolist(), strict=True))
        if self.other:
            held["(none of these)"] = self.other
        distinct = int(np.count_nonzero(self.counts))
        return Summary(self.name, "category", rows, self.missing, distinct, categories=held)

    def findings(self, rows: int, label: bool) -> Iterator[Finding]:
        lost = self.missing + (self.other if label and self.column.outside != "refuse" else 0)
        yield from _missing(self.name, self.column, lost, rows, label)
        yield from self._others()
        held = [name for name, count in zip(self.column.names, self.counts, strict=False) if count]
        if len(held) == 1 and not self.other and self.known > 1:
            yield _constant(self.name, held[0], label)
            return
        unused = [name for name in self.column.names if name not in held]
        if unused and held:
            listed = ", ".join(map(repr, unused[:12])) + (", ..." if len(unused) > 12 else "")
            what = "class" if label else "category"
            yield Finding(
                "note",
                self.name,
                f"no row has the {what} {listed}: right if only other sites do; a misspelt code "
                f"otherwise",
            )
        if label:
            yield from self._balance(held)

    @property
    def refused(self) -> bool:
        """Whether it has values that the schema does not permit."""
        return self.column.outside == "refuse" and self.other > 0

    def refusal(self, first: str) -> Finding:
        """The error that it has them; `first`: what the reader says of the first."""
        count = f"{_count(self.other, 'value')} that no category has"
        return Finding("error", self.name, f"{count}, first in {first}")

    def _others(self) -> Iterator[Finding]:
        if not self.other or self.refused:
            return
        told = f"{_count(self.other, 'value')} that no category has, first in " + _in_rows(
            self.other_rows
        )
        as_what = "missing" if self.column.outside == "missing" else "one further category"
        yield Finding(
            "warning" if self.other > self.known / 100 else "note",
            self.name,
            f"{told}: they count as {as_what}; add the category if everybody may know of it",
        )

    def _balance(self, held: Sequence[str]) -> Iterator[Finding]:
        counts = self.counts[:-1]
        total = int(counts.sum())
        for name, count in zip(self.column.names, counts.tolist(), strict=True):
            if name in held and (count < 0.05 * total or count < 10):
                yield Finding(
                    "warning",
                    self.name,
                    f"class {name!r} has {_count(count, 'row')} of {total:,} "
                    f"({_percent(count / total)}): accuracy alone says little here; judge by AUC "
                    f"or by sensitivity, or join classes",
                )


@dataclass
class _Texts:
    """A column of text or of images, as it is read."""

    name: str
    type: str
    column: Column
    missing: int = 0
    blank: int = 0
    blank_rows: list[int] = field(default_factory=list)

    def add(self, values: NDArray[Any], before: int) -> None:
        if self.type == "text":
            self.missing += int(np.sum(values == ""))
            return
        pixels = values.reshape(len(values), -1)
        even = np.flatnonzero(pixels.min(axis=1) == pixels.max(axis=1)) if len(values) else values
        self.blank += len(even)
        self.blank_rows += (even + before + 1)[: SHOWN - len(self.blank_rows)].tolist()

    def summary(self, rows: int) -> Summary:
        return Summary(self.name, self.type, rows, self.missing, None)

    def findings(self, rows: int, label: bool) -> Iterator[Finding]:
        if self.blank:
            yield Finding(
                "warning",
                self.name,
                f"{_count(self.blank, 'image')} of one even colour, first in "
                f"{_in_rows(self.blank_rows)}: "
                f"look whether they were exported whole",
            )


def _started(name: str, column: Column) -> _Numbers | _Categories | _Texts:
    if isinstance(column, NumberColumn):
        return _Numbers(name, column)
    if isinstance(column, CategoryColumn):
        return _Categories(name, column)
    return _Texts(name, column.type, column)


class _Rows:
    """Whole rows, as they are read: 8 bytes each to find those that are equal, and the people."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.count = 0
        self._rows: list[NDArray[np.uint64]] = []
        self._people: list[NDArray[np.uint64]] = []
        self._nobody: list[int] = []  # rows
        self._tests: list[NDArray[np.bool_]] = []

    def add(self, frame: Frame) -> None:
        """Take a chunk in."""
        mixed = np.zeros(len(frame), np.uint64)
        for name in self._schema.columns:
            if name != self._schema.test:  # a row for tests may be a copy of one for training
                mixed = mixed * _MIX + _hashes(_values(frame, name))
                mixed ^= mixed >> np.uint64(29)
        self._rows.append(mixed)
        if self._schema.person is not None:
            whose = _hashes(frame.texts[self._schema.person])
            nobody = np.flatnonzero(frame.texts[self._schema.person] == "")
            rows = nobody + self.count + 1
            whose[nobody] = _hashes(rows.astype(np.str_))  # each as if of a person of its own
            self._people.append(whose)
            self._nobody += rows.tolist()
        if self._schema.test is not None:
            self._tests.append(frame.texts[self._schema.test] == "test")
        self.count += len(frame)

    @property
    def people(self) -> int | None:
        """How many people the rows are of; None where the schema names none."""
        if self._schema.person is None:
            return None
        if not self._people:
            return 0
        return len(np.unique(np.concatenate(self._people))) - len(self._nobody)

    def findings(self, columns: Mapping[str, Any]) -> Iterator[Finding]:
        """On equal rows, people with several, and those in training and in tests."""
        telling = any(
            isinstance(c, _Numbers) and len(c.distinct) > DISTINCT // 2 for c in columns.values()
        )
        equal, where = _repeated(np.concatenate(self._rows))
        if equal:
            yield Finding(
                "warning" if telling else "note",
                None,
                f"{_count(equal, 'row')} equal to an earlier one, first in {_in_rows(where)}: take "
                f"copies out"
                + ("" if self._people else ", or name the person column if people have several"),
            )
        if self._people:
            yield from self._of_people()
        if self._tests:
            yield from self._of_tests()

    def _of_people(self) -> Iterator[Finding]:
        if self._nobody:
            count = len(self._nobody)
            yield Finding(
                "error",
                self._schema.person,
                f"{_count(count, 'row')} of nobody, {_among(count, self._nobody[:SHOWN])}: name "
                f"the person, or take the row out",
            )
        _, counts = np.unique(np.concatenate(self._people), return_counts=True)
        several = int(np.sum(counts > 1))
        if several:
            yield Finding(
                "note",
                self._schema.person,
                f"{several:,} of {self.people:,} people have several rows (up to {counts.max()}): "
                f'protect them with unit = "person"; the unit "record" hides one row only',
            )

    def _of_tests(self) -> Iterator[Finding]:
        tests = np.concatenate(self._tests)
        if tests.all() or not tests.any():
            which, lost = ("every", "train on") if tests.all() else ("no", "judge a model by")
            yield Finding(
                "warning",
                self._schema.test,
                f'{which} row is marked "test", so nothing is left to {lost}: mark about one '
                f"person in five",
            )
            return
        whose = np.concatenate(self._people or self._rows)
        both = np.intersect1d(whose[tests], whose[~tests])
        if not len(both):
            return
        where = np.flatnonzero(np.isin(whose, both) & tests) + 1
        if self._people:
            yield Finding(
                "error",
                self._schema.person,
                f"{_count(len(both), 'person')} with rows for tests and for training, first in "
                f"{_in_rows(where[:SHOWN].tolist())}: mark all of a person's rows alike, "
                f"or the test figures flatter the model",
            )
        else:
            yield Finding(
                "warning",
                self._schema.test,
                f"{_count(len(where), 'test row')} equal to a row for training, first in "
                f"{_in_rows(where[:SHOWN].tolist())}: if they are of one person, "
                f"mark them alike",
            )


_MIX: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, of no structure: 2^64 over the golden ratio


def _hashes(values: NDArray[Any]) -> NDArray[np.uint64]:
    """8 bytes for each value, uint64[n]: equal for equal values, missing numbers among them."""
    if values.ndim > 1:
        flat = [image.tobytes().decode("latin-1") for image in values]
        return np.asarray(pd.util.hash_array(np.array(flat, object), categorize=False))
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), np.nan, values + 0.0)  # one NaN, and no -0
    if values.dtype.kind == "U":
        values = values.astype(object)
    return np.asarray(pd.util.hash_array(values, categorize=False))


def _repeated(hashes: NDArray[np.uint64]) -> tuple[int, list[int]]:
    """How many are equal to an earlier one, and the rows (from 1) of the first such."""
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(hashes), np.bool_)
    again[first] = False
    return int(again.sum()), (np.flatnonzero(again)[:SHOWN] + 1).tolist()


def _missing(name: str, column: Column, missing: int, rows: int, label: bool) -> Iterator[Finding]:
    share = missing / rows
    if missing == rows and column.optional:
        yield Finding("note", name, "no row has a value: other sites must have some to learn from")
    elif missing == rows:
        mend = (
            "nothing can be learnt here: look at the codes of the schema"
            if label
            else "leave it out at every site, or look whether the schema lists a real value as a "
            "code for missing"
        )
        yield Finding("error" if label else "warning", name, f"no row has a value: {mend}")
    elif label and missing:
        yield Finding(
            "warning",
            name,
            f"{_count(missing, 'row')} ({_percent(share)}) without a label teach nothing: fill it "
            f"in, or expect fewer rows",
        )
    elif share > 0.2:
        yield Finding(
            "warning" if share > 0.5 else "note",
            name,
            f"{_percent(share)} of the values are missing: what is filled in for them teaches "
            f"little; see whether the column is worth it",
        )


def _constant(name: str, value: str, label: bool) -> Finding:
    if label:
        return Finding(
            "warning",
            name,
            f"every label is {value}: this site alone can teach nothing; see that rows were not "
            f"selected by it",
        )
    return Finding(
        "warning",
        name,
        f"every value is {value}: the column teaches nothing here; leave it out if it is so "
        f"everywhere",
    )


def _in_rows(rows: Sequence[int]) -> str:
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows))


def _among(count: int, rows: Sequence[int]) -> str:
    return ("in " if count == len(rows) else "among them in ") + _in_rows(rows)


def _count(count: int, what: str) -> str:
    if count != 1:
        what = "people" if what == "person" else f"{what}s"
    return f"{count:,} {what}"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.995 else 3}g} %"


def _figure(value: float) -> str:
    return f"{value:.6g}"
