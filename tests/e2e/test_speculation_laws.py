"""Sampling with speculation: the law of what is generated, for every tree and every verifier.

Laws are computed, not estimated: a cycle is run once for every course that its draws may take. A bias of one
in a hundred thousand shows, where a test on samples would need billions of them. What real draws add is
tested on samples, through :meth:`OptimizedModel.generate`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from graphwright.ir.errors import InputError
from graphwright.ir.speculation import LOSSY_VERIFIERS
from graphwright.passes.base import parse_pass
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import (
    Chain,
    Draft,
    FixedLength,
    Generation,
    Speculation,
    Tree,
    make_speculation,
)
from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.trees.fixed import Fixed
from graphwright.runtime.speculation.verifier import SamplingVerifier
from graphwright.runtime.speculation.verifiers.k_seq import KSequential, division, left_over
from graphwright.runtime.speculation.verifiers.recursive import Recursive
from graphwright.runtime.speculation.verifiers.rejection import Rejection
from graphwright.runtime.speculation.verifiers.sampling_rule import VERIFIERS, SamplingRule, accepts, draw
from graphwright.runtime.speculation.verifiers.typical import Typical
from tests.e2e.all_outcomes import law_of
from tests.e2e.fake_program import TableProgram
from tests.e2e.table_drafter import TableDrafter, pairs, speculation
from tests.e2e.test_speculation_exact import chi_square_p, joint_law

STATES = 3
START = 0
TABLE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.0, 0.7]])
OTHER = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
EXACT = sorted(name for name, rule in VERIFIERS.classes().items() if rule.exact)


def cycle_law(chosen: Speculation, budget: int) -> torch.Tensor:
    """The exact joint law ``[V**3]`` of three tokens: what one cycle yields, then the target's own."""
    judge = SamplingVerifier(chosen.verifier)

    def cycle() -> tuple[int, ...]:
        chosen.drafter.begin(Generation([[START]], sample=True, replacement=chosen.verifier.replacement))
        draft = chosen.propose([0], [budget])[0]
        nodes = [START, *draft.tokens]
        logits = TABLE.log()[nodes][None]
        return tuple(judge.verify(logits, [draft], [0])[0].tokens)

    found = law_of(cycle)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    assert any(len(tokens) > 1 for tokens in found), "nothing was ever accepted"
    return extended(found)


def extended(found: dict[tuple[int, ...], float]) -> torch.Tensor:
    """What a cycle yields, cut or continued by the target to three tokens."""
    joint = torch.zeros([STATES] * 3, dtype=torch.float64)
    target = TABLE.double()
    for tokens, chance in found.items():
        if len(tokens) >= 3:
            joint[tokens[:3]] += chance
        elif len(tokens) == 2:
            joint[tokens] += chance * target[tokens[1]]
        else:
            first = target[tokens[0]]
            joint[tokens[0]] += chance * first[:, None] * target
    return joint.flatten()


@pytest.mark.parametrize(("tree", "verifier"), pairs())
def test_every_tree_keeps_the_law_under_every_verifier(tree: str, verifier: str) -> None:
    for budget in (1, 3):
        found = cycle_law(speculation(TableDrafter(OTHER), tree, verifier), budget)
        assert torch.allclose(found, joint_law(TABLE, START), atol=1e-5)


@pytest.mark.parametrize(
    ("tree", "verifier"),
    [
        ("fixed(widths=2+2)", "recursive"),
        ("fixed(widths=2+1)", "k_seq"),
        ("fixed(widths=3)", "k_seq"),
        ("sequoia(acceptance=0.5+0.4)", "recursive"),
        ("greedy(hope=1)", "recursive"),
        ("beam(width=2)", "recursive"),
    ],
)
def test_wider_trees_keep_the_law(tree: str, verifier: str) -> None:
    found = cycle_law(speculation(TableDrafter(OTHER), tree, verifier), 4)
    assert torch.allclose(found, joint_law(TABLE, START), atol=1e-5)


class NoResidual(SamplingRule):
    """Wrong: after a refusal it draws from p as if nothing had been tried."""

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        assert q is not None
        return drawn[0] if accepts(p[drawn[0]] / q[drawn[0]]) else draw(p)


class Unscaled(SamplingRule):
    """Wrong: independent draws, each kept as often as if it were the only one."""

    replacement: ClassVar[bool] = True

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        assert q is not None
        kept = next((token for token in drawn if accepts(p[token] / q[token])), None)
        return draw((p - q).clamp(min=0.0)) if kept is None else kept


def test_wrong_rules_are_noticed() -> None:
    for rule, tree in ((NoResidual(), Chain()), (Unscaled(), Fixed())):
        found = cycle_law(Speculation(TableDrafter(OTHER), tree=tree, verifier=rule), 2)
        assert (found - joint_law(TABLE, START)).abs().max() > 1e-2


class Peeking(Tree):
    """Draws a second child of the root if token 0 follows the first, and claims that this was settled."""

    settled: ClassVar[bool] = True

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        (first,) = yield [0]
        child = growing.add(0, first)
        assert child is not None
        (second,) = yield [child]
        growing.add(child, second)
        if growing.tokens[-1] == 0:
            growing.add(0, first)


