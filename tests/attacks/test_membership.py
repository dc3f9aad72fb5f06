"""Membership attacks: shadow models, scores, and what they find where something is, and is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import stats

from attacks import lira, loss, membership, rmia, shadows, sums
from attacks.attack import Attack, Profile, guess
from attacks.case import Case
from attacks.membership import Candidates, Members, Promise, Scores
from attacks.view import Array, Given, Public, Records, ReleasedModelView
from securefl import config, models, runs
from securefl.config import ConfigurationError

ATTACKS = (loss.ATTACK, lira.ATTACK, lira.OFFLINE, rmia.ATTACK, sums.ATTACK)


def quiet(_: float) -> None:
    """No progress."""


def names(one: Attack[Any, Any]) -> str:
    return one.name


def records(count: int, seed: int = 0) -> Records:
    """Three features, two classes."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 3)).astype(np.float32)
    return Records(Array.of(features), Array.of((features[:, 0] > 0).astype(np.int64)))


def public(*overrides: str) -> Public:
    """Three sites with a small network."""
    text = """
    version = 1
    rounds = 5
    [sites]
    count = 3
    [model]
    name = "mlp"
    hidden = [4]
    [training]
    local_steps = 3
    batch_size = 64
    learning_rate = 0.3
    [protocol]
    clip = 4.0
    """
    experiment = config.parse(text, overrides)
    return Public(experiment.dump(), ("a", "b", "c"), (3,), 2, "classification")


# --- shadow models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.momentum=0.9", "training.weight_decay=0.1"),
        ("training.optimiser=adam", "training.learning_rate=0.01"),
        ("pruning.sparsity=0.5", "aggregation.algorithm=fedadam", "aggregation.learning_rate=0.1"),
        ("aggregation.weighting=records", "aggregation.weight_cap=100"),
        ("protocol.clip=0.03", "aggregation.average_from=2"),
    ],
    ids=" ".join,
)
def test_models_trained_at_once_are_those_that_sites_train(overrides):
    # Whole batches of records that are all alike: nothing is left to chance but the rounding.
    told, member = public(*overrides), np.ones((2, 60), np.bool_)
    pool = membership.taken(records(60), np.zeros(60, np.int64))
    together = shadows.train(told, pool, member, np.random.default_rng(1))
    alone = shadows.train_alone(told, pool, member[0], np.random.default_rng(2))
    moved = np.abs(alone - models.flatten(told.module())).max()
    assert moved > 0.05
    np.testing.assert_allclose(together, np.stack([alone, alone]), atol=1e-4 * moved)


RECORD = (
    "privacy.epsilon=5.0",
    "privacy.delta=1e-3",
    "privacy.rate=0.5",
    "privacy.clip=0.5",
    "privacy.expected_batch=20",
    "training.local_steps=1",
    "rounds=2",
)
SITE = (*RECORD[:2], "rounds=2", "privacy.unit=site", "privacy.clip=0.2")


@pytest.mark.parametrize(
    "overrides",
    [
        (*RECORD, "privacy.clip_quantile=0.3", "pruning.sparsity=0.5"),
        (*RECORD, "privacy.clip_quantile=0.3", "privacy.noise=distributed"),
        (*SITE, "privacy.clip_quantile=0.3"),
    ],
    ids=["local", "distributed", "site"],
)
def test_models_trained_at_once_have_the_noise_of_those_that_sites_train(overrides):
    told, pool, rng = public(*overrides), records(60), np.random.default_rng(3)
    many, few = 300, 12
    together = shadows.train(told, pool, np.ones((many, 60), np.bool_), rng)
    alone = np.stack(
        [shadows.train_alone(told, pool, np.ones(60, np.bool_), rng) for _ in range(few)]
    )
    spread = together.std(0) + 1e-9
    apart = (together.mean(0) - alone.mean(0)) / spread / math.sqrt(1 / many + 1 / few)
    assert np.abs(apart).max() < 4.5
    ratio = np.sqrt((alone.var(0) / spread**2)[spread > 1e-6].mean())
    assert 0.85 < ratio < 1.18


