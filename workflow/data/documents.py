"""Files become documents: plain text part by part, or a column of a table some rows at a time."""

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
from workflow.reference.hub import first_line

# wikitext's ` = Title = ` with the newlines before it, but not its ` = = Section = = `
HEADING = re.compile(r"\n+(?= = [^=\n].* = \n)")
PART = 1 << 20  # characters that are read at once
LONGEST = 1 << 18  # characters that are tokenised as one text: 1 MB takes 0.1 GB of memory
ROWS = 1000  # of a table, read at once
TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
NAME_TEXT = "name a text file: --set data.source=FILE"
NAME_COLUMN = "give another: --set data.column=NAME"


def documents(files: Sequence[Path], column: str) -> Iterator[tuple[str, bool]]:
    """The documents of `files` in order, as `split_documents` gives them. Raises DataError.

    column: of tables, where the text is. Each row is a document or, as in wikitext, a line of one:
    then documents start at headings, and can continue in the next file.
    """
    if not any(map(kind_of_table, files)):
        for file in files:
            yield from split_documents(read_parts(file))
        return
    batches = (rows for file in files for rows in read_rows(file, column) if rows)
    if (first := next(batches, None)) is None:
        raise DataError(files[0], f"column {column!r} is empty", NAME_COLUMN)
    batches = itertools.chain([first], batches)
    if HEADING.match("\n" + first[0]) and first[0].endswith("\n"):
        yield from split_documents(map("".join, batches))
    else:
        for row in itertools.chain.from_iterable(batches):
            yield from split_documents([row])


def split_documents(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents without the newlines around them, as (text, whether its document ends there).

    They start at headings. A long one is cut before a space, or anywhere if there is none.
    """
    parts = iter(parts)
    rest = next(parts, "").lstrip("\n")
    for part in itertools.chain(parts, ["\n"]):
        *complete, rest = HEADING.split(rest + part)
        yield from ((document, True) for document in complete if document.strip())
        while len(rest) > 2 * LONGEST:  # the heading at its end may be incomplete
            cut = max(rest.rfind(" ", 0, LONGEST), 0) or LONGEST
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest.rstrip("\n"), True


def kind_of_table(path: Path) -> str | None:
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def read_rows(path: Path, column: str) -> Iterator[list[str]]:
    """The rows of a table with text in `column`, some at a time. Raises DataError."""
    kind = kind_of_table(path)
    tables = read_parquet(path, column) if kind == "parquet" else read_by_datasets(path, kind)
    with opened(path):
        try:
            for table in tables:
                if column not in table:
                    what = f"it has no column {column!r}, but {', '.join(table)}"
                    raise DataError(path, what, NAME_COLUMN)
                if kinds := {type(row) for row in table[column]} - {str, type(None)}:
                    what = f"column {column!r} holds {kinds.pop().__name__}, not text"
                    raise DataError(path, what, NAME_COLUMN)
                yield [row for row in table[column] if row and row.strip()]
        except WorkflowError:
            raise
        except Exception as error:  # whatever a layer below says
            what = f"it cannot be read as {kind} ({first_line(error)})"
            raise DataError(path, what, "get a complete copy of it") from None


def read_by_datasets(path: Path, kind: str) -> Iterator[dict[str, list]]:
    """Some rows at a time, by column."""
    import datasets  # 2 s that plain text does not need

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the DataError says what is wrong
    file = glob.escape(str(path.resolve()))
    table = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
    yield from table.iter(batch_size=ROWS)


def read_parquet(path: Path, column: str) -> Iterator[dict[str, list]]:
    """The same; by `datasets`, the process can abort when it ends (apache/arrow#45214)."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        wanted = [column] if column in file.schema_arrow.names else None  # all, to name them
        yield from (batch.to_pydict() for batch in file.iter_batches(ROWS, columns=wanted))


def read_text(path: Path) -> tuple[str, str]:
    """A text file and the sha256 of its bytes. Raises DataError for anything but UTF-8 text."""
    return "".join(read_parts(path)), sha256_of_file(path)


def sha256_of_text(files: Sequence[Path], column: str) -> str:
    """The identity of the text in `files`: of one text file, the hash of its bytes."""
    digests = [sha256_of_file(file) for file in files]
    if len(files) == 1 and not kind_of_table(files[0]):
        return digests[0]
    read_as = [f"{digest} {kind_of_table(file)}" for digest, file in zip(digests, files)]
    return hashlib.sha256("\n".join([column, *read_as]).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a regular file. Raises DataError, also for what fails while they are read."""
    try:
        if not path.is_file():
            what = "this is a folder or a device" if path.exists() else "there is no such file"
            raise DataError(path, what, NAME_TEXT)
        with open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, f"it is damaged ({error})", "get a complete copy of it") from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
        raise DataError(path, what, "fix that or name another file") from None


def read_parts(path: Path) -> Iterator[str]:
    """A text file, or one packed as .gz, part by part; line ends become newlines.

    Raises DataError for anything but UTF-8 text, with the place.
    """
    place, blank = 0, True
    with opened(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        text = io.TextIOWrapper(file, "utf-8-sig")
        try:
            while part := text.read(PART):
                if (nul := part.find("\0")) >= 0:
                    what = f"character {place + nul} is a NUL: this is no text"
                    raise DataError(path, what, NAME_TEXT)
                place, blank = place + len(part), blank and not part.strip()
                yield part
        except UnicodeDecodeError as error:
            what = f"byte {file.tell() - len(error.object) + error.start} is not UTF-8"
            raise DataError(path, what, "save the file as UTF-8") from None
    if blank:
        raise DataError(path, "the file is empty", "give a longer text")
