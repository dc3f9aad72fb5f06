"""The report: complete, self-contained, and never kinder than the run was."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.catalogue import PROTOCOLS
from securefl.config import ConfigurationError, Encryption
from securefl.records import SUMMARY
from securefl.report import words, write_report
from securefl.tallies import NOISY_BINS, NOISY_BITS, Figures, Tally

PREFIX = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """The tags, pictures and words of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.styles = ""
        self._words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif self.open and self.open[-1] != "title":
            self._words.append(data)

    @property
    def pictures(self) -> dict[str, str]:
        """Alternative text -> SVG source."""
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        assert all(str(img["src"]).startswith(PREFIX) for img in found)
        return {
            str(img["alt"]): base64.b64decode(str(img["src"])[len(PREFIX) :]).decode()
            for img in found
        }

    def labels(self) -> set[str]:
        """Every text drawn in a picture (matplotlib notes it beside the outlines)."""
        drawn = " ".join(self.pictures.values())
        return {label.strip() for label in re.findall(r"<!--(.*?)-->", drawn, flags=re.DOTALL)}


def test_the_page_asks_for_nothing_and_runs_nothing(write_run: Any) -> None:
    page = Page(write_report(write_run()))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert not page.open, "every tag is closed"
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert not {"href", "srcset", "background"} & set(attributes)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for picture in page.pictures.values():
        assert "<script" not in picture
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', picture))


def test_a_private_run_says_epsilon_delta_and_adjacency_in_words(write_run: Any) -> None:
    spent = {"site-1": 4.9001, "site-2": 4.9001, "site-3": 4.9001}
    page = Page(write_report(write_run(summary={"epsilon": spent})))
    assert (
        "Differential privacy: epsilon 4.91 at delta 0.001 at every site, add or remove one "
        "record, accounted with privacy loss distributions." in page.text
    )
    assert "NOT PRIVATE" not in page.source
    assert "a person with records at several sites the epsilons of those sites add up" in page.text
    assert "Not covered by this guarantee: 114 held-out records were read." in page.text


def test_the_worst_site_makes_the_claim(write_run: Any) -> None:
    spent = {"site-1": 1.0, "site-2": 3.0, "site-3": 2.0}
    page = Page(write_report(write_run(summary={"epsilon": spent})))
    assert "epsilon at most 3 (from 1, by site)" in page.text
    assert "by a factor of at most 21," in page.text  # e^3 = 20.09


def test_a_run_without_a_plan_is_shouted_down(write_run: Any) -> None:
    page = Page(write_report(write_run(plan=False)))
    assert "NOT PRIVATE: there is no plan." in page.text
    assert "Differential privacy:" not in page.text
    assert "Privacy spent" not in page.text
    assert ("section", {"class": "claim bad", "aria-label": "Privacy"}) in page.tags


def test_a_seeded_run_shows_its_epsilon_as_no_guarantee(write_run: Any) -> None:
    directory = write_run(
        experiment={"not_private_seed": 3},
        summary={"private": False, "why_not_private": "the draws are predictable"},
    )
    page = Page(write_report(directory))
    assert "NOT PRIVATE: the draws are predictable." in page.text
    assert "Here they promise nothing." in page.text
    assert "Epsilon (not a guarantee)" in page.text
    assert "whoever knows it can take the noise away" in page.text


def test_the_clip_by_round_is_told_where_it_is_adaptive(write_run: Any) -> None:
    page = Page(write_report(write_run(records={"clip": 0.3125})))
    assert "Clip, first to last round 0.3125 to 0.3125" in page.text
    assert "The clip by round, from 0.3125 to 0.3125." in page.pictures
    fixed = Page(write_report(write_run("fixed")))
    assert "Clip" not in fixed.text
    assert not [alt for alt in fixed.pictures if "clip" in alt]


def test_what_a_run_wrote_cannot_become_markup(write_run: Any) -> None:
    attack = '<script>alert("x")</script><img src="https://example.org/x">'
    directory = write_run(
        records={"dropouts": {"gone": attack}},
        summary={"stopped": attack, "outside_guarantee": (attack,), "protocol": attack},
    )
    page = Page(write_report(directory))
    assert attack not in page.source
    assert page.text.count(attack) >= 4
    assert "script" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("protocol", "story", "fails"),
    [
        ("bfv", "ciphertexts it holds no key for", "A site that colludes with the server"),
        ("plain", "read the update of every site in the clear", "Everything"),
        ("secagg", "masks that cancel in the sum", "sums over different sites in different rounds"),
        ("masked-bfv", "No single secret opens an update", "the sum has no integrity"),
    ],
)
def test_the_protocol_is_told_with_what_it_does_not_stop(
    write_run: Any, protocol: str, story: str, fails: str
) -> None:
    page = Page(write_report(write_run(summary={"protocol": protocol})))
    assert f"Encryption: {protocol}." in page.text
    assert story in page.text
    assert fails in page.text
    assert f"{protocol} (this run)" in page.text


