"""Tokens become batches. A batch is a pure function of (seed, step): a resume needs only the step.

B: sequences a batch. T: tokens a sequence.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def batch_at(
    tokens: np.ndarray, step: int, batch_size: int, sequence_length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of update `step` (0, 1, …), int64 (B, T): targets are shifted by one.

    The epochs follow each other in one endless stream, which is cut every T tokens. The sequences
    that start in the same epoch are shuffled among themselves. So each token is an input once an
    epoch, and nothing is padded or dropped.
    """
    sequences = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    epochs = sequences * sequence_length // len(tokens)
    for epoch in np.unique(epochs).tolist():
        # the first sequence that starts in this epoch, and in the next
        first, after = (-(-e * len(tokens) // sequence_length) for e in (epoch, epoch + 1))
        order = shuffled(after - first, seed, epoch)
        here = epochs == epoch
        sequences[here] = first + order[sequences[here] - first]
    return inputs_and_targets(tokens, sequences * sequence_length, sequence_length)


@lru_cache(maxsize=2)  # a million sequences take 0.1 s
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def validation_batches(
    tokens: np.ndarray, max_tokens: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `max_tokens` in order, as inputs and targets; the last batch may be smaller."""
    count = min(max_tokens, len(tokens) - 1) // sequence_length
    starts = np.arange(count) * sequence_length
    for first in range(0, count, batch_size):
        yield inputs_and_targets(tokens, starts[first : first + batch_size], sequence_length)


def inputs_and_targets(
    tokens: np.ndarray, starts: np.ndarray, sequence_length: int
) -> tuple[Tensor, Tensor]:
    """The sequences (B, T) at `starts`; after the last token comes the first again."""
    positions = (starts[:, None] + np.arange(sequence_length + 1)) % len(tokens)  # (B, T + 1)
    rows = torch.from_numpy(tokens[positions].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
