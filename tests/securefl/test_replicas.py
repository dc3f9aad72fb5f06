"""reveal = "sites": sites hold the model, late ones are brought up, the server learns nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import MalformedMessageError, ProtocolError, RefusedError
from protocols.rounds import make_identities
from securefl import config, replicas, runs, store
from securefl.config import Experiment
from securefl.messages import Answer, Refusal, Request, parse_reply
from securefl.records import read_history
from securefl.replicas import (
    Copy,
    Loan,
    Moment,
    Plea,
    Replica,
    ReplicaMessage,
    Replicas,
    Report,
    Standing,
)
from securefl.runs import RunFailedError
from securefl.state import GlobalState
from securefl.store import CorruptStoreError

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)
resume = partial(runs.resume, report=False)

AGREED = bytes(range(32))
SESSION = b"session of tests"
SIZE = 12
SITES = ("protocol.name=masked-bfv", "protocol.reveal=sites", "sites.count=5")


def changed(message: Any, **fields: Any) -> Any:
    """`message` with other fields."""
    return msgspec.structs.replace(message, **fields)


def replica(update: int = 1, seed: int = 0, salt: bytes | None = None) -> Replica:
    """A copy with a pruning mask and moments; another seed, another copy."""
    rng = np.random.default_rng(seed)
    mask = np.arange(SIZE) % 3 != 0
    weights = np.where(mask, rng.normal(size=SIZE), 0).astype(np.float32)
    moments = {"first": rng.normal(size=SIZE), "second": rng.uniform(size=SIZE)}
    state = GlobalState(update, weights, mask, moments, 2, 0.75)
    return Replica(state, bytes([seed]) * 32 if salt is None else salt)


START = Replica.start(GlobalState(0, np.ones(SIZE, np.float32), np.ones(SIZE, np.bool_)))


def standing(copy: Replica) -> Standing:
    return copy.standing(AGREED)


# --- the copy ------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.integers(0, 255))
def test_a_copy_comes_back_as_it_was(update, seed):
    made = replica(update, seed)
    again = Replica.from_bytes(made.to_bytes(), SIZE)
    assert again.to_bytes() == made.to_bytes()
    assert standing(again) == standing(made)
    for name in ("weights", "mask"):
        assert np.array_equal(getattr(again.state, name), getattr(made.state, name))
    assert {k: v.tobytes() for k, v in again.state.moments.items()} == {
        k: v.tobytes() for k, v in made.state.moments.items()
    }
    assert (again.state.update, again.state.quiet, again.salt) == (update, 2, made.salt)
    assert again.state.clip_scale == 0.75


def test_the_digest_binds_everything_that_the_next_round_depends_on():
    base, copies = replica(), []
    state = base.state
    weights, moments = state.weights.copy(), dict(state.moments)
    weights[1] += 1
    copies.append(GlobalState(1, weights, state.mask, state.moments, 2, 0.75))
    moments["second"] = np.nextafter(moments["second"], 2)
    copies.append(GlobalState(1, state.weights, state.mask, moments, 2, 0.75))
    copies.append(GlobalState(1, state.weights, state.mask, {}, 2, 0.75))
    copies.append(GlobalState(2, state.weights, state.mask, state.moments, 2, 0.75))
    copies.append(GlobalState(1, state.weights, state.mask, state.moments, 3, 0.75))
    copies.append(GlobalState(1, state.weights, state.mask, state.moments, 2, 0.7500001))
    made = [standing(base), *(standing(Replica(copy, base.salt)) for copy in copies)]
    made += [standing(replica(salt=bytes([9]) * 32)), base.standing(bytes(32))]
    assert len({item.model for item in made}) == len(made)


def test_a_copy_shows_neither_weights_nor_salt():
    assert repr(replica()) == "Replica()"


@pytest.mark.parametrize(
    "change",
    [
        {"model": b""},
        {"salt": bytes(31)},
        {"moments": (Moment("first", bytes(8 * SIZE - 8)),)},
        {"moments": (Moment("b", bytes(8 * SIZE)), Moment("a", bytes(8 * SIZE)))},
        {"moments": (Moment("a", bytes(8 * SIZE)), Moment("a", bytes(8 * SIZE)))},
        {"quiet": -1},
    ],
)
def test_what_is_no_copy_is_refused(change):
    message = ReplicaMessage.from_bytes(replica().to_bytes())
    fields = {name: getattr(message, name) for name in message.__struct_fields__} | change
    data = msgspec.msgpack.encode(["ReplicaMessage", *fields.values()])
    with pytest.raises(MalformedMessageError):
        Replica.from_bytes(data, SIZE)
    with pytest.raises(MalformedMessageError):
        Replica.from_bytes(replica().to_bytes(), SIZE + 1)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_message(data):
    for kind in (ReplicaMessage, Standing, Report, Plea, Copy, Loan):
        with pytest.raises(MalformedMessageError):
            kind.from_bytes(data)


# --- the disk ------------------------------------------------------------------------------------


class Table:
    """Sites a to e with their copies on disk; four of five are a quorum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identities = make_identities("abcde", os.urandom)
        self.roster = self.identities["a"].roster
        self.sites = {name: self.site(name) for name in "abcde"}

    def site(self, name: str, **changes: Any) -> Replicas:
        """That site as after a restart."""
        values = {"session": SESSION, "agreed": AGREED, "quorum": 4, "start": START} | changes
        return Replicas(self.folder / name, self.identities[name], **values)

    def move(self, copy: Replica, sites: str) -> None:
        for name in sites:
            self.sites[name].advance(self.sites[name].holds[-1], copy)

    def report(self, name: str, number: int = 7) -> Report:
        return Report.from_bytes(self.sites[name].answer("report", number, b"", os.urandom))

    def lend(self, peer: str, plea: Plea, number: int = 7) -> Copy:
        data = self.sites[peer].answer("lend", number, plea.to_bytes(), os.urandom)
        return Copy.from_bytes(data)

    def borrow(self, name: str, loan: Loan, number: int = 7) -> Report:
        data = self.sites[name].answer("borrow", number, loan.to_bytes(), os.urandom)
        return Report.from_bytes(data)


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "table")


