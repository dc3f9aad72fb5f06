"""The protocols by name: how a framework drives any of them without knowing which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, final

from protocols import bfv_sum, plain
from protocols.errors import RefusedError
from protocols.keystream import Randomness
from protocols.rounds import Expected, ServerSide, Slots

UPLOAD: Final = "upload"
"""The phase, in every protocol, in which a client trains and sends its vector."""


@final
@dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol: its phases in order, the server's generator, and a client's step a phase.

    Every step takes (state, message, randomness), except the one of phase "upload", which takes
    (state, message, slots, randomness). `accepts` names the state type that a step continues from.
    """

    name: str
    phases: tuple[str, ...]
    slot_bits: Callable[[int], int]
    server: Callable[..., ServerSide]
    steps: Mapping[str, Callable[..., tuple[Any, bytes]]]
    accepts: Mapping[str, type]

    def step(
        self, phase: str, state: Any, message: bytes, slots: Slots | None, randomness: Randomness
    ) -> tuple[Any, bytes]:
        """The client's next state and reply; RefusedError when `phase` does not come now."""
        if phase not in self.steps or not isinstance(state, self.accepts[phase]):
            raise RefusedError(f"phase {phase!r} of {self.name} does not come now")
        if phase == UPLOAD:
            return self.steps[phase](state, message, slots, randomness)
        return self.steps[phase](state, message, randomness)


PROTOCOLS: Final[Mapping[str, Protocol]] = MappingProxyType(
    {
        "plain": Protocol(
            "plain",
            plain.PHASES,
            plain.slot_bits,
            plain.server,
            {"upload": plain.client_step1},
            {"upload": Expected},
        ),
        "bfv": Protocol(
            "bfv",
            bfv_sum.PHASES,
            bfv_sum.slot_bits,
            bfv_sum.server,
            {
                "advertise": bfv_sum.client_step1,
                "share": bfv_sum.client_step2,
                "upload": bfv_sum.client_step3,
                "open": bfv_sum.client_step4,
            },
            {
                "advertise": Expected,
                "share": bfv_sum.Advertised,
                "upload": bfv_sum.Advertised,
                "open": bfv_sum.Uploaded,
            },
        ),
    }
)
"""Every protocol by its name."""
