"""Runs whose sites have folders of their own: policies, consents and ledgers that outlive them."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from securefl import audit_log, config, runs
from securefl.audit_log import LOG
from securefl.config import ConfigurationError, Experiment
from securefl.privacy.ledger import Charged, Head, Ledger
from securefl.records import read_history
from securefl.runs import RunFailedError
from securefl.site_folder import LEDGER, make_key, open_ledger, read_key
from securefl.store import SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

NAMES = ("site-1", "site-2", "site-3")


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """`folders(epsilon, site_1="key = value")`: a folder a site, with more lines of its policy."""

    def made(epsilon: float = 9.0, **policy: str) -> Path:
        for name in NAMES:
            folder = tmp_path / "own" / name
            folder.mkdir(parents=True)
            make_key(folder)
            (folder / "site.toml").write_text(
                f'version = 1\nname = "{name}"\n[data]\nid = "rows"\npurpose = "a trial"\n'
                f'[budget]\nunit = "record"\nepsilon = {epsilon}\ndelta = 1e-3\n'
                '[policy]\nconsent = "standing"\nunknown_sites = true\n'
                f"{policy.get(name.replace('-', '_'), '')}\n"
            )
        return tmp_path / "own"

    return made


def book(own: Path, name: str) -> Ledger:
    return Ledger(own / name / LEDGER)


@pytest.fixture
def trial(small, private) -> Callable[..., Experiment]:
    """A private experiment under secagg."""
    return lambda *more: small("protocol.name=secagg", "rounds=3", *private, *more)


@pytest.mark.parametrize("workers", [(0, 0), (2, 1)], ids=["in process", "in workers"])
def test_ledgers_add_up_over_runs_and_stop_a_site_for_good(trial, folders, tmp_path, workers):
    own = folders(7.0)
    experiment = trial("privacy.epsilon=1.5", f"engine.workers={workers[0]}")
    first = run(experiment, tmp_path / "first", sites=own)
    assert first.summary.rounds == 3
    spent = []
    for name in NAMES:
        with book(own, name) as ledger:
            spent.append(ledger.epsilon("rows"))
            assert [r.charged for r in ledger.standing("rows").runs] == [3]
            assert set(ledger.kept()) == set(NAMES) - {name}
    second = run(
        trial("rounds=20", "privacy.epsilon=6.5", f"engine.workers={workers[1]}"),
        tmp_path / "second",
        sites=own,
    )
    assert second.summary.stopped == "privacy budget spent"
    assert 0 < second.summary.rounds < 20
    for name, before in zip(NAMES, spent, strict=True):
        with book(own, name) as ledger:
            assert before < ledger.epsilon("rows") <= 7.0
            assert len(ledger.standing("rows").runs) == 2
            assert ledger.standing("rows").runs[1].charged == second.summary.rounds
    with pytest.raises(RunFailedError):  # not one more round, ever
        run(trial("privacy.epsilon=4.5"), tmp_path / "third", sites=own)


def test_a_site_that_refuses_by_its_policy_is_left_out_of_every_round(small, private, folders):
    own = folders(site_2="maximum_rounds = 2\nprotocols = ['bfv']", site_1="protocols = ['bfv']")
    for name in ("site-3",):
        path = own / name / "site.toml"
        path.write_text(path.read_text() + "protocols = ['bfv']\n")
    for name in NAMES:
        path = own / name / "site.toml"
        path.write_text(path.read_text() + "minimum_cohort = 2\nminimum_colluding_sites = 0\n")
    done = run(small("protocol.name=bfv", "rounds=3", *private), own.parent / "run", sites=own)
    assert done.summary.rounds == 3
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("site-1", "site-3")
        assert "has accepted no proposal in this session" in record.dropouts["site-2"]
    assert not (own / "site-2" / LEDGER).exists()
    assert not (own / "site-2" / "accepted").exists()


def test_where_too_few_agree_the_run_says_every_reason(trial, folders, tmp_path):
    own = folders(site_1="maximum_epsilon = 1.0", site_3="maximum_rounds = 2")
    with pytest.raises(RunFailedError, match="too few sites take part: a sum needs 3") as caught:
        run(trial(), tmp_path / "run", sites=own)
    assert "site-1 refuses by policy.maximum_epsilon" in str(caught.value)
    assert "site-3 refuses by policy.maximum_rounds" in str(caught.value)
    with book(own, "site-2") as ledger:
        assert ledger.epsilon("rows") == 0.0


def test_a_run_that_was_cut_goes_on_under_the_same_name_in_the_ledgers(trial, folders, tmp_path):
    own = folders()

    class Cut(BaseException):
        pass

    class Cutting:
        def started(self, rounds, done): ...
        def phase(self, number, phase):
            if number == 2 and phase == "unmask":
                raise Cut

        def finished(self, record): ...

    with pytest.raises(Cut):
        run(trial(), tmp_path / "run", sites=own, progress=Cutting())
    done = runs.resume(tmp_path / "run")  # with its report
    assert done.summary.rounds == 3
    assert done.summary.aborted_rounds == (2,)
    for name in NAMES:
        with book(own, name) as ledger:
            (only,) = ledger.standing("rows").runs
            assert only.charged == 4  # the aborted one too


@pytest.mark.slow
def test_no_kill_makes_a_ledger_forget_or_a_round_be_used_twice(trial, folders, tmp_path):
    """SIGKILL at random instants of a whole run, in the process that plays every site."""
    own, place = folders(60.0), tmp_path / "run"
    path = tmp_path / "trial.toml"
    path.write_text(trial("rounds=40", "privacy.spare_rounds=60", "privacy.epsilon=3").dump())
    command = [sys.executable, "-m", "securefl.cli", "run"]
    rng, kills, told = random.Random(), 0, dict.fromkeys(NAMES, 0)
    while not (place / "summary.json").exists():
        begun = (place / "experiment.toml").exists()
        more = ["--resume", str(place)] if begun else [str(path), "--sites", str(own)]
        more += [] if begun else ["--directory", str(place)]
        process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(2.0, 8.0) if kills < 40 else None)
        if process.poll() is None:
            kills += 1
        process.kill()
        process.wait()
        for name in NAMES:
            if not (own / name / LEDGER).exists():
                continue
            with book(own, name) as ledger:  # opening checks the chain
                rounds = [e.round for e in ledger.entries if isinstance(e, Charged)]
            assert rounds == sorted(set(rounds))
            assert len(rounds) >= SiteStore(place / "sites" / name).charged >= told[name]
            told[name] = SiteStore(place / "sites" / name).charged
    history = read_history(place)
    assert kills
    assert history.summary.rounds == 40
    for name in NAMES:
        with book(own, name) as ledger:
            (only,) = ledger.standing("rows").runs
            assert only.charged >= told[name] >= 40
            for peer, heads in ledger.kept().items():
                with book(own, peer) as other:
                    for head in heads:
                        other.verify(Head(head.entries, head.hash))
            assert audit_log.faults(own / name / LOG, read_key(own / name).public, ledger) == ()


def test_folders_of_other_sites_are_refused_before_anything_is_written(trial, folders, tmp_path):
    own = folders()
    (own / "site-3").rename(own / "site-4")
    with pytest.raises(ConfigurationError, match=r"cannot read .*site-3"):
        run(trial(), tmp_path / "run", sites=own)
    (own / "site-4").rename(own / "site-3")
    path = own / "site-2" / "site.toml"
    path.write_text(path.read_text().replace('name = "site-2"', 'name = "site-9"'))
    with pytest.raises(ConfigurationError, match="is of site-9: name the folder after its site"):
        run(trial(), tmp_path / "run", sites=own)
    assert not (tmp_path / "run").exists()


def test_a_budget_changes_by_a_person_only(folders):
    own = folders(3.0)
    open_ledger(own / "site-1").close()
    path = own / "site-1" / "site.toml"
    path.write_text(path.read_text().replace("epsilon = 3.0", "epsilon = 5.0"))
    with pytest.raises(ConfigurationError, match=r"securefl site budget --site .* --by NAME"):
        open_ledger(own / "site-1")
    from securefl.site_folder import change_budget

    change_budget(own / "site-1", "Dr. Weber")
    with open_ledger(own / "site-1") as ledger:
        assert ledger.standing("rows").epsilon == 5.0
        assert ledger.entries[-1].by == "Dr. Weber"


def test_the_experiment_of_a_run_is_what_the_proposal_says(trial):
    """The digest in a site's answer covers every key, so nobody trains on another one."""
    assert config.parse(trial().dump()).digest() == trial().digest()
    assert trial().digest() != trial("training.learning_rate=0.2").digest()
