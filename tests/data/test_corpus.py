"""Text becomes batches: what is kept, what is held out, and in which order it comes."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import ROOT
from workflow.data import corpus as data
from workflow.data.corpus import (
    batch_at,
    load_corpus,
    sequence_start,
    split_point,
    validation_batches,
)
from workflow.data.documents import documents
from workflow.data.sources import Source
from workflow.errors import DataError


def source(file: Path) -> Source:
    return Source(file.name, (file,))


@pytest.fixture
def tokenizer(reference) -> Tokenizer:
    return reference.tokenizer.backend_tokenizer


@pytest.mark.slow
def test_one_line_of_100_mb_takes_bounded_memory(tokenizer, tmp_path):
    text = tmp_path / "line.txt"
    with open(text, "wb") as file:
        for _ in range(100):
            file.write(b"words " * 87_382 + b"x" * 524_288)  # spaces, then none for long
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = load_corpus(source(text), tokenizer, 0, 0.1, 16, tmp_path / "cache")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(corpus.train) + len(corpus.validation) == text.stat().st_size + 1
    assert grown < 1_500_000  # kB


def test_the_held_out_part_starts_with_a_document_where_one_starts():
    assert split_point(100, np.array([30, 80, 93, 100]), 0.1) == 93
    assert split_point(100, np.array([30, 80, 100]), 0.1) == 90
    assert split_point(100, np.array([30, 90, 100]), 0.1) == 90


def test_the_projects_own_text_is_long_various_and_free_of_repetition():
    text = (ROOT / "input.txt").read_text()
    paragraphs = [line for line in text.split("\n") if len(line) > 40]
    assert len(text.encode()) >= 120_000
    assert text.count("\n = ") >= 40
    assert len(set(paragraphs)) == len(paragraphs)


def test_the_token_file_is_made_once_for_a_text_and_a_tokenizer(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)
    first = load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    written = file.stat().st_mtime_ns
    again = load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert np.array_equal(first.train, again.train)
    assert first.train.dtype == np.uint16
    assert len(first.train) + len(first.validation) == 12 * 50 + 1
    text.write_text("other words " * 50)
    other = load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    assert other.text_sha256 != first.text_sha256
    assert len(list((tmp_path / "tokens").iterdir())) == 2


sizes = {
    "total": st.integers(2, 400),
    "length": st.integers(1, 30),
    "batch": st.integers(1, 5),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=200, deadline=None)
@given(**sizes)
def test_each_token_is_an_input_once_an_epoch(total, length, batch, seed):
    """Over so many epochs that they end with a sequence, and within each."""
    epochs = length // math.gcd(total, length)
    count = epochs * total // length
    starts = [sequence_start(total, n, length, seed) for n in range(count)]
    assert sorted(starts) == list(range(0, epochs * total, length))
    assert [start // total for start in starts] == [n * length // total for n in range(count)]
    steps = range(count // batch)
    rows = [batch_at(np.arange(total), step, batch, length, seed) for step in steps]
    seen = [row[0].item() for inputs, _ in rows for row in inputs]
    assert seen == [start % total for start in starts[: len(seen)]]


@settings(max_examples=200, deadline=None)
@given(**sizes, step=st.integers(0, 10**6))
def test_targets_are_the_next_tokens_across_every_boundary(total, length, batch, seed, step):
    tokens = np.arange(total)  # a token's value is its place
    inputs, targets = batch_at(tokens, step, batch, length, seed)
    assert inputs.shape == targets.shape == (batch, length)
    assert torch.equal(targets, (inputs + 1) % total)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_of_whole_sequences_has_every_token_exactly_once():
    tokens = np.arange(960)
    for epoch in range(3):
        steps = range(epoch * 30, (epoch + 1) * 30)
        seen = torch.cat([batch_at(tokens, step, 2, 16, seed=1)[0].flatten() for step in steps])
        assert sorted(seen.tolist()) == list(range(960))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.arange(1000)
    forward = [batch_at(tokens, step, 2, 16, seed=1)[0] for step in range(80)]
    backward = [batch_at(tokens, step, 2, 16, seed=1)[0] for step in reversed(range(80))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(batch_at(tokens, 0, 2, 16, seed=2)[0], forward[0])
    # another size of batch cuts the same order of sequences
    assert torch.equal(batch_at(tokens, 0, 4, 16, seed=1)[0], torch.cat(forward[:2]))


def test_validation_covers_the_held_out_tokens_in_order_without_padding():
    batches = list(validation_batches(np.arange(100), 1000, 4, 16))
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.flatten().tolist() == list(range(96))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert len(list(validation_batches(np.arange(100), 32, 1, 16))) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"abc\xffdef", "byte 3 is not UTF-8"),
        (b"abc\0def", "byte 3 is a NUL"),
        (b"short", "5 tokens to train on, one sequence needs 17"),
    ],
)
def test_a_text_that_cannot_be_trained_on_says_why(tokenizer, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_corpus(source(text), tokenizer, 0, 0.1, 16, tmp_path)


def test_a_held_out_part_of_its_own_is_kept_whole(tokenizer, tmp_path):
    parts = {}
    for name, text in (("train", "some words " * 9), ("valid", "other words " * 9)):
        parts[name] = tmp_path / f"{name}.txt"
        parts[name].write_text(text)
    both = Source("both", (parts["train"],), (parts["valid"],), revision="abc")
    corpus = load_corpus(both, tokenizer, 0, 0.5, 16, tmp_path)
    decoded = [tokenizer.decode(part[:-1]) for part in (corpus.train, corpus.validation)]
    assert decoded == ["some words " * 9, "other words " * 9]
    assert corpus.documents == 2
    assert "(revision abc, text sha256" in str(corpus)
    alone = load_corpus(source(parts["train"]), tokenizer, 0, 0.5, 16, tmp_path)
    assert alone.text_sha256 != corpus.text_sha256  # another held-out part is other data


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"\xff" + b[1:]])
def test_a_damaged_token_file_is_made_again(tokenizer, tmp_path, damage):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)
    first = load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    before = np.concatenate([first.train, first.validation])
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    assert np.array_equal(np.concatenate([again.train, again.validation]), before)


def test_a_text_that_changes_while_it_is_read_is_refused(tokenizer, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)

    def changing(files, column):
        yield from documents(files, column)
        text.write_text("other words " * 50)

    monkeypatch.setattr(data, "documents", changing)
    with pytest.raises(DataError, match="it changed while it was read"):
        load_corpus(source(text), tokenizer, 0, 0.2, 16, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []
