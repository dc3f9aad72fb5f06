"""One site as a server meets it: a gate that answers proposals, and only then requests.

A site is a folder: site.toml (what it permits), site.key (who it is, 32 secret bytes), consents/
(what a person agreed to) and accepted/ (the runs it takes part in). A proposal is checked against
all of them before a record is read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal, final

import msgspec
from msgspec import Meta

from protocols.errors import MalformedMessageError
from protocols.identity import Identity, Roster, digest
from securefl import agreement, config, models, store
from securefl.client import Client
from securefl.config import ConfigurationError, Experiment
from securefl.data import Records, Table
from securefl.messages import Answer, Proposal, Refusal, parse_asked, printable
from securefl.preprocessing import Preprocessor
from securefl.privacy import policy
from securefl.privacy.policy import Asked, PolicyError
from securefl.site_folder import SITE, read_key
from securefl.store import CorruptStoreError

Load = Callable[[Experiment], Records]
"""The site's own records for an experiment; called only after everything else was checked."""

MakeClient = Callable[[Experiment, Identity, bytes, bytes, Records], Client]
"""(experiment, identity, session, run, records) -> the client that answers requests."""


class _UnfitError(RuntimeError):
    """What a site holds does not fit a run. What it says is for the site's own people."""


_OURS = (_UnfitError, CorruptStoreError)


class _Consent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A person's consent to one run. run: the one it was used for, or empty."""

    version: Literal[1]
    digest: str
    by: Annotated[str, Meta(min_length=1)]
    at: str
    sentences: tuple[str, ...]
    run: str = ""


