"""Runs whose noise only the sum has enough of: what the sites give, and what the server gets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from protocols.bitpacking import unpack
from protocols.encoding import Aggregate, Integers
from protocols.messages import Upload
from protocols.rounds import make_identities
from securefl import agreement, config, models, runs, simulation
from securefl.algorithms import server_rule
from securefl.config import ConfigurationError, Experiment
from securefl.engines import inprocess
from securefl.evaluation import evaluate
from securefl.messages import Answer, Request
from securefl.privacy.plan import Observer, RecordDistributed, SiteDistributed
from securefl.privacy.training import Trainer
from securefl.records import read_history
from securefl.runs import MEAN_ACCURACY, RunFailedError, Wrap, resume
from securefl.server import Server
from securefl.state import apply, first_state
from securefl.store import SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)

SECURE = pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
UNITS = pytest.mark.parametrize("unit", ["record", "person", "site"])

CLINICS = """
rounds = 3
[data]
source = "table"
path = "{path}"
label = "ill"
person = "patient"
drop = ["clinic"]
default_range = [-3, 3]
[sites]
partition = "column"
column = "clinic"
[protocol]
name = "secagg"
minimum_cohort = 3
[aggregation]
learning_rate = 0.3
"""
"""Under plain nobody is expected to collude; with the same minimum its plan has the same noise."""
RECORDS = """
[privacy]
unit = "{unit}"
noise = "distributed"
epsilon = 9.0
delta = 1e-3
rate = 0.5
expected_batch = 48
"""
SITES = """
[privacy]
unit = "site"
epsilon = 40.0
delta = 1e-3
clip = 0.5
"""


@pytest.fixture(scope="module")
def clinics(tmp_path_factory) -> Path:
    """Four clinics of different sizes, patients with one to four visits, three measurements."""
    rng = np.random.default_rng(0)
    lines = ["a,b,c,patient,clinic,ill"]
    for clinic, patients in (("north", 20), ("east", 14), ("south", 11), ("west", 17)):
        for number in range(patients):
            ill = number % 2
            for _ in range(number % 4 + 1):
                measured = rng.normal(size=3) + (2 * ill - 1) * np.array([0.8, -0.6, 0.0])
                values = ",".join(f"{x:.4f}" for x in measured)
                lines.append(f"{values},{clinic}-{number},{clinic},{ill}")
    path = tmp_path_factory.mktemp("clinics") / "visits.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def trial(clinics) -> Callable[..., Experiment]:
    """`trial(unit, "key=value", ...)`: three rounds of the clinics; plans are calibrated once."""

    def made(unit: str, *overrides: str) -> Experiment:
        section = SITES if unit == "site" else RECORDS.format(unit=unit)
        return config.parse(CLINICS.format(path=clinics) + section, overrides, origin="clinics")

    return made


@pytest.fixture
def given(monkeypatch) -> Iterator[list[np.ndarray]]:
    """Every noised vector that the sites compute, in order."""
    seen: list[np.ndarray] = []
    real = Trainer.noised_sum

    def noted(self, weights, mask, randomness):
        seen.append(real(self, weights, mask, randomness))
        return seen[-1]

    monkeypatch.setattr(Trainer, "noised_sum", noted)
    return seen


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losing(phase: str, rounds: set[int] | None = None, site: str | None = None):
    """An exchange that loses replies of one phase."""

    def wrap(exchange):
        def lossy(asked, messages):
            replies = dict(exchange(asked, messages))
            for name, message in messages.items():
                hit = rounds is None or Request.from_bytes(message).round in rounds
                if asked == phase and hit and site in (None, name):
                    replies.pop(name, None)
            return replies

        return lossy

    return wrap


# --- the sum -------------------------------------------------------------------------------------


def played(
    experiment: Experiment, folder: Path, rounds: int = 2, lose: Wrap | None = None
) -> list[tuple[tuple[str, ...], bytes]]:
    """Who contributed to each of the first rounds, and the mean that the server got, as bytes."""
    consortium = simulation.assemble(experiment)
    identities = make_identities(tuple(consortium.sites), os.urandom)
    clients = {
        name: simulation.client(experiment, table, identities[name], b"s" * 16, folder / name)
        for name, table in consortium.sites.items()
    }

    def exchange(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        return inprocess.exchange(clients, messages)

    server = Server(
        experiment,
        identities["east"].roster,
        b"s" * 16,
        lose(exchange) if lose else exchange,
        lambda number, phase: None,
        consortium.plan,
    )
    state, rule, layout = first(experiment, consortium)
    got = []
    for number in range(1, rounds + 1):
        result = server.round(number, state).result
        assert isinstance(result, Aggregate)
        got.append((result.contributors, result.mean.tobytes()))
        state = apply(state, result.mean, rule, layout, experiment)
    for client in clients.values():
        client.close()
    return got


def first(experiment: Experiment, consortium: simulation.Consortium):
    """The model before the first round, what moves it, and its layout."""
    test = consortium.test
    module = models.build(experiment.model, test.shape, test.outputs, experiment.seed)
    rule = server_rule(experiment.aggregation)
    return first_state(module, rule), rule, models.layout(module)


@UNITS
@pytest.mark.parametrize(
    ("phase", "counted"), [(None, True), ("upload", False), ("confirm", True), ("open", True)]
)
def test_the_server_gets_plains_mean_bit_for_bit(trial, tmp_path, unit, phase, counted):
    """Whoever vanishes: of those whose upload counted."""
    seeded = "not_private_seed=3"
    lost = None if counted else losing("upload", site="south")
    plain = played(trial(unit, seeded, "protocol.name=plain"), tmp_path / "p", lose=lost)
    for contributors, _ in plain:
        assert ("south" in contributors) == counted
    for protocol in ("secagg", "masked-bfv"):
        gone = losing(phase, site="south") if phase else None
        experiment = trial(unit, seeded, f"protocol.name={protocol}")
        assert played(experiment, tmp_path / protocol, lose=gone) == plain


def test_where_only_the_sites_hold_the_model_it_is_the_same_bit_for_bit(trial, tmp_path):
    seeded = ("not_private_seed=3", "protocol.name=masked-bfv", "aggregation.average_from=2")
    folders = [
        run(trial("person", *seeded, f"protocol.reveal={reveal}"), tmp_path / reveal).directory
        for reveal in ("server", "sites")
    ]
    assert model(folders[0]) == model(folders[1])


@pytest.mark.slow
def test_worker_processes_give_the_same_sum(trial, tmp_path):
    seeded = trial("person", "not_private_seed=3")
    here = run(seeded, tmp_path / "here")
    workers = trial("person", "not_private_seed=3", "engine.workers=2")
    assert model(run(workers, tmp_path / "there").directory) == model(here.directory)


@UNITS
@pytest.mark.parametrize("lost", [None, "south"])
def test_the_mean_is_the_noised_sum_over_the_public_expected_batch(
    trial, tmp_path, given, unit, lost
):
    """With a site missing the divisor shrinks by its share, which is public as well."""
    experiment = trial(unit, "not_private_seed=4", "protocol.name=plain")
    gone = losing("upload", site=lost) if lost else None
    ((contributors, mean),) = played(experiment, tmp_path / "run", 1, gone)
    consortium = simulation.assemble(experiment)
    vectors = dict(zip(consortium.sites, given, strict=True))
    assert set(vectors) - set(contributors) == ({lost} if lost else set())
    plan = consortium.plan
    divisor = len(contributors)
    if isinstance(plan, RecordDistributed):
        divisor *= 48 / 4
    total = sum(vectors[site] for site in contributors)
    np.testing.assert_allclose(np.frombuffer(mean), total * plan.grid / divisor, rtol=1e-12)
    assert np.abs(total).min() > 0


@SECURE
def test_with_pruning_only_surviving_coordinates_are_noised_and_sent(
    trial, tmp_path, given, protocol
):
    pruned = ("pruning.sparsity=0.5", "pruning.schedule=one-shot")
    done = run(trial("record", f"protocol.name={protocol}", *pruned), tmp_path / "run")
    assert [len(vector) for vector in given] == [8] * 4 + [4] * 8
    assert done.summary.sparsity == 0.5
    trained = load_file(done.directory / "model.safetensors")
    flat = np.concatenate([value.ravel() for value in trained.values()])
    assert (flat == 0).sum() == 4


def test_a_huge_coordinate_is_neither_clamped_nor_refused_and_spoils_no_other_slot(
    trial, bench, monkeypatch
):
    """Clamping after the noise would tell of it; packing is linear, so a wrap stays in its slot."""
    made = bench(trial("record", "not_private_seed=5", "protocol.name=plain"))
    encoding = made.encoding
    assert isinstance(encoding, Integers)
    real, far = Trainer.noised_sum, encoding.fields  # the first coordinate of the second slot

    def shifted(self, *arguments, by: int):
        vector = real(self, *arguments)
        vector[far] += by
        return vector

    uploads = {}
    for by in (0, 1 << 45, -(1 << 59) - 12345):
        monkeypatch.setattr(
            Trainer, "noised_sum", lambda self, *arguments, by=by: shifted(self, *arguments, by=by)
        )
        uploads[by] = _slots(made.clients["east"].answer(made.first(1 + len(uploads))), encoding)
    usual = uploads.pop(0)
    for by, slots in uploads.items():
        assert (slots != usual).tolist() == [False, False, True]
        moved = (int(slots[2]) - int(usual[2])) % (1 << encoding.plain_bits)
        assert moved == by % (1 << encoding.plain_bits)


def _slots(reply: bytes, encoding: Integers) -> np.ndarray:
    """The slots of an upload of eight coordinates under plain."""
    upload = Upload.from_bytes(Answer.from_bytes(reply).body)
    packed = np.frombuffer(upload.payload, np.uint8)
    return unpack(packed, encoding.slots(8), encoding.plain_bits)


# --- what is public ------------------------------------------------------------------------------


def test_plan_and_grid_do_not_depend_on_how_many_records_a_site_holds(trial, clinics, tmp_path):
    header, *rows = clinics.read_text().splitlines()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join([header, *rows[::3]]) + "\n")
    made = [simulation.assemble(trial("record", *o)) for o in ((), (f"data.path={fewer}",))]
    sizes = [sum(map(len, each.sites.values())) for each in made]
    assert sizes[0] > 2.5 * sizes[1]
    assert made[0].plan == made[1].plan
    experiment = trial("record")
    first, second = (agreement.encoding(experiment, 4, each.plan) for each in made)
    assert first == second
    assert first.unit == pytest.approx(4 * made[0].plan.grid / 48)


def test_a_site_with_fewer_records_than_the_expected_batch_takes_part(trial):
    """The batch is of all sites together: what a site holds is not compared with anything."""
    consortium = simulation.assemble(trial("record"))
    assert min(map(len, consortium.sites.values())) < 48


@pytest.mark.parametrize(
    ("people", "telling"),
    [(None, "has no column 'patient'"), ("", "has records without a patient")],
)
def test_a_site_that_cannot_tell_its_people_apart_is_refused(trial, bench, people, telling):
    """Rows of unknown people would be clipped as if they were one person's."""
    made = bench(trial("person"))
    table = made.tables["east"]
    groups = {name: column for name, column in table.groups.items() if name != "patient"}
    if people is not None:
        groups["patient"] = np.append(table.groups["patient"][:-1], people)
    made.clients.pop("east").close()
    made.tables = {**made.tables, "east": dataclasses.replace(table, groups=groups)}
    with pytest.raises(ConfigurationError, match=f"^east {telling}") as caught:
        made.client("east")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["record", "person"])
