"""The global model as a value, and the one function that moves it.

`apply` is elementwise float64 rounded to float32, so that a server and every site that repeats it
get the same bits. Pruned weights are +0.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import nn

from protocols.errors import MalformedMessageError
from protocols.identity import digest
from securefl import config, models
from securefl.algorithms import ServerRule
from securefl.messages import ModelMessage
from securefl.models import Layout
from securefl.privacy import clipping
from securefl.pruning import prune, target_sparsity
from securefl.store import CorruptStoreError

_AVERAGE = "average"  # the key of the averaged weights among the moments


class DivergedError(RuntimeError):
    """Weights that are no longer finite."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class GlobalState:
    """The model after `update` applied aggregates.

    weights: float32[d], zero where `mask` (bool[d]) is false. moments: the server rule's state.
    quiet: rounds in a row in which the weights hardly moved, for the stopping rule. clip_scale: the
    clip of the next round over that of the first, 1 where it is fixed (`privacy.clipping`).
    """

    update: int
    weights: NDArray[np.float32]
    mask: NDArray[np.bool_]
    moments: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    quiet: int = 0
    clip_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weights.shape != self.mask.shape or self.weights.ndim != 1:
            raise ValueError("weights and mask must be vectors of one length")
        if not clipping.LEAST <= self.clip_scale <= clipping.MOST:
            raise ValueError(f"clip_scale = {self.clip_scale}: use 2^-20 to 2^20")

    @property
    def released(self) -> NDArray[np.float32]:
        """The weights that are evaluated and given out: their average, where one is kept."""
        average = self.moments.get(_AVERAGE)
        return self.weights if average is None else (average * self.mask).astype(np.float32)

    @property
    def surviving(self) -> int:
        """Weights that are not pruned: what an upload carries."""
        return int(np.count_nonzero(self.mask))

    @property
    def sparsity(self) -> float:
        """The pruned fraction of all weights."""
        return 1.0 - self.surviving / len(self.mask)

    def to_message(self) -> bytes:
        """What a site is sent: the mask and the surviving weights."""
        dense = bool(self.mask.all())
        mask = b"" if dense else np.packbits(self.mask, bitorder="little").tobytes()
        weights = self.weights if dense else self.weights[self.mask]
        body = weights.astype("<f4", copy=False).tobytes()
        return ModelMessage(self.update, len(self.mask), mask, body, self.clip_scale).to_bytes()

    @classmethod
    def from_message(cls, data: bytes, size: int) -> GlobalState:
        """The model in `data`, of `size` weights; MalformedMessageError when it is not one."""
        message = ModelMessage.from_bytes(data)
        if message.size != size:
            raise MalformedMessageError(f"the model has {message.size} weights, not {size}")
        mask = np.ones(size, np.bool_)
        if message.mask:
            if len(message.mask) != (size + 7) // 8:
                raise MalformedMessageError("the pruning mask has the wrong length")
            bits = np.unpackbits(np.frombuffer(message.mask, np.uint8), bitorder="little")
            mask, spare = bits[:size].astype(np.bool_), bits[size:]
            if spare.any() or mask.all():
                raise MalformedMessageError("the pruning mask is not in its one form")
        surviving = int(np.count_nonzero(mask))
        if surviving == 0 or len(message.weights) != 4 * surviving:
            raise MalformedMessageError("the model's weights do not fit its pruning mask")
        weights = np.zeros(size, np.float32)
        weights[mask] = np.frombuffer(message.weights, "<f4")
        if not np.isfinite(weights).all():
            raise MalformedMessageError("the model has weights that are not finite")
        return cls(message.update, weights, mask, clip_scale=message.clip_scale)

    def digest(self) -> bytes:
        """SHA-256 of `to_message()`: what a round is bound to (32 bytes)."""
        return hashlib.sha256(self.to_message()).digest()

    def to_checkpoint(self, record: str) -> bytes:
        """Everything a run continues from, as safetensors; `record` is the round's JSON line."""
        tensors: dict[str, NDArray[Any]] = {
            "weights": self.weights,
            "mask": self.mask.astype(np.uint8),
        }
        tensors |= {f"moments.{name}": value for name, value in self.moments.items()}
        numbers = {"update": self.update, "quiet": self.quiet, "clip_scale": self.clip_scale}
        about = json.dumps(numbers)
        seal = _checksum(tensors, about, record)
        return save_tensors(tensors, {"securefl": about, "record": record, "sha256": seal})

    @classmethod
    def from_checkpoint(cls, path: Path) -> tuple[GlobalState, str]:
        """The state and the record in the file `path`; CorruptStoreError when it is damaged."""
        try:
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            told = header["__metadata__"]
            tensors = load_tensors(data)
            if told["sha256"] != _checksum(tensors, told["securefl"], told["record"]):
                raise ValueError("its contents do not match their SHA-256")
            about = json.loads(told["securefl"])
            moments = {
                name.removeprefix("moments."): value
                for name, value in tensors.items()
                if name.startswith("moments.")
            }
            mask = tensors["mask"].astype(np.bool_)
            state = cls(mask=mask, weights=tensors["weights"], moments=moments, **about)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptStoreError(f"{path} is not a checkpoint: {error}") from None
        return state, told["record"]


