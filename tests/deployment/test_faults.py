"""What dies, sleeps, fills up or runs late costs a round at most, and never a budget or a sum."""

from __future__ import annotations

import signal
import time

import pytest

PHASES = ("propose", "advertise", "share", "upload", "confirm", "unmask", "open")


@pytest.mark.parametrize(
    "phase",
    [
        phase if phase == "upload" else pytest.param(phase, marks=pytest.mark.slow)
        for phase in PHASES
    ],
)
def test_a_site_killed_in_a_phase_is_missed_in_that_round_and_counted_in_by_the_next_job(
    running, phase: str
) -> None:
    point = f"before-{phase}"
    for site in running.sites if phase == "open" else ("north",):  # only one of them opens a sum
        running.hold(site, point)
    name = running.submit(f"kill-{phase}", "rounds=4", "deployment.patience=3")
    running.wait(lambda: any(running.waits(site, point) for site in running.sites), point, 90)
    [lost, *_] = [site for site in running.sites if running.waits(site, point)]
    stays = next(site for site in running.sites if site != lost)
    running.kill(lost)
    running.hold(stays, "before-advertise")  # of the next round
    for site in running.sites:
        running.release(site, point)
    before = running.joined(lost)
    running.start(lost)
    running.wait_connected((lost,), before + 1)
    running.hold(stays, "before-share")
    running.release(stays, "before-advertise")  # when phases change, the server says who is silent
    running.wait(lambda: running.gives_way(name), "the steward asks for another job", 60)
    running.release(stays)
    over = running.wait_over(name)
    assert over.state == "finished", over
    assert over.jobs >= 2
    assert lost in running.history(name).rounds[-1].survivors
    running.check_correct(name)


@pytest.mark.slow
def test_a_site_that_sleeps_for_30_seconds_is_waited_for(running) -> None:
    running.hold("north", "before-upload")
    name = running.submit("sleep")
    running.reached("north", "before-upload")
    running.signal("north", signal.SIGSTOP)
    running.release("north")
    time.sleep(30)
    running.signal("north", signal.SIGCONT)
    over = running.wait_over(name)
    assert over.state == "finished", over
    assert all("north" in record.survivors for record in running.history(name).rounds)
    running.check_correct(name)


def test_a_reply_that_comes_after_the_deadline_is_left_out_and_the_site_is_in_the_next_round(
    running,
) -> None:
    running.hold("north", "after-upload")
    running.hold("south", "before-advertise")
    name = running.submit("late", "deployment.training_deadline=4")
    running.reached("south", "before-advertise")
    running.release("south", "before-advertise")
    running.reached("north", "after-upload")
    running.wait(lambda: running.done(name) >= 1, "a round without north", 60)
    running.release("north")
    over = running.wait_over(name)
    assert over.state == "finished", over
    rounds = running.history(name).rounds
    assert "north" not in rounds[0].survivors
    assert "north" in rounds[-1].survivors
    assert running.charged("north", name) == 3  # for the update that came too late, too
    running.check_correct(name)


def test_stragglers_are_left_behind_once_enough_have_answered(running) -> None:
    running.hold("north", "before-upload")
    name = running.submit("straggler", "deployment.stragglers=1", "rounds=2")
    running.reached("north", "before-upload")
    running.wait(lambda: running.done(name) >= 1, "a round without north", 60)
    running.release("north")
    over = running.wait_over(name)
    assert over.state == "finished", over
    assert "north" not in running.history(name).rounds[0].survivors
    running.check_correct(name)


def test_a_run_waits_where_too_few_sites_are_left_and_goes_on_when_they_are_back(running) -> None:
    for site in ("north", "south"):
        running.hold(site, "before-upload")
    name = running.submit("few", "deployment.patience=2")
    for site in ("north", "south"):
        running.reached(site, "before-upload")
        running.kill(site)
        running.release(site)
    running.wait(lambda: running.state(name) == "waiting", "the run to wait", 90)
    before = {site: running.joined(site) for site in ("north", "south")}
    for site in ("north", "south"):
        running.start(site)
    for site in ("north", "south"):
        running.wait_connected((site,), before[site] + 1)
    over = running.wait_over(name)
    assert over.state == "finished", over
    running.check_correct(name)
