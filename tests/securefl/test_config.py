"""An experiment is a value: what is wrong is refused in one line, what is right comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefl.config import ConfigurationError, Experiment, load, load_site, parse, parse_site

PLAN = "[privacy]\nepsilon = 1.0\ndelta = 1e-3\nrate = 0.1\nexpected_batch = 8\n"
SHARED = PLAN + 'noise = "distributed"\n'
SITE = '[privacy]\nunit = "site"\nepsilon = 1.0\ndelta = 1e-3\n'


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("ruonds = 5", ["'ruonds'", "did you mean 'rounds'?"]),
        (
            "[training]\nlerning_rate = 1",
            ["'training.lerning_rate'", "did you mean 'training.learning_rate'?"],
        ),
        ("[privcy]\nepsilon = 1", ["'privcy'", "did you mean 'privacy'?"]),
        (PLAN + "epsilom = 2", ["'privacy.epsilom'", "did you mean 'privacy.epsilon'?"]),
        ("[sites]\ncount = 3\nxyzzy = 1", ["'sites.xyzzy'", "the keys here are", "partition"]),
        ("rounds = 0", ["rounds = 0", "greater than or equal to 1"]),
        ('rounds = "many"', ["rounds = 'many'", "integer"]),
        ("version = 2", ["version = 2", "choose 1"]),
        ("seed = -1", ["seed = -1", "greater than or equal to 0"]),
        ('device = "gpu"', ["device = 'gpu'"]),
        ('name = "../escape"', ["name = '../escape'"]),
        ("[data]\ntest_fraction = 1.0", ["data.test_fraction = 1.0", "less than 1"]),
        (
            '[data]\nsource = "iris"',
            ["data.source = 'iris'", "breast-cancer", "module:callable"],
        ),
        ('[data]\nsource = "table"\nlabel = "y"', ["data", "path ="]),
        ('[data]\nsource = "table"\npath = "a.csv"', ["data", "label ="]),
        ("[data]\ndefault_range = [1, 0]", ["default_range", "[1.0, 0.0]", "lower bound first"]),
        ("[data.ranges]\nage = [9, 9]", ["age", "[9.0, 9.0]", "lower bound first"]),
        ("[data]\ndefault_range = [1]", ["data.default_range"]),
        ("[sites]\ncount = 0", ["sites.count = 0", "greater than or equal to 1"]),
        ('[sites]\nnames = ["a", "a"]', ["sites", "repeats"]),
        ('[sites]\nnames = ["a", "b"]\ncount = 3', ["sites", "count = 3", "lists 2"]),
        ('[sites]\nnames = ["a/b", "c"]', ["'a/b'"]),
        ('[sites]\npartition = "column"', ["sites", "column ="]),
        ("[sites]\nalpha = 1.0", ["sites", "count = N"]),
        ('[sites]\ncount = 2\npartition = "idd"', ["sites.partition = 'idd'", "iid"]),
        ('[model]\nname = "transformer"', ["model.name = 'transformer'", "mlp", "cnn"]),
        ("[model]\nhidden = [0]", ["model.hidden.0 = 0"]),
        ("[training]\nlearning_rate = 0", ["training.learning_rate = 0", "greater than 0"]),
        ("[training]\nlearning_rate = inf", ["training.learning_rate = inf", "finite"]),
        ("[training]\nmomentum = 1.0", ["training.momentum = 1.0", "less than 1"]),
        ('[training]\noptimiser = "lbfgs"', ["training.optimiser = 'lbfgs'", "sgd"]),
        ('[aggregation]\nweighting = "declared"', ["aggregation", "[aggregation.weights]"]),
        ("[aggregation.weights]\na = 1", ["aggregation", 'weighting = "declared"']),
        ('[aggregation]\nweighting = "records"', ["aggregation", "weight_cap"]),
        (
            PLAN + '[aggregation]\nweighting = "records"\nweight_cap = 9',
            ["aggregation.weighting", "privacy", "uniform"],
        ),
        (PLAN.replace("1e-3", "1.0"), ["privacy.delta = 1.0", "less than 1"]),
        (PLAN.replace("rate = 0.1", "rate = 1.5"), ["privacy.rate = 1.5", "less than or equal"]),
        ("[privacy]\nepsilon = 1.0", ["privacy.delta is missing"]),
        (PLAN + 'unit = "ward"', ["privacy.unit = 'ward'", "record", "person"]),
        (PLAN + 'noise = "none"', ["privacy.noise = 'none'", "local", "distributed"]),
        (PLAN + "signal = 3.0", ["privacy", "signal", 'noise = "distributed"']),
        (SHARED + "signal = 0", ["privacy.signal = 0", "greater than 0"]),
        (PLAN + 'unit = "person"', ['privacy.unit = "person"', 'data.person = "COLUMN"']),
        (SITE + "rate = 0.5", ["no key 'privacy.rate'", "the keys here are", "clip"]),
        (SITE + "expected_batch = 8", ["no key 'privacy.expected_batch'"]),
        (SITE + "epsilom = 8", ["no key 'privacy.epsilom'", "'privacy.epsilon'"]),
        (SITE + 'noise = "local"', ["privacy.noise = 'local'", "distributed"]),
        (SITE.replace("epsilon = 1.0\n", ""), ["privacy.epsilon is missing"]),
        (SHARED + "[training]\nlocal_steps = 2", ["training.local_steps = 2", "one step"]),
        (
            SHARED + '[aggregation]\nweighting = "declared"\nweights = {a = 1}',
            ['privacy.noise = "distributed"', 'weighting = "uniform"'],
        ),
        (
            SITE + '[aggregation]\nweighting = "records"\nweight_cap = 9',
            ["aggregation.weighting", "uniform"],
        ),
        ("[aggregation]\naverage_from = 0", ["aggregation.average_from = 0", "equal to 1"]),
        ("[aggregation]\nmomentum = 1.0", ["aggregation.momentum = 1.0", "less than 1"]),
        ('[protocol]\nname = "rsa"', ["protocol.name = 'rsa'", "plain", "bfv"]),
        ("[protocol]\nbits = 64", ["protocol.bits = 64", "less than or equal to 24"]),
        ("[protocol]\nminimum_cohort = 1", ["protocol.minimum_cohort = 1", "equal to 2"]),
        ("[protocol]\nopeners = 0", ["protocol.openers = 0", "equal to 1"]),
        ('[protocol]\nname = "secagg"\nopeners = 2', ["openers = 2", "no site opens", "ckks"]),
        ('[protocol]\nname = "plain"\nopeners = 2', ["openers = 2", "no site opens", "ckks"]),
        ('[protocol]\nreveal = "sites"\nopeners = 2', ["openers = 2", "every site opens"]),
        ('[protocol]\nreveal = "all"', ["protocol.reveal = 'all'", "server", "sites"]),
        ('[protocol]\nname = "bfv"\nreveal = "sites"', ['reveal = "sites"', '"masked-bfv"']),
        ('[protocol]\nname = "ckks"\nreveal = "sites"', ['reveal = "sites"', '"masked-bfv"']),
        ('[protocol]\nname = "secagg"\nreveal = "sites"', ['reveal = "sites"', '"masked-bfv"']),
        ('[protocol]\nname = "plain"\nreveal = "sites"', ['reveal = "sites"', '"masked-bfv"']),
        ("[pruning]\nsparsity = 1.0", ["pruning.sparsity = 1.0", "less than 1"]),
        (
            "rounds = 5\n[pruning]\nsparsity = 0.5\nlast_round = 9",
            ["pruning", "from round 1 to 9", "1 to 5"],
        ),
        ("[stopping]\npatience = 2", ["stopping.tolerance is missing"]),
        ("[engine]\ndeadline = 5", ["engine", "workers >= 1"]),
        ('[engine]\nkind = "dask"', ["engine.kind = 'dask'", "local", "ray"]),
        ('[engine]\naddress = "head:6379"', ["engine", 'kind = "ray"']),
        (
            '[engine]\nkind = "ray"\naddress = "ray://head:10001"',
            ["engine.address", "ray://head:10001", "HOST:PORT", "auto"],
        ),
        (
            '[sites]\nnames = ["a", "b"]\n[transcript]\nconsent = ["c"]',
            ["transcript.consent", "'c'", "sites.names"],
        ),
        ("rounds = \nseed = 1", ["not valid TOML", "line 1"]),
        ("rounds = 3\nrounds = 4", ["not valid TOML"]),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_it_and_the_mend(text, telling):
    with pytest.raises(ConfigurationError) as caught:
        parse(text, origin="trial.toml")
    message = str(caught.value)
    assert message.startswith("trial.toml")
    assert "\n" not in message
    for part in telling:
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "telling"),
    [
        ("rounds", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("training..momentum=1", "write it as key=value"),
        ("rounds.many=3", "rounds is a value, not a table"),
        ("trainin.momentum=0.1", "did you mean 'training'?"),
        ("training.momentun=0.1", "did you mean 'training.momentum'?"),
        ("training.momentum=fast", "training.momentum = 'fast'"),
        ("pruning.sparsity=1", "pruning.sparsity = 1"),
        ("privacy.epsilon=-1", "privacy."),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override, telling):
    with pytest.raises(ConfigurationError) as caught:
        parse("rounds = 3", [override])
    assert telling in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("rounds=7", lambda e: e.rounds == 7),
        ("data.source=digits", lambda e: e.data.source == "digits"),
        ('data.source="digits"', lambda e: e.data.source == "digits"),
        ("model.hidden=[8, 4]", lambda e: e.model.hidden == (8, 4)),
        ("sites.names=['x', 'y']", lambda e: e.sites.names == ("x", "y")),
        (" protocol.bits = 12 ", lambda e: e.protocol.bits == 12),
        ("engine.workers=2", lambda e: e.engine.workers == 2),
    ],
)
def test_an_override_is_laid_over_the_file(override, read):
    text = "rounds = 3" if "names" in override else "rounds = 3\n[sites]\ncount = 4"
    assert read(parse(text, [override]))


def test_a_later_override_wins():
    assert parse("rounds = 3", ["rounds=4", "rounds=5"]).rounds == 5


def test_a_value_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Experiment().rounds = 4


def test_nothing_is_private_without_a_plan_or_with_a_test_seed():
    assert not Experiment().private
    assert parse(PLAN).private
    assert not parse("not_private_seed = 1\n" + PLAN).private


@pytest.mark.parametrize("section", [SHARED, SITE], ids=["record", "site"])
@pytest.mark.parametrize("protocol", ["plain", "bfv", "ckks"])
def test_distributed_noise_is_refused_where_single_updates_can_be_seen(section, protocol):
    """One site's vector has too little noise; only masks keep everyone from seeing it."""
    text = section + f'[protocol]\nname = "{protocol}"\n'
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert f'protocol.name = "{protocol}"' in str(caught.value)
    assert '"masked-bfv" or "secagg"' in str(caught.value)
    assert "\n" not in str(caught.value)
    seeded = "not_private_seed = 1\n" + text
    if protocol == "plain":  # the oracle of tests, and never private
        assert not parse(seeded).private
    else:
        with pytest.raises(ConfigurationError, match="shows single updates"):
            parse(seeded)


