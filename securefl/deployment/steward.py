"""Keeps a consortium's runs going: at its server, with rights over jobs there.

FLARE's jobs end with the process that ran them, and a site that came late is in the next job only.
So an interrupted run gets a new job, which goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, final

import msgspec

from securefl.config import ConfigurationError
from securefl.deployment import nodes
from securefl.deployment.kits import Kit
from securefl.deployment.progress import (
    AGAIN,
    RUNS,
    STATUS,
    RunProgress,
    check_name,
    every_run,
    is_stopped,
    write_progress,
)

MOST_JOBS: Final = 5
"""A run fails after this many jobs in a row that finished no round."""

ALIVE: Final = 12.0
"""Seconds since its last heartbeat within which a site counts as connected."""

SETTLE: Final = 3.0
"""Seconds that the set of connected sites must not have changed before a run goes on."""

IDLE: Final = 5.0
"""How many times as seldom the server is asked while no run is under way."""

START: Final = 60.0
"""Seconds that FLARE may take to start a job's process once the sites have the job."""


@final
class Session:
    """A connection to FLARE's server in the name of an administrator or a steward."""

    def __init__(self, kit: Kit, timeout: float = 10.0) -> None:
        """Raises ConfigurationError where the server does not let `kit` in, or is not there."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        self.kit = kit
        (kit.flare / "transfer").mkdir(mode=0o700, exist_ok=True)
        (kit.flare / "local").mkdir(mode=0o700, exist_ok=True)
        try:
            with _quiet():
                parts = (kit.name, str(kit.flare))
                self._session = new_secure_session(*parts, timeout=timeout, auto_login_max_tries=1)
        except Exception as error:
            raise ConfigurationError(
                f"the server at {kit.host}:{kit.port} does not let {kit.name} in "
                f"({type(error).__name__}: {error}): `securefl doctor {kit.folder}` looks why"
            ) from None

    def close(self) -> None:
        """Leave."""
        with _quiet(), contextlib.suppress(Exception):
            self._session.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connected(self, within: float = float("inf")) -> tuple[str, ...]:
        """The sites that are connected; within: seconds since a heartbeat, by this clock."""
        with _quiet():
            clients = self._session.get_connected_client_list()
        now = time.time()
        return tuple(sorted(c.name for c in clients if now - c.last_connect_time <= within))

    def submit(self, run: str, experiment: str, least: int) -> str:
        """A job for `run`; with an empty `experiment` it goes on from its checkpoint. Its id."""
        check_name(run)
        folder = self.kit.flare / "transfer" / run
        write_job(folder, run, experiment, least)
        return self.submit_folder(folder)

    def submit_folder(self, folder: Path) -> str:
        """The job that lies in `folder`, which this uses up. Its id."""
        try:
            with _quiet():
                return str(self._session.submit_job(str(folder)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clone(self, job: str) -> str:
        """The same job once more. Its id."""
        with _quiet():
            return str(self._session.clone_job(job))

    def status(self, job: str) -> str:
        """What FLARE says of a job, such as RUNNING or FINISHED:COMPLETED."""
        with _quiet():
            return str(self._session.get_job_status(job))

    def detail(self, job: str) -> str:
        """What the server and the sites said when a job was given to them."""
        with _quiet():
            return ", ".join(self._session.get_job_meta(job).get("job_deploy_detail", []))

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that FLARE's server knows."""
        with _quiet():
            return list(self._session.list_jobs())

    def progress(self, run: str) -> RunProgress | None:
        """How far a run is, from its running job; None where none says so just now."""
        for job in self.jobs():
            if job.get("job_name") == run and str(job.get("status")) == "RUNNING":
                try:
                    told = self.command(str(job["job_id"]), STATUS, {})
                    return msgspec.convert(told, RunProgress, strict=False) if told else None
                except Exception:  # FLARE's: the job is starting, or just over
                    return None
        return None

    def give_way(self, job: str) -> None:
        """Ask a running job to end after its round."""
        with _quiet():
            self._session.do_app_command(job, AGAIN, {})

    def command(self, job: str, topic: str, data: dict[str, Any]) -> dict[str, Any]:
        """What a running job answers to a command of ours."""
        with _quiet():
            return dict(self._session.do_app_command(job, topic, data))


