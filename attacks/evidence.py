"""How sure a finding is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Interval:
    """From `low` to `high`, at `confidence`, by `method`."""

    low: float
    high: float
    confidence: float
    method: str
