"""Clients in Ray actors: the same run as in process, on one machine and on several nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from securefl import runs
from securefl.config import ConfigurationError
from securefl.engines.ray import Actors, Sites
from securefl.engines.worker import Failed, Start, starts
from securefl.messages import Request
from securefl.privacy.ledger import Ledger
from securefl.records import read_history
from securefl.site_folder import LEDGER, make_key

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs securefl[ray]")

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
MANY = Path(__file__).parents[3] / "benchmarks" / "simulation.py"


def descendants(of: int) -> dict[int, tuple[int, bytes]]:
    """The living processes below process `of`: the parent and the command line of each."""
    living: dict[int, tuple[int, bytes]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                living[int(entry.name)] = int(parent), (entry / "cmdline").read_bytes()
        except (OSError, ProcessLookupError):
            continue
    found: dict[int, tuple[int, bytes]] = {}
    below = {of}
    while below:
        below = {pid for pid, (parent, _) in living.items() if parent in below} - {of}
        found |= {pid: living[pid] for pid in below}
    return found


def actors() -> dict[int, int]:
    """The processes of our actors, each with its parent: its node."""
    found = descendants(os.getpid()).items()
    return {pid: parent for pid, (parent, command) in found if command.startswith(b"ray::Sites")}


def ended(processes: Callable[[], Mapping[int, object]]) -> bool:
    """Whether there are none of them, once those that were killed had time to end."""
    until = time.monotonic() + 20
    while processes() and time.monotonic() < until:
        time.sleep(0.1)
    return not processes()


def at(acts: Mapping[tuple[int, str], Callable[[], None]]):
    """An exchange that does something once before a phase of a round."""
    left = dict(acts)

    def wrap(exchange):
        def acting(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            number = Request.from_bytes(next(iter(messages.values()))).round
            left.pop((number, phase), lambda: None)()
            return exchange(phase, messages)

        return acting

    return wrap


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes of one CPU, which no other test shares."""
    from ray.cluster_utils import Cluster

    parts = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=parts | {"include_dashboard": False})
    nodes.add_node(**parts)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def clustered(small, cluster):
    """`clustered("key=value", ...)`: the small experiment, on the cluster."""
    return lambda *more: small("engine.kind=ray", f"engine.address={cluster}", *more)


def test_a_seeded_run_gives_the_same_model_in_process_and_on_ray_and_leaves_no_process(
    small, private, tmp_path
):
    """Nor a folder, nor a dashboard; and Ray's makers are told nothing."""
    before = set(descendants(os.getpid()))
    overrides = ("protocol.name=masked-bfv", "not_private_seed=3", "rounds=2", *private)
    seen: list[bytes] = []

    def look() -> None:
        seen.extend(command for _, command in descendants(os.getpid()).values())
        [raylet] = [command for command in seen if b"/raylet/raylet" in command]
        assert b"object_store_memory" in raylet
        assert f"{256 << 20}".encode() in raylet

    here = run(small(*overrides), tmp_path / "here")
    there = run(
        small(*overrides, "engine.kind=ray", "engine.workers=2"),
        tmp_path / "there",
        exchange=at({(2, "upload"): look}),
    )
    model = "model.safetensors"
    assert (there.directory / model).read_bytes() == (here.directory / model).read_bytes()
    assert there.summary.epsilon == here.summary.epsilon
    assert sum(command.startswith(b"ray::Sites") for command in seen) == 2
    dashboards = [command for command in seen if b"dashboard/dashboard.py" in command]
    assert all(b"--disable-frontend" in command for command in dashboards)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ended(lambda: {pid: 0 for pid in descendants(os.getpid()) if pid not in before})
    assert not (tmp_path / "there" / "sites" / ".shared").exists()


def test_fifty_sites_on_two_nodes_lose_a_killed_actor_for_one_round_only(
    clustered, private, tmp_path
):
    """It is back in the next with the keys that others pin; no site pays for the lost one."""
    experiment = clustered("sites.count=50", "rounds=3", *private, "privacy.expected_batch=2")
    nodes: set[int] = set()

    def kill() -> None:
        nodes.update(actors().values())
        os.kill(min(actors()), signal.SIGKILL)

    done = run(experiment, tmp_path / "run", exchange=at({(2, "upload"): kill}))
    first, second, third = read_history(done.directory).rounds
    everyone = set(first.survivors)
    assert set(third.survivors) == everyone
    gone = everyone - set(second.survivors)
    assert len(nodes) == 2
    assert len(everyone) == 50
    assert len(gone) == 25
    assert set(second.dropouts) == gone
    assert all("no reply" in why for why in second.dropouts.values())
    assert done.summary.stopped == "round budget"
    spent = done.summary.epsilon
    assert {site for site in everyone if spent[site] == max(spent.values())} == everyone - gone
    assert ended(actors)