def test_a_protocol_unknown_here_is_not_praised(write_run: Any) -> None:
    page = Page(write_report(write_run(summary={"protocol": "later"})))
    assert "Encryption: later" not in page.text
    assert "later (this run) Not described in this version" in page.text


def test_every_protocol_that_can_be_chosen_is_described() -> None:
    assert set(PROTOCOLS) == set(words.GUARANTEES)
    for protocol in PROTOCOLS:
        told = words.GUARANTEES[protocol]
        assert all((told.layers, told.story, told.stops, told.fails))


def test_a_run_that_revealed_its_sums_to_the_sites_says_so(write_run: Any) -> None:
    """In its own words, and nowhere does it say that a server or a single site opened a sum."""
    protocol = {"name": "masked-bfv", "reveal": "sites"}
    folder = write_run(experiment={"protocol": protocol}, summary={"protocol": "masked-bfv"})
    page = Page(write_report(folder))
    told = words.REVEALED_TO_SITES
    for part in (told.layers, told.story, told.stops, told.fails):
        assert part in page.text
    assert words.GUARANTEES["masked-bfv"].story not in page.text
    assert words.GUARANTEES["secagg"].stops in page.text


REGRESSION = {"metrics": {"test_loss": 0.4, "test_mse": 3000.0, "test_mae": 44.0, "test_r2": 0.4}}


@pytest.mark.parametrize(
    ("run", "pictures"),
    [
        ({}, 7),
        ({"rounds": 1}, 7),
        ({"rounds": 1, "sites": 3}, 7),
        ({"rounds": 60, "sites": 100}, 7),
        ({"rounds": 1000, "aborted": range(2, 500, 7)}, 7),
        ({"plan": False}, 6),
        ({"plan": False, "records": REGRESSION | {"epsilon": {}}}, 8),
        ({"records": {"metrics": {"test_loss": math.nan}}}, 6),
        ({"records": {"metrics": {}, "bytes_down": {}}}, 4),
        ({"records": {"epsilon": {f"site-{i}": i / 9 for i in range(1, 21)}}, "sites": 20}, 7),
        ({"rounds": 1, "records": {"epsilon": {f"site-{i}": i for i in range(10)}}}, 7),
        ({"rounds": 2, "records": {"upload_bytes": {}, "survivors": ()}}, 7),
    ],
)
def test_every_shape_of_run_has_its_plots(
    write_run: Any, run: dict[str, Any], pictures: int
) -> None:
    spent = {f"site-{i + 1}": 1.0 for i in range(run.get("sites", 3))}
    changes = {"epsilon": spent} if run.get("plan", True) else {}
    path = write_report(write_run(**run, summary=changes))
    page = Page(path)
    assert len(page.pictures) == pictures
    assert all(alternative for alternative in page.pictures)
    assert path.stat().st_size < 3_000_000


def test_every_axis_has_its_unit(write_run: Any) -> None:
    labels = Page(write_report(write_run())).labels()
    assert {
        "round",
        "fraction of held-out records",
        "mean loss a record",
        "epsilon spent so far (no unit)",
        "zero weights (%)",
        "upload a site (kB)",
        "kB a round, all sites",
        "seconds a round",
    } <= labels
    assert {"advertise", "upload", "open", "update", "all 3 sites"} <= labels
    assert "allowed by the plan: 5" in labels


def test_a_phase_has_one_colour_in_every_plot(write_run: Any) -> None:
    later = {"seconds": {"begin": 0.1, "open": 0.1, "upload": 0.1}}
    pictures = Page(write_report(write_run(rounds=1, records=later))).pictures
    stacked = [svg for alt, svg in pictures.items() if alt.startswith("By round and phase")]
    assert len(stacked) == 3
    colours: dict[str, set[str]] = {}
    for svg in stacked:
        legend = svg[svg.index('id="legend_1"') :]
        swatches = re.findall(
            r"fill: (#\w{6})\"/>\s*</g>\s*<g id=\"text_\d+\">\s*<!-- (\w+)", legend
        )
        assert swatches
        for colour, phase in swatches:
            colours.setdefault(phase, set()).add(colour)
    assert set(colours) == {"advertise", "upload", "open", "begin"}
    assert all(len(used) == 1 for used in colours.values())


