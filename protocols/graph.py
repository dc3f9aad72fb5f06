"""Who exchanges masks and shares with whom: everyone, or near neighbours on a ring.

Up to SPARSE_ABOVE sites every site is every other's neighbour, and masks hold against an active
server. Above it the work of n^2 pairs is saved as in Bell et al. 2020 (section 3): the sites lie on
a ring in an order that a hash of all their fresh signed keys decides, and each has the k/2 sites
before it and the k/2 after it for neighbours. That is claimed against a server that follows the
protocol (an active one could try keys until it likes the ring), with T colluding sites that were
chosen before the keys were drawn, and sites that vanish for reasons of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, final

from protocols.identity import digest

SPARSE_ABOVE: Final = 200
INSECURE: Final = 2.0**-40
"""Most probability, in one round, of a ring on which masks do not hold."""
UNLUCKY: Final = 2.0**-20
"""Most probability, in one round with `minimum` sites left, that some secret lacks its shares."""


@final
@dataclass(frozen=True, slots=True)
class Thresholds:
    """m, the fewest contributions in a sum; t, the shares that recover a secret; k, the neighbours.

    degree: k, even; 0 where everyone is everyone's neighbour.
    """

    minimum: int
    threshold: int
    degree: int = 0


def least_threshold(sites: int, tolerated: int) -> int:
    """The smallest t with 2t > n + T: on the complete graph."""
    return (sites + tolerated) // 2 + 1


def thresholds(
    sites: int, tolerated: int, minimum: int | None = None, complete: bool = False
) -> Thresholds:
    """What a round of `sites` sites needs against `tolerated` colluding ones.

    `minimum` is the fewest contributions that shall do, by default as few as the complete graph
    allows and two thirds on a sparse one. On a sparse graph: the least degree, and the largest
    threshold that is UNLUCKY at most, for which `insecurity` is at most INSECURE. Where there is
    no such degree, or `complete`, the complete graph.

    >>> thresholds(5, 1)
    Thresholds(minimum=4, threshold=4, degree=0)
    >>> thresholds(1000, 50)
    Thresholds(minimum=667, threshold=29, degree=82)
    """
    if sites > SPARSE_ABOVE and not complete:
        fewest = max(-(-2 * sites // 3), tolerated + 2) if minimum is None else minimum
        for degree in range(2, sites - 1, 2):
            if _gap(sites, tolerated, fewest, degree) > INSECURE:
                continue
            threshold = _largest_threshold(sites, fewest, degree)
            chosen = Thresholds(fewest, threshold, degree)
            if threshold and insecurity(sites, tolerated, chosen) <= INSECURE:
                return chosen
    threshold = least_threshold(sites, tolerated)
    return Thresholds(max(threshold, tolerated + 2) if minimum is None else minimum, threshold)


def insecurity(sites: int, tolerated: int, chosen: Thresholds) -> float:
    """An upper bound on the probability of a ring of `sites` on which masks do not hold.

    They hold where no honest site has t colluding neighbours and the honest sites in the sum are
    connected: who holds fewer than t shares of a site's seed and secret is left with a mask over
    it, and masks between connected sites cancel in the sum of all of them only. The first is a
    hypergeometric tail, once for each site, and worst when no more than m sites advertise. For the
    second, a ring only comes apart where k/2 sites in a row vanished or collude, of n - (m - T)
    that may.
    """
    least = max(chosen.minimum, chosen.degree + 1)
    caught = sites * _tail(least - 1, tolerated, chosen.degree, chosen.threshold)
    return caught + _gap(sites, tolerated, chosen.minimum, chosen.degree)


def _gap(sites: int, tolerated: int, minimum: int, degree: int) -> float:
    removed, run = min(sites, sites - minimum + tolerated), degree // 2
    if run > removed:
        return 0.0
    return sites * math.exp(sum(math.log(removed - j) - math.log(sites - j) for j in range(run)))


def _largest_threshold(sites: int, minimum: int, degree: int) -> int:
    """The largest t of which a neighbourhood still has the shares, but for UNLUCKY; 0 for none."""
    threshold = 0
    below = 0.0  # the probability that at most `threshold` of a site's neighbours are left
    while threshold < degree:
        below += _mass(sites - 1, minimum - 1, degree, threshold)
        if sites * below > UNLUCKY:
            break
        threshold += 1
    return threshold


def _tail(population: int, marked: int, draws: int, least: int) -> float:
    """The probability of `least` marked ones or more among `draws` without replacement."""
    return math.fsum(
        _mass(population, marked, draws, x) for x in range(least, min(marked, draws) + 1)
    )


def _mass(population: int, marked: int, draws: int, x: int) -> float:
    """The hypergeometric distribution's mass at x."""
    if not max(0, draws - (population - marked)) <= x <= min(marked, draws):
        return 0.0
    chosen = _log_choose(marked, x) + _log_choose(population - marked, draws - x)
    return math.exp(chosen - _log_choose(population, draws))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@final
class Graph:
    """The neighbours of every one of `sites`: k/2 on either side of the ring that `seed` orders.

    >>> Graph("abcdefg", 0, b"").neighbours("c")
    ('a', 'b', 'd', 'e', 'f', 'g')
    """

    __slots__ = ("_at", "_degree", "_ring")

    def __init__(self, sites: Iterable[str], degree: int, seed: bytes) -> None:
        self._ring = sorted(sites)
        self._degree = degree if 0 < degree < len(self._ring) - 1 else 0
        if self._degree:
            self._ring.sort(key=lambda site: digest("ring", seed, site.encode()))
        self._at = {site: i for i, site in enumerate(self._ring)}

    def neighbours(self, site: str) -> tuple[str, ...]:
        """The neighbours of `site`, in name order."""
        at, n, half = self._at[site], len(self._ring), self._degree // 2
        if not half:
            return tuple(other for other in self._ring if other != site)
        around = [self._ring[(at + step) % n] for step in range(-half, half + 1) if step]
        return tuple(sorted(around))
