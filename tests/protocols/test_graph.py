"""The ring of neighbours: its shape, its randomness, and the probabilities that it is chosen by."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.graph import (
    INSECURE,
    SPARSE_ABOVE,
    UNLUCKY,
    Graph,
    Thresholds,
    insecurity,
    least_threshold,
    thresholds,
)


def names(count: int) -> list[str]:
    """That many sites."""
    return [f"s{i}" for i in range(count)]


@given(st.integers(2, 40), st.integers(0, 20), st.binary(max_size=8))
def test_neighbourhood_is_mutual_and_of_the_degree(count: int, half: int, seed: bytes) -> None:
    """k neighbours each, never oneself, in name order; everyone where k does not fit."""
    graph, sites = Graph(names(count), 2 * half, seed), names(count)
    sparse = 0 < 2 * half < count - 1
    for site in sites:
        near = graph.neighbours(site)
        assert list(near) == sorted(set(near) - {site})
        assert len(near) == (2 * half if sparse else count - 1)
        assert all(site in graph.neighbours(other) for other in near)


@given(st.integers(3, 40), st.integers(1, 10), st.randoms(use_true_random=False))
def test_the_ring_holds_together_unless_half_the_degree_vanish_in_a_row(
    count: int, half: int, rng: random.Random
) -> None:
    """Whoever is removed: with no run of k/2 removed neighbours the rest is connected."""
    graph, sites = Graph(names(count), 2 * half, b"ring"), names(count)
    gone = set(rng.sample(sites, rng.randrange(count - 1)))
    left = set(sites) - gone
    reached, edge = set(), {min(left)}
    while edge:
        reached |= edge
        edge = {o for site in edge for o in graph.neighbours(site) if o in left} - reached
    ring = graph._ring
    runs = max(
        len(list(group)) if key else 0
        for key, group in itertools.groupby([site in gone for site in ring * 2])
    )
    if runs < half or half * 2 >= count - 1:
        assert reached == left


def test_the_order_does_not_depend_on_how_the_sites_are_listed_but_on_the_seed() -> None:
    """All parties draw the same ring; another seed draws another one."""
    one, other = (Graph(sites, 4, b"seed") for sites in (names(30), names(30)[::-1]))
    assert all(one.neighbours(s) == other.neighbours(s) for s in names(30))
    fresh = Graph(names(30), 4, b"another seed")
    assert any(one.neighbours(s) != fresh.neighbours(s) for s in names(30))


def test_every_pair_is_as_likely_to_be_neighbours() -> None:
    """Over many seeds, k / (n - 1) of the time each."""
    sites, draws = names(9), 4000
    met: Counter[tuple[str, str]] = Counter()
    for i in range(draws):
        graph = Graph(sites, 4, i.to_bytes(4, "big"))
        met.update((a, b) for a in sites for b in graph.neighbours(a) if a < b)
    assert len(met) == math.comb(9, 2)
    assert max(abs(seen - draws / 2) for seen in met.values()) < 5.5 * math.sqrt(draws / 4)


@pytest.mark.parametrize("tolerated", [0, 1, 5])
@pytest.mark.parametrize("sites", [3, 7, 40, SPARSE_ABOVE])
def test_up_to_200_sites_everyone_is_everyones_neighbour(sites: int, tolerated: int) -> None:
    """Degree 0, 2t > n + T, m >= max(t, T + 2): and the least of all these."""
    chosen = thresholds(sites, tolerated)
    assert chosen.degree == 0
    assert chosen.threshold == least_threshold(sites, tolerated)
    assert 2 * chosen.threshold > sites + tolerated >= 2 * (chosen.threshold - 1)
    assert chosen.minimum == max(chosen.threshold, tolerated + 2)


def hypergeometric(population: int, marked: int, draws: int, x: int) -> Fraction:
    """Its mass at x, exactly."""
    ways = math.comb(marked, x) * math.comb(population - marked, draws - x)
    return Fraction(ways, math.comb(population, draws))


@pytest.mark.parametrize(
    ("sites", "tolerated", "minimum"),
    [(201, 1, None), (201, 40, None), (500, 1, 300), (1000, 100, None), (1000, 333, None)],
)
def test_the_degree_is_the_least_that_meets_both_probabilities(
    sites: int, tolerated: int, minimum: int | None
) -> None:
    """Recomputed in exact fractions: secrecy 2^-40, shares 2^-20; a smaller degree misses one."""
    chosen = thresholds(sites, tolerated, minimum)
    m, t, k = chosen.minimum, chosen.threshold, chosen.degree
    assert m == (minimum or -(-2 * sites // 3))

    def caught(t: int, k: int) -> Fraction:
        top = min(tolerated, k)
        return sites * sum(
            (hypergeometric(m - 1, tolerated, k, x) for x in range(t, top + 1)), Fraction(0)
        )

    def short(t: int, k: int) -> Fraction:
        return sites * sum((hypergeometric(sites - 1, m - 1, k, x) for x in range(t)), Fraction(0))

    def apart(k: int) -> Fraction:
        removed = sites - m + tolerated
        return sites * Fraction(math.perm(removed, k // 2), math.perm(sites, k // 2))

    assert caught(t, k) + apart(k) <= INSECURE
    assert short(t, k) <= UNLUCKY < short(t + 1, k)
    risk = insecurity(sites, tolerated, chosen)
    assert risk == pytest.approx(float(caught(t, k) + apart(k)), rel=1e-6)
    best = max((u for u in range(k - 1) if short(u, k - 2) <= UNLUCKY), default=0)
    assert not best or caught(best, k - 2) + apart(k - 2) > INSECURE


def test_the_bound_on_a_bad_ring_is_one() -> None:
    """On a small ring that is often bad, drawn ten thousand times."""
    sites, tolerated, rng = names(24), 4, random.Random(1)
    chosen = Thresholds(16, 3, 6)
    bound, bad, draws = insecurity(24, tolerated, chosen), 0, 10_000
    for _ in range(draws):
        graph = Graph(sites, chosen.degree, rng.randbytes(16))
        colluding = set(sites[:tolerated])
        honest = set(sites[tolerated : chosen.minimum])
        caught = any(
            len(colluding.intersection(graph.neighbours(s))) >= chosen.threshold for s in honest
        )
        reached, edge = set[str](), {min(honest)}
        while edge:
            reached |= edge
            edge = {o for s in edge for o in graph.neighbours(s) if o in honest} - reached
        bad += caught or reached != honest
    assert bad / draws <= bound
    assert bad > 100, "and it is not an idle bound"


@given(st.integers(SPARSE_ABOVE + 1, 3000), st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_more_colluding_sites_never_need_fewer_neighbours(sites: int, tolerated: int) -> None:
    """And the complete graph is there for whoever asks for it."""
    one, more = thresholds(sites, tolerated), thresholds(sites, tolerated + 5)
    assert 0 < one.degree <= more.degree < sites - 1
    assert thresholds(sites, tolerated, complete=True).degree == 0


def test_where_no_degree_does_everyone_is_a_neighbour() -> None:
    """Half of the sites may vanish and nearly half collude: only all pairs withstand that."""
    assert thresholds(220, 100, 111).degree == 0
