"""Speculative decoding: drafter x tree x verifier x length rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.ir.speculation import LOSSY_VERIFIERS
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.drafter import (
    Drafter,
    Generation,
    Outcome,
    PathDrafter,
    describe_drafters,
    drafter,
    make_drafter,
    parse_drafter,
)
from graphwright.runtime.speculation.drafters.ngram import NgramDrafter
from graphwright.runtime.speculation.growing import Growing, grow
from graphwright.runtime.speculation.rules.adaptive import AdaptiveLength
from graphwright.runtime.speculation.rules.fixed import FixedLength
from graphwright.runtime.speculation.rules.length_rule import RULES, LengthRule
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS
from graphwright.runtime.speculation.trees.chain import Chain
from graphwright.runtime.speculation.trees.tree import TREES, Tree
from graphwright.runtime.speculation.verifiers.recursive import Recursive
from graphwright.runtime.speculation.verifiers.sampling_rule import VERIFIERS, SamplingRule


class Speculation:
    """How a program speculates.

    Args:
        drafter: who guesses.
        rule: how many tokens; by default the drafter's own length in every cycle.
        tree: which paths are guessed; chains by default.
        verifier: how drawn drafts are verified when sampling; greedy decoding compares tokens.
        tokens: most tokens in a draft, whatever the rule says.

    Raises:
        InputError: no tokens to draft; the drafter guesses one path only, or the verifier verifies one only,
            and the tree has several; or the verifier has to know the number of draws, and the tree does not
            settle it beforehand.
    """

    def __init__(
        self,
        drafter: Drafter,
        rule: LengthRule | None = None,
        *,
        tree: Tree | None = None,
        verifier: SamplingRule | None = None,
        tokens: int = MAX_TREE_TOKENS - 1,
    ) -> None:
        if tokens < 1:
            raise InputError(f"tokens={tokens} drafts nothing", where="Speculation", hint="tokens >= 1")
        self.drafter = drafter
        self.rule = FixedLength(drafter.default_length()) if rule is None else rule
        self.tree = Chain() if tree is None else tree
        self.verifier = Recursive() if verifier is None else verifier
        self.tokens = tokens
        is_chain = isinstance(self.tree, Chain)
        if not is_chain and not isinstance(drafter, PathDrafter):
            raise InputError(
                f"drafter {drafter} guesses one path, tree {self.tree} has several",
                where="Speculation",
                hint="use tree=chain",
            )
        if not is_chain and self.verifier.single:
            raise InputError(
                f"verifier {self.verifier} verifies one path, tree {self.tree} has several",
                where="Speculation",
                hint="use verifier=recursive, or tree=chain",
            )
        if self.verifier.replacement and not self.tree.settled:
            raise InputError(
                f"verifier {self.verifier} has to know how many draws there are below a token before the "
                f"first; tree {self.tree} decides draw by draw",
                where="Speculation",
                hint="use verifier=recursive, or a tree of fixed shape",
            )

    @property
    def makes_trees(self) -> bool:
        """Whether drafts may be trees."""
        return self.drafter.makes_trees or not isinstance(self.tree, Chain)

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        """A draft of at most ``budget[i]`` tokens for each of ``rows``."""
        if not isinstance(self.drafter, PathDrafter):
            return self.drafter.propose(rows, budget)
        floors = [self.rule.floor(row) for row in rows]
        grown = grow(self.tree, self.drafter, rows, budget, floors)
        return [self._worth(row, one) for row, one in zip(rows, grown, strict=True)]

    def _worth(self, row: int, growing: Growing) -> Draft:
        """What the rule keeps of a grown draft; a drawn one stays as it is, for the sake of its law."""
        if growing.is_drawn or not len(growing):
            return growing.draft()
        return growing.likeliest(self.rule.keep(row, sorted(growing.chances, reverse=True)))

    def __repr__(self) -> str:
        return f"Speculation({self.drafter}, {self.tree}, {self.verifier}, {self.rule}, tokens={self.tokens})"


def make_speculation(chosen: Mapping[str, Any]) -> Speculation:
    """A speculation from plain options, as the ``speculate`` pass records them.

    Raises:
        InputError: there is no such part, the parts do not go together, or the verifier is lossy and the pass
            does not know.
    """
    automatic = chosen.get("verifier", "auto") == "auto"
    verifier = None if automatic else VERIFIERS.parse(chosen["verifier"])
    if verifier is not None and not verifier.exact and verifier.name not in LOSSY_VERIFIERS:
        raise InputError(
            f"verifier {verifier} is lossy, and the speculate pass would not say so",
            where="speculate{verifier=...}",
            hint="build a Speculation yourself and hand it to OptimizedModel",
        )
    return Speculation(
        parse_drafter(chosen["drafter"]),
        RULES.parse(chosen.get("rule", "fixed")),
        tree=TREES.parse(chosen.get("tree", "chain")),
        verifier=verifier,
        tokens=chosen["tokens"],
    )


def describe_trees() -> dict[str, str]:
    """Every tree's name and what it is, in one line each."""
    return TREES.describe()


def describe_verifiers() -> dict[str, str]:
    """Every verifier's name and what it is, in one line each."""
    return VERIFIERS.describe()


def describe_length_rules() -> dict[str, str]:
    """Every length rule's name and what it is, in one line each."""
    return RULES.describe()


__all__ = [
    "NO_DRAFT",
    "AdaptiveLength",
    "Chain",
    "Draft",
    "Drafter",
    "FixedLength",
    "Generation",
    "LengthRule",
    "NgramDrafter",
    "Outcome",
    "PathDrafter",
    "SamplingRule",
    "Speculation",
    "Tree",
    "describe_drafters",
    "describe_length_rules",
    "describe_trees",
    "describe_verifiers",
    "drafter",
    "make_drafter",
    "make_speculation",
    "parse_drafter",
]
