"""An audit says what was shown and no more; what goes wrong in one attack is a row."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from dataclasses import replace

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from attacks import cli, readable, report, traffic
from attacks.attack import AttackFailedError, AttackResult, Claim, Profile, Score, UnavailableError
from attacks.audit import LEVEL, Audit, Row, assess, audit, judged
from attacks.case import Case
from securefl.config import ConfigurationError
from securefl.records import read_history
from securefl.runs import run
from securefl.terminal import OneLineErrors
from securefl.transcript import crossings, delete

app = typer.Typer(cls=OneLineErrors)
cli.join(app)

RESULT = AttackResult("AUC", 0.7, None, 0.5, 10, 1)


def row(attack="a", verdict="this attack fails", p=1.0, made=True, results=(RESULT,)) -> Row:
    told = ("t", "s", f"claim of {attack}")
    return Row(
        attack=attack, title=told[0], source=told[1], claim=told[2], made=made, assumption="none",
        argument=None, verdict=verdict, p=p, results=results,
    )  # fmt: skip


# --- claims are judged together ---------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), max_size=12))
def test_a_claim_is_contradicted_exactly_where_p_is_below_its_share_of_the_level(drawn):
    rows = [
        row(str(i), "no conclusion" if broken else "this attack fails", p, made)
        for i, (p, made, broken) in enumerate(drawn)
    ]
    tests = sum(made and not broken for _, made, broken in drawn)
    for told, (p, made, broken) in zip(judged(rows), drawn, strict=True):
        tested = made and not broken
        assert (told.verdict == "contradicted") == (tested and p <= LEVEL / tests)
        assert (told.level is not None) == tested


def test_an_attack_without_p_tests_no_claim():
    told = judged([row("a", p=None), row("b", p=LEVEL)])
    assert told[0].level is None
    assert told[1].level == LEVEL
    assert [item.verdict for item in told] == ["this attack fails", "contradicted"]


# --- three worlds ------------------------------------------------------------------------------


def scored(succeeded: bool, p: float | None = None) -> Score:
    return Score((RESULT,), succeeded, p, "limit")


@pytest.mark.parametrize(
    ("found", "undefended", "no_signal", "claim", "verdict"),
    [
        (False, True, False, Claim("c", "a"), "this attack fails"),
        (False, True, False, Claim("c", "a", argument="because"), "proved"),
        (True, True, False, Claim("c", "a", argument="because"), "within the claim"),
        (True, True, False, Claim("c", "a", made=False), "broken"),
        (False, False, False, Claim("c", "a", argument="because"), "no conclusion"),
        (True, True, True, Claim("c", "a", made=False), "no conclusion"),
    ],
)
def test_the_verdict_follows_from_three_worlds(
    monkeypatch, recorded, found, undefended, no_signal, claim, verdict
):
    wrong = [*([] if undefended else [scored(False)]), *([scored(True)] if no_signal else [])]
    outcomes = iter([scored(found), scored(undefended), scored(no_signal), *wrong])
    attack = replace(traffic.ATTACK, score=lambda *_: next(outcomes), claim=lambda _: claim)
    monkeypatch.setattr("attacks.attack.guess", lambda _, worlds, *__: [None for _ in worlds])
    told = assess(attack, recorded, 1)
    assert told.verdict == verdict
    assert bool(told.reason) == (verdict == "no conclusion")
    assert told.undefended.succeeded is undefended


@pytest.mark.parametrize(("undefended", "no_signal"), [(False, False), (True, True)])
def test_a_control_that_goes_wrong_by_chance_is_tried_once_more_and_that_is_told(
    monkeypatch, recorded, undefended, no_signal
):
    seeds = []
    outcomes = iter([scored(False), scored(undefended), scored(no_signal), scored(not undefended)])

    def score(guess, truth, seed):
        seeds.append(seed)
        return next(outcomes)

    monkeypatch.setattr("attacks.attack.guess", lambda _, worlds, *__: [None for _ in worlds])
    told = assess(replace(traffic.ATTACK, score=score), recorded, 1)
    assert (told.verdict, told.reason) == ("proved", "")
    assert (told.undefended.succeeded, told.no_signal.succeeded) == (True, False)
    assert "is a second one" in told.notes[-1]
    assert seeds == [1, 1, 1, 2]


def test_what_cannot_be_tried_says_why(recorded):
    def none(case):
        raise UnavailableError("nothing of the kind was recorded")

    told = assess(replace(traffic.ATTACK, trial=none), recorded, 1)
    assert (told.verdict, told.reason) == ("not assessed", "nothing of the kind was recorded")
    assert not told.results


def test_a_figure_of_nothing_is_no_verdict(monkeypatch, recorded):
    nothing = replace(RESULT, n=0)
    outcomes = iter([Score((nothing,), False, 1.0, "none"), scored(True), scored(False)])
    attack = replace(traffic.ATTACK, score=lambda *_: next(outcomes))
    monkeypatch.setattr("attacks.attack.guess", lambda *_: [None, None, None])
    told = assess(attack, recorded, 1)
    assert (told.verdict, told.p) == ("not assessed", None)
    assert "nothing to try it on" in told.reason


def test_numpys_numbers_are_written_as_numbers():
    import numpy as np

    told = AttackResult("AUC", np.float64(0.5), None, np.float32(0.5), np.int64(3), 1)
    score = Score((told,), np.bool_(True), np.float64(0.25), "")
    assert msgspec.json.decode(msgspec.json.encode(score))["p"] == 0.25


# --- a whole audit -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(recorded) -> Audit:
    return audit(recorded, ["readable", "traffic", "epsilon"], seed=3)


def test_an_audit_of_a_clean_run_raises_no_alarm_and_says_what_it_stands_on(found, recorded):
    verdicts = {item.attack: item.verdict for item in found.rows}
    assert verdicts == {
        "readable": "this attack fails",
        "traffic": "proved",
        "epsilon": "not assessed",
    }
    assert found.alarms == ()
    assert found.seed == 3
    assert found.tests == 2
    stands = found.hashes
    assert all(len(x) == 64 for x in (stands.experiment, stands.code, stands.evidence))
    assert msgspec.json.decode(found.to_bytes(), type=Audit) == found


def test_a_seed_repeats_an_audit(found, recorded):
    again = audit(recorded, ["readable"], seed=3)
    before = next(item for item in found.rows if item.attack == "readable")
    for told, then in zip(again.rows[0].results, before.results, strict=True):
        assert told == then


def test_the_evidences_hash_changes_with_any_recorded_byte(recorded, tmp_path):
    from attacks.audit import hashes

    folder = tmp_path / "run"
    shutil.copytree(recorded.folder, folder)
    before = hashes(Case.open(folder))
    assert before == hashes(recorded)
    path = folder / "model.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert hashes(Case.open(folder)).evidence != before.evidence


def test_a_transcript_that_was_altered_is_no_evidence(recorded, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(recorded.folder, folder)
    data = folder / "transcript" / "messages.bin"
    altered = bytearray(data.read_bytes())
    altered[len(altered) // 2] ^= 1
    data.write_bytes(bytes(altered))
    with pytest.raises(ConfigurationError, match="is not what was recorded"):
        crossings(folder / "transcript")
    done = CliRunner().invoke(app, ["audit", str(folder), "--attack", "traffic"])
    assert done.exit_code != 0


def test_weights_in_clear_are_an_alarm_and_the_exit_status_says_so(
    small_run, tmp_path, monkeypatch
):
    import numpy as np

    from protocols import masks
    from securefl import config

    private = ["privacy.epsilon=5", "privacy.delta=1e-3", "privacy.rate=0.3",
               "privacy.expected_batch=30"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(masks, "add", lambda chunks, terms, bits: iter(chunks))
        patch.setattr(masks, "total", lambda terms, slots, bits: np.zeros(slots, np.uint64))
        folder = run(config.parse(small_run, private), tmp_path / "run", report=False).directory
    told = CliRunner().invoke(
        app, ["audit", str(folder), "--attack", "readable", "--format", "json", "--seed", "1"]
    )
    assert told.exit_code == 1, told.output
    assert "a claim does not hold" in told.stderr
    wrote = json.loads((folder / "audit.json").read_text())
    assert wrote["alarms"] == ["readable"]
    assert "does not hold" in (folder / "audit.html").read_text()


def test_an_attack_that_cannot_be_assessed_is_a_row_and_the_others_go_on(recorded, monkeypatch):
    from attacks import audit as module

    real = module._Worker.do

    def failing(self, job, limit, told):
        if job.attack == "readable":
            self._process.kill()
        return real(self, job, limit, told)

    monkeypatch.setattr(module._Worker, "do", failing)
    told = audit(recorded, ["readable", "traffic"], seed=1, workers=1)
    assert [item.verdict for item in told.rows] == ["no conclusion", "proved"]
    assert "ended with status" in told.rows[0].reason


def test_an_attack_that_takes_too_long_is_stopped_and_says_so(recorded):
    told = audit(recorded, ["readable"], seed=1, limit=0.06)
    assert [item.verdict for item in told.rows] == ["no conclusion"]
    assert "stopped after 0.001 minutes" in told.rows[0].reason


def test_an_interrupted_audit_ends_at_once_with_all_that_works_for_it(recorded, monkeypatch):
    from attacks import audit as module

    begun, ended = [], []
    main = threading.main_thread().ident

    def waiting(self, job, limit, told):
        begun.append(job.attack)
        if len(begun) == 2:  # the main thread only waits for both
            threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        self._process.stdout.read()  # of a process that was asked nothing: until it is killed
        ended.append(job.attack)
        raise AttackFailedError("killed")

    monkeypatch.setattr(module._Worker, "do", waiting)
    with pytest.raises(KeyboardInterrupt):
        audit(recorded, ["readable", "traffic", "loss"], seed=1)
    assert sorted(ended) == sorted(begun)
    assert len(begun) == 2  # the third was not


def test_an_audit_of_a_deleted_transcript_says_that_it_was_deleted(recorded, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(recorded.folder, folder)
    assert delete(folder)
    case = Case.open(folder)
    with pytest.raises(UnavailableError, match="is gone: it was deleted"):
        case.server()
    with pytest.raises(UnavailableError, match="site-1 recorded itself, and that is gone"):
        case.recording("site-1")


# --- the page ----------------------------------------------------------------------------------


def test_the_page_is_made_of_the_audit_alone_and_alike_each_time(found, tmp_path):
    page = report.render(found)
    assert page == report.render(msgspec.json.decode(found.to_bytes(), type=Audit))
    for told in ("readable", "traffic", found.hashes.code, "Excluded by an argument"):
        assert told in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_what_others_wrote_is_shown_as_text(found):
    hostile = "<img src=x onerror=alert(1)>"
    rows = tuple(
        msgspec.structs.replace(item, claim=hostile, reason=hostile, notes=(hostile,))
        for item in found.rows
    )
    page = report.render(msgspec.structs.replace(found, run=hostile, rows=rows))
    assert hostile not in page
    assert "&lt;img" in page


def test_the_headline_says_what_came_of_it(found):
    assert report.headline(found) == "2 attacks tried on 2 claims: none was contradicted"
    rows = tuple(
        msgspec.structs.replace(item, verdict="contradicted") if item.p is not None else item
        for item in found.rows
    )
    alarmed = msgspec.structs.replace(found, rows=rows, alarms=("readable", "traffic"))
    assert report.headline(alarmed) == "2 claims of this run do not hold"
    assert "The claim does not hold" in report.render(alarmed)
    nothing = msgspec.structs.replace(found, rows=(), tests=0)
    assert report.headline(nothing).startswith("No claim was tested")
    assert "No attack could be tried" in report.render(nothing)


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profile", "slow"], '--profile slow: say "quick" or "full"'),
        (["--attack", "nothing"], "no attack 'nothing': there are"),
        (["--site", "/nowhere"], "/nowhere"),
    ],
)
def test_nonsense_is_one_line_and_status_2(recorded, arguments, told):
    done = CliRunner().invoke(app, ["audit", str(recorded.folder), *arguments])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (recorded.folder / "audit.json").exists()


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path, recorded):
    done = CliRunner().invoke(app, ["audit", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not a run directory" in done.stderr
    folder = tmp_path / "run"
    shutil.copytree(recorded.folder, folder)
    (folder / "summary.json").unlink()
    assert read_history(folder).summary is None
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert done.exit_code == 2
    assert "is unfinished" in done.stderr


def test_an_audit_of_some_attacks_is_headed_partial_and_replaces_no_whole_one(found, recorded):
    page = report.render(found)
    assert "Partial: " in page
    assert "Left out by choice:" in page
    whole = msgspec.structs.replace(found, left_out=())
    assert "Partial" not in report.render(whole)
    path = recorded.folder / "audit.json"
    path.write_bytes(whole.to_bytes())
    try:
        done = CliRunner().invoke(app, ["audit", str(recorded.folder), "--attack", "traffic"])
        assert done.exit_code == 2
        assert "has every attack" in done.stderr
        assert path.read_bytes() == whole.to_bytes()
    finally:
        path.unlink()


def test_an_attack_that_succeeds_unclaimed_is_amber_and_in_the_headline(found):
    rows = tuple(
        msgspec.structs.replace(item, verdict="broken", made=False, level=None)
        if item.attack == "readable"
        else item
        for item in found.rows
    )
    broken = msgspec.structs.replace(found, rows=rows, broken=("readable",))
    assert report.headline(broken).startswith("1 attack succeeded where nothing is claimed")
    page = report.render(broken)
    assert 'class="claim warn"' in page
    assert "Broken; no claim says otherwise" in page


def test_a_control_that_goes_wrong_is_status_1(monkeypatch):
    blind = replace(traffic.ATTACK, undefended=traffic.no_signal)
    monkeypatch.setattr("attacks.attack.find", lambda name: blind)
    done = CliRunner().invoke(app, ["attack", "traffic", "--seed", "1"])
    assert done.exit_code == 1
    assert "a control went the wrong way" in done.stderr


def test_a_signed_audit_is_not_replaced(tmp_path, recorded):
    folder = tmp_path / "run"
    shutil.copytree(recorded.folder, folder)
    (folder / "audit.signatures.jsonl").write_text("signed\n")
    done = CliRunner().invoke(app, ["audit", str(folder), "--attack", "traffic"])
    assert done.exit_code == 2
    assert "move audit.json" in done.stderr
    assert not (folder / "audit.json").exists()


def test_one_attack_alone_in_its_two_worlds_and_on_a_run(recorded):
    listed = CliRunner().invoke(app, ["attack", "--format", "json"])
    assert {"lira", "traffic"} <= {item["name"] for item in json.loads(listed.stdout)}
    alone = CliRunner().invoke(app, ["attack", "traffic", "--format", "json", "--seed", "1"])
    told = json.loads(alone.stdout)
    assert told["undefended"]["succeeded"] is True
    assert told["no_signal"]["succeeded"] is False
    on = CliRunner().invoke(app, ["attack", "traffic", str(recorded.folder), "--format", "json"])
    assert json.loads(on.stdout)["verdict"] == "proved"


def test_a_run_without_a_transcript_is_audited_by_its_model_alone(small_run, tmp_path):
    from securefl import config

    bare = ["transcript.consent=[]", "transcript.own=[]", "rounds=1"]
    case = Case.open(run(config.parse(small_run, bare), tmp_path / "run", report=False).directory)
    for attack in (readable.ATTACK, traffic.ATTACK):
        with pytest.raises(UnavailableError, match="no transcript was recorded"):
            attack.trial(case)
    assert case.profile is Profile.quick
    assert len(case.released().weights.numpy()) == 11
