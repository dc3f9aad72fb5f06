"""What sites, packages and hands may do to an audit, and it still says what is so."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from attacks import attack, mask_reuse, membership, readable, shared_key, traffic
from attacks.attack import AttackFailedError, AttackResult, Given, Profile, Score, UnavailableError
from attacks.audit import Audit, audit, hashes
from attacks.case import Case
from attacks.cli import join
from attacks.membership import Candidates
from attacks.view import View
from protocols.messages import Upload
from securefl import config, runs, store
from securefl.config import ConfigurationError
from securefl.messages import Answer, Refusal, Request, parse_reply
from securefl.privacy.ledger import SignedHead
from securefl.terminal import OneLineErrors

SITES = '["site-1", "site-2", "site-3", "site-4"]'
RUN = f"""
version = 1
name = "adversary"
rounds = 2
[data]
source = "breast-cancer"
default_range = [0, 100]
[sites]
count = 4
[model]
name = "logistic"
[training]
batch_size = 16
[transcript]
consent = {SITES}
own = {SITES}
"""


class Misbehaving:
    """A site that replaces its reply to one phase of training by `made`."""

    def __init__(self, inner, made, phase):
        self._inner, self._made, self._phase = inner, made, phase

    def answer(self, data: bytes) -> bytes:
        reply = self._inner.answer(data)
        return self._made(reply) if Request.from_bytes(data).phase == self._phase else reply


def recorded(folder: Path, protocol: str = "masked-bfv", made=None, phase: str = "upload") -> Path:
    experiment = config.parse(RUN, [f'protocol.name="{protocol}"'])
    clients = {"site-2": lambda one: Misbehaving(one, made, phase)} if made else None
    return runs.run(experiment, folder, clients=clients, report=False).directory


def with_payload(change):
    """A reply whose upload has another payload."""

    def made(reply: bytes) -> bytes:
        said = parse_reply(reply)
        assert isinstance(said, Answer)
        upload = Upload.from_bytes(said.body)
        changed = msgspec.structs.replace(upload, payload=change(upload.payload))
        return Answer(changed.to_bytes(), said.head).to_bytes()

    return made


HOSTILE = {
    "no message at all": lambda _: b"\xdd\xff\xff\xff\xffnonsense",
    "nested deeply": lambda _: b"\x91" * 5000,
    "a body that is no upload": lambda _: Answer(b"<script>\x1b[2J").to_bytes(),
    "a refusal": lambda _: Refusal("request", "<b>no</b> $x^2$").to_bytes(),
    "too short": with_payload(lambda payload: payload[:7]),
    "empty": with_payload(lambda _: b""),
    "too long": with_payload(lambda payload: payload + bytes(100)),
    "coefficients beyond the modulus": with_payload(lambda payload: b"\xff" * len(payload)),
}


def scored(one: attack.Attack, case: Case) -> Score:
    trial = one.trial(case)
    guess = one.adversary(trial.view, trial.given, 0, lambda _: None)
    return one.score(guess, trial.truth, 0)


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_whatever_one_site_uploads_every_attack_goes_on(tmp_path, protocol, made):
    case = Case.open(recorded(tmp_path / "run", protocol, made))
    attacks = [readable.ATTACK, mask_reuse.ATTACK]
    if protocol == "masked-bfv":
        attacks.append(shared_key.ATTACK)
    for one in attacks:
        score = scored(one, case)
        assert score.results[0].n > 0
    assert hashes(case).evidence


def test_whatever_one_site_answers_for_the_masks_every_attack_goes_on(tmp_path):
    def released(_: bytes) -> bytes:
        return Answer(b"\x00").to_bytes()

    case = Case.open(recorded(tmp_path / "run", "secagg", released, "unmask"))
    assert scored(mask_reuse.ATTACK, case).p > 1e-6


def test_an_upload_of_another_length_is_told_with_who_sent_it(tmp_path):
    made = with_payload(lambda payload: payload + bytes(100))
    score = scored(readable.ATTACK, Case.open(recorded(tmp_path / "run", "secagg", made)))
    assert score.p == 0
    assert any(note.startswith("site-2 sent ") for note in score.notes)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("clean") / "run")


def opened_by(clean: Path, *sites: str) -> Case:
    """The run as if only `sites` had consented."""
    case = Case.open(clean)
    seen = tuple(item for item in case.crossings if item.site in sites)
    vars(case)["crossings"] = seen
    return case


@pytest.mark.parametrize("one", [readable.ATTACK, shared_key.ATTACK, traffic.ATTACK])
def test_where_nothing_can_be_compared_nothing_is_said_to_have_been_tested(clean, one):
    with pytest.raises(UnavailableError):
        one.trial(opened_by(clean, "site-1"))


def test_a_head_of_a_ledger_that_its_site_did_not_sign_is_not_told(clean):
    case = Case.open(clean)
    real = case.ledger_heads()
    forged = Answer(b"", SignedHead(1, bytes(32), bytes(64))).to_bytes()
    first = next(item for item in case.crossings if item.direction == "up" and item.number)
    lied = msgspec.structs.replace(first, data=forged)
    vars(case)["crossings"] = (*case.crossings, lied)
    assert case.ledger_heads() == real


# --- what a package brings ----------------------------------------------------------------------


def prints_and_guesses(view: View, given: Given, seed: int, progress) -> traffic.Sizes:
    print("\x1b[2J" * 1000)
    return traffic.adversary(view, given, seed, progress)


def raises(view: View, given: Given, seed: int, progress) -> traffic.Sizes:
    raise RuntimeError("\x1b[2J\n[bold]<script>")


def guesses_nothing(view: View, given: Given, seed: int, progress) -> None:
    return None


def tells_its_seed(view: View, given: Given, seed: int, progress) -> traffic.Sizes:
    return traffic.Sizes({"seed": float(seed)})


def brought(adversary, **changes) -> attack.Attack:
    return dataclasses.replace(traffic.ATTACK, name="brought", adversary=adversary, **changes)


def _trial() -> attack.Trial:
    return traffic.undefended(0, Profile.quick)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    # The adversary's process imports this file by its name.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for function in (prints_and_guesses, raises, guesses_nothing, tells_its_seed):
        monkeypatch.setattr(function, "__module__", Path(__file__).stem)


def test_an_attack_may_use_another_ones_adversary_and_print():
    [mine] = attack.guess(brought(prints_and_guesses), [_trial()], 0)
    trial = _trial()
    assert mine == traffic.adversary(trial.view, trial.given, 0, lambda _: None)


def test_what_an_adversary_raises_is_one_line_that_no_terminal_obeys():
    with pytest.raises(AttackFailedError) as caught:
        attack.guess(brought(raises), [_trial()], 0)
    assert str(caught.value).isprintable()


def test_a_guess_of_another_kind_is_an_error_of_the_attack():
    with pytest.raises(AttackFailedError, match="no Sizes"):
        attack.guess(brought(guesses_nothing), [_trial()], 0)


def test_an_adversary_is_not_told_the_seed_that_worlds_are_made_of():
    told = attack.guess(brought(tells_its_seed), [_trial(), _trial()], 5)
    seeds = [guess.uploaded["seed"] for guess in told]
    assert len(set(seeds)) == 2
    assert not {5.0, 6.0} & set(seeds)


def test_a_pipe_with_something_else_in_it_has_ended():
    with pytest.raises(EOFError):
        attack.receive(io.BytesIO(b"\xff" * 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_result_is_a_number_that_json_cannot_hold(value):
    with pytest.raises(ValueError, match="finite"):
        AttackResult("AUC", value, None, 0.5, 1, 0)


# --- truth and promises -------------------------------------------------------------------------


def test_the_order_of_candidates_does_not_follow_from_what_everybody_knows(clean):
    case = Case.open(clean)
    asked = membership.candidates(case)
    known = int.from_bytes(case.experiment.digest()[:6], "big")
    tables = [case.tables(site) for site in case.sites]
    trained, rest = (membership.gathered(table[i] for table in tables) for i in (0, 1))
    guessed = Candidates.drawn(trained, rest, len(asked.asked) // 2, known)
    right = (guessed.truth.member == asked.truth.member).mean()
    assert 0.3 < right < 0.7


def test_a_promise_so_weak_that_e_to_it_is_no_number_is_still_tested():
    member = np.arange(40) < 20
    pairs = np.stack([np.arange(20), np.arange(20, 40)], axis=1)
    truth = membership.Members(member, pairs, 0, membership.Promise(1000.0, 1e-5))
    told = membership.Scores(membership.Array.of(member.astype(np.float64)))
    assert membership.score(told, truth, 0).p == 1


# --- the command --------------------------------------------------------------------------------

app = typer.Typer(cls=OneLineErrors)
join(app)


def test_a_changed_transcript_is_refused_before_any_attack(clean, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean, run)
    path = run / "transcript" / "messages.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    told: list[str] = []
    with pytest.raises(ConfigurationError, match="SHA-256"):
        audit(Case.open(run), ["traffic"], seed=0, told=lambda name, *_: told.append(name))
    assert not told


def test_a_second_audit_of_a_run_at_the_same_time_is_refused(clean):
    with store.exclusive(clean):
        told = CliRunner().invoke(app, ["audit", str(clean), "--attack", "traffic"])
    assert told.exit_code == 2
    assert "in use by another process" in told.output
    assert not (clean / "audit.json").exists()


def test_what_an_audit_wrote_is_read_again(clean, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean, run)
    told = CliRunner().invoke(
        app, ["audit", str(run), "--attack", "traffic", "--seed", "4", "--format", "json"]
    )
    assert told.exit_code == 0, told.output
    found = Audit.load(run)
    assert found.to_bytes() == (run / "audit.json").read_bytes()
    assert found.seed == 4


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *(("rosters.jsonl", x) for x in ('{"keys":{"site-1":"zz"}}\n', "{\n", "", "\udcff\n")),
        # An empty index is no transcript at all, which is no damage.
        *(("index.jsonl", x) for x in ('{"keys":{"site-1":"zz"}}\n', "{\n", "\udcff\n")),
    ],
)
def test_a_damaged_index_is_one_line_that_names_the_file(clean, tmp_path, name, written):
    run = tmp_path / "run"
    shutil.copytree(clean, run)
    (run / "transcript" / name).write_text(written, errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=name):
        hashes(Case.open(run))
