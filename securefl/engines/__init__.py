"""How messages reach the sites. An engine is one function and knows nothing of any protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Exchange = Callable[[str, Mapping[str, bytes]], Mapping[str, bytes]]
"""exchange(phase, {site: request}) -> {site: reply}; sites that do not answer are left out."""
