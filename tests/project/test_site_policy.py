"""The page that people sign by tells every key of site.toml, and its default as it is."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from securefl.config import Budget, Policy, Site, SiteData

PAGE = (Path(__file__).parents[2] / "docs" / "site-policy.md").read_text()
ROWS = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*?) \|$", PAGE, re.MULTILINE))
IN_WORDS = {
    "maximum_epsilon": "the budget's",
    "maximum_delta": "the budget's",
    "units": 'the budget\'s, and `"site"`',
    "callables": "none may be named",
    "transcript_until": "no transcript",
}


def test_every_key_is_explained() -> None:
    keys = {
        *(f"data.{field.alias or key}" for key, field in SiteData.model_fields.items()),
        *(f"budget.{key}" for key in Budget.model_fields),
        *Policy.model_fields,
        *Site.model_fields,
    } - {"data", "budget", "policy", "consortium"}
    assert set(ROWS) == keys
    assert "`[consortium]` holds" in PAGE


def test_every_default_is_the_one_in_force() -> None:
    defaults = json.loads(Policy().model_dump_json())
    for key in Policy.model_fields:
        if key in IN_WORDS:
            assert ROWS[key] == IN_WORDS[key]
            assert not defaults[key]
        else:
            told = tomllib.loads(f"x = {ROWS[key].strip('`')}")["x"]
            assert told == defaults[key], key
