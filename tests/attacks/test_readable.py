"""readable: plain is read, and nothing else is."""

import msgspec
import numpy as np
import pytest

from attacks import readable
from attacks.attack import Profile
from attacks.readable import ATTACK, Counted, Reading, rehearsed
from attacks.view import AnyView, Given
from securefl.config import Encryption, Experiment


def tried(trial, seed=0):
    found = readable.adversary(trial.view, Given(), seed, lambda _: None)
    return found, readable.score(found, trial.truth, seed)


def test_plain_is_read_to_the_last_integer():
    trial = ATTACK.undefended(0, Profile.quick)
    found, told = tried(trial)
    assert told.succeeded
    assert told.p == 0
    assert told.results[0].value == pytest.approx(1.0)
    for item in found.read:
        true = trial.truth.of(item.site, item.number)
        expected = trial.truth.encoding.unpack(true[1:], trial.truth.length)
        np.testing.assert_array_equal(item.values.numpy(), expected)


@pytest.mark.parametrize("protocol", ["bfv", "secagg", "masked-bfv"])
def test_of_other_protocols_nothing_is_read(protocol):
    found, told = tried(rehearsed(protocol, 0, Profile.full))
    assert not told.succeeded
    assert abs(told.results[0].value) < 0.05
    assert {item.what for item in found.counted} >= {
        "signs like the aggregate's",
        "bits that are 1",
        "bits that differ from the last",
    }
    assert all(item.n > 1000 for item in found.counted)


def test_without_the_truth_what_is_read_is_compared_with_the_aggregate():
    trial = rehearsed("plain", 0, Profile.quick)
    found = readable.adversary(trial.view, Given(), 0, lambda _: None)
    told = readable.score(found, type(trial.truth)(trial.truth.encoding, trial.truth.length, ()), 0)
    assert told.results[0].metric.endswith("aggregate")
    assert told.results[0].value == pytest.approx(0.5, abs=0.1)  # 1 / sqrt(4 sites)


@pytest.mark.parametrize(("seen", "n"), [(5300, 10_000), (4700, 10_000)])
def test_a_lack_of_balance_either_way_shows(seen, n):
    trial = rehearsed("secagg", 0, Profile.quick)
    told = readable.score(Reading((), (Counted("bits", seen, n),), 0.0, ()), trial.truth, 0)
    assert told.succeeded


def test_uploads_of_different_lengths_are_an_alarm():
    trial = rehearsed("secagg", 0, Profile.quick)
    quiet = (Counted("bits", 5000, 10_000),)
    assert readable.score(Reading((), quiet, 0.0, ()), trial.truth, 0).p == 1
    assert readable.score(Reading((), quiet, 0.0, ("site-2 sent 7 bytes",)), trial.truth, 0).p == 0


def test_view_and_guess_travel_as_bytes():
    trial = ATTACK.undefended(0, Profile.quick)
    view = msgspec.msgpack.decode(msgspec.msgpack.encode(trial.view), type=AnyView)
    found = readable.adversary(view, Given(), 0, lambda _: None)
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ATTACK.guess)
    assert readable.score(found, trial.truth, 0).succeeded


@pytest.mark.parametrize("protocol", ["plain", "bfv", "secagg", "masked-bfv"])
def test_it_is_claimed_of_every_protocol_but_plain(protocol):
    claim = ATTACK.claim(Experiment(protocol=Encryption(name=protocol)))
    assert claim.made == (protocol != "plain")
