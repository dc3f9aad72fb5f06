"""`securefl ledger`: what a site's data sets have spent, and whether its book is whole."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from securefl.config import ConfigurationError
from securefl.terminal import OneLineErrors

if TYPE_CHECKING:
    from securefl.privacy.ledger import Entry, Ledger, Standing

LEDGER = "ledger.sqlite"

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="What data sets have spent of their budgets."
)
Place = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="A ledger file, or the folder of a site.")
]


class Format(StrEnum):
    """How to write it."""

    text = "text"
    json = "json"
    csv = "csv"


class KeptHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signed head as a file, in hexadecimal: what `heads` writes and `verify --head` reads."""

    site: str
    entries: int
    hash: str
    signature: str


@app.callback()
def _ledger() -> None:
    """What data sets have spent of their budgets."""


@app.command()
def show(
    ledger: Place,
    form: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.text,
    page: Annotated[
        Path | None, typer.Option(help="Write a page to print and sign, as HTML, here.")
    ] = None,
) -> None:
    """Each data set: its purpose, its runs, the epsilon so far and what remains."""
    with _opened(ledger) as book:
        held = [book.standing(dataset) for dataset in book.datasets]
        if page is not None:
            from securefl.report import write_ledger_page

            write_ledger_page(book, _named(ledger), page)
    if form is Format.json:
        typer.echo(msgspec.json.format(msgspec.json.encode(held)).decode())
    elif form is Format.csv:
        _write_csv([_flat(item) for item in held])
    else:
        _print(held)


@app.command()
def export(
    ledger: Place,
    form: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.json,
) -> None:
    """Every entry with its hash, oldest first: JSON, a line each, or CSV."""
    with _opened(ledger) as book:
        lines = [
            {"number": i, **_fields(entry), "hash": hashed.hex()}
            for i, (entry, hashed) in enumerate(book.hashed_entries(), start=1)
        ]
    if form is Format.csv:
        _write_csv(lines)
        return
    for line in lines:
        typer.echo(msgspec.json.encode(line).decode())


@app.command()
def heads(ledger: Place) -> None:
    """The signed heads of other sites' ledgers that this site keeps, one JSON line each."""
    with _opened(ledger) as book:
        kept = book.kept()
    for site, told in kept.items():
        for head in told:
            line = KeptHead(site, head.entries, head.hash.hex(), head.signature.hex())
            typer.echo(msgspec.json.encode(line).decode())


@app.command()
def accept(
    ledger: Place,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The data set in question.")],
    overlaps: Annotated[list[str], typer.Option(help="A data set it may share records with.")],
    reason: Annotated[str, typer.Option(help="Why, in one line.")],
    by: Annotated[str, typer.Option(help="Who decides: a person's name.")],
) -> None:
    """Decide that a data set may hold records of another: each then has its own budget for them."""
    with _opened(ledger) as book:
        book.accept(dataset, overlaps, reason=reason, by=by)
    typer.echo(f"{dataset} may share records with {', '.join(overlaps)}")


@app.command()
def verify(
    ledger: Place,
    head: Annotated[
        Path | None,
        typer.Option(help="A file of heads that another site kept (`securefl ledger heads`)."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The public key of this ledger's site, in hexadecimal.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Whose heads to compare with, where the file has several.")
    ] = None,
) -> None:
    """Check the chain of a ledger, and that it contains what its site once signed."""
    from securefl.privacy.ledger import Head

    with _opened(ledger) as book:  # which checks the chain
        checked = _read_heads(head, site) if head is not None else []
        for kept in checked:
            told = Head(kept.entries, _bytes(kept.hash, 32))
            if key is not None:
                _check_signature(kept, told, key)
            book.verify(told)
        length = book.head.entries
    signed = "" if key is None else ", signed by its key"
    also = f", and the {len(checked)} heads kept elsewhere are in it{signed}" if checked else ""
    typer.echo(f"{ledger}: {length} entries; the chain is whole{also}")


@contextmanager
def _opened(place: Path) -> Iterator[Ledger]:
    from securefl.privacy.ledger import Ledger

    path = place / LEDGER if place.is_dir() else place
    if place.is_dir() and (place / "site.toml").is_file() and not path.exists():
        raise ConfigurationError(
            f"{place} has no ledger yet: nothing was spent; the site's first run makes it"
        )
    if not path.is_file():
        raise ConfigurationError(f"{path}: no ledger: name a ledger file, or the folder of a site")
    with Ledger(path) as book:
        yield book


def _named(place: Path) -> str:
    whole = place.resolve()
    return whole.name if place.is_dir() else whole.parent.name


def _fields(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(entry))
    told.pop("curve", None)  # hundreds of numbers; the hash covers them
    for release in told.get("releases", ()):
        release.pop("curve")
    return told


def _flat(item: Standing) -> dict[str, Any]:
    return {
        "dataset": item.dataset,
        "purpose": item.purpose,
        "unit": item.unit,
        "epsilon": item.epsilon,
        "delta": item.delta,
        "spent": item.spent,
        "left": item.left,
        "runs": len(item.runs),
        "rounds": sum(run.charged + sum(run.released.values()) for run in item.runs),
    }


def _write_csv(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sys.stdout.write(out.getvalue())


def _print(held: list[Standing]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress_bar import ProgressBar

    from securefl.report import words

    console = Console(highlight=False)
    if not held:
        console.print("no data set is registered")
    for item in held:
        console.print(f"[bold]{escape(item.dataset)}[/bold]  {escape(item.purpose)}")
        console.print(ProgressBar(item.epsilon, min(item.spent, item.epsilon), width=40), end="")
        console.print(
            f"  epsilon {words.rounded_up(item.spent)} of {item.epsilon:g} at delta "
            f"{item.delta:g}, one {item.unit}"
        )
        for run in item.runs:
            console.print(
                f"  {run.opened[:10]}  {escape(run.experiment)}: {words.run_charges(run)}"
            )
        for sentence in words.ledger_sentences(item):
            console.print(sentence)
        console.print()


def _read_heads(path: Path, site: str | None) -> list[KeptHead]:
    try:
        lines = path.read_bytes().splitlines()
        found = [msgspec.json.decode(line, type=KeptHead) for line in lines if line.strip()]
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"{path} holds no heads: {error}") from None
    found = [kept for kept in found if site in (None, kept.site)]
    if not found:
        raise ConfigurationError(f"{path} holds no head of {site or 'any site'}")
    if len({kept.site for kept in found}) > 1:
        raise ConfigurationError(f"{path} holds heads of several sites: choose one with --site")
    return found


def _check_signature(kept: KeptHead, head: Any, key: str) -> None:
    from protocols.errors import ProtocolError
    from protocols.identity import Roster
    from securefl.store import CorruptStoreError

    roster = Roster({kept.site: _bytes(key, 32)})
    try:
        roster.verify(kept.site, _bytes(kept.signature, 64), head.statement())
    except ProtocolError as error:
        raise CorruptStoreError(f"head {kept.entries} of {kept.site}: {error}") from None


def _bytes(text: str, size: int) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != size:
        raise ConfigurationError(f"{text[:80]!r} is not {size} bytes in hexadecimal")
    return found
