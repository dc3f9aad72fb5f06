"""Peers to measure beside, each in a virtual environment of its own under benchmarks/.peers.

    python benchmarks/peers.py [flower]

Made on demand, with pip and nothing else. A peer that cannot be installed is told, not an error:
the rows beside it then say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = {"flower": ("flwr>=1.41,<1.42",)}


class PeerMissingError(RuntimeError):
    """A peer that cannot be installed here."""


def interpreter(peer: str) -> Path:
    """The Python in which `peer` is installed; PeerMissingError where that is not possible."""
    folder = HERE / ".peers" / peer
    python, ready = folder / "bin" / "python", folder / ".installed"
    packages = "\n".join(PACKAGES[peer])
    if ready.exists() and ready.read_text() == packages:
        return python
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *PACKAGES[peer]], capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise PeerMissingError(f"{peer} cannot be installed: {reason}")
    ready.write_text(packages)
    return python


def flower_secaggplus(parameters: int, sites: int, gone: int) -> dict[str, Any]:
    """One SecAgg+ round of Flower, without its engine; the figures of flower_secaggplus.py."""
    command = [str(interpreter("flower")), str(HERE / "flower_secaggplus.py")]
    told = subprocess.run(
        [*command, str(parameters), str(sites), str(gone)],
        check=True,
        capture_output=True,
        env=os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"},
    )
    figures: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGES:
        print(name, interpreter(name))
