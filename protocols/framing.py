"""SEAL 4.x objects as bytes in memory: what `protocols.bfv` and `protocols.ckks` hand to SEAL.

Every object is header || body; the header is the magic number, its own size, version, compression
mode, and the total size. Bodies are made here and range-checked before: no peer's bytes reach
SEAL's parser.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final, final

import zstandard

SEED_BYTES: Final = 64
"""What a ciphertext's second half is expanded from."""

_HEADER: Final = struct.Struct("<HBBBBHQ")
HEADER_BYTES: Final = _HEADER.size
C0_OFFSET: Final = 73 + HEADER_BYTES + 8
"""Where c0 begins in a ciphertext's body: after parms_id 32, NTT flag 1, size 8, degree 8, moduli
8, scale 8, correction factor 8, and the coefficient array's own header and 8-byte count."""

_MAGIC: Final = 0xA15E
_UNCOMPRESSED, _ZSTD = 0, 2
_SUPPORTED: Final = (4, 3)


@final
class Memory:
    """A file that lives in memory alone: SEAL's save and load take paths."""

    def __init__(self) -> None:
        self._file = os.memfd_create("seal", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._file}"

    def write(self, data: bytes, offset: int = 0) -> None:
        """Overwrite what lies at `offset`."""
        os.pwrite(self._file, data, offset)

    def replace(self, data: bytes) -> None:
        """Make `data` all that the file holds."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)

    def saved(self, item: Any) -> bytes:
        """The body of what `item.save` writes; our own objects only, never a peer's bytes."""
        os.ftruncate(self._file, 0)
        item.save(self.path)
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        _, _, _, minor, mode, _, _ = _HEADER.unpack_from(data)
        if minor != _SUPPORTED[1] or mode not in (_UNCOMPRESSED, _ZSTD):
            raise RuntimeError(
                f"SEAL writes format 4.{minor}, mode {mode}, which this version of securefl does "
                "not know: install tenseal 0.3.16"
            )
        body = data[_HEADER.size :]
        return zstandard.ZstdDecompressor().decompressobj().decompress(body) if mode else body

    def __del__(self) -> None:
        os.close(self._file)


def framed(body: bytes) -> bytes:
    """An uncompressed object of SEAL's with this body."""
    size = _HEADER.size + len(body)
    header = _HEADER.pack(_MAGIC, _HEADER.size, *_SUPPORTED, _UNCOMPRESSED, 0, size)
    return header + body
