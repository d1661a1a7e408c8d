"""Drafting with a second model: the output stays, whatever the model, the tree and the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from graphwright.ir.errors import InputError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import FixedLength, Speculation
from graphwright.runtime.speculation.draft_model import DraftModel
from graphwright.runtime.speculation.drafters.model import ModelDrafter
from graphwright.runtime.speculation.drafters.retrieved import RetrievedDrafter
from graphwright.runtime.speculation.drafters.staged import StagedDrafter
from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.shortening import relevance, shortened
from graphwright.runtime.speculation.trees.chain import Chain
from graphwright.runtime.speculation.trees.tree import Tree
from tests.e2e.fake_program import VOCAB, ReferenceProgram, TableProgram, tiny_model
from tests.e2e.packed_programs import repetitive_prompts
from tests.e2e.test_generate import RAGGED, padded
from tests.e2e.test_generate_errors import steps_of
from tests.e2e.test_speculation_exact import OTHER, STATES, TABLE, chi_square_p, joint_law


class Wide(Tree):
    """Two children below every token, level by level."""

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        level = [0]
        while level and len(growing) < budget:
            answers = yield level
            below = []
            for node, successors in zip(level, answers, strict=True):
                for _ in range(2):
                    if successors.ahead() > 0 and len(growing) < budget:
                        child = growing.add(node, successors)
                        below += [child] if child is not None else []
            level = below


def noisy(model: Any, share: float) -> Any:
    """The same model with some noise in its last layer's weights: right now and then."""
    torch.manual_seed(3)
    other = tiny_model("llama")
    other.load_state_dict(model.state_dict())
    weight = other.model.layers[-1].mlp.down_proj.weight
    with torch.no_grad():
        weight += share * weight.std() * torch.randn_like(weight)
    return other


def draft_with(model: Any, **options: Any) -> ModelDrafter:
    found = ModelDrafter(**options)
    found.use(DraftModel(ReferenceProgram(model)))
    return found


def fast_of(model: Any, speculation: Speculation | None) -> OptimizedModel:
    return OptimizedModel(
        ReferenceProgram(model),
        config=model.config,
        generation_config=model.generation_config,
        speculation=speculation,
    )


EIGHT = [*RAGGED, *[[row[0], *row[2:]] for row in RAGGED]] * 2


@pytest.mark.parametrize("rows", [RAGGED[:1], EIGHT[:8]], ids=["one", "ragged8"])
@pytest.mark.parametrize("tree", [Chain(), Wide()], ids=["chain", "wide"])
def test_greedy_output_stays(llama: Any, tree: Tree, rows: list[list[int]]) -> None:
    inputs = padded(rows, "left")
    want = llama.generate(**inputs, max_new_tokens=18)
    drafter = draft_with(noisy(llama, 0.5))
    fast = fast_of(llama, Speculation(drafter, FixedLength(6), tree=tree))
    assert torch.equal(fast.generate(**inputs, max_new_tokens=18), want)
    stats = fast.stats()["last"]
    assert 0 < stats["accepted"] < stats["draft_tokens"] and stats["cycles"] < 17


def test_a_perfect_draft_model_is_always_right(llama: Any) -> None:
    inputs = padded(RAGGED, "left")
    fast = fast_of(llama, Speculation(draft_with(llama), FixedLength(4)))
    assert torch.equal(
        fast.generate(**inputs, max_new_tokens=21), llama.generate(**inputs, max_new_tokens=21)
    )
    stats = fast.stats()["last"]
    assert stats["accepted"] == stats["draft_tokens"] and stats["cycles"] == 4


def test_the_draft_model_never_reads_a_token_twice(llama: Any) -> None:
    """Accepted drafts stay in its cache; only refused ones are run anew, with the token that is right."""
    program = ReferenceProgram(llama)
    drafter = ModelDrafter()
    drafter.use(DraftModel(program))
    fast = fast_of(llama, Speculation(drafter, FixedLength(4)))
    fast.generate(torch.tensor([RAGGED[0]]), max_new_tokens=16)
    # Cycles of 4: the first step of later ones has the last draft, which was not run, in front of the root.
    assert [sum(width) for width in program.widths] == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_a_row_may_end_in_the_middle_of_a_draft(llama: Any) -> None:
    inputs = padded(RAGGED, "left")
    plain = llama.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    options = {"eos_token_id": [int(plain[0, 6]), int(plain[1, 9])], "pad_token_id": 0, "max_new_tokens": 16}
    fast = fast_of(llama, Speculation(draft_with(llama), FixedLength(5)))
    assert torch.equal(fast.generate(**inputs, **options), llama.generate(**inputs, **options))