@pytest.mark.parametrize("section", [SHARED, SITE], ids=["record", "site"])
@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_distributed_noise_is_taken_under_masks_and_comes_back_as_it_was(section, protocol):
    experiment = parse(section + f'[protocol]\nname = "{protocol}"\n')
    assert experiment.private
    assert experiment.privacy is not None
    assert experiment.privacy.noise == "distributed"
    again = parse(experiment.dump())
    assert again == experiment
    assert again.digest() == experiment.digest()


def test_a_sites_update_may_come_from_any_local_training():
    assert parse(SITE + "[training]\nlocal_steps = 20\n").training.local_steps == 20
    assert parse(PLAN + "[training]\nlocal_steps = 20\n").privacy is not None


def test_the_digest_changes_with_every_promise():
    texts = [
        PLAN,
        SHARED,
        SITE,
        SHARED + "signal = 3.0\n",
        SHARED + 'unit = "person"\n[data]\nperson = "who"\n',
        SHARED + '[data]\nperson = "who"\n',
        SHARED + "[aggregation]\naverage_from = 2\n",
        SHARED + "[aggregation]\nmomentum = 0.5\n",
    ]
    assert len({parse(text).digest() for text in texts}) == len(texts)


numbers = st.floats(1e-6, 1e6, allow_nan=False)


