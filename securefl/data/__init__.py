"""Records: read them, hold them, set test rows aside, deal the rest out to sites.

Nothing here is fitted on the rows: features are scaled by ranges declared in the experiment.
"""

from securefl.data.partitions import declared_split, partition, split
from securefl.data.sources import load
from securefl.data.tables import Table

__all__ = ["Table", "declared_split", "load", "partition", "split"]
