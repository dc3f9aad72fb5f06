"""Epsilon from below: what the adversary reads is what sites gave, guesses prove no more than they
can, and a planted bug shows where an honest run does not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attacks import epsilon, evidence
from attacks.attack import Profile, Trial, UnavailableError
from attacks.attack import guess as in_a_process
from attacks.case import Case
from attacks.epsilon import ATTACK, Coins, Guessed, curve_p_value
from attacks.view import AnyView, Given, OpenedView, ReleasedModelView, ServerView
from protocols.noise import DiscreteGaussian
from securefl import config
from securefl.privacy import integers, training
from securefl.runs import run

RUN = """
rounds = 3
[data]
source = "breast-cancer"
default_range = [0.0, 100.0]
[sites]
count = 3
[model]
name = "mlp"
hidden = [8]
[training]
learning_rate = 0.5
[protocol]
name = "secagg"
bits = 24
clip = 64.0
"""
EVERYONE = "['site-1', 'site-2', 'site-3']"
OPEN = f"transcript.own={EVERYONE}"
SUMS = f"transcript.consent={EVERYONE}"
PLAN = ("privacy.epsilon=1", "privacy.delta=1e-5", "privacy.rate=1.0", "privacy.expected_batch=120")
SHARED = ("privacy.noise=distributed", "privacy.expected_batch=400")


def case(folder: Path, *overrides: str) -> Case:
    experiment = config.parse(RUN, overrides, origin="run")
    return Case.open(run(experiment, folder / "run", report=False).directory)


def silence(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Plant a bug: noise is `factor` times less than planned, everywhere."""
    hardened = integers.hardened
    monkeypatch.setattr(
        integers,
        "hardened",
        lambda total, deviation, key: hardened(total, max(deviation / factor, 16), key),
    )
    monkeypatch.setattr(
        training, "DiscreteGaussian", lambda deviation: DiscreteGaussian(max(deviation / factor, 1))
    )


def guessed(trial: Trial[Coins]) -> Guessed:
    return epsilon.adversary(trial.view, trial.given, 0, lambda _: None)


# --- what the adversary reads


@pytest.mark.parametrize(
    "overrides",
    [
        (OPEN,),
        (SUMS,),
        (SUMS, "training.weight_decay=0.1"),
        (SUMS, "aggregation.weighting=declared",
         "aggregation.weights={site-1 = 1, site-2 = 2, site-3 = 5}"),
        (OPEN, *PLAN),
        (SUMS, *PLAN),
        (OPEN, *PLAN, "privacy.clip_quantile=0.5", "pruning.sparsity=0.5", "privacy.clip=0.1"),
        (SUMS, *PLAN, *SHARED),
        (SUMS, *PLAN, *SHARED, "privacy.clip_quantile=0.5", "pruning.sparsity=0.5",
         "privacy.clip=0.1"),
    ],
    ids=lambda overrides: " ".join(overrides)[:120],
)  # fmt: skip
def test_without_noise_what_is_read_is_the_sum_of_the_gradients(tmp_path, monkeypatch, overrides):
    silence(monkeypatch, 1e9)
    more = ("audit.canaries=10", "training.batch_size=100000")
    sums_agree(ATTACK.trial(case(tmp_path, *more, *overrides)))


def sums_agree(trial: Trial[Coins]) -> None:
    """Every vector that the adversary reads is the sum of what it takes gradients to be."""
    view, known = trial.view, trial.given.known
    assert known is not None
    if isinstance(view, OpenedView):
        groups = list(epsilon._opened(view, trial.given).values())
    else:
        groups = [epsilon._summed(view, trial.given)]
    gradients, rounds = epsilon._Gradients(view.public), 0
    for seen in (item for group in groups for item in group):
        total = np.zeros(len(seen.vector))
        for site, share in seen.share.items():
            coins = trial.truth.tossed[site]
            inserted = gradients.of(epsilon._candidates(view.public, site), seen)[coins]
            real = gradients.of(known[site], seen)
            exact = inserted.sum(axis=0) + real.sum(axis=0)
            if not math.isfinite(seen.clip):  # a mean, whose number the adversary only estimates
                exact *= (len(real) + len(coins) / 2) / (len(real) + len(inserted))
            total += share * exact
        error = np.linalg.norm(seen.vector - total)
        assert error < 0.02 * np.linalg.norm(total), (seen.state.update, error)
        rounds += 1
    assert rounds == 3 * len(groups)


