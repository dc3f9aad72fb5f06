"""The global model as a value: on the wire, on disk, and moved by `apply`."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocols.errors import MalformedMessageError, ProtocolError
from securefl import config
from securefl.algorithms.fedadam import FedAdam
from securefl.algorithms.fedavg import FedAvg
from securefl.messages import ModelMessage
from securefl.models import Layout
from securefl.pruning import target_sparsity
from securefl.state import GlobalState, apply
from securefl.store import CorruptStoreError, write

LAYOUT = Layout(("weight", "bias"), ((4, 10), (4,)))


@st.composite
def states(draw) -> GlobalState:
    size = draw(st.integers(1, 70))
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    assume(any(bits))
    mask = np.array(bits, np.bool_)
    weights = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=size)
    weights = weights.astype(np.float32) * mask
    scale = draw(st.floats(2.0**-20, 2.0**20))
    return GlobalState(draw(st.integers(0, 2**40)), weights, mask, clip_scale=scale)


def state(seed: int = 0, quiet: int = 0) -> GlobalState:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=44).astype(np.float32)
    return GlobalState(3, weights, np.ones(44, np.bool_), {}, quiet)


# --- the message ---------------------------------------------------------------------------------


@given(states())
def test_a_model_comes_back_from_the_wire_as_it_was(state):
    again = GlobalState.from_message(state.to_message(), len(state.weights))
    assert (again.update, again.clip_scale) == (state.update, state.clip_scale)
    np.testing.assert_array_equal(again.weights, state.weights)
    np.testing.assert_array_equal(again.mask, state.mask)
    assert again.to_message() == state.to_message()
    assert again.digest() == state.digest()


@given(states())
def test_the_digest_binds_every_weight_the_mask_the_update_and_the_clip(state):
    clip = 2.0 if state.clip_scale == 1 else 1.0
    assert dataclasses.replace(state, clip_scale=clip).digest() != state.digest()
    index = int(np.flatnonzero(state.mask)[0])
    weights = state.weights.copy()
    weights[index] += 1
    assert dataclasses.replace(state, weights=weights).digest() != state.digest()
    assert dataclasses.replace(state, update=state.update + 1).digest() != state.digest()
    mask = state.mask.copy()
    mask[index] = False
    assume(mask.any())
    fewer = dataclasses.replace(state, weights=state.weights * mask, mask=mask)
    assert fewer.digest() != state.digest()


def test_a_pruned_model_is_smaller_on_the_wire():
    dense = GlobalState(1, np.ones(10_000, np.float32), np.ones(10_000, np.bool_))
    mask = np.arange(10_000) < 1_000
    pruned = GlobalState(1, np.ones(10_000, np.float32) * mask, mask)
    assert len(pruned.to_message()) < 0.14 * len(dense.to_message())  # a tenth, and a bit each


def test_a_mutated_model_is_read_as_a_model_or_refused():
    rng = random.Random(7)
    original = GlobalState(
        2, np.arange(20, dtype=np.float32) * (np.arange(20) % 3 > 0), np.arange(20) % 3 > 0
    ).to_message()
    refused = 0
    for _ in range(5000):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(3), rng.randrange(len(data))
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 5)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 5))
            if not data:
                data = bytearray(b"\0")
        try:
            read = GlobalState.from_message(bytes(data), 20)
        except ProtocolError:
            refused += 1
        else:
            assert np.isfinite(read.weights).all()
            assert (read.weights[~read.mask] == 0).all()
            assert read.to_message() == bytes(data)
    assert refused > 1000


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(MalformedMessageError):
        GlobalState.from_message(data, 20)


@pytest.mark.parametrize(
    ("message", "telling"),
    [
        (ModelMessage(0, 21, b"", bytes(84)), "21 weights, not 20"),
        (ModelMessage(0, 20, b"", bytes(76)), "do not fit"),
        (ModelMessage(0, 20, b"\xff\xff\x0f", bytes(80)), "one form"),
        (ModelMessage(0, 20, b"\xff\xff\x17", bytes(80)), "one form"),
        (ModelMessage(0, 20, b"\xff\xff", bytes(64)), "wrong length"),
        (ModelMessage(0, 20, b"\x00\x00\x00", b""), "do not fit"),
        (ModelMessage(0, 20, b"", bytes(80), 2.0**21), "Expected `float`"),
        (ModelMessage(0, 20, b"", bytes(80), np.nan), "Expected `float`"),
        (ModelMessage(0, 20, b"", np.full(20, np.nan, "<f4").tobytes()), "not finite"),
        (ModelMessage(0, 20, b"", np.full(20, np.inf, "<f4").tobytes()), "not finite"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_what_is_wrong(message, telling):
    with pytest.raises(MalformedMessageError, match=telling):
        GlobalState.from_message(message.to_bytes(), 20)


# --- the checkpoint ------------------------------------------------------------------------------


@settings(max_examples=30)
@given(states(), st.integers(0, 5), st.text(max_size=50))
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path_factory, state, quiet, record):
    rng = np.random.default_rng(1)
    moments = {name: rng.normal(size=len(state.weights)) for name in ("first", "second")}
    kept = GlobalState(state.update, state.weights, state.mask, moments, quiet)
    path = tmp_path_factory.mktemp("checkpoint") / "update-000003.safetensors"
    write(path, kept.to_checkpoint(record))
    again, told = GlobalState.from_checkpoint(path)
    assert told == record
    assert (again.update, again.quiet) == (kept.update, kept.quiet)
    assert again.weights.tobytes() == kept.weights.tobytes()
    assert again.weights.dtype == np.float32
    np.testing.assert_array_equal(again.mask, kept.mask)
    assert set(again.moments) == {"first", "second"}
    for name, value in moments.items():
        assert again.moments[name].tobytes() == value.tobytes()


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    rng = random.Random(8)
    whole = state().to_checkpoint("{}")
    path = tmp_path / "update-000003.safetensors"
    damaged = [b"", b"\0", whole[:8], whole[: len(whole) // 2], whole[:-1], rng.randbytes(300)]
    damaged += [b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:], b"\0" * len(whole)]
    damaged += [whole.replace(b"weights", b"weighty"), whole.replace(b"quiet", b"quite")]
    damaged += [whole.replace(b"securefl", b"something")]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CorruptStoreError, match="update-000003"):
            GlobalState.from_checkpoint(path)


def test_a_checkpoint_with_a_changed_byte_is_named_or_reads_as_it_was_written(tmp_path: Path):
    rng = random.Random(9)
    written = state()
    whole = written.to_checkpoint('{"round": 1}')
    path = tmp_path / "update-000003.safetensors"
    named = 0
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            again, record = GlobalState.from_checkpoint(path)
        except CorruptStoreError:
            named += 1
        else:  # the byte was the same, or white space in the header
            assert record == '{"round": 1}'
            assert again.digest() == written.digest()
    assert named > 300


def test_weights_and_mask_must_be_vectors_of_one_length():
    with pytest.raises(ValueError, match="one length"):
        GlobalState(0, np.zeros(3, np.float32), np.ones(4, np.bool_))
    with pytest.raises(ValueError, match="vectors"):
        GlobalState(0, np.zeros((2, 2), np.float32), np.ones((2, 2), np.bool_))


# --- apply ---------------------------------------------------------------------------------------


def experiment(**changes) -> config.Experiment:
    return config.Experiment.model_validate({"rounds": 10, **changes})


def test_apply_moves_survivors_by_the_mean_and_leaves_the_pruned_at_zero():
    rng = np.random.default_rng(3)
    mask = rng.random(44) < 0.5
    start = GlobalState(3, (rng.normal(size=44) * mask).astype(np.float32), mask)
    mean = rng.normal(size=start.surviving)
    moved = apply(start, mean, FedAvg(0.5), LAYOUT, experiment())
    expected = (start.weights.astype(np.float64)[mask] + 0.5 * mean).astype(np.float32)
    np.testing.assert_array_equal(moved.weights[mask], expected)
    assert (moved.weights[~mask] == 0).all()
    np.testing.assert_array_equal(moved.mask, mask)
    assert moved.update == 4


def contents(state: GlobalState) -> list[object]:
    moments = [(name, value.tobytes()) for name, value in sorted(state.moments.items())]
    return [state.update, state.quiet, state.weights.tobytes(), state.mask.tobytes(), moments]


@pytest.mark.parametrize("rule", [FedAvg(), FedAdam(0.1)], ids=["fedavg", "fedadam"])
def test_apply_gives_the_same_bits_every_time_and_changes_nothing_it_was_given(rule):
    pruned = experiment(pruning={"sparsity": 0.5})
    start = GlobalState(3, state().weights, np.ones(44, np.bool_), rule.start(44))
    before = contents(start)
    mean = np.random.default_rng(4).normal(size=44)
    first = apply(start, mean, rule, LAYOUT, pruned)
    second = apply(start, mean, rule, LAYOUT, pruned)
    assert contents(first) == contents(second)
    assert contents(start) == before


@pytest.mark.parametrize("schedule", ["one-shot", "linear", "cubic"])
@pytest.mark.parametrize("rule", [FedAvg(), FedAdam(0.1)], ids=["fedavg", "fedadam"])
def test_apply_prunes_by_the_schedule_and_never_revives_a_weight(rule, schedule):
    trial = experiment(
        pruning={"sparsity": 0.8, "schedule": schedule, "first_round": 2, "last_round": 8}
    )
    rng = np.random.default_rng(5)
    now = GlobalState(0, state().weights, np.ones(44, np.bool_), rule.start(44))
    for number in range(1, 11):
        after = apply(now, rng.normal(size=now.surviving), rule, LAYOUT, trial)
        wanted = target_sparsity(trial.pruning, number, 10)
        assert len(after.mask) - after.surviving == int(wanted * 44)
        assert not (after.mask & ~now.mask).any()
        assert (after.weights[~after.mask] == 0).all()
        now = after
    assert now.sparsity == pytest.approx(0.8, abs=1 / 44)


def test_quiet_rounds_are_counted_in_a_row():
    trial = experiment(stopping={"tolerance": 0.01, "patience": 2})
    still, jump = np.zeros(44), np.ones(44)
    now = state()
    counts = []
    for mean in (still, still, jump, still, still, still):
        now = apply(now, mean, FedAvg(), LAYOUT, trial)
        counts.append(now.quiet)
    assert counts == [1, 2, 0, 1, 2, 3]


def test_the_tolerance_is_relative_to_the_weights():
    trial = experiment(stopping={"tolerance": 0.01, "patience": 2})
    for size in (1e-3, 1.0, 1e3):
        weights = np.full(44, size, np.float32)
        now = GlobalState(1, weights, np.ones(44, np.bool_))
        assert apply(now, np.full(44, 0.009 * size), FedAvg(), LAYOUT, trial).quiet == 1
        assert apply(now, np.full(44, 0.011 * size), FedAvg(), LAYOUT, trial).quiet == 0


def test_without_a_stopping_rule_no_round_is_quiet():
    assert apply(state(), np.zeros(44), FedAvg(), LAYOUT, experiment()).quiet == 0


# --- the average of the weights ------------------------------------------------------------------


@pytest.mark.parametrize("since", [1, 3, 6])
@pytest.mark.parametrize("rule", [FedAvg(momentum=0.5), FedAdam(0.1)], ids=["fedavg", "fedadam"])
def test_what_is_released_is_the_mean_of_the_weights_since_that_round(rule, since):
    trial = experiment(aggregation={"average_from": since})
    rng = np.random.default_rng(6)
    now = GlobalState(0, state().weights, np.ones(44, np.bool_), rule.start(44))
    past = [now.weights]
    for number in range(1, 11):
        now = apply(now, rng.normal(size=44), rule, LAYOUT, trial)
        past.append(now.weights)
        expected = now.weights
        if number >= since:
            expected = np.mean(past[since:], axis=0, dtype=np.float64)
        np.testing.assert_allclose(now.released, expected, rtol=1e-6, atol=1e-7)
        assert now.released.dtype == np.float32
    assert np.abs(now.released - now.weights).max() > 0.01


@pytest.mark.parametrize("rule", [FedAvg(momentum=0.5), FedAdam(0.1)], ids=["fedavg", "fedadam"])
def test_averaging_changes_nothing_that_is_trained_or_sent(rule):
    """Sites train on the weights themselves; the average only looks on."""
    rng = np.random.default_rng(7)
    states = [GlobalState(0, state().weights, np.ones(44, np.bool_), rule.start(44))] * 2
    trials = [experiment(), experiment(aggregation={"average_from": 2})]
    for _ in range(6):
        mean = rng.normal(size=44)
        states = [
            apply(now, mean, rule, LAYOUT, trial) for now, trial in zip(states, trials, strict=True)
        ]
        assert states[0].to_message() == states[1].to_message()
        assert states[0].digest() == states[1].digest()
    assert states[0].released is states[0].weights
    assert (states[1].released != states[1].weights).all()


def test_what_is_released_is_pruned_as_the_weights_are():
    """The mean of the surviving weights; a weight that was pruned at the end is exactly zero."""
    trial = experiment(
        aggregation={"average_from": 2}, pruning={"sparsity": 0.5, "schedule": "linear"}
    )
    rng = np.random.default_rng(8)
    now = GlobalState(0, state().weights, np.ones(44, np.bool_))
    past = []
    for _ in range(10):
        now = apply(now, rng.normal(size=now.surviving), FedAvg(), LAYOUT, trial)
        past.append(now.weights)
    assert now.surviving == 22
    assert (now.released[~now.mask] == 0).all()
    expected = np.mean(past[1:], axis=0, dtype=np.float64) * now.mask
    np.testing.assert_allclose(now.released, expected, rtol=1e-6, atol=1e-7)


def test_an_average_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path):
    trial = experiment(aggregation={"average_from": 2})
    rng = np.random.default_rng(9)
    now = GlobalState(0, state().weights, np.ones(44, np.bool_))
    read = now
    for number in range(6):
        mean = rng.normal(size=44)
        now = apply(now, mean, FedAvg(), LAYOUT, trial)
        read = apply(read, mean, FedAvg(), LAYOUT, trial)
        path = tmp_path / f"update-{number:06d}.safetensors"
        write(path, read.to_checkpoint("{}"))
        read, _ = GlobalState.from_checkpoint(path)
        assert contents(read) == contents(now)
        assert read.released.tobytes() == now.released.tobytes()


# --- the clip ------------------------------------------------------------------------------------

ADAPTIVE = {
    "epsilon": 5.0,
    "delta": 1e-3,
    "rate": 0.2,
    "expected_batch": 16,
    "noise": "distributed",
    "clip": 4.0,
    "clip_quantile": 0.5,
}


def test_apply_moves_the_clip_and_reads_the_update_in_its_units(tmp_path: Path):
    """All within the clip: it shrinks. And it goes on from a checkpoint."""
    trial = experiment(privacy=ADAPTIVE)
    start = GlobalState(0, np.zeros(44, np.float32), np.ones(44, np.bool_), clip_scale=2.0)
    mean = np.append(np.full(44, 0.25), 4.0 / 8)
    moved = apply(start, mean, FedAvg(), LAYOUT, trial)
    assert moved.weights.tolist() == [0.5] * 44
    assert moved.clip_scale == pytest.approx(2 * np.exp(-0.1), rel=1e-15)
    path = tmp_path / "update-000001.safetensors"
    write(path, moved.to_checkpoint("{}"))
    read, _ = GlobalState.from_checkpoint(path)
    assert read.clip_scale == moved.clip_scale
    again = apply(read, mean, FedAvg(), LAYOUT, trial)
    assert again.to_message() == apply(moved, mean, FedAvg(), LAYOUT, trial).to_message()
    fixed = experiment(privacy={**ADAPTIVE, "clip_quantile": None})
    assert apply(state(), np.ones(44), FedAvg(), LAYOUT, fixed).clip_scale == 1


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 2.0**21])
def test_a_clip_out_of_range_is_no_state(scale):
    with pytest.raises(ValueError, match="clip_scale"):
        GlobalState(0, np.zeros(4, np.float32), np.ones(4, np.bool_), clip_scale=scale)
