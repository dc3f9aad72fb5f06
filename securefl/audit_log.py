"""A site's audit log: who asked for what, what was answered, and what it cost.

A site's folder holds audit.jsonl, two lines a message: one when it came ("asked"), which is on the
disk before anything is done about it, and one with what is said to it ("answered"), on the disk
before the reply leaves. A line holds hashes and sizes of what was sent, never the messages. A
request whose reply was not logged got none.

**The chain.** Every line is hashed with the one before it, the first with the site's public key,
and the site signs each. Every line names the head of the ledger; after each charge the ledger takes
in the end of the log (`Logged`), and peers keep signed heads of the ledger. `faults` compares all
of that.

Formal guarantees, where the site runs this program:

- Whoever has no `site.key` cannot add, change, reorder or take out a line unnoticed, but for lines
  at the end. Lines at the end are missed up to the last charge: by the ledger, which names a line
  that is gone, and by the charges that no line explains.
- Whoever has the key, the log and the ledger can write log and ledger anew. Heads of the ledger
  that peers keep then no longer fit (`Ledger.verify`): a head that went with an upload fixes all
  lines up to the request that was charged before that one.
- A line "answered" may be there though its reply did not leave, as when power fails between the
  two. A reply without its line never leaves; only the refusal that says that no line can be written
  has none.

Not shown: what a changed program did and never logged, who was behind the name in `by`, and whether
the machine's clock was right.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol, TypeVar, final

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError, ProtocolError
from protocols.identity import Roster, SigningKey, digest
from securefl import store
from securefl.config import ConfigurationError
from securefl.messages import (
    TRAIN,
    Proposal,
    Refusal,
    Request,
    parse_asked,
    parse_reply,
    printable,
)
from securefl.privacy.ledger import Charged, Entry, Head, Ledger, Logged, Opened
from securefl.store import CorruptStoreError

LOG: Final = "audit.jsonl"

_LEDGER: Final = "ledger.sqlite"  # securefl.site says so too, and imports torch
_LONGEST: Final = 1 << 16
"""More bytes than any line has."""

Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""32 bytes in hexadecimal."""

