"""What drafting while the model verifies is expected to give.

One after the other, a cycle takes the time of the drafts and of the step that verifies them. Overlapped,
rounds alternate between two kinds, of n drafts each:

- *before*: nothing is drafted yet. The model runs its plain step, which checks the first draft as soon as
  it is there, while the draft model drafts n tokens. One token is gained. If it is the first draft, the other
  drafts are under verification next; else they are thrown away.
- *after*: the model verifies n tokens while the draft model drafts the n that follow. Only if all are
  accepted is what was drafted meanwhile of use, and the next round is another of this kind.

The step of an *after* round feeds n tokens, the last accepted one and all drafts that follow it, and so
chooses n tokens, the last of them beside the first new draft.

Source of the scheme: Liu et al. 2024, "Parallel Speculative Decoding with Adaptive Draft Length" (PEARL;
its pre-verify and post-verify are the two kinds). The chain of rounds is worked out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphwright.cost_model.speculation import expected_tokens
from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class DraftPrices:
    """What drafting and verifying take.

    Args:
        draft_seconds: one step of the draft model.
        verify_seconds: by its tokens, one step of the model; of 1 token, a plain step.
        shared: how far the two slow each other down when they run at once: 0 on separate machines, 1
            where all of the time of the shorter one is added, as on a processor whose cores both use.
        sync_seconds: what bringing the two together takes each round.
    """

    draft_seconds: float
    verify_seconds: Callable[[int], float]
    shared: float = 0.0
    sync_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= 1:
            raise InputError(f"shared={self.shared} is not a share", where="DraftPrices", hint="from 0 to 1")
        if self.draft_seconds < 0 or self.sync_seconds < 0:
            raise InputError("a time cannot be negative", where="DraftPrices")

    def cycle_seconds(self, drafts: int) -> float:
        """A cycle of drafting, then verifying."""
        return drafts * self.draft_seconds + self.verify_seconds(drafts + 1)

    def round_seconds(self, drafts: int) -> float:
        """A round in which both run at once."""
        drafting, verifying = drafts * self.draft_seconds, self.verify_seconds(drafts)
        return max(drafting, verifying) + self.shared * min(drafting, verifying) + self.sync_seconds


def overlapped_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that one round yields on average when drafting and verifying overlap.

    With a the acceptance, an *after* round yields ``(1 - a^n) / (1 - a)`` and is followed by another with
    probability ``a^n``; a *before* round yields 1 and is followed by an *after* round with probability a. In
    the long run ``before : after = (1 - a^n) : a``.

    Args:
        acceptance: probability that a draft is accepted if those before it were.
        drafts: tokens drafted per round, n, at least 1.

    Raises:
        InputError: a probability outside of 0 to 1, or no drafts.
    """
    if not 0 <= acceptance <= 1 or drafts < 1:
        raise InputError(
            f"acceptance {acceptance!r} with {drafts} drafts does not describe a round",
            where="overlapped_tokens",
            hint="a probability from 0 to 1 and at least one draft",
        )
    run = expected_tokens(acceptance, drafts - 1)  # 1 + a + ... + a^(n-1)
    refused = 1 - acceptance**drafts
    return (refused + acceptance * run) / (refused + acceptance)


def sequential_rate(acceptance: float, drafts: int, prices: DraftPrices) -> float:
    """Tokens per second of drafting, then verifying; with 0 drafts, of plain decoding."""
    return expected_tokens(acceptance, drafts) / prices.cycle_seconds(drafts)


def overlapped_rate(acceptance: float, drafts: int, prices: DraftPrices) -> float:
    """Tokens per second when drafting and verifying overlap."""
    return overlapped_tokens(acceptance, drafts) / prices.round_seconds(drafts)


@dataclass(frozen=True)
class Overlap:
    """Whether drafting should overlap verification.

    Attributes:
        speedup: of overlapping with :attr:`drafts` tokens a round, over plain decoding.
        sequential_speedup: of drafting, then verifying with :attr:`sequential_drafts`, over plain decoding; 1
            with 0 drafts, where that does not pay.
    """

    drafts: int
    speedup: float
    sequential_drafts: int
    sequential_speedup: float

    @property
    def pays(self) -> bool:
        """Whether overlapping is faster than the best that can be done without."""
        return self.speedup > self.sequential_speedup


def price_overlap(acceptance: float, prices: DraftPrices, most: int = 16) -> Overlap:
    """The best of both, each with its own number of drafts.

    PEARL's choice, as many drafts as fit into the time of one verification, is near the best where
    verification takes the same for any number of tokens.

    Args:
        acceptance, prices: as above.
        most: the most drafts of a round or cycle.
    """
    plain = sequential_rate(acceptance, 0, prices)
    overlapped = {n: overlapped_rate(acceptance, n, prices) / plain for n in range(1, most + 1)}
    sequential = {n: sequential_rate(acceptance, n, prices) / plain for n in range(most + 1)}
    drafts = max(overlapped, key=lambda n: (overlapped[n], -n))
    in_turn = max(sequential, key=lambda n: (sequential[n], -n))
    return Overlap(drafts, overlapped[drafts], in_turn, sequential[in_turn])
