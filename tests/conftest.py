"""What all tests share: one Hypothesis profile, and run directories with known contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings

from securefl import config
from securefl.records import (
    EVALUATIONS,
    EXPERIMENT,
    METRICS,
    SUMMARY,
    EvaluationRecord,
    RoundRecord,
    Summary,
)
from securefl.tallies import Figures

# Shared machines stall, and how long an example takes is no promise of ours.
settings.register_profile("securefl", deadline=None, derandomize=True)
settings.load_profile("securefl")

WriteRun = Callable[..., Path]


def a_round(number: int, update: int, sites: tuple[str, ...], **changes: Any) -> RoundRecord:
    """A plausible finished round of a classification."""
    done = 1 - math.exp(-update / 10)
    values: dict[str, Any] = {
        "round": number,
        "update": update,
        "metrics": {"test_loss": 0.7 - 0.5 * done, "test_accuracy": 0.5 + 0.45 * done},
        "epsilon": dict.fromkeys(sites, 0.5 + 4 * done),
        "bytes_up": {"advertise": 120 * len(sites), "upload": 2_000 * len(sites), "open": 1_500},
        "bytes_down": {"advertise": 3_000 * len(sites), "open": 2_000},
        "upload_bytes": dict.fromkeys(sites, 2000),
        "seconds": {"advertise": 0.01, "upload": 0.2, "open": 0.02, "update": 0.01},
        "parameters": 530,
        "sparsity": 0.0,
        "survivors": sites,
        "dropouts": {},
        "aborted": (),
    }
    return RoundRecord(**(values | changes))


def a_summary(records: list[RoundRecord], sites: tuple[str, ...], **changes: Any) -> Summary:
    """The summary that belongs to `records`, of a private run."""
    last = records[-1]
    values: dict[str, Any] = {
        "name": "trial",
        "protocol": "bfv",
        "rounds": len(records),
        "sites": sites,
        "parameters": 530,
        "sparsity": last.sparsity,
        "metric": last.metrics,
        "private": True,
        "why_not_private": None,
        "epsilon": last.epsilon,
        "delta": 1e-3,
        "adjacency": "add or remove one record",
        "accountant": "privacy loss distributions",
        "bytes_up_per_parameter": 3.77,
        "bytes_up_last_round": sum(last.bytes_up.values()),
        "bytes_up_total": sum(sum(record.bytes_up.values()) for record in records),
        "seconds": {"upload": 0.2 * len(records)},
        "dropouts": {str(r.round): r.dropouts for r in records if r.dropouts},
        "aborted_rounds": tuple(n for r in records for n in r.aborted),
        "stopped": "round budget",
        "outside_guarantee": ("114 held-out records were read.",),
        "version": "0.1.0",
    }
    return Summary(**(values | changes))


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write a run directory and return it; keywords change what a plain private run holds.

    `evaluations`: the figures from sums over the sites, by update; `protected`: their epsilon.
    """

    def write(
        name: str = "run",
        *,
        rounds: int = 3,
        sites: int = 3,
        plan: bool = True,
        finished: bool = True,
        experiment: Mapping[str, Any] | None = None,
        records: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
        aborted: Collection[int] = (),
        evaluations: Mapping[int, Figures] | None = None,
        protected: float | None = None,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        names = tuple(f"site-{i + 1}" for i in range(sites))
        values: dict[str, Any] = {
            "name": "trial",
            "rounds": max(rounds, 1),
            "sites": {"count": sites},
        }
        if plan:
            values["privacy"] = {"epsilon": 5, "delta": 1e-3, "rate": 0.2, "expected_batch": 16}
        text = config.Experiment.model_validate(values | dict(experiment or {})).dump()
        (directory / EXPERIMENT).write_text(text, encoding="utf-8")
        made: list[RoundRecord] = []
        number = 0
        for update in range(1, rounds + 1):
            lost = []
            number += 1
            while number in aborted:
                lost.append(number)
                number += 1
            changes: dict[str, Any] = {"aborted": tuple(lost)}
            if not plan:
                changes["epsilon"] = {}
            made.append(a_round(number, update, names, **(changes | dict(records or {}))))
        (directory / METRICS).write_text("".join(r.to_json() + "\n" for r in made))
        if evaluations:
            tested = (
                EvaluationRecord(
                    made[update - 1].update, made[update - 1].round, names, figures, protected
                )
                for update, figures in evaluations.items()
            )
            (directory / EVALUATIONS).write_text("".join(e.to_json() + "\n" for e in tested))
        if finished:
            open_: dict[str, Any] = {"private": False, "why_not_private": "there is no plan"}
            no_plan = open_ | {"delta": None, "adjacency": None, "accountant": None}
            known = ({} if plan else no_plan) | dict(summary or {})
            text = a_summary(made, names, **known).to_json()
            (directory / SUMMARY).write_bytes(msgspec.json.format(text.encode()))
        return directory

    return write
