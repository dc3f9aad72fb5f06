"""An adversary gets its view's bytes and nothing else, and what goes wrong is one line."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from attacks import traffic
from attacks.attack import (
    Attack,
    AttackFailedError,
    AttackResult,
    Profile,
    Score,
    Trial,
    find,
    guess,
    installed,
)
from attacks.view import Array, Given, NetworkView, Public, Records
from securefl.config import ConfigurationError, Experiment

PUBLIC = Public(Experiment().dump(), ("a", "b", "c"), (1,), 2, "classification")
NOTHING = NetworkView(PUBLIC, ())
ROOT = Path(__file__).parents[2]

MODULE = """
import os, sys
import msgspec
from dataclasses import replace
from attacks import traffic

class Seen(msgspec.Struct, frozen=True):
    here: str
    files: list[str]
    environment: list[str]
    arguments: list[str]
    passed: int

def adversary(view, given, seed, progress):
    {body}
    progress(0.5)
    return Seen(os.getcwd(), os.listdir(), sorted(os.environ), sys.argv, len(view.passed))

ATTACK = replace(traffic.ATTACK, name="{name}", adversary=adversary, guess=Seen)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An attack whose adversary runs `body`, in a module that only its file has."""
    import importlib

    def make(body: str, name: str = "tried") -> Attack:
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        module = f"made_{len(list(folder.iterdir()))}"
        (folder / f"{module}.py").write_text(MODULE.format(body=body, name=name))
        monkeypatch.syspath_prepend(folder)
        return importlib.import_module(module).ATTACK

    return make


def test_an_adversary_starts_in_an_empty_folder_and_is_told_of_no_file(made, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN", str(tmp_path))
    told = []
    attack = made("print('noise on standard output')")
    trials = [Trial(NOTHING, {"truth": 1}), Trial(NOTHING, {"truth": 2})]
    for seen in guess(attack, trials, 1, told.append):
        assert seen.files == []
        assert not Path(seen.here).is_relative_to(tmp_path)
        assert "RUN" not in seen.environment
        assert "HOME" not in seen.environment
        assert str(tmp_path) not in " ".join(seen.arguments)
    assert not os.path.exists(seen.here)  # noqa: PTH110 - and nothing is left of it
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_truth_does_not_cross(made):
    """What the process is sent has the view, what is given, and no byte of the truth."""
    from attacks import attack as attacks

    sent = []
    real = attacks.send

    def watched(stream, data):
        sent.append(data)
        real(stream, data)

    hidden = "0123456789abcdef-truth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "send", watched)
        guess(made("pass"), [Trial(NOTHING, {hidden: 1})], 1)
    assert len(sent) == 1
    assert hidden.encode() not in sent[0]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("os._exit(7)", "ended with status 7"),
        ("return 5", "tried: what it guessed is no Seen"),
        ("sys.exit(3)", "ended with status"),
    ],
)
def test_an_adversary_that_stops_is_one_line(made, body, told):
    with pytest.raises(AttackFailedError, match="tried") as caught:
        guess(made(body), [Trial(NOTHING, {})], 1)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adversarys_process_ends_with_the_one_that_started_it():
    """A killed audit leaves nothing at work, even where nobody closes the pipe it reads."""
    code = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-m', 'attacks.alone']); "
        "print('started', flush=True); time.sleep(600)"
    )
    reading, kept_open = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=reading, stdout=subprocess.PIPE, cwd=ROOT
    )
    os.close(reading)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    time.sleep(2)  # the child holds the same pipe
    parent.kill()
    ready, _, _ = select.select([parent.stdout], [], [], 60)
    assert ready
    assert parent.stdout.read() == b""
    parent.wait()
    os.close(kept_open)


def test_an_attack_is_refused_a_view_that_lacks_what_it_needs():
    from attacks import loss

    with pytest.raises(ConfigurationError, match="works on a ReleasedModelView"):
        guess(loss.ATTACK, [Trial(NOTHING, None)], 1)
    needy = replace(traffic.ATTACK, given=frozenset({"candidates"}))
    with pytest.raises(ConfigurationError, match="must be given candidates"):
        needy.check(NOTHING, Given())
    records = Records(Array.of(np.zeros((2, 1), np.float32)), Array.of(np.zeros(2, np.int64)))
    needy.check(NOTHING, Given(candidates=records))


def test_every_installed_attack_has_its_entry_points_name_and_two_worlds():
    known = installed()
    assert {"loss", "lira", "lira-offline", "rmia", "sums", "epsilon", "ckks-key"} <= set(known)
    for name, attack in known.items():
        assert attack.name == name
        assert attack.title
        assert attack.source
        claim = attack.claim(Experiment())
        assert claim.sentence
        assert claim.assumption


def test_an_attack_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(ConfigurationError, match=r"no attack 'looss': there are .*loss"):
        find("looss")


def test_a_score_cannot_hold_nonsense():
    result = AttackResult("x", 1.0, None, 0.0, 1, 0)
    with pytest.raises(ValueError, match="at least one result"):
        Score((), False, None, "")
    with pytest.raises(ValueError, match=r"p = 1\.5"):
        Score((result,), False, 1.5, "")


@pytest.mark.parametrize("seed", range(3))
def test_traffic_ranks_sites_where_uploads_grow_with_records_and_nowhere_else(seed):
    for world, found in ((traffic.undefended, True), (traffic.no_signal, False)):
        trial = world(seed, Profile.quick)
        guessed = traffic.adversary(trial.view, trial.given, seed, lambda _: None)
        score = traffic.score(guessed, trial.truth, seed)
        assert score.succeeded is found
    assert score.p == 1.0
    assert score.results[0].value == 0.0


def test_arrays_travel_as_they_are():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(Array.of(array)), type=Array)
    assert np.array_equal(told.numpy(), array)
    assert told.numpy().dtype == array.dtype
    assert "Array(<f4, (2, 3))" in repr(told)
