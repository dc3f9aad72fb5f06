"""ckks-key: what it must find, what it must not, and what each mitigation does."""

import numpy as np
import pytest

from attacks import ckks_key
from attacks.attack import Profile, guess
from attacks.ckks_key import ATTACK, DEGREE, MITIGATIONS, World, verdict
from attacks.view import Given
from securefl.config import Encryption, Experiment

BY_NAME = {item.name: item for item in MITIGATIONS}


def tried(world, seed=0):
    found = ckks_key.adversary(world.view, Given(), seed, lambda _: None)
    return ckks_key.score(found, world.truth, seed)


@pytest.mark.parametrize("seed", range(3))
def test_tenseal_as_users_run_it_gives_its_key_away_and_every_upload_with_it(seed):
    world = ATTACK.undefended(seed, Profile.quick)
    told = tried(world)
    assert told.succeeded
    assert told.p == 0
    error = next(item for item in told.results if item.metric.startswith("largest error"))
    assert error.n == 6  # every upload of three sites in two rounds
    assert error.value < 1e-6 < error.baseline


def test_random_numbers_in_the_place_of_a_decryption_give_nothing():
    told = tried(ATTACK.no_signal(0, Profile.quick))
    assert not told.succeeded
    assert told.p == 1


def test_the_adversary_finds_the_key_from_the_bytes_of_its_view_alone():
    world = ATTACK.undefended(7, Profile.quick)
    [found] = guess(ATTACK, [world], 0)
    assert (found.key.numpy() == world.truth.key).all()
    assert found.key.shape == (DEGREE,)


def test_another_key_than_the_true_one_is_not_taken_for_it():
    world, other = ATTACK.undefended(0, Profile.quick), ATTACK.undefended(1, Profile.quick)
    found = ckks_key.adversary(other.view, Given(), 0, lambda _: None)
    assert not ckks_key.score(found, world.truth, 0).succeeded


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("none: SEAL's complex decoding of one block", "broken"),
        ("one decrypt() of one block, ever", "this attack fails"),
        ("float32, updates of 1e-5", "broken"),
        ("float32, updates of 1e-5 but 16 of 1e-3", "broken"),
        ("float32, updates of 1e-2", "this attack fails"),
        ("11 decimals", "broken"),
        ("4 decimals", "this attack fails"),
        ("updates of 4095 numbers, all of them", "broken"),
        ("the first 4095 of 4096 slots", "broken"),
        ("the first 4094 of 4096 slots", "broken"),
        ("the first 2048 of 4096 slots", "this attack fails"),
        ("float32, the server makes two ciphertexts", "broken"),
        ("2 decimals, the server makes two ciphertexts", "broken"),
        ("noise flooding at 30 bits", "proved"),
    ],
)
def test_each_mitigation_has_the_verdict_that_was_shown(name, outcome):
    told = verdict(BY_NAME[name], seed=0, keys=1)
    assert told.outcome == outcome, told.shown
    assert (told.found > 0) == (outcome == "broken")


def test_proved_is_said_only_with_a_theorem():
    for item in MITIGATIONS:
        assert (item.argument is not None) == item.name.startswith("noise flooding")


def test_more_rounds_under_one_key_make_float32_weaker():
    # A block whose integers happen to be sure is enough, and there are sixteen to choose from.
    few = World(released=ckks_key._float32, magnitude=1.25e-4, rounds=2)
    many = World(released=ckks_key._float32, magnitude=1.25e-4, rounds=16)
    found = [sum(tried(w.trial(seed)).succeeded for seed in range(2)) for w in (few, many)]
    assert found[1] >= found[0]
    assert found[1] > 0


def test_numbers_say_by_themselves_how_they_were_rounded():
    values = np.random.default_rng(0).normal(0, 0.01, 4096)
    assert not ckks_key.widths(values, 1.0, 1.0).any()
    rounded = ckks_key.widths(np.round(values, 4), 1.0, 1.0)
    np.testing.assert_allclose(rounded, 1e-4 / np.sqrt(12))
    cast = ckks_key.widths(values.astype(np.float32).astype(np.float64), 1.0, 1.0)
    assert (np.abs(values.astype(np.float32) - values) <= cast * np.sqrt(3) * 1.0001).all()
    values[7] = np.nan
    assert np.flatnonzero(ckks_key.widths(values, 5.0, 1.0)).tolist() == [7]


@pytest.mark.parametrize("protocol", ["plain", "bfv", "secagg", "masked-bfv"])
def test_of_exact_protocols_nothing_is_claimed(protocol):
    claim = ATTACK.claim(Experiment(protocol=Encryption(name=protocol)))
    assert not claim.made
    assert claim.argument is None
