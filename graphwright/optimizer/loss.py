"""Plans that may lose quality: what each option loses is measured, and so is what the chosen plan loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph
from graphwright.optimizer.build import Built, build, op_by_op
from graphwright.optimizer.planner import Request, plan_best, plan_given
from graphwright.optimizer.progress import step
from graphwright.optimizer.quality import (
    Calibration,
    Quality,
    Reference,
    Sensitivity,
    calibration_text,
    check_combined,
    measure_sensitivities,
    site_options,
)
from graphwright.optimizer.quality.text import make_calibration, positions
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Pass, parse_pass

# Choices that a measurement may refuse before nothing lossy is left to try.
_ATTEMPTS = 3
# Contiguous layers that are measured together: one measurement for each takes minutes, not an hour.
_GROUPS = 6
# Long enough that most of what is read was packed: a page and a tail take the first hundred or two.
_ROWS, _TOKENS = 3, 512
# Of what shows behind a long context only: one row as long as the workload's, up to this, whose last tokens
# are compared. Its prompt is most of the work, so that fewer layers are told apart.
_LONG_TOKENS, _COMPARED, _LONG_GROUPS = 2048, 256, 3


@dataclass(frozen=True)
class Sample:
    """What losses are measured on.

    Attributes:
        text: the rows.
        prompt: tokens of each row that are context only: they run as a prompt.
        groups: into how many parts the layers are put.
    """

    text: Calibration
    prompt: int = 0
    groups: int = _GROUPS


class Losses:
    """Measures what lossy passes lose on a calibration text.

    Args:
        model: the stock model.
        graph: its canonical graph.
        prompts: the caller's, as token ids; the embedded text if there are none.
        seed: of the choice of text.
        workload: how long texts will be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graph: Graph,
        prompts: Sequence[list[int]],
        seed: int,
        workload: Workload | None = None,
    ) -> None:
        self._model, self._graph, self._prompts, self._seed = model, graph, prompts, seed
        self._context = min((workload or Workload()).capacity, _LONG_TOKENS)
        self.calibration: Calibration = calibration_text(
            model, prompts or None, seed=seed, rows=_ROWS, tokens=_TOKENS
        )
        self._known: dict[int, Reference] = {}
        self._contextual: set[str] = set()  # what was measured behind a long context

    def measure(self, graph: Graph, passes: Sequence[Pass]) -> Mapping[tuple[str, str], Sensitivity]:
        """What each pass loses at each of its sites in an exact graph with a cache; kept on disk."""
        found: dict[tuple[str, str], Sensitivity] = {}
        for sample, chosen in self._samples(passes):
            options = site_options(graph, chosen)
            with step("measuring what lossy passes lose", total=1.0) as bar:
                found |= measure_sensitivities(
                    graph,
                    options,
                    sample.text,
                    groups=sample.groups,
                    prompt=sample.prompt,
                    make_program=lambda rewritten: op_by_op(self._model, rewritten),
                    progress=lambda _, done, bar=bar: bar.advance(done - bar.completed),  # type: ignore[misc]
                )
        return found

    def _samples(self, passes: Sequence[Pass]) -> list[tuple[Sample, list[Pass]]]:
        """Passes by the text that they are measured on."""
        far = [p for p in passes if p.needs_context]
        near = [p for p in passes if not p.needs_context]
        self._contextual.update(p.name for p in far)
        samples = [(Sample(self.calibration), near)] if near else []
        return samples + ([(self.long, far)] if far else [])

    @cached_property
    def long(self) -> Sample:
        """A row as long as the workload's texts, or as far as there is text, whose end is compared."""
        found = self.calibration
        if found.source == "generated":  # writing so much takes long: what is written already, row after row
            row = [token for own in found.rows for token in own][: self._context]
        else:
            prompts = sorted(self._prompts, key=len)[-1:]
            found = calibration_text(
                self._model, prompts or None, seed=self._seed, rows=1, tokens=self._context
            )
            row = found.rows[0]
        limit = positions(self._model)
        row = row[: limit or len(row)]
        text = make_calibration([row], found.source, found.note)
        return Sample(text, len(row) - 1 - min(_COMPARED, len(row) // 2), _LONG_GROUPS)

    def plan_and_build(self, request: Request) -> tuple[Built, list[Decision]]:
        """The fastest plan whose measured loss is within the budget.

        Losses are added up over sites for the choice. The chosen program is measured once as a whole; if
        it exceeds the budget, the choice is made again under a budget tightened by as much, and in the end
        without any loss.

        Returns:
            The program, and what was refused on the way.
        """
        request = replace(request, measure_loss=self.measure)
        refused: list[Decision] = []
        for attempt in range(_ATTEMPTS + 1):
            if attempt == _ATTEMPTS:
                request = replace(request, tighten=0.0)
            planned = plan_best(self._graph, request)
            built = build(self._model, planned)
            if not built.is_lossy:
                break
            quality = self.measure_whole(built, request)
            predicted = Sensitivity(planned.plan.kl, math.log(planned.plan.perplexity_ratio))
            verdict = check_combined(predicted, quality, request.budget)
            if verdict.ok:
                break
            losses = ({"mean_kl": planned.plan.kl}, {"mean_kl": quality.kl})
            refused += [
                Decision(text, "", Status.UNDONE, verdict.reason, *losses, "lossy") for text in built.lossy
            ]
            request = replace(request, tighten=verdict.tighten)
        return built, self.notes() + refused

    def measure_whole(self, built: Built, request: Request) -> Quality:
        """What a program loses beside the exact one; noted in ``built``."""
        passes = [parse_pass(text) for text in built.lossy]
        sample = self.long if any(p.needs_context for p in passes) else Sample(self.calibration)
        self._contextual.update(p.name for p in passes if p.needs_context)
        quality = self._reference(request, sample).measure(built.program)
        built.quality = {
            "mean_kl": quality.kl,
            "perplexity_ratio": quality.perplexity_ratio,
            "top1_agreement": quality.top1_agreement,
            "tokens": quality.tokens,
            "context": max(map(len, sample.text.rows)),
        }
        return quality

    def notes(self) -> list[Decision]:
        """What losses are measured on, where that is not simply the caller's text."""
        text, reasons = self.calibration, []
        if text.source != "caller" or text.note:
            reason = f"losses are measured on {sum(map(len, text.rows))} tokens of {_ORIGIN[text.source]}"
            reasons.append(reason + (f" ({text.note})" if text.note else ""))
        if self._contextual:
            (row,), names = self.long.text.rows, " and ".join(sorted(self._contextual))
            compared = len(row) - 1 - self.long.prompt
            reasons.append(
                f"what {names} loses is measured on the last {compared} of {len(row)} tokens of "
                f"{_ORIGIN[self.long.text.source]}, with those before as a prompt"
            )
        return [Decision("calibration", "", Status.FALLBACK, r, None, None, "exact") for r in reasons]

    def _reference(self, request: Request, sample: Sample) -> Reference:
        """The exact program: keys and values, nothing else."""
        if sample.prompt not in self._known:
            exact = plan_given(self._graph.copy(), ["place_cache{cut=kv}"], request)
            program = op_by_op(self._model, exact.graph)
            self._known[sample.prompt] = Reference(program, sample.text.rows, prompt=sample.prompt)
        return self._known[sample.prompt]


_ORIGIN = {"caller": "the caller's text", "embedded": "Python's prose", "generated": "generated text"}
