"""A site answers no request before a proposal that its policy permits and a person agreed to."""

from __future__ import annotations

import hashlib
import random
import stat
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from protocols.encoding import Aggregate
from protocols.errors import MalformedMessageError
from protocols.identity import Roster, SigningKey
from securefl import config, models, simulation
from securefl.client import Client
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table
from securefl.engines import inprocess
from securefl.messages import Answer, PinnedKey, Proposal, Refusal, Request, parse_reply
from securefl.privacy import policy
from securefl.server import Server
from securefl.site import Consents, Gate
from securefl.site_folder import KEY, SITE, make_key, read_key
from securefl.state import GlobalState
from securefl.store import CorruptStoreError, SiteStore

TODAY = date(2026, 11, 22)
SESSION, RUN = b"session of tests", b"run number one.."
NAMES = ("east", "north", "south")
PLAN = ("privacy.epsilon=5", "privacy.delta=1e-3", "privacy.rate=0.2", "privacy.expected_batch=16")
PARAMETERS = 62  # of the logistic model on 30 features with two classes


class Village:
    """Gates of some sites in folders of their own, and what an honest server would send them."""

    def __init__(self, folder: Path, experiment: Experiment, **changes: Any) -> None:
        self.folder, self.experiment = folder, experiment
        self.loaded: list[str] = []
        self.told: list[str] = []
        keys: dict[str, SigningKey] = {}
        for name in NAMES:
            (folder / name).mkdir(parents=True)
            keys[name] = make_key(folder / name)
        self.keys = {name: key.public for name, key in keys.items()}
        for name in NAMES:
            self.write(name, **changes)
        self.tables: Mapping[str, Table] = simulation.assemble(experiment).sites
        self.gates = {name: self.gate(name) for name in NAMES}

    def write(self, name: str, pinning: Sequence[str] = NAMES, **changes: Any) -> None:
        pinned = {other: self.keys[other].hex() for other in pinning if other != name}
        table = {
            "version": 1,
            "name": name,
            "data": {"id": "cardiology", "purpose": "predict relapse"},
            "budget": {"unit": "record", "epsilon": 6.0, "delta": 1e-3},
            "policy": {"consent": "standing"},
            "consortium": pinned,
        }
        table |= {key: {**table.get(key, {}), **value} for key, value in changes.items()}  # type: ignore[dict-item]
        (self.folder / name / SITE).write_text(tomli_w.dumps(table))

    def restart(self, name: str = "north") -> None:
        self.gates[name].close()
        self.gates[name] = self.gate(name)

    def gate(self, name: str) -> Gate:
        folder = self.folder / name

        def load(experiment: Experiment) -> Table:
            self.loaded.append(name)
            return self.tables[name]

        def client(
            experiment: Experiment, identity: Any, session: bytes, run: bytes, table: Table
        ) -> Client:
            store = SiteStore(folder / "runs" / run.hex())
            return Client(experiment, identity, session, table, store)

        return Gate(folder, load, client, today=lambda: TODAY, tell=self.told.append)

    def proposal(self, **changes: Any) -> bytes:
        roster = tuple(PinnedKey(name, key) for name, key in sorted(self.keys.items()))
        fields = {
            "session": SESSION,
            "run": RUN,
            "experiment": self.experiment.dump(),
            "parameters": PARAMETERS,
            "roster": roster,
        }
        return Proposal(**(fields | changes)).to_bytes()

    def ask(self, data: bytes, name: str = "north") -> Answer | Refusal:
        return parse_reply(self.gates[name].answer(data))

    def agree(self, name: str = "north", experiment: Experiment | None = None) -> Path:
        site = config.load_site(self.folder / name / SITE)
        asked = policy.asked(site, experiment or self.experiment, len(NAMES), PARAMETERS)
        return Consents(self.folder / name).agree(asked, "A. Person")

    def close(self) -> None:
        for gate in self.gates.values():
            gate.close()


