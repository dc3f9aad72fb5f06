"""A deployment on FLARE on this machine: what an exchange and a whole round take.

    python benchmarks/deployment.py

A server and three sites as processes, mTLS on loopback. First three phases of 4 MB down and 4 MB up
a site, through FLARE, each site's executor and its service's socket, with a service that only
answers. Then rounds of masked-bfv with 991,982 parameters, and the same rounds in process, where
the sites take turns. Prints one JSON object; medians and extremes over the rounds but the first.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from securefl import config
from securefl.deployment import nodes
from securefl.deployment.authority import Consortium
from securefl.deployment.conduct import Waits
from securefl.deployment.controller import RoundController
from securefl.deployment.kits import Kit
from securefl.deployment.progress import read_progress
from securefl.deployment.service import serve
from securefl.deployment.steward import Session, write_job
from securefl.records import read_history
from securefl.runs import run

SITES = ("a", "b", "c")
MEGABYTES, PHASES, REPEATS = 4, 3, 9
ROUNDS = 9
FEATURES = 8
SCHEMA = "".join(
    [
        'version = 1\nname = "bench"\nlabel = "y"\n',
        *(f'[columns.x{i}]\ntype = "number"\nrange = [-1, 1]\n' for i in range(FEATURES)),
        '[columns.y]\ntype = "category"\n[columns.y.categories]\nno = ["0"]\nyes = ["1"]\n',
    ]
)
EXPERIMENT = f"""
version = 1
name = "bench"
rounds = {ROUNDS}
device = "cpu"
[data]
source = "table"
schema = "schema.toml"
[sites]
names = ["a", "b", "c"]
[preprocessing]
scale = "range"
impute = "middle"
minimum_count = 0
[model]
name = "mlp"
hidden = [990, 990]
[protocol]
minimum_cohort = 2
colluding_sites = 0
"""
SITE = """
version = 1
name = "{name}"
[data]
id = "rows"
purpose = "a benchmark"
path = "{path}"
schema = "{schema}"
[budget]
unit = "record"
epsilon = 60.0
delta = 1e-3
[policy]
consent = "standing"
unknown_sites = true
privacy = "optional"
record_counts = true
minimum_cohort = 2
minimum_colluding_sites = 0
"""


class Exchange(RoundController):
    """Times exchanges and nothing else."""

    def control_flow(self, abort_signal, fl_ctx) -> None:
        self._ended, self._fl_ctx = abort_signal, fl_ctx
        waits = Waits(60.0, 20.0, len(SITES))
        while len(self.exchange(dict.fromkeys(SITES, b"hello"), waits)) < len(SITES):
            time.sleep(0.2)
        seconds = []
        for _ in range(REPEATS):
            messages = {site: os.urandom(MEGABYTES * 1_000_000) for site in SITES}
            started = time.perf_counter()
            for phase in range(PHASES):
                told = {site: bytes([phase]) + data for site, data in messages.items()}
                replies = self.exchange(told, waits)
                if {len(reply) for reply in replies.values()} != {MEGABYTES * 1_000_000 + 1}:
                    raise RuntimeError("a reply is missing or short")
            seconds.append(time.perf_counter() - started)
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parent
        (kit / "exchange.json").write_text(json.dumps(seconds))


class Echo:
    """A gate that sends back what it was sent."""

    def answer(self, data: bytes) -> bytes:
        return data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def made(folder: Path) -> Consortium:
    """The consortium, its sites' files and policies."""
    (folder / "schema.toml").write_text(SCHEMA)
    (folder / "experiment.toml").write_text(EXPERIMENT)
    rng = np.random.default_rng(0)
    head = ",".join([*(f"x{i}" for i in range(FEATURES)), "y"])
    consortium = Consortium.new(folder / "bench", f"localhost:{free_port()}", SITES)
    for site in SITES:
        x = rng.uniform(-1, 1, (200, FEATURES))
        rows = np.column_stack([x, x.sum(1) > 0])
        form = [*["%.3f"] * FEATURES, "%d"]
        path = folder / f"{site}.csv"
        np.savetxt(path, rows, form, ",", header=head, comments="")
        text = SITE.format(name=site, path=path, schema=folder / "schema.toml")
        (consortium.kit(site) / "site.toml").write_text(text)
    return consortium


