"""The CKKS key of TenSEAL's users, and what each mitigation does about it.

    python benchmarks/attacks_keys.py [KEYS]

KEYS independent keys for each line, by default 10. Prints one JSON list: first rows as published.py
prints them, then the verdict on each mitigation, with what was shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from attacks.ckks_key import MITIGATIONS, Verdict, verdict


@dataclass(frozen=True)
class Row:
    what: str
    source: str
    paper: float | None
    ours: float
    note: str = ""


def rows(verdicts: list[Verdict]) -> Iterator[Row]:
    """Li and Micciancio recover the whole key "with high probability" from what SEAL decodes."""
    source = "Li and Micciancio, Eurocrypt 2021, abstract"
    for told in verdicts:
        if told.mitigation.startswith("none"):
            name = told.mitigation.removeprefix("none: ")
            note = f'{told.found} of {told.keys} keys; the paper: "with high probability"'
            yield Row(f"keys recovered, {name}", source, None, told.found / told.keys, note)
            note = 'degree 8192, one core; the paper: "very modest running times"'
            yield Row(f"seconds for a key, {name}", source, None, round(told.seconds, 3), note)


def main() -> None:
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    found = [verdict(item, seed=0, keys=keys) for item in MITIGATIONS]
    both = [asdict(item) for item in rows(found)] + [asdict(item) for item in found]
    print(json.dumps(both, indent=2))


if __name__ == "__main__":
    main()
