"""`securefl data`: draft the schema of a file, and check a file before a model trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl.sections import ConfigurationError
from securefl.terminal import Format, OneLineErrors, print_json

# pandas and rich are imported where they are used, as in securefl.cli.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from securefl.data.checking import Findings, Severity, Summary
    from securefl.schema import Schema

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="What a site's file holds, and whether it may."
)
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A table, or a folder of images by class.")
]

STAYS = "Nothing was written and nothing left this machine."


@app.callback()
def _data() -> None:
    """What a site's file holds, and whether it may."""


@app.command()
def schema(
    file: File,
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header", help="Whether the first row names the columns.  [default: look]"
        ),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="The columns, where no row names them.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="What a model shall learn.  [default: the last]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="S.toml", help="Write it here, and not to the terminal.")
    ] = None,
) -> None:
    """Draft a schema from FILE, for a person to correct and all sites to agree on."""
    from securefl.data.drafting import draft

    if output is not None and output.exists():
        raise ConfigurationError(f"{output} exists: name another file, or move it away")
    given = [] if names is None else [name.strip() for name in names.split(",")]
    found = draft(file, header=header, label=label, names=given)
    if output is None:
        typer.echo(found.text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as opened:
            opened.write(found.text)
    except OSError as error:
        raise ConfigurationError(f"cannot write {output}: {error.strerror}") from None
    typer.echo(f"{output}: a draft of {len(found.schema.columns)} columns; correct it by hand")


@app.command()
def check(
    file: File,
    agreed: Annotated[
        Path, typer.Option("--schema", metavar="S.toml", help="The schema the sites agreed on.")
    ],
    output: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.text,
) -> None:
    """What is wrong, odd or worth knowing in FILE; exit 2 where something is wrong.

    The figures are for this site's own people: they go to the terminal, and nowhere else.
    """
    from securefl import schema as schemas
    from securefl.data.checking import check as checked

    wanted = schemas.load(agreed)
    found = checked(file, wanted)
    if output is Format.json:
        print_json(found)
    else:
        _print(found, wanted)
    if found.of("error"):
        raise typer.Exit(2)


def _print(found: Findings, schema: Schema) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    people = "" if found.people is None else f" of {found.people:,} people"
    console.print(
        f"{found.file}: {found.rows:,} rows{people}", markup=False, style="bold", soft_wrap=True
    )
    numbers = [column for column in found.columns if column.numbers is not None]
    categories = [column for column in found.columns if column.categories is not None]
    others = [c for c in found.columns if c.numbers is None and c.categories is None]
    if numbers:
        console.print(_numbers_table(numbers))
    if categories:
        console.print(_categories_table(categories, schema.label))
    for column in others:
        lost = f", {column.missing:,} missing" if column.missing else ""
        console.print(f"{column.name}: {column.type}{lost}", markup=False)
    if others:
        console.print()
    for severity in ("error", "warning", "note"):
        _print_findings(console, found, severity)
    if not found.findings:
        console.print("Nothing odd was found.")
    console.print(f"Schema {schema.name}: every site's copy must have this SHA-256:")
    console.print(schema.digest().hex())
    console.print(STAYS)


def _numbers_table(columns: Sequence[Summary]) -> Table:
    table = _table("missing", "least", "quarter", "median", "quarter", "most", "mean", "dev.")
    for column in columns:
        if (told := column.numbers) is None:
            continue
        figures = (told.least, *told.quartiles, told.most, told.mean, told.deviation)
        table.add_row(_plain(column.name), _missing(column), *map(_figure, figures))
    return table


def _categories_table(columns: Sequence[Summary], label: str) -> Table:
    from rich.text import Text

    table = _table("missing")
    table.add_column("rows of each category", overflow="fold")
    for column in columns:
        held = column.categories or {}
        known = sum(held.values()) or 1
        shown = sorted(held.items(), key=lambda item: -item[1]) if len(held) > 12 else held.items()
        parts = [
            f"{name} {count:,}"
            + (f" ({100 * count / known:.0f} %)" if column.name == label else "")
            for name, count in list(shown)[:12]
        ]
        if len(held) > 12:
            parts.append(f"and {len(held) - 12} more")
        style = "bold" if column.name == label else ""
        table.add_row(_plain(column.name), _missing(column), Text(", ".join(parts), style=style))
    return table


def _table(*figures: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("column", max_width=18, overflow="ellipsis", no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def _missing(column: Summary) -> str:
    share = column.missing_share
    return "–" if not column.missing else "<1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _figure(value: float) -> str:
    """At most seven characters."""
    size = abs(value)
    if size and not 1e-3 <= size < 99_999.5:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:.0f}" if size >= 999.5 else f"{value:.3g}"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def _print_findings(console: Console, found: Findings, severity: Severity) -> None:
    from rich.table import Table
    from rich.text import Text

    told = found.of(severity)
    if not told:
        return
    plural = "" if len(told) == 1 else "s"
    console.print(f"{len(told)} {severity}{plural}", style=_STYLES[severity])
    table = Table.grid(padding=(0, 1, 0, 2))
    table.add_column(max_width=18, overflow="ellipsis", no_wrap=True)
    table.add_column(overflow="fold")
    for one in told:
        table.add_row(Text(one.column or "", style="bold"), Text(one.text))
    console.print(table)
    console.print()
