"""Whole runs: what they learn, write and never write, and how they go on after a kill."""

from __future__ import annotations

import html
import importlib.resources
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from protocols import keystream, masks, shamir
from protocols.catalogue import PROTOCOLS
from protocols.identity import SigningKey
from securefl import config, models, simulation
from securefl.config import ConfigurationError, Experiment
from securefl.evaluation import evaluate
from securefl.messages import Request
from securefl.records import Summary, read_history
from securefl.report import words, write_report
from securefl.runs import RunFailedError, resume, run
from securefl.state import GlobalState
from securefl.store import CorruptStoreError, SiteStore
from securefl.transcript import crossings

ALL = pytest.mark.parametrize("protocol", list(PROTOCOLS))
BOTH = pytest.mark.parametrize("protocol", ["plain", "masked-bfv"])
HIDING = pytest.mark.parametrize("protocol", ["bfv", "ckks", "secagg", "masked-bfv"])


def demo(*overrides: str) -> Experiment:
    text = importlib.resources.files("securefl").joinpath("demo.toml").read_text(encoding="utf-8")
    return config.parse(text, overrides, origin="demo.toml")


# A report's plots take most of a short run's time.
bare_run = partial(run, report=False)
bare_resume = partial(resume, report=False)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


# --- what is learned -----------------------------------------------------------------------------


@ALL
def test_a_classifier_is_trained_privately_on_real_patients(tmp_path, protocol):
    done = bare_run(
        demo("rounds=8", f"protocol.name={protocol}", "pruning.last_round=6"), tmp_path / "r"
    )
    summary = done.summary
    assert summary.metric["test_auc"] > 0.9
    assert summary.private
    assert summary.why_not_private is None
    assert summary.sites == tuple(f"site-{i}" for i in range(1, 6))
    assert set(summary.epsilon) == set(summary.sites)
    assert all(0 < value <= 5.0 for value in summary.epsilon.values())
    assert summary.sparsity == pytest.approx(0.9, abs=1 / summary.parameters)
    records = read_history(done.directory).rounds
    assert records[0].parameters == summary.parameters
    assert records[-1].parameters <= 0.11 * summary.parameters
    spent = [r.epsilon["site-1"] for r in records]
    assert spent == sorted(spent)
    assert len(set(spent)) == len(spent)


def test_the_upload_of_a_pruned_cnn_is_nine_times_smaller(tmp_path):
    experiment = config.parse(
        """
        rounds = 2
        [data]
        source = "digits"
        default_range = [0, 16]
        [sites]
        count = 3
        [model]
        name = "cnn"
        [pruning]
        sparsity = 0.9
        schedule = "one-shot"
        """
    )
    done = bare_run(experiment, tmp_path / "run")
    first, last = read_history(done.directory).rounds
    assert first.parameters == done.summary.parameters
    assert last.parameters == pytest.approx(0.1 * done.summary.parameters, abs=1)
    for site in done.summary.sites:
        assert last.upload_bytes[site] <= 0.11 * first.upload_bytes[site]
    assert done.summary.bytes_up_per_parameter <= 3.5


def test_a_cnn_learns_digits(tmp_path):
    experiment = config.parse(
        """
        rounds = 12
        [data]
        source = "digits"
        default_range = [0, 16]
        [sites]
        count = 3
        [model]
        name = "cnn"
        [training]
        local_steps = 10
        learning_rate = 0.2
        [pruning]
        sparsity = 0.9
        last_round = 8
        """
    )
    assert bare_run(experiment, tmp_path / "run").summary.metric["test_accuracy"] > 0.8


@pytest.mark.parametrize("pruned", [False, True])
def test_the_average_of_the_weights_is_what_a_run_evaluates_and_gives_out(small, tmp_path, pruned):
    seen: list[GlobalState] = []

    class Watching:
        def started(self, rounds: int, done: int) -> None: ...
        def phase(self, round_number: int, phase: str) -> None: ...
        def finished(self, record) -> None:
            path = tmp_path / "run" / "checkpoints" / f"update-{record.update:06d}.safetensors"
            seen.append(GlobalState.from_checkpoint(path)[0])

    experiment = small(
        "aggregation.average_from=2",
        "training.learning_rate=1.0",
        *(["pruning.sparsity=0.5"] if pruned else []),
    )
    done = bare_run(experiment, tmp_path / "run", progress=Watching())
    expected = np.mean([state.weights for state in seen[1:]], axis=0, dtype=np.float64)
    trained = weights(done.directory)
    given = np.concatenate([trained[name].ravel() for name in ("0.weight", "0.bias")])
    np.testing.assert_allclose(given, expected * seen[-1].mask, rtol=1e-6, atol=1e-7)
    assert np.abs(given - seen[-1].weights).max() > 1e-3
    test = simulation.assemble(experiment).test
    module = models.build(experiment.model, test.shape, test.outputs, experiment.seed)
    models.assign(module, given)
    loss = models.loss(experiment.model, test.task)
    told = evaluate(module, loss, test, torch.device("cpu"))
    assert done.summary.metric == pytest.approx(told, rel=1e-5)


