"""What deploy/ and `make wheels` offer is there, fits the program, and installs as it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import typer.main

from securefl.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
CONTAINERFILE = re.sub(r"\\\n\s*", "", (DEPLOY / "Containerfile").read_text())


def steps(instruction: str) -> list[str]:
    """What stands after an instruction of the Containerfile, wherever it stands."""
    return re.findall(rf"^{instruction} (.*)$", CONTAINERFILE, re.MULTILINE)


def check_command(words: list[str]) -> None:
    """These words are a command of securefl, its arguments and its options."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("securefl", list(words), resilient_parsing=False)


def composed() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra flare")
    told: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return told


def test_the_image_is_built_from_files_that_are_here_and_let_in() -> None:
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {word for step in steps("COPY") for word in step.split()[:-1] if "--from" not in step}
    copied = {"wheels" if word == "wheel[s]" else word for word in copied}
    assert copied == let_in
    for word in copied - {"wheels"}:  # `make wheels` makes that one
        assert (ROOT / word).exists(), word


def test_nothing_but_what_is_named_gets_into_the_image() -> None:
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert not [step for step in steps("COPY") if step.split()[0] == "."]


def test_the_image_runs_as_nobody_in_particular() -> None:
    assert steps("USER") == ["10001:10001"]
    assert steps("ENTRYPOINT") == ['["securefl"]']
    [health] = re.findall(r"CMD \[(.*?)\]$", steps("HEALTHCHECK")[0])
    name, *words = [word.strip(' "') for word in health.split(",")]
    assert name == "securefl"
    check_command(words)


def test_compose_starts_commands_that_exist_and_keeps_what_they_may_do_small() -> None:
    services = composed()["services"]
    assert set(services) == {"server", "site"}
    for service in services.values():
        check_command(service["command"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["mem_limit"] == service["memswap_limit"]
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert [volume.rpartition(":")[2] for volume in writable] == ["/kit"]


def test_a_site_opens_no_port() -> None:
    services = composed()["services"]
    assert "ports" not in services["site"]
    assert len(services["server"]["ports"]) == 1


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_commands_that_exist_and_may_write_to_the_kit_only(unit: Path) -> None:
    told = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
    _, *words = shlex.split(told["ExecStart"])
    check_command(words)
    assert told["ReadWritePaths"] == words[-1]
    assert told["ProtectSystem"] == "strict"
    assert told["NoNewPrivileges"] == "yes"
    assert told["OOMPolicy"] == "continue"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_no_fault_with_the_units(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    text, count = re.subn(r"/opt/securefl/bin/securefl", sys.executable, unit.read_text())
    assert count == 1
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def cut_off() -> list[str]:
    """A prefix that takes the network from a command, where this machine allows it."""
    prefix = ["unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return []
    return prefix if allowed == 0 else []


@pytest.mark.slow
def test_what_make_wheels_gathers_installs_and_runs_without_a_network(tmp_path: Path) -> None:
    wheels, fresh = tmp_path / "wheels", tmp_path / "fresh"
    made = [f"VENV={tmp_path / 'builder'}", f"WHEELS={wheels}", f"PYTHON={sys.executable}"]
    subprocess.run(["make", "-C", str(ROOT), "wheels", *made], check=True, capture_output=True)
    venv.create(fresh, with_pip=True)
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    def offline(*command: str) -> str:
        done = subprocess.run(
            [*cut_off(), str(fresh / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=alone,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    offline("pip", "install", "--no-index", "--find-links", str(wheels), "securefl[flare]")
    assert re.search(r"\d+\.\d+\.\d+", offline("securefl", "--version"))
    offline(
        "securefl", "consortium", "new", "trial", "--server", "fl.example.org", "--sites", "a,b"
    )
    assert (tmp_path / "trial" / "kits" / "a" / "kit.toml").exists()
    offline("python", "-c", "import nvflare.apis.impl.controller, torch, tenseal")
