"""A real consortium for tests: a server and three sites, each a process of its own, mTLS."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

import numpy as np
import psutil
from safetensors.numpy import load_file
from sklearn.datasets import load_breast_cancer

from securefl import config
from securefl.config import Experiment
from securefl.deployment.authority import Consortium
from securefl.deployment.kits import Kit
from securefl.deployment.nodes import processes
from securefl.deployment.progress import RunProgress, read_progress
from securefl.deployment.steward import Session
from securefl.deployment_cli import proposed
from securefl.engines import Exchange
from securefl.privacy.ledger import Charged, Ledger
from securefl.records import History, read_history
from securefl.runs import run
from securefl.site_folder import LEDGER

SITES = ("middle", "north", "south")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "heart_disease"
REPOSITORY = Path(__file__).parents[2]
HOLDS = Path(__file__).parent / "holds"

FEATURES = (
    "mean radius",
    "mean texture",
    "mean perimeter",
    "mean area",
    "mean smoothness",
    "mean compactness",
    "mean concavity",
    "mean concave points",
)
BUNDLED = 'version = 1\nname = "tumours"\nlabel = "diagnosis"\n[columns.diagnosis]\n' + (
    'type = "category"\n[columns.diagnosis.categories]\n"benign" = ["1"]\n"malignant" = ["0"]\n'
)

EXPERIMENT = """\
version = 1
name = "trial"
rounds = 3
not_private_seed = 7

[data]
source = "table"
schema = "schema.toml"

[sites]
names = ["middle", "north", "south"]

[preprocessing]
scale = "range"
impute = "middle"
minimum_count = 0

[model]
name = "logistic"

[privacy]
noise = "distributed"
epsilon = 5.0
delta = 1e-3
rate = 0.5
expected_batch = 150
spare_rounds = 6

[protocol]
minimum_cohort = 2
colluding_sites = 0
"""

SITE = """\
version = 1
name = "{name}"
[data]
id = "rows"
purpose = "a trial"
path = "{path}"
schema = "{schema}"
[budget]
unit = "record"
epsilon = 60.0
delta = 1e-3
[policy]
consent = "standing"
unknown_sites = true
minimum_noise = 0.0
minimum_cohort = 2
minimum_colluding_sites = 0
allow_not_private = true
"""


def free_port() -> int:
    """A port of loopback that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(until: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Until something is so; fails when it does not come."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


class Network:
    """A network namespace for every node, joined by a bridge, where the machine allows it.

    Otherwise all nodes share this machine's loopback. Names are short: 15 bytes at most.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.mark = f"sfl{os.getpid() % 10_000}{next(_COUNT)}"
        self.spaces: dict[str, str] = {}
        low = os.getpid() % 200 + 20
        self.prefix = f"10.{low}.{next(_COUNT) % 250}"
        self.host = "localhost"
        if not names:
            return
        try:
            self._build(names)
        except (OSError, subprocess.CalledProcessError):
            self.close()
            self.spaces = {}
        else:
            self.host = f"{self.prefix}.2"

    def _build(self, names: tuple[str, ...]) -> None:
        _ip("link", "add", self.mark, "type", "bridge")
        _ip("addr", "add", f"{self.prefix}.1/24", "dev", self.mark)
        _ip("link", "set", self.mark, "up")
        for number, name in enumerate(names, start=2):
            space, here, there = f"{self.mark}-{number}", f"{self.mark}v{number}", "eth0"
            _ip("netns", "add", space)
            self.spaces[name] = space
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
            _ip("link", "set", here, "master", self.mark, "up")
            _ip("-n", space, "addr", "add", f"{self.prefix}.{number}/24", "dev", there)
            _ip("-n", space, "link", "set", there, "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def inside(self, name: str) -> tuple[str, ...]:
        """What a command begins with to run in a node's namespace."""
        return ("ip", "netns", "exec", self.spaces[name]) if name in self.spaces else ()

    def close(self) -> None:
        for space in self.spaces.values():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "del", space)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _ip("link", "del", self.mark)


