"""Documents from text files and tables; files that are not text are refused."""

import gzip
import os

import numpy as np
import pytest

from conftest import ROOT
from workflow.data import documents as module
from workflow.data.corpus import tokenize
from workflow.data.documents import read_documents, read_text, sha256_of_text
from workflow.errors import DataError

ARTICLES = [
    " = One = \n first \n = = Part = = \n more \n",
    " = Two = \n second \n",
]
LINES = ["", *"".join(ARTICLES).splitlines(keepends=True)]  # the rows of wikitext
DOCUMENTS = [article.rstrip("\n") for article in ARTICLES]


def read(files, column="text") -> list[str]:
    """The documents, joined from their pieces."""
    found = [""]
    for text, ends in read_documents(files, column):
        found[-1] += text
        if ends:
            found.append("")
    assert found.pop() == ""
    return found


@pytest.fixture
def table(tmp_path):
    """Writes rows to a parquet, JSON, CSV or TSV file."""
    import pandas

    def make(name: str, rows: list, column: str = "text"):
        path, frame = tmp_path / name, pandas.DataFrame({"id": range(len(rows)), column: rows})
        if name.endswith(".parquet"):
            frame.to_parquet(path)
        elif name.endswith(("csv", "tsv")):
            frame.to_csv(path, sep="," if name.endswith("csv") else "\t", index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
        return path

    return make


def test_reading_in_small_pieces_gives_the_same_token_ids(smollm2, monkeypatch):
    def token_ids() -> list[np.ndarray]:
        pieces = read_documents([ROOT / "input.txt"], "")
        return list(tokenize(pieces, smollm2.tokenizer.backend_tokenizer, 0, np.uint16))

    expected = token_ids()
    for size, is_cut in ((100, True), (1000, True), (30_000, False)):
        monkeypatch.setattr(module, "CHUNK_SIZE", size)
        monkeypatch.setattr(module, "PIECE_SIZE", size)
        ids = token_ids()
        assert np.array_equal(np.concatenate(ids), np.concatenate(expected))
        assert (len(ids) > len(expected)) == is_cut


def test_a_text_without_spaces_is_cut_too(monkeypatch):
    monkeypatch.setattr(module, "PIECE_SIZE", 10)
    pieces = list(module.split_documents(["x" * 35]))
    assert [(len(text), ends) for text, ends in pieces] == [(10, False), (10, False), (15, True)]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.ndjson", "a.csv", "a.tsv"]
)
def test_rows_are_lines_of_articles_or_documents(table, name):
    assert read([table(name, LINES)]) == DOCUMENTS
    rows = table(f"b{name}", ["", "one row\nof two lines", None, "another"])
    assert read([rows]) == ["one row\nof two lines", "another"]
    words = ["null", "NA", "None", "nan", "007", "2020-01-01", "True"]
    assert read([table(f"c{name}", words)]) == words


def test_a_json_list_is_read_and_a_row_can_lack_the_column(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"},\n {"id": 2}, {"text": "two"}]')
    assert read([tmp_path / "a.json"]) == ["one", "two"]


def test_articles_can_continue_in_the_next_file_but_complete_ones_are_not_joined(table):
    assert read([table("1.jsonl", LINES[:3]), table("2.jsonl", LINES[3:])]) == DOCUMENTS
    assert read([table("a.jsonl", DOCUMENTS)]) == DOCUMENTS


def test_documents_of_a_text_file_start_at_headings_also_in_a_gz_file(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("before\n\n" + "".join(ARTICLES))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read([packed]) == read([plain]) == ["before", *DOCUMENTS]


def test_hash_of_tables_depends_on_bytes_column_and_order(table):
    one, two = table("one.jsonl", ["a"]), table("two.jsonl", ["b"])
    inputs = (([one], "a"), ([one], "b"), ([one, two], "a"), ([two, one], "a"))
    assert len({sha256_of_text(files, column) for files, column in inputs}) == 4


def cut(path, name: str):
    """Removes the last 20 bytes of a file, and renames it."""
    path.write_bytes(path.read_bytes()[:-20])
    return path.rename(path.with_name(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: table("a.parquet", ["x"], "content"), "no column 'text', but id, content"),
        (lambda table: table("a.jsonl", ["x"], "content"), "no column 'text', but id, content"),
        (lambda table: table("a.parquet", [1, 2]), "column 'text' contains int, not text"),
        (lambda table: table("a.parquet", ["", None]), "column 'text' is empty"),
        (lambda table: cut(table("a.parquet", LINES), "b.parquet"), "it cannot be read as parquet"),
        (lambda table: cut(table("a.jsonl.gz", LINES), "b.jsonl.gz"), "it is damaged"),
        (lambda table: table("a.jsonl", LINES).with_name("a" * 300), "it cannot be read"),
    ],
)
def test_unreadable_table_is_refused_in_one_line(table, capfd, make, message):
    with pytest.raises(DataError, match=message) as caught:
        read([make(table)])
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"abc\xffdef", "byte 3 is not UTF-8; save the file as UTF-8"),
        ("a.txt", b"abc\0def", "character 3 is a NUL"),
        ("a.csv", b"text\ncaf\xe9\n", "byte 8 is not UTF-8; save the file as UTF-8"),
        ("a.csv", b'text\nx\n"y\n', "line 3: unexpected end of data"),
        ("a.csv", b"text\na, b\n", "line 2: it has more values than line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "byte 24 is not UTF-8; save"),
        ("a.jsonl", b'{"text": "x"}\nx\n', "line 2: Expecting value"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogates not allowed"),
        ("a.json", b'["x"]', "line 1: a str is not an object"),
    ],
)
def test_file_that_is_not_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read([tmp_path / name])


def test_path_that_is_not_a_file_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in (("absent", "no such file"), ("", "a folder"), ("fifo", "or a device")):
        with pytest.raises(DataError, match=message):
            read_text(tmp_path / path)


def test_byte_order_mark_and_windows_line_ends_are_removed(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf = A = \r\n\r\nx\r\n")
    assert read_text(tmp_path / "text.txt")[0] == " = A = \n\nx\n"
