"""Clients in Ray actors: many sites an actor, on this machine or on a Ray cluster.

For simulations that outgrow a process: whoever runs the cluster, and whoever may submit work to it,
can read every record and key. What crosses between the actors and here is bytes, numbers and site
names; frames are MessagePack.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, final

import msgspec

from securefl import config
from securefl.config import ConfigurationError
from securefl.engines.worker import (
    SHARED,
    Failed,
    Ready,
    Start,
    Told,
    Worker,
    WorkerFailedError,
    starts,
)

WINDOW: Final = 4
"""How many requests an actor holds at once: more would only lie in Ray's object store."""

OBJECT_STORE: Final = 256 << 20
"""Bytes of memory for messages on their way, where Ray is started here; more spills to disk."""

STARTING: Final = 300.0
"""Seconds that actors have to start in before the first round."""

RESTARTING: Final = 60.0
"""Seconds that a round waits for an actor that was started again."""

_SETTINGS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # device = "auto" finds a GPU as it does in process
}
_DECODER = msgspec.msgpack.Decoder(Ready | Told | Failed)


def require() -> None:
    """ConfigurationError unless Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            "engine.kind = \"ray\" needs Ray, which is not installed: pip install 'securefl[ray]'"
        )


class Sites:
    """What Ray runs: a `Worker`, by methods that take and give bytes, and raise nothing."""

    def start(self, frame: bytes) -> bytes:
        """A `Start`, answered by `Ready` or `Failed`."""
        try:
            self._worker = Worker(msgspec.msgpack.decode(frame, type=Start))
        except Exception as error:
            return msgspec.msgpack.encode(Failed.by(error))
        return msgspec.msgpack.encode(Ready())

    def answer(self, number: int, site: str, data: bytes) -> bytes:
        """A request of that number to that site, answered by `Told` or `Failed`."""
        try:
            return msgspec.msgpack.encode(Told(number, site, self._worker.answer(site, data)))
        except Exception as error:
            return msgspec.msgpack.encode(Failed.by(error))


@dataclass(slots=True)
class _Actor:
    """One actor as the engine sees it.

    held: requests that it was sent and has not answered. queue: sites still to be asked in this
    phase. patience: when, by the monotonic clock, it is no longer waited for while it starts.
    """

    start: bytes
    handle: Any
    patience: float
    ready: bool = False
    held: int = 0
    queue: deque[str] = field(default_factory=deque)


@final
class Actors:
    """Ray actors that act for the sites; a context manager that ends them.

    An actor that dies is a dropout of its sites in that round. It is started again at once, with
    the same keys; what its sites may no longer answer, their durable state says. The folder of
    states must be the same on every machine of the cluster, which is checked.

    Raises ConfigurationError where Ray is absent or cannot be reached, or an actor meets the user's
    mistake, and WorkerFailedError where one meets another.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        sites: tuple[str, ...],
        session: bytes,
        folder: Path,
        own: Path | None = None,
    ) -> None:
        require()
        engine = experiment.engine
        self._deadline = engine.deadline
        self._number = 0
        self._flying: dict[Any, int] = {}
        """What was asked of Ray and has no result yet, with the actor that was asked."""
        self._actors: list[_Actor] = []
        self._closing = contextlib.ExitStack()
        try:
            self._closing.enter_context(_connected(engine.address))
            self._closing.callback(self._kill)
            shared = self._closing.enter_context(_marked(folder))
            import ray

            resources = ray.cluster_resources()
            cpus = resources.get("CPU", 1.0)
            count = min(engine.workers or max(1, int(cpus)), len(sites))
            share = {"num_cpus": _share(cpus, count)}
            if experiment.device == "cuda":
                share["num_gpus"] = _share(resources.get("GPU", 0.0), count)
            self._kind = ray.remote(Sites).options(**share, scheduling_strategy="SPREAD")
            self._actor_of = {site: i % count for i, site in enumerate(sites)}
            threads = max(1, int(cpus) // count)
            parts = (experiment, sites, session, folder, own)
            self.roster, told = starts(*parts, count, threads, shared)
            until = time.monotonic() + STARTING
            for i, start in enumerate(told):
                self._actors.append(_Actor(msgspec.msgpack.encode(start), None, until))
                self._launch(i, until)
            self._await()
        except BaseException:
            self.close()
            raise

    def _launch(self, i: int, patience: float) -> None:
        """Start actor `i`, in the place of one that is dead."""
        actor = self._actors[i]
        actor.handle, actor.patience = self._kind.remote(), patience
        actor.ready, actor.held = False, 1  # its start
        self._flying[actor.handle.start.remote(actor.start)] = i

    def _await(self) -> None:
        """Until every actor is ready."""
        import ray

        while not all(actor.ready for actor in self._actors):
            left = self._actors[0].patience - time.monotonic()
            done = self._next(max(0.0, left))
            if done is None:
                waiting = sum(not actor.ready for actor in self._actors)
                free = ray.available_resources().get("CPU", 0.0)
                raise ConfigurationError(
                    f"{waiting} of {len(self._actors)} Ray actors did not start in {STARTING:g} s, "
                    f"with {free:g} CPUs of the cluster free: lower engine.workers, or wait until "
                    "others leave the cluster"
                )
            i, frame = done
            if frame is None:
                raise WorkerFailedError(f"Ray actor {i} ended while it was starting")

    def _next(self, timeout: float | None) -> tuple[int, Told | None] | None:
        """The next result: of which actor, and a reply; None for no reply, when it is gone.

        None when `timeout` seconds brought nothing. Raises what an actor failed with. That an actor
        became ready is taken note of here, and told as the reply to request 0.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=timeout)
        except RayError as error:
            raise WorkerFailedError(f"Ray is gone: {_line(error)}") from None
        if not ready:
            return None
        i = self._flying.pop(ready[0])
        try:
            frame = _DECODER.decode(ray.get(ready[0]))
        except RayTaskError as error:
            # Our methods raise nothing; Ray does, where it cannot import them.
            raise ConfigurationError(
                f"a machine of the Ray cluster cannot run securefl ({_line(error)}): install the "
                "same version on all, with pip install 'securefl[ray]'"
            ) from None
        except RayError:
            return i, None
        actor = self._actors[i]
        actor.held -= 1
        if isinstance(frame, Failed):
            frame.throw(i)
        if isinstance(frame, Ready):
            actor.ready = True
            return i, Told(0, "", b"")
        return i, frame

    def exchange(self, phase: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask all sites at once; who has not answered by the deadline is left out."""
        del phase
        self._number += 1
        end = math.inf if self._deadline is None else time.monotonic() + self._deadline
        for actor in self._actors:
            actor.queue.clear()  # what a slow actor was not sent in time, it needs no more
        for site in sorted(messages):
            self._actors[self._actor_of[site]].queue.append(site)
        waiting = set(messages)
        replies: dict[str, bytes] = {}
        while True:
            self._give_up(waiting)
            if not waiting:
                return replies
            self._post(messages)
            until = min([end, *(a.patience for a in self._actors if a.queue and not a.ready)])
            left = until - time.monotonic()
            done = self._next(None if until == math.inf else max(0.0, left))
            if done is None and until == end:
                return replies
            if done is None:
                continue
            i, told = done
            if told is None:
                self._bury(i)
                waiting = {site for site in waiting if self._actor_of[site] != i}
            elif told.number == self._number and told.site in waiting:
                replies[told.site] = told.data
                waiting.discard(told.site)

    def _give_up(self, waiting: set[str]) -> None:
        """Leave out the sites of actors that take too long to start again."""
        now = time.monotonic()
        for actor in self._actors:
            if not actor.ready and actor.patience <= now:
                waiting.difference_update(actor.queue)
                actor.queue.clear()

    def _post(self, messages: Mapping[str, bytes]) -> None:
        """Send every actor that is ready as much as it may hold."""
        for i, actor in enumerate(self._actors):
            while actor.ready and actor.queue and actor.held < WINDOW:
                site = actor.queue.popleft()
                asked = actor.handle.answer.remote(self._number, site, messages[site])
                self._flying[asked] = i
                actor.held += 1

    def _bury(self, i: int) -> None:
        """Take an actor for dead, and start another in its place."""
        import ray

        actor = self._actors[i]
        ray.kill(actor.handle)  # it may live where it cannot be reached
        actor.queue.clear()
        self._flying = {asked: j for asked, j in self._flying.items() if j != i}
        self._launch(i, time.monotonic() + RESTARTING)

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            if actor.handle is not None:
                ray.kill(actor.handle)

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        self._flying.clear()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray as the experiment says, or as this program has started it before."""
    os.environ.update(_SETTINGS)  # before Ray is imported, which reads them once
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as leaving:
        try:
            if address is None:
                # Ray's logs and sockets; it forgets to delete them.
                kept = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE,
                    _temp_dir=leaving.enter_context(kept),
                    **quiet,
                )
            else:
                _reach(address)
                ray.init(address=address, **quiet)
        except (RuntimeError, ValueError, OverflowError, OSError) as error:
            where = "Ray did not start here"
            mend = "see whether `ray start --head` does, and what it says"
            if address is not None:
                where = f"engine.address = {address!r}: this machine is part of no such cluster"
                mend = f"join the cluster first, with `ray start --address={address}`"
            raise ConfigurationError(f"{where} ({_line(error)}): {mend}") from None
        leaving.callback(ray.shutdown)
        # Ray prints on standard output, where results belong, that an actor died.
        ray._private.worker._worker_logs_enabled = False
        leaving.callback(setattr, ray._private.worker, "_worker_logs_enabled", True)
        yield


def _reach(address: str) -> None:
    """OSError unless something listens there; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """A mark in the folder of states, by which actors tell that they see the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = os.urandom(16).hex()
    (folder / SHARED).write_text(mark, encoding="utf-8")
    try:
        yield mark
    finally:
        (folder / SHARED).unlink(missing_ok=True)


def _share(units: float, count: int) -> float:
    """What each of `count` actors asks for of so many CPUs or GPUs, which lie on any machines.

    >>> _share(8.0, 4), _share(2.0, 3), _share(2.0, 7), _share(0.0, 3)
    (1.0, 0.5, 0.25, 0.0)
    """
    if not units:
        return 0.0
    each = math.ceil(count / max(1, int(units)))  # actors on one unit
    return math.floor(1e4 / each) / 1e4  # in the steps that Ray knows


def _line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
