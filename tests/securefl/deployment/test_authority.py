"""A consortium: who belongs to it, and that nobody holds another's keys."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from securefl.config import ConfigurationError
from securefl.deployment import certificates, kits
from securefl.deployment.authority import (
    Consortium,
    Request,
    _address,
    _check_name,
    _check_site,
    enrol,
)
from securefl.deployment.certificates import Root, make_key, now_utc
from securefl.deployment.kits import Kit

NOW = now_utc()


def _secrets(folder: Path) -> dict[bytes, Path]:
    """Every private key below `folder`, as bytes that would be found if it lay anywhere else."""
    found = {}
    for path in folder.rglob("*.key"):
        data = path.read_bytes()
        if data.startswith(b"-----"):
            data = b"".join(data.split(b"\n")[1:-2])[200:400]  # past what all keys begin with
        found[data] = path
    return found


def test_every_private_key_lies_in_its_own_kit_and_nowhere_else(made: Path) -> None:
    secrets = _secrets(made)
    whose = {str(path.relative_to(made).parent) for path in secrets.values()}
    tls = "flare/startup"
    assert whose == {
        "trial/authority",
        f"trial/kits/server/{tls}",
        f"trial/kits/server/steward/{tls}",
        f"trial/kits/administrator/{tls}",
        "trial/kits/a",
        f"trial/kits/a/{tls}",
        "trial/kits/b",
        f"trial/kits/b/{tls}",
        "c",
        f"c/{tls}",
    }
    for path in made.rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes().replace(b"\n", b"")
        held = {own for secret, own in secrets.items() if secret in data}
        assert held <= {path}, f"{path} holds {held}"


def test_secrets_are_for_their_owner_only(made: Path) -> None:
    for path in made.rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for path in (made / "trial", made / "c"):
        assert all(
            p.stat().st_mode & 0o777 == 0o700 for p in [path, *path.rglob("*")] if p.is_dir()
        )


def test_nothing_in_a_consortium_names_where_it_was_made(made: Path) -> None:
    for path in made.rglob("*"):
        if path.is_file():
            assert str(made).encode() not in path.read_bytes(), path


def test_the_certificates_verify_under_the_root_by_another_verifier(made: Path) -> None:
    """RFC 5280 and the web's rules, by `cryptography`: the server's certificate is for its host."""
    server = Kit.load(made / "trial/kits/server")
    store = Store([certificates.read_certificate(server.root)])
    builder = PolicyBuilder().store(store).time(NOW)
    name = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder.build_server_verifier(name).verify(
        certificates.read_certificate(server.certificate), []
    )
    site = certificates.read_certificate(Kit.load(made / "trial/kits/a").certificate)
    with pytest.raises(VerificationError):
        builder.build_server_verifier(name).verify(site, [])


def _handshake(server: Kit, client: Kit, host: str = "127.0.0.1") -> str:
    """A real TLS handshake on loopback, both sides checking: the client that the server saw."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.verify_mode = ssl.CERT_REQUIRED
    listening.load_cert_chain(server.certificate, server.key)
    listening.load_verify_locations(server.root)
    dialling = ssl.create_default_context(cafile=str(client.root))
    dialling.load_cert_chain(client.certificate, client.key)
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                with listening.wrap_socket(connection, server_side=True) as secured:
                    subject = (secured.getpeercert() or {})["subject"]
                    seen.append(dict(pair for part in subject for pair in part)["commonName"])
                    secured.sendall(b"ok")
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), 20) as plain,
                dialling.wrap_socket(plain, server_hostname=host) as secured,
            ):
                if secured.recv(2) != b"ok":
                    raise ssl.SSLError("closed")
        finally:
            thread.join()
    return seen[0]


def test_server_and_sites_know_each_other_in_a_real_handshake(made: Path) -> None:
    server = Kit.load(made / "trial/kits/server")
    assert _handshake(server, Kit.load(made / "trial/kits/a")) == "a"
    assert _handshake(server, Kit.load(made / "trial/kits/administrator")) == "administrator"
    with pytest.raises(ssl.SSLError, match=r"doesn't match|mismatch"):
        _handshake(server, Kit.load(made / "trial/kits/a"), host="localhost")


