"""``sparsify_attention``: decode steps read the pages of the cache that a selector scores highest.

Each store of keys gets a summary of its pages; a step scores the summaries with its queries, and attention
reads the pages with the highest scores beside the newest tokens and the first ones. What is stored stays
whole, so a page that is not read now may be read by the next token. Prompts run densely.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.ir.page_lists import BEFORE_LISTS
from graphwright.ir.selectors import Selector, parse_selector
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.place_cache import dense_input, new_size, step_inputs
from graphwright.passes.selector_samples import KnowsSentences, selector_samples

#: Tokens of a page where the store is not packed.
_PAGE = 16
#: Tokens that a step may run and still select what steps of one token select.
_ROOM = 32
_MOST = 4096


@register_pass
@dataclass(frozen=True)
class SparsifyAttention(Pass):
    """Read few pages of the cache.

    Options:
        selector: a page summary and a score, ``bounds`` or ``channels(count=16)``.
        keep: pages that a token reads at most, as a share of all so far.
        share: of the estimated attention mass that is enough; 0 reads as much as ``keep`` allows.
        page: tokens of a page; 0 for the codec's pages where the cache is packed, and 16 elsewhere.
        recent: newest tokens that are always read; -1 for what a verification step needs.
        sinks: pages at the start that are always read.
        refresh: tokens between dense passes that rectify the cache; 0 for none.
            Source: ReSA (Sun et al. 2025), section 2.2.
    """

    name: ClassVar[str] = "sparsify_attention"
    summary: ClassVar[str] = "read the pages of the cache that matter to the token, chosen by a selector"
    fidelity: ClassVar[Fidelity] = "lossy"
    needs_context: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset(
        {"quantize_cache", "rebuild_values", "predict_cache", "evict_tokens"}
    )

    selector: str = "bounds"
    keep: float = 0.125
    share: float = 0.0
    page: int = 0
    recent: int = -1
    sinks: int = 1
    refresh: int = 0

    def __post_init__(self) -> None:
        parse_selector(self.selector)
        if not 0 < self.keep <= 1:
            raise PassError(
                f"keep={self.keep} is not a share of the pages", hint="give a number above 0 and at most 1"
            )
        if not 0 <= self.share < 1:
            raise PassError(
                f"share={self.share} is not a share of the attention",
                hint="give a number from 0 (off) to below 1: 0.95",
            )
        if self.share and not self._selector.estimates:
            raise PassError(
                f"share={self.share} needs scores that estimate attention, which {self.selector}'s do not",
                hint="use keep alone, or another selector, for example bounds or mean",
            )
        limits = {"page": (0, _MOST), "recent": (-1, _MOST), "sinks": (0, _MOST), "refresh": (0, _ROOM)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise PassError(
                    f"{name}={getattr(self, name)} is out of range", hint=f"give {least} to {most}"
                )

    @property
    def _selector(self) -> Selector:
        return parse_selector(self.selector)

    @classmethod
    def variants(cls) -> list[Pass]:
        """What the planner tries: of the selectors with kernels, the one that lost less on text."""
        return [cls(selector="mean", keep=keep) for keep in (0.25, 0.125, 0.0625)]

    def find(self, graph: Graph) -> list[Site]:
        samples = selector_samples(graph, self._selector)
        sites = []
        for index, attention in enumerate(graph.calls(*_ATTENTIONS)):
            info = {"graph": graph, "samples": samples}
            sites.append(Site(module_path(attention) or f"attention.{index}", (attention,), info))
        return sites

    def legal(self, site: Site) -> Verdict:
        (attention,) = site.nodes
        graph: Graph = site.info["graph"]
        if op_name(attention) != "cache_attention":
            return Verdict(False, _ATTENTIONS[op_name(attention) or ""])
        window = argument(attention, "window")
        if window:
            return Verdict(False, f"a window of {window} tokens reads little already: left alone")
        if argument(attention, "pages") is not None:
            return Verdict(False, "its pages are selected already")
        stores = [argument(attention, name) for name in ("keys", "values")]
        obstacle = _store_obstacle(stores) or self._paging_obstacle(stores[0])
        if obstacle is not None:
            return Verdict(False, obstacle)
        paging = self._paging(stores[0])
        selector = self._selector
        reason = selector.obstacle(paging.shape)
        if reason is not None:
            return Verdict(False, f"{selector} cannot summarize these pages: {reason}")
        if graph.has_weights and (reason := _missing(selector, graph)) is not None:
            return Verdict(False, reason)
        share = f" or {self.share:.3g} of the attention, if that is less" if self.share else ""
        size = paging.shape.tokens
        words = [f"{selector} chooses 1/{1 / self.keep:.3g} of the pages of {size} tokens{share}"]
        words.append(f"the newest {paging.recent} tokens and {self.sinks} first pages are always read")
        if self.refresh:
            words.append(f"every {self.refresh} tokens are run again densely")
        return Verdict(True, "; ".join(words))

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        (attention,) = site.nodes
        keys, values = (argument(attention, name) for name in ("keys", "values"))
        paging = self._paging(keys)
        context = workload.mean_context
        forced = min(context, paging.recent + (1 + self.sinks) * paging.shape.tokens)
        kept = max(forced, min(context, self.keep * context))
        token = sum(_token_bytes(store) for store in (keys, values))
        summary = self._selector.page_bytes(paging.shape, value(keys).dtype) / paging.shape.tokens
        bytes_saved = (context - kept) * token - max(0.0, context - forced) * summary
        read = Cost(read={CACHE: B * C * 1.0})
        per_byte = predict(read, target, batch=workload.batch, context=context, tokens=1).seconds / context
        memory = workload.batch * workload.capacity * summary
        unread = f"{(context - kept) / context:.0%} of the cache not read"
        if kept >= context:
            unread = f"at a mean context of {context:.0f} tokens everything is read"
        note = f"{unread}; {memory / 2**20:+.1f} MiB of summaries"
        return CostDelta(-per_byte * bytes_saved, memory, note)

    def apply(self, site: Site, graph: Graph) -> None:
        (attention,) = site.nodes
        keys = argument(attention, "keys")
        paging = self._paging(keys)
        inputs = {**step_inputs(graph), "dense": dense_input(graph)}
        step = [inputs[name] for name in ("positions", "lengths", "counts", "dense")]
        summaries, tables = self._summaries(graph, site, keys, paging)
        pages = (paging.shape.tokens, paging.first, paging.recent, paging.settled)
        q, scale = argument(attention, "q"), argument(attention, "scale")
        scores = graph.emit(
            "score_pages", q, summaries, tables, *step, self.selector, paging.shape.groups, *pages, scale,
            before=attention,
        )  # fmt: skip
        choice = graph.emit(
            "choose_pages", scores, *step, *pages, self.sinks, self.keep, self.share, before=attention
        )
        listed = [graph.emit(operator.getitem, choice, i, before=attention) for i in range(2)]
        given = [argument(attention, name) for name in BEFORE_LISTS]
        new = graph.emit(
            "cache_attention", *given, *listed, paging.shape.tokens, paging.first, before=attention
        )
        graph.replace(attention, new)
        graph.fx.erase_node(attention)

    def _summaries(
        self, graph: Graph, site: Site, keys: Node, paging: _Paging
    ) -> tuple[list[Node], list[Node]]:
        """The states that hold the summaries of a store's pages, and the selector's tables."""
        selector, shape, name = self._selector, paging.shape, paging.name
        about: dict[str, Any] = {
            "role": "summary", "name": name, "selector": self.selector, "page": shape.tokens,
            "first": paging.first, "room": paging.recent - paging.settled - max(0, self.refresh - 1),
            "refresh": self.refresh,
        }  # fmt: skip
        fake = value(keys)
        states = []
        for label, buffer in selector.layout(shape, fake.dtype).items():
            entries = _shared_entries(graph, {**about, "span": buffer.span})
            with graph.fake_mode:
                size = (fake.shape[0], entries, *buffer.size)
                content = torch.empty(size, dtype=buffer.dtype, device=fake.device)
            node = graph.add_placeholder("state", f"{name}.summary.{label}", content)
            node.meta.update(window=0, store={**about, "buffer": label, "span": buffer.span})
            states.append(node)
        if selector.needs_tokens:
            _token_history(graph)
        heads = int(value(argument(site.nodes[0], "q")).shape[1])
        constants = selector.constants(shape, heads, site.info["samples"](site.nodes[0]))
        tables = [
            graph.add_parameter(f"{name}.summary.{key}", table.to(fake.device))
            for key, table in constants.items()
        ]
        return states, tables

    def _paging(self, keys: Node) -> _Paging:
        """How a store's tokens lie in pages."""
        groups, features = int(value(keys).shape[1]), int(value(keys).shape[3])
        if op_name(keys) != "cache_read":
            recent = self.recent if self.recent >= 0 else _ROOM + self.refresh
            name = str(keys.meta["name"])
            return _Paging(name, PageShape(groups, self.page or _PAGE, features), 0, recent, 0)
        about = argument(keys, "store")[0].meta["store"]
        settled = about["recent"]
        recent = self.recent if self.recent >= 0 else settled + _ROOM + self.refresh
        shape = PageShape(groups, about["page"], features)
        return _Paging(about["name"], shape, about["first"], recent, settled)

    def _paging_obstacle(self, keys: Node) -> str | None:
        """Why the options do not go with how keys are stored."""
        paging = self._paging(keys)
        least = paging.settled + self.refresh + 1
        if paging.recent < least:
            return f"recent={paging.recent} is too little here: the newest {least} have to be read"
        if op_name(keys) != "cache_read":
            return None
        if self.page and self.page != paging.shape.tokens:
            return f"the cache is packed in pages of {paging.shape.tokens} tokens: leave page={self.page} out"
        if self.refresh > paging.settled + 1:
            return (
                f"a dense pass over the last {self.refresh} tokens would change packed ones: "
                f"quantize_cache{{recent={self.refresh - 1}}} keeps them as they are"
            )
        return None


