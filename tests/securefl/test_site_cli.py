"""`securefl site`: a person makes a site, sees what is asked in words, and agrees to it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from securefl import cli, config
from securefl.config import Policy
from securefl.privacy import policy
from securefl.site import Consents
from securefl.site_cli import _TEMPLATE
from securefl.site_folder import KEY, LEDGER, SITE, read_key

EXPERIMENT = """
name = "relapse"
rounds = 8
[sites]
count = 4
[privacy]
epsilon = 5.0
delta = 1e-3
rate = 0.2
expected_batch = 16
"""
INIT = ("--name", "north", "--data-id", "cardio", "--unit", "record", "--epsilon", "6")
INIT = (*INIT, "--delta", "1e-3", "--purpose", 'predict "relapse" \\ again')
ASKED = ("--sites", "4", "--parameters", "62")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call `securefl site` in a folder with trial.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.toml").write_text(EXPERIMENT)
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

    def call(*arguments: object) -> Any:
        return runner.invoke(cli.app, ["site", *map(str, arguments)])

    return call


@pytest.fixture
def north(command: Any, tmp_path: Path) -> Path:
    """A site that was made by the command."""
    assert command("init", "north", *INIT).exit_code == 0
    return tmp_path / "north"


def test_init_makes_a_safe_site_and_prints_the_public_key_only(
    command: Any, tmp_path: Path
) -> None:
    result = command("init", "north", *INIT)
    assert result.exit_code == 0
    folder = tmp_path / "north"
    assert read_key(folder).public.hex() in result.stdout
    assert (folder / KEY).read_bytes().hex() not in result.stdout
    site = config.load_site(folder / SITE)
    assert site.policy == Policy()
    assert site.data.purpose == 'predict "relapse" \\ again'
    assert (site.budget.unit, site.budget.epsilon, site.budget.delta) == ("record", 6.0, 1e-3)
    before = (folder / SITE).read_bytes(), (folder / KEY).read_bytes()
    again = command("init", "north", *INIT)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert ((folder / SITE).read_bytes(), (folder / KEY).read_bytes()) == before
    (folder / SITE).unlink()  # as when it was interrupted
    told = json.loads(command("init", "north", *INIT, "--format", "json").stdout)
    assert told["public_key"] == read_key(folder).public.hex()


def test_the_comments_of_site_toml_are_the_defaults() -> None:
    """Each policy key is there, and taking the # away changes nothing but what must be chosen."""
    text = _TEMPLATE.format(
        consortium="",
        name='"north"',
        id='"a"',
        purpose='"b"',
        path="",
        schema="",
        person='person = "who"',
        unit='"person"',
        epsilon="2.0",
        delta="1e-05",
        units='["person", "site"]',
    )
    start = text.index("\n[policy]\n")
    uncommented = re.sub(
        r"^# (?=\w+ = )", "", text[start : text.index("# Code that a run")], flags=re.M
    )
    shown = tomllib.loads(uncommented)["policy"]
    assert set(shown) == set(Policy.model_fields) - {"callables"}
    site = config.parse_site(text)
    chosen = {"maximum_epsilon": 2.0, "maximum_delta": 1e-5, "units": list(site.units)}
    defaults = json.loads(Policy().model_dump_json()) | chosen
    del shown["transcript_until"]
    assert shown == {key: defaults[key] for key in shown}
    assert (site.maximum_epsilon, site.maximum_delta) == (2.0, 1e-5)


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        (("--epsilon", "0"), "budget.epsilon = 0.0"),
        (("--epsilon", "nan"), "budget.epsilon"),
        (("--delta", "2"), "budget.delta = 2.0"),
        (("--name", "a/b"), "name = 'a/b'"),
        (("--data-id", "a b"), "data.id = 'a b'"),
        (("--purpose", "two\nlines"), "data.purpose: write one line"),
        (("--unit", "person"), "--unit person needs --person COLUMN"),
    ],
)
def test_init_refuses_in_one_line_and_makes_nothing(
    command: Any, tmp_path: Path, changes: tuple[str, ...], telling: str
) -> None:
    result = command("init", "north", *INIT, *changes)
    assert result.exit_code == 2
    assert telling in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "north").exists()


