"""Programs whose tokens use different layers give what single tokens through stock layers would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphwright.optimizer.build import make_program
from graphwright.optimizer.quality.metrics import Reference
from graphwright.passes.base import parse_pass
from graphwright.passes.decay_depth import DecayDepth
from graphwright.runtime.lowering import LoweredStep, LoweringOptions, lower
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import FixedLength, Speculation
from tests.architectures import VOCAB, tiny_model
from tests.e2e.depth_reference import Exiting, TokenByToken, generated
from tests.e2e.graph_stand_in import as_model, with_graphs
from tests.e2e.packed_programs import PAGE, PackedModel, random_text
from tests.e2e.test_generate import padded
from tests.e2e.test_speculation_exact import Oracle

KV = "place_cache{cut=kv}"
INT8 = f"quantize_cache{{codec=int,bits=8,page={PAGE},first=4,recent=8}}"
EVICT = "evict_tokens{method=snapkv,tokens=40,window=4,sinks=2,slack=72}"
SELECT = "sparsify_attention{selector=bounds,keep=0.25}"
DECAY = "decay_depth{alpha=0.95,first=1,last=1,start=4,least=3}"
EXIT, LAST, SURE = "exit_early{layer=2,threshold=0.6}", 2, 0.6
LAYERS, NEW = 6, 40
PROMPTS = [row[:length] for row, length in zip(random_text(3, 40).tolist(), (25, 9, 33), strict=True)]
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tiny() -> PackedModel:
    model = tiny_model("llama", layers=LAYERS)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # sure of some tokens
    return PackedModel(model)


@pytest.fixture(scope="module")
def decaying(tiny: PackedModel) -> OptimizedModel:
    return program(tiny, KV, DECAY)


def program(tiny: PackedModel, *passes: str) -> OptimizedModel:
    """The passes' program; the last of them applied."""
    graph, records = tiny.rewrite(passes)
    assert records[-1].status == "applied", records[-1].reason
    return tiny.run(graph)


@pytest.fixture(scope="module")
def expected(tiny: PackedModel) -> list[list[int]]:
    limits = rule().limits(list(range(LAYERS)))
    assert max(limits.values()) < NEW  # every flexible layer falls out of use

    def uses(layer: int, index: int) -> bool:
        return index <= limits.get(layer, index)

    return [generated(TokenByToken(tiny.model, uses), prompt, NEW) for prompt in PROMPTS]


def rule() -> DecayDepth:
    found = parse_pass(DECAY)
    assert isinstance(found, DecayDepth)
    return found


def tokens(fast: OptimizedModel, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    """New tokens of ragged prompts."""
    inputs = padded(list(prompts), "left")
    return fast.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :].tolist()


def drafting(fast: OptimizedModel, answers: list[list[int]], width: int) -> OptimizedModel:
    """The same program with drafts, some of them wrong."""
    oracle = Oracle(answers, wrong=5, width=width, vocab=VOCAB)
    speculation = Speculation(oracle, FixedLength(12))
    own = {"config": fast.config, "generation_config": fast.generation_config}
    return OptimizedModel(fast.program, speculation=speculation, **own)


def counting(tiny: PackedModel, last: str) -> tuple[OptimizedModel, LoweredStep, Counter[int]]:
    """A program, its step, and how often each call ran, by index; those of an exit's rest from -1 down."""
    graph, _ = tiny.rewrite([KV, last])
    step = lower(graph, tiny.model.device, LoweringOptions(compile=False))
    runs: Counter[int] = Counter()

    def counted(call: Any, index: int) -> Any:
        def run(*args: Any) -> Any:
            runs[index] += 1
            return call(*args)

        return run

    step.calls = [(counted(call, i), ins, outs) for i, (call, ins, outs) in enumerate(step.calls)]
    if step.exit is not None:
        rest = step.exit.rest
        rest.calls = [(counted(call, -1 - i), ins, outs) for i, (call, ins, outs) in enumerate(rest.calls)]
    return as_model(make_program(tiny.model, graph, step), tiny.model), step, runs


# --- by position ---------------------------------------------------------------------------------


def test_rows_alone_and_ragged_follow_the_rule(
    tiny: PackedModel, decaying: OptimizedModel, expected: list[list[int]]
) -> None:
    assert tokens(decaying) == expected
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert tokens(decaying, [prompt]) == [row]
    assert tokens(program(tiny, KV)) != expected


