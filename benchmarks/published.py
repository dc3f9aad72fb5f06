"""Published figures of attacks and audits beside ours.

    python benchmarks/published.py

Prints one JSON list of rows: what, where it was published, the paper's figure, ours, and a note
where the two may differ and why. (Not attacks.py: a script there would hide the package.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from attacks import evidence


@dataclass(frozen=True)
class Row:
    what: str
    source: str
    paper: float
    ours: float
    note: str = ""


def one_run_bounds() -> Iterator[Row]:
    """The lower bounds on epsilon that Steinke, Nasr and Jagielski print, for their counts."""
    source = "Steinke, Nasr and Jagielski 2023, arXiv 2305.08846"
    for place, m, r, v, delta, paper, note in (
        ("Appendix D", 1000, 100, 75, 1e-4, 0.673, ""),
        ("Section 7", 100_000, 1510, 1439, 1e-5, 2.675, "the paper truncates"),
    ):
        ours = evidence.get_eps_audit(m, r, v, delta, 0.05)
        what = f"one-run bound, {v} of {r} guesses right, {m} canaries, delta {delta:g}, 95 %"
        yield Row(what, f"{source}, {place}", paper, round(ours, 4), note)


def main() -> None:
    rows = [*one_run_bounds()]
    print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
