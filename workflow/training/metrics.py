"""What a run logs and prints: metrics.jsonl, TensorBoard, progress bar, traces to compare."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Self, TextIO

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from workflow.config.settings import TrainSettings
from workflow.errors import CheckpointError
from workflow.files import disk_errors, remove_temporary_files, sha256_of, write_text_atomic
from workflow.training.resume import code_sha256

FOLDER_KEY = "paths.runs"  # the configuration key of the folder
METRICS_FILE, SETTINGS_FILE = "metrics.jsonl", "settings.yaml"  # in the folder of a run
TENSORBOARD_TAGS = {  # TensorBoard's names of values; it shows the groups in alphabetical order
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "flops_utilisation": "speed/flops_utilisation",
}
LOSSES = ["Multiline", [TENSORBOARD_TAGS["loss"], TENSORBOARD_TAGS["validation_loss"]]]
CHARTS = {"loss": {"training and held-out": LOSSES}}  # several values in one chart


@dataclass(frozen=True)
class StepTrace:
    """The losses of some steps, and the weights after the last: to compare runs bit for bit."""

    first_step: int
    losses: tuple[float, ...]
    weights_sha256: str
    code: str | None = field(default=None, compare=False)  # hash of what computed all the steps

    @property
    def origin(self) -> str:
        return origin(self.code)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises CheckpointError if the file is missing, or was changed after it was written."""
        try:
            values = json.loads(file.read_text("utf-8"))
            if values.pop("sha256") != sha256_of(values.items()):
                raise ValueError("another hash")
            return cls(**values | {"losses": tuple(values["losses"])})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            what, fix = "this record is missing or damaged", "make it again: FRESH=1 make run"
            raise CheckpointError(file, what, fix) from None

    def write(self, file: Path) -> None:
        values = asdict(self) | {"losses": list(self.losses)}
        values["sha256"] = sha256_of(values.items())
        write_text_atomic(file, json.dumps(values), FOLDER_KEY)


def origin(code: str | None) -> str:
    """Whether a record shows what this code does. code: the hash of the code that made it."""
    if code == code_sha256():
        return "recorded by this code"
    return "recorded by other code (FRESH=1 make run trains a new run)"


class InMemoryLogger:
    """Collects the metrics of a run in `rows`. Each row is a flat dict with "step" (steps done) and

    - loss (nats per token, before the update), learning_rate, gradient_norm (before clipping),
      tokens_per_second, and flops_utilisation (fraction of a GPU's bf16 peak, if known); or
    - validation_loss (nats per token); or prompt and sample (the generated text); or
    - began (time, UTC), commit and code (its hash): a new process trained the next steps; or
    - new_log: the log of the earlier steps was missing.
    """

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        """The number of rows, and their hash: a checkpoint has it, to recognise its log."""
        return {"rows": len(self.rows), "sha256": sha256_of(enumerate(map(json.dumps, self.rows)))}

    def has(self, key: str, step: int) -> bool:
        return any(key in row for row in self.rows if row["step"] == step)

    def sample(self, step: int, prompt: str) -> str | None:
        """The text generated from `prompt` at `step`, or None."""
        rows = (row for row in self.rows if row["step"] == step and row.get("prompt") == prompt)
        return next((row["sample"] for row in rows), None)


