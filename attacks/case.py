"""One recorded run, and everything that whoever audits it holds: the truth included.

In a simulation that is every site's records. In a deployment each site audits with its own
evidence: its records, and what it recorded of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from attacks.attack import Profile, UnavailableError
from attacks.view import (
    Array,
    ColludingView,
    Contributed,
    NetworkView,
    OpenedView,
    Passed,
    Public,
    Recording,
    ReleasedModelView,
    ServerView,
    answer,
)
from protocols.errors import ProtocolError
from protocols.identity import Roster
from securefl import agreement, models, simulation
from securefl.canaries import read_coins
from securefl.config import ConfigurationError, Experiment, load_site
from securefl.data import Records, Table, held_out
from securefl.preprocessing import Fitted
from securefl.privacy.ledger import SignedHead
from securefl.records import PREPROCESSING, SITES, History, Summary, read_history
from securefl.site_folder import SITE, private
from securefl.store import ServerStore, SiteStore
from securefl.transcript import TRANSCRIPT, Crossing, crossings, recording, rosters


@final
@dataclass(frozen=True)
class Case:
    """A run in `folder`, as one who audits it has it.

    own: the folder of the site that audits a deployment (its site.toml, key and records); None in a
    simulation.
    """

    folder: Path
    history: History
    summary: Summary
    profile: Profile = Profile.quick
    own: Path | None = None

    @classmethod
    def open(cls, folder: Path, profile: Profile = Profile.quick, own: Path | None = None) -> Case:
        """The finished run in `folder`; ConfigurationError where it is none."""
        history = read_history(folder)
        if history.summary is None:
            raise ConfigurationError(
                f"{folder} is unfinished: finish it with `securefl run --resume {folder}`"
            )
        return cls(folder, history, history.summary, profile, own)

    @property
    def experiment(self) -> Experiment:
        """What was run."""
        return self.history.experiment

    @property
    def sites(self) -> tuple[str, ...]:
        """Everybody who took part."""
        return self.summary.sites

    # --- views ---

    @cached_property
    def public(self) -> Public:
        """What everybody knows."""
        data = self.experiment.data
        if data.path is not None:  # where the records lie is nobody's business
            data = data.model_copy(update={"path": Path("withheld")})
        told = self.experiment.model_copy(update={"data": data})
        features = self._consortium.features
        return Public(told.dump(), self.sites, features.shape, features.outputs, features.task)

    def released(self) -> ReleasedModelView:
        """Whoever gets the model."""
        tensors = load_file(self.folder / "model.safetensors")
        layout = models.layout(self.public.module())
        flat = np.concatenate([tensors[name].reshape(-1) for name in layout.names])
        return ReleasedModelView(self.public, Array.of(flat.astype(np.float32)))

    def server(self) -> ServerView:
        """The server, of whose messages those of consenting sites were recorded."""
        return ServerView(self.public, self._keys, self.crossings)

    def recording(self, site: str) -> Recording:
        """What `site` recorded of itself; UnavailableError where it did not, or it is not here."""
        held = recording(self._private(site))
        if not held.drawn and not held.encoded:
            if site not in self.experiment.transcript.own:
                why = "did not record itself: say [transcript] own = [...] in the experiment"
            elif self.own is None:
                why = "recorded itself, and that is gone: it was deleted"
            else:
                why = f"recorded itself, and that is not in {self.own}: it is another's, or deleted"
            raise UnavailableError(f"{site} {why}")
        contributed = tuple(
            Contributed(item.number, item.update, Array.of(np.frombuffer(item.slots, "<u8")))
            for item in held.encoded
        )
        return Recording(site, held.drawn, contributed)

    def colluding(self, sites: Sequence[str], with_server: bool) -> ColludingView:
        """`sites`, which pool what they recorded of themselves, with the server or without it."""
        recordings = tuple(self.recording(site) for site in sites)
        seen = tuple(item for item in self.crossings if with_server or item.site in sites)
        missing = sorted(set(sites) - {item.site for item in seen})
        if missing:
            raise UnavailableError(
                f"the messages of {missing[0]} were not recorded: name it in [transcript] consent"
            )
        return ColludingView(self.public, self._keys, seen, recordings, with_server)

    def opened(self, *sites: str) -> OpenedView:
        """Whoever was handed every vector that each of `sites` contributed, and the models."""
        held = {site: self.recording(site).contributed for site in sites}
        models_ = {
            item.update: item.model
            for site in sites
            for item in recording(self._private(site)).encoded
        }
        return OpenedView(self.public, held, models_)

    def network(self) -> NetworkView:
        """Whoever taps the wires."""
        passed = tuple(
            Passed(item.number, item.phase, item.site, item.direction, len(item.data))
            for item in self.crossings
        )
        return NetworkView(self.public, passed)

    @cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """What crossed the wires of the sites that consented; UnavailableError without any."""
        found = crossings(self.folder / TRANSCRIPT)
        if not found and self.experiment.transcript.consent:
            raise UnavailableError("the transcript that was recorded is gone: it was deleted")
        if not found:
            raise UnavailableError(
                "no transcript was recorded: say [transcript] consent = [...] in the experiment"
            )
        return found

    @cached_property
    def _keys(self) -> tuple[Mapping[str, bytes], ...]:
        return tuple(dict(roster.keys) for roster in rosters(self.folder / TRANSCRIPT))

    # --- records: the truth ---

    def tables(self, site: str) -> tuple[Table, Table]:
        """The records that `site` trained on, and some that nobody did, as the model reads them.

        UnavailableError where they are not at hand.
        """
        held = self._records.get(site)
        if held is None:
            raise UnavailableError(
                f"the records of {site} are not at hand: the site itself audits with its own, "
                "--site FOLDER"
            )
        if isinstance(held, Table):
            assert self._consortium.test is not None  # noqa: S101 - tables come with one
            return held, self._consortium.test
        train, test = held_out(held, self.experiment)
        preprocessor = agreement.preprocessor(self.experiment, len(self.sites))
        assert preprocessor is not None  # noqa: S101 - frames come with a schema
        return preprocessor.apply(self._fitted, train), preprocessor.apply(self._fitted, test)

    def site_folders(self) -> tuple[Path, ...]:
        """The sites' own folders (site.toml, ledger) that are at hand."""
        if self.own is not None:
            return (self.own,)
        told = self.folder / SITES
        if not told.exists():
            return ()
        folders = Path(told.read_text(encoding="utf-8"))
        return tuple(folders / site for site in self.sites if (folders / site / SITE).exists())

    def private_folders(self) -> Mapping[str, Path]:
        """Where each site keeps its secrets of the run, if it keeps any and they are here."""
        found = {site: self._private(site) for site in self.sites}
        return {site: folder for site, folder in found.items() if folder.exists()}

    def ledger_heads(self) -> dict[str, str]:
        """The newest head of its ledger that each site signed in an answer, hexadecimal.

        One whose signature is not by the key in the transcript's rosters is left out.
        """
        heads = {}
        told = [Roster(dict(keys)) for keys in self._keys]
        try:
            seen = self.crossings
        except UnavailableError:
            return {}
        for item in seen:
            if item.direction != "up" or item.number == 0:
                continue
            said = answer(item.data)
            head = said.head if said is not None else None
            if head is not None and any(_signed(head, item.site, x) for x in told):
                heads[item.site] = head.hash.hex()
        return heads

    def coins(self, site: str) -> NDArray[np.bool_]:
        """The coins that `site` tossed for its canaries, bool[N]; UnavailableError without any."""
        try:
            return read_coins(self._private(site))
        except ConfigurationError as error:
            raise UnavailableError(str(error)) from None

    def _private(self, site: str) -> Path:
        """The folder of what `site` keeps to itself in this run."""
        run = ServerStore(self.folder).name
        if self.own is not None:
            return private(self.own, run, site)
        told = self.folder / SITES
        if told.exists():
            return private(Path(told.read_text(encoding="utf-8")) / site, run, site)
        return SiteStore(self.folder / "sites" / site).private

    @property
    def auditing(self) -> tuple[str, ...]:
        """The sites whose records are at hand."""
        return tuple(site for site, held in self._records.items() if held is not None)

    @cached_property
    def _consortium(self) -> simulation.Consortium:
        return simulation.assemble(self.experiment)

    @cached_property
    def _records(self) -> Mapping[str, Records | None]:
        if self.own is not None:
            name = load_site(self.own / SITE).name
            if name not in self.sites:
                raise ConfigurationError(f"{self.own} is of {name}, which took no part in this run")
            return {name: simulation.own_records(self.own, self.experiment)}
        told = self.folder / SITES
        if not told.exists():
            return self._consortium.sites
        folders = Path(told.read_text(encoding="utf-8"))
        return {
            site: simulation.own_records(folders / site, self.experiment) if held is None else held
            for site, held in self._consortium.sites.items()
        }

    @cached_property
    def _fitted(self) -> Fitted:
        path = self.folder / PREPROCESSING
        if not path.exists():  # made of declared values alone
            made = agreement.preprocessor(self.experiment, len(self.sites))
            assert made is not None  # noqa: S101 - asked only where there is one
            return made.start()
        told = msgspec.json.decode(path.read_bytes(), type=_Told)
        return told.values


def _signed(head: SignedHead, site: str, roster: Roster) -> bool:
    try:
        head.check(site, roster)
    except ProtocolError:
        return False
    return True


class _Told(msgspec.Struct, frozen=True):
    """Of a run's preprocessing.json, what this reads."""

    values: Fitted