def test_every_candidate_is_in_half_of_the_shadow_models():
    made = shadows.with_and_without(
        public(), records(11), records(7, seed=1), 6, np.random.default_rng(0)
    )
    assert made.member.shape == (6, 11)
    assert (made.member.sum(0) == 3).all()
    assert made.weights.shape == (6, 26)


def test_more_shadow_models_are_afforded_of_smaller_runs():
    small, large = public(), public("rounds=5000")
    assert shadows.affordable(small, 60, 1e12, 32) == 32
    assert 4 <= shadows.affordable(large, 60, 1e12, 32) < 32
    assert shadows.affordable(large, 60, 1.0, 32) == 4


# --- what a model says, and what is made of it ------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.01, 1e4), seed=st.integers(0, 2**32 - 1))
def test_confidences_are_log_odds_and_lose_nothing_where_a_model_is_sure(scale, seed):
    told, pool = public("model.name=logistic"), records(5)
    weights = np.random.default_rng(seed).normal(0, scale, (2, 8)).astype(np.float32)
    found = shadows.confidences(told, weights, pool)
    assert np.isfinite(found).all()
    target = pool.target.numpy()
    for sure, one in zip(found, weights, strict=True):
        outputs = pool.features.numpy() @ one[:6].reshape(2, 3).T + one[6:]
        # With two classes the log odds are a difference of outputs.
        odds = (outputs[:, 1] - outputs[:, 0]) * np.where(target == 1, 1, -1)
        np.testing.assert_allclose(sure, odds, rtol=1e-4, atol=1e-4 * scale)


def test_the_likelihood_ratio_is_that_of_two_normals_for_each_candidate():
    told = np.array([[0.0, 1.0], [2.0, 5.0], [6.0, 2.0], [10.0, 4.0]])
    member = np.array([[True, False], [True, True], [False, True], [False, False]])
    found = lira.likelihood_ratio(np.array([1.0, 3.0]), told, member, enough=4)
    expected = stats.norm.logpdf(1.0, 1, 1) - stats.norm.logpdf(1.0, 8, 2)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    shared = lira.likelihood_ratio(np.array([1.0, 3.0]), told, member, enough=5)
    within, without = math.sqrt((1 + 2.25) / 2), math.sqrt((4 + 2.25) / 2)
    expected = stats.norm.logpdf(1.0, 1, within) - stats.norm.logpdf(1.0, 8, without)
    assert shared[0] == pytest.approx(expected, rel=1e-4)


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=9),
    st.lists(st.floats(-5, 5), min_size=1, max_size=9),
)
def test_rmia_ranks_by_how_many_others_a_candidate_dominates(own, others):
    found = rmia.dominated(np.array(own), np.array(others))
    share = [np.mean([x - z >= math.log(rmia.GAMMA) for z in others]) for x in own]
    for x, p in zip(found, share, strict=True):
        assert p <= x < p + 1 / len(others)


# --- the score ------------------------------------------------------------------------------------


def drawn(each: int, promised: Promise | None = None, seed: int = 0) -> Candidates:
    return Candidates.drawn(records(each + 5), records(each, seed=1), each, seed, promised)


def test_candidates_are_as_many_members_as_others_and_the_rest_is_kept_apart():
    found = drawn(30)
    trained = {bytes(row) for row in records(35).features.numpy()}
    asked = [bytes(row) in trained for row in found.asked.features.numpy()]
    assert asked == found.truth.member.tolist()
    assert sum(asked) == 30
    assert found.rest is not None
    rest = {bytes(row) for row in found.rest.features.numpy()}
    assert len(rest) == 5
    assert rest < trained
    assert not rest & {bytes(row) for row in found.asked.features.numpy()}
    classes = found.asked.target.numpy()[found.truth.pairs]
    assert (classes[:, 0] == classes[:, 1]).all()
    assert len(set(found.truth.pairs.ravel())) == found.truth.pairs.size > 40
    assert 5 < found.truth.member[:30].sum() < 25  # shuffled
    with pytest.raises(ValueError, match="one member and one non-member"):
        Members(found.truth.member, found.truth.pairs[:, ::-1], 0)