Count = Annotated[int, Meta(ge=0, le=2**62)]
_Task = Literal["", "train", "fit", "evaluate"]
_Kind = TypeVar("_Kind", bound=msgspec.Struct)


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the site's ledger was, and the hash of its last entry."""

    entries: Count
    hash: Hash


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="asked"):
    """A message that reached the site. by: who sent it, as far as the site's process knows.

    size: in bytes; sha256: of all of it. session, run: hexadecimal; a request's run is empty where
    its session has no accepted proposal. task: what the round is for; empty where nobody said.
    """

    by: str
    message: Literal["proposal", "request", "unreadable"]
    size: Count
    sha256: Hash
    session: str = ""
    run: str = ""
    round: Count = 0
    phase: str = ""
    task: _Task = ""


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request was charged. entries: the numbers of the charges in the ledger.

    epsilon: what the data set has spent since ever, of `budget`, at `delta`; None where no finite
    one holds.
    """

    dataset: str
    entries: tuple[Count, ...]
    epsilon: float | None
    budget: float
    delta: float


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answered"):
    """What was said to the message in line `asked`. refused, reason: of a refusal.

    cost: None where nothing was charged.
    """

    asked: Count
    reply: Literal["answer", "refusal", "unreadable"]
    size: Count
    sha256: Hash
    refused: str = ""
    reason: str = ""
    cost: Cost | None = None


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line. number: from 1; at: UTC, to the second; ledger: its head when this was written."""

    number: Annotated[int, Meta(ge=1, le=2**62)]
    at: str
    ledger: Position
    event: Asked | Answered


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line as it stands in the file: the bytes of a `Line`, its hash, and the site's signature.

    signature: of `_statement(hash)`, 64 bytes in hexadecimal.
    """

    line: msgspec.Raw
    hash: Hash
    signature: Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]


def _start(public: bytes) -> bytes:
    """What the first line follows."""
    return digest("audit log", public)


def _chained(before: bytes, line: bytes) -> bytes:
    return digest("audit log line", before, line)


def _statement(hashed: bytes) -> bytes:
    """What a site signs."""
    return digest("audit log head", hashed)


@final
@dataclass(frozen=True, slots=True)
class End:
    """How many lines a log has, and the hash of the last (32 bytes)."""

    lines: int
    hash: bytes


@final
class AuditLog:
    """The log in the folder of a site, for writing; made with its first line.

    Several threads and processes may write it. key: the site's. Reads the site's ledger, where it
    has one, and adds `Logged` to it.
    """

    def __init__(self, folder: Path, key: SigningKey) -> None:
        self._path, self._ledger_path = folder / LOG, folder / _LEDGER
        self._key = key
        self._last = End(0, _start(key.public))
        self._size = 0  # of the file when `_last` was its end
        self._ledger: Ledger | None = None

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def append(self, event: Asked | Answered) -> Line:
        """Write one line; it is on the disk on return.

        A line that cannot be written whole is taken back. Raises OSError then, and
        CorruptStoreError where the log or the ledger was damaged, or cut while it was open.
        """
        with self._alone() as file:
            last = self._end(file)
            head = self._head()  # read here, so that heads go back in no order of processes
            line = Line(last.lines + 1, _now(), Position(head.entries, head.hash.hex()), event)
            body = msgspec.json.encode(line)
            hashed = _chained(last.hash, body)
            signature = self._key.sign(_statement(hashed)).hex()
            written = _Written(msgspec.Raw(body), hashed.hex(), signature)
            self._write(file, msgspec.json.encode(written) + b"\n")
            self._last = End(line.number, hashed)
        return line

    def cost(self, asked: Line) -> Cost | None:
        """What was charged for a request since it was logged; the ledger then names this log's end.

        Raises as `append`, and ConfigurationError where the ledger cannot be written.
        """
        if not isinstance(asked.event, Asked):
            raise ValueError(f"line {asked.number} asks for nothing")
        run, since = asked.event.run, asked.ledger.entries
        if self._head().entries == since or self._ledger is None:
            return None
        entries = self._ledger.entries
        charges = tuple(
            number
            for number, entry in enumerate(entries[since:], start=since + 1)
            if isinstance(entry, Charged) and (entry.run, entry.round) == (run, asked.event.round)
        )
        if not charges:
            return None
        self._ledger.log(self._last.lines, self._last.hash)
        (dataset,) = {e.dataset for e in entries if isinstance(e, Opened) and e.run == run}
        told = self._ledger.standing(dataset)
        spent = told.spent if math.isfinite(told.spent) else None
        return Cost(dataset, charges, spent, told.epsilon, told.delta)

    def _head(self) -> Head:
        """The ledger's, with what other processes wrote; of none where there is no ledger yet."""
        if self._ledger is None:
            if not self._ledger_path.exists():
                return Head(0, bytes(32))
            self._ledger = Ledger(self._ledger_path)
        self._ledger.verify(self._ledger.head)  # which reads what is new
        return self._ledger.head

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The file, open, with every other writer waiting."""
        if not self._path.exists():
            if self._last.lines:
                raise CorruptStoreError(f"{self._path} was taken away while it was being written")
            with contextlib.suppress(FileExistsError):
                store.write_secret(self._path, b"")
        file = os.open(self._path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _end(self, file: int) -> End:
        """The log's end, after a line that a crash cut short was taken away."""
        size = os.fstat(file).st_size
        if size == self._size:
            return self._last
        tail = os.pread(file, _LONGEST, max(0, size - _LONGEST))
        whole, newline, torn = tail.rpartition(b"\n")
        if torn:
            os.ftruncate(file, size - len(torn))
        if newline or size > _LONGEST:
            try:
                last = _check(whole.rpartition(b"\n")[2], self._key.public)
            except ValueError as error:
                raise CorruptStoreError(
                    f"{self._path}: its last line {error}; restore the newest copy"
                ) from None
        else:
            last = End(0, _start(self._key.public))
        if last.lines < self._last.lines:
            raise CorruptStoreError(
                f"{self._path} had {self._last.lines} lines and now has {last.lines}: an older "
                "copy was put in its place while it was being written; restore the newest one"
            )
        self._last, self._size = last, size - len(torn)
        return last

    def _write(self, file: int, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(file, data[written:], self._size + written)
            os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):  # where this fails too, the next writer does it
                os.ftruncate(file, self._size)
            raise
        self._size += written


