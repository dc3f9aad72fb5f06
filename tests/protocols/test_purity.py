"""protocols stands alone: no torch, no framework, no sockets, no files, no logging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import protocols
from protocols.catalogue import PROTOCOLS

BLOCKED = (
    "torch",
    "opacus",
    "pandas",
    "sklearn",
    "pydantic",
    "matplotlib",
    "requests",
    "securefl",
    "attacks",
)

ALONE = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import protocols.catalogue
import numpy as np
from protocols.encoding import FixedPoint
for name, protocol in protocols.catalogue.PROTOCOLS.items():
    module = sys.modules[protocol.server.__module__]
    encoding = FixedPoint(8, 1.0, 2, protocol.slot_bits(2))
    print(name, module.run({{"a": np.ones(2), "b": np.ones(2)}}, encoding).mean)
"""

WATCHED = """
import sys

seen = []
def audit(event, arguments):
    if event.partition(".")[0] in ("socket", "subprocess", "urllib", "ftplib", "smtplib"):
        seen.append(event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
        seen.append(f"open {arguments[0]} for writing")

import tempfile  # noqa: what the interpreter itself needs is no part of the promise
sys.addaudithook(audit)
sys.dont_write_bytecode = True
import protocols.catalogue
print(seen)
import socket
socket.socket().close()
print(seen)
"""


def python(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    root = Path(next(iter(protocols.__path__))).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_protocol_runs_without_the_frameworks() -> None:
    """Import and a whole round of each protocol, with everything else blocked."""
    assert python(ALONE) == "".join(f"{name} [1. 1.]\n" for name in PROTOCOLS)


def test_importing_opens_no_socket_and_writes_no_file() -> None:
    """Watched by an audit hook, which does see a socket when there is one."""
    quiet, loud = python(WATCHED).splitlines()
    assert quiet == "[]"
    assert "socket.__new__" in loud
