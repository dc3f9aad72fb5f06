"""The words and figures of a report: claims and numbers as people read them.

What is claimed is rounded against the claimant: an epsilon is rounded up, never down.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext

from protocols.graph import SPARSE_ABOVE
from securefl.config import Encryption
from securefl.privacy.ledger import RunStanding, Standing
from securefl.records import RoundRecord, Summary
from securefl.tallies import LOSS_CAP

_NAMES = {
    "test_accuracy": "test accuracy",
    "test_accuracy_mean_of_sites": "test accuracy, mean of the sites",
    "test_r2": "test R²",
    "test_auc": "test AUC",
    "test_balanced_accuracy": "test balanced accuracy",
    "test_sensitivity": "test sensitivity",
    "test_specificity": "test specificity",
    "test_average_precision": "test average precision",
    "test_brier": "test Brier score",
    "test_calibration_error": "test calibration error",
    "test_rmse": "test root mean squared error",
    "test_mae": "test mean absolute error",
    "test_mse": "test mean squared error",
    "test_bias": "test mean error",
    "test_loss": "test loss",
}  # the most telling first

MEANINGS: Mapping[str, str] = {
    "test_accuracy": "the share of records whose class is predicted",
    "test_r2": "the share of the target's variance that is explained",
    "test_auc": "the chance that a record of the last class is ranked above one of the first",
    "test_balanced_accuracy": "the mean over classes of the share that is recognised",
    "test_sensitivity": "the share of the last class that is recognised",
    "test_specificity": "the share of the first class that is recognised",
    "test_average_precision": "the mean precision over all records of the last class, from the "
    "highest score down",
    "test_brier": "the squared distance of the predicted probabilities from the truth; 0 is best",
    "test_calibration_error": "how far predicted probabilities are from observed shares, mean over "
    "records; chance alone raises it",
    "test_rmse": "the root of the mean squared error",
    "test_mae": "the mean size of an error",
    "test_mse": "the mean square of an error",
    "test_bias": "the mean error: above 0 the model says too much",
    "test_loss": f"the mean loss, no record's counted above {LOSS_CAP:g}",
}
"""What each figure from sums over the sites is."""


@dataclass(frozen=True)
class Guarantee:
    """What a protocol hides, from whom."""

    layers: str
    story: str
    stops: str
    fails: str


GUARANTEES: Mapping[str, Guarantee] = {
    "plain": Guarantee(
        layers="integer encoding only",
        story="The server read the update of every site in the clear. This protocol is a yardstick "
        "for tests; it hides nothing.",
        stops="Nothing.",
        fails="Everything: the server, and whoever reads its memory or its wire, "
        "sees each site's update.",
    ),
    "bfv": Guarantee(
        layers="integer encoding, BFV encryption",
        story="Each site encrypted its update before it left the site. The server added "
        "ciphertexts it holds no key for; only the sum over the sites was ever opened, by a site, "
        "once a round.",
        stops="A server that follows the protocol, reads all it gets, and colludes with no site. "
        "The sum is exact.",
        fails="A site that colludes with the server: every site holds the same key, "
        "so together they can open any single update. An active server: it can have a site open a "
        "sum of its choice, and the sum it announces has no integrity.",
    ),
    "ckks": Guarantee(
        layers="integer encoding, CKKS encryption, noise that floods its error",
        story="Each site encrypted its update before it left the site. The server added "
        "ciphertexts it holds no key for; only the sum over the sites was ever opened, by a site, "
        "once a round, under noise that hides what a decryption tells of the key, and rounded.",
        stops="A server that follows the protocol, reads all it gets, and colludes with no site. "
        "The sum is exact, except with probability 2^-64 a round.",
        fails="As bfv: a site that colludes with the server opens any single update, and an active "
        "server has a site open a sum of its choice.",
    ),
    "secagg": Guarantee(
        layers="integer encoding, masks",
        story="Each site hid its update under masks that cancel in the sum. The server added what "
        "it could not read, and enough sites together took off the masks that were left.",
        stops="A server, even an active one, with up to the tolerated number of colluding sites: "
        "they learn the sum over the other sites, and nothing else of an update.",
        fails="What the sum itself tells (differential privacy is for that); sums over different "
        "sites in different rounds can be subtracted. Against an active server the sum has no "
        "integrity.",
    ),
    "masked-bfv": Guarantee(
        layers="integer encoding, masks, BFV encryption",
        story="Each site hid its update under masks that cancel in the sum, and encrypted the "
        "result. The server added ciphertexts; enough sites together took off the masks that were "
        "left; a site opened the sum, once a round. No single secret opens an update.",
        stops="As secagg. A leaked encryption key opens sums only, broken masks leave the "
        "encryption, and the server opens nothing by itself.",
        fails="As secagg; and the site that opens can announce another sum.",
    ),
}


REVEALED_TO_SITES = Guarantee(
    layers="integer encoding, masks, BFV encryption; the sum revealed to the sites only",
    story="Each site hid its update under masks that cancel in the sum, and encrypted the result. "
    "The server added ciphertexts; enough sites together took off the masks that were left; every "
    "site opened the sum and kept it, and moved its own copy of the model. The server saw neither "
    "a sum nor the model.",
    stops=f"{GUARANTEES['masked-bfv'].stops} A server that colludes with no site learns of sums "
    "and model only how many weights survive pruning, when training converged, who took part, "
    "sizes and times.",
    fails="As secagg; and one site that colludes with the server shows it the sums and the model.",
)
"""masked-bfv under reveal = "sites"."""


ON_A_RING = (
    "So many sites took part that each masked with some neighbours only: what the masks promise "
    "holds against a server that follows the protocol, not against an active one."
)


def guarantees(protocol: Encryption, sites: int) -> Mapping[str, Guarantee]:
    """What each protocol hides, as an experiment's own settings have it for so many sites."""
    found = dict(GUARANTEES)
    if protocol.reveal == "sites":
        found[protocol.name] = REVEALED_TO_SITES
    if protocol.openers > 1:
        used, count = found[protocol.name], protocol.openers
        found[protocol.name] = replace(
            used,
            story=used.story.replace(", by a site, once a round", f", by {count} sites").replace(
                "a site opened the sum, once a round", f"{count} sites opened the sum"
            )
            + f" Each of the {count} opened it by itself, and all had to agree on every bit.",
            fails=used.fails.replace(
                "the site that opens can announce", f"all {count} sites that open can announce"
            ),
        )
    if sites > SPARSE_ABOVE and protocol.graph == "auto":
        for name in ("secagg", "masked-bfv"):
            one = found[name]
            stops = one.stops.replace("A server, even an active one,", "A server")
            found[name] = replace(
                one, story=f"{one.story} {ON_A_RING}", stops=f"{stops} {ON_A_RING}"
            )
    return found


