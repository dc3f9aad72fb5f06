"""A real deployment trains as a simulation does, and goes on whatever dies."""

from __future__ import annotations

import pytest

PHASES = ("advertise", "share", "upload", "confirm", "unmask", "open")


def test_a_seeded_deployment_gives_the_in_process_model_weight_for_weight(deployment) -> None:
    deployment.start_all()
    name = deployment.submit()
    over = deployment.wait_over(name)
    assert over.state == "finished", over
    assert over.jobs == 1
    deployment.check_correct(name)


def test_a_sites_service_killed_in_every_phase_is_a_dropout_of_that_round_and_no_more(
    deployment,
) -> None:
    deployment.start_all()
    deployment.hold("north", "before-advertise")
    name = deployment.submit("trial", "rounds=8", "privacy.spare_rounds=12")
    deployment.reached("north", "before-advertise")
    for phase, following in zip(PHASES, (*PHASES[1:], ""), strict=True):
        if following:
            deployment.hold("north", f"before-{following}")
        killed = deployment.of("north", "securefl.deployment.service")
        deployment.end(killed)
        (deployment.folder / "holds" / "north" / f"before-{phase}").unlink()
        if following:
            deployment.reached("north", f"before-{following}")
    over = deployment.wait_over(name)
    assert over.state == "finished", over
    deployment.check_correct(name)
    history = deployment.history(name)
    # Killed before it entered a round it enters it afresh; after its upload its update counts.
    assert [r.update for r in history.rounds if "north" not in r.survivors] == [1, 2]
    assert "north" in history.rounds[-1].survivors


@pytest.mark.parametrize("point", ["before-upload", "after-upload", "before-open"])
def test_a_server_killed_inside_a_round_goes_on_with_the_next(deployment, point: str) -> None:
    deployment.start_all()
    for site in deployment.sites:  # only one of them opens a sum
        deployment.hold(site, point)
    name = deployment.submit()
    deployment.wait(
        lambda: any(deployment.waits(site, point) for site in deployment.sites), point, 90
    )
    deployment.kill("server")
    for site in deployment.sites:
        deployment.release(site)
    deployment.start("server")
    over = deployment.wait_over(name, 180)
    assert over.state == "finished", over
    assert over.jobs == 2
    deployment.check_correct(name)