@dataclass(frozen=True)
class _Paging:
    """How the keys of a site lie in pages; see :mod:`graphwright.ir.sparse_ops`."""

    name: str
    shape: PageShape
    first: int
    recent: int
    settled: int


#: Attentions over a cache, with why the pages of the others are not selected.
_ATTENTIONS = {
    "cache_attention": "",
    "prefix_attention": "the rows share a prefix, which is read for all of them together",
    "prefill_attention": "its prompts are masked already: select pages first",
}


def _missing(selector: Selector, graph: Graph) -> str | None:
    """What a selector's tables are made of and is not there; None if nothing is missing."""
    if selector.needs_samples and graph.samples is None:
        return f"{selector} is calibrated, and there is no text to calibrate on"
    knows = isinstance(graph.samples, KnowsSentences) and graph.samples.ends() is not None
    if selector.needs_tokens and not knows:
        return f"{selector} needs to know which tokens end a sentence, and the model has no tokenizer"
    return None


def _store_obstacle(stores: list[Node]) -> str | None:
    """Why pages of these keys and values cannot be read one by one; None if they can."""
    packed = [op_name(node) == "cache_read" for node in stores]
    plain = [node.op == "placeholder" and "store" not in node.meta for node in stores]
    if all(plain):
        return None
    if not all(a or b for a, b in zip(packed, plain, strict=True)):
        return "keys or values are computed from what is stored, so their pages cannot be read one by one"
    if not all(packed):
        return "keys are packed and values are not, or the other way round"
    pages = [argument(read, "store")[0].meta["store"] for read in stores]
    if any(pages[0][key] != pages[1][key] for key in ("page", "first", "recent")):
        return "keys and values are packed in different pages"
    return None


