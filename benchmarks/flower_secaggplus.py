"""One round of Flower's SecAgg+ without its engine: workflow and client code, called in turn.

    python benchmarks/flower_secaggplus.py PARAMETERS SITES GONE

Runs in the environment that peers.py makes. GONE sites vanish before they upload. Every site shares
with every other (the complete graph). Prints one JSON object: seconds of each site in the step that
masks and serialises its vector, of that the masking alone (mask generation, key agreement and
modular additions), the upload's bytes, the server's seconds to take masks off, the whole round's
seconds, and the largest error of the mean.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    ConfigRecord,
    FitIns,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.compat.common import recorddict_compat
from flwr.server import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import (
    SecAggPlusWorkflow,
    WorkflowState,
)
from flwr.supercore.task_identity import TaskIdentity

CLIENT_CODE = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
MASKING = (
    "pseudo_rand_gen",
    "generate_shared_key",
    "parameters_addition",
    "parameters_subtraction",
    "parameters_mod",
)
WEIGHT = 100


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.masking = 0.0

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts as masking."""

        def measured(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.masking += time.perf_counter() - started
            return result

        return measured


class Sites:
    """Flower's grid, played by calling the client code of each site in turn."""

    def __init__(self, vectors: dict[int, np.ndarray], gone: set[int], clock: Clock) -> None:
        self.vectors, self.gone, self.clock = vectors, gone, clock
        self.contexts = {
            site: Context(run_id=1, node_id=site, node_config={}, state=RecordDict(), run_config={})
            for site in vectors
        }
        self.stage, self.upload_bytes = "", 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies of the sites that have not vanished."""
        del timeout
        replies = []
        for message in messages:
            site = message.metadata.dst_node_id
            if self.stage in ("collect_masked_vectors_stage", "unmask_stage") and site in self.gone:
                continue
            message.metadata.__dict__.update(_run_id=1, _src_node_id=1, _message_id=str(site))
            message.content = copy.deepcopy(message.content)  # the sites take it apart
            self.clock.masking, started = 0.0, time.perf_counter()
            reply = secaggplus_mod(message, self.contexts[site], self._train)
            self.clock.seconds[self.stage].append(time.perf_counter() - started)
            if self.stage == "collect_masked_vectors_stage":
                self.clock.seconds["masking"].append(self.clock.masking)
                record = reply.content.config_records[RECORD_KEY_CONFIGS]
                self.upload_bytes = sum(map(len, record[Key.MASKED_PARAMETERS]))
            reply.metadata.__dict__["_src_node_id"] = site
            replies.append(reply)
        return replies

    def _train(self, message: Message, context: Context) -> Message:
        vector = self.vectors[context.node_id]
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), WEIGHT, {})
        return Message(recorddict_compat.fitres_to_recorddict(result, False), reply_to=message)


class Mean:
    """A strategy that asks every site and keeps the mean."""

    def __init__(self, sites: Iterable[int]) -> None:
        self.sites, self.mean = list(sites), np.zeros(0)

    def configure_fit(self, number: int, parameters: Any, manager: Any) -> list[Any]:
        """Every site is asked."""
        del number, manager
        return [(SimpleNamespace(node_id=site), FitIns(parameters, {})) for site in self.sites]

    def aggregate_fit(
        self, number: int, results: Any, failures: Any
    ) -> tuple[None, dict[str, Any]]:
        """Keep what the round yields."""
        del number, failures
        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


def main(parameters: int, count: int, gone: int) -> None:
    """Play the round and print its figures."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    clock = Clock()
    for name in MASKING:
        setattr(CLIENT_CODE, name, clock.within(getattr(CLIENT_CODE, name)))
    vectors = {
        site: np.random.default_rng(site).normal(0, 0.1, parameters).astype(np.float32)
        for site in range(1, count + 1)
    }
    dead = set(list(vectors)[:gone])
    grid, strategy = Sites(vectors, dead, clock), Mean(vectors)
    context = LegacyContext.__new__(LegacyContext)
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(parameters, np.float32)])
    state[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(start, True)
    manager = SimpleNamespace(num_available=lambda: count)
    context.__dict__.update(strategy=strategy, client_manager=manager, state=state)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=count // 2 + 1)
    progress, whole = WorkflowState(), {}
    for stage in (
        workflow.setup_stage,
        workflow.share_keys_stage,
        workflow.collect_masked_vectors_stage,
        workflow.unmask_stage,
    ):
        grid.stage, started = stage.__name__, time.perf_counter()
        if not stage(grid, context, progress):
            raise RuntimeError(f"{grid.stage} gave up")
        whole[grid.stage] = time.perf_counter() - started
    right = np.mean([vector for site, vector in vectors.items() if site not in dead], axis=0)
    figures = {
        "upload": clock.seconds["collect_masked_vectors_stage"],
        "masking": clock.seconds["masking"],
        "upload_bytes": grid.upload_bytes,
        "unmask": whole["unmask_stage"] - sum(clock.seconds["unmask_stage"]),
        "round": sum(whole.values()),
        "error": float(np.abs(strategy.mean - right).max()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
