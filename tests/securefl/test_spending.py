"""A site's ledger in a round: charged before anything is drawn, and witnessed by its peers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocols.identity import SigningKey
from securefl import client as client_module
from securefl import simulation
from securefl.config import ConfigurationError
from securefl.engines import inprocess
from securefl.messages import Answer, Refusal, Request
from securefl.privacy.ledger import Holding, Ledger, OverlapError, SignedHead
from securefl.server import Server
from securefl.store import CorruptStoreError, SiteStore

SESSION = b"session of tests"
PROTOCOLS = ("masked-bfv", "secagg", "bfv", "plain")
ALL = pytest.mark.parametrize("protocol", PROTOCOLS)


@pytest.fixture
def holding(tmp_path: Path):
    """`holding(site)`: its data set in its ledger, with a budget of epsilon 5 at delta 1e-3."""
    budgets = {"epsilon": 5.5}

    def made(site: str, run: str = "run-1") -> Holding:
        ledger = Ledger(tmp_path / "ledgers" / f"{site}.sqlite")
        if "rows" not in ledger.datasets:
            ledger.register("rows", unit="record", delta=1e-3, purpose="a trial", **budgets)
        return Holding(ledger, "rows", run)

    made.budgets = budgets
    return made


def serve(made, plan=None) -> Server:
    """An honest server over the bench's clients."""
    plan = plan or simulation.assemble(made.experiment).plan
    return Server(
        made.experiment,
        made.roster,
        SESSION,
        lambda phase, messages: inprocess.exchange(made.clients, messages),
        lambda number, phase: None,
        plan,
    )


@ALL
def test_a_round_is_in_the_ledger_before_any_sample_or_noise_is_drawn(
    small, bench, private, holding, protocol, monkeypatch
):
    made = bench(small(f"protocol.name={protocol}", *private), holding)
    requests = made.drive(1, "upload")
    seen: list[int] = []
    real = client_module.Trainer.update

    def watched(self, weights, mask, randomness, *more):
        seen.append(holding("site-2").ledger.charged("run-1"))
        return real(self, weights, mask, randomness, *more)

    monkeypatch.setattr(client_module.Trainer, "update", watched)
    assert holding("site-2").ledger.charged("run-1") == 0
    reply = made.ask("site-2", requests["site-2"])
    assert seen == [1]
    assert isinstance(reply, Answer)
    head = reply.head.check("site-2", made.roster)
    assert head == holding("site-2").ledger.head
    assert made.ask("site-2", requests["site-2"]) == reply  # asked again: the same, charged once
    assert holding("site-2").ledger.charged("run-1") == 1


def test_only_the_upload_carries_a_head(small, bench, private, holding):
    made = bench(small("protocol.name=secagg", *private), holding)
    said = []
    requests = made.drive(1, "upload", lambda site, phase, request: said.append((site, request)))
    assert said
    assert all(made.ask(site, request).head is None for site, request in said)
    assert made.ask("site-1", requests["site-1"]).head is not None


def test_without_a_plan_the_ledger_is_not_touched(small, bench, holding):
    made = bench(small("protocol.name=plain"), holding)
    assert made.ask("site-1", made.first(1)).head is None
    assert holding("site-1").ledger.charged("run-1") == 0


def test_a_site_at_the_end_of_its_budget_stops_and_the_round_goes_on_without_it(
    small, bench, private, holding
):
    holding.budgets["epsilon"] = 2.5
    holding("site-2")
    holding.budgets["epsilon"] = 100.0
    made = bench(small("protocol.name=bfv", "rounds=40", *private), holding)
    server, rounds = serve(made), {}
    for number in range(1, 41):
        rounds[number] = server.round(number, made.state)
        if len(rounds[number].contributors) < 3:
            break
    assert 1 < number < 40
    assert rounds[number].contributors == ("site-1", "site-3")
    reason = rounds[number].faults["site-2"]
    assert "site-2: data set 'rows' has spent epsilon" in reason
    assert "of 2.5; one more round would bring it to" in reason
    ledger = holding("site-2").ledger
    assert ledger.charged("run-1") == number - 1
    assert ledger.epsilon("rows") <= 2.5 < holding("site-1").ledger.epsilon("rows")
    assert SiteStore(made.folder / "site-2").charged == number - 1


def test_runs_on_one_data_set_share_its_budget(small, bench, private, holding, tmp_path):
    holding.budgets["epsilon"] = 8.0  # by the filter the first run comes to more than its plan says
    first = bench(small("protocol.name=plain", "rounds=3", *private), holding)
    for number in (1, 2, 3):
        assert isinstance(first.ask("site-1", first.first(number)), Answer)
    alone = holding("site-1").ledger.epsilon("rows")
    for client in first.clients.values():
        client.close()
    second = type(first)(
        small("protocol.name=plain", "rounds=60", *private, "privacy.epsilon=8"),
        tmp_path / "second",
        lambda site: holding(site, "run-2"),
    )
    answered = 0
    while isinstance(reply := second.ask("site-1", second.first(answered + 1)), Answer):
        answered += 1
        assert answered < 60
    assert isinstance(reply, Refusal)
    assert reply.kind == "budget"
    assert 0 < alone < holding("site-1").ledger.epsilon("rows") <= 8.0
    assert holding("site-1").ledger.charged("run-2") == answered