@pytest.mark.parametrize("width", [1, 2])
def test_drafts_change_nothing(decaying: OptimizedModel, expected: list[list[int]], width: int) -> None:
    fast = drafting(decaying, expected, width)
    assert tokens(fast) == expected
    assert fast.stats()["last"]["cycles"] < NEW - 5


@pytest.mark.parametrize("rewrite", [INT8, EVICT, SELECT])
def test_other_caches_compose(tiny: PackedModel, rewrite: str) -> None:
    """Neither other rows nor drafts change a token, whatever lies in the slots of those that passed by."""
    fast = program(tiny, KV, rewrite, DECAY)
    plain = tokens(fast)
    assert plain != tokens(program(tiny, KV, rewrite))
    assert tokens(fast, PROMPTS[:1]) == plain[:1]
    assert tokens(drafting(fast, plain, 2)) == plain


def test_a_shared_prefix_composes(tiny: PackedModel, decaying: OptimizedModel) -> None:
    prompts = [PROMPTS[0][:20] + prompt for prompt in PROMPTS]
    shared = program(tiny, KV, "share_prefix", DECAY)
    assert tokens(shared, prompts) == tokens(decaying, prompts)
    assert shared.stats()["last"]["shared_prefix_tokens"] == 20


def test_layers_that_no_token_uses_do_not_run(tiny: PackedModel, expected: list[list[int]]) -> None:
    fast, step, runs = counting(tiny, DECAY)
    limits = rule().limits(list(range(LAYERS)))
    blocks = step.blocks.found
    steps = range(1, NEW)  # that choose these generated tokens; the prompt chose token 0

    assert tokens(fast, PROMPTS[:1]) == expected[:1]
    used = {layer: 1 + sum(i <= limits.get(layer, i) for i in steps) for layer in range(LAYERS)}
    assert {layer: runs[block.call] for layer, block in blocks.items()} == used
    assert fast.stats()["last"]["cycles"] == len(steps)

    # A row that has ended where it would still use a layer keeps none running.
    runs.clear()
    others = [token for row in (expected[0], expected[2]) for token in row]
    ends = (i for i, token in enumerate(expected[1]) if token not in others and token not in expected[1][:i])
    at = next(i for i in ends if i < max(limits.values()))
    end = expected[1][at]
    fast.generate(**padded(PROMPTS, "left"), **(OPTIONS | {"eos_token_id": end}))
    assert {layer: runs[block.call] for layer, block in blocks.items()} == used


def test_recorded_steps_leave_layers_out_too(
    decaying: OptimizedModel, tiny: PackedModel, expected: Any
) -> None:
    program, backend = with_graphs(decaying.program)  # type: ignore[arg-type]
    fast = as_model(program, tiny.model)
    assert tokens(fast) == expected
    depths = {rule().depth(index, LAYERS) for index in range(1, NEW)}
    repeated = [d for d in depths if sum(rule().depth(i, LAYERS) == d for i in range(1, NEW)) > 1]
    assert len(backend.captured) == len(repeated) > 2 and backend.replays > 10


def test_calls_of_forward_continue_a_prompt(decaying: OptimizedModel, expected: list[list[int]]) -> None:
    """The first call's tokens are the prompt, also where the cache grows and is filled again."""
    past, fed = None, PROMPTS[0]
    for token in expected[0]:
        out = decaying(input_ids=torch.tensor([fed]), past_key_values=past, use_cache=True)
        assert int(out.logits[0, -1].argmax()) == token
        past, fed = out.past_key_values, [token]
    past.crop(len(PROMPTS[0]) + 20)  # and again from the middle
    out = decaying(input_ids=torch.tensor([expected[0][20:21]]), past_key_values=past, use_cache=True)
    assert int(out.logits[0, -1].argmax()) == expected[0][21]


