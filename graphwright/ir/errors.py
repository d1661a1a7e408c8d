"""The one exception family that graphwright raises.

Every error says what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class GraphwrightError(Exception):
    """Base of every error that graphwright raises on purpose.

    Args:
        what: what was wrong, in one sentence.
        where: the model, argument, source line, file or graph node it was found at.
        hint: what the caller can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if hint:
            parts.append(f"  what to do: {hint}")
        super().__init__("\n".join(parts))


class InputError(GraphwrightError, ValueError):
    """An argument of a public call is not usable."""


class UnsupportedModelError(GraphwrightError):
    """The model is not one graphwright can compile (encoder, quantized, several devices, ...)."""


class CaptureError(GraphwrightError):
    """The model's forward could not be captured as one graph."""


class UnknownTargetError(GraphwrightError):
    """No target of that name exists."""


class PassError(GraphwrightError):
    """A pass that was asked for does not exist or cannot apply."""


class VerificationError(GraphwrightError):
    """A graph broke one of the invariants of docs/architecture.md."""


class BudgetError(GraphwrightError):
    """No plan meets the budget."""


class CapacityError(GraphwrightError):
    """A sequence does not fit the cache or the model's positions."""


class OutOfMemoryError(GraphwrightError, MemoryError):
    """Memory ran out while a program ran; what the call held is free again."""


class PlanError(GraphwrightError):
    """A saved plan is damaged, or was made for another model, shape or machine."""


class UnsupportedGenerationError(GraphwrightError, NotImplementedError):
    """A generation option that graphwright refuses by name."""


class ProgramBusyError(GraphwrightError):
    """Another thread is generating with the same program."""


class CodecError(GraphwrightError, ValueError):
    """A codec does not parse, or cannot store what it is given."""


class SelectorError(GraphwrightError, ValueError):
    """A selector of cached tokens does not parse, or cannot serve what it is given."""


class MaskError(GraphwrightError, ValueError):
    """A mask of a long step does not parse, or its sizes make no mask."""
