"""The processes of an audit: `python -m attacks.alone` is an adversary's (`attack.guess`), with the
word "audit" after it one that assesses an attack (`audit.audit`)."""

from __future__ import annotations

import os
import sys
import threading
import time


def main() -> None:
    """Answer on what was standard output, so that nothing an attack prints gets between."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from attacks import attack, audit

    serve = audit.serve if sys.argv[1:] == ["audit"] else attack.serve
    serve(sys.stdin.buffer, sink)


def _end_with(parent: int) -> None:
    """End this process, in the midst of whatever it does, once `parent` is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
