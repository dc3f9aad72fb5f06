"""Runs on the sites' own files: what is fitted, trained, evaluated and written, and for whom."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
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
from securefl import agreement, config, data, evaluation, models, store
from securefl.cli import app
from securefl.config import Experiment
from securefl.data import Frame, Table
from securefl.data.sources import load_frame, load_frames
from securefl.prediction import Model
from securefl.preprocessing import Fitted, Preprocessor
from securefl.records import EvaluationRecord
from securefl.runs import Run, run

SITES = {"east": 60, "north": 90, "south": 45}
SCHEMA = """
version = 1
name = "clinic"
label = "outcome"
person = "patient"
missing = ["?"]
[columns.patient]
type = "text"
[columns.part]
type = "text"
optional = true
[columns.age]
type = "number"
range = [0, 100]
unit = "years"
[columns.bmi]
type = "number"
range = [10, 60]
missing = ["-9"]
[columns.marker]
type = "number"
range = [-5, 5]
optional = true
[columns.smoker]
type = "category"
categories = { never = ["0"], former = ["1"], yes = ["2", "3"] }
[columns.outcome]
type = "category"
categories = { no = ["0"], yes = ["1"] }
"""
EXPERIMENT = """
name = "clinic"
rounds = 3
[data]
source = "table"
path = "{path}"
schema = "{schema}"
test_fraction = 0.3
[sites]
partition = "file"
[model]
name = "logistic"
[training]
learning_rate = 0.5
[protocol]
name = "plain"
"""
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
BY_COLUMN = 'person = "patient"\ntest = "part"'

Row = dict[str, str]
Rows = list[Row]


def drawn(sites: Mapping[str, int] = SITES, seed: int = 0) -> dict[str, Rows]:
    """Every site's rows: one to three a patient, with gaps; only north knows the marker."""
    rng = np.random.default_rng(seed)
    found: dict[str, Rows] = {}
    for site, count in sites.items():
        rows: Rows = []
        while len(rows) < count:
            patient, ill = f"{site}-{len(rows)}", int(rng.integers(2))
            for _ in range(min(int(rng.integers(1, 4)), count - len(rows))):
                row = {
                    "ward": "A",  # of which the schema knows nothing
                    "patient": patient,
                    "part": "test" if len(patient) % 2 else "train",
                    "age": f"{np.clip(rng.normal(50 + 15 * ill, 10), 0, 100):.1f}",
                    "bmi": f"{np.clip(rng.normal(25 + 4 * ill, 3), 10, 60):.2f}",
                    "smoker": str(rng.integers(4)),
                    "outcome": str(ill),
                }
                if site == "north":
                    row["marker"] = f"{np.clip(rng.normal(ill, 1), -5, 5):.3f}"
                for name, code in (("age", "?"), ("bmi", "-9"), ("smoker", "")):
                    if rng.random() < 0.1:
                        row[name] = code
                rows.append(row)
        found[site] = rows
    return found


class Clinic:
    """The files of three sites in a folder, and experiments on them."""

    def __init__(self, folder: Path, rows: Mapping[str, Rows], schema: str) -> None:
        self.folder, self.rows = folder, rows
        folder.mkdir(parents=True)
        self.schema = folder / "clinic.schema.toml"
        self.schema.write_text(schema)
        for site, held in rows.items():
            with self.file(site).open("w", newline="") as target:
                writer = csv.DictWriter(target, list(held[0]))
                writer.writeheader()
                writer.writerows(held)

    def file(self, site: str) -> Path:
        return self.folder / f"{site}.csv"

    def experiment(self, *overrides: str) -> Experiment:
        text = EXPERIMENT.format(path=self.folder / "*.csv", schema=self.schema)
        return config.parse(text, overrides, origin="clinic")


@pytest.fixture
def clinic(tmp_path: Path) -> Callable[..., Clinic]:
    """`clinic(rows, schema=...)`: files with those rows, by default all that `drawn` gives."""
    count = iter(range(100))

    def made(rows: Mapping[str, Rows] | None = None, schema: str = SCHEMA) -> Clinic:
        return Clinic(tmp_path / f"clinic-{next(count)}", rows or drawn(), schema)

    return made


