"""reveal = "sites": every site's own copy of the model, and how a site that is late gets one.

The server knows of a model only its `Standing`: how many aggregates were applied, a digest, how
many weights survive, and for how many rounds they hardly moved. The digest is salted with bytes
that the sites of the round derived and the server cannot, so that it tests no guess of the model.
Only the start, made from the public seed, has a public salt.

A site moves from one copy to the next before its tag of phase open leaves, and keeps the copy it
came from until it has opened a sum on the new one: whether the server counts the round or aborts
it, the site holds what the next one begins on. A site that was away, or whose disk is older, is
brought up before a round, by others' signed word as in the stable checkpoints of Castro and Liskov
1999, section 4.3. Sites agree where q = max(t, T + 2) of them say the same (`agreement.quorum`).

1. report  S -> C -> S  what a site holds, with a fresh X25519 key, signed
2. lend    S -> a holder -> S  the late site's report; its copy, sealed for that key, signed
3. borrow  S -> the late site -> S  the sealed copy, and q - 1 other sites' reports that they hold
           it; its new report

Formal Guarantees: the server, and whoever reads its wire, learns of a copy only its standing and
its size, as long as no site colludes with it. A site accepts a copy only from a pinned site, in
this session, when it is the one named, no older than its own, and q - 1 other sites signed that
they hold it; q - 1 > T, so one of them is honest. So a server with up to T sites can keep a site
late, and cannot lend it a model that no honest site holds. It can still change the sum that all
sites open: a sum has no integrity against an active server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self, final

import numpy as np
from msgspec import Meta

from protocols.errors import MalformedMessageError, ProtocolError, RefusedError
from protocols.identity import Identity, Roster, digest
from protocols.keystream import Randomness
from protocols.messages import Digest, Message, PublicKey, Signature, SiteName
from protocols.rounds import Cohort, Part, Requests, majority, statement
from protocols.sealing import ChannelKey, seal_data, unseal_data
from securefl import store
from securefl.state import GlobalState
from securefl.store import CorruptStoreError

PHASES = ("report", "lend", "borrow")
_MOST = 16  # copies in a report: two, and what crashes between writing and deleting left

Salt = Annotated[bytes, Meta(min_length=32, max_length=32)]
Sized = Annotated[int, Meta(ge=0, le=2**62)]


class Standing(Message, frozen=True):
    """A model as the server knows it; goes to the sites instead of the model."""

    update: Sized
    model: Digest
    surviving: Annotated[int, Meta(ge=1, le=2**40)]
    quiet: Sized

    def digest(self) -> bytes:
        """What a round on this model is bound to (32 bytes)."""
        return digest("standing", self.to_bytes())

    def to_message(self) -> bytes:
        """What a site is sent: no weight, and no pruning mask."""
        return self.to_bytes()


class Moment(Message, frozen=True):
    """One array of the server rule's state, float64."""

    name: Annotated[str, Meta(max_length=64)]
    values: bytes


class ReplicaMessage(Message, frozen=True):
    """A replica, in the one form that is hashed, kept and lent."""

    model: bytes
    quiet: Sized
    moments: Annotated[tuple[Moment, ...], Meta(max_length=64)]
    salt: Salt

    def __post_init__(self) -> None:
        names = [item.name for item in self.moments]
        if names != sorted(set(names)):
            raise ValueError("the moments are not in order, each once")


class Report(Message, frozen=True):
    """C -> S: the copies that a site holds, oldest first, and a fresh key to lend it one."""

    sender: SiteName
    round: Annotated[int, Meta(ge=1, le=2**62)]
    holds: Annotated[tuple[Standing, ...], Meta(min_length=1, max_length=_MOST)]
    public: PublicKey
    signature: Signature

    def __post_init__(self) -> None:
        keys = [(item.update, item.model) for item in self.holds]
        if keys != sorted(set(keys)):
            raise ValueError("the copies are not in order, each once")


class Plea(Message, frozen=True):
    """S -> a holder: lend the copy `wanted` to the sender of this report."""

    late: Report
    wanted: Standing


class Copy(Message, frozen=True):
    """A holder -> the late site, through S: a ReplicaMessage, sealed and signed."""

    sender: SiteName
    public: PublicKey
    receiver: SiteName
    standing: Standing
    box: bytes
    signature: Signature


