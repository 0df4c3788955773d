"""A command in its terminal: results and notes, closed pipes, encodings, stop signals, stdin."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from workflow.errors import DiskError, WorkflowError, one_line_errors

CLOSED_PIPE = 141  # exit code, as of programs that SIGPIPE ends
PIPE_ERRORS = (errno.EPIPE, errno.EINVAL)  # the second: Windows


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled like Ctrl-C, but with another exit code."""

    def __init__(self, number: int):
        self.exit_code = 128 + number


def stop_signals() -> list[int]:
    """SIGTERM and, where it exists, SIGHUP; without those that are ignored, as `nohup` does."""
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    return [n for n in numbers if n is not None and signal.getsignal(n) != signal.SIG_IGN]


def raise_on_signals() -> None:
    """Makes stop signals exceptions: `finally` blocks then save and clean up, as after Ctrl-C."""

    def handler(number: int, _) -> None:
        raise Stopped(number)

    for number in stop_signals():
        signal.signal(number, handler)


class Output:
    """stdout or stderr of a command. Writing never raises: a run is not lost because of it.

    Characters that the encoding lacks are replaced. After the first error, nothing is written.
    stops: if the reader has ended, as `head` does, this process gets SIGTERM: a run then saves.
    """

    def __init__(self, stream: TextIO | None, stops: bool = False):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        self.stops, self.error = stops, None
        self.stream.reconfigure(errors="replace", line_buffering=True)  # a log can be followed

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @property
    def closed_pipe(self) -> bool:
        return getattr(self.error, "errno", None) in PIPE_ERRORS

    def check(self) -> None:
        """Raises DiskError if results were lost, for example because the disk is full."""
        self.flush()
        if self.error and not self.closed_pipe:
            raise DiskError("stdout", f"it cannot be written ({self.error})", "free disk space")

    def _try(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.error = self.error or error
            if isinstance(error, OSError):
                # what the stream still holds is lost, and the end of Python raises no error
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            if self.stops and self.closed_pipe:
                self.stops = False
                signal.raise_signal(signal.SIGTERM)


def open_standard_streams() -> None:
    """Opens closed ones (`>&-`) as the null device: else the next file would become stdout."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def read_prompt() -> str:
    """The text on stdin, without a byte order mark and the last newline; lines end in newlines."""
    if sys.stdin is None:
        raise WorkflowError("stdin", "it is closed", "give PROMPT, or a text on stdin")
    sys.stdin.reconfigure(encoding="utf-8-sig", newline=None)
    with one_line_errors("stdin", "give the prompt as UTF-8"):
        return sys.stdin.read().removesuffix("\n")
