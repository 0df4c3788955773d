"""What surrounds the model in `SmolLm3.py`: a module for each noun of the story."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

OLDEST_TORCH = (2, 10)


class WorkflowError(Exception):
    """Something the user can mend, in one line: WHERE: WHAT is wrong; DO this.

    `main.py` prints it and leaves with `exit_code`; in the notebook it is the exception's message.
    """

    exit_code = 2  # bad input or configuration

    def __init__(self, where: object, what: str, do: str):
        message = f"{where}: {what}; {do}"  # a key or a name can hold a line's end
        super().__init__(" ".join(message.splitlines()))
        self.where, self.what = where, what


@contextmanager
def refused(where: object, do: str) -> Iterator[None]:
    """What the model or the tokenizer refuses (ValueError, TypeError), as one line for the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise WorkflowError(where, str(error), do) from error


def check_torch(version: str = torch.__version__) -> None:
    """Raises WorkflowError for a torch that could be harmed by a file that it loads."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        hole = "below 2.10 its loader can be made to run a file's code (CVE-2026-24747)"
        raise WorkflowError(f"torch {version}", hole, "type: pip install torch==2.13.0")


def sha256_of(values: Iterable[tuple[str, Any]]) -> str:
    """One hash over names with values; of a tensor, over its dtype, shape and every byte."""
    digest = hashlib.sha256()
    for name, value in values:
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def weights_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """The identity of a set of weights, whatever their order."""
    return sha256_of(sorted(tensors.items()))
