"""What a deployment withstands: each adversary of docs/threat-model.md, "A deployment on FLARE".

One consortium serves all tests of the file, in their order; the last ones leave it damaged. Between
the sites and the server lies a relay that copies what passes, and the sites write down what they
draw and learn (`witness`), so that one can look for it where it must not be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from safetensors.numpy import load_file

from securefl.config import ConfigurationError
from securefl.deployment import certificates, nodes
from securefl.deployment.authority import Consortium
from securefl.deployment.certificates import Root
from securefl.deployment.kits import Kit
from securefl.deployment.steward import Session, write_job
from securefl.messages import Proposal, parse_asked
from tests.deployment import witness
from tests.deployment.conftest import REPOSITORY, Deployment, free_port, wait

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client greets (RFC 9113, section 3.4): the preface, and empty SETTINGS."""

SETTINGS = 4


class Relay:
    """Copies every byte between the sites and the server's port, both ways."""

    def __init__(self, port: int, to: int) -> None:
        self._to = to
        self._lock = threading.Lock()
        self.seen = bytearray()
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                for parts in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=parts, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.seen += data
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


class Sought:
    """Byte strings to look for in a lot of memory at once, each 16 bytes long or longer."""

    def __init__(self, needles: Mapping[bytes, str]) -> None:
        self._at: dict[int, list[tuple[bytes, int]]] = {}
        self._needles = needles
        for needle in needles:
            # Whatever its place in memory, one of these eight words of it is an aligned word there.
            starts = range(len(needle) - 15)
            start = max(starts, key=lambda s: len(set(needle[s : s + 15])))
            for at in range(start, start + 8):
                word = int.from_bytes(needle[at : at + 8], "little")
                self._at.setdefault(word, []).append((needle, at))
        self._words = np.array(sorted(self._at), np.uint64)
        self._marked = np.zeros(1 << 16, bool)
        self._marked[self._hash(self._words)] = True

    @staticmethod
    def _hash(words: np.ndarray) -> np.ndarray:
        return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(48)

    def within(self, data: bytes) -> set[str]:
        """What is found in `data`, whose first byte lies at a multiple of eight."""
        found = set()
        words = np.frombuffer(data, np.uint64, len(data) // 8)
        [places] = np.nonzero(self._marked[self._hash(words)])
        places = places[np.isin(words[places], self._words)]
        for place in places.tolist():
            for needle, at in self._at[int(words[place])]:
                start = 8 * place - at
                if start >= 0 and data[start : start + len(needle)] == needle:
                    found.add(self._needles[needle])
        return found


def memory(pid: int) -> Iterator[bytes]:
    """What a process holds and could have written: the parts of its memory that are not code."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return  # it has just ended
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:  # noqa: PTH123 - not buffered
        for line in maps:
            span, rights, *_ = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if not rights.startswith("rw") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            for at in range(start, end, 1 << 24):
                with contextlib.suppress(OSError, OverflowError):
                    file.seek(at)
                    # A secret across two parts is in one of them as a whole.
                    yield file.read(min(end - at, (1 << 24) + (1 << 12)))


def files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.read_bytes()


class Running:
    """The consortium of this file, and what was seen of it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.deployment = Deployment(folder, seen_at=port)
        self.relay = Relay(port, self.deployment.port)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        spy = folder / "spy"
        spy.mkdir()
        shutil.copy(Path(__file__).with_name("witness.py"), spy / "sitecustomize.py")
        experiment = folder / "experiment.toml"
        experiment.write_text(experiment.read_text().replace("not_private_seed = 7\n", ""))
        self._path = f"{spy}{os.pathsep}{REPOSITORY}"
        self._session: Session | None = None

    def start(self) -> None:
        told = {"TMPDIR": str(self.temporary)}
        self.deployment.start("server", **told)
        for site in self.deployment.sites:
            seen = {"WITNESS": str(self.witnessed(site)), "PYTHONPATH": self._path}
            self.deployment.start(site, **told, **seen)
        self.deployment.wait_connected(self.deployment.sites)

    @property
    def session(self) -> Session:
        """The administrator's."""
        if self._session is None:
            self._session = Session(Kit.load(self.deployment.kit("administrator")))
        return self._session

    def all_there(self) -> bool:
        """Whether the server is up and every site is connected."""
        try:
            return self.session.connected() == self.deployment.sites
        except Exception:  # FLARE's client, while the server starts
            self.leave()
            return False

    def rest_there(self) -> bool:
        """The same, of the sites but for the one that was removed."""
        return (
            not self.all_there()
            and self._session is not None
            and (self.session.connected() == self.deployment.sites[:2])
        )

    def leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def submit(self, name: str, *settings: str) -> str:
        """A run, as the command line submits it. Its job."""
        return self.session.submit(name, self.deployment.experiment(*settings).dump(), 2)

    def witnessed(self, site: str) -> Path:
        return self.deployment.folder / f"{site}.witness"

    def log(self, name: str) -> str:
        return (self.deployment.kit(name) / "logs" / "flare.log").read_text(errors="replace")

    def stop(self) -> None:
        self.leave()
        self.deployment.stop()
        self.relay.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("security")
    made = Running(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        if not os.environ.get("KEEP"):
            shutil.rmtree(folder, ignore_errors=True)


# --- who has no certificate of the consortium


def greet(port: int, context: ssl.SSLContext) -> bytes:
    """What the server answers to a greeting; SSLError or ConnectionError where nothing."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        secured.sendall(HTTP2)
        if not (answer := secured.recv(9)):
            raise ConnectionResetError("hung up without a word")
        return answer


def context(kit: Kit, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A client that trusts the consortium's root, and shows a certificate where it has one."""
    made = ssl.create_default_context(cafile=kit.root)
    made.set_alpn_protocols(["h2"])
    if certificate is not None:
        made.load_cert_chain(certificate, key)
    return made


def test_without_a_certificate_of_the_consortium_no_call_gets_through(
    running: Running, tmp_path: Path
) -> None:
    kit = Kit.load(running.deployment.kit("north"))
    port = running.deployment.port
    answer = greet(port, context(kit, kit.certificate, kit.key))
    assert answer[3] == SETTINGS  # the same greeting, by a site

    now = datetime.now(UTC)
    foreign = Root.make("clinics", now)
    key = certificates.make_key()
    issued = foreign.issue("north", key.public_key(), now, 1)
    mine, secret = tmp_path / "mine.crt", tmp_path / "mine.key"
    mine.write_bytes(certificates.certificate_pem(issued))
    secret.write_bytes(certificates.key_pem(key))
    for told in (context(kit), context(kit, mine, secret)):
        # TLS 1.3: the client learns only when it reads that its certificate is not accepted.
        with pytest.raises((ssl.SSLError, ConnectionError)):
            greet(port, told)


def test_an_expired_certificate_is_refused(running: Running, tmp_path: Path) -> None:
    kit = Kit.load(running.deployment.kit("north"))
    then = datetime.now(UTC) - timedelta(days=30)
    authority = running.deployment.consortium.folder / "authority"
    root = Root(
        certificates.read_certificate(authority / "root.crt"),
        certificates.read_key(authority / "root.key"),
    )
    expired = tmp_path / "expired.crt"
    own = certificates.read_key(kit.key).public_key()
    expired.write_bytes(certificates.certificate_pem(root.issue("north", own, then, 7)))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        greet(running.deployment.port, context(kit, expired, kit.key))


# --- what the server and the network get to see of a run


@dataclass(frozen=True)
class Seen:
    """A finished run, and what the server's processes held in its last round."""

    name: str
    held: frozenset[str]
    """Of `known`: what was found in their memory."""
    leaked: frozenset[str]
    """Of `secrets`: what was found there."""
    at_site: frozenset[str]
    """The same, in the memory of a site's own service."""


def known(running: Running, run: str) -> dict[bytes, str]:
    """What the server holds by right, and the network must not see: weights, keys, who agreed to
    what."""
    folder = running.deployment.run_folder(run)
    found = {}
    for path in [*sorted((folder / "checkpoints").glob("*.safetensors")), folder / "model"]:
        if path.suffix:
            weights = load_file(path)["weights"]
            found[weights.tobytes()] = f"weights of {path.stem}"
    for name, key in Kit.load(running.deployment.server).roster.keys.items():
        found[key] = f"key of {name}"
    text = (folder / "experiment.toml").read_bytes()
    found[text[:200]] = "experiment"
    found[b"mean-concave-points"] = "schema"
    return found


def secrets(running: Running) -> dict[bytes, str]:
    """What sites drew and learned, and kept."""
    found = {}
    for site in running.deployment.sites:
        for what, data in witness.read(running.witnessed(site)):
            if what not in ("request", "reply") and len(data) >= witness.LEAST:
                found[data] = f"{site}: {what}"
        for file in ("site.key", "ledger.key"):
            found[(running.deployment.kit(site) / file).read_bytes()] = f"{site}: {file}"
    return found


@pytest.fixture(scope="module")
def seen(running: Running) -> Seen:
    """A run of three updates under masked-bfv, its server looked into before the last one ends."""
    run = "seen"
    job = running.submit(run)
    folder = running.deployment.run_folder(run)

    def last() -> bool:
        progress = running.deployment.progress(run)
        assert progress is None or not progress.over, progress
        return progress is not None and progress.done == 2 and progress.phase == "open"

    wait(last, "the last round", 90)
    kit = Kit.load(running.deployment.server)
    server = [process.pid for process in nodes.processes(kit)]
    for pid in server:
        os.kill(pid, signal.SIGSTOP)
    try:
        command = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server]
        assert any(job.encode() in told for told in command)  # the job's own process lives
        private = secrets(running)
        sought = Sought(private | known(running, run))
        held = set().union(*(sought.within(part) for pid in server for part in memory(pid)))
        [own] = running.deployment.of("north", "securefl.deployment.service")
        at_site = set().union(*map(sought.within, memory(own)))
    finally:
        for pid in server:
            os.kill(pid, signal.SIGCONT)
    over = running.deployment.wait_over(run)
    assert over.state == "finished", over
    assert folder.exists()
    leaked = held & set(private.values())
    return Seen(run, frozenset(held - leaked), frozenset(leaked), frozenset(at_site))


def test_the_server_holds_no_secret_and_no_update_of_a_site_while_its_job_runs(
    running: Running, seen: Seen
) -> None:
    told = secrets(running).values()
    for kind in ("MaskKey.draw", "ChannelKey", "seal_seeds", "split", "HE key", "update as float"):
        assert any(kind in what for what in told), kind  # what was looked for
    by_right = set(known(running, seen.name).values())
    # The search finds what is there: the state of the last finished round, the keys, the text.
    assert {what for what in by_right if "update-000002" in what} <= seen.held
    assert {f"key of {site}" for site in running.deployment.sites} <= seen.held
    assert "experiment" in seen.held
    # At the site what it keeps, and something it drew: of which round depends on how far it got.
    assert "north: site.key" in seen.at_site
    assert any(what.startswith("north: draw of ") for what in seen.at_site)
    assert not seen.leaked


def test_the_servers_memory_and_files_hold_no_secret_and_no_update_after_a_run(
    running: Running, seen: Seen
) -> None:
    by_right = known(running, seen.name)
    sought = Sought(secrets(running) | by_right)
    kit = Kit.load(running.deployment.server)
    running_now = [process.pid for process in nodes.processes(kit)]
    held, size = set[str](), 0
    for pid in running_now:
        for part in memory(pid):
            held |= sought.within(part)
            size += len(part)
    assert size > 1 << 24
    assert not held & set(secrets(running).values())
    needles, stored = secrets(running), set()
    for data in files(kit.folder):
        stored |= {what for needle, what in needles.items() if needle in data}
        stored |= {what for needle, what in by_right.items() if needle in data}
    assert {what for what in by_right.values() if what.startswith("weights")} <= stored
    assert not stored - set(by_right.values())


def test_the_stream_between_sites_and_server_shows_nothing_in_clear(
    running: Running, seen: Seen
) -> None:
    stream = bytes(running.relay.seen)
    assert len(stream) > 100_000
    frames = b"".join(
        data
        for site in running.deployment.sites
        for what, data in witness.read(running.witnessed(site))
        if what in ("request", "reply")
    )
    by_right = known(running, seen.name)
    # The same search finds in the messages themselves what the stream hides.
    inside = {what for needle, what in by_right.items() if needle in frames}
    assert {"experiment", "schema", "key of north", "weights of update-000002"} <= inside
    for needle, what in (by_right | secrets(running)).items():
        assert needle not in stream, what
        assert needle.hex().encode() not in stream, what
    assert b"securefl" not in stream
    assert seen.name.encode() not in stream


# --- what lies around on a machine


def test_nothing_is_left_in_the_folder_for_temporary_files(running: Running, seen: Seen) -> None:
    assert not list(running.temporary.rglob("*"))


def test_a_kit_its_sockets_and_its_logs_are_its_owners_alone(running: Running, seen: Seen) -> None:
    for name in ("server", *running.deployment.sites):
        kit = running.deployment.kit(name)
        assert stat.S_IMODE(kit.stat().st_mode) == 0o700
        private = [*kit.glob("*.sock"), *kit.glob("logs/*"), *kit.rglob("*.key")]
        private += [*kit.rglob("links/**/*.log"), *kit.rglob("*.sqlite"), *kit.rglob("*.jsonl")]
        for path in private:
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077 or "runs" in path.parts, path


def test_no_process_shows_a_secret_on_its_command_line(running: Running, seen: Seen) -> None:
    needles = [needle.hex() for needle in secrets(running)]
    lines = [
        " ".join(process.cmdline())
        for name in ("server", *running.deployment.sites)
        for process in nodes.processes(Kit.load(running.deployment.kit(name)))
    ]
    assert len(lines) >= 7
    for line in lines:
        assert "token" not in line
        assert not any(needle in line for needle in needles)


def test_flares_processes_speak_to_each_other_behind_the_kits_own_walls(running: Running) -> None:
    """By default FLARE listens at a port of loopback in clear, for any user of the machine."""
    kit = Kit.load(running.deployment.server)
    ports = set()
    for name in ("server", *running.deployment.sites):
        for process in nodes.processes(Kit.load(running.deployment.kit(name))):
            for link in process.net_connections(kind="tcp"):
                if link.status == "LISTEN":
                    assert name == "server", link
                    ports.add(link.laddr.port)
    assert running.deployment.port in ports
    [inner] = ports - {running.deployment.port}
    with pytest.raises((ssl.SSLError, ConnectionError)):
        greet(inner, context(kit))
    site = Kit.load(running.deployment.kit("north"))
    told = json.loads((site.flare / "local" / "comm_config.json").read_text())
    links = Path(told["internal"]["resources"]["root_dir"])
    assert kit.folder.parent in links.parents
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in links.rglob("*"))


