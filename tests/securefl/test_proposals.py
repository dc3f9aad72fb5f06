"""What a site refused is kept for its people; what they agree to is accepted the next time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from protocols.identity import SigningKey
from securefl import cli, config, simulation
from securefl.audit_log import Audited
from securefl.messages import Answer, PinnedKey, Proposal, Refusal, parse_reply
from securefl.proposals import MOST, Proposals
from securefl.site_folder import read_key

SCHEMA = """\
version = 1
name = "triage"
label = "disease"
[columns.age]
type = "number"
range = [0, 110]
[columns.disease]
type = "category"
categories = ["no", "yes"]
"""
EXPERIMENT = """\
version = 1
name = "{name}"
rounds = {rounds}
[data]
source = "table"
schema = "schema.toml"
[sites]
names = ["east", "north", "south"]
[preprocessing]
scale = "range"
[model]
name = "logistic"
[privacy]
noise = "distributed"
epsilon = 2.0
delta = 1e-3
rate = 0.3
expected_batch = 20
[protocol]
colluding_sites = 1
"""
INIT = "--name north --data-id clinic --unit record --epsilon 6 --delta 1e-3 --purpose triage"
OTHERS = {
    name: SigningKey(lambda size, n=name: n[:1].encode() * size) for name in ("east", "south")
}


class Site:
    """A site on its own folder, what a server sends it, and the commands of its people."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.own = folder, folder / "north"
        (folder / "schema.toml").write_text(SCHEMA)
        rows = "".join(f"{20 + i % 60},{'yes' if i % 2 else 'no'}\n" for i in range(120))
        (folder / "north.csv").write_text("age,disease\n" + rows)
        files = ["--data", str(folder / "north.csv"), "--schema", str(folder / "schema.toml")]
        assert self.call("init", str(self.own), *INIT.split(), *files).exit_code == 0
        path = self.own / "site.toml"
        pins = "".join(f'{name} = "{key.public.hex()}"\n' for name, key in OTHERS.items())
        path.write_text(path.read_text() + pins)
        self.gate: Audited = simulation.deployed_gate(self.own, "the server of a test")
        self.session = 0

    def call(self, *arguments: str) -> Any:
        runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
        return runner.invoke(cli.app, ["site", *arguments])

    def proposal(self, name: str = "triage", rounds: int = 3) -> Proposal:
        """A run of its own in every call, as when it is submitted again."""
        (self.folder / "experiment.toml").write_text(EXPERIMENT.format(name=name, rounds=rounds))
        text = config.load(self.folder / "experiment.toml").dump()
        keys = {name: key.public for name, key in OTHERS.items()}
        keys["north"] = read_key(self.own).public
        pinned = tuple(PinnedKey(site, keys[site]) for site in sorted(keys))
        self.session += 1
        number = self.session.to_bytes(16, "big")
        return Proposal(number, number, text, 4, pinned)

    def asked(self, proposal: Proposal) -> Answer | Refusal:
        return parse_reply(self.gate.answer(proposal.to_bytes()))


@pytest.fixture
def site(tmp_path: Path) -> Any:
    made = Site(tmp_path)
    yield made
    made.gate.close()


def test_a_refused_proposal_is_agreed_to_and_accepted_when_it_is_proposed_again(site: Site) -> None:
    assert isinstance(site.asked(site.proposal()), Refusal)
    shown = site.call("proposals", str(site.own))
    assert "waits for a person to agree" in " ".join(shown.stdout.split())
    agreed = site.call(
        "agree", "--site", str(site.own), "--proposal", "latest", "--by", "A. Person", "--yes"
    )
    assert agreed.exit_code == 0, agreed.output
    [told] = json.loads(site.call("proposals", str(site.own), "--format", "json").stdout)
    assert told["now"] == "agreed to: propose it again"
    assert isinstance(site.asked(site.proposal()), Answer)
    assert Proposals(site.own).newest_first() == ()


def test_what_a_person_reads_is_what_was_proposed(site: Site) -> None:
    site.asked(site.proposal("relapse"))
    [kept] = Proposals(site.own).newest_first()
    shown = site.call("check", "--site", str(site.own), "--proposal", kept.id[:3])
    assert shown.exit_code == 0, shown.output
    assert "relapse: at most" in shown.stdout
    assert "east, north, south" in shown.stdout
    assert kept.by == "the server of a test"


def test_a_consent_to_one_proposal_is_none_to_another(site: Site) -> None:
    site.asked(site.proposal())
    where = ("--site", str(site.own))
    site.call("agree", *where, "--proposal", "latest", "--by", "A. Person", "--yes")
    refused = site.asked(site.proposal(rounds=4))
    assert isinstance(refused, Refusal)
    assert "policy.consent" in refused.reason


def test_the_same_proposal_is_kept_once_and_old_ones_go(site: Site) -> None:
    for _ in range(2):
        site.asked(site.proposal())
    assert len(Proposals(site.own).newest_first()) == 1
    for number in range(MOST + 3):
        site.asked(site.proposal(f"run-{number}"))
    assert len(Proposals(site.own).newest_first()) == MOST


def test_a_proposal_with_an_unknown_key_is_not_agreed_to(site: Site) -> None:
    proposal = site.proposal()
    stranger = SigningKey(lambda size: b"x" * size).public
    east, *rest = proposal.roster
    swapped = (PinnedKey(east.site, stranger), *rest)
    parts = (proposal.session, proposal.run, proposal.experiment, proposal.parameters)
    assert isinstance(site.asked(Proposal(*parts, swapped)), Refusal)
    shown = " ".join(site.call("proposals", str(site.own)).stdout.split())
    assert "refused: [consortium] has not the key that it gives east" in shown
    where = ("--site", str(site.own))
    done = site.call("agree", *where, "--proposal", "latest", "--by", "A. Person", "--yes")
    assert done.exit_code == 2
    assert "put it under [consortium] in site.toml" in done.stderr
    assert not (site.own / "consents").exists()


def test_no_such_proposal_is_one_line(site: Site) -> None:
    site.asked(site.proposal())
    [kept] = Proposals(site.own).newest_first()
    done = site.call("check", "--site", str(site.own), "--proposal", "zz")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert kept.id in done.stderr


@pytest.mark.parametrize("extra", [("--sites", "3"), ("experiment.toml",)])
def test_a_proposal_says_all_and_nothing_is_laid_over_it(
    site: Site, extra: tuple[str, ...]
) -> None:
    site.asked(site.proposal())
    done = site.call("check", *extra, "--site", str(site.own), "--proposal", "latest")
    assert done.exit_code == 2
    assert "leave EXPERIMENT, --sites and --parameters out" in done.stderr


def test_a_site_that_cannot_write_it_down_refuses_as_before(site: Site) -> None:
    (site.own / "proposals").write_text("in the way")
    refused = site.asked(site.proposal())
    assert isinstance(refused, Refusal)
    assert "policy.consent" in refused.reason
