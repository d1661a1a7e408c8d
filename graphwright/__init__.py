"""graphwright: a compiler for LLM inference.

``optimize(model, target)`` turns a transformers causal language model into a faster program;
``plan(config, target)`` predicts one; ``torch.compile(model, backend="graphwright")`` uses the same
passes. Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.cost_model.target import Target
    from graphwright.cost_model.workload import Budget, Workload
    from graphwright.ir.errors import GraphwrightError
    from graphwright.optimizer.backend import report
    from graphwright.optimizer.catalog import codecs, drafters, passes, selectors, targets
    from graphwright.optimizer.driver import optimize
    from graphwright.optimizer.optimized import OptimizedModel
    from graphwright.optimizer.report import Report
    from graphwright.optimizer.saving import load
    from graphwright.optimizer.what_if import plan

_HOMES = {
    "optimize": "graphwright.optimizer.driver",
    "plan": "graphwright.optimizer.what_if",
    "load": "graphwright.optimizer.saving",
    "report": "graphwright.optimizer.backend",
    "OptimizedModel": "graphwright.optimizer.optimized",
    "Report": "graphwright.optimizer.report",
    "Workload": "graphwright.cost_model.workload",
    "Budget": "graphwright.cost_model.workload",
    "Target": "graphwright.cost_model.target",
    "targets": "graphwright.optimizer.catalog",
    "passes": "graphwright.optimizer.catalog",
    "codecs": "graphwright.optimizer.catalog",
    "selectors": "graphwright.optimizer.catalog",
    "drafters": "graphwright.optimizer.catalog",
    "GraphwrightError": "graphwright.ir.errors",
}

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "GraphwrightError",
    "OptimizedModel",
    "Report",
    "Target",
    "Workload",
    "codecs",
    "drafters",
    "load",
    "optimize",
    "passes",
    "plan",
    "report",
    "selectors",
    "targets",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