@pytest.fixture
def village(tmp_path: Path, small: Any) -> Any:
    """`village("key=value", ..., policy={...})`: three sites that permit a private experiment."""
    made: list[Village] = []

    def make(*overrides: str, **changes: Any) -> Village:
        base = (f"sites.names={list(NAMES)}", "sites.count=3", "protocol.name=secagg", *PLAN)
        made.append(Village(tmp_path / "sites", small(*base, *overrides), **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(made: Village, data: bytes, *telling: str, kind: str = "policy") -> Refusal:
    """The refusal of `data`, for which nothing was read, imported or written."""
    before, loaded = contents(made.folder), list(made.loaded)
    reply = made.ask(data)
    assert isinstance(reply, Refusal), reply
    assert reply.kind == kind
    for part in telling:
        assert part in reply.reason, reply.reason
    assert contents(made.folder) == before
    assert made.loaded == loaded
    return reply


def request(session: bytes = SESSION) -> bytes:
    return Request(session, 1, "advertise", b"").to_bytes()


# --- the order of things -------------------------------------------------------------------------


def test_sites_that_accepted_a_proposal_run_rounds_with_an_honest_server(village: Any) -> None:
    made = village()
    for name in NAMES:
        reply = made.ask(made.proposal(), name)
        assert reply == Answer(made.experiment.digest())
    assert sorted(made.loaded) == sorted(NAMES)
    table = made.tables["north"]
    module = models.build(made.experiment.model, table.shape, table.outputs, made.experiment.seed)
    weights = models.flatten(module)
    server = Server(
        made.experiment,
        Roster(made.keys),
        SESSION,
        lambda phase, messages: inprocess.exchange(made.gates, messages),
        lambda number, phase: None,
    )
    done = server.round(1, GlobalState(0, weights, np.ones(len(weights), np.bool_)))
    assert done.contributors == NAMES
    assert isinstance(done.result, Aggregate)
    assert SiteStore(made.folder / "north" / "runs" / RUN.hex()).charged == 1


def test_requests_before_an_accepted_proposal_are_refused(village: Any) -> None:
    made = village(policy={"consent": "each-run"})
    refused(made, request(), "accepted no proposal", "propose a run first")
    refused(made, made.proposal(), "policy.consent")
    refused(made, request(), "accepted no proposal")
    made.agree()
    assert isinstance(made.ask(made.proposal()), Answer)
    refused(made, request(b"another session!"), "accepted no proposal")
    reply = made.ask(request())  # the client's own answer: an empty body begins no round
    assert isinstance(reply, Refusal)
    assert reply.kind == "request"


def test_the_same_proposal_again_is_answered_alike_and_loads_nothing_again(village: Any) -> None:
    made = village()
    first = made.ask(made.proposal())
    assert [made.ask(made.proposal()) for _ in range(3)] == [first] * 3
    assert made.loaded == ["north"]


def test_a_session_and_a_run_keep_their_experiment_and_their_sites(village: Any) -> None:
    made = village()
    assert isinstance(made.ask(made.proposal()), Answer)
    other = made.experiment.model_copy(update={"rounds": 3}).dump()
    refused(made, made.proposal(experiment=other), "this session", "cannot change")
    refused(made, made.proposal(run=b"run number two.."), "this session", "cannot change")
    assert isinstance(made.ask(made.proposal()), Answer)
    later = {"session": b"a later session!"}
    refused(made, made.proposal(experiment=other, **later), "this run", "start a new run")
    made.write("north", (), policy={"consent": "standing", "unknown_sites": True})
    made.restart()
    keys = {**made.keys, "south": bytes(range(32))}
    roster = tuple(PinnedKey(name, key) for name, key in sorted(keys.items()))
    refused(made, made.proposal(roster=roster, **later), "this run", "other sites")
    assert isinstance(made.ask(made.proposal(**later)), Answer)  # as it was: resumed
    refused(made, request(), "accepted no proposal")  # the session before is over


def test_a_site_that_restarts_remembers_the_run(village: Any) -> None:
    made = village()
    assert isinstance(made.ask(made.proposal()), Answer)
    made.restart()
    other = made.experiment.model_copy(update={"rounds": 3}).dump()
    refused(made, made.proposal(experiment=other), "this run", "start a new run")
    assert isinstance(made.ask(made.proposal()), Answer)


# --- every rule, through the wire alone ----------------------------------------------------------

RULES: Sequence[tuple[str, tuple[str, ...], Mapping[str, Any]]] = (
    ("policy.allow_not_private", ("not_private_seed=1",), {}),
    ("policy.maximum_epsilon", ("privacy.epsilon=6.1",), {}),
    ("policy.maximum_delta", ("privacy.delta=1e-2",), {}),
    ("policy.units", ("privacy.unit=person", "data.person=who"), {}),
    (
        "data.person",
        ("privacy.unit=person", "data.person=visit"),
        {"data": {"person": "who"}, "budget": {"unit": "person"}},
    ),
    ("policy.noise", ("privacy.noise=distributed",), {"policy": {"noise": ["local"]}}),
    ("policy.minimum_noise", (), {"policy": {"minimum_noise": 9.0}}),
    ("policy.maximum_rounds", ("rounds=999",), {}),
    ("policy.maximum_local_steps", ("training.local_steps=101",), {}),
    ("policy.protocols", ("protocol.name=plain",), {}),
    ("policy.protocols", ("protocol.name=bfv",), {}),
    ("policy.reveal", ("protocol.name=masked-bfv",), {"policy": {"reveal": ["sites"]}}),
    ("policy.minimum_openers", ("protocol.name=masked-bfv",), {"policy": {"minimum_openers": 2}}),
    ("policy.minimum_colluding_sites", ("protocol.colluding_sites=0",), {}),
    ("policy.minimum_cohort", (), {"policy": {"minimum_cohort": 4}}),
    ("policy.models", ("model.name=mlp",), {"policy": {"models": ["logistic"]}}),
    ("policy.callables", ("model.name=os:system",), {}),
    ("policy.callables", ("model.loss=os:system",), {}),
    ("policy.callables", ("training.optimiser=os:system",), {}),
    ("policy.callables", ("aggregation.algorithm=os:system",), {}),
    ("policy.callables", ("data.source=os:system",), {}),
    ("policy.transcript_until", ("transcript.consent=['north']",), {}),
    (
        "policy.own_recording",
        ("transcript.own=['north']", "transcript.keep_until=2999-01-01"),
        {"policy": {"transcript_until": date(2999, 12, 31)}},
    ),
    ("data.path", ("data.source=table", "data.label=y", "data.path=/etc/passwd"), {}),
)


@pytest.mark.parametrize(
    ("rule", "overrides", "changes"),
    RULES,
    ids=[f"{r} {o[0] if o else 'none'}" for r, o, _ in RULES],
)
def test_a_proposal_that_breaks_a_rule_is_refused_unread(
    village: Any, rule: str, overrides: tuple[str, ...], changes: Mapping[str, Any]
) -> None:
    made = village(**changes)
    text = config.parse(made.experiment.dump(), overrides).dump()
    reply = refused(made, made.proposal(experiment=text), f"north refuses by {rule}: proposed is ")
    assert "permitted is" in reply.reason
    refused(made, request(), "accepted no proposal")


def without(experiment: Experiment, *keys: str) -> str:
    return experiment.model_copy(update=dict.fromkeys(keys)).dump()


def test_a_policy_that_its_people_change_counts_from_the_next_proposal_on(village: Any) -> None:
    made = village()
    made.write("north", policy={"maximum_rounds": 1})
    refusal = made.ask(made.proposal())
    assert isinstance(refusal, Refusal)
    assert "policy.maximum_rounds" in refusal.reason
    made.write("north")
    assert isinstance(made.ask(made.proposal()), Answer)


def test_a_policy_that_cannot_be_read_is_no_news_for_the_server(village: Any) -> None:
    made = village()
    (made.folder / "north" / SITE).write_text("rounds of applause")
    refusal = made.ask(made.proposal())
    assert isinstance(refusal, Refusal)
    assert "ask its people why" in refusal.reason
    assert SITE not in refusal.reason
    assert SITE in made.told[-1]


def test_differential_privacy_is_not_switched_off(village: Any) -> None:
    made = village()
    refused(made, made.proposal(experiment=without(made.experiment, "privacy")), "policy.privacy")


def test_record_counts_are_not_opened(village: Any) -> None:
    made = village(policy={"privacy": "optional"})
    text = without(made.experiment, "privacy")
    counted = ["aggregation.weighting=records", "aggregation.weight_cap=500"]
    refused(
        made,
        made.proposal(experiment=config.parse(text, counted).dump()),
        "policy.record_counts",
    )


def test_a_ring_of_neighbours_is_refused(village: Any) -> None:
    made = village(policy={"unknown_sites": True})
    strangers = [PinnedKey(f"x{i:03}", hashlib.sha256(b"%d" % i).digest()) for i in range(250)]
    roster = [PinnedKey(name, key) for name, key in made.keys.items()] + strangers
    data = config.parse(made.experiment.dump(), [])
    sites = config.Sites(count=253)
    text = data.model_copy(update={"sites": sites}).dump()
    refused(
        made,
        made.proposal(experiment=text, roster=tuple(sorted(roster, key=lambda k: k.site))),
        "policy.graph",
    )


# --- who takes part ------------------------------------------------------------------------------


def with_keys(made: Village, **changes: bytes | None) -> bytes:
    keys = {name: key for name, key in {**made.keys, **changes}.items() if key is not None}
    return made.proposal(roster=tuple(PinnedKey(n, k) for n, k in sorted(keys.items())))


def unnamed(made: Village, count: int) -> str:
    sites = config.Sites(count=count)
    return made.experiment.model_copy(update={"sites": sites}).dump()


def test_a_roster_with_other_keys_or_sites_than_are_pinned_is_refused(village: Any) -> None:
    made = village()
    forged = bytes(range(32))
    refused(made, with_keys(made, north=forged), "site.key", made.keys["north"].hex())
    refused(made, with_keys(made, north=None, west=forged), "not of the sites in sites.names")
    refused(made, with_keys(made, south=forged), "consortium.south", made.keys["south"].hex())
    refused(made, with_keys(made, west=forged), "not of the sites in sites.names")
    keys = {**made.keys, "west": forged}
    roster = tuple(PinnedKey(n, k) for n, k in sorted(keys.items()))
    strange = made.proposal(roster=roster, experiment=unnamed(made, 4))
    refused(made, strange, "policy.unknown_sites", "a run with west", "east, south")
    refused(made, made.proposal(roster=roster, experiment=unnamed(made, 5)), "sites.count = 5")


def test_sites_that_nobody_pinned_take_part_only_where_the_policy_says_so(village: Any) -> None:
    made = village()
    made.write("north", ("south",), policy={"consent": "standing"})
    made.restart()
    refused(made, made.proposal(), "policy.unknown_sites", "a run with east", "is south")
    made.write("north", (), policy={"consent": "standing", "unknown_sites": True})
    made.restart()
    assert isinstance(made.ask(made.proposal()), Answer)
    made.write("north", (), policy={"consent": "standing"})
    made.restart()
    refused(made, made.proposal(), "policy.unknown_sites", "no other site")


# --- consent -------------------------------------------------------------------------------------


def test_a_consent_is_for_one_run_of_exactly_what_was_shown(village: Any) -> None:
    made = village(policy={"consent": "each-run"})
    refused(made, made.proposal(), "policy.consent", "--sites 3 --parameters 62")
    other = made.experiment.model_copy(update={"rounds": 3})
    made.agree(experiment=other)
    refused(made, made.proposal(), "policy.consent")
    path = made.agree()
    assert "A. Person" in path.read_text()
    assert "predict relapse" in path.read_text()
    assert isinstance(made.ask(made.proposal()), Answer)
    resumed = made.proposal(session=b"a later session!")
    assert isinstance(made.ask(resumed), Answer)
    again = {"session": b"the next session", "run": b"run number two.."}
    refused(made, made.proposal(**again), "policy.consent")
    made.agree()
    assert isinstance(made.ask(made.proposal(**again)), Answer)


def test_a_consent_that_was_taken_back_counts_no_more(village: Any) -> None:
    made = village(policy={"consent": "each-run"})
    path = made.agree()
    assert isinstance(made.ask(made.proposal()), Answer)
    path.unlink()
    refused(made, made.proposal(session=b"a later session!"), "policy.consent")


def test_a_consent_under_another_name_or_damaged_is_none(village: Any) -> None:
    made = village(policy={"consent": "each-run"})
    path = made.agree()
    whole = path.read_text()
    told = path.stem
    path.write_text(whole.replace(told, "0" * 64))
    refused(made, made.proposal(), "ask its people why")
    path.write_text(whole[:-20])
    reply = refused(made, made.proposal(), "ask its people why")
    assert str(made.folder) not in reply.reason
    assert str(path) in made.told[-1]
    path.write_text(whole)
    assert isinstance(made.ask(made.proposal()), Answer)


@pytest.mark.parametrize("by", ["", "   ", "A\nB", "A\x1b[2J"])
def test_nobody_agrees_without_a_name(village: Any, by: str) -> None:
    made = village()
    site = config.load_site(made.folder / "north" / SITE)
    asked = policy.asked(site, made.experiment, 3, PARAMETERS)
    with pytest.raises(ConfigurationError, match="say who agrees"):
        Consents(made.folder / "north").agree(asked, by)
    assert not (made.folder / "north" / "consents").exists()


# --- what the site holds -------------------------------------------------------------------------


def test_what_is_wrong_with_the_records_is_told_at_the_site_only(village: Any) -> None:
    made = village()
    private = "could not convert string to float: 'Ada Lovelace'"

    def load(experiment: Experiment) -> Table:
        raise ValueError(private)

    made.gates["north"] = Gate(
        made.folder / "north", load, lambda *_: pytest.fail("no"), tell=made.told.append
    )
    reply = made.ask(made.proposal())
    assert reply == Refusal(
        "policy", "north cannot take part with what it holds: ask its people why"
    )
    assert private in made.told[-1]


def test_too_few_records_are_no_news_for_the_server(village: Any) -> None:
    made = village()
    made.tables = {**made.tables, "north": made.tables["north"].take(range(9))}
    reply = made.ask(made.proposal())
    assert isinstance(reply, Refusal)
    assert "expected_batch" not in reply.reason
    assert "expected_batch" in made.told[-1]
    assert not (made.folder / "north" / "accepted").exists()


@pytest.mark.parametrize("parameters", [61, 63, 530])
def test_a_model_of_another_size_than_the_plan_was_shown_for_is_refused(
    village: Any, parameters: int
) -> None:
    made = village()
    reply = made.ask(made.proposal(parameters=parameters))
    assert isinstance(reply, Refusal)
    assert reply.kind == "policy"
    assert f"62 parameters here, and the proposal says {parameters}" in made.told[-1]


def test_the_records_come_from_where_the_site_says(village: Any, tmp_path: Path) -> None:
    made = village(data={"path": "records.csv"})
    seen: list[Experiment] = []

    def load(experiment: Experiment) -> Table:
        seen.append(experiment)
        return made.tables["north"]

    overrides = ["data.source=table", "data.label=y", "data.path=/etc/passwd"]
    text = config.parse(made.experiment.dump(), overrides).dump()
    made.gates["north"] = Gate(made.folder / "north", load, lambda *_: made.gates["east"])
    made.ask(made.proposal(experiment=text))
    assert [experiment.data.path for experiment in seen] == [made.folder / "north" / "records.csv"]


def test_a_run_that_cannot_be_written_down_is_not_accepted(village: Any) -> None:
    made = village()
    taken = made.folder / "north" / "accepted" / f".{RUN.hex()}.json.partial"
    taken.mkdir(parents=True)  # where the file would be written first
    reply = made.ask(made.proposal())
    assert isinstance(reply, Refusal)
    assert str(made.folder) not in reply.reason
    assert "cannot be written" in made.told[-1]
    refused(made, request(), "accepted no proposal")
    taken.rmdir()
    assert isinstance(made.ask(made.proposal()), Answer)  # the first client let go of its store


# --- the key -------------------------------------------------------------------------------------


def test_a_key_is_made_once_is_its_owners_and_comes_back(tmp_path: Path) -> None:
    made = make_key(tmp_path)
    path = tmp_path / KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(tmp_path).public == made.public
    secret = path.read_bytes()
    with pytest.raises(ConfigurationError, match="exists"):
        make_key(tmp_path)
    assert path.read_bytes() == secret
    assert made.public not in secret
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read_key(tmp_path)
    path.chmod(0o600)
    path.write_bytes(secret[:-1])
    with pytest.raises(CorruptStoreError, match="damaged"):
        read_key(tmp_path)
    path.unlink()
    with pytest.raises(ConfigurationError, match="securefl site init"):
        read_key(tmp_path)


# --- hostile bytes -------------------------------------------------------------------------------


def test_a_proposal_is_parsed_completely(village: Any) -> None:
    made = village()
    whole = Proposal.from_bytes(made.proposal())
    assert Proposal.from_bytes(whole.to_bytes()) == whole
    roster = whole.roster
    for changes in (
        {"session": bytes(15)},
        {"run": bytes(17)},
        {"run": b""},
        {"parameters": 0},
        {"parameters": 2**41},
        {"experiment": "#" * ((1 << 20) + 1)},
        {"roster": roster[:1]},
        {"roster": roster[::-1]},
        {"roster": (roster[0], *roster)},
        {"roster": (PinnedKey("aaa", roster[0].key), *roster)},
        {"roster": (PinnedKey("a/b", bytes(32)), *roster)},
        {"roster": (PinnedKey("aaa", bytes(31)), *roster)},
    ):
        fields = {name: getattr(whole, name) for name in whole.__struct_fields__} | changes
        try:
            data = Proposal(**fields).to_bytes()
        except ValueError:  # refused as soon as it is made
            continue
        with pytest.raises(MalformedMessageError):
            Proposal.from_bytes(data)
        refused(made, data, kind="request")


@pytest.mark.parametrize(
    "text",
    ["", "rounds = 'many'", "x = " + "[" * 5000, "x = " + "9" * 5000, "[privacy]\nepsilon = nan",
 "\x00", "rounds = 1\nrounds = 2"],
    ids=range(7),
)  # fmt: skip
def test_a_hostile_experiment_is_one_line_of_refusal(village: Any, text: str) -> None:
    refused(village(), village_proposal(text))


def village_proposal(text: str) -> bytes:
    roster = tuple(PinnedKey(n, hashlib.sha256(n.encode()).digest()) for n in NAMES)
    return Proposal(SESSION, RUN, text, PARAMETERS, roster).to_bytes()


def test_mutated_proposals_are_refused_and_change_nothing(village: Any) -> None:
    made = village(policy={"consent": "each-run"})
    honest, rng = made.proposal(), random.Random(0)
    before = contents(made.folder)
    for _ in range(300):
        data = bytearray(honest)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        assert isinstance(made.ask(bytes(data)), Refusal)
    assert contents(made.folder) == before
    assert made.loaded == []


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    folder = tmp_path_factory.mktemp("north")
    make_key(folder)
    (folder / SITE).write_text(
        'version = 1\nname = "north"\n[data]\nid = "a"\npurpose = "b"\n'
        '[budget]\nunit = "record"\nepsilon = 1.0\ndelta = 1e-5\n'
    )
    return Gate(folder, lambda _: pytest.fail("read"), lambda *_: pytest.fail("made"))


@given(st.binary(max_size=300))
def test_random_bytes_get_a_refusal(lasting: Gate, data: bytes) -> None:
    assert isinstance(parse_reply(lasting.answer(data)), Refusal)


@given(
    text=st.text(max_size=200),
    names=st.sets(st.sampled_from(["north", "south", "west"]), min_size=2),
    parameters=st.integers(1, 2**40),
)
def test_well_formed_proposals_of_anything_get_a_refusal(
    lasting: Gate, text: str, names: set[str], parameters: int
) -> None:
    roster = tuple(PinnedKey(n, hashlib.sha256(n.encode()).digest()) for n in sorted(names))
    data = Proposal(SESSION, RUN, text, parameters, roster).to_bytes()
    assert isinstance(parse_reply(lasting.answer(data)), Refusal)


def test_the_folder_is_the_sites_alone(village: Any) -> None:
    """Everything a gate keeps is under its own folder."""
    made = village()
    assert isinstance(made.ask(made.proposal()), Answer)
    assert {path.name for path in (made.folder / "north").iterdir()} == {
        SITE,
        KEY,
        "accepted",
        "runs",
    }
    [accepted] = (made.folder / "north" / "accepted").iterdir()
    assert accepted.name == f"{RUN.hex()}.json"
