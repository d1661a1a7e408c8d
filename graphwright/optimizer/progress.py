"""Progress on standard error: silent for short steps, a live line with elapsed time for long ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Live

QUIET_SECONDS = 2.0


class Step:
    """A running step; long loops report how far they are."""

    def __init__(self, title: str, total: float | None) -> None:
        self.title, self.total, self.completed = title, total, 0.0
        self.shown: TaskID | None = None
        self._live: Live | None = None

    def advance(self, amount: float = 1.0) -> None:
        """Say that ``amount`` of ``total`` more is done."""
        self.completed += amount
        if self._live is not None and self.shown is not None:
            self._live.update(self.shown, completed=self.completed)


class Progress:
    """Times named steps, and shows those that last longer than two seconds.

    On a terminal a spinner (a bar, if the step has a total) with the elapsed time appears after two
    seconds and is replaced by one plain line at the end. Elsewhere only that line is printed.

    Args:
        console: where to draw; standard error by default.
        quiet_seconds: steps shorter than this leave no trace.
        enabled: False records the times and never prints.

    Attributes:
        seconds: how long each step took, by title; a title that ran twice adds up.
    """

    def __init__(
        self, console: Console | None = None, *, quiet_seconds: float = QUIET_SECONDS, enabled: bool = True
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console or Console(stderr=True)
        self._quiet_seconds = quiet_seconds
        self._enabled = enabled
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._open = 0

    @contextmanager
    def step(self, title: str, total: float | None = None) -> Iterator[Step]:
        """Time the body under ``title``; steps may nest.

        Args:
            title: what is being done, e.g. ``"capturing the graph"``.
            total: how many times the body will call ``advance()``; None if that is unknown.
        """
        step = Step(title, total)
        timer: threading.Timer | None = None
        if self._enabled and self._console.is_terminal:
            timer = threading.Timer(self._quiet_seconds, self._show, (step,))
            timer.daemon = True
            timer.start()
        started = time.perf_counter()
        try:
            yield step
        finally:
            elapsed = time.perf_counter() - started
            if timer is not None:
                timer.cancel()
                timer.join()  # a timer that just fired has drawn the step before it is taken away
            self._hide(step)
            self.seconds[title] = self.seconds.get(title, 0.0) + elapsed
            if self._enabled and elapsed >= self._quiet_seconds:
                self._console.print(f"graphwright: {title}: {elapsed:.1f} s", markup=False, highlight=False)

    def _show(self, step: Step) -> None:
        with self._lock:
            if self._live is None:
                # Redirecting stdout would send what the program prints to standard error.
                columns = (
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(40),
                    TimeElapsedColumn(),
                )
                self._live = Live(*columns, console=self._console, transient=True, redirect_stdout=False)
                self._live.start()
            self._open += 1
            step._live = self._live
            step.shown = self._live.add_task(step.title, total=step.total, completed=int(step.completed))
            task = self._live.tasks[-1]
            task.start_time = (task.start_time or task.get_time()) - self._quiet_seconds

    def _hide(self, step: Step) -> None:
        with self._lock:
            if self._live is None or step.shown is None:
                return
            self._live.remove_task(step.shown)
            step.shown = step._live = None
            self._open -= 1
            if not self._open:
                self._live.stop()
                self._live = None


_DEFAULT = threading.local()


@contextmanager
def step(title: str, total: float | None = None) -> Iterator[Step]:
    """:meth:`Progress.step` on this thread's own :class:`Progress`, for code that was not handed one."""
    if not hasattr(_DEFAULT, "progress"):
        _DEFAULT.progress = Progress()
    with _DEFAULT.progress.step(title, total) as running:
        yield running
