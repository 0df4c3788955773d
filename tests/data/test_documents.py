"""Files become documents, whatever they are; what is no text is refused with its place."""

import csv
import gzip
import json
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from conftest import ROOT
from workflow.data import documents as module
from workflow.data.corpus import tokenize
from workflow.data.documents import (
    documents,
    read_parts,
    read_text,
    sha256_of_text,
    split_documents,
)
from workflow.errors import DataError

ARTICLES = [
    " = One = \n first \n = = Part = = \n more \n",
    " = Two = \n second \n",
]
LINES = ["", *"".join(ARTICLES).splitlines(keepends=True)]  # the rows of wikitext


def whole(files, column="text") -> list[str]:
    """The documents, put together from their pieces."""
    found = [""]
    for text, ends in documents(files, column):
        found[-1] += text
        if ends:
            found.append("")
    assert found.pop() == ""
    return found


@pytest.fixture
def table(tmp_path):
    """A parquet or JSON file of the given rows."""

    def make(name: str, rows: list, column: str = "text"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.table({"id": range(len(rows)), column: rows}), path)
        elif name.endswith(".csv"):
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([("id", column), *enumerate(rows)])
        else:
            lines = "".join(json.dumps({"id": 1, column: row}) + "\n" for row in rows)
            (gzip.open if name.endswith(".gz") else open)(path, "wb").write(lines.encode())
        return path

    return make


def test_documents_start_at_headings():
    text = "before\n\n = One = \n\nfirst\n\n = = Part = = \n\nmore\n\n = Two = \n\nsecond\n"
    assert list(split_documents([text])) == [
        ("before", True),
        (" = One = \n\nfirst\n\n = = Part = = \n\nmore", True),
        (" = Two = \n\nsecond", True),
    ]


@pytest.mark.parametrize("size", [100, 1000, 30_000])
def test_a_text_read_and_cut_in_parts_gives_the_ids_of_the_whole(smollm2, monkeypatch, size):
    def ids() -> list[np.ndarray]:
        pieces = documents([ROOT / "input.txt"], "")
        return list(tokenize(pieces, smollm2.tokenizer.backend_tokenizer, 0, np.uint16))

    whole = ids()
    monkeypatch.setattr(module, "PART", size)
    monkeypatch.setattr(module, "LONGEST", size)
    parts = ids()
    assert np.array_equal(np.concatenate(parts), np.concatenate(whole))
    assert len(parts) > len(whole) or size == 30_000


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_rows_that_are_lines_are_joined_into_articles_and_others_are_documents(table, name):
    lines = table(name, LINES)
    assert whole([lines]) == [article.rstrip("\n") for article in ARTICLES]
    rows = table(f"b{name}", ["", "one row\nof two lines", None, "another"])
    assert whole([rows]) == ["one row\nof two lines", "another"]


def test_an_article_goes_on_in_the_next_part_of_its_split(table):
    parts = [table("1.jsonl", LINES[:3]), table("2.jsonl", LINES[3:])]
    assert whole(parts) == [article.rstrip("\n") for article in ARTICLES]


def test_rows_that_are_whole_articles_are_not_run_together(table):
    articles = [" = One = \n first", " = Two = \n second"]
    assert whole([table("a.jsonl", articles)]) == articles


def test_a_name_is_no_pattern(table):
    table("x1.jsonl", ["another"])
    assert whole([table("x[1].jsonl", ["one"])]) == ["one"]


def test_packed_text_is_the_text(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("".join(ARTICLES))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert whole([packed]) == whole([plain]) == [article.rstrip("\n") for article in ARTICLES]


def test_the_identity_is_that_of_bytes_column_and_order(table):
    one, two = table("one.jsonl", ["a"]), table("two.jsonl", ["b"])
    identities = [
        sha256_of_text(files, column)
        for files, column in (([one], "a"), ([one], "b"), ([one, two], "a"), ([two, one], "a"))
    ]
    assert len(set(identities)) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda table: table("a.parquet", ["x"], "content"), "no column 'text', but id, content"),
        (lambda table: table("a.jsonl", ["x"], "content"), "no column 'text', but id, content"),
        (lambda table: table("a.jsonl", [["x"], ["y"]]), "column 'text' holds list, not text"),
        (lambda table: table("a.parquet", [1, 2]), "column 'text' holds int, not text"),
        (lambda table: table("a.parquet", ["", None]), "column 'text' is empty"),
        (lambda table: spoil(table("a.parquet", LINES)), "it cannot be read as parquet"),
        (lambda table: cut(table("a.parquet", LINES)), "it cannot be read as parquet"),
        (lambda table: cut(table("a.jsonl", LINES)), "it cannot be read as json"),
        (lambda table: cut(table("a.jsonl.gz", LINES)), "it cannot be read as json"),
        (lambda table: cut(table("a.jsonl.gz", LINES), "a.gz"), "it is damaged"),
        (lambda table: cut(table("a.jsonl", LINES), "b.gz"), "it is damaged"),
        (lambda table: table("a.jsonl", LINES).with_name("a" * 300), "it cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(table, capfd, make, words):
    with pytest.raises(DataError, match=words) as caught:
        whole([make(table)])
    assert "\n" not in str(caught.value) and str(caught.value).count("; ") >= 1
    assert capfd.readouterr().err == ""


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
    path.write_bytes(content)
    return path


def cut(path, name=None):
    path.write_bytes(path.read_bytes()[:-20])
    return path.rename(path.with_name(name)) if name else path


def test_a_path_that_is_no_file_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, words in (("absent", "no such file"), ("", "a folder"), ("fifo", "or a device")):
        with pytest.raises(DataError, match=words):
            read_text(tmp_path / path)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf = A = \r\n\r\nx\r\n")
    assert read_text(tmp_path / "text.txt")[0] == " = A = \n\nx\n"
    assert "".join(read_parts(tmp_path / "text.txt")) == " = A = \n\nx\n"
