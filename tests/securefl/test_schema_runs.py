"""Runs on the sites' own files: what is fitted, trained, evaluated and written, and for whom."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from typer.testing import CliRunner

from protocols.catalogue import PROTOCOLS
from securefl import agreement, config, data, evaluation, models, simulation, store
from securefl.cli import app
from securefl.config import ConfigurationError, Experiment
from securefl.data import Frame, Table
from securefl.data.sources import load_frame, load_frames
from securefl.prediction import Model
from securefl.preprocessing import NOISY, Fitted, Preprocessor
from securefl.records import EvaluationRecord, read_history
from securefl.runs import Run, run
from securefl.store import SiteStore
from securefl.tallies import LOSS_CAP

SITES = ("east", "north", "south")
LOCAL = (
    "privacy.epsilon=6.0",
    "privacy.delta=1e-3",
    "privacy.rate=0.3",
    "privacy.expected_batch=10",
)
DISTRIBUTED = (
    "privacy.noise=distributed",
    "privacy.epsilon=6.0",
    "privacy.delta=1e-3",
    "privacy.rate=0.3",
    "privacy.expected_batch=40",
    "protocol.name=secagg",
)
PLANS = pytest.mark.parametrize("plan", [LOCAL, DISTRIBUTED], ids=["local", "distributed"])
BY_COLUMN = ('person = "patient"', 'person = "patient"\ntest = "part"')
"""What makes the clinic's schema one whose column says which rows are for tests."""


def bare_run(experiment: Experiment, folder: Path, **more: Any) -> Run:
    return run(experiment, folder, report=False, **more)


def parts(experiment: Experiment) -> dict[str, tuple[Frame, Frame]]:
    """Every site's training and test rows."""
    frames = load_frames(experiment.data)
    return {site: data.held_out(frame, experiment) for site, frame in frames.items()}


def preprocessor(experiment: Experiment) -> Preprocessor:
    made = agreement.preprocessor(experiment, 3)
    assert made is not None
    return made


def fitted(folder: Path) -> Fitted:
    told = json.loads((folder / "preprocessing.json").read_text())
    return msgspec.convert(told["values"], Fitted)


def pooled(experiment: Experiment) -> Fitted:
    """What preprocessing is fitted to where somebody has all training rows."""
    made, rows = preprocessor(experiment), [train for train, _ in parts(experiment).values()]
    values = made.start()
    for stage in range(made.stages):
        total = made.encode(stage, values, Frame.concatenate(rows), None)
        values = made.fit(stage, values, total, 0.0)
    return values


def evaluations(folder: Path) -> list[EvaluationRecord]:
    lines = store.whole_lines(folder / "evaluations.jsonl")
    return [EvaluationRecord.from_json(line) for line in lines]


def network(experiment: Experiment, folder: Path) -> torch.nn.Module:
    """The trained model, put together by hand."""
    made = preprocessor(experiment)
    module = models.build(experiment.model, made.shape, made.outputs, experiment.seed)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.eval()


def outputs_on(experiment: Experiment, folder: Path, frame: Frame) -> tuple[NDArray[Any], Table]:
    """The trained model's logits on `frame`, and the features they are of."""
    table = preprocessor(experiment).apply(fitted(folder), frame)
    outputs = network(experiment, folder)(torch.from_numpy(table.features))
    return outputs.detach().double().numpy(), table


# --- files become a model ------------------------------------------------------------------------


