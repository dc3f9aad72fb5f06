"""What the server and every site compute alike before a round, and are bound to in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from protocols import ckks_sum, graph
from protocols.catalogue import PROTOCOLS
from protocols.encoding import Encoding, FixedPoint, Integers
from protocols.graph import Thresholds
from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed
from securefl import config
from securefl.config import ConfigurationError, Experiment
from securefl.messages import TRAIN, Task
from securefl.preprocessing import NOISY, Precision, Preprocessor
from securefl.privacy import clipping
from securefl.privacy.ledger import Release
from securefl.privacy.plan import (
    Cohort,
    Observer,
    Plan,
    RecordDistributed,
    RecordLocal,
    SiteDistributed,
    Statistics,
)
from securefl.privacy.rotation import Rotation, block
from securefl.pruning import fewest_surviving
from securefl.replicas import Standing
from securefl.state import GlobalState
from securefl.tallies import EXACT_BITS, NOISY_BITS, Tally, usual_bins

OVERFLOW: Final = 2.0**-40
"""The most probability of noise that wraps one coordinate of one sum."""

FLOAT_BITS: Final = 51
"""An integer of so many bits is still exact after a division and a multiplication in float64, which
opened sums pass through as the mean over the sites."""


@lru_cache(maxsize=64)
def _calibrated(
    privacy: config.Privacy | config.SitePrivacy,
    rounds: int,
    steps: int,
    cohort: Cohort | None,
    dimension: int,
    sums: tuple[tuple[float, int], ...],
    share: float,
) -> Plan:
    if isinstance(privacy, config.Privacy):
        statistics = None
        if sums:
            shares = 1 if cohort is None else cohort.shares(Observer.OTHERS)
            spend = share * privacy.epsilon, privacy.delta
            times = 1 + min(1, privacy.spare_rounds)
            statistics = Statistics.calibrate(sums, shares, *spend, times)
        if cohort is None:
            return RecordLocal.calibrate(privacy, rounds, steps, dimension, statistics)
        return RecordDistributed.calibrate(
            privacy, rounds, cohort, dimension, statistics=statistics
        )
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
    privacy, steps = experiment.privacy, experiment.training.local_steps
    if privacy is None:
        return None
    sums: tuple[tuple[float, int], ...] = ()
    share = 0.0
    fitting = preprocessor(experiment, sites)
    if fitting is not None and experiment.preprocessing is not None:
        stages = range(fitting.stages)
        sums = tuple((fitting.sensitivity(stage), fitting.dimension(stage)) for stage in stages)
        share = experiment.preprocessing.share
    cohort = _cohort(experiment, sites)
    return _calibrated(privacy, experiment.rounds, steps, cohort, dimension, sums, share)


def _cohort(experiment: Experiment, sites: int) -> Cohort | None:
    """Whose noise a plan may count on; None where every site's is enough by itself."""
    if experiment.privacy is None or experiment.privacy.noise == "local":
        return None
    return Cohort(sites, thresholds(experiment, sites).minimum, tolerated(experiment))


def preprocessor(experiment: Experiment, sites: int) -> Preprocessor | None:
    """What makes features of a schema's columns; None where records come as features."""
    if experiment.preprocessing is None:
        return None
    return Preprocessor(experiment.data, experiment.preprocessing, _precision(experiment, sites))


def _precision(experiment: Experiment, sites: int) -> Precision:
    slot_bits = min(PROTOCOLS[experiment.protocol.name].slot_bits(sites), FLOAT_BITS)
    exact = Precision.exact(slot_bits)
    return exact if experiment.privacy is None else NOISY


def tally(experiment: Experiment, sites: int) -> Tally | None:
    """What test rows are counted with at the sites; None where nothing is."""
    schema, evaluation = experiment.data.agreed, experiment.evaluation
    if schema is None or evaluation is None:
        return None
    noisy = experiment.privacy is not None and evaluation.protected
    # Of at most 2^24 test rows no exact sum leaves its slot.
    exact_bits = min(EXACT_BITS, PROTOCOLS[experiment.protocol.name].slot_bits(sites) - 25)
    return Tally(
        classes=len(schema.classes),
        target_range=schema.target_range,
        bins=evaluation.bins or usual_bins(len(schema.classes), not noisy),
        threshold=evaluation.threshold,
        bits=NOISY_BITS if noisy else exact_bits,
    )


def evaluations(experiment: Experiment) -> int:
    """How often the model is evaluated, if all rounds take place."""
    evaluation = experiment.evaluation
    if evaluation is None:
        return 0
    return -(-experiment.rounds // (evaluation.every or experiment.rounds))


def evaluation_release(experiment: Experiment, sites: int) -> Release | None:
    """What all evaluations together may cost a test row; None where no noise covers them.

    As much as training may cost the others, for no training reads a test row.
    """
    counting, privacy = tally(experiment, sites), experiment.privacy
    if counting is None or privacy is None or experiment.evaluation is None:
        return None
    if not experiment.evaluation.protected:
        return None
    cohort = _cohort(experiment, sites)
    shares = 1 if cohort is None else cohort.shares(Observer.OTHERS)
    times = evaluations(experiment) + min(1, privacy.spare_rounds)
    sums = (counting.sensitivity, counting.dimension)
    return _evaluated(sums, shares, times, privacy.epsilon, privacy.delta)


@lru_cache(maxsize=64)
def _evaluated(
    sums: tuple[float, int], shares: int, times: int, epsilon: float, delta: float
) -> Release:
    [event] = Statistics.calibrate((sums,), shares, epsilon, delta, times).stages
    return Release(Task("evaluate").release, event, times, held_out=True)


def releases(experiment: Experiment, sites: int, plan: Plan | None) -> tuple[Release, ...]:
    """Everything that a site is charged for besides rounds of training."""
    found = []
    if plan is not None and plan.statistics is not None:
        times = plan.statistics.times
        found = [
            Release(Task("fit", stage).release, event, times, held_out=False)
            for stage, event in enumerate(plan.statistics.stages)
        ]
    tested = evaluation_release(experiment, sites)
    return (*found, tested) if tested is not None else tuple(found)


def sum_encoding(experiment: Experiment, cohort: int) -> Integers:
    """How a vector of integers that is no update becomes slots: one integer a slot."""
    slot_bits = PROTOCOLS[experiment.protocol.name].slot_bits(cohort)
    return Integers(slot_bits, 1.0, cohort, slot_bits)


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


def check_length(experiment: Experiment, cohort: int, plan: Plan | None, parameters: int) -> None:
    """ConfigurationError unless the protocol carries the updates of a model of this size."""
    chosen = encoding(experiment, cohort, plan)
    if experiment.protocol.name == "ckks":
        try:
            ckks_sum.parameters(chosen, clipping.upload_length(experiment, parameters))
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


def binding(
    experiment: Experiment,
    state: GlobalState | Standing | None,
    encoding: Encoding,
    task: Task = TRAIN,
) -> bytes:
    """SHA-256 over the experiment, weights and pruning mask, encoding and task (32 bytes)."""
    model = state.digest() if state is not None else b""
    return digest("binding", experiment.digest(), model, repr(encoding).encode(), task.digest())


def reproducible_randomness(seed: int, *context: str | int) -> Randomness:
    """The draws of a run that is seeded for tests and therefore not private."""
    material = hashlib.sha256(b"not private" + seed.to_bytes(8, "big")).digest()
    return Keystream(Seed(material), "not private", repr(context).encode()).bytes
