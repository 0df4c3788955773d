"""Loss and perplexity with their protocol, and the loss of a model that knows only word counts."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from workflow.analysis.states import hidden

if TYPE_CHECKING:
    import pandas as pd

TOKENS_AT_ONCE = 4096  # in one forward
LOGITS_AT_ONCE = 1024  # rows of 49152 floats each: 200 MB


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token, the mean over the `tokens` that were scored; protocol: in words.

    words, bytes: how many of them the text has per token; 0 if the text was not given.
    """

    loss: float
    tokens: int
    protocol: str
    words: float = 0.0
    bytes: float = 0.0

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Words are separated by white space. Like bytes, they compare across tokenizers."""
        return exp(self.loss / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes if self.bytes else math.nan

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}, perplexity {self.perplexity:.4f}"
        if self.words and self.bytes:
            figures += f", word perplexity {self.word_perplexity:.4f}"
            figures += f", {self.bits_per_byte:.4f} bits a byte"
        return f"{figures} over {self.tokens} tokens ({self.protocol})"


def exp(nats: float) -> float:
    """Infinite where a float cannot hold it: a text without white space is one long word."""
    return math.exp(nats) if nats < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    window: int = 1024,
    stride: int | None = None,
    text: str = "",
) -> Evaluation:
    """Scores token ids (N,) in windows of `window` that start every `stride` (default: window).

    Each token is scored once, with the most context that a window gives it; the first of a window
    without overlap has none and is not scored. A last, shorter window is scored too.
    model: a `LlamaModel` or the Llama of transformers. text: that of `tokens`, for the figures per
    word and byte. Raises ValueError for a stride or tokens that do not fit.
    Follows huggingface.co/docs/transformers/perplexity.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and window {window}")
    if (most := min(window, len(tokens))) < 2:
        raise ValueError(f"{most} tokens are too few to score one")
    ids, total, scored = torch.from_numpy(np.array(tokens, dtype=np.int64)), 0.0, 0
    bar = {"total": len(ids), "unit": "token", "delay": 2, "leave": False, "file": sys.stdout}
    with tqdm(desc="Evaluating", **bar) as progress:
        for batch, new in windows(ids, window, stride):
            total += summed_loss(model, batch, new)
            scored += new * len(batch)
            progress.update(new * len(batch))
    rates = (len(text.split()) / len(ids), len(text.encode()) / len(ids))
    return Evaluation(total / scored, scored, f"windows of {window} tokens every {stride}", *rates)


def windows(ids: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Batches (B, T) of windows over ids (N,), and how many tokens at each one's end to score."""
    size, window = max(TOKENS_AT_ONCE // window, 1), min(window, len(ids))
    full = ids.unfold(0, window, stride)
    if overlap := stride < window:  # the first has more to score than those after it
        yield full[:1], window - 1
    for first in range(int(overlap), len(full), size):
        yield full[first : first + size], min(stride, window - 1)
    rest, left = ids[len(full) * stride :], len(ids) - (len(full) - 1) * stride - window
    if (new := min(left, len(rest) - 1)) > 0:
        yield rest[None], new


def summed_loss(model: nn.Module, ids: Tensor, new: int) -> float:
    """The nats of the last `new` tokens of each row of ids (B, T), LOGITS_AT_ONCE at a time."""
    ids = ids.to(next(model.parameters()).device)
    states = hidden(model, ids[:, :-1])[:, -new:].flatten(0, 1)
    parts = zip(states.split(LOGITS_AT_ONCE), ids[:, -new:].flatten().split(LOGITS_AT_ONCE))
    losses = (F.cross_entropy(model.lm_head(x).float(), y, reduction="sum") for x, y in parts)
    return sum(loss.item() for loss in losses)


def compare_models(
    models: Mapping[str, nn.Module], texts: Mapping[str, np.ndarray], tokenizer, window: int
) -> tuple[dict[tuple[str, str], Evaluation], pd.DataFrame]:
    """Evaluates every model on every text (token ids), and shows the figures and their protocol.

    tokenizer: from transformers, to count words and bytes. Both results are indexed by text, model.
    """
    import pandas as pd  # 0.5 s that `evaluate` does not need

    results = {
        (text, name): evaluate(model, ids, window, text=tokenizer.decode(ids))
        for (text, ids), (name, model) in itertools.product(texts.items(), models.items())
    }
    columns = ["loss", "perplexity", "word_perplexity", "bits_per_byte"]
    rows = [
        (result.tokens, *(f"{getattr(result, name):.5g}" for name in columns), result.protocol)
        for result in results.values()
    ]
    index = pd.MultiIndex.from_tuples(results, names=["text", "model"])
    return results, pd.DataFrame(rows, index, ["tokens", *columns, "protocol"])


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Nats per token on `held_out`, from the word counts of `train` with 0.05 added to each."""
    counts = np.bincount(train, minlength=vocabulary) + 0.05
    return float(-np.log(counts / counts.sum())[held_out].mean())
