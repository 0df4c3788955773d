"""`Run`: the loop and its schedule.

    for step in run.until(5000):          # yields after each update; step = updates done
        if step % 500 == 0:
            print(run.sample("Once upon a time,"))
    run.save()                            # checkpoints/<run>/checkpoint_5000.pt

All state is on `run`, none in the loop: a break, an interrupt, or running a notebook cell again
goes on where it was.
"""

from __future__ import annotations

import math
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from SmolLm3 import LlamaModel, hf_state_dict, load_hf_weights

from . import WorkflowError, checkpoint, weights_sha256
from .checkpoint import CheckpointError
from .data import batch_at, validation_batches
from .origin import Origin, identify
from .record import Record, Trace, replace_text
from .settings import Config
from .update import (
    NextTokenLoss,
    interrupts_deferred,
    learning_rate,
    load_optimizer,
    make_optimizer,
)


class NonFiniteError(WorkflowError):
    """The loss or the gradient is not a number."""

    exit_code = 4


_OPEN = weakref.WeakValueDictionary()  # this process's runs, by folder of checkpoints


class Run:
    """A training run with its folder of checkpoints and its record.

    Takes up the newest whole checkpoint of its folder, saying so, or starts at step 0. `step`
    counts updates done; `history` holds the record's rows, `corpus` the data, `model` the model.
    One process at a time may hold a run.
    Raises CheckpointError, DataError, BusyError or DiskError when it cannot go on exactly.
    """

    def __init__(self, config: Config, reference):
        with self._closed_on_failure():
            self._open(config, Origin.of(reference))
            taken = checkpoint.newest(self.checkpoints)
            if taken:
                print(f"Run {self.name}: resuming from {taken[0].name}")
                self._restore(*taken)
            else:
                print(f"Run {self.name}: starts at step 0")
                self._start()

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> Run:
        """The run that `path` is a checkpoint of, in fresh objects, at that step.

        When the run has gone on since, its newest checkpoint is taken instead, saying so: no step
        is trained twice.
        """
        path = Path(path).resolve()
        state = checkpoint.load(path)
        folder, asked = path.parent, state["step"]
        if folder.parent != config.paths.checkpoints.resolve():
            do = f"put its folder there, or give --set paths.checkpoints={folder.parent}"
            raise CheckpointError(path, f"it is not in {config.paths.checkpoints}", do)
        run = cls.__new__(cls)
        with run._closed_on_failure():
            run._open(config, Origin.saved(folder, state), folder.name)
            print(f"Loaded {path.name}")
            if max(checkpoint.found(folder), default=asked) > asked:
                path, state = checkpoint.newest(folder)
                print(f"The run has gone on since: its record goes to {path.name}")
            run._restore(path, state)
            run.resumed_at = asked
        return run

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.record.rows

    # --- the loop ---

    def until(self, target: int) -> Iterator[int]:
        """Trains up to `target` updates in all, yielding the count after each.

        Prints, logs, validates and saves on the way. When the run is there already, nothing is
        trained and the record is told.
        """
        if self.step >= target:
            return self._tell(target)
        self._check_live()
        settings, start = self.config.train, self.resumed_at or 0
        self._forecast(target)
        options = {"total": target - start, "initial": self.step - start, "mininterval": 2.0}
        title, first = ("Resume " if self.resumed_at else "") + "Training", self.step
        self._bar = bar = tqdm(desc=title, file=sys.stdout, **options)
        try:
            while self.step < target:
                with interrupts_deferred():
                    row = self._update()
                    self.record.add(row)
                bar.update()
                if self.step == first + 20:
                    left = bar.format_dict["elapsed"] / 20 * (target - self.step)
                    tqdm.write(f"About {tqdm.format_interval(left)} to go", file=sys.stdout)
                if line := self._line(row):
                    tqdm.write(line, file=sys.stdout)
                if self.step % settings.validate_every == 0 or self.step == target:
                    self._validate()
                yield self.step
                if self.step % settings.checkpoint_every == 0 and self.step < target:
                    self.save()
        finally:
            bar.close()
            self._bar = None
            self.record.flush()

    def carry_on(self, target: int) -> Trace:
        """Goes on to `target`, unlogged and unsaved: what a run does that never stops.

        Close the run afterwards. The trace is kept, and read again once it is there.
        """
        file = self.folder / "never_stopped.json"
        if file.is_file():
            return Trace.read(file)
        if self.step >= target and not self.carried:
            what = "this run was not carried on before its resume"
            raise CheckpointError(file, what, "start anew beside it with FRESH=1")
        if self.taken_from == self.step:
            print(f"Note: at step {self.step} this run was itself read from a checkpoint")
        while self.step < target:
            with interrupts_deferred():
                self.carried.append(self._update()["loss"])
        first = target - len(self.carried) + 1
        trace = Trace(first, tuple(self.carried), self.weights_sha256())
        trace.write(file)
        return trace

    def trace(self, first_step: int) -> Trace:
        """The record from `first_step` on, and the weights as they are now."""
        losses = tuple(
            row["loss"] for row in self.history if "loss" in row and row["step"] >= first_step
        )
        return Trace(first_step, losses, self.weights_sha256())

    def save(self) -> None:
        """Writes `checkpoint_<step>.pt`; one that is there and whole is this very state.

        A run that was carried on or closed has nothing to save.
        """
        path = self.checkpoint(self.step)
        if not self.carried and self.model is not None and not checkpoint.is_whole(path):
            self.record.flush()
            if not all(p.isfinite().all() for p in self.model.parameters()):
                what = f"weights are not finite at step {self.step}, they are not saved"
                raise NonFiniteError(f"run {self.name}", what, "lower train.learning_rate")
            checkpoint.save(path, self._state())
            tqdm.write(f"Saved {path.name}", file=sys.stdout)
            milestones = {self.config.train.steps, self.config.last_step, self.resumed_at}
            checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints, milestones)

    def sample(self, prompt: str) -> str:
        """`prompt` with its continuation, logged at this step.

        Touches no random state but its own. Takes the bar off the line that will be printed on.
        """
        if self._bar is not None and not self._bar.disable:
            self._bar.clear()
        told = self.record.sample(self.step, prompt)
        if told is not None:
            return told
        self._check_live()
        settings = self.config.sample
        ids = torch.tensor(
            [self.origin.tokenizer.encode(prompt, add_special_tokens=False).ids], device=self.device
        )
        generator = torch.Generator(self.device).manual_seed(self.config.run.seed)
        output = self.model.generate(
            ids, settings.new_tokens, settings.temperature, generator=generator
        )
        text = self.origin.tokenizer.decode(output[0].tolist())
        self.record.add({"step": self.step, "prompt": prompt, "sample": text})
        return text

    def checkpoint(self, step: int) -> Path:
        return checkpoint.path_of(self.checkpoints, step)

    def weights_sha256(self) -> str:
        return weights_sha256(hf_state_dict(self.model))

    def hand_over(self) -> None:
        """Saves and closes, so that a `Run` opened again, say by a cell run twice, goes on."""
        if self.step:
            self.save()
        self.close()

    def close(self) -> None:
        """Flushes the record and frees the lock and the tensors. A second call does nothing."""
        if self.record is not None:
            self.record.close()
        if self._lock is not None:
            self._lock.close()
        self.model = self.optimizer = self.loss = None

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        self.step, self.resumed_at, self.taken_from, self.carried = 0, None, None, []
        self.model = self.record = self._lock = self._bar = None
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _check_live(self) -> None:
        if self.model is None or self.carried:
            what = "this run is closed, or was carried on unlogged"
            raise CheckpointError(f"run {self.name}", what, "open it again: Run(config, reference)")

    # --- one update ---

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of update `step` (0, 1, …), on the run's device."""
        settings, seed = self.config.train, self.config.run.seed
        inputs, targets = batch_at(
            self.corpus.train, step, settings.batch_size, settings.sequence_length, seed
        )
        return inputs.to(self.device), targets.to(self.device)

    def _update(self) -> dict[str, Any]:
        """One update; its row. Numbers that are not finite are refused before weights change."""
        settings, began = self.config.train, time.perf_counter()
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self.batch(self.step)
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        bare = [name for name, p in self.model.named_parameters() if p.grad is None]
        assert not bare, f"no gradient reaches {', '.join(bare)}"
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        value, size = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            what = f"loss {value} and gradient norm {size} at step {self.step + 1}"
            raise NonFiniteError(f"run {self.name}", what, "lower train.learning_rate")
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": value,
            "learning_rate": rate,
            "gradient_norm": size,
            "tokens_per_second": inputs.numel() / (time.perf_counter() - began),
        }

    @torch.no_grad()
    def _validate(self) -> None:
        """Logs the mean loss on the held-out tokens at this step."""
        settings, total, count = self.config.train, 0.0, 0
        for inputs, targets in validation_batches(
            self.corpus.validation,
            settings.validation_tokens,
            settings.batch_size,
            settings.sequence_length,
        ):
            loss = self.loss(inputs.to(self.device), targets.to(self.device))
            total += loss.item() * inputs.numel()
            count += inputs.numel()
        self.record.add({"step": self.step, "validation_loss": total / count})

    # --- what is printed ---

    def _line(self, row: dict[str, Any]) -> str | None:
        """What is printed of a row, if anything; after a resume, counted from the checkpoint."""
        settings, step, loss = self.config.train, row["step"], row["loss"]
        if self.resumed_at is None:
            shown = step % settings.print_every == 0
            return f"Step: {step}, Train Loss: {loss:.4f}" if shown else None
        count = step - self.resumed_at
        shown = count % max(settings.resume_steps // 5, 1) == 0
        return f"Step: {count}, Resume Loss: {loss:.4f} (global step {step})" if shown else None

    def _tell(self, target: int) -> None:
        """Prints the record up to `target`, as training printed it."""
        print(f"already at step {self.step}; from the record:")
        for row in self.record.between(self.resumed_at or 0, target):
            if "sample" in row:
                print(f"=== Generation @ step {row['step']} ===\n{row['sample']}")
            elif "loss" in row and (line := self._line(row)):
                print(line)

    def _forecast(self, target: int) -> None:
        """Prints what the steps up to `target` will take."""
        settings, steps = self.config.train, target - self.step
        tokens = steps * settings.batch_size * settings.sequence_length
        parameters = sum(p.numel() for p in self.model.parameters())
        epochs = tokens / len(self.corpus.train)
        print(
            f"{steps} steps of {settings.batch_size} × {settings.sequence_length} tokens: "
            f"{tokens} tokens, {epochs:.1f} epochs; {parameters} parameters, "
            f"{16 * parameters / 1e9:.2f} GB for weights, gradients and moments"
        )

    # --- opening, saving, restoring ---

    def _open(self, config: Config, origin: Origin, name: str | None = None) -> None:
        """Everything but weights, moments and step: data, folders, lock, unfilled objects."""
        self.config, self.origin, self.device = config, origin, config.device
        self.corpus, auto_name = identify(config, origin)
        self.name = name or auto_name
        self.checkpoints = config.paths.checkpoints / self.name
        self.folder = config.paths.runs / self.name
        if earlier := _OPEN.pop(self.checkpoints.resolve(), None):
            earlier.hand_over()
        self._lock = checkpoint.lock(self.checkpoints)
        _OPEN[self.checkpoints.resolve()] = self
        checkpoint.remove_unfinished(self.checkpoints)
        if not (self.checkpoints / "tokenizer.json").is_file():
            files = {**origin.tokenizer_files, "tokenizer.json": origin.tokenizer.to_str()}
            for file, text in files.items():
                replace_text(self.checkpoints / file, text)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # the price of a bit-exact resume on a GPU
        checkpoint.seed_random_states(config.run.seed)
        self.model = LlamaModel(config.trained).to(self.device)
        self.loss = NextTokenLoss(self.model)
        self.optimizer = make_optimizer(self.model, config.train)

    def _start(self) -> None:
        if self.config.train.init == "reference":
            load_hf_weights(self.model, self.origin.weights)
        self.record = Record(self.folder, 0)
        (self.folder / "never_stopped.json").unlink(missing_ok=True)
        self._validate()

    def _made_with(self) -> dict[str, Any]:
        """What a resume must find unchanged."""
        return {
            "config": self.config.settings_of_run(),
            "data": self.corpus.stamp,
            "tokenizer": {
                "sha256": self.corpus.tokenizer_sha256,
                "vocabulary": self.origin.tokenizer.get_vocab_size(),
                "end_of_text": self.origin.end_of_text,
            },
        }

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on; see `checkpoint.CONTENTS`."""
        return self._made_with() | {
            "step": self.step,
            "model": hf_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_states(),
            "reference": self.origin.provenance,
            "environment": checkpoint.environment(self.device),
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Fills the fresh objects, after everything was compared. Raises CheckpointError."""
        now, here = self._made_with(), checkpoint.environment(self.device)
        checkpoint.compare(path, {part: state[part] for part in now}, now)
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            load_hf_weights(self.model, state["model"])
            checkpoint.restore_random_states(state["random"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(path, f"it does not fit ({error})", "choose another") from error
        if state["environment"] != here:
            print(f"Note: saved on {state['environment']}, now on {here}: no longer bit-exact")
        self.step = self.taken_from = state["step"]
        self.record = Record(self.folder, self.step)
