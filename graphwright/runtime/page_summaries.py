"""Summaries of a cache's pages, written when the tokens of a page are committed.

A step never writes them, so a rollback never meets them. See :mod:`graphwright.ir.sparse_ops` for what reads
them, and :mod:`graphwright.ir.selectors` for what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx.node import Node

from graphwright.ir.codecs import PageShape
from graphwright.ir.graph import Graph, value
from graphwright.ir.selectors import Buffer, Selector, parse_selector
from graphwright.runtime.transfers import upload

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SummaryLayout:
    """The summary of one store of keys, without its tensors.

    Attributes:
        name: of the store of keys.
        selector: makes the summaries.
        shape: of a page.
        first: tokens before the first page.
        room: tokens that a row may run in a step and still select what steps of one token select.
        refresh: tokens between dense passes; 0 for none.
        keys: the state that newest keys are appended to, token p in slot ``p % slots``.
        roles: state name of every buffer.
        tokens: the state with token ids, for selectors that need them.
        constants: the selector's tables by name.
    """

    name: str
    selector: Selector
    shape: PageShape
    first: int
    room: int
    refresh: int
    keys: str
    roles: Mapping[str, str]
    tokens: str | None = None
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def pace(self) -> tuple[int, int]:
        """Summaries of one pace are written at the same lengths."""
        return self.shape.tokens, self.first

    def closed(self, length: int) -> int:
        """Whole pages of a row of so many committed tokens."""
        return max(length - self.first, 0) // self.shape.tokens

    def write(self, stores: Tensors, done: Sequence[int], lengths: Sequence[int]) -> None:
        """Summarize every page that is whole at these committed lengths.

        Args:
            done: ``[B]`` pages that are summarized.
            lengths: ``[B]`` committed tokens.
        """
        todo = [
            (row, page)
            for row, (start, length) in enumerate(zip(done, lengths, strict=True))
            for page in range(start, self.closed(length))
        ]
        if not todo:
            return
        keys = stores[self.keys]
        rows, pages = upload(list(zip(*todo, strict=True)), keys.device)
        numbers = self.first + pages[:, None] * self.shape.tokens
        numbers = numbers + torch.arange(self.shape.tokens, device=keys.device)
        at = (rows[:, None], numbers % keys.shape[2])
        tokens = None
        if self.tokens is not None:
            history = stores[self.tokens]
            tokens = history[rows[:, None], 0, numbers % history.shape[2], 0]
        made = self.selector.summarize(keys.transpose(1, 2)[at].transpose(1, 2), self.constants, tokens)
        for name, content in made.items():
            stores[self.roles[name]][rows, pages] = content
        self._write_spans(stores, done, lengths)

    def _write_spans(self, stores: Tensors, done: Sequence[int], lengths: Sequence[int]) -> None:
        for span in sorted({b.span for b in self._buffers.values() if b.span > 1}):
            todo = [
                (row, place)
                for row, (start, length) in enumerate(zip(done, lengths, strict=True))
                for place in range(start // span, self.closed(length) // span)
            ]
            if not todo:
                continue
            device = stores[self.keys].device
            rows, places = upload(list(zip(*todo, strict=True)), device)
            members = places[:, None] * span + torch.arange(span, device=device)
            pages = {
                name: stores[self.roles[name]][rows[:, None], members]
                for name, buffer in self._buffers.items()
                if buffer.span == 1
            }
            for name, content in self.selector.summarize_span(pages).items():
                stores[self.roles[name]][rows, places] = content

    @cached_property
    def _buffers(self) -> dict[str, Buffer]:
        # The dtype of keys changes no span.
        return self.selector.layout(self.shape, torch.float32)


def summary_layouts(graph: Graph) -> list[SummaryLayout]:
    """The summaries of a graph, from the placeholders that make them up."""
    parts: dict[str, list[Node]] = {}
    tokens = None
    states = {node.meta["name"]: node for node in graph.placeholders("state")}
    for name, node in states.items():
        role = node.meta.get("store", {}).get("role")
        if role == "summary":
            parts.setdefault(node.meta["store"]["name"], []).append(node)
        elif role == "tokens":
            tokens = name
    return [_layout(graph, states, name, nodes, tokens) for name, nodes in parts.items()]


def _layout(
    graph: Graph, states: Mapping[str, Node], name: str, nodes: Sequence[Node], tokens: str | None
) -> SummaryLayout:
    about = nodes[0].meta["store"]
    selector = parse_selector(about["selector"])
    keys = next(key for key in (f"{name}.tail", name) if key in states)
    fake = value(states[keys])
    shape = PageShape(int(fake.shape[1]), about["page"], int(fake.shape[3]))
    return SummaryLayout(
        name=name,
        selector=selector,
        shape=shape,
        first=about["first"],
        room=about["room"],
        refresh=about["refresh"],
        keys=keys,
        roles={node.meta["store"]["buffer"]: node.meta["name"] for node in nodes},
        tokens=tokens if selector.needs_tokens else None,
        constants={key: graph.parameters[f"{name}.summary.{key}"] for key in selector.constant_names(shape)},
    )


class Summaries:
    """The page summaries of one generation, and how far they go in every row.

    Args:
        layouts: of every store that has summaries.
        batch: rows.
    """

    def __init__(self, layouts: Sequence[SummaryLayout], batch: int) -> None:
        self.layouts = tuple(layouts)
        self._paces = {layout.pace: layout for layout in layouts}
        self._batch = batch
        self.reset()

    def reset(self) -> None:
        """No page is summarized."""
        self._closed = {pace: [0] * self._batch for pace in self._paces}

    def pretend(self, length: int) -> None:
        """Every whole page of rows of ``length`` tokens is summarized."""
        self._closed = {pace: [one.closed(length)] * self._batch for pace, one in self._paces.items()}

    def write(self, stores: Tensors, lengths: Sequence[int]) -> None:
        """Summarize what has become whole at these committed lengths."""
        due = {
            pace
            for pace, one in self._paces.items()
            if any(one.closed(n) > done for n, done in zip(lengths, self._closed[pace], strict=True))
        }
        for layout in self.layouts if due else ():
            if layout.pace in due:
                layout.write(stores, self._closed[layout.pace], lengths)
        for pace in due:
            one, closed = self._paces[pace], self._closed[pace]
            self._closed[pace] = [max(done, one.closed(n)) for n, done in zip(lengths, closed, strict=True)]

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget the pages that are no longer whole at these lengths."""
        for pace, one in self._paces.items():
            closed = self._closed[pace]
            self._closed[pace] = [min(done, one.closed(n)) for n, done in zip(lengths, closed, strict=True)]

    def room(self, default: int) -> int:
        """Tokens that a row may run in a step as if one at a time; ``default`` without summaries."""
        return min([default, *(layout.room for layout in self.layouts)])
