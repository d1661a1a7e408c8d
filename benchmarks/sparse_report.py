"""The tables and the picture of ``sparse_quality.py``'s results: docs/sparse_quality.md and .svg.

python benchmarks/sparse_report.py benchmarks/results/sparse_quality.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
Row = Mapping[str, Any]
Cells = Mapping[str, Callable[[Row], str]]
_RANDOM, _ORACLE = "random", "oracle"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- what the figures have to show ------------------------------------------------------------------


def of_selectors(rows: Iterable[Row]) -> list[Row]:
    """Rows of the selectors by themselves, without compositions."""
    return [r for r in rows if not r["note"]]


def place(row: Row) -> tuple[int, float]:
    """What is compared with each other: context and share of the pages."""
    return row["context"], row["keep"]


def worse_than_random(rows: Iterable[Row]) -> list[Row]:
    """Rows that hold less of the attention than pages at random."""
    rows = of_selectors(rows)
    chance = {place(r): r["mass"]["mean"] for r in rows if r["selector"] == _RANDOM}
    return [r for r in rows if r["mass"]["mean"] < chance[place(r)]]


def better_than_oracle(rows: Iterable[Row]) -> list[Row]:
    """Rows that hold more of the attention than the best pages do."""
    rows = of_selectors(rows)
    best = {place(r): r["mass"]["mean"] for r in rows if r["selector"] == _ORACLE}
    return [r for r in rows if r["mass"]["mean"] > best[place(r)]]


def mispriced(rows: Iterable[Row]) -> list[Row]:
    """Rows whose lists read other bytes than the cost model says: more, where a share may cut them short."""
    found = []
    for row in rows:
        if "predicted_bytes" in row:
            over = row["cache_bytes"] - row["predicted_bytes"]
            wrong = over if row["share"] else abs(over)
            if wrong > 1e-6 * row["predicted_bytes"]:
                found.append(row)
    return found


# --- the page ---------------------------------------------------------------------------------------


def fraction(keep: float) -> str:
    """``1/8``."""
    return f"1/{1 / keep:.3g}"


def _pm(value: Mapping[str, float], digits: int = 3) -> str:
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def _grid(rows: list[Row], name: str, cells: Cells, once: Cells | None = None) -> str:
    """One line a method; a column for each cell and share, and for what has nothing to do with the share."""
    once = once or {}
    keeps = sorted({r["keep"] for r in rows}, reverse=True)
    found = {(r[name], r["keep"]): r for r in rows}
    head = [name, *(f"{label} {fraction(k)}" for label in cells for k in keeps), *once]
    lines = []
    for n in dict.fromkeys(r[name] for r in rows):
        line = [f"`{n}`", *(cell(found[n, k]) for cell in cells.values() for k in keeps)]
        lines.append([*line, *(cell(found[n, keeps[0]]) for cell in once.values())])
    return table(head, lines)


def _whole(rows: list[Row], context: int) -> Row:
    """The row that reads everything."""
    return next(r for r in rows if r["context"] == context and r["note"] == "everything read")


def text_part(part: Row) -> str:
    """Tables of the selectors, one a context."""
    rows, blocks = part["rows"], []
    for context in sorted({r["context"] for r in rows}):
        dense = _whole(rows, context)["cache_bytes"]
        here = [r for r in of_selectors(rows) if r["context"] == context]
        pages = {r["keep"]: f"{100 * r['cache_bytes'] / dense:.1f} %" for r in here}
        cells: Cells = {
            "held": lambda r: f"{100 * r['mass']['mean']:.1f} %",
            "KL": lambda r: _pm(r["kl"]),
            "top-1": lambda r: f"{100 * r['top1']['mean']:.0f} %",
        }
        once: Cells = {"summaries": lambda r, d=dense: f"{100 * r['summary_bytes'] / d:.1f} %"}  # type: ignore[misc]
        blocks += [
            f"### {context:,} tokens, {part['texts'][str(context)]} texts\n",
            f"A dense step reads {dense / 2**20:.1f} MiB of cache. Of these bytes, pages are "
            + ", ".join(f"{share} at {fraction(keep)}" for keep, share in pages.items())
            + "; summaries come on top.\n",
            _grid(here, "selector", cells, once),
        ]
    return "\n".join(blocks)


def composed(part: Row) -> str:
    """What else was measured on text."""
    rows = [r for r in part["rows"] if r["note"] and r["note"] != "everything read"]
    lines = []
    for row in rows:
        dense = _whole(part["rows"], row["context"])["cache_bytes"]
        held = f"{100 * row['mass']['mean']:.1f} %" if "mass" in row else ""
        read = f"{100 * (row['cache_bytes'] + row['summary_bytes']) / dense:.1f} %" if "mass" in row else ""
        passes = ", ".join(f"`{p}`" for p in row["passes"][1:])
        lines.append(
            [f"{row['context']:,}", passes, held, _pm(row["kl"]), f"{100 * row['top1']['mean']:.0f} %", read]
        )
    return table(("context", "passes", "held", "KL", "top-1", "bytes"), lines)


def checks(part: Row) -> str:
    """What the figures were checked for."""

    def names(rows: list[Row]) -> str:
        return (
            ", ".join(f"`{r['selector']}` at {r['context']:,}, {fraction(r['keep'])}" for r in rows) or "none"
        )

    rows = part["rows"]
    return (
        f"Hold less than pages at random: {names(worse_than_random(rows))}. "
        f"Hold more than the oracle's pages: {names(better_than_oracle(rows))}. "
        f"Read other bytes than the cost model says: {names(mispriced(rows))}.\n"
    )


def retrieval_part(part: Row) -> str:
    """Accuracy, one table a task and kind."""
    blocks, rows = [], part["rows"]
    for task in dict.fromkeys(r["task"] for r in rows):
        here = [r for r in rows if r["task"] == task]
        dense = next(r for r in here if r["kind"] == "dense")
        blocks.append(f"### {task}\n\nDense: {dense['right']} of {dense['samples']} right.\n")
        for kind in ("selected", "evicted"):
            mine = [r for r in here if r["kind"] == kind]
            cells: dict[str, Callable[[Row], str]] = {}
            for mode in dict.fromkeys(r["question"] for r in mine):
                found = {(r["name"], r["keep"]): r for r in mine if r["question"] == mode}
                cells[f"question {mode},"] = lambda r, f=found: _right(f[r["name"], r["keep"]])  # type: ignore[misc]
            blocks.append(_grid([{**r, kind: r["name"]} for r in mine], kind, cells))
    return "\n".join(blocks)


def _right(row: Row) -> str:
    return f"{100 * row['right'] / row['samples']:.0f} %"


def drift_part(part: Row) -> str:
    """KL by bucket of tokens."""
    blocks = []
    for along in dict.fromkeys(r["along"] for r in part["rows"]):
        rows = [r for r in part["rows"] if r["along"] == along]
        columns = [(what, r) for what in ("buckets", "left") for r in rows if what in r]
        head = ["tokens", *(f"{_WHAT[what]}, `{r['options']}`" for what, r in columns)]
        lines = [
            [f"{64 * i + 1} to {64 * (i + 1)}", *(_pm(r[what][i]) for what, r in columns)]
            for i in range(len(rows[0]["buckets"]))
        ]
        if "distinct" in rows[0]:
            lines.append(["new runs of 4", *(f"{100 * r['distinct']:.0f} %" for r in rows)])
        blocks += [f"Along {along}:\n", table(head, lines)]
    return "\n".join(blocks)


def eviction_part(part: Row) -> str:
    """KL by method."""
    cells = {"KL": lambda r: _pm(r["kl"]), "top-1": lambda r: f"{100 * r['top1']['mean']:.0f} %"}
    return _grid(part["rows"], "method", cells)


def page(result: Row) -> str:
    """docs/sparse_quality.md."""
    text, about = result["text"], result["machine"]["text"]
    words = {
        "source": text["source"], "tail": text["tail"],
        "where": f"{about['cpu']}, {about['threads']} thread, Python {about['python']}, "
        f"torch {about['torch']}, transformers {about['transformers']}",
    }  # fmt: skip
    drift, evicted = result["drift"], result["eviction"]
    parts = [
        _INTRODUCTION.format(**words), checks(text), text_part(text), _COMPOSED, composed(text),
        _RETRIEVAL, retrieval_part(result["retrieval"]), _DRIFT.format(**drift), drift_part(drift),
        _EVICTION.format(context=evicted["rows"][0]["context"], tail=evicted["tail"]), eviction_part(evicted),
    ]  # fmt: skip
    return "\n".join(parts)


_INTRODUCTION = """# Sparse attention and evicted caches, measured

