"""A comparison of targets as one table, drawn with rich; 100 columns wide, readable at 80."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphwright.optimizer.quantities import clean, quantity
from graphwright.optimizer.report_rows import workload_line

if TYPE_CHECKING:
    from graphwright.optimizer.compare import Comparison, Row

#: The columns of the table, and whether one holds words rather than figures.
COLUMNS = {
    "target": True, "fits": True, "tokens/s": False, "per token": False, "bound": True,
    "prefill": False, "memory": False, "max batch": False, "max context": False, "plan": True,
}  # fmt: skip
NOTE = "Predicted, not measured: of all sequences together, and before what drafts gain."
_STYLE = {"yes": "green", "no": "red"}

#: The distinct choices of passes, each with the letter that stands for it in the table.
Plans = dict[tuple[str, ...], str]


def letter_plans(comparison: Comparison) -> Plans:
    """Most targets share a plan: each distinct one gets a letter, in the order of the rows."""
    distinct = dict.fromkeys(row.passes for row in comparison.rows if row.fits is not None)
    return {passes: _letters(index) for index, passes in enumerate(distinct)}


def plan_line(passes: tuple[str, ...]) -> str:
    """The passes of a plan in words."""
    return ", ".join(passes) or "no pass"


def cells(row: Row, plans: Plans) -> tuple[str, ...]:
    """A row in words, one text for each column; a target without a plan has no figures."""
    if row.fits is None:
        return (row.target, *["-"] * (len(COLUMNS) - 1))
    return (
        row.target,
        quantity("fits", row.fits),
        quantity("tokens_per_second", row.tokens_per_second),
        quantity("seconds", row.seconds_per_token),
        row.bound,
        quantity("seconds", row.prefill_seconds),
        _share(quantity("bytes", row.memory_bytes), quantity("bytes", row.limit_bytes)),
        quantity("largest_batch", row.largest_batch),
        "any" if row.largest_context is None else quantity("largest_context", row.largest_context),
        plans[row.passes],
    )


def _share(used: str, limit: str) -> str:
    """``30.7 of 74.5 GiB``; both units where they differ."""
    number, _, unit = used.partition(" ")
    return f"{number if limit.endswith(f' {unit}') else used} of {limit}"


def renderable(comparison: Comparison) -> RenderableType:
    """The comparison as something a rich console prints."""
    return Group(*_parts(comparison))


def render_text(comparison: Comparison, *, width: int) -> str:
    """The comparison as text without escape sequences."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable(comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parts(comparison: Comparison) -> Iterator[RenderableType]:
    yield Text.assemble(("model     ", "dim"), clean(comparison.model))
    yield Text.assemble(("workload  ", "dim"), workload_line(comparison.workload))
    plans = letter_plans(comparison)
    yield _table(comparison, plans)
    for row in comparison.rows:
        if row.reason:
            yield Text.assemble((f"{clean(row.target)}: ", "bold"), clean(row.reason))
    for passes, letter in plans.items():
        yield Text.assemble((f"plan {letter}: ", "bold"), clean(plan_line(passes)))
    yield Text(NOTE, style="dim")


def _table(comparison: Comparison, plans: Plans) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, is_text in COLUMNS.items():
        head = name.replace("max ", "max\n").replace("per ", "per\n")  # no wider than what stands below
        table.add_column(head, justify="left" if is_text else "right", overflow="fold")
    for row in comparison.rows:
        # What does not fit is no offer, however fast it would be.
        usual = "dim" if row.fits is False else ""
        words = [clean(word) for word in cells(row, plans)]
        table.add_row(*(Text(word, style=_STYLE.get(word, usual)) for word in words))
    return table


def _letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    rest, last = divmod(index, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("A") + last)
