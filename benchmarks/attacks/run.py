"""The papers' figures beside ours: `python benchmarks/attacks/run.py [MODELS] [KEYS]`

MODELS target models for membership (64), KEYS keys for each mitigation of CKKS (5). Writes
results.json and results.md beside this file; what mutants.py printed last (mutants.txt) is in the
latter as well.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import bounds
import keys
import membership
from row import Row

from attacks.ckks_key import MITIGATIONS, Verdict, verdict

HERE = Path(__file__).parent


def main() -> None:
    """Measure and write."""
    given = [int(text) for text in sys.argv[1:]]
    models, each = [*given, *(64, 5)[len(given) :]][:2]
    verdicts = [verdict(item, seed=0, keys=each) for item in MITIGATIONS]
    rows = [*bounds.rows(), *membership.rows(models), *keys.rows(verdicts)]
    told = {"rows": [asdict(row) for row in rows], "ckks": [asdict(item) for item in verdicts]}
    (HERE / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    (HERE / "results.md").write_text(_page(rows, verdicts))
    print(_page(rows, verdicts))


def _page(rows: list[Row], verdicts: list[Verdict]) -> str:
    lines = [
        "# Attacks: the papers' figures beside ours",
        "",
        "`python benchmarks/attacks/run.py` makes this page.",
        "",
        "| figure | source | paper | ours | note |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        paper = "–" if row.paper is None else f"{row.paper:g}"
        lines.append(f"| {row.what} | {row.source} | {paper} | {row.ours:g} | {row.note} |")
    lines += [
        "",
        "## The CKKS key, by what is handed out",
        "",
        "| handed out | verdict | keys found | seconds a key | shown |",
        "|---|---|---|---|---|",
    ]
    for item in verdicts:
        found = f"{item.found} of {item.keys}"
        lines.append(
            f"| {item.mitigation} | {item.outcome} | {found} | {item.seconds:.2f} | {item.shown} |"
        )
    planted = HERE / "mutants.txt"
    if planted.exists():
        lines += ["", "## Planted bugs", "", "`python benchmarks/attacks/mutants.py 20`", "", "```"]
        lines += [*planted.read_text().splitlines(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
