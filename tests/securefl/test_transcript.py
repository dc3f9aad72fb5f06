"""Transcripts: what a site records of itself is enough to play it again, and nothing outlives its
day."""

from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import date

import numpy as np
import pytest
from typer.testing import CliRunner

from attacks.attack import UnavailableError
from attacks.case import Case
from protocols.catalogue import PROTOCOLS, UPLOAD
from securefl import site_folder
from securefl.cli import app
from securefl.config import ConfigurationError
from securefl.messages import Request
from securefl.runs import run
from securefl.state import GlobalState
from securefl.store import SiteStore
from securefl.transcript import Drawing, Recorder, crossings, delete, keep, recording

EVERYONE = "['site-1', 'site-2', 'site-3']"


def own(folder, site="site-1"):
    return SiteStore(folder / "sites" / site).private


def again(data: bytes) -> Callable[[int], bytes]:
    """A source that gives what was drawn before, and no more."""
    at = 0

    def source(size: int) -> bytes:
        nonlocal at
        at += size
        assert at <= len(data)
        return data[at - size : at]

    return source


# --- a site's own recording


@pytest.mark.parametrize("protocol", ["plain", "bfv", "secagg", "masked-bfv"])
def test_with_what_a_site_drew_its_own_steps_say_the_same_again(small, bench, tmp_path, protocol):
    experiment = small(f"protocol.name={protocol}", f"transcript.own={EVERYONE}")
    held, asked, said = bench(experiment), {}, {}
    ask = held.ask

    def heard(site, request):
        reply = ask(site, request)
        said[site, Request.from_bytes(request).phase] = reply.body
        return reply

    held.ask = heard
    last = PROTOCOLS[protocol].phases[-1]

    def saw(site, phase, request):
        asked[site, phase] = Request.from_bytes(request)

    for site, request in held.drive(1, last, saw).items():
        if (site, last) not in said:
            heard(site, request)
        saw(site, last, request)
    phases = PROTOCOLS[protocol].phases
    replayed = 0
    for site in held.clients:
        told = recording(SiteStore(held.folder / site).private)
        drawn = {item.phase: item.data for item in told.drawn}
        [encoded] = told.encoded
        held.folder = tmp_path / "twins"
        state = held.client(site)._enter(asked[site, phases[0]]).protocol_state
        held.folder = tmp_path / "sites"
        for phase in phases:
            if (site, phase) not in said:
                continue
            slots = np.frombuffer(encoded.slots, "<u8")
            given = iter([slots.copy()]) if phase == UPLOAD else None
            source = again(drawn[phase])
            body = asked[site, phase].body
            state, reply = PROTOCOLS[protocol].step(phase, state, body, given, source)
            if phase == UPLOAD and "bfv" in protocol:  # SEAL draws by itself
                assert len(reply) == len(said[site, phase])
            else:
                assert reply == said[site, phase], (site, phase)
            replayed += 1
    assert replayed == len(said) >= 2 * len(phases)


@pytest.mark.parametrize("protocol", ["secagg", "masked-bfv"])
def test_what_sites_contributed_adds_up_to_what_was_opened(small, tmp_path, protocol):
    experiment = small(
        f"protocol.name={protocol}", "rounds=2", f"transcript.own={EVERYONE}",
        f"transcript.consent={EVERYONE}",
    )  # fmt: skip
    case = Case.open(run(experiment, tmp_path / "run", report=False).directory)
    from securefl import agreement

    rounds = {item.number: item for item in case.server().rounds()}
    assert len(rounds) == 2
    views = {site: case.opened(site) for site in case.sites}
    for number, seen in rounds.items():
        slots = [
            next(item.slots.numpy() for item in view.contributed[site] if item.number == number)
            for site, view in views.items()
        ]
        encoding = agreement.encoding(experiment, 3, None)
        total = np.sum(slots, axis=0, dtype=np.uint64) % (1 << encoding.slot_bits)
        decoded = encoding.decode(total, len(seen.aggregate.mean), seen.aggregate.contributors)
        assert np.array_equal(decoded.mean, seen.aggregate.mean)
    model = GlobalState.from_message(views["site-1"].models[1], 62)
    assert np.array_equal(model.weights, rounds[max(rounds)].state.weights)


def test_only_the_sites_that_are_named_record_themselves_and_only_for_their_owner(small, tmp_path):
    experiment = small("rounds=1", "protocol.name=secagg", "transcript.own=['site-2']")
    folder = run(experiment, tmp_path / "run", report=False).directory
    assert not own(folder, "site-1").exists()
    kept = own(folder, "site-2")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o600}
    told = recording(kept)
    assert [item.phase for item in told.drawn] == list(PROTOCOLS["secagg"].phases)
    assert "secret" in repr(told.drawn[0])
    assert "secret" in repr(told.encoded[0])
    case = Case.open(folder)
    with pytest.raises(UnavailableError, match="site-1 did not record itself"):
        case.opened("site-1")
    with pytest.raises(UnavailableError, match="no transcript was recorded"):
        case.colluding(["site-2"], with_server=False)