@contextmanager
def started(consortium: Consortium, echo: bool) -> Iterator[Session]:
    """Every node; a session once all sites are connected."""
    processes = []
    for name in ("server", *SITES):
        kit = Kit.load(consortium.kit(name))
        bench = f"{Path(__file__).stem}.Exchange"
        nodes.prepare(kit, (*nodes.CLASSES, bench))
        programs = nodes.programs(kit)
        if echo and kit.role == "site":
            command = (sys.executable, __file__, "echo", str(kit.folder))
            programs = (nodes.Program("service", command), programs[-1])
        paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"
        environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(kit.flare / "tmp")}
        for program in programs:
            with (kit.folder / "logs" / f"{program.name}.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        program.command,
                        stdout=log,
                        stderr=log,
                        env={**environment, "SECUREFL_KIT": str(kit.folder)},
                        start_new_session=True,
                    )
                )
    try:
        kit = Kit.load(consortium.kit("administrator"))
        session = None
        while session is None or len(session.connected()) < len(SITES):
            try:
                session = session or Session(kit)
            except config.ConfigurationError:
                time.sleep(1)
            time.sleep(0.2)
        with session:
            yield session
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for name in ("server", *SITES):
            nodes.end_all(Kit.load(consortium.kit(name)), 0.1)


def exchanges(consortium: Consortium) -> list[float]:
    """Seconds of three phases, again and again."""
    with started(consortium, echo=True) as session:
        kit = session.kit
        folder = kit.flare / "transfer" / "exchange"
        write_job(folder, "exchange", "", len(SITES))
        server = folder / "app" / "config" / "config_fed_server.json"
        told = json.loads(server.read_text())
        told["workflows"][0]["path"] = f"{Path(__file__).stem}.Exchange"
        server.write_text(json.dumps(told))
        session._session.submit_job(str(folder))
        result = consortium.kit("server") / "exchange.json"
        while not result.exists():
            time.sleep(0.5)
        time.sleep(0.5)
        return json.loads(result.read_text())


def rounds(consortium: Consortium, folder: Path) -> list[dict[str, float]]:
    """Seconds by phase of every round of a deployed run."""
    with started(consortium, echo=False) as session:
        experiment = config.load(folder / "experiment.toml")
        session.submit("bench", experiment.dump(), 2)
        place = consortium.kit("server") / "runs" / "bench"
        while (progress := read_progress(place)) is None or not progress.over:
            time.sleep(0.5)
        if progress.state != "finished":
            raise RuntimeError(progress.reason)
        return [dict(record.seconds) for record in read_history(place).rounds]


def in_process(consortium: Consortium, folder: Path) -> list[dict[str, float]]:
    """The same rounds as a simulation."""
    own = folder / "own"
    for site in SITES:
        (own / site).mkdir(parents=True)
        for file in ("site.toml", "site.key"):
            (own / site / file).write_bytes((consortium.kit(site) / file).read_bytes())
            (own / site / file).chmod(0o600)
    experiment = config.load(folder / "experiment.toml")
    done = run(experiment, folder / "alone", sites=own, report=False)
    return [dict(record.seconds) for record in read_history(done.directory).rounds]


def told(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 3),
        "least": round(min(seconds), 3),
        "most": round(max(seconds), 3),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        consortium = made(folder)
        exchanged = exchanges(consortium)[1:]
        deployed = rounds(consortium, folder)[1:]
        alone = in_process(consortium, folder)[1:]
    print(
        json.dumps(
            {
                "three phases of 4 MB a site, s": told(exchanged),
                "a round of 991,982 parameters, s": told([sum(r.values()) for r in deployed]),
                "its phases, median s": {
                    phase: round(statistics.median(r[phase] for r in deployed), 3)
                    for phase in deployed[0]
                },
                "the same in process, s": told([sum(r.values()) for r in alone]),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        serve(Path(sys.argv[2]), Echo())
    else:
        main()
