"""The CKKS key of TenSEAL's users, and what each mitigation does about it."""

from __future__ import annotations

from collections.abc import Iterator

from row import Row

from attacks.ckks_key import Verdict


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
