"""Finds the text to train on: a file, a folder, or a data set on the Hub."""

import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from workflow.config import DataSettings
from workflow.data.documents import is_text
from workflow.errors import DataError, SourceError
from workflow.reference.hub import matching_files, short_cause, snapshot


@dataclass(frozen=True)
class Source:
    """Text files for training and, if the data has a validation split, for validation."""

    name: str  # of the file, the folder, or the data set
    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    column: str = "text"  # the table column with the text
    revision: str = ""  # the Hub's commit


def find_source(settings: DataSettings) -> Source:
    """The text of `data.source`. `auto` tries the Hub first, then `data.fallback_text`.

    Raises SourceError if `data.source` is `hub` and the Hub fails, otherwise DataError.
    """
    if settings.source not in ("auto", "hub"):
        return local_source(Path(settings.source), settings.column)
    try:
        return hub_source(settings)
    except SourceError as error:
        if settings.source == "hub":
            raise
        print(f"The Hub is skipped: {str(error).partition(';')[0]}")
        return local_source(settings.fallback_text, settings.column)


def local_source(path: Path, column: str) -> Source:
    """One file, or a folder that the `datasets` library splits into train and validation."""
    if not os.path.isdir(path):  # Path.is_dir can raise for an invalid name
        return Source(path.name, (path,), column=column)
    splits = find_splits(path, None)
    used = {file.resolve() for files in splits.values() for file in files}
    if unused := [file for file in matching_files(path, ["*"]) if file.resolve() not in used]:
        example = unused[0].relative_to(path)
        print(f"Note: {len(unused)} files in {path} are not used, for example {example}")
    return make_source(path.name, splits, column)


def hub_source(settings: DataSettings) -> Source:
    """One configuration of a data set on the Hub, from the cache or downloaded."""
    dataset = settings.dataset
    fetch = functools.partial(snapshot, dataset, settings.revision, repo_type="dataset")
    first = ["README.md", f"{settings.name}/*"] if settings.name else ["README.md"]
    name, splits = read_card(fetch(first) / "README.md", settings)
    patterns = (
        [pattern for patterns in splits.values() for pattern in patterns] if splits else ["*"]
    )
    folder = fetch(["README.md", *patterns], needed=patterns)
    files = {split: matching_files(folder, patterns) for split, patterns in splits.items()}
    title = f"{dataset} {name}" if name else dataset
    files = files or find_splits(folder, name)
    return make_source(title, files, settings.column, folder.name)


def read_card(card: Path, settings: DataSettings) -> tuple[str | None, dict[str, list[str]]]:
    """The configuration's name, and the file patterns of each split, from the README.md.

    If the card has no configurations: `data.name`, and no patterns. Raises DataError.
    """
    from datasets.data_files import sanitize_patterns  # takes 2 s; plain text does not need it
    from datasets.utils.metadata import MetadataConfigs

    try:
        data = metadata_load(card) if card.is_file() else None
        found = MetadataConfigs.from_dataset_card_data(data or {})
        name = settings.name or found.get_default_config_name()
        patterns = {str(k): sanitize_patterns(v.get("data_files", [])) for k, v in found.items()}
    except Exception as error:  # invalid YAML or wrong types
        what = f"its README.md cannot be read ({short_cause(error)})"
        fix = "choose another, or give its files as data.source"
        raise DataError(settings.dataset, what, fix) from None
    if patterns and name not in patterns:
        what = f"it has no configuration {name!r}, but {', '.join(patterns)}"
        raise DataError(settings.dataset, what, "set data.name to one of them")
    return name, patterns.get(name, {})


def find_splits(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split, as `datasets` finds them by the card or by the file names.

    `datasets` sees empty copies: it reads brackets in a path as a pattern, and no `A.TXT`.
    """
    from datasets import load_dataset_builder  # takes 2 s; plain text does not need it

    with tempfile.TemporaryDirectory() as temporary:
        copies, root = {}, Path(temporary).resolve()
        for file in matching_files(folder, ["*"]):
            if not is_text(file):  # `datasets` would open archives and prefer large pictures
                continue
            stem, dot, extensions = file.name.partition(".")
            copy = root / file.relative_to(folder).with_name(stem + dot + extensions.lower())
            copies[str(copy)] = file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
        if (card := folder / "README.md").is_file():
            shutil.copyfile(card, root / card.name)
        try:
            files = load_dataset_builder(str(root), name).config.data_files
        except Exception as error:  # any error of the libraries below
            cause = short_cause(error).replace(f"The directory at {root}", "it")
            cause = cause.replace(str(root), "it")
            raise DataError(folder, cause, "name a file, or fix data.name") from None
    return {str(split): [copies[path] for path in paths] for split, paths in files.items()}


def make_source(name: str, splits: dict[str, list[Path]], column: str, revision="") -> Source:
    if not splits.get("train"):
        others = ", ".join(split for split, files in splits.items() if files)
        what = "it has no training files" + (f", only files for: {others}" if others else "")
        raise DataError(name, what, "choose another")
    train, validation = tuple(splits["train"]), tuple(splits.get("validation", ()))
    return Source(name, train, validation, column, revision)