def test_a_site_holds_the_start_and_then_the_last_two_copies(table):
    first, second = replica(1, 1), replica(2, 2)
    assert table.sites["a"].holds == (standing(START),)
    table.move(first, "a")
    assert table.sites["a"].holds == (standing(START), standing(first))
    table.move(second, "a")
    for site in (table.sites["a"], table.site("a")):
        assert site.holds == (standing(first), standing(second))
        assert site.get(standing(second)).to_bytes() == second.to_bytes()
        assert site.get(standing(first)).to_bytes() == first.to_bytes()
        with pytest.raises(RefusedError, match="does not hold the model of update 0"):
            site.get(standing(START))


def test_a_round_that_was_aborted_after_the_opening_is_replaced(table):
    aborted, again = replica(2, 2), replica(2, 3)
    base = replica(1, 1)
    table.move(base, "a")
    for copy in (aborted, again):
        table.sites["a"].advance(standing(base), copy)
    assert table.site("a").holds == (standing(base), standing(again))


def test_a_crash_at_any_write_or_deletion_loses_no_copy(table, monkeypatch):
    """Whatever is on disk when the process dies: the base, and the new one once it said so."""

    class CrashError(Exception):
        pass

    def crash(*_: object, **__: object) -> None:
        raise CrashError

    first, second = replica(1, 1), replica(2, 2)
    table.move(first, "a")
    with monkeypatch.context() as dying:
        dying.setattr(store, "write", crash)
        with pytest.raises(CrashError):
            table.move(second, "a")
    assert table.site("a").holds == table.sites["a"].holds == (standing(START), standing(first))
    table.sites["a"] = table.site("a")
    with monkeypatch.context() as dying:
        dying.setattr(Path, "unlink", crash)
        with pytest.raises(CrashError):
            table.move(second, "a")
    again = table.site("a")
    assert set(again.holds) == {standing(START), standing(first), standing(second)}
    third = replica(3, 3)
    again.advance(standing(second), third)
    assert table.site("a").holds == (standing(second), standing(third))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(9) + data[9:]])
