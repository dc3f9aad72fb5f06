"""The audit of a run: every attack that its records allow, each beside its two controls.

Every attack is tried in three worlds: the run as it was recorded; one without any defence, where it
must succeed; and one with nothing to find, where it must not. A control that goes the wrong way, as
chance has it now and then, is tried once more, in a new world; where that goes wrong too the attack
shows nothing, and its row says so. Claims are tested together at one level: a claim is contradicted
where p is below that level over the number of claims tested (Bonferroni).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, final

import msgspec

from attacks import attack as attacks
from attacks.attack import (
    Attack,
    AttackFailedError,
    AttackResult,
    Claim,
    Curve,
    Profile,
    Score,
    Trial,
    UnavailableError,
    one_line,
    receive,
    send,
    stop,
)
from attacks.case import Case
from attacks.view import (
    ActiveServer,
    AnyView,
    ColludingView,
    NetworkView,
    OpenedView,
    ReleasedModelView,
    ServerView,
)
from securefl import agreement
from securefl.config import ConfigurationError, load_site
from securefl.records import EXPERIMENT
from securefl.report import words
from securefl.site_folder import SITE
from securefl.transcript import TRANSCRIPT

AUDIT: Final = "audit.json"
LEVEL: Final = 0.01
"""How often all claims of a run that keeps them are contradicted by chance."""

Verdict = Literal[
    "contradicted",
    "broken",
    "within the claim",
    "this attack fails",
    "proved",
    "not assessed",
    "no conclusion",
]
"""contradicted: a claim does not hold. broken: the attack succeeds, and no claim says it would not.
within the claim: it succeeds by less than what is claimed. proved: an argument excludes it, and it
found nothing. no conclusion: a control went the wrong way, or the attack stopped."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one attack showed on one run. Everything that a report says of it is in here."""

    attack: str
    title: str
    source: str
    claim: str
    made: bool
    """Whether the claim is made of this run."""
    assumption: str
    argument: str | None
    adversary: str = ""
    verdict: Verdict
    reason: str = ""
    """Why there is no verdict."""
    results: tuple[AttackResult, ...] = ()
    p: float | None = None
    """Of evidence at least as strong, if the claim is true."""
    level: float | None = None
    """Below which p contradicts the claim."""
    limit: str = ""
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    undefended: Control | None = None
    no_signal: Control | None = None
    seconds: float = 0.0


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the attack showed in a world with a known answer."""

    results: tuple[AttackResult, ...]
    succeeded: bool
    curves: tuple[Curve, ...] = ()


class Hashes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256, hexadecimal, of what the audit stands on.

    policies: of each site's site.toml, by site, where it is at hand. ledgers: the head of each
    site's ledger, as the site itself signed it last. code: of every source file of the three
    packages. evidence: of every file of the run that was read, with its name.
    """

    experiment: str
    policies: dict[str, str]
    ledgers: dict[str, str]
    code: str
    evidence: str


class Audit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `securefl audit` found: audit.json."""

    version: Literal[1] = 1
    run: str
    directory: str
    """The name of the run's directory."""
    protocol: str
    unit: str | None
    """What the plan protects: a record, a person, a site; None without a plan."""
    sites: tuple[str, ...]
    auditing: tuple[str, ...]
    """The sites whose records were at hand."""
    epsilon: dict[str, float]
    delta: float | None
    private: bool
    made: str
    """When, UTC."""
    software: str
    profile: Profile
    seed: int
    level: float
    tests: int
    """How many claims were tested."""
    hashes: Hashes
    rows: tuple[Row, ...]
    alarms: tuple[str, ...]
    """The attacks that contradict a claim."""
    broken: tuple[str, ...]
    """Those that succeed, and nothing is claimed against them."""
    left_out: tuple[str, ...]
    """Those that are installed, and were left out by choice."""
    unseen: tuple[str, ...]
    """What no attack here could have seen, in sentences."""
    seconds: float

    def to_bytes(self) -> bytes:
        """audit.json."""
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"

    @classmethod
    def load(cls, folder: Path) -> Audit:
        """The audit in the run directory `folder`; ConfigurationError where there is none."""
        path = folder / AUDIT
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {path} ({error.strerror}): `securefl audit {folder}` makes it"
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{path} is damaged: {error}: `securefl audit {folder}` makes it anew"
            ) from None


LIMIT: Final = 3600.0
"""Seconds that one attack may take, by default."""

Told = Callable[[str, float, str], None]
"""told(attack, fraction, state): what is told while an audit goes on."""


