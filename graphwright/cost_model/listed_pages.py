"""How much of a cache is read through lists of pages, as expressions in the context and the step's tokens.

The arithmetic is that of :mod:`graphwright.ir.sparse_ops`, for a row whose C tokens are all committed: its
next token has position C. For one token a step it is exact at every whole context; the queries of a longer
step are taken to choose as the first of them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
from torch.fx.node import Node

from graphwright.cost_model.cost import C, Expr, T
from graphwright.ir.graph import argument, op_name
from graphwright.ir.sparse_ops import SPARSE_TOKENS

#: 1 for steps that select, 0 for longer ones, which read everything.
SELECTS: Expr = sympy.Max(0, sympy.Min(1, SPARSE_TOKENS + 1 - T))
# Decimal shares are no binary fractions: what rounding takes from a whole number of pages.
_ROUNDING = sympy.Rational(1, 10**9)


@dataclass(frozen=True)
class Paging:
    """How tokens lie in pages, and which pages are candidates; see :mod:`graphwright.ir.sparse_ops`.

    Attributes:
        page: tokens of one.
        first: tokens before the first page.
        recent, settled: newest tokens that no candidate holds.
    """

    page: int
    first: int
    recent: int
    settled: int

    @property
    def candidates(self) -> Expr:
        """Pages of one sequence that a query may choose from, the first ones among them."""
        return sympy.Max(0, self.closed)

    @property
    def closed(self) -> Expr:
        """:attr:`candidates`, below 0 while there are none."""
        behind = max(self.recent - 1, self.settled) + self.first
        return sympy.floor((C - behind) / self.page + self._half)

    @property
    def so_far(self) -> Expr:
        """Pages that hold the tokens up to the query; below 1 while there are none."""
        return sympy.ceiling((C + 1 - self.first) / self.page - self._half)

    @property
    def _half(self) -> Expr:
        """Half of a token, of a page that is no power of two: so that rounding moves no whole number."""
        return sympy.Rational(1, 2 * self.page) if self.page & (self.page - 1) else sympy.Integer(0)


@dataclass(frozen=True)
class Listing:
    """What ``choose_pages`` gives to an attention.

    Attributes:
        paging: of the store.
        sinks: first pages that are always read.
        keep: pages read at most, as a share of all so far.
        share: of the estimated mass that is enough; 0 for none.
    """

    paging: Paging
    sinks: int
    keep: float
    share: float

    @property
    def is_bound(self) -> bool:
        """Whether the scores may choose fewer pages than is said here."""
        return self.share > 0

    @property
    def skipped(self) -> Expr:
        """Whole pages of one sequence that one query does not read."""
        return _skipped(self)

    @property
    def pages(self) -> Expr:
        """Pages of one sequence that one query reads."""
        return sympy.Max(0, self.paging.so_far) - self.skipped

    @property
    def unseen_tokens(self) -> Expr:
        """Query-key pairs of one head and sequence that a step leaves out."""
        return SELECTS * T * self.paging.page * self.skipped

    @property
    def unread_tokens(self) -> Expr:
        """Tokens of one sequence that no query of a step reads, at least: their choices may all differ."""
        return _unread_tokens(self)


@lru_cache(maxsize=1024)
def _skipped(listing: Listing) -> Expr:
    spared = 1 - sympy.Rational(str(listing.keep))
    slack = 0 if spared.q & (spared.q - 1) == 0 else _ROUNDING
    over_budget = sympy.floor(spared * listing.paging.so_far + slack)
    return sympy.Max(0, sympy.Min(listing.paging.closed - listing.sinks, over_budget))


@lru_cache(maxsize=1024)
def _unread_tokens(listing: Listing) -> Expr:
    skipped, optional = listing.skipped, sympy.Max(0, listing.paging.closed - listing.sinks)
    chosen_by_some = (T - 1) * (optional - skipped)
    return SELECTS * listing.paging.page * sympy.Max(0, skipped - chosen_by_some)


def paging_of(node: Node) -> Paging:
    """From the arguments of ``score_pages`` or ``choose_pages``."""
    return Paging(*(argument(node, name) for name in ("page", "first", "recent", "settled")))


def listing_of(attention: Node) -> Listing | None:
    """The lists that an attention reads by; None if it reads everything, or if nobody knows how they came."""
    if op_name(attention) not in ("cache_attention", "packed_attention", "prefill_attention"):
        return None
    pages = argument(attention, "pages")
    if pages is None or argument(attention, "window"):
        return None
    chosen = next((n for n in pages.all_input_nodes if op_name(n) == "choose_pages"), None)
    if chosen is None:
        return None
    return Listing(paging_of(chosen), *(argument(chosen, name) for name in ("sinks", "keep", "share")))
