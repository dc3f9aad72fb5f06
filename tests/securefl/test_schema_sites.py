"""Runs on schemas where sites have folders of their own: their schema, file, policy and ledger."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from securefl import runs, schema
from securefl.config import Experiment
from securefl.preprocessing import Preprocessor
from securefl.privacy.ledger import Charged, Ledger
from securefl.privacy.training import Trainer
from securefl.records import EVALUATIONS, EvaluationRecord, read_history
from securefl.runs import RunFailedError
from securefl.site_folder import LEDGER, make_key
from securefl.store import SiteStore, whole_lines

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

SITES = ("east", "north", "south")
KINDS = ("fit", "train", "evaluate")
POLICY = 'consent = "standing"\nunknown_sites = true\nminimum_noise = 0.0\n'


class Own:
    """A folder of each site's own, with its file and schema in it."""

    def __init__(self, folder: Path, clinic) -> None:
        self.folder, self.clinic = folder, clinic
        for site in SITES:
            (folder / site).mkdir(parents=True)
            make_key(folder / site)
            shutil.copy(clinic.file(site), folder / site / "rows.csv")
            shutil.copy(clinic.schema, folder / site / "own.toml")
            self.write(site)

    def write(
        self, site: str, epsilon: float = 60.0, policy: str = "", *, schema: bool = True
    ) -> None:
        """site.toml, with a budget and more lines of policy."""
        described = 'schema = "own.toml"\n' if schema else ""
        (self.folder / site / "site.toml").write_text(
            f'version = 1\nname = "{site}"\n[data]\nid = "rows"\npurpose = "a trial"\n'
            f'path = "rows.csv"\n{described}'
            f'[budget]\nunit = "record"\nepsilon = {epsilon}\ndelta = 1e-3\n[policy]\n'
            f"{POLICY}{policy}"
        )

    def ledger(self, site: str) -> Ledger:
        return Ledger(self.folder / site / LEDGER)


@pytest.fixture
def own(clinic, tmp_path: Path) -> Own:
    return Own(tmp_path / "own", clinic())


@pytest.fixture
def trial(own, private) -> Callable[..., Experiment]:
    """A private run on files that only the sites have."""

    def made(*more: str) -> Experiment:
        experiment = own.clinic.experiment(
            *private, "protocol.name=secagg", "sites.partition=iid", *_names(), *more
        )
        data = experiment.data.model_copy(update={"path": None})
        return experiment.model_copy(update={"data": data})

    return made


def _names() -> list[str]:
    return ['sites.names=["east", "north", "south"]']


# --- what is charged -----------------------------------------------------------------------------


def test_the_ledger_has_every_release_and_stays_within_the_budget(own, trial, tmp_path):
    experiment = trial("rounds=4", "evaluation.every=2")
    done = run(experiment, tmp_path / "run", sites=own.folder)
    assert done.summary.private
    (only,) = done.summary.outside_guarantee
    assert "read the folders of all sites" in only
    for site in SITES:
        with own.ledger(site) as ledger:
            told = [e.release for e in ledger.entries if isinstance(e, Charged)]
            assert told == ["statistics-0", "", "", "evaluation", "", "", "evaluation"]
            assert done.summary.epsilon[site] <= 5.0
            assert 0 < ledger.epsilon("rows") <= 60.0
            kept = SiteStore(done.directory / "sites" / site)
            (only,) = ledger.standing("rows").runs
            assert only.charged == kept.charged == 4


@pytest.mark.parametrize(
    ("number", "twice"), [(1, "statistics-0"), (2, ""), (5, "evaluation")], ids=KINDS
)
def test_a_run_that_is_cut_goes_on_under_its_name_and_its_ledgers_know(
    own, trial, tmp_path, number, twice
):
    class Cut(BaseException):
        pass

    class Cutting:
        def started(self, rounds, done): ...
        def finished(self, record): ...
        def phase(self, round_number, phase):
            if (round_number, phase) == (number, "unmask"):
                raise Cut

    with pytest.raises(Cut):
        run(trial(), tmp_path / "run", sites=own.folder, progress=Cutting())
    done = resume(tmp_path / "run")
    assert done.summary.aborted_rounds == (number,)
    expected = ["statistics-0", "", "", "", "evaluation"]
    expected.insert(expected.index(twice), twice)
    for site in SITES:
        with own.ledger(site) as ledger:
            charged = [e for e in ledger.entries if isinstance(e, Charged)]
            assert [entry.release for entry in charged] == expected
            assert [entry.round for entry in charged] == [1, 2, 3, 4, 5, 6]
            assert len(ledger.standing("rows").runs) == 1


