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
    """Li and Micciancio recover the whole key from what SEAL decodes; so do we, from less too."""
    source = "Li and Micciancio, Eurocrypt 2021, section 6, on SEAL"
    for told in verdicts:
        if told.mitigation.startswith("none"):
            note = f"degree 8192, {told.found} of {told.keys} keys"
            share = told.found / told.keys
            yield Row(f"keys recovered, {told.mitigation}", source, 1.0, share, note)
            note = 'the paper says "very modest running times"'
            yield Row(f"seconds, {told.mitigation}", source, None, round(told.seconds, 3), note)


def main() -> None:
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    found = [verdict(item, seed=0, keys=keys) for item in MITIGATIONS]
    both = [asdict(item) for item in rows(found)] + [asdict(item) for item in found]
    print(json.dumps(both, indent=2))


if __name__ == "__main__":
    main()
