"""Parts of ``sparse_quality.py`` that run on text: selected pages, and evicted caches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sparse_programs import (
    KV,
    STEP,
    Bench,
    Dense,
    Rewritten,
    adopt,
    attention_mass,
    queries_of,
    run_steps,
)

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.evictors import registered_evictors
from graphwright.ir.graph import argument, op_name
from graphwright.ir.selectors import registered_selectors
from graphwright.ir.sparse_ops import candidate_pages, choose_pages, score_pages

Tensors = dict[str, torch.Tensor]
#: Tokens at the end of a text that are measured.
TAIL = 128
_SCORING = ("selector", "groups", "page", "first", "recent", "settled", "scale")
_SELECTORS = ("oracle", "bounds", "mean", "recent", "random")


def in_order(names: Sequence[str], first: Sequence[str]) -> list[str]:
    """Names, those of ``first`` that are there first."""
    return [*(n for n in first if n in names), *sorted(n for n in names if n not in first)]


def selectors(only: Sequence[str] = ()) -> list[str]:
    """All selectors, or those of ``only``; the oracle first."""
    return in_order([n for n in registered_selectors() if not only or n in only], _SELECTORS)


def evictors(only: Sequence[str] = ()) -> list[str]:
    """All eviction methods, or those of ``only``."""
    found = [n for n in registered_evictors() if not only or n in only]
    return in_order(found, ("snapkv", "recent", "random"))


def sparse_passes(selector: str, keep: float, *, share: float = 0.0, packed: str = "") -> list[str]:
    """Passes that select ``keep`` of the pages."""
    options = f"selector={selector},keep={keep:g}" + (f",share={share:g}" if share else "")
    return [KV, *([packed] if packed else []), f"sparsify_attention{{{options}}}"]


# --- how far logits are from dense ones -------------------------------------------------------------


def distance(expected: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(expected || actual) in nats, and whether the first choice is the same: ``[B, t]`` each."""
    kl, same = [], []
    for row in range(expected.shape[0]):
        for start in range(0, expected.shape[1], 64):
            x, y = (z[row, start : start + 64].float().log_softmax(-1) for z in (expected, actual))
            kl.append((x.exp() * (x - y)).sum(-1))
            same.append((x.argmax(-1) == y.argmax(-1)).float())
    return tuple(torch.cat(z).view(expected.shape[:2]) for z in (kl, same))  # type: ignore[return-value]


def mean_and_error(rows: torch.Tensor) -> dict[str, float]:
    """The mean over texts ``[B, ...]`` and its standard error."""
    rows = rows.double().flatten(1).mean(1) if rows.dim() > 1 else rows.double()
    error = float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else 0.0
    return {"mean": float(rows.mean()), "error": error}


def losses(made: Rewritten, dense: Dense) -> dict[str, Any]:
    """KL and agreement of a program that goes on after the context."""
    tail = dense.tokens[:, dense.context :]
    state = adopt(made, dense, dense.context, tail.shape[1])
    kl, same = distance(dense.logits, run_steps(made.program, state, tail))
    return {"kl": mean_and_error(kl), "top1": mean_and_error(same)}


# --- what lists hold ----------------------------------------------------------------------------------


def page_scores(made: Rewritten, dense: Dense) -> Tensors:
    """Scores ``[B, t, G, N]`` of every layer for the dense program's queries after the context."""
    total = dense.tokens.shape[1]
    state = adopt(made, dense, total, 0)
    parameters = made.graph.parameters
    found = {}
    for node in made.graph.calls("score_pages"):
        summary = argument(node, "summary")
        name = summary[0].meta["store"]["name"]
        q = dense.state.stores[queries_of(name)][:, :, dense.context : total]
        buffers = [state.stores[n.meta["name"]] for n in summary]
        tables = [parameters[n.meta["name"]] for n in argument(node, "constants")]
        rest = [
            argument(node, x) for x in ("selector", "groups", "page", "first", "recent", "settled", "scale")
        ]
        parts = [
            score_pages(q[:, :, start : start + STEP], buffers, tables, *step, *rest)
            for start, step in _steps(dense)
        ]
        found[name] = torch.cat(parts, dim=1)
    return found


def _steps(dense: Dense) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Positions, lengths, counts and dense tokens of the steps after the context."""
    rows, total = dense.tokens.shape
    for start in range(0, total - dense.context, STEP):
        at = torch.arange(dense.context + start, min(dense.context + start + STEP, total))
        counts = torch.full((rows,), len(at))
        # Pages that later tokens complete are no candidates yet: what is always read is longer than a step.
        yield start, (at.expand(rows, -1), torch.full((rows,), total), counts, torch.zeros_like(counts))


def held(made: Rewritten, dense: Dense, scores: Tensors) -> dict[str, Any]:
    """The attention mass and the bytes of what the lists hold."""
    mass, tokens, kept, summaries = [], [], 0.0, 0.0
    at = torch.arange(dense.context, dense.tokens.shape[1])
    for node in made.graph.calls("choose_pages"):
        scorer = argument(node, "scores")
        name = argument(scorer, "summary")[0].meta["store"]["name"]
        options = [
            argument(node, x) for x in ("page", "first", "recent", "settled", "sinks", "keep", "share")
        ]
        page, first, recent, settled = options[:4]
        mine = scores[name]
        parts = [
            choose_pages(mine[:, start : start + STEP], *step, *options) for start, step in _steps(dense)
        ]
        lists, chosen = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        read = _flags(lists, chosen)
        share = attention_mass(dense, page, first)[name]
        entries = share.shape[3] - 1
        grouped = share.view(share.shape[0], read.shape[2], -1, *share.shape[2:])  # [B, G, H/G, t, N + 1]
        got = (grouped[..., :entries] * read[..., :entries].transpose(1, 2)[:, :, None]).sum(-1)
        mass.append((got + grouped[..., entries]).flatten(1).mean(1))
        size = (at[:, None] + 1 - first - torch.arange(entries) * page).clamp(0, page)  # [t, N]
        tokens.append((read[..., :entries] * size[:, None]).sum(-1).double().mean((0, 1)).sum() + first)
        one, whole = _token_bytes(made, dense, name)
        groups = read.shape[2]
        in_full = min(settled, int(at[0])) + first if settled else 0
        each = tokens[-1] / groups  # of one key/value head
        kept += float((each - in_full) * one + in_full * whole)
        closed = candidate_pages(at[None], at[None, -1:] + 1 + settled, page, first, recent, settled)
        summaries += float(closed.double().mean()) * _summary_bytes(made, name)
    return {
        "mass": mean_and_error(torch.stack(mass).mean(0)),
        "cache_bytes": kept,
        "summary_bytes": summaries,
    }


def _flags(lists: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Which pages lists ``[B, t, G, N]`` hold, bool of the same shape."""
    pages = lists.shape[3]
    valid = torch.arange(pages) < chosen[..., None]
    flags = torch.zeros((*lists.shape[:3], pages + 1), dtype=torch.bool)
    flags.scatter_(3, torch.where(valid, lists.long(), pages), True)
    return flags[..., :pages]


