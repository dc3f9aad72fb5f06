"""The reference pages of the files that people write, made from the sections that read them.

A section's docstring is the text, the docstring below a field its line in the table, and its type
says what may stand there: a page cannot say other than what is read. Nothing here writes a file.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from securefl.config import Experiment, Site
from securefl.schema import Schema
from securefl.sections import Callable_, Hex32, Line, Name, Range, Section, SiteName

ABOVE: Final = "see above"
"""In the place of a meaning that the text above the table tells."""


def experiment() -> str:
    """The page on experiment files, in Markdown."""
    return _page(
        "The experiment file",
        "What a run is: data, sites, model, privacy and protocol. `securefl run FILE` reads it; "
        "`--set KEY=VALUE` lays a value over it, with a point between table and key: "
        "`--set training.learning_rate=0.5`. A key that does not exist is refused.",
        _EXPERIMENT,
        Experiment,
    )


def site() -> str:
    """The page on site.toml, in Markdown."""
    return _page(
        "The site's file",
        "What a site holds and permits: `site.toml` in the site's folder, which "
        "`securefl site init` makes. [What a site permits](../site-policy.md) explains the policy "
        "to those who sign it.",
        _SITE,
        Site,
    )


def schema() -> str:
    """The page on schemas, in Markdown."""
    return _page(
        "The schema",
        "What every site's file must hold, so that all of them mean the same. A site refuses a run "
        "on another schema than its own. [Your own data](../your-own-data.md) leads through making "
        "one.",
        _SCHEMA,
        Schema,
    )


def _page(title: str, about: str, examples: Iterable[str], root: type[Section]) -> str:
    """One page: examples, then every table of the file with all its keys."""
    blocks = [
        f"# {title}: reference",
        f"{about} `make reference` writes this page from the code that reads the file.",
        "## Examples",
        *(f"```toml\n{example.strip()}\n```" for example in examples),
        *_table(("At the top of the file", root), ()),
    ]
    return "\n\n".join(blocks) + "\n"


def _table(titled: tuple[str, type[Section]], path: tuple[str, ...]) -> Iterator[str]:
    """One table of the file under its heading, with all its keys, then those that are in it."""
    title, kind = titled
    yield f"## {title}"
    yield from _text(kind)
    hints, said = get_type_hints(kind, include_extras=True), _said(kind)
    rows, inner = [], []
    for field, info in kind.model_fields.items():
        name, hint = info.alias or field, hints[field]
        there = (*path, name, *(["NAME"] if _is_mapping(hint) else []))
        headings = dict(_headings(there, tuple(_sections(hint))))
        inner += [(item, there) for item in headings.items()]
        value = _links(hint, headings) or _words(hint)
        rows.append(f"| `{name}` | {value} | {_default(info)} | {said.get(field, ABOVE)} |")
    yield "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
    for item in inner:
        yield from _table(*item)


def _text(kind: type[Section]) -> Iterator[str]:
    """The docstrings of a section and of those that it extends, a paragraph at a time."""
    for each in _extended(kind):
        for paragraph in inspect.cleandoc(each.__doc__ or "").split("\n\n"):
            yield re.sub(r"\bdocs/([\w-]+)\.md\b", r"[\1](../\1.md)", paragraph)


def _said(kind: type[Section]) -> dict[str, str]:
    """The docstrings below the fields of a section (PEP 257), which Python itself forgets."""
    found = {}
    for each in _extended(kind):
        [body] = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)  # noqa: S101 - what getsource gives of a class
        for field, below in pairwise(body.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split()).rstrip(".")
    return found


def _extended(kind: type[Section]) -> tuple[type, ...]:
    return kind.__mro__[: kind.__mro__.index(Section)]


def _sections(hint: Any) -> Iterator[type[Section]]:
    """Every section that a value may be, or be a table of, but for schemas."""
    if isinstance(hint, type) and issubclass(hint, Section):
        if hint is not Schema:
            yield hint
        return
    for part in get_args(hint):
        yield from _sections(part)


def _headings(
    path: tuple[str, ...], kinds: tuple[type[Section], ...]
) -> Iterator[tuple[str, type[Section]]]:
    """Under what heading each of several sections is told, which one key tells apart."""
    name = f"`[{'.'.join(path)}]`"
    if len(kinds) == 1:
        yield name, kinds[0]
        return
    for kind in kinds:
        key, values = next(
            (key, told)
            for key in kind.model_fields
            for told in [_choices(kind, key)]
            if told
            and not any(set(told) & set(_choices(other, key)) for other in kinds if other != kind)
        )
        yield f"{name} with {key} = {_listed(map(json.dumps, values))}", kind


def _choices(kind: type[Section], key: str) -> tuple[str, ...]:
    hint = kind.model_fields[key].annotation if key in kind.model_fields else None
    return get_args(hint) if get_origin(hint) is Literal else ()


def _links(hint: Any, headings: Mapping[str, object]) -> str:
    """What a key holds that is a table of its own, or several by name."""
    links = _listed([f"[{heading}](#{_anchor(heading)})" for heading in headings])
    return f"tables by NAME: {links}" if links and _is_mapping(hint) else links


def _anchor(heading: str) -> str:
    """What a heading is called in the address of its page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _is_mapping(hint: Any) -> bool:
    return get_origin(_bare(hint)) is Mapping


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