def test_a_site_cannot_pose_as_the_server(made: Path) -> None:
    site = Kit.load(made / "trial/kits/b")
    with pytest.raises(ssl.SSLError, match=r"purpose|certificate"):
        _handshake(site, Kit.load(made / "trial/kits/a"))


def test_another_consortium_is_not_let_in(made: Path, tmp_path: Path) -> None:
    Consortium.new(tmp_path / "trial", "127.0.0.1:18021", ["a"])  # of the same name
    stranger = Kit.load(tmp_path / "trial/kits/a")
    with pytest.raises(ssl.SSLError):
        _handshake(Kit.load(made / "trial/kits/server"), stranger)
    with pytest.raises(ConfigurationError, match="belongs to another consortium"):
        kits.install(stranger.folder, made / "trial/kits/a")


def test_a_site_with_its_own_keys_gets_papers_for_them(copy: Callable[[], Path]) -> None:
    folder = copy()
    handed = folder / "trial/kits/c"
    assert not list(handed.rglob("*.key"))
    before = _secrets(folder / "c")
    kit = kits.install(handed, folder / "c")
    assert kit.check(NOW) == ()
    assert _secrets(folder / "c") == before
    assert _handshake(Kit.load(folder / "trial/kits/server"), kit) == "c"


def test_papers_for_other_keys_are_not_installed(copy: Callable[[], Path], tmp_path: Path) -> None:
    folder = copy()
    enrol(tmp_path / "c", "c")  # someone else who says that they are c
    with pytest.raises(ConfigurationError, match="not the key of the certificate"):
        kits.install(folder / "trial/kits/c", tmp_path / "c")
    assert not (tmp_path / "c" / kits.KIT).exists()


def test_a_request_that_was_changed_on_its_way_is_refused(made: Path, tmp_path: Path) -> None:
    """Each part by itself, and both keys by another's: whoever made it must hold both."""
    genuine = json.loads((made / "c" / "c.request.json").read_text())
    _, other = enrol(tmp_path / "other", "c")
    changes = (
        {"name": "d"},
        {"key": other.key},
        {"csr": other.csr},
        {"signature": other.signature},
        {"key": other.key, "signature": other.signature},
        {"csr": other.csr, "signature": other.signature},
        {"csr": "-----BEGIN"},
    )
    for change in changes:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(genuine | change))
        with pytest.raises(ConfigurationError, match="changed on its way"):
            Request.read(path)


def test_enrolling_twice_keeps_the_keys(tmp_path: Path) -> None:
    _, first = enrol(tmp_path / "d", "d")
    _, second = enrol(tmp_path / "d", "d")
    assert (first.key, first.fingerprint) == (second.key, second.fingerprint)


def test_an_added_site_is_in_everyones_newer_roster(copy: Callable[[], Path]) -> None:
    folder = copy()
    added = Consortium.load(folder / "trial").add("d")
    assert list(added.sites) == ["a", "b", "c", "d"]
    for name in ("server", "server/steward", "administrator", "a", "b", "d"):
        kit = Kit.load(folder / "trial/kits" / name)
        assert list(kit.roster) == ["a", "b", "c", "d"]
        assert kit.pins.serial == 2
        assert kit.check(NOW) == ()


def test_a_removed_site_is_refused_everywhere_and_for_good(copy: Callable[[], Path]) -> None:
    folder = copy()
    gone = Consortium.load(folder / "trial").remove("b")
    server = Kit.load(folder / "trial/kits/server")
    assert "b" not in server.roster
    assert server.pins.removed == ("b",)
    disabled = json.loads((server.flare / "disabled_clients.json").read_text())
    assert disabled == {"disabled_clients": ["b"]}
    for again in ("b", "B"):
        with pytest.raises(ConfigurationError, match="old certificate would be good again"):
            gone.add(again)
    with pytest.raises(ConfigurationError, match="no site of trial"):
        gone.remove("b")


