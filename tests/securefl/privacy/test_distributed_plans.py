"""Plans whose noise only the sum has: calibrated to what the others do not know."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from protocols.keystream import Keystream, Seed
from protocols.noise import DiscreteGaussian
from securefl.config import ConfigurationError, Privacy
from securefl.privacy import accounting, integers
from securefl.privacy.plan import (
    Cohort,
    Observer,
    RecordDistributed,
    RecordLocal,
    SiteDistributed,
)

COHORT = Cohort(sites=5, minimum=4, tolerated=1)
SMALL = {"epsilon": 1.0, "delta": 1e-3, "rate": 0.2, "expected_batch": 200, "clip": 0.7}


def record(rounds=20, cohort=COHORT, dimension=500, **changes) -> RecordDistributed:
    return RecordDistributed.calibrate(Privacy(**{**SMALL, **changes}), rounds, cohort, dimension)


@pytest.fixture(scope="module")
def plan() -> RecordDistributed:
    return record()


@pytest.fixture(scope="module")
def site_plan() -> SiteDistributed:
    return SiteDistributed.calibrate(8.0, 1e-5, 2.0, 10, Cohort(20, 15, 3), 2000)


# --- record and person ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rounds", "dimension"),
    [
        ({}, 20, 500),
        ({"epsilon": 5.0, "rate": 0.5, "expected_batch": 250}, 30, 14),
        ({"epsilon": 3.0, "delta": 1e-5, "rate": 0.03, "expected_batch": 2000}, 20, 26_000),
        ({"epsilon": 0.5, "rate": 0.1, "expected_batch": 500, "spare_rounds": 0}, 5, 100_000),
        ({"epsilon": 20.0}, 10, 50),
    ],
    ids=str,
)
def test_all_rounds_and_the_spare_ones_fit_and_nothing_is_wasted(changes, rounds, dimension):
    plan = record(rounds, dimension=dimension, **changes)
    total = rounds + changes.get("spare_rounds", 2)
    assert plan.spent(0) == 0
    assert 0.985 * plan.epsilon <= plan.spent(total) <= plan.epsilon
    assert plan.affords(total)
    assert not plan.affords(total + math.ceil(total / 10))
    assert plan.deviation >= 2


def test_distributed_noise_is_hardly_more_than_a_trusted_party_would_add(plan):
    """Within 3 %: 2 % of rounding, and what its proofs charge."""
    central = accounting.noise_multiplier(1.0, 1e-3, 0.2, 22)
    noise = math.sqrt(COHORT.shares(Observer.OTHERS)) * plan.deviation * plan.grid / plan.clip
    assert central <= noise <= 1.03 * central


@pytest.mark.parametrize(
    ("sites", "minimum", "tolerated", "others"),
    [(5, 5, 0, 4), (5, 5, 1, 4), (5, 4, 2, 2), (100, 80, 10, 70), (3, 3, 2, 1)],
)
def test_noise_is_calibrated_to_the_shares_that_no_colluder_knows(
    sites, minimum, tolerated, others
):
    """H = m - max(T, 1): a site knows its own share; the public knows none."""
    cohort = Cohort(sites, minimum, tolerated)
    assert cohort.shares(Observer.OTHERS) == others
    assert cohort.shares(Observer.PUBLIC) == minimum
    plan = record(cohort=cohort, dimension=10)
    assert plan.event(Observer.OTHERS).shares == others
    assert plan.event(Observer.PUBLIC).shares == minimum
    assert plan.spent(22, Observer.PUBLIC) < plan.spent(22) == plan.spent(22, Observer.OTHERS)
    assert plan.spent(22) > 0.97


@pytest.mark.parametrize(
    ("sites", "minimum", "tolerated"), [(5, 6, 1), (5, 1, 0), (5, 2, 2), (5, 3, -1), (1, 1, 0)]
)
def test_a_cohort_that_leaves_no_share_unknown_is_refused(sites, minimum, tolerated):
    with pytest.raises(ConfigurationError, match="use a minimum from"):
        Cohort(sites, minimum, tolerated)


def test_a_round_costs_its_whole_event(plan):
    """Epsilon comes from the plan's own numbers, and every one of them matters."""
    event = plan.event(Observer.OTHERS)
    assert (event.deviation, event.rate) == (plan.deviation, 0.2)
    assert (event.dimension, event.sensitivity) == (500, plan.sensitivity)
    assert event.slip == plan.slip == plan.beta <= 1e-3 / (100 * 22)
    assert plan.sensitivity > plan.units / 2**16
    for change in (
        {"deviation": plan.deviation * 0.95},
        {"rate": 0.21},
        {"units": plan.units * 2},
        {"cohort": Cohort(5, 3, 1)},
        {"cohort": Cohort(5, 4, 2)},
        {"delta": 0.9e-3},
        {"beta": plan.beta * 20},
    ):
        assert dataclasses.replace(plan, **change).spent(22) > plan.spent(22) * 1.001, change


