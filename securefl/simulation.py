"""A consortium on one machine: its data divided among the sites, and a client for each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from protocols.identity import Identity
from securefl import agreement, config, data, models
from securefl.client import Client, check_records
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table
from securefl.privacy.ledger import Holding
from securefl.privacy.plan import Plan
from securefl.site import SITE, Gate, open_ledger
from securefl.store import SiteStore


@final
@dataclass(frozen=True, slots=True)
class Consortium:
    """Each site's training records, in site order, the held-out test records, and the plan."""

    sites: Mapping[str, Table]
    test: Table
    plan: Plan | None


def assemble(experiment: Experiment) -> Consortium:
    """Load, hold out and divide the records as the experiment says, from its public seed."""
    table = data.load(experiment.data)
    by = experiment.sites.column if experiment.sites.partition == "column" else None
    if experiment.data.test_column is not None:
        train, test = data.declared_split(table, experiment.data.test_column)
    else:
        train, test = data.split(table, experiment.data.test_fraction, experiment.seed, by)
    sites = data.partition(train, experiment.sites, experiment.seed)
    agreement.thresholds(experiment, len(sites))
    module = models.build(experiment.model, test.shape, test.outputs, experiment.seed)
    plan = agreement.plan(experiment, len(sites), models.layout(module).size)
    agreement.encoding(experiment, len(sites), plan)
    for key, named in (
        ("aggregation.weights", experiment.aggregation.weights),
        ("transcript.consent", experiment.transcript.consent),
    ):
        strangers = sorted(set(named) - set(sites))
        if strangers:
            raise ConfigurationError(
                f"{key} names {strangers[0]!r}, but the sites are {', '.join(sites)}"
            )
    for name, records in sites.items():
        check_records(name, records, experiment)
    return Consortium(sites, test, plan)


def client(
    experiment: Experiment,
    table: Table,
    identity: Identity,
    session: bytes,
    folder: Path,
    holding: Holding | None = None,
) -> Client:
    """The client of one site, with its durable state in `folder`."""
    return Client(experiment, identity, session, table, SiteStore(folder), holding)


def gate(folder: Path, table: Table, run_folder: Path) -> Gate:
    """The gate of the site in `folder`, which holds `table`; in a run it keeps its state apart."""

    def make(
        experiment: Experiment, identity: Identity, session: bytes, run: bytes, records: Table
    ) -> Client:
        ledger = open_ledger(folder)
        try:
            holding = Holding(ledger, config.load_site(folder / SITE).data.id, run.hex())
            return client(experiment, records, identity, session, run_folder, holding)
        except BaseException:
            ledger.close()
            raise

    return Gate(folder, lambda _: table, make, tell=lambda line: print(line, file=sys.stderr))


def check_folders(folder: Path, sites: Iterable[str]) -> None:
    """ConfigurationError unless `folder` holds a folder with its own site.toml for every site."""
    for name in sites:
        own = config.load_site(folder / name / SITE)
        if own.name != name:
            raise ConfigurationError(
                f"{folder / name / SITE} is of {own.name}: name the folder after its site"
            )