@given(
    rounds=st.integers(1, 10_000),
    seed=st.integers(0, 2**32 - 1),
    rate=numbers,
    low=st.floats(-1e6, -1),
    high=st.floats(0, 1e6),
    feature=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    sparsity=st.one_of(st.none(), st.floats(0.01, 0.99)),
    epsilon=st.one_of(st.none(), numbers),
    hidden=st.lists(st.integers(1, 64), max_size=3),
    names=st.one_of(
        st.none(),
        st.lists(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,9}\Z"), min_size=2, unique=True),
    ),
    source=st.sampled_from(["digits", "my.own_module:records"]),
)
def test_what_is_dumped_is_read_back_as_the_same_value(
    rounds, seed, rate, low, high, feature, sparsity, epsilon, hidden, names, source
):
    experiment = Experiment.model_validate(
        {
            "rounds": rounds,
            "seed": seed,
            "data": {"source": source, "ranges": {feature: (low, high)}},
            "sites": {"names": names} if names else {"count": 3},
            "model": {"hidden": hidden},
            "training": {"learning_rate": rate},
            "pruning": {"sparsity": sparsity} if sparsity else None,
            "privacy": {"epsilon": epsilon, "delta": 1e-3, "rate": 0.5, "expected_batch": 2}
            if epsilon
            else None,
        }
    )
    again = parse(experiment.dump())
    assert again == experiment
    assert again.digest() == experiment.digest()
    assert again.dump() == experiment.dump()