MECHANISMS: Mapping[str, str] = {
    "PoissonGaussian": "noise of its own on sampled records",
    "PoissonDiscreteGaussianSum": "integer noise, of which each site adds a share",
    "DiscreteGaussianSum": "integer noise on whole updates, of which each site adds a share",
}
"""What each event of a ledger is, in words."""


def ledger_sentences(standing: Standing) -> tuple[str, ...]:
    """Where a data set stands, in words."""
    spent, unit = standing.spent, standing.unit
    charged = sum(run.charged for run in standing.runs)
    besides = sum(sum(run.released.values()) for run in standing.runs)
    if not charged + besides:
        return ("Nothing was spent: no round was ever charged to this data set.",)
    whose = "site's whole contribution" if unit == "site" else unit
    told = [
        f"Charged: {counted(charged, 'round')}"
        + (f" and {counted(besides, 'other sum')}" if besides else "")
        + f" in {counted(len(standing.runs), 'run')}, with those "
        f"that were aborted: epsilon {rounded_up(spent)} of {standing.epsilon:g}.",
        "What is promised is the budget. Whatever anyone concludes from everything that these and "
        f"all later runs give, one {whose} more or less changes the probability of that conclusion "
        f"by a factor of at most {odds(standing.epsilon)}, apart from a chance of "
        f"{rounded_up(standing.delta)}.",
    ]
    if standing.alone:
        told.append(
            "The data set was given to one run alone, whose plan was fixed before anything was "
            "spent: the figure is that plan's own, and no other run may ever use the data set."
        )
    else:
        told.append(
            "This holds although later runs are chosen by people who know what earlier ones gave: "
            f"costs are added at one order, {standing.order:g}, that was fixed when the first run "
            "was opened. So the count is somewhat above what the runs' own reports say."
        )
    if standing.spent >= standing.epsilon * 0.999:
        told.append("The budget is spent. Any further round is refused.")
    else:
        told.append(
            f"Of the budget of {standing.epsilon:g}, {rounded_down(standing.left)} are left"
            + (", for this run. A " if standing.alone else ". A ")
            + "round that would exceed the budget is refused before a record is read for it."
        )
    return tuple(told)


