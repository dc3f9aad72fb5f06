"""One site's book of the privacy that its data sets have spent: it outlives every run.

A data set has one budget, an epsilon at one delta for one unit, whatever runs and servers come and
however its records change. A round is charged before a record is read for it, in a transaction that
is on the disk when `charge` returns; an aborted round stays charged.

**The filter.** Later runs are chosen by people who saw what earlier ones gave, so costs compose
fully adaptively. Renyi divergences of one order that was fixed beforehand then still add up
(Feldman and Zrnic 2021, section 4): who stops before their sum exceeds a bound has spent no more
than it. The order of a data set is fixed when its first run is opened, from that run's plan and the
budget alone. At an order chosen afterwards the figure would be lower, and would not hold. What
roundings and draws are not exact is charged to a share of delta that is fixed beforehand too
(`SET_ASIDE`). The promise, whatever anybody chooses and wherever they stop, is the budget; the
figure in between is what the rounds so far cost if their number did not depend on what was seen.

**A run by itself.** The first run's plan is fixed before anything was spent, so that the tighter
accountant of `accounting.cost` holds for it. A run that fits the budget only by that one may have
the data set to itself: no other is ever opened on it. Which of the two holds is decided before the
first charge, from the plan alone.

**The chain.** Every entry is hashed with the one before it. The last hash, signed by the site, goes
with its uploads: a ledger that was edited, rolled back or replaced no longer contains what a peer
has kept (`verify`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, final

import msgspec
from msgspec import Meta

from protocols.identity import Roster, SigningKey, digest
from securefl import store
from securefl.config import ConfigurationError
from securefl.privacy import accounting
from securefl.privacy.accounting import Curve, Event, Repeated
from securefl.store import CorruptStoreError

Unit = Literal["record", "person", "site"]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
# No control characters, no other breaks of a line, nothing that turns the direction of writing.
_PRINTED: Final = r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z"
Text = Annotated[str, Meta(max_length=1000, pattern=_PRINTED)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Delta = Annotated[float, Meta(gt=0, lt=1)]
Count = Annotated[int, Meta(ge=1, le=2**62)]

WAIT_SECONDS: Final = 30.0
"""How long a charge waits for another process that is charging."""

_START: Final = bytes(32)
_LABEL: Final = b"securefl/1 ledger entry\0"
_VERSION: Final = 1
_TABLES: Final = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB NOT NULL, head BLOB NOT NULL)",
    "CREATE TABLE records (dataset TEXT NOT NULL, hash BLOB NOT NULL,"
    " PRIMARY KEY (hash, dataset)) WITHOUT ROWID",
    "CREATE TABLE heads (site TEXT NOT NULL, entries INTEGER NOT NULL, hash BLOB NOT NULL,"
    " signature BLOB NOT NULL, number INTEGER PRIMARY KEY AUTOINCREMENT)",
    "CREATE INDEX heads_of ON heads (site, number)",
)


_WRITABLE: Final = "let this process write the file and its folder, and leave them in place"
_MENDS: Final = {
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_IOERR: "free space on its disk, or see to the disk",
    sqlite3.SQLITE_READONLY: _WRITABLE,
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_PERM: _WRITABLE,
}
"""How to mend what is no damage of the file."""


SET_ASIDE: Final = 0.25
"""The share of delta that is kept for slips and distances. A plan asks for a hundredth."""

_COSTLY: Final = 100.0
"""Above this epsilon, nobody asks the tighter accountant."""


class BudgetSpentError(Exception):
    """A charge that would exceed a budget: says what was asked and what is left."""


class OverlapError(ConfigurationError):
    """A new data set that holds records of another one."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    """One line of the book. at: UTC, to the second."""

    at: str


class Registered(_Entry, frozen=True):
    """A data set and its budget; again for one that is there: a person changed its budget."""

    dataset: Name
    unit: Unit
    epsilon: Positive
    delta: Delta
    purpose: Text
    by: Text = ""


class Content(_Entry, frozen=True):
    """What the data set holds now, as a keyed hash (32 bytes, hexadecimal).

    key: the keyed hash of a constant, by which the key is known again.
    """

    dataset: Name
    fingerprint: str
    key: str


class Accepted(_Entry, frozen=True):
    """A person's decision that a data set may share records with others."""

    dataset: Name
    overlaps: tuple[Name, ...]
    reason: Text
    by: Text


