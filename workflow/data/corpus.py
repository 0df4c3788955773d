"""A text becomes one stream of tokens, kept in a file, with a held-out part for validation."""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from workflow.config.settings import Config
from workflow.data.documents import documents, sha256_of_text
from workflow.data.sources import Source, find_source
from workflow.errors import DataError
from workflow.files import DAY, atomic_write, remove_temporary_files

DIGEST = 32  # bytes of a sha256, at the end of a token file


@dataclass(frozen=True)
class Corpus:
    """A tokenised text in two parts, and its provenance."""

    name: str
    revision: str
    train: np.ndarray  # token ids, uint16 or uint32, memory-mapped
    validation: np.ndarray
    documents: int  # in both parts
    text_sha256: str
    tokenizer_sha256: str
    tokenizer: Tokenizer
    end_of_text: int  # the token after each document

    def __str__(self) -> str:
        revision = f"revision {self.revision}, " if self.revision else ""
        return (
            f"Data: {self.name}, {self.documents} documents, {len(self.train)} tokens to train on, "
            f"{len(self.validation)} held out ({revision}text sha256 {self.text_sha256[:12]}…)"
        )

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What a checkpoint records and a resume compares."""
        return {
            "text_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
        }

    @property
    def provenance(self) -> dict[str, str]:
        """What a checkpoint records for its reader; a resume compares the text by its hash."""
        return {"text": self.name, "text_revision": self.revision or "a local file"}

    def check_length(self, sequence_length: int) -> None:
        """Raises DataError if a part is shorter than one sequence and its last target."""
        for part, tokens in (("to train on", self.train), ("held out", self.validation)):
            if len(tokens) <= sequence_length:
                what = f"{len(tokens)} tokens {part}, one sequence needs {sequence_length + 1}"
                fix = "give a longer text or a smaller train.sequence_length"
                raise DataError(self.name, what, fix)


def load_corpus(
    config: Config, tokenizer: Tokenizer, end_of_text: int, source: Source | None = None
) -> Corpus:
    """Reads and tokenises `source` (None: that of the settings) and holds a part of it out.

    Without a validation split of its own, that part is the end of the stream; it starts with a
    document if one starts there. Raises DataError for a text that cannot be trained on.
    """
    source = source or find_source(config.data)
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def load(files: tuple[Path, ...]) -> tuple[str, np.ndarray]:
        """The text's hash, and its ids (N,) from a file that is made once for both."""
        text_sha256 = sha256_of_text(files, source.column)
        file = folder / f"{files[0].stem[:50]}-{text_sha256[:8]}-{tokenizer_sha256[:8]}.bin"
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32)
        if (tokens := read_tokens(file, dtype)) is None:
            pieces = documents(files, source.column)
            with atomic_write(file, "paths.cache") as unfinished:
                write_tokens(unfinished, tokenize(pieces, tokenizer, end_of_text, dtype))
                if sha256_of_text(files, source.column) != text_sha256:
                    raise DataError(files[0], "it changed while it was read", "run again")
            tokens = read_tokens(file, dtype)
        return text_sha256, tokens

    folder = config.paths.cache / "tokens"
    remove_temporary_files(folder, untouched=DAY)
    text_sha256, train = load(source.train)
    if source.validation:
        validation_sha256, validation = load(source.validation)
        text_sha256 = hashlib.sha256(f"{text_sha256} {validation_sha256}".encode()).hexdigest()
    else:
        train, validation = split(train, end_of_text, config.data.validation_fraction)
    count = sum(int(np.count_nonzero(part == end_of_text)) for part in (train, validation))
    hashes = text_sha256, tokenizer_sha256
    parts = train, validation, count
    corpus = Corpus(source.name, source.revision, *parts, *hashes, tokenizer, end_of_text)
    corpus.check_length(config.train.sequence_length)
    return corpus


def split(tokens: np.ndarray, end_of_text: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the last `fraction`: from the first document that starts in it, if one does."""
    cut = len(tokens) - round(len(tokens) * fraction)
    starts = np.flatnonzero(tokens[cut - 1 : -1] == end_of_text) + cut
    cut = starts[0] if len(starts) else cut
    return tokens[:cut], tokens[cut:]


def read_tokens(file: Path, dtype: np.dtype) -> np.ndarray | None:
    """The ids of a token file (N,), memory-mapped; None if it is missing or damaged."""
    if not file.is_file() or file.stat().st_size < DIGEST:
        return None
    content = np.memmap(file, mode="r")
    tokens, digest = content[:-DIGEST], content[-DIGEST:].tobytes()
    return tokens.view(dtype) if hashlib.sha256(tokens).digest() == digest else None


def write_tokens(file: Path, arrays: Iterable[np.ndarray]) -> None:
    """The ids, then their sha256, by which `read_tokens` finds damage."""
    digest = hashlib.sha256()
    bar = {"unit": " tokens", "unit_scale": True, "delay": 2, "leave": False, "file": sys.stdout}
    with open(file, "wb") as out, tqdm(desc="Tokenising", **bar) as progress:
        for ids in arrays:
            out.write(ids)
            digest.update(ids)
            progress.update(len(ids))
        out.write(digest.digest())


def tokenize(
    pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer, end_of_text: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The ids of each text, with `end_of_text` where its document ends."""
    pieces = iter(pieces)
    while group := list(itertools.islice(pieces, 32)):  # by all cores
        texts = [text for text, _ in group]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, group, strict=True):
            yield np.array(encoding.ids + [end_of_text] * ends, dtype)
