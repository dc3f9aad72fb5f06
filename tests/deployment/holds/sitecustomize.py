"""On the path of a site's processes under test: its gate waits where a test says so.

HOLDS names a folder. While it holds a file "before-PHASE" (or "after-PHASE") the gate waits before
it answers a request of that phase (or with its reply ready); "reached-..." tells that it does.
"""

import os
import sys

if "HOLDS" in os.environ and "securefl.deployment.service" in sys.orig_argv:
    import time
    from pathlib import Path

    from securefl import site
    from securefl.messages import Proposal, parse_asked

    folder = Path(os.environ["HOLDS"])
    answer = site.Gate.answer

    def wait(point: str) -> None:
        if (folder / point).exists():
            (folder / f"reached-{point}").touch()
            while (folder / point).exists():
                time.sleep(0.02)
            (folder / f"reached-{point}").unlink(missing_ok=True)

    def held(self: site.Gate, data: bytes) -> bytes:
        asked = parse_asked(data)
        phase = "propose" if isinstance(asked, Proposal) else asked.phase
        wait(f"before-{phase}")
        reply = answer(self, data)
        wait(f"after-{phase}")
        return reply

    site.Gate.answer = held
