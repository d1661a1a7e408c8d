"""Who may use a program: one call at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from graphwright.ir.errors import ProgramBusyError


class ProgramLock:
    """Serves calls from several threads one after the other and refuses a call from inside a call.

    A second thread waits: two calls are never mixed. The thread that already holds the program (it
    called ``generate`` or ``forward`` inside a streamer, a criterion or a logits processor) would wait
    for itself for ever, so it gets a :class:`~graphwright.ir.errors.ProgramBusyError` instead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @staticmethod
    def of(program: Any) -> ProgramLock:
        """The one lock of ``program``, however many objects share it."""
        with _REGISTRY_LOCK:
            return _LOCKS.setdefault(program, ProgramLock())

    @contextmanager
    def hold(self, call: str) -> Iterator[None]:
        """Hold the program for one call; released however the call ends."""
        me = threading.get_ident()
        if self._owner == me:
            raise ProgramBusyError(
                f"{call} was called while this program is already running in the same thread",
                where=f"OptimizedModel.{call}",
                hint="do not call the program from its own streamer, stopping criterion or logits "
                "processor; optimize the model a second time if two must run nested",
            )
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None


@contextmanager
def hold_all(call: str, *programs: Any) -> Iterator[None]:
    """Hold several programs for one call; always taken in one order, so that calls do not wait in a ring."""
    with ExitStack() as held:
        for program in sorted(set(programs), key=id):
            held.enter_context(ProgramLock.of(program).hold(call))
        yield


_REGISTRY_LOCK = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[Any, ProgramLock] = weakref.WeakKeyDictionary()
