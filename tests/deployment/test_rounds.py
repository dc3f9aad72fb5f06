"""A deployment trains as a simulation does; what dies, sleeps, fills up or runs late costs a round
at most, and never a budget or a sum.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")


PHASES = ("propose", "advertise", "share", "upload", "confirm", "unmask", "open")


STEPS = PHASES[1:]


def test_a_seeded_deployment_gives_the_in_process_model_weight_for_weight(running) -> None:
    name, kit = "equal", str(running.kit("administrator"))
    running.cli("submit", "experiment.toml", "--kit", kit, "--name", name)
    over = running.wait_over(name)
    assert over.state == "finished", over
    assert over.jobs == 1
    running.check_correct(name)


def test_a_sites_service_that_dies_before_it_uploads_is_missed_in_that_round_alone(running) -> None:
    running.hold("north", "before-upload")
    name = running.submit("service", "rounds=3")
    running.reached("north", "before-upload")
    running.hold("middle", "before-advertise")  # until the next service is there
    running.end(running.of("north", "securefl.deployment.service"))
    running.release("north")
    running.reached("middle", "before-advertise")
    running.release("middle")
    over = running.wait_over(name)
    assert over.state == "finished", over
    assert over.jobs == 1
    missed = ["north" not in record.survivors for record in running.history(name).rounds]
    assert missed == [True, False, False]
    running.check_correct(name)


@pytest.mark.slow
def test_a_sites_service_killed_in_every_phase_is_a_dropout_of_that_round_and_no_more(
    running,
) -> None:
    running.hold("north", "before-advertise")
    name = running.submit("services", "rounds=8", "privacy.spare_rounds=12")
    running.reached("north", "before-advertise")
    for phase, following in zip(STEPS, (*STEPS[1:], ""), strict=True):
        if following:
            running.hold("north", f"before-{following}")
        killed = running.of("north", "securefl.deployment.service")
        running.end(killed)
        running.release("north", f"before-{phase}")
        if following:
            running.reached("north", f"before-{following}")
    over = running.wait_over(name)
    assert over.state == "finished", over
    running.check_correct(name)
    history = running.history(name)
    # Killed before it entered a round it enters it afresh; after its upload its update counts.
    assert [r.update for r in history.rounds if "north" not in r.survivors] == [1, 2]
    assert "north" in history.rounds[-1].survivors


@pytest.mark.parametrize(
    "point",
    [
        "after-upload",
        pytest.param("between-rounds", marks=pytest.mark.slow),
        pytest.param("before-upload", marks=pytest.mark.slow),
        pytest.param("before-open", marks=pytest.mark.slow),
    ],
)
def test_a_server_killed_inside_a_round_goes_on_with_the_next(running, point: str) -> None:
    between, first = point == "between-rounds", "after-open" if point == "between-rounds" else point
    for site in running.sites:  # only one of them opens a sum
        running.hold(site, first)
    name = running.submit(f"server-{point}")
    running.wait(lambda: any(running.waits(site, first) for site in running.sites), first, 90)
    if between:
        for site in running.sites:
            running.hold(site, "before-advertise")
            running.release(site, first)
        running.wait(lambda: running.done(name) == 1, "a finished round")
    running.kill("server")
    for site in running.sites:
        running.release(site)
    running.start("server")
    over = running.wait_over(name, 180)
    assert over.state == "finished", over
    assert over.jobs == 2
    running.check_correct(name)


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
    held = running.sites if phase == "open" else ("north",)  # only one of them opens a sum
    for site in held:
        running.hold(site, point)
    name = running.submit(f"kill-{phase}", "rounds=4", "deployment.patience=3")
    running.wait(lambda: any(running.waits(site, point) for site in running.sites), point, 90)
    [lost, *_] = [site for site in running.sites if running.waits(site, point)]
    stays = next(site for site in running.sites if site != lost)
    running.kill(lost)
    running.hold(stays, "before-advertise")  # of the next round
    for site in held:
        running.release(site, point)
    before = running.joined(lost)
    running.start(lost)
    running.wait_connected((lost,), before + 1)
    running.reached(stays, "before-advertise")
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_full_disk_at_a_site_is_a_dropout_and_nothing_is_forgotten(deployment) -> None:
    disk = deployment.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system to fill")
    try:
        for file in ("site.toml", "site.key"):
            shutil.copy(deployment.kit("north") / file, disk)
        deployment.options["north"] = ("--policy", str(disk / "site.toml"))
        deployment.start_all()
        deployment.hold("south", "before-advertise")
        name = deployment.submit("trial", "rounds=4")
        deployment.reached("south", "before-advertise")
        deployment.hold("south", "before-share")
        deployment.release("south", "before-advertise")
        deployment.reached("south", "before-share")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        deployment.hold("south", "before-upload")
        deployment.release("south", "before-share")
        deployment.reached("south", "before-upload")
        deployment.release("south")
        deployment.wait(lambda: deployment.done(name) >= 1, "a round without north", 60)
        (disk / "filler").unlink()
        over = deployment.wait_over(name)
        assert over.state == "finished", over
        assert "north" not in deployment.history(name).rounds[0].survivors
        deployment.check_correct(name, {"north": disk})
        told = deployment.cli("site", "log", str(disk), "--verify", check=False)
        assert told.returncode == 0, told.stdout + told.stderr
    finally:
        deployment.kill("north")
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_site_whose_clock_is_an_hour_off_takes_part(deployment) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler to make another clock with")
    shim = deployment.folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    built = [compiler, "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(built, check=True)
    deployment.start("server")
    deployment.start("middle")
    deployment.start("north", LD_PRELOAD=str(shim), CLOCK_OFF="-3600")
    deployment.start("south", LD_PRELOAD=str(shim), CLOCK_OFF="3600")
    deployment.wait_connected(deployment.sites)
    name = deployment.submit()
    over = deployment.wait_over(name)
    assert over.state == "finished", over
    assert over.sites == deployment.sites
    deployment.check_correct(name)
