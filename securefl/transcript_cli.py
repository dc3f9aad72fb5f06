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
        Path, typer.Argument(metavar="RUN", help="A run directory, or a site's own folder.")
    ],
) -> None:
    """Delete the messages that were kept, and what sites there recorded of themselves.

    In a site's own folder, of all its runs. The model, the report and the coins of canaries stay.
    """
    from securefl import transcript
    from securefl.records import EXPERIMENT, SITES
    from securefl.site_folder import SITE, private
    from securefl.store import ServerStore

    others: list[Path] = []
    if (run / SITES).exists():  # sites that keep their secrets in folders of their own
        name = ServerStore(run).name
        folders = Path((run / SITES).read_text(encoding="utf-8"))
        others = [private(path, name, path.name) for path in folders.glob("*")]
    deleted = transcript.delete(run, others) if run.is_dir() else ()
    if not deleted and not any((run / name).exists() for name in (EXPERIMENT, SITE, "own")):
        raise ConfigurationError(f"{run} is neither a run's directory nor a site's folder")
    for folder in sorted({path.parent for path in deleted}):
        count = sum(path.parent == folder for path in deleted)
        typer.echo(f"{folder}: {count:,} deleted")
    size = f"{len(deleted):,} file{'s' * (len(deleted) != 1)}"
    typer.echo(f"{size} deleted" if deleted else f"{run} holds no transcript and no recording")