class Member(Protocol):
    """A site as a server meets it: a `securefl.site.Gate`, or what stands for one."""

    @property
    def name(self) -> str:
        """The site's name."""
        ...

    @property
    def public_key(self) -> bytes:
        """The key that others pin, 32 bytes."""
        ...

    def answer(self, data: bytes) -> bytes:
        """The reply to a proposal or a request."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@final
class Audited:
    """A member that answers nothing without a line in its site's log; closes both.

    It stands before its member from the first proposal on, by which it knows the run of a session.
    asked_by: who sends the messages, as far as this process knows. tell: takes what only people at
    the site may read.
    """

    def __init__(
        self,
        member: Member,
        log: AuditLog,
        asked_by: str,
        *,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._member, self._log = member, log
        self._by, self._tell = printable(asked_by), tell
        self._turn = threading.Lock()
        self._runs: dict[bytes, bytes] = {}  # of each session with an accepted proposal
        self._task: tuple[bytes, int, _Task] = (b"", 0, "")  # session, round, what it is for

    @property
    def name(self) -> str:
        """The site's name."""
        return self._member.name

    @property
    def public_key(self) -> bytes:
        """The key that others pin, 32 bytes."""
        return self._member.public_key

    def close(self) -> None:
        """Let go of the member and of the log."""
        self._member.close()
        self._log.close()

    def answer(self, data: bytes) -> bytes:
        """The member's reply, once both lines are on the disk.

        A Refusal where they cannot be written: before the first, the member is not asked at all.
        """
        with self._turn:  # as the member does, so that a charge belongs to one request
            asked: Proposal | Request | None
            try:
                asked = parse_asked(data)
            except MalformedMessageError:
                asked = None
            try:
                line = self._log.append(self._asked(asked, data))
            except _UNWRITABLE as error:
                return self._refusal(asked, error)
            reply = self._member.answer(data)
            answered = _answered(line.number, reply)
            if isinstance(asked, Proposal) and answered.reply == "answer":
                self._runs[asked.session] = asked.run
            try:
                cost = self._log.cost(line)
                self._log.append(msgspec.structs.replace(answered, cost=cost))
            except _UNWRITABLE as error:
                return self._refusal(asked, error)
            return reply

    def _asked(self, asked: Proposal | Request | None, data: bytes) -> Asked:
        told = (len(data), hashlib.sha256(data).hexdigest())
        if asked is None:
            return Asked(self._by, "unreadable", *told)
        session = asked.session.hex()
        if isinstance(asked, Proposal):
            return Asked(self._by, "proposal", *told, session, asked.run.hex())
        run = self._runs.get(asked.session, b"").hex()
        place = (asked.session, asked.round)
        if asked.model or asked.task != TRAIN:  # as the first request of a round
            self._task = (*place, asked.task.kind)
        task = self._task[2] if place == self._task[:2] else ""
        return Asked(self._by, "request", *told, session, run, asked.round, asked.phase, task)

    def _refusal(self, asked: Proposal | Request | None, error: Exception) -> bytes:
        self._tell(printable(f"{self.name} answers nothing, for it cannot log it: {error}"))
        kind: Literal["policy", "request"] = "policy" if isinstance(asked, Proposal) else "request"
        reason = f"{self.name} cannot write its audit log: ask its people why"
        return Refusal(kind, reason).to_bytes()


_UNWRITABLE: Final = (OSError, CorruptStoreError, ConfigurationError)


def _answered(asked: int, reply: bytes) -> Answered:
    told = (len(reply), hashlib.sha256(reply).hexdigest())
    try:
        said = parse_reply(reply)
    except MalformedMessageError:
        return Answered(asked, "unreadable", *told)
    if isinstance(said, Refusal):
        return Answered(asked, "refusal", *told, said.kind, said.reason)
    return Answered(asked, "answer", *told)


