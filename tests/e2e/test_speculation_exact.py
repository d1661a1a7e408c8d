"""Speculation does not change what is generated: tokens under greedy decoding, the law under sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, StoppingCriteriaList

from graphwright.ir.errors import InputError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import (
    Draft,
    Drafter,
    FixedLength,
    Generation,
    NgramDrafter,
    Outcome,
    Speculation,
)
from graphwright.runtime.speculation.verifiers.recursive import Recursive
from graphwright.runtime.speculation.verifiers.rejection import Rejection
from tests.e2e.fake_program import VOCAB, TableProgram
from tests.e2e.test_generate import RAGGED, Recorder, StopAt, padded, repetitive

Make = Callable[..., OptimizedModel]


class Oracle(Drafter):
    """Knows the answers; every ``wrong``-th token of a row is a mistake. Branches if ``width`` > 1."""

    name = "oracle"
    wants_logits = True

    def __init__(self, answers: list[list[int]], wrong: int = 4, width: int = 1, vocab: int = VOCAB) -> None:
        self.answers, self.wrong, self.width, self.vocab = answers, wrong, width, vocab
        self.seen: list[list[int]] = []

    def begin(self, generation: Generation) -> None:
        self.seen = [[] for _ in generation.prompts]

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, row: int, limit: int) -> Draft:
        start = len(self.seen[row])
        answer = self.answers[row][start : start + 6]
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for place, token in enumerate(answer):
            guesses = [(token + other) % self.vocab for other in range(self.width - 1, -1, -1)]
            if (start + place) % self.wrong == self.wrong - 1:
                guesses = [(guess + 11) % self.vocab for guess in guesses]
            if len(tokens) + len(guesses) > limit:
                break
            tokens += guesses
            parents += [parent] * len(guesses)
            parent = len(tokens) - 1
        return Draft(tokens, parents)

    def observe(self, row: int, outcome: Outcome) -> None:
        logits = outcome.chosen_logits()
        assert logits.shape == (len(outcome.tokens), self.vocab)
        assert logits.argmax(-1).tolist() == list(outcome.tokens)
        self.seen[row].extend(outcome.tokens)


def answers(model: Any, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=new, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one", "ragged"])
def test_greedy_is_identical_and_faster(
    stock: Any, make_fast: Make, rows: list[list[int]], width: int
) -> None:
    inputs = padded(rows, "left")
    want = answers(stock, inputs, 40)
    fast = make_fast(stock, speculation=Speculation(Oracle(want, wrong=5, width=width), FixedLength(40)))
    assert answers(fast, inputs, 40) == want
    stats = fast.stats()["last"]
    assert stats["accepted_per_position"][0] > 0 and stats["cycles"] < 20
    assert stats["by_drafter"]["oracle"]["draft_tokens"] > stats["accepted"]


@pytest.mark.parametrize("width", [1, 2])
def test_everything_that_ends_a_row_inside_an_accepted_run(llama: Any, make_fast: Make, width: int) -> None:
    inputs = padded(RAGGED, "left")
    plain = answers(llama, inputs, 40)
    for place in range(8, 14):
        options: dict[str, Any] = {"eos_token_id": [row[place] for row in plain[:2]], "pad_token_id": 0}
        theirs, mine = StopAt({plain[2][place]}), StopAt({plain[2][place]})
        stream = Recorder()
        want = llama.generate(
            **inputs, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([theirs]), **options
        )
        fast = make_fast(
            llama, speculation=Speculation(Oracle(plain, wrong=50, width=width), FixedLength(40))
        )
        got = fast.generate(**inputs, max_new_tokens=30, stopping_criteria=[mine], streamer=stream, **options)
        assert torch.equal(got, want)
        assert len(mine.seen) == len(theirs.seen) == len(stream.put_values) - 1
        assert torch.equal(torch.stack(stream.put_values[1:], 1), want[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("new", range(1, 9))
def test_max_new_tokens_is_exact_and_the_cache_may_be_full(llama: Any, make_fast: Make, new: int) -> None:
    inputs = padded([repetitive(20)], "left")
    want = answers(llama, inputs, 12)
    fast = make_fast(llama, speculation=Speculation(Oracle(want, wrong=50)), capacity=20 + new)
    assert answers(fast, inputs, new) == [want[0][:new]]


def test_a_draft_beyond_its_budget_is_refused(llama: Any, make_fast: Make) -> None:
    class Greedy(NgramDrafter):
        def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
            return [Draft([5] * (limit + 1)) for limit in budget]

    fast = make_fast(llama, speculation=Speculation(Greedy()))
    with pytest.raises(InputError, match="budget"):
        fast.generate(torch.tensor([repetitive(12)]), max_new_tokens=8)


# --- sampling: the law of what is generated -------------------------------------------------------

STATES = 4


class Fixed(Drafter):
    """Always the same draft."""

    name = "fixed"

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def begin(self, generation: Generation) -> None:
        """Nothing to keep."""

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        fits = {limit: self._cut(limit) for limit in set(budget)}
        return [fits[limit] for limit in budget]

    def _cut(self, limit: int) -> Draft:
        parents = None if self.draft.parents is None else self.draft.parents[:limit]
        return Draft(self.draft.tokens[:limit], parents)

    def observe(self, row: int, outcome: Outcome) -> None:
        """Nothing to learn."""


class Random(Fixed):
    """Draws its chain from another Markov chain, and says so."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.last: list[int] = []

    def begin(self, generation: Generation) -> None:
        self.last = [prompt[-1] for prompt in generation.prompts]

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        state, tokens, laws = torch.tensor([self.last[row] for row in rows]), [], []
        for _ in range(max(budget)):
            laws.append(self.table[state])
            state = torch.multinomial(laws[-1], 1).squeeze(1)
            tokens.append(state)
        drawn, q = torch.stack(tokens, 1).tolist(), torch.stack(laws, 1)
        return [Draft(drawn[i][:limit], None, q[i, :limit]) for i, limit in enumerate(budget)]

    def observe(self, row: int, outcome: Outcome) -> None:
        self.last[row] = outcome.tokens[-1]


