"""Texts become token files: caching, the validation split, and damage."""

from pathlib import Path

import numpy as np
import pytest

from workflow.data import corpus as module
from workflow.data.corpus import Corpus, load_corpus, split
from workflow.data.documents import read_documents
from workflow.data.sources import Source
from workflow.errors import DataError


@pytest.fixture
def load(config, reference):
    """Loads files for training and for validation; the ci profile's tokens are bytes."""

    def run(text: Path, *validation: Path) -> Corpus:
        source = Source(text.name, (text,), validation)
        return load_corpus(config, reference.tokenizer.backend_tokenizer, 0, source)

    return run


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("hello world " * 50)
    return file


def test_a_text_is_read_only_as_far_as_it_is_tokenised(reference):
    pieces = iter([("word ", False)] * 100)
    next(module.tokenize(pieces, reference.tokenizer.backend_tokenizer, 0, np.dtype(np.uint16)))
    assert len(list(pieces)) == 100 - 32  # a long text needs little memory


@pytest.mark.parametrize(("ends", "cut"), [((30, 80, 93, 100), 93), ((80, 100), 90), ((90,), 90)])
def test_validation_starts_at_a_document_if_possible(ends, cut):
    tokens = np.ones(100)
    tokens[[end - 1 for end in ends]] = 0
    assert [len(part) for part in split(tokens, 0, 0.1)] == [cut, 100 - cut]


def test_token_file_is_written_once_per_text_and_again_if_damaged(load, tmp_path, text):
    first = load(text)
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert np.array_equal(first.train, load(text).train)
    assert file.stat().st_mtime_ns == written
    assert len(first.train) + len(first.validation) == 12 * 50 + 1
    for damaged in (content[:-1], content[:5], b"\xff" + content[1:]):
        file.write_bytes(damaged)
        load(text)
        assert file.read_bytes() == content
    text.write_text("other words " * 50)
    assert load(text).text_sha256 != first.text_sha256
    (other,) = set((tmp_path / "cache" / "tokens").iterdir()) - {file}
    expected = other.read_bytes()
    other.write_bytes(content)  # undamaged, but of another text
    load(text)
    assert other.read_bytes() == expected


def test_validation_split_of_the_source_is_used_completely(load, text, tmp_path):
    held_out = tmp_path / "valid.txt"
    held_out.write_text("other words " * 9)
    corpus = load(text, held_out)
    assert (len(corpus.train), len(corpus.validation), corpus.documents) == (601, 109, 2)
    assert load(text).text_sha256 != corpus.text_sha256  # the hash covers both splits


def test_a_damaged_text_is_no_error_of_the_disk_that_its_tokens_are_written_to(load, text):
    with pytest.raises(DataError, match=r"it is damaged \(Not a gzipped file"):
        load(text.rename(text.with_name("text.txt.gz")))


def test_text_that_changes_during_reading_is_refused(load, tmp_path, text, monkeypatch):
    def change_while_reading(files, column):
        yield from read_documents(files, column)
        text.write_text("other words " * 50)

    monkeypatch.setattr(module, "read_documents", change_while_reading)
    with pytest.raises(DataError, match="the file changed while it was read"):
        load(text)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
