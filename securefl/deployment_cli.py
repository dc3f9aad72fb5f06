"""`securefl server`, `site start`, `submit`, `status`, `logs`, `stop`: a consortium at work."""

from __future__ import annotations

import re
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl import config
from securefl.config import ConfigurationError
from securefl.terminal import Format, OneLineErrors, print_json, say

# FLARE and torch are imported where they are used, as in securefl.cli.
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.table import Table

    from securefl.deployment.kits import Kit
    from securefl.deployment.progress import RunProgress
    from securefl.deployment.steward import Session

_SILENCE = 60.0
"""Seconds without a word of a run after which whoever follows it gives up."""


class StoppedShortError(RuntimeError):
    """The run that a person follows did not finish."""


server = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="A consortium's server: relays and adds."
)

KitFolder = Annotated[Path, typer.Argument(metavar="KIT", help="The participant's folder.")]
AdministratorKit = Annotated[
    Path, typer.Option("--kit", metavar="KIT", help="The administrator's kit.")
]
OutputFormat = Annotated[Format, typer.Option("--format", help="How to write the result.")]


_DAY = 24 * 60 * 60.0


@server.callback()
def _server() -> None:
    """A consortium's server: relays and adds."""


@server.command()
def start(kit_folder: KitFolder) -> None:
    """Run the server until it is stopped (Ctrl-C, SIGTERM or `securefl stop KIT`)."""
    from securefl.deployment import nodes
    from securefl.deployment.steward import Steward

    kit = _ready(kit_folder, "server")
    nodes.prepare(kit)
    say(f"server of {kit.consortium} on {kit.bind}; logs in {kit.folder / 'logs'}")
    steward, remind = Steward(kit, say), _reminder(kit)

    def beat() -> None:
        steward.beat()
        remind()

    nodes.keep_running(kit, nodes.programs(kit), say, beat)
    steward.close()
    say("stopped")


def start_site(
    kit_folder: KitFolder,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The records; by default what site.toml names."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="site.toml",
            help="What the site permits, in the folder with its key and ledger; by default in KIT.",
        ),
    ] = None,
) -> None:
    """Take part with this site until it is stopped. It only dials out."""
    from securefl.deployment import nodes

    kit = _ready(kit_folder, "site")
    own = _own_folder(kit, policy)
    if data is not None and not data.exists():
        raise ConfigurationError(f"--data {data} is not there: name the file with the records")
    nodes.prepare(kit)
    say(
        f"{kit.name} of {kit.consortium}, to {kit.host}:{kit.port}; policy {own / 'site.toml'}; "
        f"logs in {kit.folder / 'logs'}"
    )
    absolute = data.absolute() if data is not None else None
    wanted = nodes.programs(kit, own.absolute(), absolute)
    nodes.keep_running(kit, wanted, say, _reminder(kit))
    say("stopped")


def submit(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="What to run.")],
    kit_folder: AdministratorKit,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the experiment."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the run is called.  [default: NAME-DATE-TIME]")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until it is over.")] = False,
    output: OutputFormat = Format.text,
) -> None:
    """Propose a run to the consortium: every site decides for itself."""
    from securefl.deployment.steward import Session

    kit = _ready(kit_folder, "administrator")
    wanted, least = proposed(config.load(experiment, settings or (), tuple(kit.roster)), kit)
    run = name or f"{wanted.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    with Session(kit) as session:
        connected = session.connected()
        if any(job.get("job_name") == run for job in session.jobs()):
            raise ConfigurationError(f"there is a run {run} already: give this one another --name")
        job = session.submit(run, wanted.dump(), least)
        if output is Format.json:
            print_json({"run": run, "job": job, "connected": connected})
        else:
            typer.echo(f"run {run}\nconnected now: {', '.join(connected) or 'no site'}")
            where = shlex.quote(str(kit_folder))
            typer.echo(f"how far it is: securefl status {where}")
        if follow:
            _follow(session, run)


def proposed(experiment: config.Experiment, kit: Kit) -> tuple[config.Experiment, int]:
    """The experiment with its sites named, tried here, and how many sites a sum needs."""
    from securefl import agreement, simulation
    from securefl.runs import check_remote

    names = experiment.sites.names or tuple(kit.roster)
    strangers = sorted(set(names) - set(kit.roster))
    if strangers:
        raise ConfigurationError(
            f"sites.names lists {strangers[0]}, which is not in {kit.consortium}: its sites are "
            f"{', '.join(kit.roster)}"
        )
    sites = experiment.sites.model_copy(update={"names": tuple(sorted(names)), "count": None})
    experiment = experiment.model_copy(update={"sites": sites})
    check_remote(experiment, names)
    simulation.assemble(experiment)
    return experiment, agreement.thresholds(experiment, len(names)).minimum


