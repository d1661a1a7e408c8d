"""The retrieval part of ``sparse_quality.py``: greedy answers of programs that go on from a dense prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sparse_programs import KV, Bench, Dense, Rewritten, adopt, run_steps
from sparse_tasks import Sample, Task, make
from sparse_text import evictors, selectors, sparse_passes

from graphwright.optimizer.quality.sentences import ending_tokens

#: Tokens of an answer.
_NEW = 6
#: Where the question is: run in steps over the selected pages (or over what eviction left), or a part of
#: the prompt, which runs densely and is evicted after the question has been seen.
MODES = ("after the prompt", "in the prompt")
_MODES_OF = {"dense": MODES[1:], "selected": MODES[:1], "evicted": MODES}
Cases = dict[tuple[str, str, float], list[str]]


def cases(selected: Sequence[float], evicted: Sequence[float], only: Sequence[str]) -> Cases:
    """Passes by kind, method and share."""
    found: Cases = {("dense", "dense", 1.0): [KV]}
    for name in selectors(only):
        for keep in selected:
            found["selected", name, keep] = sparse_passes(name, keep)
    for name in evictors(only):
        for keep in evicted:
            found["evicted", name, keep] = []  # its budget is a number of tokens, which the task gives
    return found


def retrieval_rows(
    bench: Bench, tasks: Sequence[Task], samples: int, batch: int, wanted: Cases, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Accuracy of every case on every task, task by task."""
    prose = bench.ids(bench.text[:400_000])
    ends = ending_tokens(bench.tokenizer, bench.model.config.vocab_size).tolist()
    for task in tasks:
        right: dict[tuple[str, str, float, str], int] = {}
        for start in range(0, samples, batch):
            seeds = range(start, min(start + batch, samples))
            some = [make(task, seed, bench.ids, prose, ends) for seed in seeds]
            dense = bench.run_dense([s.context + s.question for s in some], task.length)
            for (kind, name, keep), passes in wanted.items():
                if kind == "evicted":
                    budget = round(keep * task.length)
                    passes = [KV, f"evict_tokens{{method={name},tokens={budget},when=prompt}}"]
                made = bench.rewrite(passes)
                for mode in _MODES_OF[kind]:
                    key = (kind, name, keep, mode)
                    right[key] = right.get(key, 0) + _right(bench, made, dense, some, mode)
            so_far = right["dense", "dense", 1.0, MODES[1]]
            say(f"{task}: {so_far} of {seeds.stop} right, densely")
        for (kind, name, keep, mode), count in right.items():
            yield {
                "task": str(task), "kind": kind, "name": name, "keep": keep, "question": mode,
                "right": count, "samples": samples,
            }  # fmt: skip


def _right(bench: Bench, made: Rewritten, dense: Dense, samples: Sequence[Sample], mode: str) -> int:
    """How many answers hold their number."""
    room, asked = _NEW + 1, dense.tokens[:, dense.context :]
    if mode == MODES[1]:
        state = adopt(made, dense, dense.tokens.shape[1], room)
        logits = dense.logits[:, -1]
    else:
        state = adopt(made, dense, dense.context, asked.shape[1] + room)
        logits = run_steps(made.program, state, asked)[:, -1]
    answer = []
    for _ in range(_NEW):
        token = logits.argmax(-1, keepdim=True)
        answer.append(token)
        logits = run_steps(made.program, state, token)[:, -1]
    texts = bench.tokenizer.batch_decode(torch.cat(answer, dim=1).tolist())
    return sum(s.answer in text for s, text in zip(samples, texts, strict=True))
