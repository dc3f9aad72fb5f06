"""`securefl report`: write what a run recorded, sign what an audit found, and check who signed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl.terminal import (
    LATEST,
    FirstByDefault,
    Format,
    OutputFormat,
    RunDirectory,
    print_json,
)

if TYPE_CHECKING:
    from securefl.signing import Audit, Checked

app = typer.Typer(
    cls=FirstByDefault,
    subcommand_metavar="[RUN] | COMMAND [ARGS]...",
)

Audited = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of an audited run.")]


@app.callback()
def _report() -> None:
    """Write report.html from what a finished run recorded; sign what an audit of it found.

    `securefl report RUN` is `securefl report write RUN`; a directory that is called like a command
    is named with ./ before it.
    """


@app.command()
def write(
    directory: RunDirectory = LATEST,
    output: OutputFormat = Format.text,
) -> None:
    """Write report.html from what a finished run recorded. The default."""
    from securefl.report import write_report

    path = write_report(directory)
    print_json({"report": str(path)}) if output is Format.json else typer.echo(str(path))


@app.command()
def sign(
    directory: Audited,
    folder: Annotated[
        Path, typer.Option("--site", metavar="FOLDER", help="The folder of the site that signs.")
    ],
    signatory: Annotated[
        str, typer.Option("--as", metavar="NAME, ROLE", help="Who signs for the site, in a line.")
    ] = "",
    output: OutputFormat = Format.text,
) -> None:
    """Sign audit.json and audit.html of a run with the site's key, once you read them."""
    from securefl import config, signing
    from securefl.site_folder import SITE, read_key

    audit = signing.Audit.of(directory)
    name = config.load_site(folder / SITE).name
    signature = signing.sign(audit, name, read_key(folder), datetime.now(UTC), signatory)
    if output is Format.text:
        typer.echo(f"verdict    {_verdict(audit)}; {directory / signing.PAGE} says more")
        for file, hashed in ((signing.AUDIT, audit.findings), (signing.PAGE, audit.page)):
            typer.echo(f"{file:<11}{hashed}   SHA-256")
        typer.echo(f"signed by  {_signer(signature.site, signature.signatory)}")
    path = signing.keep(directory, signature)
    if output is Format.json:
        print_json({"signatures": str(path), "alarms": audit.alarms, "signature": signature})
    else:
        typer.echo(f"public key {signature.key}   who verifies needs it from you, not from here")
        typer.echo(f"signature  {path}")


@app.command()
def verify(
    directory: Audited,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--site",
            metavar="FOLDER",
            help="Your site's folder: trust its key, and those that site.toml pins.",
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="SITE=HEX",
            help="Trust this public key, as that site's people gave it to you; may be repeated.",
        ),
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Who signed the audit of a run, and whether it is unchanged (exit 1 where that is unsure)."""
    from securefl import signing

    found = signing.verify(directory, signing.trusted_keys(folder, keys or ()))
    if output is Format.json:
        print_json(
            {"signatures": str(found.path), "lines": found.checked, "fault": found.fault or None}
        )
    else:
        for one in found.checked:
            _print(one)
    found.require()
    if output is Format.text:
        names = {one.signature.site for one in found.checked if one.signature and one.trusted}
        typer.echo(f"{directory}: the audit is unchanged, and signed by {', '.join(sorted(names))}")


def _verdict(audit: Audit) -> str:
    if audit.alarms is None:
        return "audit.json does not say how many alarms there were"
    said = {0: "no alarm", 1: "1 ALARM"}.get(audit.alarms, f"{audit.alarms} ALARMS")
    if audit.broken:
        said += f"; {audit.broken} SUCCEEDED where nothing is claimed"
    return said + (f"; PARTIAL, {audit.left_out} left out" if audit.left_out else "")


def _signer(site: str, signatory: str) -> str:
    return f"{site}, as {signatory}" if signatory else site


def _print(one: Checked) -> None:
    if one.signature is None:
        typer.echo(f"line {one.line} {one.fault}")
        return
    said = one.signature
    valid = "valid, by a pinned key" if one.trusted else "valid, by a key that is NOT PINNED"
    typer.echo(f"line {one.line}   {_signer(said.site, said.signatory)}")
    typer.echo(f"  at     {said.at[:19].replace('T', ' ')} (UTC, the signer's clock)")
    typer.echo(f"  key    {said.key}")
    typer.echo(f"  {one.fault or valid}")
