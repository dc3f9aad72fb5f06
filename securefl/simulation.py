"""A consortium on one machine: its data divided among the sites, and a client for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from protocols.identity import Identity
from securefl import agreement, data
from securefl.client import Client, check_records
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table
from securefl.privacy.plan import RecordLocal
from securefl.store import SiteStore


@final
@dataclass(frozen=True, slots=True)
class Consortium:
    """Each site's training records, in site order, and the held-out test records."""

    sites: Mapping[str, Table]
    test: Table


def assemble(experiment: Experiment) -> Consortium:
    """Load, hold out and divide the records as the experiment says, from its public seed."""
    table = data.load(experiment.data)
    by = experiment.sites.column if experiment.sites.partition == "column" else None
    train, test = data.split(table, experiment.data.test_fraction, experiment.seed, by)
    sites = data.partition(train, experiment.sites, experiment.seed)
    agreement.thresholds(experiment, len(sites))
    agreement.encoding(experiment, len(sites))
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
    return Consortium(sites, test)


def plan(experiment: Experiment) -> RecordLocal | None:
    """The privacy plan of an experiment, calibrated for all of its rounds."""
    if experiment.privacy is None:
        return None
    steps = experiment.training.local_steps
    return RecordLocal.calibrate(experiment.privacy, experiment.rounds, steps)


def client(
    experiment: Experiment, table: Table, identity: Identity, session: bytes, folder: Path
) -> Client:
    """The client of one site, with its durable state in `folder`."""
    return Client(experiment, identity, session, table, plan(experiment), SiteStore(folder))