@pytest.mark.parametrize("new", [1, 2, 5])
def test_the_cache_may_be_full(llama: Any, new: int) -> None:
    ids = torch.tensor([RAGGED[0]])
    fast = fast_of(llama, Speculation(draft_with(llama), FixedLength(6)))
    fast.capacity = ids.shape[1] + new
    assert torch.equal(fast.generate(ids, max_new_tokens=new), llama.generate(ids, max_new_tokens=new))


def test_rows_that_outgrow_the_draft_model_go_on_without(llama: Any) -> None:
    prompt = torch.tensor([RAGGED[0]])
    small = ReferenceProgram(llama)
    small.max_positions = prompt.shape[1] + 8
    drafter = ModelDrafter()
    drafter.use(DraftModel(small))
    fast = fast_of(llama, Speculation(drafter, FixedLength(4)))
    want = llama.generate(prompt, max_new_tokens=24)
    assert torch.equal(fast.generate(prompt, max_new_tokens=24), want)
    last = fast.stats()["last"]
    assert last["accepted"] > 0 and "grown beyond" in last["speculation_off"]
    small.max_positions = 5
    assert torch.equal(fast.generate(prompt, max_new_tokens=24), want)
    last = fast.stats()["last"]
    assert last["drafts"] == 0 and "the draft model reads 5" in last["speculation_off"]


def test_a_draft_model_may_read_a_part_of_the_prompt(llama: Any) -> None:
    torch.manual_seed(4)
    rows = torch.randint(3, VOCAB, (2, 150))
    program = ReferenceProgram(noisy(llama, 0.1))
    drafter = ModelDrafter(context=64)
    drafter.use(DraftModel(program))
    fast = fast_of(llama, Speculation(drafter, FixedLength(4)))
    assert torch.equal(fast.generate(rows, max_new_tokens=12), llama.generate(rows, max_new_tokens=12))
    assert fast.stats()["last"]["drafts"] > 0


def test_the_program_drafts_over_a_shortened_prompt(llama: Any) -> None:
    torch.manual_seed(4)
    rows = torch.randint(3, VOCAB, (2, 150))
    fast = fast_of(llama, Speculation(RetrievedDrafter(context=64), FixedLength(3)))
    assert torch.equal(fast.generate(rows, max_new_tokens=12), llama.generate(rows, max_new_tokens=12))
    assert fast.stats()["last"]["drafts"] > 0
    short = rows[:, :40]
    assert torch.equal(fast.generate(short, max_new_tokens=6), llama.generate(short, max_new_tokens=6))
    last = fast.stats()["last"]
    assert last["drafts"] == 0 and "no more than the 64" in last["speculation_off"]


def test_what_is_kept_of_a_long_prompt() -> None:
    facts = [list(range(100 + 64 * i, 164 + 64 * i)) for i in range(8)]
    prompt = [1, 2, 3, 4, *(token for chunk in facts for token in chunk), *facts[3][:40]]
    kept = shortened(prompt, 160)
    assert len(kept) <= 160 and kept[:4] == prompt[:4] and kept[-80:] == prompt[-80:]
    assert facts[3][10] in kept[:-80] and facts[5][10] not in kept
    assert shortened(prompt, len(prompt)) == prompt
    assert relevance([[1, 2], [3, 4], [5, 6]], [4, 3, 9])[0] == 1
    assert relevance([[1], [2]], []) == [1, 0]  # the later one, where nothing is shared


@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one", "ragged"])
def test_staged_drafts_are_what_the_smaller_model_accepts(llama: Any, rows: list[list[int]]) -> None:
    inputs = padded(rows, "left")
    want = llama.generate(**inputs, max_new_tokens=24)
    small = ReferenceProgram(noisy(llama, 0.3))
    drafter = StagedDrafter()
    drafter.use(DraftModel(small))
    fast = fast_of(llama, Speculation(drafter, FixedLength(5)))
    assert torch.equal(fast.generate(**inputs, max_new_tokens=24), want)
    stats = fast.stats()["last"]
    assert stats["accepted"] > 0
    # Fewer steps of the smaller model than tokens that it drafted for the longest row.
    assert small.steps < stats["draft_tokens"]