@pytest.mark.parametrize("more", [(OPEN,), (SUMS, *SHARED)], ids=["local", "shared"])
def test_a_persons_rows_make_one_gradient(tmp_path, monkeypatch, more):
    silence(monkeypatch, 1e9)
    rng = np.random.default_rng(0)
    whose = rng.integers(200, size=600)
    rows = [
        f"{x:.4f},{y:.4f},{int(x + y > 0)},p{who}"
        for (x, y), who in zip(rng.normal(size=(600, 2)), whose, strict=True)
    ]
    path = tmp_path / "people.csv"
    path.write_text("\n".join(["x,y,ill,who", *rows]) + "\n")
    data = (
        "data.source=table", f"data.path={path}", "data.label=ill", "data.person=who",
        "data.default_range=[-5, 5]", "privacy.unit=person", "audit.canaries=10",
    )  # fmt: skip
    trial = ATTACK.trial(case(tmp_path, *PLAN, *more, *data, "privacy.expected_batch=60"))
    assert trial.given.known is not None
    assert all(held.protected < len(held) for held in trial.given.known.values())
    sums_agree(trial)


def test_records_of_one_site_stand_in_for_those_of_others(tmp_path, monkeypatch):
    silence(monkeypatch, 1e9)
    overrides = (SUMS, *PLAN, *SHARED, "audit.canaries=20", "rounds=6", "model.hidden=[32]")
    trial = ATTACK.trial(case(tmp_path, *overrides))
    assert trial.given.known is not None
    alone = Given(known={"site-1": trial.given.known["site-1"]})
    for more, least in ((trial.given, 0.95), (alone, 0.75)):
        scores = guessed(replace(trial, given=more)).scores
        right = [
            np.mean((np.array(scores[site]) > 0) == coins)
            for site, coins in trial.truth.tossed.items()
        ]
        assert np.mean(right) >= least
    nothing = guessed(replace(trial, given=Given())).scores
    assert all(np.isfinite(told).all() for told in nothing.values())


def test_an_adversary_gets_bytes_and_no_coins(tmp_path):
    trial = ATTACK.trial(case(tmp_path, "audit.canaries=20", "rounds=1", SUMS))
    assert trial.given.candidates is None
    told = msgspec.msgpack.encode((trial.view, trial.given))
    view, known = msgspec.msgpack.decode(told, type=tuple[AnyView, Given])
    alone = epsilon.adversary(view, known, 0, lambda _: None)
    [apart] = in_a_process(ATTACK, [trial], 0)
    # The process draws by another seed, and matrices are multiplied in another order.
    for other in (guessed(trial), apart):
        assert other.scores.keys() == alone.scores.keys()
        for site, scores in alone.scores.items():
            assert np.allclose(other.scores[site], scores, atol=1e-6)
    for coins in trial.truth.tossed.values():
        text = "".join("01"[int(coin)] for coin in coins)
        assert text.encode() not in told


# --- who sees what


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ((OPEN, SUMS, *PLAN), OpenedView),
        (("transcript.own=['site-2']", *PLAN), OpenedView),
        ((SUMS, *PLAN), ServerView),
        ((OPEN, SUMS, *PLAN, *SHARED), ServerView),
        ((OPEN, *PLAN, *SHARED), ReleasedModelView),
        (("transcript.consent=['site-1']", *PLAN), ReleasedModelView),
    ],
)
def test_the_strongest_view_that_the_promise_holds_against_is_taken(tmp_path, overrides, kind):
    tried = case(tmp_path, "audit.canaries=6", "rounds=1", *overrides)
    trial = ATTACK.trial(tried)
    assert isinstance(trial.view, kind)
    promised, summary = trial.truth.promised, tried.summary
    if kind is ReleasedModelView and summary.epsilon_public is not None:
        assert promised.epsilon == summary.epsilon_public
    else:
        assert promised.epsilon == max(summary.epsilon.values())
    assert promised.delta == 1e-5
    epsilons = [pair[0] for pair in sorted(promised.pairs, key=lambda pair: pair[1])]
    assert epsilons == sorted(epsilons, reverse=True)
    if isinstance(trial.view, OpenedView):
        assert set(trial.truth.tossed) == set(trial.view.contributed)
    scores = guessed(trial).scores
    assert {len(scores[site]) for site in trial.truth.tossed} == {6}


