"""Planted bugs are seen. How often, over many seeds: benchmarks/attacks/mutants.py."""

from __future__ import annotations

from types import ModuleType

import pytest

from attacks.audit import unseen
from attacks.case import Case
from securefl import config
from securefl.runs import run


@pytest.fixture(scope="module")
def mutants(benchmark) -> ModuleType:
    return benchmark("mutants")


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("raw CKKS decryption released", {"ckks-key"}),
        ("masks reused", {"mask-reuse"}),
        ("weights in clear", {"readable"}),
        ("noise / 8, local", {"epsilon"}),
        pytest.param("noise / 8, distributed", {"epsilon"}, marks=pytest.mark.slow),
        pytest.param("no plan at one site", {"epsilon"}, marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_contradicts_a_claim(mutants, name, by):
    [mutant] = [item for item in mutants.MUTANTS if item.name == name]
    found = mutants.flagged(mutant, seed=100)
    assert by <= set(found)


def test_a_share_of_noise_that_is_missing_is_named_as_what_no_attack_sees(mutants, tmp_path):
    named = [item.name for item in mutants.MUTANTS if not item.seen]
    assert named == ["a share of the noise missing"]
    distributed = config.parse(mutants._EXPERIMENT, [*mutants.DISTRIBUTED, "rounds=1"])
    case = Case.open(run(distributed, tmp_path / "run", report=False).directory)
    assert any("leaves out its share of the noise" in told for told in unseen(case))