@BOTH
def test_a_regression_beats_predicting_the_mean(tmp_path, protocol):
    experiment = config.parse(
        f"""
        rounds = 30
        [data]
        source = "diabetes"
        default_range = [0, 300]
        target_range = [25, 346]
        [sites]
        count = 4
        [model]
        name = "linear"
        [training]
        local_steps = 20
        learning_rate = 0.1
        momentum = 0.9
        [protocol]
        name = "{protocol}"
        """
    )
    metric = bare_run(experiment, tmp_path / "run").summary.metric
    target = simulation.assemble(experiment).test.target.astype(np.float64)
    mean_alone = float(target.var()) * ((346 - 25) / 2) ** 2
    assert metric["test_mse"] < 0.8 * mean_alone
    assert metric["test_r2"] == pytest.approx(1 - metric["test_mse"] / mean_alone, abs=1e-6)


LINE = """
name = "line"
rounds = 200
[data]
source = "table"
path = "{path}"
label = "y"
task = "regression"
drop = ["place"]
[sites]
partition = "column"
column = "place"
[model]
name = "linear"
[training]
local_steps = 5
learning_rate = 0.1
[protocol]
name = "{protocol}"
[stopping]
tolerance = 1e-3
"""


@BOTH
def test_the_line_of_every_tutorial_is_found_and_the_run_stops_by_itself(line, tmp_path, protocol):
    experiment = config.parse(LINE.format(path=line, protocol=protocol))
    done = bare_run(experiment, tmp_path / "run")
    assert done.summary.stopped == "converged"
    assert done.summary.rounds < 200
    assert done.summary.sites == ("a", "b", "c")
    found = sorted(float(value.ravel()[0]) for value in weights(done.directory).values())
    assert found == pytest.approx([1.0, 2.0], abs=0.05)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_both_algorithms_learn(small, tmp_path, algorithm):
    experiment = demo(
        f"aggregation.algorithm={algorithm}",
        f"aggregation.learning_rate={1.0 if algorithm == 'fedavg' else 0.1}",
        "rounds=10",
        "protocol.name=plain",
        "pruning.sparsity=0.5",
        "pruning.last_round=10",
    )
    assert bare_run(experiment, tmp_path / "run").summary.metric["test_auc"] > 0.9


# --- the same under every protocol ---------------------------------------------------------------


@pytest.mark.parametrize("plan", [True, False], ids=["private", "no plan"])
@pytest.mark.parametrize("sites", [3, 5])
def test_all_protocols_end_with_identical_weights(small, private, tmp_path, plan, sites):
    overrides = (
        *(private if plan else ()),
        f"sites.count={sites}",
        "not_private_seed=5",
        "pruning.sparsity=0.5",
    )
    models_ = {
        (
            bare_run(small(*overrides, f"protocol.name={name}"), tmp_path / name).directory
            / "model.safetensors"
        ).read_bytes()
        for name in PROTOCOLS
    }
    assert len(models_) == 1


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_model_that_only_the_sites_hold_is_the_same_bit_for_bit(
    small, private, tmp_path, algorithm, scope
):
    """Weights, signs of zeros, mask, metrics, epsilon and survivors."""
    told = []
    for reveal in ("server", "sites"):
        experiment = small(
            *private,
            "protocol.name=masked-bfv",
            f"protocol.reveal={reveal}",
            "not_private_seed=5",
            "model.name=mlp",
            "pruning.sparsity=0.5",
            f"pruning.scope={scope}",
            f"aggregation.algorithm={algorithm}",
            "aggregation.weighting=declared",
            *(f"aggregation.weights.site-{i}={i}" for i in (1, 2, 3)),
            "stopping.tolerance=1e-9",
        )
        folder = bare_run(experiment, tmp_path / reveal).directory
        lines = [
            (r.update, r.metrics, r.epsilon, r.parameters, r.sparsity, r.survivors)
            for r in read_history(folder).rounds
        ]
        model = [(folder / name).read_bytes() for name in ("model.safetensors", "model.json")]
        told.append((lines, model))
    assert told[0] == told[1]


