"""A site's service whose gate answers with what it was asked, and says how often: for tests.

`python echo.py FOLDER`. A request b"slow..." takes a second, b"fail" is an error in the gate.
"""

import sys
import time
from pathlib import Path

from securefl.deployment.service import serve

FOLDER = Path(sys.argv[1])


class Echo:
    def answer(self, data: bytes) -> bytes:
        with (FOLDER / "asked").open("ab") as asked:
            asked.write(data + b"\n")
        if data == b"fail":
            raise OSError("no space left on device")
        if data.startswith(b"slow"):
            time.sleep(1)
        return b"reply to " + data


serve(FOLDER, Echo())
