"""What FLARE runs at a site: it hands requests to the site's own service, and brings the replies.

It reads nothing of what it relays. A request may take long (a site trains), longer than a message
may wait, so that the server asks again and again for the reply to a request it named by its hash.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunningError
from pathlib import Path
from typing import Any, Final

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from securefl.deployment.service import Connection

TOPIC: Final = "securefl"
HOLD: Final = 5.0
"""Seconds that the executor keeps the server waiting for a reply before it says: not yet."""

RESTART: Final = 30.0
"""Seconds that a service may take to come back before a request counts as lost."""


class SiteExecutor(Executor):  # type: ignore[misc]
    """Relays between the server's run and the service of this site (`service`)."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path()
        self._connection: Connection | None = None
        self._proposal: bytes = b""
        self._shown: bytes = b""
        self._current: tuple[bytes, Future[bytes]] | None = None
        self._turn = threading.Lock()
        # One at a time: a gate answers one request after the other anyway.
        self._relay = ThreadPoolExecutor(1, thread_name_prefix="securefl")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin to listen when the job starts."""
        if event_type == EventType.START_RUN:
            engine = fl_ctx.get_engine()
            self._folder = Path(engine.get_workspace().get_root_dir()).parent
            engine.register_aux_message_handler(TOPIC, self._on_request)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Tasks are not used: everything comes as auxiliary messages, which are pushed."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _on_request(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        told = request.get("hash")
        if told is None:  # is anybody there?
            return self._present()
        with self._turn:
            if self._current is None or self._current[0] != told:
                data = request.get("data")
                if data is None:
                    return _reply(unknown=True)
                if hashlib.sha256(data).digest() != told:
                    return make_reply(ReturnCode.BAD_REQUEST_DATA)
                proposal = bool(request.get("proposal"))
                self._current = told, self._relay.submit(self._asked, data, proposal)
            _, work = self._current
        try:
            return _reply(data=work.result(HOLD))
        except StillRunningError:
            return _reply()
        except OSError as error:
            with self._turn:
                self._current = None
            self.logger.warning(f"the site's service does not answer: {error}")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)

    def _present(self) -> Shareable:
        """OK where the site's service can be reached."""
        try:
            Connection(self._folder, timeout=1.0).close()
        except OSError:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)

    def _asked(self, data: bytes, proposal: bool) -> bytes:
        """The gate's reply; OSError when the service stays away."""
        if proposal:
            self._proposal = data
        end = time.monotonic() + RESTART
        while True:
            try:
                return self._ask(data)
            except OSError:
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _ask(self, data: bytes) -> bytes:
        if self._connection is None:
            self._connection = Connection(self._folder)
        if self._connection.born != self._shown:
            if self._proposal and data != self._proposal:
                # It was started again and knows of no run: the proposal stands as it was accepted.
                self._connection.ask(self._proposal)
            self._shown = self._connection.born
        return self._connection.ask(data)


def _reply(**fields: Any) -> Shareable:
    reply = make_reply(ReturnCode.OK)
    reply.update(fields)
    return reply
