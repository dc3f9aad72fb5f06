"""A whole run: from an experiment to a run directory, and on from one that was interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import msgspec
import numpy as np
from safetensors.numpy import save as save_tensors

from protocols.encoding import Aggregate
from protocols.errors import RoundAbortedError
from protocols.identity import Roster
from protocols.rounds import make_identities
from securefl import agreement, models, replicas, simulation, store
from securefl.algorithms import server_rule
from securefl.client import Client, protected_by, resolve_device
from securefl.config import ConfigurationError, Experiment
from securefl.engines import Exchange, Remote, inprocess, ray
from securefl.engines.worker import WorkerFailedError
from securefl.engines.workers import Workers
from securefl.evaluation import evaluate
from securefl.messages import Task
from securefl.preprocessing import Fitted
from securefl.privacy import accounting
from securefl.privacy.ledger import Release
from securefl.privacy.plan import Observer, Plan, RecordLocal
from securefl.records import (
    EVALUATIONS,
    EXPERIMENT,
    METRICS,
    MODEL,
    PREPROCESSING,
    SITES,
    SUMMARY,
    EvaluationRecord,
    RoundRecord,
    Summary,
    read_history,
)
from securefl.replicas import Replica, Standing
from securefl.server import BudgetsSpentError, Round, Server, Summed
from securefl.state import DivergedError, GlobalState, apply, first_state
from securefl.store import ServerStore, SiteStore
from securefl.transcript import TRANSCRIPT, recorded

MEAN_ACCURACY = "test_accuracy_mean_of_sites"

MOST_ABORTS = 3
"""A run fails after this many aborted rounds in a row."""


class Progress(Protocol):
    """What is told while a run goes on."""

    def started(self, rounds: int, done: int) -> None:
        """The run begins, or continues after `done` of `rounds` rounds."""

    def phase(self, round_number: int, phase: str) -> None:
        """A phase of a round begins."""

    def finished(self, record: RoundRecord) -> None:
        """A round is finished and on disk."""


class _Silent:
    def started(self, rounds: int, done: int) -> None: ...
    def phase(self, round_number: int, phase: str) -> None: ...
    def finished(self, record: RoundRecord) -> None: ...


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint says beside the state: whose it is, and what had been charged by then."""

    line: str
    agreed: str
    charged: dict[str, int]
    replaced: tuple[str, ...]
    fitted: str = ""
    """SHA-256 of what preprocessing was fitted to, hexadecimal."""
    standing: Standing | None = None
    """What is known of the model where the sites hold it, and no checkpoint does."""


