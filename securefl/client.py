"""One site: checks what it is asked, trains, encodes, and answers each phase of a round."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.catalogue import OPEN, PROTOCOLS, UPLOAD
from protocols.encoding import Integers
from protocols.errors import ProtocolError, RefusedError
from protocols.identity import Identity, digest
from protocols.keystream import Keystream, Randomness, Seed
from protocols.masked_bfv import Revealed
from protocols.noise import DiscreteGaussian
from protocols.rounds import Expected
from securefl import agreement, canaries, config, evaluation, models
from securefl.algorithms import server_rule
from securefl.config import ConfigurationError, Experiment
from securefl.data import Frame, Records, Table, held_out
from securefl.data.frames import shares
from securefl.messages import TRAIN, Answer, Refusal, Request, Task, printable
from securefl.preprocessing import Fitted
from securefl.privacy import clipping
from securefl.privacy.ledger import Account, BudgetSpentError, Holding, SignedHead
from securefl.privacy.rotation import Rotation
from securefl.privacy.training import Trainer
from securefl.replicas import PHASES as REPLICA_PHASES
from securefl.replicas import Replica, Replicas, Standing
from securefl.state import DivergedError, GlobalState, apply, first_state
from securefl.store import SiteStore
from securefl.transcript import Drawing, Recorder

FARTHEST: Final = 1e7
"""How far from 0 a feature may be; from sums it is at most 2e6 (`LEAST_DEVIATION` of a range)."""


@dataclass(slots=True)
class _Round:
    """A round this site is in: where its protocol stands, and what it already said.

    model: what is trained or evaluated; None where preprocessing is fitted. randomness: of what the
    site contributes.
    """

    number: int
    task: Task
    model: GlobalState | None
    base: Standing | None
    rotation: Rotation | None
    protocol_state: Any
    randomness: Randomness
    said: dict[str, tuple[bytes, Answer]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Records as features, by what preprocessing was fitted to."""

    fitted: bytes
    trainer: Trainer
    test: Table | None