def test_renewed_kits_keep_their_keys_also_those_that_were_handed_over(
    copy: Callable[[], Path],
) -> None:
    folder = copy()
    consortium = Consortium.load(folder / "trial")
    used = folder / "used"
    (folder / "trial/kits/a").rename(used)  # handed over, and not kept
    before, secrets = Kit.load(used).expires, _secrets(used)
    later = NOW + timedelta(days=340)
    assert len(consortium.due(later)) == 6
    renewed = consortium.renew(now=later)
    assert renewed.due(later) == ()
    assert not list((folder / "trial/kits/a").rglob("*.key"))
    kit = kits.install(folder / "trial/kits/a", used)
    assert kit.expires > before
    assert kit.check(later) == ()
    assert _secrets(used) == secrets


def test_an_older_kit_does_not_go_over_a_newer_one(
    copy: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copy()
    (folder / "trial/kits/a").rename(folder / "used")
    old = folder / "used"
    consortium = Consortium.load(folder / "trial").add("d")
    assert kits.install(folder / "trial/kits/a", old).pins.serial == 2
    (folder / "trial/kits/a").rename(folder / "second")
    consortium.remove("d")
    kits.install(folder / "trial/kits/a", old)
    with pytest.raises(ConfigurationError, match="older than"):
        kits.install(folder / "second", old)
    with pytest.raises(ConfigurationError, match="is the kit of a"):
        kits.install(folder / "trial/kits/b", old)


def test_a_crash_between_truth_and_kits_is_mended_by_the_next_command(
    copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy()
    consortium = Consortium.load(folder / "trial")
    with monkeypatch.context() as patch:
        patch.setattr(kits.Papers, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            consortium.remove("b")
    assert Consortium.load(folder / "trial").truth.serial == 2
    Consortium.load(folder / "trial").renew(["a"])
    assert "b" not in Kit.load(folder / "trial/kits/server").roster


def test_a_new_consortium_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="taken by the consortium"):
        Consortium.new(tmp_path / "x", "localhost", ["a", "Server"])
    with pytest.raises(ConfigurationError, match="twice"):
        Consortium.new(tmp_path / "x", "localhost", ["a", "A"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigurationError, match="nothing is overwritten"):
        Consortium.new(tmp_path / "x", "localhost", ["a"])


@pytest.mark.parametrize("name", ["../a", "a b", "a/b", "", ".", "a.b", "-a", "ä", "a" * 65, "a\n"])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a name"):
        _check_site(name)


@given(st.text())
def test_a_name_that_is_accepted_is_one_part_of_a_path(name: str) -> None:
    try:
        _check_name(name)
    except ConfigurationError:
        return
    assert Path(name).parts == (name,)
    assert name.isascii()
    assert len(name) <= 64


@pytest.mark.parametrize(
    "server",
    ["", "a b", "::1", "[::1]:80", "host:0", "host:65536", "host:x", "-h", "h/..", "é.org", ":80"],
)
def test_addresses_that_cannot_work_are_refused(server: str) -> None:
    with pytest.raises(ConfigurationError, match="--server"):
        _address(server, "--server", 8002)


@pytest.mark.parametrize(
    ("server", "address"),
    [("fl.example.org", ("fl.example.org", 8002)), ("10.0.0.7:443", ("10.0.0.7", 443))],
)
def test_a_server_has_a_name_or_an_address(server: str, address: tuple[str, int]) -> None:
    assert _address(server, "--server", 8002) == address


def test_a_bind_address_that_flare_would_not_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="and a firewall"):
        Consortium.new(tmp_path / "x", "fl.example.org", ["a"], bind="10.0.0.7")


def test_the_keeper_is_told_a_year_before_the_root_ends(made: Path) -> None:
    consortium = Consortium.load(made / "trial")
    root = certificates.read_certificate(made / "trial/authority/root.crt")
    early = root.not_valid_after_utc - timedelta(days=361)
    assert not any("own certificate" in line for line in consortium.due(early))
    assert "own certificate ends" in consortium.due(early + timedelta(days=1))[0]


def test_no_certificate_outlives_the_root() -> None:
    root = Root.make("trial", NOW)
    key = make_key().public_key()
    late = root.certificate.not_valid_after_utc - timedelta(days=5)
    assert root.issue("a", key, late, 360).not_valid_after_utc == (
        root.certificate.not_valid_after_utc
    )
    with pytest.raises(ConfigurationError, match="own certificate has expired"):
        root.issue("a", key, late + timedelta(days=6), 360)
    assert "PRIVATE" not in repr(root)