class Released(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run may release besides its rounds of training: `times`, spare ones included.

    curve: of one release. held_out: it reads test records only, and no round of training or other
    release reads any of those.
    """

    name: Name
    event: dict[str, str | float | int]
    curve: Curve
    times: Count
    held_out: bool


class Opened(_Entry, frozen=True):
    """A run that may charge the data set. curve: of one round; order: of the data set's filter.

    alone: the run has the data set to itself, by `accounting.cost`. promise: SHA-256 of the
    experiment and the plan, hexadecimal.
    """

    dataset: Name
    run: Text
    experiment: Text
    promise: str
    unit: Unit
    event: dict[str, str | float | int]
    steps: Count
    rounds: Count
    epsilon: Positive
    curve: Curve
    order: float
    alone: bool
    releases: tuple[Released, ...] = ()


class Charged(_Entry, frozen=True):
    """One round of a run. release: what it was for; empty for training."""

    run: Text
    round: Count
    release: Annotated[str, Meta(pattern=r"\A([A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z")] = ""


class Logged(_Entry, frozen=True):
    """How many lines the site's audit log had, and the hash of the last (32 bytes, hexadecimal)."""

    lines: Count
    hash: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


Kind = TypeVar("Kind", bound=_Entry)
Entry = Registered | Content | Accepted | Opened | Charged | Logged
_DECODER: Final = msgspec.json.Decoder(Entry)


@final
@dataclass(frozen=True, slots=True)
class Head:
    """How long the ledger was, and the hash of its last entry (32 bytes)."""

    entries: int
    hash: bytes

    def statement(self) -> bytes:
        """What a site signs."""
        return digest("ledger head", self.entries.to_bytes(8, "big"), self.hash)

    def signed(self, key: SigningKey) -> SignedHead:
        """This head under the site's pinned key."""
        return SignedHead(self.entries, self.hash, key.sign(self.statement()))


class SignedHead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A head as it travels and as peers keep it."""

    entries: Annotated[int, Meta(ge=0, le=2**62)]
    hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]

    def check(self, site: str, roster: Roster) -> Head:
        """The head; ProtocolError unless `site` signed it with the key that the roster pins."""
        head = Head(self.entries, self.hash)
        roster.verify(site, self.signature, head.statement())
        return head


@final
@dataclass(frozen=True, slots=True)
class Release:
    """What a run asks to release besides its rounds of training: see `Released`."""

    name: str
    event: accounting.PoissonDiscreteGaussianSum
    times: int
    held_out: bool


@final
@dataclass(slots=True)
class _Run:
    opened: Opened
    charged: int = 0
    last_round: int = 0
    released: dict[str, int] = field(default_factory=dict)

    def count(self, release: str) -> int:
        return self.released.get(release, 0) if release else self.charged

    def counts(self, more: Mapping[str, int]) -> dict[str, int]:
        """How often each of its mechanisms was charged, by name, training under ""."""
        names = ("", *(release.name for release in self.opened.releases))
        found = {name: self.count(name) + more.get(name, 0) for name in names}
        return {name: count for name, count in found.items() if count}


@final
@dataclass(slots=True)
class _Book:
    """What all entries so far come to."""

    length: int = 0
    hash: bytes = _START
    datasets: dict[str, Registered] = field(default_factory=dict)
    accepted: dict[str, set[str]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    key: str = ""
    runs: dict[str, _Run] = field(default_factory=dict)

    def add(self, entry: Entry, head: bytes) -> None:
        if isinstance(entry, Charged):
            run = self.runs[entry.run]
            if entry.release:
                run.released[entry.release] = run.count(entry.release) + 1
            else:
                run.charged += 1
            run.last_round = entry.round
        elif isinstance(entry, Registered):
            self.datasets[entry.dataset] = entry
        elif isinstance(entry, Accepted):
            self.accepted.setdefault(entry.dataset, set()).update(entry.overlaps)
        elif isinstance(entry, Content):
            self.fingerprints[entry.dataset], self.key = entry.fingerprint, entry.key
        elif isinstance(entry, Opened):
            self.runs[entry.run] = _Run(entry)
        self.length, self.hash = self.length + 1, head

    def of(self, dataset: str) -> list[_Run]:
        return [run for run in self.runs.values() if run.opened.dataset == dataset]

    def epsilon(self, dataset: str, run: str = "", more: Mapping[str, int] | None = None) -> float:
        """What the data set has spent, with `more` rounds of a run, by what they are for."""
        counts = [
            (held.opened, held.counts((more or {}) if held.opened.run == run else {}))
            for held in self.of(dataset)
        ]
        counts = [(opened, count) for opened, count in counts if count]
        if not counts:
            return 0.0
        first, charged = counts[0]
        if first.alone:
            return _alone(_parts(first, charged), self.datasets[dataset].delta)
        total = Curve.total((_run_curve(opened, count), 1) for opened, count in counts)
        return _filtered(total, self.datasets[dataset], first.order)


@final
@dataclass(frozen=True, slots=True)
class Holding:
    """A site's data set in its ledger, as one run may use it. run: a name no other run has."""

    ledger: Ledger
    dataset: str
    run: str


@final
@dataclass(frozen=True, slots=True)
class Account:
    """One run's right to charge one data set."""

    ledger: Ledger
    run: str

    def charge(self, round_number: int, release: str = "") -> Head:
        """Charge one round, durably. Raises BudgetSpentError, and charges nothing, at the end.

        release: what it is for, of those that the run was opened with; training by default.
        """
        return self.ledger.charge(self.run, round_number, release)

    @property
    def last_round(self) -> int:
        """The highest round number that was charged; 0 at first."""
        return self.ledger.last_round(self.run)

    def rounds_left(self) -> int:
        """How many more rounds the budget allows, up to those the run was opened for."""
        return self.ledger.rounds_left(self.run)


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """Where one data set stands. left: of its epsilon, before any further round."""

    dataset: str
    purpose: str
    unit: Unit
    epsilon: float
    delta: float
    spent: float
    order: float | None
    alone: bool
    runs: tuple[RunStanding, ...]

    @property
    def left(self) -> float:
        """Of the budget; what one run may still add is less, for costs do not simply add up."""
        return max(0.0, self.epsilon - self.spent)


@final
@dataclass(frozen=True, slots=True)
class RunStanding:
    """One run on a data set: what was asked, and how many rounds were charged.

    released: how often what else was charged, by name.
    """

    run: str
    experiment: str
    opened: str
    mechanism: str
    rounds: int
    epsilon: float
    charged: int
    released: Mapping[str, int] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Forecast:
    """What a data set of budget `epsilon` has spent, and would have spent after one more run.

    alone: it fits only if no other run ever has the data set. Where `after` exceeds `epsilon`, the
    site would stop before the run ends.
    """

    epsilon: float
    spent: float
    after: float
    alone: bool


@final
class Ledger:
    """The ledger in the SQLite file `path`, made when it does not exist; a context manager.

    Beside it lies `path` with the suffix .key: the secret of the keyed hashes. Every process that
    opens the ledger reads and checks all of it. Raises CorruptStoreError where it is damaged or its
    chain is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()  # one connection has one transaction
        self._book = _Book()
        self._entries: list[Entry] = []
        self._heads: list[bytes] = [_START]  # after each entry, as read or written
        self._written: list[tuple[Entry, bytes]] = []  # in the transaction under way
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f"{path} cannot be opened ({error}): let this process write it and its folder"
            ) from None
        try:
            # One file that can be copied, and a commit that survives a power cut.
            self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.execute("PRAGMA synchronous = EXTRA")
            with self._transaction():
                pass  # reads and checks what is there
        except sqlite3.Error as error:
            self._connection.close()
            raise self._failed(error) from None
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @property
    def head(self) -> Head:
        """Of everything that was read or written by this process."""
        return Head(self._book.length, self._book.hash)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return tuple(self._entries)

    def hashed_entries(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry and its hash, oldest first."""
        return zip(self._entries, self._heads[1:], strict=True)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The registered data sets."""
        return tuple(self._book.datasets)

    def register(
        self,
        dataset: str,
        *,
        unit: Unit,
        epsilon: float,
        delta: float,
        purpose: str,
        by: str = "",
    ) -> None:
        """Register a data set with its budget, or change the budget of one that is there.

        A change is an entry of its own, in the name of `by`. The unit and delta never change, for
        what was spent was counted in them. Raises ConfigurationError where they would.
        """
        with self._transaction():
            known = self._book.datasets.get(dataset)
            if known is not None:
                if (known.unit, known.delta) != (unit, delta):
                    raise ConfigurationError(
                        f"data set {dataset!r} is counted in {known.unit}s at delta = "
                        f"{known.delta:g}: these never change; register new records under a new id"
                    )
                if (known.epsilon, known.purpose) == (epsilon, purpose):
                    return
                if not by:
                    raise ConfigurationError(
                        f"data set {dataset!r} has a budget of epsilon {known.epsilon:g} for "
                        f"{known.purpose!r}: say who changes it (by)"
                    )
            self._append(
                _checked(Registered, _now(), dataset, unit, float(epsilon), delta, purpose, by)
            )

    def accept(self, dataset: str, overlaps: Iterable[str], *, reason: str, by: str) -> None:
        """A person decides that a data set may share records with `overlaps`: an entry.

        What such a record spends in each of them adds up, and no budget holds for the sum.
        """
        with self._transaction():
            for name in (dataset, *(others := tuple(overlaps))):
                self._known(name)
            if not others or dataset in others or not (reason.strip() and by.strip()):
                raise ConfigurationError(
                    f"to accept that {dataset!r} shares records, name other data sets, a reason, "
                    "and who decides"
                )
            self._append(_checked(Accepted, _now(), dataset, others, reason, by))

    def observe(self, dataset: str, records: Iterable[bytes]) -> None:
        """Tell the ledger what a data set holds now: the bytes of each record, or person's name.

        Only keyed hashes are kept. Changed content continues the same budget and is an entry.
        Raises OverlapError where records are in another data set too, whose budget they would
        escape, unless a person decided so (`accept`).
        """
        with self._transaction():
            self._known(dataset)
            key = self._key()  # made within a ledger that has entries: a lost ledger shows
        hashes = {hmac.digest(key, b"record" + record, "sha256")[:16] for record in records}
        fingerprint = hmac.digest(key, b"content" + b"".join(sorted(hashes)), "sha256").hex()
        with self._transaction():
            if self._book.fingerprints.get(dataset) == fingerprint:
                return
            allowed = self._book.accepted.get(dataset, set())
            shared = self._shared(dataset, hashes)
            shared = {other: count for other, count in shared.items() if other not in allowed}
            if shared:
                raise OverlapError(
                    f"data set {dataset!r} shares {sum(shared.values())} records with "
                    f"{', '.join(shared)}: go on under that id, or say who accepts the overlap, "
                    "and why: securefl ledger accept"
                )
            self._connection.executemany(
                "INSERT OR IGNORE INTO records VALUES (?, ?)", ((dataset, h) for h in hashes)
            )
            self._append(Content(_now(), dataset, fingerprint, _mark(key)))

    def open(
        self,
        dataset: str,
        run: str,
        *,
        experiment: str,
        promise: bytes,
        unit: Unit,
        per_round: Repeated,
        rounds: int,
        epsilon: float,
        releases: Sequence[Release] = (),
    ) -> Account:
        """Open a run on a data set, or continue one; the account it charges.

        run: a name that no other run has, ever. per_round: what one charged round costs; rounds:
        how many may be charged, spare ones included; epsilon: what the plan promises for them;
        releases: what else it may charge, each once or more.
        Raises ConfigurationError where the units differ, the run was opened under another promise,
        or the data set was given to another run alone.
        """
        with self._transaction():
            budget = self._known(dataset)
            event = _counted(per_round.event, unit, budget)
            known = self._book.runs.get(run)
            if known is not None:
                told = known.opened
                was = (told.dataset, told.promise, told.event, told.steps, told.rounds)
                asked = (dataset, promise.hex(), _told(event), per_round.times, rounds)
                if (*was, told.releases) != (*asked, _asked(releases, unit, budget)):
                    raise ConfigurationError(
                        f"run {run!r} was opened on data set {known.opened.dataset!r} under "
                        "another experiment or plan: put experiment.toml back as it was, or start "
                        "a new run"
                    )
                return Account(self, run)
            opened = _checked(
                Opened,
                _now(),
                dataset,
                run,
                experiment,
                promise.hex(),
                unit,
                _told(event),
                per_round.times,
                rounds,
                float(epsilon),
                Curve.of([Repeated(event, per_round.times)]),
                0.0,
                False,
                _asked(releases, unit, budget),
            )
            earlier = [other.opened for other in self._book.of(dataset)]
            order, alone = _admitted(budget, earlier, opened)
            self._append(msgspec.structs.replace(opened, order=order, alone=alone))
        return Account(self, run)

    def charge(self, run: str, round_number: int, release: str = "") -> Head:
        """As `Account.charge`. Raises ValueError for a round that does not follow the last one."""
        with self._transaction():
            held = self._held(run)
            opened, budget = held.opened, self._known(held.opened.dataset)
            if round_number <= held.last_round:
                raise ValueError(f"round {round_number} does not follow round {held.last_round}")
            allowed = _whole(opened)
            if release not in allowed:
                raise ValueError(f"run {run!r} was not opened for {release!r}")
            if held.count(release) >= allowed[release]:
                what = f"releases of its {release}" if release else "rounds"
                raise BudgetSpentError(
                    f"run {run!r} was opened on data set {opened.dataset!r} for "
                    f"{allowed[release]} {what}, and all were charged"
                )
            would = self._book.epsilon(opened.dataset, run, {release: 1})
            if would > budget.epsilon:
                spent = self._book.epsilon(opened.dataset)
                raise BudgetSpentError(
                    f"data set {opened.dataset!r} has spent epsilon {spent:.3f} of "
                    f"{budget.epsilon:g}; one more round would bring it to {would:.3f}"
                )
            self._append(_checked(Charged, _now(), run, round_number, release))
        return self.head

    def log(self, lines: int, hashed: bytes) -> Head:
        """Put the end of the site's audit log (`securefl.audit_log`) into the chain."""
        with self._transaction():
            self._append(_checked(Logged, _now(), lines, hashed.hex()))
        return self.head

    def rounds_left(self, run: str) -> int:
        """As `Account.rounds_left`."""
        with self._transaction():
            held = self._held(run)
            budget = self._known(held.opened.dataset)
            low, high = 0, held.opened.rounds - held.charged
            while low < high:  # the most rounds that still fit
                middle = (low + high + 1) // 2
                if self._book.epsilon(held.opened.dataset, run, {"": middle}) <= budget.epsilon:
                    low = middle
                else:
                    high = middle - 1
        return low

    def charged(self, run: str) -> int:
        """How many rounds of a run were charged; 0 where it was never opened."""
        held = self._book.runs.get(run)
        return held.charged if held else 0

    def last_round(self, run: str) -> int:
        """The highest round number that was charged to a run; 0 where none was."""
        held = self._book.runs.get(run)
        return held.last_round if held else 0

    def epsilon(self, dataset: str) -> float:
        """What the data set has spent, at its delta."""
        self._known(dataset)
        return self._book.epsilon(dataset)

    def standing(self, dataset: str) -> Standing:
        """Where a data set stands."""
        budget, runs = self._known(dataset), self._book.of(dataset)
        return Standing(
            dataset=dataset,
            purpose=budget.purpose,
            unit=budget.unit,
            epsilon=budget.epsilon,
            delta=budget.delta,
            spent=self._book.epsilon(dataset),
            order=runs[0].opened.order if runs else None,
            alone=any(run.opened.alone for run in runs),
            runs=tuple(
                RunStanding(
                    run=r.opened.run,
                    experiment=r.opened.experiment,
                    opened=r.opened.at,
                    mechanism=str(r.opened.event["mechanism"]),
                    rounds=r.opened.rounds,
                    epsilon=r.opened.epsilon,
                    charged=r.charged,
                    released=dict(r.released),
                )
                for r in runs
            ),
        )

    def forecast(
        self,
        dataset: str,
        unit: Unit,
        per_round: Repeated,
        rounds: int,
        releases: Sequence[Release] = (),
    ) -> Forecast:
        """What a run would add, were it opened now and all its rounds charged; as in `open`."""
        runs = [(run.opened, run.counts({})) for run in self._book.of(dataset)]
        return forecast(self._known(dataset), runs, unit, per_round, rounds, releases)

    def verify(self, kept: Head) -> None:
        """CorruptStoreError unless this ledger contains the head that somebody kept.

        The chain itself is checked whenever a ledger is opened.
        """
        with self._transaction():
            if kept.entries > self._book.length:
                raise CorruptStoreError(
                    f"{self._path} has {self._book.length} entries, but its site signed a head of "
                    f"{kept.entries}: entries were taken out, or an older copy was put back"
                )
            held = self._heads[kept.entries] if kept.entries >= 0 else b""
        if held != kept.hash:
            raise CorruptStoreError(
                f"{self._path}: entry {kept.entries} or one before it is not what its site signed: "
                "the ledger was edited or replaced"
            )

    def keep(self, heads: Mapping[str, SignedHead]) -> None:
        """Keep what peers signed of their ledgers, whose signatures the caller has checked."""
        with self._transaction():
            for site, told in heads.items():
                last = self._connection.execute(
                    "SELECT entries, hash FROM heads WHERE site = ? ORDER BY number DESC LIMIT 1",
                    (site,),
                ).fetchone()
                if last != (told.entries, told.hash):
                    self._connection.execute(
                        "INSERT INTO heads VALUES (?, ?, ?, ?, NULL)",
                        (site, told.entries, told.hash, told.signature),
                    )

    def kept(self) -> dict[str, tuple[SignedHead, ...]]:
        """The heads of each peer's ledger, in the order in which they came, repeats left out.

        One ledger only grows: a head that is not longer than the one before it shows that the
        peer's ledger was rolled back or forked.
        """
        found: dict[str, list[SignedHead]] = {}
        with self._transaction():
            rows = self._connection.execute(
                "SELECT site, entries, hash, signature FROM heads ORDER BY number"
            )
            for site, length, hashed, signature in rows:
                found.setdefault(site, []).append(SignedHead(length, hashed, signature))
        return {site: tuple(heads) for site, heads in found.items()}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, durable at the end; others wait. Inside, the book is up to date."""
        with self._mutex:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    self._migrate()
                    self._read()
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                for entry, head in self._written:
                    self._take(entry, head)
            except sqlite3.Error as error:
                raise self._failed(error) from None
            finally:
                self._written.clear()

    def _read(self) -> None:
        """Take in what other processes wrote since, and check its chain."""
        rows = self._connection.execute(
            "SELECT number, body, head FROM entries WHERE number >= ? ORDER BY number",
            (self._book.length,),
        )
        # The last entry that was read must still be there: a copy may have been put in place.
        if self._book.length and (next(rows, None) or (0, b"", b""))[2] != self._book.hash:
            raise CorruptStoreError(
                f"{self._path} was put back or replaced while it was open: entry "
                f"{self._book.length} is gone; restore the newest copy"
            )
        for number, body, head in rows:
            follows = number == self._book.length + 1
            try:
                if not follows or head != _chained(self._book.hash, body):
                    raise ValueError("the chain is broken")
                self._take(_DECODER.decode(body), head)
            except (msgspec.MsgspecError, TypeError, ValueError, KeyError):
                raise CorruptStoreError(
                    f"{self._path}: entry {number} does not follow from the one before it: the "
                    "ledger was edited or damaged; restore it from a copy"
                ) from None

    def _append(self, entry: Entry) -> None:
        before = self._written[-1][1] if self._written else self._book.hash
        body = msgspec.json.encode(entry)
        head, number = _chained(before, body), self._book.length + len(self._written) + 1
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, body, head))
        self._written.append((entry, head))

    def _take(self, entry: Entry, head: bytes) -> None:
        self._book.add(entry, head)
        self._entries.append(entry)
        self._heads.append(head)

    def _known(self, dataset: str) -> Registered:
        if dataset not in self._book.datasets:
            known = ", ".join(self._book.datasets) or "none"
            raise ConfigurationError(
                f"{self._path} has no data set {dataset!r} (it has {known}): register it first"
            )
        return self._book.datasets[dataset]

    def _held(self, run: str) -> _Run:
        if run not in self._book.runs:
            raise ConfigurationError(f"{self._path} has no run {run!r}: open it first")
        return self._book.runs[run]

    def _shared(self, dataset: str, hashes: set[bytes]) -> dict[str, int]:
        """How many of `hashes` each other data set ever held, where it is any."""
        found: dict[str, int] = {}
        for hashed in hashes:
            rows = self._connection.execute(
                "SELECT dataset FROM records WHERE hash = ? AND dataset != ?", (hashed, dataset)
            )
            for (other,) in rows:
                found[other] = found.get(other, 0) + 1
        return found

    @property
    def _key_path(self) -> Path:
        return self._path.with_suffix(".key")

    def _key(self) -> bytes:
        """The secret of the keyed hashes, made with the first of them.

        Under another key nothing would overlap, so that a lost or changed one is refused.
        """
        path, mark = self._key_path, self._book.key
        try:
            if not mark:
                with contextlib.suppress(FileExistsError):
                    store.write_secret(path, os.urandom(32))
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be used ({error.strerror}): {_WRITABLE}"
            ) from None
        if len(key) != 32 or mark not in ("", _mark(key)):
            raise CorruptStoreError(
                f"{path} is not the key under which {self._path.name} keeps its records: restore "
                "it from a copy"
            )
        return key

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise ConfigurationError(
                f"{self._path} was written by a newer securefl (version {version} of the ledger): "
                "install that one"
            )
        if version < 1:
            if self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise CorruptStoreError(
                    f"{self._path} is a database, but no ledger: choose another path"
                )
            if self._key_path.exists():
                raise CorruptStoreError(
                    f"{self._path} is empty, but {self._key_path.name} beside it is a ledger's: "
                    "restore the newest copy of the ledger"
                )
            for statement in _TABLES:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _failed(self, error: sqlite3.Error) -> Exception:
        """What to tell of SQLite's error, by its primary result code."""
        if isinstance(error, sqlite3.ProgrammingError):
            return ValueError(f"{self._path}: {error}")
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return ConfigurationError(f"{self._path} is in use by another process: wait for it")
        if code in _MENDS:
            return ConfigurationError(f"{self._path} cannot be used ({error}): {_MENDS[code]}")
        return CorruptStoreError(f"{self._path} cannot be used: {error}; restore it from a copy")


def _mark(key: bytes) -> str:
    """By which a key is known again."""
    return hmac.digest(key, b"key", "sha256").hex()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checked(kind: Callable[..., Kind], *fields: Any) -> Kind:
    """An entry with fields as its types want them; ConfigurationError names one that is not."""
    entry = kind(*fields)
    try:
        msgspec.json.decode(msgspec.json.encode(entry), type=type(entry))
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"the ledger takes no such entry ({error}): use ids of at most 64 letters, digits, "
            "'.', '_' and '-', texts of one line and at most 1000 characters, finite numbers"
        ) from None
    return entry


