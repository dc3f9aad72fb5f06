"""The consortium as its keeper sees it: who belongs to it, and the kits that make them part of it.

    NAME/authority/   consortium.toml (who belongs: public keys, certificates), root.crt, root.key
    NAME/kits/        one kit a participant, to be handed over
    NAME/README.md    who does what next

consortium.toml is the only truth, and is replaced as a whole; the kits are laid out after it, again
and again, so that a crash between the two is mended by the next command. The authority's folder
never holds a participant's private key: those are made in the kits, or at the sites (`enrol`).
"""

from __future__ import annotations

import ipaddress
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal, final

import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.x509 import Certificate
from msgspec import Meta

from protocols.errors import ProtocolError
from protocols.identity import Roster, SigningKey, digest
from securefl import site_folder, store
from securefl.config import ConfigurationError
from securefl.deployment import certificates, pages
from securefl.deployment.certificates import DAYS, Root
from securefl.deployment.kits import (
    ADMINISTRATOR,
    KIT,
    SERVER,
    STEWARD,
    WARN,
    Description,
    HostName,
    Papers,
    ParticipantName,
    Pins,
    Port,
    Role,
    stem,
)

AUTHORITY: Final = "authority"
KITS: Final = "kits"
TRUTH: Final = "consortium.toml"
PORT: Final = 8002
ROOT_WARN: Final = timedelta(days=DAYS)
"""How long before the root expires its keeper is told: everyone has to enrol again by then."""
_RESERVED: Final = (SERVER, ADMINISTRATOR, STEWARD, AUTHORITY, KITS, "admin")
_FLARE_ROLES: Final = {ADMINISTRATOR: "project_admin", STEWARD: "lead"}
_Hex = Annotated[str, Meta(pattern=r"\A([0-9a-f]{2})+\Z")]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A participant. key: a site's Ed25519 key; made: of its newest certificate (PEM)."""

    role: Role
    certificate: str
    made: Annotated[datetime, Meta(tz=True)]
    key: str = ""
    removed: bool = False

    @property
    def x509(self) -> Certificate:
        """The certificate."""
        return certificates.parse_certificate(self.certificate.encode(), TRUTH)

    @property
    def expires(self) -> datetime:
        """Until when the certificate is good, UTC."""
        return self.x509.not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """Of the public keys, as `fingerprint` has it."""
        return fingerprint(certificates.public_key(self.x509), self.key)