Written by `benchmarks/sparse_report.py` from `benchmarks/results/sparse_quality.json`; `make bench-sparse`
makes both. SmolLM2-135M-Instruct in bfloat16. {where}.

## Selected pages on text

{tail} tokens after a context of {source}, in steps of 16, against the dense program. Pages have 16 tokens;
the newest 32 tokens and the first page are always read, and count. `held` is the share of the dense
program's attention, of its own queries, that the pages hold: a mean over layers, heads and tokens. KL is in
nats a token, with the standard error over texts. Calibrated selectors saw other text. `oracle` reads as many
bytes of keys as there are: it is the best choice, not a method; `recent` is a window and the first page.
Lists that hold every page give the dense program's logits, bit by bit.

![KL against bytes](sparse_quality.svg)
"""
_COMPOSED = """### Compositions

A cache packed to about 4 bits in pages of 64 tokens, alone and with selected pages (summaries stay as they
are); and as few pages as hold a share of the attention that the scores estimate, at most those that `keep`
allows.
"""
_RETRIEVAL = """## Retrieval

Numbers of five digits hidden in prose, or in sentences that repeat, in the manner of RULER; the answer has
to hold the number. *After the prompt*: the prompt runs densely, or runs and is evicted, before the question
comes, which then reads selected pages, or what is left. *In the prompt*: the question runs densely, too, and
eviction has seen it; the first token of the answer is the dense one.
"""
_WHAT = {"buckets": "step", "left": "cache"}
_DRIFT = """## Drift

