"""Attacks on a client that once succeeded."""

from __future__ import annotations

import dataclasses

import msgspec

from protocols.graph import thresholds
from securefl.messages import Refusal

MANY = (
    "protocol.name=masked-bfv",
    "sites.count=203",
    "sites.partition=iid",
    "data.source=digits",
)


def test_a_site_of_a_complete_graph_takes_part_in_no_sparse_one(small, bench):
    """`protocol.graph = "complete"` is the promise that an active server reads no update."""
    made = bench(small(*MANY, "protocol.graph=complete"))
    begin = made.begin(1)
    assert begin.degree == 0
    m, t, k = dataclasses.astuple(thresholds(203, 1))
    sparse = msgspec.structs.replace(begin, minimum=m, threshold=t, degree=k)
    request = made.request(1, "advertise", sparse.to_bytes(), made.state.to_message())
    assert isinstance(made.ask(next(iter(made.clients)), request), Refusal)


def test_a_restarted_site_enters_no_round_again(small, bench):
    """Otherwise it signs a second list of survivors, and trains and uploads twice, in one round."""
    made = bench(small("protocol.name=masked-bfv", "sites.count=5"))
    made.drive(2, "confirm")
    site = next(iter(made.clients))
    made.clients[site].close()
    made.clients[site] = made.client(site)
    for number in (1, 2):
        assert isinstance(made.ask(site, made.first(number)), Refusal)
