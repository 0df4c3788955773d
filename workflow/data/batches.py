"""Batches. Each is a pure function of (seed, step), so a resume needs only the step.

B: sequences per batch. T: tokens per sequence.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def batch_at(
    tokens: np.ndarray, step: int, batch_size: int, sequence_length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of training step `step` (0, 1, …), both int64 (B, T).

    Targets are the inputs shifted by one token. The epochs form one endless stream, which is cut
    into sequences of T tokens. Sequences that start in the same epoch are shuffled. Each token is
    an input once per epoch; no token is dropped, and there is no padding.
    """
    sequences = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    epochs = sequences * sequence_length // len(tokens)
    for epoch in np.unique(epochs).tolist():
        # the first sequence that starts in this epoch, and the first one in the next epoch
        first, end = (-(-e * len(tokens) // sequence_length) for e in (epoch, epoch + 1))
        order = epoch_order(end - first, seed, epoch)
        mask = epochs == epoch
        sequences[mask] = first + order[sequences[mask] - first]
    return inputs_and_targets(tokens, sequences * sequence_length, sequence_length)


@lru_cache(maxsize=2)  # shuffling a million sequences takes 0.1 s
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def validation_batches(
    tokens: np.ndarray, max_tokens: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the first `max_tokens` tokens, in order. The last batch may be smaller."""
    count = min(max_tokens, len(tokens) - 1) // sequence_length
    starts = np.arange(count) * sequence_length
    for first in range(0, count, batch_size):
        yield inputs_and_targets(tokens, starts[first : first + batch_size], sequence_length)


def inputs_and_targets(
    tokens: np.ndarray, starts: np.ndarray, sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) at `starts`. After the last token, the first one follows."""
    positions = (starts[:, None] + np.arange(sequence_length + 1)) % len(tokens)  # (B, T + 1)
    rows = torch.from_numpy(tokens[positions].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
