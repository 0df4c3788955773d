"""Where the text comes from: a file, a folder, or a data set of the Hub."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from workflow.config import DataSettings
from workflow.errors import DataError, SourceError
from workflow.reference.hub import first_line, matching, snapshot


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
    if left := [file for file in matching(path, ["*"]) if file.resolve() not in used]:
        example = left[0].relative_to(path)
        print(f"Note: of {path}, {len(left)} files of another kind are left out, such as {example}")
    return source_of(path.name, splits, column)


def from_hub(settings: DataSettings) -> Source:
    """A configuration of a data set on the Hub, from the cache or downloaded."""
    dataset = settings.dataset
    fetch = functools.partial(snapshot, dataset, settings.revision, repo_type="dataset")
    first = ["README.md", f"{settings.name}/*"] if settings.name else ["README.md"]
    name, card = read_card(fetch(first) / "README.md", settings)
    patterns = [one for patterns in card.values() for one in patterns] if card else ["*"]
    folder = fetch(["README.md", *patterns], needed=patterns)
    splits = {split: matching(folder, these) for split, these in card.items()}
    title = f"{dataset} {name}" if name else dataset
    return source_of(title, splits or find_splits(folder, name), settings.column, folder.name)


def read_card(card: Path, settings: DataSettings) -> tuple[str | None, dict[str, list[str]]]:
    """The name of the configuration, if any, and split -> patterns of its files.

    No patterns if the card of the data set has no configurations. Raises DataError.
    """
    from datasets.data_files import sanitize_patterns  # 2 s that plain text does not need
    from datasets.utils.metadata import MetadataConfigs

    try:
        data = metadata_load(card) if card.is_file() else None
        found = MetadataConfigs.from_dataset_card_data(data or {})
        name = settings.name or found.get_default_config_name()
        patterns = {str(k): sanitize_patterns(v.get("data_files", [])) for k, v in found.items()}
    except Exception as error:  # of YAML, of types
        what = f"its README.md cannot be read ({first_line(error)})"
        fix = "choose another, or give its files as data.source"
        raise DataError(settings.dataset, what, fix) from None
    if patterns and name not in patterns:
        what = f"it has no configuration {name!r}, but {', '.join(patterns)}"
        raise DataError(settings.dataset, what, "name one of them: data.name")
    return name, patterns.get(name, {})


def find_splits(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Split -> files, as `datasets` reads a folder: by its card, or by the names of its files."""
    from datasets import load_dataset_builder  # 2 s that plain text does not need

    try:
        files = load_dataset_builder(str(folder.resolve()), name).config.data_files
    except Exception as error:  # whatever a layer below says
        raise DataError(folder, first_line(error), "name a file, or fix data.name") from None
    return {str(split): [Path(path) for path in paths] for split, paths in files.items()}


def source_of(name: str, splits: dict[str, list[Path]], column: str, revision: str = "") -> Source:
    if not splits.get("train"):
        others = ", ".join(split for split, files in splits.items() if files)
        what = "it has no files to train on" + (f", but of: {others}" if others else "")
        raise DataError(name, what, "choose another")
    train, validation = tuple(splits["train"]), tuple(splits.get("validation", ()))
    return Source(name, train, validation, column, revision)
