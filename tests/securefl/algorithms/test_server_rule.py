"""An experiment names its server rule; one of the user's own is checked."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from securefl.algorithms import server_rule
from securefl.algorithms.fedadam import FedAdam
from securefl.algorithms.fedavg import FedAvg
from securefl.config import Aggregation, ConfigurationError

MODULE = '''
class Signs:
    """Moves every weight by the sign of its mean update."""

    def __init__(self, aggregation):
        self.rate = aggregation.learning_rate

    def start(self, size):
        import numpy as np
        return {"steps": np.zeros(size)}

    def step(self, weights, mean, moments):
        import numpy as np
        return weights + self.rate * np.sign(mean), {"steps": moments["steps"] + 1}

def nothing(aggregation):
    return 42
'''


@pytest.fixture
def own_rules(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_rules_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rules_of_a_test"
    sys.modules.pop("own_rules_of_a_test", None)


def test_names_give_the_rules_with_their_settings():
    assert server_rule(Aggregation(learning_rate=0.5)) == FedAvg(0.5)
    section = Aggregation(algorithm="fedadam", learning_rate=0.1, beta1=0.5, beta2=0.6, tau=0.01)
    assert server_rule(section) == FedAdam(0.1, 0.5, 0.6, 0.01)


def test_a_callable_of_the_users_own_moves_the_weights(own_rules):
    rule = server_rule(Aggregation(algorithm=f"{own_rules}:Signs", learning_rate=0.5))
    moved, moments = rule.step(np.zeros(2), np.array([3.0, -0.1]), rule.start(2))
    np.testing.assert_array_equal(moved, [0.5, -0.5])
    np.testing.assert_array_equal(moments["steps"], [1, 1])


@pytest.mark.parametrize(
    ("reference", "telling"),
    [
        ("no_such_module_anywhere:rule", "no_such_module_anywhere"),
        ("{own}:missing", "missing"),
        ("{own}:nothing", "has no start(size) and step(weights, mean, moments)"),
    ],
)
def test_a_callable_that_is_no_rule_is_refused_in_one_line(own_rules, reference, telling):
    with pytest.raises(ConfigurationError) as caught:
        server_rule(Aggregation(algorithm=reference.format(own=own_rules)))
    assert telling in str(caught.value)
    assert "\n" not in str(caught.value)