def test_peers_keep_the_signed_heads_and_a_ledger_put_back_shows(
    small, bench, private, holding, tmp_path
):
    made = bench(small("protocol.name=bfv", *private), holding)
    server = serve(made)
    server.round(1, made.state)
    old = (tmp_path / "ledgers" / "site-1.sqlite").read_bytes()
    server.round(2, made.state)
    server.round(3, made.state)
    for site, peers in (("site-2", {"site-1", "site-3"}), ("site-3", {"site-1", "site-2"})):
        kept = holding(site).ledger.kept()
        assert set(kept) == peers
        assert [len(heads) for heads in kept.values()] == [2, 2]
        for peer, heads in kept.items():
            for told in heads:
                holding(peer).ledger.verify(told.check(peer, made.roster))
    told = holding("site-2").ledger.kept()["site-1"][-1]
    (tmp_path / "ledgers" / "site-1.sqlite").write_bytes(old)
    with pytest.raises(CorruptStoreError, match="an older copy was put back"):
        holding("site-1").ledger.verify(told.check("site-1", made.roster))


class Forging:
    """A site whose replies carry a head that another key signed."""

    def __init__(self, client) -> None:
        self.client = client

    def answer(self, data: bytes) -> bytes:
        reply = self.client.answer(data)
        if Request.from_bytes(data).phase != "upload":
            return reply
        answer = Answer.from_bytes(reply)
        head = SignedHead(answer.head.entries - 1, answer.head.hash, answer.head.signature)
        return Answer(answer.body, head).to_bytes()


def test_a_site_whose_head_is_not_signed_by_it_falls_out(small, bench, private, holding):
    made = bench(small("protocol.name=bfv", *private), holding)
    made.clients["site-1"] = Forging(made.clients["site-1"])
    done = serve(made).round(1, made.state)
    assert done.contributors == ("site-2", "site-3")
    assert "signature of site-1" in done.faults["site-1"]


def test_a_site_refuses_heads_that_its_peers_did_not_sign(small, bench, private, holding):
    made = bench(small("protocol.name=plain", *private), holding)
    other = SigningKey(os.urandom)
    head = holding("site-2").ledger.head.signed(other)
    whole = Request.from_bytes(made.first(1))
    for site in ("site-2", "nobody"):
        fields = {name: getattr(whole, name) for name in whole.__struct_fields__}
        reply = made.ask("site-1", Request(**fields | {"heads": {site: head}}).to_bytes())
        assert isinstance(reply, Refusal)
        assert site in reply.reason
    assert holding("site-1").ledger.kept() == {}
    assert holding("site-1").ledger.charged("run-1") == 0


def test_a_crash_after_the_ledgers_charge_never_lets_the_round_be_entered_again(
    small, bench, private, holding, monkeypatch
):
    """In plain the upload is the first phase: nothing else made the round number durable."""
    made = bench(small("protocol.name=plain", *private), holding)

    class Crashed(BaseException):
        pass

    def crash(self, round_number, release):
        raise Crashed

    with monkeypatch.context() as patched:
        patched.setattr(SiteStore, "charge", crash)
        with pytest.raises(Crashed):
            made.clients["site-1"].answer(made.first(1))
    made.clients["site-1"].close()
    made.clients["site-1"] = made.client("site-1")
    reply = made.ask("site-1", made.first(1))
    assert isinstance(reply, Refusal)
    assert "charged before" in reply.reason
    assert isinstance(made.ask("site-1", made.first(2)), Answer)
    assert holding("site-1").ledger.charged("run-1") == 2


def test_the_same_records_under_another_id_are_refused(small, bench, private, holding, tmp_path):
    made = bench(small("protocol.name=plain", *private), holding)
    ledger = holding("site-1").ledger
    ledger.register("again", unit="record", epsilon=9.0, delta=1e-3, purpose="once more")
    made.clients["site-1"].close()
    with pytest.raises(OverlapError, match=r"shares .* records with rows"):
        simulation.client(
            made.experiment,
            made.tables["site-1"],
            made.identities["site-1"],
            bytes(16),
            tmp_path / "again",
            Holding(ledger, "again", "run-2"),
        )


def test_a_run_cannot_change_its_experiment(small, bench, private, holding, tmp_path):
    made = bench(small("protocol.name=plain", *private), holding)
    made.clients["site-1"].close()
    with pytest.raises(ConfigurationError, match=r"was opened .* under another experiment"):
        type(made)(
            small("protocol.name=plain", *private, "privacy.epsilon=4"),
            tmp_path / "other",
            holding,
        )


def test_a_run_that_protects_sites_counts_twice_as_far_on_records(small, bench, holding):
    overrides = (
        "privacy.unit=site",
        "privacy.epsilon=400.0",
        "privacy.delta=1e-3",
        "protocol.name=secagg",
    )
    holding.budgets["epsilon"] = 1e5
    made = bench(small(*overrides), holding)
    assert serve(made).round(1, made.state).contributors == ("site-1", "site-2", "site-3")
    (run,) = holding("site-1").ledger.standing("rows").runs
    assert run.mechanism == "PoissonDiscreteGaussianSum"
    assert run.charged == 1