def test_a_budget_that_is_too_small_for_a_run_is_refused_before_a_file_is_opened(
    own, trial, tmp_path
):
    for site in SITES:
        own.write(site, epsilon=4.0)
        (own.folder / site / "rows.csv").unlink()
    with pytest.raises(RunFailedError, match=r"policy\.maximum_epsilon") as caught:
        run(trial(), tmp_path / "run", sites=own.folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not any((own.folder / site / LEDGER).exists() for site in SITES)


def test_where_earlier_runs_spent_the_budget_no_row_is_read_for_statistics(
    own, trial, tmp_path, monkeypatch
):
    for site in SITES:
        own.write(site, epsilon=8.0)
    run(trial("rounds=6"), tmp_path / "first", sites=own.folder)
    read: list[str] = []

    def watched(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def seen(self, *given, **more):
            read.append(name)
            return real(self, *given, **more)

        monkeypatch.setattr(kind, name, seen)

    watched(Preprocessor, "encode")
    watched(Preprocessor, "apply")
    watched(Trainer, "update")
    again = trial("rounds=6", "privacy.epsilon=8", "preprocessing.share=0.95")
    with pytest.raises(RunFailedError, match="too few sites have budget left for statistics"):
        run(again, tmp_path / "second", sites=own.folder)
    assert read == []
    for site in SITES:
        with own.ledger(site) as ledger:
            assert ledger.epsilon("rows") <= 8.0
            assert ledger.standing("rows").runs[1].charged == 0


# --- whose schema it is --------------------------------------------------------------------------


def test_a_site_whose_schema_differs_says_where_and_the_others_go_on(own, trial, tmp_path):
    path = own.folder / "north" / "own.toml"
    path.write_text(path.read_text().replace("range = [0, 100]", "range = [0, 120]"))
    for site in SITES:
        own.write(site, policy="minimum_cohort = 2\nminimum_colluding_sites = 0\n")
    experiment = trial("protocol.colluding_sites=0", "protocol.minimum_cohort=2")
    done = run(experiment, tmp_path / "run", sites=own.folder)
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("east", "south")
        assert set(record.dropouts) == {"north"}
    assert not (own.folder / "north" / LEDGER).exists()
    # Figures that noise hides are left out, so that there may be none: but the sum was opened.
    [*_, told] = whole_lines(done.directory / EVALUATIONS)
    assert EvaluationRecord.from_json(told).sites == ("east", "south")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("range = [0, 100]", "range = [0, 120]"), r"columns\.age.*\[0\.0, 100\.0\].*120\.0"),
        (('yes = ["2", "3"]', 'yes = ["2"]'), r"columns\.smoker.*yes: \[2, 3\].*yes: \[2\]"),
        (('unit = "years"', 'unit = "months"'), r"columns\.age.*years.*months"),
        (('missing = ["?"]', 'missing = ["?", "NA"]'), r"missing.*\[\?\].*\[\?, NA\]"),
        (("[columns.marker]", "[columns.mark]"), r"columns\.mark.*no such column"),
        (('person = "patient"', ""), r"person.*patient.*none"),
    ],
    ids=["range", "categories", "unit", "missing", "name", "person"],
)
def test_a_site_refuses_another_schema_and_says_what_both_hold(own, trial, tmp_path, change, told):
    path = own.folder / "south" / "own.toml"
    before = schema.load(path)
    path.write_text(path.read_text().replace(*change))
    assert schema.load(path).digest() != before.digest()
    with pytest.raises(RunFailedError, match=rf"south refuses by data\.schema, {told}") as caught:
        run(trial(), tmp_path / "run", sites=own.folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not (own.folder / "south" / LEDGER).exists()


def test_a_site_without_a_schema_takes_part_in_no_run_on_one(own, trial, tmp_path):
    own.write("east", schema=False)
    with pytest.raises(RunFailedError, match=r"east refuses by data\.schema: .*'clinic'"):
        run(trial(), tmp_path / "run", sites=own.folder)


def test_a_description_is_no_difference(own, trial, tmp_path):
    path = own.folder / "south" / "own.toml"
    text = 'unit = "years"\ndescription = "in whole years, when admitted"'
    path.write_text(path.read_text().replace('unit = "years"', text))
    done = run(trial("rounds=1"), tmp_path / "run", sites=own.folder)
    assert done.summary.rounds == 1


def test_what_is_wrong_in_a_file_is_for_its_site_and_not_for_the_server(
    own, trial, tmp_path, capfd
):
    path = own.folder / "south" / "rows.csv"
    lines = path.read_text().splitlines()
    column = lines[0].split(",").index("age")
    row = lines[7].split(",")
    row[column] = "417.25"
    lines[7] = ",".join(row)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFailedError, match="south cannot take part with what it holds") as caught:
        run(trial(), tmp_path / "run", sites=own.folder)
    assert "417" not in str(caught.value)
    told = capfd.readouterr().err
    assert "417.25" in told
    assert "age" in told
    assert len(told.strip().splitlines()) == 1
