"""Training with several processes, started by `torchrun`; without it there is one process.

Each process gets a slice of the same batch. Only the main process, rank 0, writes files.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from workflow.errors import LostProcessError, WorkflowError

LOST_PROCESS_WORDS = ("gloo", "nccl", "connect")  # in torch's error when a process has ended


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process: with several processes, each has its own GPU."""
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def start(supported: bool) -> None:
    """Connects the processes of `torchrun`, if any. Only the main process prints from then on.

    supported: whether the command can run in several processes. Raises WorkflowError if not.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if not supported:
        what = "torchrun has started several processes"
        fix = "start it with python; only train and resume can use several"
        raise WorkflowError("this command", what, fix)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(minutes=30)  # the others wait while the main process validates and saves
    with translate_errors():
        dist.init_process_group(backend, timeout=wait)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def end() -> None:
    """Ends all processes together, if there are several, after everything is written."""
    if dist.is_initialized():
        with suppress(LostProcessError):  # another process ended a moment earlier
            all_reduce_max(0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # in a normal exit a thread of gloo can abort, and torchrun reports a failure


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns torch's error about a lost process into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(
            word in str(error).lower() for word in LOST_PROCESS_WORDS
        ):
            raise
        what = "another process of this run has ended"
        fix = "start the same command again: it continues from the newest checkpoint"
        raise LostProcessError(f"process {rank()}", what, fix) from error


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block, then the others do: they read what it has written."""
    if not is_main_process():
        all_reduce_max(0)  # waits for the main process
    yield
    if is_main_process():
        all_reduce_max(0)
    all_reduce_max(0)  # all processes leave together


def all_reduce_max(number: int) -> int:
    """The largest of the numbers that the processes give. Does not wait for their GPUs."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    with translate_errors():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over all processes; changes `values` in place."""
    if world_size() > 1:
        with translate_errors():
            dist.all_reduce(values)
        values /= world_size()
    return values
