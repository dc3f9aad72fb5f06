"""Clients in worker processes: several sites a process, over pipes, with a deadline a phase.

Run as `python -m securefl.engines.workers` this module is the worker. Frames are MessagePack with
a length before them; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

import msgspec

from protocols.identity import Identity, Roster, SigningKey
from securefl import config
from securefl.config import ConfigurationError
from securefl.engines.inprocess import Answering

_LENGTH = struct.Struct("<Q")


class Start(msgspec.Struct, frozen=True, tag=True):
    """Engine -> worker: the experiment, the sites to act for, and where they keep their state."""

    experiment: str
    sites: tuple[str, ...]
    session: bytes
    folder: str
    threads: int
    own: str = ""
    """The folder with each site's own folder in it, where sites have one."""


class Keys(msgspec.Struct, frozen=True, tag=True):
    """Both ways: the sites' public keys."""

    keys: dict[str, bytes]


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Engine -> worker: one request for one site."""

    number: int
    site: str
    data: bytes


class Told(msgspec.Struct, frozen=True, tag=True):
    """Worker -> engine: the reply to the request of that number."""

    number: int
    site: str
    data: bytes


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> engine: it cannot go on. `mistake` tells the user's errors from ours."""

    mistake: bool
    reason: str


Frame = Start | Keys | Ask | Told | Failed
_DECODER = msgspec.msgpack.Decoder(Frame)


class WorkerFailedError(RuntimeError):
    """A worker met an error that is neither a dropout nor the user's mistake."""


