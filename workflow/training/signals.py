"""Ctrl-C and SIGTERM: the first signal waits for a safe point, the second acts at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from workflow.training import distributed


class Terminated(KeyboardInterrupt):
    exit_code = 143  # SIGTERM is handled like Ctrl-C, but main.py has another exit code for it


def raise_on_sigterm() -> None:
    """Makes SIGTERM an exception: `finally` blocks then save and clean up, as after Ctrl-C."""

    def handler(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def deferred_signals() -> Iterator[Callable[..., None]]:
    """Lets Ctrl-C and SIGTERM wait until the block calls the function `safe_point(before)`.

    After a signal, `safe_point` calls `before` (for example: save), then raises as the signal would
    have. All processes of a run stop at the same step. A second signal acts at once. In other
    threads than the main one, signals are not deferred.
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
        if number := distributed.all_reduce_max(received[0] if received else 0):
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
