"""The `securefl` command: what it prints where, and with which exit status."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from securefl import cli
from securefl.records import read_history

SMALL = ("--set", "rounds=2", "--set", "pruning.last_round=2")

GREETINGS = """
import typer

greetings = typer.Typer()

@greetings.command()
def hello() -> None:
    print("hello")

@greetings.command()
def goodbye() -> None:
    print("goodbye")
"""

EXPLOSIONS = """
from protocols.errors import ProtocolError
from securefl.config import ConfigurationError
from securefl.runs import RunFailedError

ERRORS = {
    "mistake": ConfigurationError("rounds = 0: say\\nat least 1"),
    "failed": RunFailedError("3 rounds were aborted"),
    "peer": ProtocolError("a bad signature", ["site-2", "site-1"]),
    "disk": OSError(28, "No space left on device", "metrics.jsonl"),
    "defect": ZeroDivisionError("division by zero"),
    "interrupt": KeyboardInterrupt(),
}

def add(app: typer.Typer) -> None:
    @app.command()
    def explode(kind: str) -> None:
        secret_key = "0123456789abcdef"[::-1]
        raise ERRORS[kind]
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call securefl in an empty working directory; commands joined by a test leave with it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("registered_commands", "registered_groups"):
        monkeypatch.setattr(cli.app, name, list(getattr(cli.app, name)))
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

    def call(*arguments: object) -> Any:
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an importable module that brings commands."""
    name = f"plugin_of_{tmp_path.name}"  # each test its own: modules are cached by name
    (tmp_path / f"{name}.py").write_text(GREETINGS + EXPLOSIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("option", "said"),
    [("--help", ("demo", "run", "report", "show")), ("--version", ("securefl",))],
)
def test_help_and_version_do_not_load_torch(option: str, said: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['securefl', '{option}']\n"
        "from securefl.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'matplotlib', 'tenseal', 'opacus', 'scipy', 'sklearn', 'pandas'}\n"
        "    print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "loaded: []" in done.stdout
    for name in said:
        assert name in done.stdout


def test_version_is_one_line(command: Any) -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("securefl ")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("mistake", 2, "rounds = 0: say at least 1"),
        ("failed", 1, "3 rounds were aborted"),
        ("peer", 1, "a bad signature (at fault: site-1, site-2)"),
        ("disk", 1, "No space left on device: metrics.jsonl"),
        (
            "defect",
            1,
            "unexpected ZeroDivisionError: division by zero; `securefl --debug ...` shows where",
        ),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    command: Any, plugin: str, kind: str, status: int, line: str
) -> None:
    cli.join(cli.app, [EntryPoint("explode", f"{plugin}:add", cli.GROUP)])
    result = command("explode", kind)
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr == f"securefl: {line}\n"


def test_debug_adds_the_traceback_but_no_variables(command: Any, plugin: str) -> None:
    cli.join(cli.app, [EntryPoint("explode", f"{plugin}:add", cli.GROUP)])
    result = command("--debug", "explode", "failed")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "in explode" in result.stderr
    assert "RunFailedError: 3 rounds were aborted" in result.stderr
    assert "fedcba9876543210" not in result.stderr


def test_a_typer_joins_under_the_name_of_its_entry(command: Any, plugin: str) -> None:
    cli.join(cli.app, [EntryPoint("greet", f"{plugin}:greetings", cli.GROUP)])
    result = command("greet", "goodbye")
    assert (result.exit_code, result.stdout) == (0, "goodbye\n")


def test_a_broken_package_keeps_no_one_from_the_other_commands(
    command: Any, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.join(
        cli.app,
        [
            EntryPoint("absent", "securefl_no_such_module:app", cli.GROUP),
            EntryPoint("greet", f"{plugin}:greetings", cli.GROUP),
        ],
    )
    told = capsys.readouterr().err
    assert told.startswith("securefl: command 'absent' of securefl_no_such_module:app is left out")
    assert told.count("\n") == 1
    assert command("greet", "hello").stdout == "hello\n"


def test_installed_packages_are_found_by_their_entry_points(tmp_path: Path) -> None:
    (tmp_path / "greeter.py").write_text(GREETINGS)
    about = tmp_path / "greeter-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: greeter\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[securefl.commands]\ngreet = greeter:greetings\n")
    paths = [str(tmp_path), str(Path(cli.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "securefl.cli", "greet", "hello"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "hello\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "say which: securefl run EXPERIMENT.toml, or --resume RUN"),
        (["run", "absent.toml"], "cannot read absent.toml: No such file or directory"),
        (["run", "--resume", "absent"], "absent is not a run directory"),
        (["run", "a.toml", "--resume", "b"], "EXPERIMENT.toml does not go with --resume"),
        (["run", "--resume", "b", "--set", "rounds=3"], "--set does not go with --resume"),
        (["run", "--resume", "b", "--directory", "c"], "--directory does not go with --resume"),
        (["demo", "--set", "ruonds=3"], "no key 'ruonds'; did you mean 'rounds'?"),
        (["demo", "--set", "rounds"], "--set rounds: write it as key=value"),
        (["show"], "runs/latest is not a run directory"),
        (["report", "absent"], "absent is not a run directory"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(
    command: Any, arguments: list[str], said: str
) -> None:
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(Path.cwd().iterdir()), "nothing is left behind"


def test_an_unknown_option_or_format_is_refused_with_status_2(command: Any) -> None:
    assert command("demo", "--sett", "a=b").exit_code == 2
    assert command("show", "--format", "xml").exit_code == 2
    assert command("shwo").exit_code == 2


def test_show_prints_the_summary_and_the_last_rounds(command: Any, write_run: Any) -> None:
    result = command("show", write_run(rounds=12, aborted={5}), "--last", 3)
    assert result.exit_code == 0
    for text in (
        "Differential privacy: epsilon 3.3 at delta 0.001 at every site",
        "test accuracy",
        "0.8145",
        "12 (end: round budget)",
        "1 round: number 5",
        "114 held-out records were read.",
    ):
        assert text in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("3/3  ")]
    assert rows == ["11", "12", "13"]


def test_show_says_not_private(command: Any, write_run: Any) -> None:
    assert "NOT PRIVATE: there is no plan" in command("show", write_run(plan=False)).stdout


def test_show_of_an_unfinished_run_says_how_to_go_on(command: Any, write_run: Any) -> None:
    directory = write_run("a run", finished=False)
    result = command("show", directory)
    assert result.exit_code == 0
    assert "trial: unfinished, 3 of at most 3 rounds done\n" in result.stdout
    assert f"continue with: securefl run --resume '{directory}'\n" in result.stdout


def test_show_as_json_is_only_json(command: Any, write_run: Any) -> None:
    directory = write_run(rounds=4)
    history = read_history(directory)
    result = command("show", directory, "--format", "json", "--last", 2)
    shown = json.loads(result.stdout)
    assert shown["finished"] is True
    assert shown["summary"] == json.loads(history.summary.to_json())
    assert shown["rounds"] == [json.loads(record.to_json()) for record in history.rounds[-2:]]
    unfinished = json.loads(
        command("show", write_run("other", finished=False), "--format", "json").stdout
    )
    assert unfinished["finished"] is False
    assert unfinished["summary"] is None


def test_show_last_0_lists_no_rounds(command: Any, write_run: Any) -> None:
    shown = json.loads(command("show", write_run(), "--format", "json", "--last", 0).stdout)
    assert shown["rounds"] == []


def test_show_looks_at_the_newest_run_by_default(command: Any, write_run: Any) -> None:
    Path("runs").mkdir()
    shutil.move(write_run("trial-1"), "runs")
    Path("runs/latest").symlink_to("trial-1")
    assert "trial" in command("show").stdout


def test_report_writes_the_page_and_prints_its_path(command: Any, write_run: Any) -> None:
    directory = write_run()
    result = command("report", directory)
    assert (result.exit_code, result.stdout) == (0, f"{directory}/report.html\n")
    assert (directory / "report.html").read_text().startswith("<!DOCTYPE html>")
    shown = json.loads(command("report", directory, "--format", "json").stdout)
    assert shown == {"report": f"{directory}/report.html"}


def test_report_of_an_unfinished_run_is_refused(command: Any, write_run: Any) -> None:
    result = command("report", write_run(finished=False))
    assert result.exit_code == 2
    assert "the run is unfinished" in result.stderr


def test_the_demo_as_json_prints_only_json_and_leaves_a_report(command: Any) -> None:
    result = command("demo", *SMALL, "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert shown["summary"]["rounds"] == 2
    assert Path(shown["report"]).parent == Path(shown["directory"])
    assert Path(shown["report"]).is_file()


def test_a_run_ends_with_its_summary_and_its_paths(command: Any) -> None:
    Path("mine.toml").write_text(
        'name = "mine"\nrounds = 2\nsites.count = 3\n[data]\ndefault_range = [0, 5000]\n'
    )
    result = command("run", "mine.toml", "--directory", "here", "--set", "rounds=1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "NOT PRIVATE" in result.stdout
    assert "1 (end: round budget)" in result.stdout
    assert result.stdout.endswith("run    here\nreport here/report.html\n")
    again = command("run", "mine.toml", "--directory", "here")
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr
    finished = command("run", "--resume", "here", "--format", "json")
    assert json.loads(finished.stdout)["summary"]["rounds"] == 1


def test_ctrl_c_ends_with_130_and_the_command_that_goes_on(tmp_path: Path) -> None:
    # In its own session, so that the signal reaches only this process.
    process = subprocess.Popen(
        [sys.executable, "-m", "securefl.cli", "demo", "--set", "rounds=2000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    lines = "runs/*/metrics.jsonl"
    while not any(b"\n" in path.read_bytes() for path in tmp_path.glob(lines)):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, "no round finished"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        stdout, stderr = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:  # Python drops what it raises inside a finaliser: press again
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    made = (tmp_path / "runs" / "latest").readlink()
    assert stderr == f"securefl: interrupted; continue with: securefl run --resume runs/{made}\n"
    history = read_history(tmp_path / "runs" / made)
    assert history.summary is None
    assert len(history.rounds) >= 1


def test_bars_show_round_metric_and_epsilon_on_a_terminal(write_run: Any) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    records = read_history(write_run(rounds=2)).rounds
    with cli.Bars(console) as bars:
        bars.started(2, 0)
        for record in records:
            bars.phase(record.round, "upload")
            bars.finished(record)
    shown = screen.getvalue()
    assert "round 2/2" in shown
    assert "upload" in shown
    assert "test accuracy 0.5816  epsilon 1.23" in shown


def test_bars_are_silent_where_there_is_no_terminal(write_run: Any) -> None:
    screen = io.StringIO()
    with cli.Bars(Console(file=screen, force_terminal=False)) as bars:
        bars.started(3, 1)
        bars.phase(2, "upload")
        bars.finished(read_history(write_run()).rounds[0])
    assert screen.getvalue() == ""


def test_typers_own_tracebacks_stay_off() -> None:
    assert isinstance(cli.app, typer.Typer)
    assert cli.app.pretty_exceptions_enable is False
