"""Lists the runs in a folder, and compares two of them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow.analysis import figures
from workflow.config.load import read_yaml
from workflow.errors import WorkflowError
from workflow.files import atomic_write, flatten
from workflow.training.metrics import FOLDER_KEY, METRICS_FILE, SETTINGS_FILE, read_log

COLUMNS = ("run", "began (UTC)", "model", "data", "steps", "loss", "held out", "differs")
# not about training
OTHER_TABLES = ("models", "paths", "proof", "mutations", "smoke_test", "evaluation")
# often shares of others: shown last
DERIVED = [f"train.{key}_steps" for key in ("schedule", "warmup", "decay")]
DERIVED.append("train.min_learning_rate")
MAX_SHOWN = 3  # differences in a row of the list


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about it."""

    name: str
    began: str  # UTC, ISO 8601
    settings: Mapping[str, Any]  # flat, in the order of the YAML
    data: str
    rows: Sequence[Mapping[str, Any]]  # of the log

    @property
    def model(self) -> str:
        return self.settings["train.model"] or self.settings["model"]

    def last(self, key: str) -> str:
        values = [row[key] for row in self.rows if key in row]
        return f"{values[-1]:.4f}" if values else "-"


def read_run(folder: Path) -> RunRecord:
    """Raises an error of any kind if the folder is not a run's, or is damaged."""
    log, file = folder / METRICS_FILE, folder / SETTINGS_FILE
    for path in (log, file):
        if not path.is_file():
            raise WorkflowError(folder, f"there is no {path.name} in it", "name a run")
    settings, rows = read_yaml(file), read_log(log)
    provenance = json.loads((folder / "provenance.json").read_text("utf-8"))
    row = settings["models"][settings["train"]["model"] or settings["model"]]
    settings = {key: value for key, value in settings.items() if key not in OTHER_TABLES}
    settings["architecture"] = row["architecture"]
    settings |= {f"{key} (sha256)": provenance.get(f"{key}_sha256") for key in ("text", "weights")}
    began = next(row["began"] for row in rows if "began" in row)
    flat = dict(flatten(settings))
    record = RunRecord(folder.name, str(began), flat, str(provenance["text"]), rows)
    record.last("loss"), record.last("validation_loss")  # an error for what is not a number
    return record


def report(folder: Path, names: Sequence[str]) -> str:
    """The list of the runs in `folder`; with two names, a comparison. Raises WorkflowError."""
    if not names:
        return run_list(folder)
    if len(names) != 2:
        raise WorkflowError("runs", "it compares two runs", "name two, or none for the list")
    return comparison(folder, *(named_run(folder, Path(name).name) for name in names))


def named_run(folder: Path, name: str) -> RunRecord:
    if not (folder / name).is_dir():
        raise WorkflowError(folder / name, "there is no such run", "see: main.py runs")
    try:
        return read_run(folder / name)
    except WorkflowError:
        raise
    except Exception as error:
        fix = "choose another run"
        raise WorkflowError(folder / name, f"it is damaged ({error!r})", fix) from None


def run_list(folder: Path) -> str:
    """A table, the oldest run first, and a line for each folder that cannot be read."""
    records, problems = [], []
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        if "-smoke-test-" in path.name:  # a part of another run
            continue
        try:
            records.append(named_run(folder, path.name))
        except WorkflowError as error:
            problems.append(f"{error.where}: {error.what}")
    records.sort(key=lambda record: record.began)
    lines = [COLUMNS]
    for before, record in zip([None, *records], records):
        step = max((row["step"] for row in record.rows), default=0)
        losses = record.last("loss"), record.last("validation_loss")
        row = record.name, re.sub(r"T(\d+:\d+).*", r" \1", record.began), record.model, record.data
        lines.append((*row, str(step), *losses, shown_differences(before, record)))
    table = aligned(lines) if records else f"There are no runs in {folder}"
    return "\n".join([table, *(f"Not listed: {problem}" for problem in problems)])


def shown_differences(before: RunRecord | None, record: RunRecord) -> str:
    if before is None:
        return "(the first)"
    found = [f"{key} {old} → {new}" for key, old, new in differences(before, record)]
    more = [f"{len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
    return ", ".join(found[:MAX_SHOWN] + more) or "nothing"


def differences(one: RunRecord, other: RunRecord) -> list[tuple[str, str, str]]:
    """The settings that differ, and the hashes of text and initial weights, as short texts."""

    def text(record: RunRecord, key: str) -> str:
        value = str(record.settings.get(key, "(absent)"))
        return value[:10] if key.endswith("(sha256)") else f"{value:.40}"

    a, b = one.settings, other.settings
    keys = [key for key in dict(a) | dict(b) if a.get(key) != b.get(key)]
    keys.sort(key=DERIVED.__contains__)
    return [(key, text(one, key), text(other, key)) for key in keys]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def comparison(folder: Path, one: RunRecord, other: RunRecord) -> str:
    """Writes a picture of the losses of two runs; returns its path and what differs."""
    path = folder / f"{one.name}-and-{other.name}.png"
    figure = figures.compared_losses({run.name: run.rows for run in (one, other)})
    with atomic_write(path, FOLDER_KEY) as temporary:
        figure.savefig(temporary, format="png")
    heading = ("", one.name, other.name)
    keys = {"loss": "last training loss", "validation_loss": "last held-out loss"}
    losses = [(words, one.last(key), other.last(key)) for key, words in keys.items()]
    return f"{aligned([heading, *losses, *differences(one, other)])}\nWrote {path}"
