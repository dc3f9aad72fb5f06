"""A server that has a sum of its own making opened, live, against the sites' own steps."""

from __future__ import annotations

import pytest

from attacks import forged_sum
from attacks.attack import Profile, UnavailableError
from attacks.case import Case
from securefl import config
from securefl.runs import run


def tried(trial):
    forged_sum.ATTACK.check(trial.view, trial.given)
    guess = forged_sum.adversary(trial.view, trial.given, 1, lambda _: None)
    return forged_sum.score(guess, trial.truth, 1)


@pytest.mark.parametrize("protocol", ["bfv", "ckks"])
def test_under_one_key_for_all_an_opener_gives_a_single_update_away(protocol):
    found = tried(forged_sum._world(protocol, 7, other=False))
    assert found.succeeded
    assert found.p == 0.0
    assert found.results[0].value == 1.0


def test_under_masked_bfv_an_opener_that_is_asked_gives_nothing_of_one_site():
    found = tried(forged_sum._world("masked-bfv", 7, other=False))
    assert not found.succeeded
    assert found.results[0].value < 0.05
    assert found.results[1].value >= 1  # openers were asked


def test_its_two_worlds():
    assert tried(forged_sum.undefended(3, Profile.quick)).succeeded
    assert not tried(forged_sum.no_signal(3, Profile.quick)).succeeded


def test_it_is_claimed_of_masked_bfv_alone_and_needs_an_opener(recorded, small_run, tmp_path):
    assert not forged_sum.claim(recorded.experiment).made
    with pytest.raises(UnavailableError, match="no site opens a sum"):
        forged_sum.trial(recorded)
    hidden = ["protocol.name=masked-bfv", "protocol.reveal=sites", "rounds=1"]
    done = run(config.parse(small_run, hidden), tmp_path / "run", report=False)
    case = Case.open(done.directory)
    assert forged_sum.claim(case.experiment).made
    with pytest.raises(UnavailableError, match="sites keep the sums"):
        forged_sum.trial(case)