def test_a_run_that_converges_stops_by_what_the_sites_tell(line, tmp_path):
    text = LINE.format(path=line, protocol="masked-bfv")
    done = [
        bare_run(
            config.parse(text, [f"protocol.reveal={reveal}", "not_private_seed=1"]),
            tmp_path / reveal,
        )
        for reveal in ("server", "sites")
    ]
    assert [item.summary.stopped for item in done] == ["converged", "converged"]
    assert done[0].summary.rounds == done[1].summary.rounds < 200
    assert weights(done[0].directory).keys() == weights(done[1].directory).keys()
    for name, value in weights(done[0].directory).items():
        assert value.tobytes() == weights(done[1].directory)[name].tobytes()


def test_where_only_the_sites_hold_the_model_the_directory_has_it_at_the_sites(
    small, private, tmp_path
):
    """And at its end: model.safetensors is what the consortium gets, from a site's copy."""
    experiment = small(*private, "protocol.name=masked-bfv", "protocol.reveal=sites")
    folder = run(experiment, tmp_path / "run").directory
    assert {p.suffix for p in (folder / "checkpoints").iterdir()} == {".json"}
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "experiment.toml",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "report.html",
        "server.json",
        "sites",
        "summary.json",
    }
    for site in ("site-1", "site-2", "site-3"):
        names = [p.name[:13] for p in (folder / "sites" / site / "models").iterdir()]
        assert sorted(names) == ["update-000003", "update-000004"]
    assert json.loads((folder / "summary.json").read_text())["private"] is True


def test_a_checkpoint_of_a_blind_server_that_is_damaged_is_one_line(small, tmp_path):
    folder = tmp_path / "run"
    interrupted(small("protocol.name=masked-bfv", "protocol.reveal=sites"), folder, 2)
    path = folder / "checkpoints" / "update-000002.json"
    told = json.loads(path.read_text())
    for broken in ("{", json.dumps(told | {"standing": None}), json.dumps(told | {"line": 1})):
        path.write_text(broken)
        with pytest.raises(CorruptStoreError, match=r"update-000002\.json is damaged") as caught:
            resume(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "openers"), [("bfv", 2), ("ckks", 2), ("masked-bfv", 3)])
