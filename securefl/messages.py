"""The framework's own messages: what wraps a protocol's messages, and the model on the wire."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError
from protocols.identity import digest
from protocols.messages import Message, PublicKey, SessionId, SiteName
from securefl.privacy.clipping import LEAST, MOST
from securefl.privacy.ledger import SignedHead

MOST_HEADS = 16
"""How many peers' heads a request carries at most."""


class Task(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a round is for.

    "train": an update of the model. "fit": the sums of one stage of preprocessing. "evaluate": the
    counts that test figures are told from. fitted: what preprocessing was fitted to so far, a
    `preprocessing.Fitted`; empty where records come as features.
    """

    kind: Literal["train", "fit", "evaluate"] = "train"
    stage: Annotated[int, Meta(ge=0, le=16)] = 0
    fitted: bytes = b""

    def digest(self) -> bytes:
        """What a round for this task is bound to (32 bytes)."""
        return digest("task", self.kind.encode(), self.stage.to_bytes(1, "big"), self.fitted)

    @property
    def release(self) -> str:
        """The name under which the round is charged; empty for training."""
        return {"train": "", "fit": f"statistics-{self.stage}", "evaluate": "evaluation"}[self.kind]


TRAIN: Final = Task()


class Request(Message, frozen=True):
    """S -> C: one phase of one round.

    In the first phase only: model, a `ModelMessage`, but for a task "fit"; heads, of some peers'
    ledgers, by site; task.
    """

    session: SessionId
    round: Annotated[int, Meta(ge=1, le=2**62)]
    phase: Annotated[str, Meta(max_length=32)]
    body: bytes
    model: bytes = b""
    heads: Annotated[dict[SiteName, SignedHead], Meta(max_length=MOST_HEADS)] = msgspec.field(
        default_factory=dict
    )
    task: Task = TRAIN


class Answer(Message, frozen=True):
    """C -> S: the protocol's reply. head: of the site's ledger after the round was charged."""

    body: bytes
    head: SignedHead | None = None


class Refusal(Message, frozen=True):
    """C -> S: why a site does not answer. "budget" is final for the run; "request" is not.

    "policy": the site takes no part in what was proposed.
    """

    kind: Literal["budget", "request", "policy"]
    reason: Annotated[str, Meta(max_length=1000, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class ModelMessage(Message, frozen=True):
    """S -> C: how many aggregates were applied, which weights survive, and their values.

    mask: packed bits, ceil(size/8) bytes, or empty when nothing is pruned; weights: float32.
    clip_scale: the clip of the coming round over that of the first.
    """

    update: Annotated[int, Meta(ge=0, le=2**62)]
    size: Annotated[int, Meta(ge=1, le=2**40)]
    mask: bytes
    weights: bytes
    clip_scale: Annotated[float, Meta(ge=LEAST, le=MOST)] = 1.0


class PinnedKey(Message, frozen=True):
    """One site of a roster, and its public key."""

    site: SiteName
    key: PublicKey


class Proposal(Message, frozen=True):
    """S -> C, before any request: the run that a site is asked to take part in.

    run: what the server calls it, for ever; a session is one connection's. experiment: TOML.
    parameters: of the dense model. roster: every site, in name order, each with its own key.
    """

    session: SessionId
    run: Annotated[bytes, Meta(min_length=16, max_length=16)]
    experiment: Annotated[str, Meta(max_length=1 << 20)]
    parameters: Annotated[int, Meta(ge=1, le=2**40)]
    roster: Annotated[tuple[PinnedKey, ...], Meta(min_length=2, max_length=1 << 16)]

    def __post_init__(self) -> None:
        names = [pinned.site for pinned in self.roster]
        if names != sorted(set(names)):
            raise ValueError("the roster's sites are not in order, each once")
        if len({pinned.key for pinned in self.roster}) != len(names):
            raise ValueError("the roster has one key for two sites")


def parse_asked(data: bytes) -> Proposal | Request:
    """A Proposal, or a Request that `Request.from_bytes` has still to check.

    Raises MalformedMessageError when `data` is neither.
    """
    try:
        asked = msgspec.msgpack.decode(data, type=Proposal | Request)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise MalformedMessageError(f"neither a proposal nor a request: {error}") from None
    if isinstance(asked, Proposal) and asked.to_bytes() != data:
        raise MalformedMessageError("not a Proposal: not in its one encoding")
    return asked


def printable(text: str) -> str:
    """`text` as a reason may hold it: one line, no terminal escapes, not too long."""
    return "".join(c if c.isprintable() else " " for c in text)[:1000]


def parse_reply(data: bytes) -> Answer | Refusal:
    """An Answer or a Refusal; MalformedMessageError when `data` is neither."""
    try:
        reply = msgspec.msgpack.decode(data, type=Answer | Refusal)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise MalformedMessageError(f"not a reply: {error}") from None
    return reply
