"""The drift part of ``sparse_quality.py``: what errors of new tokens add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sparse_programs import KV, STEP, Bench, Dense, Rewritten, adopt, run_steps
from sparse_text import distance, mean_and_error

from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.storage import State

_BUCKET = 64


def drift(
    bench: Bench, texts: Sequence[Sequence[int]], prompt: int, new: int, options: Sequence[str]
) -> dict[str, Any]:
    """KL against the dense program on the same tokens, by 64 tokens after a prompt.

    Along the texts, all programs meet the same tokens, and two things are told apart: what each step loses,
    and what the cache has lost, as 16 tokens see it that read all of it densely. Then
    once more along what each program generates greedily, which soon repeats itself.
    """
    found: list[dict[str, Any]] = []
    dense = bench.run_dense([text[: prompt + new] for text in texts], prompt)
    for text in options:
        steps, left = _along(_sparse(bench, text), dense, new)
        found.append({"along": "the text", "options": text, "buckets": steps, "left": left})
    prompts = dense.tokens[:, :prompt].contiguous()
    for text in options:
        tokens, logits = _generate(bench, text, prompts, new)
        exact = bench.run_dense(tokens[:, :-1].tolist(), prompt)
        kl, _ = distance(exact.logits, logits)
        fresh = _distinct(tokens[:, prompt:].tolist())
        found.append({"along": "its own tokens", "options": text, "buckets": _buckets(kl), "distinct": fresh})
    return {"prompt": prompt, "new": new, "prompts": len(texts), "rows": found}


def _sparse(bench: Bench, options: str) -> Rewritten:
    return bench.rewrite([KV, f"sparsify_attention{{{options}}}"])


def _buckets(kl: torch.Tensor) -> list[dict[str, float]]:
    return [mean_and_error(part) for part in kl.split(_BUCKET, dim=1)]


def _along(made: Rewritten, dense: Dense, new: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What steps lose and what the cache has lost, along the text. Short steps see what single ones see."""
    program, every = made.program, made.program.refresh
    tail = dense.tokens[:, dense.context :]
    state, logits, left = adopt(made, dense, dense.context, tail.shape[1]), [], []
    for end in range(STEP, new + 1, STEP):
        part = tail[:, end - STEP : end]
        left.append(_densely(made, state, part))
        logits.append(run_steps(program, state, part))
        if every and end % every == 0:  # as the runtime does: the last token's step runs them all densely
            state.rewind([every] * state.batch)
            logits[-1][:, -1] = _densely(made, state, tail[:, end - every : end])[:, -1]
            state.commit(torch.full((state.batch,), every))
    lost, kept = (_buckets(distance(dense.logits[:, :new], torch.cat(x, dim=1))[0]) for x in (logits, left))
    return lost, kept


def _densely(made: Rewritten, state: State, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a step whose tokens read everything; it is not committed."""
    counts = torch.full((tokens.shape[0],), tokens.shape[1])
    return made.program.step(state, tokens.contiguous(), counts, dense=counts)


def _generate(
    bench: Bench, options: str, prompts: torch.Tensor, new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens ``[B, L + new]``, and the logits ``[B, new - 1, V]`` of new tokens but for the last."""
    program, stock = _sparse(bench, options).program, bench.model
    fast = OptimizedModel(program, config=stock.config, generation_config=stock.generation_config)
    out = fast.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    # The first logits are the prompt's, which ran densely.
    return out.sequences, torch.stack(out.logits[1:], dim=1)


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    """The share of runs of 4 tokens that are not repeats: small where greedy text loops."""
    shares = []
    for row in rows:
        runs = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        shares.append(len(set(runs)) / len(runs))
    return sum(shares) / len(shares)
