"""plain: the oracle. Its aggregate is the plain integer mean over whoever answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import plain
from protocols.encoding import FixedPoint
from protocols.errors import RoundAbortedError


@given(st.integers(2, 8), st.data())
def test_any_dropouts_give_the_exact_mean_of_the_others_or_an_abort(
    small: Callable[..., Any], count: int, data: st.DataObject
) -> None:
    """Every set of silent sites: exact over the rest, RoundAbortedError below the minimum."""
    sites = "abcdefgh"[:count]
    minimum = data.draw(st.integers(2, count))
    silent = data.draw(st.sets(st.sampled_from(sites)))
    left = tuple(site for site in sites if site not in silent)
    game = small("plain", sites, minimum=minimum)
    if len(left) < minimum:
        with pytest.raises(RoundAbortedError):
            game.play(vanish=dict.fromkeys(silent, "upload"))
    else:
        outcome = game.play(vanish=dict.fromkeys(silent, "upload"))
        assert set(outcome.faults) == silent
        game.assert_right(outcome, left)


def test_the_mean_is_near_the_floating_point_mean() -> None:
    """The oracle itself against numpy: within one rounding step a site."""
    encoding = FixedPoint(bits=16, clip=2.0, cohort=5, slot_bits=plain.slot_bits(5))
    vectors = {s: np.random.default_rng(ord(s)).uniform(-2, 2, 1000) for s in "abcde"}
    result = plain.run(vectors, encoding)
    assert result.contributors == tuple("abcde")
    truth = np.mean(list(vectors.values()), axis=0)
    assert np.abs(result.mean - truth).max() < encoding.clip / encoding.levels


def test_weighted_run_is_near_the_weighted_mean() -> None:
    """run() with public weights, and with a site gone, against numpy's average."""
    encoding = FixedPoint(16, 1.0, 3, plain.slot_bits(3), weight_cap=50)
    weights = {"a": 50, "b": 20, "c": 30}
    vectors = {s: np.random.default_rng(ord(s)).uniform(-1, 1, 100) for s in "abc"}
    result = plain.run(vectors, encoding, weights, dropouts={"c": "upload"})
    assert result.contributors == ("a", "b")
    assert result.total_weight == 70
    truth = np.average([vectors["a"], vectors["b"]], axis=0, weights=[50, 20])
    assert np.abs(result.mean - truth).max() < 2 * encoding.clip * 50 / (encoding.levels * 70)


def test_a_client_that_has_uploaded_uploads_no_more(small: Callable[..., Any]) -> None:
    """A noised vector enters one upload only: the state after it accepts nothing."""
    game = small("plain")
    message = game.requests.messages["a"]
    game.answer("a", "upload", message)
    with pytest.raises(Exception, match="does not come now"):
        game.answer("a", "upload", message)
