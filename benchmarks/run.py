"""Measure securefl beside TenSEAL's ckks_vector and Flower's SecAgg+, and write the results.

    python benchmarks/run.py [GROUP ...]

Writes results.json (one row a figure), results.md and results.svg beside this file; with groups
(functions of GROUPS) only their rows are measured anew. Times are medians over repetitions in which
the two sides take turns, so that their ratio holds on a machine whose speed drifts; the spread is
from the fastest to the slowest repetition. TenSEAL runs in the same process, Flower in one of its
own (peers.py).
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import tenseal
import torch
from matplotlib.figure import Figure
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

import protocols.ckks
from protocols import bfv_sum, ckks_sum, masks
from protocols.bfv import Parameters, SecretKey, Sum, largest_plain_bits
from protocols.catalogue import PROTOCOLS
from protocols.encoding import FixedPoint
from protocols.graph import thresholds
from protocols.keystream import Keystream, Seed
from protocols.messages import Upload
from protocols.noise import DiscreteGaussian
from protocols.rounds import Party, Replies, ServerSide
from securefl import models
from securefl.config import Encryption, Experiment, Model, Privacy, SitePrivacy, Training
from securefl.data import Table
from securefl.privacy.accounting import PoissonGaussian, Repeated
from securefl.privacy.ledger import Account, Charged, Ledger
from securefl.privacy.plan import Cohort, Plan, RecordDistributed, RecordLocal
from securefl.privacy.preview import preview, upload_bytes
from securefl.privacy.training import Trainer

HERE = Path(__file__).parent
PARAMETERS = 1_000_000
SITES = 16
REPETITIONS = 9


@dataclass(frozen=True)
class Row:
    """One figure: what it is, how it varied, what was promised, and the peer beside it."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    floor: str | None = None
    peer: float | None = None
    ratio: float | None = None
    beside: str = "TenSEAL"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def against(
    name: str, floor: str | None, ours: list[float], theirs: list[float], beside: str = "TenSEAL"
) -> Row:
    """A row of our time beside theirs, if there is any; the median of pairwise ratios."""
    middle, ends = statistics.median(ours), (min(ours), max(ours)) if len(ours) > 1 else None
    if not theirs:
        return Row(name, middle, "s", ends, floor, None, None, beside)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Row(name, middle, "s", ends, floor, statistics.median(theirs), ratio, beside)


def encryption() -> Iterator[Row]:
    """One million parameters at 16 sites and 16 bits under bfv, beside ckks_vector."""
    encoding = encoding_for("bfv", SITES)
    parameters = Parameters(encoding.plain_bits, SITES)
    key = partial(SecretKey, Seed(bytes(64)), parameters)
    empty = partial(Sum, encoding.slots(PARAMETERS), parameters)
    promised = ("6x the peer", "4x the peer", "<= 3.5")
    yield from beside_ckks_vector("", key, empty, encoding, promised)


def ckks() -> Iterator[Row]:
    """The same under ckks, flooded and exact: what its users pay for it."""
    encoding = encoding_for("ckks", SITES)
    parameters = ckks_sum.parameters(encoding, PARAMETERS)
    key = partial(protocols.ckks.SecretKey, Seed(bytes(64)), parameters)
    empty = partial(protocols.ckks.Sum, parameters)
    yield from beside_ckks_vector("ckks: ", key, empty, encoding)


