"""What FLARE runs at the server: a whole run, from its first round or its last checkpoint."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from securefl.deployment.executor import HOLD, TOPIC
from securefl.deployment.progress import AGAIN, RUNS, STATUS, STOP, is_stopped, read_progress, stop

if TYPE_CHECKING:
    from securefl.deployment.conduct import Waits

PING: Final = 2.0
"""Seconds that a site which dropped out has to say that it is back."""

FAREWELL: Final = 5.0
"""Seconds that a job lingers for a person who asked how far it is as short a time ago."""


class JobEndedError(Exception):
    """FLARE ends the job, or it gives way to the next one: the run goes on from its checkpoint."""


class SiteFailedError(Exception):
    """A site's job process answers, and its service does not."""


class RoundController(Controller):  # type: ignore[misc]
    """Runs `experiment` (TOML) as `run`, or goes on with it where its folder is there already."""

    def __init__(self, run: str = "", experiment: str = "") -> None:
        super().__init__(task_check_period=0.5)
        self._run = run
        self._experiment = experiment
        self._ended = Signal()
        self._give_way = threading.Event()
        self._told_last = threading.Event()
        self._heard = float("-inf")
        self._away: set[str] = set()
        self._silent: set[str] = set()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to begin before the run does."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """The run's state is on disk after every round."""

    def process_result_of_unknown_task(
        self,
        client: Any,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """Tasks are not used."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The run, to its end or to where it has to stop."""
        from securefl.deployment import conduct

        self._ended, self._fl_ctx = abort_signal, fl_ctx
        engine = fl_ctx.get_engine()
        for topic, answer in (
            (AGAIN, self._on_again),
            (STOP, self._on_stop),
            (STATUS, self._on_status),
        ):
            engine.register_app_command(topic, answer)
        self._kit = Path(engine.get_workspace().get_root_dir()).parent
        try:
            conduct.conduct(self._kit, self._run, self._experiment, self)
        finally:
            self._take_leave()

    def _take_leave(self) -> None:
        """Whoever follows the run hears how it ended: once the job is over, nothing tells."""
        end = time.monotonic() + FAREWELL
        if end - self._heard < 2 * FAREWELL:
            self._told_last.clear()
            while not (self._ended.triggered or self._told_last.wait(0.2)):
                if time.monotonic() > end:
                    break

    @property
    def job(self) -> str:
        return str(self._fl_ctx.get_job_id())

    @property
    def deployed(self) -> tuple[str, ...]:
        """The sites that FLARE started this job at."""
        return tuple(sorted(client.name for client in self._fl_ctx.get_engine().get_clients()))

    @property
    def sites(self) -> tuple[str, ...]:
        """Those of them that did not fall out."""
        return tuple(site for site in self.deployed if site not in self._away)

    @property
    def silent(self) -> tuple[str, ...]:
        """Of the sites that fell out of the job, those whose process does not answer at all."""
        return tuple(sorted(self._silent))

    @property
    def gives_way(self) -> bool:
        """Whether the job is to end after this round."""
        return self._give_way.is_set()

    @property
    def stops(self) -> bool:
        """Whether the run is to end after this round, for good."""
        return is_stopped(self._kit / RUNS / self._run)

    def _on_again(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        self._give_way.set()
        return {"status": "ok"}

    def _on_stop(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        stop(self._kit / RUNS / self._run)
        return {"status": "ok"}

    def _on_status(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        told = read_progress(self._kit / RUNS / self._run)
        self._heard = time.monotonic()
        self._told_last.set()
        return {} if told is None else dict(msgspec.to_builtins(told))

    def check(self) -> None:
        """JobEndedError where the job is over."""
        if self._ended.triggered:
            raise JobEndedError("FLARE ended the job")

    def exchange(self, messages: Mapping[str, bytes], waits: Waits) -> dict[str, bytes]:
        """Ask the sites all at once; who is silent or late is left out (see `Waits`)."""
        self.check()
        present = sorted(set(self.deployed) & set(messages))
        if not present:
            return {}
        asking = _Asking(self._tell, waits, self._ended)
        threads = ThreadPoolExecutor(len(present))
        for site in present:
            threads.submit(self._one, asking, site, messages[site])
        asking.wait(len(present))
        threads.shutdown(wait=False)  # who is late must not keep the others waiting
        self.check()
        return asking.replies

    def _one(self, asking: _Asking, site: str, data: bytes) -> None:
        """One site: whoever dropped out before is asked only when it is back."""
        reply = None
        try:
            if site not in self._away or self._is_back(site):
                reply = asking.ask(site, data)
                if reply is None and not asking.over:
                    self._away.add(site)
        finally:
            asking.done(site, reply)

    def _is_back(self, site: str) -> bool:
        try:
            there = self._tell(site, Shareable(), PING) is not None
        except SiteFailedError:
            return False
        (self._silent.discard if there else self._silent.add)(site)
        if there:
            self._away.discard(site)
        return there

    def _tell(self, site: str, request: Shareable, timeout: float) -> Shareable | None:
        """What the site's executor says, or None; SiteFailedError where its service is gone."""
        engine = self._fl_ctx.get_engine()
        with engine.new_context() as context:
            # A copy: FLARE writes headers into what it sends.
            parts = ([site], TOPIC, Shareable(request), timeout, context)
            replies = engine.send_aux_request(*parts, optional=True) or {}
        reply = replies.get(site)
        if reply is not None and reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION:
            raise SiteFailedError(site)
        if reply is None or reply.get_return_code() != ReturnCode.OK:
            return None
        return reply


class _Asking:
    """One phase: every site's reply, or that there is none, and when to stop waiting."""

    def __init__(
        self,
        tell: Callable[[str, Shareable, float], Shareable | None],
        waits: Waits,
        ended: Signal,
    ) -> None:
        self.replies: dict[str, bytes] = {}
        self._tell, self._waits, self._ended = tell, waits, ended
        self._end = time.monotonic() + waits.deadline
        self._answered = 0
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        """Whether nobody waits for replies any more."""
        return time.monotonic() > self._end or bool(self._ended.triggered)

    def wait(self, count: int) -> None:
        """Until `count` sites answered or dropped out, or the time is over."""
        with self._changed:
            while self._answered < count and not self.over:
                self._changed.wait(0.2)
            self._end = min(self._end, time.monotonic())

    def done(self, site: str, reply: bytes | None) -> None:
        """A site answered, or did not."""
        with self._changed:
            self._answered += 1
            if reply is not None and not self.over:
                self.replies[site] = reply
                late = self._waits.stragglers
                if late is not None and len(self.replies) >= self._waits.enough:
                    self._end = min(self._end, time.monotonic() + late)
            self._changed.notify()

    def ask(self, site: str, data: bytes) -> bytes | None:
        """One site's reply; None where it is away or late.

        The request goes out once; from then on the site is asked for the reply to it.
        """
        digest = hashlib.sha256(data).digest()
        whole = Shareable({"hash": digest, "data": data, "proposal": self._waits.proposal})
        poll = Shareable({"hash": digest})
        told, heard = whole, time.monotonic()
        while not self.over:
            left = self._end - time.monotonic()
            try:
                reply = self._tell(site, told, min(HOLD + 10, max(1.0, left)))
            except SiteFailedError:
                return None
            if reply is None:
                if time.monotonic() - heard > self._waits.patience:
                    return None
                time.sleep(0.1)
                continue
            heard = time.monotonic()
            if "data" in reply:
                return bytes(reply["data"])
            told = whole if reply.get("unknown") else poll
        return None