_COUNT = itertools.count()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Deployment:
    """A consortium on this machine, its nodes started through the command line."""

    wait = staticmethod(wait)

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...] = SITES,
        days: int = 360,
        seen_at: int | None = None,
        *,
        apart: bool = False,
        hospitals: bool = False,
    ) -> None:
        """seen_at: the port at which sites reach the server, where it is not the server's own.
        apart: every node in a network of its own, where the machine allows it. hospitals: with the
        heart-disease hospitals' files, where they are at hand.
        """
        self.folder, self.sites = folder, sites
        self.port = free_port()
        self.network = Network(("server", *sites) if apart else ())
        self.consortium = Consortium.new(
            folder / "clinics",
            f"{self.network.host}:{seen_at or self.port}",
            sites,
            bind=f"{'0.0.0.0' if self.network.spaces else '127.0.0.1'}:{self.port}",  # noqa: S104
            days=days,
        )
        self.server = self.kit("server")
        (self._hospitals if hospitals and SHARED.exists() else self._rows)()
        for site in sites:
            text = SITE.format(
                name=site, path=folder / f"{site}.csv", schema=folder / "schema.toml"
            )
            (self.kit(site) / "site.toml").write_text(text)
        text = EXPERIMENT
        if hospitals and SHARED.exists():
            text = text.replace("[sites]", 'drop = ["slope", "ca", "thal"]\n\n[sites]')
        (folder / "experiment.toml").write_text(text)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._session: Session | None = None
        self.options: dict[str, tuple[str, ...]] = {}
        """Of `site start`, by site."""

    def _hospitals(self) -> None:
        """Three hospitals' files as they are, and the schema that is among the examples."""
        hospitals = ("cleveland", "hungarian", "va")
        for site, hospital in zip(self.sites, hospitals, strict=True):
            shutil.copy(SHARED / f"processed.{hospital}.data", self.folder / f"{site}.csv")
        shutil.copy(
            REPOSITORY / "examples" / "heart-disease.schema.toml", self.folder / "schema.toml"
        )

    def _rows(self) -> None:
        """Each site's file, and their schema: the bundled patients, dealt out."""
        frame = load_breast_cancer(as_frame=True).frame
        schema = BUNDLED
        chosen = frame[list(FEATURES)].rename(columns=lambda name: name.replace(" ", "-"))
        for name in chosen.columns:
            low, high = chosen[name].min(), chosen[name].max()
            schema += f'[columns.{name}]\ntype = "number"\nrange = [{low * 0.8}, {high * 1.2}]\n'
        chosen["diagnosis"] = frame["target"]
        for index, site in enumerate(self.sites):
            part = chosen.iloc[index :: len(self.sites)]
            part.to_csv(self.folder / f"{site}.csv", index=False)
        (self.folder / "schema.toml").write_text(schema)

    def kit(self, name: str) -> Path:
        return self.consortium.kit(name)

    def hold(self, site: str, point: str) -> None:
        """Have the site's gate wait at "before-PHASE" or "after-PHASE"."""
        (self._holds(site) / point).touch()

    def reached(self, site: str, point: str, seconds: float = 90.0) -> None:
        """Until the site's gate waits there."""
        wait(lambda: self.waits(site, point), f"{site} at {point}", seconds)

    def waits(self, site: str, point: str) -> bool:
        """Whether the site's gate waits there."""
        return (self._holds(site) / f"reached-{point}").exists()

    def release(self, site: str, point: str = "*") -> None:
        """Have the site's gate wait no more."""
        for held in self._holds(site).glob(point):
            held.unlink(missing_ok=True)

    def _holds(self, site: str) -> Path:
        folder = self.folder / "holds" / site
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, name: str, *prefix: str, **environment: str) -> None:
        """Start a node and do not wait."""
        role = "server" if name == "server" else "site"
        command = [sys.executable, "-P", "-m", "securefl.cli", role, "start", str(self.kit(name))]
        command += self.options.get(name, ())
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                [*self.network.inside(name), *prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{HOLDS}{os.pathsep}{REPOSITORY}",
                    "HOLDS": str(self._holds(name)),
                    **environment,
                },
            )

    def start_all(self) -> None:
        """The server and every site; returns when all sites are connected."""
        for name in ("server", *self.sites):
            self.start(name)
        self.wait_connected(self.sites)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `securefl` with these arguments."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "securefl.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            pytest.fail(f"securefl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    def joined(self, site: str) -> int:
        """How often the server let a site in, since it was started first."""
        log = self.server / "logs" / "flare.log"
        return log.read_text().count(f"New client {site}@") if log.exists() else 0

    def wait_connected(self, sites: tuple[str, ...], times: int = 1) -> None:
        for site in sites:
            wait(lambda site=site: self.joined(site) >= times, f"{site} connected", 90)

    def submit(self, name: str = "trial", *settings: str) -> str:
        """Submit without the command line, whose start takes seconds."""
        kit = Kit.load(self.kit("administrator"))
        experiment, least = proposed(self.experiment(*settings), kit)
        for attempt in range(3):
            try:
                self._session = self._session or Session(kit)
                self._session.submit(name, experiment.dump(), least)
                break
            except Exception:  # the server was killed since
                self.leave()
                if attempt == 2:
                    raise
        return name

    def leave(self) -> None:
        """End the administrator's session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def experiment(self, *settings: str) -> Experiment:
        return config.load(self.folder / "experiment.toml", settings)

    def check_correct(self, name: str, folders: Mapping[str, Path] | None = None) -> None:
        """The model is what the same sites' updates give in process, weight for weight; nobody was
        charged for fewer rounds than it took part in, and none was entered twice.

        folders: of sites whose own is not their kit.
        """
        history = read_history(self.run_folder(name))
        own = self.folder / f"own-{name}"
        for site in self.sites:
            (own / site).mkdir(parents=True)
            for file in ("site.toml", "site.key"):
                shutil.copy(self.kit(site) / file, own / site)
        survivors = {record.update: set(record.survivors) for record in history.rounds}

        def without_the_gone(exchange: Exchange) -> Exchange:
            done = 0

            def asked(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
                nonlocal done
                done += phase == "advertise"
                there = survivors.get(done, set(self.sites))
                return exchange(phase, {s: m for s, m in messages.items() if s in there})

            return asked

        folder = self.folder / f"alone-{name}"
        parts = {"sites": own, "exchange": without_the_gone, "report": False}
        alone = run(history.experiment, folder, **parts)
        here = load_file(alone.directory / "model.safetensors")
        there = load_file(self.run_folder(name) / "model.safetensors")
        for tensor, values in here.items():
            assert np.array_equal(values, there[tensor]), f"{tensor} of {name}"
        rounds = [record.round for record in history.rounds]
        assert rounds == sorted(set(rounds))
        for site in self.sites:
            taken_part = sum(site in record.survivors for record in history.rounds)
            folder = (folders or {}).get(site, self.kit(site))
            assert self.charged(site, name, folder) >= taken_part, site

    def charged(self, site: str, name: str, folder: Path | None = None) -> int:
        """How many rounds of training of a run the site's ledger was charged for."""
        run_id = json.loads((self.run_folder(name) / "server.json").read_text())["run"]
        with Ledger((folder or self.kit(site)) / LEDGER) as ledger:
            return sum(
                isinstance(entry, Charged) and entry.run == run_id and not entry.release
                for entry in ledger.entries
            )

    def run_folder(self, name: str) -> Path:
        return self.server / "runs" / name

    def progress(self, name: str) -> RunProgress | None:
        return read_progress(self.run_folder(name))

    def state(self, name: str) -> str:
        progress = self.progress(name)
        return progress.state if progress is not None else ""

    def done(self, name: str) -> int:
        progress = self.progress(name)
        return progress.done if progress is not None else 0

    def gives_way(self, name: str) -> bool:
        """Whether the steward asked for another job of the run."""
        return f"{name}: " in (self.folder / "server.log").read_text()

    def wait_over(self, name: str, seconds: float = 120.0) -> RunProgress:
        """How the run ended."""

        def over() -> bool:
            progress = self.progress(name)
            return progress is not None and progress.over

        wait(over, f"{name} over", seconds)
        progress = self.progress(name)
        assert progress is not None
        return progress

    def wait_phase(self, name: str, phase: str, after: int = 0, seconds: float = 90.0) -> None:
        """Until the run is in `phase` of a round above `after`."""

        def there() -> bool:
            progress = self.progress(name)
            return progress is not None and progress.phase == phase and progress.round > after

        wait(there, f"{name} in {phase}", seconds)

    def of(self, name: str, part: str) -> list[int]:
        """The processes of a node whose command line has `part` in it."""
        found = []
        for process in processes(Kit.load(self.kit(name))):
            with contextlib.suppress(Exception):
                if any(part in word for word in process.cmdline()):
                    found.append(process.pid)
        return found

    def end(self, pids: list[int]) -> None:
        """SIGKILL these processes, of which there must be some."""
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait(lambda: not any(psutil.pid_exists(pid) for pid in pids), "processes gone", 10)

    def history(self, name: str) -> History:
        return read_history(self.run_folder(name))

    def kill(self, name: str) -> None:
        """SIGKILL the whole node, supervisor and all: as when its machine loses power."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        for process in processes(Kit.load(self.kit(name))):
            with contextlib.suppress(Exception):
                process.kill()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to every process of a node."""
        for process in processes(Kit.load(self.kit(name))):
            with contextlib.suppress(Exception):
                process.send_signal(number)

    def stop(self) -> None:
        self.leave()
        for node in self.nodes.values():
            node.send_signal(signal.SIGTERM)
        for name, node in self.nodes.items():
            try:
                node.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill(name)
        for name in ("server", *self.sites):
            for process in processes(Kit.load(self.kit(name))):
                with contextlib.suppress(Exception):
                    process.kill()
        self.network.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("started"), apart=True, hospitals=True)
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


@pytest.fixture
def running(started: Deployment) -> Iterator[Deployment]:
    """A deployment that all tests of a file share, as it was when it was started."""
    yield started
    for site in started.sites:
        started.release(site)
    for name, node in started.nodes.items():
        if node.poll() is not None:
            before = started.joined(name)
            started.start(name)
            if name != "server":
                started.wait_connected((name,), before + 1)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Not started."""
    made = Deployment(tmp_path, apart=True)
    try:
        yield made
    finally:
        made.stop()
        if not os.environ.get("KEEP"):
            shutil.rmtree(tmp_path, ignore_errors=True)
