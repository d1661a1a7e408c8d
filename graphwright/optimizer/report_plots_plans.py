"""Two plots of a report: the plans, quality against speed, and what was predicted against measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from graphwright.optimizer.plain_data import number
from graphwright.optimizer.quantities import label, memory_unit, quantity, shorten, time_unit
from graphwright.optimizer.report_rows import PlanRow, comparison_rows, plan_rows, plans_are_exact
from graphwright.optimizer.report_svg import (
    COLORS,
    INK,
    LINE,
    OTHER,
    PAPER,
    SOFT,
    Plot,
    css_class,
    new_figure,
    to_svg,
)

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

# Color, shape and glyph of each status; the size of a mark says nothing here.
_STATUS = {
    "chosen": (COLORS[1], "*", "★", 150),
    "runner-up": (COLORS[0], "o", "●", 36),
    "undone": (OTHER, "X", "✖", 44),
}
# Where the number of a plan may stand, in points from its mark: the first place that is free is taken.
_PLACES = ((7, 4), (7, -11), (-13, 4), (-13, -11), (-3, 9), (-3, -16), (17, 4), (17, -11), (-23, 4))
_POINTS = 72.0
# An axis spans at least this share of its middle.
_LEAST_SPAN = 0.08
# The other numbers of a prediction follow from the times and sizes.
_COMPARED = frozenset({"seconds", "bytes", "kl"})
_MOST_ROWS = 10
_TICKS = (0.1, 0.2, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 5.0, 10.0)


def plans_plot(report: Report) -> Plot | None:
    """The front of plans: loss of quality against time per token, or memory where all plans are exact."""
    plans = plan_rows(report)
    exact = plans_are_exact(report, plans)
    key = "memory_bytes" if exact else "kl"
    placed = [
        (plan, x, y)
        for plan in plans
        if (x := number(plan.predicted.get("seconds_per_token"))) is not None
        and (y := number(plan.predicted.get(key))) is not None
    ]
    if len(placed) < 2:
        return None
    x_scale, x_unit = time_unit(max(x for _, x, _ in placed))
    y_scale, y_unit = memory_unit(max(y for *_, y in placed)) if exact else (1.0, "nats per token")
    scaled = [(plan, x / x_scale, y / y_scale) for plan, x, y in placed]
    figure, axes = new_figure(2.9)
    _draw_front(axes, [(x, y) for plan, x, y in scaled if plan.status != "undone"])
    for plan, x, y in reversed(scaled):
        color, marker, _, area = _STATUS.get(plan.status, _STATUS["runner-up"])
        look: dict[str, Any] = {"s": area, "color": color, "marker": marker, "edgecolors": PAPER}
        axes.scatter(x, y, **look, linewidths=0.7, zorder=3, clip_on=False)
    _frame(axes)
    axes.set_xlabel(f"predicted {x_unit} per token")
    axes.set_ylabel(y_unit if exact else f"KL ({y_unit})")
    figure.draw_without_rendering()  # places depend on the limits that the layout settles
    _number_plans(axes, scaled)
    legend = [
        (css_class(color), glyph, status)
        for status, (color, _, glyph, _) in _STATUS.items()
        if any(plan.status == status for plan, *_ in placed)
    ]
    caption = "Lower and further to the left is better. Numbers are those of the table of plans."
    words = "; ".join(
        f"{plan.number} {plan.status}: {quantity('seconds', x)}, {quantity(key, y)}" for plan, x, y in placed
    )
    title = "Plans: memory against speed" if exact else "Plans: quality against speed"
    return Plot(title, to_svg(figure, "plans", f"{title}: {words}"), tuple(legend), caption)


def _draw_front(axes: Axes, points: list[tuple[float, float]]) -> None:
    """A step line through the plans that no other plan beats in both directions."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=SOFT, linewidth=1.0, zorder=1)


