"""What a run starts from: tokenizer, weights and data, and the name that they make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from SmolLm3 import LlamaModel, ModelConfig, load_hf_weights
from workflow.config.settings import Config
from workflow.data.corpus import Corpus, load_corpus
from workflow.data.sources import find_source, from_path
from workflow.errors import ForeignError
from workflow.training import checkpoint
from workflow.training.restoring import fill


@dataclass(frozen=True)
class Origin:
    """What a run needs of its reference."""

    tokenizer: Tokenizer
    end_of_text: int
    provenance: dict[str, str]  # what the weights honestly are
    weights: Mapping[str, Tensor] | None = None  # under Hugging Face's names
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)  # transformers' own settings
    text_sha256: str | None = None  # of the text that a checkpoint was trained on

    @classmethod
    def of(cls, reference) -> Origin:
        """Of a `workflow.reference.Reference`."""
        tokenizer, provenance = reference.tokenizer.backend_tokenizer, asdict(reference.provenance)
        with tempfile.TemporaryDirectory() as folder:
            reference.tokenizer.save_pretrained(folder)
            files = {file.name: file.read_text("utf-8") for file in Path(folder).iterdir()}
        files.pop("tokenizer.json")  # the tokenizer itself
        return cls(tokenizer, reference.end_of_text, provenance, reference.state_dict, files)

    @classmethod
    def saved(cls, folder: Path, state: dict[str, Any]) -> Origin:
        """Of a checkpoint: a resume needs no reference."""
        tokenizer, end = checkpoint.load_tokenizer(folder), state["tokenizer"]["end_of_text"]
        text_sha256 = state["data"].get("text_sha256")
        return cls(tokenizer, end, state["reference"], text_sha256=text_sha256)


def identify(config: Config, origin: Origin) -> tuple[Corpus, str]:
    """The data of a run, and its name, which settings, data and weights determine."""
    settings = config.data
    rest = (
        origin.tokenizer,
        origin.end_of_text,
        settings.validation_fraction,
        config.train.sequence_length,
        config.paths.cache,
    )
    corpus = load_corpus(find_source(settings), *rest)
    if settings.source == "auto" and origin.text_sha256 not in (None, corpus.text_sha256):
        corpus = load_corpus(from_path(settings.text, settings.column), *rest)  # as it was then
    return corpus, config.run_name(
        corpus.text_sha256, corpus.tokenizer_sha256, origin.provenance["weights_sha256"]
    )


def untrained(config: Config, reference) -> LlamaModel:
    """The model as a run has it at step 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = LlamaModel(config.trained)
    if config.train.init == "reference":
        load_hf_weights(model, reference.state_dict)
    return model.eval()


def load_model(path: Path) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """A checkpoint's model, its tokenizer (transformers') and what they are, for a model card."""
    from transformers import PreTrainedTokenizerFast  # 3 s that training does not need

    state = checkpoint.load(path)
    model = LlamaModel(ModelConfig(**state["config"]["architecture"]))
    fill(model, state["model"], path)
    checkpoint.load_tokenizer(path.parent)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, local_files_only=True)
    made_of, name = state["reference"], f"{path.parent.name}, {state['step']} steps"
    text = {key: made_of[key] for key in ("text", "text_revision") if key in made_of}
    made_of = {"name": name, "started_from": made_of["name"], **text, **state["data"]}
    return model, tokenizer, made_of


def foreign_model(error: ForeignError, reference) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """The same of another program's file: its weights in the reference's model and tokenizer.

    Raises `error` itself where there are none.
    """
    if error.weights is None:
        raise error
    model, path = LlamaModel(reference.config), Path(error.where)
    fill(model, error.weights, path)
    made_of = {"name": path.name, "architecture_and_tokenizer": reference.provenance.name}
    return model, reference.tokenizer, made_of
