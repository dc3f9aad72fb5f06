"""The `securefl` command.

Other packages add commands through the entry-point group `securefl.commands`: an entry is a
`typer.Typer`, mounted under the entry's name, or a callable that is given the app.

Exit status: 0 done; 1 the run failed; 2 the user's mistake; 130 interrupted. An error is one
line on stderr that says what is wrong and how to mend it; `--debug` adds the traceback. Typer's
own tracebacks stay off: they print local variables, and those hold keys and records.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, TextIO

import typer

from securefl import (
    config,
    consortium_cli,
    data_cli,
    deployment_cli,
    doctor_cli,
    ledger_cli,
    report_cli,
    site_cli,
    transcript_cli,
)
from securefl.config import ConfigurationError
from securefl.terminal import (
    LATEST,
    Format,
    OneLineErrors,
    OutputFormat,
    RunDirectory,
    print_json,
    say,
    told,
)

# torch, matplotlib and rich are imported where they are used: `securefl --help` is quick.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from securefl.prediction import Model
    from securefl.privacy.preview import Preview
    from securefl.records import History, RoundRecord, Summary
    from securefl.runs import Progress, Run

GROUP = "securefl.commands"


app = typer.Typer(
    name="securefl",
    cls=OneLineErrors,
    help="Privacy-hardened secure aggregation for federated learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Lay a value over the experiment, e.g. rounds=5."
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(help="Run directory to make.  [default: runs/NAME-DATE-TIME]"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"securefl {importlib.metadata.version('securefl')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("securefl (run from a source tree that is not installed)")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Privacy-hardened secure aggregation for federated learning."""


@app.command()
def demo(
    settings: Settings = None,
    directory: Directory = None,
    output: OutputFormat = Format.text,
) -> None:
    """Five hospitals train on real patients: private, encrypted, pruned. Under a minute."""
    text = importlib.resources.files("securefl").joinpath("demo.toml").read_text(encoding="utf-8")
    _start(config.parse(text, settings or (), origin="demo.toml"), directory, output)


@app.command()
def run(
    experiment: Annotated[
        Path | None, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment to run.")
    ] = None,
    settings: Settings = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Continue this run after its last finished round."),
    ] = None,
    directory: Directory = None,
    sites: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder with each site's own in it (`securefl site init`): policies, consents "
            "and ledgers that outlive the run.",
        ),
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Run an experiment, or continue one with --resume."""
    if resume is None:
        if experiment is None:
            raise ConfigurationError("say which: securefl run EXPERIMENT.toml, or --resume RUN")
        _start(config.load(experiment, settings or ()), directory, output, sites)
        return
    for given, what in (
        (experiment, "EXPERIMENT.toml"),
        (settings, "--set"),
        (directory, "--directory"),
        (sites, "--sites"),
    ):
        if given:
            raise ConfigurationError(
                f"{what} does not go with --resume: a resumed run keeps its experiment and its "
                f"directory; leave it out, or start a new run"
            )
    from securefl import runs
    from securefl.records import SUMMARY

    resume = resume.resolve() if resume.is_symlink() else resume
    if (resume / SUMMARY).exists():
        say(f"{resume} is finished; nothing is left to resume")
    _follow(lambda progress: runs.resume(resume, progress=progress), lambda: resume, output)


app.add_typer(report_cli.app, name="report")


@app.command()
def show(
    directory: RunDirectory = LATEST,
    last: Annotated[int, typer.Option(min=0, help="How many of the last rounds to list.")] = 10,
    output: OutputFormat = Format.text,
) -> None:
    """Show the summary and the last rounds of a run, of an unfinished one too."""
    from securefl.records import read_history

    history = read_history(directory)
    rounds = history.rounds[-last:] if last else ()
    if output is Format.json:
        print_json(
            {
                "directory": str(directory),
                "finished": history.summary is not None,
                "summary": history.summary,
                "rounds": rounds,
            }
        )
        return
    from rich.console import Console

    console = Console(highlight=False)
    if history.summary is not None:
        console.print(_summary_table(history.summary))
    else:
        for line in _unfinished(history):
            console.print(line, markup=False, soft_wrap=True)
    if rounds:
        console.print(_rounds_table(rounds))


@app.command()
def predict(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows as in training.")],
    out: Annotated[
        Path | None, typer.Option("--output", metavar="OUT.csv", help="By default the terminal.")
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Apply a run's preprocessing and model to a new file: a line of CSV a row."""
    import sys

    from securefl.prediction import Model

    model = Model.load(directory)
    if out is not None and out.exists():
        raise ConfigurationError(f"{out} exists: name another file, or move it away")
    if out is None:
        _write_predictions(model, file, sys.stdout, output)
        return
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as target:
            _write_predictions(model, file, target, output)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _write_predictions(model: Model, file: Path, target: TextIO, output: Format) -> None:
    """A line a row: CSV, or JSON objects."""
    import csv

    import msgspec

    classes = model.about.classes
    names = ["row", "prediction", *(f"probability of {name}" for name in classes)]
    writer = csv.writer(target, lineterminator="\n")
    for part in model.predict(file):
        if part.first == 1 and output is Format.text:
            writer.writerow(names)
        chosen = model.chosen(part)
        for at, (known, values) in enumerate(zip(part.known, part.values.tolist(), strict=True)):
            shown = values if not classes else [classes[chosen[at]], *values]
            told = [part.first + at, *(shown if known else [None] * len(shown))]
            if output is Format.text:
                cells = (f"{cell:.6g}" if isinstance(cell, float) else cell for cell in told)
                writer.writerow(["" if cell is None else cell for cell in cells])
            else:
                line = dict(zip(names, told, strict=True))
                target.write(msgspec.json.encode(line).decode() + "\n")


