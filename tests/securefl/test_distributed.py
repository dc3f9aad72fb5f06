"""Runs whose noise only the sum has enough of: what the sites give, and what the server gets."""

from __future__ import annotations

import dataclasses
import math
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
from securefl.messages import Answer, Refusal, Request
from securefl.privacy.plan import Observer, RecordDistributed, SiteDistributed
from securefl.privacy.training import Trainer
from securefl.records import read_history
from securefl.runs import MEAN_ACCURACY, RunFailedError, Wrap
from securefl.server import Server
from securefl.state import apply, first_state
from securefl.store import SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

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


class StopError(Exception):
    pass


class Stopping:
    """Progress that stops a run once two rounds are on disk."""

    def started(self, rounds: int, done: int) -> None: ...
    def phase(self, round_number: int, phase: str) -> None: ...
    def finished(self, record) -> None:
        if record.update == 2:
            raise StopError


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

    def noted(self, *arguments):
        seen.append(real(self, *arguments))
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


# --- rotated updates -----------------------------------------------------------------------------

WIDE = ("model.name=mlp", "model.hidden=[200]", "privacy.epsilon=150.0")
"""1,202 parameters: rotated, a site's clip is spread over 1,024 of them."""


def test_rotation_is_used_exactly_where_it_narrows_the_fields(trial):
    for overrides, expected in (
        ((), False),  # eight parameters: Hoeffding's bound over eight says nothing
        (WIDE, True),
        ((*WIDE, "pruning.sparsity=0.5"), True),
        ((*WIDE, "pruning.sparsity=0.99"), False),  # the fields must hold the last rounds as well
    ):
        experiment = trial("site", *overrides)
        plan = simulation.assemble(experiment).plan
        assert agreement.rotates(experiment, plan) == expected
        plain = plan.field_bits(agreement.OVERFLOW)
        field = agreement.encoding(experiment, 4, plan).field_bits
        assert (field < plain) == expected
        assert field <= plain
        assert (agreement.rotation(experiment, plan, 0, 10) is not None) == expected
    records = trial("record", "model.name=mlp", "model.hidden=[200]")
    assert not agreement.rotates(records, simulation.assemble(records).plan)
    assert not agreement.rotates(records, None)


def test_every_update_has_a_rotation_of_its_own_and_all_sites_the_same(trial):
    experiment = trial("site", *WIDE)
    plan = simulation.assemble(experiment).plan
    made = [agreement.rotation(experiment, plan, update, 1202) for update in range(20)]
    assert len({rotation.material for rotation in made}) == 20
    other = experiment.model_copy(update={"seed": 1})
    assert agreement.rotation(other, plan, 0, 1202) not in made
    assert agreement.rotation(trial("site", *WIDE), plan, 3, 1202) == made[3]


def test_rotated_updates_come_back_as_the_mean_of_the_clipped_ones(
    trial, tmp_path, given, monkeypatch
):
    """What is sent is rotated; what the server gets is not, and has the stated noise."""
    updates: list[np.ndarray] = []
    real = Trainer._trained

    def trained(self, *arguments):
        updates.append(real(self, *arguments).astype(np.float64))
        return updates[-1].astype(np.float32)

    monkeypatch.setattr(Trainer, "_trained", trained)
    experiment = trial("site", *WIDE, "not_private_seed=3", "protocol.name=plain")
    means = [np.frombuffer(mean) for _, mean in played(experiment, tmp_path / "run", rounds=2)]
    plan = simulation.assemble(experiment).plan
    for number, mean in enumerate(means):
        mine = slice(4 * number, 4 * number + 4)
        clipped = [u * min(1.0, plan.clip / np.linalg.norm(u)) for u in updates[mine]]
        expected = np.mean(clipped, axis=0)
        noise = plan.grid * math.hypot(plan.deviation, 0.5) / math.sqrt(4)  # 0.5: of rounding
        assert 0.9 * plan.grid * plan.deviation / 2 < (mean - expected).std() < 1.1 * noise
        sent = sum(given[mine]) * plan.grid / 4
        assert np.linalg.norm(sent - expected) > 0.5 * np.linalg.norm(expected)
        rotation = agreement.rotation(experiment, plan, number, 1202)
        np.testing.assert_array_equal(rotation.restore(sent), mean)


@pytest.mark.parametrize("more", [(), ("pruning.sparsity=0.5", "pruning.schedule=one-shot")])
def test_rotated_runs_agree_bit_for_bit_whoever_opens(trial, tmp_path, more):
    """Under plain, where the server opens masked-bfv's sum, and where each site opens its own."""
    seeded = (*WIDE, *more, "not_private_seed=3", "rounds=2")
    ways = ("name=plain", "name=masked-bfv", "name=secagg", "reveal=sites")
    models_ = []
    for way in ways:
        name = () if way.startswith("name") else ("protocol.name=masked-bfv",)
        experiment = trial("site", *seeded, *name, f"protocol.{way}")
        assert agreement.rotates(experiment, simulation.assemble(experiment).plan)
        models_.append(model(run(experiment, tmp_path / way).directory))
    assert len(set(models_)) == 1


# --- a clip that follows a quantile --------------------------------------------------------------

FAR = ("privacy.clip_quantile=0.5", "privacy.clip=20.0", "privacy.clip_learning_rate=0.5")
"""Every gradient and update is within this clip, so that it shrinks round by round."""


def clips(folder: Path) -> list[float | None]:
    return [record.clip for record in read_history(folder).rounds]


