"""``speculate``: guess several tokens and let one step of the model check them all.

The graph stays as it is; the pass decides whether the program drafts, with what, and how far. Greedy
output is the same token for token; sampling keeps the distribution. Source: Leviathan, Kalman and
Matias 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.speculation import expected_tokens, predict_speculation
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph
from graphwright.ir.speculation import LOSSY_VERIFIERS
from graphwright.passes.base import (
    CostDelta,
    Fidelity,
    Pass,
    Site,
    StepShape,
    Verdict,
    register_pass,
)

#: A tree's mask is one int64 a token: the last token and at most this many drafts fit a step.
MOST_TOKENS = 62
#: Options that name a part, with options of its own.
PARTS = ("drafter", "tree", "verifier", "rule")
_PART = re.compile(r"[A-Za-z_][\w.]*(\([^()]*\))?")
#: Draft lengths that the planner prices.
LENGTHS = (2, 4, 8, 16)
#: Accepted tokens over accepted and refused ones, for the n-gram drafter, drafts of 8 and CPython's language
#: reference (``pydoc_data.topics``, the 51 topics of more than 256 tokens of SmolLM2's tokenizer, at most
#: 2,048 of each, the second halves drafted: 0.164), rounded down. Cycles without a guess count as refused
#: tokens there, although they cost a plain step only; so it stands for a hit rate of 1.
#: Text that repeats itself or its prompt, such as code, edits and summaries, accepts more.
PROSE_ACCEPTANCE = 0.16


@register_pass
@dataclass(frozen=True)
class Speculate(Pass):
    """Draft tokens and verify them in one step.

    Drafter, tree, verifier and rule are parts with options of their own, ``ngram(max_ngram=4)``, which
    docs/speculation.md lists.

    Options:
        drafter: who guesses; see ``graphwright.drafters()``.
        tokens: most tokens in a draft, 1 to 62.
        tree: which guesses are verified together: ``chain`` is one path.
        verifier: how drafts that were drawn are verified when sampling; ``auto`` is the recursive rule.
            Greedy decoding compares with the most likely token. ``typical`` makes the pass lossy.
        rule: how many tokens: ``fixed`` drafts ``tokens`` every time.
        acceptance: the probability that a draft token is accepted if those before it were, for the
            price. By default that of reference prose; the planner replaces it by what it measures.
        hit_rate: the share of cycles in which the drafter finds something, for the price; the others are
            plain steps.
        verified: draft tokens in a step on average, for the price; 0 stands for ``tokens``.
    """

    name: ClassVar[str] = "speculate"
    summary: ClassVar[str] = "draft several tokens and verify them in one step; the output stays the same"
    fidelity: ClassVar[Fidelity] = "distribution"
    scope: ClassVar[Literal["site", "program"]] = "program"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    provides: ClassVar[frozenset[str]] = frozenset({"speculation"})

    drafter: str = "ngram"
    tokens: int = 8
    tree: str = "chain"
    verifier: str = "auto"
    rule: str = "fixed"
    acceptance: float = PROSE_ACCEPTANCE
    hit_rate: float = 1.0
    verified: int = 0

    def __post_init__(self) -> None:
        for option in PARTS:
            if not _PART.fullmatch(getattr(self, option)):
                raise PassError(
                    f"{getattr(self, option)!r} is not a {option}", hint=f"write {option}=name(option=value)"
                )
        if self.verifier.partition("(")[0] in LOSSY_VERIFIERS:
            object.__setattr__(self, "fidelity", "lossy")
        _check_range("tokens", self.tokens, 1, MOST_TOKENS)
        _check_range("acceptance", self.acceptance, 0.0, 1.0)
        _check_range("hit_rate", self.hit_rate, 0.0, 1.0)
        _check_range("verified", self.verified, 0, self.tokens)

    @classmethod
    def variants(cls) -> list[Pass]:
        return [cls(tokens=tokens) for tokens in LENGTHS]

    def step_shape(self) -> StepShape:
        drafts = self.priced_tokens
        return StepShape(drafts + 1, expected_tokens(self.acceptance, drafts), self.hit_rate)

    @property
    def priced_tokens(self) -> int:
        """Draft tokens of a step, as it is priced."""
        return self.verified or self.tokens

    def find(self, graph: Graph) -> list[Site]:
        return [Site("program", (), {"graph": graph})]

    def legal(self, site: Site) -> Verdict:
        graph: Graph = site.info["graph"]
        if "speculation" in graph.annotations:
            return Verdict(False, f"the program speculates already, with {graph.annotations['speculation']}")
        if not graph.placeholders("state"):
            return Verdict(False, "there is no cache: refused tokens could not be rolled back")
        return Verdict(True, self.promise)

    @property
    def promise(self) -> str:
        """What it does, in words."""
        drafts = f"{self.drafter} drafts up to {self.tokens} tokens; refused ones are rolled back"
        if self.fidelity != "lossy":
            return drafts
        return (
            f"{drafts}; logits and greedy decoding are exact, but {self.verifier} chooses sampled tokens by "
            "another law, which no loss measured on logits shows"
        )

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        """Drafts are free, unless ``site.info["draft_seconds"]`` says what those of a cycle take."""
        drafting = site.info.get("draft_seconds", 0.0)
        price = predict_speculation(
            graph_cost(site.info["graph"]), target, self.acceptance, self.priced_tokens,
            batch=workload.batch, context=workload.mean_context, hit_rate=self.hit_rate,
            draft_seconds=drafting,
        )  # fmt: skip
        hits = "" if self.hit_rate == 1 else f" in {self.hit_rate:.0%} of the cycles"
        note = (
            f"{price['tokens_per_cycle']:.2f} tokens a cycle at acceptance {self.acceptance:g}{hits}; "
            f"a step with {self.priced_tokens + 1} tokens takes {price['verify_seconds'] * 1e3:.3g} ms, "
            f"one with a single token {price['decode_seconds'] * 1e3:.3g} ms: {price['speedup']:.2f}x"
        )
        return CostDelta(price["seconds_per_token"] - price["decode_seconds"], 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        graph.annotations["speculation"] = self.options()

    def options(self) -> dict[str, Any]:
        """What the runtime needs to know, as plain data."""
        chosen = dataclasses.asdict(self)
        for price in ("acceptance", "hit_rate", "verified", "layers"):  # a matter of price, not of what runs
            del chosen[price]
        return chosen

    def __str__(self) -> str:
        changed = super().__str__().removeprefix(self.name).strip("{}")
        if not changed.startswith("drafter="):  # it is shown even where it is the default
            changed = ",".join(filter(None, (f"drafter={self.drafter}", changed)))
        return f"{self.name}{{{changed}}}"


def _check_range(option: str, given: float, low: float, high: float) -> None:
    if not low <= given <= high:
        raise PassError(f"speculate cannot have {option}={given}", hint=f"{option} from {low} to {high}")
