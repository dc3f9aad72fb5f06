"""Signatures under what an audit found: who stands by it, and whether it is still the same.

An audit leaves two files in a run's directory, audit.json and audit.html. A site that read them
signs them with its key: a line of audit.signatures.jsonl, which names the SHA-256 of both files,
the site, its public key, the time and, where it is said, the person. Lines are only added.

Formal guarantees:

- Whoever has no `site.key` makes no line that `verify` counts for that site (Ed25519, RFC 8032),
  and a line with any byte changed counts for nobody (`digest` is injective on lists of fields up to
  collisions of SHA-256; the rest of a line has one form).
- A signature stands for these two files, byte for byte. What the audit looked at is told by the
  hashes that audit.json names: beside another run's files it is still the same audit.

Not shown: that the audit was carried out as it says; that the person named in `signatory` agreed,
beyond that who holds the site's key says so; that the signer's clock was right; that nobody took a
line out.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

import msgspec

from protocols.errors import ProtocolError
from protocols.identity import Roster, SigningKey, digest
from securefl import config, store
from securefl.config import ConfigurationError
from securefl.messages import printable
from securefl.site_folder import KEY, SITE, read_key
from securefl.store import CorruptStoreError

AUDIT: Final = "audit.json"
PAGE: Final = "audit.html"
SIGNATURES: Final = "audit.signatures.jsonl"

_FORMS: Final = {
    "findings": r"[0-9a-f]{64}",
    "page": r"[0-9a-f]{64}",
    "site": r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    "key": r"[0-9a-f]{64}",
    "at": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00",
}


class UnverifiedError(RuntimeError):
    """The signatures do not show what they should: says what is wrong, and how to mend it."""


@final
@dataclass(frozen=True, slots=True)
class Audit:
    """What a signature covers. page, findings: SHA-256 of audit.html and audit.json, hexadecimal.

    alarms: how many audit.json lists; None where it has no such list. broken: attacks that succeed
    where nothing is claimed. left_out: attacks that were not tried, by choice.
    """

    findings: str
    page: str
    alarms: int | None
    broken: int = 0
    left_out: int = 0

    @classmethod
    def of(cls, run: Path) -> Audit:
        """The audit of the run in the directory `run`.

        Raises ConfigurationError where there is none, CorruptStoreError where audit.json is none.
        """
        if not run.is_dir():
            raise ConfigurationError(f"{run} is not a run directory")
        again = f"`securefl audit {shlex.quote(str(run))}`"
        findings, page = _contents(run / AUDIT), _contents(run / PAGE)
        if findings is None or page is None:
            missing = run / (AUDIT if findings is None else PAGE)
            raise ConfigurationError(f"{missing} is not there: {again} writes it")
        try:
            told = msgspec.json.decode(findings, type=_Findings)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise CorruptStoreError(
                f"{run / AUDIT} is no audit: {error}; {again} writes it anew"
            ) from None
        alarms = None if told.alarms is None else len(told.alarms)
        hashes = _sha256(findings), _sha256(page)
        if hashes[0].encode() not in page:
            raise CorruptStoreError(
                f"{run / PAGE} is not made of this {AUDIT}, whose SHA-256 it does not name: one of "
                f"them was changed; `securefl audit {run}` writes both anew"
            )
        return cls(*hashes, alarms, len(told.broken), len(told.left_out))


class _Findings(msgspec.Struct, frozen=True):
    """The fields of audit.json that are read here."""

    alarms: list[Any] | None = None
    broken: list[Any] = []
    left_out: list[Any] = []


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a signer says. ValueError for what nobody can say.

    findings, page: SHA-256 of audit.json and audit.html. key: the signer's public key. at: UTC, to
    the second. signatory ("as" in the file): the person who signs for the site, as the site says.
    """

    findings: str
    page: str
    site: str
    key: str
    at: str
    signatory: str = msgspec.field(name="as")

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            if not re.fullmatch(form, value := str(getattr(self, name))):
                raise ValueError(f"{name} = {value[:80]!r} is not of its form")
        datetime.fromisoformat(self.at)
        if len(self.signatory) > 200 or not self.signatory.isprintable():
            raise ValueError(
                f"as = {self.signatory[:40]!r}: write one line of at most 200 printable characters"
            )

    def digest(self) -> bytes:
        """What is signed, 32 bytes."""
        hashes = (bytes.fromhex(text) for text in (self.findings, self.page, self.key))
        return digest(
            "audit signature", *hashes, *(t.encode() for t in (self.site, self.at, self.signatory))
        )


