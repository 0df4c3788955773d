"""What surrounds the model in `SmolLm3.py`: a module for each noun of the story."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class WorkflowError(Exception):
    """Something the user can mend, in one line: WHERE: WHAT is wrong; DO this.

    `main.py` prints it and leaves with `exit_code`; in the notebook it is the exception's message.
    """

    exit_code = 2  # bad input or configuration

    def __init__(self, where: object, what: str, do: str):
        super().__init__(f"{where}: {what}; {do}")


@contextmanager
def refused(where: object, do: str) -> Iterator[None]:
    """What the model or the tokenizer refuses (ValueError, TypeError), as one line for the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise WorkflowError(where, str(error), do) from error


def weights_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """The identity of a set of weights: over names, dtypes, shapes and values, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
