"""Small experiments, tables and clients that the tests of the framework share."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from protocols.catalogue import PROTOCOLS
from protocols.identity import Identity
from protocols.keystream import Keystream, Seed
from protocols.messages import Begin
from protocols.rounds import make_identities
from securefl import agreement, config, models, simulation
from securefl.client import Client
from securefl.config import Experiment
from securefl.data import Table
from securefl.messages import Answer, Refusal, Request, parse_reply
from securefl.privacy.ledger import Holding
from securefl.replicas import Replica, Standing
from securefl.state import GlobalState

# Shared machines stall: how long an example takes is no promise of this package.
settings.register_profile("securefl", deadline=None, derandomize=True)
settings.load_profile("securefl")
torch.set_num_threads(1)

SESSION = b"session of tests"


def stream(name: str) -> Keystream:
    """Bytes that look random and are the same in every run of the tests."""
    return Keystream(Seed(hashlib.sha256(name.encode()).digest()), "tests")


@pytest.fixture(scope="session")
def randomness() -> Callable[[str], Callable[[int], bytes]]:
    """`randomness(name)`: a source of bytes, the same for the same name."""
    return lambda name: stream(name).bytes


SMALL = """
name = "small"
rounds = 4
[data]
default_range = [0.0, 100.0]
[sites]
count = 3
[model]
name = "logistic"
[protocol]
name = "plain"
"""


@pytest.fixture(scope="session")
def small() -> Callable[..., Experiment]:
    """`small("key=value", ...)`: three sites, a logistic model, four quick rounds, no privacy."""
    return lambda *overrides: config.parse(SMALL, overrides, origin="small")


PRIVATE = (
    "privacy.epsilon=5.0",
    "privacy.delta=1e-3",
    "privacy.rate=0.2",
    "privacy.expected_batch=16",
)


@pytest.fixture(scope="session")
def private() -> tuple[str, ...]:
    """Overrides that give an experiment a privacy plan."""
    return PRIVATE


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """A CSV file with y = 2x + 1, sixty rows, and a column that divides them among three sites."""
    x = np.linspace(-1, 1, 60)
    rows = [f"{v:.6f},{2 * v + 1:.6f},{'abc'[i % 3]}" for i, v in enumerate(x)]
    path = tmp_path / "line.csv"
    path.write_text("\n".join(["x,y,place", *rows]) + "\n")
    return path


class Bench:
    """Real clients of one experiment, and the requests an honest server would send them."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        holding: Callable[[str], Holding | None] = lambda _: None,
    ) -> None:
        self.experiment, self.folder, self.holding = experiment, folder, holding
        consortium = simulation.assemble(experiment)
        self.tables: Mapping[str, Table] = consortium.sites
        self.identities: Mapping[str, Identity] = make_identities(
            self.tables, stream("identities").bytes
        )
        self.roster = next(iter(self.identities.values())).roster
        self.encoding = agreement.encoding(experiment, len(self.roster), consortium.plan)
        self.clients = {name: self.client(name) for name in self.tables}
        table = next(iter(self.tables.values()))
        module = models.build(experiment.model, table.shape, table.outputs, experiment.seed)
        weights = models.flatten(module)
        self.model = GlobalState(0, weights, np.ones(len(weights), np.bool_))
        self.state: GlobalState | Standing = self.model
        if experiment.protocol.reveal == "sites":
            self.state = Replica.start(self.model).standing(experiment.digest())

    def client(self, name: str) -> Client:
        """A client of that site, as after a restart: with what its folder holds."""
        return simulation.client(
            self.experiment,
            self.tables[name],
            self.identities[name],
            SESSION,
            self.folder / name,
            self.holding(name),
        )

    def begin(self, number: int, state: GlobalState | Standing | None = None) -> Begin:
        """The honest beginning of that round."""
        binding = agreement.binding(self.experiment, state or self.state, self.encoding)
        agreed = agreement.thresholds(self.experiment, len(self.roster))
        cohort = tuple(self.roster)
        m, t, k = agreed.minimum, agreed.threshold, agreed.degree
        return Begin(SESSION, number, cohort, m, t, binding, k)

    def request(self, number: int, phase: str, body: bytes, model: bytes = b"") -> bytes:
        return Request(SESSION, number, phase, body, model).to_bytes()

    def first(self, number: int, state: GlobalState | Standing | None = None) -> bytes:
        """The first request of round `number`: the beginning and the model."""
        phase = PROTOCOLS[self.experiment.protocol.name].phases[0]
        model = (state or self.state).to_message()
        return self.request(number, phase, self.begin(number, state).to_bytes(), model)

    def ask(self, site: str, request: bytes) -> Answer | Refusal:
        return parse_reply(self.clients[site].answer(request))

    def drive(
        self, number: int, until: str, seen: Callable[[str, str, bytes], None] | None = None
    ) -> dict[str, bytes]:
        """Play the honest server up to phase `until`; the requests of that phase, not yet sent.

        `seen(site, phase, request)` is called with every request that was answered.
        """
        protocol = PROTOCOLS[self.experiment.protocol.name]
        parts = (self.begin(number), self.roster, self.encoding, self.state.surviving)
        blind = self.experiment.protocol.reveal == "sites" and protocol.blind_server
        steps = blind(*parts) if blind else protocol.server(*parts, None)
        asked: Any = next(steps)
        model = self.state.to_message()
        while True:
            requests = {
                site: self.request(number, asked.phase, body, model)
                for site, body in asked.messages.items()
            }
            if asked.phase == until:
                return requests
            replies = {}
            for site, request in requests.items():
                reply = self.ask(site, request)
                assert isinstance(reply, Answer), reply
                replies[site] = reply.body
                if seen:
                    seen(site, asked.phase, request)
            asked = steps.send(replies)
            model = b""


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """`bench(experiment)`: its clients on a bench, their stores under tmp_path/sites."""
    return lambda experiment, *more: Bench(experiment, tmp_path / "sites", *more)