def bare_run(experiment: Experiment, folder: Path, **more: Any) -> Run:
    return run(experiment, folder, report=False, **more)


def parts(experiment: Experiment) -> dict[str, tuple[Frame, Frame]]:
    """Every site's training and test rows."""
    frames = load_frames(experiment.data)
    return {site: data.held_out(frame, experiment) for site, frame in frames.items()}


def preprocessor(experiment: Experiment) -> Preprocessor:
    made = agreement.preprocessor(experiment, len(SITES))
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
    assert summary.sites == tuple(SITES)
    assert summary.metric["test_auc"] > 0.8
    assert set(summary.intervals) <= set(summary.metric)
    for name, (low, high) in summary.intervals.items():
        assert low <= summary.metric[name] <= high
    assert {"test_auc", "test_accuracy"} <= set(summary.intervals)
    rows = sum(len(train) for train, _ in parts(experiment).values())
    assert (summary.trained_on, summary.counted) == (rows, "records")
    (last,) = evaluations(folder)
    assert last.update == 6
    assert last.sites == tuple(SITES)
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
    made = clinic(schema=SCHEMA.replace('person = "patient"', BY_COLUMN))
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
    assert [line["row"] for line in lines] == [str(i + 1) for i in range(SITES["east"])]
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


def test_a_site_all_of_whose_rows_are_for_tests_takes_part(clinic, tmp_path):
    rows = drawn()
    for row in rows["south"]:
        row["part"] = "test"
    made = clinic(rows, SCHEMA.replace('person = "patient"', BY_COLUMN))
    experiment = made.experiment()
    done = bare_run(experiment, tmp_path / "run")
    assert len(parts(experiment)["south"][0]) == 0
    assert fitted(done.directory).to_bytes() == pooled(experiment).to_bytes()
    (last,) = evaluations(done.directory)
    assert last.figures.rows == sum(len(test) for _, test in parts(experiment).values())


# --- test rows and training rows -----------------------------------------------------------------


@pytest.mark.parametrize("plan", [(), LOCAL, DISTRIBUTED], ids=["none", "local", "distributed"])
def test_nothing_that_test_rows_hold_reaches_the_model(clinic, tmp_path, plan):
    schema = SCHEMA.replace('person = "patient"', BY_COLUMN)
    made, changed = clinic(schema=schema), drawn()
    for rows in changed.values():
        for row in rows:
            if row["part"] == "test":
                row |= {"age": "99", "bmi": "?", "smoker": "1", "outcome": "0"}
    told = []
    for name, place in (("as it is", made), ("changed", clinic(changed, schema))):
        experiment = place.experiment("not_private_seed=3", *plan)
        folder = bare_run(experiment, tmp_path / name).directory
        weights = (folder / "model.safetensors").read_bytes()
        told.append((weights, fitted(folder), evaluations(folder)[-1].figures))
    assert told[0][:2] == told[1][:2]
    assert told[0][2] != told[1][2]


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["plain", "masked-bfv"])
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
    assert last.figures.values["test_auc"] == pytest.approx(expected["test_auc"], abs=0.002)
    assert last.figures.values["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    for site, frame in held.items():
        lines = store.whole_lines(folder / "sites" / site / "figures.jsonl")
        assert [json.loads(line)["update"] for line in lines] == [2, 4]
        own = json.loads(lines[-1])["figures"]
        _, alone = outputs_on(experiment, folder, frame)
        by_hand = evaluation.evaluate(module, loss, alone, "cpu")
        assert own["test_accuracy"] == pytest.approx(by_hand["test_accuracy"])
        assert own["test_auc"] == pytest.approx(by_hand["test_auc"], abs=0.002)


def test_workers_fit_and_evaluate_as_one_process_does(clinic, tmp_path):
    made = clinic()
    told = []
    for workers in (0, 2):
        experiment = made.experiment(
            *LOCAL, "not_private_seed=5", f"engine.workers={workers}", "rounds=2"
        )
        folder = bare_run(experiment, tmp_path / str(workers)).directory
        weights = (folder / "model.safetensors").read_bytes()
        told.append((fitted(folder), evaluations(folder)[-1].figures, weights))
    assert told[0] == told[1]
