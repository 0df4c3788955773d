"""What a run leaves to look at: rows in metrics.jsonl and TensorBoard, and traces to compare."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

SCALARS = {  # key of a row -> TensorBoard's tag
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
}


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
        replace_text(file, json.dumps(asdict(self)))


class Record:
    """The rows of a run up to `step`, the rest cut off, and the files that take the next ones.

    Each row is a flat dict with "step" (updates done) and any of: loss (nats a token, before the
    update), learning_rate, gradient_norm (before clipping), tokens_per_second (of updates alone);
    validation_loss; prompt and sample.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        old = [json.loads(line) for line in whole_lines(file)]
        if any(row["step"] > 0 for row in old) and step == 0:  # its checkpoints are gone: keep it
            file.rename(file.with_name(time.strftime("metrics-until-%Y%m%d-%H%M%S.jsonl")))
        self.rows: list[dict[str, Any]] = [row for row in old if row["step"] <= step and step]
        replace_text(file, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = open(file, "a", encoding="utf-8")
        # `step` would take the last point with it; without a purge, later steps would stand twice
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        for key in SCALARS.keys() & row.keys():
            self._board.add_scalar(SCALARS[key], row[key], row["step"])
        if "sample" in row:
            self._board.add_text("sample", row["sample"], row["step"])

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
            self._file.flush()
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def replace_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    unfinished = file.with_name(f"{file.name}.tmp.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that end; a kill can leave half a line behind the last flush."""
    if not file.is_file():
        return []
    return file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