def beside_ckks_vector(
    prefix: str,
    key: Callable[[], Any],
    empty: Callable[[], Any],
    encoding: FixedPoint,
    promised: tuple[str | None, str | None, str | None] = (None, None, None),
) -> Iterator[Row]:
    """Keys that may open one sum, and sums, beside ckks_vector 8192 [60, 40, 40], in turns."""
    vector = np.random.default_rng(0).normal(size=PARAMETERS) * 0.1
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40])
    context.global_scale = 2**40
    encryptor = key()

    def our_upload() -> bytes:
        slots = encoding.encode(vector, 1, Keystream(Seed(os.urandom(32)), "rounding"))
        return Upload("site-1", bytes(32), bytes(encryptor.encrypt(slots)), bytes(64)).to_bytes()

    def their_upload() -> list[bytes]:
        parts = range(0, PARAMETERS, 4096)
        return [tenseal.ckks_vector(context, vector[i : i + 4096]).serialize() for i in parts]

    def our_sum(total: Any, upload: bytes) -> None:
        total.add(Upload.from_bytes(upload).payload)

    def their_sum(total: list[Any], upload: list[bytes]) -> list[Any]:
        parsed = [tenseal.ckks_vector_from(context, data) for data in upload]
        return [a + b for a, b in zip(total, parsed, strict=True)]

    our_sum(empty(), our_upload())
    their_total = [tenseal.ckks_vector_from(context, data) for data in their_upload()]
    ours: dict[str, list[float]] = {"up": [], "add": [], "open": []}
    theirs: dict[str, list[float]] = {"up": [], "add": [], "open": []}
    for _ in range(REPETITIONS):
        seconds, upload = timed(our_upload)
        ours["up"].append(seconds)
        seconds, their = timed(their_upload)
        theirs["up"].append(seconds)
        total = empty()  # a sum holds no more than its cohort
        ours["add"].append(timed(lambda t=total, u=upload: our_sum(t, u))[0])
        seconds, their_total = timed(lambda t=their_total, u=their: their_sum(t, u))
        theirs["add"].append(seconds)
    sums = empty()
    for _ in range(SITES):
        our_sum(sums, our_upload())
    wire, count = sums.to_bytes(), encoding.slots(PARAMETERS)
    for _ in range(3):
        opener = key()
        seconds, slots = timed(lambda k=opener: k.open(wire, count, SITES))
        ours["open"].append(seconds)
        theirs["open"].append(timed(lambda t=their_total: [c.decrypt() for c in t])[0])
    names = tuple(str(i) for i in range(SITES))
    encoding.decode(slots, PARAMETERS, names)

    upload_name = f"{prefix}encode + encrypt + serialise, site"
    yield against(upload_name, promised[0], ours["up"], theirs["up"])
    yield against(
        f"{prefix}parse + add one upload, server", promised[1], ours["add"], theirs["add"]
    )
    yield against(f"{prefix}open the sum of {SITES}, once", None, ours["open"], theirs["open"])
    both = {
        name: SITES * statistics.median(t["add"]) + statistics.median(t["open"])
        for name, t in (("ours", ours), ("theirs", theirs))
    }
    yield Row(
        f"{prefix}add {SITES} uploads and open the sum",
        both["ours"],
        "s",
        None,
        None,
        both["theirs"],
        both["theirs"] / both["ours"],
    )
    size, peer = len(upload) / PARAMETERS, sum(map(len, their)) / PARAMETERS
    unit = "bytes a parameter"
    yield Row(f"{prefix}upload", size, unit, None, promised[2], peer, peer / size)
    down = len(wire) / PARAMETERS
    yield Row(f"{prefix}sum to open", down, unit, None, None, peer, peer / down)