def test_check_says_what_is_asked_in_words_and_in_json(command: Any, north: Path) -> None:
    result = command("check", "trial.toml", "--site", north, *ASKED)
    assert result.exit_code == 0, result.stderr
    shown = re.sub(r"[│\s]+", " ", result.stdout)
    site, experiment = config.load_site(north / SITE), config.load("trial.toml")
    asked = policy.asked(site, experiment, 4, 62)
    for about, text in asked.sentences():
        assert about in shown
        assert " ".join(text.split()) in shown
    told = json.loads(
        command("check", "trial.toml", "--site", north, *ASKED, "--format", "json").stdout
    )
    assert told["permitted"] is True
    assert told["digest"] == asked.digest().hex()
    assert told["epsilon"]["others"] == max(asked.epsilon.values()) <= 5
    assert told["budget"]["after"] <= told["budget"]["epsilon"]
    assert not (north / "consents").exists()
    assert not (north / LEDGER).exists()


def test_check_lists_every_broken_rule_and_exits_with_two(command: Any, north: Path) -> None:
    Path("trial.toml").write_text(EXPERIMENT.replace("5.0", "7.0").replace("= 8", "= 5000"))
    result = command("check", "trial.toml", "--site", north, *ASKED)
    assert result.exit_code == 2
    assert "policy.maximum_epsilon" in result.stdout
    assert "policy.maximum_rounds" in result.stdout
    asked = command("check", "trial.toml", "--site", north, *ASKED, "--format", "json")
    assert asked.exit_code == 2
    told = json.loads(asked.stdout)
    assert told["permitted"] is False
    assert told["broken"][0] == {
        "rule": "policy.maximum_epsilon",
        "proposed": "7",
        "permitted": "at most 6",
    }
    refused = command("agree", "trial.toml", "--site", north, *ASKED, "--by", "A. Person", "--yes")
    assert refused.exit_code == 2
    assert "north refuses by policy.maximum_epsilon" in refused.stderr
    assert not (north / "consents").exists()


def test_agree_refuses_without_a_terminal_unless_told_yes(command: Any, north: Path) -> None:
    result = command("agree", "trial.toml", "--site", north, *ASKED, "--by", "A. Person")
    assert result.exit_code == 2
    assert "nobody can be asked here" in result.stderr
    assert not (north / "consents").exists()
    result = command("agree", "trial.toml", "--site", north, *ASKED, "--by", "A. Person", "--yes")
    assert result.exit_code == 0
    asked = policy.asked(config.load_site(north / SITE), config.load("trial.toml"), 4, 62)
    [path] = (north / "consents").iterdir()
    assert path.stem == asked.digest().hex()
    written = json.loads(path.read_text())
    assert written["by"] == "A. Person"
    assert any("Epsilon 5 against" in sentence for sentence in written["sentences"])
    assert Consents(north).given(asked, bytes(16))


TWICE = """
import sys
from pathlib import Path
from securefl.cli import main
for _ in range(2):
    try:
        main()
    except SystemExit as end:
        print(f"<{end.code or 0} {Path(sys.argv[5], 'consents').exists()}>", flush=True)
"""


def test_agree_asks_a_person_on_a_terminal_and_nothing_typed_is_no(north: Path) -> None:
    """The command twice in one process, which takes seconds to start: "", then "y"."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", TWICE, "site", "agree", "trial.toml"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}
    with subprocess.Popen(
        [*command, "--site", north, *ASKED, "--by", "A. Person"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    ) as process:
        os.close(follower)
        os.write(leader, b"\ny\n")
        shown = b""
        while True:
            try:
                read = os.read(leader, 65536)
            except OSError:  # the other end is closed: Linux says so
                break
            if not read:
                break
            shown += read
        assert process.wait() == 0
    os.close(leader)
    refused, agreed, rest = re.split(rb"<\d \w+>", shown)
    assert re.findall(rb"<(\d \w+)>", shown) == [b"1 False", b"0 True"]
    for asked in (refused, agreed):
        assert b"What north is asked to agree to" in asked
        assert b"Does A. Person agree to one such run?" in asked
    assert b"Nothing was agreed to." in refused
    assert not rest.strip()


def test_help_of_site_needs_no_torch() -> None:
    program = (
        "import sys\nsys.argv = ['securefl', 'site', '--help']\nfrom securefl.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.endswith("False\n")
    for name in ("init", "check", "agree"):
        assert name in done.stdout