def test_local_noise_needs_an_expected_batch_of_what_is_protected(trial, unit):
    """The clinics have more than 20 records each, and at most 20 patients."""
    local = ("privacy.noise=local", "privacy.expected_batch=20", "privacy.epsilon=20.0")
    experiment = trial(unit, *local, "protocol.name=plain")
    if unit == "record":
        assert simulation.assemble(experiment).plan.unit == "record"
    else:
        with pytest.raises(ConfigurationError, match=r"fewer people than .*expected_batch = 20"):
            simulation.assemble(experiment)


@UNITS
def test_plans_follow_the_cohort_and_what_the_protocol_enforces(trial, unit):
    plan = simulation.assemble(trial(unit)).plan
    assert isinstance(plan, SiteDistributed if unit == "site" else RecordDistributed)
    assert (plan.cohort.sites, plan.cohort.minimum, plan.cohort.tolerated) == (4, 3, 1)
    assert plan.dimension == 8
    assert plan.cohort.shares(Observer.OTHERS) == 2
    assert plan.spent(5) <= plan.epsilon < plan.spent(6)
    told = {"record": "one record", "person": "one person", "site": "one site's updates"}
    assert told[unit] in plan.adjacency


def test_a_field_too_wide_for_a_slot_is_the_users_mistake(trial):
    with pytest.raises(
        ConfigurationError, match=r"privacy: field_bits = \d+: a slot has"
    ) as caught:
        simulation.assemble(trial("record", "privacy.signal=1e17"))
    assert "\n" not in str(caught.value)


