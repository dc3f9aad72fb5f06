"""A filter in FLARE's server: a message is of whom it says, and sites speak to the server alone.

FLARE 2.9 binds the origin that a message names to its token only while that token is the newest of
its client (nvflare.private.fed.authenticator, `validate_auth_headers`), and passes messages on from
one site to another, whose client obeys commands whoever sends them. So an enrolled site could ask
another one for rounds, or shut it down, in the server's name.
"""

from __future__ import annotations

import logging
from typing import Final

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.utils.admin_name_utils import is_valid_admin_client_name

_SERVER: Final = str(FQCN.ROOT_SERVER)
_LOG: Final = logging.getLogger(__name__)


def wrong(certificate: str, endpoint: str, origin: str, destination: str) -> str:
    """What is wrong with a message that came to the server; empty where nothing is.

    certificate, endpoint: the names that its connection was made with, which FLARE compared; an
    administrator's endpoint has a random name. origin, destination: what the message claims.
    """
    of, to = (str(FQCN.get_root(name)) for name in (origin, destination))
    if is_valid_admin_client_name(endpoint):
        if origin != endpoint:
            return f"{certificate} speaks as {origin}"
    elif of != certificate:
        return f"{certificate} speaks as {origin}"
    if _SERVER not in (of, to) and of != to:
        return f"{origin} speaks to {destination}"
    return ""


class Origins(FLComponent):  # type: ignore[misc]
    """Applies `wrong` to all that comes to the server, for itself or to be passed on."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin when the server does."""
        if event_type == EventType.SYSTEM_START:
            cell = fl_ctx.get_engine().get_cell().core_cell
            cell.add_incoming_filter(channel="*", topic="*", cb=self._filter)

    def _filter(self, message: Message) -> Message | None:
        """None lets the message pass."""
        endpoint = message.get_prop(MessagePropKey.ENDPOINT)
        reason = wrong(
            str(message.get_prop(MessagePropKey.COMMON_NAME) or ""),
            str(getattr(endpoint, "name", "")),
            str(message.get_header(MessageHeaderKey.ORIGIN)),
            str(message.get_header(MessageHeaderKey.DESTINATION)),
        )
        if not reason:
            return None
        _LOG.warning("dropped a message: %s", reason)
        return make_reply(ReturnCode.UNAUTHENTICATED, error="not in this name")