class Client:
    """The process that acts for one site. Its records leave it only through `answer`.

    holding: the data set's place in the site's ledger, which every round under a plan is charged to
    as well. Raises ConfigurationError when its own records do not fit the experiment.
    """

    def __init__(
        self,
        experiment: Experiment,
        identity: Identity,
        session: bytes,
        records: Records,
        store: SiteStore,
        holding: Holding | None = None,
    ) -> None:
        name, sites = identity.name, len(identity.roster)
        self._preprocessor = agreement.preprocessor(experiment, sites)
        self._tally = agreement.tally(experiment, sites)
        self._test: Frame | None = None
        if isinstance(records, Frame):
            records, self._test = held_out(records, experiment)
        check_records(name, records, experiment)
        self._records = records
        self._experiment = experiment
        self._identity = identity
        self._session = session
        self._store = store
        self._holding = holding
        self._protocol = PROTOCOLS[experiment.protocol.name]
        self._thresholds = agreement.thresholds(experiment, sites)
        self._weight = _weight(name, records, experiment)
        features = records if isinstance(records, Table) else self._preprocessor
        assert features is not None  # noqa: S101 - frames come with a schema
        self._module = models.build(
            experiment.model, features.shape, features.outputs, experiment.seed
        )
        self._layout = models.layout(self._module)
        self._size = self._layout.size
        self._plan = agreement.plan(experiment, sites, self._size)
        self._releases = {r.name: r for r in agreement.releases(experiment, sites, self._plan)}
        self._encoding = agreement.encoding(experiment, sites, self._plan)
        self._rule = server_rule(experiment.aggregation)
        start = Replica.start(first_state(self._module, self._rule))
        self._loss = models.loss(experiment.model, records.task)
        self._device = resolve_device(experiment.device)
        self._prepared: _Prepared | None = None
        self._round: _Round | None = None
        self._turn = threading.Lock()  # an engine may ask twice at once
        promise = digest("promise", experiment.digest(), repr(self._plan).encode())
        store.bind(promise.hex())
        self._coins = self._tossed()
        self._recorder: Recorder | None = None
        if name in experiment.transcript.own:
            self._recorder = Recorder(store.private, experiment.transcript.keep_until)
        if isinstance(records, Table):
            self._prepared = _Prepared(b"", self._made(records, self._loss), None)
        self._account: Account | None = None
        privacy = experiment.privacy
        if holding is not None and privacy is not None and self._plan is not None:
            holding.ledger.observe(holding.dataset, self._identifying(protected_by(experiment)))
            self._account = holding.ledger.open(
                holding.dataset,
                holding.run,
                experiment=experiment.name,
                promise=promise,
                unit=self._plan.unit,
                per_round=self._plan.per_round,
                rounds=experiment.rounds + privacy.spare_rounds,
                epsilon=self._plan.epsilon,
                releases=tuple(self._releases.values()),
            )
        self._replicas: Replicas | None = None
        if experiment.protocol.reveal == "sites":
            agreed, quorum = experiment.digest(), agreement.quorum(experiment, sites)
            self._replicas = Replicas(store.models, identity, session, agreed, quorum, start)

    def close(self) -> None:
        """Let go of the site's durable state, and of its ledger."""
        self._store.close()
        if self._holding is not None:
            self._holding.ledger.close()

    @property
    def name(self) -> str:
        """The site this client acts for."""
        return self._identity.name

    def _tossed(self) -> NDArray[np.bool_] | None:
        """The coins of this site's canaries; None where the run has none."""
        count, seed = self._experiment.audit.canaries, self._experiment.not_private_seed
        if not count:
            return None
        drawn: Randomness = os.urandom
        if seed is not None:
            drawn = agreement.reproducible_randomness(seed, self.name, "canaries")
        return canaries.toss(self._store.private, count, drawn)

    def _made(self, table: Table, loss: models.Loss) -> Trainer:
        """What trains on `table`, and on this site's canaries: they are in nothing else."""
        experiment, person = self._experiment, protected_by(self._experiment)
        if self._coins is not None:
            table = canaries.join(table, experiment, self.name, self._coins)
        parts = (table, experiment.training, self._plan, self._device, person)
        # Its own copy: what makes per-sample gradients is put into a network once.
        return Trainer(copy.deepcopy(self._module), loss, *parts)

    def _identifying(self, person: str | None) -> Iterator[bytes]:
        """What tells one record from another, or one person; test rows too."""
        if isinstance(self._records, Table):
            yield from _identifying(self._records, person)
            return
        for part in (self._records, self._test):
            yield from part.identities(person) if part is not None else ()

    def _prepare(self, fitted: bytes) -> _Prepared:
        """The records as features; made anew where preprocessing was fitted to something else."""
        if self._prepared is not None and self._prepared.fitted == fitted:
            return self._prepared
        if self._preprocessor is None or not isinstance(self._records, Frame):
            raise RefusedError("the server sends fitted values, and records come as features")
        try:
            told = Fitted.from_bytes(fitted)
            table = self._preprocessor.apply(told, self._records)
        except ValueError as error:
            raise RefusedError(f"the fitted values do not fit the schema: {error}") from None
        test = self._preprocessor.apply(told, self._test) if self._test is not None else None
        loss = models.weighted(self._loss, told.weights)
        self._prepared = None  # its features must not lie beside the new ones
        self._prepared = _Prepared(fitted, self._made(table, loss), test)
        return self._prepared

    def answer(self, data: bytes) -> bytes:
        """The reply to one request from the server, or a Refusal that says why there is none.

        The same request again gets the same reply; another request for a phase that was answered
        is refused, so that a noised vector enters one upload only.
        """
        try:
            with self._turn:
                return self._answer(Request.from_bytes(data), data).to_bytes()
        except BudgetSpentError as error:
            return Refusal("budget", printable(str(error))).to_bytes()
        except ProtocolError as error:
            return Refusal("request", printable(str(error))).to_bytes()

    def _answer(self, request: Request, data: bytes) -> Answer:
        if request.session != self._session:
            raise RefusedError("the request belongs to another session")
        if self._replicas is not None and request.phase in REPLICA_PHASES:
            # These open, sign and charge nothing of a round: asked again they may answer anew.
            return Answer(
                self._replicas.answer(request.phase, request.round, request.body, os.urandom)
            )
        if self._round is None or request.round > self._round.number:
            self._round = self._enter(request)
        current = self._round
        if request.round < current.number:
            raise RefusedError(f"round {request.round} is over: round numbers only grow")
        asked = hashlib.sha256(data).digest()
        if request.phase in current.said:
            before, answer = current.said[request.phase]
            if asked != before:
                raise RefusedError(f"phase {request.phase} was answered to another request")
            return answer
        slots = self._contribute(current) if request.phase == UPLOAD else None
        state = current.protocol_state
        if request.phase == OPEN and isinstance(state, self._protocol.accepts.get(OPEN, ())):
            current.protocol_state = None  # whatever comes of it, nothing is opened again
        # Who does not record itself holds nothing of what it drew.
        drawing = Drawing(os.urandom) if self._recorder is not None else None
        parts = list[NDArray[np.uint64]]()
        if slots is not None and drawing is not None:
            slots = _kept(slots, parts)
        current.protocol_state, reply = self._protocol.step(
            request.phase, state, request.body, slots, drawing or os.urandom
        )
        self._store.enter(current.number)  # before anything that was said in it leaves
        if self._recorder is not None and drawing is not None:
            self._recorder.drew(current.number, request.phase, drawing.data)
            if parts and current.task.kind == "train" and current.model is not None:
                update, model = current.model.update, current.model.to_message()
                self._recorder.contributed(current.number, update, parts, model)
        if isinstance(current.protocol_state, Revealed):
            self._move(current, current.protocol_state)
            current.protocol_state = None
        head = None
        if self._account is not None and request.phase == UPLOAD:
            head = self._account.ledger.head.signed(self._identity.key)
        answer = Answer(reply, head)
        current.said[request.phase] = (asked, answer)
        return answer

    def _move(self, current: _Round, revealed: Revealed) -> None:
        """Apply the aggregate that this site opened; the new copy is durable on return."""
        if self._replicas is None or current.base is None or current.model is None:
            raise ValueError("an aggregate to keep, and no copy of the model to move by it")
        mean = revealed.aggregate.mean
        if current.rotation is not None:
            mean = current.rotation.restore(mean)
        try:
            moved = apply(current.model, mean, self._rule, self._layout, self._experiment)
        except DivergedError as error:
            raise RefusedError(f"{self.name}: {error}") from None
        self._replicas.advance(current.base, Replica(moved, revealed.salt))

    def _enter(self, request: Request) -> _Round:
        if request.round <= self._store.last_round:
            raise RefusedError(f"round {request.round} was entered before: take a new number")
        self._keep(request.heads)
        task, base, model = request.task, None, None
        if task.kind == "fit" and request.model:
            raise RefusedError("preprocessing is fitted without a model, and the server shows one")
        if (task != TRAIN or self._preprocessor is not None) and not task.fitted:
            raise RefusedError(f'a round to "{task.kind}" needs what preprocessing was fitted to')
        if self._preprocessor is not None:
            _check_reach(Fitted.from_bytes(task.fitted))
        if self._replicas is not None:
            base = Standing.from_bytes(request.model)
            model = self._replicas.get(base).state
        elif task.kind != "fit":
            model = GlobalState.from_message(request.model, self._size)
        drawn: Randomness = os.urandom
        if self._experiment.not_private_seed is not None:
            update = model.update if model is not None else 0
            context = (self.name, update) if task.kind == "train" else (self.name, task.release)
            drawn = agreement.reproducible_randomness(self._experiment.not_private_seed, *context)
        rotation = None
        if task.kind == "train" and model is not None:
            if model.clip_scale != 1 and not clipping.counted(self._experiment.privacy):
                raise RefusedError("the server moves the clip, which the experiment holds fixed")
            encoding = self._encoding
            length = clipping.upload_length(self._experiment, model.surviving)
            rotation = agreement.rotation(self._experiment, self._plan, model.update, length)
        else:
            encoding = agreement.sum_encoding(self._experiment, len(self._identity.roster))
            length = self._length(task)
        expected = Expected(
            identity=self._identity,
            session=self._session,
            round=request.round,
            binding=agreement.binding(self._experiment, base or model, encoding, task),
            minimum=self._thresholds.minimum,
            encoding=encoding,
            length=length,
            tolerated=agreement.tolerated(self._experiment),
            degree=self._thresholds.degree,
            reveal=self._experiment.protocol.reveal,
            weights=agreement.public_weights(self._experiment) if task.kind == "train" else None,
        )
        return _Round(request.round, task, model, base, rotation, expected, drawn)

    def _length(self, task: Task) -> int:
        """How many integers a site gives for another task than training."""
        fitting = self._preprocessor
        if task.kind == "fit" and fitting is not None and task.stage < fitting.stages:
            return fitting.dimension(task.stage)
        if task.kind == "evaluate" and self._tally is not None:
            return self._tally.dimension
        raise RefusedError(f"nothing is agreed on to {task.kind} (stage {task.stage})")

    def _keep(self, heads: Mapping[str, SignedHead]) -> None:
        """Keep what peers signed of their ledgers, so that one who alters a ledger shows."""
        for site, told in heads.items():
            told.check(site, self._identity.roster)
        if self._account is not None and heads:
            self._account.ledger.keep(heads)

    def _contribute(self, current: _Round) -> Iterator[NDArray[np.uint64]]:
        """Train (or count) and encode when the protocol asks for the first slot, after it checked
        the rest."""
        self._charge_for(current)
        if current.task.kind != "train":
            encoding = agreement.sum_encoding(self._experiment, len(self._identity.roster))
            yield from encoding.encode(self._summed(current))
            return
        model, trainer = current.model, self._prepare(current.task.fitted).trainer
        assert model is not None  # noqa: S101 - a round of training has one
        if isinstance(self._encoding, Integers):
            noised = trainer.noised_sum(
                model.weights, model.mask, current.randomness, model.clip_scale, current.rotation
            )
            yield from self._encoding.encode(noised)
            return
        update = trainer.update(model.weights, model.mask, current.randomness, model.clip_scale)
        excess = clipping.uploaded(self._experiment, update[self._size :])
        update = np.append(update[: self._size][model.mask], excess)
        rounding = Keystream(Seed.draw(current.randomness), "rounding")
        try:
            slots = self._encoding.encode(update, self._weight, rounding)
        except ValueError:
            raise RefusedError(
                f"{self.name}: local training diverged; lower training.learning_rate"
            ) from None
        yield from slots

    def _summed(self, current: _Round) -> NDArray[np.int64]:
        """What this site adds to a sum of another task, with its share of noise under a plan."""
        task = current.task
        if task.kind == "fit":
            assert self._preprocessor is not None  # noqa: S101 - `_length` saw to it
            assert isinstance(self._records, Frame)  # noqa: S101
            try:
                before = Fitted.from_bytes(task.fitted)
                share = self._records.share(protected_by(self._experiment))
                total = self._preprocessor.encode(task.stage, before, self._records, share)
            except ValueError as error:
                raise RefusedError(f"{self.name} cannot be summed: {error}") from None
        else:
            total = self._counted(current)
        release = self._releases.get(task.release)
        if release is None:
            return total
        noise = DiscreteGaussian(release.event.deviation)
        seed = Seed.draw(current.randomness)
        return total + noise.sample(Keystream(seed, "discrete gaussian noise"), len(total))

    def _counted(self, current: _Round) -> NDArray[np.int64]:
        """The counts of the model on this site's test rows; its own figures stay in its store."""
        assert self._tally is not None  # noqa: S101 - `_length` saw to it
        test, model = self._prepare(current.task.fitted).test, current.model
        if test is None or model is None or not len(test):
            return np.zeros(self._tally.dimension, np.int64)
        models.assign(self._module, model.weights)
        outputs, losses = evaluation.forward(self._module, self._loss, test, self._device)
        person = protected_by(self._experiment)
        share = shares(test.groups[person]) if person is not None else None
        own = self._tally.local(outputs, losses, test.target)
        self._store.keep_figures(model.update, own.values)
        return self._tally.encode(outputs, losses, test.target, share)

    def _charge_for(self, current: _Round) -> None:
        """Charge the round, before a record is read for it; BudgetSpentError where it costs more
        than was promised."""
        plan, task = self._plan, current.task
        release = self._releases.get(task.release)
        if plan is None or (task.kind != "train" and release is None):
            return
        charged = self._account.last_round if self._account else 0
        if current.number <= max(self._store.last_charged, charged):
            raise RefusedError(f"round {current.number} was charged before")
        if release is not None and self._store.released(release.name) >= release.times:
            raise BudgetSpentError(
                f"{self.name}: {release.name} was charged as often as the plan allows"
            )
        rounds = self._store.charged + 1
        if release is None and not plan.affords(rounds):
            raise BudgetSpentError(
                f"{self.name}: one more round would bring epsilon to {plan.spent(rounds):.3f}, "
                f"above the promised {plan.epsilon:g}"
            )
        self._charge(current.number, task.release)

    def _charge(self, round_number: int, release: str) -> None:
        """Charge the ledger, then this run's own count: a crash between leaves the ledger ahead."""
        if self._account is not None:
            try:
                self._account.charge(round_number, release)
            except BudgetSpentError as error:
                raise BudgetSpentError(f"{self.name}: {error}") from None
        self._store.charge(round_number, release)


