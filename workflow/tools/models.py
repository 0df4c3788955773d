"""Opens a model by a name that a user types."""

import os
from dataclasses import asdict
from pathlib import Path

from workflow.config import Config
from workflow.errors import ForeignError
from workflow.reference import Reference, load_exported, load_for_generation, load_reference
from workflow.tools.arguments import REFERENCE


def open_reference(config: Config) -> Reference:
    source, cache = config.reference.source, config.paths.cache
    return load_reference(source, config.model_entry, cache=cache)


def open_model(name: str, config: Config):
    """Model, tokenizer (of transformers), and provenance.

    name: `reference`, a folder in Hugging Face format, or a checkpoint or run: see
    `checkpoint.find`. Raises WorkflowError.
    """
    from workflow import proof, training  # seconds that `open_generator` does not need

    if name == REFERENCE:
        reference = open_reference(config)
        return proof.copy_reference(reference), reference.tokenizer, asdict(reference.provenance)
    path, runs = Path(name), config.paths.checkpoints
    try:
        is_exported = os.path.isfile(path / "config.json")
        opened = load_exported(path) if is_exported else training.load_model(path, runs)
    except ForeignError as error:
        opened = training.load_foreign_model(error, open_reference(config))
    print(f"Model {opened[2]['name']}")
    return opened


def open_generator(name: str, config: Config, chat: bool):
    """Model and tokenizer to generate text: of the reference, in a few seconds.

    chat: whether the tokenizer needs its chat template. name: see `open_model`.
    """
    if name == REFERENCE and config.reference.source != "random" and not chat:
        source, cache = config.reference.source, config.paths.cache
        return load_for_generation(source, config.model_entry, cache)
    return open_model(name, config)[:2]