_NAMED: Final = (
    (SiteName, "name of letters, digits, `.`, `_` and `-`"),
    (Name, "name of letters, digits, `.`, `_` and `-`"),
    (Callable_, '`"module:callable"`'),
    (Line, "one line of text"),
    (Hex32, "64 hexadecimal digits"),
    (Range, "lowest and highest value"),
)
"""Kinds of values that have a name of their own. (No keys: not all of them can be hashed.)"""


def _words(hint: Any) -> str:
    """What may stand as a value, in a reader's words.

    >>> _words(tuple[Annotated[int, Ge(1), Le(5000)], ...] | None)
    'list of whole numbers from 1 to 5,000'
    """
    named = [words for kind, words in _NAMED if kind == hint]
    bare = _bare(hint)
    if named:
        return named[0]
    if bare is Schema:
        return "file name, or a table as in [the schema](schema.md)"
    if get_args(bare):
        return _several(get_origin(bare), get_args(bare))
    names = {bool: "`true` or `false`", Path: "file or folder", date: "date", str: "text"}
    return names[bare] if bare in names else _number(hint)


def _several(kind: Any, parts: tuple[Any, ...]) -> str:
    """Choices, unions, lists and tables."""
    if kind is Literal:
        return _listed(f"`{json.dumps(part)}`" for part in parts)
    if kind is Mapping:
        return f"table NAME = {_words(parts[1])}"
    if kind is tuple:
        count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        return f"list of {count}{_plural(_words(parts[0]))}"
    words = [_words(part) for part in parts if part is not NoneType]
    # Choices come as one list with what stands beside them.
    return _listed(one for told in words for one in re.split(r", (?=`)| or (?=`)", told))


def _listed(items: Iterable[str]) -> str:
    """
    >>> _listed(["a", "b", "c"])
    'a, b or c'
    """
    *others, last = [*items] or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _plural(words: str) -> str:
    if words.startswith("`"):
        return words
    return re.sub(r"\b(number|text|name|line|list)\b", r"\1s", words, count=1)


def _number(hint: Any) -> str:
    """A number within its bounds, such as "number above 0, below 1"."""
    limits: list[Any] = []
    for item in hint.__metadata__ if get_origin(hint) is Annotated else ():
        limits += item.metadata if isinstance(item, FieldInfo) else [item]
    told, closed = [], any(isinstance(limit, Ge) for limit in limits)
    for limit in limits:
        match limit:
            case Ge(least):
                told.append(f"from {_figure(least)}")
            case Gt(least):
                told.append(f"above {_figure(least)}")
            case Le(most) if closed:
                told[-1] += f" to {_figure(most)}"
            case Le(most):
                told.append(f"at most {_figure(most)}")
            case Lt(most):
                told.append(f"below {_figure(most)}")
            case MultipleOf(step):
                told.append(f"a multiple of {_figure(step)}")
    return f"{'whole ' * (_bare(hint) is int)}number {', '.join(told)}".strip()


def _figure(value: Any) -> str:
    """
    >>> _figure(4096), _figure(2**32), _figure(1e6), _figure(1e-12)
    ('4,096', '2^32', '1,000,000', '1e-12')
    """
    if value != int(value):
        return f"{value:g}"
    whole = int(value)
    if whole >= 2**32 and whole.bit_count() == 1:
        return f"2^{whole.bit_length() - 1}"
    return f"{whole:,}"


