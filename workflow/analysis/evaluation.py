"""Loss and perplexity with their protocol, and the loss of a model that knows only word counts."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from SmolLm3 import LlamaModel

TOKENS_AT_ONCE = 4096  # in a forward
LOGITS_AT_ONCE = 1024  # rows; of 49152 floats each, 200 MB


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a token, mean over the `tokens` that were scored; protocol: how, in words.

    words, bytes: of the text for each of its tokens; 0 where the text was not given.
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
        """Words are what white space separates; comparable across tokenizers, as bytes are."""
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
    """Where words are long, as without white space, this can be beyond all numbers."""
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

    Each token is scored once, with the most context that a window gives it; the first of the first
    window has none and is not scored. Without overlap this holds for the first of every window. A
    last part shorter than a window is scored too. model: a `LlamaModel`, or transformers' Llama.
    text: what `tokens` are of, for figures by word and byte.
    Follows huggingface.co/docs/transformers/perplexity.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and window {window}")
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to score one")
    tokens, total, scored = np.asarray(tokens), 0.0, 0
    spans = list(windows(len(tokens), window, stride))
    bar = {"total": len(tokens), "unit": "token", "delay": 2, "leave": False, "file": sys.stdout}
    with tqdm(desc="Evaluating", **bar) as progress:
        for (length, fresh), group in itertools.groupby(spans, key=lambda span: span[1:]):
            starts = [start for start, *_ in group]
            size = max(TOKENS_AT_ONCE // window, 1)
            for batch in (starts[first : first + size] for first in range(0, len(starts), size)):
                places = np.array(batch)[:, None] + np.arange(length)
                total += summed_loss(model, tokens[places].astype(np.int64), fresh)
                scored += fresh * len(batch)
                progress.update(fresh * len(batch))
    rates = (len(text.split()) / len(tokens), len(text.encode()) / len(tokens))
    return Evaluation(total / scored, scored, f"windows of {window} tokens every {stride}", *rates)


def comparison(
    models: Mapping[str, nn.Module], texts: Mapping[str, np.ndarray], tokenizer, window: int
) -> tuple[dict[tuple[str, str], Evaluation], str]:
    """Evaluates every model on every text (token ids), and makes a table of it, protocol included.

    tokenizer: transformers', to count words and bytes.
    """
    found, rows = {}, []
    for (told, ids), (name, model) in itertools.product(texts.items(), models.items()):
        result = found[told, name] = evaluate(model, ids, window, text=tokenizer.decode(ids))
        figures = (result.loss, result.perplexity, result.word_perplexity, result.bits_per_byte)
        digits = (f"{figure:.4f}" if figure < 1e5 else f"{figure:.3g}" for figure in figures)
        rows.append((told, name, result.tokens, *digits))
    head = ("text", "model", "tokens", "loss", "perplexity", "of a word", "bits a byte")
    lines = ["{:<28}{:<8}{:>7}{:>10}{:>12}{:>12}{:>13}".format(*row) for row in (head, *rows)]
    return found, "\n".join([*lines, f"({result.protocol})"])


def windows(total: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start and length of each window, and how many targets at its end no window before has."""
    done = 0  # targets before this place are scored
    for start in range(0, total - 1, stride):
        length = min(window, total - start)
        fresh = start + length - max(done, start + 1)
        if fresh > 0:
            yield start, length, fresh
        done = start + length
        if done >= total:
            return


def summed_loss(model: nn.Module, rows: np.ndarray, fresh: int) -> float:
    """The nats of the last `fresh` targets of each row (B, T), some logits at a time."""
    ids = torch.from_numpy(rows).to(next(model.parameters()).device)
    inputs, targets = ids[:, :-1], ids[:, -fresh:].flatten()
    hidden = model.hidden(inputs) if isinstance(model, LlamaModel) else model.model(inputs)[0]
    hidden = hidden[:, -fresh:].flatten(0, 1)
    parts = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))
    losses = (F.cross_entropy(model.lm_head(h).float(), t, reduction="sum") for h, t in parts)
    return sum(loss.item() for loss in losses)


def unigram_loss(
    train: np.ndarray, held_out: np.ndarray, vocabulary: int, added: float = 0.05
) -> float:
    """Nats a token on `held_out`, knowing word counts of `train` with `added` to each."""
    counts = np.bincount(train, minlength=vocabulary) + added
    return float(-np.log(counts / counts.sum())[held_out].mean())