@final
@dataclass(frozen=True, slots=True)
class Exchanged:
    """A message and what was said to it. answered: None where nothing was.

    repeats: the line in which the very same message came first; None where this is it.
    """

    number: int
    at: str
    asked: Asked
    answered: Answered | None
    repeats: int | None


def exchanged(lines: Iterable[Line]) -> tuple[Exchanged, ...]:
    """The messages of a log, in the order in which they came."""
    asked: dict[int, tuple[Line, Asked]] = {}
    answers: dict[int, Answered] = {}
    for line in lines:
        if isinstance(line.event, Asked):
            asked[line.number] = line, line.event
        else:
            answers[line.event.asked] = line.event
    first: dict[str, int] = {}
    return tuple(
        Exchanged(
            number,
            line.at,
            event,
            answers.get(number),
            before if (before := first.setdefault(event.sha256, number)) != number else None,
        )
        for number, (line, event) in asked.items()
    )


def read(path: Path) -> tuple[Line, ...]:
    """The whole lines of the log in the file `path`; none where there is no file.

    Raises CorruptStoreError, which names the line, where one cannot be read. `faults` checks them.
    """
    lines = []
    for number, text in enumerate(_texts(path)[0], start=1):
        try:
            lines.append(_decoded(bytes(_decoded(text, _Written).line), Line))
        except ValueError as error:
            raise CorruptStoreError(f"{path}: line {number} {error}") from None
    return tuple(lines)


def _texts(path: Path) -> tuple[list[bytes], bytes]:
    """The whole lines, and the part of one that a crash left."""
    try:
        *whole, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], b""
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    return whole, torn


@final
@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong. line: of the log; 0 where it is about one that is not there."""

    line: int
    what: str


def faults(path: Path, public: bytes, ledger: Ledger | None) -> tuple[Fault, ...]:
    """Everything that does not fit in a log, by its line: chain, signatures and ledger.

    public: the site's key, 32 bytes. ledger: the site's, opened before the call; None where it has
    none. The log may be written meanwhile. What a crash left of a last line is no fault.
    """
    earlier = ledger.entries if ledger is not None else ()
    whole, torn = _texts(path)  # after the ledger: every charge in `earlier` was logged before it
    found: list[Fault] = []
    lines: list[Line] = []
    ends = [_start(public)]
    before: bytes | None = ends[0]
    for number, text in enumerate(whole, start=1):
        before, line, wrong = _linked(before, number, text, public)
        ends.append(before or b"")
        found.extend(Fault(number, what) for what in wrong)
        if line is not None:
            lines.append(line)
    with contextlib.suppress(ValueError):
        _decoded(torn[:-1], _Written)
        found.append(Fault(len(whole) + 1, "does not end as a line does"))
    entries, heads = earlier, [bytes(32)]
    if ledger is not None:
        ledger.verify(ledger.head)  # which reads what came meanwhile
        entries = ledger.entries
        heads.extend(hashed for _, hashed in ledger.hashed_entries())
    found.extend(_misplaced(lines, heads))
    found.extend(_unanswerable(lines, entries))
    found.extend(_unexplained(lines, ends, earlier))
    return tuple(sorted(found, key=lambda fault: fault.line or math.inf))


def _linked(
    before: bytes | None, number: int, text: bytes, public: bytes
) -> tuple[bytes | None, Line | None, list[str]]:
    """A line's hash, what it holds, and what is wrong with it by itself and after `before`."""
    try:
        written = _decoded(text, _Written)
        line = _decoded(bytes(written.line), Line)
    except ValueError as error:
        return None, None, [str(error)]
    wrong = []
    hashed = bytes.fromhex(written.hash)
    if before is not None and hashed != _chained(before, bytes(written.line)):
        wrong.append(
            "does not follow from the one before it: it was changed, or lines were taken out, put "
            "in or moved"
        )
    try:
        _check_signature(written, public)
    except ValueError as error:
        wrong.append(str(error))
    if line.number != number:
        wrong.append(f"says that it is line {line.number}")
    return hashed, line, wrong