def assess(
    attack: Attack[Any, Any],
    case: Case,
    seed: int,
    progress: attacks.Progress = lambda _: None,
) -> Row:
    """What `attack` shows on a run, beside its two controls. Claims are judged later: `judged`."""
    started = time.perf_counter()
    row, claim = _empty(attack, case), _said(attack, case)
    try:
        trial = attack.trial(case)
        worlds = [
            trial,
            attack.undefended(seed, case.profile),
            attack.no_signal(seed, case.profile),
        ]
        guesses = attacks.guess(attack, worlds, seed, progress)
        found, undefended, no_signal = (
            attack.score(guessed, world.truth, seed)
            for guessed, world in zip(guesses, worlds, strict=True)
        )
        notes = found.notes
        if not undefended.succeeded:
            undefended = _again(attack, attack.undefended, case, seed)
            notes += ("Its control without any defence is a second one: it failed in the first.",)
        if no_signal.succeeded:
            no_signal = _again(attack, attack.no_signal, case, seed)
            notes += (
                "Its control with nothing to find is a second one: it succeeded in the first.",
            )
    except UnavailableError as error:
        return msgspec.structs.replace(row, reason=str(error))
    except AttackFailedError as error:
        return msgspec.structs.replace(row, verdict="no conclusion", reason=str(error))
    if found.results[0].n == 0:
        return msgspec.structs.replace(
            row, reason=f"there was nothing to try it on ({found.limit})"
        )
    verdict: Verdict = "this attack fails"
    reason = ""
    if not undefended.succeeded:
        verdict, reason = "no conclusion", "it did not succeed where nothing is defended"
    elif no_signal.succeeded:
        verdict, reason = "no conclusion", "it succeeded where there is nothing to find"
    elif found.succeeded:
        verdict = "within the claim" if claim.made else "broken"
    elif claim.argument is not None:
        verdict = "proved"
    return msgspec.structs.replace(
        row,
        adversary=_adversary(trial.view, bool(attack.given)),
        verdict=verdict,
        reason=reason,
        results=found.results,
        p=found.p,
        limit=found.limit,
        notes=notes,
        curves=found.curves,
        undefended=Control(undefended.results, undefended.succeeded, undefended.curves),
        no_signal=Control(no_signal.results, no_signal.succeeded, no_signal.curves),
        seconds=round(time.perf_counter() - started, 2),
    )


def _again(
    attack: Attack[Any, Any],
    control: Callable[[int, Profile], Trial[Any]],
    case: Case,
    seed: int,
) -> Score:
    """What `attack` shows in another world of `control`."""
    another = (seed + 1) % (1 << 32)
    world = control(another, case.profile)
    (guessed,) = attacks.guess(attack, [world], another)
    return attack.score(guessed, world.truth, another)


def _said(attack: Attack[Any, Any], case: Case) -> Claim:
    """What `attack` would contradict; ConfigurationError where it cannot say."""
    try:
        return attack.claim(case.experiment)
    except Exception as error:
        raise ConfigurationError(
            f"the attack {attack.name} cannot say what it attacks in this run "
            f"({type(error).__name__}: {error}): mend or remove the package that has it"
        ) from error


def _empty(attack: Attack[Any, Any], case: Case) -> Row:
    """What is known before an attack is tried."""
    claim = _said(attack, case)
    return Row(
        attack=attack.name,
        title=attack.title,
        source=attack.source,
        claim=claim.sentence,
        made=claim.made,
        assumption=claim.assumption,
        argument=claim.argument,
        verdict="not assessed",
    )


def judged(rows: Iterable[Row], level: float = LEVEL) -> tuple[Row, ...]:
    """The rows with claims contradicted where their evidence says so, all at `level` together."""
    rows = tuple(rows)
    tested = [row for row in rows if _tests(row)]
    each = level / max(1, len(tested))
    return tuple(
        msgspec.structs.replace(
            row,
            level=each,
            verdict="contradicted" if (row.p or 0.0) <= each else row.verdict,
        )
        if _tests(row)
        else row
        for row in rows
    )


def _tests(row: Row) -> bool:
    return row.made and row.p is not None and row.verdict != "no conclusion"


