"""Signatures under an audit: what they bind, who counts as a signer, and what is told if not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from protocols.errors import ProtocolError
from protocols.identity import SigningKey
from protocols.keystream import Keystream, Seed
from securefl import cli, signing
from securefl.config import ConfigurationError
from securefl.signing import AUDIT, PAGE, SIGNATURES, Audit, Signature
from securefl.site_folder import KEY, SITE, read_key
from securefl.store import CorruptStoreError

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
OFFICER = "Dr A. Naïve, data-protection officer"


def key_of(seed: int) -> SigningKey:
    return SigningKey(Keystream(Seed(bytes([seed]) * 32), "signing").bytes)


NORTH, SOUTH = key_of(1), key_of(2)
PINNED = {"north": NORTH.public, "south": SOUTH.public}


def audited(folder: Path, findings: str, page: str = "an audit") -> None:
    """Both files; the page names the SHA-256 of the findings that it is made of."""
    (folder / AUDIT).write_text(findings)
    (folder / PAGE).write_text(f"{page} of {hashlib.sha256(findings.encode()).hexdigest()}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of an audited run."""
    folder = tmp_path / "trial"
    folder.mkdir()
    audited(folder, '{"alarms": ["the bound is above the claim"], "attacks": 7}')
    return folder


def signed(run: Path, site: str = "north", key: SigningKey = NORTH) -> Signature:
    signature = signing.sign(Audit.of(run), site, key, NOW, OFFICER)
    signing.keep(run, signature)
    return signature


def told(run: Path, pinned: Mapping[str, bytes] = PINNED) -> str:
    """What is wrong with the run's signatures; empty where nothing is."""
    return signing.verify(run, pinned).fault


def test_a_signature_by_a_pinned_key_under_unchanged_files_is_sound(run: Path) -> None:
    signature = signed(run)
    found = signing.verify(run, PINNED)
    found.require()
    [line] = found.checked
    assert (line.signature, line.trusted, line.fault) == (signature, True, "")
    assert (signature.signatory, signature.at) == (OFFICER, "2026-03-04T05:06:07+00:00")


def test_the_time_is_written_in_utc(run: Path) -> None:
    there = NOW.astimezone(timezone(timedelta(hours=9)))
    assert signing.sign(Audit.of(run), "north", NORTH, there).at == "2026-03-04T05:06:07+00:00"


def test_signing_again_replaces_nothing_and_all_is_shown(run: Path) -> None:
    lines = [signed(run), signed(run, "south", SOUTH), signed(run)]
    found = signing.verify(run, PINNED)
    assert [one.signature for one in found.checked] == lines
    assert not found.fault


@pytest.mark.parametrize("file", [AUDIT, PAGE])
def test_a_file_that_changed_after_signing_is_named(run: Path, file: str) -> None:
    signed(run)
    (run / file).write_bytes((run / file).read_bytes() + b" ")
    assert f"line 1 fits no longer: {file} was changed after north signed it" in told(run)
    (run / file).unlink()
    assert f"line 1 fits no longer: {file} is gone after north signed it" in told(run)
    with pytest.raises(signing.UnverifiedError, match=SIGNATURES):
        signing.verify(run, PINNED).require()


def test_a_newer_signature_does_not_cover_up_an_older_one_of_other_files(run: Path) -> None:
    signed(run)
    audited(run, (run / AUDIT).read_text(), "another page")
    signed(run, "south", SOUTH)
    found = signing.verify(run, PINNED)
    assert [one.trusted for one in found.checked] == [False, True]
    assert f"line 1 fits no longer: {PAGE}" in found.fault


def test_nobody_is_known_where_nothing_is_pinned(run: Path) -> None:
    signed(run)
    assert told(run, {}).startswith("nothing is pinned, so nobody can say who signed")
    assert not signing.verify(run, {}).checked[0].trusted


