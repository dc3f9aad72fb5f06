"""What can go wrong between parties, and who is to blame."""

from __future__ import annotations

from collections.abc import Iterable


class ProtocolError(Exception):
    """A peer broke the protocol. The caller's own mistakes are `ValueError`.

    `culprits` names the parties whose messages show the fault, sorted; it is empty when the fault
    cannot be pinned on anyone. Messages never contain key material or a party's values.
    """

    def __init__(self, message: str, culprits: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.culprits = tuple(sorted(set(culprits)))


class MalformedMessageError(ProtocolError):
    """Bytes that are not exactly one well-formed message of the expected kind."""


class RefusedError(ProtocolError):
    """A well-formed request that an honest party does not answer."""


class RoundAbortedError(ProtocolError):
    """Too few honest answers for a sum. Nothing was opened; the next round gets a new number."""
