"""`securefl site`: make a site, see what an experiment asks of it, and agree to that."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securefl import config
from securefl.config import ConfigurationError
from securefl.terminal import Format, OneLineErrors, print_json

# torch and rich are imported where they are used, as in securefl.cli.
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from securefl.audit_log import Exchanged, Fault
    from securefl.privacy.policy import Asked, PolicyError
    from securefl.proposals import Refused

site = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="What a site permits, and what it agreed to."
)


class Unit(StrEnum):
    """What a budget is counted in."""

    record = "record"
    person = "person"
    site = "site"


Folder = Annotated[Path, typer.Option("--site", metavar="FOLDER", help="The site's folder.")]
Experiment = Annotated[
    Path | None,
    typer.Argument(metavar="[EXPERIMENT.toml]", help="What is proposed; or say --proposal."),
]
Sites = Annotated[int | None, typer.Option(min=2, help="How many sites take part.")]
Parameters = Annotated[
    int | None, typer.Option(min=1, help="Parameters of the model; who proposes the run says it.")
]
ProposalId = Annotated[
    str | None,
    typer.Option(
        "--proposal",
        metavar="ID",
        help="One that came over the network (`securefl site proposals`), or `latest`.",
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="How to write the result.")]


@site.callback()
def _site() -> None:
    """What a site permits, and what it agreed to."""


@site.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder to make.")],
    data_id: Annotated[str, typer.Option(help="A name for the data set, in the ledger.")],
    unit: Annotated[Unit, typer.Option(help="What the budget protects and counts.")],
    epsilon: Annotated[float, typer.Option(help="The budget of the data set, for ever.")],
    delta: Annotated[float, typer.Option(help="Of the budget: below one over the records.")],
    purpose: Annotated[str, typer.Option(help="What the records are used for, in one line.")],
    name: Annotated[
        str | None, typer.Option(help="What the consortium calls this site; a kit says it.")
    ] = None,
    person: Annotated[
        str | None, typer.Option(help="The column that says whose a record is (unit person).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The records: where they lie.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What they hold, as the sites agreed.")
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Make a site: site.toml with a safe policy, and the site's key. Prints the public key.

    In a kit the consortium has its name for the site, its key, and the other sites' keys.
    """
    from securefl import site_folder as sites
    from securefl import store

    path = folder / sites.SITE
    if path.exists():
        raise ConfigurationError(f"{path} exists: edit it, or name another folder")
    if unit == "person" and not person:
        raise ConfigurationError(
            "--unit person needs --person COLUMN: the column that says whose a record is"
        )
    called, consortium = _joined(folder, name)
    text = _TEMPLATE.format(
        name=_quoted(called),
        consortium=consortium,
        id=_quoted(data_id),
        purpose=_quoted(purpose),
        path=_path("path", data, folder, "records.csv"),
        schema=_path("schema", schema, folder, "schema.toml"),
        person=f"person = {_quoted(person)}" if person else '# person = "COLUMN"',
        unit=_quoted(unit),
        epsilon=repr(epsilon),
        delta=repr(delta),
        units='["site"]' if unit is Unit.site else f'["{unit}", "site"]',
    )
    config.parse_site(text, origin="this site", folder=folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    had_one = (folder / sites.KEY).exists()  # of an init that was interrupted
    key = sites.read_key(folder) if had_one else sites.make_key(folder)
    public = key.public.hex()
    store.write(path, text.encode())
    if output is Format.json:
        print_json({"site": str(path), "public_key": public})
        return
    typer.echo(f"site       {path}   read it, and change what it permits")
    typer.echo(f"key        {folder / sites.KEY}   secret; keep a copy where nobody else reads it")
    typer.echo(f"public key {public}")
    if consortium == _NOBODY:
        typer.echo("Give the public key to the other sites, and put theirs under [consortium].")


@site.command()
def enroll(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder.")],
    name: Annotated[
        str | None, typer.Option(help="What the consortium calls this site: makes its keys.")
    ] = None,
    kit: Annotated[
        Path | None, typer.Option(metavar="KIT", help="The kit that its keeper made: installs it.")
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Join a consortium with keys that never leave this site: first --name, later --kit."""
    from securefl import consortium_cli
    from securefl.deployment import authority

    if (name is None) == (kit is None):
        raise ConfigurationError(
            "say one of them: --name NAME makes the keys and the request, --kit KIT installs what "
            "the consortium's keeper made of it"
        )
    if kit is not None:
        consortium_cli.install(kit, folder, output)
        return
    path, request = authority.enrol(folder, str(name))
    if output is Format.json:
        print_json(
            {
                "request": str(path),
                "public_key": request.key,
                "fingerprint": request.fingerprint,
            }
        )
        return
    typer.echo(f"request     {path}   give this file to who keeps the consortium: it is not secret")
    typer.echo(f"fingerprint {request.fingerprint}   compare it with them by telephone")
    typer.echo(f"keys        {folder}   secret; keep a copy where nobody else reads it")
    typer.echo(f"Later: securefl site enroll {folder} --kit KIT installs the kit you are given.")


@site.command()
def check(
    folder: Folder,
    experiment: Experiment = None,
    sites: Sites = None,
    parameters: Parameters = None,
    proposal: ProposalId = None,
    output: OutputFormat = Format.text,
) -> None:
    """Every rule of this site that a proposal breaks (exit 2), or else what it asks."""
    asked, broken = _looked_at(folder, _offered(folder, experiment, sites, parameters, proposal))
    if output is Format.json:
        print_json(_told(asked, broken))
    elif asked is None:
        _show(_broken_table(broken))
    else:
        _show(_asked_table(asked))
    if broken:
        raise typer.Exit(2)


@site.command()
def agree(
    folder: Folder,
    by: Annotated[str, typer.Option(help="Who agrees: a person's name.")],
    experiment: Experiment = None,
    sites: Sites = None,
    parameters: Parameters = None,
    proposal: ProposalId = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: who calls this agrees.")] = False,
    output: OutputFormat = Format.text,
) -> None:
    """Show what a proposal asks of this site, and write down that a person agrees to it."""
    from securefl.site import Consents

    asked, broken = _looked_at(folder, _offered(folder, experiment, sites, parameters, proposal))
    if asked is None:
        raise broken[0]
    if output is Format.text:
        _show(_asked_table(asked))
    if not yes:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ConfigurationError(
                "nobody can be asked here: run this on a terminal, or say --yes in their name"
            )
        if not typer.confirm(f"Does {by} agree to one such run?"):
            typer.echo("Nothing was agreed to.")
            raise typer.Exit(1)
    path = Consents(folder).agree(asked, by)
    if output is Format.json:
        print_json(_told(asked, ()) | {"consent": str(path), "by": by})
    else:
        typer.echo(f"consent {path}\nTo withdraw it, delete that file.")
        if proposal is not None:
            typer.echo("Tell who proposed it: proposed again, this site accepts it.")


@site.command()
def proposals(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder, or kit.")],
    output: OutputFormat = Format.text,
) -> None:
    """What was proposed to this site and refused, and what it would say to it now."""
    from securefl.proposals import Proposals

    own = config.load_site(folder / "site.toml")
    kept = Proposals(folder).newest_first()
    verdicts = [_verdict(folder, own, refused) for refused in kept]
    if output is Format.json:
        told = zip(kept, verdicts, strict=True)
        print_json([{"id": one.id, "now": now, "proposal": one} for one, now in told])
    elif not kept:
        typer.echo(f"No proposal was refused by {own.name} that it did not accept later.")
    else:
        _print_proposals(folder, kept, verdicts)


def _verdict(folder: Path, own: config.Site, refused: Refused) -> str:
    """What the site would say to a proposal that it refused, by site.toml as it is now."""
    from securefl.site import Consents

    unknown = refused.strangers(own)
    if unknown:
        return f"refused: [consortium] has not the key that it gives {', '.join(unknown)}"
    try:
        parts = config.parse(refused.experiment), len(refused.sites), refused.parameters
        asked, broken = _looked_at(folder, parts)
    except (ValueError, ArithmeticError) as error:
        return f"refused: {error}"
    if asked is None:
        return f"refused: breaks {', '.join(fault.rule for fault in broken)}"
    if own.policy.consent == "standing":
        return "permitted: propose it again"
    if Consents(folder).given(asked, b""):
        return "agreed to: propose it again"
    return "waits for a person to agree"


def _print_proposals(folder: Path, kept: Sequence[Refused], verdicts: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from securefl.messages import printable

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("id", "last proposed (UTC)", "experiment", "sites", "now"):
        table.add_column(heading, overflow="fold")
    for refused, verdict in zip(kept, verdicts, strict=True):
        try:
            name = config.parse(refused.experiment).name
        except ConfigurationError:
            name = "cannot be read"
        at = printable(refused.at[:16].replace("T", " "))
        cells = (refused.id, at, name, str(len(refused.sites)), printable(verdict))
        table.add_row(*map(Text, cells))
    console.print(table)
    for refused, verdict in zip(kept, verdicts, strict=True):
        if verdict.startswith("refused: breaks"):
            console.print(Text(f"{refused.id} was told: {printable(refused.reason)}"))
    where = f"--site {shlex.quote(str(folder))} --proposal ID"
    typer.echo(f"securefl site check {where}\nsecurefl site agree {where} --by NAME")


@site.command()
def budget(
    folder: Folder,
    by: Annotated[str, typer.Option(help="Who changes it: a person's name.")],
) -> None:
    """Give the data set the budget and purpose that site.toml has now: an entry of the ledger."""
    from securefl.site_folder import SITE, change_budget

    own = config.load_site(folder / SITE)
    change_budget(folder, by)
    typer.echo(
        f"data set {own.data.id}: epsilon {own.budget.epsilon:g} at delta {own.budget.delta:g}"
    )


@site.command()
def log(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every line, signature and the ledger (exit 1).")
    ] = False,
    last: Annotated[
        int | None, typer.Option(min=0, help="Show this many messages: 20; in JSON all.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="The site's public key in hexadecimal, for a copy without site.key."),
    ] = None,
    output: OutputFormat = Format.text,
) -> None:
    """Who asked this site for what, what was answered, and what it cost: its audit log."""
    from securefl import audit_log
    from securefl.store import CorruptStoreError

    path = folder / audit_log.LOG
    if not path.exists() and not verify:
        config.load_site(folder / "site.toml")  # says so where this is no site's folder
        raise ConfigurationError(f"{folder} has no audit log yet: nobody asked the site anything")
    found = _faults(folder, key) if verify else ()
    lines = () if found else audit_log.read(path)
    told = audit_log.exchanged(lines)
    shown = told[len(told) - last :] if last is not None and last < len(told) else told
    if output is Format.json:
        faults = {"faults": found} if verify else {}
        print_json({"log": str(path), "lines": len(lines), **faults, "messages": shown})
    elif not found:
        _print_log(told, shown if last is not None else told[-20:])
    else:
        for fault in found:
            typer.echo(f"line {fault.line} {fault.what}" if fault.line else fault.what)
    if found:
        count = f"{len(found)} faults" if len(found) > 1 else "a fault"
        raise CorruptStoreError(
            f"{path}: {count}; the log or the ledger was edited, cut or replaced: keep both as "
            "they are, and compare them with the newest copies"
        )
    if verify and output is Format.text:
        typer.echo(f"{path}: {len(lines)} lines; chain, signatures and ledger fit")


def _faults(folder: Path, key: str | None) -> tuple[Fault, ...]:
    from securefl import audit_log
    from securefl.privacy.ledger import Ledger
    from securefl.site_folder import LEDGER, read_key

    try:
        public = bytes.fromhex(key) if key is not None else read_key(folder).public
    except ValueError:
        public = b""
    if len(public) != 32:
        raise ConfigurationError(f"--key {key!r} is not 32 bytes in hexadecimal")
    path = folder / audit_log.LOG
    if not (folder / LEDGER).exists():
        return audit_log.faults(path, public, None)
    with Ledger(folder / LEDGER) as ledger:
        return audit_log.faults(path, public, ledger)


def _print_log(told: Sequence[Exchanged], shown: Sequence[Exchanged]) -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from securefl.messages import printable

    console = Console(highlight=False)
    for (by, day, run), messages in groupby(
        shown, lambda one: (one.asked.by, one.at[:10], one.asked.run)
    ):
        reasons = list[str]()
        about = f"run {run}" if run else "for no run of this site's"
        title = Text(f"{printable(day)} (UTC)  asked by {printable(by)}, {about}")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=True)
        for name, width in (("line", 5), ("time", 8), ("round", 5)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        table.add_column("asked", overflow="fold", width=26)
        table.add_column("answered", overflow="fold", ratio=1)
        table.add_column("epsilon", overflow="fold", width=10)
        for one in messages:
            table.add_row(*(Text(*cell) for cell in _cells(one)))
            if one.answered is not None and one.answered.reason:
                reasons.append(f"line {one.number} was refused: {printable(one.answered.reason)}")
        console.print(table)
        for reason in reasons:
            console.print(Text(reason, style="red"))
        console.print()
    answers = [one.answered for one in told]
    refused = sum(answer is not None and answer.reply == "refusal" for answer in answers)
    counts = f"{len(told)} messages, {refused} refused, {answers.count(None)} without a reply"
    console.print(f"{counts}; {len(shown)} shown" if len(shown) < len(told) else counts)


def _cells(one: Exchanged) -> Iterator[tuple[str, str]]:
    """The cells of a message's row, and their styles."""
    from securefl.messages import printable
    from securefl.report import words

    asked, answered = one.asked, one.answered
    yield str(one.number), ""
    yield one.at[11:19], ""
    yield str(asked.round or ""), ""
    what = printable(asked.phase) if asked.message == "request" else asked.message
    task = f" ({asked.task})" if asked.task else ""
    again = f"; as line {one.repeats}" if one.repeats is not None else ""
    yield f"{what}{task}, {words.size(asked.size)}{again}", ""
    if answered is None:
        yield "no reply", "yellow"
    elif answered.reply == "refusal":
        yield f"refused: {answered.refused}", "red"
    else:
        said = "accepted" if asked.message == "proposal" else answered.reply
        yield f"{said}, {words.size(answered.size)}", ""
    cost = answered.cost if answered is not None else None
    if cost is None:
        yield "", ""
    else:
        spent = "no bound" if cost.epsilon is None else words.rounded_up(cost.epsilon)
        yield f"{spent} of {cost.budget:g}", "bold"


def _joined(folder: Path, name: str | None) -> tuple[str, str]:
    """What the site is called, and the other sites' keys: from the kit in `folder` if it is one."""
    from securefl.deployment.kits import KIT, Kit, Role
    from securefl.site_folder import KEY

    if not (folder / KIT).exists():
        if name is None:
            raise ConfigurationError(
                f"say --name NAME: what the consortium calls this site ({folder} is not a kit, "
                "which would say it)"
            )
        return name, _NOBODY
    kit = Kit.load(folder)
    if kit.role is not Role.site:
        raise ConfigurationError(f"{folder} is the kit of the {kit.name}: name a site's own folder")
    if not (folder / KEY).exists():
        raise ConfigurationError(
            f"{folder} is a kit without keys: `securefl site enroll FOLDER --kit {folder}` "
            "installs it where its keys are"
        )
    if name not in (None, kit.name):
        raise ConfigurationError(f"--name {name}: this kit is of {kit.name}; leave --name out")
    others = {site: key.hex() for site, key in kit.roster.keys.items() if site != kit.name}
    return kit.name, "\n".join(f'{site} = "{key}"' for site, key in others.items())


def _offered(
    folder: Path,
    path: Path | None,
    count: int | None,
    parameters: int | None,
    proposal: str | None,
) -> tuple[config.Experiment, int, int]:
    """The experiment, how many sites take part, and the model's parameters: from either source."""
    from securefl.proposals import Proposals

    if proposal is not None:
        if path is not None or count is not None or parameters is not None:
            raise ConfigurationError(
                "--proposal says all of it: leave EXPERIMENT, --sites and --parameters out"
            )
        kept = Proposals(folder).find(proposal)
        own = config.load_site(folder / "site.toml")
        if unknown := kept.strangers(own):
            raise ConfigurationError(
                f"proposal {kept.id} gives {', '.join(unknown)} a key that {own.name} does not "
                "know: put it under [consortium] in site.toml once you compared it with theirs"
            )
        return config.parse(kept.experiment), len(kept.sites), kept.parameters
    if path is None or count is None or parameters is None:
        raise ConfigurationError(
            "say EXPERIMENT.toml, --sites and --parameters; or --proposal ID for one that came "
            f"over the network (`securefl site proposals {folder}`)"
        )
    return config.load(path), count, parameters


def _looked_at(
    folder: Path, offered: tuple[config.Experiment, int, int]
) -> tuple[Asked | None, tuple[PolicyError, ...]]:
    """What is asked, or every rule that is broken."""
    from securefl.privacy import policy
    from securefl.privacy.ledger import Ledger
    from securefl.site_folder import LEDGER, SITE

    experiment, count, parameters = offered
    own = config.load_site(folder / SITE)
    broken = policy.broken(own, experiment, count, parameters, date.today())
    if broken:
        return None, broken
    if not (folder / LEDGER).exists():
        return policy.asked(own, experiment, count, parameters), ()
    with Ledger(folder / LEDGER) as ledger:
        return policy.asked(own, experiment, count, parameters, ledger), ()


def _told(asked: Asked | None, broken: Sequence[PolicyError]) -> dict[str, object]:
    rules = [
        {"rule": fault.rule, "proposed": fault.proposed, "permitted": fault.permitted}
        for fault in broken
    ]
    if asked is None:
        return {"permitted": False, "broken": rules}
    epsilon = {who.name.lower(): spent for who, spent in asked.epsilon.items()}
    return {
        "permitted": True,
        "broken": [],
        "digest": asked.digest().hex(),
        "rounds": asked.rounds,
        "epsilon": epsilon,
        "budget": asked.budget,
        "asked": [{"about": about, "text": text} for about, text in asked.sentences()],
    }


def _asked_table(asked: Asked) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"What {asked.site.name} is asked to agree to",
        title_justify="left",
        show_header=False,
        show_lines=True,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for about, text in asked.sentences():
        style = "bold red" if text.startswith("NOT PRIVATE") else ""
        table.add_row(about, Text(text, style=style))
    table.add_row("digest", Text(asked.digest().hex()))
    return table


def _broken_table(broken: Sequence[PolicyError]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{broken[0].site} does not permit this", title_justify="left", show_lines=True
    )
    for heading in ("rule", "proposed", "permitted"):
        table.add_column(heading, overflow="fold")
    for fault in broken:
        table.add_row(*(Text(text) for text in (fault.rule, fault.proposed, fault.permitted)))
    return table


def _show(table: Table) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


def _path(key: str, file: Path | None, folder: Path, example: str) -> str:
    """The line of site.toml that names a file, from there; a comment where none is named."""
    if file is None:
        return f'# {key} = "{example}"'
    if not file.exists():
        raise ConfigurationError(f"{file} is not there: name the file for {key} under [data]")
    told = file if file.is_absolute() else os.path.relpath(file.resolve(), folder.resolve())
    return f"{key} = {_quoted(str(told))}"


def _quoted(text: str) -> str:
    """A TOML string."""
    import tomli_w

    return tomli_w.dumps({"x": str(text)}).removeprefix("x = ").strip()


_NOBODY = f'# south = "{"0" * 64}"'
_TEMPLATE = """\
# What this site permits; docs/site-policy.md explains every key. In [policy] a line that starts
# with # shows the default: take the # away to change it. Who writes this file decides for the site.
version = 1
name = {name}

[data]
# What the ledger calls the data set: never another id for the same people.
id = {id}
purpose = {purpose}
# The column that says whose a record is; unit = "person" needs it.
{person}
# Where the records lie; a path that a server proposes is never read.
{path}
# What they hold (`securefl data schema` drafts it); a run on another schema is refused.
{schema}

# What the data set may spend: over all runs and all servers, for ever.
[budget]
unit = {unit}
epsilon = {epsilon}
delta = {delta}

# Every run must keep every rule.
[policy]
# consent = "each-run"               # a person agrees to each; "standing": all within this policy
# unknown_sites = false              # whether sites may take part that [consortium] does not pin
# privacy = "required"               # "optional": runs without a privacy plan too
# maximum_epsilon = {epsilon}
# maximum_delta = {delta}
# units = {units}
# noise = ["local", "distributed"]
# minimum_noise = 0.5                # unknown noise, over what is protected
# protocols = ["masked-bfv", "secagg"]
# minimum_cohort = 3                 # the fewest sites in a sum
# minimum_colluding_sites = 1        # that may collude with the server and learn no more
# graph = "complete"                 # "auto": masks with some sites only, where there are very many
# reveal = ["server", "sites"]       # who may learn the sum
# minimum_openers = 1                # sites that must open a sum and agree on it
# record_counts = false              # whether exact counts and statistics may be opened
# models = ["linear", "logistic", "mlp", "cnn", "small-cnn"]
# maximum_rounds = 1000              # spare ones included
# maximum_local_steps = 100
# transcript_until = 2030-12-31      # without a date: no transcript, no recording
# own_recording = false              # whether it writes down its own secrets for an audit
# canaries = false                   # whether it trains on made-up records for an audit, too
# allow_not_private = false          # runs with seeded noise: tests and demonstrations only

# Code that a run may name, and the SHA-256 of its file.
[policy.callables]
# "our_models:network" = "0000000000000000000000000000000000000000000000000000000000000000"

# The other sites' public keys, as their people handed them over.
[consortium]
{consortium}
"""
