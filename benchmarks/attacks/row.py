"""A published figure beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """paper: None where none is printed, or none could be read again."""

    what: str
    source: str
    paper: float | None
    ours: float
    note: str = ""