def _follow(session: Session, run: str) -> None:
    """Say how far a run is until it is over; StoppedShortError where it did not finish."""
    before, silent_since = "", time.monotonic()
    told: RunProgress | None = None
    while told is None or not told.over:
        heard = session.progress(run)
        if heard is not None:
            told, silent_since = heard, time.monotonic()
            line = f"{run}: {told.state}, update {told.done} of {told.rounds}"
            if told.state == "waiting":
                line += f": {told.reason}"
            if line != before:
                say(line)
            before = line
        elif time.monotonic() - silent_since > _SILENCE:
            raise StoppedShortError(
                f"nothing is heard of {run} any more: `securefl status` at the server says more"
            )
        time.sleep(1)
    if told.state == "failed":
        for reason in _reasons(told):
            say(reason)
        if "policy.consent" in told.reason:
            say("at each site: `securefl site proposals KIT`, `site agree`; then submit again")
        raise StoppedShortError(f"{run} failed")


def _reasons(run: RunProgress) -> list[str]:
    """Why it failed or waits: in all, and then what every site said."""
    return re.split(r"(?:; |: )(?=[\w.-]+ refuses by )", run.reason)


def status(kit_folder: KitFolder, output: OutputFormat = Format.text) -> None:
    """What runs, who is connected, and how far each run is.

    Exit status 1 where a server does not listen, or a site's service does not answer.
    """
    from securefl.deployment import nodes
    from securefl.deployment.kits import Kit
    from securefl.deployment.progress import every_run

    kit = Kit.load(kit_folder.absolute())
    told: dict[str, object] = {"kit": kit.name, "role": str(kit.role)}
    runs: Mapping[str, RunProgress] = {}
    well = True
    if kit.role == "administrator":
        told["connected"], runs, told["over"] = _asked(kit)
    else:
        told["running"] = nodes.supervisor(kit) is not None
        if kit.role == "server":
            runs = every_run(kit.folder)
            told["listens"] = nodes.listens(kit)
        else:
            told |= _site_told(kit)
        well = bool(told["running"] and told.get("listens", told.get("service")))
    if output is Format.json:
        print_json(told | {"runs": runs})
    else:
        _show_status(kit, told, runs)
    if not well:
        raise typer.Exit(1)


def _site_told(kit: Kit) -> dict[str, object]:
    """What is known at a site: whether its gate answers, its last message, what it refused."""
    from securefl.audit_log import LOG, exchanged, read
    from securefl.deployment import nodes
    from securefl.deployment.service import Connection
    from securefl.proposals import Proposals

    told: dict[str, object] = {"service": True, "server": nodes.reaches_server(kit)}
    try:
        Connection(kit.folder, 2.0).close()
    except OSError:
        told["service"] = False
    log = kit.folder / LOG
    lines = exchanged(read(log)) if log.exists() else ()
    told["last_asked"] = lines[-1].at if lines else None
    told["proposals"] = len(Proposals(kit.folder).newest_first())
    return told


def _show_status(kit: Kit, told: Mapping[str, object], runs: Mapping[str, RunProgress]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)

    def line(text: str) -> None:
        console.print(Text(text))

    if "running" in told:
        going = "running" if told["running"] else "not running"
        line(f"{kit.name} of {kit.consortium}: {going}")
    if "listens" in told and told["running"]:
        heard = "listens" if told["listens"] else "nothing listens: securefl logs KIT says why"
        line(f"at {kit.bind}: {heard}")
    if "service" in told and told["running"]:
        line(f"service: {'answers' if told['service'] else 'does not answer: securefl logs KIT'}")
    if "server" in told:
        reached = "connected" if told["server"] else "no connection: securefl doctor KIT says why"
        line(f"to {kit.host}:{kit.port}: {reached}")
        asked = str(told["last_asked"] or "never").replace("T", " ").replace("+00:00", " UTC")
        line(f"last asked for something: {asked} (securefl site log KIT)")
    if told.get("proposals"):
        line(f"refused proposals kept: {told['proposals']} (securefl site proposals KIT)")
    connected = told.get("connected")
    if isinstance(connected, tuple):
        line(f"connected: {', '.join(connected) or 'no site'}")
    if runs:
        console.print(_runs_table(runs))
    for name, run in runs.items():
        if run.reason and run.state not in ("running", "stopped"):
            first, *rest = _reasons(run)
            line(f"{name} {run.state}: {first}")
            for reason in rest:
                console.print(Padding(Text(reason), (0, 0, 0, 2)))
    over = told.get("over")
    if isinstance(over, tuple) and over:
        line(f"over: {', '.join(over)} (how they ended: securefl status, at the server)")


def _asked(kit: Kit) -> tuple[tuple[str, ...], dict[str, RunProgress], tuple[str, ...]]:
    """Who is connected to the server, how far running runs are, and some that are over."""
    from securefl.deployment.steward import Session

    with Session(kit) as session:
        connected = session.connected()
        names = dict.fromkeys(str(job["job_name"]) for job in session.jobs())
        heard = {name: session.progress(name) for name in names}
    over = tuple(name for name, run in heard.items() if run is None)
    return connected, {name: run for name, run in heard.items() if run is not None}, over[-5:]


