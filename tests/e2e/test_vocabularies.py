"""Drafting with a model that has another vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from graphwright.ir.errors import InputError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import Drafter, FixedLength, Speculation
from graphwright.runtime.speculation.draft_model import DraftModel
from graphwright.runtime.speculation.drafters.model import ModelDrafter
from graphwright.runtime.speculation.drafters.retokenized import RetokenizedDrafter
from graphwright.runtime.speculation.translation import (
    Retokenizer,
    SameTokens,
    SharedTokens,
    common_tokens,
)
from graphwright.runtime.speculation.trees.chain import Chain
from graphwright.runtime.speculation.trees.tree import Tree
from tests.e2e.fake_program import TableProgram
from tests.e2e.test_model_drafter import Wide
from tests.e2e.test_speculation_exact import chi_square_p, joint_law

LETTERS = ["[UNK]", "a", "b", "c", "d"]


def bpe(vocabulary: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer of letters and merged letters; everything is one word."""
    known = {text: token for token, text in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=merges, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TARGET = bpe([*LETTERS, "ab"], [("a", "b")])
#: The same letters under other ids, without "d" and with merges of its own.
DRAFT = bpe(["[UNK]", "c", "b", "a", "bc", "ca"], [("b", "c"), ("c", "a")])
STRANGER = bpe(["[UNK]", "x", "y"], [])
V, D = 6, 6


def spread(rows: int, seed: int) -> torch.Tensor:
    """A Markov chain in which everything may follow everything but the unknown token."""
    table = torch.rand((rows, rows), generator=torch.Generator().manual_seed(seed)) + 0.05
    table[:, 0] = 0.0
    return table / table.sum(-1, keepdim=True)


P, Q = spread(V, 1), spread(D, 2)


def model(tokenizer: Any = DRAFT, table: torch.Tensor = Q) -> DraftModel:
    return DraftModel(TableProgram(table.log()), tokenizer, TARGET)


def fast_with(drafter: Any, table: torch.Tensor = P, tree: Tree | None = None) -> OptimizedModel:
    return OptimizedModel(
        TableProgram(table.log()),
        config=LlamaConfig(vocab_size=V, bos_token_id=1, eos_token_id=None, pad_token_id=0),
        generation_config=GenerationConfig(),
        speculation=Speculation(drafter, FixedLength(3), tree=tree),
    )


def with_model(drafter: Any, found: DraftModel) -> Any:
    drafter.use(found)
    return drafter


def test_tokens_are_paired_by_their_strings() -> None:
    pairs = common_tokens(TARGET, DRAFT, (V, D))
    assert pairs == {1: 3, 2: 2, 3: 1}
    assert 3 not in common_tokens(TARGET, DRAFT, (3, D))  # "c" is beyond what the model can choose
    assert 1 not in common_tokens(TARGET, DRAFT, (V, 3))
    with pytest.raises(InputError, match="no token in common"):
        common_tokens(TARGET, STRANGER, (V, 3))  # but for unknown words


def test_signs_for_spaces_are_one() -> None:
    sign, dot = bpe(["[UNK]", "▁", "a", "▁a"], []), bpe(["[UNK]", "Ġ", "b", "Ġa"], [])
    sign.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
    dot.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert common_tokens(sign, dot, (4, 4)) == {1: 1, 3: 3}


def test_the_law_is_over_what_both_have() -> None:
    translation = model().translation(TableProgram(P), "intersection")
    assert isinstance(translation, SharedTokens)
    logits = torch.tensor([[-9.0, 1.0, 2.0, 3.0, 50.0, 50.0]])
    law = translation.law(logits)
    assert (
        law.shape == (1, V)
        and law[0, [0, 4, 5]].tolist() == [0, 0, 0]
        and float(law.sum()) == pytest.approx(1)
    )
    both = torch.softmax(logits[0, [3, 2, 1]], -1)
    assert law[0, 1:4].tolist() == pytest.approx(both.tolist())


def test_text_is_read_in_the_draft_models_tokens() -> None:
    read = Retokenizer(TARGET, DRAFT)
    a, b, c, d, ab = 1, 2, 3, 4, 5
    assert read((), [ab, c]) == [3, 4]  # "abc" is "a", "bc" to the draft model
    assert read([ab], [c]) != []  # joined to what came before, or by itself
    translation = model().translation(TableProgram(P), "intersection")
    assert translation.read([a], [b, c]) == [2, 1]  # both have them: one to one
    assert translation.read([a], [d]) == [0]  # unknown to it
    assert [translation.drafted(token) for token in (a, b, c)] == [3, 2, 1]


def test_which_vocabulary_it_is_follows_from_what_is_known() -> None:
    target = TableProgram(P)
    assert isinstance(DraftModel(TableProgram(Q)).translation(target), SameTokens)
    assert isinstance(model(TARGET).translation(target), SameTokens)
    assert isinstance(model().translation(target), SharedTokens)
    larger = DraftModel(TableProgram(spread(8, 3)))
    with pytest.raises(InputError, match="knows 6 tokens and the draft model 8"):
        larger.translation(target)
    same = larger.translation(target, "same")
    assert same.law(torch.zeros(1, 8)).tolist() == [pytest.approx([1 / 6] * 6)]
    smaller = DraftModel(TableProgram(spread(4, 3))).translation(target, "same")
    assert smaller.law(torch.zeros(1, 4))[0].tolist() == pytest.approx([0.25] * 4 + [0.0] * 2)
    assert smaller.read((), [1, 5, 3]) == [1, 3]


EVERY = pytest.mark.parametrize(
    ("drafter", "tree"),
    [(ModelDrafter, Chain()), (ModelDrafter, Wide()), (RetokenizedDrafter, Chain())],
    ids=["intersection", "intersection-wide", "retokenized"],
)


@EVERY
def test_greedy_output_stays(drafter: type[Drafter], tree: Tree) -> None:
    ids = torch.tensor([[1, 2, 3], [5, 5, 3], [4, 1, 1]])
    ones = torch.ones_like(ids)
    # A target that goes round through its letters, and a draft model that mostly agrees.
    around = torch.full((V, V), 0.02)
    for token, follow in ((1, 2), (2, 3), (3, 1), (4, 5), (5, 3), (0, 1)):
        around[token, follow] = 1.0
    draft = torch.full((D, D), 0.02)
    for token, follow in ((3, 2), (2, 1), (1, 3), (4, 3), (5, 2), (0, 3)):
        draft[token, follow] = 1.0
    fast = fast_with(with_model(drafter(), model(table=draft)), around, tree)
    got = fast.generate(ids, attention_mask=ones, max_new_tokens=15)
    plain = fast_with(with_model(drafter(), model()), around)
    plain.speculation = None
    assert torch.equal(got, plain.generate(ids, attention_mask=ones, max_new_tokens=15))
    stats = fast.stats()["last"]
    assert stats["accepted"] > 0 and stats["cycles"] < 14


@EVERY
def test_sampling_keeps_the_distribution(drafter: type[Drafter], tree: Tree) -> None:
    torch.manual_seed(9)
    rows = 1_000
    fast = fast_with(with_model(drafter(), model()), tree=tree)
    ids = torch.tensor([[1, 2, 3]]).expand(rows, -1)
    ones = torch.ones_like(ids)
    new = fast.generate(ids, attention_mask=ones, do_sample=True, max_new_tokens=4, top_k=0)[:, 3:]
    cells = (new[:, 0] * V + new[:, 1]) * V + new[:, 2]
    stats = fast.stats()["last"]
    assert 0 < stats["accepted"] < stats["draft_tokens"]
    assert chi_square_p(torch.bincount(cells, minlength=V**3), joint_law(P, 3)) > 1e-3


def test_text_needs_both_tokenizers() -> None:
    ids = torch.tensor([[1, 2, 3]])
    bare = DraftModel(TableProgram(Q.log()), DRAFT)
    for drafter in (RetokenizedDrafter(), ModelDrafter(vocabulary="intersection")):
        drafter.use(bare)
        with pytest.raises(InputError, match="the program's tokenizer is missing"):
            fast_with(drafter).generate(ids, max_new_tokens=3)
    stranger = with_model(ModelDrafter(), DraftModel(TableProgram(spread(3, 5).log()), STRANGER, TARGET))
    with pytest.raises(InputError, match="no token in common"):
        fast_with(stranger).generate(ids, max_new_tokens=3)
