"""The processes of one participant: FLARE's, hardened, and a site's own service; kept running.

What FLARE reads from flare/local is written afresh from this file at every start: a job may name
two classes of ours and nothing else, code never travels, logs stay where they are, and everything
that is stored lies in the kit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from securefl import store
from securefl.config import ConfigurationError
from securefl.deployment.kits import Kit

CLASSES: Final = (
    "securefl.deployment.controller.RoundController",
    "securefl.deployment.executor.SiteExecutor",
)
"""All that a job may name."""

HEARTBEAT: Final = 60
"""Seconds without a heartbeat after which FLARE's server forgets a site until it is back."""

BEAT: Final = 3.0
"""Seconds between a site's heartbeats."""

FLARE: Final = "flare"
_MARK: Final = "SECUREFL_KIT"
_LONGEST_WAIT: Final = 30.0


def prepare(kit: Kit, classes: Sequence[str] = CLASSES) -> None:
    """Write FLARE's local configuration into the kit, hardened."""
    local = kit.flare / "local"
    for folder in (kit.flare / "transfer", kit.flare / "tmp", kit.folder / "logs"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = kit.role == "server"
    resources = (_server_resources if server else _site_resources)(kit, classes)
    _write(local / "resources.json", resources)
    _write(local / "authorization.json", _authorization(server))
    _write(local / "log_config.json", _LOGS)
    _write(local / "comm_config.json", _links(kit))


def _write(path: Path, value: object) -> None:
    store.write(path, json.dumps(value, indent=1).encode())


def _hardened(classes: Sequence[str]) -> dict[str, Any]:
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": list(classes),
        # Otherwise a site's error log goes to the server.
        "allow_log_streaming": False,
    }


def _server_resources(kit: Kit, classes: Sequence[str]) -> dict[str, Any]:
    common = "nvflare.app_common"
    storage = f"{common}.storages.filesystem_storage.FilesystemStorage"
    persistor = f"{common}.state_persistors.storage_state_persistor.StorageStatePersistor"
    return {
        **_hardened(classes),
        "servers": [
            {
                "admin_storage": "transfer",
                "max_num_clients": 10_000,
                "heart_beat_timeout": HEARTBEAT,
                "admin_timeout": 10.0,
            }
        ],
        # By default both lie in the system's folder for temporary files.
        "snapshot_persistor": {
            "path": persistor,
            "args": {
                "uri_root": "/",
                "storage": {
                    "path": storage,
                    "args": {"root_dir": str(kit.flare / "snapshots"), "uri_root": "/"},
                },
            },
        },
        "components": [
            {
                "id": "job_scheduler",
                "path": f"{common}.job_schedulers.job_scheduler.DefaultJobScheduler",
                "args": {
                    # A site's gate serves one run: the next one waits for its turn.
                    "max_jobs": 1,
                    "min_schedule_interval": 0.5,
                    "max_schedule_interval": 5.0,
                    # By default a job that finds too few sites ten times, in 40 s, is dropped.
                    "max_schedule_count": 1 << 30,
                },
            },
            {
                "id": "job_manager",
                "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                "args": {"uri_root": str(kit.flare / "jobs"), "job_store_id": "job_store"},
            },
            {"id": "job_store", "path": storage},
            {"id": "origins", "path": "securefl.deployment.origins.Origins"},
            {
                "id": "process_launcher",
                "path": f"{common}.job_launcher.server_process_launcher.ServerProcessJobLauncher",
                "args": {},
            },
        ],
    }


def _site_resources(kit: Kit, classes: Sequence[str]) -> dict[str, Any]:
    common = "nvflare.app_common"
    gpus = f"{common}.resource_managers.gpu_resource_manager.GPUResourceManager"
    consumer = f"{common}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer"
    launcher = f"{common}.job_launcher.client_process_launcher.ClientProcessJobLauncher"
    none = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300}
    return {
        **_hardened(classes),
        "client": {"retry_timeout": 30, "communication_timeout": 30},
        "components": [
            {"id": "resource_manager", "path": gpus, "args": none},
            {"id": "resource_consumer", "path": consumer, "args": {}},
            {"id": "process_launcher", "path": launcher, "args": {}},
        ],
    }


