"""A round goes on without those who break it, and an active server gains nothing by its tricks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, ModuleType

import numpy as np
import pytest

from protocols.bfv import SecretKey
from protocols.catalogue import PROTOCOLS
from protocols.encoding import Aggregate
from protocols.errors import RoundAbortedError
from protocols.identity import SigningKey
from protocols.keystream import Seed
from protocols.messages import (
    Advertisement,
    Advertisements,
    Begin,
    MaskAdvertisement,
    MaskAdvertisements,
    RelayedSecrets,
    SealedSeeds,
    SharedSecrets,
    Upload,
)
from securefl import agreement, runs
from securefl.messages import Answer, Refusal, Request, parse_reply
from securefl.records import read_history
from securefl.runs import RunFailedError
from securefl.server import Server
from securefl.state import GlobalState
from securefl.store import SiteStore

# A report's plots take most of a short run's time, and are told of elsewhere (test_runs).
run = partial(runs.run, report=False)

ALL = pytest.mark.parametrize("protocol", list(PROTOCOLS))


class Malicious:
    """Stands for a site: what the honest client would say goes through `spoil(phase, reply)`."""

    def __init__(self, client, spoil: Callable[[str, bytes], bytes]) -> None:
        self._client = client
        self._spoil = spoil

    def answer(self, data: bytes) -> bytes:
        return self._spoil(Request.from_bytes(data).phase, self._client.answer(data))


def in_upload(change: Callable[[Upload], Upload]) -> Callable[[str, bytes], bytes]:
    def spoil(phase: str, reply: bytes) -> bytes:
        if phase != "upload":
            return reply
        return Answer(
            change(Upload.from_bytes(Answer.from_bytes(reply).body)).to_bytes()
        ).to_bytes()

    return spoil


def changed(upload: Upload, **fields) -> Upload:
    whole = {name: getattr(upload, name) for name in upload.__struct_fields__}
    return Upload(**{**whole, **fields})


def replay() -> Callable[[str, bytes], bytes]:
    first: list[bytes] = []

    def spoil(phase: str, reply: bytes) -> bytes:
        if phase == "upload":
            first.append(reply)
            return first[0]
        return reply

    return spoil


def garbage(data: bytes) -> Callable[[str, bytes], bytes]:
    return lambda phase, reply: data if phase == "upload" else reply


def vanish(where: str) -> Callable[[str, bytes], bytes]:
    def spoil(phase: str, reply: bytes) -> bytes:
        if phase == where:
            raise ConnectionError("gone")
        return reply

    return spoil


SPOILT = {
    "garbage": (garbage(b"\xc1" * 40), "not a reply"),
    "nothing": (garbage(b""), "not a reply"),
    "an answer of garbage": (garbage(Answer(b"garbage").to_bytes()), "not a Upload"),
    "a wrong signature": (in_upload(lambda u: changed(u, signature=bytes(64))), "signature"),
    "another sender": (in_upload(lambda u: changed(u, sender="site-1")), "in the name of site-1"),
    "a stranger": (in_upload(lambda u: changed(u, sender="mallory")), "in the name of mallory"),
    "a truncated payload": (in_upload(lambda u: changed(u, payload=u.payload[:-9])), "signature"),
    "a changed payload": (
        in_upload(lambda u: changed(u, payload=u.payload[:-1] + bytes([u.payload[-1] ^ 1]))),
        "signature",
    ),
    "silence": (vanish("upload"), "no reply in phase upload"),
}


@ALL
@pytest.mark.parametrize("fault", SPOILT)
def test_a_malicious_site_falls_out_with_a_reason_and_the_run_goes_on(
    small, tmp_path, protocol, fault
):
    spoil, telling = SPOILT[fault]
    done = run(
        small(f"protocol.name={protocol}", "protocol.colluding_sites=0", "rounds=2"),
        tmp_path / "run",
        clients={"site-2": lambda client: Malicious(client, spoil)},
    )
    history = read_history(done.directory)
    assert len(history.rounds) == 2
    for record in history.rounds:
        assert record.survivors == ("site-1", "site-3")
        assert set(record.dropouts) == {"site-2"}
        assert telling in record.dropouts["site-2"], record.dropouts
    assert done.summary.dropouts.keys() == {"1", "2"}
    assert done.summary.stopped == "round budget"


@ALL
def test_a_site_that_replays_its_older_upload_falls_out(small, tmp_path, protocol):
    spoil = replay()
    done = run(
        small(f"protocol.name={protocol}", "protocol.colluding_sites=0", "rounds=3"),
        tmp_path / "run",
        clients={"site-2": lambda client: Malicious(client, spoil)},
    )
    first, *later = read_history(done.directory).rounds
    assert first.survivors == ("site-1", "site-2", "site-3")
    for record in later:
        assert record.survivors == ("site-1", "site-3")
        assert "signature of site-2" in record.dropouts["site-2"]


def begin_of(client) -> Begin:
    """The beginning of the round that the client is in, wherever its state keeps it."""
    state = client._round.protocol_state
    while not hasattr(state, "begin"):
        state = next(
            getattr(state, name)
            for name in ("masked", "uploaded", "shared", "secrets")
            if hasattr(state, name)
        )
    return state.begin


def resigned(client, change: Callable[[Upload], bytes]) -> Callable[[str, bytes], bytes]:
    """A site that signs what it spoilt: its signature holds, its ciphertext does not."""
    from protocols.rounds import statement

    def spoil(phase: str, reply: bytes) -> bytes:
        if phase != "upload":
            return reply
        upload = Upload.from_bytes(Answer.from_bytes(reply).body)
        payload = change(upload)
        context = begin_of(client).context
        said = statement(context, "upload", upload.sender, upload.key, payload)
        signature = client._identity.key.sign(said)
        return Answer(changed(upload, payload=payload, signature=signature).to_bytes()).to_bytes()

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda upload: upload.payload[:-1],
        lambda upload: upload.payload + b"\0",
        lambda upload: b"",
        lambda upload: upload.payload[: len(upload.payload) // 2],
        lambda upload: upload.payload + upload.payload,
        lambda upload: b"\xff" * len(upload.payload),
    ],
    ids=["a byte short", "a byte more", "empty", "half", "twice", "coefficients beyond q"],
)
@pytest.mark.parametrize("protocol", ["bfv", "masked-bfv"])
def test_a_signed_ciphertext_that_is_malformed_falls_out(small, tmp_path, protocol, change):
    # With 17 bits a slot is wide enough that little is cut off a coefficient: then all ones is not
    # below q. Where 16 bits are cut, every pattern is some coefficient.
    done = run(
        small(
            f"protocol.name={protocol}",
            "protocol.colluding_sites=0",
            "protocol.bits=17",
            "rounds=2",
        ),
        tmp_path / "run",
        clients={"site-2": lambda client: Malicious(client, resigned(client, change))},
    )
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("site-1", "site-3")
        assert record.dropouts["site-2"].startswith("upload: ")


@pytest.mark.parametrize("protocol", ["bfv", "masked-bfv"])
def test_a_well_formed_foreign_ciphertext_spoils_the_round_but_yields_no_sum(
    small, tmp_path, protocol
):
    """Nobody can tell which site sent it: under the masks and the key it looks like any other."""

    def foreign(upload: Upload) -> bytes:
        return upload.payload[:-200] + bytes(reversed(upload.payload[-200:]))

    with pytest.raises(RunFailedError, match=r"no site opened the sum.*the sum counts") as caught:
        run(
            small(f"protocol.name={protocol}", "rounds=1"),
            tmp_path / "run",
            clients={"site-2": lambda client: Malicious(client, resigned(client, foreign))},
        )
    assert "\n" not in str(caught.value)


def test_a_masked_vector_of_another_kind_spoils_the_round_but_yields_no_sum(small, tmp_path):
    def foreign(upload: Upload) -> bytes:
        return bytes(len(upload.payload))

    with pytest.raises(RunFailedError, match="the opened sum counts"):
        run(
            small("protocol.name=secagg", "rounds=1"),
            tmp_path / "run",
            clients={"site-2": lambda client: Malicious(client, resigned(client, foreign))},
        )


@pytest.mark.parametrize("site", ["site-1", "site-2", "site-3"])
@pytest.mark.parametrize("phase", ["advertise", "share", "upload", "open"])
def test_any_one_site_may_vanish_in_any_phase(small, tmp_path, site, phase):
    done = run(
        small("protocol.name=bfv", "rounds=2"),
        tmp_path / "run",
        clients={site: lambda client: Malicious(client, vanish(phase))},
    )
    for record in read_history(done.directory).rounds:
        others = {"site-1", "site-2", "site-3"} - {site}
        assert others <= set(record.survivors)
        asked = phase in ("advertise", "upload") or site == "site-1"  # the lowest shares and opens
        counted = phase == "open" or not asked
        assert (site in record.survivors) == counted
        assert (site in record.dropouts) == (not counted)
    assert done.summary.rounds == 2


def _vanishings() -> list[tuple[str, str, str]]:
    return [
        (name, site, phase)
        for name in ("secagg", "masked-bfv")
        for site in ("site-1", "site-3")
        for phase in PROTOCOLS[name].phases
        if (name, site, phase) != ("masked-bfv", "site-1", "share")  # it makes the HE seed
    ]


@pytest.mark.parametrize(("protocol", "site", "phase"), _vanishings())
def test_a_masked_sum_is_exact_although_a_site_vanishes(small, tmp_path, protocol, site, phase):
    """One of four may vanish anywhere: the model is that of a plain run over the same sites."""
    seeded = ("sites.count=4", "not_private_seed=5", "rounds=1")
    done = run(
        small(f"protocol.name={protocol}", *seeded),
        tmp_path / "run",
        clients={site: lambda client: Malicious(client, vanish(phase))},
    )
    (record,) = read_history(done.directory).rounds
    counted = phase in ("confirm", "unmask", "open")
    assert (site in record.survivors) == counted
    assert (site in record.dropouts) == (not counted)
    lost = {} if counted else {site: lambda client: Malicious(client, vanish("upload"))}
    plain = run(small("protocol.name=plain", *seeded), tmp_path / "plain", clients=lost)
    assert weights(done) == weights(plain)


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_two_of_five_may_vanish_in_different_phases(small, tmp_path, protocol):
    seeded = ("sites.count=5", "protocol.colluding_sites=0", "not_private_seed=5", "rounds=2")
    gone = {"site-2": "share", "site-5": "upload"}

    def lost(phases: Mapping[str, str]):
        return {s: lambda client, p=p: Malicious(client, vanish(p)) for s, p in phases.items()}

    done = run(small(f"protocol.name={protocol}", *seeded), tmp_path / "run", clients=lost(gone))
    plain = run(
        small("protocol.name=plain", *seeded),
        tmp_path / "plain",
        clients=lost(dict.fromkeys(gone, "upload")),
    )
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("site-1", "site-3", "site-4")
        assert set(record.dropouts) == set(gone)
    assert weights(done) == weights(plain)


def test_a_maker_of_the_seed_that_vanishes_once_costs_one_round(small, tmp_path):
    done = run(
        small("protocol.name=masked-bfv", "sites.count=4", "rounds=2"),
        tmp_path / "run",
        exchange=lose({1}, "share", {"site-1"}),
    )
    assert done.summary.aborted_rounds == (1,)
    assert all(len(r.survivors) == 4 for r in read_history(done.directory).rounds)


def test_a_maker_of_the_seed_that_never_answers_costs_only_the_rounds_that_it_makes(
    small, tmp_path
):
    done = run(
        small("protocol.name=masked-bfv", "sites.count=4", "rounds=4"),
        tmp_path / "run",
        clients={"site-1": lambda client: Malicious(client, vanish("share"))},
    )
    assert done.summary.aborted_rounds == (1, 5)
    rounds = read_history(done.directory).rounds
    assert [r.round for r in rounds] == [2, 3, 4, 6]
    assert all(r.survivors == ("site-2", "site-3", "site-4") for r in rounds)
    assert all("site-1" in r.dropouts for r in rounds)


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
@pytest.mark.parametrize(
    ("phase", "telling"),
    [
        ("advertise", "3 sites advertised their keys, 4 needed"),
        ("share", "3 sites shared their secrets, 4 needed"),
        ("upload", "3 uploads, 4 needed"),
        ("confirm", "3 sites confirmed the sum, 4 needed"),
        ("unmask", "3 sites released shares, 4 needed"),
    ],
)
def test_too_few_sites_are_no_sum_and_the_reason_is_told(small, tmp_path, protocol, phase, telling):
    with pytest.raises(RunFailedError, match=telling) as caught:
        run(
            small(f"protocol.name={protocol}", "sites.count=5", "rounds=2"),
            tmp_path / "run",
            exchange=lose(set(range(1, 9)), phase, {"site-2", "site-4"}),
        )
    assert "\n" not in str(caught.value)
    assert f"site-2: no reply in phase {phase}" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_refusal_is_told_as_the_reason(small, tmp_path):
    refusal = Refusal("request", "the ethics board says no").to_bytes()
    done = run(
        small("rounds=1"),
        tmp_path / "run",
        clients={"site-3": lambda client: Malicious(client, lambda phase, reply: refusal)},
    )
    (record,) = read_history(done.directory).rounds
    assert record.dropouts == {"site-3": "refused: the ethics board says no"}


def test_a_reply_from_outside_the_cohort_changes_nothing(small, tmp_path):
    def intrude(exchange):
        def intruded(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            replies = dict(exchange(phase, messages))
            return {**replies, "mallory": replies["site-1"]}

        return intruded

    seeded = small("rounds=2", "not_private_seed=1")
    done = run(seeded, tmp_path / "run", exchange=intrude)
    assert all(len(r.survivors) == 3 for r in read_history(done.directory).rounds)
    honest = run(seeded, tmp_path / "honest")
    assert weights(done) == weights(honest)


def weights(done) -> bytes:
    return (done.directory / "model.safetensors").read_bytes()


# --- rounds that are aborted ---------------------------------------------------------------------


def lose(rounds: set[int], phase: str, sites: set[str] | None = None):
    """An exchange that loses the replies of one phase in some rounds."""

    def wrap(exchange):
        def losing(asked: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            replies = dict(exchange(asked, messages))
            for site, message in messages.items():
                number = Request.from_bytes(message).round
                if asked == phase and number in rounds and (sites is None or site in sites):
                    replies.pop(site, None)
            return replies

        return losing

    return wrap


def test_an_aborted_round_has_a_new_number_and_a_new_charge(small, private, tmp_path):
    done = run(
        small("protocol.name=bfv", *private, "rounds=3"),
        tmp_path / "run",
        exchange=lose({2}, "open"),
    )
    records = read_history(done.directory).rounds
    assert [r.round for r in records] == [1, 3, 4]
    assert [r.update for r in records] == [1, 2, 3]
    assert [r.aborted for r in records] == [(), (2,), ()]
    assert done.summary.aborted_rounds == (2,)
    assert done.summary.rounds == 3
    for site in done.summary.sites:
        assert SiteStore(done.directory / "sites" / site).charged == 4
        assert records[1].epsilon[site] > records[0].epsilon[site]
        assert done.summary.epsilon[site] == records[-1].epsilon[site] <= 5.0


def test_a_round_aborted_before_the_upload_costs_no_privacy(small, private, tmp_path):
    done = run(
        small("protocol.name=bfv", *private, "rounds=2"),
        tmp_path / "run",
        exchange=lose({1}, "share"),
    )
    assert done.summary.aborted_rounds == (1,)
    for site in done.summary.sites:
        assert SiteStore(done.directory / "sites" / site).charged == 2


def test_a_site_alone_is_no_sum(small, tmp_path):
    with pytest.raises(RunFailedError, match="1 uploads, 2 needed") as caught:
        run(
            small("rounds=2"),
            tmp_path / "run",
            exchange=lose(set(range(1, 9)), "upload", {"site-1", "site-3"}),
        )
    assert "\n" not in str(caught.value)
    assert "3 rounds in a row" in str(caught.value)
    assert "site-1: no reply in phase upload" in str(caught.value)


def test_a_run_ends_when_its_budget_is_spent_and_epsilon_is_within_the_plan(
    small, private, tmp_path
):
    done = run(
        small("protocol.name=bfv", *private, "privacy.spare_rounds=0", "rounds=4"),
        tmp_path / "run",
        exchange=lose({2}, "open"),
    )
    assert done.summary.stopped == "privacy budget spent"
    assert done.summary.rounds == 3
    assert done.summary.private
    assert set(done.summary.epsilon) == set(done.summary.sites)
    assert all(0 < value <= 5.0 for value in done.summary.epsilon.values())
    assert set(done.summary.aborted_rounds) >= {2}
    for site in done.summary.sites:
        assert SiteStore(done.directory / "sites" / site).charged == 4


def test_a_site_whose_budget_is_spent_falls_out_and_the_others_go_on(small, private, tmp_path):
    refusal = Refusal("budget", "site-2: nothing is left").to_bytes()
    done = run(
        small(*private, "rounds=2"),
        tmp_path / "run",
        clients={"site-2": lambda client: Malicious(client, lambda phase, reply: refusal)},
    )
    assert done.summary.stopped == "round budget"
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("site-1", "site-3")
        assert "nothing is left" in record.dropouts["site-2"]


def test_local_divergence_ends_the_run_in_one_clear_line(small, tmp_path):
    with pytest.raises(RunFailedError, match=r"lower training\.learning_rate") as caught:
        run(small("training.learning_rate=1e38", "training.local_steps=5"), tmp_path / "run")
    assert "\n" not in str(caught.value)


# --- an active server ----------------------------------------------------------------------------


def other_model(request: Request, experiment, roster_size: int, consistent: bool) -> bytes:
    """`request` with other weights; where `consistent`, with a beginning that binds them."""
    size = 62
    state = GlobalState.from_message(request.model, size)
    other = GlobalState(state.update, state.weights + np.float32(0.5), state.mask)
    body = request.body
    if consistent:
        begin = Begin.from_bytes(body)
        plan = agreement.plan(experiment, roster_size, size)
        encoding = agreement.encoding(experiment, roster_size, plan)
        binding = agreement.binding(experiment, other, encoding)
        fields = {name: getattr(begin, name) for name in begin.__struct_fields__}
        body = Begin(**{**fields, "binding": binding}).to_bytes()
    model = other.to_message()
    return Request(request.session, request.round, request.phase, body, model).to_bytes()


@pytest.mark.parametrize(
    ("protocol", "consistent"),
    [
        ("plain", False),
        ("bfv", False),
        ("bfv", True),
        ("secagg", False),
        ("secagg", True),
        ("masked-bfv", False),
        ("masked-bfv", True),
    ],
)
def test_a_server_that_shows_one_site_other_weights_gets_no_upload_from_it(
    small, tmp_path, protocol, consistent
):
    experiment = small(f"protocol.name={protocol}", "protocol.colluding_sites=0", "rounds=2")
    uploads: list[bytes] = []

    def active(exchange):
        def shown(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            sent = dict(messages)
            if "site-2" in sent and Request.from_bytes(sent["site-2"]).model:
                request = Request.from_bytes(sent["site-2"])
                sent["site-2"] = other_model(request, experiment, 3, consistent)
            replies = exchange(phase, sent)
            if phase == "upload" and "site-2" in replies:
                uploads.append(replies["site-2"])
            return replies

        return shown

    done = run(experiment, tmp_path / "run", exchange=active)
    assert not [reply for reply in uploads if isinstance(parse_reply(reply), Answer)]
    for record in read_history(done.directory).rounds:
        assert record.survivors == ("site-1", "site-3")
        assert "site-2" in record.dropouts


def test_the_maker_seals_no_seed_for_a_site_that_was_shown_other_weights(small, bench):
    """The active server relays the target's advertisement although it does not verify."""
    made = bench(small("protocol.name=bfv"))
    experiment = made.experiment
    items = []
    for site in ("site-1", "site-2", "site-3"):
        request = Request.from_bytes(made.first(1))
        data = made.first(1) if site != "site-2" else other_model(request, experiment, 3, True)
        reply = made.ask(site, data)
        assert isinstance(reply, Answer)
        items.append(Advertisement.from_bytes(reply.body))
    share = made.request(1, "share", Advertisements(tuple(items)).to_bytes())
    reply = made.ask("site-1", share)
    assert isinstance(reply, Refusal)
    assert "signature of site-2" in reply.reason


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_no_site_shares_secrets_with_one_that_was_shown_other_weights(small, bench, protocol):
    """Each site refuses by itself, whatever the server relays."""
    made = bench(small(f"protocol.name={protocol}"))
    items = []
    for site in ("site-1", "site-2", "site-3"):
        data = made.first(1)
        if site == "site-2":
            data = other_model(Request.from_bytes(data), made.experiment, 3, True)
        reply = made.ask(site, data)
        assert isinstance(reply, Answer)
        items.append(MaskAdvertisement.from_bytes(reply.body))
    share = made.request(1, "share", MaskAdvertisements(tuple(items)).to_bytes())
    for site, blamed in (("site-1", "site-2"), ("site-3", "site-2"), ("site-2", "site-1")):
        reply = made.ask(site, share)
        assert isinstance(reply, Refusal)
        assert f"signature of {blamed}" in reply.reason


