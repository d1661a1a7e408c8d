"""Which drafts pay: their acceptance measured on text, and the passes that say so."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from graphwright.passes.base import StepShape
from graphwright.passes.speculate import LENGTHS, Speculate
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation, describe_drafters, make_speculation
from graphwright.runtime.speculation.acceptance import measure_drafts
from graphwright.runtime.speculation.drafter import drafter_class

#: Tokens that the program writes after each prompt at most, to see what drafts would have been accepted.
CONTINUATION = 384
# Writing stops after this long: a large model's text is judged by its beginning.
_WRITING_SECONDS = 10.0
_PROMPTS, _PROMPT_TOKENS = 4, 2048
_CONFIRM_PROMPT, _CONFIRM_TOKENS = 1024, 64

Text = tuple[list[int], list[int]]


def measured_drafts(texts: Sequence[Text]) -> tuple[Speculate, ...]:
    """Every drafter that needs no logits, at every length, with what it gives on the texts.

    Args:
        texts: prompts and what followed them.
    """
    found: list[Speculate] = []
    if not any(follow for _, follow in texts):
        return ()
    for name in describe_drafters():
        if drafter_class(name).wants_logits:
            continue
        for tokens in LENGTHS:
            rates = measure_drafts(name, texts, tokens)
            found.append(
                Speculate(
                    drafter=name,
                    tokens=tokens,
                    acceptance=round(rates.acceptance, 3),
                    hit_rate=round(rates.hit_rate, 3),
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
    return list(zip(rows, _greedy(program, rows, longest, room), strict=True))


def _greedy(program: Program, rows: list[list[int]], longest: int, tokens: int) -> list[list[int]]:
    """At most ``tokens`` more of each row."""
    padded = torch.zeros((len(rows), longest), dtype=torch.int64, device=program.device)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    state = program.allocate(len(rows), longest + tokens)
    counts = torch.tensor([len(row) for row in rows], device=program.device)
    one = torch.ones_like(counts)
    chosen = program.prefill(state, padded, counts).argmax(-1)
    found = [chosen]
    started = time.perf_counter()
    while len(found) < tokens and time.perf_counter() - started < _WRITING_SECONDS:
        logits = program.step(state, chosen[:, None], one, logits="last")[:, 0]
        state.commit(one)
        chosen = logits.argmax(-1)
        found.append(chosen)
    written: list[list[int]] = torch.stack(found, dim=1).tolist()
    return written


def measured_seconds(shape: StepShape, plain: float, verify: float, batch: int) -> float:
    """Seconds per token of a row, from measured steps with and without drafts.

    Args:
        plain, verify: seconds of a step of one token and of ``shape.tokens``.
        batch: rows; the step is the longer one as soon as one of them drafts.
    """
    drafting = 1 - (1 - shape.share) ** batch
    return (drafting * (verify + shape.draft_seconds) + (1 - drafting) * plain) / shape.tokens_per_step


def saved_seconds(
    model: PreTrainedModel, program: Program, drafts: Speculate, prompts: Sequence[Sequence[int]], batch: int
) -> float:
    """Seconds per token that drafts save when the program really generates: the host's work is in it.

    Both sides generate from the same prompts, greedily and without end tokens; what they share cancels.
    """
    rows = [list(prompts[index % len(prompts)])[-_CONFIRM_PROMPT:] for index in range(batch)]
    width, tokens = min(map(len, rows)), _CONFIRM_TOKENS
    if program.max_positions is not None:  # room for what is generated, at the expense of a long prompt
        width = max(1, min(width, program.max_positions - tokens))
        tokens = min(tokens, program.max_positions - width)
    ids = torch.tensor([row[-width:] for row in rows], device=program.device)

    def seconds(speculation: Speculation | None) -> float:
        config = copy.deepcopy(model.generation_config)
        config.eos_token_id = None
        fast = OptimizedModel(program, config=model.config, generation_config=config, speculation=speculation)
        started = time.perf_counter()
        fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started

    chosen = make_speculation(drafts.options())
    seconds(None)  # the first call of a program pays for what later ones find warm
    plain, drafted = seconds(None), seconds(chosen)
    drafted, plain = drafted + seconds(chosen), plain + seconds(None)  # neither side always comes first
    return (plain - drafted) / (2 * tokens)
