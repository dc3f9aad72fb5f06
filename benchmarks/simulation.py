"""A simulation of many sites: seconds, and the peak memory of all its processes together.

    python benchmarks/simulation.py [ray|workers] [SITES] [ROUNDS]

Ten records a site, a model of 50,001 parameters, the protocol secagg, as many workers as CPUs.
Prints one JSON object. Memory is the proportional set size (what processes share counts once),
summed over this process and all below it, sampled every two seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from securefl import config
from securefl.records import read_history
from securefl.runs import run

FEATURES = 48
EXPERIMENT = """
name = "many"
device = "cpu"
[data]
source = "table"
label = "y"
task = "regression"
default_range = [-1.0, 1.0]
target_range = [-1.0, 1.0]
[model]
name = "mlp"
hidden = [1000]
[training]
learning_rate = 0.1
[protocol]
name = "secagg"
"""


def write_records(path: Path, sites: int) -> None:
    """Ten training records a site, and a fifth of all held out."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (sites * 25 // 2, FEATURES))
    y = np.tanh(x @ rng.normal(0, 1 / 7, FEATURES))
    head = ",".join([*(f"x{i}" for i in range(FEATURES)), "y"])
    np.savetxt(path, np.column_stack([x, y]), "%.3f", ",", header=head, comments="")


def held() -> int:
    """Bytes of memory that this process and all below it hold now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                told = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(told[1])
            except (OSError, IndexError):
                continue
    ours, below = {os.getpid()}, {os.getpid()}
    while below := {pid for pid, parent in parents.items() if parent in below} - ours:
        ours |= below
    total = 0
    for pid in ours:
        try:
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def main(kind: str = "ray", sites: int = 1000, rounds: int = 5) -> None:
    """Run it, and print what it took."""
    engine = {"ray": "engine.kind=ray", "workers": f"engine.workers={os.cpu_count()}"}[kind]
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(2):
            peak = max(peak, held())

    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "many.csv"), sites)
        told = (f"sites.count={sites}", f"rounds={rounds}", f"data.path={folder}/many.csv", engine)
        experiment = config.parse(EXPERIMENT, told)
        watching = threading.Thread(target=watch)
        watching.start()
        started = time.perf_counter()
        try:
            done = run(experiment, Path(folder, "run"), report=False)
        finally:
            over.set()
            watching.join()
        seconds = time.perf_counter() - started
        history = read_history(done.directory)
    figures = {
        "seconds": round(seconds, 1),
        "round": round(sum(sum(r.seconds.values()) for r in history.rounds) / rounds, 1),
        "peak": peak,
        "parameters": done.summary.parameters,
        "survivors": [len(record.survivors) for record in history.rounds],
        "aborted": len(done.summary.aborted_rounds),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