class Truth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """consortium.toml: all that the kits are made from, but for private keys."""

    version: Literal[1]
    name: ParticipantName
    host: HostName
    port: Port
    bind: str
    serial: Annotated[int, Meta(ge=1)]
    members: dict[ParticipantName, Member]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site sends to be enrolled. No secret, but it must not be swapped on its way.

    csr: PEM, signed with the TLS key, and naming `key`; key: Ed25519; signature: by it, of both.
    """

    version: Literal[1]
    name: ParticipantName
    key: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    csr: str
    signature: _Hex

    @classmethod
    def read(cls, path: Path) -> Request:
        """The request in `path`, whose maker holds both keys.

        Raises ConfigurationError: not a request, or it was changed on its way.
        """
        try:
            request = msgspec.json.decode(path.read_bytes(), type=cls)
            certificates.parse_request(request.csr.encode(), request.name, request._signing)
            Roster({request.name: request._signing}).verify(
                request.name, bytes.fromhex(request.signature), request._statement()
            )
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, ProtocolError) as error:
            raise ConfigurationError(
                f"{path} is no request, or was changed on its way: {error}; the site makes it with "
                "`securefl site enroll`"
            ) from None
        _ = request.tls  # its size
        return request

    @property
    def tls(self) -> RSAPublicKey:
        """The TLS key that the certificate will be for."""
        return certificates.public_key(
            certificates.parse_request(self.csr.encode(), self.name, self._signing)
        )

    @property
    def fingerprint(self) -> str:
        """What two people compare by telephone."""
        return fingerprint(self.tls, self.key)

    @property
    def _signing(self) -> bytes:
        return bytes.fromhex(self.key)

    def _statement(self) -> bytes:
        return digest("site request", self.name.encode(), self.csr.encode())


def fingerprint(tls: RSAPublicKey, key: str) -> str:
    """128 bits of SHA-256 over both public keys of a site, in groups of four digits."""
    digits = digest("keys", certificates.public_bytes(tls), bytes.fromhex(key)).hex()[:32]
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def enrol(folder: Path, name: str) -> tuple[Path, Request]:
    """Make a site's keys in `folder`, and the request that it sends to the consortium's keeper.

    Keys that are there already stay, so that an interrupted call can be made again.
    """
    _check_name(name)
    if (folder / KIT).exists():
        raise ConfigurationError(
            f"{folder} is a kit already: `securefl site enroll {folder} --kit KIT` installs a newer"
        )
    startup = folder / "flare" / "startup"
    for part in (folder, folder / "flare", startup):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    tls, signing = _tls_key(folder, Role.site), _signing_key(folder)
    csr = certificates.sign_request(tls, name, signing.public).decode()
    request = Request(1, name, signing.public.hex(), csr, "")
    signature = signing.sign(request._statement()).hex()
    request = msgspec.structs.replace(request, signature=signature)
    path = folder / f"{name}.request.json"
    store.write(path, msgspec.json.format(msgspec.json.encode(request), indent=2) + b"\n")
    return path, request


@final
@dataclass(frozen=True, slots=True)
class Consortium:
    """A consortium's folder. Every change returns it as it is afterwards."""

    folder: Path
    truth: Truth

    @classmethod
    def new(
        cls,
        folder: Path,
        server: str,
        sites: Sequence[str] = (),
        *,
        bind: str | None = None,
        requests: Iterable[Path] = (),
        days: int = DAYS,
        now: datetime | None = None,
    ) -> Consortium:
        """Make the consortium that is named like `folder`, which must not exist.

        server: HOST or HOST:PORT as the sites reach it. bind: ADDRESS or ADDRESS:PORT it listens
        at. sites: those that are in no request get their keys here. now: UTC.

        Raises ConfigurationError, with nothing left behind.
        """
        now = now or certificates.now_utc()
        folder = folder.absolute()
        _check_name(folder.name)
        _check_days(days)
        host, port = _address(server, "--server", PORT)
        asked = {request.name: request for request in map(Request.read, requests)}
        names = list(dict.fromkeys([*sites, *asked]))
        if len(names) < len(sites) or len({name.casefold() for name in names}) < len(names):
            raise ConfigurationError("--sites names a site twice: every site has its own name")
        for name in names:
            _check_site(name)
        if folder.exists():
            raise ConfigurationError(
                f"{folder} exists: nothing is overwritten; name another, or move it away"
            )
        if not folder.parent.is_dir():
            raise ConfigurationError(f"{folder.parent} is not a folder: make it first")
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            root = Root.make(folder.name, now)
            (partial / AUTHORITY).mkdir(mode=0o700)
            (partial / KITS).mkdir(mode=0o700)
            store.write_secret(partial / AUTHORITY / "root.key", certificates.key_pem(root.key))
            pem = certificates.certificate_pem(root.certificate)
            store.write(partial / AUTHORITY / "root.crt", pem)
            truth = Truth(1, folder.name, host, port, _bind(bind, host, port), 1, {})
            made = cls(partial, truth)
            for name in (SERVER, STEWARD, ADMINISTRATOR, *names):
                made = made._admitted(name, asked.get(name), root, days, now)
            made._keep(root)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial)
            raise
        return cls(folder, made.truth)

    @classmethod
    def load(cls, folder: Path) -> Consortium:
        """The consortium in `folder`. Raises ConfigurationError: none there, or damaged."""
        path = folder / AUTHORITY / TRUTH
        try:
            truth = msgspec.toml.decode(path.read_bytes(), type=Truth)
        except OSError:
            raise ConfigurationError(
                f"{folder} is not a consortium (it has no {AUTHORITY}/{TRUTH}): name the folder "
                "that `securefl consortium new` made"
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{path} is damaged: {error}; restore it from a copy"
            ) from None
        return cls(folder.absolute(), truth)

    @property
    def sites(self) -> dict[str, Member]:
        """The sites that take part, by name."""
        members = self.truth.members.items()
        return {n: m for n, m in members if m.role is Role.site and not m.removed}

    @property
    def members(self) -> dict[str, Member]:
        """Everyone who takes part, by name: the server and the administrators first."""
        return {n: m for n, m in self.truth.members.items() if not m.removed}

    def due(self, now: datetime) -> tuple[str, ...]:
        """What has to be done, in words: certificates that expire, or have."""
        lines = []
        root = certificates.read_certificate(self.folder / AUTHORITY / "root.crt")
        if root.not_valid_after_utc - now <= ROOT_WARN:
            lines.append(
                f"the consortium's own certificate ends on {root.not_valid_after_utc:%Y-%m-%d}, "
                "and no other outlives it: make a new consortium before (`securefl consortium new`)"
            )
        for name, member in self.members.items():
            left = member.expires - now
            if left <= WARN:
                what = f"expires in {left.days} days" if left > timedelta(0) else "has expired"
                lines.append(
                    f"the certificate of {name} {what} ({member.expires:%Y-%m-%d}): "
                    f"securefl consortium renew {self.truth.name} --site {name}"
                )
        return tuple(lines)

    def kit(self, name: str) -> Path:
        """Where the kit of a member lies, or would lie if it had not been handed over."""
        kits = self.folder / KITS
        return kits / SERVER / STEWARD if name == STEWARD else kits / name

    def add(
        self,
        name: str,
        request: Path | None = None,
        *,
        days: int = DAYS,
        now: datetime | None = None,
    ) -> Consortium:
        """Admit a site, and put it into everyone's roster."""
        _check_site(name)
        _check_days(days)
        asked = None if request is None else Request.read(request)
        if asked is not None and asked.name != name:
            raise ConfigurationError(
                f"{request} is the request of {asked.name}, not of {name}: name the right one"
            )
        with store.exclusive(self.folder / AUTHORITY):
            current = Consortium.load(self.folder)
            same = {old.casefold(): old for old in current.truth.members}.get(name.casefold())
            if same is not None and current.truth.members[same].removed:
                raise ConfigurationError(
                    f"{same} was removed, and its old certificate would be good again: give the "
                    "site another name"
                )
            if same is not None:
                raise ConfigurationError(f"{same} takes part already: give this one another name")
            root = current._root()
            added = current._admitted(name, asked, root, days, now or certificates.now_utc())
            return added._next()._keep(root)

    def remove(self, name: str) -> Consortium:
        """Take a site out for good: its certificate and keys are refused from now on."""
        with store.exclusive(self.folder / AUTHORITY):
            current = Consortium.load(self.folder)
            if name not in current.sites:
                raise ConfigurationError(
                    f"{name} is no site of {current.truth.name}: {', '.join(current.sites)} are"
                )
            root = current._root()
            gone = msgspec.structs.replace(current.truth.members[name], removed=True)
            return current._with(name, gone)._next()._keep(root)

    def renew(
        self, names: Sequence[str] = (), *, days: int = DAYS, now: datetime | None = None
    ) -> Consortium:
        """New certificates for the same keys: for the members in `names`, or for everyone."""
        _check_days(days)
        now = now or certificates.now_utc()
        with store.exclusive(self.folder / AUTHORITY):
            current = Consortium.load(self.folder)
            for name in names:
                if name not in current.members:
                    raise ConfigurationError(
                        f"{name} is not in {current.truth.name}: {', '.join(current.members)} are"
                    )
            root = current._root()
            for name in names or current.members:
                member = current.truth.members[name]
                key = certificates.public_key(member.x509)
                issued = current._issue(root, name, key, days, now)
                renewed = msgspec.structs.replace(member, certificate=issued, made=now)
                current = current._with(name, renewed)
            return current._keep(root)

    def _root(self) -> Root:
        folder = self.folder / AUTHORITY
        certificate = certificates.read_certificate(folder / "root.crt")
        return Root(certificate, certificates.read_key(folder / "root.key"))

    def _with(self, name: str, member: Member) -> Consortium:
        members = {**self.truth.members, name: member}
        return Consortium(self.folder, msgspec.structs.replace(self.truth, members=members))

    def _next(self) -> Consortium:
        truth = msgspec.structs.replace(self.truth, serial=self.truth.serial + 1)
        return Consortium(self.folder, truth)

    def _admitted(
        self, name: str, request: Request | None, root: Root, days: int, now: datetime
    ) -> Consortium:
        role = Role.server if name == SERVER else Role.site
        if name in _FLARE_ROLES:
            role = Role.administrator
        if request is not None:
            if self.kit(name).exists():
                raise ConfigurationError(
                    f"{self.kit(name)} is left from an `add` without a request: delete it"
                )
            tls, key = request.tls, request.key
        else:
            folder = self.kit(name)
            startup = folder / "flare" / "startup"
            startup.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in (folder, folder / "flare"):
                part.chmod(0o700)
            tls = _tls_key(folder, role).public_key()
            key = _signing_key(folder).public.hex() if role is Role.site else ""
        known = {m.key: n for n, m in self.truth.members.items() if m.key}
        if key in known:
            raise ConfigurationError(
                f"{name} has the same key as {known[key]}: every site makes its own"
            )
        certificate = self._issue(root, name, tls, days, now)
        return self._with(name, Member(role, certificate, now, key))

    def _issue(self, root: Root, name: str, key: RSAPublicKey, days: int, now: datetime) -> str:
        host = self.truth.host if name == SERVER else None
        role = _FLARE_ROLES.get(name)
        issued = root.issue(name, key, now, days, host=host, role=role)
        return certificates.certificate_pem(issued).decode()

    def _keep(self, root: Root) -> Consortium:
        """Replace the truth, then lay every kit out from it."""
        store.write(self.folder / AUTHORITY / TRUTH, msgspec.toml.encode(self.truth))
        members = self.truth.members
        pins = Pins(
            1,
            self.truth.name,
            self.truth.serial,
            tuple(sorted(n for n, m in members.items() if m.removed)),
            {name: members[name].key for name in sorted(self.sites)},
        )
        roster = msgspec.toml.encode(pins)
        signature = root.sign(roster)
        for name, member in self.members.items():
            about = Description(
                1,
                self.truth.name,
                member.role,
                name,
                self.truth.host,
                self.truth.port,
                member.made,
                self.truth.bind if member.role is Role.server else "",
            )
            Papers(
                about,
                roster,
                signature,
                member.x509,
                root.certificate,
                pages.kit(about, pins),
            ).write(self.kit(name))
        store.write(self.folder / "README.md", pages.consortium(self.truth.name, pins).encode())
        return self