def _send(pipe: IO[bytes], frame: Frame) -> None:
    data = msgspec.msgpack.encode(frame)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Frame | None:
    """The next frame, or None when the other side is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = pipe.read(size)
    return _DECODER.decode(data) if len(data) == size else None


class Workers:
    """Worker processes that act for the sites; a context manager that ends them."""

    def __init__(
        self,
        experiment: config.Experiment,
        sites: tuple[str, ...],
        session: bytes,
        folder: Path,
        own: Path | None = None,
    ) -> None:
        count = min(experiment.engine.workers, len(sites))
        self._deadline = experiment.engine.deadline
        self._inbox: queue.Queue[tuple[int, Frame | None]] = queue.Queue()
        self._outboxes = [queue.SimpleQueue[Frame | None]() for _ in range(count)]
        self._worker_of = {site: i % count for i, site in enumerate(sites)}
        self._alive = set(range(count))
        self._number = 0
        threads = max(1, (os.cpu_count() or 1) // count)
        self._processes = [
            subprocess.Popen(
                # -P: what lies in the working directory is not imported.
                [sys.executable, "-P", "-m", "securefl.engines.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path.cwd(),
            )
            for _ in range(count)
        ]
        for i, process in enumerate(self._processes):
            threading.Thread(target=self._listen, args=(i, process.stdout), daemon=True).start()
            threading.Thread(target=self._speak, args=(i, process.stdin), daemon=True).start()
            held, kept = str(own.absolute()) if own else "", str(folder)
            start = Start(experiment.dump(), sites[i::count], session, kept, threads, held)
            self._post(i, start)
        self.roster = self._enrol()

    def _enrol(self) -> Roster:
        """Collect every site's public key and give all workers the roster."""
        try:
            waiting, keys = set(self._alive), dict[str, bytes]()
            for phase in ("keys", "ready"):
                while waiting:
                    worker, frame = self._inbox.get()
                    if isinstance(frame, Keys):
                        keys |= frame.keys
                        waiting.discard(worker)
                    else:
                        _raise(frame, worker)
                if phase == "keys":
                    waiting = set(self._alive)
                    for worker in self._alive:
                        self._post(worker, Keys(keys))
            return Roster(keys)
        except BaseException:
            self.close()
            raise

    def exchange(self, phase: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask all sites at once; who has not answered by the deadline is left out."""
        del phase
        self._number += 1
        for outbox in self._outboxes:  # what a slow worker was not sent in time, it needs no more
            with contextlib.suppress(queue.Empty):
                while True:
                    outbox.get_nowait()
        waiting = {s for s in messages if self._worker_of[s] in self._alive}
        for site in sorted(waiting):
            self._post(self._worker_of[site], Ask(self._number, site, messages[site]))
        replies: dict[str, bytes] = {}
        end = None if self._deadline is None else time.monotonic() + self._deadline
        while waiting:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                worker, frame = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if frame is None:
                self._alive.discard(worker)
                waiting = {s for s in waiting if self._worker_of[s] != worker}
            elif isinstance(frame, Told):
                # A reply to an earlier request came too late; a second one changes nothing.
                if frame.number == self._number and frame.site in waiting:
                    replies[frame.site] = frame.data
                    waiting.discard(frame.site)
            else:
                _raise(frame, worker)
        return replies

    def _post(self, worker: int, frame: Frame) -> None:
        self._outboxes[worker].put(frame)

    def _speak(self, worker: int, pipe: IO[bytes]) -> None:
        """Write in a thread: a full pipe to one worker must not outlast the deadline of all."""
        with contextlib.suppress(BrokenPipeError), pipe:  # the listener reports the end
            while (frame := self._outboxes[worker].get()) is not None:
                _send(pipe, frame)

    def _listen(self, worker: int, pipe: IO[bytes]) -> None:
        while (frame := _receive(pipe)) is not None:
            self._inbox.put((worker, frame))
        self._inbox.put((worker, None))

    def close(self) -> None:
        """End the workers: they stop when their input does, and are killed if they do not."""
        for outbox in self._outboxes:
            outbox.put(None)
        for process in self._processes:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _raise(frame: Frame | None, worker: int) -> None:
    if isinstance(frame, Failed) and frame.mistake:
        raise ConfigurationError(frame.reason)
    if isinstance(frame, Failed):
        raise WorkerFailedError(f"worker {worker}: {frame.reason}")
    raise WorkerFailedError(f"worker {worker} ended while it was starting")


def _serve(receive: IO[bytes], send: IO[bytes]) -> None:
    """The worker: make keys, learn the roster, then answer until the input ends."""
    import torch

    from securefl import simulation

    start = _receive(receive)
    if not isinstance(start, Start):
        return
    torch.set_num_threads(start.threads)
    # The first optimiser makes torch load its compiler: seconds that no round's deadline has.
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        experiment = config.parse(start.experiment)
        keys = {site: SigningKey(os.urandom) for site in start.sites}
        consortium = simulation.assemble(experiment)
        clients: dict[str, Answering] = {}
        public = {site: key.public for site, key in keys.items()}
        if start.own:
            gates = {
                site: simulation.gate(
                    Path(start.own) / site, consortium.sites[site], Path(start.folder) / site
                )
                for site in start.sites
            }
            public = {site: gate.public_key for site, gate in gates.items()}
            clients |= gates
        _send(send, Keys(public))
        known = _receive(receive)
        if not isinstance(known, Keys):
            return
        roster = Roster(known.keys)
        clients = clients or {
            site: simulation.client(
                experiment,
                records,
                Identity(site, key, roster),
                start.session,
                Path(start.folder) / site,
            )
            for site, key in keys.items()
            if (records := consortium.sites[site]) is not None
        }
        _send(send, Keys({}))
    except ConfigurationError as error:
        _send(send, Failed(True, str(error)))
        return
    while isinstance(ask := _receive(receive), Ask):
        _send(send, Told(ask.number, ask.site, clients[ask.site].answer(ask.data)))


def main() -> None:
    """Entry point of a worker process. Only frames go to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's; it ends its workers
    send = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, send)
    except Exception as error:
        traceback.print_exc()
        _send(send, Failed(False, f"{type(error).__name__}: {error}"))
        sys.exit(1)


if __name__ == "__main__":
    main()
