"""The plots of a report: time by op, the roofline, memory, the plans, predicted against measured.

Each function takes a report and returns a :class:`Plot`, or None where the report has nothing to show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from graphwright.optimizer.plain_data import number
from graphwright.optimizer.quantities import (
    clean,
    count,
    duration,
    magnitude,
    memory_unit,
    quantity,
    time_unit,
)
from graphwright.optimizer.report_plots_plans import accuracy_plot, plans_plot
from graphwright.optimizer.report_svg import (
    COLORS,
    INK,
    OTHER,
    PAPER,
    SERIES,
    SOFT,
    Plot,
    css_class,
    new_figure,
    style,
    to_svg,
)

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

# One shape for each color, as matplotlib and as text name it.
_MARKERS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_OTHER_OPS = "other ops"
_BARS = (
    ("predicted", "before", "before, predicted"),
    ("predicted", "decode", "after, predicted"),
    ("measured", "stock", "stock, measured"),
    ("measured", "decode", "program, measured"),
)
_MEMORY = (
    ("weights_bytes", "weights", COLORS[0]),
    ("workspace_bytes", "workspace", COLORS[2]),
    ("cache_bytes", "cache", COLORS[1]),
)
# A limit that is this many times above everything else would flatten the picture.
_FAR_ABOVE = 4.0


def draw_plots(report: Report) -> list[Plot]:
    """All plots that the report has data for, in the order of a page."""
    with style():
        ops = rank_ops(report)
        drawn = (
            time_plot(report, ops),
            memory_plot(report),
            plans_plot(report),
            accuracy_plot(report),
            roofline_plot(report, ops),
        )
        return [plot for plot in drawn if plot is not None]


def rank_ops(report: Report) -> list[str]:
    """The ops that take the most time, at most as many as there are colors; the same in every plot."""
    longest: dict[str, float] = {}
    tables = [_by_op(getattr(report, side).get(section)) for side, section, _ in _BARS]
    tables.append({point.op: point.seconds for point in _points(report)})
    for table in tables:
        for op, seconds in table.items():
            longest[op] = max(longest.get(op, 0.0), seconds)
    return sorted(longest, key=lambda op: (-longest[op], op))[:SERIES]


# --- time by op ----------------------------------------------------------------------------------


def time_plot(report: Report, ops: list[str]) -> Plot | None:
    """Time per token before and after as bars stacked by op, and the measured totals below them."""
    bars = [
        (name, *_bar(getattr(report, side).get(section), ops)) for side, section, name in _BARS
    ]  # fmt: skip
    bars = [(name, parts, total) for name, parts, total in bars if total]
    if not any(parts for _, parts, _ in bars):
        return None
    longest = max(total for *_, total in bars)
    scale, unit = time_unit(longest)
    figure, axes = new_figure(0.75 + 0.4 * len(bars))
    for row, (_, parts, total) in enumerate(bars):
        start = 0.0
        for op, seconds in (parts or {"": total}).items():
            color = _color(op, ops) if parts else SOFT
            axes.barh(row, seconds / scale, 0.62, start / scale, color=color, edgecolor=PAPER, linewidth=0.5)
            start += seconds
        axes.annotate(duration(total), (total / scale, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, longest / scale * 1.25)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{unit} per token")
    shown = {op for _, parts, _ in bars for op in parts}
    legend = [(css_class(_color(op, ops)), "■", clean(op)) for op in (*ops, _OTHER_OPS) if op in shown]
    if any(not parts for _, parts, _ in bars):
        legend.append((css_class(SOFT), "■", "not split by op"))
    words = "; ".join(f"{name} {duration(total)}" for name, _, total in bars)
    caption = "Decoding at the workload's mean context."
    if any(not parts for _, parts, _ in bars):
        caption += " Measured times are of a whole step."
    return Plot(
        "Time per token, by op", to_svg(figure, "time", f"Time per token: {words}"), tuple(legend), caption
    )


def _bar(section: Any, ops: list[str]) -> tuple[dict[str, float], float]:
    """Seconds by op, the ops beyond the colors joined, and the total; 0 where nothing is known.

    A step under speculation yields several tokens: its parts are then shares of the time per token.
    """
    found = _by_op(section)
    total = number(section.get("seconds_per_token")) if isinstance(section, Mapping) else None
    whole = sum(found.values())
    total = whole if total is None else total
    if total <= 0 or not whole:
        return {}, max(total, 0.0)
    parts = {op: found[op] * total / whole for op in ops if found.get(op)}
    rest = sum(seconds for op, seconds in found.items() if op not in ops) * total / whole
    return parts | ({_OTHER_OPS: rest} if rest > 0 else {}), total


def _by_op(section: Any) -> dict[str, float]:
    found = section.get("seconds_by_op") if isinstance(section, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {str(op): value for op, seconds in found.items() if (value := number(seconds) or 0.0) > 0}


def _color(op: str, ops: list[str]) -> str:
    return COLORS[ops.index(op)] if op in ops else OTHER


# --- roofline ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One op on the roofline: FLOP/byte, FLOP/s, seconds."""

    op: str
    intensity: float
    rate: float
    seconds: float


def _points(report: Report) -> list[_Point]:
    roofline = report.curves.get("roofline") or {}
    return [
        _Point(
            str(op.get("op", "")),
            number(op.get("intensity")) or 0.0,
            number(op.get("flops_per_second")) or 0.0,
            number(op.get("seconds")) or 0.0,
        )
        for op in roofline.get("ops") or ()
    ]


