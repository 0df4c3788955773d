"""Where the text comes from: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.repocard import RepoCard
from pydantic import BaseModel, TypeAdapter

from workflow.config.settings import DataSettings
from workflow.data.documents import first_line, reading
from workflow.errors import DataError, SourceError
from workflow.reference.hub import snapshot

PART_OF = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # how the Hub numbers the files of one split


@dataclass(frozen=True)
class Source:
    """Files with text: to train on and, where a data set has its own, held out."""

    name: str  # of the file, the folder, or the data set
    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    column: str = "text"  # of tables
    revision: str = ""  # the Hub's commit


class Files(BaseModel):
    """Of a data set's card: the files of one split, as patterns."""

    split: str = "train"
    path: str | list[str]


class Configuration(BaseModel):
    """Of a data set's card: a part of it that can be chosen by name."""

    config_name: str
    data_files: str | list[str | Files] = []

    @property
    def splits(self) -> dict[str, list[str]]:
        """Split -> patterns."""
        found: dict[str, list[str]] = {}
        parts = [self.data_files] if isinstance(self.data_files, str) else self.data_files
        for part in parts:
            files = Files(path=part) if isinstance(part, str) else part
            paths = [files.path] if isinstance(files.path, str) else files.path
            found.setdefault(files.split, []).extend(paths)
        return found


def find_source(settings: DataSettings) -> Source:
    """The text of `data.source`; for `auto`, the Hub's or, where it cannot be had, `data.text`.

    Raises SourceError when the Hub has been asked for and fails, DataError for all else.
    """
    if settings.source not in ("auto", "hub"):
        return from_path(Path(settings.source), settings.column)
    wanted = (settings.dataset, settings.name, settings.revision, settings.column)
    if settings.source == "hub":
        return from_hub(*wanted)
    return from_hub_if_there(*wanted) or from_path(settings.text, settings.column)


@functools.cache  # a run asks several times: it must get the same answer, and be told once
def from_hub_if_there(*wanted: str | None) -> Source | None:
    try:
        return from_hub(*wanted)
    except SourceError as error:
        print(f"The Hub is passed over: {str(error).partition(';')[0]}")
        return None


def from_path(path: Path, column: str) -> Source:
    """A file, or the files of a folder as `datasets` finds and splits them."""
    with reading(path):
        if not path.is_dir():
            return Source(path.name, (path,), column=column)
        splits = find_splits(path, None)
        taken = {file.resolve() for files in splits.values() for file in files}
        left = [name for name in names(path) if (path / name).resolve() not in taken]
    if left:
        say(f"Note: of {path}, {len(left)} files of another kind are left out, such as {left[0]}")
    return Source(path.name, column=column, **chosen(splits, path))


@functools.cache
def say(line: str) -> None:
    """Prints a line once, however often it comes to it."""
    print(line)


@functools.lru_cache(maxsize=1)  # a run asks several times, and the network may be slow
def from_hub(dataset: str, name: str | None, revision: str, column: str) -> Source:
    """A configuration of a data set on the Hub, from the cache or downloaded."""
    fetch = functools.partial(snapshot, dataset, revision, repo_type="dataset")
    first = ["README.md", f"{name}/*"] if name else ["README.md"]
    folder = fetch(first, complete=lambda folder: bool(matching(folder, first)))
    known = configurations(folder / "README.md", dataset)
    if known and name not in known and (name or len(known) > 1):
        what = f"it has no configuration {name!r}, but {', '.join(known)}"
        raise DataError(dataset, what, "name one of them: data.name")
    name = name or next(iter(known), None)
    if name in known:
        patterns = list(itertools.chain(*known[name].values()))
        folder = fetch(["README.md", *patterns], complete=lambda folder: whole(folder, patterns))
        splits = {split: matching(folder, here) for split, here in known[name].items()}
    else:
        folder = fetch(["*"], complete=lambda folder: whole(folder, ["*"]))
        splits = find_splits(folder, name)
    called = f"{dataset} {name}" if name else dataset
    return Source(called, column=column, revision=folder.name, **chosen(splits, called))


def names(folder: Path) -> list[str]:
    """The files below a folder, hidden ones aside, as paths relative to it."""
    found = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [file.as_posix() for file in found if not any(p.startswith(".") for p in file.parts)]


def matching(folder: Path, patterns: list[str]) -> tuple[Path, ...]:
    """The files below a folder that a pattern fits, as the Hub's client understands it."""
    fits = (name for name in names(folder) if any(fnmatch(name, pattern) for pattern in patterns))
    return tuple(folder / name for name in fits)


def whole(folder: Path, patterns: list[str]) -> bool:
    """Whether each pattern has files here, and of those that are numbered none is missing."""
    numbered = [PART_OF.split(str(file)) for file in matching(folder, patterns)]
    parts = Counter((split[0], split[1]) for split in numbered if len(split) > 1)
    lacking = [count for (_, of), count in parts.items() if count < int(of)]
    return not lacking and all(matching(folder, [pattern]) for pattern in patterns)


def configurations(card: Path, dataset: str) -> dict[str, dict[str, list[str]]]:
    """Each configuration of a data set's card: its name, and the patterns of each split's files."""
    if not card.is_file():
        return {}
    try:
        rows = RepoCard(card.read_text("utf-8"), ignore_metadata_errors=True).data.get("configs")
        found = TypeAdapter(list[Configuration]).validate_python(rows or [])
    except Exception as error:  # of YAML, of types
        what = f"its README.md cannot be read ({first_line(error)})"
        raise DataError(dataset, what, "choose another, or give its files as data.source") from None
    return {row.config_name: row.splits for row in found}


def find_splits(folder: Path, name: str | None) -> dict[str, tuple[Path, ...]]:
    """Split -> files, as `datasets` reads a folder: by its card, or by the names of its files."""
    from datasets import load_dataset_builder  # 2 s that plain text does not need

    try:
        files = load_dataset_builder(str(folder.resolve()), name).config.data_files
    except Exception as error:  # whatever a layer below says
        raise DataError(folder, first_line(error), "name a file, or mend data.name") from None
    return {str(split): tuple(map(Path, paths)) for split, paths in files.items()}


def chosen(splits: dict[str, tuple[Path, ...]], where: object) -> dict[str, tuple[Path, ...]]:
    if not splits.get("train"):
        others = ", ".join(split for split, files in splits.items() if files)
        what = "it has no files to train on" + (f", but of: {others}" if others else "")
        raise DataError(where, what, "choose another")
    return {"train": splits["train"], "validation": splits.get("validation", ())}
