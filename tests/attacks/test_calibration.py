"""Over clean runs an alarm at 0.01 comes no more often than that."""

import pytest
from scipy.stats import binom

from attacks import mask_reuse, readable, shared_key
from attacks.mask_reuse import _trial
from attacks.rehearsal import gaussian_updates, rehearse
from attacks.view import Given

RUNS = 200


def p_of(attack, trial):
    found = attack.adversary(trial.view, Given(), 0, lambda _: None)
    return attack.score(found, trial.truth, 0).p


@pytest.fixture(scope="module")
def clean():
    """p of readable and of mask-reuse in every run."""
    told = {readable: [], mask_reuse: []}
    for seed in range(RUNS):
        trial = _trial(rehearse("secagg", gaussian_updates(seed, 1, 3, 40), seed), leaked=False)
        for attack, found in told.items():
            found.append(p_of(attack.ATTACK, trial))
    return told


@pytest.mark.parametrize("attack", [readable, mask_reuse])
def test_false_alarms_at_one_percent_are_at_most_one_percent(clean, attack):
    alarms = sum(p <= 0.01 for p in clean[attack])
    assert alarms <= binom.ppf(0.999, RUNS, 0.01)


@pytest.mark.parametrize("attack", [readable, mask_reuse])
def test_p_is_not_1_throughout(clean, attack):
    # A test that never comes near an alarm would find nothing either.
    assert sum(p < 0.5 for p in clean[attack]) > RUNS / 10


def test_the_signs_under_a_leaked_key_alarm_no_more_often():
    found = []
    for seed in range(40):
        made = rehearse("masked-bfv", gaussian_updates(seed, 1, 3, 40), seed)
        view = made.colluding(("site-1",))
        others = [item for site, item in made.recordings.items() if site != "site-1"]
        trial = type(_trial(made, True))(view, shared_key.contributions(view, others))
        found.append(p_of(shared_key.ATTACK, trial))
    assert sum(p <= 0.01 for p in found) <= binom.ppf(0.999, 40, 0.01)
    assert 0.2 < sum(p <= 0.5 for p in found) / 40 < 0.75