def roofline_plot(report: Report, ops: list[str]) -> Plot | None:
    """The roofline (Williams, Waterman & Patterson 2009) of the target with each op of a step on it."""
    roofline = report.curves.get("roofline") or {}
    peak, bandwidth = (number(roofline.get(key)) for key in ("flops_per_second", "bytes_per_second"))
    every = _points(report)
    points = [point for point in every if point.intensity > 0 and point.rate > 0]
    if not peak or not bandwidth or not points:
        return None
    figure, axes = new_figure(2.9)
    _roof(axes, peak, bandwidth, points)
    total = sum(point.seconds for point in every) or 1.0
    for point in sorted(points, key=lambda point: -point.seconds):
        marker, _ = _marker(point.op, ops)
        area = 30 + 170 * max(point.seconds, 0.0) / total
        axes.scatter(
            point.intensity, point.rate, s=area, color=_color(point.op, ops), marker=marker, edgecolors=PAPER,
            linewidths=0.8, zorder=3, clip_on=False,
        )  # fmt: skip
    axes.set_xlabel("arithmetic intensity (FLOP per byte)")
    axes.set_ylabel("FLOP/s")
    shown = {point.op for point in points}
    legend = [(css_class(_color(op, ops)), _marker(op, ops)[1], clean(op)) for op in ops if op in shown]
    if shown - set(ops):
        legend.append((css_class(OTHER), _marker("", ops)[1], _OTHER_OPS))
    limits = (quantity("flops_per_second", peak), quantity("bytes_per_second", bandwidth))
    caption = f"The roof: {limits[0]} and {limits[1]}. The larger a mark, the more of a step's time it takes."
    if idle := [clean(point.op) for point in every if point not in points]:
        caption += f" Not shown, as they do no arithmetic: {', '.join(idle)}."
    words = "; ".join(f"{p.op} {p.intensity:.3g} FLOP/byte {magnitude(p.rate)}FLOP/s" for p in points)
    svg = to_svg(figure, "roofline", f"Roofline of {limits[0]} and {limits[1]}: {words}")
    return Plot("Roofline", svg, tuple(legend), caption)


def _roof(axes: Axes, peak: float, bandwidth: float, points: list[_Point]) -> None:
    """The roof, with room around it and around every point, on logarithmic axes."""
    ridge = peak / bandwidth
    left = min(ridge / 10, *(point.intensity / 3 for point in points))
    right = max(ridge * 10, *(point.intensity * 3 for point in points))
    axes.loglog([left, ridge, right], [left * bandwidth, peak, peak], color=INK, linewidth=1.4)
    axes.set_xlim(left, right)
    axes.set_ylim(min(left * bandwidth, *(point.rate / 3 for point in points)), peak * 3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))


def _marker(op: str, ops: list[str]) -> tuple[str, str]:
    return _MARKERS[ops.index(op)] if op in ops else _MARKERS[0]


# --- memory --------------------------------------------------------------------------------------


def memory_plot(report: Report) -> Plot | None:
    """Weights, workspace and cache against the context, the limit, and where the workload stands."""
    curve = report.curves.get("memory") or {}
    points = sorted(
        (context, [number(point.get(key)) or 0.0 for key, *_ in _MEMORY])
        for point in curve.get("points") or ()
        if (context := number(point.get("context"))) is not None
    )
    if len(points) < 2:
        return None
    contexts = [context for context, _ in points]
    largest = max(sum(sizes) for _, sizes in points)
    limit = number(curve.get("limit_bytes"))
    near = limit is not None and limit <= _FAR_ABOVE * largest
    top = max(largest, limit or 0.0) if near else largest
    scale, unit = memory_unit(top)
    figure, axes = new_figure(2.9)
    layers = [[sizes[index] / scale for _, sizes in points] for index in range(len(_MEMORY))]
    axes.stackplot(contexts, layers, colors=[color for *_, color in _MEMORY], edgecolor=PAPER, linewidth=0.5)
    axes.set_xlim(contexts[0], contexts[-1])
    axes.set_ylim(0, top / scale * 1.15 or 1)
    free = _mark_workload(axes, report.workload, contexts)
    if near and limit is not None:
        axes.axhline(limit / scale, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        words, at = f"limit {quantity('bytes', limit)}", (1.0 if free == "right" else 0.0, limit / scale)
        nudge = (-4 if free == "right" else 4, 4)
        axes.annotate(words, at, nudge, ("axes fraction", "data"), "offset points", ha=free)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value).replace(" ", "")))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("context (tokens per sequence)")
    axes.set_ylabel(unit)
    batch = number(report.workload.get("batch")) or 1
    caption = f"At batch {count(batch)}." + (
        f" The limit, {quantity('bytes', limit)}, is far above." if limit and not near else ""
    )
    ends = ", ".join(
        f"{quantity('bytes', sum(sizes))} at {count(context)}" for context, sizes in _ends(points)
    )
    svg = to_svg(figure, "memory", f"Memory against context: {ends}")
    legend = tuple((css_class(color), "■", name) for _, name, color in reversed(_MEMORY))
    return Plot("Memory against context", svg, legend, caption)


def _mark_workload(axes: Axes, workload: Mapping[str, Any], contexts: list[float]) -> str:
    """A line at the context that the workload ends at, named above the picture; the side it leaves free."""
    own = sum(number(workload.get(key)) or 0 for key in ("prompt", "generate"))
    if not contexts[0] <= own <= contexts[-1]:
        return "left"
    axes.axvline(own, color=INK, linewidth=1.2, linestyle=(0, (1, 2)))
    share = (own - contexts[0]) / (contexts[-1] - contexts[0])
    side = "left" if share < 0.3 else "right" if share > 0.7 else "center"
    words, at = f"this workload: {count(own)}", (own, 1)
    axes.annotate(words, at, (0, 4), ("data", "axes fraction"), "offset points", ha=side)
    return "right" if share < 0.5 else "left"


def _ends(points: Iterable[Any]) -> list[Any]:
    listed = list(points)
    return [listed[0], listed[-1]]
