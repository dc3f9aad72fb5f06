"""A consortium on one machine: its data divided among the sites, and a client for each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from protocols.identity import Identity
from securefl import agreement, config, data, models
from securefl.audit_log import Audited, AuditLog, Member
from securefl.client import Client, check_records
from securefl.config import ConfigurationError, Experiment
from securefl.data import Frame, Records, Table, sources
from securefl.data.tables import Task, near
from securefl.preprocessing import Preprocessor
from securefl.privacy.ledger import Holding
from securefl.privacy.plan import Plan
from securefl.proposals import Remembering
from securefl.site import Gate, Load
from securefl.site_folder import SITE, open_ledger, private, read_key
from securefl.store import SiteStore


@final
@dataclass(frozen=True, slots=True)
class Features:
    """What a model reads and gives: everything public, and the same at every site."""

    shape: tuple[int, ...]
    outputs: int
    task: Task
    names: tuple[str, ...]
    classes: tuple[str, ...]
    target_range: tuple[float, float] | None

    @classmethod
    def of(cls, source: Table | Preprocessor) -> Features:
        """Those of a table, or of what preprocessing makes of a schema's columns."""
        if isinstance(source, Table):
            names, classes = source.names, source.classes
            parts = (source.task, names, classes, source.target_range)
        else:
            schema = source.schema
            parts = (schema.task, source.inputs, schema.classes, schema.target_range)
        return cls(source.shape, source.outputs, *parts)


@final
@dataclass(frozen=True, slots=True)
class Consortium:
    """Each site's records, in site order, the test records, and the plan.

    A site whose own file is to be read has None. Where sites evaluate the model themselves, their
    test records are among their records and `test` is None.
    """

    sites: Mapping[str, Records | None]
    test: Table | None
    features: Features
    plan: Plan | None


def assemble(experiment: Experiment) -> Consortium:
    """Load, hold out and divide the records as the experiment says, from its public seed."""
    sites: Mapping[str, Records | None]
    test = None
    if experiment.data.agreed is None:
        sites, test = _divided(experiment)
        features = Features.of(test)
    else:
        sites = _dealt(experiment)
        agreement.thresholds(experiment, len(sites))
        made = agreement.preprocessor(experiment, len(sites))
        assert made is not None  # noqa: S101 - Experiment holds this
        features = Features.of(made)
    agreement.thresholds(experiment, len(sites))
    module = models.build(experiment.model, features.shape, features.outputs, experiment.seed)
    size = models.layout(module).size
    plan = agreement.plan(experiment, len(sites), size)
    agreement.check_length(experiment, len(sites), plan, size)
    for key, named in (
        ("aggregation.weights", experiment.aggregation.weights),
        ("transcript.consent", experiment.transcript.consent),
        ("transcript.own", experiment.transcript.own),
    ):
        strangers = sorted(set(named) - set(sites))
        if strangers:
            raise ConfigurationError(
                f"{key} names {strangers[0]!r}, but the sites are {', '.join(sites)}"
            )
    for name, records in sites.items():
        if isinstance(records, Table):
            check_records(name, records, experiment)
        elif records is not None:
            check_records(name, data.held_out(records, experiment)[0], experiment)
    return Consortium(sites, test, features, plan)


def _dealt(experiment: Experiment) -> Mapping[str, Frame | None]:
    """Every site's rows as the schema reads them: a file each, or one file's divided."""
    told = experiment.data, experiment.sites
    if told[0].path is None:
        return dict.fromkeys(sorted(told[1].names or ()))
    frames = sources.load_frames(told[0])
    if told[1].partition == "file":
        for name in told[1].names or ():
            if name not in frames:
                raise ConfigurationError(
                    f"sites.names lists {name!r}, of which {told[0].path} has no file"
                    f"{near(name, frames)}"
                )
        if len(frames) < 2:
            raise ConfigurationError(
                f"{told[0].path} is one file: an aggregate of one site hides nothing: divide it by "
                'sites.partition = "iid" or "column", or bring more files'
            )
        chosen = told[1].names or tuple(frames)
        return {_site_name(name): frames[name] for name in sorted(chosen)}
    if len(frames) > 1 and told[1].partition != "column":
        raise ConfigurationError(
            f"{told[0].path} names {len(frames)} files, and sites.partition = "
            f'"{told[1].partition}" would mix their rows: use "file", so that each is a site'
        )
    return data.partition(Frame.concatenate(list(frames.values())), told[1], experiment.seed)


