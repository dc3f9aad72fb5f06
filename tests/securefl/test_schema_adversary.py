"""Attacks on runs over sites' own files that once succeeded, or that came close."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import tracemalloc
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.rounds import make_identities
from securefl import agreement, config, runs, schema, sections, simulation, store
from securefl.config import ConfigurationError, Experiment
from securefl.data import Frame, held_out, reading, sources
from securefl.engines import Exchange, inprocess
from securefl.messages import Request, Task
from securefl.prediction import Model
from securefl.preprocessing import NOISY, Fitted, Preprocessor
from securefl.privacy import accounting, policy
from securefl.privacy.accounting import PoissonDiscreteGaussianSum, PoissonGaussian, Repeated
from securefl.privacy.ledger import Ledger, Release
from securefl.server import Server
from securefl.state import GlobalState
from securefl.store import CorruptStoreError

SCHEMA = """
version = 1
name = "ward"
label = "ill"
person = "patient"
test = "part"
[columns.patient]
type = "text"
[columns.part]
type = "text"
optional = true
[columns.age]
type = "number"
range = [0, 100]
[columns.ill]
type = "category"
categories = { no = ["0"], yes = ["1"] }
"""
EXPERIMENT = """
rounds = 2
[data]
source = "table"
[sites]
partition = "file"
[model]
name = "logistic"
[protocol]
name = "plain"
"""
PLAN = """
[privacy]
unit = "{unit}"
epsilon = 5.0
delta = 1e-3
rate = 0.2
expected_batch = 8
"""
AGREED = schema.parse(SCHEMA)
MARKS = ("", "train", "test")


def experiment(unit: str = "") -> Experiment:
    """One on files of the schema; unit: what its plan protects, if it has one."""
    text = EXPERIMENT + (PLAN.format(unit=unit) if unit else "")
    return config.Experiment.model_validate(
        _with_data(config.parse_tree(text, "test"), schema=AGREED, path="unused.csv")
    )


def _with_data(tree: dict[str, object], **data: object) -> dict[str, object]:
    assert isinstance(tree["data"], dict)
    return tree | {"data": tree["data"] | data}


def frame(rows: list[tuple[str, str, float]]) -> Frame:
    """Rows of (patient, mark, age), all of them ill."""
    patients, marks, ages = zip(*rows, strict=True) if rows else ((), (), ())
    texts = {"patient": np.array(patients, np.str_), "part": np.array(marks, np.str_)}
    codes = {"ill": np.ones(len(rows), np.int32)}
    return Frame(AGREED, len(rows), {"age": np.array(ages, np.float64)}, codes, texts)


def sides(rows: list[tuple[str, str, float]], asked: Experiment) -> dict[float, str]:
    """Where each row is, by its age, of which every row has its own."""
    train, test = held_out(frame(rows), asked)
    found = dict.fromkeys(train.numbers["age"].tolist(), "train")
    return found | dict.fromkeys(test.numbers["age"].tolist(), "test")


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(MARKS)), max_size=8)


# --- what one record, or one person, moves -------------------------------------------------------


@given(ROWS, st.sampled_from("abc"), st.sampled_from(MARKS))
def test_one_row_more_moves_no_other_where_a_plan_protects_rows(drawn, patient, mark):
    """Else one marked row would take all of its patient's others out of training at once."""
    rows = [(*row, float(at)) for at, row in enumerate(drawn)]
    before, after = (
        sides(held, experiment("record")) for held in (rows, [*rows, (patient, mark, 99.0)])
    )
    del after[99.0]
    assert after == before


@given(ROWS, st.lists(st.sampled_from(MARKS), max_size=3), st.sampled_from(["person", ""]))
def test_one_person_more_moves_no_other_and_is_in_one_part(drawn, marks, unit):
    rows = [(*row, float(at)) for at, row in enumerate(drawn)]
    new = [("new", mark, 50.0 + at) for at, mark in enumerate(marks)]
    before, after = (sides(held, experiment(unit)) for held in (rows, [*rows, *new]))
    for person in ("a", "b", "c", "new"):
        assert len({after[age] for who, _, age in [*rows, *new] if who == person}) <= 1
    for _, _, age in new:
        del after[age]
    assert after == before


