"""Errors that the user can fix: one line each, with the exit code of `main.py`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class WorkflowError(Exception):
    """An error that the user can fix. Its message is `WHERE: WHAT is wrong; HOW to fix it`.

    `main.py` prints the message and exits with `exit_code`.
    """

    exit_code = 2  # bad input, configuration or environment

    def __init__(self, where: object, what: str, fix: str):
        message = f"{where}: {what}; {fix}"  # a key or a name can contain a newline
        super().__init__(" ".join(message.splitlines()))
        self.where, self.what = where, what


class ConfigError(WorkflowError):
    """A setting is missing, unknown or invalid."""


class DataError(WorkflowError):
    """A text cannot be read, or cannot be used for training."""


class LostProcessError(WorkflowError):
    exit_code = 1  # another process of a distributed run stopped


class CheckpointError(WorkflowError):
    exit_code = 3  # damaged, from another program, or from another run


class DamagedError(CheckpointError):
    """The checkpoint file changed after it was written. An older checkpoint can be used."""


class MissingError(CheckpointError):
    """There is no checkpoint with this name: a wrong word, not a wrong file."""

    exit_code = 2


class ForeignError(CheckpointError):
    """A valid torch file from another program. `weights`: the weights in it, or None."""

    weights: Mapping[str, Any] | None = None


class NonFiniteError(WorkflowError):
    exit_code = 4  # the loss or the gradient is NaN or infinite


class SourceError(WorkflowError):
    exit_code = 5  # the reference or the data set is not available


class DiskError(WorkflowError):
    exit_code = 6  # the disk is full, or writing is not allowed


class BusyError(WorkflowError):
    exit_code = 7  # another process uses this folder


@contextmanager
def one_line_errors(where: object, fix: str) -> Iterator[None]:
    """Turns a ValueError or TypeError of the model or a library into a WorkflowError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise WorkflowError(where, str(error), fix) from error