def _site_name(stem: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64]
    if not name:
        raise ConfigurationError(f"the file {stem!r} names no site: rename it")
    return name


def _divided(experiment: Experiment) -> tuple[dict[str, Table], Table]:
    """Each site's training records, and the records held out, where no schema says more."""
    table = data.load(experiment.data)
    by = experiment.sites.column if experiment.sites.partition == "column" else None
    if experiment.data.test_column is not None:
        train, test = data.declared_split(table, experiment.data.test_column)
    else:
        train, test = data.split(table, experiment.data.test_fraction, experiment.seed, by)
    return data.partition(train, experiment.sites, experiment.seed), test


def client(
    experiment: Experiment,
    records: Records,
    identity: Identity,
    session: bytes,
    folder: Path,
    holding: Holding | None = None,
    own: Path | None = None,
    private: Path | None = None,
) -> Client:
    """The client of one site, with its durable state in `folder`; the rest as for `SiteStore`."""
    store = SiteStore(folder, own, private)
    return Client(experiment, identity, session, records, store, holding)


def gate(
    folder: Path, held: Records | None, run_folder: Path, asked_by: str = "securefl run"
) -> Audited:
    """The gate of the site in `folder`, with its audit log; in a run it keeps its state apart.

    held: its records; None where they are read from the site's own file. asked_by: as in the log.
    """

    def load(experiment: Experiment) -> Records:
        return held if held is not None else own_records(folder, experiment)

    return _gate(folder, load, lambda run: run_folder, asked_by)


def deployed_gate(folder: Path, asked_by: str, path: Path | None = None) -> Audited:
    """The gate of a site on a machine of its own; a run's state is in `folder`/runs.

    What it refuses is kept for its people (`securefl.proposals`).

    path: of its records; by default the one that its site.toml names. asked_by: as in the log.
    """

    def load(experiment: Experiment) -> Records:
        return own_records(folder, experiment, path)

    def run_folder(run: bytes) -> Path:
        return folder / "runs" / run.hex() / "sites" / config.load_site(folder / SITE).name

    return _gate(folder, load, run_folder, asked_by, remembers=True)


def _gate(
    folder: Path,
    load: Load,
    run_folder: Callable[[bytes], Path],
    asked_by: str,
    remembers: bool = False,
) -> Audited:
    def make(
        experiment: Experiment, identity: Identity, session: bytes, run: bytes, records: Records
    ) -> Client:
        ledger = open_ledger(folder)
        try:
            holding = Holding(ledger, config.load_site(folder / SITE).data.id, run.hex())
            kept = run_folder(run)
            secrets = private(folder, run.hex(), identity.name)
            return client(experiment, records, identity, session, kept, holding, folder, secrets)
        except BaseException:
            ledger.close()
            raise

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    log = AuditLog(folder, read_key(folder))
    member: Member = Gate(folder, load, make, tell=tell)
    if remembers:
        member = Remembering(member, folder, asked_by, tell=tell)
    return Audited(member, log, asked_by, tell=tell)


def own_records(folder: Path, experiment: Experiment, path: Path | None = None) -> Frame:
    """The rows in the file of the site in `folder`, as the experiment's schema reads them."""
    site, schema = config.load_site(folder / SITE), experiment.data.agreed
    path = path or site.data.path
    if path is None or schema is None:
        raise ConfigurationError(
            f'{folder / SITE}: [data] names no path: say path = "FILE", where the records lie'
        )
    return sources.load_frame(path, schema, site.name)


def check_folders(folder: Path, sites: Iterable[str]) -> None:
    """ConfigurationError unless `folder` holds a folder with its own site.toml for every site."""
    for name in sites:
        own = config.load_site(folder / name / SITE)
        if own.name != name:
            raise ConfigurationError(
                f"{folder / name / SITE} is of {own.name}: name the folder after its site"
            )