def audit(
    case: Case,
    names: Sequence[str] | None = None,
    *,
    seed: int | None = None,
    workers: int = 2,
    limit: float = LIMIT,
    told: Told = lambda *_: None,
) -> Audit:
    """Every attack (or those in `names`) on the run, in `workers` processes.

    seed: of everything that the attacks draw; by default from the operating system, and recorded.
    limit: in seconds; an attack that takes longer is stopped, and comes to no conclusion.
    """
    started = time.perf_counter()
    chosen = list(names) if names is not None else list(attacks.installed())
    for name in chosen:
        _said(attacks.find(name), case)
    # What cannot be read, or is not to be, shows before any work.
    read, auditing = hashes(case), case.auditing
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    found = _in_parallel(case, chosen, seed, workers, limit, told)
    rows = judged(found[name] for name in chosen)
    summary = case.summary
    return Audit(
        run=summary.name,
        directory=case.folder.resolve().name,
        unit=case.experiment.privacy.unit if case.experiment.privacy else None,
        protocol=summary.protocol,
        sites=summary.sites,
        auditing=auditing,
        epsilon=summary.epsilon,
        delta=summary.delta,
        private=summary.private,
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        software=importlib.metadata.version("securefl"),
        profile=case.profile,
        seed=seed,
        level=LEVEL,
        tests=sum(_tests(row) for row in rows),
        hashes=read,
        rows=rows,
        alarms=tuple(row.attack for row in rows if row.verdict == "contradicted"),
        broken=tuple(row.attack for row in rows if row.verdict == "broken"),
        left_out=tuple(name for name in attacks.installed() if name not in chosen),
        unseen=unseen(case),
        seconds=round(time.perf_counter() - started, 1),
    )


# --- several attacks at a time, each in a process that assesses it -----------------------------


class _Job(msgspec.Struct, frozen=True):
    folder: str
    own: str | None
    profile: Profile
    attack: str
    seed: int


class _Done(msgspec.Struct, frozen=True, tag=True):
    row: Row


class _Part(msgspec.Struct, frozen=True, tag=True):
    fraction: float


class _Stopped(msgspec.Struct, frozen=True, tag=True):
    line: str