def test_rules_for_independent_draws_take_settled_trees_only() -> None:
    with pytest.raises(InputError, match="how many draws"):
        speculation(TableDrafter(OTHER), "greedy", "k_seq")
    # It is no formality: this tree is exact under recursive rejection, and not under the other.
    want = joint_law(TABLE, START)
    for verifier, exact in ((Recursive(), True), (KSequential(), False)):
        found = cycle_law(Speculation(TableDrafter(OTHER), tree=Peeking(), verifier=verifier), 3)
        assert torch.allclose(found, want, atol=1e-5) is exact


# --- rules by themselves --------------------------------------------------------------------------


@st.composite
def laws(draw_from: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A target's and a drafter's distribution over 2 or 3 tokens; some are impossible."""
    size = draw_from(st.integers(2, 3))
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    p, q = (torch.tensor(draw_from(weights), dtype=torch.float32) for _ in range(2))
    return p / p.sum(), q / q.sum()


def drawn_by(rule: SamplingRule, q: torch.Tensor, draws: int) -> list[int]:
    """What the rule's kind of drawing gives; as many as there are."""
    left, drawn = q.clone(), []
    while len(drawn) < draws and bool(left.sum() > 0):
        drawn.append(int(torch.multinomial(left, 1)))
        if not rule.replacement:
            left[drawn[-1]] = 0.0
    return drawn


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=15, deadline=None)
@given(laws(), st.integers(1, 3))
def test_rules_pick_by_the_target_s_law(
    name: str, both: tuple[torch.Tensor, torch.Tensor], draws: int
) -> None:
    p, q = both
    rule = VERIFIERS.parse(name)
    count = 1 if rule.single else draws
    found = law_of(lambda: rule.pick(p.clone(), q, drawn_by(rule, q, count)))
    assert [found.get(token, 0.0) for token in range(len(p))] == pytest.approx(p.tolist(), abs=1e-5)


def acceptance(rule: SamplingRule, p: torch.Tensor, q: torch.Tensor, draws: int) -> float:
    """How often the rule takes one of the draws."""

    def taken() -> bool:
        drawn = drawn_by(rule, q, draws)
        return rule.pick(p.clone(), q, drawn) in drawn

    return law_of(taken).get(True, 0.0)


@settings(max_examples=15, deadline=None)
@given(laws(), st.integers(2, 3))
def test_k_sequential_acceptance_is_within_its_bounds(
    both: tuple[torch.Tensor, torch.Tensor], draws: int
) -> None:
    p, q = both
    rho = division(p, q, draws)
    beta = float(torch.minimum(q, p / rho).sum())
    kept = 1 - (1 - beta) ** draws
    assert 1 <= rho <= draws
    if beta > 0:  # the smallest rho: what the draws take is a whole share rho of what they may
        assert kept == pytest.approx(rho * beta, abs=1e-5) or rho == pytest.approx(1, abs=1e-6)
        assert (
            float(left_over(p, q, draws, rho).sum()) == pytest.approx(1 - kept, abs=1e-5) or kept > 1 - 1e-6
        )
    # SpecTr, section 4: no rule with independent draws accepts more than the upper bound.
    most = float(torch.minimum(p, draws * q).sum())
    assert (1 - (1 - 1 / draws) ** draws) * most - 1e-6 <= kept <= most + 1e-6
    assert acceptance(KSequential(), p, q, draws) >= kept - 1e-5


def test_more_draws_are_accepted_more_often() -> None:
    p, q = torch.tensor([0.7, 0.1, 0.2]), torch.tensor([0.3, 0.4, 0.3])
    one = acceptance(Rejection(), p, q, 1)
    assert one == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-6)
    for rule in (KSequential(), Recursive()):
        found = [one, *(acceptance(rule, p, q, draws) for draws in (2, 3))]
        assert found == sorted(found) and found[-1] > found[0] + 0.1
    # Draws that may not repeat have seen every token in the end; independent ones have not.
    assert acceptance(Recursive(), p, q, 3) == pytest.approx(1, abs=1e-6)
    assert acceptance(KSequential(), p, q, 3) < 0.95
    # And yet neither rule accepts more in general.
    p, q = torch.tensor([0.65, 0.0, 0.29, 0.06]), torch.tensor([0.665, 0.087, 0.243, 0.005])
    assert acceptance(KSequential(), p, q, 2) > acceptance(Recursive(), p, q, 2) + 0.01


# --- the lossy one --------------------------------------------------------------------------------


def test_typical_acceptance_keeps_what_the_target_finds_typical() -> None:
    rule = Typical(epsilon=0.09, delta=0.3)
    sure, unsure = torch.tensor([0.94, 0.05, 0.01, 0.0]), torch.full((4,), 0.25)
    assert law_of(lambda: rule.pick(unsure, None, [3])) == {3: 1.0}
    assert law_of(lambda: rule.pick(sure, None, [3, 0, 1])) == {0: 1.0}  # the likeliest of several
    refused = law_of(lambda: rule.pick(sure, None, [1]))  # below 0.09: the target draws
    assert refused == pytest.approx({0: 0.94, 1: 0.05, 2: 0.01})
    # exp(-entropy) of 100 even tokens is 0.01, so that each of them is typical.
    assert law_of(lambda: rule.pick(torch.full((100,), 0.01), None, [7])) == {7: 1.0}