def test_dropouts_and_aborted_rounds_are_listed(write_run: Any) -> None:
    gone = {"survivors": ("site-1", "site-2"), "dropouts": {"site-3": "no reply in 30 s"}}
    page = Page(write_report(write_run(rounds=4, records=gone, aborted={2, 3})))
    assert "site-3 no reply in 30 s 1, 4–6" in page.text
    assert "Aborted rounds, repeated under new numbers: 2–3." in page.text
    assert "aborted round" in page.labels()


def test_a_quiet_run_says_so(write_run: Any) -> None:
    page = Page(write_report(write_run()))
    assert "No site dropped out of a finished round. No round was aborted." in page.text


def test_the_experiment_is_printed_whole(write_run: Any) -> None:
    directory: Path = write_run()
    page = Page(write_report(directory))
    experiment = (directory / "experiment.toml").read_text()
    assert " ".join(experiment.split()) in page.text


def test_the_same_run_gives_the_same_bytes(write_run: Any) -> None:
    directory: Path = write_run()
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first


def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(write_run: Any) -> None:
    directory: Path = write_run(finished=False)
    with pytest.raises(ConfigurationError, match=r"unfinished; .*securefl run --resume"):
        write_report(directory)
    assert not (directory / "report.html").exists()


def test_a_report_that_fails_leaves_the_old_one(write_run: Any) -> None:
    directory: Path = write_run()
    before = write_report(directory).read_bytes()
    (directory / SUMMARY).write_text("{}")
    with pytest.raises(ConfigurationError, match="damaged"):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == before
    assert not list(directory.glob(".*"))


@given(st.floats(min_value=1e-12, max_value=1e6))
def test_epsilon_is_never_shown_smaller_than_it_is(value: float) -> None:
    shown = float(words.rounded_up(value))
    assert value <= shown <= value * 1.01


@given(st.floats(0, 1))
def test_percentages_are_rounded_against_the_claimant(value: float) -> None:
    down, up = (float(f(value).removesuffix(" %")) for f in (words.percent, words.percent_up))
    assert down - 1e-6 <= 100 * value <= up + 1e-6
    assert up - down <= 0.1 + 1e-9


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0, 0.1))
def test_the_best_membership_test_grows_with_epsilon_between_chance_and_certainty(
    one: float, other: float, delta: float
) -> None:
    low, high = sorted((one, other))
    weak, strong = (words.strongest_test(spent, delta) for spent in (low, high))
    assert 0.01 - 1e-12 <= weak <= strong <= 1
    assert words.strongest_test(0.0, 0.0) == pytest.approx(0.01)


def test_the_best_membership_test_at_known_points() -> None:
    # the line through (0, delta) of slope e^eps, and its mirror image
    assert words.strongest_test(1.0, 0.001) == pytest.approx(0.01 * math.e + 0.001)
    assert words.strongest_test(5.0, 0.001) == pytest.approx(1 - math.exp(-5) * 0.989)


@given(st.sets(st.integers(1, 60)))
def test_ranges_name_exactly_the_numbers(numbers: set[int]) -> None:
    told: set[int] = set()
    for part in filter(None, words.ranges(numbers).split(", ")):
        low, _, high = part.partition("–")
        told |= set(range(int(low), int(high or low) + 1))
    assert told == numbers