def test_a_person_is_promised_what_a_record_is(plan):
    people = dataclasses.replace(plan, unit="person")
    assert people.spent(7) == plan.spent(7)
    assert people != plan


@pytest.mark.parametrize("wanted", [0.001, 0.01])
def test_an_epsilon_too_small_to_train_is_refused_with_one_that_works(wanted):
    with pytest.raises(ConfigurationError) as caught:
        record(epsilon=wanted, expected_batch=10)
    message = str(caught.value)
    assert "\n" not in message
    found = re.search(r"epsilon >= ([\d.e-]+) is reachable", message)
    assert found is not None, message
    reachable = float(found[1]) * 1.02
    assert record(epsilon=reachable, expected_batch=10).spent(22) <= reachable


def test_plans_do_not_depend_on_how_many_records_there_are():
    """No argument of calibrate, and no field, is a count of records."""
    names = {field.name for field in dataclasses.fields(RecordDistributed)}
    assert not {name for name in names if "record" in name or "size" in name or "len" in name}


def test_a_plan_is_frozen_and_holds_no_impossible_value(plan, site_plan):
    for made in (plan, site_plan):
        with pytest.raises(AttributeError):
            made.deviation = 0.0
        for change in (
            {"deviation": 1.9},
            {"deviation": math.nan},
            {"epsilon": 0.0},
            {"clip": -1.0},
            {"units": 0},
            {"dimension": 0},
        ):
            with pytest.raises(ValueError, match="use"):
                dataclasses.replace(made, **change)


# --- a round as the plan describes it ------------------------------------------------------------


def stream(name: str) -> Keystream:
    return Keystream(Seed(name.encode().ljust(32, b"\0")), "tests")


def test_the_sum_decodes_to_the_clipped_gradients_with_the_stated_noise(plan):
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(40, 500)) for _ in range(5)]
    shares = []
    for i, mine in enumerate(gradients):
        fine = integers.clipped_sum([torch.tensor(mine)], plan.clip, plan.units)
        share = DiscreteGaussian(plan.deviation).sample(stream(f"noise {i}"), 500)
        shares.append(integers.dithered(fine, stream(f"dither {i}")) + share)
    total = sum(shares) * plan.grid
    clipped = [g * np.minimum(1, plan.clip / np.linalg.norm(g, axis=1))[:, None] for g in gradients]
    error = total - np.concatenate(clipped).sum(0)
    noise = math.sqrt(5) * plan.deviation * plan.grid
    assert error.std() == pytest.approx(noise, rel=0.1)
    assert abs(error.mean()) < 5 * noise / math.sqrt(500)
    assert plan.signal_to_noise == pytest.approx(
        200 * plan.clip / (noise * math.sqrt(500)), rel=1e-9
    )


@pytest.mark.parametrize("overflow", [1e-3, 1e-12])
def test_a_field_holds_the_sum_but_for_the_stated_probability(plan, overflow):
    """Against the Gaussian's tail, and one bit fewer would not do for the bound."""
    signal = 3.0
    bits = plan.field_bits(signal, overflow)
    largest = (1 << (bits - 1)) - 1
    noise = plan.deviation * math.sqrt(2 * 5 * math.log(2 / overflow))
    assert signal * plan.units / 2**16 + 5 + noise <= largest
    assert signal * plan.units / 2**16 + 5 + noise > (largest - 1) / 2
    spread = math.sqrt(5) * plan.deviation
    beyond = math.erfc((largest - signal * plan.units / 2**16 - 5) / spread / math.sqrt(2))
    assert beyond <= overflow
    assert plan.field_bits(300.0, overflow) > bits
    with pytest.raises(ValueError, match="overflow"):
        plan.field_bits(1.0, 0.0)


def test_a_coarser_grid_saves_bits_and_costs_noise():
    privacy = Privacy(**SMALL)
    fine = RecordDistributed.calibrate(privacy, 20, COHORT, 50_000, inflation=0.01)
    coarse = RecordDistributed.calibrate(privacy, 20, COHORT, 50_000, inflation=0.5)
    assert coarse.field_bits(1.0, 1e-6) < fine.field_bits(1.0, 1e-6)
    assert coarse.signal_to_noise < fine.signal_to_noise
    assert coarse.spent(22) <= 1.0