def run_charges(run: RunStanding) -> str:
    """What a run was charged for, in words."""
    fitted = sum(n for name, n in run.released.items() if name.startswith("statistics"))
    tested = run.released.get("evaluation", 0)
    told = f"{run.charged} of {run.rounds} rounds"
    if fitted:
        told += f", {counted(fitted, 'sum')} of statistics"
    if tested:
        told += f", {counted(tested, 'sum')} of test figures (other records)"
    return f"{told} charged, {MECHANISMS[run.mechanism]}"


def counted(count: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "round"), counted(1200, "round")
    ('1 round', '1,200 rounds')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def claim(summary: Summary) -> str:
    """The privacy of a run in one sentence, fit for a summary table or a heading."""
    if not summary.private:
        return f"NOT PRIVATE: {summary.why_not_private}"
    low, high = min(summary.epsilon.values()), max(summary.epsilon.values())
    spent = (
        f"epsilon {rounded_up(high)} at delta {rounded_up(summary.delta or 0.0)} at every site"
        if rounded_up(low) == rounded_up(high)
        else f"epsilon at most {rounded_up(high)} (from {rounded_up(low)}, by site) "
        f"at delta {rounded_up(summary.delta or 0.0)}"
    )
    return (
        f"Differential privacy: {spent}, {summary.adjacency}, accounted with {summary.accountant}"
    )


def strongest_test(spent: float, delta: float, false_alarms: float = 0.01) -> float:
    """Share of members that the best possible membership test can find under (spent, delta)-DP.

    `false_alarms` is the share of outsiders it wrongly names. Kairouz, Oh and Viswanath 2015,
    theorem 2.1, read as an upper bound.

    >>> round(strongest_test(0.0, 0.0), 6)
    0.01
    """
    grown = math.exp(min(spent, 700.0)) * false_alarms + delta
    return min(1.0, grown, 1 - math.exp(-spent) * (1 - delta - false_alarms))


def odds(spent: float) -> str:
    """The factor exp(spent) to two digits, rounded up.

    >>> odds(4.9), odds(0), odds(50)
    ('140', '1', 'more than a million')
    """
    if spent > math.log(1e6):
        return "more than a million"
    up = Context(prec=2, rounding=ROUND_CEILING).create_decimal(repr(math.exp(spent)))
    return f"{up.normalize():f}"


def rounded_up(value: float) -> str:
    """A privacy loss (an epsilon or a delta) to three digits, rounded up.

    >>> rounded_up(4.9), rounded_up(4.9001), rounded_up(0)
    ('4.9', '4.91', '0')
    """
    up = Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(float(value)))
    return f"{up.normalize():f}" if up else "0"


def rounded_down(value: float) -> str:
    """What is left of a budget, to three digits, rounded down.

    >>> rounded_down(4.8391), rounded_down(0)
    ('4.83', '0')
    """
    down = Context(prec=3, rounding=ROUND_FLOOR).create_decimal(repr(float(value)))
    return f"{down.normalize():f}" if down else "0"


