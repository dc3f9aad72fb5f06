"""decryption-failures: none inside the proof's bound, some beyond it."""

import msgspec
import pytest

from attacks import decryption_failures
from attacks.attack import Profile
from attacks.decryption_failures import ATTACK, Chosen, _world
from attacks.view import AnyView, Given
from protocols.bfv import Parameters, largest_plain_bits
from securefl.config import Encryption, Experiment


def tried(trial, seed=0):
    found = decryption_failures.adversary(trial.view, Given(), seed, lambda _: None)
    return found, decryption_failures.score(found, None, seed)


def test_beyond_the_bound_honest_sums_fail():
    found, told = tried(ATTACK.undefended(0, Profile.quick))
    assert found.honest_failures > 0
    assert found.pushed_failures > 0
    assert told.succeeded
    assert told.p == 0


@pytest.mark.parametrize(("bits", "sites"), [(47, 2), (40, 4), (36, 5), (44, 16)])
def test_what_the_constructor_admits_decrypts_at_its_worst(bits, sites):
    honest = Parameters(bits, sites)
    chosen = Chosen(bits, sites, honest.upload_cut, honest.sum_cut)
    found, told = tried(_world(chosen, Profile.quick))
    assert (found.honest_failures, found.pushed_failures) == (0, 0)
    assert (found.honest, found.pushed) == (8192, 8192)
    assert told.results[0].interval.high < 4 / found.honest  # the rule of three, two-sided
    assert not told.succeeded


def test_one_bit_more_cut_than_the_proof_admits_shows():
    honest = Parameters(36, 5)
    chosen = Chosen(36, 5, honest.upload_cut + 1, honest.sum_cut)
    found, told = tried(_world(chosen, Profile.quick))
    assert found.pushed_failures > 0
    assert told.succeeded


def test_the_worlds_stand_on_both_sides_of_the_bound():
    with pytest.raises(ValueError, match="could fail to decrypt"):
        Parameters(ATTACK.undefended(0, Profile.quick).view.public.shape[0], 64)
    assert ATTACK.no_signal(0, Profile.quick).view.public.shape[0] == largest_plain_bits(64)


def test_what_is_said_of_a_choice_is_what_parameters_say():
    honest = Parameters(40, 4)
    chosen = Chosen(40, 4, honest.upload_cut, honest.sum_cut)
    for slots in (1, 2047, 2048, 5000):
        assert chosen.upload_bytes(slots) == honest.upload_bytes(slots)
        assert chosen.sum_bytes(slots, 3) == honest.sum_bytes(slots, 3)
    assert chosen.block_bytes == honest.block_bytes


def test_view_and_guess_travel_as_bytes():
    trial = _world(Chosen(40, 4, 0, 0), Profile.quick)
    view = msgspec.msgpack.decode(msgspec.msgpack.encode(trial.view), type=AnyView)
    found = decryption_failures.adversary(view, Given(), 0, lambda _: None)
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ATTACK.guess)
    assert (found.honest, found.honest_failures) == (8192, 0)


@pytest.mark.parametrize("protocol", ["plain", "bfv", "secagg", "masked-bfv"])
def test_it_is_claimed_where_bfv_is_used_and_proved_there(protocol):
    claim = ATTACK.claim(Experiment(protocol=Encryption(name=protocol)))
    assert claim.made == (claim.argument is not None) == (protocol in ("bfv", "masked-bfv"))
