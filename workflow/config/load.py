"""The YAML file, its profiles and overrides become typed settings, or one clear error."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from SmolLm3 import ModelConfig
from workflow.config.settings import Config, Member
from workflow.errors import ConfigError, WorkflowError, one_line_errors

DEFAULT_PATH = "SmolLm3_Config.yaml"
PROFILE_VARIABLE = "SMOLLM_PROFILE"
OLDEST_TORCH = (2, 10)
CHANGES_VARIABLE = "SMOLLM_SET"  # overrides, separated as words of a shell


# --- YAML -----------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: 1e-3 is a float, 010 is ten, no is a word.

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


NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
SCALARS = {  # tag: (what a scalar of this kind looks like, what it may start with)
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (NUMBER, list("-+.0123456789")),
}
StrictLoader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in SCALARS.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    StrictLoader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)
StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_decimal)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, read strictly. Raises ConfigError with the line."""
    try:
        return StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        what = f"this is not valid YAML here: {problem}"
        raise ConfigError(place, what, "mend that line") from None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        do = "run from the project's folder or name the file"
        raise ConfigError(path, "there is no such file", do) from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
        raise ConfigError(path, what, "name a readable YAML file") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8"
        raise ConfigError(path, what, "save the file as UTF-8") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        what = f"it holds {found}, expected a table of settings"
        raise ConfigError(path, what, "see the project's own YAML")
    return values


def check_torch(version: str = torch.__version__) -> None:
    """Raises WorkflowError for a torch that could be harmed by a file that it loads."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        hole = "below 2.10 its loader can be made to run a file's code (CVE-2026-24747)"
        raise WorkflowError(f"torch {version}", hole, "type: pip install torch==2.13.0")


# --- profiles and overrides -----------------------------------------------------------------------


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
    how = f"`make run PROFILE=cpu` or {PROFILE_VARIABLE}=cpu chooses another"
    return ("full" if found else "quick"), f"{reason}; {how}"


def load_config(
    path: str | Path = DEFAULT_PATH, profile: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Reads `path`, lays `profile`, then `overrides` ("section.key=value") over it; checks all.

    Overrides in the environment's SMOLLM_SET come before those given.

    Raises ConfigError: file, key, value, what was expected and, for an unknown key, the nearest
    known one.
    """
    check_torch()
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
    with one_line_errors(CHANGES_VARIABLE, "write key=value, parted by spaces"):
        values["changes"] = [*shlex.split(os.environ.get(CHANGES_VARIABLE, "")), *overrides]
    for override in values["changes"]:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {override}", "this is not key=value", "write for example train.steps=100"
            )
        if key.strip() in ("profile", "reason", "fresh", "changes"):
            raise ConfigError(f"--set {override}", "this is no setting", "choose with --profile")
        change: Any = parse_yaml(text, f"--set {key}")
        for part in reversed(key.strip().split(".")):
            change = {part: change}
        values = merge(values, change)
    as_json = json.dumps(values, default=str)  # from JSON, strictly, a list may fill a tuple
    try:
        return Config.model_validate_json(as_json)
    except ValidationError as error:
        raise _readable(path, values, error) from None


def _readable(path: Path, values: dict[str, Any], error: ValidationError) -> ConfigError:
    """The first complaint of pydantic, with the nearest known key where the key is unknown."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # first: then another is missing
    first = sorted(error.errors(), key=lambda e: e["type"] not in unknown)[0]
    keys = [str(key) for key in first["loc"]]
    where = f"{path}: {'.'.join(keys)}" if keys else str(path)
    if first["type"] in unknown:
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
