"""A site's records as its schema reads them: typed columns, before any preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from securefl.schema import Schema, Task
from securefl.sections import ConfigurationError

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
    numbers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    codes: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    texts: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    images: NDArray[np.uint8] | None = None

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
