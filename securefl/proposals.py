"""Proposals that a site refused, kept for its people: to read, and to agree to.

A site answers a proposal the moment it comes, and nobody may be at hand who could agree to it. So
the proposal is kept as it was sent: who asks for what, and how many sites and parameters. A person
looks at it later (`securefl site proposals`), agrees, and the same run proposed again is accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, final

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError
from securefl import config, store
from securefl.audit_log import Member
from securefl.config import ConfigurationError
from securefl.messages import Proposal, Refusal, parse_asked, parse_reply, printable

MOST: Final = 16
"""Proposals that are kept: the oldest makes room for a newer one."""

LATEST: Final = "latest"
"""What the newest one may be called."""

_LONGEST: Final = 2 << 20
"""Bytes of a proposal that is worth keeping: a server must not fill a site's disk."""


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A proposal that was refused. at: UTC, to the second; by: who sent it.

    experiment: TOML. parameters: of the dense model. sites: every site's public key, hexadecimal.
    reason: what the server was told.
    """

    version: Literal[1]
    at: str
    by: str
    experiment: str
    parameters: Annotated[int, Meta(ge=1)]
    sites: dict[str, str]
    reason: str

    @property
    def id(self) -> str:
        """What people call it: 8 hexadecimal digits, the same when it is proposed again."""
        told = msgspec.json.encode((self.experiment, self.parameters, sorted(self.sites.items())))
        return hashlib.sha256(told).hexdigest()[:8]

    def strangers(self, site: config.Site) -> tuple[str, ...]:
        """The other sites that it gives another key than `site` has pinned, or one it has not."""
        lax = site.policy.unknown_sites
        known = {name: key for name, key in site.consortium.items() if name != site.name}
        return tuple(
            name
            for name, key in self.sites.items()
            if name != site.name and known.get(name, key if lax else None) != key
        )


@final
@dataclass(frozen=True, slots=True)
class Proposals:
    """Those that the site in `folder` refused, a file each in proposals/."""

    folder: Path

    def keep(self, refused: Refused) -> None:
        """Write it down; an older one of the same, or one too many, goes."""
        store.write(self._path(refused), msgspec.json.encode(refused))
        for old in self.newest_first()[MOST:]:
            self._path(old).unlink(missing_ok=True)

    def forget(self, refused: Refused) -> None:
        """It is not to be kept any more."""
        self._path(refused).unlink(missing_ok=True)

    def newest_first(self) -> tuple[Refused, ...]:
        """All that are kept."""
        paths = (self.folder / "proposals").glob("*.json")
        found = (store.read(path, Refused) for path in paths)
        kept = (refused for refused in found if refused is not None)
        return tuple(sorted(kept, key=lambda refused: (refused.at, refused.id), reverse=True))

    def find(self, named: str) -> Refused:
        """The one whose id begins with `named`, or the newest one; ConfigurationError if none."""
        kept = self.newest_first()
        fit = kept[:1] if named == LATEST else [one for one in kept if one.id.startswith(named)]
        if len(fit) != 1:
            known = ", ".join(one.id for one in kept) or "none"
            raise ConfigurationError(
                f"{self.folder} keeps no one proposal {named!r}: it keeps {known} "
                f"(`securefl site proposals {self.folder}`)"
            )
        return fit[0]

    def _path(self, refused: Refused) -> Path:
        return self.folder / "proposals" / f"{refused.id}.json"


@final
class Remembering:
    """A member whose refused proposals are kept, until they are accepted.

    asked_by: who sends them. tell: takes what only people at the site may read.
    """

    def __init__(
        self, member: Member, folder: Path, asked_by: str, *, tell: Callable[[str], None]
    ) -> None:
        self._member, self._folder, self._tell = member, folder, tell
        self._by = printable(asked_by)

    @property
    def name(self) -> str:
        """The site's name."""
        return self._member.name

    @property
    def public_key(self) -> bytes:
        """The key that others pin, 32 bytes."""
        return self._member.public_key

    def close(self) -> None:
        """Let go of the member."""
        self._member.close()

    def answer(self, data: bytes) -> bytes:
        """The member's reply. A full disk costs the site what is kept here, and nothing else."""
        reply = self._member.answer(data)
        try:
            asked, said = parse_asked(data), parse_reply(reply)
        except MalformedMessageError:
            return reply
        if isinstance(asked, Proposal) and len(data) <= _LONGEST:
            try:
                self._note(asked, said.reason if isinstance(said, Refusal) else "")
            except (OSError, store.CorruptStoreError) as error:
                self._tell(printable(f"{self.name} could not keep a proposal: {error}"))
        return reply

    def _note(self, asked: Proposal, reason: str) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        sites = {pinned.site: pinned.key.hex() for pinned in asked.roster}
        parts = (asked.experiment, asked.parameters, sites, reason)
        refused = Refused(1, at, self._by, *parts)
        kept = Proposals(self._folder)
        if reason:
            kept.keep(refused)
            shown = f"`securefl site proposals {self._folder}` shows it"
            self._tell(printable(f"{self.name} refused a proposal; {shown}: {reason}"))
        else:
            kept.forget(refused)