def number(value: float) -> str:
    """A figure to four digits.

    >>> number(0.96491), number(30), number(float("nan"))
    ('0.9649', '30', 'not a number')
    """
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def interval(ends: tuple[float, float]) -> str:
    """Both ends of an interval, rounded outwards to four digits after the point or in all.

    >>> interval((0.78013, 0.82617)), interval((-12.34567, 1.0))
    ('0.7801 to 0.8262', '-12.35 to 1')
    """
    told = []
    for end, rounding in zip(ends, (ROUND_FLOOR, ROUND_CEILING), strict=True):
        figure = Context(prec=4, rounding=rounding).create_decimal(repr(float(end)))
        if abs(end) < 1:
            with localcontext(Context(prec=28, rounding=rounding)):
                figure = Decimal(repr(float(end))).quantize(Decimal("0.0001"))
        told.append(f"{figure.normalize():f}" if figure else "0")
    return " to ".join(told)


def percent(value: float) -> str:
    """A fraction as a percentage, rounded down: it reaches 100 % only when it is 1.

    >>> percent(0.9), percent(0.99996), percent(1)
    ('90 %', '99.9 %', '100 %')
    """
    return f"{math.floor(value * 1000 + 1e-9) / 10:g} %"


def percent_up(value: float) -> str:
    """A fraction as a percentage, rounded up: how a leak is stated.

    >>> percent_up(0.9926), percent_up(0.99996), percent_up(0.3)
    ('99.3 %', '100 %', '30 %')
    """
    return f"{math.ceil(value * 1000 - 1e-9) / 10:g} %"


def size(count: float) -> str:
    """A number of bytes, in powers of ten.

    >>> size(999), size(12_345), size(3_000_000)
    ('999 B', '12.3 kB', '3 MB')
    """
    unit, scale = size_unit(count)
    return f"{count / scale:.3g} {unit}" if scale > 1 else f"{count:.0f} B"


def size_unit(count: float) -> tuple[str, float]:
    """The unit in which `count` bytes read best, and its size."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return unit, scale
    return "B", 1.0


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(0.4214), duration(75), duration(7260)
    ('0.421 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(numbers: Collection[int]) -> str:
    """Whole numbers with runs drawn together.

    >>> ranges([3, 1, 2, 7])
    '1–3, 7'
    """
    runs: list[list[int]] = []
    for value in sorted(set(numbers)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def hidden(summary: Summary) -> tuple[str, str] | None:
    """The figures of a classifier that the noise on few test rows hid, in words; None where none.

    A figure that noise leaves nothing of is absent rather than a guess.
    """
    if not summary.intervals or "test_accuracy" not in summary.metric:
        return None
    wanted = ["test_brier", "test_loss"]
    if "test_sensitivity" in summary.metric or "test_specificity" in summary.metric:
        wanted = ["test_auc", "test_sensitivity", "test_specificity", *wanted]
    lost = [metric_name(key).removeprefix("test ") for key in wanted if key not in summary.metric]
    if not lost:
        return None
    return "hidden by noise", f"{', '.join(lost)}: the test rows are too few for this epsilon"


def figure(summary: Summary, key: str) -> str:
    """A figure of merit, with its 95 % interval where it has one."""
    if key not in summary.intervals:
        return number(summary.metric[key])
    low, high = summary.intervals[key]
    # No more digits than the interval allows.
    width = max(high - low, abs(high) * 1e-4, 1e-12)
    digits = max(0, 1 - math.floor(math.log10(width)))
    told = (f"{value:.{digits}f}" for value in (summary.metric[key], low, high))
    return "{} ({} to {})".format(*told)


def metric_name(key: str) -> str:
    """A test_* key as people say it."""
    return _NAMES.get(key, key.replace("_", " "))


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)


def sentence_case(text: str) -> str:
    """`text` with a capital first letter and the rest as it is.

    >>> sentence_case("test R²")
    'Test R²'
    """
    return text[:1].upper() + text[1:]


def in_order(metrics: Mapping[str, float]) -> list[str]:
    """The keys of `metrics`, the most telling first, the loss last."""
    known = [key for key in _NAMES if key in metrics and key != "test_loss"]
    other = [key for key in metrics if key not in _NAMES]
    return known + other + ["test_loss"] * ("test_loss" in metrics)


def highest_epsilon(record: RoundRecord) -> str:
    """The epsilon of the site that has spent most, or a dash without a plan."""
    return rounded_up(max(record.epsilon.values())) if record.epsilon else "–"
