"""Magnitude pruning: which coordinates of the global model survive a round.

Reads the aggregated weights alone, so it costs no privacy; and is the same on every machine, so
that sites and server agree on the mask without sending it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from securefl.config import Pruning
from securefl.models import Layout

Mask = NDArray[np.bool_]


def target_sparsity(pruning: Pruning, round_number: int, rounds: int) -> float:
    """The fraction of all parameters to be zero after round `round_number` (from 1) of `rounds`.

    0 before `first_round`; all of `pruning.sparsity` from `last_round` on (`rounds` where none is
    given), and from `first_round` on for "one-shot". In between "linear" rises evenly and "cubic"
    as 1 - (1 - progress)^3 (Zhu and Gupta 2017, equation 1, with initial sparsity 0).

    Precondition: 1 <= round_number. Never falls from one round to the next.

    >>> cubic = Pruning(sparsity=0.8)
    >>> [round(target_sparsity(cubic, r, 5), 3) for r in (1, 2, 3, 4, 5)]
    [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    if round_number < 1:
        raise ValueError(f"round_number = {round_number}: rounds are counted from 1")
    first, last = pruning.first_round, pruning.last_round or rounds
    if round_number < first:
        return 0.0
    if pruning.schedule == "one-shot" or round_number >= last:
        return pruning.sparsity
    progress = (round_number - first) / (last - first)
    if pruning.schedule == "cubic":
        progress = 1 - (1 - progress) ** 3
    return pruning.sparsity * progress


def fewest_surviving(pruning: Pruning | None, size: int) -> int:
    """How many of `size` coordinates survive every round of `prune`, at least."""
    sparsity = 0.0 if pruning is None else pruning.sparsity
    return size - _pruned(sparsity, size)


def _pruned(sparsity: float, size: int) -> int:
    return min(math.floor(sparsity * size), size - 1)


def prune(
    weights: NDArray[np.float32],
    mask: Mask,
    layout: Layout,
    sparsity: float,
    scope: Literal["global", "layer"],
) -> Mask:
    """The coordinates that survive, bool [d]: `mask` less the smallest weights.

    weights: float32 [d], finite. mask: bool [d], true where a coordinate survived so far.
    "global" leaves exactly floor(sparsity * d) coordinates pruned, the smallest weights of all;
    "layer" takes the same fraction of every weight tensor, rounded down, and so may prune less
    by under one coordinate a tensor. Biases go last, once no weight is left. Fewer are never
    pruned than before, and one coordinate always survives.

    Formal guarantees: the result is a subset of `mask`, which is left unchanged; ties fall to the
    lower index, and magnitudes are compared as float64, so every machine finds the same mask.
    Raises ValueError when shapes differ, a weight is not finite, or nothing survived so far.
    """
    size = layout.size
    if weights.shape != (size,) or mask.shape != (size,):
        raise ValueError(
            f"weights {weights.shape} and mask {mask.shape} do not fit {size} parameters"
        )
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity = {sparsity}: put it at 0 or above and below 1")
    if not mask.any():
        raise ValueError("nothing survived so far: there is no model left to prune")
    odd = np.flatnonzero(~np.isfinite(weights))
    if odd.size:
        raise ValueError(f"weight {odd[0]} is {weights[odd[0]]}: the model has diverged")

    prunable = layout.prunable
    available = int(prunable.sum())
    count = _pruned(sparsity, size)
    magnitude = np.abs(weights.astype(np.float64))
    if scope == "layer" and count < available:
        pieces = []
        for shape, where in zip(layout.shapes, layout.slices(), strict=True):
            lost = count * math.prod(shape) // available if len(shape) >= 2 else 0
            pieces.append(_without_smallest(magnitude[where], mask[where], lost))
        return np.concatenate(pieces)
    return _without_smallest(magnitude, mask, count, last=~prunable)


def _without_smallest(
    magnitude: NDArray[np.float64], mask: Mask, count: int, last: Mask | None = None
) -> Mask:
    """`mask` with `count` coordinates false: those already so, then the smallest, then `last`."""
    keys = (magnitude, mask) if last is None else (magnitude, last, mask)
    order = np.lexsort(keys)  # the last key counts most; ties keep their order
    survivors = mask.copy()
    survivors[order[:count]] = False
    return survivors