def _chained(before: bytes, body: bytes) -> bytes:
    """SHA-256 of the hash before (32 bytes) and of the entry."""
    return hashlib.sha256(_LABEL + before + body).digest()


def _counted(event: Event, unit: Unit, budget: Registered) -> Event:
    """The event as the data set's unit sees it; ConfigurationError where nothing is proven.

    Who replaces one site's update by zero moves the sum by at most the sensitivity; who changes one
    record (or person) replaces an update by another, which is twice as far.
    """
    if (unit == "site") != isinstance(event, accounting.DiscreteGaussianSum):
        raise ConfigurationError(
            f"the run protects {unit}s, but {type(event).__name__} is the cost of another unit"
        )
    if unit == budget.unit:
        return event
    if isinstance(event, accounting.DiscreteGaussianSum):
        moved, fields = 2 * event.sensitivity, dataclasses.asdict(event)
        return accounting.PoissonDiscreteGaussianSum(**fields | {"sensitivity": moved, "rate": 1.0})
    raise ConfigurationError(
        f"data set {budget.dataset!r} counts {budget.unit}s, but the run protects {unit}s: use "
        f'privacy.unit = "{budget.unit}"'
    )


_EVENTS: Final = {kind.__name__: kind for kind in Event.__args__}


def _told(event: Event) -> dict[str, str | float | int]:
    return {"mechanism": type(event).__name__, **dataclasses.asdict(event)}


