"""What the sites' files hold, as one value that all of them agree on before anything is trained.

A schema names every column with its type, unit, permitted range or categories, says which one is
the label and which one says whose a row is, and which codes stand for a missing value. It is public
and holds no figure of anybody's records.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import Field, field_validator, model_validator

from securefl.sections import Flag, Line, Name, Range, Section, parse_tree, read_text, validated

Code = Annotated[str, Field(max_length=200)]
"""A value as it stands in a file, without the blanks around it; printable, for it is shown."""

Task = Literal["classification", "regression"]


class _Column(Section):
    """What every column may say. `optional`: a site's file may lack it, and all its values then."""

    missing: tuple[Code, ...] = ()
    """Codes that mean "no value" in this column, besides those of all columns."""
    optional: Flag = False
    description: Line | None = None
    """For readers; not part of what is agreed on."""

    @field_validator("missing")
    @classmethod
    def _shown(cls, missing: tuple[Code, ...]) -> tuple[Code, ...]:
        return _printable(missing)


class NumberColumn(_Column):
    """A measured number within `range`, which is public knowledge and never fitted.

    `outside`: what becomes of a value beyond it: the file is refused, the value counts as missing,
    or as the nearest end.
    """

    type: Literal["number"]
    """What the column holds."""
    range: Range
    unit: Line | None = None
    """Of the values, for readers; agreed on."""
    outside: Literal["refuse", "missing", "clip"] = "refuse"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.range
        if not low < high:
            raise ValueError(f"range is [{low}, {high}]: put the lower bound first")
        return self


class CategoryColumn(_Column):
    """One of a few declared `categories`: a list of codes, or a table NAME = [CODE, ...].

    `outside`: what becomes of another value: the file is refused, the value counts as missing, or
    as one that is none of them.
    """

    type: Literal["category"]
    """What the column holds."""
    categories: tuple[Code, ...] | Mapping[Line, tuple[Code, ...]]
    outside: Literal["refuse", "missing", "other"] = "refuse"

    @property
    def names(self) -> tuple[str, ...]:
        """The categories' names, in order."""
        return tuple(self.categories)

    @property
    def codes(self) -> Mapping[str, int]:
        """The number of the category that each code stands for."""
        if isinstance(self.categories, tuple):
            return {code: number for number, code in enumerate(self.categories)}
        return {
            code: number for number, codes in enumerate(self.categories.values()) for code in codes
        }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.categories or "" in self.names:
            raise ValueError("categories is empty, or names an empty one: list every category")
        codes = [canonical(code) for code in _printable(tuple(self.codes))]
        listed = (
            len(self.categories)
            if isinstance(self.categories, tuple)
            else sum(map(len, self.categories.values()))
        )
        if len(set(codes)) != listed:
            raise ValueError("categories has a code twice (1 and 1.0 are one): keep one of them")
        if not isinstance(self.categories, tuple) and not all(self.categories.values()):
            raise ValueError("categories has a name without a code: list its codes")
        return self


class TextColumn(_Column):
    """Text that is no feature: whose a row is, which rows are for tests, which site holds it."""

    type: Literal["text"]
    """What the column holds."""


class ImageColumn(_Column):
    """A file in a common image format, by its path relative to the table or folder.

    `channels`: 1 for grey, 3 for colour. An image of another size is refused.
    """

    type: Literal["image"]
    """What the column holds."""
    height: Annotated[int, Field(strict=True, ge=1, le=4096)]
    """In pixels."""
    width: Annotated[int, Field(strict=True, ge=1, le=4096)]
    """In pixels."""
    channels: Literal[1, 3] = 1


Column = Annotated[
    NumberColumn | CategoryColumn | TextColumn | ImageColumn, Field(discriminator="type")
]


