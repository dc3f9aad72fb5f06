"""What one adversary sees and may do, exactly: a value that an attack gets as bytes, and no more.

A view holds no ground truth. What an adversary knows besides (records that may have been trained
on, records of the same population) is declared in what it is `Given`. Ground truth stays with the
scorer (`attacks.attack`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from protocols.catalogue import PROTOCOLS
from protocols.encoding import Aggregate
from protocols.errors import ProtocolError
from protocols.identity import Roster
from protocols.messages import Begin
from protocols.rounds import Outcome, ServerSide
from securefl import agreement, config, models
from securefl.config import Experiment
from securefl.data import Table
from securefl.data.tables import Task as Kind
from securefl.messages import Answer, Request, Task, parse_reply
from securefl.privacy import clipping
from securefl.privacy.plan import Plan
from securefl.state import GlobalState
from securefl.transcript import Crossing, Drawn


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A numpy array as it travels."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> Self:
        """The value of `array`."""
        return cls(array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())

    def numpy(self) -> NDArray[Any]:
        """The array again, read-only."""
        return np.frombuffer(self.data, np.dtype(self.dtype)).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Array({self.dtype}, {self.shape})"


class Records(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records as a model reads them: features float32[n, *shape], target int64[n] or float32[n].

    whose: int64[n], the number of each record's person from 0, where people are protected.
    """

    features: Array
    target: Array
    whose: Array | None = None

    @classmethod
    def of(cls, table: Table, person: str | None = None) -> Self:
        """Those of `table`, without its names. person: the column that says whose a record is."""
        features, target = Array.of(table.features), Array.of(table.target)
        if person is None:
            return cls(features, target)
        whose = np.unique(table.groups[person], return_inverse=True)[1]
        return cls(features, target, Array.of(whose.astype(np.int64)))

    @property
    def protected(self) -> int:
        """How many records, or people, are protected."""
        whose = None if self.whose is None else self.whose.numpy()
        return len(self) if whose is None else int(whose.max(initial=-1)) + 1

    def __len__(self) -> int:
        return self.target.shape[0]


class Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the adversary is declared to know besides what it sees.

    candidates: records of which it asks whether they were trained on. auxiliary: records of the
    same population, none of which is a candidate. known: by site, records that it knows were
    trained on, none of which is a candidate: differential privacy holds against who knows all but
    one. shadows: how many models of its own it can afford to train.
    """

    candidates: Records | None = None
    auxiliary: Records | None = None
    shadows: int = 16
    known: Mapping[str, Records] | None = None


class Public(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What everybody in a consortium knows of a run."""

    experiment: str
    """TOML, without the place of any file."""
    sites: tuple[str, ...]
    shape: tuple[int, ...]
    outputs: int
    task: Kind

    def parsed(self) -> Experiment:
        """The experiment."""
        return config.parse(self.experiment)

    def module(self) -> torch.nn.Module:
        """The model before the first round, made from the public seed."""
        experiment = self.parsed()
        return models.build(experiment.model, self.shape, self.outputs, experiment.seed)

    def loss(self) -> models.Loss:
        """The loss of each record."""
        return models.loss(self.parsed().model, self.task)

    def plan(self) -> Plan | None:
        """The privacy plan that was promised."""
        size = models.layout(self.module()).size
        return agreement.plan(self.parsed(), len(self.sites), size)

    def table(self, records: Records) -> Table:
        """`records` as training reads them."""
        names = tuple(f"x{i}" for i in range(int(np.prod(self.shape))))
        classification = self.task == "classification"
        classes = tuple(str(i) for i in range(self.outputs)) if classification else ()
        parts = records.features.numpy(), records.target.numpy()
        return Table(*parts, names, self.task, classes)


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """What one adversary sees. `public` is in every view."""

    public: Public


class ReleasedModelView(View, frozen=True):
    """Whoever gets the trained model: its weights, float32[d], in `models.layout`'s order."""

    weights: Array


class Passed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of which only the outside is seen."""

    number: int
    phase: str
    site: str
    direction: str
    size: int


class NetworkView(View, frozen=True):
    """Whoever taps the wires between server and sites, under TLS: who sends how much, and when."""

    passed: tuple[Passed, ...]


class ServerView(View, frozen=True):
    """The server: every message to and from the sites in `crossings`, in order.

    keys: each site's public key, by site, in each session of the run.
    """

    keys: tuple[Mapping[str, bytes], ...]
    crossings: tuple[Crossing, ...]

    def rounds(self) -> Iterator[Replayed]:
        """The rounds of training that gave a sum, by the server's own steps on its own messages."""
        for number in sorted({item.number for item in self.crossings}):
            replayed = replay(self, number)
            if replayed is not None:
                yield replayed


