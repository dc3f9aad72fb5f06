"""A kit: whole, its own, moveable; and what is wrong with it is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from securefl import site_folder
from securefl.config import ConfigurationError
from securefl.deployment import kits
from securefl.deployment.certificates import now_utc
from securefl.deployment.kits import Kit, Role
from securefl.store import CorruptStoreError

NOW = now_utc()


def test_a_kit_says_who_it_is(made: Path) -> None:
    server, a = (Kit.load(made / "trial/kits" / name) for name in ("server", "a"))
    assert (server.role, server.name, server.bind) == (Role.server, "server", "127.0.0.1:18021")
    assert (a.role, a.name, a.consortium, a.bind) == (Role.site, "a", "trial", "")
    assert (a.host, a.port) == ("127.0.0.1", 18021)
    assert a.roster.keys["a"] == site_folder.read_key(a.folder).public
    assert a.expires - NOW > timedelta(days=358)
    steward = Kit.load(server.folder / kits.STEWARD)
    assert (steward.role, steward.name) == (Role.administrator, "steward")


def test_a_kit_can_be_moved(copy: Callable[[], Path], tmp_path: Path) -> None:
    for name in ("server", "a", "administrator"):
        moved = shutil.move(copy() / "trial/kits" / name, tmp_path / f"else {name}")
        assert Kit.load(Path(moved)).check(NOW) == ()
        shutil.rmtree(tmp_path / "copy")


def test_certificates_allow_for_a_clock_that_is_an_hour_off(made: Path) -> None:
    kit = Kit.load(made / "trial/kits/a")
    assert kit.check(NOW - timedelta(hours=1)) == ()
    with pytest.raises(ConfigurationError, match="set the clock"):
        kit.check(NOW - timedelta(days=2))


def test_an_expiring_certificate_is_told_with_the_mend(made: Path) -> None:
    kit = Kit.load(made / "trial/kits/a")
    assert kit.check(kit.expires - timedelta(days=31)) == ()
    (warning,) = kit.check(kit.expires - timedelta(days=30))
    assert "expires in 30 days" in warning
    with pytest.raises(ConfigurationError, match="securefl consortium renew trial"):
        kit.check(kit.expires)


def test_a_servers_steward_is_checked_too(copy: Callable[[], Path]) -> None:
    kit = Kit.load(copy() / "trial/kits/server")
    (kit.folder / "steward/flare/startup/client.key").unlink()
    with pytest.raises(ConfigurationError, match=r"steward/flare/startup/client\.key"):
        kit.check(NOW)


@pytest.mark.parametrize("path", ["flare/startup/client.key", "site.key"])
def test_a_key_that_others_read_is_refused(path: str, copy: Callable[[], Path]) -> None:
    kit = Kit.load(copy() / "trial/kits/a")
    (kit.folder / path).chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        kit.check(NOW)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("flare/startup/client.key", "not the key of the certificate"),
        ("site.key", "not the key that the roster pins"),
        ("flare/startup/client.crt", 'certificate is of "b"'),
    ],
)
def test_a_part_of_another_kit_is_noticed(path: str, reason: str, copy: Callable[[], Path]) -> None:
    folder = copy() / "trial/kits"
    shutil.copy(folder / "b" / path, folder / "a" / path)
    with pytest.raises(ConfigurationError, match=reason):
        Kit.load(folder / "a").check(NOW)


def test_a_roster_that_was_changed_is_refused(copy: Callable[[], Path]) -> None:
    kit = Kit.load(copy() / "trial/kits/a")
    path = kit.folder / kits.ROSTER
    path.write_text(path.read_text().replace("serial = 1", "serial = 9"))
    with pytest.raises(ConfigurationError, match="was changed since"):
        _ = kit.roster


@pytest.mark.parametrize(
    "path", [kits.KIT, kits.ROSTER, kits.SIGNATURE, "flare/startup/client.crt", "site.key"]
)
@pytest.mark.parametrize("data", [None, b"", b"\xff\xfe", b"version = 2\n"])
def test_what_is_missing_or_damaged_is_said_in_one_line(
    path: str, data: bytes | None, copy: Callable[[], Path]
) -> None:
    folder = copy() / "trial/kits/a"
    (folder / path).unlink() if data is None else (folder / path).write_bytes(data)
    with pytest.raises((ConfigurationError, CorruptStoreError)) as error:
        Kit.load(folder).check(NOW)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_steward_goes_with_the_server(copy: Callable[[], Path]) -> None:
    from securefl.deployment.authority import Consortium

    folder = copy()
    used = folder / "used"
    (folder / "trial/kits/server").rename(used)
    Consortium.load(folder / "trial").add("d")
    kits.install(folder / "trial/kits/server", used)
    assert Kit.load(used / kits.STEWARD).pins.serial == 2
    assert Kit.load(used).check(NOW) == ()


def test_site_toml_that_pins_otherwise_is_told_line_by_line(copy: Callable[[], Path]) -> None:
    kit = Kit.load(copy() / "trial/kits/a")
    assert kits.unpinned(kit) == ()
    (kit.folder / site_folder.SITE).write_text(
        'version = 1\nname = "a"\n[data]\nid = "x"\npurpose = "y"\n[budget]\nunit = "record"\n'
        f'epsilon = 1.0\ndelta = 1e-5\n[consortium]\nb = "{"0" * 64}"\nz = "{"1" * 64}"\n'
    )
    told = "\n".join(kits.unpinned(kit))
    assert f'b = "{kit.pins.keys["b"]}"' in told
    assert f'c = "{kit.pins.keys["c"]}"' in told
    assert "take out z" in told


def test_the_startup_files_are_those_of_flares_own_templates(made: Path) -> None:
    """Key by key and value by value, but for two: the address to bind, and whom to refuse."""
    nvflare = pytest.importorskip("nvflare", reason="needs the extra flare")
    yaml = pytest.importorskip("yaml", reason="needs the extra flare")
    templates = yaml.safe_load(
        (Path(nvflare.__file__).parent / "lighter/templates/master_template.yml").read_text()
    )
    values = {
        "require_signed_jobs_config": ',\n"require_signed_jobs": true',
        "auth_identity_config": "",
        "name": "trial",
        "project_name": "trial",
        "target": "127.0.0.1:18021",
        "scheme": "grpc",
        "admin_server": "127.0.0.1",
        "admin_port": "18021",
        "conn_sec": "mtls",
        "server_identity": "server",
        "fqsn": "a",
        "is_leaf": "true",
        "username": "administrator",
        "host": "127.0.0.1",
        "port": "18021",
        "uid_source": "user_input",
    }
    for name, kit in (
        ("fed_server", "server"),
        ("fed_client", "a"),
        ("fed_admin", "administrator"),
    ):
        text = templates[name]
        for key, value in values.items():
            text = text.replace("{~~" + key + "~~}", value)
        ours = made / "trial/kits" / kit / "flare/startup" / f"{name}.json"
        assert json.loads(ours.read_text()) == json.loads(text)
