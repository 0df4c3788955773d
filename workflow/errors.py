"""What the user can fix, each in one line, with the exit code of `main.py`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class WorkflowError(Exception):
    """Something the user can fix, in one line: WHERE: WHAT is wrong; HOW to fix it.

    `main.py` prints it and leaves with `exit_code`; in the notebook it is the exception's message.
    """

    exit_code = 2  # bad input, configuration or environment

    def __init__(self, where: object, what: str, fix: str):
        message = f"{where}: {what}; {fix}"  # a key or a name can hold a newline
        super().__init__(" ".join(message.splitlines()))
        self.where, self.what = where, what


class ConfigError(WorkflowError):
    """The configuration cannot be used."""


class DataError(WorkflowError):
    """The text cannot be trained on."""


class LostProcessError(WorkflowError):
    exit_code = 1  # another process of a distributed run has ended


class CheckpointError(WorkflowError):
    exit_code = 3  # the checkpoint is damaged, foreign, or not of this run


class DamagedError(CheckpointError):
    """The file is not what was once written: an older one may be loaded instead."""


class ForeignError(CheckpointError):
    """A valid torch file of another program. `weights` are those in it, or None."""

    weights: Mapping[str, Any] | None = None


class NonFiniteError(WorkflowError):
    exit_code = 4  # the loss or the gradient is NaN or infinite


class SourceError(WorkflowError):
    exit_code = 5  # the reference or the data set is not available


class DiskError(WorkflowError):
    exit_code = 6  # there is not enough room, or no permission


class BusyError(WorkflowError):
    exit_code = 7  # another process uses this folder


@contextmanager
def one_line_errors(where: object, fix: str) -> Iterator[None]:
    """What the model or the tokenizer refuses (ValueError, TypeError) becomes a WorkflowError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise WorkflowError(where, str(error), fix) from error
