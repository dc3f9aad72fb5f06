"""`securefl doctor`: whether a kit can be used on this machine, and what to do if not.

What cannot be seen from here is not guessed: neither TLS nor gRPC carries the time, so that the
server's clock cannot be asked; and what a firewall lets in is seen from outside only.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.metadata
import ipaddress
import os
import platform
import shutil
import socket
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final, final

from cryptography import x509
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from securefl import config, site_folder
from securefl.config import ConfigurationError
from securefl.deployment import certificates, kits
from securefl.deployment.kits import Kit, Role
from securefl.privacy.ledger import Ledger
from securefl.store import CorruptStoreError

PATIENCE: Final = 5.0
"""Seconds that a connection may take."""

_GIB: Final = 1 << 30
_LEAST: Final = _GIB // 8
_ENOUGH: Final = 2 * _GIB
_PACKAGES: Final = ("securefl", "torch", "tenseal", "opacus", "cryptography", "nvflare")
_PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order; lower case only
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_SETTINGS: Final = 4
"""The type of the first frame that an HTTP/2 server sends (RFC 9113, 3.4)."""


class Verdict(StrEnum):
    """What a check found."""

    ok = "OK"
    warning = "warning"
    fault = "fault"


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what it is about, what was found, and what to do about it (if anything)."""

    about: str
    verdict: Verdict
    found: str
    mend: str = ""


def examine(
    folder: Path, *, now: datetime, environment: Mapping[str, str], data: Path | None = None
) -> Iterator[Finding]:
    """Every check that fits the kit in `folder`, one after another; none raises.

    environment: the variables that the kit's processes will see. data: the site's records, where
    site.toml does not say.
    """
    yield from _versions()
    try:
        kit = Kit.load(folder)
    except ConfigurationError as error:
        yield _fault("kit", error)
        return
    yield Finding("kit", Verdict.ok, f"{kit.role} {kit.name} of {kit.consortium}")
    yield from _papers(kit, now)
    yield _clock(kit, now)
    yield room(shutil.disk_usage(folder).free)
    yield _proxy(kit, environment)
    if kit.role is Role.server:
        yield _listening(kit)
        yield _name(kit)
    else:
        yield from _reaching(kit, environment)
    if kit.role is Role.site:
        yield from _site(kit, data)


def _ok(about: str, found: str) -> Finding:
    return Finding(about, Verdict.ok, found)


def _fault(about: str, error: Exception, mend: str = "") -> Finding:
    """A fault in the words of an error, which ends in the mend where it is one of ours."""
    return Finding(about, Verdict.fault, " ".join(str(error).split()), mend)


def _versions() -> Iterator[Finding]:
    found, faults = [f"python {platform.python_version()}"], []
    ranges = _ranges()
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "nvflare":
                faults.append("nvflare is missing: pip install 'securefl[flare]'")
            elif name != "securefl":
                faults.append(f"{name} is missing: pip install {name}")
            else:
                found.append("securefl from a source tree")
            continue
        found.append(f"{name} {version}")
        if name in ranges and not ranges[name].contains(version, prereleases=True):
            faults.append(f"{name} {version} is not supported: pip install -U 'securefl[flare]'")
    if faults:
        yield Finding("versions", Verdict.fault, "; ".join(found), "; ".join(faults))
    else:
        yield _ok("versions", ", ".join(found))


def _ranges() -> dict[str, SpecifierSet]:
    """Which versions securefl's own metadata permits, by package; nothing in a source tree."""
    try:
        lines = importlib.metadata.requires("securefl") or ()
    except importlib.metadata.PackageNotFoundError:
        return {}
    needs = [Requirement(line) for line in lines]
    return {
        need.name: need.specifier
        for need in needs
        if need.marker is None or need.marker.evaluate({"extra": "flare"})
    }


def _papers(kit: Kit, now: datetime) -> Iterator[Finding]:
    try:
        warnings = kit.check(now)
    except (ConfigurationError, CorruptStoreError) as error:
        yield _fault("certificate", error)
        return
    for warning in warnings:
        found, _, mend = warning.partition(": ")
        yield Finding("certificate", Verdict.warning, found, mend)
    if not warnings:
        days = (kit.expires - now).days
        yield _ok(
            "certificate",
            f"good for {days} more days, until {kit.expires:%Y-%m-%d}; keys match, and are for "
            "their owner only",
        )
    yield _ok("roster", f"number {kit.pins.serial}, signed: {', '.join(kit.roster) or 'no site'}")


