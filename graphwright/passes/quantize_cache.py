"""``quantize_cache``: pack what the cache stores with a codec.

Every store of a site becomes pages that the codec packs, with the newest tokens (and, if asked for, the
first ones) as they were computed. What reads the store reads ``cache_read`` instead; lowering runs the
readers tile by tile, so that no step holds a decompressed cache. Works on whatever ``place_cache``
chose to store: keys and values, the layer input (XQuant), a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.codecs import Codec, PageShape, parse_codec, registered_parts
from graphwright.ir.codecs.methods import Method, find_method, methods
from graphwright.ir.errors import CodecError, PassError
from graphwright.ir.graph import Graph, argument, module_path, stores_read, value
from graphwright.ir.packed_ops import tail_slots
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.pack_store import Packing, pack_store

_STEP_TOKENS = 64  # of a verification step at most; runtime/storage.py
_MOST_TOKENS = 4096  # of a page, and of what stays unpacked
ONLY = ("all", "keys", "values")


@register_pass
@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Pack the cache.

    Options:
        codec: a published method (``turboquant``) or a chain of parts
            (``hadamard >> token_scale >> uniform(bits=4)``).
        bits: of a method; 0 for its own default.
        values: another chain for values; empty for the method's, or the same chain as for keys.
        only: ``keys`` or ``values`` leave the other as it is.
        page: tokens of a page, which are also the group of per-channel scales; 0 for the method's.
        first: tokens at the start that stay as they are (attention sinks); -1 for the method's.
        recent: newest tokens that stay beside the page that is being filled; -1 for the method's.
    """

    name: ClassVar[str] = "quantize_cache"
    summary: ClassVar[str] = "pack the cache: fewer bits for each number it stores"
    fidelity: ClassVar[Fidelity] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset({"slide_attention"})

    codec: str = "combined"
    bits: int = 0
    values: str = ""
    only: str = "all"
    page: int = 0
    first: int = -1
    recent: int = -1

    def __post_init__(self) -> None:
        if self.only not in ONLY:
            raise PassError(f"only={self.only!r} is not a store", hint=f"choose one of {', '.join(ONLY)}")
        for name, least, usual in (("page", 0, "64"), ("first", -1, "4"), ("recent", -1, "128")):
            tokens = getattr(self, name)
            if not least <= tokens <= _MOST_TOKENS:
                raise PassError(f"{name}={tokens} is not a number of tokens", hint=f"{usual} is usual")
        self.recipe()

    @classmethod
    def variants(cls) -> list[Pass]:
        """What the planner tries: from nearly lossless to small."""
        return [cls(codec=codec, bits=bits) for codec, bits in PLANNED]

    def recipe(self) -> Recipe:
        """The options resolved.

        Raises:
            CodecError: an unknown method, a chain that does not parse, bits that the method does not have.
        """
        if self.codec in methods():
            found = find_method(self.codec)
            keys, values = found.codecs(self.bits or None)
        else:
            if self.bits:
                raise CodecError(
                    f"bits={self.bits} goes with a method, not with the chain {self.codec!r}",
                    where="quantize_cache",
                    hint="write the bits into the chain: uniform(bits=4)",
                )
            if not any(sign in self.codec for sign in (">>", "(")) and self.codec not in registered_parts():
                find_method(self.codec)  # raises, with the nearest names
            found, keys, values = None, self.codec, self.values or self.codec
        return Recipe(
            parse_codec(keys),
            parse_codec(self.values or values),
            self.page or (found.page if found else 64),
            self.first if self.first >= 0 else (found.first if found else 0),
            self.recent if self.recent >= 0 else (found.recent if found else 0),
            found,
            (self.bits or found.default_bits) if found else 0,
        )

    def find(self, graph: Graph) -> list[Site]:
        taken: set[Node] = set()
        recipe = self.recipe()
        calibrated = recipe.keys.needs_samples or recipe.values.needs_samples
        samples = graph.sampled() if calibrated else None
        sites = []
        for index, attention in enumerate(graph.calls("cache_attention")):
            keys, values = (stores_read([argument(attention, name)]) for name in ("keys", "values"))
            stores = [n for n in dict.fromkeys([*keys, *values]) if "store" not in n.meta and n not in taken]
            taken.update(stores)
            roles = {n: "keys" if n in keys else "values" for n in stores}
            if self.only != "all":
                stores = [n for n in stores if roles[n] == self.only]
            if stores:
                name = module_path(attention) or f"attention.{index}"
                info = {"graph": graph, "roles": roles, "stores": stores, "samples": samples}
                sites.append(Site(name, (attention, *stores), info))
        return sites

    def legal(self, site: Site) -> Verdict:
        graph: Graph = site.info["graph"]
        if argument(site.nodes[0], "pages") is not None:
            return Verdict(False, "its pages are selected already: pack the cache first")
        recipe = self.recipe()
        words = []
        for store in site.info["stores"]:
            codec, shape = recipe.codec(site, store), recipe.page_shape(store)
            label = store.meta["name"].removeprefix(f"{site.name}.")
            window = store.meta["window"]
            if window and window <= recipe.tail:
                return Verdict(
                    False,
                    f"the window of {window} tokens is no longer than the unpacked tail of {recipe.tail}",
                )
            if not value(store).dtype.is_floating_point:
                return Verdict(False, f"{label} holds {value(store).dtype}, which no codec packs")
            reason = codec.obstacle(shape)
            if reason is not None:
                return Verdict(False, f"{label} stays as it is: {reason}")
            if codec.needs_samples and graph.samples is None and graph.has_weights:
                return Verdict(False, f"{label}: {codec} is calibrated, and there is no text to calibrate on")
            words.append(f"{label} in {codec.bits_per_value(shape):.3g} bits by {codec}")
        return Verdict(True, "; ".join([*words, *recipe.notes(site.info["stores"])]))

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        seconds = memory = 0.0
        recipe = self.recipe()
        for store in site.info["stores"]:
            shape = recipe.page_shape(store)
            before = value(store).element_size() * shape.groups * shape.features
            after = recipe.codec(site, store).page_bytes(shape) / shape.tokens
            window = store.meta["window"]
            read = Cost(read={CACHE: B * (C if not window else min(workload.capacity, window)) * 1.0})
            per_byte = predict(
                read, target, batch=workload.batch, context=workload.mean_context, tokens=1
            ).seconds
            seconds += per_byte * (after - before)
            held = min(workload.capacity, window) if window else workload.capacity
            memory += workload.batch * (held * (after - before) + recipe.tail * before)
        return CostDelta(seconds, memory, f"{memory / 2**20:+.1f} MiB of cache")

    def apply(self, site: Site, graph: Graph) -> None:
        recipe = self.recipe()
        for store in site.info["stores"]:
            codec, shape = recipe.codec(site, store), recipe.page_shape(store)
            pages = _sample_pages(site.info["samples"](store), shape) if codec.needs_samples else None
            constants = codec.constants(shape, pages)
            pack_store(graph, store, Packing(codec, shape, recipe.first, recipe.recent, constants))