def test_an_unknown_key_counts_for_nobody_and_is_told_with_the_way_to_pin_it(run: Path) -> None:
    signed(run, "east", stranger := key_of(3))
    assert told(run).endswith(f"pin it with --key east={stranger.public.hex()}")
    signed(run)
    found = signing.verify(run, PINNED)
    assert not found.fault, "a signature by a stranger spoils nothing"
    assert [one.trusted for one in found.checked] == [False, True]


def test_a_stranger_cannot_sign_as_a_pinned_site(run: Path) -> None:
    signed(run, "south", SOUTH)
    signed(run, "north", key_of(3))
    assert told(run).startswith("line 2 says north and is signed by another key than the one that")


def test_a_pinned_key_cannot_sign_under_another_name(run: Path) -> None:
    signed(run, "east", NORTH)
    assert told(run).startswith("line 1 says east and is signed by the key that you pin for north")


def test_a_run_that_nobody_signed_says_how_to_sign_it(run: Path) -> None:
    assert told(run).startswith("nobody signed: `securefl report sign")
    (run / SIGNATURES).touch()
    assert told(run).startswith("nobody signed")


SIGNED = signing.sign(Audit("a" * 64, "b" * 64, 0), "north", NORTH, NOW, OFFICER)
LINE = msgspec.json.encode(SIGNED)

HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), max_size=200)
FIELDS = {
    "findings": HEX,
    "page": HEX,
    "site": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    "key": HEX | st.just(SOUTH.public.hex()),
    "at": st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat(timespec="seconds")),
    "signatory": PRINTABLE,
    "signature": st.binary(min_size=64, max_size=64).map(bytes.hex),
}


