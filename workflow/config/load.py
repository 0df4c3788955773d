"""Loads the settings: the YAML file, then a profile, then overrides."""

import difflib
import io
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.torch_version import TorchVersion

from SmolLm3 import ModelConfig
from workflow.config.settings import RENAMED_KEYS, Config, ModelEntry, Wheel
from workflow.errors import ConfigError, WorkflowError, one_line_errors

PROFILE_VARIABLE = "SMOLLM_PROFILE"
OVERRIDES_VARIABLE = "SMOLLM_SET"  # overrides separated by spaces, quoted as in a shell


def load_config(
    path: str | Path = "SmolLm3_Config.yaml",
    profile: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Reads `path`, then applies the profile, SMOLLM_SET, and `overrides` ("section.key=value").

    Raises ConfigError with the file, the key, the value and what was expected. For an unknown key
    it suggests the most similar one. Raises WorkflowError if torch is too old or assert is off.
    """
    if not __debug__:
        fix = "unset PYTHONOPTIMIZE, and run python without -O"
        raise WorkflowError("python", "assert is off, so claims would not be checked", fix)
    if TorchVersion(torch.__version__) < (2, 10):
        what = "before 2.10, torch.load can run code from a file (CVE-2026-24747)"
        raise WorkflowError(f"torch {torch.__version__}", what, "type: pip install torch==2.13.0")
    values = read_yaml(Path(path))
    profiles = values.pop("profiles", None)
    profiles = profiles if isinstance(profiles, dict) else {}
    name, reason = choose_profile(profile, str(values.get("profile", "auto")))
    if not isinstance(profiles.get(name, "absent"), dict | None):
        fix = f"choose one of {', '.join(map(str, profiles))}; each is a table of settings"
        raise ConfigError(path, f"there is no profile {name!r}", fix)
    values = merge(values, profiles[name] or {}) | {"profile": name, "profile_reason": reason}
    if os.environ.get("FRESH") == "1":
        values["name_suffix"] = time.strftime("-%Y%m%d-%H%M%S")
    with one_line_errors(OVERRIDES_VARIABLE, "write key=value, separated by spaces"):
        overrides = [*shlex.split(os.environ.get(OVERRIDES_VARIABLE, "")), *overrides]
    for override in overrides:
        values = merge(values, parse_override(override))
    return validate(values | {"overrides": overrides}, path)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "run from the project's folder, or name a readable file in UTF-8"
        raise ConfigError(path, f"it cannot be read: {error}", fix) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        what = f"it contains {found}, expected a table of settings"
        raise ConfigError(path, what, "see the project's own YAML")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML 1.2: 1e-3 is a float, 010 is ten, and no is a string.

    Raises ConfigError with the line, also if a key appears twice in one table.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    # the last four: a value of another type than its tag, or too many nested lists
    except (YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        what = f"this is not valid YAML here: {getattr(error, 'problem', None) or error}"
        raise ConfigError(place, what, "fix that line") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """The opposite of `parse_yaml`, with the keys in their order."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = yaml.sort_base_mapping_type_on_output = False
    yaml.dump(values, text)
    return text.getvalue()


def choose_profile(argument: str | None, in_file: str) -> tuple[str, str]:
    """The profile and the reason for it. The argument is first, then the environment, the file."""
    environment = os.environ.get(PROFILE_VARIABLE), f"set by {PROFILE_VARIABLE}"
    for name, reason in (argument, "as requested"), environment, (in_file, "set in the YAML"):
        if name and name != "auto":
            return name, reason
    has_gpu = torch.cuda.is_available()
    reason = "a CUDA GPU was found" if has_gpu else "no CUDA GPU was found"
    how = f"to choose another: `make run PROFILE=cpu` or {PROFILE_VARIABLE}=cpu"
    return ("full" if has_gpu else "quick"), f"{reason}; {how}"


def merge(base: Any, changes: Any) -> Any:
    """A copy of `base` with `changes`; tables inside tables are merged too."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return base | {key: merge(base.get(key), value) for key, value in changes.items()}


def parse_override(override: str) -> dict[str, Any]:
    """Turns `section.key=value` into {section: {key: value}}."""
    where, (key, equals, text) = f"--set {override}", override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(where, "this is not key=value", "write for example train.steps=100")
    if key in ("profile", "profile_reason", "name_suffix", "overrides"):
        raise ConfigError(where, "this is not a setting", "choose a profile with --profile")
    change = parse_yaml(text, f"--set {key}")
    for part in reversed(key.split(".")):
        change = {part: change}
    return change


def validate(values: dict[str, Any], path: str | Path) -> Config:
    """Checks the settings with pydantic. Its first error becomes a ConfigError."""
    with one_line_errors(path, "use text as keys, and no table that contains itself"):
        text = json.dumps(values, default=str)  # from JSON, pydantic accepts a list as a tuple
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        # an unknown key is shown first: it is probably a misspelt missing key
        unknown = ("extra_forbidden", "unexpected_keyword_argument")
        first = sorted(error.errors(), key=lambda e: e["type"] not in unknown)[0]
    keys, kind = [str(key) for key in first["loc"]], first["type"]
    if kind in unknown:
        known = known_keys(keys[:-1])
        near = difflib.get_close_matches(RENAMED_KEYS.get(keys[-1], keys[-1]), known, n=1)
        what, fix = "there is no such key", f"did you mean {near[0]}?" if near else "remove it"
    elif kind == "missing":
        what, fix = "this key is missing", "add it, as in the project's own YAML"
    elif kind == "value_error":
        what, fix = first["msg"].removeprefix("Value error, "), "change it: --set KEY=VALUE"
    else:
        what, fix = f"{first['input']!r} does not fit: {first['msg']}", "change the value"
    raise ConfigError(f"{path}: {'.'.join(keys)}" if keys else path, what, fix)


def known_keys(parents: Sequence[str]) -> list[str]:
    """The keys of the table at `parents`."""
    if parents[:1] == ["models"]:
        table = {"architecture": ModelConfig, "wheel": Wheel}.get(parents[-1], ModelEntry)
    else:
        table = Config.model_fields[parents[0]].annotation if parents else Config
    return list(getattr(table, "model_fields", None) or table.__dataclass_fields__)