{new} tokens after {prompts} prompts of {prompt:,} tokens; KL against the dense program on the same tokens.
*step*: of each step's logits. *cache*: of the same tokens where 16 at a time read everything, so that what
is left is the error of the cache, whose new tokens were computed sparsely; a dense pass runs them again.
Greedy text soon repeats itself (the last line), which is easy to predict.
"""
_EVICTION = """## Eviction on text

A prompt of {context:,} tokens evicted to a share of its tokens, the newest 32 and the first 4 among them, and
KL of the next {tail} tokens.
"""


# --- the picture ------------------------------------------------------------------------------------

_MARKS = "osDv^<>Pph*X"


def draw(rows: list[Row], to: Path) -> None:
    """KL against bytes read for a token, one line a selector, one panel a context."""
    contexts = sorted({r["context"] for r in rows})
    figure, panels = plt.subplots(
        1, len(contexts), figsize=(5 * len(contexts), 4.6), sharey=True, squeeze=False
    )
    for axes, context in zip(panels[0], contexts, strict=True):
        here = [r for r in of_selectors(rows) if r["context"] == context]
        whole = _whole(rows, context)
        for mark, name in zip(_MARKS, dict.fromkeys(r["selector"] for r in here), strict=False):
            own = [r for r in here if r["selector"] == name]
            read = [(r["cache_bytes"] + r["summary_bytes"]) / 2**20 for r in own]
            style = "--" if name in (_ORACLE, _RANDOM, "recent") else "-"
            axes.plot(read, [r["kl"]["mean"] for r in own], style, marker=mark, markersize=5, label=name)
        axes.axvline(whole["cache_bytes"] / 2**20, linestyle=":", color="black", label="dense")
        axes.set(title=f"{context:,} tokens", xlabel="MiB read for a token", yscale="log", xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean KL, nats per token")
    panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    (args.docs / "sparse_quality.md").write_text(page(result))
    draw(result["text"]["rows"], args.docs / "sparse_quality.svg")


if __name__ == "__main__":
    main()
