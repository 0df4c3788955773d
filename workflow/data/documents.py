"""Files become documents: plain text, part by part, or a column of a table, some rows at a time."""

from __future__ import annotations

import codecs
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
from typing import Any

from workflow.errors import DataError, WorkflowError

# wikitext's ` = Title = `, not its ` = = Section = = `
HEADING = re.compile(r"^(?= = [^=\n].* = $)", re.MULTILINE)
GAP = re.compile(r"(?<=\w) (?=\w)")
PART = 1 << 20  # characters, or bytes, that are read and tokenised at once
ROWS = 1000  # of a table, that are read at once
TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
PACKED = {".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"}  # as .gz is, but not read here


def documents(files: Iterable[Path], column: str) -> Iterator[tuple[str, bool]]:
    """The documents of `files` in order; see `pieces`.

    column: of tables, where the text is; one can go on in the next. Raises DataError.
    """
    for table, group in itertools.groupby(files, key=lambda file: bool(kind_of_table(file))):
        if table:
            yield from documents_of_rows(list(group), column)
        else:
            yield from (piece for file in group for piece in pieces(read_parts(file)))


def documents_of_rows(files: list[Path], column: str) -> Iterator[tuple[str, bool]]:
    """Each row is a document, or a line of one, as in wikitext: then they start at headings."""
    rows = (row for file in files for row in read_rows(file, column))
    filled = (row for row in rows if row.strip())
    if (first := next(filled, None)) is None:
        raise DataError(files[0], f"column {column!r} is empty", "name another: data.column")
    if HEADING.match(first) and first.endswith("\n"):
        yield from pieces(gathered(itertools.chain([first], filled)))
    else:
        yield from (piece for row in itertools.chain([first], filled) for piece in pieces([row]))


def gathered(texts: Iterable[str]) -> Iterator[str]:
    """The same text in parts of about `PART`."""
    waiting, size = [], 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size > PART:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def pieces(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents without the newlines around them, as (text, whether it ends its document).

    A document is one piece, or several where it is longer than `PART`: cut before a space between
    words, where no tokenizer of the family sees one word, or anywhere if there is none for so long.
    """
    rest, inside = "", False  # `inside`: an earlier piece of this document is out
    for part in itertools.chain(parts, ["\n"]):
        *whole, rest = split_whole_lines(rest + part)
        for document in whole:
            yield from ended(document, inside)
            inside = False
        while len(rest) > PART:
            cut = last_gap(rest[:PART])
            yield rest[:cut] if inside else rest[:cut].lstrip("\n"), False
            rest, inside = rest[cut:], True
    yield from ended(rest, inside)


def ended(document: str, inside: bool) -> Iterator[tuple[str, bool]]:
    """A document, or the end of one, as its last piece; nothing if it is blank."""
    if inside or document.strip():
        yield document.rstrip("\n") if inside else document.strip("\n"), True


def split_whole_lines(text: str) -> list[str]:
    """Split at headings, but not at one in the last line, which may go on."""
    end = text.rfind("\n") + 1
    *whole, last = HEADING.split(text[:end])
    return [*whole, last + text[end:]]


def last_gap(text: str) -> int:
    gaps = [match.start() for match in GAP.finditer(text, len(text) // 2)]
    return gaps[-1] if gaps else len(text)


# --- read -----------------------------------------------------------------------------------------


def kind_of_table(path: Path) -> str | None:
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def read_rows(path: Path, column: str) -> Iterator[str]:
    """A column of text of a table, some rows at a time. Raises DataError."""
    sha256_of_file(path)
    kind = kind_of_table(path)
    read = read_parquet if kind == "parquet" else read_by_datasets
    try:
        for rows in read(path, column):
            if column not in rows:
                what = f"it has no column {column!r}, but {', '.join(rows)}"
                raise DataError(path, what, "give another: --set data.column=NAME")
            yield from (text_of(value, path, column) for value in rows[column])
    except WorkflowError:
        raise
    except Exception as error:  # whatever a layer below says
        what = f"it cannot be read as {kind} ({first_line(error)})"
        raise DataError(path, what, "get a whole copy of it") from None


def read_by_datasets(path: Path, column: str) -> Iterator[dict[str, list]]:
    """Some rows at a time, by column."""
    import datasets  # 2 s that plain text does not need

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, here
    file = glob.escape(str(path.resolve()))
    kind = kind_of_table(path)
    table = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
    yield from table.iter(batch_size=ROWS)


def read_parquet(path: Path, column: str) -> Iterator[dict[str, list]]:
    """The same; by `datasets`, the process can abort when it ends (apache/arrow#45214)."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            yield {name: [] for name in file.schema_arrow.names}
        for batch in file.iter_batches(ROWS, columns=[column]):
            yield batch.to_pydict()


def text_of(value: Any, path: Path, column: str) -> str:
    if not isinstance(value, str | None):
        what = f"column {column!r} holds {type(value).__name__}, not text"
        raise DataError(path, what, "give another: --set data.column=NAME")
    return value or ""


def first_line(error: Exception) -> str:
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: Path) -> tuple[str, str]:
    """A text file and the sha256 of its bytes. Raises DataError for all that is no UTF-8 text."""
    return "".join(read_parts(path)), sha256_of_file(path)


def sha256_of_text(files: Sequence[Path], column: str) -> str:
    """The identity of the text in `files`: of one text file, the hash of its bytes."""
    digests = [sha256_of_file(file) for file in files]
    if len(files) == 1 and not kind_of_table(files[0]):
        return digests[0]
    read_as = [f"{digest} {kind_of_table(file)}" for digest, file in zip(digests, files)]
    return hashlib.sha256("\n".join([column, *read_as]).encode()).hexdigest()


def size_of_text(file: Path) -> int | None:
    """About how many bytes of text a file has, if that is known before it is read."""
    if file.suffix == ".gz":
        return None
    if kind_of_table(file) == "parquet":
        from pyarrow import ArrowException, parquet

        try:
            data = parquet.read_metadata(file)
        except (OSError, ArrowException):
            return None  # what is wrong is said when it is read
        return sum(data.row_group(i).total_byte_size for i in range(data.num_row_groups))
    return file.stat().st_size


def sha256_of_file(path: Path) -> str:
    do = "name a text file: --set data.source=FILE"
    if path.suffix in PACKED:
        raise DataError(path, "this kind of archive is not read here", "unpack it, or use gzip")
    with reading(path):
        if not path.exists():
            raise DataError(path, "there is no such file", do)
        if not path.is_file():
            raise DataError(path, "this is a folder or a device, not a file", do)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, f"it is damaged ({error})", "get a whole copy of it") from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
        raise DataError(path, what, "mend that or name another file") from None


def read_parts(path: Path) -> Iterator[str]:
    """A text file, part by part, so that its size is of no account; line ends become newlines.

    One that ends in .gz is unpacked on the way.
    Raises DataError for all that is no UTF-8 text, with the place.
    """
    sha256_of_file(path)
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    place, something, part = 0, False, b"more"
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        while part:
            part = file.read(PART)
            pending = len(utf8.getstate()[0])
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                what = f"byte {place - pending + error.start} is not UTF-8"
                raise DataError(path, what, "save the file as UTF-8") from None
            if b"\0" in part:
                what = f"byte {place + part.index(0)} is a NUL: this is no text"
                raise DataError(path, what, "name a text file: --set data.source=FILE")
            text = text.removeprefix("\ufeff") if place == 0 else text
            place, something = place + len(part), something or bool(text.strip())
            yield text
    if not something:
        raise DataError(path, "the file is empty", "give a longer text")
