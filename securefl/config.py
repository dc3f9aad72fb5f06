"""An experiment, and a site with its policy, as values: TOML in, frozen and validated.

Every key is checked when it is read. A key that does not exist is refused with the nearest
one that does; a combination that would weaken a promise is refused with the mend.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import pydantic
import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Clip = Annotated[float, Field(ge=1e-6, le=1e6)]
Unit = Annotated[float, Field(gt=0, le=1)]
Quantile = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]
Rounds = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Bound = Annotated[float, Field(ge=-1e30, le=1e30)]
Range = Annotated[tuple[Bound, Bound], Field(description="lowest and highest value, lowest first")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Callable_ = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


def _one_line(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= 1000:
        raise ValueError("write one line of 1 to 1000 printable characters")
    return text


def _hexadecimal(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text!r} is not 64 hexadecimal digits in lower case")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Hex32 = Annotated[str, AfterValidator(_hexadecimal)]
Flag = Annotated[bool, Field(strict=True)]
Budgeted = Annotated[float, Field(gt=0, le=1e6)]
Delta = Annotated[float, Field(ge=1e-12, lt=1)]
Protected = Literal["record", "person", "site"]


class ConfigurationError(ValueError):
    """What a user wrote cannot be run: names the key, the value and the mend, in one line."""


class Section(BaseModel):
    """A frozen table of a configuration file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


_Kind = TypeVar("_Kind", bound=Section)


class Data(Section):
    """Where the records come from and what is publicly known about them.

    `ranges` and `default_range` scale every feature linearly onto [-1, 1]; they are declared,
    never fitted, so that scaling reads no private record. `test_column` names a column in which
    "test" marks the records held out; without it `test_fraction` of them are drawn. `person` names
    the column that says whose a record is.
    """

    source: (
        Literal["breast-cancer", "digits", "diabetes", "table", "heart-disease", "mnist"]
        | Callable_
    ) = "breast-cancer"
    path: Path | None = None
    label: str | None = None
    person: str | None = None
    task: Literal["classification", "regression"] | None = None
    classes: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_column: str | None = None
    default_range: Range | None = None
    ranges: Mapping[str, Range] = {}
    target_range: Range | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, (low, high) in {
            **self.ranges,
            **({"default_range": self.default_range} if self.default_range else {}),
            **({"target_range": self.target_range} if self.target_range else {}),
        }.items():
            if not low < high:
                raise ValueError(f"range of {key} is [{low}, {high}]: put the lower bound first")
        if self.source in ("table", "heart-disease", "mnist") and self.path is None:
            raise ValueError(f'source = "{self.source}" needs path = "FILE or FOLDER"')
        if self.source == "table" and self.label is None:
            raise ValueError('source = "table" needs label = "COLUMN"')
        return self


class Sites(Section):
    """Who takes part, and which records each one holds in a simulation."""

    count: Count | None = None
    names: tuple[SiteName, ...] | None = None
    partition: Literal["iid", "dirichlet", "column"] = "iid"
    alpha: Positive = 1.0
    column: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.names is not None and len(set(self.names)) != len(self.names):
            raise ValueError("names repeats a site: every site has its own name")
        if self.names is not None and self.count not in (None, len(self.names)):
            raise ValueError(f"count = {self.count} but names lists {len(self.names)}: keep one")
        if self.partition == "column":
            if self.column is None:
                raise ValueError('partition = "column" needs column = "NAME"')
        elif self.names is None and self.count is None:
            raise ValueError("say count = N or names = [...]")
        return self


class Model(Section):
    """A network by name, or `module:callable` installed at every site.

    A callable is called as `callable(inputs, outputs)` with the feature shape and the number of
    outputs, and returns a torch.nn.Module.
    """

    name: Literal["linear", "logistic", "mlp", "cnn", "small-cnn"] | Callable_ = "logistic"
    hidden: tuple[Count, ...] = (16,)
    loss: Literal["auto", "cross-entropy", "squared-error"] | Callable_ = "auto"


class Training(Section):
    """What a site does between two rounds."""

    local_steps: Rounds = 1
    batch_size: Count = 32
    optimiser: Literal["sgd", "adam"] | Callable_ = "sgd"
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0


