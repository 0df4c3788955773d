"""Where the text comes from: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from workflow.config.settings import DataSettings
from workflow.data.documents import first_line
from workflow.errors import DataError, SourceError
from workflow.reference.hub import snapshot

SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # how the Hub numbers the files of one split


@dataclass(frozen=True)
class Source:
    """Files with text: to train on and, if a data set has a validation split, held out."""

    name: str  # of the file, the folder, or the data set
    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    column: str = "text"  # of tables
    revision: str = ""  # the Hub's commit


def find_source(settings: DataSettings) -> Source:
    """The text of `data.source`; for `auto`, the Hub's or, if that is not available, `data.text`.

    Raises SourceError when the Hub was asked for and fails, DataError for anything else.
    """
    if settings.source not in ("auto", "hub"):
        return from_path(Path(settings.source), settings.column)
    try:
        return from_hub(settings)
    except SourceError as error:
        if settings.source == "hub":
            raise
        print(f"The Hub is skipped: {str(error).partition(';')[0]}")
        return from_path(settings.text, settings.column)


def from_path(path: Path, column: str) -> Source:
    """A file, or the files of a folder as `datasets` finds and splits them."""
    if not os.path.isdir(path):  # no error for an impossible name
        return Source(path.name, (path,), column=column)
    splits = find_splits(path, None)
    used = {file.resolve() for files in splits.values() for file in files}
    if left := [name for name in names(path) if (path / name).resolve() not in used]:
        print(f"Note: of {path}, {len(left)} files of another kind are left out, such as {left[0]}")
    return Source(path.name, *train_and_validation(splits, path), column)


def from_hub(settings: DataSettings) -> Source:
    """A configuration of a data set on the Hub, from the cache or downloaded."""
    dataset, name = settings.dataset, settings.name
    fetch = functools.partial(snapshot, dataset, settings.revision, repo_type="dataset")
    first = ["README.md", f"{name}/*"] if name else ["README.md"]
    folder = fetch(first, complete=lambda folder: bool(matching(folder, first)))
    configurations, default = read_card(folder / "README.md", dataset)
    name = name or default
    if configurations and name not in configurations:
        what = f"it has no configuration {name!r}, but {', '.join(configurations)}"
        raise DataError(dataset, what, "name one of them: data.name")
    if configurations:
        patterns = [one for patterns in configurations[name].values() for one in patterns]
        folder = fetch(["README.md", *patterns], complete=lambda folder: has_all(folder, patterns))
        splits = {split: matching(folder, these) for split, these in configurations[name].items()}
    else:
        folder = fetch(["*"], complete=lambda folder: has_all(folder, ["*"]))
        splits = find_splits(folder, name)
    title = f"{dataset} {name}" if name else dataset
    return Source(title, *train_and_validation(splits, title), settings.column, folder.name)


def names(folder: Path) -> list[str]:
    """The files below a folder except hidden ones, as paths relative to it."""
    found = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [file.as_posix() for file in found if not any(p.startswith(".") for p in file.parts)]


def matching(folder: Path, patterns: list[str]) -> tuple[Path, ...]:
    """The files below a folder that a pattern fits, as the Hub's client understands it."""
    fits = filter_repo_objects(names(folder), allow_patterns=patterns)
    return tuple(folder / name for name in fits)


def has_all(folder: Path, patterns: list[str]) -> bool:
    """Whether each pattern has files here, and no numbered one is missing."""
    split = [SHARD.split(str(file)) for file in matching(folder, patterns)]
    shards = Counter((parts[0], parts[1]) for parts in split if len(parts) > 1)
    complete = all(count >= int(total) for (_, total), count in shards.items())
    return complete and all(matching(folder, [pattern]) for pattern in patterns)


def read_card(card: Path, dataset: str) -> tuple[dict[str, dict[str, list[str]]], str | None]:
    """Of a data set's card: configuration -> split -> patterns of files; the default's name."""
    if not card.is_file():
        return {}, None
    from datasets.data_files import sanitize_patterns  # 2 s that plain text does not need
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
        configurations = MetadataConfigs.from_dataset_card_data(data)
        patterns = {
            str(name): sanitize_patterns(configuration.get("data_files", []))
            for name, configuration in configurations.items()
        }
        return patterns, configurations.get_default_config_name()
    except Exception as error:  # of YAML, of types
        what = f"its README.md cannot be read ({first_line(error)})"
        raise DataError(dataset, what, "choose another, or give its files as data.source") from None


def find_splits(folder: Path, name: str | None) -> dict[str, tuple[Path, ...]]:
    """Split -> files, as `datasets` reads a folder: by its card, or by the names of its files."""
    from datasets import load_dataset_builder  # 2 s that plain text does not need

    try:
        files = load_dataset_builder(str(folder.resolve()), name).config.data_files
    except Exception as error:  # whatever a layer below says
        raise DataError(folder, first_line(error), "name a file, or fix data.name") from None
    return {str(split): tuple(map(Path, paths)) for split, paths in files.items()}


def train_and_validation(
    splits: dict[str, tuple[Path, ...]], where: object
) -> tuple[tuple[Path, ...], ...]:
    if not splits.get("train"):
        others = ", ".join(split for split, files in splits.items() if files)
        what = "it has no files to train on" + (f", but of: {others}" if others else "")
        raise DataError(where, what, "choose another")
    return splits["train"], splits.get("validation", ())
