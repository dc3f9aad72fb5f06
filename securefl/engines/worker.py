"""What acts for several sites of a simulation: the same in a worker process and in a Ray actor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn, final

import msgspec
import torch

from protocols.identity import Identity, Roster, SigningKey
from securefl import config, simulation
from securefl.config import ConfigurationError
from securefl.engines.inprocess import Answering
from securefl.site_folder import read_key


class WorkerFailedError(RuntimeError):
    """A worker met an error that is neither a dropout nor the user's mistake."""


@final
class Start(msgspec.Struct, frozen=True, tag=True):
    """Engine -> worker: the experiment, the sites to act for, and where they keep their state."""

    experiment: str
    secrets: dict[str, bytes]
    """The sites to act for, each with the 32 bytes of its key; empty where it brings its own."""
    keys: dict[str, bytes]
    """The public keys of all sites."""
    session: bytes
    folder: str
    own: str
    """The folder with each site's own folder in it, or empty."""
    threads: int
    shared: str = ""
    """What the file `SHARED` in `folder` must say, so that this is the engine's folder, or empty.
    """

    def __repr__(self) -> str:
        return f"Start({', '.join(self.secrets)})"


@final
class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker -> engine: its sites can be asked."""


@final
class Told(msgspec.Struct, frozen=True, tag=True):
    """Worker -> engine: a site's reply to the request of that number."""

    number: int
    site: str
    data: bytes


@final
class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> engine: it cannot go on. `mistake` tells the user's errors from ours."""

    mistake: bool
    reason: str

    @classmethod
    def by(cls, error: Exception) -> Failed:
        """What is told of an error."""
        if isinstance(error, ConfigurationError):
            return cls(True, str(error))
        return cls(False, f"{type(error).__name__}: {error}")

    def throw(self, worker: int) -> NoReturn:
        """Raise it where the engine is: ConfigurationError or WorkerFailedError."""
        if self.mistake:
            raise ConfigurationError(self.reason)
        raise WorkerFailedError(f"worker {worker}: {self.reason}")


SHARED: Final = ".shared"
"""A file that the engine puts into the folder of states, for workers on other machines to see."""


def starts(
    experiment: config.Experiment,
    sites: tuple[str, ...],
    session: bytes,
    folder: Path,
    own: Path | None,
    count: int,
    threads: int,
    shared: str = "",
) -> tuple[Roster, list[Start]]:
    """The roster, and how each of `count` workers starts. Site keys are drawn here, or are `own`.

    So a worker that is started again has the same keys, which the others pin.
    """
    secrets = {site: b"" if own else os.urandom(32) for site in sites}
    if own is not None:
        keys = {site: read_key(own / site).public for site in sites}
    else:
        keys = {site: _key(secret).public for site, secret in secrets.items()}
    held = str(own.absolute()) if own else ""
    return Roster(keys), [
        Start(
            experiment=experiment.dump(),
            secrets={site: secrets[site] for site in sites[i::count]},
            keys=keys,
            session=session,
            folder=str(folder.absolute()),
            own=held,
            threads=threads,
            shared=shared,
        )
        for i in range(count)
    ]


def _key(secret: bytes) -> SigningKey:
    return SigningKey(lambda size: secret)


@final
class Worker:
    """The clients of several sites, which share one process. Raises ConfigurationError."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        # The first optimiser makes torch load its compiler: seconds that no round's deadline has.
        torch.optim.SGD([torch.zeros(1)], lr=1.0)
        if start.shared:
            _check_shared(Path(start.folder), start.shared)
        self._sites: Mapping[str, Answering] = dict(_sites(start))

    def answer(self, site: str, data: bytes) -> bytes:
        """The reply of that site to one request."""
        return self._sites[site].answer(data)


def _sites(start: Start) -> Iterator[tuple[str, Answering]]:
    experiment = config.parse(start.experiment)
    consortium = simulation.assemble(experiment)
    roster, folder = Roster(start.keys), Path(start.folder)
    for site, secret in start.secrets.items():
        records = consortium.sites[site]
        if start.own:
            yield site, simulation.gate(Path(start.own) / site, records, folder / site)
        elif records is not None:
            identity = Identity(site, _key(secret), roster)
            state = folder / site
            yield site, simulation.client(experiment, records, identity, start.session, state)


def _check_shared(folder: Path, told: str) -> None:
    """ConfigurationError unless `folder` is here what it is to the engine."""
    try:
        seen = (folder / SHARED).read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != told:
        raise ConfigurationError(
            f"{os.uname().nodename} does not see {folder} as the machine that runs the experiment "
            "does: put the run on a file system that all machines of the Ray cluster share, with "
            "--directory"
        )
