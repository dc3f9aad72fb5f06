"""The lines of metrics.jsonl and the summary: they come back as written, or say what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefl.config import ConfigurationError
from securefl.records import (
    EVALUATIONS,
    METRICS,
    SUMMARY,
    EvaluationRecord,
    RoundRecord,
    Summary,
    read_history,
)
from securefl.tallies import Figures

names = st.text(min_size=1, max_size=12)
amounts = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
counts = st.integers(min_value=0, max_value=2**60)


@st.composite
def rounds(draw: st.DrawFn) -> RoundRecord:
    number = draw(st.integers(1, 10**6))
    sites = draw(st.lists(names, unique=True, max_size=6))
    cut = draw(st.integers(0, len(sites)))
    return RoundRecord(
        round=number,
        update=draw(st.integers(1, number)),
        metrics=draw(st.dictionaries(names, st.floats(allow_infinity=False), max_size=4)),
        epsilon=draw(st.dictionaries(names, amounts, max_size=4)),
        bytes_up=draw(st.dictionaries(names, counts, max_size=4)),
        bytes_down=draw(st.dictionaries(names, counts, max_size=4)),
        upload_bytes=draw(st.dictionaries(names, counts, max_size=4)),
        seconds=draw(st.dictionaries(names, amounts, max_size=4)),
        parameters=draw(st.integers(1, 10**9)),
        sparsity=draw(st.floats(0, 1)),
        survivors=tuple(sites[:cut]),
        dropouts={site: draw(st.text(max_size=20)) for site in sites[cut:]},
        aborted=tuple(n for n in draw(st.lists(st.integers(1, 10**6))) if n < number),
    )


PLAIN: dict[str, Any] = {
    "round": 2,
    "update": 1,
    "metrics": {"test_loss": 0.5},
    "epsilon": {"a": 1.5},
    "bytes_up": {"upload": 10},
    "bytes_down": {"upload": 20},
    "upload_bytes": {"a": 10},
    "seconds": {"upload": 0.25},
    "parameters": 4,
    "sparsity": 0.5,
    "survivors": ("a",),
    "dropouts": {"b": "no reply"},
    "aborted": (1,),
}
SUMMARY_VALUES: dict[str, Any] = {
    "name": "trial",
    "protocol": "bfv",
    "rounds": 1,
    "sites": ("a", "b"),
    "parameters": 4,
    "sparsity": 0.5,
    "metric": {"test_loss": 0.5},
    "private": True,
    "why_not_private": None,
    "epsilon": {"a": 1.5, "b": 1.5},
    "delta": 1e-3,
    "adjacency": "add or remove one record",
    "accountant": "RDP",
    "bytes_up_per_parameter": 3.4,
    "bytes_up_last_round": 10,
    "bytes_up_total": 10,
    "seconds": {"upload": 0.25},
    "dropouts": {"2": {"b": "no reply"}},
    "aborted_rounds": (1,),
    "stopped": "round budget",
    "outside_guarantee": ("held-out rows were read",),
    "version": "0.1.0",
}


def same(one: object, other: object) -> bool:
    """Equal, with NaN equal to NaN."""
    return repr(msgspec.to_builtins(one)) == repr(msgspec.to_builtins(other))


@given(rounds())
def test_a_round_comes_back_from_its_line_as_it_was(record: RoundRecord) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert same(RoundRecord.from_json(line), record)


def test_a_summary_comes_back_as_it_was() -> None:
    summary = Summary(**SUMMARY_VALUES)
    assert Summary.from_json(summary.to_json()) == summary


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_valid_json_and_reads_as_nan(bad: float) -> None:
    line = RoundRecord(**PLAIN | {"metrics": {"test_loss": bad}}).to_json()
    assert json.loads(line)["metrics"] == {"test_loss": None}
    assert math.isnan(RoundRecord.from_json(line).metrics["test_loss"])


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_foreign_bytes_are_refused_with_their_place(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"^metrics line 7 is damaged: .*; restore"):
        RoundRecord.from_json(data, "metrics line 7")


@given(st.data())
def test_a_mutated_line_reads_or_is_refused_and_nothing_else(data: st.DataObject) -> None:
    line = bytearray(RoundRecord(**PLAIN).to_json().encode())
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(RoundRecord.from_json(bytes(line)), RoundRecord)
    except ConfigurationError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are promised


def test_nesting_that_exhausts_the_stack_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        RoundRecord.from_json("[" * 200_000)


@pytest.mark.parametrize("field", [f for f in PLAIN if f != "aborted"])
def test_a_missing_field_is_named(field: str) -> None:
    tree = {key: value for key, value in PLAIN.items() if key != field}
    with pytest.raises(ConfigurationError, match=f"missing required field {field}"):
        RoundRecord.from_json(json.dumps(tree))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ConfigurationError, match="unknown field extra"):
        RoundRecord.from_json(json.dumps(PLAIN | {"extra": 1}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"update": 3}, "round 2 cannot be update 3"),
        ({"update": 0}, "cannot be update 0"),
        ({"parameters": 0}, "parameters = 0"),
        ({"sparsity": 1.5}, "sparsity = 1.5 is not between"),
        ({"sparsity": math.nan}, "sparsity = nan"),
        ({"epsilon": {"a": -0.1}}, "epsilon of a = -0.1"),
        ({"epsilon": {"a": math.inf}}, "epsilon of a = inf"),
        ({"epsilon": {"a": math.nan}}, "epsilon of a = nan"),
        ({"bytes_up": {"upload": -1}}, "bytes_up of upload = -1"),
        ({"seconds": {"upload": -1.0}}, "seconds of upload"),
        ({"dropouts": {"a": "gone"}}, "a both survived and dropped out"),
        ({"aborted": (2,)}, "not past"),
        ({"clip": 0.0}, "clip = 0.0 is not"),
        ({"clip": math.inf}, "clip = inf is not"),
    ],
)
def test_a_round_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RoundRecord(**PLAIN | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": {"a": 1.5}}, "private, but no epsilon for b"),
        ({"delta": None}, "private, but delta = None"),
        ({"delta": 0.0}, "private, but delta = 0.0"),
        ({"adjacency": None}, "adjacency or accountant"),
        ({"accountant": ""}, "adjacency or accountant"),
        ({"why_not_private": "seeded"}, "private, yet why_not_private says 'seeded'"),
        ({"private": False}, "must say why_not_private"),
        ({"private": False, "why_not_private": ""}, "must say why_not_private"),
        ({"epsilon": {"a": 1.0, "b": 1.0, "c": 1.0}}, "names c, not among the sites"),
        ({"sites": ("a", "a")}, "somebody twice"),
        ({"sites": ()}, "nobody"),
        ({"bytes_up_total": -1}, "bytes_up_total"),
        ({"dropouts": {"two": {}}}, "not a round number"),
    ],
)
def test_a_summary_cannot_claim_what_it_does_not_hold(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Summary(**SUMMARY_VALUES | changes)


def test_what_is_read_is_held_to_the_same_rules() -> None:
    tree = SUMMARY_VALUES | {"epsilon": {"a": 1.5}}
    with pytest.raises(ConfigurationError, match=r"s\.json is damaged: private, but no epsilon"):
        Summary.from_json(json.dumps(tree), "s.json")


def test_a_history_has_every_finished_round_and_the_summary(write_run: Any) -> None:
    history = read_history(write_run(rounds=4, aborted={2}))
    assert [record.round for record in history.rounds] == [1, 3, 4, 5]
    assert history.summary is not None
    assert history.summary.aborted_rounds == (2,)
    assert history.experiment.name == "trial"


def test_a_line_cut_short_by_a_kill_is_no_finished_round(write_run: Any) -> None:
    directory: Path = write_run(rounds=3, finished=False)
    whole = (directory / METRICS).read_bytes()
    for kept in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        (directory / METRICS).write_bytes(whole[:kept])
        assert [record.round for record in read_history(directory).rounds] == [1, 2]


def test_a_run_before_its_first_round_is_unfinished_not_broken(write_run: Any) -> None:
    directory: Path = write_run(finished=False)
    (directory / METRICS).unlink()
    history = read_history(directory)
    assert history.rounds == ()
    assert history.summary is None


def test_a_folder_that_is_no_run_is_refused_with_the_mend(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigurationError, match=r"is not a run directory .* give the folder"):
            read_history(folder)


def test_a_damaged_line_is_named(write_run: Any) -> None:
    directory: Path = write_run(rounds=3)
    lines = (directory / METRICS).read_text().splitlines()
    (directory / METRICS).write_text("\n".join([lines[0], lines[1][:-9], lines[2], ""]))
    with pytest.raises(ConfigurationError, match=r"metrics\.jsonl line 2 is damaged"):
        read_history(directory)


def test_rounds_that_do_not_grow_are_refused(write_run: Any) -> None:
    directory: Path = write_run(rounds=2)
    lines = (directory / METRICS).read_text().splitlines()
    (directory / METRICS).write_text("\n".join([lines[1], lines[0], ""]))
    with pytest.raises(ConfigurationError, match="line 2 is damaged: round 1 after round 2"):
        read_history(directory)


@pytest.mark.parametrize("text", ["", "{}", "null", "[1]"])
def test_a_summary_that_is_none_is_damaged_not_unfinished(write_run: Any, text: str) -> None:
    directory: Path = write_run()
    (directory / SUMMARY).write_text(text)
    with pytest.raises(ConfigurationError, match=r"summary\.json is damaged"):
        read_history(directory)


FIGURES = Figures(
    40.0,
    {"test_auc": 0.8, "test_accuracy": 0.75},
    {"test_auc": (0.7, 0.9)},
    roc=((0.0, 0.0), (0.2, 0.6), (1.0, 1.0)),
    calibration=((0.25, 0.2, 30.0), (0.7, 0.9, 10.0)),
    recalls=(0.5, None),
)


def test_an_evaluation_comes_back_from_its_line_as_it_was() -> None:
    record = EvaluationRecord(2, 3, ("a", "b"), FIGURES, 1.5)
    line = record.to_json()
    assert "\n" not in line
    assert EvaluationRecord.from_json(line) == record


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"update": 0}, "round 3 cannot have tested update 0"),
        ({"update": 4}, "round 3 cannot have tested update 4"),
        ({"sites": ()}, "nobody"),
        ({"sites": ("a", "a")}, "somebody twice"),
        ({"epsilon": -1.0}, "epsilon of the test rows = -1"),
        ({"epsilon": math.inf}, "epsilon of the test rows = inf"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    values = {"update": 2, "round": 3, "sites": ("a", "b"), "figures": FIGURES}
    with pytest.raises(ValueError, match=said):
        EvaluationRecord(**values | changes)


def test_figures_that_no_sums_give_are_damage() -> None:
    line = EvaluationRecord(2, 3, ("a", "b"), FIGURES).to_json()
    for good, bad in (("0.8,", "1.8,"), ('"rows":40.0', '"rows":-1'), ("[0.2,0.6]", "[0.2,6]")):
        assert good in line
        with pytest.raises(ConfigurationError, match="line 7 is damaged"):
            EvaluationRecord.from_json(line.replace(good, bad), "line 7")


def test_the_figures_of_an_evaluation_stand_in_the_metrics_of_its_round(write_run: Any) -> None:
    history = read_history(write_run(rounds=4, aborted={2}, evaluations={2: FIGURES, 4: FIGURES}))
    assert [(e.update, e.round) for e in history.evaluations] == [(2, 3), (4, 5)]
    plain = read_history(write_run("plain", rounds=4, aborted={2}))
    assert plain.evaluations == ()
    for record, before in zip(history.rounds, plain.rounds, strict=True):
        told = FIGURES.values if record.update in (2, 4) else {}
        assert record.metrics == before.metrics | told


def test_of_two_evaluations_of_an_update_the_later_counts(write_run: Any) -> None:
    """An interrupted run repeats one; what was told of a round that never finished is no more."""
    directory: Path = write_run(rounds=2, finished=False)
    better = msgspec.structs.replace(FIGURES, values=FIGURES.values | {"test_auc": 0.85})
    lines = [
        EvaluationRecord(2, 2, ("a",), FIGURES).to_json(),
        EvaluationRecord(2, 3, ("a",), better).to_json(),
        EvaluationRecord(3, 4, ("a",), FIGURES).to_json(),
        "cut short",
    ]
    (directory / EVALUATIONS).write_text("\n".join(lines))
    history = read_history(directory)
    assert [e.figures for e in history.evaluations] == [better]
    assert history.rounds[1].metrics["test_auc"] == 0.85


def test_evaluations_out_of_order_are_refused(write_run: Any) -> None:
    directory: Path = write_run(rounds=2)
    lines = [EvaluationRecord(u, u, ("a",), FIGURES).to_json() + "\n" for u in (2, 1)]
    (directory / EVALUATIONS).write_text("".join(lines))
    with pytest.raises(ConfigurationError, match=r"evaluations\.jsonl line 2 is damaged: update 1"):
        read_history(directory)