def test_a_damaged_copy_is_one_line_with_the_mend(table, damage):
    made = replica(1, 1)
    table.move(made, "a")
    (path,) = (p for p in (table.folder / "a").iterdir() if "000001" in p.name)
    path.write_bytes(damage(path.read_bytes()))
    for read in (
        lambda: table.site("a"),
        lambda: replicas.read(table.folder / "a", standing(made), AGREED, SIZE),
    ):
        with pytest.raises(CorruptStoreError, match="delete the file") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_copies_of_another_experiment_are_not_taken(table):
    table.move(replica(1, 1), "a")
    with pytest.raises(CorruptStoreError, match="of another experiment"):
        table.site("a", agreed=bytes(32))


# --- a late site ---------------------------------------------------------------------------------


@pytest.fixture
def late(table):
    """a, b, c and d hold update 2; e was away and holds update 1. Everything for an honest loan."""
    table.move(replica(1, 1), "abcde")
    copy = replica(2, 2)
    table.move(copy, "abcd")
    reports = {name: table.report(name) for name in "abcde"}
    table.plea = Plea(reports["e"], standing(copy))
    table.loan = Loan(table.lend("b", table.plea), tuple(reports[name] for name in "abcd"))
    return table


def test_a_late_site_gets_a_copy_and_holds_it_durably(late):
    told = late.borrow("e", late.loan)
    assert told.holds == (late.plea.wanted,)
    replicas.verify(late.roster, replicas.context(SESSION, AGREED), told)
    assert late.site("e").get(late.plea.wanted).to_bytes() == replica(2, 2).to_bytes()
    assert late.borrow("e", late.loan).holds == told.holds  # asked twice, it says so again


def test_a_copy_crosses_the_wire_sealed(late):
    seen = late.plea.to_bytes() + late.loan.to_bytes()
    secret = replica(2, 2)
    model = secret.state.to_message()
    for data in (secret.salt, model[-16:], secret.state.moments["first"].tobytes()):
        assert data in secret.to_bytes()
        assert data not in seen
    again = late.lend("b", late.plea)
    assert again.box != late.loan.copy.box
    assert again.public != late.loan.copy.public


def claim(table: Table, name: str, *holds: Standing) -> Report:
    """A report that `name` really signs, be it true or not."""
    bound, public = replicas.context(SESSION, AGREED), bytes(range(32))
    said = replicas._reported(bound, name, 7, holds, public)
    return Report(name, 7, holds, public, table.identities[name].key.sign(said))


def test_all_but_one_of_a_quorum_must_vouch(late):
    """Three here. The late site's own word, and reports of other copies, do not count."""
    wanted = late.plea.wanted
    by = {report.sender: report for report in late.loan.reports}
    two = (by["a"], by["b"])
    for reports in (
        (),
        two,
        (*two, claim(late, "e", wanted)),
        (*two, claim(late, "d", standing(replica(1, 1)))),
        (*two, claim(late, "d", changed(wanted, quiet=wanted.quiet + 1))),
    ):
        with pytest.raises(RefusedError, match=r"other sites hold the model of update 2, 3 must"):
            late.borrow("e", changed(late.loan, reports=reports))
    told = late.borrow("e", changed(late.loan, reports=(*two, by["d"])))
    assert told.holds == (wanted,)


