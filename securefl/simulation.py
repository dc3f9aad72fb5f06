"""A consortium on one machine: its data divided among the sites, and a client for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from protocols.identity import Identity
from securefl import agreement, data, models
from securefl.client import Client, check_records
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table
from securefl.privacy.ledger import Holding
from securefl.privacy.plan import Plan
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