def test_the_signal_bound_widens_the_field(trial):
    encodings = []
    for signal in ("1.0", "1e4"):
        experiment = trial("record", f"privacy.signal={signal}")
        encodings.append(agreement.encoding(experiment, 4, simulation.assemble(experiment).plan))
    assert encodings[0].field_bits + 5 < encodings[1].field_bits


# --- charges -------------------------------------------------------------------------------------


@UNITS
@SECURE
def test_the_charge_is_on_disk_before_a_record_is_read(trial, bench, monkeypatch, unit, protocol):
    """Before the sample, the gradients and the noise."""
    made = bench(trial(unit, f"protocol.name={protocol}"))
    requests = made.drive(1, "upload")
    on_disk: list[int] = []
    real = Trainer.noised_sum

    def watched(self, weights, mask, randomness):
        def drawing(size: int) -> bytes:
            on_disk.append(SiteStore(made.folder / "south").charged)
            return randomness(size)

        on_disk.append(SiteStore(made.folder / "south").charged)
        return real(self, weights, mask, drawing)

    monkeypatch.setattr(Trainer, "noised_sum", watched)
    assert SiteStore(made.folder / "south").charged == 0
    assert isinstance(made.ask("south", requests["south"]), Answer)
    assert len(on_disk) >= 2
    assert set(on_disk) == {1}