def test_files_with_gaps_become_a_model_that_predicts_as_the_parts_do_by_hand(clinic, tmp_path):
    made = clinic()
    experiment = made.experiment("rounds=6", "protocol.name=masked-bfv")
    done = bare_run(experiment, tmp_path / "run")
    summary, folder = done.summary, done.directory
    assert summary.sites == SITES
    assert summary.metric["test_auc"] > 0.8
    assert set(summary.intervals) <= set(summary.metric)
    for name, (low, high) in summary.intervals.items():
        assert low <= summary.metric[name] <= high
    assert {"test_auc", "test_accuracy"} <= set(summary.intervals)
    rows = sum(len(train) for train, _ in parts(experiment).values())
    assert (summary.trained_on, summary.counted) == (rows, "records")
    (last,) = evaluations(folder)
    assert last.update == 6
    assert last.sites == SITES
    assert last.figures.values.items() <= summary.metric.items()
    about = json.loads((folder / "model.json").read_text())
    assert msgspec.convert(about["fitted"], Fitted) == fitted(folder)
    assert about["schema"]["columns"]["age"]["unit"] == "years"
    assert list(about["inputs"]) == about["features"]
    # One file, by the library and by the command.
    frame = load_frame(made.file("south"), experiment.data.agreed, "south")
    outputs, table = outputs_on(experiment, folder, frame)
    by_hand = torch.softmax(torch.from_numpy(outputs), 1).numpy()
    model = Model.load(folder)
    (part,) = model.predict(made.file("south"))
    assert len(part.values) == len(made.rows["south"]) == len(table)
    np.testing.assert_array_equal(part.values, by_hand)
    np.testing.assert_array_equal(model.chosen(part), by_hand.argmax(1))
    said = CliRunner().invoke(app, ["predict", str(folder), str(made.file("south"))])
    assert said.exit_code == 0, said.output
    lines = list(csv.DictReader(io.StringIO(said.stdout)))
    assert [line["prediction"] for line in lines] == [
        ("no", "yes")[chosen] for chosen in by_hand.argmax(1)
    ]
    told = [float(line["probability of yes"]) for line in lines]
    np.testing.assert_allclose(told, by_hand[:, 1], atol=1e-6)  # six figures


def test_a_file_without_labels_people_or_test_marks_is_predicted(clinic, tmp_path):
    made = clinic(changes=BY_COLUMN)
    folder = bare_run(made.experiment(), tmp_path / "run").directory
    bare = tmp_path / "new.csv"
    with bare.open("w", newline="") as target:
        names = ["smoker", "marker", "bmi", "age"]
        writer = csv.DictWriter(target, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made.rows["north"])
    model = Model.load(folder)
    (whole,), (part,) = model.predict(made.file("north")), model.predict(bare)
    np.testing.assert_array_equal(part.values, whole.values)