def test_several_sites_open_where_the_experiment_says_so(small, tmp_path, protocol, openers):
    overrides = (f"protocol.name={protocol}", f"protocol.openers={openers}")
    experiment = small(*overrides, "rounds=2")
    asked: list[int] = []

    def watch(exchange):
        def watched(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            if phase == "open":
                asked.append(len(messages))
            return exchange(phase, messages)

        return watched

    bare_run(experiment, tmp_path / "run", exchange=watch)
    assert asked == [openers, openers]


def test_experiments_are_masked_and_encrypted_unless_they_say_otherwise(tmp_path):
    assert Experiment().protocol.name == demo().protocol.name == "masked-bfv"
    assert Experiment().protocol.colluding_sites == demo().protocol.colluding_sites == 1


@ALL
def test_two_sites_are_enough_where_no_site_is_expected_to_collude(small, tmp_path, protocol):
    overrides = (f"protocol.name={protocol}", "sites.count=2", "protocol.colluding_sites=0")
    (record,) = read_history(
        bare_run(small(*overrides, "rounds=1"), tmp_path / "run").directory
    ).rounds
    assert record.survivors == ("site-1", "site-2")


def test_a_seeded_run_is_the_same_again_and_another_seed_is_not(small, private, tmp_path):
    made = [
        weights(bare_run(small(*private, f"not_private_seed={s}"), tmp_path / str(i)).directory)
        for i, s in enumerate((1, 1, 2))
    ]
    for name, value in made[0].items():
        np.testing.assert_array_equal(value, made[1][name])
        assert not np.array_equal(value, made[2][name])


def test_a_run_that_is_not_seeded_draws_new_noise(small, private, tmp_path):
    first, second = (
        weights(bare_run(small(*private), tmp_path / str(i)).directory) for i in range(2)
    )
    for name, value in first.items():
        assert not np.array_equal(value, second[name])


# --- unequal sites -------------------------------------------------------------------------------


def local_models(experiment: Experiment) -> dict[str, tuple[int, np.ndarray]]:
    """Site -> (records, weights after one full-batch step), by hand."""
    made = {}
    for site, table in simulation.assemble(experiment).sites.items():
        module = models.build(experiment.model, table.shape, table.outputs, experiment.seed)
        optimiser = torch.optim.SGD(module.parameters(), lr=experiment.training.learning_rate)
        output = module(torch.from_numpy(table.features))
        torch.nn.functional.cross_entropy(output, torch.from_numpy(table.target)).backward()
        optimiser.step()
        made[site] = (len(table), models.flatten(module).astype(np.float64))
    return made


@ALL
@pytest.mark.parametrize("weighting", ["uniform", "records", "declared"])
def test_the_weighted_mean_of_unequal_sites_is_as_computed_by_hand(
    small, tmp_path, protocol, weighting
):
    more = {
        "uniform": (),
        "records": ("aggregation.weight_cap=500",),
        "declared": tuple(f"aggregation.weights.site-{i}={i * i}" for i in (1, 2, 3)),
    }[weighting]
    experiment = small(
        f"protocol.name={protocol}",
        f"aggregation.weighting={weighting}",
        *more,
        "sites.partition=dirichlet",
        "sites.alpha=0.5",
        "protocol.bits=20",
        "training.batch_size=1000",
        "training.learning_rate=0.5",
        "rounds=1",
    )
    made = local_models(experiment)
    sizes = [size for size, _ in made.values()]
    assert max(sizes) > 2 * min(sizes)
    weight = {
        "uniform": dict.fromkeys(made, 1),
        "records": {site: size for site, (size, _) in made.items()},
        "declared": {"site-1": 1, "site-2": 4, "site-3": 9},
    }[weighting]
    total = sum(weight.values())
    expected = sum(weight[site] * vector for site, (_, vector) in made.items()) / total
    done = bare_run(experiment, tmp_path / "run")
    module = models.build(experiment.model, (30,), 2, 0)
    names = models.layout(module).names
    found = np.concatenate([weights(done.directory)[name].ravel() for name in names])
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_declared_weights_count_only_those_who_contributed(small, tmp_path):
    experiment = small(
        "aggregation.weighting=declared",
        *(f"aggregation.weights.site-{i}={i * i}" for i in (1, 2, 3)),
        "protocol.bits=20",
        "training.batch_size=1000",
        "rounds=1",
    )
    made = local_models(experiment)

    def lose(exchange):
        def losing(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            return {s: r for s, r in exchange(phase, messages).items() if s != "site-2"}

        return losing

    done = bare_run(experiment, tmp_path / "run", exchange=lose)
    expected = (made["site-1"][1] + 9 * made["site-3"][1]) / 10
    names = models.layout(models.build(experiment.model, (30,), 2, 0)).names
    found = np.concatenate([weights(done.directory)[name].ravel() for name in names])
    np.testing.assert_allclose(found, expected, atol=2e-4)


# --- what is refused before anything is written --------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "telling"),
    [
        (("sites.count=1",), "site"),
        (("sites.count=400",), "site"),
        (("protocol.minimum_cohort=4",), "minimum_cohort = 4"),
        (
            ("protocol.name=masked-bfv", "sites.count=2"),
            "2 sites cannot withstand protocol.colluding_sites = 1: a sum needs 3 updates; "
            "use at most 0 or bring more sites",
        ),
        (("protocol.name=secagg", "sites.count=2"), "use at most 0 or bring more sites"),
        (("protocol.name=secagg", "protocol.colluding_sites=2"), "use at most 1 or bring more"),
        (
            ("protocol.name=masked-bfv", "sites.count=5", "protocol.minimum_cohort=3"),
            "minimum_cohort = 3 is below the 4 that 5 sites of which 1 may collude need",
        ),
        (
            ("protocol.name=masked-bfv", "sites.count=5", "protocol.minimum_cohort=6"),
            "minimum_cohort = 6",
        ),
        (
            ("protocol.name=masked-bfv", "sites.count=5", "protocol.openers=5"),
            "protocol.openers = 5, but a sum may count as few as 4 of 5 sites: use at most 4",
        ),
        (
            ("protocol.name=bfv", "protocol.openers=3"),
            "protocol.openers = 3, but a sum may count as few as 2",
        ),
        (("transcript.consent=['site-9']",), "site-9"),
        (("aggregation.algorithm=no_such_module:rule",), "no_such_module"),
        (("model.name=cnn",), "model.name"),
        (("data.default_range=[0, 1]", "data.ranges.nonsense=[0, 1]"), "nonsense"),
        (("aggregation.weighting=records", "aggregation.weight_cap=10"), "weight_cap"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_leaves_no_file(small, tmp_path, overrides, telling):
    with pytest.raises(ConfigurationError, match=re.escape(telling)) as caught:
        run(small(*overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_cannot_be_met_leaves_no_file(small, private, tmp_path):
    with pytest.raises(ConfigurationError, match="reachable"):
        run(small(*private, "privacy.epsilon=0.001"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_written_over_another(small, tmp_path):
    bare_run(small("rounds=1"), tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(ConfigurationError, match="holds a run already"):
        run(small("rounds=2"), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


# --- the run directory ---------------------------------------------------------------------------


def test_a_report_may_be_left_out_and_made_later(small, private, tmp_path):
    folder = bare_run(small(*private, "rounds=1"), tmp_path / "run").directory
    assert (folder / "summary.json").exists()
    assert not (folder / "report.html").exists()
    resumed = tmp_path / "resumed"
    interrupted(small("rounds=2"), resumed, 1)
    assert bare_resume(resumed).summary.rounds == 2
    assert not (resumed / "report.html").exists()
    assert write_report(folder).read_text().startswith("<!DOCTYPE html>")


def test_a_run_directory_holds_everything(small, private, tmp_path):
    experiment = small(*private, "transcript.consent=['site-1']", "pruning.sparsity=0.5")
    folder = run(experiment, tmp_path / "run").directory
    for name in (
        "experiment.toml",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "model.json",
        "report.html",
        "transcript/index.jsonl",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "checkpoints").glob("*.safetensors"))
    assert config.load(folder / "experiment.toml") == experiment

    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["update"] for x in lines] == [1, 2, 3, 4]
    for x in lines:
        assert {"test_loss", "test_accuracy"} <= x["metrics"].keys()
        assert x["epsilon"].keys() == {"site-1", "site-2", "site-3"}
        assert x["bytes_up"]["upload"] == sum(x["upload_bytes"].values())
        assert x["bytes_down"]["upload"] > 0
        assert {"upload", "aggregate", "update"} <= x["seconds"].keys()
        assert x["survivors"] == ["site-1", "site-2", "site-3"]

    told = json.loads((folder / "summary.json").read_text())
    assert set(told) == set(Summary.__struct_fields__)
    assert told["rounds"] == 4
    assert told["bytes_up_total"] == sum(sum(x["bytes_up"].values()) for x in lines)
    assert told["bytes_up_last_round"] == sum(lines[-1]["bytes_up"].values())
    assert told["delta"] == 1e-3
    assert "add or remove one record" in told["adjacency"]
    assert any("held-out" in sentence for sentence in told["outside_guarantee"])

    about = json.loads((folder / "model.json").read_text())
    assert about["private"] is True
    assert about["classes"]
    assert len(about["features"]) == 30
    zeros = sum(int((v == 0).sum()) for v in weights(folder).values())
    assert zeros == 31  # half of 62


def test_no_pickle_is_written(small, tmp_path):
    folder = run(small("rounds=1"), tmp_path / "run").directory
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()} - {""}
    assert suffixes == {".toml", ".jsonl", ".json", ".html", ".safetensors"}


@pytest.mark.parametrize(
    ("plan", "seed"),
    [(False, ()), (True, ("not_private_seed=1",)), (False, ("not_private_seed=1",))],
)
def test_what_is_not_private_says_so_everywhere(small, private, tmp_path, plan, seed):
    folder = run(small(*(private if plan else ()), *seed), tmp_path / "run").directory
    told = json.loads((folder / "summary.json").read_text())
    assert told["private"] is False
    assert told["why_not_private"]
    assert json.loads((folder / "model.json").read_text())["private"] is False
    assert "not private" in (folder / "report.html").read_text().lower()
    if not plan:
        assert told["epsilon"] == {}


def test_a_new_run_goes_to_runs_and_latest_points_at_the_newest(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (bare_run(small("rounds=1")).directory for _ in range(2))
    assert first != second
    assert first.parent == second.parent == Path("runs")
    assert first.name.startswith("small-")
    assert Path("runs/latest").resolve() == second.resolve()


# --- nothing secret is written -------------------------------------------------------------------


@HIDING
def test_nothing_secret_is_in_the_run_directory(small, private, tmp_path, monkeypatch, protocol):
    """Every seed, key and share that the run drew is looked for in every file, raw and in hex.

    One share of each self-mask seed a releaser is told in phase unmask, and only there.
    """
    secrets: set[bytes] = set()
    public: set[bytes] = set()
    own_shares: set[bytes] = set()
    mask_seeds: set[bytes] = set()
    mask_shares: set[bytes] = set()
    urandom, init, key = os.urandom, keystream.Seed.__init__, SigningKey.__init__
    mask_key, split = masks.MaskKey.__init__, shamir.split

    def drawn(size: int) -> bytes:
        data = urandom(size)
        (secrets if size >= 32 else public).add(data)
        return data

    def seeded(self, material: bytes) -> None:
        secrets.add(bytes(material))
        init(self, material)

    def keyed(self, randomness) -> None:
        key(self, randomness)
        secrets.add(self._private.private_bytes_raw())

    def mask_keyed(self, seed) -> None:
        mask_key(self, seed)
        mask_seeds.add(seed._material)

    def shared(secret, threshold, points, randomness):
        shares = split(secret, threshold, points, randomness)
        kind = mask_shares if secret._material in mask_seeds else own_shares
        kind.update(share.reveal() for share in shares.values())
        return shares

    monkeypatch.setattr(os, "urandom", drawn)
    monkeypatch.setattr(keystream.Seed, "__init__", seeded)
    monkeypatch.setattr(SigningKey, "__init__", keyed)
    monkeypatch.setattr(masks.MaskKey, "__init__", mask_keyed)
    monkeypatch.setattr(shamir, "split", shared)
    everyone = "transcript.consent=['site-1', 'site-2', 'site-3']"
    folder = run(
        small(f"protocol.name={protocol}", "rounds=2", *private, everyone), tmp_path / "r"
    ).directory
    monkeypatch.undo()

    he_seeds = [secret for secret in secrets if len(secret) == 64]
    assert len(he_seeds) == (0 if protocol == "secagg" else 2)  # one a round
    assert len(secrets) > 10
    assert len(mask_shares) == len(own_shares) == (2 * 3 * 3 if PROTOCOLS[protocol].masked else 0)
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert any(session in data for data in files.values() for session in public)  # it finds things
    for secret in secrets | mask_shares:
        for path, data in files.items():
            assert secret not in data, path
            assert secret.hex().encode() not in data.lower(), path
    crossed = crossings(folder / "transcript")
    for share in own_shares:
        told = {path for path, data in files.items() if share in data}
        assert told <= {folder / "transcript" / "messages.bin"}
        shown = {(item.phase, item.direction) for item in crossed if share in item.data}
        assert shown == ({("unmask", "up")} if told else set())


@HIDING
def test_the_summary_and_report_name_what_the_protocol_stops_and_does_not(
    small, private, tmp_path, protocol
):
    folder = run(small(f"protocol.name={protocol}", "rounds=1", *private), tmp_path / "r").directory
    assert json.loads((folder / "summary.json").read_text())["protocol"] == protocol
    page = " ".join(html.unescape((folder / "report.html").read_text()).split())
    told = words.GUARANTEES[protocol]
    for part in (protocol, told.layers, told.story, told.stops, told.fails):
        assert part in page, part


def test_a_transcript_holds_exactly_what_crossed_the_wires_of_consenting_sites(small, tmp_path):
    crossed: list[tuple[int, str, str, str, bytes]] = []

    def watch(exchange):
        def watched(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            replies = exchange(phase, messages)
            for site in sorted(messages):
                number = Request.from_bytes(messages[site]).round
                crossed.append((number, phase, site, "down", messages[site]))
                if site in replies:
                    crossed.append((number, phase, site, "up", replies[site]))
            return replies

        return watched

    consent = {"site-1", "site-3"}
    consenting = "transcript.consent=['site-1', 'site-3']"
    experiment = small("protocol.name=masked-bfv", "rounds=2", consenting)
    folder = bare_run(experiment, tmp_path / "run", exchange=watch).directory / "transcript"
    index = [json.loads(x) for x in (folder / "index.jsonl").read_text().splitlines()]
    bytes_ = (folder / "messages.bin").read_bytes()
    told = [
        (x["round"], x["phase"], x["site"], x["direction"], bytes_[x["at"] : x["at"] + x["bytes"]])
        for x in index
    ]
    assert told == [entry for entry in crossed if entry[2] in consent]
    assert len(bytes_) == sum(x["bytes"] for x in index)
    assert {p.name for p in folder.iterdir()} == {"index.jsonl", "messages.bin", "rosters.jsonl"}


def test_without_consent_nothing_is_recorded(small, tmp_path):
    assert not (bare_run(small("rounds=1"), tmp_path / "run").directory / "transcript").exists()


def test_a_transcript_records_an_active_servers_garbage_too(small, tmp_path):
    def active(exchange):
        return lambda phase, messages: exchange(phase, {**messages, "site-2": b"garbage"})

    experiment = small("rounds=1", "transcript.consent=['site-2']")
    done = bare_run(experiment, tmp_path / "run", exchange=active)
    (record,) = read_history(done.directory).rounds
    assert record.survivors == ("site-1", "site-3")
    recorded = crossings(done.directory / "transcript")
    assert [item.data for item in recorded if item.direction == "down"] == [b"garbage"]


# --- resuming ------------------------------------------------------------------------------------


def test_a_finished_run_is_returned_as_it_is(small, tmp_path):
    done = run(small("rounds=1"), tmp_path / "run")
    before = {p: p.read_bytes() for p in done.directory.rglob("*") if p.is_file()}
    assert resume(done.directory).summary == done.summary
    assert {p: p.read_bytes() for p in done.directory.rglob("*") if p.is_file()} == before


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigurationError, match="not a run directory"):
        resume(tmp_path)


def interrupted(experiment: Experiment, folder: Path, rounds: int) -> None:
    """A run that stops after so many finished rounds, as if its machine had."""

    class StopError(Exception):
        pass

    class Stopping:
        def started(self, rounds: int, done: int) -> None: ...
        def phase(self, round_number: int, phase: str) -> None: ...
        def finished(self, record) -> None:
            if record.update == rounds:
                raise StopError

    with pytest.raises(StopError):
        bare_run(experiment, folder, progress=Stopping())


def finished_well(folder: Path, whole: Path, rounds: int) -> None:
    """The run in `folder` ended as the one in `whole` did."""
    history = read_history(folder)
    assert history.summary is not None
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [r.update for r in history.rounds] == list(range(1, rounds + 1))
    numbers = [r.round for r in history.rounds]
    assert numbers == sorted(set(numbers))
    missing = tuple(n for n in range(1, numbers[-1]) if n not in numbers)
    assert tuple(n for r in history.rounds for n in r.aborted) == missing
    assert set(missing) <= set(history.summary.aborted_rounds)


@pytest.fixture(scope="session")
def seeded(small, private):
    """Six private rounds of the seeded, not private mode."""
    return small(
        *private,
        "protocol.name=masked-bfv",
        "not_private_seed=11",
        "rounds=6",
        "privacy.spare_rounds=30",
        "aggregation.algorithm=fedadam",
        "aggregation.average_from=3",
        "pruning.sparsity=0.5",
    )


@pytest.fixture(scope="session")
def whole(seeded, tmp_path_factory):
    """The directory of such a run that nothing interrupted; only read. The server has the model."""
    return bare_run(seeded, tmp_path_factory.mktemp("seeded") / "whole").directory


@pytest.fixture(scope="session")
def cut(seeded, tmp_path_factory):
    """By who holds the model: the directory of such a run that stopped after three rounds."""
    found = {}
    for reveal in ("server", "sites"):
        chosen = seeded.protocol.model_copy(update={"reveal": reveal})
        found[reveal] = tmp_path_factory.mktemp("cut") / reveal
        interrupted(seeded.model_copy(update={"protocol": chosen}), found[reveal], 3)
    return found


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: None,
        lambda folder: (folder / "metrics.jsonl").write_bytes(
            (folder / "metrics.jsonl").read_bytes()[:-20]
        ),
        lambda folder: sorted((folder / "checkpoints").iterdir())[-1].unlink(),
        lambda folder: [
            (folder / "checkpoints" / f".update-000004.{kind}.partial").write_bytes(b"half")
            for kind in ("safetensors", "json")
        ],
        lambda folder: (folder / ".summary.json.partial").write_bytes(b"{"),
    ],
    ids=["nothing", "torn metrics", "newest checkpoint", "partial", "partial summary"],
)
@pytest.mark.parametrize("reveal", ["server", "sites"])
def test_an_interrupted_run_goes_on_from_what_is_whole(whole, cut, tmp_path, damage, reveal):
    folder = Path(shutil.copytree(cut[reveal], tmp_path / "run"))
    spent = read_history(folder).rounds[-1].epsilon
    damage(folder)
    done = bare_resume(folder)
    finished_well(folder, whole, 6)
    assert all(done.summary.epsilon[site] > spent[site] for site in spent)


def test_a_run_that_lost_its_records_is_not_continued_as_if_it_were_whole(cut, tmp_path):
    shutil.copytree(cut["server"], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CorruptStoreError, match=r"metrics\.jsonl lacks 2 of 3 finished rounds"):
        resume(tmp_path / "run")


def test_a_torn_transcript_index_is_whole_again_after_resuming(small, tmp_path):
    experiment = small("rounds=4", "transcript.consent=['site-1']")
    folder = tmp_path / "run"
    interrupted(experiment, folder, 2)
    index = folder / "transcript" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-10])
    bare_resume(folder)
    entries = [json.loads(x) for x in index.read_text().splitlines()]
    assert {x["round"] for x in entries} == {1, 2, 3, 4}


def test_a_relative_data_path_holds_when_resuming_from_elsewhere(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = LINE.format(path=line.name, protocol="plain").replace("rounds = 200", "rounds = 4")
    experiment = config.parse(text)
    interrupted(experiment, Path("runs/one"), 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert bare_resume(tmp_path / "runs" / "one").summary.rounds == 4


def test_a_run_that_failed_can_be_resumed(small, tmp_path):
    def silent(exchange):
        def lost(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            number = Request.from_bytes(next(iter(messages.values()))).round
            return {} if number in (3, 4, 5) else exchange(phase, messages)

        return lost

    with pytest.raises(RunFailedError, match="3 rounds in a row"):
        bare_run(small(), tmp_path / "run", exchange=silent)
    assert not (tmp_path / "run" / "summary.json").exists()
    done = resume(tmp_path / "run")
    assert done.summary.rounds == 4
    assert (tmp_path / "run" / "report.html").exists()
    assert done.summary.aborted_rounds == (3, 4, 5)
    assert [r.round for r in read_history(done.directory).rounds] == [1, 2, 6, 7]


# A process that starts a run, or resumes it, again and again in children that are killed. A child
# logs every noised vector it computes, so that charges can be counted against them. A line of input
# is a run: its directory, its experiment, the log and a seed.
KILLED = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
import opacus
from securefl import config, runs, simulation
from securefl.privacy import training

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first one loads torch's compiler

def logged(real):
    def logging(self, *arguments):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, b".")
        os.close(handle)
        return real(self, *arguments)
    return logging

training.Trainer.update = logged(training.Trainer.update)
training.Trainer.noised_sum = logged(training.Trainer.noised_sum)

def die_at(fsync):
    left = [fsync]
    def counting(handle, real=os.fsync):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)
    os.fsync = counting

def attempt(fsync=None, delay=None):
    pid = os.fork()
    if pid == 0:
        try:
            if fsync is not None:
                die_at(fsync)
            if (folder / "experiment.toml").exists():
                runs.resume(folder, report=False)
            else:
                runs.run(experiment, folder, report=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

for line in sys.stdin:
    folder, file, log, seed = json.loads(line)
    folder, experiment, rng = Path(folder), config.load(Path(file)), random.Random(seed)
    simulation.assemble(experiment)  # what every child would load and calibrate again
    kills = 0
    for _ in range(5):  # at a write to disk, in the middle of making it durable
        kills += attempt(fsync=rng.randint(1, 25)) == signal.SIGKILL
    for _ in range(3):  # at any instant
        kills += attempt(delay=rng.uniform(0, 0.5)) == signal.SIGKILL
    print(attempt(), kills, flush=True)
"""


class Killer:
    """That process: it loads what a run needs once, for every run that it kills."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", KILLED],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )

    def kill(self, folder: Path, file: Path, log: Path, seed: int, seconds: float) -> int:
        """How often the run in `folder` was killed before it came to its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps([str(folder), str(file), str(log), seed])
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert ready, f"not within {seconds:g} s: {self.errors.read_text()}"
        told = self.process.stdout.readline()
        assert told, self.errors.read_text()
        status, kills = map(int, told.split())
        assert status == 0, self.errors.read_text()
        return kills


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    made = Killer(tmp_path_factory.mktemp("killer") / "errors")
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.mark.parametrize(
    ("protocol", "reveal", "noise", "seed", "workers"),
    [
        ("bfv", "server", "local", 1, 0),
        ("masked-bfv", "server", "local", 2, 0),
        ("masked-bfv", "sites", "local", 3, 0),
        pytest.param("masked-bfv", "sites", "local", 4, 2, marks=pytest.mark.slow),
        ("secagg", "server", "distributed", 5, 0),
        pytest.param("masked-bfv", "sites", "distributed", 6, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    seeded, whole, killer, tmp_path, protocol, reveal, noise, seed, workers
):
    privacy = seeded.privacy.model_copy(update={"noise": noise})
    seeded = seeded.model_copy(update={"privacy": privacy})
    chosen = seeded.protocol.model_copy(update={"name": protocol})
    seeded = seeded.model_copy(update={"protocol": chosen})
    if noise == "distributed":  # else it is the same under every protocol
        whole = bare_run(seeded, tmp_path / "whole").directory
    chosen = chosen.model_copy(update={"reveal": reveal})
    engine = seeded.engine.model_copy(update={"workers": workers})
    seeded = seeded.model_copy(update={"protocol": chosen, "engine": engine})
    folder, log = tmp_path / "run", tmp_path / "vectors"
    (tmp_path / "trial.toml").write_text(seeded.dump())
    seconds = 600.0 if workers else 120.0
    assert killer.kill(folder, tmp_path / "trial.toml", log, seed, seconds) >= 3
    finished_well(folder, whole, 6)
    history = read_history(folder)
    plan = simulation.assemble(seeded).plan
    charged = {site: SiteStore(folder / "sites" / site).charged for site in history.summary.sites}
    if not workers:  # whose vectors are computed elsewhere
        assert sum(charged.values()) >= log.stat().st_size  # no vector without its charge
    for site, count in charged.items():
        assert count >= 6
        assert history.summary.epsilon[site] == plan.spent(count)
        past = [record.epsilon[site] for record in history.rounds]
        assert past == sorted(past)
        assert history.summary.epsilon[site] >= past[-1]
