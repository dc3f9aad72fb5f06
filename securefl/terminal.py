"""What every command of `securefl` has in common: one-line errors, and how results are written."""

from __future__ import annotations

import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from typer.core import TyperGroup

from securefl.config import ConfigurationError


class Format(StrEnum):
    """How a command writes its result."""

    text = "text"
    json = "json"


LATEST: Final = Path("runs", "latest")
OutputFormat = Annotated[Format, typer.Option("--format", help="How to write the result.")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


class OneLineErrors(TyperGroup):
    """Turns every error into one line and an exit status, for joined commands too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except (typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own: usage errors and typer.Exit
                raise
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            say(told(error))
            raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from None


class FirstByDefault(OneLineErrors):
    """A group whose first command is meant where the first argument names none of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


def told(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif type(error).__module__.partition(".")[0] in ("securefl", "protocols", "attacks"):
        line = str(error)  # our own errors say what to mend
        if culprits := getattr(error, "culprits", ()):
            line += f" (at fault: {', '.join(culprits)})"
    else:
        line = f"unexpected {type(error).__name__}: {error}; `securefl --debug ...` shows where"
    return " ".join("; ".join([line, *getattr(error, "__notes__", ())]).split())


def say(line: str) -> None:
    """Write one line of ours to stderr."""
    typer.echo(f"securefl: {line}", err=True)


def print_json(value: object) -> None:
    """Write `value` as indented JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
