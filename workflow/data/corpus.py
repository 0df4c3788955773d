"""A text becomes a token file on disk, split into training and validation tokens."""

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
from workflow.data.documents import read_documents, sha256_of_text
from workflow.data.sources import Source, find_source
from workflow.errors import DataError
from workflow.files import DAY, atomic_write, remove_temporary_files

DIGEST_BYTES = 32  # a token file ends with its sha256
CODE = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
CODE_SHA256 = hashlib.sha256(CODE).hexdigest()  # other code may make other tokens


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text, for training and validation, and their provenance."""

    name: str
    revision: str
    train: np.ndarray  # token ids, uint16 or uint32, memory-mapped
    validation: np.ndarray
    documents: int  # number of documents in both parts
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
        """Saved in a checkpoint. A resume compares it."""
        return {
            "text_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
        }

    @property
    def provenance(self) -> dict[str, str]:
        """Saved in a checkpoint for its readers. A resume does not compare it."""
        return {"text": self.name, "text_revision": self.revision or "a local file"}

    def check_length(self, sequence_length: int) -> None:
        """Raises DataError if a part is too short for one sequence and its last target."""
        for part, tokens in (("to train on", self.train), ("held out", self.validation)):
            if len(tokens) <= sequence_length:
                what = f"{len(tokens)} tokens {part}, one sequence needs {sequence_length + 1}"
                fix = "give a longer text or a smaller train.sequence_length"
                raise DataError(self.name, what, fix)


def load_corpus(
    config: Config, tokenizer: Tokenizer, end_of_text: int, source: Source | None = None
) -> Corpus:
    """Reads and tokenises `source` (None: the one in the settings).

    Validation uses the source's validation split or, without one, the end of the text.
    Raises DataError if the text cannot be read or is too short.
    """
    source = source or find_source(config.data)
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    folder = config.paths.cache / "tokens"

    def load(files: tuple[Path, ...]) -> tuple[str, np.ndarray]:
        """The text's hash and its token ids (N,). The token file is written once and reused."""
        text_sha256 = sha256_of_text(files, source.column)
        file = folder / f"{files[0].stem[:50]}-{text_sha256[:8]}-{tokenizer_sha256[:8]}.bin"
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32)
        key = f"{text_sha256} {tokenizer_sha256} {CODE_SHA256}"
        if (tokens := read_tokens(file, dtype, key)) is None:
            pieces = read_documents(files, source.column)
            with atomic_write(file, "paths.cache") as temporary:
                write_tokens(temporary, tokenize(pieces, tokenizer, end_of_text, dtype), key)
                if sha256_of_text(files, source.column) != text_sha256:
                    raise DataError(files[0], "the file changed while it was read", "run again")
            tokens = read_tokens(file, dtype, key)
        return text_sha256, tokens

    remove_temporary_files(folder, min_age=DAY)
    text_sha256, train = load(source.train)
    if source.validation:
        validation_sha256, validation = load(source.validation)
        text_sha256 = hashlib.sha256(f"{text_sha256} {validation_sha256}".encode()).hexdigest()
    else:
        fraction, tokens = config.data.validation_fraction, len(train)
        train, validation = split(train, end_of_text, fraction)
        if len(validation) < tokens * fraction / 2:
            share = f"{len(validation) / tokens:.1%} of the text, not {fraction:.0%}"
            print(f"Note: {share}, is held out, because it starts with a document")
    documents = sum(int(np.count_nonzero(part == end_of_text)) for part in (train, validation))
    tokens, hashes = (train, validation, documents), (text_sha256, tokenizer_sha256)
    corpus = Corpus(source.name, source.revision, *tokens, *hashes, tokenizer, end_of_text)
    corpus.check_length(config.train.sequence_length)
    return corpus


def split(tokens: np.ndarray, end_of_text: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Takes the last `fraction` for validation, from the first document start in it, if any."""
    cut = len(tokens) - round(len(tokens) * fraction)
    starts = np.flatnonzero(tokens[cut - 1 : -1] == end_of_text) + cut
    cut = starts[0] if len(starts) else cut
    return tokens[:cut], tokens[cut:]


def read_tokens(file: Path, dtype: np.dtype, key: str) -> np.ndarray | None:
    """The token ids (N,) of a token file, memory-mapped.

    key: hashes of text, tokenizer and this code. None if it is missing, damaged, or of another key.
    """
    if not file.is_file() or file.stat().st_size < DIGEST_BYTES:
        return None
    content = np.memmap(file, mode="r")
    tokens, stored = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:].tobytes()
    digest = hashlib.sha256(key.encode())
    digest.update(tokens)
    return tokens.view(dtype) if digest.digest() == stored else None


def write_tokens(file: Path, arrays: Iterable[np.ndarray], key: str) -> None:
    """Writes the ids, then the sha256 of `key` and ids, with which `read_tokens` detects damage."""
    digest = hashlib.sha256(key.encode())
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
    """The token ids of each piece, plus `end_of_text` after the last piece of a document."""
    pieces = iter(pieces)
    while group := list(itertools.islice(pieces, 32)):  # tokenised in parallel
        texts = [text for text, _ in group]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, group, strict=True):
            yield np.array([*encoding.ids, end_of_text] if ends else encoding.ids, dtype)
