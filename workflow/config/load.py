"""Loads the settings: the YAML file, then a profile, then overrides."""

import difflib
import io
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workflow.config.settings import Config
from workflow.errors import ConfigError, WorkflowError, one_line_errors
from workflow.files import project_file

PROFILE_VARIABLE = "SMOLLM_PROFILE"
CONFIG = "SmolLm3_Config.yaml"
# Settings that name a file to read, or the cache; in the YAML, they are relative to its folder.
INPUTS = ("data.source", "data.fallback_text", "proof.wikitext_file", "mutations.curves_file")
INPUTS += ("evaluation.texts", "reference.source", "paths.cache")
OVERRIDES_VARIABLE = "SMOLLM_SET"  # overrides separated by spaces, quoted as in a shell


def load_config(
    path: str | Path | None = None,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    saved: Mapping[str, Any] | None = None,
) -> Config:
    """Reads `path`, then applies the profile, SMOLLM_SET, and `overrides` ("section.key=value").

    path: by default SmolLm3_Config.yaml next to the code. Files that it names are next to it.
    saved: the settings of a run, which replace those of the file and of its profile; the profile is
    then that of the run. Raises ConfigError with the key, the value and what was expected, and with
    the override or else the file. Raises WorkflowError if torch is too old or assert is off.
    """
    if not __debug__:
        fix = "unset PYTHONOPTIMIZE, and run python without -O"
        raise WorkflowError("python", "assert is off, so claims would not be checked", fix)
    path, saved = Path(path or project_file(CONFIG)), saved or {}
    values, (changes, causes) = read_yaml(path), parse_overrides(overrides)
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, dict):
        raise ConfigError(f"{path}: profiles", "it is no table", "see the project's own YAML")
    # first without `models:`: it needs torch, which takes seconds to import
    tables = merged(values, saved, *changes)
    validate({key: tables[key] for key in tables if key != "models"}, path, causes, complete=False)
    name, reason = choose_profile(profile, str(values.get("profile", "auto")), saved)
    if not isinstance(profiles.get(name, {} if saved else "absent"), dict | None):
        fix = f"choose one of {', '.join(map(str, profiles))}; each is a table of settings"
        raise ConfigError(f"profile {name} ({reason})", "there is no such profile", fix)
    check_torch()
    of_profile, base = profiles.get(name) or {}, dict(flattened(values))
    changed = [key for key, value in flattened(of_profile) if value != base.get(key)]
    fresh = os.environ.get("FRESH") == "1"
    about = {
        "profile": name,
        "profile_reason": reason,
        "profile_keys": [] if saved else changed,
        "name_suffix": time.strftime("-%Y%m%d-%H%M%S") if fresh else "",
        "overrides": [cause.partition(" ")[2] for cause in causes.values()],
    }
    config = validate(merged(values, of_profile, saved, *changes, about), path, causes)
    for setting in INPUTS:
        if setting not in causes:  # what is typed is relative to the user's folder
            config = next_to(path.parent, config, setting)
    return config


def check_torch() -> None:
    import torch
    from torch.torch_version import TorchVersion

    if TorchVersion(torch.__version__) < (2, 13):
        what = "this code needs 2.13; before 2.10, torch.load can run code (CVE-2026-24747)"
        raise WorkflowError(f"torch {torch.__version__}", what, "type: pip install torch==2.13.0")


def next_to(folder: Path, config: Config, setting: str) -> Config:
    """Replaces a relative path by the one in `folder`, if it exists there; the cache always is."""
    table, _, key = setting.partition(".")
    section = getattr(config, table)
    names = getattr(section, key)

    def place(name: Any) -> Any:
        path = folder / name
        return type(name)(path) if key == "cache" or os.path.exists(path) else name

    names = tuple(map(place, names)) if isinstance(names, tuple) else names and place(names)
    return config.model_copy(update={table: section.model_copy(update={key: names})})