def test_scoring_sees_the_loss(
    decaying: OptimizedModel, tiny: PackedModel, expected: list[list[int]]
) -> None:
    """The first step is a prompt, what follows counts as generated."""
    ids = torch.tensor([PROMPTS[0] + expected[0]])
    scored = decaying.score(ids, step=len(PROMPTS[0]))
    assert scored[0, len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist() == expected[0]
    exact = program(tiny, KV)
    rows = [row + answer for row, answer in zip(PROMPTS, expected, strict=True)]
    lost = Reference(exact.program, rows, step=8).measure(decaying.program)  # type: ignore[arg-type]
    assert lost.kl > 1e-4


# --- by confidence -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exiting(tiny: PackedModel) -> OptimizedModel:
    return program(tiny, KV, EXIT)


@pytest.fixture(scope="module")
def exits(tiny: PackedModel) -> tuple[list[list[int]], list[list[bool]]]:
    """The rows' tokens, and which of them exited when they were fed."""
    rows = [Exiting(tiny.model, LAST, SURE) for _ in PROMPTS]
    found = [generated(row, prompt, NEW) for row, prompt in zip(rows, PROMPTS, strict=True)]
    return found, [row.exited for row in rows]


def test_sure_tokens_exit(tiny: PackedModel, exiting: OptimizedModel, exits: Any) -> None:
    found, left = exits
    assert all(0 < sum(row) < len(row) for row in left)
    assert tokens(exiting) == found != tokens(program(tiny, KV))
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert tokens(exiting, [prompt]) == [row]
    never = program(tiny, KV, "exit_early{layer=2,threshold=1.0,measure=margin}")
    assert tokens(never) == tokens(program(tiny, KV))


@pytest.mark.parametrize("width", [1, 2])
def test_drafts_change_nothing_where_tokens_exit(exiting: OptimizedModel, exits: Any, width: int) -> None:
    assert tokens(drafting(exiting, exits[0], width)) == exits[0]


@pytest.mark.parametrize("rewrite", [INT8, EVICT])
def test_other_caches_hold_what_exited(tiny: PackedModel, rewrite: str) -> None:
    fast = program(tiny, KV, rewrite, EXIT)
    plain = tokens(fast)
    assert tokens(fast, PROMPTS[:1]) == plain[:1]
    assert tokens(drafting(fast, plain, 2)) == plain


def test_only_keys_and_values_are_made_above_an_exit(tiny: PackedModel, exits: Any) -> None:
    fast, step, runs = counting(tiny, EXIT)
    assert step.exit is not None
    assert tokens(fast, PROMPTS[:1]) == exits[0][:1]
    left = sum(exits[1][0])
    steps = NEW - 1
    assert runs[step.exit.head] == runs[step.exit.decision] == steps  # not in the prompt
    assert {runs[-1 - i] for i in range(len(step.exit.rest.calls))} == {left}
    above = range(step.exit.decision + 1, len(step.calls))
    assert len(above) == LAYERS - LAST and {runs[i] for i in above} == {1 + steps - left}

    runs.clear()  # a step of several rows takes the short way where all of them exit
    assert tokens(fast) == exits[0]
    assert runs[-1] == sum(map(all, zip(*exits[1], strict=True)))


def test_the_short_way_stores_what_the_long_one_does(tiny: PackedModel) -> None:
    """A token that exits beside one that does not, and alone: equal logits, keys and values."""
    fast, _, ran = counting(tiny, EXIT)
    runs, state = fast.program, fast.program.allocate(2, 80)
    ids = torch.tensor([PROMPTS[0][:9], PROMPTS[1][:9]])
    runs.prefill(state, ids, torch.tensor([9, 9]))
    alone = runs.allocate(1, 80)
    runs.prefill(alone, ids[:1], torch.tensor([9]))
    text, short, shorter = random_text(2, 30, seed=8), 0, 0
    for at in range(30):
        both = runs.step(state, text[:, at : at + 1], torch.ones(2, dtype=torch.int64))
        short += ran[-1]
        ran.clear()
        one = runs.step(alone, text[:1, at : at + 1], torch.ones(1, dtype=torch.int64))
        shorter += ran[-1]
        ran.clear()
        assert torch.equal(both[:1], one)
        state.commit(torch.ones(2, dtype=torch.int64))
        alone.commit(torch.ones(1, dtype=torch.int64))
    assert short < shorter < 30
    for name, store in alone.stores.items():
        assert torch.equal(store[0], state.stores[name][0]), name


def test_a_step_that_the_host_looks_into_is_not_recorded(exiting: OptimizedModel) -> None:
    recorded, _ = with_graphs(exiting.program)  # type: ignore[arg-type]
    assert recorded.graphs_off is not None and "exit early" in recorded.graphs_off
