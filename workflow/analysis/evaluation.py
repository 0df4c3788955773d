"""Loss and perplexity of a model on a text, and the loss of a unigram model."""

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

MAX_TOKENS = 4096  # in one forward pass
ABSURD = 1e9  # a perplexity this high says nothing more: it is not shown
MAX_LOGITS = 1024  # rows of 49152 floats at the same time: 200 MB


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token, the mean over all scored `tokens`.

    The values per word and per byte do not depend on the tokenizer. They are NaN without a text.
    """

    tokens: int
    loss: float
    perplexity: float
    word_perplexity: float  # words are separated by white space
    bits_per_byte: float
    protocol: str  # size and stride of the windows

    def __str__(self) -> str:
        values = f"loss {self.loss:.4f}, perplexity {self.perplexity:.4f}"
        if self.word_perplexity < ABSURD:
            values += f", word perplexity {self.word_perplexity:.4f}"
        values += f", {self.bits_per_byte:.4f} bits per byte"
        return f"{values} over {self.tokens} tokens ({self.protocol})"


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: np.ndarray, window: int, stride: int | None = None, text: str = ""
) -> Evaluation:
    """The loss on token ids (N,), in windows of `window` tokens that start every `stride` tokens.

    stride: by default `window`. Each token is scored once, in the window where it has the most
    context. Without overlap, the first token of a window has no context: it is not scored. The last
    window may be shorter. model: a `LlamaModel` or the Llama of transformers. text: the text of
    `tokens`, for the values per word and per byte. Raises ValueError for a wrong stride or window,
    or fewer than two tokens. Follows huggingface.co/docs/transformers/perplexity.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and window {window}")
    if window > (context := model.config.max_position_embeddings):
        raise ValueError(f"window {window} exceeds the model's context of {context}")
    if (length := min(window, len(tokens))) < 2:
        raise ValueError(f"the window has {length} tokens, it needs 2 or more")
    ids = torch.tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)
    bar = {"desc": "Evaluating", "unit": "batch", "delay": 2, "leave": False, "file": sys.stdout}
    total, scored = 0.0, 0
    for batch, new in tqdm(list(windows(ids, window, stride)), **bar):
        states = hidden(model, batch[:, :-1])[:, -new:].flatten(0, 1)
        targets = batch[:, -new:].flatten()
        for x, y in zip(states.split(MAX_LOGITS), targets.split(MAX_LOGITS)):
            total += F.cross_entropy(model.lm_head(x).float(), y, reduction="sum").item()
        scored += len(targets)
    loss, protocol = total / scored, f"windows of {window} tokens every {stride}"
    by_word = loss * len(ids) / (len(text.split()) or math.nan)
    bits = loss / math.log(2) * len(ids) / (len(text.encode()) or math.nan)
    # not math.exp: it raises an error for a text without white space, which is one long word
    perplexities = torch.tensor([loss, by_word], dtype=torch.float64).exp().tolist()
    return Evaluation(scored, loss, *perplexities, bits, protocol)


def windows(ids: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Yields windows of ids (N,) as (B, T), and n: the last n tokens of each are scored."""
    size, window = max(MAX_TOKENS // window, 1), min(window, len(ids))
    full = ids.unfold(0, window, stride)
    if overlap := stride < window:  # in the first window, more tokens are scored
        yield full[:1], window - 1
    for first in range(int(overlap), len(full), size):
        yield full[first : first + size], min(stride, window - 1)
    rest, left = ids[len(full) * stride :], len(ids) - (len(full) - 1) * stride - window
    if (new := min(left, len(rest) - 1)) > 0:
        yield rest[None], new


def evaluate_models(
    models: Mapping[str, nn.Module], texts: Mapping[str, np.ndarray], tokenizer, window: int
):
    """Evaluates every model on every text (token ids); returns a dict and the same as a DataFrame.

    tokenizer: from transformers, to count words and bytes. The keys of both are (text, model).
    """
    import pandas as pd  # 0.5 s that `evaluate` does not need

    results = {
        (text, name): evaluate(model, ids, window, text=tokenizer.decode(ids))
        for text, ids in texts.items()
        for name, model in models.items()
    }
    index = pd.MultiIndex.from_tuples(results, names=["text", "model"])
    table = pd.DataFrame(results.values(), index)
    shown = table.select_dtypes("float").map(lambda x: f"{x:.5g}" if x < ABSURD else "–")
    return results, table.assign(**shown)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Nats per token on `held_out`; a token's probability is its share in `train`.

    0.05 is added to each count, so that no probability is 0.
    """
    counts = np.bincount(train, minlength=vocabulary) + 0.05
    return float(-np.log(counts / counts.sum())[held_out].mean())
