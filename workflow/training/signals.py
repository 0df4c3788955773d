"""Ctrl-C, SIGTERM and SIGHUP: the first signal waits for a safe point, the second acts at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

from workflow.training import distributed

NUMBERS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))


class DeferredSignals:
    """In its `with` block, Ctrl-C, SIGTERM and SIGHUP wait until the block calls `safe_point`.

    A second signal acts at once. A block that ends early can leave a signal waiting: the next
    `safe_point` or `raise_pending` raises it. In other threads than the main one, signals are not
    deferred.
    """

    def __init__(self):
        self.pending = 0  # the number of the signal that waits, or 0
        self._handlers: dict[int, Callable] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in NUMBERS}
            self._handlers = {n: handler for n, handler in handlers.items() if callable(handler)}
            for number in self._handlers:
                signal.signal(number, self._wait)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def safe_point(self, before: Callable[[], None] = lambda: None) -> None:
        """If a signal waits, calls `before` (for example: save), then raises as it would have.

        All processes of a run stop at the same step.
        """
        if number := distributed.all_reduce_max(self.pending):
            before()
            self._raise(number)

    def raise_pending(self) -> None:
        """Raises the signal that the block left waiting, if any."""
        if self.pending:
            self._raise(self.pending)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self._raise(number, frame)
        self.pending = number

    def _raise(self, number: int, frame: FrameType | None = None) -> None:
        self.pending = 0
        self._handlers[number](number, frame)