def chi_square_p(counts: torch.Tensor, law: torch.Tensor) -> float:
    """P-value of ``counts`` under ``law`` (both over the same cells; cells of probability 0 excluded)."""
    assert int(counts[law == 0].sum()) == 0, "something impossible was drawn"
    counts, law = counts[law > 0].double(), law[law > 0].double()
    expected = law * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(law) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def joint_law(table: torch.Tensor, start: int) -> torch.Tensor:
    """Law of the first three tokens of the chain, ``[V**3]``."""
    p = table.double()
    return (p[start][:, None, None] * p[:, :, None] * p[None]).flatten()


TABLE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25] * 4, [0.05, 0.15, 0.3, 0.5]])
OTHER = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.5, 0.0, 0.0, 0.5]])
DRAFTERS: dict[str, tuple[Callable[[], Drafter], int]] = {
    "chain": (lambda: Fixed(Draft([1, 1, 3])), 50_000),
    "tree": (lambda: Fixed(Draft([0, 1, 1, 2, 3, 0], [-1, -1, 0, 0, 1, 1])), 20_000),
    "ngram": (lambda: NgramDrafter(min_ngram=1, tokens=2), 20_000),
    "drawn": (lambda: Random(OTHER), 20_000),
}


def sample(drafter: Drafter | None, rows: int, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    config = LlamaConfig(vocab_size=STATES, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    program = TableProgram(TABLE.log())
    speculation = None if drafter is None else Speculation(drafter, FixedLength(6))
    fast = OptimizedModel(
        program, config=config, generation_config=GenerationConfig(), speculation=speculation
    )
    ids = torch.tensor([[2, 0, 1, 2, 0]]).expand(rows, -1)
    ones = torch.ones_like(ids)
    out = fast.generate(ids, attention_mask=ones, do_sample=True, max_new_tokens=4, **{"top_k": 0, **options})
    new = out[:, 5:]
    cells = (new[:, 0] * STATES + new[:, 1]) * STATES + new[:, 2]
    return torch.bincount(cells, minlength=STATES**3), fast.stats()["last"]


@pytest.mark.parametrize("name", DRAFTERS)
def test_sampling_keeps_the_distribution(name: str) -> None:
    make, rows = DRAFTERS[name]
    torch.manual_seed(20)
    counts, stats = sample(make(), rows)
    assert counts.sum() == rows and 0 < stats["accepted"] < stats["draft_tokens"]
    assert chi_square_p(counts, joint_law(TABLE, 0)) > 1e-3


@pytest.mark.parametrize("name", DRAFTERS)
def test_sampling_keeps_the_distribution_after_processors(name: str) -> None:
    make, _ = DRAFTERS[name]
    torch.manual_seed(21)
    counts, stats = sample(make(), 8_000, temperature=0.7, top_k=3)
    warped = TABLE.log() / 0.7
    third = warped.topk(3, -1).values[:, -1:]
    law = torch.where(warped < third, 0.0, warped.exp())
    assert stats["accepted"] > 0
    assert chi_square_p(counts, joint_law(law / law.sum(-1, keepdim=True), 0)) > 1e-3


def test_the_chi_square_test_notices_a_bias() -> None:
    torch.manual_seed(22)
    counts, _ = sample(None, 50_000)
    assert chi_square_p(counts, joint_law(TABLE, 0)) > 1e-3
    assert chi_square_p(counts, joint_law(0.97 * TABLE + 0.03 * OTHER, 0)) < 1e-6


def test_rejection_never_returns_what_the_target_excludes() -> None:
    p, q = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.9, 0.1, 0.0])
    torch.manual_seed(0)
    for rule in (Rejection(), Recursive()):
        assert {rule.pick(p, q, [0]) for _ in range(200)} == {1, 2}
        assert {rule.pick(p, p, [1]) for _ in range(50)} == {1}
