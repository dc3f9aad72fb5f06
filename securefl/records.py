"""What a run writes down: a line a finished round, a summary at the end, and how to read them.

This is the only definition of the lines of `metrics.jsonl` and of `summary.json`. JSON has no
NaN or infinity: a figure of merit that is not finite (a diverged loss) is written as null and
read as NaN. Everything else must be finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from securefl import config
from securefl.config import ConfigurationError
from securefl.tallies import Figures

EXPERIMENT = "experiment.toml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SITES = "sites.txt"
"""Where the sites of a simulation have folders of their own."""
SUMMARY = "summary.json"
REPORT = "report.html"
MODEL = "model.json"
"""What the weights in model.safetensors are of."""
PREPROCESSING = "preprocessing.json"
"""What preprocessing was fitted to."""
EVALUATIONS = "evaluations.jsonl"
"""Test figures from sums over the sites, a line an evaluation."""

_MERIT = ("metrics", "metric")  # the fields in which null stands for a figure that is not finite


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen value with one JSON form."""

    def to_json(self) -> str:
        """This record as one line of JSON, without a line end."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "record") -> Self:
        """The record written in `text`.

        Raises ConfigurationError that names `where`, the field and what is wrong with it.
        """
        try:
            tree = msgspec.json.decode(text)
            for field in _MERIT:
                if isinstance(tree, dict) and isinstance(tree.get(field), dict):
                    tree[field] = {k: math.nan if v is None else v for k, v in tree[field].items()}
            return msgspec.convert(tree, cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            what = str(error).replace("`", "").replace("$.", "")
            raise ConfigurationError(
                f"{where} is damaged: {what}; restore the file from a copy, or repeat the run"
            ) from None


class RoundRecord(_Record, frozen=True):
    """One finished round: a line of `metrics.jsonl`.

    Raises ValueError for figures that no round can have.
    """

    round: int
    """The round number; it grows, and the gaps are aborted rounds."""
    update: int
    """How many aggregates have been applied, this one included."""
    metrics: dict[str, float]
    """test_* figures on the declared held-out rows."""
    epsilon: dict[str, float]
    """Site -> epsilon spent so far, this round included; empty without a plan."""
    bytes_up: dict[str, int]
    """Phase -> bytes from all sites to the server."""
    bytes_down: dict[str, int]
    """Phase -> bytes from the server to all sites."""
    upload_bytes: dict[str, int]
    """Site -> bytes of its upload message."""
    seconds: dict[str, float]
    """Phase -> seconds; "upload" includes the training."""
    parameters: int
    """Uploaded parameters: those that had survived when the round began."""
    sparsity: float
    """Fraction of the model's parameters that are zero after this round's pruning."""
    survivors: tuple[str, ...]
    """The sites in the aggregate."""
    dropouts: dict[str, str]
    """Site -> why it is not in the aggregate."""
    aborted: tuple[int, ...] = ()
    """Numbers of the rounds aborted since the previous line."""
    clip: float | None = None
    """The L2 clip of this round where it is adaptive: what the rounds before it released."""

    def __post_init__(self) -> None:
        if not 1 <= self.update <= self.round:
            raise ValueError(f"round {self.round} cannot be update {self.update}")
        if self.parameters < 1:
            raise ValueError(f"parameters = {self.parameters}: a round uploads at least one")
        if both := sorted(set(self.survivors) & set(self.dropouts)):
            raise ValueError(f"{', '.join(both)} both survived and dropped out")
        if late := [number for number in self.aborted if not 1 <= number < self.round]:
            raise ValueError(f"round {self.round} lists aborted rounds {late}, which are not past")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip = {self.clip} is not a finite number above 0")
        _check_fraction("sparsity", self.sparsity)
        for name in ("epsilon", "bytes_up", "bytes_down", "upload_bytes", "seconds"):
            _check_amounts(name, getattr(self, name))


class EvaluationRecord(_Record, frozen=True):
    """Test figures from sums over the sites: a line of `evaluations.jsonl`.

    Raises ValueError for what no evaluation can be.
    """

    update: int
    """The model that was tested: how many aggregates had been applied."""
    round: int
    """The number of the evaluation's own round."""
    sites: tuple[str, ...]
    """Whose test rows are in the sums."""
    figures: Figures
    epsilon: float | None = None
    """What the evaluations so far cost a test row (or person); None where nothing protects it."""
    bytes_up: int = 0
    """From all sites to the server."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.update <= self.round:
            raise ValueError(f"round {self.round} cannot have tested update {self.update}")
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError("sites names nobody, or somebody twice")
        if self.epsilon is not None:
            _check_amounts("epsilon", {"the test rows": self.epsilon})


class Summary(_Record, frozen=True):
    """What a run came to: `summary.json`.

    Formal Guarantees: a summary that says `private` has an epsilon for every site, a delta, an
    adjacency and an accountant; one that does not, says why not.
    """

    name: str
    protocol: str
    rounds: int
    """Finished rounds."""
    sites: tuple[str, ...]
    parameters: int
    """Parameters of the dense model."""
    sparsity: float
    metric: dict[str, float]
    """Last test_* figures on the declared held-out rows."""
    private: bool
    why_not_private: str | None
    epsilon: dict[str, float]
    """Site -> epsilon spent over the whole run, aborted rounds included."""
    delta: float | None
    adjacency: str | None
    """What neighbouring data sets differ in, e.g. "add or remove one record"."""
    accountant: str | None
    bytes_up_per_parameter: float
    """Upload message bytes a parameter, last dense round, mean over sites."""
    bytes_up_last_round: int
    bytes_up_total: int
    seconds: dict[str, float]
    """Phase -> seconds over the whole run."""
    dropouts: dict[str, dict[str, str]]
    """Round number (as text) -> site -> reason."""
    aborted_rounds: tuple[int, ...]
    stopped: str
    """Why the run ended: "round budget", "converged", "privacy budget spent", ..."""
    outside_guarantee: tuple[str, ...]
    """Sentences: what was read from private or held-out records outside the plan."""
    version: str
    epsilon_public: float | None = None
    """Against whoever sees only the released models, where that is another figure."""
    intervals: dict[str, tuple[float, float]] = {}
    """95 % intervals of figures in `metric` that come from sums over the sites."""
    trained_on: float | None = None
    """Training records (or people) of all sites, as preprocessing counted them."""
    counted: Literal["records", "people"] = "records"
    """What `trained_on` counts."""
    canaries: int = 0
    """Candidates of an audit at every site, about half of which it trained on besides."""

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.parameters < 1:
            raise ValueError(f"rounds = {self.rounds}, parameters = {self.parameters}: no such run")
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError("sites names nobody, or somebody twice")
        _check_fraction("sparsity", self.sparsity)
        _check_amounts("epsilon", self.epsilon)
        _check_amounts("seconds", self.seconds)
        for name in ("bytes_up_per_parameter", "bytes_up_last_round", "bytes_up_total"):
            _check_amounts(name, {name: getattr(self, name)})
        if strangers := sorted(set(self.epsilon) - set(self.sites)):
            raise ValueError(f"epsilon names {', '.join(strangers)}, not among the sites")
        if not all(number.isdecimal() for number in self.dropouts):
            raise ValueError("dropouts has a key that is not a round number")
        if not self.private:
            if not self.why_not_private:
                raise ValueError("a run that is not private must say why_not_private")
            return
        if self.why_not_private is not None:
            raise ValueError(f"private, yet why_not_private says {self.why_not_private!r}")
        if missing := [site for site in self.sites if site not in self.epsilon]:
            raise ValueError(f"private, but no epsilon for {', '.join(missing)}")
        if self.delta is None or not 0 < self.delta < 1:
            raise ValueError(f"private, but delta = {self.delta}")
        if not self.adjacency or not self.accountant:
            raise ValueError("private, but adjacency or accountant is not said")


@dataclass(frozen=True)
class History:
    """What a run directory tells; `summary` is None while the run is unfinished.

    The figures of `evaluations` stand in the metrics of their rounds as well.
    """

    directory: Path
    experiment: config.Experiment
    rounds: tuple[RoundRecord, ...]
    summary: Summary | None
    evaluations: tuple[EvaluationRecord, ...] = ()


def read_history(directory: Path) -> History:
    """The experiment, finished rounds, evaluations and summary in the run directory `directory`.

    A last line of `metrics.jsonl` without its line end was cut short by a kill: that round never
    finished, so it is left out, and so are evaluations of it. Of two evaluations of one update,
    which an interrupted run may have repeated, the later counts.

    Raises ConfigurationError for a folder that is no run directory or holds a damaged file.
    """
    if not (directory / EXPERIMENT).is_file():
        raise ConfigurationError(
            f"{directory} is not a run directory (it has no {EXPERIMENT}): "
            "give the folder that `securefl run` printed"
        )
    summary = _read(directory / SUMMARY)
    where = str(directory / SUMMARY)
    rounds = tuple(_rounds(directory / METRICS))
    updates = {record.update for record in rounds}
    evaluations = {
        record.update: record
        for record in _evaluations(directory / EVALUATIONS)
        if record.update in updates
    }
    return History(
        directory=directory,
        experiment=config.load(directory / EXPERIMENT),
        rounds=tuple(_with_figures(record, evaluations.get(record.update)) for record in rounds),
        summary=Summary.from_json(summary, where) if summary is not None else None,
        evaluations=tuple(evaluations.values()),
    )


def _with_figures(record: RoundRecord, evaluation: EvaluationRecord | None) -> RoundRecord:
    if evaluation is None:
        return record
    metrics = record.metrics | evaluation.figures.values
    return msgspec.structs.replace(record, metrics=metrics)


def _rounds(path: Path) -> Iterable[RoundRecord]:
    last = 0
    for where, line in _lines(path):
        record = RoundRecord.from_json(line, where)
        if record.round <= last:
            raise _disorder(where, f"round {record.round} after round {last}")
        last = record.round
        yield record


def _evaluations(path: Path) -> Iterable[EvaluationRecord]:
    last = 0
    for where, line in _lines(path):
        record = EvaluationRecord.from_json(line, where)
        if record.update < last:
            raise _disorder(where, f"update {record.update} after update {last}")
        last = record.update
        yield record


def _lines(path: Path) -> Iterable[tuple[str, bytes]]:
    """Where each finished line of `path` stands, and the line; none where there is no file."""
    for number, line in enumerate((_read(path) or b"").split(b"\n")[:-1], start=1):
        yield f"{path} line {number}", line


def _disorder(where: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} is damaged: {what}; restore the file from a copy, or repeat the run"
    )


def _read(path: Path) -> bytes | None:
    """The bytes of `path`, or None when it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; make the file readable"
        ) from None


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value} is not between 0 and 1")


def _check_amounts(name: str, amounts: Mapping[str, Any]) -> None:
    for key, value in amounts.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} of {key} = {value} is not a finite number of at least 0")
