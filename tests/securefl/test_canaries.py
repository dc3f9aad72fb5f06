"""Canaries: anyone can make the candidates, only their site knows the coins, nothing else moves."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.attack import UnavailableError
from attacks.case import Case
from securefl import agreement, config, models, runs, simulation, site_folder
from securefl.canaries import candidates, join, read_coins, toss
from securefl.config import ConfigurationError
from securefl.data import Table
from securefl.privacy.gradients import PerSampleGradients
from securefl.privacy.training import Trainer
from securefl.runs import RunFailedError, run
from securefl.site_folder import make_key
from securefl.store import ServerStore, SiteStore


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Table, str | None]]:
    """Every table that a Trainer is made of from now on, and the column that people are in."""
    seen: list[tuple[Table, str | None]] = []
    honest = Trainer.__init__

    def watching(self: Trainer, module, loss, table, training, plan, device, person=None) -> None:
        seen.append((table, person))
        honest(self, module, loss, table, training, plan, device, person)

    monkeypatch.setattr(Trainer, "__init__", watching)
    return seen


def own(folder, site="site-1"):
    return SiteStore(folder / "sites" / site).private


# --- the candidates


@given(
    st.integers(1, 20).map(lambda half: 2 * half),
    st.sampled_from([(3,), (1, 4, 4)]),
    st.sampled_from([0, 2, 10]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_anybody_computes_the_same_candidates_from_public_values(count, shape, classes, seed):
    experiment = config.parse(f"seed = {seed}\n[audit]\ncanaries = {count}")
    features, target = candidates(experiment, "north", shape, classes)
    again = candidates(experiment, "north", shape, classes)
    assert np.array_equal(features, again[0])
    assert np.array_equal(target, again[1])
    assert features.shape == (count, *shape)
    assert set(np.unique(features)) <= {-1.0, 1.0}
    if classes:
        assert target.dtype == np.int64
        assert ((target >= 0) & (target < classes)).all()
    else:
        assert set(np.unique(target)) <= {-1.0, 1.0}
    other = candidates(experiment, "south", (64,), classes)[0]
    assert not np.array_equal(other, candidates(experiment, "north", (64,), classes)[0])


def test_gradients_of_candidates_reach_the_clip_and_are_nearly_orthogonal(small):
    experiment = small("audit.canaries=200", "model.name=mlp", "model.hidden=[32]")
    features, target = candidates(experiment, "site-1", (64,), 10)
    module = models.build(experiment.model, (64,), 10, 0)
    each = PerSampleGradients(module, loss_reduction="sum")
    loss = models.loss(experiment.model, "classification")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss(each(torch.from_numpy(features)), torch.from_numpy(target)).sum().backward()
    gradients = np.concatenate(
        [part.grad_sample.reshape(200, -1).numpy() for part in module.parameters()], axis=1
    )
    norms = np.linalg.norm(gradients, axis=1)
    assert (norms > 1.0).mean() > 0.95
    cosines = (gradients / norms[:, None]) @ (gradients / norms[:, None]).T
    assert np.abs(cosines[~np.eye(200, dtype=bool)]).mean() < 0.25


# --- the coins


def test_coins_are_tossed_once_kept_from_others_and_fair(tmp_path, randomness):
    folder = tmp_path / "own"
    first = toss(folder, 1000, randomness("coins"))
    assert 400 < first.sum() < 600  # six deviations of a fair coin
    again = toss(folder, 1000, randomness("others"))
    assert np.array_equal(first, again)
    assert np.array_equal(first, read_coins(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "canaries.json").stat().st_mode) == 0o600
    with pytest.raises(ConfigurationError, match=r"1000 coins and audit\.canaries = 10: "):
        toss(folder, 10, randomness("coins"))
    with pytest.raises(ConfigurationError, match="holds no coins"):
        read_coins(tmp_path)


def test_coins_are_the_operating_systems_but_under_a_seed_for_tests(small, tmp_path):
    def coins(name: str, *more: str) -> list[bytes]:
        experiment = small("rounds=1", "audit.canaries=64", *more)
        folder = run(experiment, tmp_path / name, report=False).directory
        return [read_coins(own(folder, f"site-{i}")).tobytes() for i in (1, 2, 3)]

    assert len({*coins("one"), *coins("two")}) == 6
    assert coins("three", "not_private_seed=1") == coins("four", "not_private_seed=1")


# --- what they are part of, and what they are not


def test_a_site_trains_on_its_records_and_on_heads_and_on_nothing_else(
    small, tmp_path, monkeypatch
):
    seen = watched(monkeypatch)
    experiment = small("rounds=1", "audit.canaries=20")
    folder = run(experiment, tmp_path / "run", report=False).directory
    sites = simulation.assemble(experiment).sites
    for (trained, _), (name, held) in zip(seen, sites.items(), strict=True):
        coins = read_coins(own(folder, name))
        features, target = candidates(experiment, name, held.shape, len(held.classes))
        assert len(trained) == len(held) + coins.sum()
        assert np.array_equal(trained.features[: len(held)], held.features)
        assert np.array_equal(trained.features[len(held) :], features[coins])
        assert np.array_equal(trained.target[len(held) :], target[coins])
    assert run(small("rounds=1"), tmp_path / "none", report=False)
    assert not own(tmp_path / "none").exists()


def test_exact_statistics_and_test_figures_are_of_the_sites_own_rows(clinic, tmp_path):
    made, told = clinic(), []
    for number, more in enumerate([(), ("audit.canaries=40",)]):
        experiment = made.experiment("rounds=1", "training.learning_rate=1e-9", *more)
        folder = run(experiment, tmp_path / f"{number}", report=False).directory
        values = json.loads((folder / "preprocessing.json").read_text())["values"]
        [evaluated] = (folder / "evaluations.jsonl").read_text().splitlines()
        told.append((values, json.loads(evaluated)["figures"]))
    assert told[0] == told[1]


def test_a_canary_is_a_person_of_its_own(clinic, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    plan = (
        "privacy.unit=person", "privacy.epsilon=6.0", "privacy.delta=1e-3", "privacy.rate=0.3",
        "privacy.expected_batch=10", "preprocessing.scale=range", "preprocessing.impute=middle",
        "preprocessing.minimum_count=0", "evaluation.protected=false", "rounds=1",
    )  # fmt: skip
    folder = run(
        clinic().experiment(*plan, "audit.canaries=40"), tmp_path / "run", report=False
    ).directory
    for (joined, person), site in zip(seen, ("east", "north", "south"), strict=True):
        extra = int(read_coins(own(folder, site)).sum())
        assert person == "patient"
        whose = joined.groups[person]
        assert len(np.unique(whose[-extra:])) == extra
        assert not set(whose[-extra:]) & set(whose[:-extra])


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_the_plan_and_what_is_charged_are_the_same_with_canaries(small, private, tmp_path, noise):
    overrides = (*private, f"privacy.noise={noise}", "protocol.name=secagg", "rounds=2")
    bare, joined = (small(*overrides, *more) for more in ((), ("audit.canaries=10",)))
    assert agreement.plan(bare, 3, 62) == agreement.plan(joined, 3, 62)
    spent = [
        run(experiment, tmp_path / f"{i}", report=False).summary.epsilon
        for i, experiment in enumerate((bare, joined))
    ]
    assert spent[0] == spent[1]
    assert bare.digest() != joined.digest()


def test_worker_processes_toss_their_sites_coins(small, tmp_path):
    experiment = small("rounds=1", "audit.canaries=16", "engine.workers=1")
    folder = run(experiment, tmp_path / "run", report=False).directory
    assert {len(read_coins(own(folder, f"site-{i}"))) for i in (1, 2, 3)} == {16}


@pytest.fixture
def folders(tmp_path) -> Callable[[str], Path]:
    """`folders(policy)`: a folder for each of three sites, with those lines in each policy."""

    def made(policy: str) -> Path:
        for name in ("site-1", "site-2", "site-3"):
            folder = tmp_path / "own" / name
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "site.key").exists():
                make_key(folder)
            (folder / "site.toml").write_text(
                f'version = 1\nname = "{name}"\n[data]\nid = "rows"\npurpose = "a trial"\n'
                '[budget]\nunit = "record"\nepsilon = 90.0\ndelta = 1e-3\n'
                f'[policy]\nconsent = "standing"\nunknown_sites = true\n{policy}\n'
            )
        return tmp_path / "own"

    return made


def test_sites_take_part_with_canaries_only_where_their_policies_permit_it(
    small, private, folders, tmp_path
):
    experiment = small("protocol.name=secagg", "rounds=1", *private, "audit.canaries=12")
    with pytest.raises(RunFailedError, match=r"policy\.canaries: proposed is 12 canaries"):
        run(experiment, tmp_path / "refused", sites=folders(""), report=False)
    own_folders = folders("canaries = true")
    folder = run(experiment, tmp_path / "run", sites=own_folders, report=False).directory
    # What is a site's own is in its own folder, and nowhere in the run's directory.
    assert not list(folder.rglob("canaries.json"))
    site = own_folders / "site-1"
    tossed = read_coins(site_folder.private(site, ServerStore(folder).name, "site-1"))
    assert len(tossed) == 12
    assert np.array_equal(Case.open(folder).coins("site-1"), tossed)
    assert np.array_equal(Case.open(folder, own=site).coins("site-1"), tossed)
    with pytest.raises(UnavailableError, match="holds no coins"):
        Case.open(folder, own=site).coins("site-2")


def test_a_resumed_run_keeps_its_coins(small, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(exchange):
        def stopping(phase, messages):
            if list((tmp_path / "run" / "checkpoints").glob("update-000001*")):
                raise StoppedError
            return exchange(phase, messages)

        return stopping

    experiment = small("rounds=2", "audit.canaries=32")
    with pytest.raises(StoppedError):
        run(experiment, tmp_path / "run", exchange=stop, report=False)
    before = {
        i: (own(tmp_path / "run", f"site-{i}") / "canaries.json").read_bytes() for i in (1, 2)
    }
    runs.resume(tmp_path / "run", report=False)
    for i, held in before.items():
        assert (own(tmp_path / "run", f"site-{i}") / "canaries.json").read_bytes() == held


def test_the_summary_and_the_report_say_that_there_were_canaries(small, tmp_path):
    done = run(small("rounds=1", "audit.canaries=8"), tmp_path / "run")
    assert done.summary.canaries == 8
    page = " ".join((done.directory / "report.html").read_text().split())
    assert "canaries, about half of 8 by coins that it keeps" in page


def test_joining_none_changes_nothing(small):
    experiment = small("audit.canaries=4")
    table = simulation.assemble(experiment).sites["site-1"]
    assert isinstance(table, Table)
    joined = join(table, experiment, "site-1", np.zeros(4, np.bool_))
    assert np.array_equal(joined.features, table.features)
    assert np.array_equal(joined.target, table.target)


@pytest.mark.parametrize("count", ["3", "-2", "1.5", "100002", "true"])
def test_a_number_of_canaries_that_cannot_be_halved_is_refused(small, count):
    with pytest.raises(ConfigurationError, match=r"audit\.canaries") as caught:
        small(f"audit.canaries={count}")
    assert "\n" not in str(caught.value)