def _token_bytes(store: Node) -> float:
    """Bytes of one token of one row, packed or not."""
    fake = value(store)
    values = int(fake.shape[1]) * int(fake.shape[3])
    if op_name(store) != "cache_read":
        return float(values * fake.dtype.itemsize)
    shape = PageShape(int(fake.shape[1]), argument(store, "page"), int(fake.shape[3]))
    return parse_codec(argument(store, "codec")).page_bytes(shape) / shape.tokens


def _shared_entries(graph: Graph, about: dict[str, Any]) -> Any:
    """The symbol for the entries of a summary: summaries that are laid out alike share it."""
    keys = ("role", "page", "first", "span")
    for node in graph.placeholders("state"):
        if all(node.meta.get("store", {}).get(key) == about[key] for key in keys):
            return value(node).shape[1]
    return new_size(graph, 5 + about["span"])


def _token_history(graph: Graph) -> None:
    """A store of every row's token ids, ``[B, 1, S, 1]``, one for the graph."""
    if any(node.meta.get("store", {}).get("role") == "tokens" for node in graph.placeholders("state")):
        return
    ids, inputs = graph.placeholder("input_ids"), step_inputs(graph)
    fake, slots = value(ids), new_size(graph, 43)
    with graph.fake_mode:
        content = fake.new_empty((fake.shape[0], 1, slots, 1))
    history = graph.add_placeholder("state", "tokens", content)
    history.meta.update(window=0, store={"role": "tokens"})
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for dim in (1, 3):
        ids = graph.emit(torch.ops.aten.unsqueeze.default, ids, dim, before=first)
    graph.emit("cache_append", history, ids, inputs["lengths"], inputs["counts"], before=first)