def _kept(
    slots: Iterator[NDArray[np.uint64]], parts: list[NDArray[np.uint64]]
) -> Iterator[NDArray[np.uint64]]:
    """`slots`, of which a copy goes into `parts`: a protocol masks in place."""
    for part in slots:
        parts.append(part.copy())
        yield part


def _check_reach(fitted: Fitted) -> None:
    """RefusedError where fitted values map a number of any permitted size far beyond any use.

    From public values alone: an overflow that is met in a record, and refused, would tell of it.
    """
    for number in fitted.numbers:
        farthest = max(number.centre - number.low, number.high - number.centre)
        if not farthest / number.spread <= FARTHEST:
            raise RefusedError(
                f"the fitted values do not fit the schema: {number.name!r} would be mapped to more "
                f"than {FARTHEST:g}"
            )


def check_records(name: str, table: Records, experiment: Experiment) -> None:
    """ConfigurationError when this site's records cannot be trained on as the experiment says."""
    _weight(name, table, experiment)
    drawn = isinstance(table, Table) and experiment.sites.partition != "column"
    if drawn and table.task == "classification" and len(np.unique(table.target)) < 2:
        held = table.classes[int(table.target[0])] if len(table) else "no"
        raise ConfigurationError(
            f"{name} holds records of one class only ({held}): choose another partition, a larger "
            "sites.alpha, or fewer sites"
        )
    privacy, person = experiment.privacy, protected_by(experiment)
    if person is not None and person not in table.groups:
        raise ConfigurationError(
            f'{name} has no column {person!r} (data.person), which privacy.unit = "person" needs'
        )
    if person is not None and (table.groups[person] == "").any():
        raise ConfigurationError(
            f"{name} has records without a {person} (data.person): fill it in or leave them out"
        )
    if isinstance(privacy, config.Privacy) and privacy.noise == "local":
        count, kind = len(table), "records"
        if person is not None:
            count, kind = len(np.unique(table.groups[person])), "people"
        if count < privacy.expected_batch:
            raise ConfigurationError(
                f"{name} holds fewer {kind} than privacy.expected_batch = "
                f"{privacy.expected_batch}: lower expected_batch or leave the site out"
            )


