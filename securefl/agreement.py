"""What the server and every site compute alike before a round, and are bound to in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from protocols import graph
from protocols.catalogue import PROTOCOLS
from protocols.encoding import Encoding, FixedPoint, Integers
from protocols.graph import Thresholds
from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed
from securefl import config
from securefl.config import ConfigurationError, Experiment
from securefl.privacy import clipping
from securefl.privacy.plan import Cohort, Plan, RecordDistributed, RecordLocal, SiteDistributed
from securefl.privacy.rotation import Rotation, block
from securefl.pruning import fewest_surviving
from securefl.replicas import Standing
from securefl.state import GlobalState

OVERFLOW: Final = 2.0**-40
"""The most probability of noise that wraps one coordinate of one sum."""


@lru_cache(maxsize=64)
def _calibrated(
    privacy: config.Privacy | config.SitePrivacy,
    rounds: int,
    steps: int,
    cohort: Cohort | None,
    dimension: int,
) -> Plan:
    if isinstance(privacy, config.Privacy):
        if cohort is None:
            return RecordLocal.calibrate(privacy, rounds, steps, dimension)
        return RecordDistributed.calibrate(privacy, rounds, cohort, dimension)
    assert cohort is not None  # noqa: S101 - a site's noise is distributed
    total = rounds + privacy.spare_rounds
    return SiteDistributed.calibrate(
        privacy.epsilon,
        privacy.delta,
        privacy.clip,
        total,
        cohort,
        dimension,
        counted=clipping.counted(privacy),
    )


def plan(experiment: Experiment, sites: int, dimension: int) -> Plan | None:
    """The privacy plan of an experiment, calibrated for all of its rounds.

    dimension: parameters of the dense model.
    """
    privacy, cohort = experiment.privacy, None
    if privacy is None:
        return None
    if privacy.noise == "distributed":
        cohort = Cohort(sites, thresholds(experiment, sites).minimum, tolerated(experiment))
    steps = experiment.training.local_steps
    return _calibrated(privacy, experiment.rounds, steps, cohort, dimension)


def encoding(experiment: Experiment, cohort: int, plan: Plan | None) -> Encoding:
    """How updates become slots when at most `cohort` sites contribute."""
    protocol, aggregation = experiment.protocol, experiment.aggregation
    slot_bits = PROTOCOLS[protocol.name].slot_bits(cohort)
    if isinstance(plan, RecordDistributed | SiteDistributed):
        # Sites send sums; the mean over the sites, times this, is the mean over an expected batch.
        unit = plan.grid
        if isinstance(plan, RecordDistributed):
            unit *= cohort / plan.expected_batch
        try:
            return Integers(_field_bits(experiment, plan), unit, cohort, slot_bits)
        except ValueError as error:
            raise ConfigurationError(f"privacy: {error}") from None
    cap = 1
    if aggregation.weighting == "declared":
        cap = max(aggregation.weights.values())
    elif aggregation.weighting == "records":
        cap = aggregation.weight_cap or 1
    try:
        return FixedPoint(
            bits=protocol.bits,
            clip=protocol.clip,
            cohort=cohort,
            slot_bits=slot_bits,
            weight_cap=cap,
            weight_slot=aggregation.weighting == "records",
        )
    except ValueError as error:
        raise ConfigurationError(f"protocol: {error}") from None


def _field_bits(experiment: Experiment, plan: RecordDistributed | SiteDistributed) -> int:
    if isinstance(plan, SiteDistributed):
        return min(plan.field_bits(OVERFLOW), plan.field_bits(OVERFLOW, _spread(experiment, plan)))
    # One coordinate of a gradient is far below its norm where there are many: 16 times the mean.
    usual = plan.expected_batch * min(1.0, 16 / math.sqrt(plan.dimension))
    privacy = experiment.privacy
    told = privacy.signal if isinstance(privacy, config.Privacy) else None
    return plan.field_bits(told or usual, OVERFLOW)


def _spread(experiment: Experiment, plan: SiteDistributed) -> int:
    fewest = fewest_surviving(experiment.pruning, plan.dimension)
    return block(clipping.upload_length(experiment, fewest))


def rotates(experiment: Experiment, plan: Plan | None) -> bool:
    """Whether sites rotate their updates: where each is protected and fields are narrower so."""
    if not isinstance(plan, SiteDistributed):
        return False
    return plan.field_bits(OVERFLOW, _spread(experiment, plan)) < plan.field_bits(OVERFLOW)


def rotation(
    experiment: Experiment, plan: Plan | None, update: int, length: int
) -> Rotation | None:
    """How vectors of `length` are rotated after `update` applied aggregates; None where not.

    Another one for every update, from the public seed: sites and whoever decodes are bound to both
    in the round. An aborted round gave no aggregate that an update could depend on.
    """
    if not rotates(experiment, plan):
        return None
    material = digest("rotation", experiment.seed.to_bytes(8, "big"), update.to_bytes(8, "big"))
    return Rotation(length, material)


def tolerated(experiment: Experiment) -> int:
    """T: how many sites may collude with the server."""
    protocol = experiment.protocol
    return protocol.colluding_sites if PROTOCOLS[protocol.name].masked else 0


def thresholds(experiment: Experiment, cohort: int) -> Thresholds:
    """The thresholds of a cohort of `cohort` sites; ConfigurationError when it has none."""
    protocol = experiment.protocol
    if not PROTOCOLS[protocol.name].masked:
        chosen = Thresholds(protocol.minimum_cohort or 2, 1)
    else:
        colluding, complete = protocol.colluding_sites, protocol.graph == "complete"
        chosen = graph.thresholds(cohort, colluding, protocol.minimum_cohort, complete)
        least = max(chosen.threshold, colluding + 2)
        if least > cohort:
            raise ConfigurationError(
                f"{cohort} sites cannot withstand protocol.colluding_sites = {colluding}: a sum "
                f"needs {least} updates; use at most {max(0, cohort - 2)} or bring more sites"
            )
        if chosen.minimum < least:
            raise ConfigurationError(
                f"protocol.minimum_cohort = {chosen.minimum} is below the {least} that {cohort} "
                f"sites of which {colluding} may collude need"
            )
    if chosen.minimum > cohort:
        raise ConfigurationError(
            f"{cohort} site{'s' if cohort > 1 else ''} cannot reach "
            f"protocol.minimum_cohort = {chosen.minimum}: "
            + (f"use at most {cohort}" if cohort > 1 else "the sum of one site is its update")
        )
    if protocol.openers > chosen.minimum:
        raise ConfigurationError(
            f"protocol.openers = {protocol.openers}, but a sum may count as few as "
            f"{chosen.minimum} of {cohort} sites: use at most {chosen.minimum}"
            + (", or raise protocol.minimum_cohort" if protocol.openers <= cohort else "")
        )
    return chosen


def quorum(experiment: Experiment, cohort: int) -> int:
    """The fewest sites that must agree on a model under reveal = "sites": max(t, T + 2).

    So any but one of them include an honest site, whoever else colludes. On a sparse graph, where
    t counts neighbours only, more than half of the cohort.
    """
    chosen = thresholds(experiment, cohort)
    return max(chosen.threshold, cohort // 2 + 1, experiment.protocol.colluding_sites + 2)


def public_weights(experiment: Experiment) -> Mapping[str, int] | None:
    """The declared weight of each site; None where all weigh one or weights travel encrypted."""
    aggregation = experiment.aggregation
    return aggregation.weights if aggregation.weighting == "declared" else None


def binding(experiment: Experiment, state: GlobalState | Standing, encoding: Encoding) -> bytes:
    """SHA-256 over the experiment, the weights and pruning mask, and the encoding (32 bytes)."""
    return digest("binding", experiment.digest(), state.digest(), repr(encoding).encode())


def reproducible_randomness(seed: int, *context: str | int) -> Randomness:
    """The draws of a run that is seeded for tests and therefore not private."""
    material = hashlib.sha256(b"not private" + seed.to_bytes(8, "big")).digest()
    return Keystream(Seed(material), "not private", repr(context).encode()).bytes
