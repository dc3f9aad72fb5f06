"""A participant's kit: one folder with everything that makes it part of a consortium.

    kit.toml            who this is, and where the server is
    roster.toml, .sig   the sites' pinned keys and who was removed, signed by the consortium's root
    flare/startup/      FLARE's startup files, the TLS certificate and its key
    site.key            a site's Ed25519 key
    steward/            (server) a kit within the kit: submits interrupted runs again

A kit holds no path but relative ones: it can be moved. Its private keys are made once, in the kit
or on the way to it, and nothing here ever copies or replaces one. All else in it is `Papers`, which
the consortium's keeper can hand over again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar, final

import msgspec
from cryptography import x509
from msgspec import Meta

from protocols.identity import Roster
from securefl import config, site_folder, store
from securefl.config import ConfigurationError
from securefl.deployment import certificates

KIT: Final = "kit.toml"
ROSTER: Final = "roster.toml"
SIGNATURE: Final = "roster.sig"
README: Final = "README.md"
STEWARD: Final = "steward"
SERVER: Final = "server"
ADMINISTRATOR: Final = "administrator"
DISABLED: Final = "disabled_clients.json"
ROOT: Final = "rootCA.pem"
WARN: Final = timedelta(days=30)
"""How long before a certificate expires warnings begin."""

ParticipantName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]
"""No dots: FLARE reads them as levels of a tree."""
HostName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9]([A-Za-z0-9-]{0,62}\.?)*\Z", min_length=1, max_length=253)
]
Port = Annotated[int, Meta(ge=1, le=65535)]
_File = TypeVar("_File", bound=msgspec.Struct)
_Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Role(StrEnum):
    """What a participant does."""

    server = "server"
    site = "site"
    administrator = "administrator"


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """kit.toml. bind: ADDRESS:PORT that a server listens at, empty for others. made: UTC."""

    version: Literal[1]
    consortium: ParticipantName
    role: Role
    name: ParticipantName
    host: HostName
    port: Port
    made: Annotated[datetime, Meta(tz=True)]
    bind: str = ""


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """roster.toml: the sites' keys (hexadecimal). serial: grows with every change, from 1.

    removed: sites that take part no more; their names are never given again.
    """

    version: Literal[1]
    consortium: ParticipantName
    serial: Annotated[int, Meta(ge=1)]
    removed: tuple[ParticipantName, ...]
    keys: dict[ParticipantName, _Hex32]


@final
@dataclass(frozen=True, slots=True)
class Papers:
    """All of a kit that is not secret."""

    about: Description
    roster: bytes
    signature: bytes
    certificate: x509.Certificate
    root: x509.Certificate
    page: str

    @property
    def pins(self) -> Pins:
        """What the roster says."""
        return _decoded(self.roster, Pins, ROSTER)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The papers in `folder`, which belong together.

        Raises ConfigurationError: damaged, or parts of different consortia.
        """
        about = _decoded(_bytes(folder / KIT), Description, str(folder / KIT))
        startup = folder / "flare" / "startup"
        papers = cls(
            about,
            _bytes(folder / ROSTER),
            _hex(folder / SIGNATURE),
            certificates.read_certificate(startup / f"{stem(about.role)}.crt"),
            certificates.read_certificate(startup / ROOT),
            _bytes(folder / README).decode(errors="replace"),
        )
        papers.check(folder)
        return papers

    def check(self, folder: Path) -> None:
        """Raise ConfigurationError unless one root signed the roster and the certificate."""
        certificates.check_issued(self.certificate, self.root)
        try:
            certificates.check_signature(self.root, self.signature, self.roster)
        except ValueError as error:
            raise ConfigurationError(
                f"{folder / ROSTER}: {error}, so it was changed since: install the kit again"
            ) from None
        if certificates.name_of(self.certificate) != self.about.name:
            raise ConfigurationError(
                f'{folder}: the certificate is of "{certificates.name_of(self.certificate)}", but '
                f'{KIT} says name = "{self.about.name}": install the kit again'
            )
        if self.pins.consortium != self.about.consortium:
            raise ConfigurationError(
                f"{folder}: {ROSTER} and {KIT} are of different consortia: install the kit again"
            )

    def write(self, folder: Path) -> None:
        """Lay the papers out in `folder`; kit.toml is last, each file is whole at any instant."""
        startup = folder / "flare" / "startup"
        for part in (folder, folder / "flare", startup):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in self._startup():
            store.write(startup / name, data)
        if self.about.role is Role.server:
            gone = {"disabled_clients": sorted(self.pins.removed)}
            store.write(folder / "flare" / DISABLED, _json(gone))
        store.write(folder / ROSTER, self.roster)
        store.write(folder / SIGNATURE, self.signature.hex().encode() + b"\n")
        store.write(folder / README, self.page.encode())
        store.write(folder / KIT, msgspec.toml.encode(self.about))

    def _startup(self) -> Iterator[tuple[str, bytes]]:
        """FLARE's startup files, as nvflare 2.9's own provisioning writes them.

        nvflare/lighter/templates/master_template.yml; a test compares them.
        """
        about = self.about
        yield f"{stem(about.role)}.crt", certificates.certificate_pem(self.certificate)
        yield ROOT, certificates.certificate_pem(self.root)
        if about.role is Role.server:
            yield "fed_server.json", _json(_fed_server(about, self.pins.removed))
        elif about.role is Role.site:
            yield "fed_client.json", _json(_fed_client(about))
        else:
            yield "fed_admin.json", _json(_fed_admin(about))


