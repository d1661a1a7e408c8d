"""What an evictor is: a score of the tokens that a layer holds, and what becomes of those that leave.

A layer that may hold fewer tokens than its rows are long keeps the best scored ones, for each key/value
head by itself and as many for each. The first tokens (attention sinks) and the newest ones always stay,
whatever their score. What leaves is gone, or is merged into what stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, NamedTuple, TypeVar

import torch

from graphwright.ir.errors import PassError
from graphwright.ir.spelling import PartParser, spell


@dataclass(frozen=True)
class Seen:
    """What an evictor looks at: one row of a layer, n tokens in the order in which they came.

    Attributes:
        queries: ``[B, H, W, D]`` the newest queries, of the last W of the n tokens; W may be 0.
        keys: ``[B, G, n, D]``; values: ``[B, G, n, E]``, as they are stored (keys after rotary).
        accumulated: ``[B, G, n]`` float32, what the evictor noted of each token before; 0 for new ones.
        scale, softcap: of the layer's attention.
        length: tokens that the row has had, evicted ones included.
        known: what was computed of it, so that it need not be again.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    accumulated: torch.Tensor
    scale: float
    softcap: float = 0.0
    length: int = 0
    known: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def attention(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The share of attention that each token gets from the newest queries: ``[B, G, n]`` float32.

        A mean over the queries, and over the heads that share a key/value head. A query sees the tokens
        up to its own. Attention sinks that a model has learned take their share and are left out here.

        Args:
            weights: ``[B, H, W]``, of the queries in the mean; equal by default.
        """
        if weights is not None:
            return self._attention(weights)
        if "attention" not in self.known:
            self.known["attention"] = self._attention(None)
        return self.known["attention"]

    def _attention(self, weights: torch.Tensor | None) -> torch.Tensor:
        batch, heads, window, _ = self.queries.shape
        groups, tokens = self.keys.shape[1:3]
        per = heads // groups
        if not window:
            return self.keys.new_zeros((batch, groups, tokens), dtype=torch.float32)
        if weights is None:
            weights = self.queries.new_ones((batch, heads, window), dtype=torch.float32)
        own = torch.arange(window, device=self.keys.device) + tokens - window
        hidden = torch.arange(tokens, device=self.keys.device) > own[:, None]  # [W, n]
        found = []
        for group in range(groups):  # one at a time: all heads' scores of a long row would be large
            mine = slice(group * per, (group + 1) * per)
            keys = self.keys[:, group, None].float()
            scores = self.queries[:, mine].float() @ keys.transpose(2, 3) * self.scale
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)  # [B, H/G, W, n]
            share = weights[:, mine].float()
            mean = (shares * share[..., None]).sum((1, 2)) / share.sum((1, 2))[:, None]
            found.append(mean)
        return torch.stack(found, dim=1)


class Kept(NamedTuple):
    """What stays: ``keys [B, G, k, D]``, ``values [B, G, k, E]``, ``accumulated [B, G, k]`` float32."""

    keys: torch.Tensor
    values: torch.Tensor
    accumulated: torch.Tensor


@dataclass(frozen=True)
class Evictor(ABC):
    """How tokens are scored. Fields of the subclass are its options; it prints as ``name(option=value)``.

    Class attributes:
        observes: scores need the newest queries, which the step then keeps.
        accumulates: it notes a number of each token, which moves along with it.
        by_layer: layers get shares of their own of the budget, from calibration text.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    observes: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False

    @abstractmethod
    def score(self, seen: Seen) -> torch.Tensor:
        """``[B, G, n]``, higher for tokens that should stay.

        The same for the same row, whatever else is in the batch.
        """

    def note(self, seen: Seen) -> torch.Tensor:
        """``[B, G, n]`` float32: what is noted of each token from now on, before anything leaves."""
        return seen.accumulated

    def merge(self, seen: Seen, kept: torch.Tensor) -> Kept:
        """What is stored of the tokens ``kept [B, G, k]`` (ascending); by default, as they were."""
        return gather(seen, kept)

    def anchored(self, budget: int) -> int:
        """Tokens of a prompt that stay for good once it has run, out of ``budget``; 0: none in particular."""
        return 0

    def shares(self, attention: Sequence[torch.Tensor], keep: float) -> list[float]:
        """For ``by_layer``: the fraction of tokens that each layer keeps, ``keep`` on average.

        Args:
            attention: of each layer, ``[rows, G, n]`` as :meth:`Seen.attention` gives it.
        """
        return [keep] * len(attention)

    def __str__(self) -> str:
        return spell(self)


def gather(seen: Seen, kept: torch.Tensor) -> Kept:
    """Tokens ``kept [B, G, k]`` as they are."""
    keys, values = (
        x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[3])) for x in (seen.keys, seen.values)
    )
    return Kept(keys, values, seen.accumulated.gather(2, kept))