class Contributed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site contributed to one round of training, before any mask or encryption.

    slots: uint64[slots], as its encoding gave it. update: of the model that was trained.
    """

    number: int
    update: int
    slots: Array


class Recording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one site recorded of itself: all that it would hand to a fellow conspirator.

    With what it drew, every key and mask of its own follows from the messages it got.
    """

    site: str
    drawn: tuple[Drawn, ...]
    contributed: tuple[Contributed, ...]


class ColludingView(View, frozen=True):
    """Some sites that pool what they hold, with the server or without it.

    crossings: of these sites, or of all where the server is with them.
    """

    keys: tuple[Mapping[str, bytes], ...]
    crossings: tuple[Crossing, ...]
    recordings: tuple[Recording, ...]
    with_server: bool


class OpenedView(View, frozen=True):
    """Whoever broke the aggregation, or was handed what sites contributed: vectors of single sites.

    The claim of local noise holds against it. contributed: by site. models: the model of each
    round, by update, `GlobalState.to_message()`.
    """

    contributed: Mapping[str, tuple[Contributed, ...]]
    models: Mapping[int, bytes]

    @property
    def site(self) -> str:
        """Whose they are, in words."""
        return " and ".join(self.contributed)


class ActiveServer(View, frozen=True):
    """A server that sends what it likes: the attack runs the experiment's sites live.

    Through `securefl.run(experiment, exchange=..., clients=...)`, on records of its own choice.
    """


AnyView = ReleasedModelView | NetworkView | ServerView | ColludingView | OpenedView | ActiveServer


@final
@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """One round of training as the server saw it end.

    state: the model that was trained. mean: float64[upload_length], of `contributors`.
    """

    number: int
    state: GlobalState
    task: Task
    aggregate: Aggregate

    @property
    def update(self) -> NDArray[np.float64]:
        """The mean update of all weights, float64[d]; zero where they are pruned."""
        full = np.zeros(len(self.state.mask))
        full[self.state.mask] = self.aggregate.mean[: self.state.surviving]
        return full


def replay(view: ServerView | ColludingView, number: int) -> Replayed | None:
    """Round `number` again, by the server's own steps, on the recorded replies.

    None where it was not for training, was aborted, or is not recorded well enough to end; and
    under reveal = "sites", where the server gets no sum.
    """
    experiment = view.public.parsed()
    crossed = [item for item in view.crossings if item.number == number]
    first = PROTOCOLS[experiment.protocol.name].phases[0]
    opening = next((x for x in crossed if x.direction == "down" and x.phase == first), None)
    if opening is None or experiment.protocol.reveal == "sites":
        return None
    request = Request.from_bytes(opening.data)
    if request.task.kind != "train":
        return None
    plan, sites = view.public.plan(), len(view.public.sites)
    state = GlobalState.from_message(request.model, models.layout(view.public.module()).size)
    length = clipping.upload_length(experiment, state.surviving)
    encoding = agreement.encoding(experiment, sites, plan)
    weights = agreement.public_weights(experiment)
    replies = {(x.phase, x.site): x.data for x in crossed if x.direction == "up"}
    for keys in view.keys:  # of the sessions of a resumed run, the one whose signatures fit
        parts = (Begin.from_bytes(request.body), Roster(dict(keys)), encoding, length, weights)
        serve, openers = PROTOCOLS[experiment.protocol.name].server, experiment.protocol.openers
        steps = serve(*parts, openers) if openers > 1 else serve(*parts)
        aggregate = _ended(steps, replies)
        if aggregate is not None:
            rotation = agreement.rotation(experiment, plan, state.update, length)
            if rotation is not None:
                aggregate = replace(aggregate, mean=rotation.restore(aggregate.mean))
            return Replayed(number, state, request.task, aggregate)
    return None


def answer(data: bytes) -> Answer | None:
    """What a site answered; None where it refused, or sent something that is no reply."""
    try:
        said = parse_reply(data)
    except ProtocolError:
        return None
    return said if isinstance(said, Answer) else None


def _ended(steps: ServerSide, replies: Mapping[tuple[str, str], bytes]) -> Aggregate | None:
    """What the server's steps end with on these replies, by phase and site."""
    try:
        requests = next(steps)
        while True:
            told = {
                site: parse_reply(replies[requests.phase, site])
                for site in requests.messages
                if (requests.phase, site) in replies
            }
            bodies = {site: said.body for site, said in told.items() if isinstance(said, Answer)}
            requests = steps.send(bodies)
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome.aggregate
    except ProtocolError:
        return None


def by_round(crossings: tuple[Crossing, ...]) -> dict[int, list[Crossing]]:
    """The messages of each round."""
    found: dict[int, list[Crossing]] = defaultdict(list)
    for item in crossings:
        found[item.number].append(item)
    return found
