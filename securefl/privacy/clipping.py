"""Adaptive clipping: the clip follows a quantile of the norms (Andrew et al. 2021, algorithm 1).

Whether a vector was within the clip is one more coordinate of it, +count or -count fine units: a
record's vector then has norm sqrt(units^2 + count^2) at most, exactly, and the noise that covers it
covers this coordinate too. So the cost is a wider vector in the plan's one event, and no second
mechanism. Whoever applies the aggregate reads the share of vectors within the clip from it and
moves the clip; reading what is private costs nothing.

In integers the clip is always `units`, and the plan never changes: where the clip is `scale` times
the first, an integer stands for `scale` times as much.
"""

from __future__ import annotations

from decimal import Context, Decimal
from typing import Final

import numpy as np
from numpy.typing import NDArray

from securefl.config import AnyPrivacy, Experiment

COUNT: Final = 8
"""The clip over the count: sqrt(1 + 1/64) - 1 < 0.8 % more noise. One record in a batch of B, at
noise multiplier z, is then known to be within the clip or not but for noise of 4 z / B in the
share."""

LEAST: Final = 2.0**-20
MOST: Final = 2.0**20
"""The clip stays between these multiples of the first, so that nothing overflows."""

_DIGITS: Final = Context(prec=40)


def count(units: int) -> int:
    """The count in fine units, at least 1, where the clip has `units`."""
    return max(1, units // COUNT)


def counted(privacy: AnyPrivacy | None) -> bool:
    """Whether vectors carry the count: whether the clip is adaptive."""
    return privacy is not None and privacy.clip_quantile is not None


def upload_length(experiment: Experiment, surviving: int) -> int:
    """How many numbers a site uploads: the surviving weights, and the count."""
    return surviving + counted(experiment.privacy)


def opened(
    experiment: Experiment, mean: NDArray[np.float64], scale: float
) -> tuple[NDArray[np.float64], float]:
    """The mean update, and the next scale of the clip, from an opened mean under `scale`.

    mean: float64[surviving weights], and the count after them where the clip is adaptive. The same
    bits everywhere: float64 products, and an exponential that is correctly rounded.
    """
    privacy = experiment.privacy
    if privacy is None or privacy.clip_quantile is None:
        return mean, scale
    update, told = mean[:-1], float(mean[-1])
    if privacy.noise == "local":  # `uploaded` at each site, whose updates are in their own units
        excess = told / experiment.protocol.clip
    else:
        update, excess = update * scale, told * COUNT / (2 * privacy.clip)
    share = excess + 0.5
    return update, moved(scale, share, privacy.clip_quantile, privacy.clip_learning_rate)


def uploaded(experiment: Experiment, excess: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a site with local noise uploads of `excess`, the share within the clip less one half.

    In a field that holds numbers up to protocol.clip, so that noise up to one half more is kept.
    """
    return excess * np.float32(experiment.protocol.clip)


def moved(scale: float, share: float, quantile: float, learning_rate: float) -> float:
    """scale * exp(-learning_rate * (share - quantile)), from LEAST to MOST.

    share: of the vectors that were within the clip, with noise. The step is cut at a difference of
    1, which only noise exceeds.

    >>> round(moved(1.0, share=1.0, quantile=0.5, learning_rate=0.2), 6)
    0.904837
    """
    step = Decimal(-learning_rate * min(max(share - quantile, -1.0), 1.0))
    return min(max(scale * float(step.exp(_DIGITS)), LEAST), MOST)
