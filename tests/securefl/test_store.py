"""What is on disk survives a crash at any instant, and a charge is never forgotten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefl.config import ConfigurationError
from securefl.store import (
    CorruptStoreError,
    ServerStore,
    SiteStore,
    append_line,
    exclusive,
    whole_lines,
    write,
)

WRITER = """
import sys
from pathlib import Path
from securefl.store import write
path = Path(sys.argv[1])
print("ready", flush=True)
for i in range(1_000_000):
    write(path, bytes([i % 251]) * (200_000 + i % 7))
"""

CHARGER = """
import sys
from pathlib import Path
from securefl.store import SiteStore
store = SiteStore(Path(sys.argv[1]))
while True:
    store.charge(store.last_round + 1)
    print(store.charged, flush=True)
"""

HOLDER = """
import sys
from pathlib import Path
from securefl.store import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(script: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # else readline holds back lines that communicate does not give
    )


def kill(process: subprocess.Popen[bytes]) -> bytes:
    """SIGKILL; what the process had printed."""
    os.kill(process.pid, signal.SIGKILL)
    out, _ = process.communicate()
    return out


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.029])
def test_a_file_killed_while_it_is_written_is_the_old_or_the_new_whole(tmp_path, delay):
    path = tmp_path / "folder" / "state.bin"
    write(path, b"first")
    process = start(WRITER, path)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(delay)
    kill(process)
    data = path.read_bytes()
    assert data == b"first" or (len(data) >= 200_000 and data == data[:1] * len(data))
    if data != b"first":
        assert len(data) - 200_000 in range(7)


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.023])
def test_a_charge_that_was_told_is_on_disk_after_a_kill(tmp_path, delay):
    process = start(CHARGER, tmp_path)
    first = process.stdout.readline()
    time.sleep(delay)
    said = (first + kill(process)).split(b"\n")[:-1]
    told = int(said[-1])
    store = SiteStore(tmp_path)
    assert store.charged in (told, told + 1)  # at most the one that had not been told yet
    assert store.last_round == store.charged


def test_a_new_store_has_nothing_charged(tmp_path):
    store = SiteStore(tmp_path / "never")
    assert (store.charged, store.last_round) == (0, 0)
    assert ServerStore(tmp_path / "never").last_round == 0


@settings(max_examples=25)
@given(st.lists(st.integers(1, 30), max_size=12))
def test_charges_and_round_numbers_only_grow(tmp_path_factory, rounds):
    folder = tmp_path_factory.mktemp("site")
    charged, last = 0, 0
    for number in rounds:
        store = SiteStore(folder)
        if number <= last:
            with pytest.raises(ValueError, match="does not follow"):
                store.charge(number)
        else:
            store.charge(number)
            charged, last = charged + 1, number
        assert (store.charged, store.last_round) == (charged, last)
        assert (SiteStore(folder).charged, SiteStore(folder).last_round) == (charged, last)


def test_a_server_never_begins_a_number_twice(tmp_path):
    numbers = [ServerStore(tmp_path).begin() for _ in range(5)]
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe",
        b'{"version":1,"charged":-1,"last_round":0}',
        b'{"version":1,"charged":1}',
        b'{"version":1,"charged":"3","last_round":0}',
        b'{"version":1,"charged":1,"last_round":1,"more":2}',
    ],
)
def test_a_damaged_file_is_named_and_never_read_as_nothing_spent(tmp_path, content):
    (tmp_path / "site.json").write_bytes(content)
    (tmp_path / "server.json").write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"site\.json"):
        SiteStore(tmp_path)
    with pytest.raises(CorruptStoreError, match=r"server\.json"):
        ServerStore(tmp_path)


def test_a_file_of_another_version_is_named(tmp_path):
    (tmp_path / "site.json").write_text('{"version":2,"charged":1,"last_round":1}')
    with pytest.raises(CorruptStoreError, match=r"site\.json"):
        SiteStore(tmp_path)


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    process = start(HOLDER, tmp_path)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ConfigurationError, match="in use by another process"), exclusive(tmp_path):
        pass
    kill(process)
    with exclusive(tmp_path):
        pass


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError
    with exclusive(tmp_path / "deep" / "er"), exclusive(tmp_path):
        pass


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    for i in range(3):
        append_line(path, json.dumps({"i": i}))
    whole = path.read_bytes()
    assert [json.loads(x)["i"] for x in whole_lines(path)] == [0, 1, 2]
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        assert whole_lines(path) == whole[:cut].decode().split("\n")[:-1]


def test_a_line_torn_within_a_character_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, "ok")
    with path.open("ab") as file:
        file.write("é".encode()[:1])
    assert whole_lines(path) == ["ok"]
