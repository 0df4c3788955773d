"""Reads documents from text files and from tables (parquet, JSON lines, CSV), in parts."""

import glob
import gzip
import hashlib
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from workflow.errors import DataError, WorkflowError
from workflow.reference.hub import short_cause

# the newlines before a wikitext title ` = Title = `, but not before a ` = = Section = = `
HEADING = re.compile(r"\n+(?= = [^=\n].* = \n)")
CHUNK_SIZE = 1 << 20  # characters read at once
PIECE_SIZE = 1 << 18  # characters; longer documents are cut. Tokenising 1 MB needs 0.1 GB
ROWS_AT_ONCE = 1000  # of a table
TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
TEXT_FILE_FIX = "name a text file: --set data.source=FILE"
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


def table_format(path: Path) -> str | None:
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def read_table(path: Path, column: str) -> Iterator[list[str]]:
    """The non-empty texts in `column`, some rows at a time. Raises DataError."""
    kind = table_format(path)
    tables = read_parquet(path, column) if kind == "parquet" else read_json_or_csv(path, kind)
    with open_file(path):
        try:
            for table in tables:
                if column not in table:
                    what = f"it has no column {column!r}, but {', '.join(table)}"
                    raise DataError(path, what, COLUMN_FIX)
                if kinds := {type(row) for row in table[column]} - {str, type(None)}:
                    what = f"column {column!r} contains {kinds.pop().__name__}, not text"
                    raise DataError(path, what, COLUMN_FIX)
                yield [row for row in table[column] if row and row.strip()]
        except WorkflowError:
            raise
        except Exception as error:  # any error of the libraries below
            what = f"it cannot be read as {kind} ({short_cause(error)})"
            raise DataError(path, what, "get a complete copy of it") from None


def read_json_or_csv(path: Path, kind: str) -> Iterator[dict[str, list]]:
    """The columns of a table, some rows at a time."""
    import datasets  # takes 2 s; plain text does not need it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our DataError is enough
    file = glob.escape(str(path.resolve()))
    table = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
    yield from table.iter(batch_size=ROWS_AT_ONCE)


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


def read_chunks(path: Path) -> Iterator[str]:
    """The text of a text file or a .gz file, in chunks. Line ends become newlines.

    Raises DataError, with the position, if it is not UTF-8 text.
    """
    position, empty = 0, True
    with open_file(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        text = io.TextIOWrapper(file, "utf-8-sig")
        try:
            while chunk := text.read(CHUNK_SIZE):
                if (nul := chunk.find("\0")) >= 0:
                    what = f"character {position + nul} is a NUL: this is not a text file"
                    raise DataError(path, what, TEXT_FILE_FIX)
                position, empty = position + len(chunk), empty and not chunk.strip()
                yield chunk
        except UnicodeDecodeError as error:
            what = f"byte {file.tell() - len(error.object) + error.start} is not UTF-8"
            raise DataError(path, what, "save the file as UTF-8") from None
    if empty:
        raise DataError(path, "the file is empty", "give a longer text")