def first_state(module: nn.Module, rule: ServerRule) -> GlobalState:
    """The state before the first round, from a module made from the public seed."""
    weights = models.flatten(module)
    return GlobalState(0, weights, np.ones(len(weights), np.bool_), rule.start(len(weights)))


def _checksum(tensors: Mapping[str, NDArray[Any]], *texts: str) -> str:
    fields = [text.encode() for text in texts]
    for name, value in sorted(tensors.items()):
        fields += [name.encode(), str(value.dtype).encode(), value.tobytes()]
    return digest("checkpoint", *fields).hex()


def _norm(vector: NDArray[np.float64]) -> float:
    """The Euclidean norm, added up in numpy's own order: BLAS has another on every machine."""
    return float(np.sqrt(np.sum(np.square(vector))))


def apply(
    state: GlobalState,
    mean: NDArray[np.float64],
    rule: ServerRule,
    layout: Layout,
    experiment: config.Experiment,
) -> GlobalState:
    """The next state: move by the mean update of the surviving weights, then prune.

    mean: float64[clipping.upload_length(experiment, state.surviving)]: the update, and what moves
    the clip where it is adaptive. Reads only the aggregate, so it costs no privacy.
    Raises DivergedError when a weight is no longer finite.
    """
    mean, clip_scale = clipping.opened(experiment, mean, state.clip_scale)
    update = np.zeros(len(state.mask))
    update[state.mask] = mean
    kept = {name: value for name, value in state.moments.items() if name != _AVERAGE}
    moved, moments = rule.step(state.weights.astype(np.float64), update, kept)
    with np.errstate(over="ignore"):
        weights = np.where(state.mask, moved, 0.0).astype(np.float32)
    if not np.isfinite(weights).all():
        raise DivergedError("the global model diverged: lower aggregation.learning_rate")
    mask = state.mask
    if experiment.pruning is not None:
        sparsity = target_sparsity(experiment.pruning, state.update + 1, experiment.rounds)
        mask = prune(weights, mask, layout, sparsity, experiment.pruning.scope)
        weights = np.where(mask, weights, np.float32(0))
    since = experiment.aggregation.average_from
    if since is not None and state.update + 1 >= since:
        before = state.moments.get(_AVERAGE, np.zeros(len(weights)))
        after = before + (weights - before) / (state.update + 2 - since)
        moments = {**moments, _AVERAGE: after}
    quiet = 0
    if experiment.stopping is not None:
        distance = _norm(weights.astype(np.float64) - state.weights)
        still = distance <= experiment.stopping.tolerance * _norm(state.weights.astype(np.float64))
        quiet = state.quiet + 1 if still else 0
    return GlobalState(state.update + 1, weights, mask, moments, quiet, clip_scale)