def test_where_a_required_value_is_missing_nothing_is_predicted(clinic, tmp_path):
    made = clinic()
    experiment = made.experiment('preprocessing.required=["age", "smoker"]')
    folder = bare_run(experiment, tmp_path / "run").directory
    lacking = [row["age"] == "?" or row["smoker"] == "" for row in made.rows["east"]]
    assert any(lacking)
    out = tmp_path / "out.csv"
    command = ["predict", str(folder), str(made.file("east")), "--output", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    lines = list(csv.DictReader(out.open()))
    assert [line["row"] for line in lines] == [str(i + 1) for i in range(len(lacking))]
    assert [line["prediction"] == "" for line in lines] == lacking
    assert [line["probability of no"] == "" for line in lines] == lacking


def test_a_run_without_a_schema_predicts_on_a_file_of_its_features(tmp_path):
    names, rng = ("a", "b"), np.random.default_rng(1)
    values = rng.uniform(-3, 3, (80, 2))
    labels = np.where(values.sum(1) > 0, "high", "low")
    path = tmp_path / "rows.csv"
    lines = [f"{a:.4f},{b:.4f},{y}" for (a, b), y in zip(values, labels, strict=True)]
    path.write_text("\n".join([",".join((*names, "y")), *lines]) + "\n")
    experiment = config.parse(
        f'rounds = 2\n[data]\nsource = "table"\npath = "{path}"\nlabel = "y"\n'
        'classes = ["low", "high"]\ndefault_range = [-3, 3]\n[sites]\ncount = 3\n'
        '[model]\nname = "logistic"\n[protocol]\nname = "plain"\n'
    )
    folder = bare_run(experiment, tmp_path / "run").directory
    alone = tmp_path / "features.csv"
    alone.write_text("\n".join(["a,b", *(line.rpartition(",")[0] for line in lines)]) + "\n")
    (part,) = Model.load(folder).predict(alone)
    module = models.build(experiment.model, (2,), 2, 0)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        scaled = torch.tensor(np.round(values, 4) / 3, dtype=torch.float32)
        by_hand = torch.softmax(module(scaled).double(), 1).numpy()
    np.testing.assert_allclose(part.values, by_hand, atol=1e-6)


# --- what is fitted ------------------------------------------------------------------------------

FITTINGS = {
    "by default": (),
    "quantiles": (
        "preprocessing.clip_quantiles=[0.05, 0.95]",
        "preprocessing.impute=median",
        "preprocessing.class_weights=balanced",
        "preprocessing.indicators=true",
    ),
    "median": ("preprocessing.scale=range", "preprocessing.impute=median"),
}


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("said", FITTINGS.values(), ids=FITTINGS)
def test_fitted_values_are_those_of_all_training_rows_together(clinic, tmp_path, protocol, said):
    experiment = clinic().experiment("rounds=1", f"protocol.name={protocol}", *said)
    folder = bare_run(experiment, tmp_path / "run").directory
    assert fitted(folder).to_bytes() == pooled(experiment).to_bytes()


def test_a_site_all_of_whose_rows_are_for_tests_takes_part(clinic, drawn, tmp_path):
    for row in drawn["south"]:
        row["part"] = "test"
    made = clinic(drawn, BY_COLUMN)
    experiment = made.experiment()
    done = bare_run(experiment, tmp_path / "run")
    assert len(parts(experiment)["south"][0]) == 0
    assert fitted(done.directory).to_bytes() == pooled(experiment).to_bytes()
    (last,) = evaluations(done.directory)
    assert last.figures.rows == sum(len(test) for _, test in parts(experiment).values())


def test_a_site_without_training_rows_adds_its_share_of_noise_and_nothing_else(
    clinic, drawn, tmp_path
):
    for row in drawn["south"]:
        row["part"] = "test"
    experiment = clinic(drawn, BY_COLUMN).experiment(*DISTRIBUTED)
    done = bare_run(experiment, tmp_path / "run")
    assert done.summary.private
    for record in read_history(done.directory).rounds:
        assert record.survivors == SITES


def test_where_the_schema_says_enough_nothing_is_fitted_and_nothing_counted(
    clinic, private, tmp_path
):
    experiment = clinic().experiment(
        *private,
        "preprocessing.scale=range",
        "preprocessing.impute=middle",
        "preprocessing.minimum_count=0",
    )
    done = bare_run(experiment, tmp_path / "run")
    assert done.summary.trained_on is None
    for site in SITES:
        assert SiteStore(done.directory / "sites" / site).released("statistics-0") == 0
    about = json.loads((done.directory / "model.json").read_text())
    assert msgspec.convert(about["fitted"], Fitted) == preprocessor(experiment).start()


def test_a_number_is_learned_and_predicted_in_its_own_unit(clinic, tmp_path):
    """Rows without a label teach nothing, and are predicted all the same."""
    made = clinic(changes=('label = "outcome"', 'label = "bmi"'))
    experiment = made.experiment("rounds=6", "model.name=linear", "training.learning_rate=0.1")
    folder = bare_run(experiment, tmp_path / "run").directory
    assert fitted(folder).to_bytes() == pooled(experiment).to_bytes()
    test = Frame.concatenate([test for _, test in parts(experiment).values()])
    outputs, table = outputs_on(experiment, folder, test)
    (last,) = evaluations(folder)
    assert last.figures.rows == len(table)
    error = (outputs[:, 0] - table.target) * (60 - 10) / 2
    told = last.figures.values
    assert told["test_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert told["test_rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    (part,) = Model.load(folder).predict(made.file("east"))
    assert part.known.all()
    frame = load_frame(made.file("east"), experiment.data.agreed, "east")
    outputs, _ = outputs_on(experiment, folder, frame)
    expected = (outputs + 1) / 2 * (60 - 10) + 10
    labelled = [row["bmi"] != "-9" for row in made.rows["east"]]
    assert not all(labelled)
    np.testing.assert_allclose(part.values[labelled], expected, rtol=1e-6)


# --- test rows and training rows -----------------------------------------------------------------


@pytest.mark.parametrize("plan", [(), LOCAL, DISTRIBUTED], ids=["none", "local", "distributed"])
def test_nothing_that_test_rows_hold_reaches_the_model(clinic, drawn, tmp_path, plan):
    made = clinic(changes=BY_COLUMN)
    for rows in drawn.values():
        for row in rows:
            if row["part"] == "test":
                row |= {"age": "99", "bmi": "?", "smoker": "1", "outcome": "0"}
    told = []
    for name, place in (("as it is", made), ("changed", clinic(drawn, BY_COLUMN))):
        experiment = place.experiment("not_private_seed=3", *plan)
        folder = bare_run(experiment, tmp_path / name).directory
        weights = (folder / "model.safetensors").read_bytes()
        told.append((weights, fitted(folder), evaluations(folder)[-1].figures))
    assert told[0][:2] == told[1][:2]
    assert told[0][2] != told[1][2]


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_the_consortiums_figures_are_those_of_all_test_rows_in_one_place(
    clinic, tmp_path, protocol
):
    experiment = clinic().experiment("rounds=4", f"protocol.name={protocol}", "evaluation.every=2")
    folder = bare_run(experiment, tmp_path / "run").directory
    held = {site: test for site, (_, test) in parts(experiment).items()}
    _, table = outputs_on(experiment, folder, Frame.concatenate(list(held.values())))
    module, loss = network(experiment, folder), models.loss(experiment.model, "classification")
    expected = evaluation.evaluate(module, loss, table, "cpu")
    first, last = evaluations(folder)
    assert (first.update, last.update) == (2, 4)
    assert last.figures.rows == len(table)
    assert last.figures.values["test_accuracy"] == pytest.approx(expected["test_accuracy"])
    ill = int(table.target.sum())
    # Of so few rows a pair that shares a bin weighs 1 / (2 ill well) by itself: four may.
    resolution = 0.002 + 2 / (ill * (len(table) - ill))
    assert last.figures.values["test_auc"] == pytest.approx(expected["test_auc"], abs=resolution)
    tally = agreement.tally(experiment, len(SITES))
    assert tally is not None
    # A loss weighs a quarter and is made whole: the mean is within five deviations of rounding.
    step = LOSS_CAP * 4 / 2**tally.bits
    rounding = 5 * step / (12 * len(table)) ** 0.5
    assert last.figures.values["test_loss"] == pytest.approx(expected["test_loss"], abs=rounding)
    for site, frame in held.items():
        lines = store.whole_lines(folder / "sites" / site / "figures.jsonl")
        assert [json.loads(line)["update"] for line in lines] == [2, 4]
        own = json.loads(lines[-1])["figures"]
        _, alone = outputs_on(experiment, folder, frame)
        by_hand = evaluation.evaluate(module, loss, alone, "cpu")
        assert own["test_accuracy"] == pytest.approx(by_hand["test_accuracy"])
        assert own["test_auc"] == pytest.approx(by_hand["test_auc"], abs=0.002)


def test_workers_fit_and_evaluate_as_one_process_does(clinic, tmp_path):
    """One worker, for all sites: that several share them out is told in test_workers."""
    made = clinic()
    told = []
    for workers in (0, 1):
        experiment = made.experiment(
            *LOCAL, "not_private_seed=5", f"engine.workers={workers}", "rounds=2"
        )
        folder = bare_run(experiment, tmp_path / str(workers)).directory
        weights = (folder / "model.safetensors").read_bytes()
        told.append((fitted(folder), evaluations(folder)[-1].figures, weights))
    assert told[0] == told[1]


# --- under a plan --------------------------------------------------------------------------------


def units(experiment: Experiment, name: str) -> float:
    """The deviation of the noise in one count of a release, all sites' together, in rows."""
    made = agreement.preprocessor(experiment, 3)
    module = models.build(experiment.model, made.shape, made.outputs, 0)
    plan = agreement.plan(experiment, 3, models.layout(module).size)
    (found,) = [r for r in agreement.releases(experiment, 3, plan) if r.name == name]
    return found.event.deviation * 3**0.5 / (1 << NOISY.bits)


@PLANS
def test_under_a_plan_statistics_and_figures_have_noise_and_stay_within_epsilon(
    clinic, tmp_path, plan
):
    experiment = clinic().experiment(*plan)
    done = [bare_run(experiment, tmp_path / str(i)) for i in range(2)]
    one, two = (fitted(item.directory) for item in done)
    assert not one.exact
    assert one.rows != two.rows
    assert one.numbers[0].centre != two.numbers[0].centre
    first, second = (evaluations(item.directory)[-1].figures for item in done)
    assert not first.exact
    assert first.rows != second.rows
    rows = sum(len(train) for train, _ in parts(experiment).values())
    for item in done:
        summary = item.summary
        assert summary.private
        assert set(summary.epsilon) == set(SITES)
        assert all(0 < spent <= 6.0 for spent in summary.epsilon.values())
        assert abs(summary.trained_on - rows) <= 6 * units(experiment, "statistics-0")
        assert not any("Exact" in sentence for sentence in summary.outside_guarantee)


@PLANS
def test_statistics_take_their_share_of_epsilon_from_training(clinic, plan):
    made = clinic()
    nothing = ("preprocessing.scale=range", "preprocessing.impute=middle")
    plans = []
    for more in ((), (*nothing, "preprocessing.minimum_count=0")):
        experiment = made.experiment(*plan, *more, "preprocessing.share=0.3")
        size = preprocessor(experiment).shape[0] * 2 + 2
        plans.append(agreement.plan(experiment, 3, size))
    fits, free = plans
    assert fits.statistics is not None
    assert free.statistics is None
    assert fits.spent(0) > free.spent(0) == 0
    for rounds in (1, 3):
        without = dataclasses.replace(fits, statistics=None).spent(rounds)
        assert max(without, fits.spent(0)) <= fits.spent(rounds)
    # As much is promised, so that training must do with less.
    assert dataclasses.replace(fits, statistics=None).spent(5) < free.spent(5) <= 6.0


def test_every_release_is_charged_once_and_said(clinic, private, tmp_path):
    experiment = clinic().experiment(
        *private,
        "rounds=4",
        "evaluation.every=2",
        "preprocessing.clip_quantiles=[0.05, 0.95]",
    )
    folder = bare_run(experiment, tmp_path / "run").directory
    for site in SITES:
        kept = SiteStore(folder / "sites" / site)
        assert kept.charged == 4
        counts = [kept.released(n) for n in ("statistics-0", "statistics-1", "evaluation")]
        assert counts == [1, 1, 2]
    rounds = [record.round for record in read_history(folder).rounds]
    assert rounds == [3, 4, 6, 7]
    assert [record.round for record in evaluations(folder)] == [5, 8]


def numbers(folder: Path) -> Iterator[float]:
    """Every number in what a run writes for everybody."""

    def within(tree: Any) -> Iterator[float]:
        if isinstance(tree, dict):
            tree = list(tree.values())
        if isinstance(tree, list):
            for item in tree:
                yield from within(item)
        elif isinstance(tree, int | float) and not isinstance(tree, bool):
            yield tree

    for path in folder.rglob("*.json*"):
        if "sites" not in path.relative_to(folder).parts:
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path]:
                yield from within(json.loads(text if isinstance(text, str) else path.read_text()))


@PLANS
def test_people_are_counted_and_nobody_learns_exactly_how_many(clinic, tmp_path, plan):
    experiment = clinic().experiment(
        *plan, "privacy.unit=person", "privacy.epsilon=12", "preprocessing.share=0.9"
    )
    folder = bare_run(experiment, tmp_path / "run").directory
    summary = read_history(folder).summary
    held = parts(experiment)
    for train, test in held.values():
        assert not {*train.texts["patient"]} & {*test.texts["patient"]}
    train, test = (Frame.concatenate(list(each)) for each in zip(*held.values(), strict=True))
    people = [len({*part.texts["patient"]}) for part in (train, test)]
    rows = [len(train), len(test)]
    assert rows[0] - people[0] > 12 * units(experiment, "statistics-0")
    assert summary.counted == "people"
    assert summary.adjacency.endswith("one person")
    assert abs(summary.trained_on - people[0]) <= 6 * units(experiment, "statistics-0")
    told = {*numbers(folder)}
    assert summary.trained_on in told
    assert not told & {*people, *rows, *(sum(people), sum(rows))}


def test_what_is_told_exactly_is_said(clinic, private, tmp_path):
    made = clinic()
    said = {}
    for name, more in {
        "no plan": (),
        "protected": private,
        "open": (*private, "evaluation.protected=false"),
    }.items():
        done = bare_run(made.experiment("rounds=1", *more), tmp_path / name)
        said[name] = " ".join(done.summary.outside_guarantee)
        assert evaluations(done.directory)[-1].figures.exact == (name != "protected")
        rows = sum(len(test) for _, test in parts(made.experiment()).values())
        assert (evaluations(done.directory)[-1].figures.rows == rows) == (name != "protected")
    assert "Exact statistics over all sites' training records were revealed" in said["no plan"]
    assert "how many records there are, how many values are missing, means" in said["no plan"]
    assert "Exact counts over all sites' test records were revealed" in said["no plan"]
    assert "Exact" not in said["protected"]
    assert "Exact statistics" not in said["open"]
    assert "Exact counts over all sites' test records" in said["open"]
    assert "not protected by the plan" in said["open"]


@PLANS
def test_statistics_may_take_most_of_epsilon_but_never_all(clinic, plan):
    """Whatever the share, there is a plan that keeps its promise, or one line that says why not."""
    said = (*plan, "privacy.epsilon=12")
    experiment = clinic().experiment(*said, "preprocessing.share=0.9")
    assert simulation.assemble(experiment).plan.spent(experiment.rounds + 2) <= 12
    with pytest.raises(ConfigurationError, match=r"lower preprocessing\.share") as caught:
        simulation.assemble(clinic().experiment(*said, "rounds=500", "preprocessing.share=0.999"))
    assert len(str(caught.value).splitlines()) == 1