FIRST = [PoissonGaussian(1.5, 0.1), PoissonGaussian(0.8, 0.05)]
SUMS = [PoissonDiscreteGaussianSum(40.0 + 20 * k, 2, 30.0, 7, 1.0) for k in range(3)]
RUNS = st.lists(
    st.tuples(
        st.sampled_from(FIRST),
        st.integers(0, 3),
        st.sampled_from(SUMS),
        st.integers(0, 2),
        st.sampled_from(SUMS),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@given(RUNS)
def test_no_record_pays_more_than_the_ledger_says_whichever_part_it_is_in(tmp_path_factory, told):
    """A record is for training in some runs and for tests in others, as each run's seed has it."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with Ledger(path) as book:
        book.register("rows", unit="record", epsilon=1e4, delta=1e-3, purpose="a trial")
        paid: list[tuple[list[Repeated], list[Repeated]]] = []
        for number, (step, rounds, fit, fits, test, tests) in enumerate(told):
            releases = (
                Release("statistics-0", fit, 2, held_out=False),
                Release("evaluation", test, 3, held_out=True),
            )
            account = book.open(
                "rows",
                f"run-{number}",
                experiment="trial",
                promise=bytes(32),
                unit="record",
                per_round=Repeated(step, 2),
                rounds=3,
                epsilon=1.0,
                releases=releases,
            )
            names = [""] * rounds + ["statistics-0"] * fits + ["evaluation"] * tests
            for at, name in enumerate(names, 1):
                account.charge(at, name)
            paid.append(
                ([Repeated(step, 2 * rounds), Repeated(fit, fits)], [Repeated(test, tests)])
            )
        spent = book.epsilon("rows")
        for path_ in itertools.product((0, 1), repeat=len(paid)):
            whole = [part for pair, side in zip(paid, path_, strict=True) for part in pair[side]]
            assert accounting.epsilon(whole, 1e-3) <= spent + 1e-9


# --- what a server may choose --------------------------------------------------------------------

CLIPPED = config.Preprocessing(clip_quantiles=(0.01, 0.99), impute="median", bins=4)
MAKER = Preprocessor(experiment("record").data, CLIPPED, NOISY)
AGES = st.one_of(st.just(np.nan), st.sampled_from([0.0, 5e-324, 50.0, 100.0]), st.floats(0, 100))
ANY = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(AGES, max_size=6), AGES, ANY, ANY, st.floats(0, 1))
def test_ranges_of_a_servers_choice_move_the_second_sum_by_no_more(ages, more, one, other, at):
    """However narrow or wide: a count of who is above a chosen age is within the sensitivity."""
    low, high = min(one, other), max(one, other)
    fill = min(max(low * (1 - at) + high * at, low), high)
    if not low < high:
        return
    (age,) = MAKER.start().numbers
    chosen = {"low": low, "high": high, "fill": fill, "centre": 0.0, "spread": 1.0}
    number = msgspec.structs.replace(age, **chosen)
    before = Fitted(1, False, 5.0, (number,), (), ())
    rows = [("a", "", value) for value in ages]
    with np.errstate(all="ignore"):
        ours, theirs = (
            MAKER.encode(1, before, frame(held), None) for held in (rows, [*rows, ("b", "", more)])
        )
    assert np.linalg.norm((theirs - ours).astype(np.float64)) <= MAKER.sensitivity(1)


def test_the_first_sum_is_of_declared_ranges_and_no_others():
    (age,) = MAKER.start().numbers
    narrow = msgspec.structs.replace(age, low=40.0, high=41.0, fill=40.5)
    chosen = msgspec.structs.replace(MAKER.start(), numbers=(narrow,))
    with pytest.raises(ValueError, match="declared ranges"):
        MAKER.encode(0, chosen, frame([("a", "", 40.5)]), None)


SITE = """
version = 1
name = "x"
[data]
id = "rows"
purpose = "a trial"
[budget]
unit = "record"
epsilon = 10.0
delta = 1e-3
[policy]
privacy = "{privacy}"
record_counts = {counts}
"""


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(("unit", "protected"), [("record", False), ("record", True), ("", True)])
def test_no_policy_lets_exact_counts_of_test_rows_out_by_default(unit, protected, counts):
    """Else a plan is proposed with test rows outside it, nearly all rows made test rows, and models
    chosen that each tell the count of some."""
    said = SITE.format(privacy="required" if unit else "optional", counts=str(counts).lower())
    site = config.parse_site(said)
    site = site.model_copy(update={"data": site.data.model_copy(update={"agreed": AGREED})})
    asked = experiment(unit)
    assert asked.evaluation is not None
    free = {"scale": "range", "impute": "middle", "minimum_count": 0}  # nothing is fitted
    asked = asked.model_copy(
        update={
            "evaluation": asked.evaluation.model_copy(update={"protected": protected}),
            "preprocessing": config.Preprocessing.model_validate(free),
        }
    )
    rules = [error.rule for error in policy.broken(site, asked, 3, 4, date(2026, 1, 1))]
    exact = not (unit and protected)
    assert ("policy.record_counts" in rules) == (exact and not counts)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ('categories = ["a", "b"]', 'categories = ["a, b"]'),
        ('categories = ["a", "b"]', 'categories = ["b", "a"]'),
        ('categories = { x = ["1"], y = ["2"] }', 'categories = { y = ["2"], x = ["1"] }'),
        ('categories = { x = ["1"], y = ["2"] }', 'categories = { "x: [1]; y" = ["2"] }'),
        ('categories = ["a"]\nmissing = ["?", "-9"]', 'categories = ["a"]\nmissing = ["?, -9"]'),
    ],
)
def test_a_schema_that_reads_like_the_sites_own_is_still_another(ours, theirs):
    """Differences were once told by comparing what people read of them."""
    column = '[columns.kind]\ntype = "category"\n'
    mine, other = (schema.parse(SCHEMA + column + said) for said in (ours, theirs))
    [(key, shown, proposed)] = schema.differences(mine, other)
    assert key == "columns.kind"
    assert shown != proposed


# --- what a file or a schema may hold ------------------------------------------------------------


@pytest.mark.parametrize("code", ["\x1b[31mred", "two\nlines", "\u202etxt", "a\0b", "\t"])
@pytest.mark.parametrize("categories", ['["{code}", "b"]', '{{ x = ["{code}"], y = ["b"] }}'])
def test_no_code_of_a_schema_steers_a_terminal_or_breaks_a_line(code, categories):
    escaped = "".join(f"\\u{ord(sign):04x}" for sign in code)
    told = SCHEMA.replace('{ no = ["0"], yes = ["1"] }', categories.format(code=escaped))
    with pytest.raises(ConfigurationError, match="cannot be printed") as caught:
        schema.parse(told)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigurationError, match="cannot be printed"):
        schema.parse(f'missing = ["{escaped}"]\n' + SCHEMA)


@pytest.mark.parametrize("part", ["a", '"a"', "'b'", r'"\""', '"="', "a ", '"#"'])
@pytest.mark.parametrize("told", ["{key} = 1", "x = {{ {key} = 1 }}", "[{key}]", "[[{key}]]"])
def test_a_proposal_of_one_long_key_does_not_fill_the_memory(part, told):
    """For a key of n parts tomllib takes memory in the square of n: 3 GB for 64 kB."""
    text = told.format(key=".".join([part] * 20_000))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match="more than 32 parts"):
            config.parse(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


def test_dots_in_texts_and_numbers_are_no_parts_of_a_key():
    dotted = ".".join("a" * 50)
    text = "\n".join(
        [
            f"# {dotted}",
            f'x = "{dotted} # \\" {dotted}"',
            f"y = '{dotted}'",
            f'z = """\n{dotted}\n{dotted}"""',
            f"w = '''\n{dotted}'''",
            "v = [" + ", ".join(["1.5"] * 50) + "]",
        ]
    )
    assert sections.parse_tree(text, "test")["v"] == [1.5] * 50


def test_telling_images_apart_takes_no_more_memory_than_they_do():
    image = schema.parse(
        'version = 1\nname = "i"\nlabel = "kind"\n[columns.kind]\ntype = "category"\n'
        'categories = ["a", "b"]\n[columns.image]\ntype = "image"\nheight = 32\nwidth = 32\n'
        "channels = 3\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 3, 32, 32), np.uint8)
    pixels[7] = pixels[3]
    held = Frame(image, 2000, {}, {"kind": np.zeros(2000, np.int32)}, {}, pixels)
    tracemalloc.start()
    try:
        told = [hash(row) for row in held.identities(None)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < pixels.nbytes
    assert told[7] == told[3]
    assert len(set(told)) == 1999


@pytest.mark.parametrize("filling", [b"\0", b"1", b'"', b",", b" "], ids=repr)
def test_a_bomb_in_gzip_is_one_line_and_little_memory(tmp_path, filling):
    """One line of many times what a line may have: most of it is never unpacked."""
    path = tmp_path / "bomb.csv"
    with gzip.open(path, "wb", compresslevel=1) as packed:
        packed.write(b"patient,part,age,ill\n")
        for _ in range(12):
            packed.write(filling * (1 << 24))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError) as caught:
            reading.load(path, AGREED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert peak < 1 << 29


# --- what a crash, or a hand, leaves behind ------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An experiment on three sites' files, forty rows each."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "ward.toml").write_text(SCHEMA)
    rng = np.random.default_rng(0)
    for site in "xyz":
        rows = ["patient,part,age,ill"]
        for at in range(40):
            ill = int(rng.integers(2))
            mark = "test" if at % 4 == 0 else ""
            rows.append(f"{site}{at},{mark},{rng.uniform(0, 60) + 40 * ill:.1f},{ill}")
        (folder / f"{site}.csv").write_text("\n".join(rows) + "\n")
    told = f'schema = "ward.toml"\npath = "{folder}/*.csv"'
    path = folder / "experiment.toml"
    path.write_text(
        EXPERIMENT.replace('source = "table"', f'source = "table"\n{told}')
        + "[evaluation]\nevery = 1\n"
    )
    return config.load(path)


@contextlib.contextmanager
def served(asked: Experiment, folder: Path) -> Iterator[tuple[Server, Fitted]]:
    """A server of real sites, in round 2, and what preprocessing was fitted to in round 1."""
    consortium = simulation.assemble(asked)
    identities = make_identities(tuple(consortium.sites), os.urandom)
    clients = {
        site: simulation.client(asked, records, identities[site], bytes(16), folder / site)
        for site, records in consortium.sites.items()
        if records is not None
    }
    server = Server(
        asked,
        identities["x"].roster,
        bytes(16),
        lambda _, messages: inprocess.exchange(clients, messages),
        lambda number, phase: None,
        consortium.plan,
    )
    made = agreement.preprocessor(asked, 3)
    assert made is not None
    first = server.sum(1, Task("fit", 0, made.start().to_bytes()), made.dimension(0))
    yield server, made.fit(0, made.start(), first.total, 0.0)
    for client in clients.values():
        client.close()


def test_without_a_plan_a_server_counts_whatever_it_likes_among_the_test_rows(files, tmp_path):
    """As docs/threat-model.md says: a model of its choice, asked for as often as it likes."""
    tally = agreement.tally(files, 3)
    assert tally is not None
    sites = simulation.assemble(files).sites.values()
    tests = [held_out(each, files)[1] for each in sites if isinstance(each, Frame)]
    ages = np.concatenate([each.numbers["age"] for each in tests])
    with served(files, tmp_path) as (server, fitted):
        (age,) = fitted.numbers
        task = Task("evaluate", fitted=fitted.to_bytes())
        for number, above in enumerate([30.0, 55.5, 70.0], 2):
            edge = (above - age.centre) / age.spread  # logits [0, age - edge]
            weights = np.array([0, 1, 0, -edge], np.float32)
            model = GlobalState(1, weights, np.ones(4, np.bool_))
            total = server.sum(number, task, tally.dimension, model).total
            # Of each class (wrong, right), half a row each: those above are wrong of the first and
            # right of the last.
            assert (total[0] + total[3]) * 2 == (ages > above).sum() << tally.bits


@pytest.mark.parametrize("plan", [False, True])
def test_other_fitted_values_in_every_round_stop_no_site(files, tmp_path, plan):
    """A site whose features were made anew once fell over its own network."""
    if plan:
        said = {"epsilon": 5.0, "delta": 1e-3, "rate": 0.2, "expected_batch": 8, "noise": "local"}
        files = files.model_copy(update={"privacy": config.Privacy.model_validate(said)})
    model = GlobalState(0, np.zeros(4, np.float32), np.ones(4, np.bool_))
    with served(files, tmp_path) as (server, fitted):
        (age,) = fitted.numbers
        for number in (2, 3):
            moved = msgspec.structs.replace(age, centre=age.centre + number)
            other = msgspec.structs.replace(fitted, numbers=(moved,))
            done = server.round(number, model, other.to_bytes())
            assert done.contributors == ("x", "y", "z")


class _Cut(BaseException):
    """The machine stops."""


def cut_run(asked: Experiment, folder: Path) -> None:
    """Leave a run that was cut in its second round of training."""
    trained: set[int] = set()

    def wrap(exchange: Exchange) -> Exchange:
        def cutting(phase, messages):
            request = Request.from_bytes(next(iter(messages.values())))
            if phase == "upload" and request.task.kind == "train":
                trained.add(request.round)
            if len(trained) == 2:
                raise _Cut
            return exchange(phase, messages)

        return cutting

    with pytest.raises(_Cut):
        runs.run(asked, folder, exchange=wrap, report=False)


def test_an_evaluation_that_a_crash_cut_short_is_made_again(files, tmp_path):
    cut_run(files, tmp_path / "run")
    kept = tmp_path / "run" / "evaluations.jsonl"
    kept.write_bytes(kept.read_bytes()[:-20])
    done = runs.resume(tmp_path / "run", report=False)
    updates = [json.loads(line)["update"] for line in kept.read_text().splitlines()]
    assert updates == [1, 2]
    assert "test_accuracy" in done.summary.metric


@pytest.mark.parametrize("damage", ["lost", "another", "torn"])
def test_a_run_goes_on_with_what_its_rounds_were_trained_with_or_not_at_all(
    files, tmp_path, damage
):
    """Else the model would be trained on other features in its later rounds, without a word."""
    folder = tmp_path / "run"
    cut_run(files, folder)
    kept = folder / "preprocessing.json"
    if damage == "lost":
        kept.unlink()
    elif damage == "torn":
        kept.write_bytes(kept.read_bytes()[:-5])
    else:
        tree = json.loads(kept.read_text())
        values = msgspec.convert(tree["values"], Fitted)
        tree["values"] = msgspec.to_builtins(msgspec.structs.replace(values, rows=values.rows + 1))
        kept.write_text(json.dumps(tree))
    before = {path: path.read_bytes() for path in folder.glob("sites/*/site.json")}
    with pytest.raises(CorruptStoreError, match=r"preprocessing\.json"):
        runs.resume(folder, report=False)
    assert before == {path: path.read_bytes() for path in before}


@given(st.lists(st.sampled_from(["", "a", "bb\n", "\n"]), max_size=4))
def test_a_line_is_added_after_whole_lines_only(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("lines") / "lines"
    path.write_text("".join(found))
    whole = store.whole_lines(path)
    store.append_line(path, "new")
    assert store.whole_lines(path) == [*whole, "new"]
    assert path.read_bytes().endswith(b"\n")


def test_a_model_whose_parts_are_of_different_runs_is_one_line(files, tmp_path):
    cut_run(files, tmp_path / "run")
    done = runs.resume(tmp_path / "run", report=False).directory
    path = done / "model.json"
    told = json.loads(path.read_text())
    data = files.data.path.parent / "x.csv"
    assert sum(len(part.known) for part in Model.load(done).predict(data)) == 40
    for wrong in (
        {"classes": ["no"]},
        {"classes": ["\u001b[31m", "=1+1"]},
        {"task": "regression"},
        {"shape": [7]},
        {"outputs": 1 << 30},
        {"fitted": None},
        {"features": ["a"]},
    ):
        path.write_text(json.dumps(told | wrong))
        with pytest.raises(ConfigurationError, match=r"model\.json") as caught:
            Model.load(done)
        assert str(caught.value).isprintable()


def test_no_repr_shows_a_record(clinic):
    """Records must not reach a log or a traceback by way of the values that hold them."""
    declared = ("preprocessing.scale=range", "preprocessing.impute=middle")
    experiment = clinic().experiment(*declared, "preprocessing.minimum_count=0")
    frames = sources.load_frames(experiment.data)
    fitting = agreement.preprocessor(experiment, len(frames))
    for frame in frames.values():
        table = fitting.apply(fitting.start(), frame)
        for shown in (repr(frame), repr(table)):
            assert not any(name in shown for name in frame.texts["patient"])
            assert "array(" not in shown
