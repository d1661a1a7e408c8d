"""Semantic ops of sparse attention: scores of a cache's pages, and lists of the pages that queries read.

Page n of a row holds the tokens ``first + n * P .. first + (n + 1) * P`` by number. Its *summary* is written
by a selector (:mod:`graphwright.ir.selectors`) once its tokens are committed (``runtime/page_summaries.py``).
For the query at position p of a row with L committed tokens, of pages n

- below ``M = (min(p + 1 - recent, L - settled) - first) // P`` are the *candidates*, all of them summarized;
- from M on are the newest ones and the one that is being filled: always read, as are the first ``sinks``.

A query's list holds at most ``max(forced, ceil(keep * pages so far))`` pages, the forced ones among them.
Every query of every step, row and key/value head is served by itself: how many tokens a step runs changes
nothing as long as it has at most ``recent - settled`` of them, and drafts change nothing.

The first ``dense[b]`` tokens of a step read everything, and so does a step of more than
:data:`SPARSE_TOKENS`, which only prompts have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.ops import semantic_op
from graphwright.ir.selectors import parse_selector

#: Most tokens of a step that selects: as ``runtime/storage.py`` has it for decoding and verification.
SPARSE_TOKENS = 64
#: In the place of a number of pages: everything is read.
EVERYTHING = -1


def candidate_pages(
    positions: torch.Tensor, lengths: torch.Tensor, page: int, first: int, recent: int, settled: int
) -> torch.Tensor:
    """M of each query, ``[B, T]`` int64. See the module."""
    closed = torch.minimum(positions + 1 - recent, lengths[:, None] - settled) - first
    return closed.clamp(min=0) // page


def pages_so_far(positions: torch.Tensor, page: int, first: int) -> torch.Tensor:
    """Pages that hold the tokens up to each query, ``[B, T]`` int64."""
    return (positions + 1 - first).clamp(min=0).add(page - 1) // page


def _score_fake(q, summary, constants, positions, lengths, counts, dense, selector, groups, *rest):  # type: ignore[no-untyped-def]
    size = (q.shape[0], q.shape[2], groups, summary[0].shape[1])
    return q.new_empty(size, dtype=torch.float32)


@semantic_op(
    "score_pages(Tensor q, Tensor[] summary, Tensor[] constants, Tensor positions, Tensor lengths, "
    "Tensor counts, Tensor dense, str selector, int groups, int page, int first, int recent, int settled, "
    "float scale) -> Tensor",
    fake=_score_fake,
)
def score_pages(
    q: torch.Tensor,
    summary: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    dense: torch.Tensor,
    selector: str,
    groups: int,
    page: int,
    first: int,
    recent: int,
    settled: int,
    scale: float,
) -> torch.Tensor:
    """The share of attention that each candidate page is estimated to have among the candidates.

    Args:
        q: ``[B, H, T, D]``.
        summary: the selector's buffers ``[B, N, ...]``, in the order of its layout.
        constants: the selector's tables.
        positions: ``[B, T]``; lengths, counts: ``[B]``; as in ``cache_attention``.
        dense: ``[B]`` int64, see the module.
        selector: as text.
        groups: G, key/value heads.
        page, first, recent, settled: tokens; see the module.
        scale: of attention.

    Returns:
        ``[B, T, G, N]`` float32: a softmax over the candidates for each query head, averaged over the
        heads of a group; 0 for pages that are no candidates. Undefined where everything is read.
    """
    batch, heads, tokens, width = q.shape
    pages = summary[0].shape[1]
    if tokens > SPARSE_TOKENS:
        return q.new_empty((batch, tokens, groups, pages), dtype=torch.float32)
    chosen = parse_selector(selector)
    shape = PageShape(groups, page, width)
    buffers = dict(zip(chosen.layout(shape, q.dtype), summary, strict=True))
    tables = dict(zip(chosen.constant_names(shape), constants, strict=True))
    closed = candidate_pages(positions, lengths, page, first, recent, settled)
    scores = chosen.score(q, buffers, tables, shape, scale, closed).double()
    candidate = torch.arange(pages, device=q.device) < closed[:, None, :, None]  # [B, 1, T, N]
    scores = scores.masked_fill(~candidate, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    shared = weights.view(batch, groups, heads // groups, tokens, pages).mean(2)
    return shared.transpose(1, 2).float().contiguous()


def _choose_fake(scores, positions, *rest):  # type: ignore[no-untyped-def]
    return scores.new_empty(scores.shape, dtype=torch.int32), scores.new_empty(
        scores.shape[:3], dtype=torch.int32
    )


@semantic_op(
    "choose_pages(Tensor scores, Tensor positions, Tensor lengths, Tensor counts, Tensor dense, int page, "
    "int first, int recent, int settled, int sinks, float keep, float share) -> (Tensor, Tensor)",
    fake=_choose_fake,
)
def choose_pages(
    scores: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    dense: torch.Tensor,
    page: int,
    first: int,
    recent: int,
    settled: int,
    sinks: int,
    keep: float,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each query reads.

    Args:
        scores: ``[B, T, G, N]`` float32, of ``score_pages``.
        positions, lengths, counts, dense, page, first, recent, settled: as there.
        sinks: pages at the start that are always read.
        keep: pages read at most, as a share of all so far, the forced ones included.
        share: of the attention mass that the scores estimate; the fewest candidates that have it are
            read, as far as ``keep`` allows. 0 reads as many as ``keep`` allows.
            Source: ZipVL (He et al. 2024), section 4.1.

    Returns:
        ``[B, T, G, N]`` int32, the numbers of the pages in ascending order, undefined after the last; and
        ``[B, T, G]`` int32, how many: -1 for queries that read everything.
    """
    batch, tokens, groups, pages = scores.shape
    if tokens > SPARSE_TOKENS:
        lists = scores.new_empty(scores.shape, dtype=torch.int32)
        return lists, scores.new_full((batch, tokens, groups), EVERYTHING, dtype=torch.int32)
    number = torch.arange(pages, device=scores.device)
    closed = candidate_pages(positions, lengths, page, first, recent, settled)[:, :, None, None]
    so_far = pages_so_far(positions, page, first)[:, :, None, None]
    forced = (number < so_far) & ((number < sinks) | (number >= closed))
    open_to_choice = (number < closed) & ~forced
    budget = torch.ceil(so_far * keep).long() - forced.sum(-1, keepdim=True)
    ranked = torch.where(open_to_choice, scores, -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)  # ties: the lower page first
    rank = torch.empty_like(order).scatter_(-1, order, number.expand_as(order).contiguous())
    taken = open_to_choice & (rank < budget)
    if share:
        best = torch.where(open_to_choice, scores, 0.0).gather(-1, order).double()
        before = (best.cumsum(-1) - best).gather(-1, rank)  # mass of the better ones
        wanted = torch.where(open_to_choice, scores, 0.0).double().sum(-1, keepdim=True) * share
        taken &= before < wanted
    read = forced | taken
    chosen = read.sum(-1)
    everything = torch.arange(tokens, device=scores.device) < dense[:, None]
    chosen = torch.where(everything[:, :, None], EVERYTHING, chosen)
    lists = torch.where(read, number, pages).sort(-1).values
    return lists.int(), chosen.int()
