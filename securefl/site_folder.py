"""A site's folder: its policy, its key and its ledger, whatever runs it takes part in."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from protocols.identity import SigningKey
from securefl import config, store
from securefl.config import ConfigurationError
from securefl.privacy.ledger import Ledger
from securefl.store import CorruptStoreError

SITE: Final = "site.toml"
KEY: Final = "site.key"
LEDGER: Final = "ledger.sqlite"


def private(folder: Path, run: str, site: str) -> Path:
    """Where the site in `folder` keeps its secrets of a run (hexadecimal), if it keeps any."""
    return folder / "runs" / run / "sites" / site / "own"


def make_key(folder: Path) -> SigningKey:
    """Make the site's long-lived key, readable by its owner only.

    Raises ConfigurationError when there is one: a key is never replaced.
    """
    secret = os.urandom(32)
    try:
        store.write_secret(folder / KEY, secret)
    except FileExistsError:
        raise ConfigurationError(
            f"{folder / KEY} exists: the site has its key; keep it, or name another folder"
        ) from None
    return SigningKey(lambda size: secret)


def read_key(folder: Path) -> SigningKey:
    """The site's key. Raises ConfigurationError when there is none, or others may read it."""
    path = folder / KEY
    try:
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; `securefl site init` makes it"
        ) from None
    if others:
        raise ConfigurationError(f"{path} can be read by others: chmod 600 {path}")
    if len(secret) != 32:
        raise CorruptStoreError(f"{path} is damaged: restore it from a copy")
    return SigningKey(lambda size: secret)


def open_ledger(folder: Path) -> Ledger:
    """The site's ledger, with its data set and budget as site.toml has them.

    Raises ConfigurationError where the ledger has another budget: a person changes that, by name.
    """
    site = config.load_site(folder / SITE)
    ledger = Ledger(folder / LEDGER)
    try:
        _register(ledger, site)
    except ConfigurationError as error:
        ledger.close()
        raise ConfigurationError(
            f"{folder / SITE}: {error}; `securefl site budget --site {folder} --by NAME` changes it"
        ) from None
    return ledger


def change_budget(folder: Path, by: str) -> None:
    """Give the data set the budget and purpose of site.toml, in the name of a person."""
    with Ledger(folder / LEDGER) as ledger:
        _register(ledger, config.load_site(folder / SITE), by)


def _register(ledger: Ledger, site: config.Site, by: str = "") -> None:
    budget = site.budget
    ledger.register(
        site.data.id,
        unit=budget.unit,
        epsilon=budget.epsilon,
        delta=budget.delta,
        purpose=site.data.purpose,
        by=by,
    )
