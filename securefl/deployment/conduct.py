"""One run on a consortium's server: how far it is, and what becomes of it when its job ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

import msgspec

from protocols.catalogue import UPLOAD
from protocols.identity import Roster
from securefl import agreement, config, runs, store
from securefl.config import ConfigurationError, Experiment
from securefl.deployment.kits import Kit
from securefl.deployment.progress import (
    RUNS,
    RunProgress,
    check_name,
    read_progress,
    write_progress,
)
from securefl.engines import Remote
from securefl.records import EXPERIMENT, RoundRecord
from securefl.server import PROPOSE

PARTIES: Final = "roster.json"
"""In a run's folder: the sites that it began with."""

SUBMITTED: Final = "submitted.toml"
"""In a run's folder: the experiment as it came, from which the run can begin at any time."""


class _Parties(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sites and their keys (hexadecimal)."""

    keys: dict[str, str]


@final
@dataclass(frozen=True, slots=True)
class Waits:
    """How long to wait for replies, in seconds: in all, and without a sign of life of a site.

    stragglers: for the last ones, once `enough` have answered. proposal: whether what is asked is
    the proposal, which a site's service must be shown again when it was started again.
    """

    deadline: float
    patience: float
    enough: int
    stragglers: float | None = None
    proposal: bool = False


class Job(Protocol):
    """What a run needs of FLARE's job: see `controller.RoundController`."""

    @property
    def job(self) -> str: ...
    @property
    def sites(self) -> tuple[str, ...]: ...
    @property
    def deployed(self) -> tuple[str, ...]: ...
    @property
    def silent(self) -> tuple[str, ...]: ...
    @property
    def gives_way(self) -> bool: ...
    @property
    def stops(self) -> bool: ...
    def exchange(self, messages: Mapping[str, bytes], waits: Waits) -> dict[str, bytes]: ...


class GivesWayError(Exception):
    """The job ends between two rounds, so that the next one counts late sites in."""


class StoppedError(Exception):
    """A person ended the run between two rounds."""


def conduct(kit_folder: Path, name: str, experiment_text: str, job: Job) -> None:
    """The run `name`: begun with `experiment_text`, or gone on with where its folder is there.

    What becomes of it is in its folder (`RunProgress`), and not in what this returns. Raises
    ConfigurationError, and touches nothing, where another job conducts it, or another experiment
    has its name.
    """
    kit = Kit.load(kit_folder)
    folder = kit.folder / RUNS / check_name(name)
    if not (experiment_text or folder.exists()):
        raise ConfigurationError(f"there is no run {name} to go on with")
    with store.exclusive(folder / "job"):
        if experiment_text:
            _submitted(folder, name, experiment_text)
        begun = (folder / EXPERIMENT).exists()
        if begun:
            experiment = config.load(folder / EXPERIMENT)
        else:
            text = (folder / SUBMITTED).read_text(encoding="utf-8")
            experiment = config.parse(text, origin="the submitted experiment")
        _Conducted(kit, folder, experiment, job).go(begun)


def _submitted(folder: Path, name: str, experiment_text: str) -> None:
    """Keep what was submitted before anything else is said of the run.

    Raises ConfigurationError where there is a run of this name: it goes on as it began.
    """
    config.parse(experiment_text, origin="the submitted experiment")
    if (folder / EXPERIMENT).exists() or read_progress(folder) is not None:
        raise ConfigurationError(f"there is a run {name} already: submit it under another --name")
    store.write(folder / SUBMITTED, experiment_text.encode())


@final
class _Conducted:
    """One run in one job. Implements `securefl.runs.Progress`."""

    def __init__(self, kit: Kit, folder: Path, experiment: Experiment, job: Job) -> None:
        self._folder, self._job = folder, job
        pins = kit.pins
        # What a run begins with stays: a site that was removed since counts as dropped out.
        begun_with = store.read(folder / PARTIES, _Parties)
        keys = pins.keys if begun_with is None else begun_with.keys
        names = experiment.sites.names or tuple(keys)
        strangers = sorted(set(names) - set(keys))
        if strangers:
            raise ConfigurationError(f"{strangers[0]} is not in the consortium's roster")
        if begun_with is None:
            parties = _Parties({site: keys[site] for site in names})
            store.write(folder / PARTIES, msgspec.json.encode(parties))
        self._roster = Roster({site: bytes.fromhex(keys[site]) for site in names})
        self._removed = frozenset(pins.removed)
        before = read_progress(folder)
        jobs = before.jobs if before is not None else 0
        self._experiment = _with_names(experiment, names)
        self._told = RunProgress(
            version=1,
            state="running",
            rounds=experiment.rounds,
            names=tuple(self._roster),
            least=agreement.thresholds(experiment, len(names)).minimum,
            job=job.job,
            jobs=jobs + 1,
            deployed=job.deployed,
        )

    def go(self, begun: bool) -> None:
        """Train until the run is finished or cannot go on now, and say which."""
        self._say()
        try:
            remote = Remote(self._roster, self._exchange)
            if begun:
                runs.resume(self._folder, progress=self, remote=remote)
            else:
                runs.run(self._experiment, self._folder, progress=self, remote=remote)
            self._say(state="finished", phase="")
        except StoppedError:
            self._say(state="stopped", reason="stopped by a person")
        except GivesWayError:
            self._say(state="interrupted", reason="more sites came: the next job counts them in")
        except (runs.RunFailedError, ConfigurationError) as error:
            few = isinstance(error, runs.RunFailedError) and self._few()
            self._say(state="waiting" if few else "failed", reason=str(error))
            if not few:
                raise
        except BaseException as error:
            self._say(state="interrupted", reason=f"{type(error).__name__}: {error}")
            raise

    def _few(self) -> bool:
        """Whether fewer sites answer than a sum needs."""
        return len(self._job.sites) < self._told.least

    def _exchange(self, phase: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        told, proposal = self._experiment.deployment, phase == PROPOSE
        long = proposal or phase == UPLOAD
        waits = Waits(
            deadline=told.training_deadline if long else told.deadline,
            patience=told.patience,
            enough=self._told.least,
            stragglers=None if proposal else told.stragglers,
            proposal=proposal,
        )
        asked = {site: data for site, data in messages.items() if site not in self._removed}
        return self._job.exchange(asked, waits)

    def started(self, rounds: int, done: int) -> None:
        """The run begins, or continues after `done` of `rounds` rounds."""
        self._say(rounds=rounds, done=done)

    def phase(self, round_number: int, phase: str) -> None:
        """A phase of a round begins."""
        self._say(round=round_number, phase=phase)

    def finished(self, record: RoundRecord) -> None:
        """A round is finished and on disk: the one place where a run may stop and lose nothing."""
        self._say(done=record.update)
        if self._job.stops:
            raise StoppedError
        if self._job.gives_way:
            raise GivesWayError

    def _say(self, **changes: object) -> None:
        here = {"sites": self._job.sites, "silent": self._job.silent, **changes}
        self._told = msgspec.structs.replace(self._told, **here)
        write_progress(self._folder, self._told)


def _with_names(experiment: Experiment, names: tuple[str, ...]) -> Experiment:
    """With the sites named, where it names none: those of the roster."""
    sites = experiment.sites.model_copy(update={"names": tuple(sorted(names)), "count": None})
    return experiment.model_copy(update={"sites": sites})