def _token_bytes(made: Rewritten, dense: Dense, name: str) -> tuple[float, float]:
    """Bytes of a token of a layer, keys and values: as it is packed, and as it is."""
    attention = next(a for a in _attentions(made) if _store_name(argument(a, "keys")) == name)
    packed = whole = 0.0
    for part in ("keys", "values"):
        node = argument(attention, part)
        fake = node.meta["val"]
        groups, width = int(fake.shape[1]), int(fake.shape[3])
        plain = float(groups * width * fake.dtype.itemsize)
        whole += plain
        if op_name(node) == "cache_read":
            page = PageShape(groups, argument(node, "page"), width)
            packed += parse_codec(argument(node, "codec")).page_bytes(page) / page.tokens
        else:
            packed += plain
    return packed, whole


def _attentions(made: Rewritten) -> list[torch.fx.Node]:
    return made.graph.calls("cache_attention")


def _store_name(keys: torch.fx.Node) -> str:
    if keys.op == "placeholder":
        return str(keys.meta["name"])
    return str(argument(keys, "store")[0].meta["store"]["name"])


def _summary_bytes(made: Rewritten, name: str) -> float:
    """Bytes of the summary of a page of a layer."""
    found = 0.0
    for node in made.graph.placeholders("state"):
        about, fake = node.meta.get("store", {}), node.meta["val"]
        if about.get("role") == "summary" and about["name"] == name:
            found += math.prod(int(x) for x in fake.shape[2:]) * fake.dtype.itemsize / about["span"]
    return found


def predicted_bytes(made: Rewritten, dense: Dense) -> float:
    """Bytes of the cache that attention reads for a token after the context, as the cost model has it."""
    cost = graph_cost(made.graph).by_op["cache_attention"]
    at = range(dense.context, dense.tokens.shape[1])
    return sum(cost.at(batch=1, context=p, tokens=1).read["cache"] for p in at) / len(at)


# --- the parts ----------------------------------------------------------------------------------------


def text_rows(
    bench: Bench, texts: Sequence[Dense], keeps: Sequence[float], only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Every selector at every share of the pages, and compositions."""
    yield from _measure(bench, texts, "bounds", "everything read", [sparse_passes("bounds", 1.0)])
    for selector in selectors(only):
        yield from _measure(bench, texts, selector, "", [sparse_passes(selector, keep) for keep in keeps])
    yield from _compositions(bench, texts[:1], sorted({keeps[0], keeps[-1]}, reverse=True))


def _compositions(bench: Bench, texts: Sequence[Dense], keeps: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Packed caches, and as few pages as hold enough of the attention."""
    packed = "quantize_cache{codec=combined,bits=4}"
    made = [[KV, packed], *(sparse_passes("bounds", keep, packed=packed) for keep in keeps)]
    yield from _measure(bench, texts, "bounds", "packed", made)
    for selector in ("bounds", "mean"):
        enough = [sparse_passes(selector, keeps[0], share=share) for share in (0.95, 0.8)]
        yield from _measure(bench, texts, selector, "share", enough)


def _measure(
    bench: Bench, texts: Sequence[Dense], selector: str, note: str, cases: Sequence[Sequence[str]]
) -> Iterator[dict[str, Any]]:
    for dense in texts:
        scores: Tensors = {}
        for passes in cases:
            made = bench.rewrite(passes)
            row: dict[str, Any] = {
                "selector": selector, "note": note, "passes": list(passes), "context": dense.context,
                "left": made.left, **losses(made, dense),
            }  # fmt: skip
            if choices := made.graph.calls("choose_pages"):
                scores = scores or page_scores(made, dense)
                row |= {x: argument(choices[0], x) for x in ("keep", "share")} | held(made, dense, scores)
                if not made.program.lowered.packed:
                    row["predicted_bytes"] = predicted_bytes(made, dense)
            yield row


def eviction_rows(
    bench: Bench, dense: Dense, keeps: Sequence[float], only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A prompt of the context evicted, then the tokens after it: no further token leaves."""
    for method in evictors(only):
        for keep in keeps:
            options = f"method={method},tokens={round(keep * dense.context)},slack={2 * TAIL},when=prompt"
            made = bench.rewrite([KV, f"evict_tokens{{{options}}}"])
            yield {"method": method, "keep": keep, "context": dense.context, "left": made.left} | losses(
                made, dense
            )
