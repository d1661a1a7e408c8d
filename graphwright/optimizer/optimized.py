"""What ``optimize`` returns: a program with its plan and its report."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graphwright.ir.graph import Graph
from graphwright.optimizer.compiled_kernels import CompiledKernels
from graphwright.optimizer.planner import Plan
from graphwright.optimizer.report import Report
from graphwright.runtime import model as runtime
from graphwright.runtime.decoding.protocol import DecodingProgram
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation
from graphwright.runtime.speculation.draft_model import NeedsModel


def weights_bytes(graph: Graph, among: Container[int] | None = None) -> int:
    """Bytes of the storages that hold the parameters; tied weights count once.

    Args:
        among: addresses of the storages that count; None for all.
    """
    return _storage_bytes(graph.parameters.values(), among)


def _storage_bytes(held: Iterable[Any], among: Container[int] | None = None) -> int:
    storages = [t.untyped_storage() for t in held if isinstance(t, torch.Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if among is None or address in among)


class OptimizedModel(runtime.OptimizedModel):
    """A compiled model that stands where the transformers model stood.

    Attributes:
        plan: the passes that were applied, and what for.
        graph: the rewritten graph.
        stock: the model that it was made from; it owns the weights.
        compiled: kernels for the target, if it is another machine's GPU; None else.
    """

    program: Program

    def __init__(
        self,
        program: Program,
        *,
        config: Any,
        generation_config: Any,
        speculation: Speculation | None,
        plan: Plan,
        report: Report,
        graph: Graph,
        stock: PreTrainedModel,
        compiled: CompiledKernels | None = None,
    ) -> None:
        super().__init__(program, config=config, generation_config=generation_config, speculation=speculation)
        self.plan = plan
        self.graph = graph
        self._report = report
        self.stock = stock
        self.compiled = compiled

    @property
    def report(self) -> Report:
        """Every decision: why, predicted, measured; with the speculation statistics so far."""
        if self.speculation is not None:
            self._report.speculation = {
                k: v for k, v in self.stats().items() if k not in ("last", "by_drafter")
            }
        return self._report

    def _assistant_program(self, assistant: Any) -> DecodingProgram:
        """Of a transformers model: compiled when it first assists, and kept for as long as it lives."""
        if isinstance(assistant, PreTrainedModel):
            from graphwright.optimizer.draft_models import draft_program  # which makes objects of this class

            return draft_program(assistant)
        return super()._assistant_program(assistant)

    def memory(self) -> dict[str, int]:
        """Resident bytes by kind, from the real buffers.

        Returns:
            ``weights`` (shared with the stock model), ``tables`` (rotations, codebooks and maps that passes
            made), ``prepared`` (matrices laid out for the kernels), ``cache`` (of the generations alive
            now), ``draft_model`` (all of these of a second model, if one drafts) and ``total``. Of a packed
            cache also the parts of ``cache``: ``cache.pages``, ``cache.tail`` and ``cache.first`` (tokens
            kept as they are), ``cache.stores`` (not packed).
        """
        own = {t.untyped_storage().data_ptr() for t in (*self.stock.parameters(), *self.stock.buffers())}
        held = weights_bytes(self.graph)
        weights = weights_bytes(self.graph, own)
        kinds = {
            "weights": weights,
            "tables": held - weights,
            "prepared": self.program.prepared_bytes,
            "cache": self.program.cache_bytes(),
        }
        draft = self._second_program()
        if draft is not None:
            kinds["draft_model"] = _storage_bytes(draft.lowered.slots) + draft.cache_bytes()
        parts = {f"cache.{part}": held for part, held in self.program.cache_parts().items()}
        return {**kinds, **parts, "total": sum(kinds.values())}

    def _second_program(self) -> Program | None:
        """The program of the second model that the plan drafts with, if it does."""
        drafter = None if self.speculation is None else self.speculation.drafter
        given = drafter.given if isinstance(drafter, NeedsModel) else None
        return given.program if given is not None and isinstance(given.program, Program) else None

    def save(self, directory: str | Path) -> None:
        """Write the plan, the graph, the report and compiled kernels for ``graphwright.load``.

        Raises:
            PlanError: the directory exists and is not a saved plan.
        """
        from graphwright.optimizer.saving import save

        save(self, Path(directory))