@pytest.mark.parametrize("unit", ["record", "site"])
def test_every_round_and_every_abort_has_new_noise_and_a_new_charge(trial, tmp_path, given, unit):
    """The lost round's vectors were sent: no later one may be the same, nor its noise."""
    done = run(trial(unit), tmp_path / "run", exchange=losing("confirm", {2}))
    assert done.summary.aborted_rounds == (2,)
    assert done.summary.private
    assert len(given) == 4 * 4
    for i, one in enumerate(given):
        for other in given[:i]:
            assert (one != other).sum() >= 2  # of eight; some numbers may agree by chance
    plan = simulation.assemble(trial(unit)).plan
    for site in done.summary.sites:
        assert SiteStore(done.directory / "sites" / site).charged == 4
        assert done.summary.epsilon[site] == plan.spent(4, Observer.OTHERS)
        assert plan.spent(4, Observer.PUBLIC) < done.summary.epsilon[site] <= plan.epsilon
    past = [record.epsilon["east"] for record in read_history(done.directory).rounds]
    assert past == [plan.spent(count) for count in (1, 3, 4)]
    assert (done.summary.delta, done.summary.adjacency) == (1e-3, plan.adjacency)
    assert done.summary.accountant == plan.cost(4).accountant


def test_an_upload_asked_for_twice_is_one_vector_and_one_charge(trial, bench, given):
    made = bench(trial("record"))
    request = made.drive(1, "upload")["west"]
    first = made.clients["west"].answer(request)
    assert made.clients["west"].answer(request) == first
    assert len(given) == 1
    assert SiteStore(made.folder / "west").charged == 1


