"""What a run leaves to look at: rows in metrics.jsonl and TensorBoard, and traces to compare."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from workflow.errors import CheckpointError
from workflow.files import disk_errors, remove_temporary_files, write_text_atomic
from workflow.tools.stamp import commit

SETTING = "paths.runs"  # the key of the YAML that says where all this lies
SCALARS = {  # key of a row -> TensorBoard's tag
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "flops_utilisation": "flops_utilisation",
}
BINS = 64  # of a histogram

usual_hook = threading.excepthook


def without_disk_errors(thread) -> None:
    """TensorBoard's thread keeps such an error for its writer, where it becomes ours."""
    if not issubclass(thread.exc_type, OSError):
        usual_hook(thread)


threading.excepthook = without_disk_errors


@dataclass(frozen=True)
class Trace:
    """Some steps of a run, to compare bit for bit: their losses, and the weights after the last."""

    first_step: int
    losses: tuple[float, ...]
    weights_sha256: str

    @classmethod
    def read(cls, file: Path) -> Trace:
        values = json.loads(file.read_text())
        return cls(**values | {"losses": tuple(values["losses"])})

    def write(self, file: Path) -> None:
        write_text_atomic(file, json.dumps(asdict(self)), SETTING)


class Record:
    """The rows of a run up to `step`, the rest cut off, and the files that take the next ones.

    Each row is a flat dict with "step" (updates done) and any of: loss (nats a token, before the
    update), learning_rate, gradient_norm (before clipping), tokens_per_second (of updates alone),
    flops_utilisation (of a GPU's bf16 peak, if known); validation_loss; prompt and sample; or
    `began` (when, UTC) and `commit`: by whom the steps after it were computed.
    made_of: weights and text, kept beside them; settings: the run's, shown in TensorBoard.
    """

    def __init__(self, folder: Path, step: int, made_of: Mapping, settings: Mapping):
        self.folder, file = folder, folder / "metrics.jsonl"
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        with disk_errors(folder, SETTING):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(folder)
            old = whole_rows(file)
            if any(row["step"] > 0 for row in old) and step == 0:  # its checkpoints are gone
                file.rename(file.with_name(time.strftime("metrics-until-%Y%m%d-%H%M%S.jsonl")))
            self.rows: list[dict[str, Any]] = [row for row in old if row["step"] <= step and step]
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_text_atomic(file, lines, SETTING)
            write_text_atomic(
                folder / "made_of.json", json.dumps(made_of, indent=1) + "\n", SETTING
            )
            self._file = open(file, "ab", buffering=0)  # what is written is not lost with us
            wait_for_a_new_second(folder)
            # `step` would take the last point with it; without a purge, later steps would double
            self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
            if not step:
                rows = "".join(f"| {name} | {value} |\n" for name, value in made_of.items())
                self._board.add_text("made of", f"| what | which |\n|---|---|\n{rows}", 0)
                self._board.add_text("config", f"```\n{yaml.safe_dump(dict(settings))}```", 0)

    def add(self, row: dict[str, Any]) -> None:
        if self._began and "loss" in row:  # the first step of these hands
            began, self._began = self._began, None
            self.add({"step": row["step"] - 1, "began": began, "commit": commit()})
        self.rows.append(row)
        with disk_errors(self.folder, SETTING):
            self._file.write((json.dumps(row) + "\n").encode())
            for key in SCALARS.keys() & row.keys():
                self._board.add_scalar(SCALARS[key], row[key], row["step"])
            if "sample" in row:
                self._board.add_text("sample", row["sample"], row["step"])

    def add_histograms(self, step: int, model: nn.Module) -> None:
        """How weights, and gradients where there are any, are spread, for TensorBoard alone."""
        with disk_errors(self.folder, SETTING):
            for name, parameter in model.named_parameters():
                for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
                    if values is not None:
                        bars = histogram(values.detach())
                        self._board.add_histogram_raw(f"{kind}/{name}", **bars, global_step=step)

    def has(self, key: str, step: int) -> bool:
        """Whether a row of this step has `key`."""
        return any(key in row for row in self.rows if row["step"] == step)

    def between(self, after: int, last: int) -> list[dict[str, Any]]:
        """The rows of steps after `after`, up to `last`."""
        return [row for row in self.rows if after < row["step"] <= last]

    def sample(self, step: int, prompt: str) -> str | None:
        """The text sampled from `prompt` at `step`, if there is one."""
        texts = (
            row["sample"]
            for row in self.rows
            if row["step"] == step and row.get("prompt") == prompt
        )
        return next(texts, None)

    def flush(self) -> None:
        if not self._file.closed:
            with disk_errors(self.folder, SETTING):
                os.fsync(self._file.fileno())
                self._board.flush()

    def close(self) -> None:
        self._file.close()
        with disk_errors(self.folder, SETTING):
            self._board.close()


class RowsAlone(Record):
    """What other processes of the run than the first keep: rows since they started, no files."""

    def __init__(self, folder: Path, step: int, made_of: Mapping, settings: Mapping):
        self.rows = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def add_histograms(self, step: int, model: nn.Module) -> None:
        pass

    def flush(self) -> None:
        pass

    close = flush


def histogram(values: Tensor) -> dict[str, Any]:
    """What TensorBoard keeps of a tensor: its range and sums, and counts in bins of one width."""
    values = values.float().cpu()  # counting on a GPU is not deterministic
    low, high = (bound.item() for bound in values.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    return {
        "min": values.min().item(),
        "max": values.max().item(),
        "num": values.numel(),
        "sum": values.sum().item(),
        "sum_squares": values.square().sum().item(),
        "bucket_limits": torch.linspace(low, high, BINS + 1)[1:].tolist(),
        "bucket_counts": torch.histc(values, BINS, low, high).tolist(),
    }


def wait_for_a_new_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of the second in their names."""
    now = int(time.time())
    if any(folder.glob(f"events.out.tfevents.{now}.*")):
        time.sleep(now + 1 - time.time())


def whole_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of the lines that end; a kill can leave half a line.

    Raises CheckpointError, with its number, for a line that is no row.
    """
    lines = file.read_bytes().rpartition(b"\n")[0].split(b"\n") if file.is_file() else []
    rows = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            what = f"line {number} is damaged"
            raise CheckpointError(file, what, "move the file away; the curves begin anew") from None
    return rows
