"""The processes of one run, as `torchrun` starts them; without it, there is one.

They work on slices of the same batch. The first, rank 0, alone writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from workflow.errors import LostProcessError, WorkflowError

TIMEOUT = timedelta(minutes=30)  # the others wait while the first validates, samples and saves

LOST = ("gloo", "nccl", "connect")  # in what torch then says


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def start(able: bool) -> None:
    """Joins the processes that `torchrun` has started, if it has. Only the first prints.

    Raises WorkflowError where that is more than one, and the command is not `able` to be shared.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if not able:
        what = "torchrun has started several processes"
        raise WorkflowError("this command", what, "start it with python; train and resume share")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with told():
        dist.init_process_group(backend, timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")


def end() -> None:
    """Leaves together with the others, if there are any, when all work is done and written.

    At once: where the interpreter is taken down first, a thread of gloo's now and then aborts it,
    and torchrun takes the run for failed.
    """
    if dist.is_initialized():
        with suppress(LostProcessError):  # gone a moment before
            barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def told() -> Iterator[None]:
    """What torch says of a process that is gone, as one line."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error).lower() for word in LOST):
            raise
        do = "start the same command again: it goes on from the newest checkpoint"
        raise LostProcessError(
            f"process {rank()}", "another process of this run has ended", do
        ) from error


@contextmanager
def first_first() -> Iterator[None]:
    """The first process goes through, then the others: what it has written, they read."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()
    barrier()


def barrier() -> None:
    agreed(0)


def agreed(number: int) -> int:
    """The largest of all processes' numbers. Waits for the processes, not for their GPUs."""
    if count() == 1:
        return number
    largest = torch.tensor(number)
    with told():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def averaged(values: torch.Tensor) -> torch.Tensor:
    """The mean over all processes."""
    if count() > 1:
        with told():
            dist.all_reduce(values)
        values /= count()
    return values
