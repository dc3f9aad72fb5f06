"""Clients as objects in this process: the default, and what tests use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Answering(Protocol):
    """Anything that answers for a site: a `securefl.client.Client`, or what a test puts there."""

    def answer(self, data: bytes) -> bytes:
        """The reply to one request; ConnectionError or TimeoutError when the site is gone."""
        ...


def exchange(clients: Mapping[str, Answering], messages: Mapping[str, bytes]) -> dict[str, bytes]:
    """Ask each site in turn; one that is gone is left out, any other error is a bug and shows."""
    replies = {}
    for site, message in messages.items():
        try:
            replies[site] = clients[site].answer(message)
        except (ConnectionError, TimeoutError):
            continue
    return replies