def choose(scores: torch.Tensor, count: int, first: int, newest: int) -> torch.Tensor:
    """The tokens that stay: ``[B, G, count]``, ascending.

    Args:
        scores: ``[B, G, n]``; of equal ones the earlier token stays.
        count: how many, at least ``first + newest``.
        first, newest: tokens at both ends that stay whatever their score.
    """
    tokens = scores.shape[2]
    at = torch.arange(tokens, device=scores.device)
    safe = (at < first) | (at >= tokens - newest)
    ranked = scores.float().nan_to_num(nan=float("-inf")).masked_fill(safe, float("inf"))
    order = torch.sort(ranked, dim=2, descending=True, stable=True).indices
    # Scores may be infinite too: those that must stay come first all the same.
    order = order.gather(2, torch.sort((~safe)[order].int(), dim=2, stable=True).indices)
    return order[:, :, :count].sort(dim=2).values


def leaving(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which of so many tokens are not among ``kept [B, G, k]``: ``[B, G, n]`` bool."""
    found = torch.ones((*kept.shape[:2], tokens), dtype=torch.bool, device=kept.device)
    return found.scatter_(2, kept, False)


def merge_into(seen: Seen, kept: torch.Tensor, into: torch.Tensor, weights: torch.Tensor) -> Kept:
    """Weighted means of the tokens that go to one place, keys and values alike.

    Args:
        kept: ``[B, G, k]`` tokens that stay.
        into: ``[B, G, n]`` the place 0..k-1 that each token goes to; k for nowhere.
        weights: ``[B, G, n]`` float32, above 0 for the tokens that stay.

    Returns:
        Means in the stores' dtype; ``accumulated`` is the sum of what the merged tokens have.
    """
    count = kept.shape[2]
    shape = (*kept.shape[:2], count + 1)
    weights = weights.double()  # sums whose order is not fixed on a GPU come out the same after rounding

    def sums(x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(shape, dtype=torch.float64, device=x.device)
        return found.scatter_add(2, into, x.double())[:, :, :count]

    total, alone = sums(weights), sums(torch.ones_like(weights)) == 1
    as_it_is = gather(seen, kept)

    def mean(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        found = torch.zeros((*shape, x.shape[3]), dtype=torch.float64, device=x.device)
        index = into[..., None].expand(-1, -1, -1, x.shape[3])
        found = found.scatter_add(2, index, x.double() * weights[..., None])
        means = (found[:, :, :count] / total[..., None]).to(x.dtype)
        return torch.where(alone[..., None], own, means)

    return Kept(
        mean(seen.keys, as_it_is.keys), mean(seen.values, as_it_is.values), sums(seen.accumulated).float()
    )


def places(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """The place of each kept token among them, ``[B, G, n]``; k for those that leave."""
    count = kept.shape[2]
    found = torch.full((*kept.shape[:2], tokens), count, dtype=torch.int64, device=kept.device)
    numbers = torch.arange(count, device=kept.device).expand_as(kept)
    return found.scatter_(2, kept, numbers)


# --- registry ------------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Evictor]] = {}
E = TypeVar("E", bound=type[Evictor])


def register_evictor(cls: E) -> E:
    """Class decorator: make an evictor known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


def registered_evictors() -> dict[str, type[Evictor]]:
    """All evictors by name."""
    import graphwright.ir.evictors.kinds  # noqa: F401  the package imports its own evictors

    return dict(_REGISTRY)


@cache
def parse_evictor(text: str) -> Evictor:
    """An evictor from its text; ``str(parse_evictor(text))`` parses to the same one.

    Raises:
        PassError: it does not parse; the message points at the character.
    """
    return PartParser(text, registered_evictors(), PassError, "evictor", "snapkv(pool=7)").whole()