# --- site ----------------------------------------------------------------------------------------


def test_a_site_plan_meets_its_epsilon_and_no_more(site_plan):
    assert 0.985 * 8.0 <= site_plan.spent(10) <= 8.0
    assert site_plan.affords(10)
    assert not site_plan.affords(11)
    assert site_plan.spent(10, Observer.PUBLIC) < site_plan.spent(10)
    assert site_plan.event(Observer.OTHERS).shares == 12


def test_a_sites_update_never_exceeds_the_sensitivity_it_is_charged_for(site_plan):
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 1e6):
        row = torch.tensor(rng.normal(size=(1, 2000)) * scale)
        fine = integers.clipped_sum([row], site_plan.clip, site_plan.units)
        rounded = integers.conditionally_rounded(fine, site_plan.sensitivity, stream("site"))
        assert np.square(rounded.astype(object)).sum() <= site_plan.sensitivity**2
        expected = row[0].numpy() * min(1, site_plan.clip / np.linalg.norm(row))
        assert np.abs(rounded * site_plan.grid - expected).max() <= 1.001 * site_plan.grid


def test_a_sites_field_holds_every_site_at_its_clip(site_plan):
    bits = site_plan.field_bits(1e-9)
    noise = site_plan.deviation * math.sqrt(2 * 20 * math.log(2e9))
    assert 20 * site_plan.units / 2**16 + 20 + noise <= (1 << (bits - 1)) - 1
    assert site_plan.signal_to_noise > 0


@pytest.mark.parametrize("overflow", [1e-3, 2.0**-40])
@pytest.mark.parametrize(("sites", "deviation"), [(5, 2.0), (100, 2.0), (100, 300.0)])
def test_a_rotated_field_holds_rotation_rounding_and_noise_together(sites, deviation, overflow):
    """One coordinate is a sum of signs and of Gaussians: against its tail, written out."""
    plan = dataclasses.replace(
        SiteDistributed.calibrate(8.0, 1e-5, 2.0, 10, Cohort(sites, sites, 1), 2000),
        deviation=deviation,
    )
    bits = plan.field_bits(overflow, 1024)
    largest = (1 << (bits - 1)) - 1
    clips, noise = sites * plan.units / 2**16, math.sqrt(sites) * deviation
    spread = math.hypot(clips / math.sqrt(1024), noise)
    reach = spread * math.sqrt(2 * math.log(2 / overflow)) + sites
    assert largest / 2 - 1 < reach * 1.001
    assert reach <= largest
    assert math.erfc((largest - sites) / spread / math.sqrt(2)) <= overflow
    assert bits < plan.field_bits(overflow)
    with pytest.raises(ValueError, match="spread"):
        plan.field_bits(overflow, 0)


def test_a_rotation_that_spreads_over_little_takes_more_bits_than_none(site_plan):
    """Hoeffding's bound says nothing there: the plain bound is the exact one."""
    quiet = dataclasses.replace(site_plan, deviation=2.0)
    assert quiet.field_bits(1e-12, 1) > quiet.field_bits(1e-12)


# --- the count of an adaptive clip ---------------------------------------------------------------


@pytest.fixture(scope="module")
def counting() -> RecordDistributed:
    return record(clip_quantile=0.5)


@pytest.fixture(scope="module")
def counting_site() -> SiteDistributed:
    return SiteDistributed.calibrate(8.0, 1e-5, 2.0, 10, Cohort(20, 15, 3), 2000, counted=True)


def test_the_count_is_a_coordinate_of_the_event_and_part_of_its_sensitivity(
    counting, counting_site
):
    """A record's fine vector is sqrt(units^2 + count^2) long: for that it is charged."""
    for plan, beta, dimension in (
        (counting, counting.beta, 500),
        (counting_site, math.exp(-0.5), 2000),
    ):
        assert plan.count * 8 == plan.units
        event = plan.event(Observer.OTHERS)
        assert event.dimension == plan.coordinates == dimension + 1
        whole = math.sqrt(plan.units**2 + plan.count**2) / 2**16
        assert event.sensitivity == pytest.approx(
            integers.sensitivity(whole, dimension + 1, beta), rel=1e-6
        )
        uncharged = dataclasses.replace(plan, counted=False)
        assert uncharged.sensitivity < plan.sensitivity
        assert uncharged.spent(10) < plan.spent(10) * 0.996
        assert uncharged.count == 0


