"""A real consortium for tests: a server and three sites, each a process of its own, mTLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from sklearn.datasets import load_breast_cancer

from securefl import config
from securefl.config import Experiment
from securefl.deployment.authority import Consortium
from securefl.deployment.kits import Kit
from securefl.deployment.nodes import processes
from securefl.deployment.progress import RunProgress, read_progress

SITES = ("middle", "north", "south")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "heart_disease"
REPOSITORY = Path(__file__).parents[2]

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


class Deployment:
    """A consortium on this machine, its nodes started through the command line."""

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...] = SITES,
        days: int = 360,
        seen_at: int | None = None,
    ) -> None:
        """seen_at: the port at which sites reach the server, where it is not the server's own."""
        self.folder, self.sites = folder, sites
        self.port = free_port()
        self.consortium = Consortium.new(
            folder / "clinics",
            f"localhost:{seen_at or self.port}",
            sites,
            bind=f"127.0.0.1:{self.port}",
            days=days,
        )
        self.server = self.kit("server")
        self._rows()
        for site in sites:
            text = SITE.format(
                name=site, path=folder / f"{site}.csv", schema=folder / "schema.toml"
            )
            (self.kit(site) / "site.toml").write_text(text)
        (folder / "experiment.toml").write_text(EXPERIMENT)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

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

    def start(self, name: str, *prefix: str, **environment: str) -> None:
        """Start a node and do not wait."""
        role = "server" if name == "server" else "site"
        command = [sys.executable, "-P", "-m", "securefl.cli", role, "start", str(self.kit(name))]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
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
        told = [part for setting in settings for part in ("--set", setting)]
        kit = str(self.kit("administrator"))
        self.cli("submit", "experiment.toml", "--kit", kit, "--name", name, *told)
        return name

    def experiment(self, *settings: str) -> Experiment:
        return config.load(self.folder / "experiment.toml", settings)

    def run_folder(self, name: str) -> Path:
        return self.server / "runs" / name

    def progress(self, name: str) -> RunProgress | None:
        return read_progress(self.run_folder(name))

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


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Not started."""
    made = Deployment(tmp_path)
    try:
        yield made
    finally:
        made.stop()
        if not os.environ.get("KEEP"):
            shutil.rmtree(tmp_path, ignore_errors=True)