class _Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run that this site takes part in: what was asked, and who else does."""

    version: Literal[1]
    asked: str
    roster: str


@final
@dataclass(frozen=True, slots=True)
class Consents:
    """What people at a site agreed to, a file each, and the runs that use it.

    A consent is for one run: asked again for the same experiment, a person agrees again, and the
    run before is over. Whoever deletes the file withdraws it.
    """

    folder: Path

    def agree(self, asked: Asked, by: str) -> Path:
        """Write down that `by` agrees to one run of what is asked; the file."""
        if not by.strip() or not by.isprintable():
            raise ConfigurationError("say who agrees: a name, in one line")
        sentences = tuple(f"{about}: {text}" for about, text in asked.sentences())
        at = datetime.now(UTC).isoformat(timespec="seconds")
        consent = _Consent(1, asked.digest().hex(), by.strip(), at, sentences)
        self._write(consent)
        return self._path(asked.digest())

    def given(self, asked: Asked, run: bytes) -> bool:
        """Whether a person agreed to what is asked, and for no other run than this."""
        consent = self._read(asked)
        return consent is not None and consent.run in ("", run.hex())

    def use(self, asked: Asked, run: bytes) -> None:
        """Tie the consent to this run, for good."""
        consent = self._read(asked)
        if consent is not None and not consent.run:
            self._write(msgspec.structs.replace(consent, run=run.hex()))

    def _path(self, told: bytes) -> Path:
        return self.folder / "consents" / f"{told.hex()}.json"

    def _write(self, consent: _Consent) -> None:
        path = self._path(bytes.fromhex(consent.digest))
        store.write(path, msgspec.json.format(msgspec.json.encode(consent), indent=2))

    def _read(self, asked: Asked) -> _Consent | None:
        path = self._path(asked.digest())
        consent = store.read(path, _Consent)
        if consent is not None and consent.digest != asked.digest().hex():
            raise CorruptStoreError(f"{path} is a consent to something else: delete it")
        return consent


@final
class Gate:
    """What a server talks to at a site: `answer` takes a Proposal first, and then its Requests.

    today: the date at the site. tell: takes what only people at the site may read, such as why
    their records do not fit; a server is told no more than that.

    Formal guarantee: before a proposal that keeps every rule and has its consent, `load` is not
    called and no module that a proposal names is imported; before it is accepted, the gate writes
    nothing. The experiment and the roster of a session, and of a run in any session, never change.
    """

    def __init__(
        self,
        folder: Path,
        load: Load,
        make_client: MakeClient,
        *,
        today: Callable[[], date] = date.today,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder = folder
        self._site = config.load_site(folder / SITE)
        self._key = read_key(folder)
        self._load, self._make_client = load, make_client
        self._today, self._tell = today, tell
        self._consents = Consents(folder)
        self._turn = threading.Lock()
        self._sessions: dict[bytes, bytes] = {}  # the proposal that each was accepted with
        self._current: tuple[bytes, Client] | None = None

    @property
    def name(self) -> str:
        """The site's name."""
        return self._site.name

    @property
    def public_key(self) -> bytes:
        """The key that others pin, 32 bytes."""
        return self._key.public

    def close(self) -> None:
        """Let go of the client, if there is one."""
        with self._turn:
            self._leave()

    def answer(self, data: bytes) -> bytes:
        """The reply to a proposal or a request, or a Refusal that says why there is none.

        The Answer to an accepted proposal holds `Experiment.digest()`.
        """
        with self._turn:
            try:
                asked = parse_asked(data)
            except MalformedMessageError as error:
                return Refusal("request", printable(str(error))).to_bytes()
            if isinstance(asked, Proposal):
                try:
                    return Answer(self._accept(asked, data)).to_bytes()
                except (ValueError, ArithmeticError, RecursionError, *_OURS) as error:
                    return Refusal("policy", self._reason(error)).to_bytes()
            if self._current is None or asked.session != self._current[0]:
                reason = (
                    f"{self.name} has accepted no proposal in this session: propose a run first"
                )
                return Refusal("policy", reason).to_bytes()
            return self._current[1].answer(data)

    def _reason(self, error: Exception) -> str:
        """What the server is told: all that came from public values, and nothing of a file."""
        if not isinstance(error, _OURS):
            return printable(str(error))
        self._tell(printable(f"{self.name} cannot take part: {error}"))
        return f"{self.name} cannot take part with what it holds: ask its people why"

    def _accept(self, proposal: Proposal, data: bytes) -> bytes:
        """The experiment's digest, once everything is checked and the client stands ready."""
        same = self._sessions.get(proposal.session)
        if same is not None and same != hashlib.sha256(data).digest():
            raise ConfigurationError(
                f"{self.name} accepted another proposal in this session, and it cannot change"
            )
        experiment = config.parse(proposal.experiment, origin="the proposed experiment")
        if same is not None and self._current and self._current[0] == proposal.session:
            return experiment.digest()
        self._site = self._permits()
        identity = Identity(self.name, self._key, self._roster(experiment, proposal))
        sites = len(identity.roster)
        policy.check(self._site, experiment, sites, proposal.parameters, self._today())
        asked = policy.asked(self._site, experiment, sites, proposal.parameters)
        accepted = _accepted(asked, identity.roster)
        self._check_run(proposal, accepted)
        self._check_consent(asked, proposal.run)
        own = experiment.data.model_copy(update={"path": self._site.data.path})
        if experiment.data.path is not None:
            experiment = experiment.model_copy(update={"data": own})
        client = self._client(experiment, identity, proposal)
        try:
            self._consents.use(asked, proposal.run)
            store.write(self._path(proposal.run), msgspec.json.encode(accepted))
        except OSError as error:
            client.close()
            raise _UnfitError(f"{self._folder} cannot be written: {error.strerror}") from None
        self._sessions[proposal.session] = hashlib.sha256(data).digest()
        self._current = proposal.session, client
        return experiment.digest()

    def _permits(self) -> config.Site:
        """What site.toml permits now: its people change it while this process goes on."""
        try:
            site = config.load_site(self._folder / SITE)
        except ConfigurationError as error:
            raise _UnfitError(str(error)) from None
        if site.name != self.name:
            raise _UnfitError(f"{self._folder / SITE} is of {site.name} now: put it back")
        return site

    def _roster(self, experiment: Experiment, proposal: Proposal) -> Roster:
        """The roster, where it pins this site's own key and contradicts nothing that is known."""
        keys = {pinned.site: pinned.key for pinned in proposal.roster}
        named, count = experiment.sites.names, experiment.sites.count
        if named is not None and sorted(named) != sorted(keys):
            raise ConfigurationError("the roster is not of the sites in sites.names")
        if count is not None and count != len(keys):
            raise ConfigurationError(
                f"the roster is of {len(keys)} sites, but sites.count = {count}"
            )
        if keys.get(self.name) != self._key.public:
            raise self._refused("site.key", "another key for this site", self._key.public.hex())
        for site, key in keys.items():
            pinned = self._site.consortium.get(site)
            if pinned is None and site != self.name and not self._site.policy.unknown_sites:
                known = ", ".join(sorted(self._site.consortium)) or "no other site"
                mend = f"{known}, until site.toml has the public key of {site} under [consortium]"
                raise self._refused("policy.unknown_sites", f"a run with {site}", mend)
            if pinned is not None and pinned != key.hex():
                raise self._refused(f"consortium.{site}", f"the key {key.hex()}", pinned)
        return Roster(keys)

    def _refused(self, rule: str, proposed: str, permitted: str) -> PolicyError:
        return PolicyError(self.name, rule, proposed, permitted)

    def _check_run(self, proposal: Proposal, accepted: _Accepted) -> None:
        before = store.read(self._path(proposal.run), _Accepted)
        if before is not None and before != accepted:
            raise ConfigurationError(
                f"{self.name} takes part in this run with another experiment or other sites, and "
                "these cannot change: start a new run"
            )

    def _check_consent(self, asked: Asked, run: bytes) -> None:
        if self._site.policy.consent == "standing" or self._consents.given(asked, run):
            return
        raise self._refused(
            "policy.consent",
            "a run that nobody at this site agreed to",
            "what a person there agrees to beforehand: securefl site agree "
            f"(--sites {asked.sites} --parameters {asked.parameters})",
        )

    def _client(self, experiment: Experiment, identity: Identity, proposal: Proposal) -> Client:
        """The client, on the records. What is wrong with them is told to this site only."""
        try:
            records = self._load(experiment)
            features: Table | Preprocessor | None = None
            features = agreement.preprocessor(experiment, len(identity.roster))
            if features is None and isinstance(records, Table):
                features = records
            if features is None:
                raise ConfigurationError("records in columns need data.schema")
            shape, outputs = features.shape, features.outputs
            module = models.build(experiment.model, shape, outputs, experiment.seed)
            if models.layout(module).size != proposal.parameters:
                raise ConfigurationError(
                    f"the model has {models.layout(module).size} parameters here, and the proposal "
                    f"says {proposal.parameters}"
                )
            self._leave()  # it may be this very run's, which only one client may charge
            return self._make_client(experiment, identity, proposal.session, proposal.run, records)
        except Exception as error:
            # Whatever it says may quote a record, and foreign code may have raised it.
            raise _UnfitError(str(error)) from error

    def _leave(self) -> None:
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def _path(self, run: bytes) -> Path:
        return self._folder / "accepted" / f"{run.hex()}.json"


def _accepted(asked: Asked, roster: Roster) -> _Accepted:
    pinned = (part for site, key in roster.keys.items() for part in (site.encode(), key))
    return _Accepted(1, asked.digest().hex(), digest("roster", *pinned).hex())