class Schema(Section):
    """The columns of every site's file, in order (which counts where `header` is false).

    `label` is what a model learns. `person` says whose a row is; `test` marks with "test" the rows
    that no training reads. `missing` lists the codes that mean "no value" in any column, besides
    the empty one; `decimal` is the sign in front of a fraction. Columns of a file that are not
    listed are never read.
    """

    version: Literal[1]
    """Of this form of file."""
    name: Name
    """What people call it."""
    label: str
    person: str | None = None
    test: str | None = None
    header: Flag = True
    decimal: Literal[".", ","] = "."
    missing: tuple[Code, ...] = ()
    columns: Annotated[Mapping[Line, Column], Field(min_length=1, max_length=100_000)]
    """Every column that is read."""

    @field_validator("columns")
    @classmethod
    def _named_plainly(cls, columns: Mapping[str, Column]) -> Mapping[str, Column]:
        for name in columns:
            if name != name.strip():
                raise ValueError(f"column {name!r} has blanks around its name: take them off")
        return columns

    @field_validator("missing")
    @classmethod
    def _shown(cls, missing: tuple[Code, ...]) -> tuple[Code, ...]:
        return _printable(missing)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, named in (("label", self.label), ("person", self.person), ("test", self.test)):
            if named is not None and named not in self.columns:
                raise ValueError(f'{key} = "{named}" is not in [columns]: add it there')
        if isinstance(self.columns[self.label], TextColumn | ImageColumn):
            raise ValueError(f'label = "{self.label}" is no number and no category: choose another')
        if isinstance(self.columns[self.label], CategoryColumn) and len(self.classes) < 2:
            raise ValueError(f'label = "{self.label}" has one category: a classifier needs two')
        if self.columns[self.label].optional:
            raise ValueError(f'label = "{self.label}" is optional: nobody can learn without it')
        for key, named in (("person", self.person), ("test", self.test)):
            if named is not None and not isinstance(self.columns[named], TextColumn):
                raise ValueError(f'{key} = "{named}" must be of type = "text"')
        images = [n for n, column in self.columns.items() if isinstance(column, ImageColumn)]
        if len(images) > 1:
            raise ValueError(f"{images[0]!r} and {images[1]!r} are images: a record has one")
        return self

    @property
    def task(self) -> Task:
        """What a model of the label does."""
        return "classification" if self.classes else "regression"

    @property
    def classes(self) -> tuple[str, ...]:
        """The label's categories; empty for regression."""
        column = self.columns[self.label]
        return column.names if isinstance(column, CategoryColumn) else ()

    @property
    def target_range(self) -> tuple[float, float] | None:
        """The label's range; None for classification."""
        column = self.columns[self.label]
        return column.range if isinstance(column, NumberColumn) else None

    @property
    def image(self) -> str | None:
        """The column of images, if there is one."""
        found = (n for n, column in self.columns.items() if isinstance(column, ImageColumn))
        return next(found, None)

    def missing_codes(self, column: str) -> frozenset[str]:
        """All codes that mean "no value" in `column`, the empty one among them."""
        return frozenset({"", *self.missing, *self.columns[column].missing})

    def dump(self) -> str:
        """This schema as TOML; `parse(dump())` gives an equal value."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self) -> bytes:
        """SHA-256 of what sites agree on (32 bytes): everything but descriptions."""
        said = {"columns": {"__all__": {"description"}}}
        return hashlib.sha256(
            b"securefl schema 1\0" + self.model_dump_json(exclude=said).encode()
        ).digest()


def canonical(code: str) -> str:
    """A code as it is compared: without blanks around it, and 1.0 as 1.

    >>> canonical(" 3.0 "), canonical("A11")
    ('3', 'A11')
    """
    code = code.strip()
    whole, point, zeros = code.partition(".")
    if point and not zeros.strip("0") and whole.lstrip("+-").isdecimal():
        return whole
    return code


def parse(text: str, origin: str = "schema") -> Schema:
    """The schema written in `text`; ConfigurationError naming `origin`, key, value and mend."""
    return validated(Schema, parse_tree(text, origin), origin)


def load(path: Path | str) -> Schema:
    """The schema in the TOML file `path`; ConfigurationError as `parse`."""
    return parse(read_text(path), str(path))


def differences(ours: Schema, theirs: Schema) -> Iterator[tuple[str, str, str]]:
    """Every (key, ours, theirs) in which two schemas differ but for descriptions, in words."""
    for key in ("label", "person", "test", "header", "decimal", "missing"):
        mine, other = getattr(ours, key), getattr(theirs, key)
        if mine != other:
            yield key, _told(mine), _told(other)
    for name in dict.fromkeys([*ours.columns, *theirs.columns]):
        if name not in theirs.columns or name not in ours.columns:
            here = "no such column"
            mine_, other_ = (
                _column(s.columns[name]) if name in s.columns else here for s in (ours, theirs)
            )
            yield f"columns.{name}", mine_, other_
            continue
        held, asked = ours.columns[name], theirs.columns[name]
        if _agreed(held) != _agreed(asked):
            yield f"columns.{name}", _column(held), _column(asked)
    if not ours.header and list(ours.columns) != list(theirs.columns):
        yield "columns", "in the order " + ", ".join(ours.columns), ", ".join(theirs.columns)


def steers_nothing(text: str) -> bool:
    """Whether `text` has no control character, no break of a line, and none that turns writing."""
    return re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*", text) is not None


def _printable(codes: tuple[Code, ...]) -> tuple[Code, ...]:
    """`codes`, none of which steers a terminal or breaks a line; ValueError else."""
    for code in codes:
        if not steers_nothing(code):
            raise ValueError(f"{code!r} holds a sign that cannot be printed: leave it out")
    return codes


def _agreed(column: Column) -> str:
    """What is agreed on of a column, in order; what people read may stand for two."""
    return column.model_dump_json(exclude={"description"})


def _column(column: Column) -> str:
    said = column.model_dump(mode="json", exclude={"description"}, exclude_defaults=True)
    return ", ".join(f"{key} {_told(value)}" for key, value in said.items())


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{_told(key)}: {_told(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_told, value)) + "]"
    if isinstance(value, str) and not set(value).isdisjoint(",;:[]"):
        return repr(value)  # or one code would read as two
    return "none" if value is None else str(value)