def test_colluding_sites_pool_their_own_and_with_the_server_all(small, tmp_path):
    experiment = small(
        "rounds=1", "protocol.name=secagg", "transcript.own=['site-1']",
        "transcript.consent=['site-1', 'site-2']",
    )  # fmt: skip
    case = Case.open(run(experiment, tmp_path / "run", report=False).directory)
    alone = case.colluding(["site-1"], with_server=False)
    assert {item.site for item in alone.crossings} == {"site-1"}
    assert [held.site for held in alone.recordings] == ["site-1"]
    together = case.colluding(["site-1"], with_server=True)
    assert {item.site for item in together.crossings} == {"site-1", "site-2"}


def test_a_recording_that_was_changed_or_cut_is_not_believed(tmp_path):
    recorder = Recorder(tmp_path, None)
    recorder.drew(1, "share", b"secret")
    recorder.contributed(1, 0, [np.arange(3, dtype=np.uint64)], b"model")
    recorder.drew(2, "share", b"")
    told = recording(tmp_path)
    assert [item.data for item in told.drawn] == [b"secret", b""]
    assert told.encoded[0].model == b"model"
    index = tmp_path / "recording.jsonl"
    index.write_text(index.read_text() + '{"torn')
    Recorder(tmp_path, None).drew(3, "share", b"more")
    assert [item.number for item in recording(tmp_path).drawn] == [1, 2, 3]
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    data = tmp_path / "recording.bin"
    data.write_bytes(data.read_bytes().replace(b"secret", b"SECRET"))
    with pytest.raises(ConfigurationError, match="not what was recorded"):
        recording(tmp_path)


def test_what_is_drawn_is_what_was_given():
    drawing = Drawing(bytes)
    assert drawing(3) + drawing(2) == drawing.data == bytes(5)


# --- until when


def test_after_its_day_a_transcript_is_read_no_more(small, tmp_path):
    experiment = small(
        "rounds=1", f"transcript.consent={EVERYONE}", "transcript.own=['site-1']",
        "transcript.keep_until=2999-12-31",
    )  # fmt: skip
    folder = run(experiment, tmp_path / "run", report=False).directory
    for read, place in ((crossings, folder / "transcript"), (recording, own(folder))):
        assert read(place, date(2999, 12, 31))
        with pytest.raises(ConfigurationError, match=r"until 2999-12-31.*delete") as caught:
            read(place, date(3000, 1, 1))
        assert "\n" not in str(caught.value)
        keep(place, date(2026, 1, 1))
        keep(place, date(2999, 1, 1))  # a day that was named is not put off
        with pytest.raises(ConfigurationError, match="until 2026-01-01"):
            read(place, date(2026, 1, 2))


def test_a_run_after_the_day_of_its_transcript_is_refused(small, tmp_path):
    experiment = small(f"transcript.consent={EVERYONE}", "transcript.keep_until=2020-01-01")
    with pytest.raises(ConfigurationError, match=r"keep_until = 2020-01-01 is over"):
        run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sites_with_policies_are_asked_for_no_transcript_without_a_day(small, tmp_path):
    with pytest.raises(ConfigurationError, match=r"say until when, keep_until = YYYY-MM-DD"):
        run(small(f"transcript.consent={EVERYONE}"), tmp_path / "run", sites=tmp_path / "sites")


def test_deleting_takes_all_that_was_kept_and_nothing_else(small, tmp_path):
    experiment = small(
        "rounds=1", f"transcript.consent={EVERYONE}", "transcript.own=['site-1', 'site-2']",
        "audit.canaries=4", "transcript.keep_until=2999-12-31",
    )  # fmt: skip
    folder = run(experiment, tmp_path / "run", report=False).directory
    before = {path for path in folder.rglob("*") if path.is_file()}
    kept = {path for path in before if path.parent == folder / "transcript"}
    kept |= {p for i in (1, 2) for p in own(folder, f"site-{i}").iterdir()}
    kept = {path for path in kept if path.name != "canaries.json"}
    done = CliRunner().invoke(app, ["transcript", "delete", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"{len(kept)} files deleted" in done.output
    assert {path for path in folder.rglob("*") if path.is_file()} == before - kept
    assert not (folder / "transcript").exists()
    assert delete(folder) == ()
    assert Case.open(folder).coins("site-1").shape == (4,)


def test_a_folder_that_is_of_no_run_and_no_site_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["transcript", "delete", str(tmp_path)])
    assert done.exit_code == 2
    assert "neither a run's directory nor a site's folder" in done.stderr


def test_a_site_deletes_what_it_recorded_in_its_own_folder(tmp_path):
    (tmp_path / "site.toml").write_text("a site's")
    held = site_folder.private(tmp_path, "ab" * 16, "north")
    held.mkdir(parents=True)
    Recorder(held, None).drew(1, "share", b"secret")
    assert delete(tmp_path) == (held / "recording.bin", held / "recording.jsonl")
    assert not list(held.iterdir())


@pytest.mark.parametrize("key", ["own", "consent"])
def test_a_site_that_is_none_cannot_be_recorded(small, tmp_path, key):
    with pytest.raises(ConfigurationError, match=rf"transcript\.{key} names 'site-9'"):
        run(small(f"transcript.{key}=['site-9']"), tmp_path / "run")
