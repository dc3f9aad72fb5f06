"""The audit as a page: `audit.html`, made of `audit.json` alone.

Self-contained, without scripts, printable on A4. Every sentence with a number in it is made here or
in the template from the audit's figures. The same audit gives the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from attacks.attack import AttackResult, Curve
from attacks.audit import Audit, Row, Verdict
from securefl import store
from securefl.report import environment, plots, words
from securefl.report.plots import Plot

PAGE: Final = "audit.html"

VERDICTS: Final[Mapping[Verdict, str]] = {
    "contradicted": "The claim does not hold",
    "broken": "Broken; no claim says otherwise",
    "within the claim": "Something shows, within the claim",
    "this attack fails": "This attack fails",
    "proved": "Excluded by an argument; nothing found",
    "not assessed": "Not assessed",
    "no conclusion": "No conclusion",
}
"""Each verdict in words: never more than was shown."""


def write(folder: Path, audit: Audit) -> Path:
    """Write audit.html beside audit.json; return its path."""
    path = folder / PAGE
    store.write(path, render(audit).encode())
    return path


def render(audit: Audit) -> str:
    """The page."""
    with mpl.rc_context(plots.STYLE):
        pictures = {row.attack: picture for row in audit.rows if (picture := _picture(row))}
    return (
        environment("attacks")
        .get_template("audit.html")
        .render(
            audit=audit,
            assessed=[_Told.of(row) for row in audit.rows if row.results],
            claims=_claims(audit),
            missing=[row for row in audit.rows if not row.results],
            pictures=pictures,
            headline=headline(audit),
            findings=hashlib.sha256(audit.to_bytes()).hexdigest(),
            tone="bad" if audit.alarms else "warn" if audit.broken or not audit.private else "",
            number=words.number,
            verdicts=VERDICTS,
            guarantee=_guarantee(audit),
            chance=_share(audit.level),
            level=f"{audit.level / audit.tests:.2g}" if audit.tests else "",
        )
    )


def headline(audit: Audit) -> str:
    """What the audit came to, in one sentence."""
    done = sum(1 for row in audit.rows if row.results)
    if audit.alarms:
        claims = len({row.claim for row in audit.rows if row.verdict == "contradicted"})
        count = words.counted(claims, "claim")
        return f"{count} of this run {'does' if claims == 1 else 'do'} not hold"
    if audit.broken:
        count = words.counted(len(audit.broken), "attack")
        held = "; no claim was contradicted" if audit.tests else ""
        return f"{count} succeeded where nothing is claimed{held}"
    if not audit.tests:
        return f"No claim was tested; {words.counted(done, 'attack')} tried"
    claims = len({row.claim for row in audit.rows if row.level is not None})
    told = f"{words.counted(done, 'attack')} tried on {words.counted(claims, 'claim')}"
    return f"{told}: {'it was not' if claims == 1 else 'none was'} contradicted"


def _claims(audit: Audit) -> list[list[_Told]]:
    """What was assessed, the rows of one claim together; contradicted ones first."""
    told: dict[tuple[bool, str, str], list[_Told]] = {}
    for row in audit.rows:
        if row.results:
            told.setdefault((row.made, row.claim, row.assumption), []).append(_Told.of(row))
    groups = sorted(
        told.values(), key=lambda rows: all(item.row.verdict != "contradicted" for item in rows)
    )
    return [_one_cell_an_adversary(rows) for rows in groups]


def _one_cell_an_adversary(rows: list[_Told]) -> list[_Told]:
    """`rows` with those of one adversary together, and how many rows its cell spans."""
    order = list(dict.fromkeys(item.adversary for item in rows))
    together = sorted(rows, key=lambda item: order.index(item.adversary))
    spans = [sum(x.adversary == item.adversary for x in rows) for item in together]
    first = [i == 0 or together[i - 1].adversary != x.adversary for i, x in enumerate(together)]
    return [
        replace(item, adversaries=span if begins else 0)
        for item, span, begins in zip(together, spans, first, strict=True)
    ]


@dataclass(frozen=True)
class _Told:
    """A row in words."""

    row: Row
    claim: str
    adversary: str
    assumption: str
    verdict: str
    evidence: str
    baseline: str
    interval: str
    n: str
    limit: str
    figures: Sequence[tuple[str, str, str, str, str]]
    controls: Sequence[tuple[str, str, str]]
    notes: Sequence[str]
    adversaries: int = 1
    """Rows that the adversary's cell spans; 0 where one above spans this one."""

    @classmethod
    def of(cls, row: Row) -> _Told:
        first = row.results[0]
        return cls(
            row=row,
            claim=words.sentence_case(row.claim).removesuffix("."),
            adversary=words.sentence_case(row.adversary),
            assumption=words.sentence_case(row.assumption).removesuffix("."),
            verdict=VERDICTS[row.verdict],
            evidence=f"{words.sentence_case(first.metric)} {_figure(first.value)}",
            baseline=_figure(first.baseline),
            interval=_interval(first),
            n=f"{first.n:,}",
            limit=words.sentence_case(row.limit).removesuffix("."),
            figures=[
                (r.metric, _figure(r.value), _interval(r), _figure(r.baseline), f"{r.n:,}")
                for r in row.results
            ],
            controls=[
                (
                    told,
                    f"{control.results[0].metric} {_figure(control.results[0].value)}",
                    "succeeds" if control.succeeded else "finds nothing",
                )
                for told, control in (
                    ("Without any defence", row.undefended),
                    ("Where there is nothing to find", row.no_signal),
                )
                if control is not None
            ],
            notes=[f"{words.sentence_case(note).removesuffix('.')}." for note in row.notes],
        )


