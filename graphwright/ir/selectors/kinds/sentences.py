"""``sentences``: a mean key for each sentence that a page has a part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors.products import key_products
from graphwright.ir.selectors.selector import Buffer, Samples, Selector, Tensors, register_selector


@register_selector
@dataclass(frozen=True)
class Sentences(Selector):
    """Mean keys of the pieces of sentences in a page, each as likely as its tokens are many.

    A sentence ends with a token of the table ``ends``. Pages stay as long as they are: a page keeps up to
    ``parts`` pieces, the last of which takes in all later ones. The score is the logarithm of the sum over
    pieces of ``count * exp(scale * q.mean)``, at least that of the page's mean key by Jensen's inequality.

    The table comes from the tokenizer. Without one it is ``[False]``: tokens beyond the table end nothing,
    every page is one piece, and the selector is ``mean``. Whoever applies it should ask for a tokenizer.

    Args:
        parts: mean keys of a page.

    Source: SentenceKV, "Efficient LLM Inference via Sentence-Level Semantic KV Caching" (Zhu et al. 2025),
    section 3; there, what is read are sentences, here the pages that hold them.
    """

    name: ClassVar[str] = "sentences"
    summary: ClassVar[str] = "mean keys of the sentences in each page"
    source: ClassVar[str] = "SentenceKV, Zhu et al. 2025"
    needs_tokens: ClassVar[bool] = True

    parts: int = 2

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise SelectorError(
                f"sentences keeps parts={self.parts} mean keys of a page", where="sentences", hint="1 or more"
            )

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {
            "means": Buffer((shape.groups, self.parts, shape.features), dtype),
            "counts": Buffer((self.parts,), torch.int16),
        }

    def constants(self, shape: PageShape, heads: int, samples: Samples) -> dict[str, torch.Tensor]:
        """``ends [V]`` bool."""
        return {"ends": torch.zeros(1, dtype=torch.bool) if samples.ends is None else samples.ends}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if tokens is None:
            raise SelectorError(
                "sentences are found by their tokens", where="sentences", hint="pass the pages' token ids"
            )
        ends = constants["ends"]
        ending = ends[tokens.clamp(0, len(ends) - 1)] & (tokens < len(ends))  # [n, P]
        before = ending.long().cumsum(1) - ending.long()  # sentences that ended before a token
        number = torch.arange(self.parts, device=keys.device)
        member = before.clamp(max=self.parts - 1)[:, None, :] == number[:, None]  # [n, parts, P]
        counts = member.sum(-1)
        sums = torch.einsum("nsp,ngpd->ngsd", member.double(), keys.double())
        means = sums / counts.clamp(min=1)[:, None, :, None]
        return {"means": means.to(keys.dtype), "counts": counts.to(torch.int16)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        counts = summary["counts"].double()
        first = counts[..., :1].clamp(min=1)  # every page has one; what was never written stays finite
        share = torch.cat((first, counts[..., 1:]), dim=-1).log()[:, None, None]  # [B, 1, 1, N, parts]
        return (key_products(q, summary["means"]) * scale + share).logsumexp(-1)
