"""securefl: federated learning with differential privacy, encrypted aggregation and pruning.

>>> from securefl import load, run  # doctest: +SKIP
>>> run(load("clinics.toml")).summary.metric  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from securefl.config import ConfigurationError, Experiment, load

if TYPE_CHECKING:
    from securefl.runs import Run, resume, run

__all__ = ["ConfigurationError", "Experiment", "Run", "load", "resume", "run"]


def __getattr__(name: str) -> Any:
    # torch is heavy: `import securefl` stays quick, and what trains is loaded when it is used.
    if name in {"Run", "resume", "run"}:
        from securefl import runs

        return getattr(runs, name)
    raise AttributeError(f"module 'securefl' has no attribute {name!r}")
