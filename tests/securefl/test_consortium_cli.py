"""`securefl consortium`, `site enroll` and `doctor`: from nothing to kits that can be used."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from securefl import cli, config
from securefl.deployment import certificates
from securefl.deployment.authority import Consortium
from securefl.deployment.doctor import Finding, Verdict, examine, proxy_for, room
from securefl.deployment.kits import Kit

NOW = certificates.now_utc()
SITE = ("--data-id", "d", "--unit", "record", "--epsilon", "6", "--delta", "1e-3", "--purpose", "p")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the consortium `trial` of a and b, on a port of loopback."""
    folder = tmp_path_factory.mktemp("made")
    Consortium.new(folder / "trial", f"127.0.0.1:{_free_port()}", ["a", "b"])
    return folder


@pytest.fixture
def command(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call `securefl` in a folder with a copy of `trial`."""
    shutil.copytree(made / "trial", tmp_path / "trial")
    monkeypatch.chdir(tmp_path)
    for variable in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(variable, raising=False)
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

    def call(*arguments: object) -> Any:
        return runner.invoke(cli.app, list(map(str, arguments)))

    return call


@contextmanager
def _answering(kit: Kit, first: bytes = bytes(3) + b"\x04" + bytes(5)) -> Iterator[int]:
    """A TLS listener at the server's port, with the certificate of `kit`, that begins as HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(kit.certificate, kit.key)
    context.load_verify_locations(kit.root)
    context.set_alpn_protocols(["h2"])
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            connection, _ = listener.accept()
            connection.settimeout(10)
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.sendall(first)
                    secured.recv(100)
            except OSError:
                connection.close()

    with socket.create_server(("127.0.0.1", kit.port)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield kit.port
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", kit.port)).close()
            thread.join(30)


def _found(folder: Path, **options: Any) -> dict[str, Finding]:
    given = {"now": NOW, "environment": {}, **options}
    return {finding.about: finding for finding in examine(folder, **given)}


def test_a_newcomer_sets_a_consortium_up_and_enrols_a_site_with_its_own_keys(
    command: Any, tmp_path: Path
) -> None:
    enrolled = command("site", "enroll", "mine", "--name", "c", "--format", "json")
    assert enrolled.exit_code == 0, enrolled.output
    request = json.loads(enrolled.output)
    made = command(
        *("consortium", "new", "second", "--server", "fl.example.org", "--sites", "a, b"),
        *("--request", request["request"], "--format", "json"),
    )
    assert made.exit_code == 0, made.output
    told = json.loads(made.output)
    assert (told["server"], told["bind"]) == ("fl.example.org:8002", "0.0.0.0:8002")
    assert [m["name"] for m in told["members"] if m["role"] == "site"] == ["a", "b", "c"]
    assert told["members"][-1]["fingerprint"] == request["fingerprint"]
    installed = command("site", "enroll", "mine", "--kit", "second/kits/c")
    assert installed.exit_code == 0, installed.output
    init = command("site", "init", "mine", *SITE)
    assert init.exit_code == 0, init.output
    own = config.load_site(tmp_path / "mine" / "site.toml")
    assert own.name == "c"
    assert own.consortium == {
        m["name"]: m["public_key"] for m in told["members"] if m["name"] in ("a", "b")
    }


def test_add_remove_renew_and_update_go_from_the_keeper_to_a_kit_in_use(
    command: Any, tmp_path: Path
) -> None:
    shutil.copytree("trial/kits/a", "used")
    assert command("site", "init", "used", *SITE).exit_code == 0
    for arguments in (("add", "trial", "d"), ("remove", "trial", "b"), ("renew", "trial")):
        result = command("consortium", *arguments)
        assert result.exit_code == 0, result.output
    updated = command("consortium", "update", "used", "--kit", "trial/kits/a")
    assert updated.exit_code == 0, updated.output
    assert "write: d = " in updated.output
    assert "take out b" in updated.output
    shown = json.loads(command("consortium", "show", "trial", "--format", "json").output)
    assert shown["serial"] == 3
    assert {m["name"] for m in shown["members"] if m["removed"]} == {"b"}
    assert shown["due"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("consortium", "new", "x", "--server", "h"), "--sites a,b,c"),
        (("consortium", "new", "trial", "--server", "h", "--sites", "a"), "nothing is overwritten"),
        (("consortium", "new", "x", "--server", "h", "--sites", "../a"), "cannot be a name"),
        (("consortium", "new", "x", "--server", "h", "--sites", "a", "--days", "0"), "--days 0"),
        (("consortium", "show", "trial/kits"), "is not a consortium"),
        (("consortium", "add", "trial", "a"), "takes part already"),
        (("consortium", "renew", "trial", "--site", "z"), "z is not in trial"),
        (("consortium", "update", "trial", "--kit", "trial"), "cannot read"),
        (("site", "enroll", "x"), "say one of them"),
        (("site", "enroll", "trial/kits/a", "--name", "a"), "is a kit already"),
        (("site", "init", "trial/kits/a", "--name", "b", *SITE), "leave --name out"),
        (("site", "init", "trial/kits/server", *SITE), "name a site's own folder"),
        (("site", "init", "plain", *SITE), "say --name NAME"),
    ],
)
def test_a_mistake_is_one_line_that_says_how_to_mend_it(
    command: Any, arguments: tuple[str, ...], told: str
) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_loads_neither_flare_nor_torch_nor_certificates() -> None:
    code = (
        "import sys, securefl.cli\n"
        "print([m for m in ('nvflare', 'torch', 'grpc', 'cryptography.x509') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_doctor_finds_a_good_kit_good(command: Any, tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text("age\n40\n")
    (tmp_path / "schema.toml").write_text(
        'version = 1\nname = "ages"\nlabel = "age"\n'
        '[columns.age]\ntype = "number"\nrange = [0, 110]\n'
    )
    assert command("site", "init", "trial/kits/a", *SITE).exit_code == 0
    assert _found(tmp_path / "trial/kits/a")["schema"].verdict is Verdict.fault
    path = tmp_path / "trial/kits/a/site.toml"
    path.write_text(path.read_text().replace('# schema = "', 'schema = "../../../'))
    with _answering(Kit.load(tmp_path / "trial/kits/server")):
        result = command("doctor", "trial/kits/a", "--data", "records.csv", "--format", "json")
        server = _found(tmp_path / "trial/kits/server")
        administrator = _found(tmp_path / "trial/kits/administrator")
    told = json.loads(result.output)
    by_name = {check["about"]: check for check in told["checks"]}
    faults = [check for check in told["checks"] if check["verdict"] == "fault"]
    assert [check for check in faults if check["about"] != "versions"] == []
    assert '"server"' in by_name["server"]["found"]
    assert "which is running" in server["port"].found
    assert administrator["server"].verdict is Verdict.ok


def test_doctor_says_where_the_way_to_the_server_ends(tmp_path: Path, made: Path) -> None:
    kits = tmp_path / "kits"
    shutil.copytree(made / "trial" / "kits", kits)
    assert "not reached" in _found(kits / "a")["port"].found
    assert "is free" in _found(kits / "server")["port"].found
    stranger = Consortium.new(tmp_path / "other", f"127.0.0.1:{Kit.load(kits / 'a').port}", ["a"])
    with _answering(Kit.load(stranger.kit("server"))):
        assert "does not hold" in _found(kits / "a")["server"].found
        assert "another program" in _found(kits / "server")["port"].found
    with _answering(Kit.load(kits / "server"), b"220 mail "):
        assert "does not speak gRPC" in _found(kits / "a")["server"].found
        assert _found(stranger.kit("a"))["server"].verdict is Verdict.fault


def test_doctor_says_what_is_wrong_with_kit_clock_and_policy(tmp_path: Path, made: Path) -> None:
    kit = Path(shutil.copytree(made / "trial/kits/a", tmp_path / "a"))
    found = _found(kit, now=NOW - timedelta(hours=2))
    assert found["clock"].verdict is Verdict.warning
    assert "expired" in _found(kit, now=NOW + timedelta(days=400))["certificate"].found
    assert _found(kit, now=NOW + timedelta(days=350))["certificate"].verdict is Verdict.warning
    assert "securefl site init" in found["site.toml"].mend
    (kit / "site.key").chmod(0o644)
    assert "chmod 600" in _found(kit)["certificate"].found
    assert _found(tmp_path)["kit"].verdict is Verdict.fault


def test_doctor_reads_records_and_ledger(command: Any, tmp_path: Path) -> None:
    kit = tmp_path / "trial/kits/a"
    assert command("site", "init", kit, *SITE).exit_code == 0
    assert _found(kit)["records"].verdict is Verdict.warning
    assert _found(kit, data=tmp_path / "none.csv")["records"].verdict is Verdict.fault
    assert _found(kit)["ledger"].verdict is Verdict.ok
    assert not (kit / "ledger.sqlite").exists()
    (kit / "ledger.sqlite").write_bytes(b"no ledger" * 100)
    assert _found(kit)["ledger"].verdict is Verdict.fault


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://p:1"}, None),  # gRPC reads lower case only
        ({"https_proxy": "http://p:1"}, "p:1"),
        ({"http_proxy": "http://p"}, "p:80"),
        ({"https_proxy": "http://p:1", "grpc_proxy": "http://u:pw@q:2"}, "q:2"),
        ({"https_proxy": "https://p:1"}, None),
        ({"https_proxy": "http://p:1", "no_proxy": "x, example.org"}, None),
        ({"https_proxy": "http://p:1", "no_proxy": "x", "no_grpc_proxy": "y"}, "p:1"),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    environment: dict[str, str], proxy: str | None
) -> None:
    assert proxy_for("fl.example.org", environment)[0] == proxy


@given(st.ip_addresses(v=4, network="10.0.0.0/8"))
def test_addresses_are_exempt_by_network(address: object) -> None:
    environment = {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}
    assert proxy_for(str(address), environment)[0] is None


def test_a_password_in_a_proxy_variable_is_not_shown(made: Path) -> None:
    environment = {"https_proxy": "http://user:hunter2@127.0.0.1:9"}
    told = _found(made / "trial/kits/a", environment=environment)
    assert told["proxy"].verdict is Verdict.warning
    assert "hunter2" not in str(told)
    assert "through 127.0.0.1:9" in told["port"].found


@pytest.mark.parametrize(
    ("free", "verdict"), [(1 << 40, Verdict.ok), (1 << 30, Verdict.warning), (9, Verdict.fault)]
)
def test_little_room_is_a_warning_and_none_a_fault(free: int, verdict: Verdict) -> None:
    assert room(free).verdict is verdict
