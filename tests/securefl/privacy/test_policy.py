"""A site refuses what its policy forbids, by the rule that forbids it, and nothing else."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from securefl import config
from securefl.config import ConfigurationError, Experiment, Site
from securefl.privacy import policy
from securefl.privacy.ledger import Ledger
from securefl.privacy.plan import Observer
from securefl.privacy.policy import PolicyError

TODAY = date(2026, 11, 22)
PARAMETERS = 62

NORTH: Mapping[str, Any] = {
    "version": 1,
    "name": "north",
    "data": {"id": "cardiology", "purpose": "predict relapse"},
    "budget": {"unit": "record", "epsilon": 6.0, "delta": 1e-3},
}
BY_PERSON: Mapping[str, Any] = {
    "data": {**NORTH["data"], "person": "patient"},
    "budget": {**NORTH["budget"], "unit": "person"},
}
SITES = ("east", "north", "south", "west")
PLAN = ("privacy.epsilon=5", "privacy.delta=1e-3", "privacy.rate=0.2", "privacy.expected_batch=16")
SHARED = (*PLAN, "privacy.noise=distributed")
BASE = (f"sites.names={list(SITES)}", "rounds=8")


def a_site(**changes: Any) -> Site:
    """A site with the safe policy; `changes` are tables of site.toml."""
    return config.parse_site(tomli_w.dumps({**NORTH, **changes}))


def proposed(*overrides: str) -> Experiment:
    return config.parse("", [*BASE, *overrides], origin="proposal")


@dataclass(frozen=True)
class Case:
    """A proposal that breaks exactly one rule of a site."""

    rule: str
    told: tuple[str, str]
    experiment: tuple[str, ...]
    site: Mapping[str, Any]
    sites: int = len(SITES)

    @property
    def name(self) -> str:
        return f"{self.rule} {self.experiment[-1] if self.experiment else 'none'}"


def case(rule: str, told: tuple[str, str], *experiment: str, sites: int = 4, **site: Any) -> Case:
    return Case(rule, told, experiment, site, sites)


CASES = (
    case("policy.allow_not_private", ("seed", "nobody can predict"), *PLAN, "not_private_seed=1"),
    case("policy.privacy", ("without [privacy]", "with a plan")),
    case("policy.maximum_epsilon", ("6.5", "at most 6"), *PLAN, "privacy.epsilon=6.5"),
    case(
        "policy.maximum_epsilon",
        ("5", "at most 2"),
        *PLAN,
        policy={"maximum_epsilon": 2.0},
    ),
    case("policy.maximum_delta", ("0.01", "at most 0.001"), *PLAN, "privacy.delta=0.01"),
    case("policy.units", ('"person"', '"record"'), *PLAN, "data.person=who", "privacy.unit=person"),
    case("policy.units", ('"record"', '"person"'), *PLAN, "data.person=patient", **BY_PERSON),
    case(
        "policy.units",
        ('"site"', '"record"'),
        "privacy.unit=site",
        "privacy.epsilon=5",
        "privacy.delta=1e-3",
        policy={"units": ["record"]},
    ),
    case(
        "data.person",
        ("'visit'", "'patient'"),
        *PLAN,
        "privacy.unit=person",
        "data.person=visit",
        **BY_PERSON,
    ),
    case("policy.noise", ('"distributed"', '"local"'), *SHARED, policy={"noise": ["local"]}),
    case("policy.noise", ('"local"', '"distributed"'), *PLAN, policy={"noise": ["distributed"]}),
    case("policy.minimum_noise", ("0.", "at least 3"), *PLAN, policy={"minimum_noise": 3.0}),
    case("policy.minimum_noise", ("0.", "at least 3"), *SHARED, policy={"minimum_noise": 3.0}),
    case("policy.maximum_rounds", ("12 with", "at most 11"), *PLAN, "privacy.spare_rounds=4",
         policy={"maximum_rounds": 11}),
    case("policy.maximum_local_steps", ("101", "at most 100"), *PLAN, "training.local_steps=101",
         "privacy.rate=0.05", "rounds=2"),
    case("policy.protocols", ('"secagg"', '"masked-bfv"'), *PLAN, "protocol.name=secagg",
         policy={"protocols": ["masked-bfv"]}),
    case("policy.protocols", ('"bfv"', '"secagg"'), *PLAN, "protocol.name=bfv",
         "protocol.minimum_cohort=3", policy={"minimum_colluding_sites": 0}),
    case("policy.protocols", ('"plain"', '"secagg"'), *PLAN, "protocol.name=plain",
         "protocol.minimum_cohort=3", policy={"minimum_colluding_sites": 0}),
    case("policy.minimum_cohort", ("3 sites", "at least 4"), *PLAN, policy={"minimum_cohort": 4}),
    case("policy.minimum_colluding_sites", ("with 0", "at least 1"), *PLAN,
         "protocol.colluding_sites=0"),
    case("policy.minimum_colluding_sites", ("with 1", "at least 2"), *PLAN,
         policy={"minimum_colluding_sites": 2}),
    case("policy.minimum_colluding_sites", ("bfv with 0", "at least 1"), *PLAN,
         "protocol.name=bfv", "protocol.minimum_cohort=3", policy={"protocols": ["bfv"]}),
    case("policy.graph", ("of 299", "all of them"), *PLAN, "sites.count=300", sites=300),
    case("policy.reveal", ('"server"', '"sites"'), *PLAN, policy={"reveal": ["sites"]}),
    case("policy.reveal", ('"sites"', '"server"'), *PLAN, "protocol.reveal=sites",
         policy={"reveal": ["server"]}),
    case("policy.minimum_openers", ("1", "at least 2"), *PLAN, policy={"minimum_openers": 2}),
    case("policy.models", ('"mlp"', '"logistic"'), *PLAN, "model.name=mlp",
         policy={"models": ["logistic"]}),
    *(
        case("policy.callables", (f"{key} = 'colorsys:rgb_to_hls'", "no such code"), *PLAN,
             f"{key}=colorsys:rgb_to_hls")
        for key in ("model.name", "model.loss", "training.optimiser", "aggregation.algorithm",
                    "data.source")
    ),
    case("policy.callables", ("SHA-256", "SHA-256 " + "0" * 64), *PLAN,
         "model.name=colorsys:rgb_to_hls", policy={"callables": {"colorsys:rgb_to_hls": "0" * 64}}),
    case("policy.canaries", ("10 canaries", "none"), *PLAN, "audit.canaries=10"),
    case("policy.transcript_until", ("until 2026-12-01", "none"), *PLAN,
         "transcript.consent=['north']", "transcript.keep_until=2026-12-01"),
    case("policy.transcript_until", ("until 2026-12-01", "of 2026-11-30 or before"), *PLAN,
         "transcript.consent=['north', 'south']", "transcript.keep_until=2026-12-01",
         policy={"transcript_until": date(2026, 11, 30)}),
    case("policy.transcript_until", ("until 2026-12-01", "of 2026-11-30 or before"), *PLAN,
         "transcript.own=['north']", "transcript.keep_until=2026-12-01",
         policy={"transcript_until": date(2026, 11, 30), "own_recording": True}),
    case("policy.own_recording", ("draws and contributes", "without it"), *PLAN,
         "transcript.own=['north']", "transcript.keep_until=2026-12-01",
         policy={"transcript_until": date(2027, 1, 1)}),
    case("policy.transcript_until", ("no day that is named", "of 2027-01-01 or before"), *PLAN,
         "transcript.consent=['north']", policy={"transcript_until": date(2027, 1, 1)}),
    case("policy.transcript_until", ("on 2026-11-22", "not over"), *PLAN,
         "transcript.consent=['north']", "transcript.keep_until=2026-11-21",
         policy={"transcript_until": date(2027, 1, 1)}),
    case("policy.record_counts", ('"records"', '"uniform"'), "aggregation.weighting=records",
         "aggregation.weight_cap=500", policy={"privacy": "optional"}),
    case("data.path", ("from a file", "no file"), *PLAN, "data.source=table", "data.label=y",
         "data.path=/etc/passwd"),
)  # fmt: skip
EVERY = pytest.mark.parametrize("broken", CASES, ids=[case.name for case in CASES])


def experiment_of(broken: Case) -> Experiment:
    named = [] if broken.sites != len(SITES) else [BASE[0]]
    return config.parse("", [*named, *BASE[1:], *broken.experiment], origin="proposal")


@EVERY
def test_a_broken_rule_is_refused_by_its_name_with_both_values(broken: Case) -> None:
    site, experiment = a_site(**broken.site), experiment_of(broken)
    with pytest.raises(PolicyError) as caught:
        policy.check(site, experiment, broken.sites, PARAMETERS, TODAY)
    error = caught.value
    assert error.rule == broken.rule
    assert broken.told[0] in error.proposed
    assert broken.told[1] in error.permitted
    for part in ("north", error.rule, error.proposed, error.permitted):
        assert part in str(error)
    assert "\n" not in str(error)
    [only] = policy.broken(site, experiment, broken.sites, PARAMETERS, TODAY)
    assert (only.rule, str(only)) == (error.rule, str(error))


def test_every_rule_of_a_site_has_a_case() -> None:
    """But those of the roster and the person."""
    rules = {f"policy.{key}" for key in config.Policy.model_fields} | {"data.person", "data.path"}
    elsewhere = {"policy.consent", "policy.unknown_sites"}
    assert {broken.rule for broken in CASES} == rules - elsewhere


WITHIN = {
    "policy": {
        "maximum_epsilon": 5.0,
        "maximum_delta": 1e-3,
        "maximum_rounds": 10,
        "maximum_local_steps": 3,
        "minimum_noise": 0.6,
        "minimum_colluding_sites": 1,
        "minimum_cohort": 3,
        "protocols": ["masked-bfv"],
        "models": ["logistic", "linear"],
        "transcript_until": date(2027, 1, 1),
        "own_recording": True,
    }
}
BREAKERS: Mapping[str, st.SearchStrategy[str | tuple[str, ...]]] = {
    "policy.maximum_epsilon": st.sampled_from([5.001, 5.5, 6.0, 40.0, 1e6]).map(
        "privacy.epsilon={}".format
    ),
    "policy.maximum_delta": st.sampled_from([0.0011, 0.005, 0.01]).map("privacy.delta={}".format),
    "policy.maximum_rounds": st.integers(9, 40).map("rounds={}".format),
    "policy.maximum_local_steps": st.integers(4, 9).map("training.local_steps={}".format),
    "policy.protocols": st.just(("protocol.name=secagg", "protocol.openers=1")),
    "policy.models": st.sampled_from(["mlp", "cnn", "small-cnn"]).map("model.name={}".format),
    "policy.callables": st.sampled_from(
        ["model.loss", "training.optimiser", "aggregation.algorithm", "data.source"]
    ).map("{}=os:system".format),
    "policy.minimum_colluding_sites": st.just("protocol.colluding_sites=0"),
    "policy.allow_not_private": st.integers(0, 2**62).map("not_private_seed={}".format),
}


@st.composite
def within(draw: st.DrawFn) -> tuple[str, ...]:
    """A proposal that WITHIN permits; few plans, for each must be calibrated."""
    epsilon, rounds, steps = draw(st.sampled_from([(5, 8, 1), (3, 8, 1), (5, 2, 3)]))
    return (
        *PLAN,
        f"privacy.epsilon={epsilon}",
        f"rounds={rounds}",
        f"training.local_steps={steps}",
        f"model.name={draw(st.sampled_from(['logistic', 'linear']))}",
        f"protocol.openers={draw(st.integers(1, 3))}",
        f"training.learning_rate={draw(st.floats(1e-3, 10))}",
        f"transcript.consent={draw(st.sampled_from([[], ['north'], ['south']]))}",
        f"transcript.own={draw(st.sampled_from([[], ['north'], ['south']]))}",
        f"transcript.keep_until={draw(st.sampled_from(['2026-11-22', '2027-01-01']))}",
    )


@settings(max_examples=25)
@given(within())
def test_what_keeps_every_rule_is_accepted(overrides: tuple[str, ...]) -> None:
    site, experiment = a_site(**WITHIN), proposed(*overrides)
    policy.check(site, experiment, 4, PARAMETERS, TODAY)
    assert policy.broken(site, experiment, 4, PARAMETERS, TODAY) == ()


@settings(max_examples=60)
@given(within(), st.sampled_from(sorted(BREAKERS)), st.data())
def test_one_broken_rule_is_refused_by_exactly_that_rule(
    overrides: tuple[str, ...], rule: str, data: st.DataObject
) -> None:
    drawn = data.draw(BREAKERS[rule])
    experiment = proposed(*overrides, *((drawn,) if isinstance(drawn, str) else drawn))
    with pytest.raises(PolicyError) as caught:
        policy.check(a_site(**WITHIN), experiment, 4, PARAMETERS, TODAY)
    assert caught.value.rule == rule


def test_several_broken_rules_all_show_and_what_cannot_run_still_names_them() -> None:
    site = a_site()
    experiment = proposed(*PLAN, "privacy.epsilon=9", "rounds=2000", "protocol.name=bfv")
    found = [error.rule for error in policy.broken(site, experiment, 4, PARAMETERS, TODAY)]
    assert set(found) >= {"policy.maximum_epsilon", "policy.maximum_rounds", "policy.protocols"}
    unreachable = proposed(*PLAN, "privacy.epsilon=1e-6", "privacy.delta=0.01")
    [one] = policy.broken(site, unreachable, 4, PARAMETERS, TODAY)
    assert one.rule == "policy.maximum_delta"
    with pytest.raises(ConfigurationError, match="too small to train"):
        policy.check(site, proposed(*PLAN, "privacy.epsilon=1e-6"), 4, PARAMETERS, TODAY)
    hopeless = ("privacy.unit=site", "privacy.epsilon=1e-300", "privacy.delta=1e-12")
    with pytest.raises(ConfigurationError, match="privacy: no noise reaches"):
        policy.broken(site, proposed(*hopeless), 4, PARAMETERS, TODAY)


def test_the_day_named_by_transcript_until_is_the_last() -> None:
    site = a_site(policy={"transcript_until": TODAY})
    experiment = proposed(*PLAN, "transcript.consent=['north']", f"transcript.keep_until={TODAY}")
    policy.check(site, experiment, 4, PARAMETERS, TODAY)
    with pytest.raises(PolicyError, match="transcript_until"):
        policy.check(site, experiment, 4, PARAMETERS, date(2026, 11, 23))


def test_defaults_follow_the_budget_and_the_demonstration_keeps_them() -> None:
    site = a_site()
    assert (site.maximum_epsilon, site.maximum_delta, site.units) == (6.0, 1e-3, ("record", "site"))
    demo = Path(config.__file__).with_name("demo.toml")
    policy.check(site, config.load(demo), 5, 530, TODAY)


# --- code ----------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`module("a/b.py")`: an importable file that fails loudly when anyone imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('this was imported')\n")
        return path

    return make


def test_listed_code_is_accepted_by_the_hash_of_its_file_and_never_imported(
    module: Callable[[str], Path],
) -> None:
    module("package_of_ours/__init__.py")
    path = module("package_of_ours/networks.py")
    reference = "package_of_ours.networks:small"
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    assert policy.source_hash(reference) == pinned
    site = a_site(policy={"callables": {reference: pinned}})
    experiment = proposed(*PLAN, f"model.name={reference}")
    policy.check(site, experiment, 4, PARAMETERS, TODAY)
    path.write_text(path.read_text() + "# another version\n")
    with pytest.raises(PolicyError, match=pinned) as caught:
        policy.check(site, experiment, 4, PARAMETERS, TODAY)
    assert caught.value.rule == "policy.callables"
    assert not any(name.startswith("package_of_ours") for name in sys.modules)


def test_another_callable_of_a_listed_module_is_refused(module: Callable[[str], Path]) -> None:
    path = module("listed_module.py")
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    site = a_site(policy={"callables": {"listed_module:small": pinned}})
    with pytest.raises(PolicyError, match="no such code"):
        policy.check(site, proposed(*PLAN, "model.name=listed_module:large"), 4, 62, TODAY)


@pytest.mark.parametrize(
    "reference",
    ["sys:exit", "no_such_module:f", "colorsys.no:f", "os.path.no:f", "xml:dom", "a.:b"],
)
def test_what_has_no_file_of_its_own_has_no_hash_or_is_hashed_as_it_lies(reference: str) -> None:
    found = policy.source_hash(reference)
    if reference == "xml:dom":  # a package: its __init__.py
        import xml

        assert found == hashlib.sha256(Path(str(xml.__file__)).read_bytes()).hexdigest()
    else:
        assert found is None


# --- what a person is asked ----------------------------------------------------------------------


def told(asked: policy.Asked) -> dict[str, str]:
    return {sentence.about: sentence.text for sentence in asked.sentences()}


def test_what_is_asked_says_what_the_plan_says() -> None:
    site, experiment = a_site(), proposed(*SHARED, "privacy.epsilon=2", "privacy.spare_rounds=3")
    asked = policy.asked(site, experiment, 4, PARAMETERS)
    assert asked.plan is not None
    assert asked.rounds == 11
    assert asked.epsilon == {who: asked.plan.spent(11, who) for who in Observer}
    assert max(asked.epsilon.values()) <= 2
    words = told(asked)
    assert "11 rounds (3 of them" in words["experiment"]
    assert "predict relapse" in words["purpose"]
    assert "east, north, south, west" in words["who takes part"]
    assert "62 parameters" in words["model"]
    assert "3 or more sites" in words["protocol"]
    assert "1 other site" in words["protocol"]
    assert "delta 0.001" in words["privacy"]
    assert "relies on the protocol" in words["privacy"]
    assert "None of this site's messages" in words["transcript"]


@pytest.mark.parametrize(
    ("overrides", "about", "telling"),
    [
        ((), "privacy", "NOT PRIVATE"),
        ((), "budget", "Nothing is counted"),
        ((*PLAN, "not_private_seed=1"), "privacy", "NOT PRIVATE"),
        (PLAN, "privacy", "adds all of that noise itself"),
        ((*PLAN, "protocol.name=plain"), "protocol", "hides nothing"),
        ((*PLAN, "protocol.name=plain"), "leaves the site", "in the clear"),
        ((*PLAN, "protocol.name=bfv"), "protocol", "Together with one site it can read"),
        ((*PLAN, "protocol.colluding_sites=0"), "protocol", "as long as no site works together"),
        ((*PLAN, "protocol.reveal=sites"), "protocol", "the server gets neither"),
        ((*PLAN, "transcript.consent=['north']"), "transcript", "kept for later study"),
        ((*PLAN, "transcript.own=['north']"), "transcript", "read this site's every update"),
        ((*PLAN, "audit.canaries=10"), "canaries", "makes 10 records up and trains on"),
        ((*PLAN, "model.loss=colorsys:hls_to_rgb"), "model", "colorsys:hls_to_rgb (model.loss)"),
        ((*PLAN, "privacy.epsilon=8"), "budget", "will stop, for good, before the run ends"),
        (
            ("aggregation.weighting=records", "aggregation.weight_cap=500"),
            "leaves the site",
            "record counts is opened",
        ),
    ],
)
def test_what_is_weaker_is_said(overrides: tuple[str, ...], about: str, telling: str) -> None:
    asked = policy.asked(a_site(), proposed(*overrides), 4, PARAMETERS)
    assert telling in told(asked)[about]
    assert not any("\n" in text for _, text in asked.sentences())


def test_a_ring_and_unknown_keys_are_said() -> None:
    asked = policy.asked(a_site(), config.parse("", [*PLAN, "sites.count=300"]), 300, PARAMETERS)
    assert "only while the server follows the protocol" in told(asked)["protocol"]
    assert "nobody's yet" in told(asked)["who takes part"]
    unknown = a_site(policy={"unknown_sites": True})
    asked = policy.asked(unknown, proposed(*PLAN), 4, PARAMETERS)
    assert "it could play other sites itself" in told(asked)["who takes part"]
    pinned = a_site(consortium={name: name[0].encode().hex() * 32 for name in SITES[::2]})
    assert "(east, south)" in told(policy.asked(pinned, proposed(*PLAN), 4, 62))["who takes part"]


def test_what_is_taken_is_what_the_ledger_would_count(tmp_path: Path) -> None:
    site = a_site(budget={"unit": "record", "epsilon": 20.0, "delta": 1e-3})
    experiment = proposed(*PLAN, "privacy.spare_rounds=2")
    fresh = policy.asked(site, experiment, 4, PARAMETERS)
    assert fresh.budget is not None
    assert fresh.plan is not None
    budget = site.budget
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asked = policy.asked(site, experiment, 4, PARAMETERS, ledger)
        assert asked.budget == fresh.budget  # it does not know the data set yet
        ledger.register(
            "cardiology",
            unit=budget.unit,
            epsilon=budget.epsilon,
            delta=budget.delta,
            purpose="predict relapse",
        )
        for run in ("first", "second"):
            before = policy.asked(site, experiment, 4, PARAMETERS, ledger).budget
            assert before is not None
            assert before.spent == ledger.epsilon("cardiology")
            account = ledger.open(
                "cardiology",
                run,
                experiment="trial",
                promise=bytes(32),
                unit="record",
                per_round=fresh.plan.per_round,
                rounds=10,
                epsilon=5.0,
            )
            for number in range(1, 11):
                account.charge(number)
            assert ledger.epsilon("cardiology") == before.after
        assert before.spent > 0
        again = policy.asked(site, experiment, 4, PARAMETERS, ledger)
        assert again.digest() == fresh.digest()  # what is asked is the same, whatever is left


def test_a_run_that_must_have_the_data_set_alone_says_so() -> None:
    site = a_site(budget={"unit": "record", "epsilon": 5.0, "delta": 1e-3})
    asked = policy.asked(site, proposed(*PLAN), 4, PARAMETERS)
    assert asked.budget is not None
    assert asked.budget.alone
    assert "only if no other run ever uses this data set" in told(asked)["budget"]


DIFFERENT: Mapping[str, Callable[[policy.Asked], policy.Asked]] = {
    "experiment": lambda a: replace(
        a, experiment=a.experiment.model_copy(update={"rounds": a.experiment.rounds + 1})
    ),
    "transcript": lambda a: replace(
        a,
        experiment=a.experiment.model_copy(
            update={"transcript": config.Transcript(consent=("north",))}
        ),
    ),
    "own recording": lambda a: replace(
        a,
        experiment=a.experiment.model_copy(
            update={"transcript": config.Transcript(own=("north",))}
        ),
    ),
    "canaries": lambda a: replace(
        a, experiment=a.experiment.model_copy(update={"audit": config.Audit(canaries=2)})
    ),
    "sites": lambda a: replace(a, sites=5),
    "parameters": lambda a: replace(a, parameters=63),
    "plan": lambda a: replace(a, plan=None),
    "purpose": lambda a: replace(
        a, site=a_site(data={"id": "cardiology", "purpose": "sell advertisements"})
    ),
    "data set": lambda a: replace(a, site=a_site(data={"id": "x", "purpose": "predict relapse"})),
    "name": lambda a: replace(a, site=a_site(name="south")),
    "code": lambda a: replace(a, site=a_site(policy={"callables": {"colorsys:x": "0" * 64}})),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_consent_refers_to_exactly_what_was_shown(what: str) -> None:
    asked = policy.asked(a_site(), proposed(*PLAN, "model.loss=colorsys:x"), 4, PARAMETERS)
    assert len(asked.digest()) == 32
    assert DIFFERENT[what](asked).digest() != asked.digest()
    assert policy.asked(asked.site, asked.experiment, 4, PARAMETERS).digest() == asked.digest()
