"""A message that comes to FLARE's server is of whom its certificate says, and for the server."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from hypothesis import given
from hypothesis import strategies as st

from securefl.deployment.origins import wrong

SITES = st.sampled_from(["north", "south", "north-2"])
JOBS = st.sampled_from(["", ".6a680dde", ".6a680dde.0"])


@given(SITES, JOBS, JOBS)
def test_a_site_and_its_jobs_speak_to_the_server_and_its_jobs(site: str, of: str, to: str) -> None:
    assert wrong(site, site, site + of, "server" + to) == ""
    assert wrong("server", "server" + of, "server" + of, site + to) == ""
    assert wrong(site, site, site + of, site + to) == ""


@given(SITES, SITES | st.just("server"), JOBS, JOBS)
def test_nobody_speaks_in_anothers_name(certificate: str, name: str, of: str, to: str) -> None:
    told = wrong(certificate, certificate + of, name + of, "server" + to)
    assert bool(told) == (name != certificate)


@given(SITES, SITES, JOBS, JOBS)
def test_no_site_speaks_to_another(site: str, other: str, of: str, to: str) -> None:
    assert bool(wrong(site, site, site + of, other + to)) == (site != other)


def test_an_administrators_session_is_itself_alone() -> None:
    from nvflare.fuel.utils.admin_name_utils import new_admin_client_name

    session, other = new_admin_client_name(), new_admin_client_name()
    assert wrong("administrator", session, session, "server") == ""
    assert wrong("administrator", session, other, "server")
    assert wrong("administrator", session, "server", "north")
    assert wrong("administrator", session, session, "north")


@pytest.mark.parametrize("certificate", ["", "N/A"])
def test_without_a_certificate_nothing_passes(certificate: str) -> None:
    assert wrong(certificate, "north", "north", "server")
