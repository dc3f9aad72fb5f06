"""A site answers an honest server, once, and nobody else; what it spends is on disk first."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.catalogue import PROTOCOLS
from protocols.messages import Begin, Confirmations, SealedSeed, Survivors
from protocols.rounds import make_identities
from securefl import client as client_module
from securefl import simulation
from securefl.config import ConfigurationError
from securefl.messages import Answer, Refusal, Request, parse_reply
from securefl.state import GlobalState
from securefl.store import SiteStore

BFV = ("protocol.name=bfv",)
MASKED = ("protocol.name=masked-bfv", "sites.count=4")  # three of four are enough
ALL = pytest.mark.parametrize("protocol", list(PROTOCOLS))


def refused(reply: Answer | Refusal, *telling: str) -> None:
    assert isinstance(reply, Refusal), reply
    assert reply.kind == "request"
    for part in telling:
        assert part in reply.reason, reply.reason


# --- one reply a phase ---------------------------------------------------------------------------


@ALL
def test_the_same_request_again_gets_the_same_reply(small, bench, private, protocol):
    made = bench(small(f"protocol.name={protocol}", *private))
    last = PROTOCOLS[protocol].phases[-1]
    answered: dict[tuple[str, str], bytes] = {}
    if protocol != "plain":
        made.drive(1, last, lambda site, phase, request: answered.update({(site, phase): request}))
    final = made.drive(2, last)
    for site, request in final.items():
        first = made.clients[site].answer(request)
        assert isinstance(parse_reply(first), Answer)
        for _ in range(3):
            assert made.clients[site].answer(request) == first
        assert SiteStore(made.folder / site).last_round == 2


@ALL
def test_every_phase_repeats_its_reply_without_a_second_charge(small, bench, private, protocol):
    made = bench(small(f"protocol.name={protocol}", *private))
    phases = PROTOCOLS[protocol].phases
    replies: dict[tuple[str, str], tuple[bytes, bytes]] = {}

    def note(site: str, phase: str, request: bytes) -> None:
        replies[site, phase] = (request, made.clients[site].answer(request))

    for site, request in made.drive(1, phases[-1], note).items():
        note(site, phases[-1], request)
    assert {phase for _, phase in replies} == set(phases)
    for (site, _), (request, reply) in replies.items():
        assert isinstance(parse_reply(reply), Answer)
        assert made.clients[site].answer(request) == reply
        assert SiteStore(made.folder / site).charged == 1


@ALL
def test_another_request_for_an_answered_phase_is_refused(small, bench, private, protocol):
    made = bench(small(f"protocol.name={protocol}", *private))
    requests = made.drive(1, "upload")
    site = "site-1"
    assert isinstance(made.ask(site, requests[site]), Answer)
    seen = Request.from_bytes(requests[site])
    other = made.request(1, "upload", seen.body, seen.model + b"\0")
    refused(made.ask(site, other), "upload", "answered to another request")
    assert SiteStore(made.folder / site).charged == 1


def test_the_maker_seals_no_second_seed_and_the_opener_opens_no_second_sum(small, bench):
    made = bench(small(*BFV))
    first: dict[str, tuple[str, bytes]] = {}
    opening = made.drive(1, "open", lambda s, p, r: first.setdefault(p, (s, r)))
    (opener, request), *_ = opening.items()
    assert isinstance(made.ask(opener, request), Answer)
    seen = Request.from_bytes(request)
    refused(made.ask(opener, made.request(1, "open", seen.body[:-1] + b"\1")), "another request")
    maker, share = first["share"]
    refused(
        made.ask(maker, made.request(1, "share", Request.from_bytes(share).body + b"\0")),
        "another request",
    )


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
@pytest.mark.parametrize("phase", ["confirm", "unmask"])
def test_a_site_signs_one_sum_and_releases_its_shares_once(small, bench, protocol, phase):
    """Whatever the second request says: with two answers a server could take both masks off."""
    made = bench(small(f"protocol.name={protocol}", "sites.count=5"))
    requests = made.drive(1, phase)
    site = "site-2"
    assert isinstance(made.ask(site, requests[site]), Answer)
    body = Request.from_bytes(requests[site]).body
    if phase == "confirm":
        other = Survivors(tuple(s for s in made.roster if s != "site-5")).to_bytes()
    else:
        other = Confirmations(Confirmations.from_bytes(body).items[:-1]).to_bytes()
    assert other != body
    refused(made.ask(site, made.request(1, phase, other)), "another request")


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_a_site_confirms_no_sum_below_the_minimum_or_without_itself(small, bench, protocol):
    made = bench(small(f"protocol.name={protocol}", "sites.count=5"))
    made.drive(1, "confirm")
    for sites, telling in (
        (("site-1", "site-2", "site-3"), "a sum of 3 is below the 4 needed"),
        (("site-1", "site-3", "site-4", "site-5"), "leaves out site-2"),
    ):
        body = Survivors(sites).to_bytes()
        refused(made.ask("site-2", made.request(1, "confirm", body)), telling)


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"threshold": 3}, "2t > n + T needs at least 4"),
        ({"threshold": 1}, "2t > n + T needs at least 4"),
        ({"minimum": 3}, "below this site's 4"),
        ({"threshold": 5}, "minimum 4 is below"),
    ],
)
def test_a_site_takes_part_under_no_weaker_thresholds(small, bench, protocol, change, telling):
    made = bench(small(f"protocol.name={protocol}", "sites.count=5"))
    honest = made.begin(1)
    fields = {name: getattr(honest, name) for name in honest.__struct_fields__}
    body = Begin(**{**fields, **change}).to_bytes()
    request = made.request(1, "advertise", body, made.state.to_message())
    refused(made.ask("site-1", request), telling)


# --- order, rounds, sessions ---------------------------------------------------------------------


@ALL
def test_old_round_numbers_are_refused(small, bench, protocol):
    made = bench(small(f"protocol.name={protocol}"))
    assert isinstance(made.ask("site-1", made.first(7)), Answer)
    for old in (1, 6):
        refused(made.ask("site-1", made.first(old)), "over", "only grow")
    assert isinstance(made.ask("site-1", made.first(8)), Answer)
    refused(made.ask("site-1", made.first(7)), "over")


def test_round_numbers_that_were_charged_are_refused_after_a_restart(small, bench, private):
    made = bench(small(*private))
    assert isinstance(made.ask("site-1", made.first(5)), Answer)
    made.clients["site-1"].close()
    made.clients["site-1"] = made.client("site-1")
    for old in (4, 5):
        refused(made.ask("site-1", made.first(old)), "entered before")
    assert SiteStore(made.folder / "site-1").charged == 1
    assert isinstance(made.ask("site-1", made.first(6)), Answer)
    assert SiteStore(made.folder / "site-1").charged == 2


@ALL
def test_another_session_is_refused(small, bench, protocol):
    made = bench(small(f"protocol.name={protocol}"))
    seen = Request.from_bytes(made.first(1))
    strange = Request(b"another session!", 1, seen.phase, seen.body, seen.model)
    refused(made.ask("site-1", strange.to_bytes()), "another session")


@pytest.mark.parametrize("protocol", ["bfv", "secagg", "masked-bfv"])
@pytest.mark.parametrize("phase", ["share", "upload", "confirm", "unmask", "open", ""])
def test_a_phase_out_of_order_is_refused(small, bench, private, protocol, phase):
    made = bench(small(f"protocol.name={protocol}", *private))
    model = made.state.to_message()
    refused(made.ask("site-1", made.request(1, phase, b"", model)), "does not come now")
    assert SiteStore(made.folder / "site-1").charged == 0


def test_opening_before_uploading_and_advertising_twice_are_refused(small, bench):
    made = bench(small(*BFV))
    made.drive(1, "share")
    refused(made.ask("site-2", made.request(1, "open", b"")), "does not come now")
    changed = Begin(b"session of tests", 1, ("site-1", "site-2"), 2, 1, made.begin(1).binding)
    refused(made.ask("site-2", made.request(1, "advertise", changed.to_bytes())), "another request")


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"binding": bytes(32)}, "another model or other parameters"),
        ({"round": 9}, "another round"),
        ({"session": b"another session!"}, "another round"),
        ({"cohort": ("site-2", "site-3", "site-4")}, "site-1 is not in the cohort"),
        (
            {"cohort": ("mallory", "site-1", "site-2")},
            "mallory is in the cohort but not in the roster",
        ),
    ],
)
@ALL
def test_a_round_that_is_not_the_expected_one_is_refused(small, bench, protocol, change, telling):
    made = bench(small(f"protocol.name={protocol}"))
    honest = made.begin(1)
    fields = {name: getattr(honest, name) for name in honest.__struct_fields__}
    begin = Begin(**{**fields, **change})
    phase = PROTOCOLS[protocol].phases[0]
    request = made.request(1, phase, begin.to_bytes(), made.state.to_message())
    refused(made.ask("site-1", request), telling)


def test_a_cohort_below_the_sites_own_minimum_is_refused(small, bench):
    made = bench(small("protocol.minimum_cohort=3"))
    honest = made.begin(1)
    fields = {name: getattr(honest, name) for name in honest.__struct_fields__}
    begin = Begin(**{**fields, "minimum": 2})
    request = made.request(1, "upload", begin.to_bytes(), made.state.to_message())
    refused(made.ask("site-1", request), "minimum cohort 2 is below this site's 3")


# --- the model it is shown -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_and_not_charged(small, bench, private, value):
    made = bench(small(*private))
    weights = made.state.weights.copy()
    weights[3] = value
    poisoned = GlobalState(0, weights, made.state.mask)
    refused(made.ask("site-1", made.first(1, poisoned)), "not finite")
    assert SiteStore(made.folder / "site-1").charged == 0


def test_a_model_other_than_the_one_that_is_bound_is_refused(small, bench, private):
    made = bench(small(*private))
    other = GlobalState(0, made.state.weights + 1, made.state.mask)
    request = made.request(1, "upload", made.begin(1).to_bytes(), other.to_message())
    refused(made.ask("site-1", request), "another model")
    assert SiteStore(made.folder / "site-1").charged == 0


def test_a_model_of_another_size_or_none_is_refused(small, bench):
    made = bench(small())
    larger = GlobalState(0, np.zeros(63, np.float32), np.ones(63, np.bool_))
    refused(made.ask("site-1", made.first(1, larger)), "63 weights, not 62")
    refused(made.ask("site-1", made.request(2, "upload", made.begin(2).to_bytes())), "ModelMessage")


# --- charges -------------------------------------------------------------------------------------


@ALL
def test_the_charge_is_on_disk_before_any_sample_or_noise_is_drawn(
    small, bench, private, protocol, monkeypatch
):
    made = bench(small(f"protocol.name={protocol}", *private))
    requests = made.drive(1, "upload")
    site = "site-2"
    on_disk: list[int] = []
    real = client_module.Trainer.update

    def watched(self, weights, mask, randomness, *more):
        def drawing(size: int) -> bytes:
            on_disk.append(SiteStore(made.folder / site).charged)
            return randomness(size)

        on_disk.append(SiteStore(made.folder / site).charged)
        return real(self, weights, mask, drawing, *more)

    monkeypatch.setattr(client_module.Trainer, "update", watched)
    assert SiteStore(made.folder / site).charged == 0
    assert isinstance(made.ask(site, requests[site]), Answer)
    assert len(on_disk) >= 2
    assert set(on_disk) == {1}


def test_a_malformed_upload_request_is_not_charged(small, bench, private):
    made = bench(small(*BFV, *private))
    requests = made.drive(1, "upload")
    site = "site-2"
    whole = Request.from_bytes(requests[site])
    sealed = SealedSeed.from_bytes(whole.body)
    fields = {name: getattr(sealed, name) for name in sealed.__struct_fields__}
    others = Request.from_bytes(requests["site-3"]).body
    for body in (
        b"",
        whole.body[:-1],
        whole.body + b"\0",
        others,
        SealedSeed(**{**fields, "box": bytes(len(sealed.box))}).to_bytes(),
        SealedSeed(**{**fields, "signature": bytes(64)}).to_bytes(),
        SealedSeed(**{**fields, "key": bytes(32)}).to_bytes(),
        SealedSeed(**{**fields, "maker": "site-3"}).to_bytes(),
    ):
        refused(made.ask(site, made.request(1, "upload", body)))
    assert SiteStore(made.folder / site).charged == 0
    assert isinstance(made.ask(site, requests[site]), Answer)
    assert SiteStore(made.folder / site).charged == 1


def test_without_a_plan_nothing_is_charged(small, bench):
    made = bench(small())
    assert isinstance(made.ask("site-1", made.first(1)), Answer)
    assert SiteStore(made.folder / "site-1").charged == 0


def test_a_round_beyond_the_budget_is_a_refusal_for_good(small, bench, private):
    made = bench(small(*private, "privacy.spare_rounds=0", "rounds=3"))
    for number in (1, 2, 3):
        assert isinstance(made.ask("site-1", made.first(number)), Answer)
    for number in (4, 5):
        reply = made.ask("site-1", made.first(number))
        assert isinstance(reply, Refusal)
        assert reply.kind == "budget"
        assert "above the promised 5" in reply.reason
    made.clients["site-1"].close()
    made.clients["site-1"] = made.client("site-1")
    reply = made.ask("site-1", made.first(6))
    assert isinstance(reply, Refusal)
    assert reply.kind == "budget"
    assert SiteStore(made.folder / "site-1").charged == 3


def test_two_rounds_on_the_same_model_never_send_the_same_vector(small, bench, private):
    made = bench(small(*private))
    first, second = (made.ask("site-1", made.first(number)) for number in (1, 2))
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert first.body != second.body


def test_local_divergence_is_one_clear_line(small, bench):
    made = bench(small("training.learning_rate=1e38", "training.local_steps=5"))
    reply = made.ask("site-1", made.first(1))
    refused(reply, "site-1: local training diverged; lower training.learning_rate")
    assert "\n" not in reply.reason


# --- hostile bytes -------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(4), rng.randrange(len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randint(1, 9)]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            out = out[:at]
    return bytes(out)


@pytest.mark.parametrize(
    ("protocol", "phase"),
    [
        *((BFV, phase) for phase in ("advertise", "share", "upload", "open")),
        *((MASKED, phase) for phase in ("advertise", "share", "confirm", "unmask", "open")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].partition("=")[2],
)
def test_mutated_requests_get_a_refusal_and_change_nothing(small, bench, private, protocol, phase):
    made = bench(small(*protocol, *private))
    requests = made.drive(1, phase)
    site, honest = min(requests.items())
    store = made.folder / site / "site.json"
    before = store.read_bytes() if store.exists() else None
    charged = SiteStore(made.folder / site).charged
    rng = random.Random(phase)
    body = Request.from_bytes(honest)
    for i in range(600):
        if i % 2:  # the envelope is whole, what is in it is not
            model = mutated(rng, body.model) if body.model and i % 4 == 1 else body.model
            inner = body.body if model != body.model else mutated(rng, body.body)
            data = Request(body.session, 1, phase, inner, model).to_bytes()
        else:
            data = mutated(rng, honest)
        if data == honest:
            continue
        if isinstance(parse_reply(made.clients[site].answer(data)), Answer):
            # An honest body with another model than the one that this site is at work on already.
            assert Request.from_bytes(data).body == body.body
            before = store.read_bytes()
        assert (store.read_bytes() if store.exists() else None) == before, data
        assert SiteStore(made.folder / site).charged == charged
    # A mutated round number may have moved the site on; the honest server simply begins anew.
    assert isinstance(made.ask(site, made.first(2**61)), Answer)


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_mutated_relays_cost_one_charge_at_most(small, bench, private, protocol):
    """Boxes of shares are opened only when they are needed, so a site may upload over a bad one."""
    made = bench(small(f"protocol.name={protocol}", "sites.count=4", *private))
    site, honest = min(made.drive(1, "upload").items())
    rng, answered = random.Random(protocol), 0
    body = Request.from_bytes(honest).body
    for _ in range(300):
        data = made.request(1, "upload", mutated(rng, body))
        answered += isinstance(parse_reply(made.clients[site].answer(data)), Answer)
        assert SiteStore(made.folder / site).charged == answered <= 1


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, small, private):
    """One client for all examples of a property; at the end nothing was charged."""
    experiment = small(*BFV, *private)
    tables = simulation.assemble(experiment).sites
    identities = make_identities(tables, lambda size: bytes(range(size)))
    folder = tmp_path_factory.mktemp("site-1")
    session = b"session of tests"
    yield simulation.client(experiment, tables["site-1"], identities["site-1"], session, folder)
    assert not (folder / "site.json").exists()


@given(st.binary(max_size=400))
def test_random_bytes_get_a_refusal(lasting, data):
    assert isinstance(parse_reply(lasting.answer(data)), Refusal)


@given(
    session=st.sampled_from([b"session of tests", b"another session!"]),
    number=st.integers(1, 2**62),
    phase=st.sampled_from(["advertise", "share", "upload", "open", "confirm", ""]),
    body=st.binary(max_size=300),
    model=st.binary(max_size=300),
)
def test_well_formed_requests_with_random_contents_get_a_refusal(
    lasting, session, number, phase, body, model
):
    data = Request(session, number, phase, body, model).to_bytes()
    assert isinstance(parse_reply(lasting.answer(data)), Refusal)


# --- records that do not fit ---------------------------------------------------------------------


def test_fewer_records_than_an_expected_batch_is_the_users_mistake(small, bench):
    plan = ("privacy.epsilon=5.0", "privacy.delta=1e-3", "privacy.rate=0.2")
    with pytest.raises(ConfigurationError, match=r"site-1 .*expected_batch = 400") as caught:
        bench(small(*plan, "privacy.expected_batch=400"))
    assert "\n" not in str(caught.value)


def test_one_class_only_at_a_site_is_the_users_mistake(small, bench, tmp_path):
    rows = ["x,y"] + [f"{i},{'yes' if i < 30 else 'no'}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    experiment = small(
        "data.source=table", f"data.path={tmp_path}/rows.csv", "data.label=y", "sites.count=2"
    )
    made = bench(experiment)
    table = made.tables["site-1"]
    made.tables = {**made.tables, "site-1": table.take(table.target == 0)}
    with pytest.raises(ConfigurationError, match=r"site-1 holds records of one class only \(no\)"):
        made.client("site-1")


def test_more_records_than_the_weight_cap_is_the_users_mistake(small, bench):
    with pytest.raises(ConfigurationError, match="weight_cap = 100"):
        bench(small("aggregation.weighting=records", "aggregation.weight_cap=100"))


def test_a_site_without_a_declared_weight_is_the_users_mistake(small, bench):
    with pytest.raises(ConfigurationError, match="no weight for site-3"):
        bench(
            small(
                "aggregation.weighting=declared",
                "aggregation.weights.site-1=1",
                "aggregation.weights.site-2=2",
            )
        )