def _age(job: dict[str, Any]) -> str:
    """What FLARE's jobs are sorted by, oldest first."""
    return str(job.get("submit_time", ""))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """FLARE's client prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def write_job(folder: Path, run: str, experiment: str, least: int) -> None:
    """A FLARE job that names our two classes and holds no code."""
    shutil.rmtree(folder, ignore_errors=True)
    config_folder = folder / "app" / "config"
    config_folder.mkdir(parents=True)
    controller, executor = nodes.CLASSES
    told = {"run": run, "experiment": experiment}
    meta = {
        "name": run,
        "resource_spec": {},
        "deploy_map": {"app": ["@ALL"]},
        "min_clients": least,
    }
    server = {
        "format_version": 2,
        "workflows": [{"id": "run", "path": controller, "args": told}],
        "components": [],
        "dead_client_grace_period": 60.0,
        "dead_client_check_lead_time": 30.0,
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": {"path": executor, "args": {}}}],
        "task_result_filters": [],
        "task_data_filters": [],
        "components": [],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (config_folder / "config_fed_server.json").write_text(json.dumps(server))
    (config_folder / "config_fed_client.json").write_text(json.dumps(client))


@final
class Steward:
    """Looks after the runs of a server's kit; `beat` does what is due."""

    def __init__(self, kit: Kit, tell: Callable[[str], None], every: float = 1.0) -> None:
        self._kit, self._tell, self._every = kit, tell, every
        self._session: Session | None = None
        self._due = 0.0
        self._submitted: dict[str, str] = {}
        self._fruitless: dict[str, tuple[int, int]] = {}
        self._seen: tuple[str, ...] = ()
        self._since = 0.0
        self._asked: set[str] = set()
        self._gone: dict[str, float] = {}
        """Since when jobs that should run have no process."""

    def beat(self) -> None:
        """Submit interrupted runs again, and make room for late sites; not more often than due."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._every
        known = every_run(self._kit.folder)
        unfinished = {name: progress for name, progress in known.items() if not progress.over}
        if not unfinished:
            self._due = now + IDLE * self._every
        try:
            self._look_after(unfinished, set(known), now)
        except Exception as error:  # FLARE's server may be down, or FLARE's client in any state
            self.close()
            self._due = now + 5 * self._every
            if not isinstance(error, ConfigurationError):
                self._tell(f"the steward starts over: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave FLARE's server."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _look_after(self, unfinished: dict[str, RunProgress], known: set[str], now: float) -> None:
        if self._session is None:
            self._session = Session(Kit.load(self._kit.folder / "steward"))
            (self._kit.flare / "jobs").mkdir(exist_ok=True)  # FLARE makes it at its start only
        connected = self._session.connected(ALIVE)
        if connected != self._seen:
            self._seen, self._since = connected, now
        jobs = self._session.jobs()
        alive = {
            str(job["job_id"]): str(job.get("status"))
            for job in jobs
            if str(job.get("status")) in ("RUNNING", "SUBMITTED", "DISPATCHED", "APPROVED")
        }
        newest = {str(job.get("job_name")): str(job["job_id"]) for job in sorted(jobs, key=_age)}
        for name, job in newest.items():
            # The server was killed before the run said anything. One that was refused says nothing
            # either, and FLARE is given the time to see that it ended.
            if name not in known and job in alive and not self._lives(job, alive[job], now, START):
                self._session.clone(job)
                self._tell(f"{name}: begins once more")
        settled = now - self._since >= SETTLE
        for name, progress in unfinished.items():
            job = self._submitted.get(name, progress.job)
            if job in alive and self._lives(job, alive[job], now):
                # Only another job can count these in.
                out = (set(progress.names) - set(progress.deployed)) | set(progress.silent)
                late = out & set(connected)
                if late and settled and progress.job == job and job not in self._asked:
                    self._asked.add(job)
                    self._session.give_way(job)
                    came = ", ".join(sorted(late))
                    self._tell(f"{name}: {came} came: counted in by a job after this round")
            elif settled:
                self._go_on(name, progress, connected)

    def _lives(self, job: str, status: str, now: float, patience: float = SETTLE) -> bool:
        """Whether a job does what FLARE says of it: a killed server leaves it so for ever."""
        if status not in ("RUNNING", "DISPATCHED"):
            return True
        if any(job in command for command in nodes.commands(self._kit)):
            self._gone.pop(job, None)
            return True
        # Before it runs, it is given to the sites one after the other.
        patience = patience if status == "RUNNING" else START
        return now - self._gone.setdefault(job, now) < patience

    def _go_on(self, name: str, progress: RunProgress, connected: tuple[str, ...]) -> None:
        folder = self._kit.folder / RUNS / name
        if is_stopped(folder):
            reason = "stopped by a person"
            write_progress(
                folder, msgspec.structs.replace(progress, state="stopped", reason=reason)
            )
            return
        # Where nothing is known of a run, its next job says what it needs.
        present = set(connected) & set(progress.names or connected)
        if len(present) < progress.least:
            if progress.state != "waiting":
                asked = f"{len(progress.names)} sites are connected, {progress.least} are needed"
                reason = f"{len(present)} of {asked}"
                told = msgspec.structs.replace(progress, state="waiting", reason=reason)
                write_progress(folder, told)
            return
        done, count = self._fruitless.get(name, (progress.done, 0))
        count = count + 1 if done == progress.done else 1
        self._fruitless[name] = progress.done, count
        if count > MOST_JOBS:
            reason = f"{MOST_JOBS} jobs in a row finished no round, the last: {progress.reason}"
            told = msgspec.structs.replace(progress, state="failed", reason=reason)
            write_progress(folder, told)
            self._tell(f"{name}: {reason}")
            return
        assert self._session is not None  # noqa: S101 - `_look_after` opened it
        self._submitted[name] = self._session.submit(name, "", progress.least)
        self._tell(f"{name}: goes on from update {progress.done} with {', '.join(sorted(present))}")