def _clock(kit: Kit, now: datetime) -> Finding:
    says = f"{now:%Y-%m-%d %H:%M} UTC"
    if now < kit.made - timedelta(minutes=5):
        return Finding(
            "clock",
            Verdict.warning,
            f"it says {says}, but the kit was made at {kit.made:%Y-%m-%d %H:%M} UTC",
            "set this machine's clock, or that of the consortium's keeper (a day off is too much)",
        )
    return _ok("clock", f"{says}, after the kit was made; the server's cannot be asked")


def room(free: int) -> Finding:
    """Whether `free` bytes are enough for runs and logs."""
    found = f"{free / _GIB:.1f} GiB are free where the kit lies"
    if free >= _ENOUGH:
        return _ok("disk", found)
    verdict = Verdict.warning if free >= _LEAST else Verdict.fault
    return Finding("disk", verdict, found, "make room: runs are kept here, and logs")


def _proxy(kit: Kit, environment: Mapping[str, str]) -> Finding:
    proxy, why = proxy_for(kit.host, environment)
    if kit.role is Role.server:
        return _ok("proxy", "none is used: a server opens no connections")
    if proxy is None:
        return _ok("proxy", why)
    mend = f"if the connection fails, or is not meant to go there: export no_proxy={kit.host}"
    return Finding("proxy", Verdict.warning, why, mend)


