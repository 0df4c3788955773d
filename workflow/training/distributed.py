"""The processes of one run, as `torchrun` starts them; without it there is one.

They work on slices of the same batch. The main process, rank 0, is the only one that writes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from workflow.errors import LostProcessError, WorkflowError

LOST = ("gloo", "nccl", "connect")  # words in torch's error when a process has gone


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


def start(supported: bool) -> None:
    """Joins the processes of `torchrun`, if any; only the main one prints.

    supported: whether the command can run in several. Raises WorkflowError if not.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if not supported:
        what = "torchrun has started several processes"
        fix = "start it with python; only train and resume run in several"
        raise WorkflowError("this command", what, fix)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(minutes=30)  # of the others, while the main process validates and saves
    with translate_errors():
        dist.init_process_group(backend, timeout=wait)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")


def end() -> None:
    """Leaves together with the other processes, if any, once everything is written."""
    if dist.is_initialized():
        with suppress(LostProcessError):  # it left a moment earlier
            all_reduce_max(0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # in a usual exit a thread of gloo's can abort, and torchrun reports failure


@contextmanager
def translate_errors() -> Iterator[None]:
    """torch's error about a process that is gone becomes one line."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error).lower() for word in LOST):
            raise
        what = "another process of this run has ended"
        fix = "start the same command again: it continues from the newest checkpoint"
        raise LostProcessError(f"process {rank()}", what, fix) from error


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block, then the others: they read what it has written."""
    if not is_main_process():
        all_reduce_max(0)  # waits for the main process
    yield
    if is_main_process():
        all_reduce_max(0)
    all_reduce_max(0)  # nobody leaves before all are done


def all_reduce_max(number: int) -> int:
    """The largest of all processes' numbers. Waits for the processes, not for their GPUs."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    with translate_errors():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over all processes."""
    if world_size() > 1:
        with translate_errors():
            dist.all_reduce(values)
        values /= world_size()
    return values
