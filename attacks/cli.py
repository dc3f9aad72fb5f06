"""`securefl audit` and `securefl attack`, joined to the command through its entry points."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl.config import ConfigurationError
from securefl.terminal import Format, print_json, say

# torch and rich are imported where they are used: `securefl --help` is quick.
if TYPE_CHECKING:
    from rich.table import Table

    from attacks.attack import AttackResult, Profile
    from attacks.audit import Audit, Row, Told

LATEST = Path("runs", "latest")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Profiled = Annotated[
    str, typer.Option("--profile", metavar="quick|full", help="How much work to put in.")
]
Own = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="FOLDER",
        help="The folder of the site that audits a deployment, with its own records.",
    ),
]
Seeded = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=2**32 - 1,
        help="Repeat an audit: what its audit.json says. [default: new]",
    ),
]
Written = Annotated[Format, typer.Option("--format", help="How to write the result.")]


def join(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("audit")(audit)
    app.command("attack")(attack)


def audit(
    run: Run = LATEST,
    profile: Profiled = "quick",
    own: Own = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--attack", metavar="NAME", help="Only this attack; say it again for more."),
    ] = None,
    seed: Seeded = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = min(2, os.cpu_count() or 1),
    limit: Annotated[
        int, typer.Option(metavar="MINUTES", min=1, max=10_000, help="For each attack, at most.")
    ] = 60,
    output: Written = Format.text,
) -> None:
    """Replay what each adversary saw in a run, attack it, and write audit.json and audit.html."""
    from attacks import report
    from attacks.audit import AUDIT, Audit
    from attacks.audit import audit as assess_all
    from attacks.case import Case
    from securefl import store

    case = Case.open(_resolved(run), _profile(profile), own)
    signed = case.folder / "audit.signatures.jsonl"
    if signed.exists():
        raise ConfigurationError(
            f"{signed} is under an audit that a new one would replace: move audit.json, audit.html "
            "and the signatures elsewhere first"
        )
    names = list(dict.fromkeys(only)) if only else None
    if names and (case.folder / AUDIT).exists() and not Audit.load(case.folder).left_out:
        raise ConfigurationError(
            f"{case.folder / AUDIT} has every attack, and one with some would replace it: move it "
            f"elsewhere first, or try one alone, `securefl attack {names[0]} {run}`"
        )
    with store.exclusive(case.folder):  # else one audit's page may stand beside another's figures
        with _bars() as told:
            found = assess_all(case, names, seed=seed, workers=workers, limit=60 * limit, told=told)
        (case.folder / report.PAGE).unlink(missing_ok=True)
        store.write(case.folder / AUDIT, found.to_bytes())
        page = report.write(case.folder, found)
    if output is Format.json:
        print_json(found)
    else:
        _print(found)
        typer.echo(f"{page}")
    _exit(found)


def attack(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which; without one, all are listed.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run directory. [default: its controls alone]"),
    ] = None,
    profile: Profiled = "quick",
    own: Own = None,
    seed: Seeded = None,
    output: Written = Format.text,
) -> None:
    """Try one attack: on a run, or in its own two worlds where the answer is known."""
    from attacks import attack as attacks

    if name is None:
        _list(output)
        return
    known = attacks.find(name)
    chosen = _profile(profile)
    drawn = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    if run is None:
        with _bars() as told:
            worlds = [known.undefended(drawn, chosen), known.no_signal(drawn, chosen)]
            guesses = attacks.guess(known, worlds, drawn, lambda x: told(name, x, "running"))
        scores = [
            known.score(guessed, world.truth, drawn)
            for guessed, world in zip(guesses, worlds, strict=True)
        ]
        undefended, no_signal = scores
        if output is Format.json:
            worlds_told = {"undefended": undefended, "no_signal": no_signal}
            print_json({"attack": name, "seed": drawn, **worlds_told})
        else:
            from rich.console import Console

            for title, score in (
                ("where nothing is defended it must succeed, and it", undefended),
                ("where there is nothing to find it must not, and it", no_signal),
            ):
                outcome = "succeeds" if score.succeeded else "finds nothing"
                Console().print(_results_table(f"{name}: {title} {outcome}", score.results))
            typer.echo(f"--seed {drawn} repeats this")
        if not undefended.succeeded or no_signal.succeeded:
            say(f"{name}: a control went the wrong way; of a run it would have no conclusion")
            raise typer.Exit(1)
        return
    from attacks.audit import assess, judged
    from attacks.case import Case

    case = Case.open(_resolved(run), chosen, own)
    with _bars() as told:
        (row,) = judged([assess(known, case, drawn, lambda x: told(name, x, "running"))])
    if output is Format.json:
        print_json(row)
        return
    from rich.console import Console

    console = Console(highlight=False)
    if row.results:
        console.print(_results_table(f"{row.title} ({row.adversary})", row.results))
    console.print(f"{row.verdict}{': ' + row.reason if row.reason else ''}", markup=False)
    for line in (row.limit, *row.notes, f"--seed {drawn} repeats this"):
        if line:
            console.print(line, style="dim", markup=False)
    if row.verdict in ("no conclusion", "contradicted"):
        raise typer.Exit(1)


def _list(output: Format) -> None:
    from attacks.attack import installed

    found = installed()
    if output is Format.json:
        print_json([{"name": a.name, "title": a.title, "source": a.source} for a in found.values()])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("attack", "what it tries", "source", box=None, header_style="dim")
    for item in found.values():
        table.add_row(item.name, item.title, item.source)
    Console().print(table)


def _resolved(run: Path) -> Path:
    return run.resolve() if run.is_symlink() else run


def _profile(name: str) -> Profile:
    from attacks import attack as attacks

    try:
        return attacks.Profile(name)
    except ValueError:
        raise ConfigurationError(f'--profile {name}: say "quick" or "full"') from None


@contextmanager
def _bars() -> Iterator[Told]:
    """Progress of attacks as rich bars on a terminal, and nothing anywhere else."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    bars = progress.Progress(
        progress.TextColumn("{task.description:<20}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[state]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, progress.TaskID] = {}

    def told(name: str, fraction: float, state: str) -> None:
        if name not in tasks:  # it pulses until there is a fraction
            tasks[name] = bars.add_task(name, total=None, state=state)
        total = 1.0 if fraction else None
        bars.update(tasks[name], completed=fraction, total=total, state=state)

    with bars:
        yield told


def _print(found: Audit) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("attack", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what it found (by chance; n)")
    for row in found.rows:
        told = row.reason
        if row.results:
            figure, interval, baseline, n = _cells(row.results[0])
            told = f"{figure}{f', {interval}' if interval else ''} ({baseline}; {n})"
        style = {"contradicted": "bold red", "not assessed": "dim"}.get(row.verdict, "")
        table.add_row(row.attack, row.verdict, escape(told), style=style)
    console = Console(highlight=False)
    console.print(table)


def _cells(result: AttackResult) -> tuple[str, str, str, str]:
    interval = result.interval
    told = f"{interval.low:.3g} to {interval.high:.3g}" if interval is not None else ""
    return (
        f"{result.metric} {result.value:.3g}",
        told,
        f"{result.baseline:.3g}",
        f"{result.n:,}",
    )


def _results_table(title: str, results: tuple[AttackResult, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for name in ("figure", "interval", "baseline", "n"):
        table.add_column(name)
    for result in results:
        table.add_row(*_cells(result))
    return table


def _exit(found: Audit) -> None:
    """Exit status 1 where a claim is contradicted, or an attack came to no conclusion."""
    for name in found.alarms:
        row: Row = next(row for row in found.rows if row.attack == name)
        say(f"a claim does not hold: {row.claim} ({name}: p = {row.p:.2g})")
    unsure = [row.attack for row in found.rows if row.verdict == "no conclusion"]
    if unsure:
        say(f"no conclusion of {', '.join(unsure)}: the page says why; another --seed may help")
    if found.alarms or unsure:
        raise typer.Exit(1)
