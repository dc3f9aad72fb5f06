"""The protocols by name: how a framework drives any of them without knowing which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, final

from protocols import bfv_sum, ckks_sum, masked_bfv, plain, secagg
from protocols.errors import RefusedError
from protocols.keystream import Randomness
from protocols.rounds import BlindServerSide, Expected, ServerSide, Slots, Steps

UPLOAD: Final = "upload"
"""The phase, in every protocol, in which a client trains and sends its vector."""

OPEN: Final = "open"
"""The phase, where there is one, in which a client decrypts the sum. It is tried once: a refusal
after decrypting tells the asker one bit about a ciphertext it may have chosen."""


@final
@dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol: its phases in order, the server's generator, and a client's step a phase.

    Every step takes (state, message, randomness), except the one of phase "upload", which takes
    (state, message, slots, randomness). `accepts` names the states that a step continues from.
    masked: whether sites put masks on their vectors, so that thresholds hold.
    blind_server: the server's generator under reveal = "sites", where the protocol has that.
    """

    name: str
    phases: tuple[str, ...]
    slot_bits: Callable[[int], int]
    server: Callable[..., ServerSide]
    steps: Steps
    accepts: Mapping[str, type | tuple[type, ...]]
    masked: bool = False
    blind_server: Callable[..., BlindServerSide] | None = None

    def __post_init__(self) -> None:
        if not set(self.phases) == set(self.steps) == set(self.accepts):
            raise ValueError(f"{self.name} does not have one step and its states for every phase")

    def step(
        self, phase: str, state: Any, message: bytes, slots: Slots | None, randomness: Randomness
    ) -> tuple[Any, bytes]:
        """The client's next state and reply; RefusedError when `phase` does not come now."""
        if phase not in self.steps or not isinstance(state, self.accepts[phase]):
            raise RefusedError(f"phase {phase!r} of {self.name} does not come now")
        if phase == UPLOAD:
            return self.steps[phase](state, message, slots, randomness)
        return self.steps[phase](state, message, randomness)


_ALL: Final = (
    Protocol(
        "plain",
        plain.PHASES,
        plain.slot_bits,
        plain.server,
        plain.STEPS,
        {"upload": Expected},
    ),
    Protocol(
        "bfv",
        bfv_sum.PHASES,
        bfv_sum.slot_bits,
        bfv_sum.server,
        bfv_sum.STEPS,
        {
            "advertise": Expected,
            "share": bfv_sum.Advertised,
            "upload": bfv_sum.Advertised,
            "open": bfv_sum.Uploaded,
        },
    ),
    Protocol(
        "ckks",
        ckks_sum.PHASES,
        ckks_sum.slot_bits,
        ckks_sum.server,
        ckks_sum.STEPS,
        {
            "advertise": Expected,
            "share": bfv_sum.Advertised,
            "upload": bfv_sum.Advertised,
            "open": bfv_sum.Uploaded,
        },
    ),
    Protocol(
        "secagg",
        secagg.PHASES,
        secagg.slot_bits,
        secagg.server,
        secagg.STEPS,
        {
            "advertise": Expected,
            "share": secagg.Advertised,
            "upload": secagg.Shared,
            "confirm": secagg.Uploaded,
            "unmask": secagg.Confirmed,
        },
        masked=True,
    ),
    Protocol(
        "masked-bfv",
        masked_bfv.PHASES,
        masked_bfv.slot_bits,
        masked_bfv.server,
        masked_bfv.STEPS,
        {
            "advertise": Expected,
            "share": secagg.Advertised,
            "upload": secagg.Shared,
            "confirm": masked_bfv.Uploaded,
            "unmask": masked_bfv.Confirmed,
            "open": (masked_bfv.Released, masked_bfv.Confirmed),
        },
        masked=True,
        blind_server=masked_bfv.blind_server,
    ),
)

PROTOCOLS: Final[Mapping[str, Protocol]] = MappingProxyType({item.name: item for item in _ALL})
"""Every protocol by its name."""