class Signature(Statement, frozen=True, forbid_unknown_fields=True):
    """One line of audit.signatures.jsonl. signature: Ed25519 over the statement, hexadecimal."""

    signature: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch("[0-9a-f]{128}", self.signature):
            raise ValueError("signature is not 64 bytes in hexadecimal")

    def check(self) -> None:
        """Raise ProtocolError unless the key that the line names made its signature."""
        roster = Roster({self.site: bytes.fromhex(self.key)})
        roster.verify(self.site, bytes.fromhex(self.signature), self.digest())


def sign(audit: Audit, site: str, key: SigningKey, at: datetime, signatory: str = "") -> Signature:
    """The signature of `site` under `audit`. at: aware.

    Raises ConfigurationError for a name or a `signatory` that cannot stand in a line.
    """
    instant = at.astimezone(UTC).isoformat(timespec="seconds")
    said = audit.findings, audit.page, site, key.public.hex(), instant, signatory.strip()
    try:
        statement = Statement(*said)
    except ValueError as error:
        raise ConfigurationError(f"cannot sign: {error}") from None
    return Signature(*said, key.sign(statement.digest()).hex())


def keep(run: Path, signature: Signature) -> Path:
    """Add `signature` to the run's, durably, after those that are there; the path of the file."""
    path = run / SIGNATURES
    last = (_contents(path) or b"").rpartition(b"\n")[2]
    with contextlib.suppress(ValueError):
        _decoded(last)  # whole, and an editor took its end of line
        with path.open("ab") as file:
            file.write(b"\n")
    store.append_line(path, msgspec.json.encode(signature).decode())
    return path


def trusted_keys(folder: Path | None, keys: Sequence[str]) -> Mapping[str, bytes]:
    """The public keys that a verifier trusts, by site: 32 bytes each.

    folder: a site's; its own key and those under [consortium]. keys: further ones, SITE=HEX.
    Raises ConfigurationError where one is nonsense, or two say different things of a site or a key.
    """
    said: list[tuple[str, str]] = []
    if folder is not None:
        own = config.load_site(folder / SITE)
        said.extend(own.consortium.items())
        if (folder / KEY).exists():  # an auditor may have a copy without it
            said.append((own.name, read_key(folder).public.hex()))
    for text in keys:
        site, _, key = text.partition("=")
        if not (re.fullmatch(_FORMS["site"], site) and re.fullmatch(_FORMS["key"], key.lower())):
            raise ConfigurationError(
                f"--key {text[:100]!r}: write it as SITE=HEX, a public key in 64 hexadecimal digits"
            )
        said.append((site, key.lower()))
    sites: dict[str, str] = {}
    names: dict[str, str] = {}
    for site, key in said:
        if sites.setdefault(site, key) != key:
            raise ConfigurationError(f"two keys are pinned for {site}: leave the wrong one out")
        if names.setdefault(key, site) != site:
            raise ConfigurationError(
                f"one key is pinned for {names[key]} and {site}: every site has its own"
            )
    return {site: bytes.fromhex(key) for site, key in sites.items()}


@final
@dataclass(frozen=True, slots=True)
class Checked:
    """A line of the file. signature: None where the line cannot be read.

    fault: what is wrong with the line, or with the files for it; empty where it is a valid
    signature under the files as they are. trusted: that, and by the key that the verifier pins for
    the site.
    """

    line: int
    signature: Signature | None
    trusted: bool
    fault: str


