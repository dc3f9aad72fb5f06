"""What the people who hold a kit read first: who does what next, in plain words."""

from __future__ import annotations

from securefl.deployment.kits import Description, Pins, Role


def consortium(name: str, pins: Pins) -> str:
    """README.md of a consortium's folder."""
    sites = "\n".join(f"| `kits/{site}` | the people of {site} |" for site in pins.keys)
    removed = ", ".join(pins.removed)
    gone = (
        f"\n**Removed: {removed}.** Hand `kits/server` over at once: the server refuses them once "
        "it has it and was started again.\n"
        if removed
        else ""
    )
    return f"""# The consortium {name}

You keep this consortium: with what is in `authority/` anyone can be made part of it. Keep that
folder where nobody else reads it (best on a machine without a network), and keep a copy.

## Hand these over
Roster {pins.serial}. Each kit goes to one machine, by a way on which nobody else can read it, since
it may hold private keys.
{gone}
| kit | for |
|---|---|
| `kits/server` | whoever runs the server |
| `kits/administrator` | whoever starts runs |
{sites}

Then delete what you handed over: you do not need it again. `securefl consortium renew` makes kits
without private keys, for the keys that the others hold.

## Later
| when | what |
|---|---|
| anything is unclear | `securefl consortium show {name}` |
| certificates expire within 30 days | `securefl consortium renew {name}`, hand the kits over |
| a site joins | `securefl consortium add {name} SITE`, hand all kits over |
| a site leaves, or a key of it may be known to others | `securefl consortium remove {name} SITE`, \
hand `kits/server` over at once and then the others |

Whoever has a kit already installs the newer one over it: \
`securefl consortium update FOLDER --kit KIT`.
"""


def kit(about: Description, pins: Pins) -> str:
    """README.md of one kit."""
    steps = {
        Role.server: _SERVER,
        Role.site: _SITE,
        Role.administrator: _ADMINISTRATOR,
    }[about.role]
    return steps.format(
        name=about.name,
        consortium=about.consortium,
        host=about.host,
        port=about.port,
        bind=about.bind,
        sites=", ".join(pins.keys) or "none yet",
        serial=pins.serial,
    )


_COMMON = """
## Keep in mind
- This folder makes you part of the consortium. Files that end in `.key` are secret: whoever has
  them can pass for you. Keep a copy where nobody else reads it.
- The folder can be moved, and copied to another machine; never use two copies at a time.
- A newer kit goes over this one: `securefl consortium update FOLDER --kit NEWER`. Secret files and
  what you wrote stay as they are.
- The sites of roster {serial}: {sites}.
"""

_SERVER = (
    """# {consortium}: the server's kit

The server adds up what the sites send. With the default protocols it cannot read what one site
sent.

1. Put this folder on the server's machine, and install there: `pip install 'securefl[flare]'`.
2. The sites reach it as **{host}**, TCP port **{port}**; it listens at {bind}. Open that one port
   in the firewall. Nothing else comes in, and it opens no connection to any site.
3. `securefl doctor FOLDER` says whether all is well, and what to do if not.
4. `securefl server start FOLDER`; `securefl status FOLDER` says how things are.
5. What a run leaves is in `runs/NAME`: `securefl show FOLDER/runs/NAME`.

`steward/` is a second identity, with which the server goes on with runs that were interrupted. It
stays where it is.
"""
    + _COMMON
)

_SITE = (
    """# {consortium}: the kit of {name}

Your records stay on your machine. What it sends is for runs that you permit, and, unless you permit
otherwise, masked and encrypted: only the sum over all sites can be opened.

1. Put this folder on your machine, and install there: `pip install 'securefl[flare]'`.
2. Your machine opens connections to **{host}**, TCP port **{port}**, and to nothing else. Nobody
   connects to it: no port is opened in your firewall.
3. `securefl site init FOLDER ...` writes `site.toml`: what your records may be used for. Name the
   records by `--data FILE`, and by `--schema FILE` the schema that the sites agreed on. Read
   `site.toml`, and change what it permits.
4. `securefl doctor FOLDER` says whether all is well, and what to do if not.
5. `securefl site start FOLDER`; again after every change of `site.toml`.
6. By default a person here agrees to every run: `securefl site proposals FOLDER` shows what was
   asked, `securefl site agree --site FOLDER --proposal ID --by NAME` agrees to it; tell who asked.
7. `securefl status FOLDER` says how things are, `securefl site log FOLDER` what was asked and sent.

Copy `ledger.sqlite` and `audit.jsonl` too: without them what your records have spent is forgotten.
"""
    + _COMMON
)

_ADMINISTRATOR = (
    """# {consortium}: the kit of the {name}

With this kit runs are started and stopped. Every site decides for itself whether it takes part.

1. Put this folder on the machine that you work at, and install there:
   `pip install 'securefl[flare]'`.
2. It opens connections to **{host}**, TCP port **{port}**.
3. `securefl doctor FOLDER` says whether all is well, and what to do if not.
4. `securefl submit EXPERIMENT.toml --kit FOLDER --follow`; `securefl status FOLDER` later. Where a
   site's people have to agree first, tell them, and submit again when they did.
"""
    + _COMMON
)