class _Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What preprocessing is fitted to, for which experiment, in which rounds, what they moved."""

    values: Fitted
    agreed: str
    rounds: tuple[int, ...] = ()
    bytes_up: int = 0
    seconds: float = 0.0

    @property
    def stages(self) -> int:
        return len(self.rounds)

    def digest(self) -> str:
        """SHA-256 of the values, hexadecimal."""
        return hashlib.sha256(self.values.to_bytes()).hexdigest()

    def after(self, values: Fitted, summed: Summed) -> _Fitted:
        """With one more stage."""
        moved = self.bytes_up + sum(summed.traffic.bytes_up.values())
        spent = self.seconds + round(sum(summed.traffic.seconds.values()), 3)
        return _Fitted(values, self.agreed, (*self.rounds, summed.number), moved, spent)


_Done = TypeVar("_Done")

Known = GlobalState | Standing
"""The model as the server knows it: itself, or what the sites tell of theirs."""


class RunFailedError(RuntimeError):
    """A run that cannot go on; what it finished is on disk and can be resumed."""


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    directory: Path
    summary: Summary


Wrap = Callable[[Exchange], Exchange]
Replace = Callable[[Client], inprocess.Answering]


def run(
    experiment: Experiment,
    directory: Path | None = None,
    *,
    progress: Progress | None = None,
    sites: Path | None = None,
    remote: Remote | None = None,
    exchange: Wrap | None = None,
    clients: Mapping[str, Replace] | None = None,
    report: bool = True,
) -> Run:
    """Run `experiment` into `directory`, by default runs/NAME-YYYYMMDD-HHMMSS.

    sites: a folder with one of each site's own in it (`securefl.site`): its policy, key, consents
    and ledger, which outlive the run. Sites then get a proposal first, and may refuse it.
    remote: the same, where the sites are on machines of their own. What each has spent is then told
    as the most that it can have, from the rounds that were begun.

    `exchange` wraps what carries messages and `clients` replaces sites: the one seam through which
    tests and attacks put an active server or a malicious site. Raises ConfigurationError for what
    cannot be run, before anything is written, and RunFailedError for a run that cannot go on.
    Without `report` no report.html is drawn, which takes most of the time of a short run;
    `report.write_report` makes it at any time.
    """
    if experiment.data.path is not None:  # so that the run can be resumed from anywhere
        data = experiment.data.model_copy(update={"path": experiment.data.path.absolute()})
        experiment = experiment.model_copy(update={"data": data})
    parts = (progress or _Silent(), exchange, clients or {}, sites, remote, report)
    job = _Job(experiment, *parts)
    folder = _new_folder(experiment.name) if directory is None else Path(directory)
    with store.exclusive(folder):
        if (folder / EXPERIMENT).exists():
            raise ConfigurationError(f"{folder} holds a run already: resume it, or name another")
        if sites is not None:  # so that the run can be resumed from anywhere
            store.write(folder / SITES, str(sites.absolute()).encode())
        store.write(folder / EXPERIMENT, experiment.dump().encode())
        return job.go(folder, latest=directory is None)


def resume(
    directory: Path,
    *,
    progress: Progress | None = None,
    remote: Remote | None = None,
    report: bool = True,
) -> Run:
    """Continue the run in `directory` after its last finished round; a finished one is returned.

    The round that was interrupted counts as aborted: its number is not used again, and what sites
    were charged for it stays charged. `report` is as in `run`.
    """
    folder = Path(directory)
    if folder.is_symlink():  # runs/latest may point elsewhere before this run ends
        folder = folder.resolve()
    history = read_history(folder)
    if history.summary is not None:
        return Run(folder, history.summary)
    told = folder / SITES
    sites = Path(told.read_text(encoding="utf-8")) if told.exists() else None
    job = _Job(history.experiment, progress or _Silent(), None, {}, sites, remote, report)
    with store.exclusive(folder):
        return job.go(folder)


def check_remote(experiment: Experiment, sites: tuple[str, ...]) -> None:
    """ConfigurationError unless sites on machines of their own can run `experiment`."""
    if experiment.data.agreed is None or experiment.data.path is not None:
        raise ConfigurationError(
            'every site reads its own file here: say schema = "FILE" under [data], and no path'
        )
    if experiment.protocol.reveal == "sites":
        raise ConfigurationError(
            'protocol.reveal = "sites" is for simulations so far: with sites on machines of their '
            'own say "server"'
        )
    if experiment.sites.names is None or sorted(experiment.sites.names) != sorted(sites):
        raise ConfigurationError("sites.names must list the sites of the roster, and no other")


def _check_retention(experiment: Experiment, policed: bool) -> None:
    """ConfigurationError for a transcript without a last day where sites have policies (`policed`),
    or after that day."""
    told = experiment.transcript
    if told.recorded and told.keep_until is None and policed:
        raise ConfigurationError(
            "[transcript] keeps messages of sites with policies of their own: say until when, "
            "keep_until = YYYY-MM-DD"
        )
    if told.recorded and told.keep_until is not None and date.today() > told.keep_until:
        raise ConfigurationError(
            f"transcript.keep_until = {told.keep_until.isoformat()} is over: name a later day, or "
            "keep no transcript"
        )


class _Job:
    """One run of one experiment: what is fixed before the first round."""

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        wrap: Wrap | None,
        replaced: Mapping[str, Replace],
        sites: Path | None = None,
        remote: Remote | None = None,
        report: bool = True,
    ) -> None:
        self.experiment = experiment
        self.report = report
        self.progress = progress
        self.wrap = wrap
        self.replaced = replaced
        self.tampered = tuple(sorted(replaced))
        self.sites = sites
        self.remote = remote
        if remote is not None:
            check_remote(experiment, tuple(remote.roster))
        _check_retention(experiment, sites is not None or remote is not None)
        self.consortium = simulation.assemble(experiment)
        if sites is not None:
            simulation.check_folders(sites, self.consortium.sites)
            if experiment.data.agreed is not None and experiment.data.path is not None:
                raise ConfigurationError(
                    "data.path is whoever proposes the run's, and with --sites every site reads "
                    "the file that its own site.toml names: take path out of [data], and say "
                    'sites.names = ["...", ...]'
                )
        elif None in self.consortium.sites.values() and remote is None:
            raise ConfigurationError(
                "without data.path every site brings its own file: say where the sites' folders "
                "are, --sites FOLDER"
            )
        self.plan = self.consortium.plan
        self.rule = server_rule(experiment.aggregation)
        features = self.consortium.features
        parts = (features.shape, features.outputs, experiment.seed)
        self.module = models.build(experiment.model, *parts)
        self.layout = models.layout(self.module)
        self.first = first_state(self.module, self.rule)
        self.start: Known = self.first
        self._suffix = ".safetensors"
        if experiment.protocol.reveal == "sites":
            self.start = Replica.start(self.first).standing(experiment.digest())
            self._suffix = ".json"
        self.loss = models.loss(experiment.model, features.task)
        count = len(self.consortium.sites)
        self.preprocessor = agreement.preprocessor(experiment, count)
        self.tally = agreement.tally(experiment, count)
        self.releases = {r.name: r for r in agreement.releases(experiment, count, self.plan)}
        self.fitted: _Fitted | None = None
        if self.preprocessor is not None:
            self.fitted = _Fitted(self.preprocessor.start(), experiment.digest().hex())
        self.remarks: list[str] = []
        self.device = resolve_device(experiment.device)
        strangers = sorted(set(replaced) - set(self.consortium.sites))
        if strangers:
            raise ConfigurationError(f"clients replaces {strangers[0]}, which is not a site")
        if replaced and sites is not None:
            raise ConfigurationError("clients are replaced where there are no folders of sites")
        if replaced and experiment.engine.pooled:
            raise ConfigurationError(
                'clients are replaced in process only: set engine.workers = 0 and kind = "local"'
            )
        if experiment.engine.kind == "ray":
            ray.require()

    def go(self, folder: Path, latest: bool = False) -> Run:
        """Train to the end and write what a run directory holds.

        latest: whether runs/latest is to point there, from when the sites take part.
        """
        state, records = self._continue(folder)
        server_store = ServerStore(folder)
        session = os.urandom(16)
        self.progress.started(self.experiment.rounds, state.update)
        with self._engine(folder, session) as (roster, exchange):
            entered = self.progress.phase
            server = Server(self.experiment, roster, session, exchange, entered, self.plan)
            if self.sites is not None or self.remote is not None:
                self._propose(server, server_store.run(os.urandom))
            if latest:
                _point_latest_at(folder)
            self._fit(folder, server, server_store)
            stopped = self._why_stop(state)
            while stopped is None:
                self._evaluate(folder, server, server_store, state, records)
                last = records[-1].round if records else 0
                result = self._round(server, server_store, last, state)
                if result is None:
                    stopped = "privacy budget spent"
                else:
                    state = self._advance(folder, state, records, result)
                    stopped = self._why_stop(state)
            self._evaluate(folder, server, server_store, state, records, last=True)
        return self._finish(folder, state, records, server_store.last_round, stopped)

    def _propose(self, server: Server, run: bytes) -> None:
        """Ask the sites; RunFailedError where too few agree for any sum."""
        refusals = server.propose(run, self.layout.size)
        least = agreement.thresholds(self.experiment, len(self.consortium.sites)).minimum
        if len(self.consortium.sites) - len(refusals) < least:
            reasons = "; ".join(refusals.values())
            raise RunFailedError(f"too few sites take part: a sum needs {least}: {reasons}")

    def _fit(self, folder: Path, server: Server, numbers: ServerStore) -> None:
        """Fit preprocessing, stage by stage; each is on disk before the next one begins."""
        if self.preprocessor is None or self.fitted is None:
            return
        self.fitted = store.read(folder / PREPROCESSING, _Fitted) or self.fitted
        self._check_agreed(folder, self.fitted.agreed)
        for stage in range(self.fitted.stages, self.preprocessor.stages):
            before = self.fitted.values
            task = Task("fit", stage, before.to_bytes())
            length = self.preprocessor.dimension(stage)
            summed = self._summed(server, numbers, task, length)
            if summed is None:
                raise RunFailedError("too few sites have budget left for statistics")
            noise = self._noise(task, summed)
            values = self.preprocessor.fit(stage, before, summed.total, noise)
            self.fitted = self.fitted.after(values, summed)
            store.write(folder / PREPROCESSING, msgspec.json.encode(self.fitted))

    def _summed(
        self,
        server: Server,
        numbers: ServerStore,
        task: Task,
        length: int,
        model: GlobalState | None = None,
    ) -> Summed | None:
        return self._attempts(lambda: server.sum(numbers.begin(), task, length, model))

    def _noise(self, task: Task, summed: Summed) -> float:
        """The deviation of all noise in each integer of a sum."""
        release = self.releases.get(task.release)
        return release.event.deviation * len(summed.contributors) ** 0.5 if release else 0.0

    def _evaluate(
        self,
        folder: Path,
        server: Server,
        numbers: ServerStore,
        state: Known,
        records: Sequence[RoundRecord],
        *,
        last: bool = False,
    ) -> None:
        """Test figures from sums over the sites, where `state` is to have any and has none yet."""
        evaluation = self.experiment.evaluation
        if self.tally is None or evaluation is None or self.fitted is None or not records:
            return
        due = last or (evaluation.every is not None and state.update % evaluation.every == 0)
        if not due or any(item.update == state.update for item in _evaluations(folder)):
            return
        assert isinstance(state, GlobalState)  # noqa: S101 - Experiment holds this
        told = replace(state, weights=state.released)
        task = Task("evaluate", fitted=self.fitted.values.to_bytes())
        length = self.tally.dimension
        try:
            summed = self._summed(server, numbers, task, length, told)
        except RunFailedError as error:
            self.remarks.append(f"The model of update {state.update} has no test figures: {error}")
            return
        if summed is None:
            self.remarks.append(
                f"The model of update {state.update} has no test figures: too few sites have "
                "budget left for them."
            )
            return
        figures = self.tally.figures(summed.total, self._noise(task, summed))
        record = EvaluationRecord(
            update=state.update,
            round=summed.number,
            sites=summed.contributors,
            figures=figures,
            epsilon=self._most_tested(folder),
            bytes_up=sum(summed.traffic.bytes_up.values()),
            seconds=round(sum(summed.traffic.seconds.values()), 3),
        )
        store.append_line(folder / EVALUATIONS, record.to_json())
        metrics = {**records[-1].metrics, **figures.values}
        self.progress.finished(msgspec.structs.replace(records[-1], metrics=metrics))

    def _advance(
        self, folder: Path, state: Known, records: list[RoundRecord], result: Round
    ) -> Known:
        """Apply an aggregate (where the sites have not), evaluate, and make the round durable."""
        started = time.perf_counter()
        try:
            moved = self._moved(state, result.result)
        except DivergedError as error:
            raise RunFailedError(f"round {result.number}: {error}") from None
        result.traffic.seconds["update"] = time.perf_counter() - started
        record = self._record(folder, records, result, state, moved)
        self._save(folder, moved, record)
        records.append(record)
        self.progress.finished(record)
        return moved

    def _moved(self, state: Known, result: Aggregate | Standing) -> Known:
        if isinstance(result, Standing):
            return result
        if isinstance(state, Standing):
            raise ValueError("an aggregate, and no model to move by it")
        return apply(state, result.mean, self.rule, self.layout, self.experiment)

    def _model(self, folder: Path, state: Known) -> GlobalState:
        """The model itself. Where the sites hold it, from a site's copy: this plays all of them."""
        if isinstance(state, GlobalState):
            return state
        if state == self.start:
            return self.first
        for site in self.consortium.sites:
            models_ = SiteStore(folder / "sites" / site).models
            replica = replicas.read(models_, state, self.experiment.digest(), self.layout.size)
            if replica is not None:
                return replica.state
        raise store.CorruptStoreError(
            f"no site under {folder / 'sites'} holds the model of update {state.update}: restore "
            "the folder from a copy, or start a new run"
        )

    def _continue(self, folder: Path) -> tuple[Known, list[RoundRecord]]:
        """The last finished round's state and all finished rounds' records."""
        checkpoints = sorted((folder / "checkpoints").glob(f"update-*{self._suffix}"))
        if not checkpoints:
            if store.whole_lines(folder / METRICS):
                raise store.CorruptStoreError(
                    f"{folder / 'checkpoints'} is empty, but rounds were finished: restore it from "
                    "a copy, or start a new run"
                )
            return self.start, []
        state, saved = _read_checkpoint(checkpoints[-1])
        self._check_continues(folder, saved)
        self._check_fitted(folder, saved)
        # The checkpoint is what counts: lines after it are dropped, its own is added if missing.
        records = [
            record
            for record in (RoundRecord.from_json(x) for x in store.whole_lines(folder / METRICS))
            if record.update < state.update
        ]
        records.append(RoundRecord.from_json(saved.line))
        if len(records) != state.update:
            raise store.CorruptStoreError(
                f"{folder / METRICS} lacks {state.update - len(records)} of {state.update} "
                "finished rounds: restore the file from a copy"
            )
        lines = "".join(record.to_json() + "\n" for record in records)
        store.write(folder / METRICS, lines.encode())
        return state, records

    def _check_fitted(self, folder: Path, saved: _Saved) -> None:
        """Refuse to train on with other features than before."""
        fitted = store.read(folder / PREPROCESSING, _Fitted) or self.fitted
        if saved.fitted and fitted is not None and fitted.digest() != saved.fitted:
            raise store.CorruptStoreError(
                f"{folder / PREPROCESSING} is not what the rounds so far were trained with: "
                "restore it from a copy, or start a new run"
            )

    def _check_continues(self, folder: Path, saved: _Saved) -> None:
        """Refuse to go on where the outputs would claim what was not so in the rounds before."""
        self._check_agreed(folder, saved.agreed)
        for site, charged in saved.charged.items():
            if self.remote is None and SiteStore(folder / "sites" / site).charged < charged:
                raise store.CorruptStoreError(
                    f"{folder / 'sites' / site} was charged for {charged} rounds and no longer "
                    "says so: restore it from a copy"
                )
        self.tampered = tuple(sorted({*self.tampered, *saved.replaced}))

    def _check_agreed(self, folder: Path, agreed: str) -> None:
        """ConfigurationError unless `agreed` is the digest of this experiment."""
        if agreed != self.experiment.digest().hex():
            raise ConfigurationError(
                f"{folder / EXPERIMENT} was changed after the run began: put it back as it was, or "
                "start a new run"
            )

    @contextlib.contextmanager
    def _engine(self, folder: Path, session: bytes) -> Iterator[tuple[Roster, Exchange]]:
        names = tuple(self.consortium.sites)
        consent = frozenset(self.experiment.transcript.consent)

        def wrapped(exchange: Exchange, roster: Roster) -> Exchange:
            if consent:
                until = self.experiment.transcript.keep_until
                exchange = recorded(exchange, folder / TRANSCRIPT, consent, roster, until)
            return self.wrap(exchange) if self.wrap else exchange

        if self.remote is not None:
            yield self.remote.roster, wrapped(self.remote.exchange, self.remote.roster)
            return
        engine = self.experiment.engine
        if engine.pooled:
            parts = (self.experiment, names, session, folder / "sites", self.sites)
            with ray.Actors(*parts) if engine.kind == "ray" else Workers(*parts) as pool:
                yield pool.roster, wrapped(pool.exchange, pool.roster)
            return
        if self.sites is not None:
            gates = {
                name: simulation.gate(self.sites / name, table, folder / "sites" / name)
                for name, table in self.consortium.sites.items()
            }
            roster = Roster({name: gate.public_key for name, gate in gates.items()})
            try:
                asked = wrapped(lambda _, messages: inprocess.exchange(gates, messages), roster)
                yield roster, asked
            finally:
                for gate in gates.values():
                    gate.close()
            return
        identities = make_identities(names, os.urandom)
        honest = {
            name: simulation.client(
                self.experiment, records, identities[name], session, folder / "sites" / name
            )
            for name, records in self.consortium.sites.items()
            if records is not None
        }
        answering: dict[str, inprocess.Answering] = {
            name: self.replaced[name](client) if name in self.replaced else client
            for name, client in honest.items()
        }
        roster = identities[names[0]].roster
        try:
            asked = wrapped(lambda _, messages: inprocess.exchange(answering, messages), roster)
            yield roster, asked
        finally:
            for client in honest.values():
                client.close()

    def _why_stop(self, state: Known) -> str | None:
        if state.update >= self.experiment.rounds:
            return "round budget"
        stopping = self.experiment.stopping
        if stopping is not None and state.quiet >= stopping.patience:
            return "converged"
        return None

    def _round(self, server: Server, numbers: ServerStore, last: int, state: Known) -> Round | None:
        """The next round that succeeds; None when the sites' budgets are spent."""
        fitted = self.fitted.values.to_bytes() if self.fitted else b""
        return self._attempts(lambda: server.round(numbers.begin(after=last), state, fitted))

    def _attempts(self, work: Callable[[], _Done]) -> _Done | None:
        """What `work` gives, asked again after an abort; None when the sites' budgets are spent."""
        for attempt in range(MOST_ABORTS):
            try:
                return work()
            except BudgetsSpentError:
                return None
            except WorkerFailedError as error:
                raise RunFailedError(str(error)) from error
            except RoundAbortedError as error:
                if attempt == MOST_ABORTS - 1:
                    raise RunFailedError(
                        f"{MOST_ABORTS} rounds in a row were aborted, the last because: {error}"
                    ) from error
        raise AssertionError("unreachable")

    def _record(
        self,
        folder: Path,
        records: list[RoundRecord],
        result: Round,
        before: Known,
        after: Known,
    ) -> RoundRecord:
        model = self._model(folder, after)
        models.assign(self.module, model.released)
        past = records[-1].round if records else 0
        traffic = result.traffic
        out = {site: why for site, why in result.faults.items() if site in self.consortium.sites}
        survivors = tuple(site for site in self.consortium.sites if site in result.contributors)
        return RoundRecord(
            round=result.number,
            update=after.update,
            metrics=self._metrics(),
            epsilon=self._spent(folder),
            bytes_up=dict(traffic.bytes_up),
            bytes_down=dict(traffic.bytes_down),
            upload_bytes={site: traffic.upload_bytes[site] for site in survivors},
            # Milliseconds: finer times would tell of the secret batch that was trained on.
            seconds={phase: round(seconds, 3) for phase, seconds in traffic.seconds.items()},
            parameters=before.surviving,
            sparsity=model.sparsity,
            survivors=survivors,
            dropouts={site: why for site, why in out.items() if site not in survivors},
            aborted=tuple(sorted({*range(past + 1, result.number)} - self._besides(folder))),
            clip=self._clip(folder, before),
        )

    def _besides(self, folder: Path) -> set[int]:
        """The rounds that were finished for something else than training."""
        fitted = self.fitted.rounds if self.fitted else ()
        return {*fitted, *(item.round for item in _evaluations(folder))}

    def _clip(self, folder: Path, before: Known) -> float | None:
        """The clip of a round on `before`, where it is adaptive."""
        privacy = self.experiment.privacy
        if privacy is None or privacy.clip_quantile is None:
            return None
        return privacy.clip * self._model(folder, before).clip_scale

    def _metrics(self) -> dict[str, float]:
        """The test figures, and the mean of the accuracy over sites that a column tells apart."""
        test, sites = self.consortium.test, self.experiment.sites
        if test is None:
            return {}
        metrics = evaluate(self.module, self.loss, test, self.device)
        held = test.groups.get(sites.column or "") if sites.partition == "column" else None
        if held is not None and test.classes:
            each = [
                evaluate(self.module, self.loss, test.take(held == site), self.device)
                for site in np.unique(held)
            ]
            metrics[MEAN_ACCURACY] = float(np.mean([figures["test_accuracy"] for figures in each]))
        return metrics

    def _charged(self, folder: Path) -> dict[str, int]:
        """How many rounds each site was charged for, from its own durable count.

        Where sites are on machines of their own: the most that an honest one can have been.
        """
        if self.plan is None:
            return {}
        sites = self.consortium.sites
        if self.remote is not None:
            begun = ServerStore(folder).last_round - len(self._besides(folder))
            return dict.fromkeys(sites, min(begun, self._most_rounds))
        return {site: SiteStore(folder / "sites" / site).charged for site in sites}

    def _spent(self, folder: Path) -> dict[str, float]:
        """Epsilon that each site has spent on any record."""
        plan = self.plan
        if plan is None:
            return {}
        return {
            site: max(plan.spent(count), self._tested(folder, site, plan))
            for site, count in self._charged(folder).items()
        }

    def _tested(self, folder: Path, site: str, plan: Plan) -> float:
        """Epsilon that test figures cost a site's test records, which no training reads."""
        counted = [
            accounting.Repeated(release.event, self._released(folder, site, release))
            for release in self.releases.values()
            if release.held_out
        ]
        return accounting.epsilon(counted, plan.delta)

    def _released(self, folder: Path, site: str, release: Release) -> int:
        """How often a site was charged for test figures; see `_charged`."""
        if self.remote is None:
            return SiteStore(folder / "sites" / site).released(release.name)
        finished = len(_evaluations(folder))
        aborted = (
            ServerStore(folder).last_round - len(self._besides(folder)) - self._updates(folder)
        )
        return min(release.times, finished + aborted)

    def _updates(self, folder: Path) -> int:
        """How many rounds of training are on disk."""
        return len(store.whole_lines(folder / METRICS))

    @property
    def _most_rounds(self) -> int:
        """Of training, that a site agreed to: spare ones included."""
        privacy = self.experiment.privacy
        return self.experiment.rounds + (privacy.spare_rounds if privacy else 0)

    def _most_tested(self, folder: Path) -> float | None:
        """The same at the site that spent most; None where nothing protects test records."""
        plan = self.plan
        if plan is None or not any(release.held_out for release in self.releases.values()):
            return None
        return max(self._tested(folder, site, plan) for site in self.consortium.sites)

    def _spent_publicly(self, folder: Path) -> float | None:
        """Epsilon against whoever sees only the models, where noise is distributed."""
        if self.plan is None or isinstance(self.plan, RecordLocal):
            return None
        return self.plan.spent(max(self._charged(folder).values()), Observer.PUBLIC)

    def _save(self, folder: Path, state: Known, record: RoundRecord) -> None:
        """Make a round durable: first the checkpoint, which is what a resumed run starts from."""
        checkpoints, line = folder / "checkpoints", record.to_json()
        agreed, charged = self.experiment.digest().hex(), self._charged(folder)
        standing = state if isinstance(state, Standing) else None
        fitted = self.fitted.digest() if self.fitted else ""
        saved = msgspec.json.encode(_Saved(line, agreed, charged, self.tampered, fitted, standing))
        data = saved if isinstance(state, Standing) else state.to_checkpoint(saved.decode())
        store.write(checkpoints / f"update-{state.update:06d}{self._suffix}", data)
        store.append_line(folder / METRICS, line)
        for old in sorted(checkpoints.glob(f"update-*{self._suffix}"))[:-2]:
            old.unlink()

    def _finish(
        self,
        folder: Path,
        known: Known,
        records: list[RoundRecord],
        last_round: int,
        stopped: str,
    ) -> Run:
        if not records:
            raise RunFailedError(f"no round was finished: {stopped}")
        state = self._model(folder, known)
        summary = self._summary(folder, state, records, last_round, stopped)
        self._write_model(folder, state)
        store.write(folder / SUMMARY, msgspec.json.format(summary.to_json()).encode() + b"\n")
        if self.report:
            from securefl.report import write_report

            write_report(folder)
        return Run(folder, summary)

    def _write_model(self, folder: Path, state: GlobalState) -> None:
        tensors = {
            name: state.released[part].reshape(shape)
            for name, shape, part in zip(
                self.layout.names, self.layout.shapes, self.layout.slices(), strict=True
            )
        }
        features = self.consortium.features
        about = {
            "version": 1,
            "model": self.experiment.model.model_dump(mode="json"),
            "shape": list(features.shape),
            "outputs": features.outputs,
            "task": features.task,
            "features": list(features.names),
            "classes": list(features.classes),
            "scaling": self.experiment.data.model_dump(
                mode="json", include={"ranges", "default_range", "target_range"}
            ),
            **self._preprocessed(),
            "update": state.update,
            "sparsity": state.sparsity,
            "private": self._why_not_private() is None,
        }
        store.write(folder / "model.safetensors", save_tensors(tensors))
        store.write(folder / MODEL, json.dumps(about, indent=2).encode() + b"\n")

    def _preprocessed(self) -> dict[str, Any]:
        """What makes features of a new file's columns: it travels with the model."""
        schema, preprocessing = self.experiment.data.agreed, self.experiment.preprocessing
        evaluation = self.experiment.evaluation
        if schema is None or preprocessing is None:
            return {}
        assert self.preprocessor is not None and self.fitted is not None  # noqa: S101, PT018
        return {
            "schema": schema.model_dump(mode="json", exclude_none=True),
            "drop": list(self.experiment.data.drop),
            "preprocessing": preprocessing.model_dump(mode="json", exclude_none=True),
            "fitted": msgspec.to_builtins(self.fitted.values),
            "threshold": evaluation.threshold if evaluation else 0.5,
            "inputs": dict(self.preprocessor.described(self.fitted.values)),
        }

    def _summary(
        self,
        folder: Path,
        state: GlobalState,
        records: list[RoundRecord],
        last_round: int,
        stopped: str,
    ) -> Summary:
        last = records[-1]
        dense = [r for r in records if r.parameters == len(state.weights)][-1]
        finished = {record.round for record in records} | self._besides(folder)
        seconds: dict[str, float] = defaultdict(float)
        for record in records:
            for phase, spent in record.seconds.items():
                seconds[phase] += spent
        plan, experiment = self.plan, self.experiment
        why_not = self._why_not_private()
        tested = _evaluations(folder)
        final = tested[-1].figures if tested and tested[-1].update == state.update else None
        seconds["evaluate"] += sum(item.seconds for item in tested)
        seconds["fit"] += self.fitted.seconds if self.fitted else 0.0
        besides = sum(item.bytes_up for item in tested)
        besides += self.fitted.bytes_up if self.fitted else 0
        return Summary(
            name=experiment.name,
            protocol=experiment.protocol.name,
            rounds=len(records),
            sites=tuple(self.consortium.sites),
            parameters=len(state.weights),
            sparsity=state.sparsity,
            metric={**last.metrics, **(final.values if final else {})},
            private=why_not is None,
            why_not_private=why_not,
            epsilon=self._spent(folder),
            epsilon_public=self._spent_publicly(folder),
            delta=plan.delta if plan else None,
            adjacency=plan.adjacency if plan else None,
            accountant=plan.cost(max(self._charged(folder).values())).accountant if plan else None,
            bytes_up_per_parameter=float(np.mean(list(dense.upload_bytes.values())))
            / dense.parameters,
            bytes_up_last_round=sum(last.bytes_up.values()),
            bytes_up_total=besides + sum(sum(record.bytes_up.values()) for record in records),
            seconds={phase: spent for phase, spent in seconds.items() if spent},
            dropouts={str(r.round): r.dropouts for r in records if r.dropouts},
            aborted_rounds=tuple(n for n in range(1, last_round + 1) if n not in finished),
            stopped=stopped,
            outside_guarantee=self._outside_guarantee(),
            version=importlib.metadata.version("securefl"),
            intervals=dict(final.intervals) if final else {},
            trained_on=self.fitted.values.rows if self.fitted and self.fitted.stages else None,
            counted="people" if protected_by(experiment) else "records",
            canaries=experiment.audit.canaries,
        )

    def _why_not_private(self) -> str | None:
        """Why nothing is promised; None when the plan held at every site."""
        reasons = []
        if self.plan is None:
            reasons.append("no privacy plan: the experiment has no [privacy] section")
        if self.experiment.not_private_seed is not None:
            reasons.append("not_private_seed makes sampling and noise predictable; it is for tests")
        if self.tampered:
            reasons.append(f"run(clients=...) replaced {', '.join(self.tampered)}")
        return "; ".join(reasons) or None

    def _outside_guarantee(self) -> tuple[str, ...]:
        """What was read from records outside the plan, in sentences for the report."""
        experiment, test = self.experiment, self.consortium.test
        data = experiment.data
        sentences = list(self.remarks)
        if test is not None:
            sentences.append(
                f"{len(test)} held-out test records were read in clear after every "
                "round to compute the test figures; they are not protected by the plan."
            )
        sentences += self._exactly_released()
        together = self.sites is None and self.remote is None
        if self.tally is not None and self.plan is not None and together:
            sentences.append(
                "Every site's own test figures carry no noise: they are in its folder under sites, "
                "for its own people. Leave that folder out of what is passed on."
            )
        if self.remote is not None:
            pass  # no program read more than one site's records
        elif data.agreed is not None and experiment.sites.partition == "file":
            sentences.append("This is a simulation: one program read the files of all sites.")
        elif data.agreed is not None and data.path is None:
            sentences.append("This is a simulation: one program read the folders of all sites.")
        else:
            held = " and held out the test records" if test is not None else ""
            sentences.append(
                f"This is a simulation: one program divided the records among the sites{held}, and "
                "read all of them to do so."
            )
        if test is not None and data.source == "table" and test.classes and data.classes is None:
            sentences.append("The names of the classes were read from the records.")
        foreign = [
            f"{key} = {value!r}"
            for key, value in (
                ("model.name", experiment.model.name),
                ("model.loss", experiment.model.loss),
                ("training.optimiser", experiment.training.optimiser),
            )
            if ":" in value
        ]
        if foreign:
            sentences.append(
                f"The guarantee rests on {' and '.join(foreign)} treating every record by itself "
                "and keeping none; a trial found nothing against it, which is no proof."
            )
        return tuple(sentences)

    def _exactly_released(self) -> list[str]:
        """What sums over the sites were opened without noise, in sentences for the report."""
        evaluation, sentences = self.experiment.evaluation, []
        if self.preprocessor is not None and self.preprocessor.stages and self.plan is None:
            sentences.append(
                "Exact statistics over all sites' training records were revealed, for "
                f"preprocessing: {self.preprocessor.revealed}."
            )
        if evaluation is not None and (self.plan is None or not evaluation.protected):
            sentences.append(
                "Exact counts over all sites' test records were revealed, for the test figures"
                + ("." if self.plan is None else "; they are not protected by the plan.")
            )
        return sentences


