"""Progress: silent for short steps, one line for long ones, times recorded either way."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from graphwright.optimizer.progress import Progress


def make_console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_short_step_prints_nothing(terminal: bool) -> None:
    console = make_console(terminal=terminal)
    progress = Progress(console)
    with progress.step("capturing the graph"):
        pass
    assert written(console) == ""
    assert list(progress.seconds) == ["capturing the graph"]


def test_a_long_step_prints_one_plain_line_off_a_terminal() -> None:
    console = make_console(terminal=False)
    progress = Progress(console, quiet_seconds=0.0)
    with progress.step("lowering [1/2]"):
        pass
    assert written(console).count("\n") == 1
    assert written(console).startswith("graphwright: lowering [1/2]: ")


def test_a_long_step_draws_on_a_terminal_and_cleans_up() -> None:
    console = make_console(terminal=True)
    progress = Progress(console, quiet_seconds=0.01)
    with progress.step("outer"), progress.step("inner", total=2) as bar:
        time.sleep(0.2)
        bar.advance()
    assert "outer" in written(console) and "inner" in written(console)
    assert progress._live is None
    assert written(console).rstrip().splitlines()[-1].startswith("graphwright: outer: ")


def test_times_add_up_and_survive_errors() -> None:
    progress = Progress(make_console(terminal=False))
    with progress.step("check"):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="boom"), progress.step("check"):
        time.sleep(0.01)
        raise ValueError("boom")
    assert progress.seconds["check"] >= 0.02


def test_disabled_is_silent_and_still_records() -> None:
    console = make_console(terminal=True)
    progress = Progress(console, quiet_seconds=0.0, enabled=False)
    with progress.step("quiet"):
        pass
    assert written(console) == "" and "quiet" in progress.seconds