privacy = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Plan what a run may cost.")
app.add_typer(privacy, name="privacy")


@privacy.callback()
def _privacy() -> None:
    """Plan what a run may cost."""


@privacy.command()
def plan(
    epsilon: Annotated[float, typer.Option(help="What the whole run may cost.")],
    records: Annotated[int, typer.Option(min=1, help="Training records of all sites, about.")],
    sites: Annotated[int, typer.Option(min=2, help="How many sites take part.")],
    parameters: Annotated[int, typer.Option(min=1, help="Parameters of the model.")],
    delta: Annotated[float, typer.Option(help="Below one over the records.")] = 1e-5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of one step.")] = 100,
    rate: Annotated[float, typer.Option(help="Share of the records that a step samples.")] = 0.1,
    site: Annotated[bool, typer.Option("--site", help="Protect each site's whole update.")] = False,
    settings: Settings = None,
    output: OutputFormat = Format.text,
) -> None:
    """What noise, bytes and epsilon a target comes to, before anyone trains.

    Local noise (each site's is enough by itself) beside distributed noise (only the sum's is). With
    --site every record of a site is protected at once, by distributed noise; --records and --rate
    are not read.
    """
    from securefl.privacy.preview import preview

    found = {}
    ways = {"local": rate * records / sites, "distributed": rate * records}
    if site:
        del ways["local"]
    for noise, batch in ways.items():
        values = [
            ("rounds", rounds),
            ("sites.count", sites),
            ("privacy.noise", noise),
            ("privacy.epsilon", epsilon),
            ("privacy.delta", delta),
        ]
        if site:
            values += [("privacy.unit", "site")]
        else:
            values += [("privacy.rate", rate), ("privacy.expected_batch", max(1, round(batch)))]
        chosen = [*(f"{key}={value}" for key, value in values), *(settings or ())]
        found[noise] = preview(config.parse("", chosen, origin="plan"), sites, parameters)
    if output is Format.json:
        print_json({noise: _told_plan(item) for noise, item in found.items()})
        return
    from rich.console import Console

    Console(highlight=False).print(_plan_table(found))


class Page(StrEnum):
    """A file that people write, and the page that explains its keys."""

    experiment = "experiment"
    site = "site"
    schema = "schema"


@app.command()
def reference(page: Annotated[Page, typer.Argument(help="Which file's keys to explain.")]) -> None:
    """Print what every key of a file means, as in docs/reference/."""
    from securefl import reference as pages

    write = {Page.experiment: pages.experiment, Page.site: pages.site, Page.schema: pages.schema}
    typer.echo(write[page](), nl=False)


