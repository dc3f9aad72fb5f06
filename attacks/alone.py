"""The process in which an adversary runs: `python -m attacks.alone`, started by `attack.guess`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Answer on what was standard output, so that nothing an attack prints gets between."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from attacks.attack import serve

    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
