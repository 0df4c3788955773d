"""What a run starts from: tokenizer, weights and data, and the name that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint
from .data import Corpus, load_corpus
from .settings import Config


@dataclass(frozen=True)
class Origin:
    """What a run needs of its reference."""

    tokenizer: Tokenizer
    end_of_text: int
    provenance: dict[str, str]  # what the weights honestly are
    weights: Mapping[str, Tensor] | None = None  # under Hugging Face's names

    @classmethod
    def of(cls, reference) -> Origin:
        """Of a `workflow.reference.Reference`."""
        tokenizer, provenance = reference.tokenizer.backend_tokenizer, asdict(reference.provenance)
        return cls(tokenizer, reference.end_of_text, provenance, reference.state_dict)

    @classmethod
    def saved(cls, folder: Path, state: dict[str, Any]) -> Origin:
        """Of a checkpoint: a resume needs no reference."""
        tokenizer, end = checkpoint.load_tokenizer(folder), state["tokenizer"]["end_of_text"]
        return cls(tokenizer, end, state["reference"])


def identify(config: Config, origin: Origin) -> tuple[Corpus, str]:
    """The data of a run, and its name, which settings, data and weights determine."""
    corpus = load_corpus(
        config.data.text,
        origin.tokenizer,
        origin.end_of_text,
        config.data.validation_fraction,
        config.train.sequence_length,
        config.paths.cache,
    )
    return corpus, config.run_name(
        corpus.text_sha256, corpus.tokenizer_sha256, origin.provenance["weights_sha256"]
    )
