"""``graphwright calibrate``: a progress bar while it measures, then what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import typer
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from graphwright.cost_model.calibrate import stored_at
from graphwright.cost_model.target import Target
from graphwright.optimizer.cli_support import INTERRUPTED
from graphwright.optimizer.quantities import clean, quantity

Tell = Callable[[str, float], None]


def run(refresh: bool, seconds: float) -> None:
    """Measure the machine at hand, or read what was measured before, and print the figures.

    Raises:
        InputError: ``seconds`` is not a finite number above zero.
        typer.Exit: with 130, if it was interrupted.
    """
    from graphwright.optimizer.calibration import calibrate_machine

    measured = False

    def told(step: str, done: float) -> None:
        nonlocal measured
        if done < 1:  # the end is told also where nothing was measured
            measured = True
            tell(step, done)

    try:
        with _bar() as tell:
            target = calibrate_machine(told, refresh=refresh, seconds=seconds)
    except KeyboardInterrupt:
        typer.echo("graphwright: interrupted; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(target)
    if not measured:
        typer.echo("measured before; --refresh measures again")


@contextmanager
def _bar() -> Iterator[Tell]:
    """A bar on standard error that a step's name and the fraction done move; one line a step elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(40),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    # Redirecting stdout would send what is printed meanwhile to standard error.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("measuring", total=1.0)
        yield lambda step, done: bar.update(task, description=clean(step), completed=done)


def _plain_lines() -> Tell:
    last = ""

    def tell(step: str, done: float) -> None:
        nonlocal last
        if step != last:
            typer.echo(f"graphwright: {clean(step)}", err=True)
        last = step

    return tell


def _show(target: Target) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", no_wrap=True, justify="right")
    table.add_column("source", overflow="fold")
    for cells in figures(target):
        table.add_row(*(Text(clean(cell)) for cell in cells))
    console = Console()
    console.print(Group(Text(f"{clean(target.name)}: {clean(target.title)}", style="bold"), table))
    file = stored_at(torch.device("cpu" if target.kind == "cpu" else "cuda"))
    # Not through rich, which would break a long path into lines.
    if file.exists():
        typer.echo(f"kept in {file}")
    else:
        typer.echo(f"graphwright: the figures are not kept: {file} cannot be written", err=True)


def figures(target: Target) -> Iterator[tuple[str, str, str]]:
    """What is known of a machine, as ``(figure, value with its unit, source)``."""

    def source(name: str) -> str:
        return str(target.sources.get(name) or target.sources.get(f"measured.{name}", "measured"))

    yield "memory", quantity("bytes", target.memory_bytes), source("memory")
    yield "bandwidth", quantity("bytes_per_second", target.bandwidth), source("bandwidth")
    for size, rate in target.bandwidths:
        yield f"  of {quantity('bytes', size)}", quantity("bytes_per_second", rate), source("bandwidths")
    if target.on_chip_cache:
        yield "last-level cache", quantity("bytes", target.on_chip_cache), source("on_chip_cache")
    for dtype, rate in target.peak_flops.items():
        yield f"{dtype} peak", f"{quantity('flops', rate)}/s", source(f"peak_flops.{dtype}")
    for name, curve in target.curves.items():
        kernel = name.replace(".", " in ")
        yield f"{kernel}, skinny", quantity("bytes_per_second", 1 / curve[0][1]), source(name)
        fastest = max(intensity / per_byte for intensity, per_byte in curve)
        yield f"{kernel}, most", f"{quantity('flops', fastest)}/s", source(name)
    for dtype, rate in target.activation_rates.items():
        yield f"between kernels in {dtype}", quantity("bytes_per_second", rate), source(dtype)
    yield "launch overhead", quantity("seconds", target.launch_overhead), source("launch_overhead")
    for name, seconds in target.launches.items():
        yield f"  of {name.replace('.', ' in ')}", quantity("seconds", seconds), source(name)
    for name, reached in target.measured.items():
        yield name.replace("_", " "), quantity("fraction", reached), source(name)