# --- jobs that would run something else than ours


def job(folder: Path, server: dict[str, Any], client: dict[str, Any]) -> Path:
    """A job of ours, with parts of its configurations replaced."""
    write_job(folder, folder.name, "", 1)
    for name, changed in (("server", server), ("client", client)):
        path = folder / "app" / "config" / f"config_fed_{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def pending(running: Running, name: str) -> Path:
    return Kit.load(running.deployment.kit("administrator")).flare / "transfer" / name


def refused(running: Running, submitted: str) -> str:
    """Why a job was not deployed."""
    wait(lambda: running.session.status(submitted).startswith("FINISHED"), "the job's end")
    assert running.session.status(submitted) == "FINISHED:FAILED_TO_RUN"
    return running.session.detail(submitted)


def end(running: Running, submitted: str, run: str) -> None:
    """End a job whose run must not go on."""
    for process in nodes.processes(Kit.load(running.deployment.server)):
        if submitted in process.cmdline():
            process.kill()
    shutil.rmtree(running.deployment.run_folder(run), ignore_errors=True)


def test_a_job_that_carries_code_is_refused_and_its_code_never_runs(
    running: Running, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    carried = {"path": "carried.Carried", "args": {}}
    folder = job(
        pending(running, "carries"),
        {"workflows": [{"id": "run", **carried}]},
        {"executors": [{"tasks": ["*"], "executor": carried}]},
    )
    code = folder / "app" / "custom" / "carried.py"
    code.parent.mkdir()
    code.write_text(f"open({str(ran)!r}, 'w').close()\n")
    meta = folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"byoc": False}))
    assert "BYOC not permitted" in refused(running, running.session.submit_folder(folder))
    assert not ran.exists()


