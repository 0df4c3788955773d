"""Loss and perplexity with their protocol, and the loss of a model that knows only word counts."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from workflow.analysis.states import hidden

TOKENS_AT_ONCE = 4096  # in one forward
LOGITS_AT_ONCE = 1024  # rows of 49152 floats each: 200 MB


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token, the mean over the `tokens` that were scored; protocol: in words.

    The figures per word and byte compare across tokenizers; they are NaN if there is no text.
    """

    tokens: int
    loss: float
    perplexity: float
    word_perplexity: float  # words are separated by white space
    bits_per_byte: float
    protocol: str

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}, perplexity {self.perplexity:.4f}, word perplexity "
        figures += f"{self.word_perplexity:.4f}, {self.bits_per_byte:.4f} bits a byte"
        return f"{figures} over {self.tokens} tokens ({self.protocol})"


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: np.ndarray, window: int, stride: int | None = None, text: str = ""
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
    ids = torch.tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)
    bar = {"desc": "Evaluating", "unit": "batch", "delay": 2, "leave": False, "file": sys.stdout}
    total, scored = 0.0, 0
    for batch, new in tqdm(list(windows(ids, window, stride)), **bar):
        states = hidden(model, batch[:, :-1])[:, -new:].flatten(0, 1)
        targets = batch[:, -new:].flatten()
        for x, y in zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE)):
            total += F.cross_entropy(model.lm_head(x).float(), y, reduction="sum").item()
        scored += len(targets)
    loss, protocol = total / scored, f"windows of {window} tokens every {stride}"
    by_word = loss * len(ids) / (len(text.split()) or math.nan)
    bits = loss / math.log(2) * len(ids) / (len(text.encode()) or math.nan)
    # torch, because a text without white space is one long word: infinite, where math.exp raises
    perplexities = torch.tensor([loss, by_word], dtype=torch.float64).exp().tolist()
    return Evaluation(scored, loss, *perplexities, bits, protocol)


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


def compare_models(
    models: Mapping[str, nn.Module], texts: Mapping[str, np.ndarray], tokenizer, window: int
):
    """Evaluates every model on every text (token ids): a dict of Evaluation, and a DataFrame.

    tokenizer: from transformers, to count words and bytes. Both results are indexed by text, model.
    """
    import pandas as pd  # 0.5 s that `evaluate` does not need

    results = {
        (text, name): evaluate(model, ids, window, text=tokenizer.decode(ids))
        for text, ids in texts.items()
        for name, model in models.items()
    }
    index = pd.MultiIndex.from_tuples(results, names=["text", "model"])
    table = pd.DataFrame(results.values(), index)
    return results, table.assign(**table.select_dtypes("float").map("{:.5g}".format))


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Nats per token on `held_out`, from the word counts of `train` with 0.05 added to each."""
    counts = np.bincount(train, minlength=vocabulary) + 0.05
    return float(-np.log(counts / counts.sum())[held_out].mean())