def _event(told: Mapping[str, str | float | int]) -> Event:
    fields = {key: value for key, value in told.items() if key != "mechanism"}
    event: Event = _EVENTS[str(told["mechanism"])](**fields)
    return event


def _asked(releases: Sequence[Release], unit: Unit, budget: Registered) -> tuple[Released, ...]:
    """The releases as the ledger keeps them, in the data set's unit."""
    found = []
    for item in releases:
        event = _counted(item.event, unit, budget)
        curve = Curve.of([Repeated(event, 1)])
        found.append(Released(item.name, _told(event), curve, item.times, item.held_out))
    return tuple(found)


def _whole(opened: Opened) -> dict[str, int]:
    """Everything that a run may charge, by name."""
    return {"": opened.rounds, **{item.name: item.times for item in opened.releases}}


def _run_curve(opened: Opened, counts: Mapping[str, int]) -> Curve:
    """What a run costs any record: it trains on it, or holds it out for tests, never both."""
    parts: dict[bool, list[tuple[Curve, float]]] = {False: [], True: []}
    parts[False].append((opened.curve, counts.get("", 0)))
    for item in opened.releases:
        parts[item.held_out].append((item.curve, counts.get(item.name, 0)))
    return Curve.either(Curve.total(parts[False]), Curve.total(parts[True]))


