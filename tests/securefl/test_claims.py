"""Nothing that is edited, lost or replaced makes a run claim more privacy than it had."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from msgspec import structs

from protocols.errors import MalformedMessageError
from securefl import config, runs, store
from securefl.config import ConfigurationError
from securefl.messages import Answer, Refusal, Request, parse_reply, printable
from securefl.runs import RunFailedError
from securefl.store import CorruptStoreError, SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

PLAN = """
[privacy]
epsilon = 20.0
delta = 1e-3
rate = 0.2
expected_batch = 16
"""


class InterruptedRunError(Exception):
    """Stands for a kill between two rounds."""


class StopAfter:
    """Progress that interrupts the run once `update` rounds are on disk."""

    def __init__(self, update: int) -> None:
        self.update = update

    def started(self, rounds: int, done: int) -> None: ...

    def phase(self, round_number: int, phase: str) -> None: ...

    def finished(self, record) -> None:
        if record.update == self.update:
            raise InterruptedRunError


def interrupted(folder: Path, text: str, update: int = 2, **options) -> Path:
    experiment = config.parse(text + '\n[protocol]\nname = "bfv"\n')
    with pytest.raises(InterruptedRunError):
        run(experiment, folder, progress=StopAfter(update), **options)
    return folder / "experiment.toml"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("", PLAN, id="a plan added"),
        pytest.param(PLAN, PLAN.replace("20.0", "5.0"), id="less epsilon"),
        pytest.param(PLAN, PLAN.replace("0.2", "0.01"), id="a lower rate"),
        pytest.param("not_private_seed = 3\n" + PLAN, PLAN, id="the test seed removed"),
        pytest.param("seed = 1\n" + PLAN, "seed = 2\n" + PLAN, id="another public seed"),
    ],
)
def test_a_run_is_not_resumed_under_another_experiment(tmp_path, before, after) -> None:
    written = interrupted(tmp_path / "run", "rounds = 4\n" + before)
    edited = config.parse("rounds = 4\n" + after + '\n[protocol]\nname = "bfv"\n')
    written.write_text(edited.dump())
    with pytest.raises(ConfigurationError, match="was changed after the run began"):
        resume(tmp_path / "run")


def test_what_is_no_promise_may_change_on_resume(tmp_path) -> None:
    written = interrupted(tmp_path / "run", "rounds = 4\n" + PLAN)
    written.write_text(written.read_text().replace("workers = 0", "workers = 1"))
    assert resume(tmp_path / "run").summary.rounds == 4


@pytest.mark.parametrize("loss", ["removed", "set back"])
def test_a_site_that_forgot_its_charges_stops_the_run(tmp_path, loss) -> None:
    interrupted(tmp_path / "run", "rounds = 4\n" + PLAN)
    path = tmp_path / "run/sites/site-2/site.json"
    if loss == "removed":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"charged":2', '"charged":1'))
    with pytest.raises(CorruptStoreError, match="site-2 was charged for 2 rounds"):
        resume(tmp_path / "run")


def test_charges_stay_under_their_plan_without_any_checkpoint(tmp_path) -> None:
    written = interrupted(tmp_path / "run", "rounds = 4\n" + PLAN, update=1)
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    (tmp_path / "run/metrics.jsonl").unlink()
    written.write_text(written.read_text().replace("epsilon = 20.0", "epsilon = 5.0"))
    with pytest.raises(ConfigurationError, match="charged under another experiment or plan"):
        resume(tmp_path / "run")


def test_a_run_with_a_replaced_site_is_not_private_even_after_resume(tmp_path) -> None:
    """What a replacement does with the records, nobody can say."""
    interrupted(tmp_path / "run", "rounds = 3\n" + PLAN, clients={"site-2": lambda honest: honest})
    summary = resume(tmp_path / "run").summary
    assert summary.private is False
    assert "replaced site-2" in (summary.why_not_private or "")


def test_a_lost_server_record_does_not_bring_back_round_numbers(tmp_path) -> None:
    interrupted(tmp_path / "run", "rounds = 3\n")
    (tmp_path / "run/server.json").unlink()
    assert resume(tmp_path / "run").summary.rounds == 3


def test_two_processes_never_charge_one_site(tmp_path, monkeypatch) -> None:
    """An orphan worker and the run that was resumed would overwrite each other's count."""
    code = (
        "import sys; from pathlib import Path; from securefl.store import SiteStore\n"
        "store = SiteStore(Path(sys.argv[1])); store.bind('a'); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    with pytest.raises(ConfigurationError, match="in use by another process"):
        SiteStore(tmp_path).bind("a")
    other.communicate("")
    SiteStore(tmp_path).bind("a")


MODULES = """
import torch
from torch import nn

class Centred(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs[0], outputs)
    def forward(self, x):
        return self.layer(x - x.mean(0))

class Idle(Centred):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.idle = nn.Parameter(torch.zeros(3))
    def forward(self, x):
        return self.layer(x)

def plain(inputs, outputs):
    return nn.Linear(inputs[0], outputs)
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> Path:
    (tmp_path / "foreign_models.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"), [("Centred", "depends on the others"), ("Idle", "takes no part")]
)
def test_a_model_that_mixes_samples_is_refused(foreign, name, said) -> None:
    experiment = config.parse(f'rounds = 2\n[model]\nname = "foreign_models:{name}"\n{PLAN}')
    with pytest.raises(ConfigurationError, match=said):
        run(experiment, foreign / "run")
    assert not (foreign / "run" / "experiment.toml").exists()


def test_foreign_code_is_named_as_what_the_guarantee_rests_on(foreign) -> None:
    experiment = config.parse(f'rounds = 2\n[model]\nname = "foreign_models:plain"\n{PLAN}')
    summary = run(experiment, foreign / "run").summary
    assert any("foreign_models:plain" in sentence for sentence in summary.outside_guarantee)


def test_a_reason_cannot_carry_terminal_codes() -> None:
    forged = Answer(b"").to_bytes().replace(b"Answer", b"Refusal")
    for data in (forged, b"\x93\xa7Refusal\xa7request\xa4a\x1b[2"):
        with pytest.raises(MalformedMessageError):
            parse_reply(data)
    assert printable("a\x1b[2Jb\nc") == "a [2Jb c"


def test_resuming_through_a_link_stays_with_its_run_when_the_link_moves(tmp_path) -> None:
    """runs/latest moves when another run starts; a resumed run must not follow it."""
    interrupted(tmp_path / "one", "rounds = 4\n")
    interrupted(tmp_path / "two", "rounds = 4\n")
    link = tmp_path / "latest"
    link.symlink_to("one")

    class Moves(StopAfter):
        def finished(self, record) -> None:
            link.unlink(missing_ok=True)
            link.symlink_to("two")

    done = resume(link, progress=Moves(0))
    assert done.directory == tmp_path / "one"
    assert (tmp_path / "one" / "summary.json").exists()
    assert not (tmp_path / "two" / "summary.json").exists()


@pytest.mark.parametrize("protocol", ["bfv", "masked-bfv"])
def test_a_refused_opening_is_the_last_one_of_the_round(tmp_path, protocol) -> None:
    """Refusals to open chosen ciphertexts would tell of the key, a bit at a time."""
    answers = []

    def forging(exchange):
        def ask(phase, messages):
            if phase != "open":
                return exchange(phase, messages)
            [(site, message)] = messages.items()
            request = Request.from_bytes(message)
            forged = bytearray(request.body)
            forged[-1] ^= 1
            wrong = structs.replace(request, body=bytes(forged)).to_bytes()
            answers.append(
                [parse_reply(exchange(phase, {site: m})[site]) for m in (wrong, message)]
            )
            return {}

        return ask

    experiment = config.parse(f'rounds = 1\n[protocol]\nname = "{protocol}"')
    with pytest.raises(RunFailedError):
        run(experiment, tmp_path / "run", exchange=forging)
    assert answers
    for first, second in answers:
        assert isinstance(first, Refusal)
        assert isinstance(second, Refusal)
        assert "does not come now" in second.reason