class Aggregation(Section):
    """How the aggregate moves the global weights (Reddi et al. 2021, algorithm 2).

    `momentum` belongs to fedavg, `beta1`, `beta2` and `tau` to fedadam. With `average_from` the
    model that is evaluated and given out is the mean of the weights since that round (Polyak and
    Juditsky 1992); it reads aggregates only, so it costs no privacy.
    """

    algorithm: Literal["fedavg", "fedadam"] | Callable_ = "fedavg"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    average_from: Count | None = None
    weighting: Literal["uniform", "records", "declared"] = "uniform"
    weights: Mapping[SiteName, Count] = {}
    weight_cap: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighting == "declared" and not self.weights:
            raise ValueError('weighting = "declared" needs [aggregation.weights] SITE = WEIGHT')
        if self.weighting != "declared" and self.weights:
            raise ValueError('weights are read only with weighting = "declared"')
        if self.weighting == "records" and self.weight_cap is None:
            raise ValueError(
                'weighting = "records" needs weight_cap = W, a public number that no site\'s '
                "record count exceeds"
            )
        return self


class Privacy(Section):
    """DP-SGD on records, or on people (`data.person`), for the whole run.

    With `noise = "local"` each site's noise is enough by itself; `expected_batch` is a site's. With
    "distributed" only the sum over the sites has enough, one step a round, and `expected_batch`
    counts the records (or people) of all sites; masks hide what a site gives. `rate` and
    `expected_batch` are public choices and never derived from a record count. `spare_rounds` are
    rounds that may be lost to aborts without overspending `epsilon`. `signal`: how far all clipped
    gradients together may move one coordinate of the sum, in clips, before it may wrap. With
    `clip_quantile` the clip only begins at `clip` and follows that quantile of the gradients'
    norms, by `clip_learning_rate` a round.
    """

    unit: Literal["record", "person"] = "record"
    noise: Literal["local", "distributed"] = "local"
    epsilon: Positive
    delta: Annotated[float, Field(ge=1e-12, lt=1)]
    clip: Clip = 1.0
    clip_quantile: Quantile | None = None
    clip_learning_rate: Unit = 0.2
    rate: Unit
    expected_batch: Count
    spare_rounds: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 2
    signal: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.signal is not None and self.noise == "local":
            raise ValueError('signal is read only with noise = "distributed"')
        return self


class SitePrivacy(Section):
    """Each site's whole update protected, by noise that only the sum over the sites has enough of.

    The update of any local training is clipped to L2 norm `clip`. Where it takes fewer bits, sites
    rotate their updates first, by a rotation that is public; that needs no key. `clip_quantile`
    and `clip_learning_rate`: as in `Privacy`, for the norms of updates.
    """

    unit: Literal["site"]
    noise: Literal["distributed"] = "distributed"
    epsilon: Positive
    delta: Annotated[float, Field(ge=1e-12, lt=1)]
    clip: Clip = 1.0
    clip_quantile: Quantile | None = None
    clip_learning_rate: Unit = 0.2
    spare_rounds: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 2


def _unit(value: Any) -> str:
    unit = value.get("unit") if isinstance(value, dict) else getattr(value, "unit", None)
    return "site" if unit == "site" else "record"


AnyPrivacy = Annotated[
    Annotated[Privacy, Tag("record")] | Annotated[SitePrivacy, Tag("site")], Discriminator(_unit)
]


class Encryption(Section):
    """The aggregation protocol, the integers it carries, and whom it withstands.

    `colluding_sites`: T, how many sites may collude with the server (secagg and masked-bfv).
    `minimum_cohort`: m, the fewest updates in a sum; by default what the protocol needs.
    `graph`: with "auto" more than 200 sites mask with some neighbours only, which withstands a
    server that follows the protocol; "complete" withstands an active one, at n^2 pairs' work.
    `reveal`: who learns the sum; under "sites" (masked-bfv) sites hold the model, the server none.
    `openers`: how many sites must open a sum, each by itself, and agree (bfv and masked-bfv).
    """

    name: Literal["plain", "bfv", "secagg", "masked-bfv"] = "masked-bfv"
    bits: Annotated[int, Field(ge=2, le=24)] = 16
    clip: Clip = 1.0
    colluding_sites: Annotated[int, Field(ge=0)] = 1
    minimum_cohort: Annotated[int, Field(ge=2)] | None = None
    graph: Literal["auto", "complete"] = "auto"
    reveal: Literal["server", "sites"] = "server"
    openers: Count = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reveal == "sites" and self.name != "masked-bfv":
            raise ValueError(
                f'reveal = "sites" but name = "{self.name}": only "masked-bfv" keeps the sum from '
                "the server; use it, or leave reveal out"
            )
        if self.openers > 1 and self.name not in ("bfv", "masked-bfv"):
            raise ValueError(
                f'openers = {self.openers} but under name = "{self.name}" no site opens a sum: use '
                '"bfv" or "masked-bfv", or leave openers out'
            )
        if self.openers > 1 and self.reveal == "sites":
            raise ValueError(
                f'openers = {self.openers} but under reveal = "sites" every site opens the sum: '
                "leave openers out"
            )
        return self