def resigned(table: Table, copy: Copy, by: str, bound: bytes | None = None, **fields: Any) -> Copy:
    """A copy changed and signed anew by `by`."""
    copy = changed(copy, **fields)
    to = (copy.receiver, table.plea.late.public)
    bound = replicas.context(SESSION, AGREED) if bound is None else bound
    sealing = replicas._sealing(bound, 7, copy.sender, copy.public, to, copy.standing)
    said = replicas.statement(sealing, "lend", copy.sender, copy.box)
    return changed(copy, signature=table.identities[by].key.sign(said))


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (lambda t: changed(t.loan.copy, box=t.loan.copy.box[:-1] + b"\0"), "signature of b"),
        (lambda t: changed(t.loan.copy, signature=bytes(64)), "signature of b"),
        (lambda t: changed(t.loan.copy, sender="c"), "signature of c"),
        (lambda t: changed(t.loan.copy, receiver="d"), "sealed for d"),
        (lambda t: changed(t.loan.copy, public=bytes(32)), "signature of b"),
        (lambda t: changed(t.loan.copy, standing=standing(replica(2, 5))), "signature of b"),
        (lambda t: resigned(t, t.loan.copy, "b", box=bytes(60)), "does not open"),
        (lambda t: resigned(t, t.loan.copy, "b", public=bytes(32)), "unusable"),
        (lambda t: resigned(t, t.loan.copy, "b", bytes(32)), "signature of b"),
        (lambda t: resigned(t, t.loan.copy, "b", sender="mallory"), "not in the roster"),
        (lambda t: t.lend("b", Plea(t.report("a"), t.plea.wanted)), "sealed for a"),
        (lambda t: (t.report("e"), t.loan.copy)[1], "signature of b"),
    ],
    ids=[
        "box", "signature", "sender", "receiver", "key", "standing", "garbage", "low order",
        "another session", "a stranger", "sealed for another", "for an older key",
    ],
)  # fmt: skip
def test_a_copy_that_is_not_what_it_says_is_refused(late, change, telling):
    before = late.sites["e"].holds
    with pytest.raises(ProtocolError, match=telling):
        late.borrow("e", changed(late.loan, copy=change(late)))
    assert late.site("e").holds == late.sites["e"].holds == before


def test_a_lender_that_seals_another_model_is_named(late):
    """It signs and seals a model of its own under the digest that the others vouch for."""
    lender = late.site("b")
    wanted = late.plea.wanted
    lender._held = {"": (wanted, replica(2, 9))}
    data = lender.answer("lend", 7, late.plea.to_bytes(), os.urandom)
    with pytest.raises(ProtocolError, match="b lent another model than it named") as caught:
        late.borrow("e", changed(late.loan, copy=Copy.from_bytes(data)))
    assert caught.value.culprits == ("b",)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (lambda r: changed(r, signature=bytes(64)), "signature of a"),
        (lambda r: changed(r, public=bytes(32)), "signature of a"),
        (lambda r: changed(r, round=8), "signature of a"),
        (lambda r: changed(r, holds=r.holds[:1]), "signature of a"),
        (lambda r: changed(r, sender="mallory"), "not in the roster"),
    ],
)
def test_a_forged_report_is_refused_by_borrowers_and_lenders(late, change, telling):
    forged = change(late.loan.reports[0])
    reports = tuple(sorted((forged, *late.loan.reports[1:]), key=lambda r: r.sender))
    with pytest.raises(ProtocolError, match=telling):
        late.borrow("e", changed(late.loan, reports=reports))
    with pytest.raises(ProtocolError, match=telling):
        late.lend("b", Plea(forged, late.plea.wanted))


def test_a_report_of_another_session_or_round_opens_no_copy(late):
    strange = late.site("e", session=b"another session!")
    report = Report.from_bytes(strange.answer("report", 7, b"", os.urandom))
    with pytest.raises(ProtocolError, match="signature of e"):
        late.lend("b", Plea(report, late.plea.wanted))
    with pytest.raises(RefusedError, match="reported in round 7, not 8"):
        late.lend("b", late.plea, number=8)
    with pytest.raises(RefusedError, match="lends nothing to itself"):
        late.lend("b", Plea(late.report("b"), late.plea.wanted))
    with pytest.raises(RefusedError, match="e does not hold the model of update 2"):
        late.lend("e", Plea(late.report("b"), late.plea.wanted))


def test_a_site_takes_no_older_copy_than_its_own(late):
    """A server that replays what was true cannot roll a site back."""
    table = late
    old = table.plea.wanted
    loan, key = table.loan, table.sites["e"]._channel
    assert table.borrow("e", loan).holds == (old,)
    newer = replica(3, 3)
    table.move(newer, "e")
    table.sites["e"].advance(standing(newer), replica(4, 4))
    table.sites["e"]._channel = key
    with pytest.raises(RefusedError, match="takes no older one"):
        table.borrow("e", loan)


def test_without_a_report_there_is_no_key_for_a_copy(late):
    late.sites["e"] = late.site("e")
    with pytest.raises(RefusedError, match="has not reported"):
        late.borrow("e", late.loan)


