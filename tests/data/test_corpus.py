"""A text becomes tokens: what is kept, what is held out, and what is refused."""

import resource
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from conftest import ROOT, overrides
from workflow.config.load import load_config
from workflow.data import corpus as data
from workflow.data.corpus import Corpus, load_corpus, split
from workflow.data.documents import documents
from workflow.data.sources import Source
from workflow.errors import DataError


@pytest.fixture
def tokenizer(reference) -> Tokenizer:
    return reference.tokenizer.backend_tokenizer


@pytest.fixture
def load(tokenizer, tmp_path):
    """Loads a file, or a source, for sequences of 16 tokens; the cache is in `tmp_path`."""

    def run(source: Path | Source, fraction: float = 0.2) -> Corpus:
        if isinstance(source, Path):
            source = Source(source.name, (source,))
        changes = ["train.sequence_length=16", f"data.validation_fraction={fraction}"]
        config = load_config(ROOT / "SmolLm3_Config.yaml", "ci", overrides(tmp_path, *changes))
        return load_corpus(config, tokenizer, 0, source)

    return run


@pytest.mark.slow
def test_one_line_of_100_mb_takes_bounded_memory(load, tmp_path):
    text = tmp_path / "line.txt"
    with open(text, "wb") as file:
        for _ in range(100):
            file.write(b"words " * 87_382 + b"x" * 524_288)  # spaces, then none for long
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = load(text, 0.1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(corpus.train) + len(corpus.validation) == text.stat().st_size + 1
    assert grown < 1_500_000  # kB


@pytest.mark.parametrize(("ends", "cut"), [((30, 80, 93, 100), 93), ((80, 100), 90), ((90,), 90)])
def test_the_held_out_part_starts_with_a_document_if_one_starts_there(ends, cut):
    tokens = np.ones(100)
    tokens[[end - 1 for end in ends]] = 0
    assert [len(part) for part in split(tokens, 0, 0.1)] == [cut, 100 - cut]


def test_the_projects_own_text_is_long_various_and_free_of_repetition():
    text = (ROOT / "input.txt").read_text()
    paragraphs = [line for line in text.split("\n") if len(line) > 40]
    assert len(text.encode()) >= 120_000
    assert text.count("\n = ") >= 40
    assert len(set(paragraphs)) == len(paragraphs)


def test_the_token_file_is_made_once_for_a_text_and_a_tokenizer(load, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)
    first = load(text)
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    written = file.stat().st_mtime_ns
    again = load(text)
    assert file.stat().st_mtime_ns == written
    assert np.array_equal(first.train, again.train)
    assert first.train.dtype == np.uint16
    assert len(first.train) + len(first.validation) == 12 * 50 + 1
    text.write_text("other words " * 50)
    other = load(text)
    assert other.text_sha256 != first.text_sha256
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"abc\xffdef", "byte 3 is not UTF-8"),
        (b"abc\0def", "character 3 is a NUL"),
        (b"short", "5 tokens to train on, one sequence needs 17"),
    ],
)
def test_a_text_that_cannot_be_trained_on_says_why(load, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(text, 0.1)


def test_a_held_out_part_of_its_own_is_kept_whole(load, tokenizer, tmp_path):
    parts = {}
    for name, text in (("train", "some words " * 9), ("valid", "other words " * 9)):
        parts[name] = tmp_path / f"{name}.txt"
        parts[name].write_text(text)
    both = Source("both", (parts["train"],), (parts["valid"],), revision="abc")
    corpus = load(both)
    decoded = [tokenizer.decode(part[:-1]) for part in (corpus.train, corpus.validation)]
    assert decoded == ["some words " * 9, "other words " * 9]
    assert corpus.documents == 2
    assert "(revision abc, text sha256" in str(corpus)
    alone = load(parts["train"], 0.5)
    assert alone.text_sha256 != corpus.text_sha256  # another held-out part is other data


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"\xff" + b[1:]])
def test_a_damaged_token_file_is_made_again(load, tmp_path, damage):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)
    first = load(text)
    before = np.concatenate([first.train, first.validation])
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = load(text)
    assert np.array_equal(np.concatenate([again.train, again.validation]), before)


def test_a_text_that_changes_while_it_is_read_is_refused(load, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)

    def changing(files, column):
        yield from documents(files, column)
        text.write_text("other words " * 50)

    monkeypatch.setattr(data, "documents", changing)
    with pytest.raises(DataError, match="it changed while it was read"):
        load(text)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
