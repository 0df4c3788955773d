"""Text becomes batches.

Documents are tokenised and joined by the end-of-text token into one stream, with a held-out part of
its own or taken from the end. Batches are a pure function of (seed, step): nothing is padded,
nothing is dropped, and a resumed run needs no more than the step to go on with the next tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from workflow.data.documents import documents, sha256_of_text, size_of_text
from workflow.data.sources import Source
from workflow.errors import DataError
from workflow.files import DAY, atomic_write, remove_temporary_files

TOGETHER = 1 << 22  # characters that are tokenised at once
DIGEST = 32  # bytes of a sha256, at the end of a token file


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, in two parts.

    train, validation: token ids, uint16 or uint32, memory-mapped.
    documents: in both. name, revision, text_sha256, tokenizer_sha256: what it was made of.
    """

    name: str
    revision: str
    train: np.ndarray
    validation: np.ndarray
    documents: int
    text_sha256: str
    tokenizer_sha256: str

    def __str__(self) -> str:
        revision = f"revision {self.revision}, " if self.revision else ""
        return (
            f"Data: {self.name}, {self.documents} documents, {len(self.train)} tokens to train on, "
            f"{len(self.validation)} held out ({revision}text sha256 {self.text_sha256[:12]}…)"
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

    @property
    def origin(self) -> dict[str, str]:
        """What a checkpoint tells and no resume compares: the text is known by its hash."""
        return {"text": self.name, "text_revision": self.revision or "a local file"}


def load_corpus(
    source: Source,
    tokenizer: Tokenizer,
    end_of_text: int,
    validation_fraction: float,
    sequence_length: int,
    cache: Path,
) -> Corpus:
    """Reads, tokenises and, where the source has no held-out part of its own, splits a text.

    That part is then the end of the stream; it starts where a document does, if one starts there.
    Raises DataError when either part is shorter than one sequence and its last target.
    """
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    how = (source.column, tokenizer, end_of_text, cache / "tokens", tokenizer_sha256)
    text_sha256, train = token_file(source.train, *how)
    if source.validation:
        held_out_sha256, validation = token_file(source.validation, *how)
        text_sha256 = hashlib.sha256(f"{text_sha256} {held_out_sha256}".encode()).hexdigest()
        count = sum(np.count_nonzero(part == end_of_text) for part in (train, validation))
    else:
        ends = np.flatnonzero(train == end_of_text) + 1
        cut = split_point(len(train), ends, validation_fraction)
        train, validation, count = train[:cut], train[cut:], len(ends)
    for part, tokens in (("to train on", train), ("held out", validation)):
        if len(tokens) <= sequence_length:
            raise DataError(
                source.name,
                f"{len(tokens)} tokens {part}, one sequence needs {sequence_length + 1}",
                "give a longer text or a smaller train.sequence_length",
            )
    hashes = (text_sha256, tokenizer_sha256)
    return Corpus(source.name, source.revision, train, validation, int(count), *hashes)


def token_file(
    files: Sequence[Path],
    column: str,
    tokenizer: Tokenizer,
    end_of_text: int,
    folder: Path,
    tokenizer_sha256: str,
) -> tuple[str, np.ndarray]:
    """The text's hash, and its ids (N,), of a file in `folder` that is made once for both.

    The file ends with the hash of the ids: a damaged one is made again.
    """
    text_sha256 = sha256_of_text(files, column)
    kind = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32)
    file = folder / f"{files[0].stem[:50]}-{text_sha256[:8]}-{tokenizer_sha256[:8]}.bin"
    tokens = read_tokens(file, kind)
    if tokens is None:
        remove_temporary_files(folder, untouched=DAY)
        sizes = [size_of_text(path) for path in files]
        bar = {"total": sum(sizes) if all(sizes) else None, "unit": "B", "unit_scale": True}
        bar |= {"desc": "Tokenising", "delay": 2, "leave": False, "file": sys.stdout}
        digest = hashlib.sha256()
        with (
            atomic_write(file, "paths.cache") as unfinished,
            open(unfinished, "wb") as out,
            tqdm(**bar) as progress,
        ):
            for size, ids in tokenize(documents(files, column), tokenizer, end_of_text, kind):
                out.write(ids)
                digest.update(ids)
                progress.update(size)
            out.write(digest.digest())
            if sha256_of_text(files, column) != text_sha256:
                raise DataError(files[0], "it changed while it was read", "run again")
        tokens = read_tokens(file, kind)
    return text_sha256, tokens


def read_tokens(file: Path, kind: np.dtype) -> np.ndarray | None:
    """The ids of a token file, memory-mapped; None if it is not there or not whole."""
    count = (file.stat().st_size - DIGEST) // kind.itemsize if file.is_file() else -1
    if count < 0:
        return None
    tokens = np.memmap(file, kind, "r", shape=count) if count else np.empty(0, kind)
    with open(file, "rb") as whole:
        whole.seek(tokens.nbytes)
        return tokens if whole.read() == hashlib.sha256(tokens).digest() else None


def tokenize(
    pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer, end_of_text: int, kind: type
) -> Iterator[tuple[int, np.ndarray]]:
    """Some documents at a time: their bytes, and their ids, with `end_of_text` after each document.

    The next are encoded, by the threads of the tokenizer, while the last are made an array.
    """
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    closing = {True: [end_of_text], False: []}
    with ThreadPoolExecutor(1) as ahead:
        encoded = (
            (group, ahead.submit(encode, [text for text, _ in group])) for group in groups(pieces)
        )
        for (group, ids), _ in itertools.pairwise(itertools.chain(encoded, [None])):
            ends = [closing[ends] for _, ends in group]
            parts = [part for e, end in zip(ids.result(), ends) for part in (e.ids, end)]
            size = sum(len(text.encode()) for text, _ in group)
            yield size, np.concatenate([np.array(part, kind) for part in parts])


def groups(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, of some megabytes together: few enough for memory, many for threads."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece[0]) + 100  # as many as it weighs if it is empty
        if size > TOGETHER:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


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
