"""A deployed run is audited by each site with its own evidence; its secrets stay in its own kit."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

ASKED = (
    "rounds=4",
    "audit.canaries=16",
    "transcript.consent=['middle', 'north', 'south']",
    "transcript.own=['north', 'south']",
    "transcript.keep_until=2999-06-30",
)
PERMITTED = "canaries = true\nown_recording = true\ntranscript_until = 2999-12-31\n"


@pytest.mark.slow
def test_a_site_audits_a_deployed_run_with_its_own_evidence_and_nobody_elses(
    running, tmp_path
) -> None:
    for site in running.sites:
        told = running.kit(site) / "site.toml"
        told.write_text(told.read_text().replace("[policy]\n", f"[policy]\n{PERMITTED}"))
    over = running.wait_over(running.submit("audited", *ASKED))
    assert over.state == "finished", over
    at_server = running.run_folder("audited")
    assert (at_server / "transcript" / "messages.bin").exists()
    for name in ("recording.bin", "canaries.json"):  # secrets are where their owners are
        assert not list(running.server.rglob(name))
        assert list(running.kit("north").rglob(name))
    assert list(running.kit("middle").rglob("canaries.json"))
    assert not list(running.kit("middle").rglob("recording.bin"))
    # What the site gets from the server, and its own folder: no other site's.
    shutil.copytree(at_server, tmp_path / "run")
    kit = running.kit("north")
    chosen = [
        word
        for name in ("epsilon", "readable", "shared-key", "loss")
        for word in ("--attack", name)
    ]
    audited = running.cli("audit", str(tmp_path / "run"), "--site", str(kit), *chosen, check=False)
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    reasons = {row["attack"]: row["reason"] for row in found["rows"]}
    assert audited.returncode == 0, (audited.stderr, reasons)
    assert found["auditing"] == ["north"]
    assert found["alarms"] == []
    rows = {row["attack"]: row for row in found["rows"]}
    assert rows["epsilon"]["results"][0]["n"] == 16  # its own canaries, and no others
    assert rows["readable"]["verdict"] == "this attack fails"
    assert rows["loss"]["results"]
    assert rows["shared-key"]["verdict"] == "not assessed"
    assert set(found["hashes"]["ledgers"]) == set(running.sites)
    assert list(found["hashes"]["policies"]) == ["north"]
    running.cli("report", "sign", str(tmp_path / "run"), "--site", str(kit))
    running.cli("report", "verify", str(tmp_path / "run"), "--site", str(kit))