def test_without_canaries_or_coins_there_is_nothing_to_try(tmp_path):
    with pytest.raises(UnavailableError, match="no canaries were trained on"):
        ATTACK.trial(case(tmp_path / "none", "rounds=1", SUMS))
    held = case(tmp_path / "lost", "rounds=1", SUMS, "audit.canaries=4")
    for path in held.folder.glob("sites/*/own/canaries.json"):
        path.unlink()
    with pytest.raises(UnavailableError, match="coins are at hand"):
        ATTACK.trial(held)


def test_what_a_run_does_not_claim_is_not_tested(tmp_path):
    trial = ATTACK.trial(case(tmp_path, "rounds=1", SUMS, "audit.canaries=20"))
    assert trial.truth.promised.epsilon == math.inf
    score = ATTACK.score(guessed(trial), trial.truth, 0)
    assert score.p is None
    assert not any("claimed" in result.metric for result in score.results)
    a_site = ("privacy.unit=site", "privacy.epsilon=1", "privacy.delta=1e-5")
    for unclaimed in ((), (*PLAN, "not_private_seed=1"), a_site):
        assert not ATTACK.claim(config.parse(RUN, unclaimed)).made
    assert ATTACK.claim(config.parse(RUN, PLAN)).made


# --- what guesses prove


@given(
    st.integers(1, 200), st.data(), st.floats(0, 6), st.sampled_from([0.0, 1e-6, 1e-3, 0.05])
)  # fmt: skip
@settings(max_examples=150)
def test_the_bound_holds_for_randomised_response(m, data, eps, delta):
    """With probability delta every coin is told, else each guess is right with probability
    e^eps / (1 + e^eps): (eps, delta)-differentially private, and as leaky as that may be."""
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(0, r))
    honest = stats.binom.sf(v - 1, r, 1 / (1 + math.exp(-eps)))
    exact = delta + (1 - delta) * honest
    assert curve_p_value(m, r, v, ((eps, delta),)) >= exact * (1 - 1e-5)


@given(st.integers(2, 60), st.data(), st.floats(0.1, 3))
@settings(max_examples=60)
def test_many_pairs_of_a_gaussian_curve_prove_what_the_curve_does(m, data, mu):
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(1, r))
    deltas = np.append(np.geomspace(1e-12, 0.1, 200), np.linspace(0.1, 0.99, 200))
    pairs = tuple((evidence.gaussian_epsilon(mu, delta), delta) for delta in deltas.tolist())
    exact = evidence.gaussian_p_value(m, r, v, mu)
    found = curve_p_value(m, r, v, pairs)
    assert found >= exact * 0.999 - 1e-9
    assert found <= exact * 1.05 + 1e-6


@given(st.integers(1, 100), st.data(), st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.2)),
                                              min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=60)