class MetricsLogger(InMemoryLogger):
    """Also writes the rows to metrics.jsonl and TensorBoard. Rows after `step` are removed first.

    provenance: of weights and text, written to provenance.json. settings: shown in TensorBoard.
    logged: the `fingerprint` in the checkpoint of `step`, if it has one. tensorboard: whether to
    write its files. Raises DiskError; CheckpointError if rows were changed since that checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        provenance: Mapping,
        settings: Mapping,
        logged: Mapping | None = None,
        tensorboard: bool = True,
    ):
        self.folder, file = folder, folder / METRICS_FILE
        self._start_time = datetime.now(UTC).isoformat(timespec="seconds")
        with disk_errors(folder, FOLDER_KEY):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(folder)
            old = read_log(file)
            if step == 0 and (last := max((row["step"] for row in old), default=0)):
                kept = time.strftime("metrics-until-%Y%m%d-%H%M%S.jsonl")
                file.rename(file.with_name(kept))
                print(f"Note: {file} has {last} steps, but no checkpoint; it is now {kept}")
            self.rows = [row for row in old if row["step"] <= step] if step else []
            if step and not file.is_file():  # the user moved it away
                print(f"Note: {file} is missing: a new log starts at step {step}")
                self.rows = [{"step": step, "new_log": True}]
            elif logged and {"step": step, "new_log": True} not in self.rows[:1]:
                self._check_rows(file, step, logged)
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_text_atomic(file, lines, FOLDER_KEY)
            text = json.dumps(provenance, indent=1) + "\n"
            write_text_atomic(folder / "provenance.json", text, FOLDER_KEY)
            self._file = open(file, "ab", buffering=0)  # unbuffered: a kill loses no row
            self._board = summary_writer(folder, step) if tensorboard else None
            if self._board and not step:
                self._board.add_custom_scalars(CHARTS)
                for tag, values in (("provenance", provenance), ("config", settings)):
                    self._board.add_text(tag, f"```\n{json.dumps(values, indent=1)}\n```", 0)

    def _check_rows(self, file: Path, step: int, logged: Mapping) -> None:
        """Raises CheckpointError if the first rows are not `logged`.

        Only held-out losses, samples and notes of the checkpoint's own step may follow them.
        """
        before, self.rows = self.rows, self.rows[: logged["rows"]]
        added = [row for row in before[logged["rows"] :] if row["step"] < step or "loss" in row]
        if added or self.fingerprint() != logged:
            what = f"its rows up to step {step} were changed after checkpoint_{step}.pt was saved"
            raise CheckpointError(file, what, "move the file away to start a new log")
        self.rows = before

    def log(self, row: dict[str, Any]) -> None:
        if self._start_time and "loss" in row:  # the first step that this process trains
            began, self._start_time = self._start_time, None
            code = {"commit": git_commit(), "code": code_sha256()}
            self.log({"step": row["step"] - 1, "began": began, **code})
        super().log(row)
        with disk_errors(self.folder, FOLDER_KEY):
            self._file.write((json.dumps(row) + "\n").encode())
            if self._board:
                for key in TENSORBOARD_TAGS.keys() & row:
                    self._board.add_scalar(TENSORBOARD_TAGS[key], row[key], row["step"])
                if "sample" in row:
                    self._board.add_text("sample", row["sample"], row["step"])

    def log_histograms(self, step: int, model: nn.Module) -> None:
        """Shows weights and gradients in TensorBoard: of a large tensor, a regular sample."""
        if not self._board:
            return
        with disk_errors(self.folder, FOLDER_KEY):
            for name, parameter in model.named_parameters():
                gradient = ("tensor gradients", parameter.grad)
                for kind, values in (("tensor weights", parameter), gradient):  # after the losses
                    if values is not None:
                        # an odd distance, so that the sample is not from a few channels only
                        flat, distance = values.detach().flatten(), values.numel() // 2**16 | 1
                        self._board.add_histogram(f"{kind}/{name}", flat[::distance], step, bins=64)

    def flush(self) -> None:
        if not self._file.closed:
            with disk_errors(self.folder, FOLDER_KEY):
                os.fsync(self._file.fileno())
                if self._board:
                    self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board:
            with disk_errors(self.folder, FOLDER_KEY):
                self._board.close()


def summary_writer(folder: Path, step: int) -> SummaryWriter:
    """A TensorBoard writer that continues after `step`: TensorBoard then hides later points."""
    now = int(time.time())  # TensorBoard orders event files by the second in their names
    if any(folder.glob(f"events.out.tfevents.{now}.*")):
        time.sleep(max(0, now + 1 - time.time()))  # the second may be over by now
    before = set(threading.enumerate())
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
    for thread in set(threading.enumerate()) - before:
        # an error in this thread is raised by the writer later: the thread prints no traceback
        thread._invoke_excepthook = lambda _: None
    return writer


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of a log. Raises CheckpointError, with the number of a damaged line."""
    # a kill can leave a partial last line: it is ignored
    lines = file.read_bytes().rpartition(b"\n")[0].split(b"\n") if file.is_file() else []
    rows = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:  # "7" cannot be compared with 7
                raise ValueError("no step")
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            what, fix = f"line {number} is damaged", "move the file away to start a new log"
            raise CheckpointError(file, what, fix) from None
    return rows