def _in_parallel(
    case: Case, names: Sequence[str], seed: int, workers: int, limit: float, told: Told
) -> Mapping[str, Row]:
    """Each attack's row. What stops an attack is in its row; the others go on."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    rows: dict[str, Row] = {}
    working: set[_Worker] = set()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set() and (name := _next(waiting)) is not None:
            with _Worker(working) as worker:
                while name is not None:
                    told(name, 0.0, "running")
                    own = str(case.own) if case.own is not None else None
                    job = _Job(str(case.folder), own, case.profile, name, seed)
                    try:
                        rows[name] = worker.do(job, limit, told)
                    except AttackFailedError as error:  # and a new process for the next
                        row = _empty(attacks.find(name), case)
                        rows[name] = msgspec.structs.replace(
                            row, verdict="no conclusion", reason=str(error)
                        )
                        told(name, 1.0, "no conclusion")
                        break
                    told(name, 1.0, rows[name].verdict)
                    name = None if stopped.is_set() else _next(waiting)

    count = max(1, min(workers, len(names)))
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after an error, or Ctrl-C, nothing is left at work
            stopped.set()
            while wait(futures, 0.1).not_done:
                for worker in tuple(working):
                    worker.kill()
    for future in futures:
        future.result()
    return rows


def _next(waiting: queue.SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


@final
class _Worker:
    """A process that assesses one attack after the other; in `working` while there is one."""

    def __init__(self, working: set[_Worker]) -> None:
        self._working = working

    def __enter__(self) -> _Worker:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attacks.alone", "audit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._working.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._working.discard(self)
        stop(self._process)

    def kill(self) -> None:
        """End the process at once; whoever waits for a row is told so."""
        self._process.kill()

    def do(self, job: _Job, limit: float, told: Told) -> Row:
        """The row of `job`; AttackFailedError where it cannot be assessed at all, or not within
        `limit` seconds."""
        deadline = threading.Timer(limit, self.kill)
        deadline.start()
        try:
            send(self._process.stdin, msgspec.msgpack.encode(job))
            while True:
                data = receive(self._process.stdout)
                said = msgspec.msgpack.decode(data, type=_Done | _Part | _Stopped)
                if isinstance(said, _Done):
                    return said.row
                if isinstance(said, _Stopped):
                    raise AttackFailedError(said.line)
                told(job.attack, said.fraction, "running")
        except (EOFError, BrokenPipeError):
            code = stop(self._process)
            raise AttackFailedError(
                f"{job.attack}: stopped after {limit / 60:g} minutes, --limit gives it more"
                if deadline.finished.is_set()
                else f"{job.attack}: the process that assesses it ended with status {code}"
            ) from None
        finally:
            deadline.cancel()


def serve(source: Any, sink: Any) -> None:
    """The process that assesses: answer until `source` ends."""
    cases: dict[tuple[str, str | None, Profile], Case] = {}
    while True:
        try:
            job = msgspec.msgpack.decode(receive(source), type=_Job)
        except EOFError:
            return
        try:
            key = (job.folder, job.own, job.profile)
            if key not in cases:
                own = Path(job.own) if job.own is not None else None
                cases[key] = Case.open(Path(job.folder), job.profile, own)

            def told(fraction: float) -> None:
                send(sink, msgspec.msgpack.encode(_Part(float(fraction))))

            row = assess(attacks.find(job.attack), cases[key], job.seed, told)
            said = msgspec.msgpack.encode(_Done(row))
        except Exception as error:
            said = msgspec.msgpack.encode(_Stopped(f"{job.attack}: {one_line(error)}"))
        send(sink, said)


# --- what the audit cannot see, and what it stands on --------------------------------------------


def unseen(case: Case) -> tuple[str, ...]:
    """Bugs that leave no trace in any view of this run, in sentences."""
    found = ["A program that was changed, and records what the unchanged one would have."]
    privacy, recorded = case.experiment.privacy, case.experiment.transcript
    if privacy is not None and privacy.noise == "distributed":
        shares = max(agreement.tolerated(case.experiment), 1)
        found.append(
            "A site that leaves out its share of the noise: the promise already takes "
            f"{words.counted(shares, 'share')} for known, so that what everybody sees stays "
            "within it."
        )
    elif privacy is not None and (missing := sorted(set(case.sites) - set(recorded.own))):
        found.append(
            "Noise that is missing at a site that did not record itself "
            f"({', '.join(missing)}): in a sum the others' noise covers it."
        )
    if missing := sorted(set(case.sites) - set(recorded.consent)):
        found.append(f"What the messages of {', '.join(missing)} tell: they were not recorded.")
    return tuple(found)


def hashes(case: Case) -> Hashes:
    """What the audit of `case` stands on."""
    return Hashes(
        experiment=_sha256((case.folder / EXPERIMENT).read_bytes()),
        policies={site: _sha256(path.read_bytes()) for site, path in _policies(case).items()},
        ledgers=case.ledger_heads(),
        code=_code(),
        evidence=_evidence(case),
    )


def _policies(case: Case) -> dict[str, Path]:
    return {load_site(folder / SITE).name: folder / SITE for folder in case.site_folders()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _code() -> str:
    """Over every Python source of the three packages, by name, as installed."""
    total = hashlib.sha256()
    for package in ("protocols", "securefl", "attacks"):
        root = Path(str(files(package)))
        for path in sorted(root.rglob("*.py")):
            total.update(f"{package}/{path.relative_to(root)}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _evidence(case: Case) -> str:
    """Over every file of the run that an attack may read, by name."""
    total, folder = hashlib.sha256(), case.folder
    names = ["summary.json", "metrics.jsonl", "model.safetensors", "model.json"]
    parts = {name: folder / name for name in names}
    places = {TRANSCRIPT: folder / TRANSCRIPT}
    places |= {f"own/{site}": path for site, path in case.private_folders().items()}
    for place, inner in places.items():
        parts |= {f"{place}/{path.name}": path for path in inner.glob("*") if path.is_file()}
    for name, path in sorted(parts.items()):
        if path.exists():
            total.update(f"{name}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _adversary(view: AnyView, given: bool) -> str:
    """Who sees a view, in words."""
    match view:
        case ReleasedModelView():
            told = "whoever has the trained model"
        case NetworkView():
            told = "whoever taps the wires, under TLS"
        case ServerView(crossings=crossed):
            sites = len({item.site for item in crossed})
            told = f"the server, which follows the protocol and keeps {sites} sites' messages"
        case ColludingView(recordings=recordings, with_server=True):
            told = f"the server, with all that {_names(recordings)} holds"
        case ColludingView(recordings=recordings):
            told = f"{_names(recordings)}, pooling all they hold, without the server"
        case OpenedView(site=site):
            told = f"whoever opened what {site} contributed, round by round"
        case ActiveServer():
            told = "a server that sends what it likes"
    return told + (", and has records to ask about" if given else "")


def _names(recordings: Iterable[Any]) -> str:
    return " and ".join(item.site for item in recordings) or "nobody"
