"""Text becomes batches.

A text is cut into documents at its headings, tokenised, joined by the end-of-text token into one
stream, and split once into a training and a held-out part. Batches are a pure function of (seed,
step): nothing is padded, nothing is dropped, and a resumed run needs no more than the step to go on
with the very next tokens.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import WorkflowError

# wikitext's ` = Title = `, not its ` = = Section = = `
HEADING = re.compile(r"^(?= = [^=\n].* = $)", re.MULTILINE)


class DataError(WorkflowError):
    """The text cannot be trained on."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, split once.

    train, validation: token ids, uint16 or uint32, memory-mapped.
    documents, text_sha256, tokenizer_sha256: what it was made of.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    documents: int
    text_sha256: str
    tokenizer_sha256: str

    def __str__(self) -> str:
        return (
            f"Data: {self.name}, {self.documents} documents, {len(self.train)} tokens to train on, "
            f"{len(self.validation)} held out (text sha256 {self.text_sha256[:12]}…)"
        )

    @property
    def stamp(self) -> dict[str, str | int]:
        """What a checkpoint records and a resume compares."""
        return {
            "text_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
        }


def load_corpus(
    path: Path,
    tokenizer: Tokenizer,
    end_of_text: int,
    validation_fraction: float,
    sequence_length: int,
    cache: Path,
) -> Corpus:
    """Reads, tokenises and splits a text.

    The token file in `cache` is keyed by text and tokenizer, and made once. The held-out part is
    the end of the stream; it starts where a document does, if one starts there.
    Raises DataError when either part is shorter than one sequence and its last target.
    """
    text, text_sha256 = read_text(path)
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    file = cache / "tokens" / f"{path.stem}-{text_sha256[:8]}-{tokenizer_sha256[:8]}.npy"
    if not file.is_file():
        write_tokens(file, tokenize(text, tokenizer, end_of_text), tokenizer.get_vocab_size())
    tokens = np.load(file, mmap_mode="r")
    ends = np.flatnonzero(tokens == end_of_text) + 1
    cut = split_point(len(tokens), ends, validation_fraction)
    for part, length in (("to train on", cut), ("held out", len(tokens) - cut)):
        if length <= sequence_length:
            raise DataError(
                path,
                f"{length} tokens {part}, one sequence needs {sequence_length + 1}",
                "give a longer text or a smaller train.sequence_length",
            )
    return Corpus(path.name, tokens[:cut], tokens[cut:], len(ends), text_sha256, tokenizer_sha256)


def read_text(path: Path) -> tuple[str, str]:
    """A text file and the sha256 of its bytes. Raises DataError for all that is no UTF-8 text."""
    do = "name a text file: --set data.text=FILE"
    if not path.exists():
        raise DataError(path, "there is no such file", do)
    if not path.is_file():
        raise DataError(path, "this is a folder or a device, not a file", do)
    raw = path.read_bytes()
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8"
        raise DataError(path, what, "save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(path, f"character {text.index(chr(0))} is a NUL: this is no text", do)
    if not text.strip():
        raise DataError(path, "the file is empty", "give a longer text")
    return text, hashlib.sha256(raw).hexdigest()


def tokenize(text: str, tokenizer: Tokenizer, end_of_text: int) -> list[int]:
    """The documents' ids, each document closed by `end_of_text`."""
    documents = [document.strip("\n") for document in HEADING.split(text) if document.strip()]
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [token for document in encoded for token in (*document.ids, end_of_text)]


def write_tokens(file: Path, tokens: list[int], vocabulary: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".tmp.{os.getpid()}.npy")
    np.save(unfinished, np.array(tokens, dtype=np.uint16 if vocabulary <= 65536 else np.uint32))
    os.replace(unfinished, file)


def split_point(total: int, ends: np.ndarray, fraction: float) -> int:
    """Where the held-out part starts: with a document, if one starts in the last `fraction`."""
    cut = total - round(total * fraction)
    starts = ends[(ends >= cut) & (ends < total)]
    return int(starts[0]) if len(starts) else cut


# --- batches --------------------------------------------------------------------------------------


def batch_at(
    tokens: np.ndarray, step: int, batch_size: int, sequence_length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, T), of update `step` (0, 1, …): targets are one token on.

    The epochs follow each other in one endless stream, which is cut every T tokens; the sequences
    that start in one epoch are shuffled among themselves. So each token is an input once an epoch
    and every batch is full.
    """
    first = step * batch_size
    starts = [
        sequence_start(len(tokens), n, sequence_length, seed)
        for n in range(first, first + batch_size)
    ]
    places = (np.array(starts)[:, None] + np.arange(sequence_length + 1)) % len(tokens)
    rows = torch.from_numpy(tokens[places].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def sequence_start(total: int, n: int, sequence_length: int, seed: int) -> int:
    """Where in the stream of all epochs the n-th sequence of a run starts."""
    epoch = n * sequence_length // total
    # the first sequence that starts in this epoch, and in the next
    first, after = (-(-e * total // sequence_length) for e in (epoch, epoch + 1))
    place = first + int(shuffled(after - first, seed, epoch)[n - first])
    return place * sequence_length


@functools.lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def validation_batches(tokens: np.ndarray, most: int, batch_size: int, sequence_length: int):
    """The first `most` tokens in order, as inputs and targets; the last batch may be smaller."""
    count = min(most, len(tokens) - 1) // sequence_length
    for first in range(0, count, batch_size):
        starts = np.arange(first, min(first + batch_size, count)) * sequence_length
        places = starts[:, None] + np.arange(sequence_length + 1)
        rows = torch.from_numpy(tokens[places].astype(np.int64))
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
