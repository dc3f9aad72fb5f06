"""What a site's service draws, learns and is asked, written down: for tests that look for it.

Run as `sitecustomize` in the site's processes; it changes nothing of what they do. Each line of the
file that the environment's WITNESS names is JSON: what it is, and its bytes in hexadecimal.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LEAST = 16
"""Bytes of a draw that is worth looking for; nonces have 12 and are public."""

OURS = ("protocols.", "securefl.", "__main__")

RELEASED = ("Seed.draw", "client_step1")
"""Who draws a self-mask seed: the sites release it to the server once its owner has uploaded
(Bonawitz et al. 2017, figure 4, round 4), so that the server knows it by right."""


def _write(what: str, data: bytes) -> None:
    line = json.dumps({"what": what, "data": data.hex()}) + "\n"
    file = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def _callers() -> tuple[str, ...]:
    """The functions of ours on the way to a draw, nearest first; none for other programs' draws."""
    names, frame = [], sys._getframe(2)
    while frame is not None and len(names) < 3:
        if frame.f_globals.get("__name__", "").startswith(OURS):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(names)


def watch() -> None:
    """Begin to write down."""
    draw = os.urandom

    def urandom(size: int) -> bytes:
        drawn, callers = draw(size), _callers()
        if size >= LEAST and callers and callers[:2] != RELEASED:
            _write(f"draw of {' < '.join(callers)}", drawn)
        return drawn

    os.urandom = urandom

    import numpy as np

    from protocols import keystream
    from securefl.audit_log import Audited
    from securefl.privacy.training import Trainer

    train, answer, derive = Trainer.noised_sum, Audited.answer, keystream.Seed.derive

    def noised_sum(self: Trainer, *told: Any, **named: Any) -> Any:
        update = train(self, *told, **named)
        for kind in (np.int64, np.int32, np.float64, np.float32):
            _write(f"update as {kind.__name__}", update.astype(kind).tobytes())
        return update

    def answered(self: Audited, data: bytes) -> bytes:
        _write("request", data)
        reply = answer(self, data)
        _write("reply", reply)
        return reply

    def derived(self: keystream.Seed, purpose: str, context: bytes = b"", size: int = 32) -> bytes:
        secret = derive(self, purpose, context, size)
        if purpose == "bfv secret key":
            _write("HE key's seed", secret)
        return secret

    Trainer.noised_sum = noised_sum  # type: ignore[method-assign]
    Audited.answer = answered  # type: ignore[method-assign]
    keystream.Seed.derive = derived  # type: ignore[method-assign]


def read(path: Path) -> list[tuple[str, bytes]]:
    """What was written down: what it is, and its bytes."""
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["what"], bytes.fromhex(line["data"])) for line in lines]


if "WITNESS" in os.environ and any("deployment.service" in part for part in sys.orig_argv):
    watch()