def _misplaced(lines: Sequence[Line], heads: Sequence[bytes]) -> Iterator[Fault]:
    """Lines whose head of the ledger is none of its heads, or older than one before."""
    most = 0
    for line in lines:
        told = line.ledger
        if told.entries >= len(heads):
            what = f"{len(heads) - 1}: entries of it were taken out, or an older copy was put back"
            yield Fault(line.number, f"knew a ledger of {told.entries} entries, and it has {what}")
        elif told.hash != heads[told.entries].hex():
            yield Fault(
                line.number,
                f"knew another entry {told.entries} of the ledger, which was edited or replaced",
            )
        if told.entries < most:
            yield Fault(line.number, f"knew a ledger of {told.entries} entries after one of {most}")
        most = max(most, told.entries)


def _unanswerable(lines: Sequence[Line], entries: Sequence[Entry]) -> Iterator[Fault]:
    """Answers to nothing, and costs that the ledger does not have."""
    asked: dict[int, Asked] = {}
    for line in lines:
        if isinstance(line.event, Asked):
            asked[line.number] = line.event
            continue
        request = asked.pop(line.event.asked, None)
        if request is None:
            yield Fault(
                line.number, f"answers line {line.event.asked}, which asks nothing or was answered"
            )
            continue
        for number in line.event.cost.entries if line.event.cost else ():
            entry = entries[number - 1] if 0 < number <= len(entries) else None
            if not isinstance(entry, Charged) or (entry.run, entry.round) != (
                request.run,
                request.round,
            ):
                yield Fault(
                    line.number,
                    f"was charged entry {number} of the ledger, which is no charge for it",
                )


def _unexplained(
    lines: Sequence[Line], ends: Sequence[bytes], entries: Sequence[Entry]
) -> Iterator[Fault]:
    """Entries of the ledger that name lines that are not there, or that no request explains."""
    requests = _requests(lines)
    began = lines[0].ledger.entries if lines else len(entries)  # the log may be the younger one
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, Logged):
            gone = entry.lines >= len(ends)
            if gone:
                yield Fault(
                    0,
                    f"entry {number} of the ledger names line {entry.lines}, and the log has "
                    f"{len(ends) - 1}: lines were taken out",
                )
            elif ends[entry.lines].hex() != entry.hash:
                yield Fault(entry.lines, f"is not the one that entry {number} of the ledger names")
        elif isinstance(entry, Charged | Opened) and number > began:
            place = (entry.run, entry.round if isinstance(entry, Charged) else 0)
            if not any(since < number <= until for since, until in requests.get(place, ())):
                told = f"charges round {entry.round} of" if isinstance(entry, Charged) else "opens"
                what = f"entry {number} of the ledger {told} run {entry.run}"
                yield Fault(0, f"{what}, and no line asks for it")


def _requests(lines: Sequence[Line]) -> Mapping[tuple[str, int], Sequence[tuple[int, float]]]:
    """For a run and round (0: its proposal), how long the ledger was before and after requests."""
    until = {
        line.event.asked: line.ledger.entries for line in lines if isinstance(line.event, Answered)
    }
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for line in lines:
        if isinstance(line.event, Asked) and line.event.run:
            span = line.ledger.entries, until.get(line.number, math.inf)
            found.setdefault((line.event.run, line.event.round), []).append(span)
    return found


def _check(text: bytes, public: bytes) -> End:
    """The end that a signed line makes. ValueError says what is wrong with it."""
    written = _decoded(text, _Written)
    number = _decoded(bytes(written.line), Line).number
    _check_signature(written, public)
    return End(number, bytes.fromhex(written.hash))


def _check_signature(written: _Written, public: bytes) -> None:
    statement = _statement(bytes.fromhex(written.hash))
    try:
        Roster({"site": public}).verify("site", bytes.fromhex(written.signature), statement)
    except ProtocolError:
        raise ValueError("is not signed by this site's key") from None


def _decoded(text: bytes, kind: type[_Kind]) -> _Kind:
    try:
        found = msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if msgspec.json.encode(found) != text:
        raise ValueError("is not as it was written")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
