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
from typing import IO, NoReturn, Self

import msgspec

from securefl import config
from securefl.config import ConfigurationError
from securefl.engines.worker import (
    Failed,
    Ready,
    Start,
    Told,
    Worker,
    WorkerFailedError,
    starts,
)

_LENGTH = struct.Struct("<Q")


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Engine -> worker: one request for one site."""

    number: int
    site: str
    data: bytes


Frame = Start | Ready | Ask | Told | Failed
_DECODER = msgspec.msgpack.Decoder(Frame)


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
        parts = (experiment, sites, session, folder, own)
        self.roster, told = starts(*parts, count, threads)
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
            self._post(i, told[i])
        self._wait()

    def _wait(self) -> None:
        """Until every worker is ready."""
        try:
            waiting = set(self._alive)
            while waiting:
                worker, frame = self._inbox.get()
                if not isinstance(frame, Ready):
                    _raise(frame, worker)
                waiting.discard(worker)
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


def _raise(frame: Frame | None, worker: int) -> NoReturn:
    if isinstance(frame, Failed):
        frame.throw(worker)
    raise WorkerFailedError(f"worker {worker} ended while it was starting")


def _serve(receive: IO[bytes], send: IO[bytes]) -> None:
    """The worker: start, then answer until the input ends."""
    start = _receive(receive)
    if not isinstance(start, Start):
        return
    try:
        worker = Worker(start)
    except ConfigurationError as error:
        _send(send, Failed.by(error))
        return
    _send(send, Ready())
    while isinstance(ask := _receive(receive), Ask):
        _send(send, Told(ask.number, ask.site, worker.answer(ask.site, ask.data)))


def main() -> None:
    """Entry point of a worker process. Only frames go to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's; it ends its workers
    send = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, send)
    except Exception as error:
        traceback.print_exc()
        _send(send, Failed.by(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
