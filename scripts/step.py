"""Run one set-up command with a progress line, and show its output only when it fails.

Usage: python3 scripts/step.py "what is being done" -- COMMAND [ARGUMENT ...]

Standard library only: it runs before anything is installed. On a terminal a line with the elapsed
time is redrawn; elsewhere (CI) one plain line is printed when the step starts, every 30 seconds, and
when it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

REDRAW_SECONDS = 0.2
PLAIN_LINE_SECONDS = 30.0
SPINNER = "|/-\\"


def run_step(title: str, command: list[str]) -> int:
    """Run ``command`` under a progress line; return its exit status."""
    interactive = sys.stderr.isatty()
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _wait(process, title, started, interactive)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            print(f"\n{title}: interrupted", file=sys.stderr)
            return 130
        seconds = time.monotonic() - started
        outcome = "done" if process.returncode == 0 else f"FAILED (exit {process.returncode})"
        _line(f"{title}: {outcome} in {seconds:.0f} s", interactive, end="\n")
        if process.returncode != 0:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            print(f"command: {' '.join(command)}", file=sys.stderr)
    return process.returncode


def _wait(process: subprocess.Popen[bytes], title: str, started: float, interactive: bool) -> None:
    if not interactive:
        _line(f"{title} ...", interactive, end="\n")
    next_plain, frame = PLAIN_LINE_SECONDS, 0
    while True:
        try:
            process.wait(timeout=REDRAW_SECONDS)
            return
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - started
        if interactive:
            frame += 1
            _line(f"{SPINNER[frame % len(SPINNER)]} {title} ... {seconds:.0f} s", interactive, end="")
        elif seconds >= next_plain:
            next_plain += PLAIN_LINE_SECONDS
            _line(f"{title} ... {seconds:.0f} s", interactive, end="\n")


def _line(text: str, interactive: bool, *, end: str) -> None:
    clear = "\r\x1b[K" if interactive else ""
    print(f"{clear}{text}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(run_step(sys.argv[1], sys.argv[3:]))
