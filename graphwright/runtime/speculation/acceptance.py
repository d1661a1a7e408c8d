"""How well a drafter guesses a text, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Draft, make_drafter


def measure_acceptance(
    drafter_name: str, rows: Sequence[Sequence[int]], tokens: int, *, program: Any = None, **options: Any
) -> float:
    """The probability that a draft token is accepted if those before it were, over given texts.

    Decoding is replayed as if the model had written each row: the first half is the prompt, the rest is
    drafted, compared and observed cycle by cycle. A cycle in which the drafter guesses nothing counts
    as one refused token, so that the figure may be used as if every cycle drafted.

    Args:
        drafter_name: a registered drafter.
        rows: token sequences; those shorter than two tokens are left out.
        tokens: most tokens in a draft.
        program: what the drafter's ``begin`` gets; the n-gram drafter needs none.
        options: of the drafter.

    Returns:
        Accepted tokens over accepted and refused ones, from 0 to 1; 0 if there was nothing to guess.

    Raises:
        InputError: no such drafter or option, no tokens to draft, or a drafter that needs logits.
    """
    if tokens < 1:
        raise InputError(f"tokens={tokens} drafts nothing", where="measure_acceptance", hint="tokens >= 1")
    guesser = make_drafter(drafter_name, **options)
    if guesser.wants_logits:
        raise InputError(
            f"drafter '{drafter_name}' needs the model's logits, which a text does not have",
            where="measure_acceptance",
            hint="measure it by generating with the program; see OptimizedModel.stats()",
        )
    accepted = refused = 0
    for row in rows:
        if len(row) < 2:
            continue
        text = [int(token) for token in row]
        start = (len(text) + 1) // 2
        guesser.begin([text[:start]], program)
        while start < len(text):
            budget = min(tokens, len(text) - start)
            draft = guesser.propose([0], [budget])[0]
            kept, refusal = _follow(draft, text[start:])
            accepted, refused = accepted + kept, refused + refusal
            step = text[start : start + kept + 1]  # the model's own token follows the accepted ones
            guesser.observe(0, step)
            start += len(step)
    return accepted / (accepted + refused) if accepted else 0.0


def _follow(draft: Draft, text: Sequence[int]) -> tuple[int, int]:
    """Tokens of the draft that the text goes through, and 1 if it then left a guess (or there was none)."""
    if not draft.tokens:
        return 0, 1
    node = kept = 0
    for token in text:
        options = draft.successors[node]
        if not options:
            return kept, 0
        if token not in options:
            return kept, 1
        node = options[token] + 1
        kept += 1
    return kept, 0
