"""Base of drafters whose program is the target's after more passes: one cache, one copy of the weights."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation
from graphwright.runtime.speculation.program_drafter import DraftSession, ProgramDrafter, ProgramSession


@dataclass
class DraftProgramDrafter(ProgramDrafter):
    """Runs ``Program.draft``, which was built with :meth:`draft_passes`, over the target's own cache.

    What a draft step appends to the cache is written again by the step that verifies it.
    """

    @abstractmethod
    def draft_passes(self) -> tuple[str, ...]:
        """The passes, as text, that make the draft program's graph of the target's."""

    def open(self, generation: Generation) -> DraftSession:
        """A session over the target's state.

        Raises:
            InputError: the program was built without this drafter's draft program.
        """
        wanted, draft = self.draft_passes(), generation.program.draft
        if draft is None or draft.lowered.draft_passes != wanted:
            found = "none" if draft is None else f"one that {' and '.join(draft.lowered.draft_passes)} made"
            raise InputError(
                f"drafter {self} runs a draft program that {' and '.join(wanted)} makes of the target's, and "
                f"this program has {found}",
                where="speculation",
                hint=f"optimize the model with speculate{{drafter={self}}} among its passes",
            )
        return ProgramSession(draft, generation.state)