def _frame(axes: Axes) -> None:
    """Room around the marks; plans that are all but equal in one direction stand close together in it."""
    axes.margins(0.12, 0.16)
    for axis, (low, high), limit in (
        (axes.xaxis, axes.get_xlim(), axes.set_xlim),
        (axes.yaxis, axes.get_ylim(), axes.set_ylim),
    ):
        axis.set_major_locator(MaxNLocator(5))
        middle = (low + high) / 2
        if high - low < _LEAST_SPAN * abs(middle):
            limit(middle * (1 - _LEAST_SPAN / 2), middle * (1 + _LEAST_SPAN / 2))


def _number_plans(axes: Axes, scaled: list[tuple[PlanRow, float, float]]) -> None:
    """Each plan's number beside its mark, where it hides neither a mark nor another number."""
    dots = axes.figure.dpi / _POINTS
    marks = [axes.transData.transform((x, y)) / dots for _, x, y in scaled]
    taken = [(float(x) - 4, float(y) - 4, float(x) + 4, float(y) + 4) for x, y in marks]
    for (plan, x, y), mark in zip(scaled, marks, strict=True):
        width = 6.0 * len(str(plan.number))
        boxes = {
            (dx, dy): (mark[0] + dx, mark[1] + dy, mark[0] + dx + width, mark[1] + dy + 8)
            for dx, dy in _PLACES
        }
        free = [place for place, box in boxes.items() if not any(_overlap(box, other) for other in taken)]
        place = free[0] if free else _PLACES[0]
        taken.append(boxes[place])
        weight = "bold" if plan.chosen else "normal"
        axes.annotate(str(plan.number), (x, y), place, textcoords="offset points", weight=weight, zorder=4)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def accuracy_plot(report: Report) -> Plot | None:
    """Measured over predicted, for every time, size and loss of quality that is known twice."""
    rows = list(_ratios(report))[:_MOST_ROWS]
    if not rows:
        return None
    figure, axes = new_figure(0.75 + 0.28 * len(rows))
    reach = max(1.35, *(max(ratio, 1 / ratio) * 1.1 for _, ratio in rows))
    axes.set_xscale("log")
    axes.set_xlim(1 / reach, reach)
    axes.axvspan(1 / 1.15, 1.15, color=LINE, alpha=0.45, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1.0)
    for row, (_, ratio) in enumerate(rows):
        axes.plot([1, ratio], [row, row], color=COLORS[0], linewidth=2)
        axes.scatter(ratio, row, s=34, color=COLORS[0], edgecolors=PAPER, linewidths=0.7, zorder=3)
        axes.annotate(
            f"{ratio:.2f}", (1, row), (6, 0), ("axes fraction", "data"), "offset points", va="center"
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(FixedLocator(_ticks(reach)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("measured / predicted")
    words = "; ".join(f"{name} {ratio:.2f}" for name, ratio in rows)
    caption = "Right of the line, more was measured than predicted. The band is 15 per cent to each side."
    svg = to_svg(figure, "accuracy", f"Measured over predicted: {words}")
    return Plot("Predicted against measured", svg, (), caption)


def _ratios(report: Report) -> Iterator[tuple[str, float]]:
    for row in comparison_rows(report, details=False):
        ratio = _ratio(row.predicted, row.measured)
        if ratio is not None and _COMPARED & set(row.key.split("_")) and "second" not in row.key.split("_"):
            yield shorten(f"{label(row.section)}, {label(row.key)}"), ratio
    for plan in plan_rows(report):
        known = plan.chosen and "decode" in report.measured  # the program itself, which the rows above show
        for key in ("kl",) if known else ("seconds_per_token", "memory_bytes", "kl"):
            ratio = _ratio(plan.predicted.get(key), plan.measured.get(key))
            if ratio is not None:
                yield f"plan {plan.number}, {label(key)}", ratio


def _ratio(predicted: object, measured: object) -> float | None:
    below, above = number(predicted), number(measured)
    return above / below if below and above and below > 0 and above > 0 else None


def _ticks(reach: float) -> list[float]:
    """Four or so ticks about 1 that lie within ``reach``."""
    inside = [tick for tick in _TICKS if 1 / reach <= tick <= reach]
    if len(inside) <= 5:
        return inside
    outer = [inside[0], inside[-1]]
    middle = [tick for tick in (0.5, 1.0, 2.0) if outer[0] < tick < outer[1]]
    return [outer[0], *middle, outer[1]]
