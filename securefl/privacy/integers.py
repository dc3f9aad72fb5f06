"""From clipped vectors to integers with a known sensitivity, and noise on their sum.

A *grid unit* is what one integer of the aggregate stands for; a *fine unit* is 2^-16 of it. Vectors
are clipped on the fine grid, where an integer norm is checked and sums are exact, and only a sum is
rounded to the grid. So no real number is ever rounded after a record has been bounded, and nothing
leaks through low-order bits (Mironov 2012).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.keystream import Keystream
from protocols.noise import CUT, DiscreteGaussian, divergence_from_rounded

FINE_BITS: Final = 16
"""Fine units in a grid unit, as a power of two."""

_ATTEMPTS: Final = 256
_EXACT: Final = 1 << 53
_CHUNK: Final = 1 << 17  # numbers


def clipped_sum(
    gradients: Sequence[torch.Tensor], clip: float, units: int, count: int = 0
) -> NDArray[np.int64]:
    """The sum of the rows, each clipped to L2 norm `clip`, in integers of clip / units, int64[d].

    With a `count` it is int64[d + 1]: to the last number every row adds +count where its norm was
    within the clip, and -count where it was not.

    gradients: one tensor [rows, ...] a parameter; a row across all of them is one record's (or
    person's) gradient, d numbers. Precondition: clip > 0, 0 <= count <= units, rows * units < 2^53.

    Formal Guarantees: every row adds integers whose exact L2 norm is at most `units` (and with a
    count, at most sqrt(units^2 + count^2)), whatever the row holds; a row with a number that is not
    finite adds nothing. The sum is exact. Entries are
    rounded towards zero, which costs each less than one unit. The proof of the norm: q holds
    integers below 2^53, exact in float64, and a float64 sum of d squares in any order is off by at
    most a factor 1 +- (d + 1) 2^-53; rows for which it exceeds units^2 (1 - (d + 2) 2^-52) are
    left out. Rows are scaled to stay below, so that this happens to none in practice.
    """
    rows = len(gradients[0])
    if not (clip > 0 and units >= 1 and rows * units < _EXACT and 0 <= count <= units):
        raise ValueError(
            f"clip = {clip}, units = {units}, count = {count}, {rows} rows: use clip > 0 and "
            f"1 <= units < 2^53 / {max(rows, 1)} and a count from 0 to units"
        )
    flat = [part.reshape(rows, math.prod(part.shape[1:])) for part in gradients]
    widths = [part.shape[1] for part in flat]
    size = sum(widths)
    total = torch.zeros(size + (count > 0), dtype=torch.float64, device=flat[0].device)
    # As much as a processor's cache holds; an accelerator takes all at once.
    step = max(1, _CHUNK // size if total.device.type == "cpu" else rows)
    chunk = total.new_empty(min(step, rows), size)
    for start in range(0, rows, step):
        taken = chunk[: rows - start]
        for part, into in zip(flat, torch.split(taken, widths, 1), strict=True):
            into.copy_(part[start : start + step])
        whole, within = _clipped(taken, clip, units)
        total[:size] += whole.sum(0)  # integers below 2^53: exact
        total[size:] += count * (2 * within.sum() - len(within))
    return np.asarray(total.to(torch.int64).cpu().numpy(), np.int64)


def _clipped(rows: torch.Tensor, clip: float, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of `rows` (float64[n, d], overwritten) as integers of clip / units; some left out.

    And which of those that are not were within the clip.
    """
    slack = (rows.shape[1] + 2) * 2.0**-52
    norms = torch.linalg.vector_norm(rows, dim=1)
    unit = (clip / units) * (1 + 3 * slack) * torch.clamp(norms / clip, min=1.0)
    whole = rows.div_(unit[:, None], rounding_mode="trunc")  # trunc_ takes four times as long
    squares = torch.linalg.vecdot(whole, whole)
    kept = squares <= float(units) ** 2 * (1 - slack)  # nothing that is not finite is
    within = norms <= clip
    return (whole, within) if kept.all() else (whole[kept], within[kept])


def dithered(total: NDArray[np.int64], keystream: Keystream) -> NDArray[np.int64]:
    """floor(S / 2^16 + u) with u uniform on the multiples of 2^-16 in [0, 1), int64[d].

    From fine units to grid units. Precondition: |total| < 2^62; the keystream is secret.

    Formal Guarantees: for the same u, the results of S and S + g differ by floor(g / 2^16 + w), w
    being the fractional part of S / 2^16 + u and uniform too: a stochastic rounding of g / 2^16,
    independent in every coordinate, whatever S is. `sensitivity` bounds its norm.
    """
    fractions = np.frombuffer(keystream.bytes(2 * len(total)), "<u2").astype(np.int64)
    return (total + fractions) >> np.int64(FINE_BITS)