@dataclass(frozen=True)
class Recipe:
    """What ``quantize_cache`` does to a store.

    Attributes:
        keys, values: codecs; whatever is not values is packed as keys.
        page, first, recent: tokens.
        method: that they come from, if one, and its bits.
    """

    keys: Codec
    values: Codec
    page: int
    first: int
    recent: int
    method: Method | None
    bits: int = 0

    @property
    def tail(self) -> int:
        """Slots of the full-precision tail."""
        return tail_slots(self.page, self.first, self.recent, _STEP_TOKENS)

    def codec(self, site: Site, store: Node) -> Codec:
        """The codec of one of a site's stores."""
        return self.values if site.info["roles"][store] == "values" else self.keys

    def page_shape(self, store: Node) -> PageShape:
        """The shape of a store's pages."""
        _, groups, _, features = value(store).shape
        return PageShape(int(groups), self.page, int(features))

    def notes(self, stores: Sequence[Node]) -> list[str]:
        """What else is kept, and what the method stores in its paper, in words."""
        kept = [f"the first {self.first}"] * bool(self.first)
        kept.append(f"the newest {self.recent} to {self.recent + self.page - 1}")
        notes = [f"{' and '.join(kept)} tokens as they are"]
        place = self.method.place if self.method else "kv"
        if self.method and place in _PLACES and any(s.meta["name"].endswith(".keys") for s in stores):
            notes.append(f"{self.method.name}'s paper stores {_PLACES[place]}")
        if self.method and self.bits in self.method.worse:
            notes.append("it lost more than int of no more bits where it was measured (docs/kv_quality.md)")
        return notes


_PLACES = {
    "minimum": "the layer input (place_cache{cut=minimum})",
    "pre_rotary": "keys before rotary (place_cache{cut=pre_rotary})",
    "keys": "keys alone (rebuild_values)",
}
#: (method, bits) of the planner's options, from nearly lossless to small.
PLANNED = (("int", 8), ("combined", 4), ("combined", 3), ("combined", 2))


def _sample_pages(store: torch.Tensor | None, shape: PageShape) -> torch.Tensor | None:
    """What a store held in calibration, ``[B, G, tokens, D]``, as pages ``[N, G, P, D]``."""
    if store is None:
        return None
    whole = store.shape[2] // shape.tokens * shape.tokens
    pages = store[:, :, :whole].unflatten(2, (-1, shape.tokens))
    return pages.transpose(1, 2).flatten(0, 1).float()
