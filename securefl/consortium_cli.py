"""`securefl consortium`: who belongs to a consortium, and the kits that make them part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl.config import ConfigurationError
from securefl.terminal import Format, OneLineErrors, print_json

# rich, and what reads certificates, are imported where they are used, as in securefl.cli.
if TYPE_CHECKING:
    from rich.table import Table

    from securefl.deployment.authority import Consortium

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Set a consortium up, and keep it.")
Folder = Annotated[
    Path, typer.Argument(metavar="CONSORTIUM", help="The folder that `consortium new` made.")
]
Days = Annotated[
    int | None, typer.Option(metavar="N", help="Days that the certificates hold.  [default: 360]")
]
OutputFormat = Annotated[Format, typer.Option("--format", help="How to write the result.")]


@app.callback()
def _consortium() -> None:
    """Set a consortium up, and keep it."""


@app.command()
def new(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="The consortium, and its folder.")],
    server: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="As the sites reach it.  [port: 8002]")
    ],
    sites: Annotated[
        str, typer.Option(metavar="a,b,c", help="The sites whose keys are made here.")
    ] = "",
    bind: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS[:PORT]", help="What the server listens at, if not that."),
    ] = None,
    request: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A site that made its own keys: `securefl site enroll`."),
    ] = None,
    days: Days = None,
    output: OutputFormat = Format.text,
) -> None:
    """Make a consortium: its certificates, its roster, and one kit a participant."""
    from securefl.deployment.authority import Consortium
    from securefl.deployment.certificates import DAYS

    names = [part.strip() for part in sites.split(",") if part.strip()]
    if not names and not request:
        raise ConfigurationError("say which sites take part: --sites a,b,c, or --request FILE")
    made = Consortium.new(
        name, server, names, bind=bind, requests=request or (), days=DAYS if days is None else days
    )
    _tell(made, output, f"made {name}: read {name / 'README.md'}, which says who does what next")


@app.command()
def add(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")],
    request: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it made its own keys: `securefl site enroll`."),
    ] = None,
    days: Days = None,
    output: OutputFormat = Format.text,
) -> None:
    """Admit a site. Every kit then has a newer roster, and is handed out again."""
    from securefl.deployment.authority import Consortium
    from securefl.deployment.certificates import DAYS

    consortium = Consortium.load(folder)
    added = consortium.add(site, request, days=DAYS if days is None else days)
    _tell(added, output, f"{site} takes part: hand kits/{site} over, and every other kit again")


@app.command()
def remove(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")],
    output: OutputFormat = Format.text,
) -> None:
    """Take a site out for good. The server refuses it once it has its newer kit."""
    from securefl.deployment.authority import Consortium

    gone = Consortium.load(folder).remove(site)
    _tell(
        gone,
        output,
        f"{site} is removed: install kits/server at the server NOW and start it again, then hand "
        "out the others",
    )


@app.command()
def renew(
    folder: Folder,
    site: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only for these.  [default: all]")
    ] = None,
    days: Days = None,
    output: OutputFormat = Format.text,
) -> None:
    """New certificates for the same keys, wherever those are."""
    from securefl.deployment.authority import Consortium
    from securefl.deployment.certificates import DAYS

    consortium = Consortium.load(folder)
    renewed = consortium.renew(site or (), days=DAYS if days is None else days)
    whose = ", ".join(f"kits/{name}" for name in site) if site else "every kit"
    _tell(renewed, output, f"renewed: hand {whose} over again")


@app.command()
def show(folder: Folder, output: OutputFormat = Format.text) -> None:
    """Who belongs to a consortium, until when, and what is due."""
    from securefl.deployment.authority import Consortium

    _tell(Consortium.load(folder), output, "")


@app.command()
def update(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The kit that is in use.")],
    kit: Annotated[Path, typer.Option(metavar="KIT", help="The newer one.")],
    output: OutputFormat = Format.text,
) -> None:
    """Install a newer kit over the one in use: keys, site.toml and ledger stay as they are."""
    install(kit, folder, output)


def install(kit: Path, folder: Path, output: Format) -> None:
    """Install `kit` over `folder`, and say what a person still has to do."""
    from securefl.deployment import kits
    from securefl.deployment.certificates import now_utc

    installed = kits.install(kit, folder)
    warnings = (*installed.check(now_utc()), *kits.unpinned(installed))
    if output is Format.json:
        print_json(
            {
                "kit": str(folder),
                "name": installed.name,
                "serial": installed.pins.serial,
                "expires": installed.expires,
                "warnings": warnings,
            }
        )
        return
    typer.echo(
        f"{folder} is the kit of {installed.name} in {installed.consortium}: roster "
        f"{installed.pins.serial}, certificate until {installed.expires:%Y-%m-%d}"
    )
    for warning in warnings:
        typer.echo(f"do this: {warning}")


def _tell(consortium: Consortium, output: Format, done: str) -> None:
    from securefl.deployment.certificates import now_utc

    now = now_utc()
    due = consortium.due(now)
    if output is Format.json:
        print_json(
            {
                "consortium": consortium.truth.name,
                "server": f"{consortium.truth.host}:{consortium.truth.port}",
                "bind": consortium.truth.bind,
                "serial": consortium.truth.serial,
                "members": [
                    {
                        "name": name,
                        "role": member.role,
                        "expires": member.expires,
                        "fingerprint": member.fingerprint,
                        "public_key": member.key or None,
                        "removed": member.removed,
                        "kit": str(consortium.kit(name)),
                    }
                    for name, member in consortium.truth.members.items()
                ],
                "due": due,
            }
        )
        return
    from rich.console import Console

    Console(highlight=False).print(_table(consortium))
    for line in due:
        typer.echo(f"due: {line}")
    if done:
        typer.echo(done)


def _table(consortium: Consortium) -> Table:
    from rich.table import Table
    from rich.text import Text

    from securefl.deployment.certificates import now_utc
    from securefl.deployment.kits import WARN

    truth, now = consortium.truth, now_utc()
    table = Table(
        title=f"{truth.name}: server {truth.host}:{truth.port}, roster {truth.serial}",
        title_justify="left",
    )
    table.add_column("who", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("certificate until", no_wrap=True)
    table.add_column("fingerprint of the keys", overflow="fold")
    for name, member in truth.members.items():
        soon = member.expires - now <= WARN
        until = Text(f"{member.expires:%Y-%m-%d}", style="bold red" if soon else "")
        if member.removed:
            until = Text("removed", style="dim")
        style = "dim" if member.removed else ""
        table.add_row(
            Text(name, style=style), Text(member.role, style=style), until, member.fingerprint
        )
    return table