def _parts(opened: Opened, counts: Mapping[str, int]) -> tuple[list[Repeated], list[Repeated]]:
    """Everything charged that training records are in, and that held-out ones are in."""
    parts: dict[bool, list[Repeated]] = {False: [], True: []}
    training = _event(opened.event), opened.steps * counts.get("", 0)
    parts[False].append(Repeated(*training))
    for item in opened.releases:
        parts[item.held_out].append(Repeated(_event(item.event), counts.get(item.name, 0)))
    return parts[False], parts[True]


def _alone(parts: Iterable[list[Repeated]], delta: float) -> float:
    return max(accounting.epsilon(part, delta) for part in parts)


def _filtered(total: Curve, budget: Registered, order: float) -> float:
    """Epsilon by the filter; inf where slips and distances exceed what is set aside for them.

    The filter needs bounds that are fixed beforehand, one on the moments and one on what is charged
    to delta. Were delta shared out by what a path of runs happened to use, P's mass of slips could
    come from one path and the moments from another, and delta could be exceeded by all slips.
    Distances count e^epsilon times, at the budget; where that is beyond reason, at what was spent.
    """
    epsilon = _exact(total).epsilon((1 - SET_ASIDE) * budget.delta, order)
    at = min(budget.epsilon, max(epsilon, 30.0), 700.0)
    inexact = total.slip + (1 + math.exp(at)) * total.distance
    return epsilon if inexact <= SET_ASIDE * budget.delta else math.inf