def _links(kit: Kit) -> dict[str, Any]:
    """How FLARE's process and those of its jobs, on one machine, reach each other.

    By default through a port of loopback, in clear, where any user of the machine may connect and
    speak in a job's name. At the server, through which all goes: TLS with the server's certificate
    on both ends. A site's certificate is good for clients only; there little goes this way, and
    what does lies in a folder that only its owner can open.
    """
    resources = {"host": "localhost", "connection_security": "mtls"}
    if kit.role == "server":
        return {"internal": {"scheme": "stcp", "resources": resources}}
    folder = {"root_dir": str(kit.flare / "links"), "dir_mode": "700", "file_mode": "600"}
    folder |= {"max_poll_interval": "0.2", "connection_security": "clear"}
    return {"internal": {"scheme": "shared-file", "resources": folder}}


def _authorization(server: bool) -> dict[str, Any]:
    """Who may do what here: the administrator, and the steward, who only submits jobs again."""
    nothing = {
        "submit_job": "none",
        "clone_job": "none",
        "manage_job": "none",
        "download_job": "none",
        "view": "none",
        "operate": "none",
        "shell_commands": "none",
        "byoc": "none",
        "server-predeployed-flwr": "none",
        "app_command": "none",
    }
    administrator = {**nothing, "submit_job": "any"}
    steward = dict(administrator)
    if server:
        administrator |= {"manage_job": "any", "download_job": "any", "view": "any"}
        administrator |= {"operate": "any", "app_command": "any"}
        steward |= {
            "clone_job": "any",
            "manage_job": "any",
            "view": "any",
            "operate": "any",
            "app_command": "any",
        }
    return {
        "format_version": "1.0",
        "permissions": {
            "project_admin": administrator,
            "lead": steward,
            "org_admin": nothing,
            "member": nothing,
        },
    }


_LOGS: Final = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "plain": {
            "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
            "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(message)s",
        }
    },
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "stream": "ext://sys.stdout",
        }
    },
    "loggers": {"root": {"level": "INFO", "handlers": ["console"]}},
}


@final
@dataclass(frozen=True, slots=True)
class Program:
    """One process to keep running: its log is logs/NAME.log in the kit."""

    name: str
    command: tuple[str, ...]


def programs(kit: Kit, site: Path | None = None, data: Path | None = None) -> tuple[Program, ...]:
    """What runs for a participant. site: the folder of site.toml. data: the records' file."""
    python = (sys.executable, "-P", "-u", "-m")
    fed = "nvflare.private.fed.app."
    module = "server.server_train" if kit.role == "server" else "client.client_train"
    start = "fed_server.json" if kit.role == "server" else "fed_client.json"
    settings = ["secure_train=true", "config_folder=config", "org=securefl"]
    if kit.role == "site":
        settings += [f"uid={kit.name}", f"heart_beat_interval={BEAT:g}"]
    flare = Program(
        FLARE,
        (*python, fed + module, "-m", str(kit.flare), "-s", start, "--set", *settings),
    )
    if kit.role == "server":
        return (flare,)
    told = (str(kit.folder), str(site or kit.folder), *([str(data)] if data else []))
    return Program("service", (*python, "securefl.deployment.service", *told)), flare