def test_a_perfect_guess_succeeds_and_a_random_one_does_not():
    truth = drawn(150).truth
    told = membership.score(Scores(Array.of(truth.member.astype(float))), truth, 1)
    assert told.succeeded
    assert told.results[0].value == 1
    rng = np.random.default_rng(0)
    random = [
        membership.score(Scores(Array.of(rng.random(300))), truth, 1).succeeded for _ in range(100)
    ]
    assert sum(random) <= 4  # 1 in 100; five or more of them by chance once in 270 times


def test_a_rate_that_too_few_non_members_support_is_left_out_and_said():
    for each, measured in ((100, []), (320, ["TPR at 1 % FPR"])):
        truth = drawn(each).truth
        scores = np.random.default_rng(0).random(2 * each)
        told = membership.score(Scores(Array.of(scores)), truth, 1)
        assert [result.metric for result in told.results[1:]] == measured
        assert any("2995 are needed" in note for note in told.notes)
        assert any("299 are needed" in note for note in told.notes) == (not measured)


def test_a_curve_has_at_most_400_points():
    truth = drawn(2000).truth
    scores = np.random.default_rng(0).random(4000) + truth.member
    [curve] = membership.score(Scores(Array.of(scores)), truth, 1).curves
    assert len(curve.x) == len(curve.y) <= 400
    assert (curve.x[0], curve.x[-1], curve.y[-1]) == (0, 1, 1)
    assert list(curve.x) == sorted(curve.x)


def test_few_members_who_stand_out_are_found_though_the_auc_is_hardly_above_one_half():
    truth = drawn(1000).truth
    rng = np.random.default_rng(0)
    scores = rng.random(2000)
    scores[np.flatnonzero(truth.member)[:60]] += 1
    told = membership.score(Scores(Array.of(scores)), truth, 1)
    assert told.results[0].value < 0.56
    assert told.succeeded


@pytest.mark.parametrize("seen", [0.0, 1.0])
def test_a_broken_promise_has_a_small_p_and_one_that_is_kept_has_not(seen):
    # Whoever is exchanged shows with odds of e^(2 epsilon): as much as the promise allows. `seen`
    # is by how much more.
    promised, each, alarms = Promise(0.3, 1e-6), 200, 0
    rng = np.random.default_rng(5)
    for seed in range(60):
        truth = drawn(each, promised, seed).truth
        odds = math.exp(2 * promised.epsilon + seen)
        right = rng.random(len(truth.pairs)) < odds / (1 + odds)
        scores = np.zeros(2 * each)
        scores[truth.pairs[:, 0]] = right
        scores[truth.pairs[:, 1]] = ~right
        p = membership.score(Scores(Array.of(scores)), truth, seed).p
        assert p is not None
        alarms += p < 0.05
    if seen:
        assert alarms > 40
    else:
        assert alarms <= stats.binom.isf(0.001, 60, 0.05)


def test_no_promise_no_p_and_no_claim():
    assert membership.score(Scores(Array.of(np.arange(20.0))), drawn(10).truth, 0).p is None
    assert not membership.claim(config.parse("version = 1")).made
    claim = membership.claim(public(*RECORD).parsed())
    assert claim.made
    assert "an epsilon of at most 5 at delta 0.001" in claim.sentence


# --- worlds with a known answer ---------------------------------------------------------------