def proxy_for(host: str, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The HTTP proxy (HOST:PORT) through which gRPC will reach `host`, and why that one or none.

    As gRPC's core does it: the first of grpc_proxy, https_proxy and http_proxy, in lower case only;
    none for hosts in no_grpc_proxy, or else no_proxy (by suffix, or CIDR for addresses); of other
    schemes than http none, with an error in its log. (grpc: doc/environment_variables.md)
    """
    variable = next((name for name in _PROXIES if environment.get(name)), None)
    if variable is None:
        return None, "no proxy variable is set (grpc_proxy, https_proxy, http_proxy)"
    exempt = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    if any(_covers(entry.strip(), host) for entry in exempt.split(",")):
        return None, f"{variable} is set, but no_proxy exempts {host}"
    url = urllib.parse.urlsplit(environment[variable])
    if url.scheme != "http" or not url.hostname:
        return None, f"{variable} is not an http:// address, so gRPC goes without it"
    address = f"{url.hostname}:{url.port or 80}"
    return address, f"{variable} is set: connections to {host} go through {address}"


def _covers(entry: str, host: str) -> bool:
    if not entry:
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    return host.endswith(entry)


def _name(kit: Kit) -> Finding:
    try:
        addresses = _resolved(kit.host, kit.port)
    except OSError:
        return Finding(
            "name",
            Verdict.warning,
            f"{kit.host} does not resolve here",
            "see that it does at the sites: that is the name they connect to",
        )
    return _ok("name", f"{kit.host} is {', '.join(addresses)}; sites connect to port {kit.port}")


def _listening(kit: Kit) -> Finding:
    """Whether the server's port is free, or held by a server of this kit."""
    host, _, digits = kit.bind.rpartition(":")
    port = int(digits)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return _fault(
                    "port",
                    error,
                    f"the server cannot listen at {kit.bind}: a port above 1023, and an address of "
                    "this machine, need no rights (`securefl consortium new --bind`)",
                )
        else:
            return _ok("port", f"{kit.bind} is free for the server")
    try:
        with socket.create_connection(
            ("127.0.0.1" if host == "0.0.0.0" else host, port),  # noqa: S104
            PATIENCE,
        ) as plain:
            shown = _shown(kit, plain)
    except OSError as error:
        shown, told = None, _plain(error)
    else:
        told = "its certificate is another"
    if shown == certificates.read_certificate(kit.certificate):
        return _ok("port", f"{kit.bind} is held by the server of this kit, which is running")
    return Finding(
        "port",
        Verdict.fault,
        f"{kit.bind} is held by another program ({told})",
        "stop that program (`ss -ltnp` names it), or make the server's kit with another port",
    )


def _reaching(kit: Kit, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The way to the server, step by step; what follows on a fault is not looked at."""
    proxy, _ = proxy_for(kit.host, environment)
    if proxy is None:
        try:
            addresses = _resolved(kit.host, kit.port)
        except OSError as error:
            yield Finding(
                "name",
                Verdict.fault,
                f"{kit.host} does not resolve: {_plain(error)}",
                "ask whoever runs the server for its name, and this network's people for DNS; or "
                "put it into /etc/hosts",
            )
            return
        yield _ok("name", f"{kit.host} is {', '.join(addresses)}")
    try:
        plain = _connected(kit, proxy)
    except (OSError, http.client.HTTPException) as error:
        way = f"through {proxy}" if proxy else "directly"
        yield Finding(
            "port",
            Verdict.fault,
            f"TCP port {kit.port} of {kit.host} is not reached {way}: {_plain(error)}",
            "see that the server runs, and that firewalls let this machine out to that port",
        )
        return
    with plain:
        yield _ok("port", f"TCP port {kit.port} of {kit.host} answers")
        try:
            shown = _shown(kit, plain)
        except (OSError, ConfigurationError) as error:
            yield Finding(
                "server",
                Verdict.fault,
                f"no mutual TLS with what answers there: {_plain(error)}",
                "see that it is the consortium's server and nothing on the way opens TLS, and that "
                "this kit is the newest",
            )
            return
    ends = shown.not_valid_after_utc
    serial = f"{shown.serial_number:x}"[:16]
    yield _ok(
        "server",
        f'it shows the certificate of "{certificates.name_of(shown)}" ({serial}..., until '
        f"{ends:%Y-%m-%d}) under our root, and takes ours",
    )


def _resolved(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


def _connected(kit: Kit, proxy: str | None) -> socket.socket:
    """A TCP connection to the server, through the proxy if there is one."""
    if proxy is None:
        return socket.create_connection((kit.host, kit.port), PATIENCE)
    connection = http.client.HTTPConnection(proxy, timeout=PATIENCE)
    connection.set_tunnel(kit.host, kit.port)
    connection.connect()
    return connection.sock


def _shown(kit: Kit, plain: socket.socket) -> x509.Certificate:
    """The certificate of a gRPC server that took ours. Raises OSError: it is not so."""
    context = ssl.create_default_context(cafile=str(kit.root))
    context.load_cert_chain(kit.certificate, kit.key)
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(plain, server_hostname=kit.host) as secured:
        # Under TLS 1.3 a server refuses our certificate after the handshake: let it speak first.
        secured.sendall(_PREFACE)
        frame = secured.recv(9)
        if len(frame) < 4 or frame[3] != _SETTINGS:
            raise ConnectionError("it does not speak gRPC, or does not take our certificate")
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


def _plain(error: Exception) -> str:
    """An error of the network in few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} s"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _site(kit: Kit, data: Path | None) -> Iterator[Finding]:
    path = kit.folder / site_folder.SITE
    if not path.exists():
        yield Finding(
            "site.toml",
            Verdict.fault,
            f"{path} is not there: nothing is permitted yet",
            f"securefl site init {kit.folder} --data-id ID ... writes it",
        )
        return
    try:
        own = config.load_site(path)
        unpinned = kits.unpinned(kit)
    except ConfigurationError as error:
        yield _fault("site.toml", error)
        return
    if own.name != kit.name:
        yield Finding(
            "site.toml",
            Verdict.fault,
            f'it says name = "{own.name}", but this is the kit of {kit.name}',
            f'write name = "{kit.name}"',
        )
    elif unpinned:
        yield Finding(
            "site.toml",
            Verdict.warning,
            "it pins other keys than the roster: runs with those sites are refused",
            "; ".join(unpinned),
        )
    else:
        yield _ok("site.toml", f"data set {own.data.id}; pins every site of the roster")
    if own.data.agreed is None:
        yield Finding(
            "schema",
            Verdict.fault,
            "site.toml names none: every run is refused",
            'put schema = "FILE", the one that the sites agreed on, under [data]',
        )
    yield _records(data or own.data.path)
    yield _ledger(kit.folder / site_folder.LEDGER)


def _records(path: Path | None) -> Finding:
    if path is None:
        return Finding(
            "records",
            Verdict.warning,
            "site.toml does not say where they lie",
            "write path under [data], or start with --data FILE",
        )
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return Finding(
            "records",
            Verdict.fault,
            f"{path} cannot be read: {error.strerror}",
            "put them there, and let the account that runs the site read them",
        )
    return _ok("records", f"{path} can be read; `securefl data check` looks inside")


def _ledger(path: Path) -> Finding:
    if not path.exists():
        return _ok("ledger", "none yet: the first run makes it")
    try:
        with Ledger(path) as ledger:
            head = ledger.head
    except Exception as error:  # whatever is wrong with it is what is asked for
        return _fault("ledger", error)
    if not os.access(path, os.W_OK):
        return Finding("ledger", Verdict.fault, f"{path} cannot be written", f"chmod 600 {path}")
    return _ok("ledger", f"whole: {head.entries} entries")