def _evaluations(folder: Path) -> list[EvaluationRecord]:
    """Every evaluation at the sites so far, oldest first."""
    path = folder / EVALUATIONS
    return [
        EvaluationRecord.from_json(line, f"{path} line {number}")
        for number, line in enumerate(store.whole_lines(path), start=1)
    ]


def _read_checkpoint(path: Path) -> tuple[Known, _Saved]:
    """What a checkpoint holds; CorruptStoreError when it is damaged."""
    state: Known | None = None
    try:
        if path.suffix == ".json":
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
            state = saved.standing
        else:
            state, told = GlobalState.from_checkpoint(path)
            saved = msgspec.json.decode(told, type=_Saved)
    except (OSError, msgspec.MsgspecError) as error:
        raise store.CorruptStoreError(f"{path} is damaged: {error}") from None
    if state is None:
        raise store.CorruptStoreError(f"{path} is damaged: it does not say what the sites hold")
    return state, saved


def _new_folder(name: str) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs", f"{name}-{stamp}")
    for again in range(2, 1000):
        if not folder.exists():
            break
        folder = Path("runs", f"{name}-{stamp}-{again}")
    return folder


def _point_latest_at(folder: Path) -> None:
    """runs/latest points at the newest run; replaced in one step."""
    link = folder.parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")