def test_a_deadline_drops_sites_that_are_too_slow_and_they_come_back(clustered, tmp_path):
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(max(actors()))
        os.kill(stopped[0], signal.SIGSTOP)

    experiment = clustered("sites.count=4", "engine.deadline=6", "rounds=3")
    acts = {(2, "upload"): stop, (3, "upload"): lambda: os.kill(stopped[0], signal.SIGCONT)}
    done = run(experiment, tmp_path / "run", exchange=at(acts))
    first, second, third = read_history(done.directory).rounds
    assert len(first.survivors) == len(third.survivors) == 4
    assert second.survivors in (("site-1", "site-3"), ("site-2", "site-4"))
    assert all("no reply" in why for why in second.dropouts.values())
    assert ended(actors)


def test_a_users_mistake_inside_an_actor_comes_out_as_one_line(clustered, private, tmp_path):
    wrong = clustered(*private[:3], "privacy.expected_batch=400", "engine.workers=1")
    names = ("site-1", "site-2", "site-3")
    with pytest.raises(ConfigurationError, match="expected_batch = 400") as caught:
        Actors(wrong, names, b"session of tests", tmp_path)
    assert "\n" not in str(caught.value)
    assert ended(actors)


def test_a_cluster_that_this_machine_is_not_part_of_is_named_with_the_mend(small, tmp_path):
    experiment = small("engine.kind=ray", "engine.address=localhost:1")
    with pytest.raises(ConfigurationError, match="ray start --address=localhost:1") as caught:
        run(experiment, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_without_ray_the_extra_is_named_and_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'securefl\[ray\]'") as caught:
        run(small("engine.kind=ray"), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_actor_that_sees_another_folder_than_the_engine_says_so(small, tmp_path):
    """On a machine that does not share it; here the folder never got the engine's mark."""
    experiment, names = small(), ("site-1", "site-2", "site-3")
    parts = (experiment, names, b"session of tests", tmp_path, None)
    _, [start] = starts(*parts, count=1, threads=1, shared="mark")
    told = msgspec.msgpack.decode(Sites().start(msgspec.msgpack.encode(start)), type=Failed)
    assert told.mistake
    assert str(tmp_path) in told.reason
    assert "\n" not in told.reason
    assert not any((tmp_path / name).exists() for name in names)


def test_what_starts_a_worker_shows_no_secret(small, tmp_path):
    parts = (small(), ("site-1", "site-2", "site-3"), b"session of tests", tmp_path, None)
    _, told = starts(*parts, count=2, threads=1)
    assert isinstance(told[0], Start)
    assert repr(told[0]) == "Start(site-1, site-3)"


@pytest.mark.slow
def test_sites_with_folders_of_their_own_are_proposed_the_run_and_charge_their_ledgers(
    clustered, private, tmp_path
):
    names, own = ("site-1", "site-2", "site-3"), tmp_path / "own"
    for name in names:
        (own / name).mkdir(parents=True)
        make_key(own / name)
        (own / name / "site.toml").write_text(
            f'version = 1\nname = "{name}"\n[data]\nid = "rows"\npurpose = "a trial"\n'
            '[budget]\nunit = "record"\nepsilon = 7.0\ndelta = 1e-3\n'
            '[policy]\nconsent = "standing"\nunknown_sites = true\n'
        )
    experiment = clustered("protocol.name=secagg", "rounds=2", *private)
    assert run(experiment, tmp_path / "run", sites=own).summary.rounds == 2
    for name in names:
        with Ledger(own / name / LEDGER) as ledger:
            assert [told.charged for told in ledger.standing("rows").runs] == [2]
            assert set(ledger.kept()) == set(names) - {name}


@pytest.mark.slow
def test_a_thousand_sites_of_fifty_thousand_parameters_take_part_in_every_round(tmp_path):
    """Five rounds of secagg, in memory that a small machine has."""
    command = [sys.executable, str(MANY), "ray", "1000", "5"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told["parameters"] >= 50_000
    assert told["survivors"] == [1000] * 5
    assert told["aborted"] == 0
    assert told["peak"] < 6e9
