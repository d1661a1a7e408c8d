"""Which drafts pay: their acceptance measured on text, and the passes that say so."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from graphwright.passes.base import StepShape
from graphwright.passes.speculate import Speculate
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import make_speculation
from graphwright.runtime.speculation.acceptance import Likeliest, Text, measure_drafts
from graphwright.runtime.speculation.drafter import drafter_classes
from graphwright.runtime.speculation.rules.length_rule import RULES

#: Tokens that the program writes after each prompt at most, to see what drafts would have been accepted.
CONTINUATION = 384
# Writing stops after this long: a large model's text is judged by its beginning.
_WRITING_SECONDS = 10.0
_PROMPTS, _PROMPT_TOKENS = 4, 2048
_CONFIRM_PROMPT, _CONFIRM_BATCHES = 1024, 3

# How much of each distribution is kept of what the program writes.
_LIKELIEST = 8


def proposed_drafts(costs: Mapping[int, float] | None = None) -> list[Speculate]:
    """What the planner tries: every drafter as it proposes itself.

    Args:
        costs: of a step by its tokens, relative to a plain one, for rules that weigh them; their own
            assumption without.
    """
    found = [
        Speculate(drafter=name, **proposal)
        for name, cls in drafter_classes().items()
        for proposal in cls.proposals
    ]
    return [with_costs(chosen, costs) for chosen in found] if costs else found


def weighs_costs(chosen: Speculate) -> bool:
    """Whether the length rule wants to know what steps take."""
    return RULES.parse(chosen.rule).weighs_costs


def with_costs(chosen: Speculate, costs: Mapping[int, float]) -> Speculate:
    """The same drafts, with these costs of a step where the length rule weighs them."""
    if not weighs_costs(chosen):
        return chosen
    spelled = "+".join(f"{tokens}:{cost:.3g}" for tokens, cost in sorted(costs.items()))
    return replace(chosen, rule=f"{chosen.rule.partition('(')[0]}(costs={spelled})")


def measured_drafts(
    texts: Sequence[Text], candidates: Sequence[Speculate] | None = None
) -> tuple[Speculate, ...]:
    """Drafts with what they give on the texts.

    Args:
        texts: prompts and what followed them.
        candidates: what to measure; by default what the planner tries. Those that need logits are left out
            where the texts have none.
    """
    if not any(text.follow for text in texts):
        return ()
    with_logits = all(text.likeliest is not None for text in texts)
    found = []
    for chosen in proposed_drafts() if candidates is None else candidates:
        speculation = make_speculation(chosen.options())
        if speculation.drafter.wants_logits and not with_logits:
            continue
        rates = measure_drafts(speculation, texts)
        found.append(
            replace(
                chosen,
                acceptance=round(rates.acceptance, 3),
                hit_rate=round(rates.hit_rate, 3),
                verified=min(rates.verified, chosen.tokens),
            )
        )
    return tuple(found)


def continue_prompts(
    program: Program, prompts: Sequence[Sequence[int]], tokens: int = CONTINUATION
) -> list[Text]:
    """What the program itself writes after each prompt, greedily, all of them in one batch.

    Args:
        prompts: token ids; the first four, their last 2,048 tokens. Those that fill the model's positions
            are left out.
        tokens: to write after each, if the positions allow.
    """
    most = program.max_positions
    rows = [list(prompt)[-_PROMPT_TOKENS:] for prompt in prompts[:_PROMPTS]]
    rows = [row for row in rows if row and (most is None or len(row) < most)]
    if not rows:
        return []
    longest = max(map(len, rows))
    room = tokens if most is None else min(tokens, most - longest)
    written, likeliest = _greedy(program, rows, longest, room)
    return [Text(*text) for text in zip(rows, written, likeliest, strict=True)]


def until_end(text: Text, ends: Collection[int]) -> Text:
    """A text up to its first end token: nobody reads what a model writes after it."""
    last = next((at for at, token in enumerate(text.follow) if token in ends), len(text.follow))
    return text._replace(follow=text.follow[: last + 1])


def _greedy(
    program: Program, rows: list[list[int]], longest: int, tokens: int
) -> tuple[list[list[int]], list[Likeliest]]:
    """At most ``tokens`` more of each row, and what else was likely at each of them."""
    padded = torch.zeros((len(rows), longest), dtype=torch.int64, device=program.device)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    state = program.allocate(len(rows), longest + tokens)
    counts = torch.tensor([len(row) for row in rows], device=program.device)
    one = torch.ones_like(counts)
    logits = program.prefill(state, padded, counts)
    found = [logits.topk(min(_LIKELIEST, program.vocab_size))]
    started = time.perf_counter()
    while len(found) < tokens and time.perf_counter() - started < _WRITING_SECONDS:
        logits = program.step(state, found[-1].indices[:, :1], one, logits="last")[:, 0]
        state.commit(one)
        found.append(logits.topk(min(_LIKELIEST, program.vocab_size)))
    ids = torch.stack([best.indices for best in found], dim=1).cpu()
    scores = torch.stack([best.values for best in found], dim=1).cpu()
    written: list[list[int]] = ids[:, :, 0].tolist()
    return written, [Likeliest(*row, program.vocab_size) for row in zip(ids, scores, strict=True)]


def measured_seconds(shape: StepShape, plain: float, verify: float, batch: int) -> float:
    """Seconds per token of a row, from measured steps with and without drafts.

    Args:
        plain, verify: seconds of a step of one token and of ``shape.tokens``.
        batch: rows; the step is the longer one as soon as one of them drafts.
    """
    drafting = 1 - (1 - shape.share) ** batch
    return (drafting * (verify + shape.draft_seconds) + (1 - drafting) * plain) / shape.tokens_per_step


class Tried(NamedTuple):
    """Drafts in a program that really generates.

    Attributes:
        saved: seconds per token, the host's work included.
        stats: counters of the drafted call, as ``OptimizedModel.stats()`` gives them.
    """

    saved: float
    stats: dict[str, Any]


def try_drafts(
    model: PreTrainedModel,
    program: Program,
    drafts: Speculate,
    prompts: Sequence[Sequence[int]],
    batch: int,
    tokens: int = 64,
) -> Tried:
    """Generate with and without drafts.

    Both sides generate from the same prompts, greedily and without end tokens; what they share cancels. No
    prompt is drafted for twice: some drafters remember what they wrote.

    Args:
        prompts: token ids; up to three batches of different ones are taken, the last 1,024 tokens of each.
        tokens: to write after each.
    """
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = None
    sides = [
        OptimizedModel(program, config=model.config, generation_config=config, speculation=speculation)
        for speculation in (None, make_speculation(drafts.options()))
    ]
    batches = _batches(prompts, batch, tokens, program.max_positions)

    def seconds(side: int, ids: torch.Tensor, new: int) -> float:
        started = time.perf_counter()
        ids = ids.to(program.device)
        mask = torch.ones_like(ids)
        sides[side].generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return time.perf_counter() - started

    seconds(0, *batches[0])  # the first call of a program pays for what later ones find warm
    took = [0.0, 0.0]
    for index, (ids, new) in enumerate(batches):
        for side in (0, 1) if index % 2 else (1, 0):  # neither always comes first
            took[side] += seconds(side, ids, new)
    return Tried((took[0] - took[1]) / sum(new for _, new in batches), sides[1].stats())


def _batches(
    prompts: Sequence[Sequence[int]], batch: int, tokens: int, positions: int | None
) -> list[tuple[torch.Tensor, int]]:
    """Ids ``[batch, L]`` of different prompts, and how many tokens there is room for behind them."""
    found = []
    for start in range(0, min(len(prompts), _CONFIRM_BATCHES * batch), batch):
        rows = [list(prompts[(start + i) % len(prompts)])[-_CONFIRM_PROMPT:] for i in range(batch)]
        width, new = min(map(len, rows)), tokens
        if positions is not None:  # room for what is generated, at the expense of a long prompt
            width = max(1, min(width, positions - new))
            new = min(new, positions - width)
        found.append((torch.tensor([row[-width:] for row in rows]), new))
    return found
