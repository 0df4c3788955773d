"""Ctrl-C and SIGTERM: the first waits for a safe point, the second acts at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    exit_code = 143  # SIGTERM, handled like Ctrl-C, but for main.py's exit code


def raise_on_sigterm() -> None:
    """So that what must be saved or removed is, when the process is asked to end."""

    def handler(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def deferred_signals(all_reduce: Callable[[int], int] = int) -> Iterator[Callable[..., None]]:
    """Signals wait for `safe_point(before)`, which is yielded: no step stops half done.

    It calls `before`, then acts as the signal would have. A second signal acts at once. all_reduce:
    gives all processes the signal that one received. Outside the main thread, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda *_: None
        return
    received: list[int] = []

    def wait(number: int, frame) -> None:
        received.append(number)
        if len(received) > 1:
            handlers[number](number, frame)

    def safe_point(before: Callable[[], None] = lambda: None) -> None:
        if number := all_reduce(received[0] if received else 0):
            before()
            handlers[number](number, None)

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, wait)
    try:
        yield safe_point
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
