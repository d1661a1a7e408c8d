"""A stock Llama that decides for each token which layers it uses, one token at a time.

Nothing here knows of steps, batches or caches of ours: every token runs alone through the stock layers, each
with a cache that holds the tokens that used it, or what stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache


class TokenByToken:
    """One row.

    Args:
        model: a stock Llama.
        uses: (layer, generated index of the token) -> whether the token uses the layer.
    """

    def __init__(self, model: Any, uses: Callable[[int, int], bool]) -> None:
        self.model, self.uses = model, uses
        self.cache = DynamicCache(config=model.config)
        self.position = 0

    @torch.no_grad()
    def feed(self, token: int, index: int) -> torch.Tensor:
        """The logits ``[V]`` after a token."""
        hidden = self.model.model.embed_tokens(torch.tensor([[token]]))
        for number in range(len(self.model.model.layers)):
            if self.uses(number, index):
                hidden = self.layer(number, hidden)
        self.position += 1
        return self.read_out(hidden)

    def layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """One stock layer over the token, which joins the layer's cache."""
        angles = self.model.model.rotary_emb(hidden, torch.tensor([[self.position]]))
        return self.model.model.layers[number](
            hidden, attention_mask=None, past_key_values=self.cache, position_embeddings=angles
        )

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[V]`` of a stream ``[1, 1, H]``."""
        return self.model.lm_head(self.model.model.norm(hidden))[0, 0]


def generated(row: TokenByToken, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens; the last token of the prompt chooses generated token 0."""
    for place, token in enumerate(prompt):
        logits = row.feed(token, place + 1 - len(prompt))
    tokens = [int(logits.argmax())]
    while len(tokens) < new:
        tokens.append(int(row.feed(tokens[-1], len(tokens)).argmax()))
    return tokens


class Exiting(TokenByToken):
    """One row whose generated tokens may exit behind a layer.

    Args:
        layer: the last one that every token uses.
        threshold: of the largest probability.

    Attributes:
        exited: of each generated token that was fed, whether it exited.
    """

    def __init__(self, model: Any, layer: int, threshold: float) -> None:
        super().__init__(model, lambda number, index: True)
        self.last, self.threshold = layer, threshold
        self.exited: list[bool] = []

    @torch.no_grad()
    def feed(self, token: int, index: int) -> torch.Tensor:
        hidden = self.model.model.embed_tokens(torch.tensor([[token]]))
        layers = range(len(self.model.model.layers))
        for number in layers[: self.last + 1]:
            hidden = self.layer(number, hidden)
        logits = self.read_out(hidden)
        leaves = index > 0 and bool(logits.softmax(-1).max() >= self.threshold)
        if index > 0:
            self.exited.append(leaves)
        for number in layers[self.last + 1 :]:
            output = self.layer(number, hidden)  # its keys and values are those of the stream that left
            hidden = hidden if leaves else output
        self.position += 1
        return self.read_out(hidden)