def _identifying(table: Table, person: str | None) -> Iterator[bytes]:
    """What tells one record from another, or one person."""
    if person is not None:
        yield from (name.encode() for name in np.unique(table.groups[person]).tolist())
        return
    rows = table.features.reshape(len(table), -1)
    yield from (row.tobytes() + y.tobytes() for row, y in zip(rows, table.target, strict=True))


def protected_by(experiment: Experiment) -> str | None:
    """The column that says whose a row is, where people and not records are protected."""
    privacy = experiment.privacy
    return experiment.data.person_column if privacy and privacy.unit == "person" else None


def _weight(name: str, table: Records, experiment: Experiment) -> int:
    aggregation = experiment.aggregation
    if aggregation.weighting == "declared":
        if name not in aggregation.weights:
            raise ConfigurationError(f"aggregation.weights has no weight for {name}: add one")
        return aggregation.weights[name]
    if aggregation.weighting == "records":
        cap = aggregation.weight_cap or 0
        if len(table) > cap:
            raise ConfigurationError(
                f"{name} holds more records than aggregation.weight_cap = {cap}: raise weight_cap"
            )
        return len(table)
    return 1


def resolve_device(name: str) -> torch.device:
    """The device an experiment names; "auto" takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f'device = "{name}" but torch sees no GPU: use "auto" or "cpu"')
    return torch.device(name)
