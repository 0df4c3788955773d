"""Reads documents from text files and from tables (parquet, JSON, CSV, TSV), in parts."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from workflow.errors import DataError, WorkflowError
from workflow.reference.hub import short_cause

# the newlines before a wikitext title ` = Title = `, but not before a ` = = Section = = `
HEADING = re.compile(r"\n+(?= = [^=\n].* = \n)")
CHUNK_SIZE = 1 << 20  # characters read at once
PIECE_SIZE = 1 << 18  # characters; longer documents are cut. Tokenising 1 MB needs 0.1 GB
ROWS_AT_ONCE = 1000  # of a table
# "CSV" was "csv" when rows such as `NA` were dropped: the name is a part of the text's hash
TABLES = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
TABLES |= {".csv": "CSV", ".tsv": "TSV"}
TEXT_FILE_FIX = "name a text file"
COLUMN_FIX = "choose another column: --set data.column=NAME"


def read_documents(files: Sequence[Path], column: str) -> Iterator[tuple[str, bool]]:
    """The documents of `files`, in order, as pieces (see `split_documents`). Raises DataError.

    column: the table column with the text. A row is one document. In wikitext, a row is
    one line; then documents start at headings and can continue in the next file.
    """
    if not any(map(table_format, files)):
        for file in files:
            yield from split_documents(read_chunks(file))
        return
    batches = (rows for file in files for rows in read_table(file, column) if rows)
    if (first := next(batches, None)) is None:
        raise DataError(files[0], f"column {column!r} is empty", COLUMN_FIX)
    batches = itertools.chain([first], batches)
    if HEADING.match("\n" + first[0]) and first[0].endswith("\n"):
        yield from split_documents(map("".join, batches))
    else:
        for row in itertools.chain.from_iterable(batches):
            yield from split_documents([row])


def split_documents(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of documents: (text, whether the document ends here).

    A document starts at a heading; newlines around it are removed. A long document is cut into
    pieces before a space or, if there is none, anywhere.
    """
    chunks = iter(chunks)
    rest = next(chunks, "").lstrip("\n")
    for chunk in itertools.chain(chunks, ["\n"]):
        *complete, rest = HEADING.split(rest + chunk)
        yield from ((document, True) for document in complete if document.strip())
        while len(rest) > 2 * PIECE_SIZE:  # a heading at the end may be incomplete
            cut = max(rest.rfind(" ", 0, PIECE_SIZE), 0) or PIECE_SIZE
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest.rstrip("\n"), True


def is_text(path: Path) -> bool:
    """Whether a file of a folder is read, by its name."""
    return path.name.lower().removesuffix(".gz").endswith((".txt", *TABLES))


def table_format(path: Path) -> str | None:
    return TABLES.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def read_table(path: Path, column: str) -> Iterator[list[str]]:
    """The non-empty texts in `column`, some rows at a time. Raises DataError."""
    kind = table_format(path)
    tables = read_parquet(path, column) if kind == "parquet" else read_rows(path, kind)
    with open_file(path):
        try:
            for table in tables:
                if column not in table:
                    names = ", ".join(f"{name:.40}" for name in table)
                    what = f"it has no column {column!r}, but {names}"
                    raise DataError(path, what, COLUMN_FIX)
                if kinds := {type(row) for row in table[column]} - {str, type(None)}:
                    what = f"column {column!r} contains {kinds.pop().__name__}, not text"
                    raise DataError(path, what, COLUMN_FIX)
                rows = [row for row in table[column] if row and row.strip()]
                "".join(rows).encode()  # JSON can contain half a character
                yield rows
        except WorkflowError:
            raise
        except Exception as error:  # any error of the libraries below
            what = f"it cannot be read as {kind} ({short_cause(error)})"
            raise DataError(path, what, "correct the file, or get a complete copy") from None


def read_rows(path: Path, kind: str) -> Iterator[dict[str, list]]:
    """The columns of a JSON, CSV or TSV file, some rows at a time."""
    names: dict[str, None] = {}  # a row of JSON can lack a column
    with open_text(path) as text:
        rows = read_json(text) if kind == "json" else read_csv(text, "," if kind == "CSV" else "\t")
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            names |= dict.fromkeys(itertools.chain.from_iterable(batch))
            yield {name: [row.get(name) for row in batch] for name in names}


def read_json(text: TextIO) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, or of one JSON list."""
    is_list = text.read(CHUNK_SIZE).lstrip().startswith("[")
    text.seek(0)
    lines = [(1, text.read())] if is_list else enumerate(text, 1)
    for number, line in lines:
        try:
            content = json.loads(line) if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number + error.lineno - 1}: {error.msg}") from None
        for row in content if isinstance(content, list) else [content]:
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: a {type(row).__name__} is not an object")
            yield row


def read_csv(text: TextIO, delimiter: str) -> Iterator[dict[str, str]]:
    """The rows by the names in the first one. Every value is text: also `NA`, `null` and `007`."""
    csv.field_size_limit(2**31 - 1)  # characters; the default is 128 KB
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row:
                raise csv.Error("it has more values than line 1")
            yield row
    except csv.Error as error:
        raise ValueError(f"line {rows.reader.line_num}: {error}") from None


def read_parquet(path: Path, column: str) -> Iterator[dict[str, list]]:
    """The same for parquet. With `datasets`, the process can abort at exit (apache/arrow#45214)."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        # without this column, all columns are read and their names go into the error
        columns = [column] if column in file.schema_arrow.names else None
        batches = file.iter_batches(ROWS_AT_ONCE, columns=columns)
        yield from (batch.to_pydict() for batch in batches)


def read_text(path: Path) -> tuple[str, str]:
    """A text and the sha256 of the file's bytes. Raises DataError if it is not UTF-8 text."""
    return "".join(read_chunks(path)), sha256_of_file(path)


def sha256_of_text(files: Sequence[Path], column: str) -> str:
    """The hash of the text in `files`. For one text file, it is the hash of its bytes."""
    digests = [sha256_of_file(file) for file in files]
    if len(files) == 1 and not table_format(files[0]):
        return digests[0]
    read_as = [f"{digest} {table_format(file)}" for digest, file in zip(digests, files)]
    return hashlib.sha256("\n".join([column, *read_as]).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file. Errors while opening or reading become a DataError."""
    try:
        if not path.is_file():
            what = "this is a folder or a device" if path.exists() else "there is no such file"
            raise DataError(path, what, TEXT_FILE_FIX)
        with open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, f"it is damaged ({error})", "get a complete copy of it") from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
        raise DataError(path, what, "fix that, or choose another file") from None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text file or a .gz file. Line ends become newlines.

    Raises DataError, with the position, if it is not UTF-8 text.
    """
    with open_file(path) as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as file:
        try:
            yield io.TextIOWrapper(file, "utf-8-sig")
        except UnicodeDecodeError as error:
            what = f"byte {file.tell() - len(error.object) + error.start} is not UTF-8"
            raise DataError(path, what, "save the file as UTF-8") from None


def read_chunks(path: Path) -> Iterator[str]:
    """The text of a text file or a .gz file, in chunks. Raises DataError if it is not text."""
    position, empty = 0, True
    with open_text(path) as text:
        while chunk := text.read(CHUNK_SIZE):
            if (nul := chunk.find("\0")) >= 0:
                what = f"character {position + nul} is a NUL: this is not a text file"
                raise DataError(path, what, TEXT_FILE_FIX)
            position, empty = position + len(chunk), empty and not chunk.strip()
            yield chunk
    if empty:
        raise DataError(path, "the file is empty", "give a longer text")
