"""Peak memory of one upload of ten million parameters, at the site and at the server.

    python benchmarks/memory.py [site|server]

Prints one JSON object: the peak above the idle process, and the bound that the project promises,
three times the float32 vector plus one encoded upload.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from protocols.bfv import Parameters, SecretKey, Sum, largest_plain_bits
from protocols.encoding import FixedPoint
from protocols.keystream import Keystream, Seed
from protocols.messages import Upload

PARAMETERS = 10_000_000
SITES = 16


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def start_peak() -> int:
    """Forget the peak so far; the memory in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def site(count: int) -> Upload:
    """Encode, encrypt and serialise `count` parameters, as a client does."""
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    key = SecretKey(Seed(bytes(64)), Parameters(encoding.plain_bits, SITES))
    vector = np.random.default_rng(0).normal(size=count).astype(np.float32)
    payload = bytes(key.encrypt(encoding.encode(vector, 1, Keystream(Seed(bytes(32)), "b"))))
    return Upload("site-1", bytes(32), payload, bytes(64))


def server(upload: bytes, count: int) -> Sum:
    """Parse and add one upload, as the server does."""
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    total = Sum(encoding.slots(count), Parameters(encoding.plain_bits, SITES))
    total.add(Upload.from_bytes(upload).payload)
    return total


def measure(side: str) -> dict[str, float]:
    """The peak of one side, in bytes, beside the promised bound."""
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    parameters = Parameters(encoding.plain_bits, SITES)
    upload_bytes = parameters.upload_bytes(encoding.slots(PARAMETERS))
    server(site(5000).to_bytes(), 5000)  # what libraries allocate once is not the upload's
    if side == "site":
        before = start_peak()
        wire = site(PARAMETERS).to_bytes()
        assert len(wire) >= upload_bytes
    else:
        # A well-formed upload of the right size without the site's work in this process.
        small = site(4096 * 8 - encoding.header_slots * encoding.fields).payload
        times = upload_bytes // len(small) + 1
        payload = (small * times)[:upload_bytes]
        rest = encoding.slots(PARAMETERS) % 2048
        if spare := parameters.upload_bits * rest % 8:
            last = bytearray(payload)
            last[-1] &= (1 << spare) - 1
            payload = bytes(last)
        wire = Upload("site-1", bytes(32), payload, bytes(64)).to_bytes()
        del small, payload
        before = start_peak() - len(wire)  # the message that arrived counts
        server(wire, PARAMETERS)
    return {
        "peak": resident("VmHWM") - before,
        "bound": 3 * 4 * PARAMETERS + upload_bytes,
        "vector": 4 * PARAMETERS,
        "upload": upload_bytes,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else "site")))
