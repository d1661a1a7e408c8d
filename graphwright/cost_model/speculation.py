"""What speculative decoding is expected to give.

A cycle drafts some tokens and runs the model once over them and the last committed token. Drafts are
accepted along one path from the root down to the first wrong one, and the model's own token follows.
Drafts are either a chain, given by their number n, or a tree, given by the index of each token's parent
(-1 for the root), parents before children, as in ``runtime/speculation/tree.py``.

Sources: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding"
(chains); Chen et al. 2024, "Sequoia", section 3 (trees); Liu et al. 2024, "Optimizing Speculative
Decoding for Serving Large Language Models Using Goodput" (SmartSpec; load).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

from graphwright.cost_model.cost import Cost
from graphwright.cost_model.graph_cost import GraphCost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.ir.errors import InputError

#: Of a chain: one probability for all positions, or one for each.
Acceptance = float | Sequence[float]
#: Of a tree: for each depth (the root's children first), one probability for each child, first tried first.
TreeAcceptance = Sequence[Sequence[float]]
#: A chain of so many tokens, or a tree by its parents.
Drafts = int | Sequence[int]


# --- expected tokens -----------------------------------------------------------------------------


def expected_tokens(acceptance: Acceptance, drafts: int) -> float:
    """Tokens that one cycle yields on average with a chain, the model's own token included.

    Args:
        acceptance: probability that a draft is accepted if those before it were: one number, which gives
            equation 1 of Leviathan et al., ``(1 - a^(n+1)) / (1 - a)``, or one for each position.
        drafts: tokens drafted per cycle, n.

    Raises:
        InputError: a probability outside of 0 to 1, fewer positions than drafts, or n below 0.
    """
    chances = [acceptance] * drafts if isinstance(acceptance, (int, float)) else list(acceptance)
    if drafts < 0 or len(chances) < drafts or not all(0 <= chance <= 1 for chance in chances):
        raise InputError(
            f"acceptance {acceptance!r} does not describe {drafts} drafts",
            where="expected_tokens",
            hint="probabilities from 0 to 1, one for all positions or one for each",
        )
    return 1.0 + sum(itertools.accumulate(chances[:drafts], lambda reached, chance: reached * chance))


def expected_tree_tokens(
    acceptance: TreeAcceptance, parents: Sequence[int], *, replacement: bool = False
) -> float:
    """Tokens that one cycle yields on average with a tree, the model's own token included.

    A drafted token is reached if every token on its path was accepted, so it adds the product of their
    probabilities; the sum over all tokens and the root is the expectation (Sequoia, section 3). There a
    probability depends on a child's rank only, which is one row here.

    Args:
        acceptance: by depth (the root's children first) and by rank among siblings; depths beyond the
            last row take the last row.
        parents: ``[N]`` index of each token's parent, -1 for the root.
        replacement: how siblings were drawn, which decides what the numbers mean.

            - False: without replacement. Siblings differ, at most one of them is accepted, and a number is
              the probability that the child of this rank is the one. The numbers of a row sum to at
              most 1.
            - True: with replacement, so that siblings are tries of their own and may repeat. A number is
              the probability that this try is accepted if those before it were refused. The child of
              rank r is then accepted with ``a_r (1 - a_1) ... (1 - a_(r-1))``.

    Raises:
        InputError: not a tree, more siblings than numbers, or numbers that are no such probabilities.
    """
    rows = [_ranked(row, replacement) for row in acceptance]
    reached: list[float] = []
    depths: list[int] = []
    children: dict[int, int] = {}
    for index, parent in enumerate(parents):
        if not -1 <= parent < index:
            raise InputError(
                f"draft token {index} has parent {parent}, which does not come before it",
                where="expected_tree_tokens(parents=...)",
            )
        depth = 0 if parent < 0 else depths[parent] + 1
        rank = children.get(parent, 0)
        children[parent] = rank + 1
        row = rows[min(depth, len(rows) - 1)] if rows else []
        if rank >= len(row):
            raise InputError(
                f"there is no acceptance for child {rank + 1} at depth {depth + 1}",
                where="expected_tree_tokens(acceptance=...)",
                hint="one row for each depth, with one probability for each child",
            )
        depths.append(depth)
        reached.append(row[rank] * (1.0 if parent < 0 else reached[parent]))
    return 1.0 + sum(reached)


def _ranked(row: Sequence[float], replacement: bool) -> list[float]:
    """The probability that each child of one token is the one accepted."""
    total = 1.0 if replacement else sum(row)
    if not all(0 <= chance <= 1 for chance in row) or total > 1 + 1e-9:
        raise InputError(
            f"acceptance {list(row)!r} is not one of siblings",
            where="expected_tree_tokens(acceptance=...)",
            hint="probabilities from 0 to 1, which sum to at most 1 without replacement",
        )
    if not replacement:
        return list(row)
    refused = itertools.accumulate((1 - chance for chance in row), lambda a, b: a * b, initial=1.0)
    return [chance * before for chance, before in zip(row, refused, strict=False)]


# --- price ---------------------------------------------------------------------------------------


def speculation_speedup(
    acceptance: Acceptance,
    drafts: int,
    *,
    decode_seconds: float,
    verify_seconds: float,
    draft_seconds: float = 0.0,
) -> float:
    """How many times faster than plain decoding; below 1 it is a loss.

    Args:
        acceptance, drafts: as in :func:`expected_tokens`.
        decode_seconds: one step with one token.
        verify_seconds: one step with ``drafts + 1`` tokens.
        draft_seconds: making the drafts of one cycle.
    """
    cycle = verify_seconds + draft_seconds
    return expected_tokens(acceptance, drafts) * decode_seconds / cycle


def drafting_seconds(
    draft: GraphCost | Cost, target: Target, drafts: int, *, batch: int = 1, context: float = 0
) -> float:
    """Seconds that a draft program takes for a chain: one step for each token, over a growing context.

    Looking drafts up in the text (n-grams) takes no step: there it is 0.

    Args:
        draft: the draft program's cost, of the same B, C and T as the model's.
        target: where it runs.
        drafts: tokens drafted per cycle.
        batch, context: sequences, and tokens in its cache before the cycle.
    """
    steps = (predict(draft, target, batch=batch, context=context + i, tokens=1) for i in range(drafts))
    return sum(step.seconds for step in steps)


def predict_speculation(
    cost: GraphCost | Cost,
    target: Target,
    acceptance: Acceptance | TreeAcceptance,
    drafts: Drafts,
    *,
    batch: int = 1,
    context: float = 0,
    draft_seconds: float = 0.0,
    hit_rate: float = 1.0,
    replacement: bool = False,
) -> dict[str, float]:
    """Speculation's price and gain on a target.

    A batch verifies one step, padded to its longest draft; each row accepts its own number of tokens. A
    drafter that finds nothing for a row (n-gram lookup) leaves the row one token in that step, and where
    it finds nothing for any row the step is a plain one.

    Args:
        cost: of the model.
        target: the machine.
        acceptance: as in :func:`expected_tokens`, or for a tree in :func:`expected_tree_tokens`; of the
            cycles that do draft.
        drafts: the number of tokens in a chain, or the parents of a tree.
        batch, context: sequences, and tokens of each in the cache.
        draft_seconds: making the drafts of one cycle for all rows; see :func:`drafting_seconds`.
        hit_rate: share of cycles in which the drafter drafts, for each row on its own.
        replacement: how a tree's siblings were drawn.

    Returns:
        ``tokens_per_cycle`` (of a row), ``decode_seconds`` (of a plain step), ``verify_seconds`` (of a
        step with drafts), ``cycle_seconds`` (the mean over steps with and without drafts, drafting
        included), ``seconds_per_token`` (of a row), ``tokens_per_second`` (of all rows: the goodput) and
        ``speedup`` (below 1 it is a loss).

    Raises:
        InputError: an acceptance that does not describe the drafts, or a ``hit_rate`` outside of 0 to 1.
    """
    if not 0 <= hit_rate <= 1:
        raise InputError(
            f"hit_rate {hit_rate!r} is not a share", where="hit_rate=...", hint="a number from 0 to 1"
        )

    def step(tokens: int) -> float:
        return predict(cost, target, batch=batch, context=context, tokens=tokens).seconds

    if isinstance(drafts, int):
        drafted, gained = drafts, expected_tokens(cast(Acceptance, acceptance), drafts)
    else:
        drafted = len(drafts)
        gained = expected_tree_tokens(cast(TreeAcceptance, acceptance), drafts, replacement=replacement)
    decode, verify = step(1), step(drafted + 1)
    some_row_drafts = 1 - (1 - hit_rate) ** batch
    cycle = some_row_drafts * verify + (1 - some_row_drafts) * decode + draft_seconds
    tokens = 1 + hit_rate * (gained - 1)
    return {
        "tokens_per_cycle": tokens,
        "decode_seconds": decode,
        "verify_seconds": verify,
        "cycle_seconds": cycle,
        "seconds_per_token": cycle / tokens,
        "tokens_per_second": batch * tokens / cycle,
        "speedup": tokens * decode / cycle,
    }


# --- choice --------------------------------------------------------------------------------------


def goodput(
    cost: GraphCost | Cost,
    target: Target,
    acceptance: Acceptance,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    context: float = 0,
    draft_seconds: Callable[[int], float] | None = None,
    hit_rate: float = 1.0,
) -> dict[int, float]:
    """Accepted tokens per second of a batch, by draft length; length 0 is plain decoding.

    Source: SmartSpec: goodput is the expected number of accepted tokens of all requests over
    the time of the step. The load is the batch: the larger it is, the shorter the best draft.

    Args:
        cost, target, acceptance, batch, context, hit_rate: as in :func:`predict_speculation`.
        lengths: draft lengths to price.
        draft_seconds: the time of drafting so many tokens for all rows; none by default.
    """

    def rate(drafts: int) -> float:
        drafting = draft_seconds(drafts) if draft_seconds and drafts else 0.0
        return predict_speculation(
            cost, target, acceptance, drafts,
            batch=batch, context=context, draft_seconds=drafting, hit_rate=hit_rate,
        )["tokens_per_second"]  # fmt: skip

    return {drafts: rate(drafts) for drafts in lengths}


def best_length(
    cost: GraphCost | Cost,
    target: Target,
    acceptance: Acceptance,
    *,
    most: int = 16,
    batch: int = 1,
    context: float = 0,
    draft_seconds: Callable[[int], float] | None = None,
    hit_rate: float = 1.0,
) -> int:
    """The draft length of largest goodput; 0 if none is faster than plain decoding.

    Args:
        most: the longest draft, or as many as ``acceptance`` has positions for, if that is less.
        cost, target, acceptance, batch, context, draft_seconds, hit_rate: as in :func:`goodput`.
    """
    positions = most if isinstance(acceptance, (int, float)) else min(most, len(acceptance))
    rates = goodput(
        cost, target, acceptance, range(positions + 1),
        batch=batch, context=context, draft_seconds=draft_seconds, hit_rate=hit_rate,
    )  # fmt: skip
    return best_drafts(lambda drafts: rates[drafts] / rates[0], positions)


def best_drafts(speedup: Callable[[int], float], most: int = 16) -> int:
    """The number of drafts with the largest speedup; 0 if none is above 1."""
    return max(range(most + 1), key=lambda drafts: (speedup(drafts) if drafts else 1.0, -drafts))