class Pruning(Section):
    """Magnitude pruning of the global model, from the aggregate alone."""

    sparsity: Annotated[float, Field(gt=0, lt=1)]
    schedule: Literal["one-shot", "linear", "cubic"] = "cubic"
    scope: Literal["global", "layer"] = "global"
    first_round: Count = 1
    last_round: Count | None = None


class Stopping(Section):
    """Stop once the global weights move by less than `tolerance` (relative) for `patience` rounds.

    Only the aggregate is read, so stopping costs no privacy.
    """

    tolerance: Positive
    patience: Count = 3


class Engine(Section):
    """Where the clients run: in this process, or in `workers` processes of their own."""

    workers: Annotated[int, Field(ge=0)] = 0
    deadline: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.deadline is not None and self.workers == 0:
            raise ValueError("deadline needs workers >= 1: one process cannot interrupt itself")
        return self


class Transcript(Section):
    """Record what crosses each wire, for the sites that consent; nothing by default."""

    consent: tuple[SiteName, ...] = ()


class Experiment(Section):
    """Everything that decides a federated run. Read it with `load`, write it with `dump`.

    `seed` is public: it drives initialisation, splits and partitions only. `not_private_seed`
    makes every draw reproducible, for tests, and every output then says "not private".
    """

    version: Literal[1] = 1
    name: Name = "experiment"
    rounds: Rounds = 30
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    not_private_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    data: Data = Data()
    sites: Sites = Sites(count=5)
    model: Model = Model()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    privacy: AnyPrivacy | None = None
    protocol: Encryption = Encryption()
    pruning: Pruning | None = None
    stopping: Stopping | None = None
    engine: Engine = Engine()
    transcript: Transcript = Transcript()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.privacy is not None and self.aggregation.weighting == "records":
            raise ValueError(
                'aggregation.weighting = "records" sends exact record counts, which the privacy '
                'plan does not cover: use "uniform", or "declared" with public weights'
            )
        self._check_privacy()
        known = self.sites.names
        if self.pruning is not None:
            last = self.pruning.last_round or self.rounds
            if not self.pruning.first_round <= last <= self.rounds:
                raise ValueError(
                    f"pruning runs from round {self.pruning.first_round} to {last}, "
                    f"but the run has rounds 1 to {self.rounds}"
                )
        if known is not None:
            for key, named in (
                ("aggregation.weights", self.aggregation.weights),
                ("transcript.consent", self.transcript.consent),
            ):
                for site in named:
                    if site not in known:
                        raise ValueError(f"{key} names {site!r}, which is not in sites.names")
        return self

    def _check_privacy(self) -> None:
        privacy = self.privacy
        if privacy is None:
            return
        if privacy.unit == "person" and self.data.person is None:
            raise ValueError('privacy.unit = "person" needs data.person = "COLUMN"')
        if privacy.noise == "local":
            return
        if self.protocol.name not in ("secagg", "masked-bfv") and not (
            self.protocol.name == "plain" and self.not_private_seed is not None
        ):
            raise ValueError(
                f'protocol.name = "{self.protocol.name}" shows single updates to whoever holds its '
                'key, and with privacy.noise = "distributed" only the sum has enough noise: use '
                '"masked-bfv" or "secagg"'
            )
        if self.aggregation.weighting != "uniform":
            raise ValueError(
                'privacy.noise = "distributed" adds up sums: use aggregation.weighting = "uniform"'
            )
        if privacy.unit != "site" and self.training.local_steps != 1:
            raise ValueError(
                f"training.local_steps = {self.training.local_steps}: with privacy.noise = "
                '"distributed" a round is one step; use 1, or noise = "local"'
            )

    @property
    def private(self) -> bool:
        """True when a privacy plan holds and no test seed undoes it."""
        return self.privacy is not None and self.not_private_seed is None

    def dump(self) -> str:
        """This experiment as TOML, defaults included; `parse(dump())` gives an equal value."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self) -> bytes:
        """SHA-256 of what sites must agree on before a round (32 bytes)."""
        alone = {"name": True, "device": True, "engine": True, "transcript": True}
        agreed = self.model_dump_json(exclude={**alone, "data": {"path"}})
        return hashlib.sha256(b"securefl experiment 1\0" + agreed.encode()).digest()


class SiteData(Section):
    """One data set of a site, as its ledger knows it.

    `person` names the column that says whose a record is; `path` is where the records lie. Both are
    the site's own: what a proposed experiment says of them is not believed.
    """

    id: Name
    purpose: Line
    person: str | None = None
    path: Path | None = None


class Budget(Section):
    """What a data set may ever spend, over all runs: epsilon at one delta, counted in one unit."""

    unit: Protected
    epsilon: Budgeted
    delta: Delta


class Policy(Section):
    """What a site lets a server propose; docs/site-policy.md says what each key means.

    A run must keep every rule. Every default is the safe one. Without `maximum_epsilon`,
    `maximum_delta` and `units` the budget decides (`Site.maximum_epsilon` and so on).
    """

    consent: Literal["each-run", "standing"] = "each-run"
    unknown_sites: Flag = False
    privacy: Literal["required", "optional"] = "required"
    maximum_epsilon: Budgeted | None = None
    maximum_delta: Delta | None = None
    units: tuple[Protected, ...] | None = None
    noise: tuple[Literal["local", "distributed"], ...] = ("local", "distributed")
    minimum_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    protocols: tuple[Literal["plain", "bfv", "secagg", "masked-bfv"], ...] = (
        "masked-bfv",
        "secagg",
    )
    minimum_cohort: Annotated[int, Field(strict=True, ge=2, le=1 << 16)] = 3
    minimum_colluding_sites: Annotated[int, Field(strict=True, ge=0, le=1 << 16)] = 1
    graph: Literal["auto", "complete"] = "complete"
    reveal: tuple[Literal["server", "sites"], ...] = ("server", "sites")
    minimum_openers: Count = 1
    record_counts: Flag = False
    models: tuple[Literal["linear", "logistic", "mlp", "cnn", "small-cnn"], ...] = (
        "linear",
        "logistic",
        "mlp",
        "cnn",
        "small-cnn",
    )
    callables: Mapping[Callable_, Hex32] = {}
    maximum_rounds: Rounds = 1000
    maximum_local_steps: Rounds = 100
    transcript_until: date | None = None
    canaries: Flag = False
    allow_not_private: Flag = False


class Site(Section):
    """One site: what it holds, what that may spend, and what it lets a server propose (site.toml).

    `consortium`: the public keys that it pins, 64 hexadecimal digits, by site.
    """

    version: Literal[1]
    name: SiteName
    data: SiteData
    budget: Budget
    policy: Policy = Policy()
    consortium: Mapping[SiteName, Hex32] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        budget, policy = self.budget, self.policy
        if budget.unit == "person" and self.data.person is None:
            raise ValueError('budget.unit = "person" needs data.person = "COLUMN"')
        for key, value, most in (
            ("epsilon", policy.maximum_epsilon, budget.epsilon),
            ("delta", policy.maximum_delta, budget.delta),
        ):
            if value is not None and value > most:
                raise ValueError(
                    f"policy.maximum_{key} = {value:g} is above budget.{key} = {most:g}, which no "
                    "run may exceed: lower it, or leave it out"
                )
        for unit in policy.units or ():
            if unit not in self._countable:
                known = " or ".join(f'"{unit}"' for unit in self._countable)
                raise ValueError(
                    f'policy.units lists "{unit}", which a budget in {budget.unit}s cannot count: '
                    f"use {known}"
                )
        if len(set(self.consortium.values())) != len(self.consortium):
            raise ValueError("consortium pins one key for two sites: every site has its own")
        return self

    @property
    def _countable(self) -> tuple[Protected, ...]:
        """The units that the ledger proves a bound for, in the budget's unit."""
        return (self.budget.unit,) if self.budget.unit == "site" else (self.budget.unit, "site")

    @property
    def units(self) -> tuple[Protected, ...]:
        """What a run may protect: by default the budget's unit, and whole sites."""
        return self._countable if self.policy.units is None else self.policy.units

    @property
    def maximum_epsilon(self) -> float:
        """The most epsilon that one run may promise; by default the budget's."""
        most = self.policy.maximum_epsilon
        return self.budget.epsilon if most is None else most

    @property
    def maximum_delta(self) -> float:
        """The most delta that one run may promise; by default the budget's."""
        most = self.policy.maximum_delta
        return self.budget.delta if most is None else most