class Loan(Message, frozen=True):
    """S -> the late site: a sealed copy, and who else holds it."""

    copy: Copy
    reports: Annotated[tuple[Report, ...], Meta(max_length=1 << 16)]

    def __post_init__(self) -> None:
        senders = [item.sender for item in self.reports]
        if senders != sorted(set(senders)):
            raise ValueError("the reports are not in order, each site once")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """A model at a site. salt: 32 bytes, as confidential as the model."""

    state: GlobalState = field(repr=False)
    salt: bytes = field(repr=False)

    @classmethod
    def start(cls, state: GlobalState) -> Self:
        """The model before the first round, which everyone knows."""
        return cls(state, bytes(32))

    def to_bytes(self) -> bytes:
        """The one form of this copy."""
        moments = (
            Moment(name, values.astype("<f8", copy=False).tobytes())
            for name, values in sorted(self.state.moments.items())
        )
        model = self.state.to_message()
        return ReplicaMessage(model, self.state.quiet, tuple(moments), self.salt).to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, size: int) -> Self:
        """The copy in `data`, of `size` weights; MalformedMessageError when it is not one."""
        message = ReplicaMessage.from_bytes(data)
        state = GlobalState.from_message(message.model, size)
        if any(len(item.values) != 8 * size for item in message.moments):
            raise MalformedMessageError("a moment does not have one value a weight")
        moments = {
            item.name: np.frombuffer(item.values, "<f8").astype(np.float64)
            for item in message.moments
        }
        whole = replace(state, moments=moments, quiet=message.quiet)
        return cls(whole, message.salt)

    def standing(self, agreed: bytes) -> Standing:
        """What the server may know of this copy; `agreed`: the experiment's digest."""
        model = _digest(agreed, self.to_bytes())
        return Standing(self.state.update, model, self.state.surviving, self.state.quiet)


def _digest(agreed: bytes, data: bytes) -> bytes:
    return digest("replica", agreed, data)


def _name(standing: Standing) -> str:
    return f"update-{standing.update:06d}-{standing.model.hex()}.model"


def read(folder: Path, standing: Standing, agreed: bytes, size: int) -> Replica | None:
    """The copy in a site's `folder`, None when it has none; CorruptStoreError when it is damaged.

    For who plays the site; nothing reads another site's folder.
    """
    path = folder / _name(standing)
    if not path.exists():
        return None
    replica, found = _load(path, agreed, size)
    if found != standing:
        raise CorruptStoreError(f"{path} is not the model that its name says")
    return replica


def _load(path: Path, agreed: bytes, size: int) -> tuple[Replica, Standing]:
    data = path.read_bytes()
    try:
        replica = Replica.from_bytes(data, size)
    except MalformedMessageError as error:
        raise CorruptStoreError(f"{path} is damaged: {error}; {_MEND}") from None
    standing = replica.standing(agreed)
    if path.name != _name(standing):
        raise CorruptStoreError(f"{path} is damaged or of another experiment: {_MEND}")
    return replica, standing


_MEND = "delete the file, and the other sites will lend a copy"


