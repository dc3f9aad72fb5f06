"""What a site lets a server propose, and what a person at the site is asked to agree to.

Everything here is computed from public values: the site's own file, the proposed experiment, how
many sites take part and how large the model is. No record is read, and no code that the experiment
names is run: of a `module:callable` only the file is hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple, final

from protocols.graph import Thresholds
from protocols.identity import digest
from securefl import agreement
from securefl.config import ConfigurationError, Data, Experiment, Site
from securefl.privacy.ledger import Forecast, Ledger, Registered, forecast
from securefl.privacy.plan import Observer, Plan, RecordLocal
from securefl.privacy.preview import noise_multiplier
from securefl.report import words
from securefl.schema import differences


class PolicyError(ConfigurationError):
    """A proposal that breaks a rule of a site's policy; one line names all three, and the site.

    rule: the key of site.toml, such as "policy.maximum_epsilon".
    """

    def __init__(self, site: str, rule: str, proposed: object, permitted: object) -> None:
        self.site, self.rule = site, rule
        self.proposed, self.permitted = str(proposed), str(permitted)
        super().__init__(
            f"{site} refuses by {rule}: proposed is {self.proposed}; permitted is {self.permitted}"
        )


class _Rule(NamedTuple):
    key: str
    broken: bool
    proposed: object
    permitted: object


def check(site: Site, experiment: Experiment, sites: int, dimension: int, today: date) -> None:
    """Raise PolicyError for the first rule of `site` that a proposal breaks.

    sites: how many take part; dimension: parameters of the dense model. Raises ConfigurationError
    where the experiment cannot be run at all.
    """
    for rule in _rules(site, experiment, sites, dimension, today):
        if rule.broken:
            raise _error(site, rule)


def broken(
    site: Site, experiment: Experiment, sites: int, dimension: int, today: date
) -> tuple[PolicyError, ...]:
    """Every rule of `site` that a proposal breaks, for showing to a person; as `check`.

    Where one is broken and the experiment cannot be run either, those found before that showed.
    """
    found: list[PolicyError] = []
    try:
        for rule in _rules(site, experiment, sites, dimension, today):
            if rule.broken:
                found += [_error(site, rule)]  # kept when a later rule cannot be told
    except ConfigurationError:
        if not found:
            raise
    return tuple(found)


def _error(site: Site, rule: _Rule) -> PolicyError:
    return PolicyError(site.name, rule.key, rule.proposed, rule.permitted)


def _rules(
    site: Site, experiment: Experiment, sites: int, dimension: int, today: date
) -> Iterator[_Rule]:
    """Every rule; what is cheap to tell first, so that a hostile proposal costs little."""
    yield from _of_promise(site, experiment)
    yield from _of_work(site, experiment)
    yield from _of_records(site, experiment, today)
    yield from _of_code(site, experiment)
    yield from _of_protocol(site, experiment, sites)
    yield from _of_sums(site, experiment, sites)
    plan = _plan(experiment, sites, dimension)
    if plan is not None:
        noise, least = noise_multiplier(plan), site.policy.minimum_noise
        yield _Rule("policy.minimum_noise", noise < least, f"{noise:.4g}", f"at least {least:g}")
    agreement.check_length(experiment, sites, plan, dimension)


def _plan(experiment: Experiment, sites: int, dimension: int) -> Plan | None:
    try:
        return agreement.plan(experiment, sites, dimension)
    except ConfigurationError:
        raise
    except (ValueError, ArithmeticError) as error:  # numbers that no noise can serve
        raise ConfigurationError(f"privacy: {error}") from None


def _of_promise(site: Site, experiment: Experiment) -> Iterator[_Rule]:
    policy, privacy = site.policy, experiment.privacy
    yield _Rule(
        "policy.allow_not_private",
        experiment.not_private_seed is not None and not policy.allow_not_private,
        "noise that a seed makes predictable (not_private_seed)",
        "noise that nobody can predict",
    )
    if privacy is None:
        required = policy.privacy == "required"
        yield _Rule("policy.privacy", required, "a run without [privacy]", "a run with a plan")
        return
    epsilon, delta = site.maximum_epsilon, site.maximum_delta
    yield _Rule(
        "policy.maximum_epsilon",
        privacy.epsilon > epsilon,
        f"{privacy.epsilon:g}",
        f"at most {epsilon:g}",
    )
    yield _Rule(
        "policy.maximum_delta", privacy.delta > delta, f"{privacy.delta:g}", f"at most {delta:g}"
    )
    yield _among("policy.units", privacy.unit, site.units)
    yield _among("policy.noise", privacy.noise, policy.noise)


def _of_work(site: Site, experiment: Experiment) -> Iterator[_Rule]:
    policy, steps = site.policy, experiment.training.local_steps
    rounds = _rounds(experiment)
    yield _Rule(
        "policy.maximum_rounds",
        rounds > policy.maximum_rounds,
        f"{rounds} with the spare ones",
        f"at most {policy.maximum_rounds}",
    )
    yield _Rule(
        "policy.maximum_local_steps",
        steps > policy.maximum_local_steps,
        f"{steps}",
        f"at most {policy.maximum_local_steps}",
    )


def _of_records(site: Site, experiment: Experiment, today: date) -> Iterator[_Rule]:
    policy, data, privacy = site.policy, experiment.data, experiment.privacy
    by_person = privacy is not None and privacy.unit == site.budget.unit == "person"
    yield _Rule(
        "data.person",
        by_person and data.person_column != site.data.person,
        f"column {data.person_column!r} to say whose a record is",
        f"column {site.data.person!r}",
    )
    yield _Rule(
        "data.path",
        data.path is not None and site.data.path is None,
        "records from a file",
        "no file: [data] of this site names no path",
    )
    yield from _of_schema(site, data)
    yield from _of_tests(site, experiment)
    counted = experiment.aggregation.weighting == "records"
    yield _Rule(
        "policy.record_counts",
        counted and not policy.record_counts,
        'aggregation.weighting = "records"',
        '"uniform" or "declared"',
    )
    yield _Rule(
        "policy.canaries",
        experiment.audit.canaries > 0 and not policy.canaries,
        f"{experiment.audit.canaries} canaries of an audit among this site's training records",
        "none",
    )
    most, told = policy.transcript_until, experiment.transcript
    until = told.keep_until
    named = "no day that is named" if until is None else until.isoformat()
    yield _Rule(
        "policy.transcript_until",
        site.name in told.recorded
        and (most is None or until is None or not today <= until <= most),
        f"on {today.isoformat()}, a transcript of this site that is kept until {named}",
        "none"
        if most is None
        else f"one with a transcript.keep_until of {most.isoformat()} or before, and not over",
    )
    yield _Rule(
        "policy.own_recording",
        site.name in told.own and not policy.own_recording,
        "that this site writes down what it draws and contributes (transcript.own)",
        "a transcript.own without it",
    )


def _of_schema(site: Site, data: Data) -> Iterator[_Rule]:
    ours, theirs = site.data.agreed, data.agreed
    if theirs is None:
        return
    if ours is None:
        told = f"a run on files of the schema {theirs.name!r}"
        yield _Rule("data.schema", True, told, "the schema in [data] of this site, which has none")
        return
    for key, mine, other in differences(ours, theirs):
        yield _Rule(f"data.schema, {key}", True, other, mine)


def _of_sums(site: Site, experiment: Experiment, sites: int) -> Iterator[_Rule]:
    """Sums that tell how many records all sites have, and more, without noise."""
    fitting = agreement.preprocessor(experiment, sites)
    exact = fitting is not None and fitting.stages and experiment.privacy is None
    yield _Rule(
        "policy.record_counts",
        bool(exact) and not site.policy.record_counts,
        "exact statistics of all sites' records, their number among them",
        "statistics with noise ([privacy]), or none: [preprocessing] from declared values",
    )


def _of_code(site: Site, experiment: Experiment) -> Iterator[_Rule]:
    policy = site.policy
    if ":" not in experiment.model.name:
        yield _among("policy.models", experiment.model.name, policy.models)
    for key, reference in _named_code(experiment):
        pinned, found = policy.callables.get(reference), source_hash(reference)
        here = "in no file that is installed here" if found is None else f"with SHA-256 {found}"
        yield _Rule(
            "policy.callables",
            pinned is None or pinned != found,
            f"{key} = {reference!r} {here}",
            "no such code" if pinned is None else f"that with SHA-256 {pinned}",
        )


def _of_protocol(site: Site, experiment: Experiment, sites: int) -> Iterator[_Rule]:
    policy, protocol = site.policy, experiment.protocol
    yield _among("policy.protocols", protocol.name, policy.protocols)
    yield _among("policy.reveal", protocol.reveal, policy.reveal)
    one_opens = protocol.name in ("bfv", "ckks", "masked-bfv") and protocol.reveal == "server"
    openers = policy.minimum_openers
    yield _Rule(
        "policy.minimum_openers",
        one_opens and protocol.openers < openers,
        f"{protocol.openers}",
        f"at least {openers}",
    )
    colluding, least = agreement.tolerated(experiment), policy.minimum_colluding_sites
    yield _Rule(
        "policy.minimum_colluding_sites",
        colluding < least,
        f"{protocol.name} with {colluding}",
        f"at least {least}",
    )
    thresholds = agreement.thresholds(experiment, sites)
    yield _Rule(
        "policy.minimum_cohort",
        thresholds.minimum < policy.minimum_cohort,
        f"a sum of {thresholds.minimum} sites",
        f"at least {policy.minimum_cohort}",
    )
    yield _Rule(
        "policy.graph",
        thresholds.degree > 0 and policy.graph == "complete",
        f"masks with {thresholds.degree} of {sites - 1} other sites",
        'masks with all of them (protocol.graph = "complete")',
    )


def _of_tests(site: Site, experiment: Experiment) -> Iterator[_Rule]:
    """Counts of test records without noise: whoever chooses the models chooses what is counted."""
    evaluation, privacy = experiment.evaluation, experiment.privacy
    exact = evaluation is not None and (privacy is None or not evaluation.protected)
    yield _Rule(
        "policy.record_counts",
        exact and not site.policy.record_counts,
        "exact counts of all sites' test records, for the test figures",
        "counts with noise ([privacy], and evaluation.protected = true)",
    )


def _among(key: str, proposed: str, permitted: tuple[str, ...]) -> _Rule:
    known = " or ".join(f'"{name}"' for name in permitted) or "none"
    return _Rule(key, proposed not in permitted, f'"{proposed}"', known)


def _rounds(experiment: Experiment) -> int:
    """All rounds that may be charged, spare ones included."""
    return experiment.rounds + (experiment.privacy.spare_rounds if experiment.privacy else 0)


def _named_code(experiment: Experiment) -> tuple[tuple[str, str], ...]:
    """Every `module:callable` of an experiment, after the key that names it."""
    named = (
        ("model.name", experiment.model.name),
        ("model.loss", experiment.model.loss),
        ("training.optimiser", experiment.training.optimiser),
        ("aggregation.algorithm", experiment.aggregation.algorithm),
        ("data.source", experiment.data.source),
    )
    return tuple((key, value) for key, value in named if ":" in value)


def source_hash(reference: str) -> str | None:
    """SHA-256, hexadecimal, of the file of the module in "module:callable"; None without one.

    It is found as an import would find it, but neither it nor a package around it is imported.

    >>> source_hash("no_such_module:f") is None
    True
    """
    module, _, _ = reference.partition(":")
    path, spec = None, None
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        if spec is not None and path is None:
            return None  # a module that is no package has no modules
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path)
            if spec is not None:
                break
        else:
            return None
        path = spec.submodule_search_locations
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    try:
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    except OSError:
        return None


class Sentence(NamedTuple):
    """One thing a person is asked to agree to: what it is about, and what is asked, in words."""

    about: str
    text: str


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """What a person at a site is asked to agree to: one run of one experiment.

    parameters: of the dense model. plan: what the run promises; None where it promises nothing.
    budget: what of the data set's budget it takes; None where nothing is counted.
    """

    site: Site
    experiment: Experiment
    sites: int
    parameters: int
    thresholds: Thresholds
    plan: Plan | None
    budget: Forecast | None

    @property
    def rounds(self) -> int:
        """All rounds that may take place, spare ones included."""
        return _rounds(self.experiment)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites that take part, where the experiment names them or this site pins all."""
        if self.experiment.sites.names is not None:
            return tuple(sorted(self.experiment.sites.names))
        pinned = {*self.site.consortium, self.site.name}
        return tuple(sorted(pinned)) if len(pinned) == self.sites else ()

    @property
    def recorded(self) -> bool:
        """Whether a transcript of this site's messages is kept."""
        return self.site.name in self.experiment.transcript.consent

    @property
    def records_itself(self) -> bool:
        """Whether this site writes down what it draws and contributes."""
        return self.site.name in self.experiment.transcript.own

    @property
    def epsilon(self) -> Mapping[Observer, float]:
        """What all rounds cost, by who looks; empty without a plan."""
        if self.plan is None:
            return {}
        return {who: self.plan.spent(self.rounds, who) for who in Observer}

    def digest(self) -> bytes:
        """SHA-256 of what is asked, which a consent refers to (32 bytes).

        Over the experiment's own digest, the sites, the plan, the data set with its purpose, and
        what is kept of this site and until when: another of any of these asks anew.
        """
        until = self.experiment.transcript.keep_until
        kept = f"{self.recorded} {self.records_itself} {until}"
        data, code = self.site.data, self.site.policy.callables
        hashes = [
            f"{reference} {code.get(reference)}" for _, reference in _named_code(self.experiment)
        ]
        return digest(
            "asked",
            self.experiment.digest(),
            self.site.name.encode(),
            data.id.encode(),
            data.purpose.encode(),
            str(self.sites).encode(),
            " ".join(self.names).encode(),
            str(self.parameters).encode(),
            repr(self.plan).encode(),
            kept.encode() if self.recorded or self.records_itself else b"",
            "\n".join(hashes).encode(),
        )

    def sentences(self) -> tuple[Sentence, ...]:
        """What is asked, in the words of people who sign."""
        found = [
            Sentence("purpose", f"{self.site.data.purpose} (data set {self.site.data.id})"),
            Sentence("experiment", self._told_work()),
            Sentence("who takes part", self._told_sites()),
            Sentence("model", self._told_model()),
            Sentence("protocol", self._told_protocol()),
            *self._told_data(),
            *self._told_canaries(),
            Sentence("privacy", self._told_privacy()),
            Sentence("budget", self._told_budget()),
            Sentence("leaves the site", self._told_traffic()),
            Sentence("transcript", self._told_transcript()),
        ]
        return tuple(found)

    def _told_work(self) -> str:
        steps, spare = self.experiment.training.local_steps, self.rounds - self.experiment.rounds
        return (
            f"{self.experiment.name}: at most {self.rounds:,} rounds"
            + (f" ({spare:,} of them only in place of rounds that fail)" if spare else "")
            + f", each with {words.counted(steps, 'training step')} on this site's records."
        )

    def _told_sites(self) -> str:
        named = f": {', '.join(self.names)}" if self.names else ""
        told = f"{self.sites} sites and a server{named}."
        known = {*self.site.consortium, self.site.name}
        if self.names and known.issuperset(self.names):
            return f"{told} This site knows the key of each."
        if self.site.policy.unknown_sites:
            return (
                f"{told} The server says what the keys of others are: it could play other sites "
                "itself, and learn what masks would hide from it."
            )
        others = ", ".join(sorted(known - {self.site.name})) or "nobody's yet"
        return f"{told} Only sites whose key this site knows may take part ({others})."

    def _told_model(self) -> str:
        model = f"{self.experiment.model.name}, {words.counted(self.parameters, 'parameter')}."
        code = [f"{reference} ({key})" for key, reference in _named_code(self.experiment)]
        if not code:
            return f"{model} No code but securefl's own runs on the records."
        return (
            f"{model} Code that is installed at this site runs on the records: {', '.join(code)}."
        )

    def _told_protocol(self) -> str:
        protocol = self.experiment.protocol
        name, least = protocol.name, self.thresholds.minimum
        if name == "plain":
            return "plain: it hides nothing. The server reads this site's every update."
        if name in ("bfv", "ckks"):
            return (
                f"{name}: a server that follows the protocol and colludes with no site learns only "
                f"the sum over {least} or more sites. Together with one site it can read this "
                "site's every update."
            )
        colluding = agreement.tolerated(self.experiment)
        told = f"{name}: nobody learns this site's update; only the sum over {least} or more sites "
        told += "is opened. "
        told += (
            f"Should the server and up to {words.counted(colluding, 'other site')} work "
            f"together, they learn the sum over the remaining {least - colluding} or more, "
            "this site among them."
            if colluding
            else "This holds only as long as no site works together with the server."
        )
        if self.thresholds.degree:
            told += " All this holds only while the server follows the protocol."
        if protocol.reveal == "sites":
            told += " The sum and the model stay with the sites; the server gets neither."
        return told

    def _told_data(self) -> Iterator[Sentence]:
        """What is summed besides updates, where records are read by a schema."""
        schema, evaluation = self.experiment.data.agreed, self.experiment.evaluation
        fitting = agreement.preprocessor(self.experiment, self.sites)
        if schema is None or fitting is None:
            return
        features = ", ".join(self.experiment.data.features)
        yield Sentence(
            "data",
            f"Files as the schema {schema.name!r} says, {schema.digest().hex()[:16]}. The model "
            f"learns {schema.label} from {features}.",
        )
        if fitting.stages:
            noise = "exact" if self.plan is None else "with noise, within the run's epsilon"
            yield Sentence(
                "statistics",
                f"Before training, sums over all sites' training records are opened, {noise}: "
                f"{fitting.revealed}.",
            )
        if evaluation is not None:
            covered = self.plan is not None and evaluation.protected
            noise = "with noise, at the run's own epsilon" if covered else "exact"
            times = words.counted(agreement.evaluations(self.experiment), "time")
            yield Sentence(
                "test figures",
                f"{times}, sums of counts over all sites' test records are opened, {noise}. No "
                "training reads these records.",
            )

    def _told_canaries(self) -> Iterator[Sentence]:
        """What is trained on besides records."""
        count = self.experiment.audit.canaries
        if count:
            yield Sentence(
                "canaries",
                f"For an audit this site makes {words.counted(count, 'record')} up and trains on "
                "those that its own coin picks, about half. Which these are stays here. They are "
                "in no statistics and no test figures, and cost the real records no privacy; the "
                "model learns less from them.",
            )

    def _told_privacy(self) -> str:
        plan, privacy = self.plan, self.experiment.privacy
        if plan is None or privacy is None:
            return (
                "NOT PRIVATE: no noise is added. What the sums and the model tell of this site's "
                "records is not limited by anything."
            )
        if self.experiment.not_private_seed is not None:
            return "NOT PRIVATE: the noise comes from a seed that others know. For tests only."
        most = max(self.epsilon.values())
        because = {
            "record": "one record was among this site's",
            "person": "one person's records were among this site's",
            "site": "this site's updates were among them",
        }[privacy.unit]
        if isinstance(plan, RecordLocal):
            told = f"Epsilon {words.rounded_up(most)} against everyone else"
            relied = "This site adds all of that noise itself, so it holds even if all others lie."
        else:
            told = ", ".join(
                f"epsilon {words.rounded_up(spent)} against {who.value}"
                for who, spent in self.epsilon.items()
            )
            told = words.sentence_case(told)
            relied = (
                "Each site adds a share of the noise, and only the sum over "
                f"{plan.cohort.minimum} or more has enough: this relies on the protocol above."
            )
        return (
            f"{told}, at delta {privacy.delta:g}, for all rounds together ({plan.adjacency}). So "
            f"whatever anyone concludes is at most {words.odds(most)} times as likely because "
            f"{because}, but for a probability of {privacy.delta:g}. {relied}"
        )

    def _told_budget(self) -> str:
        if self.budget is None:
            return "Nothing is counted, for nothing is promised."
        known, unit = self.budget, self.site.budget.unit
        taken = max(0.0, known.after - known.spent)
        told = (
            f"Epsilon {words.rounded_up(known.spent)} of {known.epsilon:g} (delta "
            f"{self.site.budget.delta:g}, counted in {unit}s) is spent. Counted so that it holds "
            f"whatever runs come later, this run takes up to {words.rounded_up(taken)} more"
        )
        if known.after > known.epsilon:
            return (
                f"{told}, which is more than is left: this site will stop, for good, before the "
                "run ends."
            )
        told += f" and leaves {words.rounded_down(known.epsilon - known.after)}."
        if known.alone:
            told += " It fits only if no other run ever uses this data set; none will be let."
        return told

    def _told_traffic(self) -> str:
        upload = {
            "plain": "one update in the clear",
            "bfv": "one encrypted update",
            "ckks": "one encrypted update",
            "secagg": "one masked update",
            "masked-bfv": "one masked and encrypted update",
        }[self.experiment.protocol.name]
        counted = self.experiment.aggregation.weighting == "records"
        return (
            f"Each round {upload} of {words.counted(self.parameters, 'number')} at most, "
            "with what the protocol needs to add and open sums. Others see that this site "
            "takes part, when, how long it takes, and where its ledger stands (a hash)."
            + (" The sum of all sites' record counts is opened." if counted else "")
            + " No record leaves."
        )

    def _told_transcript(self) -> str:
        until = self.experiment.transcript.keep_until
        day = "; no last day is named" if until is None else f" until {until.isoformat()}"
        told = []
        if self.recorded:
            told += [f"This site's messages are kept for later study{day}."]
        if self.records_itself:
            told += [
                "This site also writes down, in its own folder, what it draws at random and what "
                f"it contributes{day}. Nothing of that is sent; whoever got it would read this "
                "site's every update."
            ]
        return " ".join(told) or "None of this site's messages is kept for later study."


def asked(
    site: Site, experiment: Experiment, sites: int, dimension: int, ledger: Ledger | None = None
) -> Asked:
    """What `experiment` asks of a site among `sites`, for a model of `dimension` parameters.

    ledger: the site's; without one, or where it does not know the data set yet, as for a budget of
    which nothing is spent. Raises ConfigurationError where it cannot be run, or cannot be counted.
    """
    plan = _plan(experiment, sites, dimension)
    budget = None
    if plan is not None and experiment.privacy is not None:
        unit, per_round, rounds = experiment.privacy.unit, plan.per_round, _rounds(experiment)
        besides = agreement.releases(experiment, sites, plan)
        if ledger is not None and site.data.id in ledger.datasets:
            budget = ledger.forecast(site.data.id, unit, per_round, rounds, besides)
        else:
            data, limit = site.data, site.budget
            fresh = Registered("", data.id, limit.unit, limit.epsilon, limit.delta, data.purpose)
            budget = forecast(fresh, (), unit, per_round, rounds, besides)
    thresholds = agreement.thresholds(experiment, sites)
    return Asked(site, experiment, sites, dimension, thresholds, plan, budget)
