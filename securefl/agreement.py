"""What the server and every site compute alike before a round, and are bound to in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from protocols import graph
from protocols.catalogue import PROTOCOLS
from protocols.encoding import FixedPoint
from protocols.graph import Thresholds
from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed
from securefl.config import ConfigurationError, Experiment
from securefl.replicas import Standing
from securefl.state import GlobalState


def encoding(experiment: Experiment, cohort: int) -> FixedPoint:
    """How updates become integers when at most `cohort` sites contribute."""
    protocol, aggregation = experiment.protocol, experiment.aggregation
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
            slot_bits=PROTOCOLS[protocol.name].slot_bits(cohort),
            weight_cap=cap,
            weight_slot=aggregation.weighting == "records",
        )
    except ValueError as error:
        raise ConfigurationError(f"protocol: {error}") from None


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
            f"protocol.minimum_cohort = {chosen.minimum}: the sum of one site is that site's update"
        )
    if protocol.openers > chosen.minimum:
        raise ConfigurationError(
            f"protocol.openers = {protocol.openers} but a sum may count no more than "
            f"{chosen.minimum} sites: use at most {chosen.minimum}, or raise "
            "protocol.minimum_cohort"
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


def binding(experiment: Experiment, state: GlobalState | Standing, encoding: FixedPoint) -> bytes:
    """SHA-256 over the experiment, the weights and pruning mask, and the encoding (32 bytes)."""
    return digest("binding", experiment.digest(), state.digest(), repr(encoding).encode())


def reproducible_randomness(seed: int, *context: str | int) -> Randomness:
    """The draws of a run that is seeded for tests and therefore not private."""
    material = hashlib.sha256(b"not private" + seed.to_bytes(8, "big")).digest()
    return Keystream(Seed(material), "not private", repr(context).encode()).bytes
