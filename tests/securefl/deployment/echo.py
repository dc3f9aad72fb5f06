"""A site's service whose gate answers with what it was asked, and says how often: for tests.

`python echo.py FOLDER`. A request b"slow..." takes a second, b"fail" is an error in the gate.
"""

import sys
import time
from pathlib import Path

from securefl.deployment.service import serve


class Echo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, data: bytes) -> bytes:
        with (self.folder / "asked").open("ab") as asked:
            asked.write(data + b"\n")
        if data == b"fail":
            raise OSError("no space left on device")
        if data.startswith(b"slow"):
            time.sleep(1)
        return b"reply to " + data


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Echo(Path(sys.argv[1])))
