"""A plan is shown before anyone trains: the figures of the plan and encoding that would be used."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from protocols.bfv import Parameters
from securefl import agreement, cli, config
from securefl.config import ConfigurationError
from securefl.privacy.plan import Observer, SiteDistributed
from securefl.privacy.preview import preview

PLANNED = ["rounds=5", "privacy.epsilon=2", "privacy.delta=1e-3", "privacy.rate=0.1"]


@pytest.mark.parametrize(("noise", "batch"), [("local", 20), ("distributed", 100)])
def test_the_preview_is_what_a_run_would_use(noise: str, batch: int) -> None:
    experiment = config.parse(
        "", [*PLANNED, f"privacy.noise={noise}", f"privacy.expected_batch={batch}"]
    )
    shown, plan = preview(experiment, 5, 100), agreement.plan(experiment, 5, 100)
    assert plan is not None
    assert shown.epsilon == {who: plan.spent(5, who) for who in Observer}
    assert max(shown.epsilon.values()) <= 2
    encoding = agreement.encoding(experiment, 5, plan)
    assert shown.field_bits == encoding.field_bits
    size = Parameters(encoding.plain_bits, 5).upload_bytes(encoding.slots(100))
    assert shown.bytes_up == size / 100


def test_under_ckks_a_preview_counts_whole_blocks_and_a_model_too_large_is_one_line() -> None:
    experiment = config.parse("", [*PLANNED, "protocol.name=ckks", "privacy.expected_batch=20"])
    assert preview(experiment, 5, 5000).bytes_up == 2 * (64 + 8192 * 100 // 8) / 5000
    agreement.check_length(experiment, 5, None, 5000)
    with pytest.raises(ConfigurationError, match="use a smaller model") as caught:
        agreement.check_length(experiment, 5, None, 10**17)
    assert "\n" not in str(caught.value)
    encrypted = config.parse("", [*PLANNED, "protocol.name=bfv", "privacy.expected_batch=20"])
    agreement.check_length(encrypted, 5, None, 10**17)


def test_a_preview_of_whole_updates_says_whether_they_are_rotated() -> None:
    asked = ["privacy", "plan", "--site", "--epsilon", "50", "--records", "1", "--sites", "20"]
    asked += ["--delta", "1e-3", "--rounds", "3"]
    for parameters, rotated in ((10, False), (5000, True)):
        command = [*asked, "--parameters", str(parameters)]
        shown = json.loads(CliRunner().invoke(cli.app, [*command, "--format", "json"]).stdout)
        assert set(shown) == {"distributed"}
        assert shown["distributed"]["rotated"] is rotated
        told = CliRunner().invoke(cli.app, command).stdout
        assert ("yes" in told) == rotated
    chosen = ["rounds=3", "sites.count=20", "privacy.unit=site", "privacy.epsilon=50"]
    experiment = config.parse("", [*chosen, "privacy.delta=1e-3"])
    plan = agreement.plan(experiment, 20, 5000)
    assert isinstance(plan, SiteDistributed)
    narrow = agreement.encoding(experiment, 20, plan).field_bits
    assert shown["distributed"]["field_bits"] == narrow < plan.field_bits(agreement.OVERFLOW)


@pytest.mark.parametrize(
    "given",
    [
        [*PLANNED, "privacy.expected_batch=20"],
        [*PLANNED, "privacy.expected_batch=100", "privacy.noise=distributed"],
        ["rounds=5", "privacy.unit=site", "privacy.epsilon=9", "privacy.delta=1e-3"],
    ],
    ids=["local", "distributed", "site"],
)
def test_the_preview_tells_what_an_adaptive_clip_costs(given: list[str]) -> None:
    fixed = preview(config.parse("", given), 5, 100)
    assert fixed.clip_noise is fixed.share_error is None
    adaptive = config.parse("", [*given, "privacy.clip_quantile=0.5"])
    shown, plan = preview(adaptive, 5, 100), agreement.plan(adaptive, 5, 100)
    assert plan is not None
    assert shown.share_error == plan.share_error(5)
    assert shown.clip_noise == pytest.approx(math.sqrt(1 + 1 / 64) - 1, rel=1e-3)
    assert shown.signal_to_noise == pytest.approx(
        fixed.signal_to_noise / (1 + shown.clip_noise), rel=0.005
    )
    encoding = agreement.encoding(adaptive, 5, plan)
    size = Parameters(encoding.plain_bits, 5).upload_bytes(encoding.slots(101))
    assert shown.bytes_up == size / 100


def test_without_a_plan_there_is_nothing_to_preview() -> None:
    with pytest.raises(ConfigurationError, match=r"no \[privacy\] section"):
        preview(config.parse(""), 5, 100)


def test_the_command_tells_both_kinds_of_noise_and_refuses_in_one_line() -> None:
    asked = ["privacy", "plan", "--epsilon", "2", "--records", "1000", "--sites", "5"]
    asked += ["--parameters", "100", "--delta", "1e-3", "--rounds", "5", "--format", "json"]
    told = json.loads(CliRunner().invoke(cli.app, asked).stdout)
    assert set(told) == {"local", "distributed"}
    assert told["distributed"]["signal_to_noise"] > told["local"]["signal_to_noise"]
    assert told["distributed"]["epsilon"]["public"] < told["distributed"]["epsilon"]["others"] <= 2
    refused = CliRunner().invoke(cli.app, [*asked, "--set", "privacy.delta=2"])
    assert refused.exit_code == 2