def test_a_plan_that_counts_meets_its_epsilon_for_less_than_one_percent_more_noise(
    plan, counting, site_plan, counting_site
):
    assert 0.985 <= counting.spent(22) <= 1.0
    assert 0.985 * 8 <= counting_site.spent(10) <= 8.0
    for fixed, counts in ((plan, counting), (site_plan, counting_site)):
        noise, more = (each.deviation * each.grid for each in (fixed, counts))
        assert noise * 1.003 < more < noise * 1.01
        assert counts.signal_to_noise < fixed.signal_to_noise


def test_a_hostile_rows_vector_stays_within_the_charged_sensitivity(counting):
    """Clipped, counted and rounded: the change that one record makes, over many draws of u.

    A row just within the clip and one far beyond it are as long as can be.
    """
    units, count = counting.units, counting.count
    rng = np.random.default_rng(3)
    worst = 0.0
    for size in (0.999999, 1.0, 1.000001, 1e9):
        for kind in ("dense", "one coordinate", "half steps"):
            row = {
                "dense": rng.normal(size=500),
                "one coordinate": np.eye(500)[7],
                "half steps": np.full(500, 1.0),
            }[kind]
            row *= size * counting.clip / np.linalg.norm(row)
            fine = integers.clipped_sum([torch.tensor(row[None])], counting.clip, units, count)
            assert np.square(fine.astype(object)).sum() <= units**2 + count**2
            assert abs(fine[-1]) == count
            others = rng.integers(-(1 << 30), 1 << 30, 501)
            for i in range(20):
                name = f"{size} {kind} {i}"
                before = integers.dithered(others, stream(name))
                after = integers.dithered(others + fine, stream(name))
                worst = max(worst, math.sqrt(np.square((after - before).astype(object)).sum()))
    assert worst <= counting.sensitivity
    # Without the count in it the bound on what is not rounded would not hold.
    assert math.sqrt(units**2 + count**2) > units * 1.007


def test_fields_hold_the_count_of_a_whole_batch():
    """In a wide model a coordinate of the gradients may be planned for less than the count."""
    narrow = record(dimension=200_000, clip_quantile=0.5)
    fixed = record(dimension=200_000)
    signal, overflow = 0.5, 2.0**-40  # half a clip: hardly any gradient there
    assert narrow.field_bits(signal, overflow) > fixed.field_bits(signal, overflow)
    reach = (200 + 4 * math.sqrt(200)) * narrow.count / 2**16
    noise = narrow.deviation * math.sqrt(2 * 5 * math.log(2 / overflow))
    assert reach + noise <= (1 << (narrow.field_bits(signal, overflow) - 1)) - 1
    assert narrow.field_bits(200.0, overflow) == fixed.field_bits(200.0, overflow)


def test_the_stated_error_of_the_share_is_that_of_the_noise(counting, counting_site):
    for plan, sites, batch in ((counting, 5, 200), (counting_site, 20, 20)):
        noise = np.zeros(4000)
        for i in range(sites):
            noise += DiscreteGaussian(plan.deviation).sample(stream(f"share {i}"), 4000)
        share = noise / (plan.count / 2**16) / (2 * batch)
        assert plan.share_error(sites) == pytest.approx(share.std(), rel=0.05)


def test_local_noise_covers_the_count_as_well():
    privacy = Privacy(**{**SMALL, "noise": "local", "clip_quantile": 0.3})
    plan = RecordLocal.calibrate(privacy, 20, 2, 500)
    fixed = RecordLocal.calibrate(Privacy(**{**SMALL, "noise": "local"}), 20, 2, 500)
    whole = math.sqrt(plan.units**2 + plan.count**2)
    assert plan.deviation >= plan.noise_multiplier * whole
    assert plan.deviation == pytest.approx(plan.noise_multiplier * whole, rel=1e-6)
    assert plan.count >= plan.units // 8
    assert fixed.deviation == fixed.noise_multiplier * fixed.units
    assert plan.spent(22) == pytest.approx(fixed.spent(22), rel=1e-3)
    assert plan.spent(22) <= 1.0
    distance = plan.per_round.event.distance
    assert distance == integers.hardening_distance(plan.deviation, 501)
    assert distance > integers.hardening_distance(plan.deviation, 500) > 0
    per_step = plan.deviation / (2 * plan.count * 200)
    assert plan.share_error(5) == pytest.approx(per_step / math.sqrt(10))
