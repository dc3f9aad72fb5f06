"""A whole run: from an experiment to a run directory, and on from one that was interrupted."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, final

import msgspec
import numpy as np
from safetensors.numpy import save as save_tensors

from protocols.encoding import Aggregate
from protocols.errors import RoundAbortedError
from protocols.identity import Roster
from protocols.rounds import make_identities
from securefl import agreement, models, replicas, simulation, store
from securefl.algorithms import server_rule
from securefl.client import Client, resolve_device
from securefl.config import ConfigurationError, Experiment
from securefl.engines import Exchange, inprocess
from securefl.engines.workers import WorkerFailedError, Workers
from securefl.evaluation import evaluate
from securefl.privacy.plan import Observer, RecordLocal
from securefl.records import (
    EXPERIMENT,
    METRICS,
    SITES,
    SUMMARY,
    RoundRecord,
    Summary,
    read_history,
)
from securefl.replicas import Replica, Standing
from securefl.server import BudgetsSpentError, Round, Server
from securefl.state import DivergedError, GlobalState, apply, first_state
from securefl.store import ServerStore, SiteStore
from securefl.transcript import recorded

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
    standing: Standing | None = None
    """What is known of the model where the sites hold it, and no checkpoint does."""


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
    exchange: Wrap | None = None,
    clients: Mapping[str, Replace] | None = None,
    report: bool = True,
) -> Run:
    """Run `experiment` into `directory`, by default runs/NAME-YYYYMMDD-HHMMSS.

    sites: a folder with one of each site's own in it (`securefl.site`): its policy, key, consents
    and ledger, which outlive the run. Sites then get a proposal first, and may refuse it.

    `exchange` wraps what carries messages and `clients` replaces sites: the one seam through which
    tests and attacks put an active server or a malicious site. Raises ConfigurationError for what
    cannot be run, before anything is written, and RunFailedError for a run that cannot go on.
    Without `report` no report.html is drawn, which takes most of the time of a short run;
    `report.write_report` makes it at any time.
    """
    if experiment.data.path is not None:  # so that the run can be resumed from anywhere
        data = experiment.data.model_copy(update={"path": experiment.data.path.absolute()})
        experiment = experiment.model_copy(update={"data": data})
    job = _Job(experiment, progress or _Silent(), exchange, clients or {}, sites, report)
    folder = _new_folder(experiment.name) if directory is None else Path(directory)
    with store.exclusive(folder):
        if (folder / EXPERIMENT).exists():
            raise ConfigurationError(f"{folder} holds a run already: resume it, or name another")
        if sites is not None:  # so that the run can be resumed from anywhere
            store.write(folder / SITES, str(sites.absolute()).encode())
        store.write(folder / EXPERIMENT, experiment.dump().encode())
        if directory is None:
            _point_latest_at(folder)
        return job.go(folder)


def resume(directory: Path, *, progress: Progress | None = None) -> Run:
    """Continue the run in `directory` after its last finished round; a finished one is returned.

    The round that was interrupted counts as aborted: its number is not used again, and what sites
    were charged for it stays charged.
    """
    folder = Path(directory)
    if folder.is_symlink():  # runs/latest may point elsewhere before this run ends
        folder = folder.resolve()
    history = read_history(folder)
    if history.summary is not None:
        return Run(folder, history.summary)
    told = folder / SITES
    sites = Path(told.read_text(encoding="utf-8")) if told.exists() else None
    job = _Job(history.experiment, progress or _Silent(), None, {}, sites)
    with store.exclusive(folder):
        return job.go(folder)


class _Job:
    """One run of one experiment: what is fixed before the first round."""

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        wrap: Wrap | None,
        replaced: Mapping[str, Replace],
        sites: Path | None = None,
        report: bool = True,
    ) -> None:
        self.experiment = experiment
        self.report = report
        self.progress = progress
        self.wrap = wrap
        self.replaced = replaced
        self.tampered = tuple(sorted(replaced))
        self.sites = sites
        self.consortium = simulation.assemble(experiment)
        if sites is not None:
            simulation.check_folders(sites, self.consortium.sites)
        self.plan = self.consortium.plan
        self.rule = server_rule(experiment.aggregation)
        test = self.consortium.test
        self.module = models.build(experiment.model, test.shape, test.outputs, experiment.seed)
        self.layout = models.layout(self.module)
        self.first = first_state(self.module, self.rule)
        self.start: Known = self.first
        self._suffix = ".safetensors"
        if experiment.protocol.reveal == "sites":
            self.start = Replica.start(self.first).standing(experiment.digest())
            self._suffix = ".json"
        self.loss = models.loss(experiment.model, test.task)
        self.device = resolve_device(experiment.device)
        strangers = sorted(set(replaced) - set(self.consortium.sites))
        if strangers:
            raise ConfigurationError(f"clients replaces {strangers[0]}, which is not a site")
        if replaced and sites is not None:
            raise ConfigurationError("clients are replaced where there are no folders of sites")
        if replaced and experiment.engine.workers:
            raise ConfigurationError("clients are replaced in process only: set engine.workers = 0")

    def go(self, folder: Path) -> Run:
        """Train to the end and write what a run directory holds."""
        state, records = self._continue(folder)
        server_store = ServerStore(folder)
        session = os.urandom(16)
        self.progress.started(self.experiment.rounds, state.update)
        with self._engine(folder, session) as (roster, exchange):
            entered = self.progress.phase
            server = Server(self.experiment, roster, session, exchange, entered, self.plan)
            if self.sites is not None:
                self._propose(server, server_store.run(os.urandom))
            stopped = self._why_stop(state)
            while stopped is None:
                last = records[-1].round if records else 0
                result = self._round(server, server_store, last, state)
                if result is None:
                    stopped = "privacy budget spent"
                else:
                    state = self._advance(folder, state, records, result)
                    stopped = self._why_stop(state)
        return self._finish(folder, state, records, server_store.last_round, stopped)

    def _propose(self, server: Server, run: bytes) -> None:
        """Ask the sites; RunFailedError where too few agree for any sum."""
        refusals = server.propose(run, self.layout.size)
        least = agreement.thresholds(self.experiment, len(self.consortium.sites)).minimum
        if len(self.consortium.sites) - len(refusals) < least:
            reasons = "; ".join(refusals.values())
            raise RunFailedError(f"too few sites take part: a sum needs {least}: {reasons}")

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

    def _check_continues(self, folder: Path, saved: _Saved) -> None:
        """Refuse to go on where the outputs would claim what was not so in the rounds before."""
        if saved.agreed != self.experiment.digest().hex():
            raise ConfigurationError(
                f"{folder / EXPERIMENT} was changed after the run began: put it back as it was, or "
                "start a new run"
            )
        for site, charged in saved.charged.items():
            if SiteStore(folder / "sites" / site).charged < charged:
                raise store.CorruptStoreError(
                    f"{folder / 'sites' / site} was charged for {charged} rounds and no longer "
                    "says so: restore it from a copy"
                )
        self.tampered = tuple(sorted({*self.tampered, *saved.replaced}))

    @contextlib.contextmanager
    def _engine(self, folder: Path, session: bytes) -> Iterator[tuple[Roster, Exchange]]:
        names = tuple(self.consortium.sites)
        consent = frozenset(self.experiment.transcript.consent)

        def wrapped(exchange: Exchange) -> Exchange:
            if consent:
                exchange = recorded(exchange, folder / "transcript", consent)
            return self.wrap(exchange) if self.wrap else exchange

        if self.experiment.engine.workers:
            parts = (self.experiment, names, session, folder / "sites", self.sites)
            with Workers(*parts) as workers:
                yield workers.roster, wrapped(workers.exchange)
            return
        if self.sites is not None:
            gates = {
                name: simulation.gate(self.sites / name, table, folder / "sites" / name)
                for name, table in self.consortium.sites.items()
            }
            roster = Roster({name: gate.public_key for name, gate in gates.items()})
            try:
                yield roster, wrapped(lambda _, messages: inprocess.exchange(gates, messages))
            finally:
                for gate in gates.values():
                    gate.close()
            return
        identities = make_identities(names, os.urandom)
        honest = {
            name: simulation.client(
                self.experiment, table, identities[name], session, folder / "sites" / name
            )
            for name, table in self.consortium.sites.items()
        }
        answering: dict[str, inprocess.Answering] = {
            name: self.replaced[name](client) if name in self.replaced else client
            for name, client in honest.items()
        }
        roster = identities[names[0]].roster
        try:
            yield roster, wrapped(lambda phase, messages: inprocess.exchange(answering, messages))
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
        for attempt in range(MOST_ABORTS):
            try:
                return server.round(numbers.begin(after=last), state)
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
            aborted=tuple(range(past + 1, result.number)),
            clip=self._clip(folder, before),
        )

    def _clip(self, folder: Path, before: Known) -> float | None:
        """The clip of a round on `before`, where it is adaptive."""
        privacy = self.experiment.privacy
        if privacy is None or privacy.clip_quantile is None:
            return None
        return privacy.clip * self._model(folder, before).clip_scale

    def _metrics(self) -> dict[str, float]:
        """The test figures, and the mean of the accuracy over sites that a column tells apart."""
        test, sites = self.consortium.test, self.experiment.sites
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
        """How many rounds each site was charged for, from its own durable count."""
        if self.plan is None:
            return {}
        sites = self.consortium.sites
        return {site: SiteStore(folder / "sites" / site).charged for site in sites}

    def _spent(self, folder: Path) -> dict[str, float]:
        """Epsilon that each site has spent."""
        if self.plan is None:
            return {}
        return {site: self.plan.spent(count) for site, count in self._charged(folder).items()}

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
        saved = msgspec.json.encode(_Saved(line, agreed, charged, self.tampered, standing))
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
        test = self.consortium.test
        about = {
            "version": 1,
            "model": self.experiment.model.model_dump(mode="json"),
            "shape": list(test.shape),
            "outputs": test.outputs,
            "task": test.task,
            "features": list(test.names),
            "classes": list(test.classes),
            "scaling": self.experiment.data.model_dump(
                mode="json", include={"ranges", "default_range", "target_range"}
            ),
            "update": state.update,
            "sparsity": state.sparsity,
            "private": self._why_not_private() is None,
        }
        store.write(folder / "model.safetensors", save_tensors(tensors))
        store.write(folder / "model.json", json.dumps(about, indent=2).encode() + b"\n")

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
        finished = {record.round for record in records}
        seconds: Counter[str] = Counter()
        for record in records:
            seconds.update(record.seconds)
        plan, experiment = self.plan, self.experiment
        why_not = self._why_not_private()
        return Summary(
            name=experiment.name,
            protocol=experiment.protocol.name,
            rounds=len(records),
            sites=tuple(self.consortium.sites),
            parameters=len(state.weights),
            sparsity=state.sparsity,
            metric=last.metrics,
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
            bytes_up_total=sum(sum(record.bytes_up.values()) for record in records),
            seconds=dict(seconds),
            dropouts={str(r.round): r.dropouts for r in records if r.dropouts},
            aborted_rounds=tuple(n for n in range(1, last_round + 1) if n not in finished),
            stopped=stopped,
            outside_guarantee=self._outside_guarantee(),
            version=importlib.metadata.version("securefl"),
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
        data, test = self.experiment.data, self.consortium.test
        sentences = []
        sentences.append(
            f"{len(test)} held-out test records were read in clear after every "
            "round to compute the test figures; they are not protected by the plan."
        )
        sentences.append(
            "This is a simulation: one program divided the records among the sites and held out "
            "the test records, and read all of them to do so."
        )
        if data.source == "table" and test.task == "classification" and data.classes is None:
            sentences.append("The names of the classes were read from the records.")
        experiment = self.experiment
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
