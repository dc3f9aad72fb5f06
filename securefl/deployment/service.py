"""A site's gate as a process of its own, behind a socket that only its owner can open.

Records, keys and training are here and nowhere else at the site: what FLARE runs only relays bytes.
When this process dies (out of memory, say) the site drops out of one round: whoever supervises it
starts it again, and who relays shows it the accepted proposal once more.

A connection begins with 16 bytes that this process drew when it started; then both ways each
message has its length before it. A request that this process fails on gets a Refusal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self, final

from securefl import store
from securefl.engines.inprocess import Answering
from securefl.messages import Refusal

SOCKET: Final = "gate.sock"
MOST_BYTES: Final = 1 << 32
"""Of one message; a length beyond that is a fault, not a message."""

_LENGTH: Final = struct.Struct("<Q")
_BORN: Final = 16


@final
class Connection:
    """The relaying end. `born` tells one process of the site's gate from the next."""

    def __init__(self, folder: Path, timeout: float | None = None) -> None:
        """Raises OSError while no service listens in `folder`."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            with _short(folder) as short:
                self._socket.connect(f"{short}/{SOCKET}")
            self.born = _exactly(self._socket, _BORN)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, data: bytes) -> bytes:
        """The gate's reply; ConnectionError when the service is gone."""
        _send(self._socket, data)
        return _receive(self._socket)

    def close(self) -> None:
        """Let go of the service."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(folder: Path, gate: Answering) -> None:
    """Answer for `gate` until the process ends; ConfigurationError where another one does."""
    born = os.urandom(_BORN)
    with store.exclusive(folder / "service"), socket.socket(socket.AF_UNIX) as listener:
        with contextlib.suppress(FileNotFoundError):
            (folder / SOCKET).unlink()
        with _short(folder) as short:
            before = os.umask(0o177)
            try:
                listener.bind(f"{short}/{SOCKET}")
            finally:
                os.umask(before)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            parts = (connection, gate, born)
            threading.Thread(target=_converse, args=parts, daemon=True).start()


def _converse(connection: socket.socket, gate: Answering, born: bytes) -> None:
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(born)
        while True:
            _send(connection, _answer(gate, _receive(connection)))


def _answer(gate: Answering, data: bytes) -> bytes:
    try:
        return gate.answer(data)
    except Exception:
        traceback.print_exc()  # for the site's own people: stderr is the site's log
        return Refusal("request", "the site met an error: its log says which").to_bytes()


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A name for `folder` that fits into a socket's address, which holds 107 bytes."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytes:
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if size > MOST_BYTES:
        raise ConnectionError(f"a message of {size} bytes")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other side is gone")
        view = view[count:]
    return bytes(data)


def main(arguments: list[str]) -> None:
    """`python -m securefl.deployment.service KIT SITE [DATA]`: the process itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    folder, own, *data = map(Path, arguments)
    import torch

    from securefl import simulation
    from securefl.deployment.kits import Kit

    # The first optimiser makes torch load its compiler: seconds that no round's deadline has.
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kit = Kit.load(folder)
    asked_by = f"server of {kit.consortium} at {kit.host}:{kit.port}"
    gate = simulation.deployed_gate(own, asked_by, data[0] if data else None)
    serve(folder, gate)


if __name__ == "__main__":
    main(sys.argv[1:])
