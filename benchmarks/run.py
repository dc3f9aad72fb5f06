"""Measure securefl beside TenSEAL's ckks_vector in one process, and write the results.

    python benchmarks/run.py

Writes results.json (one row a figure), results.md and results.svg beside this file. Times are
medians over repetitions in which the two sides take turns, so that their ratio holds on a machine
whose speed drifts; the spread is from the fastest to the slowest repetition.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
from matplotlib.figure import Figure

from protocols import bfv_sum
from protocols.bfv import Parameters, SecretKey, Sum, largest_plain_bits
from protocols.encoding import FixedPoint
from protocols.keystream import Keystream, Seed
from protocols.messages import Upload

HERE = Path(__file__).parent
PARAMETERS = 1_000_000
SITES = 16
REPETITIONS = 9


@dataclass(frozen=True)
class Row:
    """One figure: what it is, how it varied, what was promised, and the peer beside it."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    floor: str | None = None
    peer: float | None = None
    ratio: float | None = None


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def against(name: str, floor: str, ours: list[float], theirs: list[float]) -> Row:
    """A row of our time beside theirs; the ratio is the median of pairwise ratios."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    ends = (min(ours), max(ours))
    return Row(name, statistics.median(ours), "s", ends, floor, statistics.median(theirs), ratio)


def encryption() -> Iterator[Row]:
    """One million parameters at 16 sites and 16 bits, beside ckks_vector 8192 [60, 40, 40]."""
    vector = np.random.default_rng(0).normal(size=PARAMETERS) * 0.1
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    key = SecretKey(Seed(bytes(64)), Parameters(encoding.plain_bits, SITES))
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40])
    context.global_scale = 2**40

    def our_upload() -> bytes:
        slots = encoding.encode(vector, 1, Keystream(Seed(os.urandom(32)), "rounding"))
        return Upload("site-1", bytes(32), bytes(key.encrypt(slots)), bytes(64)).to_bytes()

    def their_upload() -> list[bytes]:
        parts = range(0, PARAMETERS, 4096)
        return [tenseal.ckks_vector(context, vector[i : i + 4096]).serialize() for i in parts]

    def our_sum(total: Sum, upload: bytes) -> None:
        total.add(Upload.from_bytes(upload).payload)

    def their_sum(total: list[Any], upload: list[bytes]) -> list[Any]:
        parsed = [tenseal.ckks_vector_from(context, data) for data in upload]
        return [a + b for a, b in zip(total, parsed, strict=True)]

    total = Sum(encoding.slots(PARAMETERS))
    our_sum(total, our_upload())
    their_total = [tenseal.ckks_vector_from(context, data) for data in their_upload()]
    ours: dict[str, list[float]] = {"up": [], "add": [], "open": []}
    theirs: dict[str, list[float]] = {"up": [], "add": [], "open": []}
    for _ in range(REPETITIONS):
        seconds, upload = timed(our_upload)
        ours["up"].append(seconds)
        seconds, their = timed(their_upload)
        theirs["up"].append(seconds)
        ours["add"].append(timed(lambda upload=upload: our_sum(total, upload))[0])
        seconds, their_total = timed(lambda t=their_total, u=their: their_sum(t, u))
        theirs["add"].append(seconds)
    sums = Sum(encoding.slots(PARAMETERS))
    for _ in range(SITES):
        our_sum(sums, our_upload())
    wire = sums.to_bytes()
    for _ in range(3):
        seconds, slots = timed(lambda: key.open(wire, sums.slots, SITES))
        ours["open"].append(seconds)
        theirs["open"].append(timed(lambda t=their_total: [c.decrypt() for c in t])[0])
    names = tuple(str(i) for i in range(SITES))
    encoding.decode(slots, PARAMETERS, names)

    yield against("encode + encrypt + serialise, site", "6x the peer", ours["up"], theirs["up"])
    yield against("parse + add one upload, server", "4x the peer", ours["add"], theirs["add"])
    yield against(f"open the sum of {SITES}, once", "", ours["open"], theirs["open"])
    both = {
        name: SITES * statistics.median(t["add"]) + statistics.median(t["open"])
        for name, t in (("ours", ours), ("theirs", theirs))
    }
    yield Row(
        f"add {SITES} uploads and open the sum",
        both["ours"],
        "s",
        None,
        None,
        both["theirs"],
        both["theirs"] / both["ours"],
    )
    size, peer_size = len(upload) / PARAMETERS, sum(map(len, their)) / PARAMETERS
    yield Row("upload", size, "bytes a parameter", None, "<= 3.5", peer_size, peer_size / size)
    down, peer_down = len(wire) / PARAMETERS, peer_size
    yield Row("sum to open", down, "bytes a parameter", None, None, peer_down, peer_down / down)


def pruned() -> Iterator[Row]:
    """The upload of one million parameters of which nine tenths are pruned."""
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    key = SecretKey(Seed(bytes(64)), Parameters(encoding.plain_bits, SITES))
    sizes = []
    for count in (PARAMETERS, PARAMETERS // 10):
        slots = encoding.encode(np.zeros(count), 1, Keystream(Seed(bytes(32)), "rounding"))
        upload = Upload("site-1", bytes(32), bytes(key.encrypt(slots)), bytes(64))
        sizes.append(len(upload.to_bytes()))
    yield Row("upload at sparsity 0.9, of dense", sizes[1] / sizes[0], "", None, "<= 0.11")


def rounds() -> Iterator[Row]:
    """A whole bfv round, every party in this process, training left out."""
    for sites, count in ((5, 100_000), (SITES, 100_000), (5, PARAMETERS)):
        rng = np.random.default_rng(0)
        vectors = {f"site-{i:02}": rng.normal(size=count) * 0.1 for i in range(sites)}
        encoding = FixedPoint(16, 1.0, sites, bfv_sum.slot_bits(sites))
        times = [timed(lambda v=vectors, e=encoding: bfv_sum.run(v, e))[0] for _ in range(3)]
        name = f"bfv round, {sites} sites, {count:,} parameters, all parties in turn"
        yield Row(name, statistics.median(times), "s", (min(times), max(times)))


def memory() -> Iterator[Row]:
    """Peak memory of ten million parameters, in processes of their own."""
    for side in ("site", "server"):
        command = [sys.executable, str(HERE / "memory.py"), side]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        name = f"peak memory of 10,000,000 parameters, {side}"
        yield Row(name, told["peak"] / 1e6, "MB", None, f"<= {told['bound'] / 1e6:.0f}")


def demo() -> Iterator[Row]:
    """The main job as a user runs it, start of Python included."""
    text = importlib.resources.files("securefl").joinpath("demo.toml").read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.toml"
        path.write_text(text)
        command = [sys.executable, "-m", "securefl.cli", "run", str(path), "--format", "json"]
        times = [
            timed(
                lambda i=i: subprocess.run(
                    [*command, "--directory", f"{folder}/{i}"], check=True, capture_output=True
                )
            )[0]
            for i in range(3)
        ]
    yield Row(
        "demo, whole command", statistics.median(times), "s", (min(times), max(times)), "<= 60"
    )


def markdown(rows: list[Row], machine: str) -> str:
    """The rows as a table."""
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {machine}. One million parameters, {SITES} sites, 16 bits, one thread. "
        "The peer is TenSEAL's `ckks_vector` at degree 8192 with moduli [60, 40, 40], in the same "
        "process, taking turns. Times are medians; the ratio is the median of pairwise ratios.",
        "",
        "securefl's server only adds; what c1 needs, the opener expands from seeds. The row that "
        "adds all uploads and opens the sum counts both.",
        "",
        "![times beside the peer](results.svg)",
        "",
        "| what | value | spread | promised | peer | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread[0]:.3g} to {row.spread[1]:.3g}"
        peer = "" if row.peer is None else f"{row.peer:.3g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}x"
        value = f"{row.value:.3g} {row.unit}".strip()
        lines.append(f"| {row.name} | {value} | {spread} | {row.floor or ''} | {peer} | {ratio} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Bars of every row that has a peer and is a time."""
    shown = [row for row in rows if row.peer is not None and row.unit == "s"]
    figure = Figure(figsize=(8, 0.9 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(shown))
    axes.barh(at - 0.2, [row.value for row in shown], 0.38, label="securefl", color="#0072b2")
    axes.barh(
        at + 0.2, [row.peer for row in shown], 0.38, label="TenSEAL ckks_vector", color="#bbb"
    )
    for i, row in enumerate(shown):
        axes.text(max(row.value, row.peer or 0) * 1.05, i, f"{row.ratio:.1f}x", va="center")
    axes.set_yticks(at, [row.name for row in shown])
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("seconds (logarithmic), one million parameters")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure everything and write the three files."""
    rows: list[Row] = []
    for group in (encryption, pruned, rounds, memory, demo):
        for row in group():
            rows.append(row)
            ratio = "" if row.ratio is None else f"  {row.ratio:.1f}x the peer's {row.peer:.3g}"
            print(f"{row.name:<64} {row.value:10.3g} {row.unit}{ratio}", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    told = {"machine": machine, "rows": [asdict(row) for row in rows]}
    (HERE / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (HERE / "results.md").write_text(markdown(rows, machine))
    draw(rows, HERE / "results.svg")


if __name__ == "__main__":
    main()