@given(st.floats(0, 1e15))
def test_sizes_keep_three_digits(count: float) -> None:
    figure, unit = words.size(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(figure) * scale == pytest.approx(count, rel=0.006, abs=0.51)


def test_above_200_sites_the_report_claims_nothing_against_an_active_server() -> None:
    for name in ("secagg", "masked-bfv"):
        few, many = (words.guarantees(Encryption(name=name), sites)[name] for sites in (200, 201))
        assert words.ON_A_RING in many.stops
        assert "even an active one" not in many.stops
        assert few == words.GUARANTEES[name]
        complete = Encryption(name=name, graph="complete")
        assert words.guarantees(complete, 201)[name] == few


def some_figures(kinds: int = 2, apart: float = 1.0, deviations: float = 0.0) -> Figures:
    """Figures of 600 rows, of so many classes (0: a regression), with so much noise."""
    random = np.random.default_rng(1)
    noisy = {"bins": NOISY_BINS, "bits": NOISY_BITS} if deviations else {}
    if kinds:
        tally, target = Tally(kinds, **noisy), random.integers(0, kinds, 600)
        outputs = random.normal(0, 1, (600, kinds)) + apart * np.eye(kinds)[target]
        total = tally.encode(outputs, random.exponential(0.5, 600), target)
    else:
        tally, level = Tally(0, target_range=(0.0, 50.0), **noisy), random.uniform(-1, 1, 600)
        outputs = level[:, None] + random.normal(0, 0.3 / apart, (600, 1))
        total = tally.encode(outputs, (outputs[:, 0] - level) ** 2, level)
    deviation = deviations * tally.sensitivity
    noise = np.rint(random.normal(0, deviation, tally.dimension)).astype(np.int64)
    return tally.figures(total + noise, deviation)


@pytest.mark.parametrize(
    ("kinds", "evaluations", "pictures"),
    [(2, 3, 4), (2, 1, 2), (4, 3, 3), (4, 1, 1), (0, 3, 3), (0, 1, 0)],
)
def test_figures_from_sums_have_their_table_and_plots(
    write_run: Any, kinds: int, evaluations: int, pictures: int
) -> None:
    """ROC curve and calibration for two classes, calibration for more, and how training went."""
    told = {update: some_figures(kinds, 1 + update / 3) for update in range(1, evaluations + 1)}
    page = Page(write_report(write_run(evaluations=told)))
    assert len(page.pictures) == pictures + 5  # those of a private run without any figure
    last = told[evaluations]
    for key, value in last.values.items():
        row = [words.sentence_case(words.metric_name(key).removeprefix("test "))]
        row.append(words.number(value))
        row.append(words.interval(last.intervals[key]) if key in last.intervals else "–")
        assert " ".join([*row, words.MEANINGS[key]]) in page.text
    assert f"From sums over 3 sites, of 600 test rows after round {evaluations}" in page.text
    assert "no test row left its site. The sums were exact." in page.text
    assert ("class 3" in page.text) == (kinds == 4)


def test_noise_in_the_figures_is_said_with_its_epsilon(write_run: Any) -> None:
    evaluations = {2: some_figures(deviations=0.5)}
    page = Page(write_report(write_run(evaluations=evaluations, protected=0.70001)))
    about = round(evaluations[2].rows)
    assert f"of about {about} test rows" in page.text
    assert "The sums carried noise: epsilon 0.701 protects the test rows." in page.text
    assert "The sums were exact" not in page.text


def test_the_roc_curve_shows_the_point_at_the_threshold(write_run: Any) -> None:
    figures = some_figures()
    page = Page(write_report(write_run(evaluations={3: figures})))
    sensitivity = words.number(figures.values["test_sensitivity"])
    specificity = words.number(figures.values["test_specificity"])
    said = f"Sensitivity {sensitivity}, specificity {specificity} at the threshold 0.5."
    assert [alt for alt in page.pictures if said in alt]
    assert {"at the threshold 0.5", "chance", "sensitivity", "calibrated"} <= page.labels()


def test_figures_that_noise_hides_leave_a_page_without_them(write_run: Any) -> None:
    """Nothing told: no plot of nothing, and no row of dashes."""
    evaluations = {1: Figures(0.0, {}, {}, exact=False), 2: Figures(0.0, {}, {}, exact=False)}
    page = Page(write_report(write_run(evaluations=evaluations)))
    assert "of about 0 test rows" in page.text
    assert not [alt for alt in page.pictures if "ROC" in alt or "Observed" in alt]


def test_every_figure_from_sums_has_a_name_and_a_meaning() -> None:
    for kinds in (0, 2, 3):
        for key in some_figures(kinds).values:
            assert words.MEANINGS[key]
            assert (
                words.in_order({key: 0.0, "test_unknown": 0.0})[0 if key != "test_loss" else 1]
                == key
            )


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_an_interval_is_never_shown_narrower_than_it_is(low: float, width: float) -> None:
    shown_low, shown_high = map(float, words.interval((low, low + width)).split(" to "))
    assert shown_low <= low
    assert low + width <= shown_high
    assert shown_high - shown_low <= width + 4e-4 + 2e-3 * (abs(low) + width)