def _default(info: FieldInfo) -> str:
    """What counts where a key is left out."""
    if info.is_required():
        return "required"
    value = info.default
    if isinstance(value, Section):
        said = value.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        told = ", ".join(f"{key} = {json.dumps(item)}" for key, item in said.items())
        return f"`{{{told}}}`" if said else "its keys' own"
    if value is None or value in ((), {}):
        return "(none)"
    return f"`{json.dumps(value)}`"


_EXPERIMENT: Final = (
    """
# clinics.toml: three clinics learn who has heart disease. No row leaves its clinic.
version = 1
name = "clinics"
rounds = 60

[data]
source = "table"
schema = "clinics.schema.toml"     # what every file holds; the example of the schema's page
path = "clinics/*.csv"             # a file a site; leave it out where sites bring their own

[sites]
partition = "file"                 # clinics/north.csv is the site "north"

[preprocessing]
scale = "range"                    # needs no statistic; "standardise" does
impute = "middle"                  # so does this
minimum_count = 0                  # merge no rare categories: then no statistic is needed at all

[evaluation]
every = 20                         # test figures after 20, 40 and 60 updates

[model]
name = "logistic"

[training]
learning_rate = 1.0

[aggregation]
average_from = 20                  # give out the mean of the weights since round 20

[privacy]                          # without this section nothing is promised of any record
unit = "person"                    # all rows of one person; the schema names the column
noise = "distributed"              # only the sum over the sites has enough noise
epsilon = 3.0                      # for the whole run
delta = 1e-4                       # well below one over the number of people
rate = 0.5                         # share of the people that a step samples
expected_batch = 300               # about rate times the people of all sites, from public knowledge

[protocol]
name = "masked-bfv"
colluding_sites = 1
minimum_cohort = 3
""",
)

_SITE: Final = (
    """
# site.toml of the site "north". Everything that is not said has the safe default.
version = 1
name = "north"

[data]
id = "cardiology-2026"             # what the ledger calls these records, for good
purpose = "Predict heart disease from a first visit"
person = "patient"                 # whose a row is
path = "records.csv"               # relative to this file; never sent to anybody
schema = "clinics.schema.toml"     # this site's own copy

[budget]                           # for all runs together
unit = "person"
epsilon = 6.0
delta = 1e-3

[policy]
maximum_epsilon = 3.0              # of one run
minimum_cohort = 3

[consortium]                       # public keys, from the sites' people and not from the server
south = "5f1e0c0e6d6d4c2f9f5a3b8a6f0b7c1d2e3f405162738495a6b7c8d9eafb0c1d"
""",
)

_SCHEMA: Final = (
    """
# clinics.schema.toml: a table whose first row names the columns, in any order.
version = 1
name = "clinics"
label = "disease"                  # what a model learns
person = "patient"                 # whose a row is
test = "split"                     # rows marked "test" are never trained on
missing = ["NA", "?"]              # in every column, and the empty cell

[columns.patient]
type = "text"

[columns.split]
type = "text"
optional = true                    # a file without it has no test rows

[columns.age]
type = "number"
unit = "years"
range = [18, 100]                  # what is publicly plausible, not what a file happens to hold

[columns.cholesterol]
type = "number"
unit = "mg/dl"
range = [50, 600]
outside = "missing"                # such a value was not measured: count it as missing
missing = ["0"]                    # in this column only

[columns.smoker]
type = "category"
categories = ["no", "former", "yes"]
outside = "missing"

[columns.pain]
type = "category"
description = "chest pain at the first visit; descriptions are not part of what is agreed on"

[columns.pain.categories]          # readable names for the codes of the files
typical = ["1"]
atypical = ["2", "3"]              # two codes may mean one category
none = ["4"]

[columns.disease]
type = "category"
categories = ["no", "yes"]         # with two classes the last is the one that figures are about
""",
    """
# readings.schema.toml: no header, so the order of the columns counts. Fractions with a comma.
version = 1
name = "readings"
label = "pressure"                 # a number: regression
header = false
decimal = ","

[columns.age]
type = "number"
unit = "years"
range = [18, 100]

[columns.weight]
type = "number"
unit = "kg"
range = [30, 250]
outside = "clip"                   # a value beyond counts as the nearest end

[columns.pressure]
type = "number"
unit = "mmHg"
range = [60, 260]
""",
    """
# images.schema.toml: a folder of images by class, such as scans/pneumonia/0001.png.
version = 1
name = "chest-scans"
label = "finding"

[columns.image]
type = "image"
height = 64                        # pixels; an image of another size is refused
width = 64
channels = 1                       # grey

[columns.finding]
type = "category"
categories = ["normal", "pneumonia"]
""",
)
