"""Loss and perplexity with their protocol, and the loss of a model that knows only word counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a token, mean over the `tokens` that were scored; protocol: how, in words."""

    loss: float
    tokens: int
    protocol: str

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}, perplexity {self.perplexity:.4f}"
        return f"{figures} over {self.tokens} tokens ({self.protocol})"


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: np.ndarray, window: int = 1024, stride: int | None = None
) -> Evaluation:
    """Scores token ids (N,) in windows of `window` that start every `stride` (default: window).

    Each token is scored once, with the most context that a window gives it; the first of the first
    window has none and is not scored. Without overlap this holds for the first of every window. A
    last part shorter than a window is scored too. `model` maps ids (1, T) to logits (1, T, V).
    Follows huggingface.co/docs/transformers/perplexity.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and window {window}")
    device = next(model.parameters()).device
    total, scored, done = 0.0, 0, 0  # `done`: targets before this place are scored
    for start in range(0, max(len(tokens) - 1, 1), stride):
        ids = torch.tensor(
            np.asarray(tokens[start : start + window], dtype=np.int64), device=device
        )
        fresh = len(ids) - max(done - start, 1)  # targets that no window before has scored
        if fresh > 0:
            logits = model(ids[None, :-1])[0, -fresh:]
            total += F.cross_entropy(logits.float(), ids[-fresh:], reduction="sum").item()
            scored += fresh
        done = start + len(ids)
        if done >= len(tokens):
            break
    if scored == 0:
        raise ValueError(f"{len(tokens)} tokens are too few to score one")
    return Evaluation(total / scored, scored, f"windows of {window} tokens every {stride}")


def unigram_loss(
    train: np.ndarray, held_out: np.ndarray, vocabulary: int, added: float = 0.05
) -> float:
    """Nats a token on `held_out`, knowing word counts of `train` with `added` to each."""
    counts = np.bincount(train, minlength=vocabulary) + added
    return float(-np.log(counts / counts.sum())[held_out].mean())