def keep_running(
    kit: Kit,
    wanted: Sequence[Program],
    tell: Callable[[str], None],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Run the programs until SIGTERM or SIGINT, and start again what ends; `beat` twice a second.

    FLARE is also started again when its startup files change, which it reads at its start only: so
    a renewed certificate is used, and a removed site's connection and tokens are gone at once.

    ConfigurationError when the kit is in use already. What an earlier supervisor that was killed
    left running is ended first.
    """
    with store.exclusive(kit.folder / "supervisor"):
        end_all(kit)
        store.write(kit.folder / "supervisor" / "pid", str(os.getpid()).encode())
        stopping = _stop_signals()
        running = [_Kept(kit, program) for program in wanted]
        before = used = _startup(kit)
        try:
            while not stopping:
                now = _startup(kit)
                if now == before != used:  # changed, and not just being changed
                    tell("the kit was updated: starting FLARE again")
                    used = now
                    for kept in running:
                        kept.end_if(FLARE)
                before = now
                for kept in running:
                    kept.look(tell)
                beat()
                time.sleep(0.5)
        finally:
            end_all(kit)
            (kit.folder / "supervisor" / "pid").unlink(missing_ok=True)


def _startup(kit: Kit) -> dict[str, bytes]:
    """What FLARE reads at its start and nobody but the consortium's keeper changes."""
    found = {}
    for path in (kit.flare / "startup").iterdir():
        with contextlib.suppress(FileNotFoundError):  # while it is being replaced
            found[path.name] = path.read_bytes()
    return found


def _stop_signals() -> list[int]:
    """A list that is empty until a signal to stop came."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: came.append(number))
    return came


@final
class _Kept:
    """A program, its process, and how long to wait before it is started again."""

    def __init__(self, kit: Kit, program: Program) -> None:
        self._kit, self._program = kit, program
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._wait = 0.0

    def end_if(self, name: str) -> None:
        """End it, and what it started, where it is called `name`; `look` starts it again."""
        import psutil

        if self._program.name != name or self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(self._process.pid)
            _end([*mine.children(recursive=True), mine])
        self._process, self._started, self._wait = None, 0.0, 0.0

    def look(self, tell: Callable[[str], None]) -> None:
        """Start it, where it does not run and its time has come."""
        now = time.monotonic()
        if self._process is not None:
            if self._process.poll() is None:
                return
            tell(f"{self._program.name} ended with {self._process.returncode}: starting it again")
            self._process = None
            quick = now - self._started < 10
            self._wait = min(_LONGEST_WAIT, max(1.0, 2 * self._wait)) if quick else 0.0
        if now < self._started + self._wait:
            return
        path = self._kit.folder / "logs" / f"{self._program.name}.log"
        _rotate(path)
        with path.open("ab") as log:
            path.chmod(0o600)
            self._process = subprocess.Popen(
                self._program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._kit.folder,
                env=_environment(self._kit),
                start_new_session=True,
            )
        self._started = now


def _environment(kit: Kit) -> dict[str, str]:
    return {
        **os.environ,
        _MARK: str(kit.folder.resolve()),
        # What lies in the working folder is not imported, by FLARE's own processes either.
        "PYTHONSAFEPATH": "1",
        "TMPDIR": str(kit.flare / "tmp"),
    }


def _rotate(path: Path, most: int = 20 << 20) -> None:
    """Keep one older log beside a new one."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > most:
            path.replace(path.with_suffix(".1.log"))


def supervisor(kit: Kit) -> int | None:
    """The process that keeps the kit's others running, where there is one."""
    import psutil

    try:
        pid = int((kit.folder / "supervisor" / "pid").read_text())
        command = psutil.Process(pid).cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    return pid if "start" in command else None  # another process may have got the number since


def processes(kit: Kit) -> Iterator[Any]:
    """Every process that was started for the kit (psutil.Process), those of FLARE's jobs too."""
    import psutil

    marked = str(kit.folder.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == marked and process.pid != os.getpid():
                yield process


def reaches_server(kit: Kit) -> bool:
    """Whether a TCP connection of a site's processes to the server, or to a proxy, stands."""
    import psutil

    proxied = any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy"))
    return any(
        connection.status == psutil.CONN_ESTABLISHED
        and connection.raddr
        and (proxied or connection.raddr.port == kit.port)
        for connection in _connections(kit)
    )


def listens(kit: Kit) -> bool:
    """Whether a server's process listens at its port."""
    import psutil

    port = kit.bind.rpartition(":")[2]
    return any(
        connection.status == psutil.CONN_LISTEN and str(connection.laddr.port) == port
        for connection in _connections(kit)
    )


def _connections(kit: Kit) -> Iterator[Any]:
    """Every TCP socket of the kit's processes."""
    import psutil

    for process in processes(kit):
        with contextlib.suppress(psutil.Error):
            yield from process.net_connections("tcp")


def commands(kit: Kit) -> Iterator[list[str]]:
    """The command line of every process that was started for the kit."""
    import psutil

    for process in processes(kit):
        with contextlib.suppress(psutil.Error):
            yield process.cmdline()


def end_all(kit: Kit, patience: float = 3.0) -> None:
    """End every process that was started for the kit."""
    _end(list(processes(kit)), patience)


def _end(found: Sequence[Any], patience: float = 3.0) -> None:
    """SIGTERM, and SIGKILL to those processes that are left after `patience` seconds."""
    import psutil

    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=patience)


def stop(kit: Kit, patience: float = 20.0) -> bool:
    """End the supervisor and all it keeps running; whether there was any."""
    pid = supervisor(kit)
    if pid is None:
        left = any(True for _ in processes(kit))
        end_all(kit)
        return left
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + patience
    while supervisor(kit) is not None:
        if time.monotonic() > end:
            raise ConfigurationError(f"process {pid} does not stop: kill -9 {pid}")
        time.sleep(0.1)
    return True