def parse(text: str, overrides: Iterable[str] = (), origin: str = "experiment") -> Experiment:
    """The experiment written in `text`, with `a.b=value` overrides laid over it.

    Raises ConfigurationError naming `origin`, the key, the value and the mend.

    >>> parse("rounds = 5", ["training.learning_rate=0.5"]).training.learning_rate
    0.5
    >>> parse("ruonds = 5")
    Traceback (most recent call last):
    securefl.config.ConfigurationError: experiment: no key 'ruonds'; did you mean 'rounds'?
    """
    tree = _tree(text, origin)
    for override in overrides:
        _lay_over(tree, override)
    return _validated(Experiment, tree, origin)


def load(path: Path | str, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment in the TOML file `path`; a relative data path is relative to that file."""
    text = _text(path)
    experiment = parse(text, overrides, origin=str(path))
    data = experiment.data
    if data.path is not None and not data.path.is_absolute():
        written_here = tomllib.loads(text).get("data", {}).get("path") == str(data.path)
        base = Path(path).resolve().parent if written_here else Path.cwd()
        data = data.model_copy(update={"path": base / data.path})
        experiment = experiment.model_copy(update={"data": data})
    return experiment


def parse_site(text: str, origin: str = "site") -> Site:
    """The site written in `text`. Raises ConfigurationError as `parse` does."""
    return _validated(Site, _tree(text, origin), origin)


def load_site(path: Path | str) -> Site:
    """The site in the TOML file `path`; a relative data path is relative to that file.

    Raises ConfigurationError naming the file, the key, the value and the mend.
    """
    site = parse_site(_text(path), origin=str(path))
    if site.data.path is None:
        return site
    data = site.data.model_copy(update={"path": Path(path).resolve().parent / site.data.path})
    return site.model_copy(update={"data": data})


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _tree(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, or deep brackets
        raise ConfigurationError(f"{origin} is not valid TOML: {error}") from None


def _validated(kind: type[_Kind], tree: dict[str, Any], origin: str) -> _Kind:
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigurationError(f"{origin}: {_first_fault(error, kind)}") from None


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise ConfigurationError(f"--set {override}: write it as key=value, e.g. privacy.epsilon=3")
    table = tree
    for step in steps[:-1]:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"--set {override}: {step} is a value, not a table")
    try:
        table[steps[-1]] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        table[steps[-1]] = value.strip()  # a bare word is a string


def _first_fault(error: pydantic.ValidationError, kind: type[Section]) -> str:
    """The most telling fault of a validation error, as one line."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path = [str(step) for step in fault["loc"]]
    known = _keys(path[:-1], kind)
    if path[:1] == ["privacy"] and path[1:2] in (["record"], ["site"]):
        del path[1]  # which of the two sections it was read as
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        if near:
            return f"no key {key!r}; did you mean {'.'.join([*path[:-1], near[0]])!r}?"
        return f"no key {key!r}; the keys here are {', '.join(sorted(known))}"
    message = re.sub(r"^Value error, ", "", fault["msg"])
    if fault["type"] == "missing":
        return f"{key} is missing: say what it is"
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    choices = [f["ctx"]["expected"] for f in faults if f["type"] == "literal_error"]
    where = ".".join(p for p in path if not p.startswith(("literal[", "constrained-", "function-")))
    if choices:
        extra = ' or "module:callable"' if len(faults) > 1 else ""
        return f"{where} = {fault['input']!r}: choose {choices[0]}{extra}"
    return f"{where} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(path: list[str], kind: type[Section]) -> list[str]:
    """The keys that exist at `path`, which leads from `kind` through its sections."""
    section: type[BaseModel] = kind
    for step in path:
        if section is Experiment and step == "privacy":
            section = SitePrivacy if path[1:2] == ["site"] else Privacy
        elif step in section.model_fields:
            annotation = section.model_fields[step].annotation
            kinds = [annotation, *get_args(annotation)]
            found = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
            section = found[0] if found else section
    return list(section.model_fields)
