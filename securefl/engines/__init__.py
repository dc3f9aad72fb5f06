"""How messages reach the sites. An engine is one function and knows nothing of any protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from protocols.identity import Roster

Exchange = Callable[[str, Mapping[str, bytes]], Mapping[str, bytes]]
"""exchange(phase, {site: request}) -> {site: reply}; sites that do not answer are left out."""


@final
@dataclass(frozen=True, slots=True)
class Remote:
    """Sites on machines of their own: the keys that they are pinned by, and the way to them.

    What they spend is in their own ledgers, which nobody else reads; they are asked before a run
    (`Server.propose`) and may refuse it.
    """

    roster: Roster
    exchange: Exchange
