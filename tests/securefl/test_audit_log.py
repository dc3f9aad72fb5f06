"""No reply leaves a site without its line, and no line changes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from protocols.catalogue import UPLOAD
from securefl import audit_log, cli
from securefl.audit_log import LOG, Asked, Audited, AuditLog, Fault, exchanged, faults, read
from securefl.config import ConfigurationError
from securefl.messages import (
    Answer,
    PinnedKey,
    Proposal,
    Refusal,
    Request,
    Task,
    parse_asked,
    parse_reply,
)
from securefl.privacy.accounting import PoissonGaussian, Repeated
from securefl.privacy.ledger import Charged, Ledger, Logged
from securefl.runs import run
from securefl.site_folder import KEY, LEDGER, SITE, make_key, read_key
from securefl.store import CorruptStoreError

NAMES: Final = ("site-1", "site-2", "site-3")
SESSION, RUN = b"session of tests", b"run number one.."
PHASES: Final = ("advertise", "share", UPLOAD, "confirm")
TROUBLE: Final = Request(SESSION, 1, "trouble", b"").to_bytes()
PROPOSAL: Final = Proposal(
    SESSION, RUN, "", 1, (PinnedKey("a", bytes(32)), PinnedKey("b", b"b" * 32))
).to_bytes()


class Till:
    """A member that takes every run, and charges its uploads to a ledger, before it answers."""

    name = "north"

    def __init__(self, folder: Path) -> None:
        self._ledger = Ledger(folder / LEDGER)
        self._ledger.register("rows", unit="record", epsilon=50.0, delta=1e-5, purpose="a trial")
        self.public_key = read_key(folder).public
        self._said: dict[bytes, bytes] = {}

    def answer(self, data: bytes) -> bytes:
        if data == TROUBLE:
            raise ConnectionError("gone")
        if data not in self._said:
            self._said[data] = self._reply(data)
        return self._said[data]

    def _reply(self, data: bytes) -> bytes:
        if data == b"nonsense":
            return Refusal("request", "neither a proposal nor a request").to_bytes()
        asked = parse_asked(data)
        if isinstance(asked, Proposal):
            self._ledger.open(
                "rows",
                asked.run.hex(),
                experiment="a trial",
                promise=bytes(32),
                unit="record",
                per_round=Repeated(PoissonGaussian(6.0, 0.1), 1),
                rounds=2000,
                epsilon=2.0,
            )
            return Answer(b"accepted").to_bytes()
        if asked.phase == UPLOAD:
            self._ledger.charge(RUN.hex(), asked.round)
        return Answer(bytes(asked.round) + asked.phase.encode()).to_bytes()

    def close(self) -> None:
        self._ledger.close()


def request(number: int, phase: str, **more: Any) -> bytes:
    return Request(SESSION, number, phase, b"", **more).to_bytes()


def opened(folder: Path, **more: Any) -> Audited:
    if not (folder / KEY).exists():
        make_key(folder)
    return Audited(Till(folder), AuditLog(folder, read_key(folder)), "heart.example", **more)


def wrong(folder: Path, log: Path | None = None) -> tuple[Fault, ...]:
    with Ledger(folder / LEDGER) as ledger:
        return faults(log or folder / LOG, read_key(folder).public, ledger)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a folder, for every line is synced."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


def written(folder: Path, rounds: int = 3) -> Path:
    """A site that took part in some rounds."""
    site = opened(folder)
    site.answer(PROPOSAL)
    for number in range(1, rounds + 1):
        for phase in PHASES:
            site.answer(request(number, phase, model=b"m" if phase == PHASES[0] else b""))
    site.close()
    return folder


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield written(Path(made))


# --- what a line says ----------------------------------------------------------------------------


def test_a_log_says_who_asked_for_what_what_was_sent_and_what_it_cost(folder: Path) -> None:
    site = opened(folder)
    asked = [PROPOSAL, request(1, "advertise", task=Task("fit", 1)), request(1, UPLOAD)]
    asked += [request(1, UPLOAD), b"nonsense", Request(bytes(16), 1, "x", b"").to_bytes()]
    replies = [site.answer(data) for data in asked]
    told = exchanged(read(folder / LOG))
    with Ledger(folder / LEDGER) as ledger:
        standing = ledger.standing("rows")
        (charge,) = (i for i, e in enumerate(ledger.entries, 1) if isinstance(e, Charged))
    assert [one.number for one in told] == [1, 3, 5, 7, 9, 11]
    for one, data, reply in zip(told, asked, replies, strict=True):
        assert one.asked.by == "heart.example"
        assert (one.asked.size, one.asked.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert one.answered is not None
        assert one.answered.sha256 == hashlib.sha256(reply).hexdigest()
        assert one.answered.size == len(reply)
    assert [one.asked.message for one in told] == [
        "proposal",
        *3 * ["request"],
        "unreadable",
        "request",
    ]
    assert [one.asked.run for one in told] == [*4 * [RUN.hex()], "", ""]
    assert [one.asked.task for one in told] == ["", "fit", "fit", "fit", "", ""]
    assert [one.asked.phase for one in told] == ["", "advertise", UPLOAD, UPLOAD, "", "x"]
    assert [one.repeats for one in told] == [None, None, None, 5, None, None]
    costs = [one.answered.cost for one in told if one.answered]
    assert [cost is not None for cost in costs] == [False, False, True, False, False, False]
    assert costs[2] is not None
    assert costs[2].entries == (charge,)
    assert costs[2].epsilon == standing.spent > 0
    assert (costs[2].dataset, costs[2].budget, costs[2].delta) == ("rows", 50.0, 1e-5)
    assert told[4].answered is not None
    assert (told[4].answered.reply, told[4].answered.refused) == ("refusal", "request")
    assert wrong(folder) == ()


def test_the_log_is_its_owners_only_and_holds_no_message(folder: Path) -> None:
    site = opened(folder)
    site.answer(PROPOSAL)
    site.answer(Request(SESSION, 1, UPLOAD, os.urandom(1 << 20)).to_bytes())
    assert stat.S_IMODE((folder / LOG).stat().st_mode) == 0o600
    assert len((folder / LOG).read_bytes()) < 5000


def test_a_message_that_got_no_reply_shows_as_such(folder: Path) -> None:
    site = opened(folder)
    site.answer(PROPOSAL)
    with pytest.raises(ConnectionError):
        site.answer(TROUBLE)
    site.answer(request(1, UPLOAD))
    assert [one.answered is None for one in exchanged(read(folder / LOG))] == [False, True, False]
    assert wrong(folder) == ()


def test_several_processes_write_one_chain(folder: Path) -> None:
    make_key(folder)
    sites = [opened(folder) for _ in range(4)]
    sites[0].answer(PROPOSAL)

    def work(site: Audited) -> None:
        for number in range(1, 30):
            site.answer(request(number, "advertise"))

    threads = [threading.Thread(target=work, args=(site,)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(folder / LOG)) == 2 * (1 + 4 * 29)
    assert wrong(folder) == ()


# --- what verification finds ---------------------------------------------------------------------


def altered(pristine: Path, lines: list[bytes]) -> tuple[Fault, ...]:
    with tempfile.TemporaryDirectory() as made:
        log = Path(made) / LOG
        log.write_bytes(b"".join(lines))
        return wrong(pristine, log)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


@settings(max_examples=150)
@given(st.data())
def test_a_change_of_any_byte_shows(pristine: Path, data: st.DataObject) -> None:
    text = bytearray((pristine / LOG).read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    assert altered(pristine, [bytes(text)])


def test_a_changed_end_of_a_line_shows(pristine: Path) -> None:
    text = (pristine / LOG).read_bytes()
    for at in (i for i, byte in enumerate(text) if byte == 0x0A):
        assert altered(pristine, [text[:at], b"}", text[at + 1 :]])


@settings(max_examples=60)
@given(st.data())
def test_lines_that_are_taken_out_moved_or_put_in_show(pristine: Path, data: st.DataObject) -> None:
    lines = lines_of(pristine)
    what = data.draw(st.sampled_from(["out", "move", "again"]))
    at = data.draw(st.integers(0, len(lines) - 2))
    line = lines[at]
    if what != "again":
        del lines[at]
    if what != "out":
        others = [i for i in range(len(lines)) if i != at]
        lines.insert(data.draw(st.sampled_from(others)), line)
    found = altered(pristine, lines)
    assert found
    assert min(fault.line for fault in found if fault.line) <= len(lines)


def test_lines_cut_off_at_the_end_show_up_to_the_last_charge(pristine: Path) -> None:
    lines = lines_of(pristine)
    with Ledger(pristine / LEDGER) as ledger:
        named = [entry.lines for entry in ledger.entries if isinstance(entry, Logged)]
    assert named == sorted(set(named))
    for length in range(len(lines)):
        assert bool(altered(pristine, lines[:length])) == (length < named[-1]), length


def test_who_has_the_key_cannot_write_the_log_anew_beside_the_ledger(pristine: Path) -> None:
    key = read_key(pristine)
    for gone in (2, 3, 7):
        end, lines = audit_log._start(key.public), list[bytes]()
        kept = [line for line in read(pristine / LOG) if line.number != gone]
        for number, line in enumerate(kept, start=1):
            body = msgspec.json.encode(msgspec.structs.replace(line, number=number))
            end = audit_log._chained(end, body)
            signature = key.sign(audit_log._statement(end)).hex()
            parts = (msgspec.Raw(body), end.hex(), signature)
            lines.append(msgspec.json.encode(audit_log._Written(*parts)) + b"\n")
        found = altered(pristine, lines)
        assert any("of the ledger names" in fault.what for fault in found)


def test_a_log_of_another_key_shows_at_its_first_line(pristine: Path, folder: Path) -> None:
    with Ledger(pristine / LEDGER) as ledger:
        make_key(folder)
        found = faults(pristine / LOG, read_key(folder).public, ledger)
    assert found[0].line == 1
    assert sum("is not signed" in fault.what for fault in found) == len(lines_of(pristine))


def test_an_older_ledger_is_found_by_the_lines_that_knew_more(folder: Path) -> None:
    written(folder, 1)
    older = (folder / LEDGER).read_bytes()
    site = opened(folder)
    site.answer(PROPOSAL)
    site.answer(request(2, UPLOAD))
    site.close()
    (folder / LEDGER).write_bytes(older)
    found = wrong(folder)
    last = len(lines_of(folder))
    assert any(
        fault.line == last and "entries of it were taken out" in fault.what for fault in found
    )
    assert any("is no charge for it" in fault.what for fault in found)


def test_a_charge_that_no_line_asks_for_is_found(folder: Path) -> None:
    written(folder)
    with Ledger(folder / LEDGER) as ledger:
        ledger.charge(RUN.hex(), 9)
        number = ledger.head.entries
    (fault,) = wrong(folder)
    told = f"entry {number} of the ledger charges round 9 of run {RUN.hex()}"
    assert fault == Fault(0, f"{told}, and no line asks for it")


def test_a_log_that_is_younger_than_its_ledger_answers_for_its_own_time_only(folder: Path) -> None:
    make_key(folder)
    till = Till(folder)
    till.answer(PROPOSAL)
    till.answer(request(1, UPLOAD))
    till.close()
    site = opened(folder)
    site.answer(PROPOSAL)
    site.answer(request(2, UPLOAD))
    site.close()
    assert wrong(folder) == ()
    (folder / LOG).unlink()  # and begun anew
    site = opened(folder)
    site.answer(PROPOSAL)
    site.close()
    (fault,) = wrong(folder)
    assert "names line 3, and the log has 2: lines were taken out" in fault.what


def test_a_log_that_shrinks_while_it_is_written_stops_the_site(folder: Path) -> None:
    told: list[str] = []
    site = opened(folder, tell=told.append)
    site.answer(PROPOSAL)
    lines = lines_of(folder)
    site.answer(request(1, UPLOAD))
    (folder / LOG).write_bytes(b"".join(lines))
    reply = parse_reply(site.answer(request(2, UPLOAD)))
    assert isinstance(reply, Refusal)
    assert "an older copy was put in its place" in told[0]
    with Ledger(folder / LEDGER) as ledger:
        assert ledger.last_round(RUN.hex()) == 1


# --- crashes and full disks ----------------------------------------------------------------------


def test_a_line_that_a_crash_cut_short_is_mended(pristine: Path, folder: Path) -> None:
    text = (pristine / LOG).read_bytes()
    start = text[:-1].rfind(b"\n") + 1
    for cut in (*range(start + 1, len(text), 97), len(text) - 1):
        shutil.copytree(pristine, folder, dirs_exist_ok=True)
        (folder / LOG).write_bytes(text[:cut])
        assert wrong(folder) == ()
        site = opened(folder)
        site.answer(PROPOSAL)
        site.close()
        assert (folder / LOG).read_bytes()[:start] == text[:start]
        assert len(lines_of(folder)) == len(lines_of(pristine)) + 1
        assert wrong(folder) == ()


def killed(folder: Path, instant: int, work: Callable[[Audited], Iterator[bytes]]) -> list[bytes]:
    """The hashes of the replies that left a process which was killed at some line of our code."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        left = instant

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in (audit_log.__file__, __file__):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            site = opened(folder)
            sys.settrace(trace)
            for reply in work(site):
                os.write(writer, hashlib.sha256(reply).digest())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(process, 0)
    return [data[i : i + 32] for i in range(0, len(data), 32)]


