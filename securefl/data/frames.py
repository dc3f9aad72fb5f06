"""A site's records as its schema reads them: typed columns, before any preprocessing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from securefl.schema import Schema, Task
from securefl.sections import ConfigurationError

_CHUNK: Final = 1 << 14

MISSING: Final = -1
"""The code of a category that is not known."""


@final
@dataclass(frozen=True, eq=False)
class Frame:
    """n rows of one site's file, by column.

    numbers: float64[n], NaN where missing, every other value within the column's range.
    codes: int32[n], the number of the category, MISSING, or len(categories) for one that is none
        of those declared (outside = "other").
    texts: str[n], "" where missing.
    images: uint8[n, channels, height, width], or None where the schema has no image column.

    Every column of the schema is in one of them; one that the file lacks is all missing.
    """

    schema: Schema
    rows: int
    numbers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    codes: Mapping[str, NDArray[np.int32]] = field(default_factory=dict, repr=False)
    texts: Mapping[str, NDArray[np.str_]] = field(default_factory=dict, repr=False)
    images: NDArray[np.uint8] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        columns: dict[str, NDArray[Any]] = {**self.numbers, **self.codes, **self.texts}
        for name, column in columns.items():
            if column.shape != (self.rows,):
                raise ConfigurationError(
                    f"column {name!r} has shape {column.shape}: give one value for each of the "
                    f"{self.rows} rows"
                )
        if self.images is not None and len(self.images) != self.rows:
            raise ConfigurationError(f"{len(self.images)} images for {self.rows} rows")

    def __len__(self) -> int:
        return self.rows

    @classmethod
    def concatenate(cls, parts: Sequence[Frame]) -> Frame:
        """The rows of `parts`, one below the other; of one schema, one part or more."""
        first = parts[0]
        if len(parts) == 1:
            return first
        images = [part.images for part in parts if part.images is not None]
        return cls(
            first.schema,
            sum(map(len, parts)),
            {
                name: np.concatenate([part.numbers[name] for part in parts])
                for name in first.numbers
            },
            {name: np.concatenate([part.codes[name] for part in parts]) for name in first.codes},
            {name: np.concatenate([part.texts[name] for part in parts]) for name in first.texts},
            np.concatenate(images) if images else None,
        )

    def take(self, rows: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """The rows at `rows` (numbers from 0, or one truth value a row), in that order."""
        chosen = np.asarray(rows)
        if chosen.dtype != np.bool_:
            chosen = chosen.astype(np.int64)
        count = int(chosen.sum()) if chosen.dtype == np.bool_ else len(chosen)
        return type(self)(
            self.schema,
            count,
            {name: column[chosen] for name, column in self.numbers.items()},
            {name: column[chosen] for name, column in self.codes.items()},
            {name: column[chosen] for name, column in self.texts.items()},
            None if self.images is None else self.images[chosen],
        )

    @property
    def task(self) -> Task:
        """What a model of the label does."""
        return self.schema.task

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class number; empty for regression."""
        return self.schema.classes

    @property
    def target(self) -> NDArray[np.int32] | NDArray[np.float64]:
        """The label of every row, [n]; see `labelled`."""
        label = self.schema.label
        return self.codes[label] if label in self.codes else self.numbers[label]

    @property
    def groups(self) -> Mapping[str, NDArray[np.str_]]:
        """The columns of text, which can tell sites apart."""
        return self.texts

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which rows have a label, bool[n]: the others teach nothing."""
        if self.task == "regression":
            return np.asarray(~np.isnan(self.target), np.bool_)
        known = self.target
        return np.asarray((known >= 0) & (known < len(self.classes)), np.bool_)

    def share(self, person: str | None) -> NDArray[np.float64] | None:
        """Of every row, one over the rows of its person, float64[n]; None where rows count alone.

        person: the column that says whose a row is.
        """
        return None if person is None else shares(self.texts[person])

    def identities(self, person: str | None) -> Iterator[bytes]:
        """What tells one row from another by what it holds, or whose it is where `person` says."""
        if person is not None:
            for name in self.texts[person].tolist():
                yield name.encode()
            return
        for start in range(0, self.rows, _CHUNK):
            part = slice(start, min(start + _CHUNK, self.rows))
            columns = [column[part].view(np.int64) for column in self.numbers.values()]
            columns += [column[part].astype(np.int64) for column in self.codes.values()]
            rows = np.stack(columns, axis=1) if columns else np.zeros((part.stop - start, 0))
            for at, row in enumerate(np.ascontiguousarray(rows, np.int64), start):
                yield row.tobytes() + (
                    self.images[at].tobytes() if self.images is not None else b""
                )


def shares(people: NDArray[np.str_]) -> NDArray[np.float64]:
    """Of every row, one over the rows of its person, float64[n].

    >>> shares(np.array(["a", "b", "a"])).tolist()
    [0.5, 1.0, 0.5]
    """
    _, whose, rows = np.unique(people, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / rows[whose], np.float64)