def scored(attack: Attack[Any, Any], world: Callable[[int, Profile], Any], seed: int) -> Any:
    trial = world(seed, Profile.quick)
    attack.check(trial.view, trial.given)
    given = msgspec.structs.replace(trial.given, shadows=8)
    guessed = attack.adversary(trial.view, given, seed, quiet)
    return attack.score(guessed, trial.truth, seed)


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_an_attack_succeeds_where_it_must_and_not_where_there_is_nothing(attack):
    found = scored(attack, attack.undefended, 0)
    assert found.succeeded
    assert found.results[0].value > 0.6
    nothing = scored(attack, attack.no_signal, 0)
    assert not nothing.succeeded
    interval = nothing.results[0].interval
    assert interval.low < 0.5 < interval.high


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_an_attack_refuses_a_view_that_is_not_its_own(attack):
    told, asked = public(), records(4)
    other = ReleasedModelView(told, Array.of(np.zeros(26, np.float32)))
    if attack is sums.ATTACK:
        with pytest.raises(ConfigurationError, match="sums works on a ServerView"):
            attack.check(other, Given(asked))
    else:
        attack.check(other, Given(asked, asked))
        with pytest.raises(ConfigurationError, match="must be given candidates"):
            attack.check(other, Given(auxiliary=asked))
    if "auxiliary" in attack.given:
        with pytest.raises(ConfigurationError, match="must be given auxiliary"):
            attack.check(other, Given(asked))


def test_an_adversary_in_a_process_of_its_own_guesses_the_same():
    trial = loss.undefended(3, Profile.quick)
    [apart] = guess(loss.ATTACK, [trial], seed=0)
    here = loss.adversary(trial.view, trial.given, 0, quiet)
    np.testing.assert_allclose(apart.of.numpy(), here.of.numpy(), atol=1e-5)


# --- LiRA beside the loss attack --------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "least"), [(16, 10), pytest.param(64, 10, marks=pytest.mark.slow)]
)
def test_lira_finds_ten_times_as_many_members_as_the_loss_at_a_thousandth(
    benchmark, targets, least
):
    records = 600 if targets > 16 else 400
    found = benchmark("membership").attacked(targets, records=records, rounds=20, seed=1)
    rates = {name: one.roc().tpr_at(0.001) for name, one in found.items()}
    assert rates["lira"].rate > least * max(rates["loss"].rate, 0.001)
    for one in found.values():
        assert one.shuffled(np.random.default_rng(0)).auc == pytest.approx(0.5, abs=0.03)


# --- a run as it is recorded ------------------------------------------------------------------

