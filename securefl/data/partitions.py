"""Which records are held out, and which site holds which: decided by public seeds alone."""

from __future__ import annotations

import hashlib
import re
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from securefl.config import ConfigurationError, Experiment, Sites
from securefl.data.frames import Frame
from securefl.data.tables import Table, near

TRIES = 1000
"""How often a random partition is redrawn before it is refused."""

Rows = NDArray[np.int64]

Records = Table | Frame
"""A site's records, as features or as its schema reads them."""

AnyRecords = TypeVar("AnyRecords", Table, Frame)


def split(table: Table, fraction: float, seed: int, by: str | None = None) -> tuple[Table, Table]:
    """The records for training, and the `fraction` of them held out for tests.

    Stratified by class, and by the group column `by` where one is given (the column that tells
    sites apart, so that every site keeps its share). The last record of a stratum is never held
    out. Both parts keep the order of the rows; the same seed gives the same parts.

    Precondition: 0 < fraction < 1. Raises ConfigurationError when a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(f"data.test_fraction = {fraction}: put it between 0 and 1")
    rng = np.random.default_rng([seed, 1])
    strata = _strata(table, by)
    sizes = np.bincount(strata)
    shares = _apportion(sizes, fraction)
    if shares.sum() == 0:
        raise ConfigurationError(
            f"data.test_fraction = {fraction} of {len(table)} records holds none out: raise it "
            "or bring more records"
        )
    held_out = np.zeros(len(table), dtype=np.bool_)
    for stratum, share in enumerate(shares):
        held_out[rng.permutation(np.flatnonzero(strata == stratum))[:share]] = True
    return table.take(~held_out), table.take(held_out)


def declared_split(table: Table, column: str) -> tuple[Table, Table]:
    """The records for training, and those that `column` marks "test". Both keep their order.

    Raises ConfigurationError where the table has no such column, or a part would be empty.
    """
    if column not in table.groups:
        raise ConfigurationError(
            f"data.test_column = {column!r} is not a column of the data{near(column, table.groups)}"
        )
    held_out = table.groups[column] == "test"
    if held_out.all() or not held_out.any():
        raise ConfigurationError(
            f"data.test_column = {column!r} marks {int(held_out.sum())} of {len(table)} records "
            '"test": some must be, and some not'
        )
    return table.take(~held_out), table.take(held_out)


def held_out(frame: Frame, experiment: Experiment) -> tuple[Frame, Frame]:
    """A site's rows for training, and those for tests: by a hash of each row, or of its person.

    Where the schema has a column `test`, those that it marks "test". One row (or person) more or
    fewer, whichever is protected, changes no other's part. All rows of one person are in one part
    (where some of them are marked, all are for tests), but where a plan protects single rows: there
    each follows its own mark, for one marked row more would take its person's others out of
    training. The experiment's public seed goes into the hash.
    """
    schema, person, privacy = frame.schema, frame.schema.person, experiment.privacy
    if schema.test is not None:
        test = frame.texts[schema.test] == "test"
        if person is not None and not (privacy is not None and privacy.unit == "record"):
            marked = np.unique(frame.texts[person][test])
            test = np.isin(frame.texts[person], marked)
    else:
        least = int(experiment.data.test_fraction * 2**64)
        key = b"securefl test rows" + experiment.seed.to_bytes(8, "big")
        drawn = (
            int.from_bytes(hashlib.blake2b(row, digest_size=8, key=key).digest(), "big") < least
            for row in frame.identities(person)
        )
        test = np.fromiter(drawn, np.bool_, count=len(frame))
    return frame.take(~test), frame.take(test)


def partition(table: AnyRecords, sites: Sites, seed: int) -> dict[str, AnyRecords]:
    """The records dealt out to sites: site name -> its records, in the order of the sites.

    "iid" deals rows out evenly at random; "dirichlet" draws for every class the shares of the
    sites from Dir(alpha) (Hsu, Qi and Brown 2019: a smaller alpha skews more); "column" makes
    one site of each value of a group column, whatever it holds. A random partition that leaves a
    site without records, or a classifier's site with one class only, is redrawn, at most `TRIES`
    times.

    Raises ConfigurationError when there are fewer than two sites, more sites than records, a site
    would be left without records, or a random partition would still leave one with one class only.
    """
    if sites.partition == "column":
        parts = _by_column(table, sites)
        for name, rows in parts.items():
            if len(rows) == 0:
                raise ConfigurationError(
                    f"sites.column = {sites.column!r}: site {name!r} is left without records: "
                    "leave it out of sites.names"
                )
        return {name: table.take(rows) for name, rows in parts.items()}

    names = sites.names or tuple(f"site-{i + 1}" for i in range(sites.count or 0))
    _check_count(len(names))
    if len(names) > len(table):
        raise ConfigurationError(
            f"{len(names)} sites for {len(table)} records: lower sites.count or bring more records"
        )
    if sites.partition == "dirichlet" and table.task == "regression":
        raise ConfigurationError(
            'sites.partition = "dirichlet" skews classes, and regression has none: use "iid" or '
            '"column"'
        )
    rng = np.random.default_rng([seed, 2])
    fault = None
    for _ in range(TRIES):
        if sites.partition == "dirichlet":
            drawn = _dirichlet(table.target, len(names), sites.alpha, rng)
        else:
            drawn = np.array_split(rng.permutation(len(table)), len(names))
        parts = dict(zip(names, drawn, strict=True))
        fault = _fault(table, parts)
        if fault is None:
            return {name: table.take(np.sort(rows)) for name, rows in parts.items()}
    mend = "lower sites.count or bring more records"
    if sites.partition == "dirichlet":
        mend = f"raise sites.alpha = {sites.alpha:g} or {mend}"
    raise ConfigurationError(f"{TRIES} draws left a site wanting, the last because {fault}: {mend}")


def _strata(table: Table, by: str | None) -> Rows:
    """The number [n] of the stratum each record is in."""
    kinds = table.target if table.task == "classification" else np.zeros(len(table), np.int64)
    if by is None:
        columns = [kinds]
    else:
        columns = [kinds, np.unique(_group(table, by), return_inverse=True)[1]]
    numbers: Rows = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1]
    return numbers.ravel()


def _apportion(sizes: Rows, fraction: float) -> Rows:
    """How many of each stratum to hold out: largest remainders, one of each always left."""
    wanted = min(max(round(fraction * int(sizes.sum())), 1), int(sizes.sum()) - 1)
    exact = sizes * fraction
    shares: Rows = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    for stratum in np.argsort(np.floor(exact) - exact, kind="stable"):
        if shares.sum() < wanted and shares[stratum] < sizes[stratum] - 1:
            shares[stratum] += 1
    return shares


def _dirichlet(
    target: NDArray[np.generic], count: int, alpha: float, rng: np.random.Generator
) -> list[Rows]:
    dealt: list[list[Rows]] = [[] for _ in range(count)]
    for kind in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == kind))
        cuts = np.round(np.cumsum(rng.dirichlet([alpha] * count))[:-1] * len(rows))
        for site, part in enumerate(np.split(rows, cuts.astype(np.int64))):
            dealt[site].append(part)
    return [np.concatenate(parts) for parts in dealt]


def _by_column(table: Records, sites: Sites) -> dict[str, Rows]:
    assert sites.column is not None  # noqa: S101 (Sites holds this)
    column = _group(table, sites.column)
    parts: dict[str, Rows] = {}
    for value in np.unique(column):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).lstrip("._-")[:64]
        if not name:
            row = int(np.flatnonzero(column == value)[0]) + 1
            raise ConfigurationError(
                f"sites.column = {sites.column!r}, row {row}: {str(value)!r} names no site: give "
                "it a value with a letter or digit"
            )
        if name in parts:
            raise ConfigurationError(
                f"sites.column = {sites.column!r}: two values make the site name {name!r}: "
                "rename one"
            )
        parts[name] = np.flatnonzero(column == value)
    if sites.count is not None and sites.count != len(parts):
        raise ConfigurationError(
            f"sites.count = {sites.count}, but column {sites.column!r} has {len(parts)} values: "
            "drop the count"
        )
    names = sites.names or tuple(parts)
    for name in names:
        if name not in parts:
            raise ConfigurationError(
                f"sites.names: site {name!r} is left without records, no value of column "
                f"{sites.column!r}{near(name, parts)}"
            )
    for name in parts:
        if name not in names:
            raise ConfigurationError(
                f"column {sites.column!r} has site {name!r}, which sites.names lacks: add it"
            )
    _check_count(len(names))
    return {name: parts[name] for name in names}


def _group(table: Records, name: str) -> NDArray[np.str_]:
    if name in table.groups:
        return table.groups[name]
    if isinstance(table, Table) and name in table.names:
        raise ConfigurationError(
            f'sites.column = {name!r} is a feature: set data.drop = ["{name}"], so that it tells '
            "sites apart and feeds no model"
        )
    raise ConfigurationError(
        f"sites.column = {name!r} is not a column of the data{near(name, table.groups)}"
    )


def _check_count(count: int) -> None:
    if count < 2:
        raise ConfigurationError(
            f"{count} site: an aggregate of one site hides nothing: take two sites or more"
        )


def _fault(table: Records, parts: dict[str, Rows]) -> str | None:
    """Why a site cannot train with its part, or None."""
    for name, rows in parts.items():
        if len(rows) == 0:
            return f"site {name!r} is left without records"
        held = np.unique(table.target[rows])
        if table.task == "classification" and len(held) < 2:
            return f"site {name!r} has one class only, {table.classes[int(held[0])]!r}"
    return None
