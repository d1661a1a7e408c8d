"""Divergence, perplexity and agreement, against arithmetic by hand and against the stock model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphwright.ir.errors import InputError
from graphwright.optimizer.quality import Quality, Reference, measure_quality
from tests.quality.rounded_cache import Lab, RoundCache

ROWS = [torch.arange(3, 53).tolist(), torch.arange(60, 20, -1).tolist(), [5] * 21]


class Table:
    """A program whose logits depend on the last token only."""

    def __init__(self, table: Any) -> None:
        self.table = torch.as_tensor(table)
        self.device, self.dtype, self.vocab_size = torch.device("cpu"), self.table.dtype, len(self.table)
        self.steps = 0

    def allocate(self, batch: int, capacity: int) -> Any:
        """No state is needed."""
        return SimpleNamespace(commit=lambda counts: None, end_prompt=lambda prompts: None)

    def step(self, state: Any, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Look up."""
        self.steps += 1
        return self.table[tokens]


def compare(first: Any, second: Any, rows: Any, **options: Any) -> Quality:
    """:func:`measure_quality` on tables."""
    return measure_quality(first, second, rows, **options)


def log(*probabilities: float) -> list[float]:
    """Logits of a distribution."""
    return [math.log(p) for p in probabilities]


def test_two_tokens_by_hand() -> None:
    """A vocabulary of two: every figure can be written down."""
    exact = Table([log(0.5, 0.5), log(0.9, 0.1)])
    lossy = Table([log(0.25, 0.75), log(0.8, 0.2)])
    found = compare(exact, lossy, [[0, 0, 1, 0]])  # contexts 0, 0, 1 with the next tokens 0, 1, 0
    after_0 = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    after_1 = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    assert found.kl == pytest.approx((2 * after_0 + after_1) / 3, rel=1e-5)
    ratio = (0.5 / 0.25 * 0.5 / 0.75 * 0.9 / 0.8) ** (1 / 3)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert found.log_perplexity == pytest.approx(math.log(ratio), rel=1e-4)
    # Of two equal logits the first counts as the choice: after 0 the programs differ, after 1 they agree.
    assert found.top1_agreement == pytest.approx(1 / 3)
    assert found.tokens == 3
    largest = max(abs(math.log(p)) for p in (0.5, 0.9, 0.1))
    assert found.relative_logit_difference == pytest.approx(math.log(2) / largest, rel=1e-5)


def test_identical_programs_differ_by_exactly_nothing(lab: Lab) -> None:
    """Not nearly: two lowerings of one graph give 0, 1 and 1."""
    found = measure_quality(lab.program(lab.graph), lab.program(lab.graph), ROWS)
    assert found == Quality(0.0, 1.0, 1.0, sum(len(row) - 1 for row in ROWS), 0.0)


def test_the_exact_program_is_the_stock_model(lab: Lab) -> None:
    """The divergence of a lossy program from stock's logits is the one from the exact program."""
    changed = lab.graph.copy()
    rewrite = RoundCache(3)
    for site in rewrite.find(changed):
        rewrite.apply(site, changed)
    program = lab.program(changed)
    found = measure_quality(lab.program(lab.graph), program, ROWS[:1])
    ids = torch.tensor(ROWS[:1])
    state = program.allocate(1, 64)
    actual = program.step(state, ids, torch.tensor([50]))[0, :-1].log_softmax(-1)
    with torch.no_grad():
        expected = lab.model(ids).logits[0, :-1].log_softmax(-1)
    assert found.kl > 0.01
    assert found.kl == pytest.approx(float((expected.exp() * (expected - actual)).sum(-1).mean()), rel=1e-3)
    at = ids[0, 1:, None]
    nll = float((expected.gather(1, at) - actual.gather(1, at)).mean())
    assert found.log_perplexity == pytest.approx(nll, rel=1e-3)
    agreed = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    assert found.top1_agreement == pytest.approx(float(agreed))


def test_rows_of_any_length_count_by_their_tokens() -> None:
    """Rows together give the mean over their tokens, whatever the step, and however many rows."""
    torch.manual_seed(0)
    exact, lossy = Table(torch.randn(70, 70)), Table(torch.randn(70, 70))
    rows = [*ROWS, [1], *([[7, 8, 9]] * 9)]
    together = compare(exact, lossy, rows)
    single = [compare(exact, lossy, [row]) for row in rows if len(row) > 1]
    assert together.tokens == sum(s.tokens for s in single)
    mean = sum(s.kl * s.tokens for s in single) / together.tokens
    assert together.kl == pytest.approx(mean, rel=1e-6)
    other = compare(exact, lossy, rows, step=5)
    assert (other.kl, other.tokens) == (pytest.approx(together.kl, rel=1e-6), together.tokens)


def test_the_reference_runs_once_if_its_logits_fit() -> None:
    """Kept or computed again, the result is the same."""
    torch.manual_seed(0)
    lossy = Table(torch.randn(70, 70))
    exact, once = Table(torch.randn(70, 70)), Table(torch.zeros(70, 70))
    once.table = exact.table
    kept, again = Reference(once, ROWS), Reference(exact, ROWS, keep_bytes=1000)  # type: ignore[arg-type]
    results = [reference.measure(lossy) for reference in (kept, again) for _ in range(3)]  # type: ignore[arg-type]
    assert len(set(results)) == 1
    assert (once.steps, exact.steps) == (4, 12)


def test_half_precision_is_compared_in_full() -> None:
    """Logits in bfloat16 lose nothing more in the comparison."""
    torch.manual_seed(0)
    first, second = (torch.randn(70, 70).bfloat16() for _ in range(2))
    half = compare(Table(first), Table(second), ROWS)
    full = compare(Table(first.double()), Table(second.double()), ROWS)
    assert half.kl == pytest.approx(full.kl, rel=1e-5)
    assert half.perplexity_ratio == pytest.approx(full.perplexity_ratio, rel=1e-5)


def test_a_broken_program_has_lost_everything() -> None:
    """NaN is infinite loss, never a number that passes a bound; ruled-out tokens are no NaN."""
    exact = Table([[0.0, 0.0], [0.0, 1.0]])
    broken = compare(exact, Table([[math.nan, 0.0], [0.0, 1.0]]), [[0, 1, 0, 1]])
    assert broken.kl == math.inf and broken.perplexity_ratio == math.inf
    assert broken.relative_logit_difference == math.inf
    ruled_out = [[0.0, 0.0, -math.inf]] * 3
    fine = compare(Table(ruled_out), Table([[0.0, 0.1, -math.inf]] * 3), [[0, 1, 0, 1]])
    assert 0 < fine.kl < 0.01
    impossible = compare(Table([[0.0, 0.0]] * 2), Table([[0.0, -math.inf]] * 2), [[0, 1, 0]])
    assert impossible.kl == math.inf and impossible.perplexity_ratio == math.inf


@pytest.mark.parametrize("rows", [[], [[1]], [[], [1]]])
def test_nothing_to_measure_on(rows: list[list[int]]) -> None:
    """A row of one token predicts nothing that is known."""
    with pytest.raises(InputError, match="no row has two tokens"):
        compare(Table([[0.0, 1.0]] * 2), Table([[0.0, 1.0]] * 2), rows)
