"""An experiment, and a site with its policy, as values: TOML in, frozen and validated.

Every key is checked when it is read. A key that does not exist is refused with the nearest
one that does; a combination that would weaken a promise is refused with the mend.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from securefl import sections
from securefl.schema import Schema
from securefl.sections import (
    Budgeted,
    Callable_,
    Clip,
    Count,
    Delta,
    Flag,
    Hex32,
    Line,
    Name,
    Positive,
    Protected,
    Quantile,
    Range,
    Rounds,
    Section,
    SiteName,
    Unit,
    parse_tree,
    read_text,
    validated,
)

ConfigurationError = sections.ConfigurationError


def _a_promise(delta: float) -> float:
    if delta > 0.01:
        raise ValueError(
            f"{delta:g} permits that everything about one record in {1 / delta:.0f} is told: use "
            "far less than one over the number of records (or people)"
        )
    return delta


RunDelta = Annotated[float, Field(ge=1e-12, lt=1), AfterValidator(_a_promise)]


class Data(Section):
    """Where the records come from and what is publicly known about them.

    With a `schema` (a file's name, or its tables) the files are read and checked as it says,
    and `[preprocessing]` makes features of them. `path` is then a table, a folder, or has a `*`:
    every file is a site, named by what the star stands for; without a path every site brings its
    own. `drop` lists columns that are no features.

    Without a schema `ranges` and `default_range` scale every feature linearly onto [-1, 1]; they
    are declared, never fitted, so that scaling reads no private record. `test_column` names a
    column in which "test" marks the records held out; without it `test_fraction` of them are drawn.
    `person` names the column that says whose a record is.
    """

    source: (
        Literal["breast-cancer", "digits", "diabetes", "table", "heart-disease", "mnist"]
        | Callable_
    ) = "breast-cancer"
    """Files ("table"), a public data set by its name, or installed code that gives a table."""
    agreed: Schema | None = Field(default=None, alias="schema")
    path: Path | None = None
    label: str | None = None
    """Without a schema: the column that the model learns."""
    person: str | None = None
    task: Literal["classification", "regression"] | None = None
    """Without a schema: by default what the label looks like."""
    classes: tuple[str, ...] | None = None
    """Without a schema: the label's classes, in order; by default those that occur."""
    drop: tuple[str, ...] = ()
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_column: str | None = None
    default_range: Range | None = None
    ranges: Mapping[str, Range] = {}
    target_range: Range | None = None
    """Without a schema: of the label of a regression, mapped onto [-1, 1]."""

    @field_validator("agreed", mode="before")
    @classmethod
    def _read(cls, told: Any) -> Any:
        if isinstance(told, str):
            raise ValueError(f"{told!r} is a file, which is read only where this is one, too")
        return told

    @property
    def person_column(self) -> str | None:
        """The column that says whose a record is."""
        return self.person if self.agreed is None else self.agreed.person

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.agreed is not None:
            return self._consistent_with(self.agreed)
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
            raise ValueError('source = "table" needs label = "COLUMN", or schema = "FILE"')
        return self

    def _consistent_with(self, schema: Schema) -> Self:
        if self.source != "table":
            raise ValueError(f'schema goes with source = "table", not "{self.source}"')
        said = ("label", "person", "task", "classes", "test_column", "default_range")
        for key in (*said, "target_range", "ranges"):
            if getattr(self, key):
                raise ValueError(f"{key} goes without a schema, which says it: drop {key}")
        for name in self.drop:
            if name not in schema.columns:
                raise ValueError(f"drop lists {name!r}, which is not in the schema")
            if name == schema.label:
                raise ValueError(f"drop lists the label {name!r}: keep it")
        if not self.features:
            raise ValueError("the schema leaves no feature: drop fewer columns")
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """The schema's columns that features are made of; () without a schema."""
        schema = self.agreed
        if schema is None:
            return ()
        if schema.image is not None and schema.image not in self.drop:
            return (schema.image,)
        return tuple(
            name
            for name, column in schema.columns.items()
            if name not in (schema.label, *self.drop) and column.type in ("number", "category")
        )


class Preprocessing(Section):
    """How the columns of a schema become features: fitted on all sites' training rows together.

    Every statistic is a secure sum over the sites; under `[privacy]` one with noise, which may cost
    `share` of the run's epsilon. The fitted values are part of the model.

    `scale`: "standardise" to mean 0 and deviation 1, or "range", which maps the schema's range onto
    [-1, 1] and needs no statistic. `impute`: what a missing number becomes: the mean, the median,
    or the "middle" of its range (no statistic). A missing category is none of them. `indicators`:
    one more feature that tells where a number is missing. `clip_quantiles`: numbers beyond these
    quantiles count as them. `bins`: of the histograms that quantiles are read from. `required`:
    rows without a value in these columns are left out. Categories with fewer than `minimum_count`
    records (or people) in the consortium are merged; 0 merges none and needs no statistic.
    `class_weights`: "balanced" weighs each class's loss by one over its frequency.
    """

    scale: Literal["standardise", "range"] = "standardise"
    impute: Literal["mean", "median", "middle"] = "mean"
    indicators: Flag = False
    clip_quantiles: tuple[Quantile, Quantile] | None = None
    bins: Annotated[int, Field(strict=True, ge=2, le=4096)] = 256
    required: tuple[str, ...] = ()
    minimum_count: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 10
    class_weights: Literal["none", "balanced"] = "none"
    share: Quantile = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.clip_quantiles is not None and not self.clip_quantiles[0] < self.clip_quantiles[1]:
            raise ValueError("clip_quantiles: put the lower one first")
        return self


class Evaluation(Section):
    """Test figures from sums over all sites: no test row leaves its site.

    Every site holds out its own test rows: those that the schema's `test` column marks, or
    `data.test_fraction` of them, by a hash of each row (or person). `every`: updates between two
    evaluations; the last update is always evaluated. `bins`: of the histograms of scores. Under
    `[privacy]` the sums carry noise that covers the test rows, which no training reads, at the
    run's own epsilon; with `protected` = false test rows are declared outside the guarantee.
    `threshold`: from which probability the last class is predicted, where there are two.
    """

    every: Count | None = None
    bins: Annotated[int, Field(strict=True, ge=2, le=4096, multiple_of=2)] | None = None
    protected: Flag = True
    threshold: Quantile = 0.5


class Sites(Section):
    """Who takes part, and which records each one holds in a simulation.

    With `partition` = "file" every file of `data.path` is a site.
    """

    count: Count | None = None
    """How many sites, where neither names nor files say it."""
    names: tuple[SiteName, ...] | None = None
    """Their names; with files, which of them take part."""
    partition: Literal["iid", "dirichlet", "column", "file"] = "iid"
    alpha: Positive = 1.0
    """With "dirichlet": a small one makes sites differ much (Hsu, Qi and Brown 2019)."""
    column: str | None = None
    """With "column": every value of it is a site."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.names is not None and len(set(self.names)) != len(self.names):
            raise ValueError("names repeats a site: every site has its own name")
        if self.names is not None and self.count not in (None, len(self.names)):
            raise ValueError(f"count = {self.count} but names lists {len(self.names)}: keep one")
        if self.partition == "file" and self.count is not None:
            raise ValueError('count goes without partition = "file", where every file is a site')
        if self.partition == "column":
            if self.column is None:
                raise ValueError('partition = "column" needs column = "NAME"')
        elif self.partition != "file" and self.names is None and self.count is None:
            raise ValueError("say count = N or names = [...]")
        return self


class Model(Section):
    """A network by name, or `module:callable` installed at every site.

    A callable is called as `callable(inputs, outputs)` with the feature shape and the number of
    outputs, and returns a torch.nn.Module.
    """

    name: Literal["linear", "logistic", "mlp", "cnn", "small-cnn"] | Callable_ = "logistic"
    """A network: "mlp" has hidden layers, "cnn" and "small-cnn" are for images."""
    hidden: tuple[Count, ...] = (16,)
    """Of "mlp": how many units each hidden layer has."""
    loss: Literal["auto", "cross-entropy", "squared-error"] | Callable_ = "auto"
    """With "auto": cross-entropy of classes, squared error of numbers."""


class Training(Section):
    """What a site does between two rounds."""

    local_steps: Rounds = 1
    """Of a site in one round; 1 with distributed noise of records."""
    batch_size: Count = 32
    """Records of a step; with [privacy] `rate` and `expected_batch` say it."""
    optimiser: Literal["sgd", "adam"] | Callable_ = "sgd"
    """Of the local steps."""
    learning_rate: Positive = 0.1
    """Of the local steps."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of "sgd" alone."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """How strongly weights are drawn to zero."""


class Aggregation(Section):
    """How the aggregate moves the global weights (Reddi et al. 2021, algorithm 2).

    `momentum` belongs to fedavg, `beta1`, `beta2` and `tau` to fedadam. With `average_from` the
    model that is evaluated and given out is the mean of the weights since that round (Polyak and
    Juditsky 1992); it reads aggregates only, so it costs no privacy.
    """

    algorithm: Literal["fedavg", "fedadam"] | Callable_ = "fedavg"
    """How the mean update moves the weights."""
    learning_rate: Positive = 1.0
    """How far the global weights follow the mean update."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    average_from: Count | None = None
    weighting: Literal["uniform", "records", "declared"] = "uniform"
    """What a site counts in the mean: as the others, as its records, or as declared."""
    weights: Mapping[SiteName, Count] = {}
    """With "declared": public weights by site."""
    weight_cap: Count | None = None
    """With "records": a public number that no record count of a site exceeds."""

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
    """What is protected; people take a column that names them."""
    noise: Literal["local", "distributed"] = "local"
    """Whether each site's noise suffices, or only that of the sum over all sites."""
    epsilon: Positive
    """The most that the whole run may cost, test rows apart."""
    delta: RunDelta
    """The chance that epsilon does not hold: well below one over the records (or people)."""
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
    and `clip_learning_rate`: as where records are protected, but of the norms of updates.
    """

    unit: Literal["site"]
    """Everything that a site sends is protected."""
    noise: Literal["distributed"] = "distributed"
    """No other."""
    epsilon: Positive
    """The most that the whole run may cost."""
    delta: RunDelta
    """The chance that epsilon does not hold; well below one over the sites."""
    clip: Clip = 1.0
    clip_quantile: Quantile | None = None
    clip_learning_rate: Unit = 0.2
    spare_rounds: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 2
    """Rounds that may be lost to aborts without overspending."""


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
    `openers`: how many sites must open a sum, each by itself, and agree (bfv, ckks, masked-bfv).
    """

    name: Literal["plain", "bfv", "ckks", "secagg", "masked-bfv"] = "masked-bfv"
    """What "plain" sends is open; "bfv" and "ckks" encrypt, "secagg" masks, "masked-bfv" both."""
    bits: Annotated[int, Field(ge=2, le=24)] = 16
    """Of a coordinate of an update; with distributed noise the plan chooses them."""
    clip: Clip = 1.0
    """The largest coordinate of an update; larger ones are cut. Not read with distributed noise."""
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
        if self.openers > 1 and self.name not in ("bfv", "ckks", "masked-bfv"):
            raise ValueError(
                f'openers = {self.openers} but under name = "{self.name}" no site opens a sum: use '
                '"masked-bfv", "bfv" or "ckks", or leave openers out'
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
    """Share of the weights that is zero in the end."""
    schedule: Literal["one-shot", "linear", "cubic"] = "cubic"
    """All at once, evenly, or fast at first (Zhu and Gupta 2017)."""
    scope: Literal["global", "layer"] = "global"
    """Whether the smallest weights of all, or of each layer."""
    first_round: Count = 1
    """When pruning begins."""
    last_round: Count | None = None
    """When it has reached `sparsity`; by default at the end."""


class Stopping(Section):
    """Stop once the global weights move by less than `tolerance` (relative) for `patience` rounds.

    Only the aggregate is read, so stopping costs no privacy.
    """

    tolerance: Positive
    patience: Count = 3


class Engine(Section):
    """Where the clients of a simulation run, by `kind`: on this machine, or on Ray.

    "local" ones run in this process, or in `workers` processes of their own; those on "ray" in
    `workers` actors. Without an `address` Ray is started here, for this run.
    """

    kind: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(strict=True, ge=0, le=10_000)] = 0
    """0: this process; on Ray: an actor for every CPU of the cluster."""
    address: str | None = None
    """Of Ray: HOST:PORT, or "auto", the cluster that this machine is part of."""
    deadline: Positive | None = None
    """Seconds that workers have for a phase of a round; who is late is left out."""

    @field_validator("address")
    @classmethod
    def _node(cls, told: str | None) -> str | None:
        if told is not None and not re.fullmatch(r"auto|[A-Za-z0-9._-]+:\d{1,5}", told):
            raise ValueError(
                f"{told!r} is no node of a cluster: write HOST:PORT, as `ray start` prints it, or "
                '"auto" for the cluster that this machine is part of'
            )
        return told

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "local" and self.address is not None:
            raise ValueError(
                f'address = "{self.address}" is of a Ray cluster: say kind = "ray", or leave it out'
            )
        if self.deadline is not None and not self.pooled:
            raise ValueError("deadline needs workers >= 1: one process cannot interrupt itself")
        return self

    @property
    def pooled(self) -> bool:
        """Whether clients run in other processes than this one."""
        return self.kind == "ray" or self.workers > 0


class Deployment(Section):
    """How long a consortium's server waits for sites on machines of their own.

    Who is later than a deadline is left out of the phase, and of the round: it takes part in the
    next one again.
    """

    deadline: Positive = 300.0
    """Seconds for a phase in which nobody trains."""
    training_deadline: Positive = 3600.0
    """Seconds for the phase in which sites train, and for the proposal, when they read records."""
    patience: Positive = 40.0
    """Seconds without a sign of life after which a site has dropped out."""
    stragglers: Positive | None = None
    """Seconds that the last ones still have once enough for a sum have answered."""


class Transcript(Section):
    """Record what crosses each wire, for the sites that consent; nothing by default.

    `own`: sites that also write down what they draw at random and what they contribute, each in a
    folder of its own that never leaves it: for an audit of what colluding sites could tell, and of
    local noise by itself. Whoever got that folder would read the site's every update.
    """

    consent: tuple[SiteName, ...] = ()
    """Sites whose messages may be kept in the run directory."""
    own: tuple[SiteName, ...] = ()
    keep_until: date | None = None
    """The last day of all that, which sites with a policy insist on; then it is read no more."""

    @property
    def recorded(self) -> frozenset[str]:
        """Every site of which something is kept."""
        return frozenset({*self.consent, *self.own})


class Audit(Section):
    """What a run does so that its privacy can be measured.

    `canaries`: how many candidates every site makes, each of which it trains on if a coin of its
    own says so; afterwards `securefl audit` guesses the coins, and says how much of epsilon that
    shows. They are records that teach nothing: a model learns less of the others. Their privacy
    is part of the plan, and that of the real records costs no more. Every site must permit it.
    """

    canaries: Annotated[int, Field(strict=True, ge=0, le=100_000, multiple_of=2)] = 0
    """An even number; half of them are trained on, about."""


class Experiment(Section):
    """Everything that decides a federated run.

    `seed` is public: it drives initialisation, splits and partitions only. `not_private_seed`
    makes every draw reproducible, for tests, and every output then says "not private".
    """

    version: Literal[1] = 1
    """Of this form of file."""
    name: Name = "experiment"
    """Of the run and its directory."""
    rounds: Rounds = 30
    """Updates of the model, at most."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    not_private_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where sites compute: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N", a GPU."""
    data: Data = Data()
    """Where records come from."""
    sites: Sites = Sites(count=5)
    """Who takes part."""
    model: Model = Model()
    """What is trained."""
    training: Training = Training()
    """What a site does in a round."""
    aggregation: Aggregation = Aggregation()
    """What is made of the updates."""
    preprocessing: Preprocessing | None = None
    """How columns become features. With a schema it is always there."""
    evaluation: Evaluation | None = None
    """Test figures from the sites. With a schema it is always there."""
    privacy: AnyPrivacy | None = None
    """What is promised of each record, person or site. Without it nothing is."""
    protocol: Encryption = Encryption()
    """How updates are added up."""
    pruning: Pruning | None = None
    """Weights that become zero."""
    stopping: Stopping | None = None
    """When to stop before all rounds are done."""
    engine: Engine = Engine()
    """Where sites run in a simulation."""
    deployment: Deployment = Deployment()
    """How long a server waits for sites on machines of their own."""
    transcript: Transcript = Transcript()
    """What is kept for later study."""
    audit: Audit = Audit()
    """What is put into training to measure what leaks."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, tree: Any) -> Any:
        """With a schema there is preprocessing, and evaluation at the sites."""
        if isinstance(tree, dict) and isinstance(tree.get("data"), dict | Data):
            data = tree["data"]
            if data.get("schema") if isinstance(data, dict) else data.agreed:
                return {"preprocessing": {}, "evaluation": {}, **tree}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_schema()
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
                ("transcript.own", self.transcript.own),
            ):
                for site in named:
                    if site not in known:
                        raise ValueError(f"{key} names {site!r}, which is not in sites.names")
        return self

    def _check_schema(self) -> None:
        schema, preprocessing = self.data.agreed, self.preprocessing
        if schema is None:
            for key in ("preprocessing", "evaluation"):
                if getattr(self, key) is not None:
                    raise ValueError(f'[{key}] needs data.schema = "FILE"')
            if self.sites.partition == "file":
                raise ValueError('sites.partition = "file" needs data.schema = "FILE"')
            return
        if self.data.path is None and self.sites.names is None:
            raise ValueError("without data.path every site brings its own file: say sites.names")
        if self.privacy is not None and self.privacy.unit == "site":
            raise ValueError(
                'privacy.unit = "site" does not cover sums over the records of a site, which '
                'preprocessing and test figures are made of: use "record" or "person"'
            )
        if self.protocol.reveal == "sites":
            raise ValueError(
                'protocol.reveal = "sites" hides every sum from the server, which fits '
                'preprocessing and test figures from sums: use reveal = "server"'
            )
        for name in preprocessing.required if preprocessing else ():
            if name not in self.data.features:
                raise ValueError(f"preprocessing.required lists {name!r}, which is no feature")

    def _check_privacy(self) -> None:
        privacy = self.privacy
        if privacy is None:
            return
        if privacy.unit == "person" and self.data.person_column is None:
            where = 'data.person = "COLUMN"' if self.data.agreed is None else "a schema with person"
            raise ValueError(f'privacy.unit = "person" needs {where}')
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
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, by_alias=True))

    def digest(self) -> bytes:
        """SHA-256 of what sites must agree on before a round (32 bytes)."""
        alone = dict.fromkeys(("name", "device", "engine", "deployment", "transcript"), True)
        told = {"columns": {"__all__": {"description"}}}
        agreed = self.model_dump_json(exclude={**alone, "data": {"path": True, "agreed": told}})
        return hashlib.sha256(b"securefl experiment 1\0" + agreed.encode()).digest()


class SiteData(Section):
    """One data set of a site, as its ledger knows it.

    `person` names the column that says whose a record is; `path` is where the records lie, and
    `schema` the file that says what they hold. All are the site's own: what a proposed experiment
    says of them is not believed.
    """

    id: Name
    """What the ledger calls the data set, for good."""
    purpose: Line
    """What the records are used for."""
    person: str | None = None
    path: Path | None = None
    agreed: Schema | None = Field(default=None, alias="schema")


class Budget(Section):
    """What a data set may ever spend, over all runs: epsilon at one delta, counted in one unit."""

    unit: Protected
    """What is protected and counted."""
    epsilon: Budgeted
    """Of all runs together."""
    delta: Delta
    """The chance that epsilon does not hold."""


class Policy(Section):
    """What a site lets a server propose; docs/site-policy.md says what each key means.

    A run must keep every rule. Every default is the safe one. Without `maximum_epsilon`,
    `maximum_delta` and `units` the budget decides.
    """

    consent: Literal["each-run", "standing"] = "each-run"
    unknown_sites: Flag = False
    privacy: Literal["required", "optional"] = "required"
    maximum_epsilon: Budgeted | None = None
    maximum_delta: Delta | None = None
    units: tuple[Protected, ...] | None = None
    noise: tuple[Literal["local", "distributed"], ...] = ("local", "distributed")
    minimum_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    protocols: tuple[Literal["plain", "bfv", "ckks", "secagg", "masked-bfv"], ...] = (
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
    own_recording: Flag = False
    canaries: Flag = False
    allow_not_private: Flag = False


class Site(Section):
    """One site: what it holds, what that may spend, and what it lets a server propose (site.toml).

    `consortium`: the public keys that it pins, 64 hexadecimal digits, by site.
    """

    version: Literal[1]
    """Of this form of file."""
    name: SiteName
    """What the consortium calls this site."""
    data: SiteData
    """The records."""
    budget: Budget
    """What they may spend."""
    policy: Policy = Policy()
    """What a server may propose."""
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

    Opens no file: who proposes an experiment must not name one here, not even a schema's.
    Raises ConfigurationError naming `origin`, the key, the value and the mend.

    >>> parse("rounds = 5", ["training.learning_rate=0.5"]).training.learning_rate
    0.5
    >>> parse("ruonds = 5")
    Traceback (most recent call last):
    securefl.sections.ConfigurationError: experiment: no key 'ruonds'; did you mean 'rounds'?
    """
    return _experiment(text, overrides, origin, None)


def _experiment(
    text: str,
    overrides: Iterable[str],
    origin: str,
    folder: Path | None,
    names: Sequence[str] = (),
) -> Experiment:
    tree = parse_tree(text, origin)
    if folder is not None:
        _read_schema(tree, folder)
    for override in overrides:
        _lay_over(tree, override)
    if folder is not None:
        _read_schema(tree, Path())
    sites = tree.setdefault("sites", {}) if names else None
    if isinstance(sites, dict) and "count" not in sites:
        sites.setdefault("names", list(names))
    return validated(Experiment, tree, origin)


def _read_schema(tree: dict[str, Any], folder: Path) -> None:
    """Put the schema in the place of its file's name, which is relative to `folder`."""
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("schema"), str):
        path = folder / data["schema"]
        data["schema"] = parse_tree(read_text(path), str(path))
        validated(Schema, data["schema"], str(path))  # so that errors name its own file