@final
@dataclass(frozen=True, slots=True)
class Verification:
    """What a verifier learns. fault: empty where the audit is signed as it should be.

    That is: every line is a valid signature under the files as they are, and one at least is by a
    key that the verifier pins.
    """

    path: Path
    checked: tuple[Checked, ...]
    fault: str

    def require(self) -> None:
        """Raise UnverifiedError unless the audit is signed as it should be."""
        if self.fault:
            raise UnverifiedError(f"{self.path}: {self.fault}")


def verify(run: Path, pinned: Mapping[str, bytes]) -> Verification:
    """Check every signature under the audit of a run. pinned: keys of 32 bytes by site.

    Raises ConfigurationError where `run` is no directory, or a file cannot be read.
    """
    if not run.is_dir():
        raise ConfigurationError(f"{run} is not a run directory")
    path = run / SIGNATURES
    now = {name: _contents(run / name) for name in (AUDIT, PAGE)}
    hashes = {name: None if data is None else _sha256(data) for name, data in now.items()}
    lines = (_contents(path) or b"").removesuffix(b"\n").split(b"\n")
    checked = tuple(
        _checked(number, line, hashes, pinned)
        for number, line in enumerate(lines, start=1)
        if lines != [b""]
    )
    return Verification(path, checked, _wrong(checked, run, pinned))


def _checked(
    number: int, line: bytes, hashes: Mapping[str, str | None], pinned: Mapping[str, bytes]
) -> Checked:
    try:
        signature = _decoded(line)
    except ValueError as error:
        return Checked(number, None, False, printable(f"is no signature ({error}): {_ANEW}"))
    fault = _fault(signature, hashes, pinned)
    trusted = not fault and pinned.get(signature.site) == bytes.fromhex(signature.key)
    return Checked(number, signature, trusted, fault)


def _fault(
    signature: Signature, hashes: Mapping[str, str | None], pinned: Mapping[str, bytes]
) -> str:
    """What is wrong with a line that can be read; empty where nothing is."""
    site = signature.site
    try:
        signature.check()
    except ProtocolError:
        return f"says {site} and is not signed by the key that it names: {_ANEW}"
    for name, key in pinned.items():
        if (name == site) != (key.hex() == signature.key):
            what = "another key than the one" if name == site else "the key"
            return f"says {site} and is signed by {what} that you pin for {name}: ask its people"
    for file, then in ((AUDIT, signature.findings), (PAGE, signature.page)):
        if hashes[file] != then:
            what = "is gone" if hashes[file] is None else "was changed"
            return f"fits no longer: {file} {what} after {site} signed it; {_BACK}"
    return ""


_ANEW: Final = "get the file again, or take the line out and sign anew"
_BACK: Final = f"get the files back as they were, or move {SIGNATURES} away and sign anew"


def _wrong(checked: Sequence[Checked], run: Path, pinned: Mapping[str, bytes]) -> str:
    """What is wrong with all of it, the worst first."""
    if not checked:
        return f"nobody signed: `securefl report sign {shlex.quote(str(run))} --site FOLDER` does"
    for one in checked:
        if one.fault:
            return f"line {one.line} {one.fault}"
    if any(one.trusted for one in checked):
        return ""
    if not pinned:
        return (
            "nothing is pinned, so nobody can say who signed: name your site's folder (--site "
            "FOLDER), or a key that a site's people gave you (--key SITE=HEX)"
        )
    told = {f"{one.signature.site}={one.signature.key}" for one in checked if one.signature}
    return (
        "signed by unknown keys only: once you compared a key with that site's people, pin it with "
        + " or ".join(f"--key {one}" for one in sorted(told))
    )


def _decoded(line: bytes) -> Signature:
    """The signature that a line holds; ValueError where it is not exactly one."""
    try:
        found = msgspec.json.decode(line, type=Signature)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if msgspec.json.encode(found) != line:
        raise ValueError("not as it was written")
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _contents(path: Path) -> bytes | None:
    """All of a file; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