@final
@dataclass(frozen=True, slots=True)
class Kit:
    """One participant's folder, as its machine uses it. bind: empty unless it is the server's."""

    folder: Path
    role: Role
    name: str
    consortium: str
    host: str
    port: int
    bind: str
    made: datetime

    @classmethod
    def load(cls, folder: Path) -> Kit:
        """The kit in `folder`. Raises ConfigurationError: there is none, or it is damaged."""
        if not (folder / KIT).is_file():
            raise ConfigurationError(
                f"{folder} is not a kit (it has no {KIT}): name the folder that the consortium's "
                "keeper made (`securefl consortium new`), or enrol with `securefl site enroll`"
            )
        about = _decoded(_bytes(folder / KIT), Description, str(folder / KIT))
        return cls.of(folder, about)

    @classmethod
    def of(cls, folder: Path, about: Description) -> Kit:
        """The kit in `folder` that is described so."""
        return cls(
            folder,
            about.role,
            about.name,
            about.consortium,
            about.host,
            about.port,
            about.bind,
            about.made,
        )

    @property
    def flare(self) -> Path:
        """FLARE's workspace."""
        return self.folder / "flare"

    @property
    def key(self) -> Path:
        """The TLS key."""
        return self.flare / "startup" / f"{stem(self.role)}.key"

    @property
    def certificate(self) -> Path:
        """The TLS certificate."""
        return self.flare / "startup" / f"{stem(self.role)}.crt"

    @property
    def root(self) -> Path:
        """The consortium's own certificate: what every other one is checked against."""
        return self.flare / "startup" / ROOT

    @property
    def pins(self) -> Pins:
        """The roster with its serial and who was removed. Raises ConfigurationError: damaged."""
        return Papers.read(self.folder).pins

    @property
    def roster(self) -> Roster:
        """The sites and their pinned Ed25519 keys. Raises ConfigurationError: damaged."""
        return Roster({name: bytes.fromhex(key) for name, key in self.pins.keys.items()})

    @property
    def expires(self) -> datetime:
        """Until when the TLS certificate is good, UTC."""
        return certificates.read_certificate(self.certificate).not_valid_after_utc

    def check(self, now: datetime) -> tuple[str, ...]:
        """Whether the kit can be used `now` (UTC): what there is to warn of.

        Raises ConfigurationError: a part is missing or does not belong to the others, a key can be
        read by others, the certificate has expired or is not yet valid.
        """
        papers = Papers.read(self.folder)
        check_keys(self, papers)
        begins = papers.certificate.not_valid_before_utc
        ends = papers.certificate.not_valid_after_utc
        if now < begins:
            raise ConfigurationError(
                f"the certificate of {self.name} is not valid before {begins:%Y-%m-%d %H:%M} UTC, "
                f"and the clock says {now:%Y-%m-%d %H:%M}: set the clock"
            )
        if now >= ends:
            raise ConfigurationError(
                f"the certificate of {self.name} expired on {ends:%Y-%m-%d}: the consortium's "
                f"keeper makes a new one (`securefl consortium renew {self.consortium}`), and "
                f"`securefl consortium update {self.folder} --kit KIT` installs it"
            )
        warnings = []
        if ends - now <= WARN:
            warnings.append(
                f"the certificate of {self.name} expires in {(ends - now).days} days, on "
                f"{ends:%Y-%m-%d}: ask for a new one (`securefl consortium renew`)"
            )
        if self.role is Role.server:
            steward = Kit.load(self.folder / STEWARD)
            warnings.extend(steward.check(now))
        return tuple(warnings)


def check_keys(kit: Kit, papers: Papers) -> None:
    """Raise ConfigurationError unless the private keys in `kit` are those of `papers`."""
    secret = certificates.read_key(kit.key)
    mine = certificates.public_bytes(secret.public_key())
    if mine != certificates.public_bytes(certificates.public_key(papers.certificate)):
        raise ConfigurationError(
            f"{kit.key} is not the key of the certificate of {papers.about.name}: put back the key "
            "that this folder was enrolled with, or install the kit that was made for it"
        )
    if papers.about.role is not Role.site:
        return
    pinned = papers.pins.keys.get(papers.about.name)
    if pinned is None:
        raise ConfigurationError(
            f"{papers.about.name} is not in the roster of {papers.about.consortium} any more: "
            "ask the consortium's keeper"
        )
    if site_folder.read_key(kit.folder).public.hex() != pinned:
        raise ConfigurationError(
            f"{kit.folder / site_folder.KEY} is not the key that the roster pins for "
            f"{kit.name}: put back the key that this folder was enrolled with"
        )