def sensitivity(clip: float, dimension: int, beta: float) -> float:
    """A bound on |R(x)|, R the stochastic rounding to integers of x in R^d with |x| <= clip.

    It holds but for a probability `beta`; always where beta = 0. L2 norms, in grid units.
    Preconditions: clip > 0, dimension >= 1, 0 <= beta < 1. Two bounds (Kairouz, Liu and Steinke
    2021), the smaller of which is given:

    - clip + sqrt(d), for every coordinate moves by less than 1;
    - the root of clip^2 + d/4 + sqrt(2 log(1/beta)) (clip + sqrt(d)/2). E[R_i^2] is at most
      x_i^2 + 1/4, and R_i^2 takes two values |2 floor(x_i) + 1| <= 2 |x_i| + 1 apart, so that by
      Hoeffding's inequality the sum exceeds its mean by t with probability at most
      exp(-2 t^2 / w^2), w = |2 |x| + 1| <= 2 clip + sqrt(d).
    """
    if not (clip > 0 and dimension >= 1 and 0 <= beta < 1):
        raise ValueError(
            f"clip = {clip}, dimension = {dimension}, beta = {beta}: "
            "use clip > 0, dimension >= 1 and 0 <= beta < 1"
        )
    always = clip + math.sqrt(dimension)
    if beta == 0:
        return always
    deviation = math.sqrt(2 * math.log(1 / beta)) * (clip + math.sqrt(dimension) / 2)
    return min(always, math.sqrt(clip**2 + dimension / 4 + deviation))


def conditionally_rounded(
    fine: NDArray[np.int64], bound: float, keystream: Keystream
) -> NDArray[np.int64]:
    """One vector from fine to grid units, rounded anew until its L2 norm is at most `bound`.

    fine: int64[d] in fine units, of norm at most 2^16 * clip; bound: `sensitivity(clip, d, beta)`.
    An attempt fails with probability at most beta (Kairouz, Liu and Steinke 2021, algorithm 1);
    after 256 of them the vector is rounded towards zero instead.

    Formal Guarantees: the norm of the result, as an exact sum of integer squares, is at most
    `bound` (and at most that of `fine` / 2^16 after 256 failures).
    """
    slack = (len(fine) + 2) * 2.0**-52
    for _ in range(_ATTEMPTS):
        rounded = dithered(fine, keystream)
        if float(np.square(rounded.astype(np.float64)).sum()) <= bound**2 * (1 - slack):
            return rounded
    return np.asarray(np.sign(fine) * (np.abs(fine) >> np.int64(FINE_BITS)), np.int64)


def hardened(total: NDArray[np.int64], deviation: float, keystream: Keystream) -> NDArray[np.int64]:
    """`total` (int64[d]) with Gaussian noise that leaks nothing through its low-order bits.

    deviation: of the noise, in the units of `total`, from 16 to 2^24; units so fine that it is
    2^18 or more cost nothing.

    Formal Guarantees: the result is within statistical distance `hardening_distance(deviation, d)`
    of round(total + N(0, deviation^2 I)): of a function of what the continuous Gaussian mechanism
    of that deviation gives, exactly computed. So whatever holds for that mechanism, sampling and
    composition included, holds here once the distance is charged to delta. The noise is
    N_Z(0, deviation^2 + 1/12); the proof is at `protocols.noise.divergence_from_rounded`.
    """
    return total + _hardening(deviation).sample(keystream, len(total))


def hardening_distance(deviation: float, dimension: int) -> float:
    """The statistical distance of `hardened` noise from the rounded Gaussian, d coordinates."""
    drawn = _hardening(deviation)
    divergence = dimension * divergence_from_rounded(drawn.sigma**2 - 1 / 12)
    return dimension * (drawn.tau + CUT) + math.sqrt(divergence / 2)


def _hardening(deviation: float) -> DiscreteGaussian:
    if not 16 <= deviation <= 1 << 23:
        raise ValueError(
            f"deviation = {deviation} units: use 16 to 2^23; choose "
            f"{'finer' if deviation < 16 else 'coarser'} units"
        )
    # Upwards: more noise than a continuous Gaussian of that deviation is a function of it too.
    return DiscreteGaussian(math.nextafter(math.sqrt(deviation**2 + 1 / 12), math.inf))
