"""The clip finds a quantile of the norms, from noised counts alone, and is the same everywhere."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocols.keystream import Keystream, Seed
from protocols.noise import DiscreteGaussian
from securefl import config
from securefl.config import Experiment, Privacy, SitePrivacy
from securefl.privacy import clipping, integers
from securefl.privacy.plan import Cohort, RecordDistributed, RecordLocal, SiteDistributed
from securefl.state import GlobalState

COHORT = Cohort(sites=5, minimum=4, tolerated=1)
RECORD = {"epsilon": 5.0, "delta": 1e-3, "rate": 0.2, "expected_batch": 400}


def stream(name: str) -> Keystream:
    return Keystream(Seed(name.encode().ljust(32, b"\0")), "tests")


# --- how the clip moves --------------------------------------------------------------------------


@given(
    st.floats(clipping.LEAST, clipping.MOST),
    st.floats(-1e300, 1e300),
    st.floats(0.01, 0.99),
    st.floats(1e-6, 1.0),
)
def test_a_step_follows_the_formula_and_stays_in_range_whatever_the_noise(
    scale, share, quantile, rate
):
    after = clipping.moved(scale, share, quantile, rate)
    assert clipping.LEAST <= after <= clipping.MOST
    difference = max(-1.0, min(1.0, share - quantile))
    free = scale * math.exp(-rate * difference)
    assert after == pytest.approx(min(max(free, clipping.LEAST), clipping.MOST), rel=1e-12)
    if share > quantile:
        assert after <= scale  # more are within the clip than should be
    if share < quantile:
        assert after >= scale


def test_the_clip_has_the_same_bits_everywhere():
    """A vector: exponentials of libm differ by the last bit from one machine to the next."""
    scale, seen = 1.0, []
    for share in (0.9, 0.31, -0.2, 1.7, 0.5001):
        scale = clipping.moved(scale, share, 0.5, 0.2)
        seen.append(scale.hex())
    assert seen == [
        "0x1.d8a2b4ac44685p-1",
        "0x1.eaf0fad95cefdp-1",
        "0x1.1a5bc4e2bf018p+0",
        "0x1.ce59e3af7a8e7p-1",
        "0x1.ce5785adbc04ep-1",
    ]


def test_without_a_quantile_nothing_is_read_and_nothing_moves():
    mean = np.arange(5.0)
    for privacy in (None, Privacy(**RECORD)):
        experiment = Experiment(privacy=privacy)
        update, scale = clipping.opened(experiment, mean, 1.0)
        assert update is mean
        assert scale == 1.0
        assert clipping.upload_length(experiment, 5) == 5


# --- it converges --------------------------------------------------------------------------------


def adaptive(noise: str, clip: float, quantile: float) -> Experiment:
    privacy = Privacy(**RECORD, noise=noise, clip=clip, clip_quantile=quantile)
    return Experiment(privacy=privacy, protocol={"clip": 0.5})


def site(clip: float, quantile: float) -> Experiment:
    privacy = SitePrivacy(unit="site", epsilon=20.0, delta=1e-3, clip=clip, clip_quantile=quantile)
    return Experiment(privacy=privacy)


def norms(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-normal about 1: its quantiles are known."""
    return rng.lognormal(0.0, 0.7, count)


def rows(rng: np.random.Generator, count: int) -> torch.Tensor:
    directions = rng.normal(size=(count, 6))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    return torch.tensor(directions * norms(rng, count)[:, None])


def settled(experiment: Experiment, opened, rounds: int = 180) -> float:
    """The geometric mean of the clip after it has had time to settle.

    opened(clip, number): the mean that the round's protocol would open under that clip.
    """
    assert experiment.privacy is not None
    state = GlobalState(0, np.zeros(6, np.float32), np.ones(6, np.bool_))
    past = []
    for number in range(rounds):
        clip = experiment.privacy.clip * state.clip_scale
        past.append(math.log(clip))
        _, scale = clipping.opened(experiment, opened(clip, number), state.clip_scale)
        state = dataclasses.replace(state, clip_scale=scale)
    return math.exp(np.mean(past[-40:]))


