"""`securefl transcript`: what was kept of a run for later study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from securefl.config import ConfigurationError
from securefl.terminal import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="What was kept of a run for later study."
)


@app.callback()
def _transcript() -> None:
    """What was kept of a run for later study."""


@app.command()
def delete(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run directory, or a site's own folder of a run."),
    ],
) -> None:
    """Delete the messages that were kept, and what sites there recorded of themselves.

    The model, the report and the coins of canaries stay.
    """
    from securefl import transcript

    if not run.is_dir():
        raise ConfigurationError(f"{run} is no folder: give the one of a run")
    deleted = transcript.delete(run)
    size = f"{len(deleted):,} file{'s' * (len(deleted) != 1)}"
    for folder in sorted({path.parent for path in deleted}):
        count = sum(path.parent == folder for path in deleted)
        typer.echo(f"{folder}: {count:,} deleted")
    typer.echo(f"{size} deleted" if deleted else f"{run} holds no transcript and no recording")
