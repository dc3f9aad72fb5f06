"""Records: read them, hold them, set test rows aside, deal the rest out to sites.

Nothing here is fitted on the rows: features are scaled by ranges declared in the experiment, or
made of a `Frame` by what `securefl.preprocessing` was fitted to.
"""

from securefl.data.frames import Frame
from securefl.data.partitions import Records, declared_split, held_out, partition, split
from securefl.data.sources import load
from securefl.data.tables import Table

__all__ = [
    "Frame",
    "Records",
    "Table",
    "declared_split",
    "held_out",
    "load",
    "partition",
    "split",
]
