"""What exists, with one line each."""

from __future__ import annotations

from graphwright.cost_model.target import targets as _targets
from graphwright.ir.codecs import registered_parts
from graphwright.ir.codecs.methods import methods
from graphwright.ir.evictors import registered_evictors as _evictors
from graphwright.ir.selectors import registered_selectors as _selectors
from graphwright.passes.base import describe_passes
from graphwright.runtime.speculation import describe_drafters


def targets() -> dict[str, str]:
    """Every machine that can be optimized for."""
    return _targets()


def passes() -> dict[str, str]:
    """Every rewrite, with those of other packages."""
    return describe_passes()


def drafters() -> dict[str, str]:
    """Every source of drafts for speculative decoding."""
    return describe_drafters()


def codecs() -> dict[str, str]:
    """How caches can be stored: published methods by name, and the parts of which chains are made."""
    named = {name: f"{m.summary} ({m.source})" for name, m in methods().items()}
    parts = {name: f"part: {part.summary}" for name, part in sorted(registered_parts().items())}
    return {"none": "full precision, as the model computes it", **named, **parts}


def selectors() -> dict[str, str]:
    """Which cached tokens attention reads, and which ones a cache keeps (named by their pass)."""
    known = sorted(_selectors().items())
    chosen = {name: f"{selector.summary} ({selector.source})" for name, selector in known}
    evicting = {
        f"evict_tokens{{method={name}}}": f"eviction: {evictor.summary}"
        + (f" ({evictor.source})" if evictor.source else "")
        for name, evictor in sorted(_evictors().items())
    }
    return {"all": "every token in the cache (or in the layer's window)", **evicting, **chosen}
