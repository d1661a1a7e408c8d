"""Second models to draft with: loaded, compiled and handed to drafters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph
from graphwright.optimizer.draft_program import speculation_of
from graphwright.optimizer.quality.tokenizer import find_tokenizer
from graphwright.passes.base import Pass
from graphwright.passes.speculate import Speculate
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation, parse_drafter
from graphwright.runtime.speculation.draft_model import DraftModel, NeedsModel

# What a model was compiled to. A program holds the model's weights, not the model.
_PROGRAMS: weakref.WeakKeyDictionary[PreTrainedModel, Program] = weakref.WeakKeyDictionary()


def draft_program(model: PreTrainedModel) -> Program:
    """A model as a program to draft with, by exact passes; compiled once for each model object.

    Raises:
        GraphwrightError: the model cannot be compiled, see :func:`graphwright.optimize`.
    """
    from graphwright.optimizer.driver import optimize  # which builds programs that draft

    found = _PROGRAMS.get(model)
    if found is None or found.device != model.device:
        found = _PROGRAMS[model] = optimize(model).program
    return found


def ready_speculation(graph: Graph, program: Program, model: PreTrainedModel) -> Speculation | None:
    """What the plan drafts with, its second model loaded and compiled.

    Args:
        graph: of the plan.
        program: that runs it.
        model: the stock model, whose tokenizer says what another vocabulary has in common with it.

    Raises:
        InputError: the second model cannot be loaded, or does not go with the program.
        GraphwrightError: it cannot be compiled.
    """
    speculation = speculation_of(graph)
    if speculation is not None and isinstance(speculation.drafter, NeedsModel):
        drafter = speculation.drafter
        draft = _load(drafter.path, program)
        tokenizer, _ = find_tokenizer(draft, draft.config.get_text_config().vocab_size)
        ours, _ = find_tokenizer(model, program.vocab_size)
        drafter.use(DraftModel(draft_program(draft), tokenizer, ours))
        drafter.check(program)
    return speculation


def check_draft_models(passes: Sequence[Pass]) -> None:
    """Refuse passes that draft with a model that is not there, before anything is compiled.

    Raises:
        InputError: no model is named, or none is found under its name.
    """
    for one in passes:
        drafter = parse_drafter(one.drafter) if isinstance(one, Speculate) else None
        if isinstance(drafter, NeedsModel):
            if not drafter.path:
                raise InputError(
                    f"drafter={drafter} does not say which model drafts",
                    where=str(one),
                    hint=f"drafter={drafter.name}(path=folder)",
                )
            _found(drafter.path, AutoConfig)


def _load(path: str, program: Program) -> PreTrainedModel:
    model: PreTrainedModel = _found(path, AutoModelForCausalLM, dtype="auto")
    moved: PreTrainedModel = model.to(program.device).eval()  # type: ignore[arg-type]
    return moved


def _found(path: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the draft model cannot be loaded: {first}",
            where=path,
            hint="path is a folder, or a name on the hub, of a transformers causal language model",
        ) from error
