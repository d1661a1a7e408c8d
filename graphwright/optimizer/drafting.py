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
from graphwright.runtime.speculation import Speculation, drafters, make_speculation
from graphwright.runtime.speculation.acceptance import measure_drafts
from graphwright.runtime.speculation.drafter import drafter_class

#: Tokens that the program writes after each prompt, to see what drafts would have been accepted.
CONTINUATION = 64
_PROMPTS, _PROMPT_TOKENS = 4, 2048
_CONFIRM_PROMPT = 1024

Text = tuple[list[int], list[int]]


def measured_drafts(texts: Sequence[Text]) -> tuple[Speculate, ...]:
    """Every drafter that needs no logits, at every length, with what it gives on the texts.

    Args:
        texts: prompts and what followed them.
    """
    found: list[Speculate] = []
    if not any(follow for _, follow in texts):
        return ()
    for name in drafters():
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
    """What the program itself writes after each prompt, greedily.

    Args:
        prompts: token ids; the first four, their last 2,048 tokens.
        tokens: to write after each.
    """
    written = []
    for prompt in [list(p)[-_PROMPT_TOKENS:] for p in prompts[:_PROMPTS] if len(p)]:
        room = tokens if program.max_positions is None else min(tokens, program.max_positions - len(prompt))
        if room > 0:
            written.append((prompt, _greedy(program, prompt, room)))
    return written


def _greedy(program: Program, prompt: list[int], tokens: int) -> list[int]:
    state = program.allocate(1, len(prompt) + tokens)
    one = torch.ones(1, dtype=torch.int64, device=program.device)
    ids = torch.tensor([prompt], device=program.device)
    logits = program.prefill(state, ids, one * len(prompt))
    found: list[int] = []
    for index in range(tokens):
        chosen = logits.argmax(-1)
        found.append(int(chosen))
        if index + 1 < tokens:
            logits = program.step(state, chosen[:, None], one, logits="last")[:, 0]
            state.commit(one)
    return found


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
    width, tokens = min(map(len, rows)), CONTINUATION
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
    return (seconds(None) - seconds(chosen)) / tokens
