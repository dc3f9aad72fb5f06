"""Rounds that fit and evaluate: cut, lost, and asked for by a server that does not keep to them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocols import bitpacking
from protocols.catalogue import PROTOCOLS
from protocols.messages import Begin
from protocols.rounds import make_identities
from securefl import agreement, data, models, runs, simulation, store
from securefl.algorithms import server_rule
from securefl.config import ConfigurationError, Experiment
from securefl.data import Frame
from securefl.data.sources import load_frames
from securefl.engines import Exchange, inprocess
from securefl.messages import Answer, Refusal, Request, Task, parse_reply
from securefl.preprocessing import Fitted, FittedNumber
from securefl.records import EvaluationRecord, read_history
from securefl.runs import RunFailedError
from securefl.server import BudgetsSpentError, Server
from securefl.state import GlobalState, first_state
from securefl.store import CorruptStoreError, SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

SESSION = b"session of tests"
SITES = ("east", "north", "south")
SECAGG = PROTOCOLS["secagg"].phases

Alter = Callable[[str, Request], Request | None]
"""What a server sends to a site in place of a request; None: nothing."""


class Cut(BaseException):
    """The machine stops."""


class Kinds:
    """What every round of a run is for, as its first requests say."""

    def __init__(self) -> None:
        self.rounds: dict[int, str] = {}

    def of(self, request: Request) -> str:
        return self.rounds.setdefault(request.round, request.task.kind)


def cut_at(kind: str, phase: str, *, after: bool) -> Callable[[Exchange], Exchange]:
    """Stop before or after the first exchange of that phase in a round of that kind."""
    kinds = Kinds()

    def wrap(exchange: Exchange) -> Exchange:
        def cutting(asked: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            told = {kinds.of(Request.from_bytes(message)) for message in messages.values()}
            if told == {kind} and asked == phase:
                if after:
                    exchange(asked, messages)
                raise Cut
            return exchange(asked, messages)

        return cutting

    return wrap


def altering(alter: Alter) -> Callable[[Exchange], Exchange]:
    """A server that sends what `alter` makes of an honest one's requests."""

    def wrap(exchange: Exchange) -> Exchange:
        def sent(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            changed = {site: alter(site, Request.from_bytes(m)) for site, m in messages.items()}
            return exchange(phase, {s: m.to_bytes() for s, m in changed.items() if m is not None})

        return sent

    return wrap


def fitted(folder: Path) -> Fitted:
    told = json.loads((folder / "preprocessing.json").read_text())
    return msgspec.convert(told["values"], Fitted)


def evaluations(folder: Path) -> list[EvaluationRecord]:
    lines = store.whole_lines(folder / "evaluations.jsonl")
    return [EvaluationRecord.from_json(line) for line in lines]


def released(folder: Path, site: str) -> tuple[int, int, int]:
    kept = SiteStore(folder / "sites" / site)
    return kept.released("statistics-0"), kept.charged, kept.released("evaluation")


# --- exact sums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("sites", [3, 129, 1000])
def test_an_exact_sum_loses_nothing_however_many_sites_there_are(clinic, protocol, sites):
    """Not in the digits' sums either, which pass through floating-point numbers."""
    experiment = clinic().experiment(f"protocol.name={protocol}")
    precision = agreement._precision(experiment, sites)
    half = 1 << (precision.bits - 1)  # digits are from -half to half - 1
    digits = np.random.default_rng(sites).integers(-half, half, 2000)
    total = np.concatenate([digits[:1000] * sites, digits[1000:] * (sites - 1) + 1])
    encoding = agreement.sum_encoding(experiment, sites)
    slots = np.concatenate(list(encoding.encode(total)))
    slots[0] = sites
    names = tuple(f"site-{i}" for i in range(sites))
    aggregate = encoding.decode(slots, len(total), names)
    opened = np.rint(aggregate.mean * sites).astype(np.int64)  # as `Server.sum`
    np.testing.assert_array_equal(opened, total)


# --- a crash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["fit", "train", "evaluate"])
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(phase, marks=() if phase in ("upload", "unmask") else pytest.mark.slow)
        for phase in SECAGG
    ],
)
def test_a_run_that_is_cut_in_any_phase_goes_on_and_charges_every_attempt(
    clinic, private, tmp_path, phase, kind, after
):
    experiment = clinic().experiment(*private, "rounds=2", "protocol.name=secagg")
    folder = tmp_path / "run"
    with pytest.raises(Cut):
        run(experiment, folder, exchange=cut_at(kind, phase, after=after))
    kept = folder / "preprocessing.json"
    before = kept.read_bytes() if kept.exists() else b""
    assert (before != b"") == (kind != "fit")
    done = resume(folder)
    assert done.summary.stopped == "round budget"
    assert "test_accuracy" in done.summary.metric
    if before:
        assert kept.read_bytes() == before
    # A site draws in its upload, and only there: an attempt that came so far was charged.
    drew = SECAGG.index(phase) > SECAGG.index("upload") or (phase == "upload" and after)
    lost = {k: int(drew and k == kind) for k in ("fit", "train", "evaluate")}
    for site in SITES:
        assert released(folder, site) == (1 + lost["fit"], 2 + lost["train"], 1 + lost["evaluate"])
        assert done.summary.epsilon[site] <= 5.0
    (last,) = evaluations(folder)
    assert last.update == 2
    rounds = [record.round for record in read_history(folder).rounds]
    fits = json.loads(kept.read_text())["rounds"]
    numbers = [*fits, *rounds, last.round]
    assert numbers == sorted(set(numbers))
    assert {*numbers, *done.summary.aborted_rounds} == set(range(1, last.round + 1))
    assert done.summary.aborted_rounds == ({"fit": 1, "train": 2, "evaluate": 4}[kind],)