@pytest.mark.parametrize(
    "override",
    [
        "rounds=31",
        "seed=1",
        "not_private_seed=1",
        "data.test_fraction=0.3",
        "data.default_range=[0, 1]",
        "sites.count=6",
        "model.name=mlp",
        "training.learning_rate=0.2",
        "training.local_steps=2",
        "aggregation.algorithm=fedadam",
        "privacy.epsilon=2.0",
        "protocol.bits=12",
        "protocol.clip=2.0",
        "protocol.minimum_cohort=3",
        "protocol.reveal=sites",
        "protocol.openers=2",
        "pruning.sparsity=0.6",
        "stopping.tolerance=0.1",
    ],
)
def test_the_digest_changes_with_what_sites_must_agree_on(override):
    text = (
        "rounds = 30\n[sites]\ncount = 5\n[pruning]\nsparsity = 0.5\n"
        "[stopping]\ntolerance = 0.2\n" + PLAN
    )
    assert parse(text, [override]).digest() != parse(text).digest()


@pytest.mark.parametrize(
    "override", ["engine.workers=2", "name=other", "transcript.consent=['site-1']"]
)
def test_the_digest_does_not_change_with_what_concerns_one_party_alone(override):
    assert parse("rounds = 3", [override]).digest() == parse("rounds = 3").digest()