# --- the client ----------------------------------------------------------------------------------


def ask(made: Any, site: str, phase: str, body: bytes = b"") -> Answer | Refusal:
    return made.ask(site, made.request(1, phase, body))


def test_a_server_that_lies_about_the_model_gets_a_refusal(small, bench):
    made = bench(small(*SITES))
    honest = made.state
    for change in (
        {"model": bytes(32)},
        {"update": 1},
        {"surviving": honest.surviving - 1},
        {"quiet": 3},
    ):
        reply = made.ask("site-1", made.first(1, changed(honest, **change)))
        assert isinstance(reply, Refusal)
        assert "does not hold the model of update" in reply.reason
    weights = made.request(1, "advertise", made.begin(1).to_bytes(), made.model.to_message())
    assert isinstance(made.ask("site-1", weights), Refusal)
    assert isinstance(made.ask("site-1", made.first(1)), Answer)


def test_a_model_is_on_disk_before_its_tag_leaves(small, bench, monkeypatch):
    made = bench(small(*SITES))
    requests = made.drive(1, "open")
    folder = made.folder / "site-1" / "models"
    assert not folder.exists()
    assert isinstance(made.ask("site-1", requests["site-1"]), Answer)
    assert sorted(path.name[:13] for path in folder.iterdir()) == ["update-000000", "update-000001"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(OSError, match="No space"):
        made.clients["site-2"].answer(requests["site-2"])
    reply = made.ask("site-2", requests["site-2"])  # the sum was opened: it is not opened again
    assert isinstance(reply, Refusal)
    assert "does not come now" in reply.reason


def test_the_same_sum_makes_the_same_model_at_every_site(small, bench):
    made = bench(small(*SITES))
    for site, request in made.drive(1, "open").items():
        assert isinstance(made.ask(site, request), Answer)
    told = set()
    for site in made.clients:
        reply = ask(made, site, "report")
        assert isinstance(reply, Answer)
        told.add(Report.from_bytes(reply.body).holds)
    assert len(told) == 1
    (held,) = told
    assert [item.update for item in held] == [0, 1]


def test_requests_for_copies_are_refused_where_the_server_holds_the_model(small, bench):
    made = bench(small("protocol.name=masked-bfv"))
    for phase in replicas.PHASES:
        model = made.state.to_message()
        reply = made.ask("site-1", made.request(1, phase, b"", model))
        assert isinstance(reply, Refusal)
        assert "does not come now" in reply.reason


@given(st.sampled_from(replicas.PHASES), st.binary(min_size=1, max_size=300))
def test_random_bytes_get_a_refusal(lasting, phase, body):
    data = Request(SESSION, 1, phase, body).to_bytes()
    assert isinstance(parse_reply(lasting.answer(data)), Refusal)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, small):
    """One client for all examples of a property."""
    from securefl import simulation

    experiment = small(*SITES)
    tables = simulation.assemble(experiment).sites
    identities = make_identities(tables, os.urandom)
    folder = tmp_path_factory.mktemp("site-1")
    return simulation.client(experiment, tables["site-1"], identities["site-1"], SESSION, folder)


# --- whole runs ----------------------------------------------------------------------------------

Exchange = Callable[[str, Mapping[str, bytes]], Mapping[str, bytes]]
WHOLE = (
    *SITES,
    "rounds=3",
    "not_private_seed=5",
    "pruning.sparsity=0.5",
    "aggregation.algorithm=fedadam",
    "aggregation.learning_rate=0.1",
)


class StopError(Exception):
    """Stands for a kill once a round is on disk."""


class Stopping:
    """Progress that ends the run after so many rounds: no report is drawn."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def started(self, rounds: int, done: int) -> None: ...
    def phase(self, round_number: int, phase: str) -> None: ...
    def finished(self, record: Any) -> None:
        if record.update == self.rounds:
            raise StopError


def train(experiment: Experiment, folder: Path, rounds: int = 3, **options: Any) -> Path:
    """Run until so many rounds are finished; the run directory."""
    with pytest.raises(StopError):
        run(experiment, folder, progress=Stopping(rounds), **options)
    return folder


def weights(folder: Path) -> np.ndarray:
    """The weights that an unfinished run has come to, from the server's or the sites' disks."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    if newest.suffix == ".safetensors":
        return GlobalState.from_checkpoint(newest)[0].weights
    experiment, known = config.load(folder / "experiment.toml"), told_standing(newest)
    copies = (
        replicas.read(site / "models", known, experiment.digest(), 62)
        for site in sorted((folder / "sites").iterdir())
    )
    return next(copy.state.weights for copy in copies if copy is not None)


