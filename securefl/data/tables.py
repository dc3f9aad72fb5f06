"""A table of records as arrays, and the checks between a data frame and one.

Rows in messages are counted from 1, below the header.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from securefl.config import ConfigurationError, Data

Task = Literal["classification", "regression"]

MOST_GUESSED_CLASSES = 20
"""A label with more distinct values than this is not guessed to be one of classes."""


@dataclass(frozen=True, eq=False)
class Table:
    """Records that one party holds: n rows, each with features and a target.

    features: float32 [n, *shape], finite; scaled onto [-1, 1] where ranges are declared.
    target: int64 [n], the class number; or float32 [n], scaled onto [-1, 1] by `target_range`
        where that is declared.
    names: one a feature, in row-major order of `shape`.
    classes: the name of each class number; empty for regression.
    groups: columns of text [n] that are no features but can tell sites apart.

    Raises ConfigurationError on construction when the arrays do not fit together.
    """

    features: NDArray[np.float32] = field(repr=False)
    target: NDArray[np.int64] | NDArray[np.float32] = field(repr=False)
    names: tuple[str, ...]
    task: Task
    classes: tuple[str, ...] = ()
    groups: Mapping[str, NDArray[np.str_]] = field(default_factory=dict, repr=False)
    target_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise ConfigurationError(f"table of records: {fault}")

    def __len__(self) -> int:
        return len(self.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one record's features."""
        return self.features.shape[1:]

    @property
    def outputs(self) -> int:
        """How many numbers a model has to give for one record."""
        return len(self.classes) or 1

    def take(self, rows: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Table:
        """The records at `rows` (row numbers from 0, or one truth value a row), in that order."""
        chosen = np.asarray(rows)
        if chosen.dtype != np.bool_:
            chosen = chosen.astype(np.int64)
        return replace(
            self,
            features=self.features[chosen],
            target=self.target[chosen],
            groups={name: column[chosen] for name, column in self.groups.items()},
        )

    def _fault(self) -> str | None:
        """What does not fit together, or None."""
        features, target, rows = self.features, self.target, len(self.target)
        kind = np.int64 if self.task == "classification" else np.float32
        faults = (
            (features.dtype != np.float32, f"features are {features.dtype}: make them float32"),
            (
                features.ndim < 2 or math.prod(features.shape[1:]) == 0,
                f"features have shape {features.shape}: give [records, ...], one feature or more",
            ),
            (
                target.shape != features.shape[:1],
                f"target has shape {target.shape}, features {features.shape}: one target a record",
            ),
            (
                target.dtype != kind,
                f"target is {target.dtype}: make it {kind.__name__} for {self.task}",
            ),
            (
                len(self.names) != math.prod(features.shape[1:]),
                f"{len(self.names)} names for {math.prod(features.shape[1:])} features",
            ),
            (len(set(self.names)) != len(self.names), "a feature name comes twice"),
            # Both pass NaN on, and take no memory.
            (
                not (np.isfinite(features.min(initial=0)) and np.isfinite(features.max(initial=0))),
                "features hold NaN or infinity",
            ),
            (not np.isfinite(target).all(), "target holds NaN or infinity"),
            (
                any(len(column) != rows for column in self.groups.values()),
                f"a group column has not the {rows} rows of the target",
            ),
        )
        for wrong, message in faults:
            if wrong:
                return message
        if self.task == "regression":
            return "regression has no classes" if self.classes else None
        if self.target_range is not None:
            return "target_range is for regression"
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            return f"classes are {self.classes}: give two or more, each once"
        if rows and not 0 <= target.min() <= target.max() < len(self.classes):
            return f"target names a class outside 0 to {len(self.classes) - 1}"
        return None


def scale(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """`values` mapped linearly from [low, high] onto [-1, 1].

    >>> scale(np.array([0.0, 5.0, 20.0]), 0, 20).tolist()
    [-1.0, -0.5, 1.0]
    """
    return (values - low) / (high - low) * 2 - 1


def from_frames(
    frames: Mapping[str, pd.DataFrame],
    label: str,
    data: Data,
    *,
    groups: Sequence[str] = (),
    shape: tuple[int, ...] | None = None,
) -> Table:
    """The records of `frames` (where they come from -> rows), one below the other.

    Every column is a feature but `label`, `groups`, `data.drop`, `data.person` and
    `data.test_column`; all but the label become the table's groups. `shape` folds the features of
    one record. Checks every value and raises ConfigurationError naming the place, the column, the
    row and the value.
    """
    first = next(iter(frames))
    columns = [str(name) for name in frames[first].columns]
    for origin, frame in frames.items():
        _check_columns(origin, [str(name) for name in frame.columns], columns, first)
        if len(frame) == 0:
            raise ConfigurationError(f"{origin} has a header but no records: add rows")
    if label not in columns:
        raise ConfigurationError(
            f"{first} has no column {label!r} (data.label){near(label, columns)}"
        )
    aside = _aside(first, columns, label, groups, data)
    if data.person in columns:
        # Rows of unknown people would be taken for one person, who is none of them.
        for origin, frame in frames.items():
            unknown = np.flatnonzero(_text(frame[data.person]) == "")
            if unknown.size:
                raise _missing(origin, data.person, int(unknown[0]))
    names = tuple(name for name in columns if name != label and name not in aside)
    if not names:
        raise ConfigurationError(f"{first} has no feature left: drop fewer columns in data.drop")
    ranges = _ranges(names, columns, data)

    target, task, classes = _target(frames, label, data)
    features = [
        np.stack([_feature(origin, frame, name, ranges.get(name)) for name in names], axis=1)
        for origin, frame in frames.items()
    ]
    stacked = np.concatenate(features)
    return Table(
        features=stacked.reshape(len(stacked), *(shape or (len(names),))),
        target=target,
        names=names,
        task=task,
        classes=classes,
        groups={
            name: np.concatenate([_text(frame[name]) for frame in frames.values()])
            for name in aside
        },
        target_range=data.target_range,
    )


def _aside(
    first: str, columns: Sequence[str], label: str, groups: Sequence[str], data: Data
) -> list[str]:
    """The columns that are neither features nor the label; ConfigurationError when one is not."""
    named = [("drop", name) for name in data.drop]
    named += [
        (key, name)
        for key, name in (("person", data.person), ("test_column", data.test_column))
        if name is not None
    ]
    for key, name in named:
        known = columns if key == "drop" else (*columns, *groups)
        if name not in known:
            raise ConfigurationError(
                f"{first} has no column {name!r} (data.{key}){near(name, columns)}"
            )
        if name == label:
            raise ConfigurationError(
                f"data.drop lists the label {label!r}: keep it"
                if key == "drop"
                else f"data.{key} names the label {label!r}: name another column"
            )
    return list(dict.fromkeys([*groups, *(name for _, name in named)]))


def near(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown `name`, as the end of a message."""
    known = sorted(known)
    if len(known) == 1 and ";" in known[0]:
        return f"; it has one column, {known[0]!r}: separate the columns with commas"
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {lower[close[0]]!r}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; there are {shown}" if known else "; there are none"


def _check_columns(origin: str, columns: list[str], expected: list[str], first: str) -> None:
    for number, name in enumerate(columns, start=1):
        if not name.strip():
            raise ConfigurationError(f"{origin}: column {number} has no name: give it one")
        if columns.index(name) != number - 1:
            raise ConfigurationError(f"{origin}: column {name!r} comes twice: rename one")
    for name in expected:
        if name not in columns:
            raise ConfigurationError(f"{origin} has no column {name!r}, but {first} has: add it")
    for name in columns:
        if name not in expected:
            raise ConfigurationError(f"{first} has no column {name!r}, but {origin} has: add it")


def _ranges(
    names: Sequence[str], columns: Sequence[str], data: Data
) -> Mapping[str, tuple[float, float]]:
    """The declared range of every feature, or of none."""
    for name in data.ranges:
        if name not in columns:
            raise ConfigurationError(f"data.ranges names no column: {name!r}{near(name, names)}")
    if not data.ranges and data.default_range is None:
        return {}
    bare = [name for name in names if name not in data.ranges]
    if bare and data.default_range is None:
        raise ConfigurationError(
            f"no range declared for {', '.join(map(repr, bare))}: add each to [data.ranges], "
            "or set data.default_range = [lowest, highest]"
        )
    return {name: data.ranges.get(name) or data.default_range or (-1.0, 1.0) for name in names}


def _feature(
    origin: str, frame: pd.DataFrame, name: str, declared: tuple[float, float] | None
) -> NDArray[np.float32]:
    values = _numbers(origin, frame[name], name)
    if declared is None:
        return values.astype(np.float32)
    return scale(np.clip(values, *declared), *declared).astype(np.float32)


def _target(
    frames: Mapping[str, pd.DataFrame], label: str, data: Data
) -> tuple[NDArray[np.int64] | NDArray[np.float32], Task, tuple[str, ...]]:
    """The target of all records, the task, and the class names (empty for regression)."""
    texts = {origin: _text(frame[label]) for origin, frame in frames.items()}
    for origin, text in texts.items():
        missing = np.flatnonzero(text == "")
        if missing.size:
            raise _missing(origin, label, int(missing[0]))
    values = np.concatenate(list(texts.values()))
    task = data.task or _guess_task(values, label, data)

    if task == "regression":
        if data.classes is not None:
            raise ConfigurationError("data.classes is for classification: drop it, or set the task")
        numbers = np.concatenate(
            [_numbers(origin, frame[label], label, mend="") for origin, frame in frames.items()]
        )
        if data.target_range is not None:
            # Not clamped: that would quietly flatter the test figures of far-off records.
            numbers = scale(numbers, *data.target_range)
        return numbers.astype(np.float32), task, ()

    if data.target_range is not None:
        raise ConfigurationError("data.target_range is for regression: drop it, or set the task")
    seen = np.unique(values)
    classes = data.classes or tuple(str(name) for name in sorted(seen, key=_class_order))
    if len(set(classes)) != len(classes) or len(classes) < 2:
        only = classes[0]
        raise ConfigurationError(
            f"label {label!r} has one class only, {only!r}: a classifier needs records of two"
        )
    number = {name: index for index, name in enumerate(classes)}
    for origin, text in texts.items():
        for row, name in enumerate(text):
            if name not in number:
                raise ConfigurationError(
                    f"{origin}: column {label!r}, row {row + 1}: {str(name)!r} is not in "
                    f"data.classes ({', '.join(classes)}): correct the row or add the class"
                )
    if len(seen) < 2:
        raise ConfigurationError(
            f"label {label!r} has one class only, {str(seen[0])!r}: a classifier needs records "
            "of two"
        )
    return np.array([number[name] for name in values], dtype=np.int64), task, tuple(classes)


def _guess_task(values: NDArray[np.str_], label: str, data: Data) -> Task:
    """Text or a few whole numbers are classes; numbers with fractions are measured."""
    if data.classes is not None:
        return "classification"
    if data.target_range is not None:
        return "regression"
    numbers = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(np.float64)
    if np.isfinite(numbers).all() and (numbers != np.floor(numbers)).any():
        return "regression"
    distinct = len(np.unique(values))
    if distinct > MOST_GUESSED_CLASSES:
        raise ConfigurationError(
            f"label {label!r} has {distinct} distinct values: say data.task = "
            '"classification" or "regression"'
        )
    return "classification"


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers by value, then text by letter."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _numbers(
    origin: str, column: pd.Series, name: str, mend: str = ", or drop the column (data.drop)"
) -> NDArray[np.float64]:
    """The column as finite float64, or an error that names the first value that is none.

    `mend` is the last way out that a message offers.
    """
    numeric = pd.api.types.is_numeric_dtype(column.dtype)  # truth values included
    loose = column if numeric else column.astype(object)
    if not numeric and pd.api.types.infer_dtype(column, skipna=True).startswith(
        ("date", "time", "period", "interval")
    ):
        loose = column.astype(str)  # a moment in time is no number, whatever its encoding
    values: NDArray[np.float64] = pd.to_numeric(loose, errors="coerce").to_numpy(
        np.float64, na_value=np.nan
    )
    bad = np.flatnonzero(~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max))
    if not bad.size:
        return values
    row = int(bad[0])
    raw = column.iloc[row]
    if np.isnan(values[row]):
        if _is_missing(raw) or str(raw).strip().lower() in ("", "nan"):
            raise _missing(origin, name, row, mend)
        raise ConfigurationError(
            f"{origin}: column {name!r}, row {row + 1}: {str(raw)[:60]!r} is not a number: "
            f"correct it, encode the column as numbers{mend}"
        )
    raise ConfigurationError(
        f"{origin}: column {name!r}, row {row + 1}: {raw} is beyond what a float32 holds: "
        "correct it or leave the row out"
    )


def _is_missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _missing(origin: str, name: str, row: int, mend: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"{origin}: column {name!r}, row {row + 1}: no value: fill it in, leave the row out{mend}"
    )


def _text(column: pd.Series) -> NDArray[np.str_]:
    """The column as text, "" where a value is missing; whole numbers without a point."""
    words = ["" if _is_missing(value) else str(value).strip() for value in column]
    if not pd.api.types.is_bool_dtype(column.dtype) and pd.api.types.is_numeric_dtype(column.dtype):
        words = [word.removesuffix(".0") for word in words]
    return np.array(words, dtype=np.str_)
