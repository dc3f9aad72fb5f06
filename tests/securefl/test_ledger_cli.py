"""`securefl ledger`: what was spent, in words and files, and whether the book is whole."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from protocols.identity import SigningKey
from securefl import cli
from securefl.privacy.accounting import PoissonGaussian, Repeated
from securefl.privacy.ledger import Ledger

PURPOSE = "<b>triage</b> & study, [bold]2026[/bold]"


@pytest.fixture
def key() -> SigningKey:
    return SigningKey(os.urandom)


@pytest.fixture
def site(tmp_path: Path, key: SigningKey) -> Path:
    """The folder of a site that was charged twelve rounds; another keeps its heads."""
    folder = tmp_path / "north"
    with Ledger(folder / "ledger.sqlite") as mine, Ledger(tmp_path / "south.sqlite") as other:
        mine.register("rows", unit="record", epsilon=6.0, delta=1e-3, purpose=PURPOSE)
        mine.register("rows", unit="record", epsilon=5.0, delta=1e-3, purpose=PURPOSE, by="Dr. W")
        account = mine.open(
            "rows",
            "5f2a",
            experiment="relapse",
            promise=bytes(32),
            unit="record",
            per_round=Repeated(PoissonGaussian(2.0, 0.1), 1),
            rounds=30,
            epsilon=3.0,
        )
        for number in range(1, 13):
            head = account.charge(number)
            if number % 4 == 0:
                other.keep({"north": head.signed(key)})
        mine.register("later", unit="person", epsilon=1.0, delta=1e-6, purpose="nothing yet")
    return folder


def call(*arguments: object) -> Any:
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(cli.app, ["ledger", *map(str, arguments)])


def test_show_tells_every_data_set_in_words(site):
    shown = call("show", site)
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert "<b>triage</b> & study, [bold]2026[/bold]" in words
    assert "12 of 30 rounds charged" in words
    assert "12 rounds in 1 run" in words
    assert "of 5 at delta 0.001, one record" in words
    assert "Nothing was spent" in words


def test_show_and_export_give_files_that_programs_read(site):
    rows, later = json.loads(call("show", site, "--format", "json").output)
    assert rows["dataset"] == "rows"
    assert 0 < rows["spent"] < rows["epsilon"] == 5.0
    assert rows["runs"][0]["charged"] == 12
    assert later["runs"] == []
    first, _ = csv.DictReader(call("show", site, "--format", "csv").output.splitlines())
    assert (first["rounds"], float(first["spent"])) == ("12", rows["spent"])
    lines = [json.loads(line) for line in call("export", site).output.splitlines()]
    assert [line["number"] for line in lines] == list(range(1, 17))
    assert [line["type"] for line in lines[3:5]] == ["charged", "charged"]
    with Ledger(site / "ledger.sqlite") as book:
        assert lines[-1]["hash"] == book.head.hash.hex()
    table = list(csv.DictReader(call("export", site, "--format", "csv").output.splitlines()))
    assert [row["hash"] for row in table] == [line["hash"] for line in lines]


def test_the_page_to_sign_says_what_show_says_and_escapes_it(site, tmp_path):
    assert call("show", site, "--page", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h1>north</h1>" in page
    assert "&lt;b&gt;triage&lt;/b&gt; &amp; study" in page
    assert "<b>" not in page
    assert "budget of epsilon 5 set by Dr. W" in page
    assert "12 of 30" in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


def test_verify_finds_the_heads_that_another_site_kept(site, tmp_path, key):
    heads = call("heads", tmp_path / "south.sqlite")
    assert len(heads.output.splitlines()) == 3
    (tmp_path / "heads.json").write_text(heads.output)
    options = ("--head", tmp_path / "heads.json", "--key", key.public.hex())
    done = call("verify", site, *options)
    assert done.exit_code == 0, done.output
    assert "16 entries; the chain is whole, and the 3 heads kept elsewhere are in it" in done.output
    wrong = call("verify", site, *options[:-1], SigningKey(os.urandom).public.hex())
    assert wrong.exit_code == 1
    assert "signature of north is not valid" in wrong.output


def test_verify_shows_a_ledger_that_was_set_back_edited_or_replaced(site, tmp_path, key):
    (tmp_path / "heads.json").write_text(call("heads", tmp_path / "south.sqlite").output)
    whole = tmp_path / "whole.sqlite"
    shutil.copy(site / "ledger.sqlite", whole)
    with sqlite3.connect(site / "ledger.sqlite") as book:
        book.execute("DELETE FROM entries WHERE number > 10")
    back = call("verify", site, "--head", tmp_path / "heads.json")
    assert back.exit_code == 1
    assert "entries were taken out, or an older copy was put back" in back.output
    shutil.copy(whole, site / "ledger.sqlite")
    with sqlite3.connect(site / "ledger.sqlite") as book:
        book.execute("UPDATE entries SET body = replace(body, '5.0', '9.0') WHERE number = 2")
    edited = call("verify", site)
    assert edited.exit_code == 1
    assert "entry 2 does not follow" in edited.output
    (site / "ledger.sqlite").unlink()
    with Ledger(site / "ledger.sqlite") as book:
        book.register("rows", unit="record", epsilon=5.0, delta=1e-3, purpose="again")
    replaced = call("verify", site, "--head", tmp_path / "heads.json")
    assert replaced.exit_code == 1


def test_a_person_may_accept_that_records_are_shared(site):
    given = ("--overlaps", "rows", "--reason", "the same patients, told so", "--by", "Dr. W")
    assert call("accept", site, "later", *given).exit_code == 0
    last = json.loads(call("export", site).output.splitlines()[-1])
    assert (last["type"], last["overlaps"], last["by"]) == ("accepted", ["rows"], "Dr. W")
    refused = call("accept", site, "gone", *given)
    assert refused.exit_code == 2
    assert "has no data set 'gone'" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no head of any site"),
        ("nonsense\n", "holds no heads"),
        ('{"site":"a","entries":1,"hash":"zz","signature":""}\n', "is not 32 bytes in hexadecimal"),
        (
            '{"site":"a","entries":1,"hash":"","signature":""}\n'
            '{"site":"b","entries":1,"hash":"","signature":""}\n',
            "holds heads of several sites: choose one with --site",
        ),
    ],
)
def test_a_file_of_heads_that_is_none_is_one_line(site, tmp_path, text, message):
    (tmp_path / "heads.json").write_text(text)
    refused = call("verify", site, "--head", tmp_path / "heads.json")
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())


def test_what_is_no_ledger_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "gone.sqlite"):
        refused = call("show", place)
        assert refused.exit_code == 2
        assert "no ledger: name a ledger file, or the folder of a site" in refused.output
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be taken for one" * 9)
    refused = call("show", tmp_path / "text.sqlite")
    assert refused.exit_code in (1, 2)
    assert len(refused.output.strip().splitlines()) == 1
