"""The report: every decision that was made about a program, why, and what it cost.

A :class:`Report` is plain data. It renders as text (``str(report)``), as JSON with a schema
(``report.schema.json`` beside this file) and as one self-contained HTML file.

Nested dictionaries hold plain numbers, with the unit in the key: ``seconds_per_token``,
``tokens_per_second``, ``bytes_read``, ``weights_bytes``. :mod:`graphwright.optimizer.quantities`
turns key and number into words.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError
from graphwright.optimizer.plain_data import NUMBER, Either, misfit, plain
from graphwright.optimizer.report_cost import PhaseCost

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "graphwright.report/1"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


class Status(str, Enum):
    """What became of one pass at one site."""

    APPLIED = "applied"
    ILLEGAL = "illegal"  # would change what the model computes, or cannot be expressed
    UNPROFITABLE = "unprofitable"  # legal, and the cost model predicts no gain
    NOT_FOUND = "not found"  # the pass has no site in this model
    UNDONE = "undone"  # applied, and a measurement contradicted the prediction
    FALLBACK = "fallback"  # runs on a slower implementation than the target could have

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Decision:
    """One pass at one site.

    Args:
        pass_name: the pass as its round-trip string, e.g. ``speculate{drafter=ngram}``.
        site: where, e.g. ``layers.3``; empty for a pass that concerns the whole program.
        status: what became of it.
        reason: why, in one sentence.
        predicted: what the cost model expected of it (units in the keys; negative is saved).
        measured: the same keys, measured; None if it was not.
        fidelity: ``exact``, ``reordered``, ``distribution`` or ``lossy``.
    """

    pass_name: str
    site: str
    status: Status
    reason: str
    predicted: dict[str, float] | None = None
    measured: dict[str, float] | None = None
    fidelity: str = "exact"


@dataclass
class Report:
    """Everything that was decided, predicted and measured for one program.

    Args:
        model: what was optimized, e.g. ``LlamaForCausalLM (smollm2), 134.5 M parameters, bfloat16``.
        target: the machine it was optimized for.
        workload: ``batch``, ``prompt``, ``generate``, ``shared_prefix``.
        decisions: every pass and site, refusals included.
        predicted: by section (``decode``, ``prefill``, ``memory``, ...), each a dictionary of
            quantities with the unit in the key.
        measured: the same sections and keys, plus ``quality`` (``max_abs_logit_difference``,
            ``mean_kl``, ``top1_agreement``) and ``seconds`` (how long each step of optimizing took).
        ops: how many of each semantic op the canonical graph holds.
        near_misses: sites that almost matched a semantic op, and what was in the way.
        kernels: ``{"op", "provider", "reason"}``, one for each op that was lowered.
        compiled: kernels compiled for a target that is not here: ``target``, ``arch``, ``triton`` (its
            version), ``note`` (what is missing, and why) and ``kernels``; empty on the target itself.
        speculation: statistics of the drafts, or None without speculation.
        costs: by phase (``decode``, ``verify``, ``prefill``), what :meth:`cost` prints: ``expression``
            (strings in B, C and T), ``at`` (batch, context, tokens) and ``value`` (numbers).
        plans: the front of plans and the runners-up: ``passes``, ``status`` (``chosen``, ``runner-up``,
            ``undone``), ``reason``, ``predicted`` and ``measured``, each ``seconds_per_token``,
            ``memory_bytes``, ``kl`` and ``perplexity_ratio``.
        curves: ``roofline`` (``flops_per_second`` and ``bytes_per_second`` of the target, and ``ops``) and
            ``memory`` (``points`` by context, ``limit_bytes``), for the plots.
        crossovers: ``what`` turns at which ``value`` (None: nowhere) of which ``quantity``, and a ``note``.
        code_before: the captured graph as runnable Python.
        code_after: the optimized graph as runnable Python.
        versions: graphwright, torch, transformers, Python, CPU name, threads.
    """

    model: str
    target: str
    workload: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    predicted: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    near_misses: list[str] = field(default_factory=list)
    kernels: list[dict[str, str]] = field(default_factory=list)
    compiled: dict[str, Any] = field(default_factory=dict)
    speculation: dict[str, Any] | None = None
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    crossovers: list[dict[str, Any]] = field(default_factory=list)
    code_before: str = ""
    code_after: str = ""
    versions: dict[str, Any] = field(default_factory=dict)

    def by_status(self, status: Status) -> list[Decision]:
        """The decisions that ended in ``status``, in the order they were made."""
        return [decision for decision in self.decisions if decision.status is status]

    def cost(self, phase: str = "decode") -> PhaseCost:
        """What one step of ``phase`` costs; its ``str()`` prints the expressions and their values.

        Raises:
            InputError: the report holds no cost of such a phase; names those there are.
        """
        if phase not in self.costs:
            known = ", ".join(self.costs)
            hint = f"there are {known}" if known else "this report holds no costs; plan or optimize again"
            raise InputError(f"no cost of a phase {phase!r}", where="report", hint=hint)
        return PhaseCost(phase, **self.costs[phase])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data that matches ``report.schema.json``; numbers that are not finite become None."""
        return {"schema": SCHEMA, **plain(asdict(self))}

    def to_json(self) -> str:
        """The report as JSON text with a ``schema`` key; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "report JSON") -> Report:
        """Read a report that :meth:`to_json` wrote.

        Raises:
            InputError: the text is not JSON, or not a report of this schema version.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where=where, hint="the file may be cut off") from None
        _check(data, where)
        data = {key: value for key, value in data.items() if key != "schema"}
        data["decisions"] = [Decision(**{**d, "status": Status(d["status"])}) for d in data["decisions"]]
        return cls(**data)

    def to_text(self, width: int = 100, *, color: bool = False) -> str:
        """The report as text of at most ``width`` columns (80 or more read well)."""
        from graphwright.optimizer.report_text import render_text

        return render_text(self, width=width, color=color)

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained HTML page that works offline; written to ``path`` if given."""
        from graphwright.optimizer.report_html import render_page

        page = render_page(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> RenderableType:
        from graphwright.optimizer.report_text import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        from graphwright.optimizer.report_html import render_fragment

        return render_fragment(self)


_QUANTITIES: dict[str, Any] = {"*": NUMBER}
_MAYBE_QUANTITIES = Either((_QUANTITIES, None))
_DECISION: dict[str, Any] = {
    "pass_name": str,
    "site": str,
    "status": frozenset(status.value for status in Status),
    "reason": str,
    "predicted": _MAYBE_QUANTITIES,
    "measured": _MAYBE_QUANTITIES,
    "fidelity": frozenset({"exact", "reordered", "distribution", "lossy"}),
}
_COST: dict[str, Any] = {
    "expression": {"*": Either((str, {"*": str}))},
    "at": _QUANTITIES,
    "value": {"*": Either((*NUMBER.shapes, _QUANTITIES))},
}
_PLAN: dict[str, Any] = {
    "passes": [str],
    "status": frozenset({"chosen", "runner-up", "undone"}),
    "reason": str,
    "predicted": _QUANTITIES,
    "measured": _MAYBE_QUANTITIES,
}
_CURVES: dict[str, Any] = {
    "roofline?": {
        "flops_per_second": NUMBER,
        "bytes_per_second": NUMBER,
        "ops": [{"op": str, "*": NUMBER}],
    },
    "memory?": {"points": [{"context": NUMBER, "*": NUMBER}], "limit_bytes": NUMBER},
}
_CROSSOVER: dict[str, Any] = {
    "what": str,
    "quantity": frozenset({"batch", "context"}),
    "value": NUMBER,
    "note": str,
}
_COMPILED: dict[str, Any] = {
    "target?": str,
    "arch?": str,
    "triton?": str,
    "note?": str,
    "kernels?": [
        {
            "label": str,
            "ops": str,
            "registers": NUMBER,
            "spill_bytes": NUMBER,
            "shared_bytes": NUMBER,
            "num_warps": NUMBER,
            "binary_bytes": NUMBER,
            "error": str,
        }
    ],
}
#: What ``report.schema.json`` says, for readers without a JSON Schema validator.
_SHAPE: dict[str, Any] = {
    "schema": str,
    "model": str,
    "target": str,
    "workload": dict,
    "decisions": [_DECISION],
    "predicted": dict,
    "measured": dict,
    "ops": dict,
    "near_misses": [str],
    "kernels": [{"op": str, "provider": str, "reason": str, "*": str}],
    "speculation": Either((dict, None)),
    "code_before": str,
    "code_after": str,
    "versions": dict,
    # Documents from before these fields existed lack them.
    "compiled?": _COMPILED,
    "costs?": {"*": _COST},
    "plans?": [_PLAN],
    "curves?": _CURVES,
    "crossovers?": [_CROSSOVER],
}


def _check(data: object, where: str) -> None:
    """Refuse data that is not a report of this schema; the JSON Schema file says the same in full."""
    hint = f"this version reads {SCHEMA}, as written by Report.to_json()"
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"not a {SCHEMA} document: found {found!r}", where=where, hint=hint)
    if problem := misfit(data, _SHAPE):
        raise InputError(f"the report is malformed: {problem}", where=where, hint=hint)
