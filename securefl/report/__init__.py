"""The report of a run: one self-contained page for those who answer for the records.

`report.html` holds its own styles and pictures, asks for nothing from outside (its content
security policy forbids it), runs no script, and prints on A4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import msgspec

from protocols.catalogue import PROTOCOLS
from securefl import agreement, store
from securefl.config import ConfigurationError, Experiment
from securefl.privacy.ledger import Accepted, Ledger, Registered
from securefl.records import MODEL, REPORT, SUMMARY, History, Summary, read_history
from securefl.report import words

__all__ = ["environment", "write_ledger_page", "write_report"]

_KEY_FIGURES = 3  # of merit, where a table has them all


def write_report(directory: Path) -> Path:
    """Write `report.html` into the finished run directory `directory`; return its path.

    The same run gives the same bytes. The page is written whole or not at all.

    Raises ConfigurationError when the folder is no run directory, holds a damaged file, or the
    run is unfinished.
    """
    history = read_history(directory)
    if history.summary is None:
        raise ConfigurationError(
            f"{directory} has no {SUMMARY}: the run is unfinished; finish it with "
            f"`securefl run --resume {directory}`, or look at it with `securefl show {directory}`"
        )
    page = _render(history, history.summary)
    path = directory / REPORT
    store.write(path, page.encode())
    return path


def write_ledger_page(ledger: Ledger, site: str, path: Path) -> None:
    """Write a page that a data-protection officer can print: what each data set has spent."""
    held = [ledger.standing(dataset) for dataset in ledger.datasets]
    page = (
        environment()
        .get_template("ledger.html")
        .render(
            site=site,
            head=ledger.head,
            held=held,
            sentences={item.dataset: words.ledger_sentences(item) for item in held},
            decisions={item.dataset: _decisions(ledger, item.dataset) for item in held},
            mechanisms=words.MECHANISMS,
            rounded_up=words.rounded_up,
            rounded_down=words.rounded_down,
            share=lambda item: min(100.0, 100 * item.spent / item.epsilon),
        )
    )
    store.write(path, page.encode())


def _decisions(ledger: Ledger, dataset: str) -> Sequence[str]:
    """What people decided about a data set, oldest first."""
    told = []
    for entry in ledger.entries:
        if isinstance(entry, Registered) and entry.dataset == dataset:
            by = f" by {entry.by}" if entry.by else ""
            told.append(f"{entry.at}: budget of epsilon {entry.epsilon:g} set{by}")
        elif isinstance(entry, Accepted) and entry.dataset == dataset:
            told.append(
                f"{entry.at}: {entry.by} accepted that it shares records with "
                f"{', '.join(entry.overlaps)}: {entry.reason}"
            )
    return told


def _render(history: History, summary: Summary) -> str:
    from securefl.report.plots import evaluation_plots, plots  # matplotlib is slow to import

    plan = history.experiment.privacy
    spent = max(summary.epsilon.values(), default=0.0)
    return (
        environment()
        .get_template("report.html")
        .render(
            summary=summary,
            experiment=history.experiment,
            claim=words.claim(summary),
            local_noise=plan is not None and plan.noise == "local",
            unit=plan.unit if plan is not None else None,
            unit_more="site's updates or none"
            if plan is not None and plan.unit == "site"
            else f"{plan.unit if plan is not None else 'record'} more or less at a site",
            tolerated=history.experiment.protocol.colluding_sites,
            public=words.rounded_up(summary.epsilon_public or 0.0),
            odds=words.odds(spent),
            delta=words.rounded_up(summary.delta or 0.0),
            strongest=words.percent_up(words.strongest_test(spent, summary.delta or 0.0)),
            guarantees=words.guarantees(history.experiment.protocol, len(summary.sites)),
            figures=_figures(history, summary),
            spending=_spending(summary),
            plots=plots(
                history.rounds, plan.epsilon if plan else None, metrics=not history.evaluations
            ),
            test=_test(history),
            test_plots=evaluation_plots(history.evaluations, *_threshold(history.experiment)),
            dropouts=_dropouts(summary),
            inputs=_inputs(history.directory),
            aborted=words.ranges(summary.aborted_rounds),
        )
    )


def _inputs(directory: Path) -> Mapping[str, str]:
    """What each input of the model is, in words; empty where records came as features."""
    try:
        told = msgspec.json.decode((directory / MODEL).read_bytes(), type=_Inputs)
    except (OSError, msgspec.MsgspecError):  # the page tells of the run; the model is beside it
        return {}
    return told.inputs


class _Inputs(msgspec.Struct, frozen=True):
    inputs: dict[str, str] = {}


def environment(*packages: str) -> jinja2.Environment:
    """Where pages are made: our templates, and before them those of `packages`."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package) for package in (*packages, "securefl.report")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _figures(history: History, summary: Summary) -> Sequence[tuple[str, str]]:
    """The key figures, each with its name and unit."""
    budget = history.experiment.rounds
    keys = words.in_order(summary.metric)
    merit = [
        (words.sentence_case(words.metric_name(key)), words.number(summary.metric[key]))
        for key in (keys[:_KEY_FIGURES] if history.evaluations else keys)
    ]
    if (told := words.hidden(summary)) is not None:
        merit.append((words.sentence_case(told[0]), told[1]))
    return [
        *merit,
        ("Sites", words.number(len(summary.sites))),
        ("Rounds finished", f"{summary.rounds:,} of at most {budget:,}"),
        ("Ended because", summary.stopped),
        ("Model parameters", f"{summary.parameters:,}"),
        ("Pruned at the end", words.percent(summary.sparsity)),
        *_clip(history),
        ("Upload a parameter", f"{words.number(summary.bytes_up_per_parameter)} bytes"),
        ("Uploaded, last round", words.size(summary.bytes_up_last_round)),
        ("Uploaded, whole run", words.size(summary.bytes_up_total)),
        ("Time in rounds", words.duration(sum(summary.seconds.values()))),
        ("Aggregation protocol", summary.protocol),
        *_thresholds(history, len(summary.sites)),
        ("securefl version", summary.version),
    ]


