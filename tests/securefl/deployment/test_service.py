"""A site's service, and the executor that relays to it: real processes, real sockets."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from securefl.deployment import executor
from securefl.deployment.executor import SiteExecutor
from securefl.deployment.service import SOCKET, Connection
from securefl.messages import Refusal, parse_reply


class Service:
    """echo.py as a process, in a folder whose name is longer than a socket's address may be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ("long-" * 30)
        self.folder.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("echo.py"))]
        path = str(Path(__file__).parents[3])
        self.process = subprocess.Popen(
            [*command, str(self.folder)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def connect(self) -> Connection:
        end = time.monotonic() + 30
        while True:
            try:
                return Connection(self.folder)
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def asked(self) -> list[bytes]:
        return (self.folder / "asked").read_bytes().splitlines()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def relay(service: Service) -> SiteExecutor:
    """An executor as FLARE has it after the start of a job."""
    service.connect().close()
    made = SiteExecutor()
    made._folder = service.folder
    return made


def ask(relay: SiteExecutor, data: bytes, **more: object) -> Shareable:
    told = {"hash": hashlib.sha256(data).digest(), "data": data, **more}
    return relay._on_request(executor.TOPIC, Shareable(told), None)


def poll(relay: SiteExecutor, data: bytes) -> Shareable:
    told = Shareable({"hash": hashlib.sha256(data).digest()})
    return relay._on_request(executor.TOPIC, told, None)


def test_a_service_answers_and_its_socket_is_its_owners(service: Service) -> None:
    with service.connect() as first, service.connect() as second:
        assert first.ask(b"x" * 3_000_000) == b"reply to " + b"x" * 3_000_000
        assert second.ask(b"") == b"reply to "
        assert first.born == second.born
    assert (service.folder / SOCKET).stat().st_mode & 0o077 == 0


def test_an_error_in_the_gate_is_a_refusal_and_the_service_goes_on(service: Service) -> None:
    with service.connect() as connection:
        refusal = parse_reply(connection.ask(b"fail"))
        assert isinstance(refusal, Refusal)
        assert "space" not in refusal.reason
        assert connection.ask(b"next") == b"reply to next"


def test_a_message_beyond_all_bounds_ends_its_connection_alone(service: Service) -> None:
    with service.connect() as other:
        with Connection(service.folder) as connection:
            raw: socket.socket = connection._socket
            raw.sendall(struct.pack("<Q", 1 << 40))
            assert raw.recv(1) == b""
        assert other.ask(b"still") == b"reply to still"


def test_a_second_service_in_the_same_folder_is_refused(service: Service) -> None:
    service.connect().close()
    second = Service.__new__(Service)
    second.folder = service.folder
    second.start()
    assert second.process is not None
    _, told = second.process.communicate(timeout=60)
    assert second.process.returncode == 1
    assert b"in use by another process" in told


def test_a_killed_service_is_a_lost_connection_and_the_next_one_is_another(
    service: Service,
) -> None:
    with service.connect() as connection:
        born = connection.born
        service.kill()
        with pytest.raises(OSError, match=r"."):
            connection.ask(b"x")
    service.start()
    with service.connect() as connection:
        assert connection.born != born


def test_a_duplicated_request_is_answered_twice_and_asked_of_the_gate_once(
    relay: SiteExecutor, service: Service
) -> None:
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda _: ask(relay, b"slow"), range(4)))
    assert {reply["data"] for reply in replies} == {b"reply to slow"}
    assert ask(relay, b"slow")["data"] == b"reply to slow"
    assert service.asked() == [b"slow"]


def test_a_reply_that_takes_long_is_fetched_later_by_its_requests_hash(
    relay: SiteExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "HOLD", 0.2)
    assert "data" not in ask(relay, b"slow")
    monkeypatch.setattr(executor, "HOLD", 10.0)
    assert poll(relay, b"slow")["data"] == b"reply to slow"


def test_a_request_that_the_executor_never_saw_is_said_to_be_unknown(relay: SiteExecutor) -> None:
    assert poll(relay, b"never")["unknown"]


def test_bytes_that_are_not_what_their_hash_says_are_not_relayed(
    relay: SiteExecutor, service: Service
) -> None:
    told = Shareable({"hash": hashlib.sha256(b"a").digest(), "data": b"b"})
    assert relay._on_request(executor.TOPIC, told, None).get_return_code() != ReturnCode.OK
    assert not (service.folder / "asked").exists()


def test_a_service_that_was_started_again_is_shown_the_proposal_first(
    relay: SiteExecutor, service: Service
) -> None:
    ask(relay, b"proposal", proposal=True)
    ask(relay, b"one")
    service.kill()
    service.start()
    assert ask(relay, b"two")["data"] == b"reply to two"
    assert service.asked() == [b"proposal", b"one", b"proposal", b"two"]


def test_a_service_that_stays_away_is_an_error_and_not_a_hang(
    relay: SiteExecutor, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "RESTART", 0.5)
    service.kill()
    assert ask(relay, b"x").get_return_code() != ReturnCode.OK
    service.start()
    service.connect().close()
    assert ask(relay, b"x")["data"] == b"reply to x"