@final
class Replicas:
    """One site's copies, durable, and its side of report, lend and borrow."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        session: bytes,
        agreed: bytes,
        quorum: int,
        start: Replica,
    ) -> None:
        self._folder, self._agreed = folder, agreed
        self._identity, self._quorum = identity, quorum
        self._size = len(start.state.weights)
        self._context = context(session, agreed)
        self._channel: ChannelKey | None = None
        self._held: dict[str, tuple[Standing, Replica]] = {}
        for path in sorted(folder.glob("update-*.model")):
            replica, standing = _load(path, agreed, self._size)
            self._held[path.name] = (standing, replica)
        if not self._held:
            standing = start.standing(agreed)
            self._held[_name(standing)] = (standing, start)

    @property
    def holds(self) -> tuple[Standing, ...]:
        """What this site holds, oldest first."""
        copies = (standing for standing, _ in self._held.values())
        return tuple(sorted(copies, key=lambda item: (item.update, item.model)))[-_MOST:]

    def get(self, standing: Standing) -> Replica:
        """The copy of that standing; RefusedError when this site does not hold it."""
        for held, replica in self._held.values():
            if held == standing:
                return replica
        raise RefusedError(
            f"{self._identity.name} does not hold the model of update {standing.update} that the "
            f"server names: its own is that of update {self.holds[-1].update}"
        )

    def advance(self, base: Standing, moved: Replica) -> None:
        """Hold `moved` beside the copy it came from, and no other; durable on return."""
        self._keep((base, self.get(base)), (moved.standing(self._agreed), moved))

    def _keep(self, *copies: tuple[Standing, Replica]) -> None:
        """Hold these, all on disk before any other is deleted."""
        held = {_name(standing): (standing, replica) for standing, replica in copies}
        for name, (_, replica) in held.items():
            if not (self._folder / name).exists():
                store.write(self._folder / name, replica.to_bytes())
        for path in self._folder.glob("update-*.model"):
            if path.name not in held:
                path.unlink()
        self._held = held

    def answer(self, phase: str, number: int, body: bytes, randomness: Randomness) -> bytes:
        """The reply of one of PHASES in round `number`; ProtocolError when there is none."""
        if phase == "report":
            if body:
                raise MalformedMessageError("a request for a report has no body")
            return self._report(number, randomness).to_bytes()
        if phase == "lend":
            return self._lend(number, Plea.from_bytes(body), randomness).to_bytes()
        self._borrow(number, Loan.from_bytes(body))
        return self._report(number, randomness).to_bytes()

    def _report(self, number: int, randomness: Randomness) -> Report:
        self._channel = ChannelKey(randomness)
        me, public = self._identity, self._channel.public
        said = _reported(self._context, me.name, number, self.holds, public)
        return Report(me.name, number, self.holds, public, me.key.sign(said))

    def _lend(self, number: int, plea: Plea, randomness: Randomness) -> Copy:
        me, late, wanted = self._identity, plea.late, plea.wanted
        verify(me.roster, self._context, late)
        if late.sender == me.name:
            raise RefusedError(f"{me.name} lends nothing to itself")
        if late.round != number:
            raise RefusedError(f"{late.sender} reported in round {late.round}, not {number}")
        data = self.get(wanted).to_bytes()
        channel = ChannelKey(randomness)
        to = (late.sender, late.public)
        sealing = _sealing(self._context, number, me.name, channel.public, to, wanted)
        box = seal_data(data, channel, to, sealing, randomness)
        signature = me.key.sign(statement(sealing, "lend", me.name, box))
        return Copy(me.name, channel.public, late.sender, wanted, box, signature)

    def _borrow(self, number: int, loan: Loan) -> None:
        me, copy, wanted = self._identity, loan.copy, loan.copy.standing
        if self._channel is None:
            raise RefusedError(f"{me.name} has not reported: it has no key to open a copy")
        if copy.receiver != me.name:
            raise RefusedError(f"this copy is sealed for {copy.receiver}, not {me.name}")
        if wanted in self.holds:
            return
        if wanted.update < self.holds[-1].update:
            raise RefusedError(
                f"{me.name} holds the model of update {self.holds[-1].update} and takes no older "
                f"one than that, such as that of update {wanted.update}"
            )
        to = (me.name, self._channel.public)
        sealing = _sealing(self._context, number, copy.sender, copy.public, to, wanted)
        me.roster.verify(
            copy.sender, copy.signature, statement(sealing, "lend", copy.sender, copy.box)
        )
        vouching = 0
        for report in loan.reports:
            verify(me.roster, self._context, report)
            vouching += report.sender != me.name and wanted in report.holds
        if vouching < self._quorum - 1:
            raise RefusedError(
                f"{vouching} other sites hold the model of update {wanted.update}, "
                f"{self._quorum - 1} must"
            )
        data = unseal_data(copy.box, self._channel, (copy.sender, copy.public), sealing)
        if _digest(self._agreed, data) != wanted.model:
            raise ProtocolError(f"{copy.sender} lent another model than it named", [copy.sender])
        self._keep((wanted, Replica.from_bytes(data, self._size)))


def context(session: bytes, agreed: bytes) -> bytes:
    """What every report and copy of a session is bound to (32 bytes)."""
    return digest("replicas", session, agreed)


def verify(roster: Roster, bound: bytes, report: Report) -> None:
    """ProtocolError unless a pinned site made this report in the session of `bound`."""
    said = _reported(bound, report.sender, report.round, report.holds, report.public)
    roster.verify(report.sender, report.signature, said)


def _reported(
    bound: bytes, sender: str, number: int, holds: tuple[Standing, ...], public: bytes
) -> bytes:
    items = (standing.to_bytes() for standing in holds)
    return statement(bound, "report", sender, number.to_bytes(8, "big"), public, *items)


def _sealing(
    bound: bytes, number: int, sender: str, public: bytes, to: tuple[str, bytes], what: Standing
) -> bytes:
    receiver, key = to
    said = (number.to_bytes(8, "big"), sender.encode(), public, receiver.encode(), key)
    return digest("copy", bound, *said, what.to_bytes())


# --- the server -----------------------------------------------------------------------------------


@final
class Whereabouts:
    """Who holds which copy, by the sites' own signed reports of this session.

    lenders: how many sites may be asked to lend to one that refuses what it gets; of T + 1 one is
    honest.
    """

    def __init__(self, roster: Roster, bound: bytes, quorum: int, lenders: int) -> None:
        self._roster, self._bound, self._quorum = roster, bound, quorum
        self._lenders = lenders
        self._reports: dict[str, Report] = {}

    def bring_up(self, cohort: Cohort, standing: Standing) -> Part[None]:
        """Before a round on `standing`: whoever reports another copy is lent this one.

        What fails becomes a fault; the round goes on with those who hold the copy.
        """
        # What is known is what a finished round told; after an abort everyone is asked again.
        reports, self._reports = self._reports, {}
        missing = tuple(site for site in self._roster if site not in reports)
        if missing:
            reports |= yield from self._ask(cohort, missing)
        for late in sorted(site for site in reports if standing not in reports[site].holds):
            holders = [site for site in reports if standing in reports[site].holds]
            if len(holders) < self._quorum - 1:
                cohort.faults[late] = (
                    f"report: holds another model, and {len(holders)} others hold that of update "
                    f"{standing.update}, {self._quorum - 1} must"
                )
                continue
            plea, tried = Plea(reports[late], standing), 0
            vouching = tuple(reports[site] for site in sorted(holders))
            for peer in holders:
                if tried == self._lenders or standing in reports[late].holds:
                    break
                copy = yield from _lent(cohort, plea, peer)
                if copy is not None:
                    tried += 1
                    loan = Requests("borrow", {late: Loan(copy, vouching).to_bytes()})
                    reports |= cohort.accept(loan, (yield loan), self._parser(cohort))

    def reached(self, cohort: Cohort, holders: tuple[str, ...], update: int) -> Part[Standing]:
        """After a round: what the `holders` of its aggregate made of it.

        Raises RoundAbortedError unless at least q of them hold one and the same model.
        """
        self._reports = {}
        reports = yield from self._ask(cohort, holders)
        made = {
            site: [item.to_bytes() for item in report.holds if item.update == update]
            for site, report in reports.items()
        }
        told = {site: items[0] for site, items in made.items() if len(items) == 1}
        cohort.require(len(told), f"sites moved to update {update}", self._quorum)
        agreeing, odd = majority(told)
        cohort.faults |= dict.fromkeys(odd, "report: holds another model than the others")
        cohort.require(len(agreeing), f"sites agree on update {update}", self._quorum)
        self._reports = {site: reports[site] for site in agreeing}
        return Standing.from_bytes(told[agreeing[0]])

    def _ask(self, cohort: Cohort, sites: tuple[str, ...]) -> Part[dict[str, Report]]:
        requests = Requests("report", dict.fromkeys(sites, b""))
        return cohort.accept(requests, (yield requests), self._parser(cohort))

    def _parser(self, cohort: Cohort) -> Callable[[str, bytes], Report]:
        def parse(site: str, data: bytes) -> Report:
            report = Report.from_bytes(data)
            if (report.sender, report.round) != (site, cohort.begin.round):
                raise ProtocolError(f"{site} sent a report that is not its own of now", [site])
            verify(self._roster, self._bound, report)
            return report

        return parse


def _lent(cohort: Cohort, plea: Plea, peer: str) -> Part[Copy | None]:
    """The copy that `peer` lends, if it does."""

    def parse(site: str, data: bytes) -> Copy:
        copy = Copy.from_bytes(data)
        if (copy.sender, copy.receiver, copy.standing) != (site, plea.late.sender, plea.wanted):
            raise ProtocolError(f"{site} lent something else than it was asked for", [site])
        return copy

    requests = Requests("lend", {peer: plea.to_bytes()})
    return cohort.accept(requests, (yield requests), parse).get(peer)
