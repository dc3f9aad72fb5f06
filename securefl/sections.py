"""What every file that a person writes has in common: frozen tables, read and checked key by key.

A key that does not exist is refused with the nearest one that does; every error is one line that
names the file, the key, the value and the mend.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Tag

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Clip = Annotated[float, Field(ge=1e-6, le=1e6)]
Unit = Annotated[float, Field(gt=0, le=1)]
Quantile = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]
Rounds = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Bound = Annotated[float, Field(ge=-1e30, le=1e30)]
Range = Annotated[tuple[Bound, Bound], Field(description="lowest and highest value, lowest first")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Callable_ = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


def _one_line(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= 1000:
        raise ValueError("write one line of 1 to 1000 printable characters")
    return text


def _hexadecimal(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text!r} is not 64 hexadecimal digits in lower case")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Hex32 = Annotated[str, AfterValidator(_hexadecimal)]
Flag = Annotated[bool, Field(strict=True)]
Budgeted = Annotated[float, Field(gt=0, le=1e6)]
Delta = Annotated[float, Field(ge=1e-12, lt=1)]
Protected = Literal["record", "person", "site"]


class ConfigurationError(ValueError):
    """What a user wrote cannot be run: names the key, the value and the mend, in one line."""


class Section(BaseModel):
    """A frozen table of a configuration file; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


Kind = TypeVar("Kind", bound=Section)

_QUOTED = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)|"(?:[^"\\\n]|\\.)*+"?'
    r"|'''.*?(?:'''|\Z)|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
_DEEP = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){32}")


def read_text(path: Path | str) -> str:
    """The text of the file `path`, UTF-8; ConfigurationError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def parse_tree(text: str, origin: str) -> dict[str, Any]:
    """The TOML in `text`; ConfigurationError, naming `origin`, when it is none.

    A key of n parts takes tomllib memory in the square of n: a proposal must not have long ones.
    """
    if _DEEP.search(_QUOTED.sub("_", text)):
        raise ConfigurationError(f"{origin} has a key of more than 32 parts: no key here has")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, or deep brackets
        raise ConfigurationError(f"{origin} is not valid TOML: {error}") from None


def validated(kind: type[Kind], tree: dict[str, Any], origin: str) -> Kind:
    """The `kind` that `tree` describes; ConfigurationError naming the most telling fault."""
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigurationError(f"{origin}: {_first_fault(error, kind)}") from None


def _first_fault(error: pydantic.ValidationError, kind: type[Section]) -> str:
    """The most telling fault of a validation error, as one line."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path, known = _read_as(kind, [str(step) for step in fault["loc"]])
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        if near:
            return f"no key {key!r}; did you mean {'.'.join([*path[:-1], near[0]])!r}?"
        return f"no key {key!r}; the keys here are {', '.join(sorted(known))}"
    message = re.sub(r"^Value error, ", "", fault["msg"])
    told = {
        "missing": f"{key} is missing: say what it is",
        "union_tag_not_found": f"{key}.type is missing: say what it is",
        "value_error": f"{key}: {message}" if key else message,
    }
    if fault["type"] == "union_tag_invalid":
        return f"{key}.type = {fault['ctx']['tag']!r}: choose {fault['ctx']['expected_tags']}"
    if fault["type"] in told:
        return told[fault["type"]]
    choices = [f["ctx"]["expected"] for f in faults if f["type"] == "literal_error"]
    where = ".".join(p for p in path if not p.startswith(("literal[", "constrained-", "function-")))
    if choices:
        extra = ' or "module:callable"' if len(faults) > 1 else ""
        return f"{where} = {fault['input']!r}: choose {choices[0]}{extra}"
    return f"{where} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _read_as(kind: type[Section], steps: list[str]) -> tuple[list[str], list[str]]:
    """The keys that `steps` names, without the tags of sections, and those that exist beside the
    last of them."""
    path, section = [], kind
    kinds: dict[str, type[Section]] = {}
    for number, step in enumerate(steps):
        if step in kinds and len(kinds) > 1:  # which of several sections it was read as
            section, kinds = kinds[step], {}
            continue
        path.append(step)
        if number == len(steps) - 1:
            break
        fields = {info.alias or name: info for name, info in section.model_fields.items()}
        if step in fields:
            info = fields[step]
            kinds = dict(_sections(info.annotation, *info.metadata))
            section = next(iter(kinds.values()), section)
    return path, [info.alias or name for name, info in section.model_fields.items()]


def _sections(annotation: Any, *metadata: Any) -> Iterator[tuple[str, type[Section]]]:
    """Every section in an annotation, by the tag that tells it from the others."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        tags = [item.tag for item in metadata if isinstance(item, Tag)]
        if not tags and "type" in annotation.model_fields:
            tags = list(get_args(annotation.model_fields["type"].annotation))
        yield (tags or [annotation.__name__])[0], annotation
        return
    if get_origin(annotation) is Annotated:
        first, *rest = get_args(annotation)
        yield from _sections(first, *rest)
        return
    for part in get_args(annotation):
        yield from _sections(part)
