"""Second models of a call: ``generate(assistant_model=...)`` with transformers' options as a speculation.

Source of the options: transformers' assisted generation (Gante 2023) and its ``GenerationConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.protocol import DecodingProgram
from graphwright.runtime.decoding.refusals import refuse
from graphwright.runtime.speculation import AdaptiveLength, FixedLength, LengthRule, Speculation
from graphwright.runtime.speculation.draft_model import DraftModel, NeedsModel
from graphwright.runtime.speculation.drafters.model import ModelDrafter
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS

_WHERE = "generate(assistant_model=...)"
# What transformers takes where nobody says otherwise.
_DEFAULTS = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}
# Options of how transformers aligns two tokenizers, which is done in another way here.
_ALIGNMENT = ("assistant_lookbehind", "target_lookbehind")


def assisted(model: DraftModel, given: Mapping[str, Any], *configs: Any) -> Speculation:
    """Drafts of a second model, as many as transformers' options say.

    ``heuristic`` and ``heuristic_transient`` grow and shrink the drafts as transformers does, row by row, and
    begin anew in each call.

    Args:
        model: the assistant.
        given: the call's keyword arguments.
        configs: generation configurations that may have the options, first ones first.

    Raises:
        InputError: an option that makes no sense.
        UnsupportedGenerationError: one that has no counterpart here.
    """
    for name in _ALIGNMENT:
        if given.get(name) is not None:
            raise refuse(name, given[name], "tokens are aligned by their text; leave it out", _WHERE)
    chosen = {name: _first(name, given, configs) for name in _DEFAULTS}
    rule = _length_rule(chosen["num_assistant_tokens"], chosen["num_assistant_tokens_schedule"])
    drafter = ModelDrafter(confidence=float(chosen["assistant_confidence_threshold"]))
    drafter.use(model)
    return Speculation(drafter, rule)


def second_programs(speculation: Speculation | None, program: DecodingProgram) -> list[Any]:
    """The programs that run beside ``program`` in this speculation, checked to go with it.

    Raises:
        InputError: they do not, or are missing.
    """
    if speculation is None or not isinstance(speculation.drafter, NeedsModel):
        return []
    speculation.drafter.check(program)
    return [speculation.drafter.model.program]


def _first(name: str, given: Mapping[str, Any], configs: tuple[Any, ...]) -> Any:
    """An option from where it is given first."""
    found = [given.get(name), *(getattr(config, name, None) for config in configs), _DEFAULTS[name]]
    return next(value for value in found if value is not None)


def _length_rule(tokens: Any, schedule: Any) -> LengthRule:
    if not isinstance(tokens, (int, float)) or tokens < 1:
        raise InputError(
            f"num_assistant_tokens={tokens!r} drafts nothing", where=_WHERE, hint="an integer, 1 or more"
        )
    most = MAX_TREE_TOKENS - 1
    if schedule == "constant":
        return FixedLength(min(int(tokens), most))
    if schedule in ("heuristic", "heuristic_transient"):
        return AdaptiveLength(start=min(int(tokens), most), low=1, high=most)
    raise InputError(
        f"there is no num_assistant_tokens_schedule={schedule!r}",
        where=_WHERE,
        hint="constant, heuristic or heuristic_transient",
    )