@pytest.mark.parametrize("unit", ["record", "site"])
def test_an_adaptive_clip_is_the_same_whoever_opens_bit_for_bit(trial, tmp_path, unit):
    """Under plain, where the server opens masked-bfv's sum, and where each site opens its own.

    With pruning, and the sites' updates rotated.
    """
    seeded = (*FAR, "pruning.sparsity=0.5", "pruning.schedule=one-shot", "not_private_seed=3")
    if unit == "site":
        seeded += WIDE
    told = []
    for way in ("name=plain", "name=masked-bfv", "reveal=sites"):
        name = () if way.startswith("name") else ("protocol.name=masked-bfv",)
        experiment = trial(unit, *seeded, *name, f"protocol.{way}")
        done = run(experiment, tmp_path / way)
        assert agreement.rotates(experiment, simulation.assemble(experiment).plan) == (
            unit == "site"
        )
        told.append((model(done.directory), clips(done.directory)))
    assert told[0] == told[1] == told[2]
    past = told[0][1]
    assert past[0] == 20.0
    assert all(20 * math.exp(-0.5 * i) <= clip < 20 for i, clip in enumerate(past) if i)


@pytest.mark.parametrize("unit", ["record", "person", "site"])
def test_the_clip_of_a_run_moves_as_the_opened_counts_say(trial, tmp_path, given, unit):
    experiment = trial(unit, *FAR, "not_private_seed=3", "protocol.name=plain")
    plan = simulation.assemble(experiment).plan
    done = run(experiment, tmp_path / "run")
    expected = [20.0]
    for number in range(3):
        total = sum(vector[-1] for vector in given[4 * number : 4 * number + 4])
        batch = 4 if unit == "site" else 48
        share = 0.5 + total * 2**16 / (2 * plan.count * batch)
        expected.append(expected[-1] * math.exp(-0.5 * max(-1.0, min(1.0, share - 0.5))))
    assert clips(done.directory) == pytest.approx(expected[:3], rel=1e-9)
    assert done.summary.epsilon["east"] == plan.spent(3)


def test_a_site_with_local_noise_tells_its_share_and_the_clip_follows(trial, tmp_path):
    local = (
        "privacy.noise=local",
        "privacy.expected_batch=10",
        "privacy.epsilon=30.0",
        "training.local_steps=2",
        "training.learning_rate=0.01",
    )
    fixed = run(trial("record", *local, "protocol.name=bfv"), tmp_path / "fixed")
    assert clips(fixed.directory) == [None] * 3
    told = []
    for way in ("name=bfv", "name=masked-bfv"):
        experiment = trial("record", *local, *FAR, "not_private_seed=2", f"protocol.{way}")
        done = run(experiment, tmp_path / way)
        told.append((model(done.directory), clips(done.directory)))
        assert done.summary.epsilon["east"] <= 30
    assert told[0] == told[1]
    past = told[0][1]
    assert past[0] == 20.0
    assert past[2] < past[1] < 20
    # About as many are sampled as are expected, and nearly all of them are within.
    assert past[2] == pytest.approx(20 * math.exp(-0.5 * 0.5 * 2), rel=0.25)


@pytest.mark.parametrize("reveal", ["server", "sites"])
def test_a_run_that_was_stopped_goes_on_with_its_clip(trial, tmp_path, reveal):
    ways = ("protocol.name=masked-bfv", f"protocol.reveal={reveal}")
    seeded = trial("person", *FAR, "not_private_seed=7", *ways)
    whole = run(seeded, tmp_path / "whole")
    with pytest.raises(StopError):
        run(seeded, tmp_path / "run", progress=Stopping())
    done = runs.resume(tmp_path / "run")  # with its report
    assert clips(done.directory) == clips(whole.directory)
    assert len(set(clips(done.directory))) == 3
    assert model(done.directory) == model(whole.directory)


@pytest.mark.parametrize(("overrides", "refused"), [((), True), (FAR, False)])
def test_a_server_cannot_move_a_clip_that_the_experiment_holds_fixed(
    trial, bench, overrides, refused
):
    made = bench(trial("record", *overrides))
    state = dataclasses.replace(made.model, clip_scale=4.0)
    reply = made.ask("east", made.first(1, state))
    assert isinstance(reply, Refusal) == refused
    if refused:
        assert "moves the clip" in reply.reason


def test_sites_that_are_shown_different_clips_make_no_sum(trial, bench):
    """The clip is in what masks are bound to."""
    made = bench(trial("record", *FAR))
    other = dataclasses.replace(made.model, clip_scale=0.5)
    reply = made.ask(
        "east", made.request(1, "advertise", made.begin(1).to_bytes(), other.to_message())
    )
    assert isinstance(reply, Refusal)
    assert "another model" in reply.reason


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

    def watched(self, weights, mask, randomness, *more):
        def drawing(size: int) -> bytes:
            on_disk.append(SiteStore(made.folder / "south").charged)
            return randomness(size)

        on_disk.append(SiteStore(made.folder / "south").charged)
        return real(self, weights, mask, drawing, *more)

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
    seeded = trial("person", "not_private_seed=7", "aggregation.average_from=2")
    whole = run(seeded, tmp_path / "whole")
    with pytest.raises(StopError):
        run(seeded, tmp_path / "run", progress=Stopping())
    done = resume(tmp_path / "run")
    assert model(done.directory) == model(whole.directory)
    assert done.summary.epsilon == whole.summary.epsilon
