"""Published figures of attacks and audits beside ours.

    python benchmarks/published.py

Prints one JSON list of rows: what, where it was published, the paper's figure, ours, and a note
where the two may differ and why. (Not attacks.py: a script there would hide the package.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from attacks import evidence

SEED = 1
SIMULATIONS = 50


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


def gaussian_epsilons() -> Iterator[Row]:
    """The Gaussian mechanisms of Andrew et al.: their epsilon, and what canaries estimate."""
    source = "Andrew et al. 2023, arXiv 2302.03098, the Gaussian mechanism"
    rng = np.random.default_rng(SEED)
    null = evidence.Normal(0.0, 1.0)
    for sigma, paper in ((4.22, 1.0), (1.54, 3.0), (0.541, 10.0)):
        ours = evidence.gaussian_epsilon(1 / sigma, 1e-6)
        yield Row(f"epsilon of sigma {sigma}, delta 1e-6", source, paper, round(ours, 3))
        told = [
            evidence.estimate_epsilon(rng.normal(1 / sigma, 1, 1000), null, 1e-6).epsilon
            for _ in range(SIMULATIONS)
        ]
        what = f"epsilon of sigma {sigma} as 1,000 canaries estimate it"
        note = f"mean of {SIMULATIONS} draws of the limiting normals, deviation {np.std(told):.2f}"
        yield Row(
            what, f"{source}: the analytical value", paper, round(float(np.mean(told)), 2), note
        )


def main() -> None:
    rows = [*one_run_bounds(), *gaussian_epsilons()]
    print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
