"""Canaries: records of an audit's own, of which only the site knows which were trained on.

With `[audit] canaries = N` every site makes the same N candidates as anyone else could, from the
public seed and its name, and tosses a fair coin of its own for each: heads, and it is trained on.
Whoever can tell heads from tails knows something that epsilon bounds (Steinke, Nasr and Jagielski
2023, "Privacy auditing with one (1) training run", algorithm 1).

What makes a good canary is a gradient as long as the clip and far from all others: then it moves a
sum by as much as any record may, in a direction of its own (section 5.1 there: under DP-SGD every
clipped canary gives up to the clip). A candidate's features are independent fair signs, the corners
of [-1, 1], onto which ranges are scaled, and about where standardised numbers lie; its target is
drawn evenly and by itself. So
- no real record resembles one: one of d features agrees with it in every sign by chance 2^-d;
- its gradient is long: that of a first layer is an error times the features, whose norm is
  sqrt(d), the largest there is in [-1, 1]; and no model predicts targets that are drawn by
  themselves, so that the error stays large until the model has learnt this very record;
- two of them are nearly orthogonal: cosines of sign vectors deviate by 1/sqrt(d).
For images the same is a random pattern.

What it costs: canaries are records that teach nothing, so a model learns less of the others. It
costs these no privacy: a plan's promise is about one record more or less whatever the rest are, and
canaries are among the rest, drawn without a look at any record. They are protected like any other;
that is what makes them measure the promise. They enter no statistics and no test figures, which are
made of a site's own rows, and nothing public depends on how many were heads: rate and expected
batch are the experiment's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from protocols.identity import digest
from protocols.keystream import Keystream, Randomness, Seed
from securefl import store
from securefl.config import ConfigurationError, Experiment
from securefl.data import Table

CANARIES: Final = "canaries.json"
"""The file of the coins, in what a site keeps to itself (`SiteStore.private`)."""


class _Coins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coins of one site: "1" for every candidate that it trains on, else "0"."""

    version: Literal[1]
    coins: Annotated[str, Meta(pattern=r"\A[01]+\Z")]

    def __repr__(self) -> str:
        return f"_Coins(<{len(self.coins)} secret coins>)"


def candidates(
    experiment: Experiment, site: str, shape: tuple[int, ...], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64] | NDArray[np.float32]]:
    """The candidates of `site` as a model reads them: features float32[N, *shape], and targets.

    classes: how many there are, targets int64[N] below it; 0 for regression, whose targets are
    the ends of [-1, 1], float32[N]. Everybody can compute them.
    """
    count, size = experiment.audit.canaries, int(np.prod(shape))
    material = digest("canaries", experiment.seed.to_bytes(8, "big"), site.encode())
    drawn = Keystream(Seed(material), "canaries").uniform(count * (size + 1)).reshape(count, -1)
    features = np.where(drawn[:, :size] < 0.5, np.float32(-1), np.float32(1))
    if classes:
        target = np.minimum(drawn[:, size] * classes, classes - 1).astype(np.int64)
        return features.reshape(count, *shape), target
    ends = np.where(drawn[:, size] < 0.5, np.float32(-1), np.float32(1))
    return features.reshape(count, *shape), ends


def toss(folder: Path, count: int, randomness: Randomness) -> NDArray[np.bool_]:
    """The site's own coins, bool[count]: tossed once, and the same whenever they are asked for.

    folder: of what the site keeps to itself. The file is durable on return, for its owner's eyes
    only, and is never written again. Raises ConfigurationError where it is of another run.
    """
    if not (folder / CANARIES).exists():
        bits = np.unpackbits(np.frombuffer(randomness(-(-count // 8)), np.uint8))[:count]
        text = "".join(map(str, bits.tolist()))
        store.private_folder(folder)
        store.write_secret(folder / CANARIES, msgspec.json.encode(_Coins(1, text)))
    coins = read_coins(folder)
    if len(coins) != count:
        raise ConfigurationError(
            f"{folder / CANARIES} holds {len(coins)} coins and audit.canaries = {count}: put the "
            "experiment back as it was, or start a new run"
        )
    return coins


def read_coins(folder: Path) -> NDArray[np.bool_]:
    """The coins that a site tossed, bool[N]; ConfigurationError where it has none."""
    told = store.read(folder / CANARIES, _Coins)
    if told is None:
        raise ConfigurationError(
            f"{folder} holds no coins: the site put no canaries into its training, or only the "
            "site itself has them"
        )
    return np.array([coin == "1" for coin in told.coins], np.bool_)


def join(table: Table, experiment: Experiment, site: str, coins: NDArray[np.bool_]) -> Table:
    """The records of `site`, and after them its candidates with coin heads.

    Each is a person of its own, where records belong to people. coins: bool[N].
    """
    shape, classes = table.shape, len(table.classes)
    features, target = candidates(experiment, site, shape, classes)
    names = np.array([f"\0canary {number}" for number in np.flatnonzero(coins)], np.str_)
    return replace(
        table,
        features=np.concatenate([table.features, features[coins]]),
        target=np.concatenate([table.target, target[coins]]),
        groups={
            column: np.concatenate([held, names]) if len(names) else held
            for column, held in table.groups.items()
        },
    )