def join(target: typer.Typer, entries: Iterable[importlib.metadata.EntryPoint]) -> None:
    """Add the commands of other packages to `target`.

    A package that cannot be loaded is named on stderr and left out: it must not keep anyone from
    the other commands.
    """
    for entry in entries:
        try:
            loaded = entry.load()
            if isinstance(loaded, typer.Typer):
                target.add_typer(loaded, name=entry.name)
            else:
                loaded(target)
        except Exception as error:
            say(f"command {entry.name!r} of {entry.value} is left out: {told(error)}")


app.add_typer(data_cli.app, name="data")
app.add_typer(ledger_cli.app, name="ledger")
app.add_typer(consortium_cli.app, name="consortium")
app.add_typer(transcript_cli.app, name="transcript")
app.command()(doctor_cli.doctor)
app.add_typer(site_cli.site, name="site")
deployment_cli.mount(app, site_cli.site)


def main() -> None:
    """The command line: `sys.argv` in, an exit status out."""
    join(app, importlib.metadata.entry_points(group=GROUP))
    app()


class Bars:
    """Progress of a run as rich bars on a terminal, and nothing anywhere else.

    Implements `securefl.runs.Progress`.
    """

    def __init__(self, console: Console) -> None:
        from rich import progress

        self._bars = progress.Progress(
            progress.TextColumn("[bold]round {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=12),
            progress.TextColumn("[dim]left"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("[cyan]{task.fields[phase]:<9}"),
            progress.TextColumn("{task.fields[latest]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bars.add_task("rounds", total=1, phase="", latest="", visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, rounds: int, done: int) -> None:
        """The run has a budget of `rounds` updates, of which `done` are made."""
        self._bars.update(
            self._task, total=rounds, completed=done, phase="starting", visible=True, refresh=True
        )

    def phase(self, round_number: int, phase: str) -> None:
        """Round `round_number` has entered `phase`."""
        self._bars.update(self._task, phase=phase)

    def finished(self, record: RoundRecord) -> None:
        """A round is done."""
        self._bars.update(self._task, completed=record.update, latest=_latest(record))


def _start(
    experiment: config.Experiment,
    directory: Path | None,
    output: Format,
    sites: Path | None = None,
) -> None:
    from securefl import runs

    previous = _newest()

    def made() -> Path | None:
        if directory is not None:
            return directory
        return newest if (newest := _newest()) != previous else None

    _follow(
        lambda progress: runs.run(experiment, directory, progress=progress, sites=sites),
        made,
        output,
    )


def _follow(
    work: Callable[[Progress], Run], directory: Callable[[], Path | None], output: Format
) -> None:
    """Do `work` under progress bars, then report; `directory` tells what can be resumed."""
    from rich.console import Console

    from securefl.records import REPORT
    from securefl.report import write_report

    try:
        with Bars(Console(stderr=True)) as progress:
            result = work(progress)
    except KeyboardInterrupt:
        say(f"interrupted; {_way_on(directory())}")
        raise typer.Exit(130) from None
    except ConfigurationError:
        raise
    except Exception as error:
        error.add_note(_way_on(directory()))
        raise
    path = result.directory / REPORT
    if not path.exists():  # killed after the last round, then resumed
        write_report(result.directory)
    if output is Format.json:
        print_json(
            {
                "directory": str(result.directory),
                "report": str(path),
                "summary": result.summary,
            }
        )
        return
    console = Console(highlight=False)
    console.print(_summary_table(result.summary))
    for name, place in (("run", result.directory), ("report", path)):
        console.print(f"{name:<7}{place}", markup=False, soft_wrap=True)


def _way_on(directory: Path | None) -> str:
    if directory is None or not (directory / "experiment.toml").exists():
        return "no run directory was made: start again"
    return f"continue with: securefl run --resume {shlex.quote(str(directory))}"


def _newest() -> Path | None:
    """The directory of the newest run, relative to here, if there is one."""
    return LATEST.parent / LATEST.readlink().name if LATEST.is_symlink() else None


def _latest(record: RoundRecord) -> str:
    from securefl.report import words

    keys = words.in_order(record.metrics)[:1]
    parts = [f"{words.metric_name(k)} {words.number(record.metrics[k])}" for k in keys]
    if record.epsilon:
        parts.append(f"epsilon {words.highest_epsilon(record)}")
    return "  ".join(parts)


def _summary_table(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    from securefl.report import words

    table = Table(title=Text(summary.name, style="bold"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows: list[tuple[str, str]] = [
        (words.metric_name(key), words.figure(summary, key))
        for key in words.in_order(summary.metric)
    ]
    if (told := words.hidden(summary)) is not None:
        rows.append(told)
    if summary.trained_on is not None:
        about = "about " if summary.private else ""
        rows.append(("trained on", f"{about}{summary.trained_on:,.0f} {summary.counted}"))
    rows += [
        ("rounds", f"{summary.rounds:,} (end: {summary.stopped})"),
        ("sites", f"{len(summary.sites)}"),
        (
            "parameters",
            f"{summary.parameters:,}, {words.percent(summary.sparsity)} pruned at the end",
        ),
        ("protocol", summary.protocol),
        (
            "upload",
            f"{words.number(summary.bytes_up_per_parameter)} bytes a parameter; "
            f"last round {words.size(summary.bytes_up_last_round)}, "
            f"all rounds {words.size(summary.bytes_up_total)}",
        ),
        ("time", words.duration(sum(summary.seconds.values()))),
    ]
    if summary.dropouts:
        count = sum(map(len, summary.dropouts.values()))
        rows.append(("dropouts", f"{count} in {len(summary.dropouts)} rounds"))
    if summary.aborted_rounds:
        aborted = words.counted(len(summary.aborted_rounds), "round")
        rows.append(("aborted", f"{aborted}: number {words.ranges(summary.aborted_rounds)}"))
    style = "green" if summary.private else "bold red"
    table.add_row("privacy", Text(words.claim(summary), style=style), end_section=True)
    for name, value in rows:
        table.add_row(name, Text(value))
    if summary.outside_guarantee:
        table.add_section()
        table.add_row("not covered", Text("\n".join(summary.outside_guarantee)))
    return table


def _told_plan(item: Preview) -> dict[str, object]:
    spent = {who.name.lower(): value for who, value in item.epsilon.items()}
    return {**{key: getattr(item, key) for key in _PLANNED}, "epsilon": spent}


_PLANNED = {
    "noise_multiplier": "noise, over what one record (or site) moves",
    "signal_to_noise": "signal to noise of a round",
    "field_bits": "bits of a coordinate of the sum",
    "bytes_up": "bytes up, a parameter and round",
    "rotated": "updates are rotated for narrower fields",
    "clip_noise": "more noise for the adaptive clip",
    "share_error": "noise in the share within the clip",
}


def _plan_table(found: Mapping[str, Preview]) -> Table:
    from rich.table import Table

    from securefl.report import words

    table = Table()
    table.add_column("")
    for noise in found:
        table.add_column(f"{noise} noise", justify="right")
    for key, title in _PLANNED.items():
        table.add_row(title, *(_figure(getattr(item, key)) for item in found.values()))
    for who in next(iter(found.values())).epsilon:
        spent = (words.rounded_up(item.epsilon[who]) for item in found.values())
        table.add_row(f"epsilon against {who.value}", *spent)
    return table


def _figure(value: float | bool | None) -> str:
    if value is None:
        return "–"
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.4g}"


def _rounds_table(rounds: Sequence[RoundRecord]) -> Table:
    from rich import box
    from rich.table import Table

    from securefl.report import words

    merit = words.in_order(rounds[-1].metrics)[:2]
    names = [key.removeprefix("test_") for key in merit]
    table = Table(
        title="Last rounds", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("round", *names, "epsilon", "pruned", "up", "down", "time", "sites"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in rounds:
        table.add_row(
            str(record.round),
            *(words.number(record.metrics[k]) if k in record.metrics else "–" for k in merit),
            words.highest_epsilon(record),
            words.percent(record.sparsity),
            words.size(sum(record.bytes_up.values())),
            words.size(sum(record.bytes_down.values())),
            words.duration(sum(record.seconds.values())),
            f"{len(record.survivors)}/{len(record.survivors) + len(record.dropouts)}",
        )
    return table


def _unfinished(history: History) -> Sequence[str]:
    done = history.rounds[-1].update if history.rounds else 0
    place = shlex.quote(str(history.directory))
    promise = "" if history.experiment.private else "; NOT PRIVATE"
    return (
        f"{history.experiment.name}: unfinished, {done:,} of at most "
        f"{history.experiment.rounds:,} rounds done{promise}",
        f"continue with: securefl run --resume {place}",
    )


if __name__ == "__main__":
    main()
