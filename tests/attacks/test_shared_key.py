"""shared-key: one leaked HE key against each protocol."""

import msgspec
import numpy as np
import pytest

from attacks import shared_key
from attacks.attack import Profile, UnavailableError
from attacks.rehearsal import gaussian_updates, rehearse
from attacks.shared_key import ATTACK, rehearsed
from attacks.view import AnyView, Given
from securefl.config import Encryption, Experiment


def tried(trial, seed=0):
    found = shared_key.adversary(trial.view, Given(), seed, lambda _: None)
    return found, shared_key.score(found, trial.truth, seed)


@pytest.mark.parametrize("colluder", ["site-1", "site-3"])
def test_under_bfv_one_site_with_the_server_opens_every_update_bit_for_bit(colluder):
    # site-1 makes the seed of the round itself; site-3 gets it sealed.
    made = rehearse("bfv", gaussian_updates(3, 2, 4, 50), 3)
    view = made.colluding((colluder,))
    others = [item for site, item in made.recordings.items() if site != colluder]
    found = shared_key.adversary(view, Given(), 0, lambda _: None)
    told = shared_key.score(found, shared_key.contributions(view, others), 0)
    assert told.succeeded
    assert told.p == 0
    assert (told.results[0].value, told.results[0].n) == (1.0, 6)
    assert told.results[1].value == pytest.approx(1.0)


def test_under_masked_bfv_the_key_is_found_and_opens_nothing_of_an_update():
    found, told = tried(rehearsed("masked-bfv", 0, Profile.full))
    assert found.keys == 5
    assert len(found.opened) == 15
    assert told.results[0].value == 0
    assert abs(told.results[1].value) < 0.05
    assert not told.succeeded


def test_under_masked_bfv_the_opened_vectors_add_up_to_the_sum_and_the_masks():
    # The key is the right one: what it opens are the masked vectors, not noise of a wrong key.
    made = rehearse("masked-bfv", gaussian_updates(3, 1, 3, 50), 3)
    view = made.colluding(("site-1",))
    [training] = shared_key.trainings(view.public, view.crossings)
    [recording] = view.recordings
    seed = shared_key.leaked_seed(training.begin, recording, view.crossings)
    parts = shared_key.uploads(view.crossings, 1)
    opened = {
        s: shared_key.opened("masked-bfv", seed, training, x.payload) for s, x in parts.items()
    }
    from attacks.mask_reuse import _unmasked

    bare = _unmasked(made.view, training, opened)  # as seen without a friend: pairs cancel
    total = np.sum(list(bare.values()), axis=0, dtype=np.uint64)
    expected = np.sum(
        [item.contributed[0].slots.numpy() for item in made.recordings.values()],
        axis=0,
        dtype=np.uint64,
    )
    modulus = np.uint64((1 << training.encoding.plain_bits) - 1)
    np.testing.assert_array_equal(total & modulus, expected & modulus)


def test_a_key_of_another_round_opens_nothing():
    found, told = tried(ATTACK.no_signal(1, Profile.quick))
    assert found.keys == 2
    assert told.results[0].value == 0
    assert not told.succeeded


def test_without_what_a_site_drew_there_is_no_key():
    trial = rehearsed("bfv", 0, Profile.quick)
    other = rehearsed("bfv", 1, Profile.quick)
    view = type(trial.view)(
        trial.view.public, trial.view.keys, trial.view.crossings, other.view.recordings, True
    )
    found = shared_key.adversary(view, Given(), 0, lambda _: None)
    assert found.keys == 0
    assert found.opened == ()


def test_view_and_guess_travel_as_bytes():
    trial = ATTACK.undefended(0, Profile.quick)
    view = msgspec.msgpack.decode(msgspec.msgpack.encode(trial.view), type=AnyView)
    found = shared_key.adversary(view, Given(), 0, lambda _: None)
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ATTACK.guess)
    assert shared_key.score(found, trial.truth, 0).results[0].value == 1


def test_it_is_claimed_of_masked_bfv_alone():
    made = {
        name: ATTACK.claim(Experiment(protocol=Encryption(name=name))).made
        for name in ("plain", "bfv", "secagg", "masked-bfv")
    }
    assert made == {"plain": False, "bfv": False, "secagg": False, "masked-bfv": True}


def test_fields_of_a_slot_are_those_that_were_packed():
    made = rehearse("plain", gaussian_updates(0, 1, 3, 20), 0)
    [training] = shared_key.trainings(made.view.public, made.view.crossings)
    slots = made.recordings["site-1"].contributed[0].slots.numpy()
    found = shared_key.fields(training.encoding, slots)[: training.length]
    expected = training.encoding.unpack(slots[1:], training.length)
    np.testing.assert_array_equal(found, expected)


def test_where_nothing_was_trained_there_is_nothing_to_try():
    trial = rehearsed("bfv", 0, Profile.quick)
    with pytest.raises(UnavailableError, match="no round of training"):
        shared_key.contributions(type(trial.view)(trial.view.public, (), (), (), True), [])