def _exact(curve: Curve) -> Curve:
    return dataclasses.replace(curve, slip=0.0, distance=0.0)


def _admitted(budget: Registered, earlier: Sequence[Opened], opened: Opened) -> tuple[float, bool]:
    """The order of a data set's filter, and whether one more run has the data set to itself."""
    if any(other.alone for other in earlier):
        raise ConfigurationError(
            f"data set {budget.dataset!r} was given to run {earlier[0].run!r} alone, "
            "which fits its budget by the tightest accountant only: no other run can use it"
        )
    if earlier:
        return earlier[0].order, False
    order = _order(opened.curve, budget)
    total = _run_curve(opened, _whole(opened))
    if _filtered(total, budget, order) <= budget.epsilon:
        return order, False
    # The tighter accountant saves a small part, and takes memory without bound for vast costs.
    renyi = total.epsilon(budget.delta, total.best_order(budget.delta))
    if renyi > min(4 * budget.epsilon + 1, _COSTLY):
        return order, False
    return order, _alone(_parts(opened, _whole(opened)), budget.delta) <= budget.epsilon


def forecast(
    budget: Registered,
    runs: Sequence[tuple[Opened, Mapping[str, int]]],
    unit: Unit,
    per_round: Repeated,
    rounds: int,
    releases: Sequence[Release] = (),
) -> Forecast:
    """What one more run would add to a budget, after what earlier runs were charged, by name.

    Raises ConfigurationError where the run could not be opened, as `Ledger.open` does.
    """
    event, steps = _counted(per_round.event, unit, budget), per_round.times
    opened = Opened(
        at="",
        dataset=budget.dataset,
        run="",
        experiment="",
        promise="",
        unit=unit,
        event=_told(event),
        steps=steps,
        rounds=rounds,
        epsilon=0.0,
        curve=Curve.of([Repeated(event, steps)]),
        order=0.0,
        alone=False,
        releases=_asked(releases, unit, budget),
    )
    order, alone = _admitted(budget, [run for run, _ in runs], opened)
    if alone:
        after = _alone(_parts(opened, _whole(opened)), budget.delta)
        return Forecast(budget.epsilon, 0.0, after, True)
    before = [(_run_curve(run, counts), 1) for run, counts in runs]
    spent = _filtered(Curve.total(before), budget, order)
    after = _filtered(
        Curve.total([*before, (_run_curve(opened, _whole(opened)), 1)]), budget, order
    )
    return Forecast(budget.epsilon, spent, after, False)


def _order(curve: Curve, budget: Registered) -> float:
    """The order at which most rounds of `curve` fit the budget."""
    delta = (1 - SET_ASIDE) * budget.delta
    low, high = 1e-9, 1e9  # rounds, on a logarithmic scale
    while high > low * 1.01:
        middle = (low * high) ** 0.5
        rounds = Curve.total([(_exact(curve), middle)])
        if rounds.epsilon(delta, rounds.best_order(delta)) <= budget.epsilon:
            low = middle
        else:
            high = middle
    return Curve.total([(_exact(curve), low)]).best_order(delta)
