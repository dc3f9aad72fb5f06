"""FLARE itself starts from our kits: sites register, a removed one does not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from securefl.deployment.authority import Consortium
from securefl.deployment.certificates import now_utc
from securefl.deployment.doctor import Verdict, examine
from securefl.deployment.kits import Kit, Role

nvflare = pytest.importorskip("nvflare", reason="needs the extra flare")
PATIENCE = 120.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _local(kit: Kit) -> None:
    """FLARE's own defaults in local/, with its stores inside the kit."""
    import yaml

    template = Path(nvflare.__file__).parent / "lighter/templates/master_template.yml"
    sections = yaml.safe_load(template.read_text())
    kind = {
        Role.server: "local_server_resources",
        Role.site: "local_client_resources",
        Role.administrator: "default_admin_resources",
    }[kit.role]
    text = sections[kind]
    for key, value in {
        "class_allow_list": "[]",
        "allow_log_streaming": "false",
        "num_gpus": "0",
        "gpu_mem": "0",
    }.items():
        text = text.replace("{~~" + key + "~~}", value)
    resources = json.loads(text)
    if kit.role is Role.server:
        storage = resources["snapshot_persistor"]["args"]["storage"]
        storage["args"]["root_dir"] = str(kit.flare / "snapshots")
        for component in resources["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(kit.flare / "jobs")
    for part in ("local", "transfer"):
        (kit.flare / part).mkdir()
    (kit.flare / "local/resources.json").write_text(json.dumps(resources))
    (kit.flare / "local/log_config.json").write_text(sections["log_config"])
    (kit.flare / "local/authorization.json").write_text(sections["default_authz"])


@contextmanager
def _started(*kits: Kit) -> Iterator[dict[str, Path]]:
    """FLARE's processes for these kits, and where each writes its log."""
    processes, logs = [], {}
    try:
        for kit in kits:
            _local(kit)
            module = "server.server_train" if kit.role is Role.server else "client.client_train"
            config = "fed_server.json" if kit.role is Role.server else "fed_client.json"
            names = [f"uid={kit.name}"] if kit.role is Role.site else []
            logs[kit.name] = kit.folder / "log"
            with logs[kit.name].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            *("-u", "-m", f"nvflare.private.fed.app.{module}"),
                            *("-m", str(kit.flare), "-s", config, "--set", "secure_train=true"),
                            *(*names, f"org={kit.name}", "config_folder=config"),
                        ],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield logs
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until(true: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.5)


@pytest.mark.slow
def test_flare_starts_from_our_kits_refuses_a_removed_site_and_doctor_sees_it(
    tmp_path: Path,
) -> None:
    from nvflare.apis.fl_exception import FLCommunicationError
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    consortium = Consortium.new(tmp_path / "trial", f"127.0.0.1:{_free_port()}", ["a", "b"])
    consortium.remove("b")
    server, a, b, administrator = (
        Kit.load(consortium.kit(name)) for name in ("server", "a", "b", "administrator")
    )
    with _started(server, b, a) as logs:
        _local(administrator)

        def said(name: str, words: str) -> bool:
            return words in logs[name].read_text(errors="replace")

        _until(lambda: said("a", "Successfully registered"))
        _until(lambda: said("server", "requires identity 'removed:b'"))
        for kit in (server, a, administrator):
            found = examine(kit.folder, now=now_utc(), environment={})
            about = {finding.about: finding for finding in found}
            reached = about["port" if kit is server else "server"]
            assert reached.verdict is Verdict.ok, reached
        session = new_secure_session("administrator", str(administrator.flare), timeout=30)
        try:
            assert [client.name for client in session.get_connected_client_list()] == ["a"]
        finally:
            session.close()
        assert not said("b", "Successfully registered")
        # Nor by the administrators' door, where FLARE lets any certificate's connection in.
        posing = Path(shutil.copytree(administrator.flare, tmp_path / "posing"))
        for name in ("client.key", "client.crt"):
            shutil.copy(b.flare / "startup" / name, posing / "startup")
        startup = posing / "startup/fed_admin.json"
        startup.write_text(startup.read_text().replace('"administrator"', '"b"'))
        with pytest.raises(FLCommunicationError, match="client_registration"):
            new_secure_session("b", str(posing), timeout=10)
        assert said("server", "Reject disabled client registration: b")