def _tls_key(folder: Path, role: Role) -> RSAPrivateKey:
    """The TLS key in a participant's folder, made where it is not there yet."""
    path = folder / "flare" / "startup" / f"{stem(role)}.key"
    if not path.exists():
        store.write_secret(path, certificates.key_pem(certificates.make_key()))
    return certificates.read_key(path)


def _signing_key(folder: Path) -> SigningKey:
    """The Ed25519 key in a site's folder, made where it is not there yet."""
    had_one = (folder / site_folder.KEY).exists()
    return site_folder.read_key(folder) if had_one else site_folder.make_key(folder)


def _check_name(name: str) -> None:
    try:
        msgspec.convert(name, ParticipantName)
    except msgspec.ValidationError:
        raise ConfigurationError(
            f'"{name}" cannot be a name: use 1 to 64 letters, digits, "-" and "_", and begin with '
            "a letter or digit"
        ) from None


def _check_site(name: str) -> None:
    _check_name(name)
    if name.casefold() in _RESERVED:
        raise ConfigurationError(f'"{name}" is taken by the consortium itself: use another name')


def _check_days(days: int) -> None:
    if not 1 <= days <= certificates.ROOT_DAYS:
        raise ConfigurationError(
            f"--days {days}: a certificate is good for 1 to {certificates.ROOT_DAYS} days"
        )