def load(path: Path | str, overrides: Iterable[str] = (), names: Sequence[str] = ()) -> Experiment:
    """The experiment in the TOML file `path`; a relative data path is relative to that file.

    names: of the sites, where it says neither names nor a number of them.
    """
    text = read_text(path)
    experiment = _experiment(text, overrides, str(path), Path(path).parent, names)
    data = experiment.data
    if data.path is not None and not data.path.is_absolute():
        written_here = tomllib.loads(text).get("data", {}).get("path") == str(data.path)
        base = Path(path).resolve().parent if written_here else Path.cwd()
        data = data.model_copy(update={"path": base / data.path})
        experiment = experiment.model_copy(update={"data": data})
    return experiment


def parse_site(text: str, origin: str = "site", folder: Path | None = None) -> Site:
    """The site written in `text`. Raises ConfigurationError as `parse` does.

    folder: where the schema that it names is looked for; without one it may name none.
    """
    tree = parse_tree(text, origin)
    if folder is not None:
        _read_schema(tree, folder)
    return validated(Site, tree, origin)


def load_site(path: Path | str) -> Site:
    """The site in the TOML file `path`; a relative data path is relative to that file.

    Raises ConfigurationError naming the file, the key, the value and the mend.
    """
    site = parse_site(read_text(path), str(path), Path(path).parent)
    if site.data.path is None:
        return site
    data = site.data.model_copy(update={"path": Path(path).resolve().parent / site.data.path})
    return site.model_copy(update={"data": data})


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