def _figure(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "unbounded"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def _interval(result: AttackResult) -> str:
    interval = result.interval
    if interval is None:
        return "–"
    told = f"{_figure(interval.low)} to {_figure(interval.high)}"
    return told if interval.confidence == 0.95 else f"{told} ({_share(interval.confidence)})"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _guarantee(audit: Audit) -> str:
    """The promise that the audit tests, in a sentence."""
    if not audit.private or not audit.epsilon:
        return "NOT PRIVATE: no privacy is promised of this run."
    spent = words.rounded_up(max(audit.epsilon.values()))
    delta = words.rounded_up(audit.delta or 0.0)
    return f"By its plan the run spent epsilon {spent} at delta {delta} on each {audit.unit}."


def _picture(row: Row) -> Plot | None:
    """The run beside its controls; ROC curves on log axes."""
    parts: list[tuple[str, Sequence[Curve]]] = [("this run", row.curves)]
    if row.undefended is not None:
        parts.append(("without any defence", row.undefended.curves))
    if row.no_signal is not None:
        parts.append(("nothing to find", row.no_signal.curves))
    drawn = [(told, curve) for told, curves in parts for curve in curves]
    if not row.curves:
        return None
    figure = Figure(figsize=(5.0, 3.9), layout="constrained")
    axes = figure.add_subplot()
    roc = row.curves[0].kind == "roc"
    for number, (told, curve) in enumerate(drawn):
        label = told if len({c.label for _, c in drawn}) == 1 else f"{told}: {curve.label}"
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        x, y = np.array(curve.x), np.array(curve.y)
        if curve.kind == "roc":  # left of 1/n nothing was measured
            seen = x > 0
            axes.plot(x[seen], y[seen], drawstyle="steps-post", label=label, color=colour)
        elif curve.kind == "histogram":
            axes.step(x, y, where="mid", label=label, color=colour)
        else:
            axes.plot(x, y, label=label, color=colour)
    if roc:
        least = min(min((x for x in c.x if x > 0), default=0.1) for _, c in drawn) / 2
        line = np.geomspace(least, 1, 50)
        axes.plot(line, line, color="#9aa5b1", linestyle=":", label="a coin")
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.05))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda rate, _: _share(rate)))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("false-positive rate")
        axes.set_ylabel("true-positive rate")
    else:
        axes.set_xlabel(row.curves[0].label)
        axes.set_ylabel("share" if row.curves[0].kind == "histogram" else "")
    axes.legend(loc="best")
    caption = "Higher is a stronger attack; the dotted line is a coin's." if roc else row.title
    alt = f"{row.title}: {row.results[0].metric} {_figure(row.results[0].value)}"
    return plots.finish(figure, row.title, caption, alt)
