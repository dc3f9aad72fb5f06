"""Pruning reaches its target exactly, takes the smallest first, and never revives a coordinate."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefl.config import Pruning
from securefl.models import Layout
from securefl.pruning import fewest_surviving, prune, target_sparsity

SCOPES = st.sampled_from(["global", "layer"])
SPARSITIES = st.floats(0, 1, exclude_max=True)


@st.composite
def networks(draw):
    """A layout of weights and biases, its weights (ties are common), and a mask so far."""
    shapes = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 4), st.integers(1, 5)), st.tuples(st.integers(1, 4))
            ),
            min_size=1,
            max_size=4,
        )
    )
    layout = Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    weights = draw(st.lists(values, min_size=layout.size, max_size=layout.size))
    return layout, np.array(weights, np.float32), np.ones(layout.size, np.bool_)


@given(networks(), SPARSITIES)
def test_global_pruning_leaves_exactly_the_target_pruned(network, sparsity):
    layout, weights, mask = network
    kept = prune(weights, mask, layout, sparsity, "global")
    pruned = layout.size - int(kept.sum())
    assert pruned == min(math.floor(sparsity * layout.size), layout.size - 1)
    assert mask.all()  # the argument is left as it was


@given(networks(), st.lists(SPARSITIES, min_size=1, max_size=4), SCOPES)
def test_no_coordinate_revives_and_one_always_survives(network, sparsities, scope):
    """Even where the target falls, and with other weights in every round."""
    layout, weights, mask = network
    for number, sparsity in enumerate(sparsities):
        kept = prune(np.roll(weights, number), mask, layout, sparsity, scope)
        assert not (kept & ~mask).any()
        assert kept.any()
        mask = kept


@given(networks(), SPARSITIES, SCOPES)
def test_biases_go_only_once_no_weight_is_left(network, sparsity, scope):
    layout, weights, mask = network
    kept = prune(weights, mask, layout, sparsity, scope)
    if not kept[~layout.prunable].all():
        assert not kept[layout.prunable].any()


@given(networks(), SPARSITIES)
def test_what_survives_is_no_smaller_than_what_went_and_ties_go_by_index(network, sparsity):
    layout, weights, mask = network
    kept = prune(weights, mask, layout, sparsity, "global")
    among = layout.prunable
    index = np.arange(layout.size)
    gone = [(abs(weights[i]), i) for i in index[among & ~kept]]
    left = [(abs(weights[i]), i) for i in index[among & kept]]
    if gone and left:
        assert max(gone) < min(left)


@given(networks(), SPARSITIES)
def test_layer_pruning_takes_the_same_fraction_of_every_tensor(network, sparsity):
    layout, weights, mask = network
    kept = prune(weights, mask, layout, sparsity, "layer")
    count = math.floor(sparsity * layout.size)
    weights_in_all = int(layout.prunable.sum())
    assert layout.size - int(kept.sum()) <= count
    if count < weights_in_all:
        for shape, where in zip(layout.shapes, layout.slices(), strict=True):
            lost = math.prod(shape) - int(kept[where].sum())
            expected = count * math.prod(shape) // weights_in_all if len(shape) == 2 else 0
            assert lost == expected


@given(networks(), SPARSITIES, SCOPES)
def test_pruning_twice_is_pruning_once(network, sparsity, scope):
    layout, weights, mask = network
    once = prune(weights, mask, layout, sparsity, scope)
    assert np.array_equal(prune(weights * once, once, layout, sparsity, scope), once)


@given(networks(), st.floats(0, 1, exclude_min=True, exclude_max=True), SCOPES)
def test_never_fewer_survive_than_what_fields_are_planned_for(network, sparsity, scope):
    layout, weights, mask = network
    left = int(prune(weights, mask, layout, sparsity, scope).sum())
    least = fewest_surviving(Pruning(sparsity=sparsity), layout.size)
    assert 1 <= least <= left
    assert least == left or scope == "layer"
    assert fewest_surviving(None, layout.size) == layout.size


def test_pruned_coordinates_count_towards_the_target():
    layout = Layout(("w",), ((1, 4),))
    weights = np.array([9, 1, 2, 3], np.float32)
    mask = np.array([False, True, True, True])
    assert prune(weights, mask, layout, 0.5, "global").tolist() == [False, False, True, True]


def test_global_pruning_may_empty_a_layer_and_layer_pruning_does_not():
    layout = Layout(("small", "large"), ((1, 2), (1, 2)))
    weights = np.array([0.1, 0.2, 5, 6], np.float32)
    mask = np.ones(4, np.bool_)
    assert prune(weights, mask, layout, 0.5, "global").tolist() == [False, False, True, True]
    assert prune(weights, mask, layout, 0.5, "layer").tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.zeros(3, np.float32)}, "do not fit 4 parameters"),
        ({"mask": np.ones(5, np.bool_)}, "do not fit 4 parameters"),
        ({"mask": np.zeros(4, np.bool_)}, "nothing survived"),
        ({"weights": np.array([0, np.nan, 0, 0], np.float32)}, "weight 1 is nan"),
        ({"sparsity": 1.0}, "sparsity = 1.0"),
        ({"sparsity": -0.1}, "sparsity = -0.1"),
        ({"sparsity": math.nan}, "sparsity = nan"),
    ],
)
def test_what_cannot_be_pruned_is_refused(changes, message):
    arguments = {
        "weights": np.zeros(4, np.float32),
        "mask": np.ones(4, np.bool_),
        "layout": Layout(("w",), ((2, 2),)),
        "sparsity": 0.5,
        "scope": "global",
    }
    with pytest.raises(ValueError, match=message):
        prune(**(arguments | changes))


schedules = st.builds(
    lambda kind, sparsity, first, length: Pruning(
        sparsity=sparsity, schedule=kind, first_round=first, last_round=first + length
    ),
    st.sampled_from(["one-shot", "linear", "cubic"]),
    st.floats(0.01, 0.99),
    st.integers(1, 10),
    st.integers(0, 20),
)


@given(schedules)
def test_a_schedule_rises_from_nothing_to_its_sparsity_and_never_falls(pruning):
    rounds = pruning.last_round + 3
    course = [target_sparsity(pruning, number, rounds) for number in range(1, rounds + 1)]
    assert course == sorted(course)
    assert all(value == 0 for value in course[: pruning.first_round - 1])
    assert course[pruning.last_round - 1 :] == [pruning.sparsity] * 4


def test_the_schedules_follow_their_formulae():
    def course(kind, **keys):
        pruning = Pruning(sparsity=0.8, schedule=kind, **keys)
        return [target_sparsity(pruning, number, 6) for number in range(1, 7)]

    assert course("one-shot", first_round=3) == [0, 0, 0.8, 0.8, 0.8, 0.8]
    assert course("linear", first_round=2) == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8])
    cubic = [0.8 * (1 - (1 - t / 4) ** 3) for t in range(5)]
    assert course("cubic", first_round=2) == pytest.approx([0, *cubic])
    assert course("cubic", first_round=2, last_round=4)[3:] == [0.8, 0.8, 0.8]


def test_rounds_are_counted_from_one():
    with pytest.raises(ValueError, match="counted from 1"):
        target_sparsity(Pruning(sparsity=0.5), 0, 10)
