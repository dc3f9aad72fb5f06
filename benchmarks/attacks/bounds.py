"""What right guesses prove, beside the paper's own examples."""

from __future__ import annotations

from collections.abc import Iterator

from row import Row

from attacks import evidence


def rows() -> Iterator[Row]:
    """The lower bounds on epsilon that Steinke, Nasr and Jagielski print, for their counts."""
    source = "Steinke, Nasr and Jagielski 2023, arXiv 2305.08846"
    for place, m, r, v, delta, paper, note in (
        ("Appendix D", 1000, 100, 75, 1e-4, 0.673, ""),
        ("Section 7", 100_000, 1510, 1439, 1e-5, 2.675, "the paper truncates"),
    ):
        ours = evidence.get_eps_audit(m, r, v, delta, 0.05)
        what = f"one-run bound, {v} of {r} guesses right, {m} canaries, delta {delta:g}, 95 %"
        yield Row(what, f"{source}, {place}", paper, round(ours, 4), note)