def told_standing(checkpoint: Path) -> Standing:
    """What the server's checkpoint says of the model."""
    return msgspec.convert(msgspec.json.decode(checkpoint.read_bytes())["standing"], Standing)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, the signs of zeros too."""
    return one.tobytes() == other.tobytes()


def losing(rounds: set[int], phase: str, sites: set[str], hear: bool = True) -> Any:
    """An exchange in which the replies of `sites` are lost; with `hear` false the requests too."""

    def wrap(exchange: Exchange) -> Exchange:
        def lossy(asked: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            number = max((Request.from_bytes(data).round for data in messages.values()), default=0)
            gone = sites if asked == phase and number in rounds else set()
            if not hear:
                messages = {site: data for site, data in messages.items() if site not in gone}
            return {s: r for s, r in exchange(asked, messages).items() if s not in gone}

        return lossy

    return wrap


@pytest.fixture(scope="module")
def served(small, tmp_path_factory) -> Callable[[str | None], Path]:
    """The run in which the server holds the model and site-3 is lost in round 2 in that phase."""
    made: dict[str | None, Path] = {}

    def serve(phase: str | None = None) -> Path:
        if phase not in made:
            wrap = losing({2}, phase, {"site-3"}) if phase else None
            folder = tmp_path_factory.mktemp("served") / "run"
            made[phase] = train(small(*WHOLE, "protocol.reveal=server"), folder, exchange=wrap)
        return made[phase]

    return serve


@pytest.mark.parametrize("hear", [True, False], ids=["its reply is lost", "it is away"])
@pytest.mark.parametrize("phase", ["open", "report"])
def test_a_site_that_misses_the_end_of_a_round_is_brought_up(small, tmp_path, served, phase, hear):
    """The sum counts it all the same; the run ends as if nothing had happened."""
    wrap = losing({2}, phase, {"site-2"}, hear)
    folder = train(small(*WHOLE), tmp_path / "run", exchange=wrap)
    records = read_history(folder).rounds
    assert [record.round for record in records] == [1, 2, 3]
    assert all(len(record.survivors) == 5 for record in records)
    lent = ["borrow" in record.bytes_down for record in records]
    assert lent == [False, False, phase == "open" and not hear]
    assert same(weights(folder), weights(served()))


@pytest.mark.parametrize(
    ("phase", "like"),
    [
        ("advertise", "upload"),
        ("share", "upload"),
        ("upload", "upload"),
        ("confirm", None),
        ("unmask", None),
    ],
)
def test_a_site_that_vanishes_before_the_opening_is_brought_up(
    small, tmp_path, served, phase, like
):
    """The same sites are in the sum as where the server holds the model, and the same bits."""
    folder = train(small(*WHOLE), tmp_path / "run", exchange=losing({2}, phase, {"site-3"}))
    expected = served(like)
    survivors = [record.survivors for record in read_history(folder).rounds]
    assert survivors == [record.survivors for record in read_history(expected).rounds]
    assert ("site-3" in survivors[1]) == (like is None)
    assert same(weights(folder), weights(expected))
    held = [
        {path.name for path in (folder / "sites" / site / "models").iterdir()}
        for site in ("site-1", "site-3")
    ]
    assert held[1] == held[0]


@pytest.mark.parametrize("phase", ["open", "report"])
def test_a_round_that_is_aborted_at_its_end_is_done_again(small, tmp_path, served, phase):
    """Two of five are lost where four are needed: some hold a model that nobody goes on from."""
    wrap = losing({2}, phase, {"site-2", "site-4"}, hear=phase == "open")
    folder = train(small(*WHOLE), tmp_path / "run", exchange=wrap)
    assert [record.aborted for record in read_history(folder).rounds] == [(), (2,), ()]
    assert same(weights(folder), weights(served()))


def test_the_first_round_may_be_aborted_at_its_end_and_the_run_go_on(small, tmp_path, served):
    """The start is on disk with what was made of it: a restarted site can go back to it."""
    folder = tmp_path / "run"
    with pytest.raises(RunFailedError, match="3 rounds in a row"):
        run(small(*WHOLE), folder, exchange=losing({1, 2, 3}, "report", {"site-1", "site-2"}))
    resumed(folder, 3)
    assert same(weights(folder), weights(served()))


def resumed(folder: Path, rounds: int) -> None:
    with pytest.raises(StopError):
        resume(folder, progress=Stopping(rounds))


def test_a_site_that_lost_its_disk_is_brought_up_when_the_run_goes_on(small, tmp_path, served):
    folder = train(small(*WHOLE), tmp_path / "run", 2)
    for path in (folder / "sites" / "site-4" / "models").iterdir():
        path.unlink()
    resumed(folder, 3)
    assert "borrow" in read_history(folder).rounds[2].bytes_down
    assert same(weights(folder), weights(served()))


class Lying:
    """Stands for a site that signs another model than it holds once it has moved."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def answer(self, data: bytes) -> bytes:
        request, reply = Request.from_bytes(data), self._client.answer(data)
        if request.phase != "report":
            return bytes(reply)
        told = Report.from_bytes(Answer.from_bytes(reply).body)
        if told.holds[-1].update == 0:
            return bytes(reply)
        holds = (*told.holds[:-1], changed(told.holds[-1], model=bytes(32)))
        bound = replicas.context(request.session, self._client._experiment.digest())
        said = replicas._reported(bound, told.sender, told.round, holds, told.public)
        signature = self._client._identity.key.sign(said)
        return Answer(changed(told, holds=holds, signature=signature).to_bytes()).to_bytes()