def install(newer: Path, folder: Path) -> Kit:
    """Put the papers of the kit `newer` over those in `folder`, whose private keys stay.

    For a kit that was renewed or whose roster changed, and for the first one after an enrolment.
    Raises ConfigurationError, with nothing changed: of another consortium or participant, older
    than what is there, or not for the keys that are there.
    """
    papers = Papers.read(newer)
    about = papers.about
    if (folder / KIT).exists():
        _check_newer(papers, Papers.read(folder), folder)
    kit = Kit.of(folder, about)
    check_keys(kit, papers)
    if about.role is Role.server:
        install(newer / STEWARD, folder / STEWARD)
    papers.write(folder)
    return kit


def unpinned(kit: Kit) -> tuple[str, ...]:
    """What site.toml pins otherwise than the roster: what to write there, in words."""
    if kit.role is not Role.site or not (kit.folder / site_folder.SITE).exists():
        return ()
    path = kit.folder / site_folder.SITE
    pinned = config.load_site(path).consortium
    keys = {name: key for name, key in kit.pins.keys.items() if name != kit.name}
    lines = [
        f'under [consortium] in {path} write: {name} = "{key}"'
        for name, key in keys.items()
        if pinned.get(name) != key
    ]
    lines.extend(
        f"under [consortium] in {path} take out {name}, which is not in the roster"
        for name in pinned
        if name not in keys
    )
    return tuple(lines)


def _check_newer(new: Papers, old: Papers, folder: Path) -> None:
    if new.root != old.root:
        raise ConfigurationError(
            f"{folder} belongs to another consortium: a kit of {new.about.consortium} needs a "
            "folder of its own"
        )
    if (new.about.role, new.about.name) != (old.about.role, old.about.name):
        raise ConfigurationError(
            f"{folder} is the kit of {old.about.name}, and the other one is for {new.about.name}: "
            "name the folder that it is for"
        )
    if new.pins.serial < old.pins.serial or new.about.made < old.about.made:
        raise ConfigurationError(
            f"the kit is older than what {folder} has (roster {new.pins.serial}, made "
            f"{new.about.made:%Y-%m-%d %H:%M}, after roster {old.pins.serial}, made "
            f"{old.about.made:%Y-%m-%d %H:%M}): ask the consortium's keeper for the newest"
        )


def stem(role: Role) -> str:
    """What FLARE calls the certificate and key of such a participant."""
    return "server" if role is Role.server else "client"


def _fed_server(about: Description, removed: tuple[str, ...]) -> dict[str, object]:
    server: dict[str, object] = {
        "name": about.consortium,
        "service": {"target": about.bind, "scheme": "grpc"},
        "admin_server": about.host,
        "admin_port": int(about.bind.rpartition(":")[2]),
        "ssl_private_key": "server.key",
        "ssl_cert": "server.crt",
        "ssl_root_cert": ROOT,
        "connection_security": "mtls",
    }
    if removed:
        # FLARE closes a connection whose certificate is not of the identity that this map has for
        # the name it claims (nvflare.fuel.f3.cellnet.identity); no certificate is of these.
        server["auth_identity_map"] = {name: f"removed:{name}" for name in removed}
    return {"format_version": 2, "require_signed_jobs": True, "servers": [server]}


def _fed_client(about: Description) -> dict[str, object]:
    return {
        "format_version": 2,
        "require_signed_jobs": True,
        "servers": [
            {
                "name": about.consortium,
                "service": {"target": f"{about.host}:{about.port}", "scheme": "grpc"},
                "identity": SERVER,
            }
        ],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": ROOT,
            "fqsn": about.name,
            "is_leaf": True,
            "connection_security": "mtls",
        },
    }


def _fed_admin(about: Description) -> dict[str, object]:
    return {
        "format_version": 1,
        "admin": {
            "project_name": about.consortium,
            "username": about.name,
            "server_identity": SERVER,
            "scheme": "grpc",
            "host": about.host,
            "port": about.port,
            "connection_security": "mtls",
            "uid_source": "user_input",
            "with_file_transfer": True,
            "upload_dir": "transfer",
            "download_dir": "transfer",
            "client_key": "client.key",
            "client_cert": "client.crt",
            "ca_cert": ROOT,
        },
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; install the kit again "
            "(`securefl consortium update FOLDER --kit KIT`)"
        ) from None


def _hex(path: Path) -> bytes:
    with contextlib.suppress(ValueError):
        return bytes.fromhex(_bytes(path).decode("ascii"))
    raise ConfigurationError(f"{path} is damaged: install the kit again")


def _decoded(data: bytes, kind: type[_File], origin: str) -> _File:
    try:
        return msgspec.toml.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{origin} is damaged: {error}; install the kit again") from None
