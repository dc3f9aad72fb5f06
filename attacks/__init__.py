"""What leaks: attacks replayed on what each adversary really saw.

Reads securefl and protocols; neither of them imports it.

>>> from attacks import Case, assess, find  # doctest: +SKIP
>>> assess(find("loss"), Case.open(Path("runs/latest")), seed=1).verdict  # doctest: +SKIP

What an attack is made of is in `attacks.attack`, what adversaries see in `attacks.view`, and what
counts prove in `attacks.evidence`; docs/attacks.md adds an attack in one file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.attack import find, installed
    from attacks.audit import Audit, assess
    from attacks.case import Case

__all__ = ["Audit", "Case", "assess", "find", "installed"]

_HOMES = {
    "find": "attack",
    "installed": "attack",
    "Audit": "audit",
    "assess": "audit",
    "Case": "case",
}


def __getattr__(name: str) -> Any:
    # torch is heavy, and the command line imports this package for every command.
    if name not in _HOMES:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attacks.{_HOMES[name]}"), name)