def flattened(table: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of nested tables, with dotted keys. A list is one setting."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "restore it, or name a readable file in UTF-8"
        raise ConfigError(path, f"it cannot be read: {error}", fix) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(path, "it is no table of settings", "see the project's own YAML")
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


def choose_profile(argument: str | None, in_file: str, saved: Mapping) -> tuple[str, str]:
    """The profile, and the reason for it.

    That of a run stays. Otherwise the argument is first, then the environment, the file.
    """
    if name := saved.get("profile"):
        if argument not in (None, "auto", name):
            what, fix = f"this run has the profile {name}", "omit it; change settings with --set"
            raise ConfigError(f"--profile {argument}", what, fix)
        return name, "settings from the checkpoint"
    for name, reason in (
        (argument, "as requested"),
        (os.environ.get(PROFILE_VARIABLE), f"set by {PROFILE_VARIABLE}"),
        (in_file, "set in the YAML"),
    ):
        if name and name != "auto":
            return name, reason
    import torch  # takes seconds

    how = f"to choose another: `make run PROFILE=cpu` or {PROFILE_VARIABLE}=cpu"
    if torch.cuda.is_available():
        return "full", f"a CUDA GPU was found; {how}"
    return "quick", f"no CUDA GPU was found; {how}"


def merge(base: Any, changes: Any) -> Any:
    """A copy of `base` with `changes`; tables inside tables are merged too."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return base | {key: merge(base.get(key), value) for key, value in changes.items()}


def merged(*tables: Any) -> Any:
    """One table after the other, each merged into the result so far."""
    return reduce(merge, tables)


def parse_overrides(overrides: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """SMOLLM_SET, then `overrides`, as tables; for each key, the place and words that set it."""
    with one_line_errors(OVERRIDES_VARIABLE, "write key=value, separated by spaces"):
        environment = shlex.split(os.environ.get(OVERRIDES_VARIABLE, ""))
    given = [f"{OVERRIDES_VARIABLE} {override}" for override in environment]
    given += [f"--set {override}" for override in overrides]
    changes, causes = [], {}
    for cause in given:
        key, change = parse_override(cause.partition(" ")[2], cause)
        changes.append(change)
        causes[key] = cause
    return changes, causes


def parse_override(override: str, where: str) -> tuple[str, dict[str, Any]]:
    """Turns `section.key=value` into the key and {section: {key: value}}. where: for errors."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(where, "this is not key=value", "write for example train.steps=100")
    if key == "profile":
        raise ConfigError(where, "this is not a setting", "choose a profile with --profile")
    change = parse_value(text, type_at(key.split(".")), where)
    for part in reversed(key.split(".")):
        change = {part: change}
    return key, change


def parse_value(text: str, kind: Any, where: str) -> Any:
    """The value of an override for a setting of the type `kind`.

    Words and paths are taken as they are, even with `#` or `: `. All else is read as YAML.
    """
    kinds, is_list = [kind, *get_args(kind)], get_origin(kind) is tuple
    if not any(k in (str, Path) or isinstance(k, str) for k in kinds):
        return parse_yaml(text, where)
    if is_list:  # one path needs no brackets
        return parse_yaml(text, where) if text.startswith("[") else [text]
    return None if text == "null" and NoneType in kinds else text


def type_at(keys: Sequence[str]) -> Any:
    """The type of a setting or a table; None if there is no such key."""
    kind: Any = Config
    for key in keys:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            parts = (part for part in (kind, *get_args(kind)) if isinstance(part, type))
            kind = get_type_hints(next(parts, object)).get(key)
    return kind


def validate(
    values: dict[str, Any], path: Path, causes: Mapping[str, str], complete: bool = True
) -> Config | None:
    """Checks the settings with pydantic. Its first error becomes a ConfigError.

    causes: key -> the override that set it. complete: whether a missing key is an error.
    """
    with one_line_errors(path, "use text as keys, and no table that contains itself"):
        text = json.dumps(values, default=str)  # from JSON, pydantic accepts a list as a tuple
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors()
    if not complete:  # the profile can add what is missing, also for a share such as 10%
        errors = [e for e in errors if e["type"] != "missing" and not str(e["input"]).endswith("%")]
    if not errors:
        return None
    # an unknown key is shown first: it is probably a misspelt missing key
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    first = sorted(errors, key=lambda e: e["type"] not in unknown)[0]
    key, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind in unknown:
        near = similar_key(key, values)
        what, fix = "there is no such key", f"did you mean {near}?" if near else "remove it"
    elif kind == "missing":
        what, fix = "this key is missing", "add it, as in the project's own YAML"
    elif kind == "value_error":
        what, _, fix = first["msg"].removeprefix("Value error, ").partition("; ")
        fix = fix or "change it: --set KEY=VALUE"
    else:
        what, fix = f"{first['input']!r} does not fit: {first['msg']}", "change the value"
    where = f"{path}: {key}" if key else path
    raise ConfigError(find_causes(key, what, causes) or where, what, fix)


def find_causes(key: str, what: str, causes: Mapping[str, str]) -> str:
    """The overrides that caused an error: of `key`, or without one of the keys in `what`."""
    keys = [f"{word}." for word in ([key] if key else re.findall(r"[\w.]+", what))]

    def caused(name: str) -> bool:
        return any(f"{name}.".startswith(key) or key.startswith(f"{name}.") for key in keys)

    return ", ".join(causes[name] for name in causes if caused(name))


def similar_key(unknown: str, values: Mapping[str, Any]) -> str | None:
    """The setting that is most like an unknown one; first in the same table."""
    table, _, last = unknown.rpartition(".")
    names = [*map(str, values), *(name for name, _ in flattened(values))]
    names = [name for name in names if not f"{name}.".startswith(f"{unknown}.")]
    first = (f"{table}.", "train.", "sample.")
    names.sort(key=lambda name: [not name.startswith(start) for start in first])
    full_names = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(last, full_names, n=1)
    return full_names[near[0]] if near else None
