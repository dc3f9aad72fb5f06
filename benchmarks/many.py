"""A whole round of many sites in one process: seconds, and peak memory.

    python benchmarks/many.py [secagg|masked-bfv] [SITES] [PARAMETERS]

Prints one JSON object. Up to 200 sites every one shares with every other; above, with neighbours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from protocols import masked_bfv, secagg
from protocols.encoding import FixedPoint

PROTOCOLS = {"secagg": secagg, "masked-bfv": masked_bfv}


def peak() -> int:
    """The most bytes of memory that this process held; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main(name: str = "secagg", sites: int = 200, parameters: int = 10_000) -> None:
    """Play the round, check that the mean is right, and print what it took."""
    protocol = PROTOCOLS[name]
    vectors = {f"site-{i:04}": np.full(parameters, 0.25) for i in range(sites)}
    encoding = FixedPoint(16, 1.0, sites, protocol.slot_bits(sites))
    started = time.perf_counter()
    aggregate = protocol.run(vectors, encoding, tolerated=1)
    seconds = time.perf_counter() - started
    assert len(aggregate.contributors) == sites
    assert np.abs(aggregate.mean - 0.25).max() < 1e-4
    print(json.dumps({"seconds": seconds, "peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