RUN = """
version = 1
name = "attacked"
rounds = 8
[data]
source = "breast-cancer"
test_fraction = 0.3
default_range = [0, 100]
[sites]
count = 3
[model]
name = "logistic"
[training]
learning_rate = 0.5
[privacy]
noise = "distributed"
epsilon = 0.5
delta = 1e-3
rate = 0.5
expected_batch = 200
[protocol]
name = "masked-bfv"
[pruning]
sparsity = 0.5
[transcript]
consent = ["site-1", "site-2", "site-3"]
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("attacked") / "run"
    return Case.open(runs.run(config.parse(RUN), folder, report=False).directory)


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_a_run_with_little_epsilon_is_not_broken(case, attack):
    trial = attack.trial(case)
    attack.check(trial.view, trial.given)
    guessed = attack.adversary(trial.view, trial.given, 0, quiet)
    told = attack.score(guessed, trial.truth, 0)
    assert not told.succeeded
    assert told.p is not None
    assert told.p > 0.01
    assert trial.truth.member.sum() * 2 == len(trial.truth.member) == len(trial.given.candidates)


def test_the_view_of_whoever_gets_the_model_is_the_model(case):
    view = lira.trial(case).view
    saved = load_file(case.folder / "model.safetensors")
    assert sorted(view.weights.numpy()) == sorted(
        np.concatenate([x.ravel() for x in saved.values()])
    )
    assert view.__struct_fields__ == ("public", "weights")
    sent = msgspec.msgpack.encode(view)
    for row in case.tables("site-1")[0].features[:50]:
        assert row.tobytes() not in sent
    assert str(case.folder).encode() not in sent


def test_what_the_server_saw_gives_the_sum_of_every_round(case):
    seen = list(sums.trial(case).view.rounds())
    assert [item.state.update for item in seen] == list(range(8))
    for item in seen:
        gradients = sums.clipped_gradients(case.public, item, records_of(case))
        assert gradients.shape[1] == item.state.surviving
        assert np.linalg.norm(gradients, axis=1).max() <= 1 + 1e-6


def records_of(case: Case) -> Records:
    return membership.taken(Records.of(case.tables("site-1")[0]), np.arange(20))


TABLES = """
version = 1
name = "tables"
rounds = 2
[data]
source = "table"
path = "withheld-place/*.csv"
test_fraction = 0.4
[data.schema]
version = 1
name = "tables"
label = "ill"
[data.schema.columns.age]
type = "number"
range = [0, 100]
[data.schema.columns.smoker]
type = "category"
categories = ["no", "yes"]
[data.schema.columns.ill]
type = "category"
categories = ["no", "yes"]
[sites]
partition = "file"
[preprocessing]
scale = "range"
impute = "middle"
minimum_count = 0
[protocol]
name = "plain"
[transcript]
consent = ["a", "b", "c"]
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run on three files, whose features preprocessing makes."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "withheld-place").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        rows = [
            f"{rng.integers(20, 90)},{rng.choice(['no', 'yes'])},{rng.choice(['no', 'yes'])}"
            for _ in range(60)
        ]
        (folder / "withheld-place" / f"{name}.csv").write_text("\n".join(["age,smoker,ill", *rows]))
    place = f"data.path={folder / 'withheld-place' / '*.csv'}"
    experiment = config.parse(TABLES, [place])
    return Case.open(runs.run(experiment, folder / "run", report=False).directory)


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_a_run_on_tables_is_attacked_on_what_its_model_reads(tables, attack):
    trial = attack.trial(tables)
    assert b"withheld-place" not in msgspec.msgpack.encode(trial.view)
    guessed = attack.adversary(trial.view, trial.given, 0, quiet)
    told = attack.score(guessed, trial.truth, 0)
    assert told.p is None
    assert not told.succeeded


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((), None),
        (("privacy.unit=site", "privacy.noise=distributed"), None),
        (("sites.partition=column", "sites.column=place"), "at each site apart"),
        (("data.test_column=part",), "not drawn at random"),
        (("privacy.unit=person", "data.person=patient"), "a person's"),
    ],
)
def test_a_promise_is_tested_only_where_records_were_held_out_at_random(overrides, why):
    site = "privacy.unit=site" in overrides
    privacy = RECORD[:2] if site else RECORD
    sites = "partition" in str(overrides)
    text = "version = 1\n[data]\nsource = 'table'\npath = 'x.csv'\nlabel = 'y'\n"
    text += "" if sites else "[sites]\ncount = 3\n"
    experiment = config.parse(text, [*privacy, *overrides])
    promised, notes = membership._promised(experiment)
    assert (promised is None) == bool(why)
    assert (why or "") in " ".join(notes)
    assert bool(notes) == bool(why)


@pytest.mark.parametrize("marked", [False, True])
def test_a_promise_to_rows_of_tables_is_tested_unless_their_files_say_which_are_for_tests(marked):
    mark = "[data.schema.columns.part]\ntype = 'text'\n[sites]"
    text = TABLES.replace('label = "ill"', 'label = "ill"\ntest = "part"') if marked else TABLES
    experiment = config.parse(text.replace("[sites]", mark) if marked else text, RECORD)
    promised, notes = membership._promised(experiment)
    assert (promised is None) == marked == bool(notes)