@pytest.mark.parametrize("unit", ["record", "site"])
def test_a_run_stops_when_its_budget_is_spent(trial, tmp_path, given, unit):
    """Three rounds and two spare ones: the sixth is refused at every site, before it reads."""
    done = run(trial(unit), tmp_path / "run", exchange=losing("confirm", {1, 2, 4}))
    assert done.summary.stopped == "privacy budget spent"
    assert done.summary.rounds == 2
    assert len(given) == 5 * 4
    assert all(value <= done.summary.epsilon["east"] for value in done.summary.epsilon.values())
    assert done.summary.epsilon["east"] <= simulation.assemble(trial(unit)).plan.epsilon


def test_a_sum_below_the_minimum_is_never_opened(trial, tmp_path):
    """Fewer shares of noise than the plan counts on: the round is aborted."""
    lost = {"south", "west"}

    def wrap(exchange):
        def lossy(asked, messages):
            return {s: r for s, r in exchange(asked, messages).items() if s not in lost}

        return lossy

    with pytest.raises(RunFailedError, match="2 sites advertised their keys, 3 needed"):
        run(trial("record"), tmp_path / "run", exchange=wrap)
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- what is reported ----------------------------------------------------------------------------


def test_the_mean_over_the_sites_is_reported_where_a_column_tells_them_apart(trial, tmp_path):
    experiment = trial("record", "not_private_seed=6", "protocol.name=plain")
    done = run(experiment, tmp_path / "run")
    assert not done.summary.private
    test = simulation.assemble(experiment).test
    module = models.build(experiment.model, test.shape, test.outputs, experiment.seed)
    trained = load_file(done.directory / "model.safetensors")
    names = models.layout(module).names
    models.assign(module, np.concatenate([trained[name].ravel() for name in names]))
    loss, held = models.loss(experiment.model, test.task), test.groups["clinic"]
    each = [
        evaluate(module, loss, test.take(held == site), torch.device("cpu"))["test_accuracy"]
        for site in done.summary.sites
    ]
    assert done.summary.metric[MEAN_ACCURACY] == pytest.approx(np.mean(each))
    assert len(set(each)) > 1  # else any mean would do
    together = run(
        trial(
            "record",
            "not_private_seed=6",
            "protocol.name=plain",
            "sites.count=4",
            "sites.partition=iid",
        ),
        tmp_path / "iid",
    )
    assert MEAN_ACCURACY not in together.summary.metric


def test_an_interrupted_run_goes_on_without_a_charge_forgotten(trial, tmp_path):
    class StopError(Exception):
        pass

    class Stopping:
        def started(self, rounds: int, done: int) -> None: ...
        def phase(self, round_number: int, phase: str) -> None: ...
        def finished(self, record) -> None:
            if record.update == 2:
                raise StopError

    seeded = trial("person", "not_private_seed=7", "aggregation.average_from=2")
    whole = run(seeded, tmp_path / "whole")
    with pytest.raises(StopError):
        run(seeded, tmp_path / "run", progress=Stopping())
    done = resume(tmp_path / "run")
    assert model(done.directory) == model(whole.directory)
    assert done.summary.epsilon == whole.summary.epsilon