def test_typical_acceptance_is_lossy_and_says_so() -> None:
    inexact = {name for name, rule in VERIFIERS.classes().items() if not rule.exact}
    assert inexact == LOSSY_VERIFIERS
    lossy = parse_pass("speculate{verifier=typical(epsilon=0.2)}")
    assert lossy.fidelity == "lossy" and "another law" in lossy.promise  # type: ignore[attr-defined]
    for exact in ("speculate", "speculate{verifier=recursive}", "speculate{tree=fixed,verifier=k_seq}"):
        assert parse_pass(exact).fidelity == "distribution"
    # On given guesses too: the law follows the guess.
    rule, p = SamplingVerifier(Typical()), torch.tensor([[[0.4, 0.35, 0.25], [0.2, 0.5, 0.3]]])
    found = law_of(lambda: tuple(rule.verify(p.log(), [Draft([2])], [0])[0].tokens))
    assert found == pytest.approx({(2, 0): 0.2, (2, 1): 0.5, (2, 2): 0.3})


def test_a_lossy_rule_that_the_pass_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rejection, "exact", False)
    with pytest.raises(InputError, match="lossy"):
        make_speculation({"drafter": "ngram", "verifier": "rejection", "tokens": 4})


# --- through generate, with real draws ------------------------------------------------------------

#: Rows of three tokens; more draw a sharper picture, at about 0.4 ms each.
ROWS = int(os.environ.get("GRAPHWRIGHT_LAW_ROWS", "600"))


def sampled(tree: str, verifier: str, rows: int, **options: Any) -> tuple[torch.Tensor, int]:
    """How often each first three tokens were generated, and how many draft tokens were accepted.

    The first is drawn before there is a draft; two more are generated, so that a draft of three fits.
    """
    config = LlamaConfig(vocab_size=STATES, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    chosen = speculation(TableDrafter(OTHER), tree, verifier, rule=FixedLength(3))
    fast = OptimizedModel(
        TableProgram(TABLE.log()), config=config, generation_config=GenerationConfig(), speculation=chosen
    )
    ids = torch.tensor([[2, START]]).expand(rows, -1)
    ones = torch.ones_like(ids)
    torch.manual_seed(11)
    out = fast.generate(
        ids, attention_mask=ones, do_sample=True, max_new_tokens=5, **{"top_k": 0, **options}
    )[:, 2:5]
    cells = (out[:, 0] * STATES + out[:, 1]) * STATES + out[:, 2]
    return torch.bincount(cells, minlength=STATES**3), int(fast.stats()["last"]["accepted"])


@pytest.mark.parametrize(("tree", "verifier"), pairs())
def test_samples_follow_the_law(tree: str, verifier: str) -> None:
    counts, accepted = sampled(tree, verifier, ROWS)
    assert counts.sum() == ROWS and accepted > 0.6 * ROWS
    assert chi_square_p(counts, joint_law(TABLE, START)) > 1e-3


def processed_law(**options: float) -> torch.Tensor:
    """The joint law ``[V**3]`` of three tokens after temperature, nucleus and repetition penalty."""
    joint = torch.zeros([STATES] * 3, dtype=torch.float64)

    def extend(tokens: list[int], chance: float) -> None:
        if len(tokens) == 5:
            joint[tuple(tokens[2:])] += chance
            return
        for token, share in enumerate(_processed(tokens, **options).tolist()):
            if share:
                extend([*tokens, token], chance * share)

    extend([2, START], 1.0)
    return joint.flatten()


def _processed(
    tokens: list[int], temperature: float = 1.0, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> torch.Tensor:
    """The law of the next token, from the definitions of these options."""
    logits = TABLE[tokens[-1]].double().log()
    for token in set(tokens):
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    law = torch.softmax(logits / temperature, -1)
    order = law.argsort(descending=True)
    before = law[order].cumsum(-1) - law[order]  # the nucleus: all up to the first that completes top_p
    law[order[before >= top_p]] = 0.0
    return law / law.sum()


@pytest.mark.parametrize(
    ("tree", "verifier", "options"),
    [
        ("fixed(widths=2)", "recursive", {"temperature": 0.6}),
        ("fixed(widths=2)", "k_seq", {"top_p": 0.75}),
        ("greedy", "recursive", {"repetition_penalty": 1.7}),
        ("beam", "recursive", {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 0.8}),
        ("chain", "rejection", {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.2}),
    ],
)
def test_samples_follow_the_law_after_processors(tree: str, verifier: str, options: dict[str, float]) -> None:
    counts, accepted = sampled(tree, verifier, ROWS, **options)
    law = processed_law(**options)
    assert accepted > 0.5 * ROWS
    assert (law - joint_law(TABLE, START)).abs().max() > 0.02, "the processors change nothing"
    assert chi_square_p(counts, law) > 1e-3