@cache
def plans() -> tuple[RecordLocal, RecordDistributed]:
    """For 130 rounds: any of the experiments' but for the clip."""
    privacy = Privacy(**RECORD, clip_quantile=0.5)
    local = RecordLocal.calibrate(privacy, 130, 1, 6)
    return local, RecordDistributed.calibrate(privacy, 130, COHORT, 6)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_the_clip_finds_the_quantile_of_the_gradients_norms_from_far_off(noise, start, quantile):
    """From a hundredth and a hundredfold, with Poisson batches and the plan's noise."""
    experiment = adaptive(noise, start, quantile)
    privacy = experiment.privacy
    assert isinstance(privacy, Privacy)
    rng = np.random.default_rng(round(1000 * quantile + start))
    local, plan = (dataclasses.replace(made, clip=start) for made in plans())
    sampling = stream(f"{noise} {start} {quantile}")

    def opened(clip: float, number: int) -> np.ndarray:
        batch = rows(rng, rng.poisson(400))
        if noise == "local":
            fine = integers.clipped_sum([batch], clip, local.units, local.count)
            told = integers.hardened(fine, local.deviation, sampling)[-1] / (2 * local.count * 400)
            return np.append(np.zeros(6), clipping.uploaded(experiment, np.float32([told])))
        fine = integers.clipped_sum([batch], clip, plan.units, plan.count)
        total = integers.dithered(fine, sampling)
        for _ in range(5):
            total = total + DiscreteGaussian(plan.deviation).sample(sampling, 7)
        return total * plan.grid / 400

    expected = np.quantile(norms(np.random.default_rng(0), 200_000), quantile)
    assert settled(experiment, opened) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_clip_finds_the_quantile_of_the_updates_norms(start):
    experiment = site(start, 0.5)
    cohort = Cohort(60, 60, 1)
    plan = SiteDistributed.calibrate(200.0, 1e-3, start, 100, cohort, 6, counted=True)
    rng, sampling = np.random.default_rng(5), stream("sites")

    def opened(clip: float, number: int) -> np.ndarray:
        total = np.zeros(7, np.int64)
        for row in rows(rng, 60):
            fine = integers.clipped_sum([row[None]], clip, plan.units, plan.count)
            rounded = integers.conditionally_rounded(fine, plan.sensitivity, sampling)
            total += rounded + DiscreteGaussian(plan.deviation).sample(sampling, 7)
        return total * plan.grid / 60

    assert settled(experiment, opened, 100) == pytest.approx(1.0, rel=0.15)


# --- what a round is told ------------------------------------------------------------------------


@pytest.mark.parametrize("within", [0, 100, 250, 400])
def test_the_share_that_is_read_is_the_share_that_was_within_the_clip(within):
    """Of an expected batch; a quarter of a batch beyond moves it as a quarter."""
    for noise, clip in (("distributed", 3.0), ("local", 0.2)):
        experiment = adaptive(noise, clip, 0.25)
        privacy = experiment.privacy
        assert isinstance(privacy, Privacy)
        plan = dataclasses.replace(plans()[1], clip=clip)
        batch = torch.zeros(400, 6, dtype=torch.float64)
        batch[within:, 0] = 10 * clip
        fine = integers.clipped_sum([batch], clip, plan.units, plan.count)
        assert fine[-1] == plan.count * (2 * within - 400)
        mean = fine / (1 << integers.FINE_BITS) * plan.grid / 400
        if noise == "local":
            excess = np.float32([fine[-1] / (2 * plan.count * 400)])
            mean = np.append(mean[:-1], clipping.uploaded(experiment, excess))
        update, scale = clipping.opened(experiment, mean, 1.0)
        assert scale == pytest.approx(math.exp(-0.2 * (within / 400 - 0.25)), rel=1e-6)
        assert len(update) == 6
        assert update[0] == pytest.approx(clip * (400 - within) / 400, rel=1e-4)


def test_under_a_distributed_plan_a_grid_unit_grows_with_the_clip():
    """Integers never change their range: what they stand for does."""
    mean = np.array([1.0, -2.0, 0.0])
    update, scale = clipping.opened(adaptive("distributed", 3.0, 0.5), mean, 8.0)
    assert update.tolist() == [8.0, -16.0]
    assert scale == 8.0
    update, scale = clipping.opened(adaptive("local", 3.0, 0.5), mean, 8.0)
    assert update.tolist() == [1.0, -2.0]
    assert scale == 8.0


def test_a_quantile_is_between_nothing_and_everything():
    for bad in (0, 1, -0.5, "median"):
        for privacy in (RECORD, {"unit": "site", "epsilon": 5.0, "delta": 1e-3}):
            with pytest.raises(config.ConfigurationError, match="clip_quantile"):
                config.parse(
                    "", [f"privacy.{k}={v}" for k, v in {**privacy, "clip_quantile": bad}.items()]
                )