PLACES = {"east": 60, "north": 90, "south": 45}
CLINIC = """
version = 1
name = "clinic"
label = "outcome"
person = "patient"
missing = ["?"]
[columns.patient]
type = "text"
[columns.part]
type = "text"
optional = true
[columns.age]
type = "number"
range = [0, 100]
unit = "years"
[columns.bmi]
type = "number"
range = [10, 60]
missing = ["-9"]
[columns.marker]
type = "number"
range = [-5, 5]
optional = true
[columns.smoker]
type = "category"
categories = { never = ["0"], former = ["1"], yes = ["2", "3"] }
[columns.outcome]
type = "category"
categories = { no = ["0"], yes = ["1"] }
"""
ON_FILES = """
name = "clinic"
rounds = 3
[data]
source = "table"
path = "{path}"
schema = "{schema}"
test_fraction = 0.3
[sites]
partition = "file"
[model]
name = "logistic"
[training]
learning_rate = 0.5
[protocol]
name = "plain"
"""

Row = dict[str, str]
Rows = list[Row]


def drawn_rows() -> dict[str, Rows]:
    """Every site's rows: one to three a patient, with gaps; only north knows the marker."""
    rng = np.random.default_rng(0)
    found: dict[str, Rows] = {}
    for site, count in PLACES.items():
        rows: Rows = []
        while len(rows) < count:
            patient, ill = f"{site}-{len(rows)}", int(rng.integers(2))
            for _ in range(min(int(rng.integers(1, 4)), count - len(rows))):
                row = {
                    "ward": "A",  # of which the schema knows nothing
                    "patient": patient,
                    "part": "test" if len(patient) % 2 else "train",
                    "age": f"{np.clip(rng.normal(50 + 15 * ill, 10), 0, 100):.1f}",
                    "bmi": f"{np.clip(rng.normal(25 + 4 * ill, 3), 10, 60):.2f}",
                    "smoker": str(rng.integers(4)),
                    "outcome": str(ill),
                }
                if site == "north":
                    row["marker"] = f"{np.clip(rng.normal(ill, 1), -5, 5):.3f}"
                gaps = {"age": "?", "bmi": "-9", "smoker": ""}
                row |= {name: code for name, code in gaps.items() if rng.random() < 0.1}
                rows.append(row)
        found[site] = rows
    return found


class Clinic:
    """The files of three sites in a folder, and experiments on them."""

    def __init__(self, folder: Path, rows: Mapping[str, Rows], schema: str) -> None:
        self.folder, self.rows = folder, rows
        folder.mkdir(parents=True)
        self.schema = folder / "clinic.schema.toml"
        self.schema.write_text(schema)
        for site, held in rows.items():
            with self.file(site).open("w", newline="") as target:
                writer = csv.DictWriter(target, list(held[0]))
                writer.writeheader()
                writer.writerows(held)

    def file(self, site: str) -> Path:
        return self.folder / f"{site}.csv"

    def experiment(self, *overrides: str) -> Experiment:
        written = self.folder / "clinic.toml"
        written.write_text(ON_FILES.format(path=self.folder / "*.csv", schema=self.schema))
        return config.load(written, overrides)


@pytest.fixture
def drawn() -> dict[str, Rows]:
    """The rows of three sites' files, for a test to change."""
    return drawn_rows()


@pytest.fixture
def clinic(tmp_path: Path) -> Callable[..., Clinic]:
    """`clinic(rows, (old, new))`: files with those rows, and a change of their schema."""
    count = iter(range(100))

    def made(rows: Mapping[str, Rows] | None = None, changes: tuple[str, str] = ("", "")) -> Clinic:
        schema = CLINIC.replace(*changes)
        return Clinic(tmp_path / f"clinic-{next(count)}", rows or drawn_rows(), schema)

    return made