@dataclass(frozen=True)
class _Test:
    """The last evaluation at the sites, in words.

    figures: (name, value, interval, meaning). recalls: (class, share recognised).
    """

    source: str
    figures: Sequence[tuple[str, str, str, str]]
    recalls: Sequence[tuple[str, str]]


def _test(history: History) -> _Test | None:
    """What the last evaluation at the sites told; None where there was none."""
    if not history.evaluations:
        return None
    last = history.evaluations[-1]
    figures = last.figures
    rows = f"{'' if figures.exact else 'about '}{round(figures.rows):,}"
    people = history.experiment.privacy is not None and history.experiment.privacy.unit == "person"
    whose = "people" if people else "test rows"
    source = (
        f"From sums over {words.counted(len(last.sites), 'site')}, of {rows} {whose} after round "
        f"{last.round}; no test row left its site. "
    )
    if figures.exact:
        source += "The sums were exact."
    else:
        source += "The sums carried noise"
        if last.epsilon is not None:
            source += f": epsilon {words.rounded_up(last.epsilon)} protects the test rows"
        source += ". Intervals count the noise."
    schema = history.experiment.data.agreed
    classes = schema.classes if schema is not None else ()
    names = classes or [f"class {number}" for number in range(len(figures.recalls))]
    return _Test(
        source,
        [
            (
                words.sentence_case(words.metric_name(key).removeprefix("test ")),
                words.number(figures.values[key]),
                words.interval(figures.intervals[key]) if key in figures.intervals else "–",
                words.MEANINGS.get(key, ""),
            )
            for key in words.in_order(figures.values)
        ],
        [
            (name, "–" if recall is None else words.number(recall))
            for name, recall in zip(names, figures.recalls, strict=False)
        ]
        if len(figures.recalls) > 2
        else [],
    )


def _threshold(experiment: Experiment) -> tuple[float, str | None]:
    """The probability from which the last of two classes is predicted, and its name."""
    schema, evaluation = experiment.data.agreed, experiment.evaluation
    classes = schema.classes if schema is not None else ()
    return evaluation.threshold if evaluation is not None else 0.5, classes[-1] if classes else None


def _clip(history: History) -> Sequence[tuple[str, str]]:
    """How the clip went, where it is adaptive."""
    clips = [record.clip for record in history.rounds if record.clip is not None]
    if not clips:
        return []
    return [("Clip, first to last round", f"{words.number(clips[0])} to {words.number(clips[-1])}")]


def _thresholds(history: History, sites: int) -> Sequence[tuple[str, str]]:
    """Who may collude, who must be in a sum, and how many may vanish, where masks hide updates."""
    experiment = history.experiment
    if not PROTOCOLS[experiment.protocol.name].masked:
        return []
    agreed = agreement.thresholds(experiment, sites)
    return [
        ("May collude with the server", f"{experiment.protocol.colluding_sites} of {sites} sites"),
        ("A sum counts at least", f"{agreed.minimum} sites"),
        ("May vanish from a round", f"{sites - agreed.minimum} of {sites} sites"),
    ]


def _spending(summary: Summary) -> Sequence[tuple[str, str]]:
    """(epsilon, the sites that spent it), the highest first."""
    groups: dict[str, list[str]] = {}
    for site in sorted(summary.epsilon, key=lambda site: -summary.epsilon[site]):
        groups.setdefault(words.rounded_up(summary.epsilon[site]), []).append(site)
    return [(spent, ", ".join(sites)) for spent, sites in groups.items()]


def _dropouts(summary: Summary) -> Sequence[tuple[str, str, str]]:
    """(site, reason, rounds), in the order of the sites."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for number, gone in summary.dropouts.items():
        for site, reason in gone.items():
            rounds.setdefault((site, reason), []).append(int(number))
    return [(site, why, words.ranges(rounds[site, why])) for site, why in sorted(rounds)]
