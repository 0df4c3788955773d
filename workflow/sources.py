"""Where the text comes from: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.repocard import RepoCard

from .documents import DataError, first_line
from .hub import SourceError, snapshot
from .settings import DataSettings


@dataclass(frozen=True)
class Source:
    """Files with text: to train on and, where a data set has its own, held out."""

    name: str  # of the file, the folder, or the data set
    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    column: str = "text"  # of tables
    revision: str = ""  # the Hub's commit


def find_source(settings: DataSettings) -> Source:
    """The text of `data.source`; for `auto`, the Hub's or, where it cannot be had, `data.text`.

    Raises SourceError when the Hub has been asked for and fails, DataError for all else.
    """
    if settings.source not in ("auto", "hub"):
        return from_path(Path(settings.source), settings.column)
    try:
        return from_hub(settings.dataset, settings.name, settings.revision, settings.column)
    except SourceError as error:
        if settings.source == "hub":
            raise
        passed_over(str(error).partition(";")[0], settings.text)
        return from_path(settings.text, settings.column)


@functools.cache  # a run asks several times; it is said once
def passed_over(why: str, instead: Path) -> None:
    print(f"The Hub is passed over: {why}. Data: {instead}")


def from_path(path: Path, column: str) -> Source:
    """A file, or the files of a folder as `datasets` finds and splits them."""
    if not path.is_dir():
        return Source(path.name, (path,), column=column)
    splits = find_splits(path, None)
    taken = {file.resolve() for files in splits.values() for file in files}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.resolve() not in taken and not file.name.startswith("."):
            print(f"Note: {file} is of another kind than most of {path}, and left out")
    return Source(path.name, column=column, **wanted(splits, path))


@functools.lru_cache(maxsize=1)  # a run asks several times, and the network may be slow
def from_hub(dataset: str, name: str | None, revision: str, column: str) -> Source:
    """A configuration of a data set on the Hub, from the cache or downloaded."""
    fetch = functools.partial(snapshot, dataset, revision, repo_type="dataset")
    folder = fetch(["README.md", f"{name}/*" if name else "*"], complete=has("README.md"))
    known = configurations(folder / "README.md")
    if name and known and name not in known:
        what = f"it has no configuration {name!r}, but {', '.join(known)}"
        raise DataError(dataset, what, "mend data.name")
    called = f"{dataset} {name}" if name else dataset
    if name in known:
        patterns = list(itertools.chain(*known[name].values()))
        folder = fetch(["README.md", *patterns], complete=has(*patterns))
        splits = {split: matching(folder, here) for split, here in known[name].items()}
    else:
        splits = find_splits(folder, name)
    return Source(called, column=column, revision=folder.name, **wanted(splits, called))


def has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: all(any(folder.glob(pattern)) for pattern in patterns)


def matching(folder: Path, patterns: list[str]) -> tuple[Path, ...]:
    return tuple(file for pattern in patterns for file in sorted(folder.glob(pattern)))


def configurations(card: Path) -> dict[str | None, dict[str, list[str]]]:
    """Each configuration of a data set's card: its name, and the patterns of each split's files."""
    if not card.is_file():
        return {}
    data = RepoCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
    found = {}
    for row in data.get("configs") or []:
        files = row.get("data_files", [])
        parts = files if isinstance(files, list) else [files]
        splits = found[row["config_name"]] = {}
        for part in parts:
            part = part if isinstance(part, dict) else {"path": part}
            paths = [part["path"]] if isinstance(part["path"], str) else part["path"]
            splits.setdefault(part.get("split", "train"), []).extend(paths)
    return found


def find_splits(folder: Path, name: str | None) -> dict[str, tuple[Path, ...]]:
    """Split -> files, as `datasets` reads a folder: by its card, or by the names of its files."""
    from datasets import load_dataset_builder  # 2 s that plain text does not need

    try:
        files = load_dataset_builder(str(folder), name).config.data_files
    except Exception as error:  # whatever a layer below says
        raise DataError(folder, first_line(error), "name a file, or mend data.name") from None
    return {str(split): tuple(map(Path, paths)) for split, paths in files.items()}


def wanted(splits: dict[str, tuple[Path, ...]], where: object) -> dict[str, tuple[Path, ...]]:
    if not splits.get("train"):
        others = ", ".join(split for split, files in splits.items() if files)
        what = "it has no files to train on" + (f", but of: {others}" if others else "")
        raise DataError(where, what, "choose another")
    return {"train": splits["train"], "validation": splits.get("validation", ())}