def test_a_relative_data_path_is_relative_to_the_file_that_names_it(tmp_path: Path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    file = folder / "trial.toml"
    file.write_text('[data]\nsource = "table"\nlabel = "y"\npath = "rows.csv"\n')
    monkeypatch.chdir(tmp_path)
    assert load(Path("study/trial.toml")).data.path == folder / "rows.csv"


def test_a_relative_data_path_on_the_command_line_is_relative_to_where_one_stands(
    tmp_path: Path, monkeypatch
):
    folder = tmp_path / "study"
    folder.mkdir()
    file = folder / "trial.toml"
    file.write_text('[data]\nsource = "table"\nlabel = "y"\npath = "rows.csv"\n')
    monkeypatch.chdir(tmp_path)
    assert load(file, ["data.path=here.csv"]).data.path == tmp_path / "here.csv"


def test_an_absolute_data_path_stays(tmp_path: Path):
    file = tmp_path / "trial.toml"
    file.write_text(f'[data]\nsource = "table"\nlabel = "y"\npath = "{tmp_path}/elsewhere.csv"\n')
    assert load(file).data.path == tmp_path / "elsewhere.csv"


@pytest.mark.parametrize(
    ("content", "telling"),
    [(None, "cannot read"), (b"\xff\xfe", "UTF-8"), (b"rounds = -1", "rounds = -1")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content, telling):
    file = tmp_path / "trial.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert telling in str(caught.value)
    assert "\n" not in str(caught.value)


# --- a site --------------------------------------------------------------------------------------

NORTH = """version = 1
name = "north"
[data]
id = "cardiology"
purpose = "predict relapse"
[budget]
unit = "record"
epsilon = 3.0
delta = 1e-5
"""


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("", ["version is missing"]),
        (NORTH.replace("version = 1", "version = 2"), ["version = 2", "choose 1"]),
        (NORTH.replace("budget", "bugdet"), ["'bugdet'", "did you mean 'budget'?"]),
        (NORTH.replace('purpose = "predict relapse"\n', ""), ["data.purpose is missing"]),
        (NORTH.replace("predict", "predict\\n"), ["data.purpose", "one line"]),
        (NORTH.replace("predict", "predict\\u001b[2J"), ["data.purpose", "one line"]),
        (NORTH.replace('"record"', '"persons"'), ["budget.unit = 'persons'", "'person'"]),
        (NORTH.replace('"record"', '"person"'), ["data.person ="]),
        (NORTH.replace("epsilon = 3.0", "epsilon = inf"), ["budget.epsilon = inf"]),
        (NORTH + "[policy]\nmax_epsilon = 1", ["did you mean 'policy.maximum_epsilon'?"]),
        (NORTH + "[policy]\nmaximum_epsilon = 4", ["above budget.epsilon = 3", "leave it out"]),
        (NORTH + "[policy]\nmaximum_delta = 1e-4", ["above budget.delta = 1e-05"]),
        (NORTH + '[policy]\nunits = ["person"]', ["cannot count", 'use "record" or "site"']),
        (NORTH + '[policy]\nprotocols = ["rsa"]', ["policy.protocols.0 = 'rsa'", "secagg"]),
        (NORTH + '[policy]\nprivacy = "off"', ["policy.privacy = 'off'", "optional"]),
        (NORTH + '[policy]\nconsent = "never"', ["policy.consent = 'never'", "standing"]),
        (NORTH + "[policy]\nminimum_cohort = 1", ["policy.minimum_cohort = 1", "2"]),
        (NORTH + "[policy]\nallow_not_private = 1", ["policy.allow_not_private = 1"]),
        (NORTH + '[policy]\ntranscript_until = "soon"', ["policy.transcript_until = 'soon'"]),
        (NORTH + '[policy.callables]\n"a:b" = "12"', ["policy.callables.a:b", "64 hexadecimal"]),
        (NORTH + '[policy.callables]\n"a" = "12"', ["policy.callables"]),
        (NORTH + '[consortium]\nsouth = "XY"', ["consortium.south", "64 hexadecimal"]),
        (
            NORTH + f'[consortium]\nsouth = "{"0" * 64}"\neast = "{"0" * 64}"',
            ["one key for two sites"],
        ),
        ("x = " + "[" * 5000, ["not valid TOML"]),
        ("x = " + "9" * 5000, ["not valid TOML"]),
    ],
)
def test_a_sites_mistake_is_one_line(text: str, telling: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_site(text, origin="site.toml")
    assert str(caught.value).startswith("site.toml")
    assert "\n" not in str(caught.value)
    for part in telling:
        assert part in str(caught.value)


def test_a_site_is_a_frozen_value_whose_defaults_are_the_safe_ones(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(NORTH.replace("[budget]", 'path = "rows.csv"\n[budget]'))
    site = load_site(path)
    assert site.data.path == tmp_path / "rows.csv"
    policy = site.policy
    assert (policy.privacy, policy.consent, policy.graph) == ("required", "each-run", "complete")
    assert not policy.unknown_sites
    assert not policy.record_counts
    assert not policy.canaries
    assert not policy.allow_not_private
    assert policy.transcript_until is None
    assert policy.callables == {}
    assert set(policy.protocols) == {"masked-bfv", "secagg"}
    with pytest.raises(ValueError, match="frozen"):
        site.policy.privacy = "optional"
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_site(tmp_path / "none.toml")