def _runs_table(runs: Mapping[str, RunProgress]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("run", "state", "updates", "phase", "sites", "since"):
        table.add_column(heading, overflow="fold")
    for name, run in runs.items():
        table.add_row(
            Text(name),
            Text(run.state),
            f"{run.done}/{run.rounds}",
            f"{run.round} {run.phase}".strip() if run.state == "running" else "",
            f"{len(run.sites)}/{len(run.names)}",
            run.at.removesuffix("+00:00").replace("T", " "),
        )
    return table


def logs(
    kit_folder: KitFolder,
    lines: Annotated[int, typer.Option(min=1, help="How many of each log.")] = 30,
) -> None:
    """The last lines of the kit's logs."""
    from securefl.deployment.kits import Kit

    kit = Kit.load(kit_folder.absolute())
    found = sorted((kit.folder / "logs").glob("*.log"))
    if not found:
        raise ConfigurationError(f"{kit.folder / 'logs'} holds no log: nothing was started yet")
    for path in found:
        typer.echo(f"== {path}")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]:
            typer.echo("".join(c for c in line if c.isprintable()))


def stop(
    kit_folder: KitFolder,
    run: Annotated[
        str | None, typer.Option(help="End this run after its round, and nothing else.")
    ] = None,
) -> None:
    """Stop what `server start` or `site start` began; or, with an administrator's kit, a run."""
    from securefl.deployment import nodes
    from securefl.deployment.kits import Kit

    kit = Kit.load(kit_folder.absolute())
    if run is not None:
        _stop_run(kit, run)
    elif kit.role == "administrator":
        raise ConfigurationError("an administrator's kit runs nothing: say --run NAME")
    elif not nodes.stop(kit):
        say(f"{kit.name} was not running")


def _stop_run(kit: Kit, run: str) -> None:
    from securefl.deployment.progress import RUNS, STOP, check_name, read_progress
    from securefl.deployment.progress import stop as stop_run
    from securefl.deployment.steward import Session

    if kit.role == "server":
        folder = kit.folder / RUNS / check_name(run)
        progress = read_progress(folder)
        if progress is None or progress.over:
            raise ConfigurationError(f"no run {run!r} goes on: `securefl status` lists them")
        stop_run(folder)
        say(f"{run} ends after its round")
        return
    if kit.role != "administrator":
        raise ConfigurationError("a run is stopped with the administrator's kit, or the server's")
    with Session(kit) as session:
        for job in session.jobs():
            if job.get("job_name") == run and str(job.get("status")) == "RUNNING":
                session.command(str(job["job_id"]), STOP, {})
                say(f"{run} ends after its round")
                return
    raise ConfigurationError(
        f"no job of a run {run!r} is running: `securefl status` lists those that are; one that "
        "waits is stopped with the server's kit"
    )


def _ready(folder: Path, role: str) -> Kit:
    """The kit, checked; warnings are said."""
    import importlib.util

    from securefl.deployment.kits import Kit

    if importlib.util.find_spec("nvflare") is None:
        raise ConfigurationError("FLARE is not installed here: pip install 'securefl[flare]'")
    kit = Kit.load(folder.absolute())
    if kit.role != role:
        raise ConfigurationError(f"{folder} is the kit of a {kit.role}: this takes a {role}'s")
    for warning in kit.check(datetime.now(UTC)):
        say(warning)
    return kit


def _reminder(kit: Kit) -> Callable[[], None]:
    """What says once a day that the kit's certificate expires soon, or has expired."""
    due = time.monotonic() + _DAY

    def remind() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _DAY
            try:
                for warning in kit.check(datetime.now(UTC)):
                    say(warning)
            except ConfigurationError as error:
                say(str(error))

    return remind


def _own_folder(kit: Kit, policy: Path | None) -> Path:
    """The folder of the site's policy, key and ledger, looked through before anything starts."""
    from securefl import site_folder

    folder = policy.parent if policy is not None else kit.folder
    if policy is not None and policy.name != site_folder.SITE:
        raise ConfigurationError(f"--policy {policy}: the file is called {site_folder.SITE}")
    if not (folder / site_folder.SITE).exists():
        raise ConfigurationError(
            f"{folder / site_folder.SITE} is not there: `securefl site init {folder} ...` makes it"
        )
    own = config.load_site(folder / site_folder.SITE)
    if own.name != kit.name:
        raise ConfigurationError(
            f"{folder / site_folder.SITE} is of {own.name}, and the kit of {kit.name}"
        )
    if site_folder.read_key(folder).public != kit.roster.keys.get(kit.name):
        raise ConfigurationError(
            f"{folder / site_folder.KEY} is not the key that the roster has for "
            f"{kit.name}: enrol it, `securefl site enroll`"
        )
    site_folder.open_ledger(folder).close()
    return folder


def mount(app: typer.Typer, site: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(server, name="server")
    site.command("start")(start_site)
    commands: tuple[Callable[..., None], ...] = (submit, status, logs, stop)
    for command in commands:
        app.command()(command)