def pruned() -> Iterator[Row]:
    """The upload of one million parameters of which nine tenths are pruned."""
    encoding = FixedPoint(16, 1.0, SITES, largest_plain_bits(SITES))
    key = SecretKey(Seed(bytes(64)), Parameters(encoding.plain_bits, SITES))
    sizes = []
    for count in (PARAMETERS, PARAMETERS // 10):
        slots = encoding.encode(np.zeros(count), 1, Keystream(Seed(bytes(32)), "rounding"))
        upload = Upload("site-1", bytes(32), bytes(key.encrypt(slots)), bytes(64))
        sizes.append(len(upload.to_bytes()))
    yield Row("upload at sparsity 0.9, of dense", sizes[1] / sizes[0], "", None, "<= 0.11")


def rounds() -> Iterator[Row]:
    """A whole bfv round, every party in this process, training left out."""
    for sites, count in ((5, 100_000), (SITES, 100_000), (5, PARAMETERS)):
        rng = np.random.default_rng(0)
        vectors = {f"site-{i:02}": rng.normal(size=count) * 0.1 for i in range(sites)}
        encoding = FixedPoint(16, 1.0, sites, bfv_sum.slot_bits(sites))
        times = [timed(lambda v=vectors, e=encoding: bfv_sum.run(v, e))[0] for _ in range(3)]
        name = f"bfv round, {sites} sites, {count:,} parameters, all parties in turn"
        yield Row(name, statistics.median(times), "s", (min(times), max(times)))


MANY = (200, 1000)  # the last at which every site shares with every other, and one beyond
MASKED_ROUNDS = (  # sites, vanished before they upload, parameters, repetitions
    (5, 0, PARAMETERS, 5),
    (5, 1, PARAMETERS, 5),
    (20, 0, PARAMETERS, 3),
    (20, 2, PARAMETERS, 3),
    # Flower's shares alone take four minutes here, whatever the vector.
    (100, 0, PARAMETERS, 1),
    (100, 10, PARAMETERS, 1),
)


@dataclass
class Played:
    """What one round of ours took: seconds by phase of a site's step, and of the server."""

    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    server: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    upload_bytes: int = 0
    seconds: float = 0.0


def encoding_for(protocol: str, sites: int, bits: int = 16) -> FixedPoint:
    """The encoding that an experiment with that protocol and so many sites uses."""
    return FixedPoint(bits, 1.0, sites, PROTOCOLS[protocol].slot_bits(sites))


def play(name: str, count: int, sites: int, gone: int) -> Played:
    """A whole round with every party in this process; `gone` sites vanish before they upload."""
    protocol, played = PROTOCOLS[name], Played()
    rng = np.random.default_rng(0)
    vectors = {f"site-{i:04}": rng.normal(size=count) * 0.1 for i in range(sites)}

    def step(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            seconds, result = timed(lambda: work(*arguments))
            played.steps[phase].append(seconds)
            if phase == "upload":
                played.upload_bytes = len(result[1])
            return result

        return measured

    def serving(*arguments: Any) -> ServerSide:
        side = protocol.server(*arguments)
        requests = next(side)
        while True:
            replies: Replies = yield requests
            started, phase = time.perf_counter(), requests.phase
            try:
                requests = side.send(replies)
            except StopIteration as done:
                return done.value
            finally:
                played.server[phase] += time.perf_counter() - started

    party = Party(vectors, encoding_for(name, sites), None, os.urandom, thresholds(sites, 1), 1)
    steps = {phase: step(phase, work) for phase, work in protocol.steps.items()}
    lost = dict.fromkeys(list(vectors)[1 : 1 + gone], "upload")
    played.seconds, _ = timed(lambda: party.play(steps, serving, lost))
    return played


def masking(name: str, count: int, sites: int) -> float:
    """Seconds in which one site agrees on its masks, draws them and adds them to its slots."""
    encoding = encoding_for(name, sites)
    slots = list(encoding.encode(np.zeros(count), 1, Keystream(Seed(bytes(32)), "rounding")))
    mine, context = masks.MaskKey.draw(os.urandom), bytes(32)
    peers_ = {f"site-{i:04}": masks.MaskKey.draw(os.urandom).public for i in range(1, sites)}

    def work() -> None:
        terms = [masks.own(mine.seed, "site-0000", context)]
        terms += [mine.pair("site-0000", peer, key, context) for peer, key in peers_.items()]
        for _ in masks.add(slots, terms, encoding.plain_bits):
            pass

    return timed(work)[0]


def masked_rounds() -> Iterator[Row]:
    """secagg and masked-bfv rounds without training, beside Flower's SecAgg+."""
    missing = ""
    for sites, gone, count, repetitions in MASKED_ROUNDS:
        ours: dict[str, list[tuple[float, Played]]] = {"secagg": [], "masked-bfv": []}
        theirs: list[Mapping[str, Any]] = []
        for _ in range(repetitions):
            for name, rounds_played in ours.items():
                masks_alone = statistics.median(masking(name, count, sites) for _ in range(7))
                rounds_played.append((masks_alone, play(name, count, sites, gone)))
            if not missing:
                try:
                    theirs.append(peers.flower_secaggplus(count, sites, gone))
                except peers.PeerMissingError as error:
                    missing = str(error)
                    print(missing, flush=True)
        at = f"{sites} sites, {gone} gone, {count:,} parameters"
        for name, rounds_played in ours.items():
            middle = [statistics.median(p.steps["upload"]) for _, p in rounds_played]
            yield against(
                f"{name}, {at}: mask one vector",
                "4x the peer",
                [seconds for seconds, _ in rounds_played],
                [statistics.median(their["masking"]) for their in theirs],
                "Flower",
            )
            yield against(
                f"{name}, {at}: a site's upload step, from float vector to message",
                None,
                middle,
                [statistics.median(their["upload"]) for their in theirs],
                "Flower",
            )
            size = rounds_played[0][1].upload_bytes / count
            peer = theirs[0]["upload_bytes"] / count if theirs else None
            ratio = peer / size if peer else None
            unit = "bytes a parameter"
            floor = "2.5x smaller"
            yield Row(f"{name}, {at}: upload", size, unit, None, floor, peer, ratio, "Flower")
            yield against(
                f"{name}, {at}: the server takes masks off",
                None,
                [p.server["unmask"] for _, p in rounds_played],
                [their["unmask"] for their in theirs],
                "Flower",
            )
            yield against(
                f"{name}, {at}: whole round, all parties in turn",
                None,
                [p.seconds for _, p in rounds_played],
                [their["round"] for their in theirs],
                "Flower",
            )


def many_sites() -> Iterator[Row]:
    """A round of many sites, each in a process of its own: all pairs, and neighbours only."""
    for sites in MANY:
        for name in ("secagg", "masked-bfv"):
            command = [sys.executable, str(HERE / "many.py"), name, str(sites), "10000"]
            told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            what = f"{name}, {sites:,} sites, 10,000 parameters: whole round, all parties"
            yield Row(what, told["seconds"], "s", beside="Flower")
            yield Row(f"{what}, peak memory", told["peak"] / 1e6, "MB", beside="Flower")


def upload_sizes() -> Iterator[Row]:
    """Bytes of an upload of a million parameters, by sites and bits."""
    for name, sites, bits, floor in (
        ("masked-bfv", 16, 16, "<= 3.0"),
        ("masked-bfv", 16, 8, "<= 2.0"),
        ("masked-bfv", 100, 12, None),
        ("secagg", 16, 16, "<= 2.63"),  # 5 % above (bits + log2 sites) / 8
        ("secagg", 100, 16, "<= 3.02"),
    ):
        encoding = encoding_for(name, sites, bits)
        slots = encoding.slots(PARAMETERS)
        size = -(-slots * encoding.plain_bits // 8)
        if name == "masked-bfv":
            size = Parameters(encoding.plain_bits, sites).upload_bytes(slots)
        value = size / PARAMETERS
        ratio = 8.0 / value
        what = f"{name}, {sites} sites, {bits} bits: upload"
        yield Row(what, value, "bytes a parameter", None, floor, 8.0, ratio, "Flower")


def noise() -> Iterator[Row]:
    """A million draws of integer noise, one thread, beside torch.normal."""
    stream = Keystream(Seed(os.urandom(32)), "noise")
    torch.set_num_threads(1)
    theirs = [timed(lambda: torch.normal(0.0, 1.0, (1 << 20,)))[0] for _ in range(REPETITIONS)]
    peer = (1 << 20) / 1e6 / statistics.median(theirs)
    for sigma, floor in ((2.0, ">= 20"), (50.0, ">= 20"), (2000.0, ">= 20"), (2.0**20, None)):
        gaussian = DiscreteGaussian(sigma)
        gaussian.sample(stream, 1)  # builds the table
        times = [timed(lambda g=gaussian: g.sample(stream, 1 << 20))[0] for _ in range(REPETITIONS)]
        rates = [(1 << 20) / 1e6 / seconds for seconds in times]
        middle, name = statistics.median(rates), f"discrete Gaussian, sigma {sigma:g}"
        spread, unit = (min(rates), max(rates)), "million a second"
        yield Row(name, middle, unit, spread, floor, peer, middle / peer, "torch.normal")


def dp_steps() -> Iterator[Row]:
    """One step on 256 images of 28 x 28 with the small CNN, as a multiple of it without privacy."""
    rng, size = np.random.default_rng(0), 256
    images = rng.random((size, 1, 28, 28), np.float32)
    names, digits = tuple(map(str, range(784))), tuple(map(str, range(10)))
    labels = rng.integers(0, 10, size)
    table = Table(images, labels, names, "classification", digits)
    module = models.build(Model(name="small-cnn"), table.shape, table.outputs, 0)
    loss = models.loss(Model(), "classification")
    weights = models.flatten(module)
    mask = np.ones(len(weights), np.bool_)

    def trainer(plan: Plan | None) -> Trainer:
        fresh = copy.deepcopy(module)
        return Trainer(fresh, loss, table, Training(batch_size=size), plan, torch.device("cpu"))

    privacy = Privacy(noise="local", epsilon=3.0, delta=1e-5, rate=1.0, expected_batch=size)
    cohort = Cohort(10, 10, 1)
    rivals = {
        "no privacy": trainer(None),
        "local noise": trainer(RecordLocal.calibrate(privacy, 400, 1, len(weights))),
        "distributed noise": trainer(
            RecordDistributed.calibrate(privacy, 400, cohort, len(weights))
        ),
    }
    opacus_model = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
    opacus = DPOptimizer(
        torch.optim.SGD(opacus_model.parameters(), lr=0.1),
        noise_multiplier=1.2,
        max_grad_norm=1.0,
        expected_batch_size=size,
        loss_reduction="sum",
    )
    features, target = torch.from_numpy(images), torch.from_numpy(labels)

    def their_step() -> None:
        opacus.zero_grad()
        loss(opacus_model(features), target).sum().backward()
        opacus.step()

    steps: dict[str, Callable[[], Any]] = {
        "no privacy": lambda: rivals["no privacy"].update(weights, mask, os.urandom),
        "local noise": lambda: rivals["local noise"].update(weights, mask, os.urandom),
        "distributed noise": lambda: rivals["distributed noise"].noised_sum(
            weights, mask, os.urandom
        ),
        "Opacus": their_step,
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(3 * REPETITIONS):
        for name, work in steps.items():
            times[name].append(timed(work)[0])
    plain = times.pop("no privacy")[REPETITIONS:]  # the first rounds warm up
    ratios = {
        name: sorted(a / b for a, b in zip(taken[REPETITIONS:], plain, strict=True))
        for name, taken in times.items()
    }
    theirs = statistics.median(ratios.pop("Opacus"))
    yield Row(
        "a step of 256 images, small-cnn, without privacy",
        statistics.median(plain),
        "s",
        beside="Opacus",
    )
    for name, each in ratios.items():
        value = statistics.median(each)
        what = f"the same step with {name}, times as long"
        spread = (each[0], each[-1])
        yield Row(what, value, "x", spread, "<= 2.5", theirs, theirs / value, "Opacus")


def headroom() -> Iterator[Row]:
    """Bytes of an upload whose fields hold the noise of all sites, beside 16 bits without it."""
    record = Privacy(
        noise="distributed", epsilon=3.0, delta=1e-5, clip=0.1, rate=0.034, expected_batch=2048
    )
    site = SitePrivacy(unit="site", epsilon=8.0, delta=1e-5)
    for what, privacy in (("26,010 parameters, record", record), ("26,010 parameters, site", site)):
        for sites in (5, 16, 100):
            for protocol in ("masked-bfv", "secagg"):
                encryption = Encryption(name=protocol)
                experiment = Experiment(rounds=400, privacy=privacy, protocol=encryption)
                noised = preview(experiment, sites, 26_010)
                encoding = encoding_for(protocol, sites)
                bare = upload_bytes(encryption, encoding, sites, 26_010) / 26_010
                name = f"{protocol}, {sites} sites, {what}: upload with noise in its fields"
                bits = f"{noised.field_bits} bits a field"
                yield Row(
                    f"{name}, {bits}",
                    noised.bytes_up,
                    "bytes a parameter",
                    None,
                    None,
                    bare,
                    bare / noised.bytes_up,
                    "16 bits without noise",
                )


def ledger() -> Iterator[Row]:
    """A site's ledger of 10,000 entries, of twenty runs on one data set; and one more entry."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        with Ledger(path) as book:
            book.register("cohort", unit="record", epsilon=30.0, delta=1e-5, purpose="a benchmark")
            accounts = [
                book.open(
                    "cohort",
                    f"run-{i}",
                    experiment="a benchmark",
                    promise=bytes(32),
                    unit="record",
                    per_round=Repeated(PoissonGaussian(4.0 + i, 0.01), 5),
                    rounds=1_000_000,
                    epsilon=3.0,
                )
                for i in range(20)
            ]
            with book._transaction():  # at once, for each charge waits for the disk
                for i in range(10_000 - len(book.entries)):
                    charge = Charged("2026-01-01T00:00:00+00:00", f"run-{i % 20}", i // 20 + 1)
                    book._append(charge)

        def epsilon() -> float:
            with Ledger(path) as book:
                assert book.head.entries == 10_000
                return book.epsilon("cohort")

        opened = [timed(epsilon)[0] for _ in range(REPETITIONS)]
        with Ledger(path) as book:
            account = Account(book, accounts[0].run)
            numbers = range(1000, 1000 + 5 * REPETITIONS)
            charged = [timed(lambda n=n: account.charge(n))[0] for n in numbers]
    for name, times, floor in (
        ("open a ledger of 10,000 entries and tell epsilon", opened, "<= 0.2"),
        ("charge one round to it, durably", charged, None),
    ):
        yield Row(name, statistics.median(times), "s", (min(times), max(times)), floor)


def memory() -> Iterator[Row]:
    """Peak memory of ten million parameters, in processes of their own."""
    for side in ("site", "server"):
        command = [sys.executable, str(HERE / "memory.py"), side]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        name = f"peak memory of 10,000,000 parameters, {side}"
        yield Row(name, told["peak"] / 1e6, "MB", None, f"<= {told['bound'] / 1e6:.0f}")


def demo() -> Iterator[Row]:
    """The main job as a user runs it, start of Python included."""
    text = importlib.resources.files("securefl").joinpath("demo.toml").read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.toml"
        path.write_text(text)
        command = [sys.executable, "-m", "securefl.cli", "run", str(path), "--format", "json"]
        times = [
            timed(
                lambda i=i: subprocess.run(
                    [*command, "--directory", f"{folder}/{i}"], check=True, capture_output=True
                )
            )[0]
            for i in range(3)
        ]
    yield Row(
        "demo, whole command", statistics.median(times), "s", (min(times), max(times)), "<= 60"
    )


INTRODUCTION = {
    "TenSEAL": f"One million parameters, {SITES} sites, 16 bits, one thread. The peer is TenSEAL's "
    "`ckks_vector` at degree 8192 with moduli [60, 40, 40], in the same process, taking turns. "
    "securefl's server only adds; what c1 needs, the opener expands from seeds. The row that adds "
    "all uploads and opens the sum counts both. Rows "
    "without a protocol's name are of bfv; securefl's ckks floods what it opens and rounds it, so "
    "that sums are exact and the key stays in, which TenSEAL leaves to its users.",
    "Flower": "16 bits, one thread, no training; the peer is SecAgg+ of Flower 1.41 on the "
    "complete graph, driven without its engine in a process of its own, taking turns. *Mask one "
    "vector* is key agreement, drawing the masks and adding them; *upload step* is everything from "
    "the float vector to the message, which in masked-bfv encrypts too and in Flower does not. "
    "securefl draws masks from AES-256 under 256-bit seeds, Flower folds its seeds to 32 bits for "
    "a Mersenne twister. The rounds of 100 sites are played once, "
    "because Flower's shares alone take minutes there.",
    "torch.normal": "A million draws at a time, one thread. The peer draws float32 from a Mersenne "
    "twister, whose state its outputs give away; as floats, sums with it leak low-order bits. "
    "Ours are integers from AES-256, within 2^-100 of the discrete Gaussian.",
    "Opacus": "One step on 256 images with the CNN of 26,010 parameters, one thread, as a multiple "
    "of the same step without privacy. The peer is Opacus's own `DPOptimizer`, with floating-point "
    "clipping and noise from a Mersenne twister; ours samples, clips in integers, rounds and adds "
    "integer noise from AES-256.",
    "16 bits without noise": 'An upload under `privacy.noise = "distributed"`, whose fields hold '
    "the noise of all sites, for 400 rounds; record: epsilon 3, rate 0.034, batch 2,048; site: "
    "epsilon 8, rotated. Beside it, what the same protocol takes for 16 bits without noise.",
}


def markdown(rows: list[Row], machine: str) -> str:
    """The rows as a table a peer."""
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {machine}, a shared machine. Times are medians; the spread is from the "
        "fastest to the slowest repetition, the ratio the median of pairwise ratios.",
        "",
        "![times beside the peers](results.svg)",
    ]
    for peer, introduction in INTRODUCTION.items():
        shown = [row for row in rows if row.beside == peer]
        lines += ["", f"## Beside {peer}", introduction, ""]
        lines += [
            "| what | value | spread | promised | peer | ratio |",
            "|---|---|---|---|---|---|",
        ]
        absent = not any(row.peer for row in shown)
        for row in shown:
            spread = "" if row.spread is None else f"{row.spread[0]:.3g} to {row.spread[1]:.3g}"
            other = "not installed" * absent if row.peer is None else f"{row.peer:.3g}"
            ratio = "" if row.ratio is None else f"{row.ratio:.1f}x"
            value = f"{row.value:.3g} {row.unit}".strip()
            cells = (row.name, value, spread, row.floor or "", other, ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Bars of every row that has a peer and is a time, a panel a peer."""
    timed_rows = [row for row in rows if row.peer is not None and row.unit == "s"]
    panels = {
        "TenSEAL ckks_vector": [row for row in timed_rows if row.beside == "TenSEAL"],
        "Flower SecAgg+": [
            row for row in timed_rows if row.beside == "Flower" and ", 0 gone" in row.name
        ],
    }
    panels = {peer: shown for peer, shown in panels.items() if shown}
    heights = [len(shown) + 1 for shown in panels.values()]
    figure = Figure(figsize=(10, 0.5 * sum(heights) + 1), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for axes, (peer, shown) in zip(grid[:, 0], panels.items(), strict=True):
        at = np.arange(len(shown))
        axes.barh(at - 0.2, [row.value for row in shown], 0.38, label="securefl", color="#0072b2")
        axes.barh(at + 0.2, [row.peer for row in shown], 0.38, label=peer, color="#bbb")
        for i, row in enumerate(shown):
            axes.text(max(row.value, row.peer or 0) * 1.05, i, f"{row.ratio:.1f}x", va="center")
        axes.set_yticks(at, [_short(row.name) for row in shown])
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("seconds (logarithmic)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _short(name: str) -> str:
    """A row's name without what all rows of a panel share."""
    return name.replace(", 0 gone, 1,000,000 parameters", "").split(", from float")[0]


GROUPS = (
    encryption,
    ckks,
    pruned,
    rounds,
    masked_rounds,
    many_sites,
    upload_sizes,
    noise,
    dp_steps,
    headroom,
    ledger,
    memory,
    demo,
)


def main(wanted: list[str]) -> None:
    """Measure every group, or those that are `wanted`, and write the three files."""
    rows: dict[str, Row] = {}
    if wanted:  # the others stay as they were measured
        told = json.loads((HERE / "results.json").read_text())
        rows = {row["name"]: Row(**row) for row in told["rows"]}
    for group in GROUPS:
        if wanted and group.__name__ not in wanted:
            continue
        for row in group():
            rows[row.name] = row
            ratio = "" if row.ratio is None else f"  {row.ratio:.1f}x the peer's {row.peer:.3g}"
            print(f"{row.name:<64} {row.value:10.3g} {row.unit}{ratio}", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    kept = list(rows.values())
    told = {"machine": machine, "rows": [asdict(row) for row in kept]}
    (HERE / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (HERE / "results.md").write_text(markdown(kept, machine))
    draw(kept, HERE / "results.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
