"""What a run on a consortium's server does when its job does not answer, or is the wrong one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from securefl import deployment_cli, store
from securefl.config import ConfigurationError
from securefl.deployment.authority import Consortium
from securefl.deployment.conduct import Waits, conduct
from securefl.deployment.kits import Kit
from securefl.deployment.progress import check_name, every_run, read_progress
from securefl.deployment.steward import Steward

SITES = ("a", "b", "c")
EXPERIMENT = """
version = 1
name = "trial"
[data]
source = "table"
[data.schema]
version = 1
name = "rows"
label = "y"
[data.schema.columns.x]
type = "number"
range = [0, 1]
[data.schema.columns.y]
type = "category"
[data.schema.columns.y.categories]
no = ["0"]
yes = ["1"]
[sites]
names = ["a", "b", "c"]
[preprocessing]
[protocol]
minimum_cohort = 2
colluding_sites = 0
"""


class Nobody:
    """A job whose sites do not answer."""

    job = "job-1"
    deployed = SITES
    silent = ()
    gives_way = False
    stops = False

    def __init__(self, sites: tuple[str, ...] = SITES) -> None:
        self.sites = sites

    def exchange(self, messages: Mapping[str, bytes], waits: Waits) -> dict[str, bytes]:
        assert waits.enough == 2
        return {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's kit that no test changes: keys of RSA-3072 take a while to make."""
    folder = tmp_path_factory.mktemp("made") / "trial"
    return Consortium.new(folder, "localhost:1", SITES).kit("server")


@pytest.fixture
def kit(made: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(made, tmp_path / "server"))


def test_a_run_whose_sites_are_gone_waits_for_them(kit: Path) -> None:
    conduct(kit, "one", EXPERIMENT, Nobody(()))
    progress = read_progress(kit / "runs" / "one")
    assert progress is not None
    assert (progress.state, progress.least) == ("waiting", 2)
    assert not progress.over


def test_a_run_that_all_sites_refuse_has_failed_and_says_why(kit: Path) -> None:
    with pytest.raises(RuntimeError, match="too few sites take part"):
        conduct(kit, "one", EXPERIMENT, Nobody())
    progress = every_run(kit)["one"]
    assert progress.state == "failed"
    assert "a sum needs 2" in progress.reason


def test_a_job_without_an_experiment_goes_on_with_a_run_and_begins_none(kit: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run one to go on with"):
        conduct(kit, "one", "", Nobody())
    conduct(kit, "one", EXPERIMENT, Nobody(()))
    conduct(kit, "one", "", Nobody(()))
    progress = read_progress(kit / "runs" / "one")
    assert progress is not None
    assert progress.jobs == 2


def test_a_second_run_of_the_same_name_is_refused_and_the_first_is_as_it_was(kit: Path) -> None:
    conduct(kit, "one", EXPERIMENT, Nobody(()))
    before = read_progress(kit / "runs" / "one")
    other = EXPERIMENT.replace("[sites]", "[training]\nlocal_steps = 7\n[sites]")
    with pytest.raises(ConfigurationError, match="a run one already"):
        conduct(kit, "one", other, Nobody())
    assert read_progress(kit / "runs" / "one") == before


def test_a_second_job_of_a_run_leaves_the_first_alone(kit: Path) -> None:
    conduct(kit, "one", EXPERIMENT, Nobody(()))
    before = read_progress(kit / "runs" / "one")
    with (
        store.exclusive(kit / "runs" / "one" / "job"),
        pytest.raises(ConfigurationError, match="in use by another process"),
    ):
        conduct(kit, "one", "", Nobody())
    assert read_progress(kit / "runs" / "one") == before


def test_a_run_that_waits_is_stopped_with_the_servers_kit_and_no_job_begins_again(
    kit: Path,
) -> None:
    conduct(kit, "one", EXPERIMENT, Nobody(()))
    deployment_cli.stop(kit, "one")
    progress = read_progress(kit / "runs" / "one")
    assert progress is not None
    assert progress.state == "waiting"  # the steward sees it next
    Steward(Kit.load(kit), print)._go_on("one", progress, SITES)
    assert every_run(kit)["one"].state == "stopped"
    with pytest.raises(ConfigurationError, match="no run 'one' goes on"):
        deployment_cli.stop(kit, "one")
    with pytest.raises(ConfigurationError, match="no run 'two' goes on"):
        deployment_cli.stop(kit, "two")


def test_a_site_outside_the_roster_is_refused_by_name(kit: Path) -> None:
    other = EXPERIMENT.replace('"c"]', '"stranger"]')
    with pytest.raises(ConfigurationError, match="stranger is not in the consortium's roster"):
        conduct(kit, "one", other, Nobody())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x" * 101, "a b", "a\n"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a run"):
        check_name(name)
