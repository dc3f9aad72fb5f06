"""Rehearsed rounds are rounds of the real protocol."""

import numpy as np
import pytest

from attacks.rehearsal import gaussian_updates, rehearse
from protocols.encoding import FixedPoint
from securefl import agreement

PROTOCOLS = ["plain", "bfv", "secagg", "masked-bfv"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_server_reads_the_mean_of_the_updates_and_no_more_sites(protocol):
    updates = gaussian_updates(0, rounds=2, sites=4, length=30)
    made = rehearse(protocol, updates, seed=1)
    rounds = list(made.view.rounds())
    assert [item.number for item in rounds] == [1, 2]
    for item, vectors in zip(rounds, updates, strict=True):
        mean = np.mean(list(vectors.values()), axis=0)
        np.testing.assert_allclose(item.update, mean, atol=1e-4)
        assert item.aggregate.contributors == ("site-1", "site-2", "site-3", "site-4")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_sites_recorded_adds_up_to_the_opened_sum(protocol):
    made = rehearse(protocol, gaussian_updates(0, rounds=1, sites=3, length=30), seed=1)
    experiment = made.view.public.parsed()
    encoding = agreement.encoding(experiment, 3, None)
    assert isinstance(encoding, FixedPoint)
    slots = [item.contributed[0].slots.numpy() for item in made.recordings.values()]
    total = np.sum(slots, axis=0, dtype=np.uint64) & np.uint64((1 << encoding.plain_bits) - 1)
    [only] = made.view.rounds()
    mean = encoding.decode(total, 30, only.aggregate.contributors).mean
    np.testing.assert_array_equal(mean, only.aggregate.mean)


def test_the_same_seed_gives_the_same_masks_and_another_gives_others():
    updates = gaussian_updates(0, rounds=1, sites=3, length=10)
    views = [rehearse("secagg", updates, seed).view for seed in (1, 1, 2)]
    assert views[0].crossings == views[1].crossings
    assert views[0].crossings != views[2].crossings


def test_a_site_hands_over_what_is_its_own_alone():
    made = rehearse("bfv", gaussian_updates(0, rounds=1, sites=3, length=10), seed=1)
    view = made.colluding(("site-2",), with_server=False)
    assert {item.site for item in view.crossings} == {"site-2"}
    assert [item.site for item in view.recordings] == ["site-2"]
