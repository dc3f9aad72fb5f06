"""The plots of a report: one vector picture each, by round, with units on every axis."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from securefl.records import EvaluationRecord, RoundRecord
from securefl.report import words

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B59F00", "#555555")
INK = "#33414e"
RED = "#b3261e"
STYLE: dict[Any, Any] = {  # matplotlib lists its keys in a Literal of its own version
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.formatter.useoffset": False,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#9aa5b1",
    "ytick.color": "#9aa5b1",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.fonttype": "path",
    "svg.hashsalt": "securefl",  # the same run gives the same bytes
    "text.parse_math": False,
}
_FEW = 40  # rounds up to which single points and bars can still be told apart
_SIZE = (5.6, 3.1)  # inches


@dataclass(frozen=True)
class Plot:
    """A finished picture: `source` is a data URI of an SVG, `alt` tells it to who cannot see it."""

    title: str
    caption: str
    alt: str
    source: str


def plots(
    rounds: Sequence[RoundRecord], budget: float | None = None, *, metrics: bool = True
) -> list[Plot]:
    """Every plot that these rounds can fill; none for no rounds.

    `budget` is the epsilon that the plan allows each site. Without `metrics` figures of merit are
    left out: `evaluation_plots` draws those from sums over the sites.
    """
    if not rounds:
        return []
    drawn: list[Plot | None] = []
    with mpl.rc_context(STYLE):
        drawn += _metrics(rounds) if metrics else []
        drawn.append(_epsilon(rounds, budget))
        drawn.append(_clip(rounds))
        drawn.append(_sparsity(rounds))
        drawn.append(
            _by_phase(
                rounds,
                lambda record: record.bytes_up,
                title="Bytes up, by phase",
                axis="all sites",
                caption="What all sites together sent to the server in each round.",
            )
        )
        drawn.append(
            _by_phase(
                rounds,
                lambda record: record.bytes_down,
                title="Bytes down, by phase",
                axis="all sites",
                caption="What the server sent to all sites together in each round.",
            )
        )
        drawn.append(
            _by_phase(
                rounds,
                lambda record: record.seconds,
                title="Time, by phase",
                axis="",
                caption="Wall-clock time of each phase. “upload” includes the local training.",
            )
        )
    return [plot for plot in drawn if plot is not None]


def evaluation_plots(
    evaluations: Sequence[EvaluationRecord], threshold: float = 0.5, positive: str | None = None
) -> list[Plot]:
    """Every plot that evaluations at the sites can fill; none for no evaluations.

    ROC curve and calibration are of the last one. `threshold`: the probability from which the
    class `positive` is predicted, where there are two.
    """
    if not evaluations:
        return []
    with mpl.rc_context(STYLE):
        drawn = [
            _roc(evaluations[-1], threshold),
            _calibration(evaluations[-1], positive),
            *(_learning(evaluations, keys) for keys in _PANELS),
        ]
    return [plot for plot in drawn if plot is not None]


_PANELS = (
    ("test_auc", "test_accuracy", "test_balanced_accuracy"),
    ("test_r2",),
    ("test_rmse", "test_mae"),
    ("test_loss",),
)


def _roc(evaluation: EvaluationRecord, threshold: float) -> Plot | None:
    figures = evaluation.figures
    if not figures.roc:
        return None
    figure, axes = _unit_square()
    area = figures.values.get("test_auc")
    told = "ROC curve" if area is None else f"AUC {words.number(area)}"
    marker = "o" if len(figures.roc) <= _FEW else ""
    axes.plot(*zip(*figures.roc, strict=True), marker=marker, clip_on=False, label=told)
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linestyle="--", linewidth=1.2, label="chance")
    alt = f"ROC curve from sums over the sites; {told}."
    sensitivity, specificity = (
        figures.values.get(f"test_{key}") for key in ("sensitivity", "specificity")
    )
    if sensitivity is not None and specificity is not None:
        at = f"at the threshold {threshold:g}"
        axes.plot(
            1 - specificity,
            sensitivity,
            "o",
            color=COLOURS[5],
            markersize=8,
            clip_on=False,
            label=at,
        )
        alt += f" Sensitivity {words.number(sensitivity)}, specificity "
        alt += f"{words.number(specificity)} {at}."
    axes.set_xlabel("false positive rate (1 − specificity)")
    axes.set_ylabel("sensitivity")
    axes.legend(loc="lower right")
    return finish(
        figure,
        "ROC curve",
        "What share of the last class is recognised, against the share of the other class that is "
        "mistaken for it, for every threshold. All sites' test rows together.",
        alt,
    )


def _calibration(evaluation: EvaluationRecord, positive: str | None) -> Plot | None:
    groups = evaluation.figures.calibration
    if not groups:
        return None
    figure, axes = _unit_square()
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linestyle="--", linewidth=1.2, label="calibrated")
    predicted, observed, rows = (np.array(column) for column in zip(*groups, strict=True))
    axes.plot(predicted, observed, color=COLOURS[0], linewidth=1.0)
    sizes = 12 + 150 * rows / rows.max()
    axes.scatter(
        predicted,
        observed,
        sizes,
        color=COLOURS[0],
        alpha=0.75,
        linewidth=0,
        zorder=3,
        clip_on=False,
        label="test rows, larger where more",
    )
    two = len(evaluation.figures.recalls) == 2
    of = (f"“{positive}”" if positive else "the last class") if two else "the likeliest class"
    axes.set_xlabel(f"predicted probability of {of}")
    axes.set_ylabel("observed share" if two else "share that is right")
    axes.legend(loc="lower right")
    pairs = "; ".join(f"{words.number(p)}: {words.number(o)}" for p, o, _ in groups)
    return finish(
        figure,
        "Calibration",
        "Of the rows with about the same predicted probability, the share for which it came true. "
        "Points above the line: the model says too little.",
        f"Observed share by predicted probability of {of}: {pairs}.",
    )


def _learning(evaluations: Sequence[EvaluationRecord], keys: Sequence[str]) -> Plot | None:
    """Figures by round with their intervals as bands; None for fewer than two evaluations."""
    told = [key for key in keys if sum(key in e.figures.values for e in evaluations) > 1]
    if not told:
        return None
    figure, axes = _canvas(evaluations)
    for key, colour in zip(told, COLOURS, strict=False):
        known = [e for e in evaluations if key in e.figures.values]
        x = [e.round for e in known]
        low, high = zip(*(e.figures.intervals[key] for e in known), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(known) <= _FEW else ""
        axes.plot(x, [e.figures.values[key] for e in known], marker=marker, color=colour)
        axes.lines[-1].set_label(words.metric_name(key))
    if len(told) > 1:
        _legend(axes)
    axes.set_ylabel(_UNITS.get(told[0], "from 0 to 1"))
    first, *others = (words.metric_name(key) for key in told)
    title = words.listed([first, *(name.removeprefix("test ") for name in others)])
    runs = "; ".join(
        f"{words.metric_name(key)} from "
        f"{_first_to_last([e.figures.values.get(key) for e in evaluations])}"
        for key in told
    )
    return finish(
        figure,
        words.sentence_case(title),
        "On all sites' test rows, from sums over the sites. The band is the 95 % interval.",
        f"By round: {runs}.",
    )


def _unit_square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], 1.3 * _SIZE[1]), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    return figure, axes


_UNITS = {
    "test_mse": "squared units of the target",
    "test_rmse": "units of the target",
    "test_mae": "units of the target",
    "test_r2": "share of variance explained",
    "test_loss": "mean loss a record",
}


def _metrics(rounds: Sequence[RoundRecord]) -> list[Plot]:
    """Figures of merit: those on the scale from 0 to 1 together, the others on their own."""
    keys = words.in_order({key: 0.0 for record in rounds for key in record.metrics})
    shares = [key for key in keys if key in ("test_accuracy", "test_auc")]
    panels = [shares] if shares else []
    panels += [[key] for key in keys if key not in shares]
    made = []
    for panel in panels:
        figure, axes = _canvas(rounds)
        for key in panel:
            _line(axes, rounds, [r.metrics.get(key, math.nan) for r in rounds])
            axes.lines[-1].set_label(words.metric_name(key))
        if len(panel) > 1:
            _legend(axes)
        _mark_aborted(axes, rounds)
        axes.set_ylabel(
            "fraction of held-out records" if panel == ["test_accuracy"] else "from 0 to 1"
        )
        if panel is not shares:
            axes.set_ylabel(_UNITS.get(panel[0], words.metric_name(panel[0])))
        title = " and ".join(words.metric_name(key) for key in panel)
        told = "; ".join(
            f"{words.metric_name(key)} from {_first_to_last([r.metrics.get(key) for r in rounds])}"
            for key in panel
        )
        made.append(
            finish(
                figure,
                words.sentence_case(title),
                "On the rows held out of training."
                + (" A gap is a round with no finite figure." if _gaps(axes) else ""),
                f"By round: {told}.",
            )
        )
    return made


def _epsilon(rounds: Sequence[RoundRecord], budget: float | None) -> Plot | None:
    sites = list(dict.fromkeys(site for record in rounds for site in record.epsilon))
    if not sites:
        return None
    curves: dict[tuple[float, ...], list[str]] = {}
    for site in sites:
        spent = [0.0]
        for record in rounds:
            spent.append(record.epsilon.get(site, spent[-1]))  # what is spent stays spent
        curves.setdefault(tuple(spent[1:]), []).append(site)
    figure, axes = _canvas(rounds)
    highest = max(curves, key=lambda curve: curve[-1])
    if len(curves) <= len(COLOURS):
        for curve, named in curves.items():
            _line(axes, rounds, curve)
            axes.lines[-1].set_label(_site_label(named, len(sites)))
    else:
        table = np.array(list(curves))
        if len(rounds) == 1:
            axes.vlines(rounds[0].round, table.min(), table.max(), color=COLOURS[4], linewidth=6)
        x = [record.round for record in rounds]
        axes.fill_between(x, table.min(0), table.max(0), color=COLOURS[4], alpha=0.35, linewidth=0)
        axes.collections[-1].set_label(f"lowest to highest of {len(sites)} sites")
        _line(axes, rounds, highest)
        axes.lines[-1].set_label(f"highest at the end: {_site_label(curves[highest], len(sites))}")
    if budget is not None:
        axes.axhline(budget, color=RED, linestyle="--", linewidth=1.2)
        axes.lines[-1].set_label(f"allowed by the plan: {words.rounded_up(budget)}")
    _mark_aborted(axes, rounds)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("epsilon spent so far (no unit)")
    _legend(axes)
    return finish(
        figure,
        "Privacy spent, by site",
        "Epsilon spent since the first round; lower is more private. "
        "Aborted rounds are charged too.",
        f"Epsilon by round at {len(sites)} sites; the highest ends at "
        f"{words.rounded_up(highest[-1])}.",
    )


def _clip(rounds: Sequence[RoundRecord]) -> Plot | None:
    clips = [record.clip for record in rounds]
    known = [clip for clip in clips if clip is not None]
    if not known:
        return None
    figure, axes = _canvas(rounds)
    _line(axes, rounds, [math.nan if clip is None else clip for clip in clips])
    if max(known) > 2 * min(known):
        axes.set_yscale("log")
    axes.set_ylabel("L2 norm")
    return finish(
        figure,
        "Clip",
        "The norm to which each gradient or update was clipped. It follows a quantile of their "
        "norms, which is a part of what the privacy plan covers.",
        f"The clip by round, from {_first_to_last(known)}.",
    )


def _sparsity(rounds: Sequence[RoundRecord]) -> Plot:
    figure = Figure(figsize=(_SIZE[0], _SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _line(upper, rounds, [100 * record.sparsity for record in rounds])
    upper.set_ylabel("zero weights (%)")
    upper.set_ylim(-3, 103)
    uploads = [[float(n) for n in r.upload_bytes.values()] or [math.nan] for r in rounds]
    unit, scale = words.size_unit(
        max((max(u) for u in uploads if not math.isnan(u[0])), default=0.0)
    )
    means = [sum(u) / len(u) / scale for u in uploads]
    low, high = ([f(u) / scale for u in uploads] for f in (min, max))
    if low != high:
        x = [record.round for record in rounds]
        lower.fill_between(x, low, high, color=COLOURS[4], alpha=0.35, linewidth=0)
    _line(lower, rounds, means)
    lower.set_ylabel(f"upload a site ({unit})")
    lower.set_ylim(bottom=0)
    _round_axis(lower, rounds)
    figure.align_ylabels()
    told = _first_to_last([m * scale for m in means], words.size)
    return finish(
        figure,
        "Sparsity and upload",
        "Above: the share of the model pruned after each round. Below: the upload message of a "
        "site, mean over sites"
        + ("; the band spans the sites." if low != high else ".")
        + " A round uploads what the rounds before it left.",
        f"Sparsity from {_first_to_last([r.sparsity for r in rounds], words.percent)}; "
        f"upload of a site from {told}.",
    )


def _by_phase(
    rounds: Sequence[RoundRecord],
    amounts: Callable[[RoundRecord], Mapping[str, float]],
    *,
    title: str,
    axis: str,
    caption: str,
) -> Plot | None:
    """Stacked amounts by phase; `axis` empty means seconds, else bytes and over whom."""
    phases = list(dict.fromkeys(phase for record in rounds for phase in amounts(record)))
    if not phases:
        return None
    table = np.array([[float(amounts(r).get(phase, 0)) for r in rounds] for phase in phases])
    told = words.size if axis else words.duration
    total = table.sum()
    unit, scale = words.size_unit(float(table.sum(0).max())) if axis else ("seconds", 1.0)
    figure, axes = _canvas(rounds)
    x = np.array([record.round for record in rounds])
    # A phase has one colour in every plot.
    known = dict.fromkeys(k for r in rounds for k in (*r.bytes_up, *r.bytes_down, *r.seconds))
    palette = dict(zip(known, itertools.cycle(COLOURS), strict=False))
    colours = [palette[phase] for phase in phases]
    if len(rounds) <= _FEW:
        floor = np.zeros(len(rounds))
        for row, phase, colour in zip(table / scale, phases, colours, strict=True):
            axes.bar(x, row, 0.8, floor, color=colour, label=phase, linewidth=0)
            floor += row
    else:
        axes.stackplot(x, table / scale, labels=phases, colors=colours, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit} a round" + (f", {axis}" if axis else ""))
    _legend(axes)
    shares = ", ".join(
        f"{phase} {told(float(row.sum()))}" for phase, row in zip(phases, table, strict=True)
    )
    return finish(
        figure,
        title,
        f"{caption} Over the run: {told(float(total))}.",
        f"By round and phase; over the run {shares}.",
    )


def _canvas(rounds: Sequence[RoundRecord | EvaluationRecord]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    _round_axis(axes, rounds)
    return figure, axes


def _round_axis(axes: Axes, rounds: Sequence[RoundRecord | EvaluationRecord]) -> None:
    first, last = rounds[0].round, rounds[-1].round
    margin = max(0.6, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("round")


def _line(axes: Axes, rounds: Sequence[RoundRecord], values: Sequence[float]) -> None:
    marker = "o" if len(rounds) <= _FEW else ""
    finite = [value if math.isfinite(value) else math.nan for value in values]
    axes.plot([record.round for record in rounds], finite, marker=marker, clip_on=False)


def _mark_aborted(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    first = rounds[0].round
    lost = [n for record in rounds for n in record.aborted if n >= first - 0.6]
    if lost:
        axes.plot(
            lost,
            [0.03] * len(lost),
            "x",
            color=RED,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="aborted round",
        )
        _legend(axes)


def _legend(axes: Axes) -> None:
    """A legend above the axes, where it hides no point."""
    _, labels = axes.get_legend_handles_labels()
    width = max(map(len, labels)) + 5  # in letters, the line before the text included
    columns = max(1, min(len(labels), 72 // width))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _gaps(axes: Axes) -> bool:
    return any(np.isnan(np.asarray(line.get_ydata(), dtype=float)).any() for line in axes.lines)


def _site_label(named: Sequence[str], of: int) -> str:
    if len(named) == 1:
        return named[0]
    return f"all {of} sites" if len(named) == of else f"{named[0]} and {len(named) - 1} more"


def _first_to_last(
    values: Sequence[float | None], told: Callable[[float], str] = words.number
) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{told(known[0])} to {told(known[-1])}" if known else "nothing to nothing"


def finish(figure: Figure, title: str, caption: str, alt: str) -> Plot:
    """`figure`, drawn under `STYLE`, as a picture: the same one gives the same bytes."""
    drawing = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Figure.savefig draws the same twice: once to lay it out, and once into the file.
    FigureCanvasSVG(figure).print_svg(drawing, metadata=metadata)  # type: ignore[no-untyped-call]
    # An <img> keeps each drawing's identifiers and styles to itself, and has an alternative text.
    source = "data:image/svg+xml;base64," + base64.b64encode(drawing.getvalue()).decode()
    return Plot(title, caption, alt, source)
