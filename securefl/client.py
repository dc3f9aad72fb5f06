"""One site: checks what it is asked, trains, encodes, and answers each phase of a round."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.catalogue import OPEN, PROTOCOLS, UPLOAD
from protocols.encoding import Integers
from protocols.errors import ProtocolError, RefusedError
from protocols.identity import Identity, digest
from protocols.keystream import Keystream, Randomness, Seed
from protocols.masked_bfv import Revealed
from protocols.rounds import Expected
from securefl import agreement, config, models
from securefl.algorithms import server_rule
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table
from securefl.messages import Answer, Refusal, Request, printable
from securefl.privacy import clipping
from securefl.privacy.ledger import Account, BudgetSpentError, Holding, SignedHead
from securefl.privacy.rotation import Rotation
from securefl.privacy.training import Trainer
from securefl.replicas import PHASES as REPLICA_PHASES
from securefl.replicas import Replica, Replicas, Standing
from securefl.state import DivergedError, GlobalState, apply, first_state
from securefl.store import SiteStore


@dataclass(slots=True)
class _Round:
    """A round this site is in: where its protocol stands, and what it already said."""

    number: int
    model: GlobalState
    base: Standing | None
    rotation: Rotation | None
    protocol_state: Any
    training: Randomness
    said: dict[str, tuple[bytes, Answer]] = field(default_factory=dict)


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
        table: Table,
        store: SiteStore,
        holding: Holding | None = None,
    ) -> None:
        name = identity.name
        check_records(name, table, experiment)
        self._experiment = experiment
        self._identity = identity
        self._session = session
        self._store = store
        self._holding = holding
        self._protocol = PROTOCOLS[experiment.protocol.name]
        self._thresholds = agreement.thresholds(experiment, len(identity.roster))
        self._weight = _weight(name, table, experiment)
        module = models.build(experiment.model, table.shape, table.outputs, experiment.seed)
        self._layout = models.layout(module)
        self._size = self._layout.size
        self._plan = agreement.plan(experiment, len(identity.roster), self._size)
        self._encoding = agreement.encoding(experiment, len(identity.roster), self._plan)
        self._rule = server_rule(experiment.aggregation)
        start = Replica.start(first_state(module, self._rule))
        loss = models.loss(experiment.model, table.task)
        device = resolve_device(experiment.device)
        person = protected_by(experiment)
        self._trainer = Trainer(
            module, loss, table, experiment.training, self._plan, device, person
        )
        self._round: _Round | None = None
        self._turn = threading.Lock()  # an engine may ask twice at once
        promise = digest("promise", experiment.digest(), repr(self._plan).encode())
        store.bind(promise.hex())
        self._account: Account | None = None
        privacy = experiment.privacy
        if holding is not None and privacy is not None and self._plan is not None:
            holding.ledger.observe(holding.dataset, _identifying(table, person))
            self._account = holding.ledger.open(
                holding.dataset,
                holding.run,
                experiment=experiment.name,
                promise=promise,
                unit=self._plan.unit,
                per_round=self._plan.per_round,
                rounds=experiment.rounds + privacy.spare_rounds,
                epsilon=self._plan.epsilon,
            )
        self._replicas: Replicas | None = None
        if experiment.protocol.reveal == "sites":
            agreed, quorum = experiment.digest(), agreement.quorum(experiment, len(identity.roster))
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
        current.protocol_state, reply = self._protocol.step(
            request.phase, state, request.body, slots, os.urandom
        )
        self._store.enter(current.number)  # before anything that was said in it leaves
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
        if self._replicas is None or current.base is None:
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
        base = None
        if self._replicas is None:
            model = GlobalState.from_message(request.model, self._size)
        else:
            base = Standing.from_bytes(request.model)
            model = self._replicas.get(base).state
        training: Randomness = os.urandom
        if self._experiment.not_private_seed is not None:
            training = agreement.reproducible_randomness(
                self._experiment.not_private_seed, self.name, model.update
            )
        if model.clip_scale != 1 and not clipping.counted(self._experiment.privacy):
            raise RefusedError("the server moves the clip, which the experiment holds fixed")
        length = clipping.upload_length(self._experiment, model.surviving)
        rotation = agreement.rotation(self._experiment, self._plan, model.update, length)
        expected = Expected(
            identity=self._identity,
            session=self._session,
            round=request.round,
            binding=agreement.binding(self._experiment, base or model, self._encoding),
            minimum=self._thresholds.minimum,
            encoding=self._encoding,
            length=length,
            tolerated=agreement.tolerated(self._experiment),
            degree=self._thresholds.degree,
            reveal=self._experiment.protocol.reveal,
            weights=agreement.public_weights(self._experiment),
        )
        return _Round(request.round, model, base, rotation, expected, training)

    def _keep(self, heads: Mapping[str, SignedHead]) -> None:
        """Keep what peers signed of their ledgers, so that one who alters a ledger shows."""
        for site, told in heads.items():
            told.check(site, self._identity.roster)
        if self._account is not None and heads:
            self._account.ledger.keep(heads)

    def _contribute(self, current: _Round) -> Iterator[NDArray[np.uint64]]:
        """Train and encode when the protocol asks for the first slot, after it checked the rest."""
        if self._plan is not None:
            charged = self._account.last_round if self._account else 0
            if current.number <= max(self._store.last_charged, charged):
                raise RefusedError(f"round {current.number} was charged before")
            spend = self._plan.spent(self._store.charged + 1)
            if not self._plan.affords(self._store.charged + 1):
                raise BudgetSpentError(
                    f"{self.name}: one more round would bring epsilon to {spend:.3f}, "
                    f"above the promised {self._plan.epsilon:g}"
                )
            self._charge(current.number)
        model = current.model
        if isinstance(self._encoding, Integers):
            noised = self._trainer.noised_sum(
                model.weights, model.mask, current.training, model.clip_scale, current.rotation
            )
            yield from self._encoding.encode(noised)
            return
        update = self._trainer.update(model.weights, model.mask, current.training, model.clip_scale)
        excess = clipping.uploaded(self._experiment, update[self._size :])
        update = np.append(update[: self._size][model.mask], excess)
        rounding = Keystream(Seed.draw(current.training), "rounding")
        try:
            slots = self._encoding.encode(update, self._weight, rounding)
        except ValueError:
            raise RefusedError(
                f"{self.name}: local training diverged; lower training.learning_rate"
            ) from None
        yield from slots

    def _charge(self, round_number: int) -> None:
        """Charge the ledger, then this run's own count: a crash between leaves the ledger ahead."""
        if self._account is not None:
            try:
                self._account.charge(round_number)
            except BudgetSpentError as error:
                raise BudgetSpentError(f"{self.name}: {error}") from None
        self._store.charge(round_number)


def check_records(name: str, table: Table, experiment: Experiment) -> None:
    """ConfigurationError when this site's records cannot be trained on as the experiment says."""
    _weight(name, table, experiment)
    drawn = experiment.sites.partition != "column"
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
    return experiment.data.person if privacy and privacy.unit == "person" else None


def _weight(name: str, table: Table, experiment: Experiment) -> int:
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