def sampled(drafter: ModelDrafter, rows: int, tree: Tree) -> tuple[torch.Tensor, dict[str, Any]]:
    config = LlamaConfig(vocab_size=STATES, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    fast = OptimizedModel(
        TableProgram(TABLE.log()),
        config=config,
        generation_config=GenerationConfig(),
        speculation=Speculation(drafter, FixedLength(3), tree=tree),
    )
    ids = torch.tensor([[2, 0, 1, 2, 0]]).expand(rows, -1)
    ones = torch.ones_like(ids)
    new = fast.generate(ids, attention_mask=ones, do_sample=True, max_new_tokens=4, top_k=0)[:, 5:]
    cells = (new[:, 0] * STATES + new[:, 1]) * STATES + new[:, 2]
    return torch.bincount(cells, minlength=STATES**3), fast.stats()["last"]


@pytest.mark.parametrize(("tree", "confidence"), [(Chain(), 0.0), (Wide(), 0.0), (Chain(), 0.45)])
def test_sampling_keeps_the_distribution(tree: Tree, confidence: float) -> None:
    torch.manual_seed(5)
    drafter = ModelDrafter(confidence=confidence)
    drafter.use(DraftModel(TableProgram((OTHER + 1e-9).log())))
    counts, stats = sampled(drafter, 1_200, tree)
    assert 0 < stats["accepted"] < stats["draft_tokens"]
    assert chi_square_p(counts, joint_law(TABLE, 0)) > 1e-3


def test_confidence_stops_a_draft(llama: Any) -> None:
    ids = torch.tensor([RAGGED[0]])
    drafted = []
    for confidence in (0.0, 0.5, 1.0):
        fast = fast_of(llama, Speculation(draft_with(llama, confidence=confidence), FixedLength(6)))
        fast.generate(ids, max_new_tokens=14)
        drafted.append(fast.stats()["last"]["draft_tokens"])
    assert drafted[0] > drafted[2] == 0 and drafted[0] >= drafted[1]


def test_what_cannot_draft_says_so(llama: Any) -> None:
    ids = torch.tensor([RAGGED[0]])
    with pytest.raises(InputError, match="no draft model"):
        fast_of(llama, Speculation(ModelDrafter())).generate(ids, max_new_tokens=3)
    elsewhere = ReferenceProgram(llama)
    elsewhere.device = torch.device("meta")
    drafter = ModelDrafter()
    drafter.use(DraftModel(elsewhere))
    fast = fast_of(llama, Speculation(drafter))
    with pytest.raises(InputError, match="on meta, the program on cpu"):
        fast.generate(ids, max_new_tokens=3)
    assert steps_of(fast) == 0
    for wrong in ({"vocabulary": "french"}, {"context": 3}, {"confidence": 2.0}):
        with pytest.raises(InputError):
            ModelDrafter(**wrong)
    with pytest.raises(InputError, match="context"):
        RetrievedDrafter(context=8)
    with pytest.raises(InputError, match="inner=model"):
        StagedDrafter(inner="model")
    with pytest.raises(InputError, match="tokens=0"):
        StagedDrafter(tokens=0)


@pytest.mark.parametrize("tree", [Chain(), Wide()], ids=["chain", "wide"])
def test_a_real_cache_does_as_the_reference(llama: Any, make_fast: Any, tree: Tree) -> None:
    """What is committed, cut and run again is what the reference runs from scratch."""
    torch.manual_seed(4)
    rows = [torch.randint(3, VOCAB, (length,)).tolist() for length in (150, 120, 97)]
    inputs = padded(rows, "left")
    want, drafts = llama.generate(**inputs, max_new_tokens=16), []
    program = make_fast(llama).program
    before = program.cache_bytes()  # others may hold caches of a program that tests share
    for fast in (make_fast(llama), fast_of(llama, None)):
        fast.speculation = Speculation(RetrievedDrafter(context=80), FixedLength(6), tree=tree)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=16), want)
        stats = fast.stats()["last"]
        drafts.append([stats[key] for key in ("cycles", "accepted", "draft_tokens")])
    assert drafts[0] == drafts[1] and drafts[0][1] < drafts[0][2]
    assert program.cache_bytes() <= before  # neither cache outlives the call


@pytest.mark.parametrize("kind", ["windowed", "packed"])
def test_every_kind_of_cache_follows_the_text(kind: str, make: Any) -> None:
    """A ragged batch beyond the window and over full pages, with drafts over shortened prompts."""
    program, model = make(kind)
    fast = OptimizedModel(program, config=model.config, generation_config=model.generation_config)
    ids, mask = repetitive_prompts([260, 90, 171])
    options = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    want = fast.generate(ids, do_sample=False, **options)
    fast.speculation = Speculation(RetrievedDrafter(context=80), FixedLength(5))
    assert torch.equal(fast.generate(ids, do_sample=False, **options), want)
    stats = fast.stats()["last"]
    assert stats["accepted"] > 0 and stats["cycles"] < 39
