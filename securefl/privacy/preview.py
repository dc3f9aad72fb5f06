"""What a plan would cost and carry, before anyone trains: from public numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from protocols import ckks_sum
from protocols.bfv import Parameters
from protocols.encoding import Encoding
from securefl import agreement, config
from securefl.config import ConfigurationError, Experiment
from securefl.privacy import clipping
from securefl.privacy.plan import Observer, Plan, RecordLocal


@final
@dataclass(frozen=True, slots=True)
class Preview:
    """One plan for a number of sites and of model parameters.

    noise_multiplier: of the noise that the adversary does not know, over what is protected.
    signal_to_noise: an expected batch of clipped gradients, all alike (or all sites' updates), over
        the norm of all noise in one round: below 1 little is learned in a round.
    field_bits: bits of one coordinate of the sum; bytes_up: of an upload, a parameter.
    rotated: whether updates are rotated, which takes fewer bits. Where the clip is adaptive,
    clip_noise: how much more noise the count asks for, as a fraction; share_error: the deviation of
    noise in a round's share of records (or updates) within the clip.
    """

    noise_multiplier: float
    signal_to_noise: float
    field_bits: int
    bytes_up: float
    rotated: bool
    epsilon: Mapping[Observer, float]
    clip_noise: float | None = None
    share_error: float | None = None


def preview(experiment: Experiment, sites: int, parameters: int) -> Preview:
    """The plan of `experiment` for `sites` sites and a model of `parameters` parameters.

    Raises ConfigurationError where the experiment has no plan, or none is reachable.
    """
    plan = agreement.plan(experiment, sites, parameters)
    if plan is None:
        raise ConfigurationError("there is no [privacy] section: add one to plan for")
    encoding = agreement.encoding(experiment, sites, plan)
    length = clipping.upload_length(experiment, parameters)
    return Preview(
        noise_multiplier=noise_multiplier(plan),
        signal_to_noise=_signal_to_noise(plan, sites, parameters),
        field_bits=encoding.field_bits,
        bytes_up=upload_bytes(experiment.protocol, encoding, sites, length) / parameters,
        rotated=agreement.rotates(experiment, plan),
        epsilon={who: plan.spent(experiment.rounds, who) for who in Observer},
        clip_noise=math.hypot(1, plan.count / plan.units) - 1 if plan.counted else None,
        share_error=plan.share_error(sites) if plan.counted else None,
    )


def noise_multiplier(plan: Plan) -> float:
    """The noise that the adversary does not know, at least, over what is protected."""
    if isinstance(plan, RecordLocal):
        return plan.noise_multiplier
    hidden = plan.cohort.shares(Observer.OTHERS)
    return math.sqrt(hidden) * plan.deviation / plan.sensitivity


def _signal_to_noise(plan: Plan, sites: int, parameters: int) -> float:
    if isinstance(plan, RecordLocal):  # every site's batch has noise of its own
        noise = plan.deviation / plan.units
        return math.sqrt(sites / parameters) * plan.expected_batch / noise
    return plan.signal_to_noise


def upload_bytes(protocol: config.Encryption, encoding: Encoding, sites: int, length: int) -> int:
    """Bytes of a site's `length` numbers, encrypted where the protocol does; no signatures."""
    slots = encoding.slots(length)
    if protocol.name in ("plain", "secagg"):
        return -(-slots * encoding.plain_bits // 8)
    if protocol.name == "ckks":
        return ckks_sum.parameters(encoding, length).upload_bytes
    return Parameters(encoding.plain_bits, sites).upload_bytes(slots)