def _address(text: str, option: str, port: int) -> tuple[str, int]:
    """HOST and port in HOST[:PORT]."""
    host, colon, digits = text.partition(":")
    if ":" in digits:
        raise ConfigurationError(
            f"{option} {text}: FLARE listens on IPv4 only; use a name, or an IPv4 address"
        )
    try:
        host = msgspec.convert(host, HostName)
        port = msgspec.convert(int(digits), Port) if colon else port
    except ValueError:  # msgspec's too
        raise ConfigurationError(
            f"{option} {text}: use a host name or an IPv4 address, and a port from 1 to 65535, "
            f"such as server.example.org:{PORT}"
        ) from None
    return host, port


def _bind(bind: str | None, host: str, port: int) -> str:
    """ADDRESS:PORT to listen at: as FLARE can, everywhere or on this machine only."""
    if bind is None:
        return f"{'127.0.0.1' if _is_loopback(host) else '0.0.0.0'}:{port}"  # noqa: S104
    address, port = _address(bind, "--bind", port)
    if address != "0.0.0.0" and not _is_loopback(address):  # noqa: S104
        raise ConfigurationError(
            f"--bind {bind}: FLARE listens at all of a machine's addresses or at loopback only: "
            "use 0.0.0.0 or 127.0.0.1, and a firewall for the rest"
        )
    return f"{address}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"
