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
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import WorkflowError
from .files import DAY, remove_unfinished, written_whole

# wikitext's ` = Title = `, not its ` = = Section = = `
HEADING = re.compile(r"^(?= = [^=\n].* = $)", re.MULTILINE)
GAP = re.compile(r"(?<=\w) (?=\w)")
PART = 1 << 20  # characters, or bytes, that are read and tokenised at once


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
    text_sha256 = sha256_of_file(path)
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    kind = np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32
    file = cache / "tokens" / f"{path.stem}-{text_sha256[:8]}-{tokenizer_sha256[:8]}.bin"
    if not file.is_file():
        remove_unfinished(file.parent, untouched=DAY)
        with written_whole(file, "paths.cache") as unfinished, open(unfinished, "wb") as out:
            for ids in tokenize(read_parts(path), tokenizer, end_of_text):
                out.write(np.array(ids, dtype=kind).tobytes())
    tokens = np.memmap(file, kind, mode="r") if file.stat().st_size else np.empty(0, kind)
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
    return "".join(read_parts(path)), sha256_of_file(path)


def sha256_of_file(path: Path) -> str:
    do = "name a text file: --set data.text=FILE"
    if not path.exists():
        raise DataError(path, "there is no such file", do)
    if not path.is_file():
        raise DataError(path, "this is a folder or a device, not a file", do)
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
        raise DataError(path, what, "mend that or name another file") from None


def read_parts(path: Path) -> Iterator[str]:
    """A text file, part by part, so that its size is of no account; line ends become newlines.

    Raises DataError for all that is no UTF-8 text, with the place.
    """
    sha256_of_file(path)
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    place, something, part = 0, False, b"more"
    with reading(path), open(path, "rb") as file:
        while part:
            part = file.read(PART)
            pending = len(utf8.getstate()[0])
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                what = f"byte {place - pending + error.start} is not UTF-8"
                raise DataError(path, what, "save the file as UTF-8") from None
            if b"\0" in part:
                what = f"byte {place + part.index(0)} is a NUL: this is no text"
                raise DataError(path, what, "name a text file: --set data.text=FILE")
            text = text.removeprefix("\ufeff") if place == 0 else text
            place, something = place + len(part), something or bool(text.strip())
            yield text
    if not something:
        raise DataError(path, "the file is empty", "give a longer text")


def tokenize(parts: Iterable[str], tokenizer: Tokenizer, end_of_text: int) -> Iterator[list[int]]:
    """The documents' ids, each document closed by `end_of_text`, some megabytes at a time."""
    waiting: list[tuple[str, bool]] = []
    for piece in pieces(parts):
        waiting.append(piece)
        if sum(len(text) for text, _ in waiting) > PART:
            yield encode(waiting, tokenizer, end_of_text)
            waiting.clear()
    yield encode(waiting, tokenizer, end_of_text)


def encode(texts: list[tuple[str, bool]], tokenizer: Tokenizer, end_of_text: int) -> list[int]:
    encoded = tokenizer.encode_batch_fast([text for text, _ in texts], add_special_tokens=False)
    closings = [(end_of_text,) if closes else () for _, closes in texts]
    return [token for e, closing in zip(encoded, closings) for token in (*e.ids, *closing)]


def pieces(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents without the newlines around them, as (text, whether it ends its document).

    A document is one piece, or several where it is longer than `PART`: cut before a space between
    words, where no tokenizer of the family sees one word, or anywhere if there is none for so long.
    """
    rest, inside = "", False  # `inside`: an earlier piece of this document is out
    for part in itertools.chain(parts, ["\n"]):
        *whole, rest = split_whole_lines(rest + part)
        for document in whole:
            yield from ended(document, inside)
            inside = False
        while len(rest) > PART:
            cut = last_gap(rest[:PART])
            yield rest[:cut] if inside else rest[:cut].lstrip("\n"), False
            rest, inside = rest[cut:], True
    yield from ended(rest, inside)


def ended(document: str, inside: bool) -> Iterator[tuple[str, bool]]:
    """A document, or the end of one, as its last piece; nothing if it is blank."""
    if inside or document.strip():
        yield document.rstrip("\n") if inside else document.strip("\n"), True


def split_whole_lines(text: str) -> list[str]:
    """Split at headings, but not at one in the last line, which may go on."""
    end = text.rfind("\n") + 1
    *whole, last = HEADING.split(text[:end])
    return [*whole, last + text[end:]]


def last_gap(text: str) -> int:
    gaps = [match.start() for match in GAP.finditer(text, len(text) // 2)]
    return gaps[-1] if gaps else len(text)


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