@given(st.data())
def test_any_change_of_any_field_makes_the_signature_invalid(data: st.DataObject) -> None:
    SIGNED.check()
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(FIELDS[name].filter(lambda value: value != getattr(SIGNED, name)))
    changed = msgspec.structs.replace(SIGNED, **{name: value})
    with pytest.raises(ProtocolError):
        changed.check()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An audited run that north signed, and its line."""
    folder = tmp_path_factory.mktemp("kept")
    audited(folder, "{}")
    signed(folder)
    return folder, (folder / SIGNATURES).read_bytes()


@given(st.data())
def test_any_change_of_any_byte_of_the_line_is_told(
    kept: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, line = kept
    (folder / SIGNATURES).write_bytes(line)
    assert not told(folder)
    at = data.draw(st.integers(0, len(line) - 2))  # all but the end of the line
    change = data.draw(st.integers(1, 255))
    (folder / SIGNATURES).write_bytes(line[:at] + bytes([line[at] ^ change]) + line[at + 1 :])
    assert told(folder).startswith("line 1 ")


@given(junk=st.binary(min_size=1, max_size=300))
def test_whatever_else_stands_in_the_file_is_told_in_one_printable_line(
    kept: tuple[Path, bytes], junk: bytes
) -> None:
    folder, line = kept
    (folder / SIGNATURES).write_bytes(line + junk)
    found = signing.verify(folder, PINNED)
    assert found.fault.startswith("line 2 is no signature")
    assert found.fault.isprintable()
    assert found.checked[0].trusted


@pytest.mark.parametrize(
    "changed",
    [
        b"[" * 100_000,
        LINE.replace(b":", b": ", 1),
        LINE[:-1] + b',"page":"' + b"c" * 64 + b'"}',
        LINE[:-1] + b',"\\u001b[31mred":1}',
        LINE.replace(b"north", b"NORTH/../x"),
        LINE.replace(b"+00:00", b"+01:00"),
        LINE.replace(b"2026-03-04", b"2026-13-41"),
        LINE.replace(OFFICER.encode(), b"red \\u001b[31m"),
        LINE.replace(OFFICER.encode(), b"x" * 201),
        LINE.replace(b'"as"', b'"by"'),
    ],
)
def test_a_line_in_another_form_is_none_even_where_it_means_the_same(
    run: Path, changed: bytes
) -> None:
    assert changed != LINE
    (run / SIGNATURES).write_bytes(changed + b"\n")
    fault = told(run)
    assert fault.startswith("line 1 is no signature")
    assert fault.isprintable()


def test_what_a_crash_left_of_a_line_is_told_and_goes_when_somebody_signs_again(run: Path) -> None:
    signed(run)
    whole = (run / SIGNATURES).read_bytes()
    (run / SIGNATURES).write_bytes(whole + whole[:100])
    assert told(run).startswith("line 2 is no signature")
    signed(run, "south", SOUTH)
    assert not told(run)
    assert len(signing.verify(run, PINNED).checked) == 2


def test_signing_keeps_a_line_whose_end_an_editor_took(run: Path) -> None:
    signed(run)
    (run / SIGNATURES).write_bytes((run / SIGNATURES).read_bytes().rstrip())
    assert not told(run)
    signed(run, "south", SOUTH)
    assert len(signing.verify(run, PINNED).checked) == 2
    assert not told(run)


@pytest.mark.parametrize("signatory", ["two\nlines", "\x1b[31m", "x" * 201, "\udc80"])
def test_who_signs_is_one_printable_line(run: Path, signatory: str) -> None:
    with pytest.raises(ConfigurationError, match="one line of at most 200 printable characters"):
        signing.sign(Audit.of(run), "north", NORTH, NOW, signatory)


@pytest.mark.parametrize(
    ("text", "alarms"), [("{}", None), ('{"alarms": []}', 0), ('{"alarms": [{"p": 0.01}, 2]}', 2)]
)
def test_alarms_are_counted_where_the_audit_lists_them(
    run: Path, text: str, alarms: int | None
) -> None:
    audited(run, text)
    assert Audit.of(run).alarms == alarms


def test_a_page_of_other_findings_is_not_signed(run: Path) -> None:
    (run / AUDIT).write_text('{"alarms": []}')
    with pytest.raises(CorruptStoreError, match=r"audit.html is not made of this audit.json"):
        Audit.of(run)


def test_what_succeeded_unclaimed_and_what_was_left_out_is_counted(run: Path) -> None:
    audited(run, '{"alarms": [], "broken": ["readable"], "left_out": ["loss", "lira"]}')
    told = Audit.of(run)
    assert (told.alarms, told.broken, told.left_out) == (0, 1, 2)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"alarms": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_audit_is_not_signed(run: Path, text: bytes) -> None:
    (run / AUDIT).write_bytes(text)
    with pytest.raises(CorruptStoreError, match=r"audit.json is no audit"):
        Audit.of(run)


@pytest.mark.parametrize("file", [AUDIT, PAGE])
def test_a_run_that_was_not_audited_is_not_signed(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(ConfigurationError, match=rf"{file} is not there: `securefl audit"):
        Audit.of(run)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["north"], "write it as SITE=HEX"),
        (["=" + "0" * 64], "write it as SITE=HEX"),
        (["north=" + "0" * 63], "write it as SITE=HEX"),
        (["north=" + "z" * 64], "write it as SITE=HEX"),
        (["north=" + "0" * 64, "north=" + "1" * 64], "two keys are pinned for north"),
        (["north=" + "0" * 64, "south=" + "0" * 64], "one key is pinned for north and south"),
    ],
)
def test_keys_that_say_nothing_or_two_things_are_refused(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        signing.trusted_keys(None, keys)


# The commands


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call securefl where the audited run and the sites lie."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

    def call(*arguments: object) -> Any:
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def sites(command: Any) -> tuple[Path, Path]:
    """The folders of north and south; south pins the key of north."""
    for name in ("north", "south"):
        made = command(
            *("site", "init", name, "--name", name, "--data-id", "cardio", "--unit", "record"),
            *("--epsilon", "6", "--delta", "1e-3", "--purpose", "predict relapse"),
        )
        assert made.exit_code == 0, made.output
    path = Path("south", SITE)
    path.write_text(path.read_text() + f'north = "{read_key(Path("north")).public.hex()}"\n')
    return Path("north"), Path("south")


def test_a_site_signs_and_another_one_that_pins_its_key_verifies(
    command: Any, sites: tuple[Path, Path], run: Path
) -> None:
    north, south = sites
    done = command("report", "sign", "trial", "--site", north, "--as", OFFICER)
    assert done.exit_code == 0
    assert done.stdout.startswith("verdict    1 ALARM; trial/audit.html says more\n")
    assert f"signed by  north, as {OFFICER}\n" in done.stdout
    for folder in (north, south):
        seen = command("report", "verify", "trial", "--site", folder)
        assert (seen.exit_code, seen.stderr) == (0, "")
        assert seen.stdout.endswith("trial: the audit is unchanged, and signed by north\n")
    pin = f"north={read_key(north).public.hex().upper()}"
    assert command("report", "verify", "trial", "--key", pin).exit_code == 0
    shown = json.loads(
        command("report", "verify", "trial", "--key", pin, "--format", "json").stdout
    )
    assert shown["fault"] is None
    [line] = shown["lines"]
    assert (line["trusted"], line["signature"]["as"]) == (True, OFFICER)


def test_verifying_without_a_key_to_trust_is_status_1_in_one_line(
    command: Any, sites: tuple[Path, Path], run: Path
) -> None:
    command("report", "sign", "trial", "--site", sites[1])
    for trust in ((), ("--site", sites[0])):
        seen = command("report", "verify", "trial", *trust)
        assert seen.exit_code == 1
        assert seen.stderr.count("\n") == 1
        assert seen.stderr.startswith(f"securefl: trial/{SIGNATURES}: ")
        assert "by a key that is NOT PINNED" in seen.stdout
        shown = command("report", "verify", "trial", *trust, "--format", "json")
        assert shown.exit_code == 1
        assert json.loads(shown.stdout)["fault"] in shown.stderr


def test_a_changed_page_is_status_1_in_one_line(
    command: Any, sites: tuple[Path, Path], run: Path
) -> None:
    command("report", "sign", "trial", "--site", sites[0])
    (run / PAGE).write_text("nothing was found")
    seen = command("report", "verify", "trial", "--site", sites[0])
    assert seen.exit_code == 1
    assert seen.stderr.count("\n") == 1
    assert f"{PAGE} was changed after north signed it" in seen.stderr


def test_an_auditor_verifies_with_a_copy_of_site_toml_alone(
    command: Any, sites: tuple[Path, Path], run: Path
) -> None:
    command("report", "sign", "trial", "--site", sites[0])
    (sites[1] / KEY).unlink()
    assert command("report", "verify", "trial", "--site", sites[1]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sign", "absent", "--site", "north"), "absent is not a run directory"),
        (("sign", "trial", "--site", "absent"), "cannot read absent/site.toml"),
        (("sign", "trial", "--site", "north", "--as", "a\nb"), "cannot sign: as = 'a\\nb'"),
        (("verify", "absent"), "absent is not a run directory"),
        (("verify", "trial", "--site", "absent"), "cannot read absent/site.toml"),
        (("verify", "trial", "--key", "north"), "--key 'north': write it as SITE=HEX"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_signs_nothing(
    command: Any, sites: tuple[Path, Path], run: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = command("report", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (run / SIGNATURES).exists()


def test_report_takes_a_run_or_the_name_of_a_command(
    command: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ((), ("--format", "json"), ("trial",), ("write", "trial"), ("./sign",)):
        done = command("report", *arguments)
        assert done.exit_code == 2
        assert "is not a run directory (it has no experiment.toml)" in done.stderr
    told = command("report", "--help").stdout
    assert all(f" {name} " in told for name in ("[RUN]", "write", "sign", "verify"))
    assert "RUN" in command("report", "write", "--help").stdout


def test_debug_shows_where_an_error_of_a_command_in_a_group_arose(command: Any) -> None:
    assert "Traceback" not in command("report", "verify", "absent").stderr
    assert "Traceback" in command("--debug", "report", "verify", "absent").stderr