def test_no_reply_leaves_without_its_line_wherever_the_process_is_killed(folder: Path) -> None:
    make_key(folder)
    number, unanswered = 0, 0

    def work(site: Audited) -> Iterator[bytes]:
        yield site.answer(PROPOSAL)
        for phase in PHASES:
            yield site.answer(request(number, phase))

    for number in range(1, 28):
        left = killed(folder, 13 * number, work)
        told = exchanged(read(folder / LOG))
        logged = {one.answered.sha256 for one in told if one.answered}
        assert {reply.hex() for reply in left} <= logged
        assert wrong(folder) == ()
        unanswered = sum(one.answered is None for one in told)
    assert left
    assert unanswered > 5


def test_a_kill_in_the_midst_of_a_write_leaves_a_log_that_verifies(folder: Path) -> None:
    written(folder, 1)
    length = len(lines_of(folder))
    process = os.fork()
    if process == 0:
        pwrite = os.pwrite

        def half(file: int, data: bytes, at: int) -> int:
            pwrite(file, data[: len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        os.pwrite = half
        try:
            opened(folder).answer(PROPOSAL)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert not (folder / LOG).read_bytes().endswith(b"\n")
    assert wrong(folder) == ()
    site = opened(folder)
    site.answer(PROPOSAL)
    assert len(lines_of(folder)) == length + 2
    assert wrong(folder) == ()


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """`disk(size)`: no file may grow beyond that many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("phase", ["advertise", UPLOAD])
def test_a_full_disk_lets_no_reply_out_and_spoils_nothing(
    folder: Path, disk: Callable[[int], None], phase: str
) -> None:
    told: list[str] = []
    site = opened(folder, tell=told.append)
    site.answer(PROPOSAL)
    for number in range(1, 60):  # longer than the ledger, which shall not be what fails
        site.answer(request(number, "share"))
    text, asked = (folder / LOG).read_bytes(), request(60, phase)
    step = len(lines_of(folder)[-2])
    assert len(text) > (folder / LEDGER).stat().st_size
    for room in (0, 1, step - 1, step, step + 1, step + 200):
        before = len(lines_of(folder))
        disk(len((folder / LOG).read_bytes()) + room)
        reply = parse_reply(site.answer(asked))
        disk(1 << 30)
        assert isinstance(reply, Refusal)
        assert reply == Refusal("request", "north cannot write its audit log: ask its people why")
        assert "File too large" in told.pop()
        assert (folder / LOG).read_bytes()[: len(text)] == text
        assert len(lines_of(folder)) <= before + 1
        assert wrong(folder) == ()
    with Ledger(folder / LEDGER) as ledger:
        assert ledger.last_round(RUN.hex()) == (60 if phase == UPLOAD else 0)
    assert isinstance(parse_reply(site.answer(asked)), Answer)
    assert wrong(folder) == ()


def test_a_run_whose_acceptance_could_not_be_logged_is_known_later(
    folder: Path, disk: Callable[[int], None]
) -> None:
    till = opened(folder)
    till.answer(PROPOSAL)
    for number in range(1, 60):
        till.answer(request(number, "share"))
    till.close()
    site = opened(folder)
    disk(len((folder / LOG).read_bytes()) + len(lines_of(folder)[0]) + 50)
    assert isinstance(parse_reply(site.answer(PROPOSAL)), Refusal)
    disk(1 << 30)
    assert isinstance(parse_reply(site.answer(request(60, UPLOAD))), Answer)
    assert wrong(folder) == ()


def test_a_site_that_cannot_log_a_request_is_not_asked(folder: Path) -> None:
    told: list[str] = []
    site = opened(folder, tell=told.append)
    site.answer(PROPOSAL)
    (folder / LOG).rename(folder / "elsewhere")
    reply = parse_reply(site.answer(request(1, UPLOAD)))
    assert isinstance(reply, Refusal)
    assert "was taken away" in told[0]
    with Ledger(folder / LEDGER) as ledger:
        assert not any(isinstance(entry, Charged) for entry in ledger.entries)


# --- real rounds, and the screen -----------------------------------------------------------------


def site_folder(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    make_key(folder)
    (folder / SITE).write_text(
        f'version = 1\nname = "{name}"\n[data]\nid = "rows"\npurpose = "a trial"\n'
        '[budget]\nunit = "record"\nepsilon = 9.0\ndelta = 1e-3\n'
        '[policy]\nconsent = "standing"\nunknown_sites = true\n'
    )


@pytest.fixture(scope="module")
def after_a_run(small, private) -> Iterator[Path]:
    """The sites' folders after three rounds of training with in-process gates."""
    with tempfile.TemporaryDirectory() as made:
        for name in NAMES:
            site_folder(Path(made) / "own" / name, name)
        experiment = small("protocol.name=secagg", "rounds=3", *private)
        run(experiment, Path(made) / "run", sites=Path(made) / "own")
        yield Path(made) / "own"


def test_every_site_of_a_run_has_a_log_that_fits_its_ledger(after_a_run: Path) -> None:
    for name in NAMES:
        folder = after_a_run / name
        assert wrong(folder) == ()
        told = exchanged(read(folder / LOG))
        uploads = [one for one in told if one.asked.phase == UPLOAD]
        assert [one.asked.round for one in uploads] == [1, 2, 3]
        assert {one.asked.task for one in told if one.asked.message == "request"} == {"train"}
        assert {one.asked.run for one in told} == {told[0].asked.run} != {""}
        spent = [one.answered.cost.epsilon for one in uploads if one.answered and one.answered.cost]
        with Ledger(folder / LEDGER) as ledger:
            assert spent[-1] == ledger.epsilon("rows")
            assert sum(isinstance(entry, Logged) for entry in ledger.entries) == 3
        assert spent == sorted(set(spent))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["site", "log", *map(str, arguments)], env={"COLUMNS": "80"})


def test_the_screen_shows_rounds_sizes_and_epsilon_in_80_columns(after_a_run: Path) -> None:
    shown = invoke(after_a_run / NAMES[0], "--last", 100)
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "asked by securefl run" in shown.output
    assert re.search(r"proposal, [\d.]+ k?B +accepted, ", shown.output)
    with Ledger(after_a_run / NAMES[0] / LEDGER) as ledger:
        assert re.search(
            rf"upload \(train\).* of {ledger.standing('rows').epsilon:g}", shown.output
        )
    checked = invoke(after_a_run / NAMES[0], "--verify")
    assert checked.exit_code == 0
    assert "chain, signatures and ledger fit" in checked.output
    assert "20 shown" not in invoke(after_a_run / NAMES[0], "--last", 2).output


def test_json_holds_every_message(after_a_run: Path) -> None:
    told = json.loads(invoke(after_a_run / NAMES[1], "--verify", "--format", "json").output)
    assert told["faults"] == []
    assert len(told["messages"]) == told["lines"] // 2
    last = [one["answered"]["cost"] for one in told["messages"] if one["answered"]["cost"]][-1]
    with Ledger(after_a_run / NAMES[1] / LEDGER) as ledger:
        assert last["epsilon"] == ledger.epsilon("rows")


def test_an_edited_log_is_told_with_its_line_and_status_1(after_a_run: Path, folder: Path) -> None:
    shutil.copytree(after_a_run / NAMES[2], folder / "copy")
    log = folder / "copy" / LOG
    lines = lines_of(folder / "copy")
    log.write_bytes(b"".join([*lines[:4], *lines[6:]]))
    found = invoke(folder / "copy", "--verify")
    assert found.exit_code == 1
    assert "line 5 does not follow from the one before it" in found.output
    told = json.loads(invoke(folder / "copy", "--verify", "--format", "json").stdout)
    assert told["faults"][0]["line"] == 5


def test_a_copy_without_the_secret_key_is_verified_by_the_public_one(
    after_a_run: Path, folder: Path
) -> None:
    public = read_key(after_a_run / NAMES[0]).public.hex()
    shutil.copytree(after_a_run / NAMES[0], folder / "copy", ignore=shutil.ignore_patterns(KEY))
    assert invoke(folder / "copy", "--verify", "--key", public).exit_code == 0
    other = read_key(after_a_run / NAMES[1]).public.hex()
    assert "is not signed" in invoke(folder / "copy", "--verify", "--key", other).output
    bad = invoke(folder / "copy", "--verify", "--key", "abc")
    assert bad.exit_code == 2
    assert "--key 'abc' is not 32 bytes in hexadecimal" in bad.output


def test_what_is_no_log_is_one_line(folder: Path) -> None:
    site_folder(folder / "new", "new")
    shown = invoke(folder / "new")
    assert shown.exit_code == 2
    assert "has no audit log yet" in shown.output
    assert invoke(folder / "nowhere").exit_code == 2
    (folder / "new" / LOG).write_text("{}\n")
    shown = invoke(folder / "new")
    assert shown.exit_code == 1
    assert "line 1 cannot be read" in shown.output
    with pytest.raises(CorruptStoreError, match=r"audit.jsonl: line 1 cannot be read"):
        read(folder / "new" / LOG)
    with pytest.raises(ConfigurationError, match="cannot read"):
        read(folder / "new")


def test_a_name_that_plays_tricks_with_the_terminal_is_shown_plain(folder: Path) -> None:
    site_folder(folder / "north", "north")
    site = Audited(
        Till(folder / "north"),
        AuditLog(folder / "north", read_key(folder / "north")),
        "heart\x1b[2Jexample",
    )
    site.answer(PROPOSAL)
    site.answer(request(1, "\x1b[31m\nred[/bold]"))
    shown = invoke(folder / "north").output
    assert "\x1b" not in shown
    assert "red[/bold]" in shown
    (first, *_) = read(folder / "north" / LOG)
    assert isinstance(first.event, Asked)
    assert first.event.by == "heart [2Jexample"
