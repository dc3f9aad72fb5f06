"""`securefl doctor`: a kit's checks as a table, with what to do about each fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl.terminal import Format, print_json

# torch and rich are imported where they are used, as in securefl.cli.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from securefl.deployment.doctor import Finding


def doctor(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="A participant's folder.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The site's records, if site.toml does not say."),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to write the result.")
    ] = Format.text,
) -> None:
    """Whether a kit can be used on this machine; exit 1 if not, and what to do about it."""
    from securefl.deployment.certificates import now_utc
    from securefl.deployment.doctor import Verdict, examine

    findings = tuple(examine(kit, now=now_utc(), environment=os.environ, data=data))
    faults = sum(finding.verdict is Verdict.fault for finding in findings)
    if output is Format.json:
        print_json({"kit": str(kit), "faults": faults, "checks": findings})
    else:
        from rich.console import Console

        Console(highlight=False).print(_table(kit, findings))
        if faults:
            what = "1 fault: it has" if faults == 1 else f"{faults} faults: they have"
            typer.echo(f"{what} to be mended before this kit can be used.")
        else:
            typer.echo("This kit can be used.")
    if faults:
        raise typer.Exit(1)


def _table(kit: Path, findings: Sequence[Finding]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from securefl.deployment.doctor import Verdict

    styles = {Verdict.ok: "green", Verdict.warning: "bold yellow", Verdict.fault: "bold red"}
    table = Table(title=f"The kit {kit}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    for finding in findings:
        told = Text(finding.found)
        if finding.mend:
            told.append(f"\ndo this: {finding.mend}", style="bold")
        table.add_row(finding.about, Text(finding.verdict, style=styles[finding.verdict]), told)
    return table