def test_an_opener_opens_no_sum_of_one(small, bench):
    """An active server may swap what it asks to be opened, but not count one site as a sum."""
    made = bench(small("protocol.name=bfv"))
    requests = made.drive(1, "upload")
    uploads = {site: made.ask(site, request) for site, request in requests.items()}
    from protocols.bfv import Parameters, Sum
    from protocols.messages import SumToOpen

    upload = Upload.from_bytes(uploads["site-2"].body)
    parameters = Parameters(made.encoding.plain_bits, made.encoding.cohort)
    total = Sum(made.encoding.slots(made.state.surviving), parameters)
    total.add(upload.payload)
    asked = SumToOpen(("site-1", "site-2"), (), total.to_bytes()).to_bytes()
    reply = made.ask("site-1", made.request(1, "open", asked))
    assert isinstance(reply, Refusal)
    assert "sum of 2" in reply.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_get_no_upload(small, tmp_path, value):
    def poison(exchange):
        def poisoned(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
            sent = {}
            for site, data in messages.items():
                request = Request.from_bytes(data)
                state = GlobalState.from_message(request.model, 62)
                bad = GlobalState(state.update, state.weights * np.float32(value), state.mask)
                sent[site] = Request(
                    request.session, request.round, phase, request.body, bad.to_message()
                ).to_bytes()
            return exchange(phase, sent)

        return poisoned

    with pytest.raises(RunFailedError, match="not finite"):
        run(small("rounds=1"), tmp_path / "run", exchange=poison)


@ALL
def test_the_server_counts_what_crossed_its_wire(small, bench, protocol):
    made = bench(small(f"protocol.name={protocol}"))
    sent: dict[str, int] = {}
    came: dict[str, int] = {}

    def exchange(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = {site: made.clients[site].answer(data) for site, data in messages.items()}
        sent[phase] = sent.get(phase, 0) + sum(map(len, messages.values()))
        came[phase] = came.get(phase, 0) + sum(map(len, replies.values()))
        return replies

    entered: list[tuple[int, str]] = []
    server = Server(
        made.experiment,
        made.roster,
        b"session of tests",
        exchange,
        lambda number, phase: entered.append((number, phase)),
    )
    result = server.round(1, made.state)
    assert result.number == 1
    assert entered == [(1, phase) for phase in PROTOCOLS[protocol].phases]
    assert dict(result.traffic.bytes_down) == sent
    assert dict(result.traffic.bytes_up) == came
    assert sum(result.traffic.upload_bytes.values()) == came["upload"]
    assert set(result.traffic.upload_bytes) == set(made.roster)
    assert not result.faults


def test_a_server_without_answers_aborts_with_the_reasons(small, bench):
    made = bench(small())
    silent = Server(
        made.experiment, made.roster, b"session of tests", lambda *_: {}, lambda *_: None
    )
    with pytest.raises(RoundAbortedError, match="site-1: no reply in phase upload"):
        silent.round(1, made.state)


@pytest.mark.parametrize("protocol", ["bfv", "secagg", "masked-bfv"])
def test_the_model_is_sent_in_the_first_phase_only(small, bench, protocol):
    made = bench(small(f"protocol.name={protocol}"))
    with_model: dict[str, set[bool]] = {}

    def exchange(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        shown = {bool(Request.from_bytes(data).model) for data in messages.values()}
        with_model.setdefault(phase, set()).update(shown)
        return {site: made.clients[site].answer(data) for site, data in messages.items()}

    Server(made.experiment, made.roster, b"session of tests", exchange, lambda *_: None).round(
        1, made.state
    )
    assert with_model.pop("advertise") == {True}
    assert set(with_model) == set(PROTOCOLS[protocol].phases[1:])
    assert all(shown == {False} for shown in with_model.values())


def test_a_maker_that_seals_a_wrong_seed_is_found_out_by_the_sites(small, tmp_path):
    """The maker names one seed and seals another: nobody uploads under it."""

    def spoil(phase: str, reply: bytes) -> bytes:
        if phase != "share":
            return reply
        items = SealedSeeds.from_bytes(Answer.from_bytes(reply).body).items
        boxes = [item.box for item in items]
        mixed = []
        for item, box in zip(items, boxes[1:] + boxes[:1], strict=True):
            whole = {name: getattr(item, name) for name in item.__struct_fields__}
            mixed.append(type(item)(**{**whole, "box": box}))
        return Answer(SealedSeeds(tuple(mixed)).to_bytes()).to_bytes()

    done = run(
        small("protocol.name=bfv", "rounds=1"),
        tmp_path / "run",
        clients={"site-1": lambda client: Malicious(client, spoil)},
    )
    (record,) = read_history(done.directory).rounds
    assert record.survivors == ("site-2", "site-3")  # the next one made the seed
    assert record.dropouts["site-1"].startswith("share: ")


def test_a_maker_that_seals_a_wrong_seed_gets_no_upload_from_the_others(small, bench):
    """masked-bfv: the seed is checked before anything is trained; the maker can silence sites."""
    made = bench(small("protocol.name=masked-bfv", "sites.count=4"))
    said = {}
    requests = made.drive(1, "share")
    for site, request in requests.items():
        reply = made.ask(site, request)
        assert isinstance(reply, Answer)
        said[site] = SharedSecrets.from_bytes(reply.body)
    boxes = {item.receiver: item for item in said["site-1"].seeds}
    honest = boxes["site-3"]
    fields = {name: getattr(honest, name) for name in honest.__struct_fields__}
    for spoilt, telling in (
        ({"box": boxes["site-2"].box}, "signature of site-1"),
        ({"key": bytes(32)}, "signature of site-1"),
        ({"receiver": "site-2"}, "sealed for site-2"),
        ({"maker": "site-2"}, "site-1 makes the seed of this round"),
    ):
        shares = tuple(i for s, x in said.items() for i in x.shares if i.receiver == "site-3")
        relayed = RelayedSecrets(tuple(said), shares, (type(honest)(**{**fields, **spoilt}),))
        reply = made.ask("site-3", made.request(1, "upload", relayed.to_bytes()))
        assert isinstance(reply, Refusal)
        assert telling in reply.reason


# --- what the server holds -----------------------------------------------------------------------


def reachable(*roots: object) -> list[object]:
    """Every object that can be reached from `roots`, without modules, classes and functions."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, ModuleType | type | FunctionType):
            continue
        seen[id(item)] = item
        waiting.extend(gc.get_referents(item))
    return list(seen.values())


@pytest.mark.parametrize(
    ("protocol", "reveal"), [("bfv", "server"), ("masked-bfv", "server"), ("masked-bfv", "sites")]
)
def test_the_server_never_holds_the_he_seed_or_a_key(small, bench, protocol, reveal, monkeypatch):
    """Everything reachable from the server is searched in every phase and after the round.

    Under reveal = "sites" for an aggregate too.
    """
    blind = reveal == "sites"
    secret = (SecretKey, SigningKey, *((Aggregate, GlobalState) if blind else ()))
    drawn: list[bytes] = []
    init = Seed.__init__

    def noted(self, material: bytes) -> None:
        drawn.append(bytes(material))
        init(self, material)

    monkeypatch.setattr(Seed, "__init__", noted)
    overrides = (f"protocol.name={protocol}", f"protocol.reveal={reveal}")
    made = bench(small(*overrides, "sites.count=4"))
    drawn.clear()
    found: list[str] = []

    def look(where: str, *roots: object) -> set[str]:
        held = reachable(*roots)
        said = {type(item).__name__ for item in held if isinstance(item, secret)}
        seeds = {data for data in drawn if len(data) == 64}
        raw = [item for item in held if isinstance(item, bytes | bytearray)]
        return said | {where for data in seeds for item in raw if data in item}

    def exchange(phase: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
        replies = {site: made.clients[site].answer(data) for site, data in messages.items()}
        found.extend(look(phase, messages, replies))
        return replies

    parts = (made.begin(1), made.roster, made.encoding, made.state.surviving)
    serve = PROTOCOLS[protocol].blind_server if blind else PROTOCOLS[protocol].server
    steps = serve(*parts)
    asked = next(steps)
    model = made.state.to_message()
    while True:
        requests = {s: made.request(1, asked.phase, b, model) for s, b in asked.messages.items()}
        replies = {s: parse_reply(r).body for s, r in exchange(asked.phase, requests).items()}
        if asked.phase == "open":
            clients = [made.clients[s]._round for s in sorted(made.roster)]
            if not blind:  # there all of them have opened, and hold no key any more
                assert "SecretKey" in look("a site", *clients)  # the search finds what is there
            else:
                assert "GlobalState" in look("a site", *clients)
                assert "SecretKey" not in look("a site", *clients)
        model = b""
        try:
            asked = steps.send(replies)
        except StopIteration as done:
            found.extend(look("outcome", done.value))
            break
        found.extend(look(asked.phase, steps, asked))
    assert [len(data) for data in set(drawn) if len(data) == 64] == [64]
    assert found == []