def test_more_right_guesses_and_more_claims_prove_more(m, data, pairs):
    r = data.draw(st.integers(1, m))
    found = [curve_p_value(m, r, v, tuple(pairs)) for v in range(0, r + 1, max(1, r // 5))]
    assert all(a >= b * (1 - 1e-5) for a, b in itertools.pairwise(found))
    one = curve_p_value(m, r, r, tuple(pairs[:1]))
    assert curve_p_value(m, r, r, tuple(pairs)) <= one * (1 + 1e-5)


def test_guesses_by_chance_reject_seldom():
    """500 null audits of a claim of epsilon 0.2: how many have p <= 0.05, by a binomial tail."""
    rng, rejected, bounded = np.random.default_rng(0), 0, 0
    promised = epsilon.Promised(0.2, 1e-5)
    for number in range(500):
        coins = rng.random(24) < 0.5
        scores = {"a": rng.normal(size=12).tolist(), "b": rng.normal(size=12).tolist()}
        truth = Coins({"a": coins[:12], "b": coins[12:]}, promised, True, "nobody")
        score = epsilon.score(Guessed(scores), truth, number)
        rejected += score.p is not None and score.p <= 0.05
        bounded += score.results[0].value > 0.2
    for count in (rejected, bounded):
        assert stats.binom.sf(count - 1, 500, 0.05) > 1e-4


def test_a_site_that_leaks_alone_shows_among_others():
    rng = np.random.default_rng(1)
    coins = {site: rng.random(64) < 0.5 for site in ("a", "b", "c")}
    scores = {site: rng.normal(size=64).tolist() for site in coins}
    scores["b"] = np.where(coins["b"], 0.4, -0.4).tolist()
    truth = Coins(coins, epsilon.Promised(1.0, 1e-5), True, "nobody")
    alone = epsilon.score(Guessed(scores), truth, 0)
    assert alone.p is not None
    assert alone.p < 1e-3
    assert alone.succeeded
    together = epsilon.score(Guessed(scores), replace(truth, apart=False), 0)
    assert together.p is not None
    assert together.p > alone.p


def test_a_score_says_what_it_could_have_shown_and_names_the_estimate_so():
    rng = np.random.default_rng(2)
    coins = {"a": rng.random(100) < 0.5}
    scores = Guessed({"a": (coins["a"] + rng.normal(size=100)).tolist()})
    score = epsilon.score(scores, Coins(coins, epsilon.Promised(3.0, 1e-5), False, "nobody"), 0)
    assert "with every coin guessed right the lower bound would be 3." in score.limit
    assert "p of the claim" in score.limit
    names = [result.metric for result in score.results]
    assert names[:2] == ["epsilon, lower bound at 95 %", "epsilon, as claimed"]
    assert any("an estimate and no bound" in name for name in names)
    assert score.results[0].baseline == 0
    assert msgspec.json.decode(msgspec.json.encode(score.results))  # no infinity


# --- worlds with a known answer


@pytest.mark.parametrize("seed", [1, 2])
def test_it_succeeds_where_nothing_is_defended_and_not_where_there_is_nothing(seed):
    worlds = [ATTACK.undefended(seed, Profile.quick), ATTACK.no_signal(seed, Profile.quick)]
    found, nothing = (
        ATTACK.score(guess, world.truth, seed)
        for guess, world in zip(map(guessed, worlds), worlds, strict=True)
    )
    assert found.succeeded
    assert found.results[0].value > 1
    assert not nothing.succeeded
    assert nothing.results[0].value < 0.5
    again = ATTACK.undefended(seed, Profile.quick)
    assert {s: coins.tolist() for s, coins in again.truth.tossed.items()} == {
        s: coins.tolist() for s, coins in worlds[0].truth.tossed.items()
    }


@pytest.mark.parametrize(("view", "noise"), [(OPEN, ()), (SUMS, SHARED)], ids=["local", "shared"])
def test_noise_that_is_far_too_little_shows_and_honest_noise_does_not(
    tmp_path, monkeypatch, view, noise
):
    overrides = (view, *PLAN, *noise, "rounds=6", "audit.canaries=64", "model.hidden=[32]")
    honest = ATTACK.trial(case(tmp_path / "honest", *overrides))
    score = ATTACK.score(guessed(honest), honest.truth, 0)
    assert score.p is not None
    assert score.p > 1e-3
    silence(monkeypatch, 20.0)
    broken = ATTACK.trial(case(tmp_path / "broken", *overrides))
    score = ATTACK.score(guessed(broken), broken.truth, 0)
    assert score.p is not None
    assert score.p < 0.01
    assert score.results[0].value > broken.truth.promised.epsilon
