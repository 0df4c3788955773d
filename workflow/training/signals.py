"""Ctrl-C and SIGTERM: the first waits for a safe point, the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is; main.py leaves with another exit code."""

    exit_code = 143


def raise_on_sigterm() -> None:
    """So that what must be saved or removed is, when the process is asked to end."""

    def handler(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def deferred(agreed: Callable[[int], int] = int) -> Iterator[Callable[..., None]]:
    """Signals wait for `safe_point(before)`, which is yielded: nothing is half made or recorded.

    It calls `before`, if given, then acts as the signal would have. A second signal acts at once.
    agreed: of several processes, makes the number of a signal that one has met known to all.
    Outside the main thread, where none arrives, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda before=None: None
        return
    waiting: list[int] = []

    def wait(number: int, frame) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            usual[number](number, frame)

    def safe_point(before: Callable[[], None] | None = None) -> None:
        if number := agreed(waiting[0] if waiting else 0):
            if before:
                before()
            usual[number](number, None)

    numbers = (signal.SIGINT, signal.SIGTERM)
    usual = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    for number in usual:
        signal.signal(number, wait)
    try:
        yield safe_point
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