def test_a_site_stays_late_over_an_aborted_round_and_is_brought_up_in_the_next(
    small, tmp_path, served
):
    """Nobody lends in round 3, and it is aborted; in round 4 everyone reports anew."""
    others = {"site-1", "site-3", "site-4", "site-5"}

    def wrap(exchange: Exchange) -> Exchange:
        for number, phase, sites in ((2, "open", {"site-2"}), (3, "lend", others)):
            exchange = losing({number}, phase, sites, hear=False)(exchange)
        return losing({3}, "upload", {"site-4"})(exchange)  # type: ignore[no-any-return]

    folder = train(small(*WHOLE), tmp_path / "run", exchange=wrap)
    third = read_history(folder).rounds[2]
    assert (third.round, third.aborted, len(third.survivors)) == (4, (3,), 5)
    assert "borrow" in third.bytes_down
    assert same(weights(folder), weights(served()))


@pytest.mark.parametrize("how", ["garbage", "another box"])
def test_a_bad_lender_is_passed_over(small, tmp_path, served, how):
    """What it lends is refused by the late site; the next holder is asked."""

    class Bad:
        def __init__(self, client: Any) -> None:
            self._client = client

        def answer(self, data: bytes) -> bytes:
            reply = self._client.answer(data)
            if Request.from_bytes(data).phase != "lend":
                return bytes(reply)
            if how == "garbage":
                return Answer(b"garbage").to_bytes()
            copy = Copy.from_bytes(Answer.from_bytes(reply).body)
            return Answer(changed(copy, box=bytes(len(copy.box))).to_bytes()).to_bytes()

    wrap = losing({2}, "open", {"site-2"}, hear=False)
    folder = train(small(*WHOLE), tmp_path / "run", exchange=wrap, clients={"site-1": Bad})
    assert len(read_history(folder).rounds[2].survivors) == 5
    assert same(weights(folder), weights(served()))


