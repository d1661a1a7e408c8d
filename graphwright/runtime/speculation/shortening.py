"""A long prompt made short for a drafter: its beginning, its end, and what the end is about.

What is kept is whole chunks of the prompt in their order. The newest tokens and the first ones stay; chunks
between them are ranked by what they share with the newest ones. Drafts then cost little however long the
prompt is, and the target, which reads all of it, decides.

Sources: Chen et al. 2025, "Long-Context Inference with Retrieval-Augmented Speculative Decoding" (RAPID: a
drafter that reads retrieved chunks); Yang et al. 2025, "SpecExtend" (a drafter's cache of retrieved chunks);
Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond" (the ranking).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

#: Tokens of a chunk.
CHUNK = 64
# Of what is kept: the share of the newest tokens, and of the first ones.
_NEWEST, _FIRST = 0.5, 1 / 16
# BM25's saturation of repeats; chunks are equally long, so there is no weight for lengths.
_SATURATION = 1.2


def shortened(prompt: Sequence[int], context: int) -> list[int]:
    """At most ``context`` tokens of a prompt, in order; all of them if they are no more."""
    if len(prompt) <= context:
        return list(prompt)
    newest = max(1, int(context * _NEWEST))
    first = int(context * _FIRST)
    end = len(prompt) - newest
    starts = range(first, end, CHUNK)
    chunks = [prompt[start : min(start + CHUNK, end)] for start in starts]
    room, kept = context - newest - first, []
    for index in relevance(chunks, prompt[end:]):
        if len(chunks[index]) <= room:
            kept.append(index)
            room -= len(chunks[index])
    middle = [token for index in sorted(kept) for token in chunks[index]]
    return [*prompt[:first], *middle, *prompt[end:]]


def relevance(chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[int]:
    """Chunks by what they share with ``query``, most first; of equals the later one.

    Single tokens and pairs of tokens count, rare ones more.
    """
    counted = [_terms(chunk) for chunk in chunks]
    spread = Counter(term for terms in counted for term in terms)
    wanted = {
        term: math.log(1 + (len(chunks) - spread[term] + 0.5) / (spread[term] + 0.5))
        for term in _terms(query)
        if term in spread
    }
    scores = [
        sum(
            wanted[term] * n * (_SATURATION + 1) / (n + _SATURATION)
            for term, n in terms.items()
            if term in wanted
        )
        for terms in counted
    ]
    return sorted(range(len(chunks)), key=lambda index: (-scores[index], -index))


def _terms(tokens: Sequence[int]) -> Counter[tuple[int, ...]]:
    return Counter([*((token,) for token in tokens), *pairwise(tokens)])