def git_commit() -> str:
    """The git commit of this code, with a + if tracked files have changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)  # noqa: S603
        return done.stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


class ProgressBar:
    """A progress bar, and a line for some steps. After a resume both count from the checkpoint."""

    def __init__(self, settings: TrainSettings, resumed_at: int, out: TextIO | None = None):
        self.out = out  # for the lines; the bar is on sys.stdout
        self.settings, self.resumed_at, self.max_steps = settings, resumed_at, 0
        self.bar = tqdm(disable=True)

    def start(self, step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        title = "Resume Training" if self.resumed_at else "Training"
        counts = {"total": max_steps - self.resumed_at, "initial": step - self.resumed_at}
        self.bar = tqdm(desc=title, file=sys.stdout, mininterval=2.0, **counts)

    def show(self, row: Mapping[str, Any]) -> None:
        """Moves the bar by one step, and prints the step's line if it has one."""
        self.bar.update()
        self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        if line := step_line(row, self.settings, self.resumed_at, self.max_steps):
            self.print(line)

    def print(self, line: str) -> None:
        self.bar.clear()  # then it is drawn again, below the line
        print(line, file=self.out)
        self.bar.refresh()

    def replay(self, rows: Iterable[Mapping[str, Any]], since: int, max_steps: int) -> None:
        """Prints logged rows in the same form as training does."""
        self.resumed_at, self.max_steps = since, max_steps
        for row in rows:
            if "sample" in row:
                self.print(f"=== Generation @ step {row['step']} ===\n{row['sample']}")
            self.write(row)


def step_line(
    row: Mapping[str, Any], settings: TrainSettings, resumed_at: int, max_steps: int
) -> str | None:
    """The line printed for a row of the log, or None: losses of some steps, the first, the last.

    All held-out losses are printed. After a resume, steps count from the checkpoint.
    """
    step, count = row["step"], row["step"] - resumed_at
    if "validation_loss" in row:
        return f"Step: {step}, Held-out Loss: {row['validation_loss']:.4f}"
    interval = settings.log_every
    if resumed_at:
        interval = max(min((max_steps - resumed_at) // 5, interval), 1)
    if "loss" not in row or (count % interval and step not in (resumed_at + 1, max_steps)):
        return None
    if resumed_at:
        return f"Step: {count}, Resume Loss: {row['loss']:.4f} (global step {step})"
    return f"Step: {step}, Train Loss: {row['loss']:.4f}"


def loss_summary(rows: Sequence[Mapping[str, Any]], unigram: float) -> str:
    """First, best and last losses of a log, compared with the loss of the unigram model."""
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [(row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row]
    count = min(100, len(losses))
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    (start, _), (best, at), (end, _) = held_out[0], min(held_out), held_out[-1]
    return (
        f"training loss: {losses[0]:.4f} at step 1, mean of the first {count} steps {first:.4f}, "
        f"of the last {last:.4f}\n"
        f"held out: {start:.4f} at first, best {best:.4f} at step {at}, {end:.4f} at the end, "
        f"{abs(unigram - end):.4f} {'below' if end < unigram else 'above'} the unigram model"
    )


def sample_table(rows: Iterable[Mapping[str, Any]]):
    """The generated texts of a log by step, as a styled DataFrame."""
    import pandas as pd  # imported here because it takes 1 s, and training does not need it

    samples = [(row["step"], " ".join(row["sample"].split())) for row in rows if "sample" in row]
    texts = [(step, "".join(filter(str.isprintable, text))) for step, text in samples]
    style = pd.DataFrame(texts, columns=["step", "sample"]).style.hide(axis="index")
    return style.format(escape="html").set_properties(**{"text-align": "left"})
