"""Which tokens the rows of a batch share, and where the program keeps them.

A state with a shared prefix holds its keys and values once; each row's own stores follow it. The prefix is
filled by a state of one row, whose stores *are* the prefix: nothing is copied but what each row keeps for
itself, such as the rings of sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.ir.errors import InputError

#: Fewer tokens are not worth a step of their own, where nobody promised any.
LEAST_TOKENS = 16


def common_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    shortest = min(map(len, prompts))
    for place in range(shortest):
        if any(prompt[place] != prompts[0][place] for prompt in prompts):
            return place
    return shortest


def tokens_to_share(promised: int | None, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens of these prompts are run and stored once.

    Each row keeps at least its last token, whose logits begin its answer. A batch of one row shares nothing.

    Args:
        promised: what the program was promised; 0: whatever there is; None: it shares nothing.

    Raises:
        InputError: the rows do not begin with what was promised.
    """
    if promised is None or len(prompts) == 1:
        return 0
    common, most = common_tokens(prompts), min(map(len, prompts)) - 1
    if promised == 0:
        return min(common, most) if min(common, most) >= LEAST_TOKENS else 0
    if common < promised:
        raise _broken_promise(promised, common, prompts)
    return min(promised, most)


def _broken_promise(promised: int, common: int, prompts: Sequence[Sequence[int]]) -> InputError:
    differs = next(
        row for row, mine in enumerate(prompts) if len(mine) <= common or mine[common] != prompts[0][common]
    )
    what = "ends there" if len(prompts[differs]) <= common else f"has token {prompts[differs][common]} there"
    if differs == 0:  # it is the first row that is too short
        other = ""
    else:
        other = f", row 0 {'ends' if len(prompts[0]) <= common else f'has {prompts[0][common]}'}"
    return InputError(
        f"the rows were promised to share their first {promised} tokens, and share {common}: "
        f"row {differs} {what} (position {common}){other}",
        where=f"input_ids, row {differs}",
        hint="drop shared_prefix from the workload (or tokens from share_prefix), or fix the prompts",
    )


def prefix_for(promised: int | None, batch: int, capacity: int) -> int:
    """The prefix of a batch that keeps the promise, for timing; each row has a token of its own."""
    return min(promised or 0, capacity - 1) if batch > 1 else 0
