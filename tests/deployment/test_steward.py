"""Every run that was submitted comes to its end, whatever befalls what is written about it."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from securefl.deployment.progress import PROGRESS

DAMAGED = '{"version":1,"sta'


def test_two_runs_at_once_are_run_one_after_the_other(running) -> None:
    running.hold("north", "before-upload")
    first = running.submit("first")
    running.reached("north", "before-upload")
    second = running.submit("second", "not_private_seed=8")
    running.release("north")
    for name in (first, second):
        over = running.wait_over(name)
        assert over.state == "finished", over
        running.check_correct(name)


@pytest.mark.slow
def test_a_name_that_is_taken_is_refused_and_its_run_goes_on(running) -> None:
    running.hold("north", "before-upload")
    name = running.submit("taken")
    running.reached("north", "before-upload")
    kit = str(running.kit("administrator"))
    done = running.cli("submit", "experiment.toml", "--kit", kit, "--name", name, check=False)
    assert done.returncode == 2
    assert "there is a run taken already" in done.stderr
    running.release("north")
    over = running.wait_over(name)
    assert over.state == "finished", over
    running.check_correct(name)


@pytest.mark.slow
def test_a_run_whose_progress_is_damaged_goes_on_when_the_server_is_started_again(running) -> None:
    running.hold("north", "before-upload")
    name = running.submit("damaged")
    running.reached("north", "before-upload")
    running.kill("server")
    (running.run_folder(name) / PROGRESS).write_text(DAMAGED)
    running.release("north")
    running.start("server")
    over = running.wait_over(name, 180)
    assert over.state == "finished", over
    running.check_correct(name)


@pytest.mark.slow
def test_a_server_killed_before_a_run_said_anything_begins_it(running) -> None:
    name = running.submit("early")
    running.wait(lambda: running.of("server", "runner_process"), "the job's process", 60)
    running.kill("server")
    assert running.progress(name) is None
    running.start("server")
    over = running.wait_over(name, 240)
    assert over.state == "finished", over
    running.check_correct(name)