def test_what_was_fitted_for_another_experiment_is_not_trained_on(clinic, tmp_path):
    """Before the first update only the fitted values tell that experiment.toml was changed."""
    folder = tmp_path / "run"
    with pytest.raises(Cut):
        run(clinic().experiment(), folder, exchange=cut_at("train", "upload", after=False))
    path = folder / "experiment.toml"
    text = path.read_text()
    path.write_text(text.replace('scale = "standardise"', 'scale = "range"'))
    with pytest.raises(ConfigurationError, match="was changed after the run began"):
        resume(folder)
    path.write_text(text)
    assert runs.resume(folder).summary.rounds == 3  # with its report


@pytest.mark.parametrize("name", ["preprocessing.json", "evaluations.jsonl"])
def test_a_file_of_fitted_values_or_figures_that_is_damaged_is_one_line(clinic, tmp_path, name):
    folder = tmp_path / "run"
    experiment = clinic().experiment("evaluation.every=1")
    with pytest.raises(Cut):
        run(experiment, folder, exchange=cut_at("evaluate", "upload", after=False))
    path = folder / name
    whole = path.read_text() if path.exists() else ""
    path.write_text(whole[:-20] or '{"update": 1}\n')
    with pytest.raises((CorruptStoreError, ConfigurationError), match="damaged") as caught:
        resume(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert name in str(caught.value)


# --- sites that fall out -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["advertise", "upload", "confirm"])
@pytest.mark.parametrize("kind", ["fit", "evaluate"])
def test_a_site_that_falls_out_of_a_sum_is_left_out_of_it(clinic, drawn, tmp_path, kind, phase):
    rows = {**drawn, "west": [row | {"patient": "w" + row["patient"]} for row in drawn["east"]]}
    experiment = clinic(rows).experiment("protocol.name=secagg", "protocol.minimum_cohort=3")
    kinds = Kinds()

    def losing(site: str, request: Request) -> Request | None:
        lost = kinds.of(request) == kind and site == "north"
        late = SECAGG.index(request.phase) >= SECAGG.index(phase)
        return None if lost and late else request

    folder = tmp_path / "run"
    done = run(experiment, folder, exchange=altering(losing))
    assert done.summary.aborted_rounds == ()
    # Who falls out after its upload is in the sum.
    out = ("north",) if phase != "confirm" else ()
    frames = {
        site: data.held_out(frame, experiment)
        for site, frame in load_frames(experiment.data).items()
    }
    left = [site for site in frames if kind != "fit" or site not in out]
    made = agreement.preprocessor(experiment, 4)
    everybody = Frame.concatenate([frames[site][0] for site in left])
    total = made.encode(0, made.start(), everybody, None)
    assert fitted(folder) == made.fit(0, made.start(), total, 0.0)
    (last,) = evaluations(folder)
    tested = [site for site in frames if kind != "evaluate" or site not in out]
    assert list(last.sites) == tested
    assert last.figures.rows == sum(len(frames[site][1]) for site in tested)


# --- a server that does not keep to what was agreed ----------------------------------------------


class Ward:
    """Real clients on the clinic's files, and a server that can be told what to ask."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        consortium = simulation.assemble(experiment)
        self.plan = consortium.plan
        identities = make_identities(tuple(consortium.sites), os.urandom)
        self.roster = identities[SITES[0]].roster
        self.clients = {
            site: simulation.client(experiment, records, identities[site], SESSION, folder / site)
            for site, records in consortium.sites.items()
        }
        self.uploads: dict[str, bytes] = {}
        self.server = Server(
            experiment, self.roster, SESSION, self.exchange, lambda number, phase: None, self.plan
        )
        made, tally = agreement.preprocessor(experiment, 3), agreement.tally(experiment, 3)
        self.preprocessor, self.tally = made, tally
        features = simulation.Features.of(made)
        self.module = models.build(experiment.model, features.shape, features.outputs, 0)
        self.model = first_state(self.module, server_rule(experiment.aggregation))
        self.length = made.dimension(0)
        self.fit = Task("fit", 0, made.start().to_bytes())

    def exchange(self, phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = inprocess.exchange(self.clients, messages)
        if phase == "upload":
            self.uploads = dict(replies)
        return replies

    def fitted(self, number: int = 1) -> bytes:
        """What an honest first round is fitted to."""
        summed = self.server.sum(number, self.fit, self.length)
        noise = 0.0 if self.plan is None else 1.0
        told = self.preprocessor.fit(0, self.preprocessor.start(), summed.total, noise)
        return told.to_bytes()

    def first(self, number: int, task: Task, model: GlobalState | None) -> bytes:
        """The first request of a round, bound to just what it says."""
        agreed, encoding = agreement.thresholds(self.experiment, 3), None
        if task.kind == "train":
            encoding = agreement.encoding(self.experiment, 3, self.plan)
        else:
            encoding = agreement.sum_encoding(self.experiment, 3)
        bound = agreement.binding(self.experiment, model, encoding, task)
        begin = Begin(
            SESSION, number, SITES, agreed.minimum, agreed.threshold, bound, agreed.degree
        ).to_bytes()
        phase = PROTOCOLS[self.experiment.protocol.name].phases[0]
        shown = model.to_message() if model is not None else b""
        return Request(SESSION, number, phase, begin, shown, {}, task).to_bytes()

    def ask(self, request: bytes, site: str = "east") -> Answer | Refusal:
        return parse_reply(self.clients[site].answer(request))

    def refusal(self, request: bytes) -> Refusal:
        reply = self.ask(request)
        assert isinstance(reply, Refusal)
        assert len(reply.reason.splitlines()) == 1
        return reply


@pytest.fixture
def ward(clinic, tmp_path: Path) -> Callable[..., Ward]:
    """`ward("key=value", ...)`: clients of an experiment on the clinic's files."""
    return lambda *more: Ward(clinic().experiment(*more), tmp_path / "ward")


def other(values: bytes) -> bytes:
    """Fitted values that differ a little."""
    told = Fitted.from_bytes(values)
    return msgspec.structs.replace(told, rows=told.rows + 1).to_bytes()


LIES: dict[str, tuple[str, Callable[[Task], Task]]] = {
    "other fitted values in training": ("train", lambda t: Task(fitted=other(t.fitted))),
    "other fitted values in an evaluation": (
        "evaluate",
        lambda t: Task("evaluate", fitted=other(t.fitted)),
    ),
    "other fitted values to fit after": ("fit", lambda t: Task("fit", 0, other(t.fitted))),
    "another stage": ("fit", lambda t: Task("fit", 1, t.fitted)),
    "an evaluation in place of training": ("train", lambda t: Task("evaluate", 0, t.fitted)),
    "training in place of an evaluation": ("evaluate", lambda t: Task(fitted=t.fitted)),
    "a fit in place of training": ("train", lambda t: Task("fit", 0, t.fitted)),
    "training in place of a fit": ("fit", lambda t: Task(fitted=t.fitted)),
}


@pytest.mark.parametrize("consistent", [False, True], ids=["as bound", "bound anew"])
@pytest.mark.parametrize(("kind", "lie"), LIES.values(), ids=LIES)
def test_one_site_that_is_told_of_another_task_spoils_the_round_and_no_more(
    clinic, tmp_path, kind, lie, consistent
):
    """Also where the server binds that site to what it tells it: the others are bound to more."""
    experiment = clinic().experiment(
        "rounds=1",
        "protocol.name=secagg",
        "preprocessing.clip_quantiles=[0.05, 0.95]",
    )
    first = first_model(experiment)

    def lying(site: str, request: Request) -> Request:
        begins = request.phase == "advertise" and request.task.kind == kind
        if not begins or site != "east" or request.task.stage:
            return request
        task, model, shown = lie(request.task), None, request.model
        if task.kind == "fit":
            shown = b""
        elif not shown:
            shown = first.to_message()
        body = request.body
        if consistent:
            if shown:
                model = GlobalState.from_message(shown, len(first.weights))
            if task.kind == "train":
                encoding = agreement.encoding(experiment, 3, None)
            else:
                encoding = agreement.sum_encoding(experiment, 3)
            bound = agreement.binding(experiment, model, encoding, task)
            body = msgspec.structs.replace(Begin.from_bytes(body), binding=bound).to_bytes()
        return msgspec.structs.replace(request, task=task, model=shown, body=body)

    folder = tmp_path / "run"
    if kind == "evaluate":  # a run ends well without figures
        done = run(experiment, folder, exchange=altering(lying))
        assert evaluations(folder) == []
        assert "has no test figures" in " ".join(done.summary.outside_guarantee)
        assert not any(name.startswith("test_") for name in done.summary.metric)
        return
    with pytest.raises(RunFailedError, match="3 rounds in a row were aborted"):
        run(experiment, folder, exchange=altering(lying))
    assert (folder / "preprocessing.json").exists() == (kind == "train")
    assert not (folder / "model.safetensors").exists()


def first_model(experiment: Experiment) -> GlobalState:
    features = simulation.assemble(experiment).features
    module = models.build(experiment.model, features.shape, features.outputs, experiment.seed)
    return first_state(module, server_rule(experiment.aggregation))


def test_a_model_has_no_place_in_a_round_that_fits_and_one_that_trains_needs_it(ward):
    made = ward()
    whole = Request.from_bytes(made.first(1, made.fit, None))
    shown = msgspec.structs.replace(whole, model=made.model.to_message())
    assert "fitted without a model" in made.refusal(shown.to_bytes()).reason
    fitted = made.fitted()
    for task in (Task(fitted=fitted), Task("evaluate", fitted=fitted)):
        bare = msgspec.structs.replace(
            Request.from_bytes(made.first(2, task, made.model)), model=b""
        )
        made.refusal(bare.to_bytes())
    assert (
        "needs what preprocessing was fitted to"
        in made.refusal(made.first(2, Task(), made.model)).reason
    )
    assert isinstance(made.ask(made.first(2, Task(fitted=fitted), made.model)), Answer)


@pytest.mark.parametrize("protocol", ["plain", "secagg"])
def test_a_round_is_for_one_task(ward, private, protocol):
    """Else a site would draw noise for one task and be asked for the same round's other."""
    made = ward(*private, f"protocol.name={protocol}")
    fitted = made.fitted(1)
    tasks = [
        (Task(fitted=fitted), made.model),
        (Task("evaluate", fitted=fitted), made.model),
        (made.fit, None),
    ]
    for number, (asked, shown) in enumerate(tasks, start=2):
        assert isinstance(made.ask(made.first(number, asked, shown)), Answer)
        kept = [made.clients["east"]._store.released(name) for name in ("evaluation",)]
        for task, model in tasks:
            if task != asked:
                reply = made.refusal(made.first(number, task, model))
                assert "was answered to another request" in reply.reason
        assert kept == [made.clients["east"]._store.released(name) for name in ("evaluation",)]


@pytest.mark.parametrize("name", ["fit", "evaluate"])
def test_a_server_that_asks_again_under_new_rounds_is_refused_as_the_plan_says(ward, private, name):
    """Averaging many noisy sums would take the noise away."""
    made = ward(*private, "protocol.name=secagg")
    fitted = made.fitted(1)
    task, length, shown, had = made.fit, made.length, None, 1
    if name == "evaluate":
        task = Task("evaluate", fitted=fitted)
        length, shown, had = made.tally.dimension, made.model, 0
    for number in range(2, 3 - had):
        made.server.sum(number, task, length, shown)
    made.server.sum(8, task, length, shown)
    for number in (9, 10):
        with pytest.raises(BudgetsSpentError, match="as often as the plan allows"):
            made.server.sum(number, task, length, shown)
    for client in made.clients.values():
        assert client._store.released(task.release) == 2
    if name == "evaluate":  # which costs training nothing
        assert len(made.server.round(11, made.model, fitted).contributors) == 3


def raw(values: Fitted, **figures: float) -> bytes:
    """The message with figures in its first number that no `FittedNumber` takes."""
    tree = msgspec.msgpack.decode(values.to_bytes())
    first = tree[1 + Fitted.__struct_fields__.index("numbers")][0]  # after the message's tag
    for name, figure in figures.items():
        first[1 + FittedNumber.__struct_fields__.index(name)] = figure
    return msgspec.msgpack.encode(tree)


WRONG: dict[str, Callable[[Fitted], bytes]] = {
    "nothing of the kind": lambda told: b"junk",
    "cut": lambda told: told.to_bytes()[:-3],
    "more": lambda told: told.to_bytes() + b"\0",
    "infinite": lambda told: raw(told, centre=float("inf")),
    "not a number": lambda told: raw(told, fill=float("nan")),
    "a spread of 0": lambda told: raw(told, spread=0.0),
    "a tiny spread": lambda told: raw(told, spread=1e-300),
    "a huge centre": lambda told: raw(told, centre=1e300),
    "huge bounds": lambda told: raw(told, low=-1e300, high=1e300, fill=1e300),
    "other columns": lambda told: msgspec.structs.replace(told, numbers=()).to_bytes(),
    "too few sums": lambda told: msgspec.structs.replace(told, sums=0).to_bytes(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_fitted_values_that_no_sums_give_are_refused(ward, kind, wrong):
    made = ward()
    good = Fitted.from_bytes(made.fitted())
    task = Task(kind, fitted=wrong(good))
    reply = made.refusal(made.first(2, task, made.model))
    assert reply.kind == "request"
    assert "the fitted values do not fit" in reply.reason or "not a Fitted" in reply.reason
    assert isinstance(
        made.ask(made.first(3, Task(kind, fitted=good.to_bytes()), made.model)), Answer
    )


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_whether_fitted_values_are_refused_tells_nothing_of_any_row(ward, kind):
    """Else a server bisects the oldest age of a site, by values that only an older one overflows"""
    made = ward()
    good = Fitted.from_bytes(made.fitted())
    rows = Frame.concatenate(
        list(data.held_out(load_frames(made.experiment.data)["east"], made.experiment))
    )
    oldest, largest = float(np.nanmax(rows.numbers["age"])), float(np.finfo(np.float32).max)
    replies = []
    for number, share in enumerate((0.9, 1.1), start=2):
        age = good.numbers[0]
        assert age.name == "age"
        crafted = FittedNumber("age", 0.0, age.low, age.high, 0.0, 0.0, oldest * share / largest)
        told = msgspec.structs.replace(good, numbers=(crafted, *good.numbers[1:]))
        task = Task(kind, fitted=told.to_bytes())
        replies.append(made.refusal(made.first(number, task, made.model)).reason)
    assert replies[0] == replies[1]


# --- what a server sees --------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_no_site_sends_its_own_counts_in_clear(ward, protocol):
    made = ward(f"protocol.name={protocol}")
    made.fitted()
    frames = load_frames(made.experiment.data)
    for site in SITES:
        rows = data.held_out(frames[site], made.experiment)[0]
        own = made.preprocessor.encode(0, made.preprocessor.start(), rows, None)
        encoding = agreement.sum_encoding(made.experiment, 3)
        slots = np.concatenate(list(encoding.encode(own)))
        # As integers of 8 bytes, and as they stand in a vector that nothing hides.
        packed = [
            bitpacking.pack(slots[at : at + 4], encoding.slot_bits).tobytes()[:-1]
            for at in range(0, len(slots) - 3, 4)
        ]
        looked_for = [*packed, *(struct.pack("<q", value) for value in {*own.tolist()} - {0, 1})]
        assert len(looked_for) > 5
        found = [value for value in looked_for if value in made.uploads[site]]
        assert bool(found) == (protocol == "plain")
