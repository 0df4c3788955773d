"""What a run prints: what it will take, a bar, a line every so many steps; or its record."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm

from workflow.config.settings import TrainSettings

WARM_AFTER, ESTIMATED_AFTER = 10, 20  # steps; the first ones are slow


class Progress:
    """A bar up to step `target`; after a resume at step `resumed_at` it counts from there."""

    def __init__(self, settings: TrainSettings, resumed_at: int | None, step: int, target: int):
        self.settings, self.resumed_at, self.target = settings, resumed_at, target
        self.started, self.warm = step, 0.0  # seconds until WARM_AFTER
        start = resumed_at or 0
        title = ("Resume " if resumed_at else "") + "Training"
        counts = {"total": target - start, "initial": step - start}
        self.bar = tqdm(desc=title, file=sys.stdout, mininterval=2.0, **counts)

    def show(self, row: dict[str, Any]) -> None:
        """Moves the bar; prints the row's line and, once, how long the rest will take."""
        self.bar.update()
        done, elapsed = row["step"] - self.started, self.bar.format_dict["elapsed"]
        if done == WARM_AFTER:
            self.warm = elapsed
        if done == ESTIMATED_AFTER:
            pace = (elapsed - self.warm) / (ESTIMATED_AFTER - WARM_AFTER)
            left = pace * (self.target - row["step"])
            tqdm.write(f"About {tqdm.format_interval(left)} to go", file=sys.stdout)
        if line := line_of(row, self.settings, self.resumed_at):
            tqdm.write(line, file=sys.stdout)

    def clear(self) -> None:
        """Takes the bar off the line that will be printed on."""
        if not self.bar.disable:
            self.bar.clear()

    def close(self) -> None:
        self.bar.close()


def line_of(row: dict[str, Any], settings: TrainSettings, resumed_at: int | None) -> str | None:
    """What is printed of a row, if anything; after a resume, counted from the checkpoint."""
    step, loss = row["step"], row["loss"]
    if resumed_at is None:
        shown = step % settings.print_every == 0
        return f"Step: {step}, Train Loss: {loss:.4f}" if shown else None
    count = step - resumed_at
    shown = count % max(settings.resume_steps // 5, 1) == 0
    return f"Step: {count}, Resume Loss: {loss:.4f} (global step {step})" if shown else None


def tell(
    rows: Iterable[dict[str, Any]], settings: TrainSettings, resumed_at: int | None, step: int
) -> None:
    """Prints a record as training printed it."""
    print(f"already at step {step}; from the record:")
    for row in rows:
        if "sample" in row:
            print(f"=== Generation @ step {row['step']} ===\n{row['sample']}")
        elif "loss" in row and (line := line_of(row, settings, resumed_at)):
            print(line)


def summary(rows: Sequence[dict[str, Any]], unigram: float) -> str:
    """How the losses of a record went, and how far below the unigram model's they came."""
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [(row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row]
    first, last = fmean(losses[:100]), fmean(losses[-100:])
    (start, _), (best, at), (end, _) = held_out[0], min(held_out), held_out[-1]
    return (
        f"training loss: {losses[0]:.4f} at step 1, mean of the first 100 steps {first:.4f}, "
        f"of the last {last:.4f}\n"
        f"held out: {start:.4f} at first, best {best:.4f} at step {at}, {end:.4f} at the end, "
        f"{unigram - end:.4f} below the unigram model"
    )


def samples(rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of a record's samples by step, to read one below the other."""
    lines = ["| step | sample |", "|---:|:---|"]
    for row in rows:
        if "sample" in row:
            text = "".join(filter(str.isprintable, " ".join(row["sample"].split())))
            text = re.sub(r"([\\`*_{}\[\]<>|$#~!&^])", r"\\\1", text)
            lines.append(f"| {row['step']} | {text} |")
    return "\n".join(lines)


def forecast(steps: int, settings: TrainSettings, epoch: int, parameters: int) -> None:
    """Prints what `steps` updates will take; `epoch` has so many tokens."""
    tokens = steps * settings.batch_size * settings.sequence_length
    print(
        f"{steps} steps of {settings.batch_size} × {settings.sequence_length} tokens: "
        f"{tokens} tokens, {tokens / epoch:.1f} epochs; {parameters} parameters, "
        f"{16 * parameters / 1e9:.2f} GB for weights, gradients and moments"
    )