def test_an_unsigned_job_and_one_changed_after_it_was_signed_are_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvflare.fuel.hci.client import file_transfer

    sign = file_transfer.sign_folders

    def sign_and_change(folder: str, *told: Any, **named: Any) -> None:
        sign(folder, *told, **named)
        path = next(Path(folder).rglob("config_fed_server.json"))
        path.write_text(path.read_text() + " ")

    for signing, reason in (
        (lambda *told, **named: None, "unsigned job rejected"),
        (sign_and_change, "does not pass signature verification"),
    ):
        # An administrator whose program is changed: the server's own is as it is.
        monkeypatch.setattr(file_transfer, "sign_folders", signing)
        submitted = running.session.submit_folder(job(pending(running, "changed"), {}, {}))
        assert reason in refused(running, submitted)


@pytest.mark.parametrize("place", ["workflows", "components"])
def test_a_job_that_names_another_class_is_refused_at_the_server(
    running: Running, place: str, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    other = {"path": "subprocess.Popen", "args": {"args": ["touch", str(ran)]}}
    named: dict[str, Any] = {
        "workflows": [{"id": "run", **other}],
        "components": [{"id": "more", **other}],
    }
    before = running.log("server").count("is not in allow_list")
    folder = job(pending(running, "other"), {place: named[place]}, {})
    submitted = running.session.submit_folder(folder)
    wait(
        lambda: (
            f"'subprocess.Popen' at config path '{place}" in running.log("server")
            and running.log("server").count("is not in allow_list") > before
        ),
        "a refusal",
    )
    end(running, submitted, "other")
    assert not ran.exists()


def test_a_job_that_names_another_class_is_refused_at_every_site(
    running: Running, tmp_path: Path
) -> None:
    """Each site gets a configuration of its own, with the class in another place."""
    ran = tmp_path / "ran"
    other = {"path": "subprocess.Popen", "args": {"args": ["touch", str(ran)]}}
    flares = {"path": "nvflare.app_common.executors.task_script_runner.TaskScriptRunner"}
    named: dict[str, dict[str, Any]] = {
        "middle": {"executors": [{"tasks": ["*"], "executor": other}]},
        "north": {"components": [{"id": "more", **other}]},
        "south": {"task_data_filters": [{"tasks": ["*"], "filters": [flares]}]},
    }
    folder = job(pending(running, "others"), {}, {})
    write_job(folder, "others", running.deployment.experiment().dump(), 1)
    ours = json.loads((folder / "app" / "config" / "config_fed_client.json").read_text())
    told = json.loads((folder / "meta.json").read_text())
    told["deploy_map"] = {"app": ["server"]} | {site: [site] for site in named}
    (folder / "meta.json").write_text(json.dumps(told))
    for site, changed in named.items():
        config = folder / site / "config"
        config.mkdir(parents=True)
        (config / "config_fed_client.json").write_text(json.dumps(ours | changed))
    before = {site: len(running.log(site)) for site in named}
    submitted = running.session.submit_folder(folder)
    for site, changed in named.items():
        [place] = changed
        wait(
            lambda site=site, place=place: re.search(
                f"config path '{place}[^']*' is not in allow_list",
                running.log(site)[before[site] :],
            ),
            f"a refusal at {site}",
        )
    end(running, submitted, "others")
    assert not ran.exists()


@pytest.mark.slow
def test_code_and_unsigned_jobs_that_a_server_lets_through_are_refused_at_every_site(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's configuration is replaced by one that permits everything."""
    from nvflare.fuel.hci.client import file_transfer

    deployment, kit = running.deployment, Kit.load(running.deployment.server)
    running.leave()
    deployment.nodes["server"].terminate()
    deployment.nodes["server"].wait()
    nodes.prepare(kit, classes=("*",))
    rights, start = kit.flare / "local" / "authorization.json", kit.flare / "startup"
    rights.write_text(rights.read_text().replace('"byoc": "none"', '"byoc": "any"'))
    told = (start / "fed_server.json").read_text()
    unsigned = told.replace('"require_signed_jobs": true', '"require_signed_jobs": false')
    assert unsigned != told
    (start / "fed_server.json").write_text(unsigned)
    [program] = nodes.programs(kit)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SECUREFL_KIT": str(kit.folder)}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(program.command, stdout=log, stderr=log, env=environment)
    try:
        wait(running.all_there, "all sites", 90)
        ran = tmp_path / "ran"
        folder = job(pending(running, "lets-through"), {}, {})
        code = folder / "app" / "custom" / "sitecustomize.py"
        code.parent.mkdir()
        code.write_text(f"open({str(ran)!r}, 'a').close()\n")
        detail = refused(running, running.session.submit_folder(folder))
        for site in deployment.sites:
            assert re.search(f"{site}: [^,]*BYOC not permitted", detail)
        assert not ran.exists()

        monkeypatch.setattr(file_transfer, "sign_folders", lambda *told, **named: None)
        submitted = running.session.submit_folder(job(pending(running, "unsigned"), {}, {}))
        detail = refused(running, submitted)
        for site in deployment.sites:
            assert re.search(f"{site}: [^,]*unsigned job rejected", detail)
    finally:
        running.leave()
        server.terminate()
        server.wait()
        (start / "fed_server.json").write_text(told)
        deployment.start("server")
    wait(running.all_there, "all sites", 90)


# --- a site in another's name


def test_a_site_cannot_join_as_another_site_nor_as_an_administrator(
    running: Running, tmp_path: Path
) -> None:
    north = Kit.load(running.deployment.kit("north"))
    copy = tmp_path / "copy"
    shutil.copytree(north.flare / "startup", copy / "flare" / "startup")
    (copy / "flare" / "local").mkdir()
    for path in (north.flare / "local").iterdir():
        shutil.copy(path, copy / "flare" / "local")
    told = (copy / "flare" / "startup" / "fed_client.json").read_text()
    (copy / "flare" / "startup" / "fed_client.json").write_text(told.replace("north", "south"))
    posing = dataclasses.replace(north, folder=copy, name="south")
    _, program = nodes.programs(posing)
    before = running.deployment.joined("south")
    with (tmp_path / "posing.log").open("wb") as log:
        process = subprocess.Popen(program.command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait(
            lambda: (
                "authenticated as 'north' but claimed endpoint 'south'" in running.log("server")
            ),
            "a refusal",
        )
    finally:
        process.kill()
        process.wait()
    assert running.deployment.joined("south") == before
    assert "south" in running.session.connected()

    administrator = Kit.load(running.deployment.kit("administrator"))
    forged = tmp_path / "forged"
    shutil.copytree(administrator.folder, forged)
    for old, new in ((north.key, "client.key"), (north.certificate, "client.crt")):
        shutil.copy(old, forged / "flare" / "startup" / new)
    with pytest.raises(ConfigurationError, match="does not let administrator in"):
        Session(Kit.load(forged), timeout=5.0)


def test_a_site_gets_no_token_in_anothers_name_and_no_command_to_it(running: Running) -> None:
    audit = running.deployment.kit("south") / "flare" / "audit.log"  # FLARE's
    before = audit.read_text().count("train.check_status")
    done = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name("intruder.py"),
         running.deployment.kit("north"), "south"],
        capture_output=True, text=True, timeout=90, check=False, cwd=running.deployment.folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["as itself"], done.stderr  # it speaks as FLARE expects
    assert not told["as the victim"]
    assert "ok" not in told["own name"]
    assert "ok" not in told["the server's name"]
    log = running.log("server")
    assert "north.other speaks to south" in log
    assert "north speaks as server" in log
    assert audit.read_text().count("train.check_status") == before


# --- who only wants to stop it


def test_junk_and_a_thousand_connections_do_not_stop_the_server(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    kit, port = Kit.load(running.deployment.kit("north")), running.deployment.port
    draw = np.random.default_rng(1)
    with contextlib.ExitStack() as kept:
        for number in range(1000):
            link = kept.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number % 4 == 0:
                with contextlib.suppress(OSError):
                    link.sendall(draw.bytes(int(draw.integers(1, 2000))))
        # A site's certificate, and then junk and a frame of 16 MB (RFC 9113, section 4.1).
        for junk in (draw.bytes(5000), HTTP2 + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(70_000)):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                context(kit, kit.certificate, kit.key).wrap_socket(
                    plain, server_hostname="localhost"
                ) as secured,
            ):
                secured.sendall(junk)
                while secured.recv(1 << 16):
                    pass
        assert greet(port, context(kit, kit.certificate, kit.key))[3] == SETTINGS
        wait(running.all_there, "all sites")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- a site that was removed: last, since it is gone for good


def test_a_removed_site_is_out_at_once_and_the_run_goes_on_without_it(running: Running) -> None:
    deployment = running.deployment
    running.submit("goes-on", "rounds=20")

    def begun() -> bool:
        progress = deployment.progress("goes-on")
        return progress is not None and progress.done >= 1

    wait(begun, "the first round", 90)
    running.leave()
    joined = deployment.joined("south")
    deployment.consortium.remove("south")  # lays the server's kit out anew, where it lies

    def without() -> bool:
        progress = deployment.progress("goes-on")
        return (
            progress is not None
            and progress.jobs == 2
            and progress.sites == ("middle", "north")
            and progress.done >= 3
        )

    wait(without, "rounds without the removed site", 90)
    assert running.session.connected() == ("middle", "north")
    assert "requires identity 'removed:south'" in running.log("server")

    deployment.nodes["south"].terminate()
    deployment.nodes["south"].wait()
    refusals = running.log("server").count("requires identity 'removed:south'")
    deployment.start("south")
    wait(
        lambda: running.log("server").count("requires identity 'removed:south'") > refusals,
        "a refusal",
    )
    assert deployment.joined("south") == joined


@pytest.mark.slow
def test_a_removed_site_is_in_no_new_run(running: Running) -> None:
    deployment = running.deployment
    if "south" in Consortium.load(deployment.consortium.folder).sites:
        running.leave()
        deployment.consortium.remove("south")
    wait(running.rest_there, "the other sites", 90)
    asked = running.witnessed("north")
    earlier = len(witness.read(asked))
    running.submit("names-it")
    running.submit("after", 'sites.names=["middle", "north"]')

    def proposed() -> bool:
        requests = [data for what, data in witness.read(asked)[earlier:] if what == "request"]
        told = [parse_asked(data) for data in requests]
        rosters = [[p.site for p in t.roster] for t in told if isinstance(t, Proposal)]
        assert all(roster == ["middle", "north"] for roster in rosters)
        return bool(rosters)

    wait(proposed, "a proposal")
    wait(lambda: "south is not in the consortium's roster" in running.log("server"), "a refusal")
    assert deployment.progress("names-it") is None