def test_a_report_of_an_earlier_round_does_not_count(small, tmp_path):
    """A site that repeats what it once said is not taken to hold anything new."""

    class Repeating:
        def __init__(self, client: Any) -> None:
            self._client, self._said = client, b""

        def answer(self, data: bytes) -> bytes:
            if Request.from_bytes(data).phase == "report":
                self._said = self._said or self._client.answer(data)
                return self._said
            return bytes(self._client.answer(data))

    clients = dict.fromkeys(("site-2", "site-4"), Repeating)
    with pytest.raises(RunFailedError, match="3 sites moved to update 1, 4 needed") as caught:
        run(small(*WHOLE), tmp_path / "run", clients=clients)
    assert "site-2: report: site-2 sent a report that is not its own of now" in str(caught.value)


def test_one_site_that_lies_of_its_model_changes_nothing(small, tmp_path, served):
    """The others are a quorum. It is lent what it held all along, and takes part again."""
    folder = train(small(*WHOLE), tmp_path / "run", clients={"site-2": Lying})
    assert all(len(record.survivors) == 5 for record in read_history(folder).rounds)
    assert same(weights(folder), weights(served()))


def test_sites_that_do_not_agree_on_the_model_are_an_abort(small, tmp_path):
    """Three of five say the same, where four must."""
    with pytest.raises(RunFailedError, match="3 sites agree on update 1, 4 needed") as caught:
        run(small(*WHOLE), tmp_path / "run", clients=dict.fromkeys(("site-2", "site-4"), Lying))
    assert "site-2: report: holds another model than the others" in str(caught.value)


def test_too_many_lost_disks_end_the_run_with_the_reason(small, tmp_path):
    experiment = small(*WHOLE, "rounds=2")
    folder = tmp_path / "run"

    def forgetting(exchange: Exchange) -> Exchange:
        def forget(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            replies = exchange(phase, messages)
            if phase == "report":
                return {s: r for s, r in replies.items() if s in ("site-1", "site-2")}
            return replies

        return forget

    with pytest.raises(RunFailedError, match="2 sites moved to update 1, 4 needed"):
        run(experiment, folder, exchange=forgetting)


def numbers(state: GlobalState) -> list[bytes]:
    """Every four surviving weights in a row, as float32: what no message may hold."""
    flat = state.weights[state.mask]
    return [flat[i : i + 4].tobytes() for i in range(len(flat) - 3)]


def test_no_weight_no_sum_and_no_pruning_mask_is_on_the_servers_wire_or_disk(small, tmp_path):
    """The search is made over every request and reply of the run, and every file but the sites'."""
    wire: list[bytes] = []

    def recording(exchange: Exchange) -> Exchange:
        def record(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            replies = exchange(phase, messages)
            wire.extend([*messages.values(), *replies.values()])
            return replies

        return record

    consent = "transcript.consent=['site-1', 'site-2', 'site-3', 'site-4', 'site-5']"
    seen: dict[str, list[bytes]] = {}
    for reveal in ("server", "sites"):
        wire.clear()
        lossy = losing({2}, "open", {"site-2"}, hear=False)
        folder = train(
            small(*WHOLE, f"protocol.reveal={reveal}", consent),
            tmp_path / reveal,
            exchange=lambda exchange, lossy=lossy: lossy(recording(exchange)),
        )
        files = [
            path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.parts[-2] != "models"
        ]
        seen[reveal] = [*wire, *files]
    assert any(b"Loan" in data for data in seen["sites"])
    models = (tmp_path / "sites" / "sites" / "site-1" / "models").iterdir()
    copies = [Replica.from_bytes(path.read_bytes(), 62) for path in models]
    heads = [head for copy in copies for head in numbers(copy.state)]
    assert any(head in data for head in heads for data in seen["server"])  # the search finds it
    for data in seen["sites"]:
        assert not any(head in data for head in heads)
        for copy in copies:
            assert copy.salt not in data
            assert np.packbits(copy.state.mask, bitorder="little").tobytes() not in data
            assert copy.state.digest() not in data


def test_a_salted_digest_tests_no_guess_of_the_model(small, tmp_path):
    """Who knows the model exactly cannot tell it from the digest: the same model, other digests."""
    made, told = [], []
    for name in "ab":
        folder = train(small(*WHOLE), tmp_path / name, 1)
        made.append(weights(folder))
        told.append(told_standing(folder / "checkpoints" / "update-000001.json"))
    assert same(*made)
    assert told[0].model != told[1].model
    assert changed(told[0], model=told[1].model) == told[1]
