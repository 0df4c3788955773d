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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from SmolLm3 import LlamaModel, hf_state_dict, load_hf_weights

from . import WorkflowError, checkpoint, files, progress, randomness, weights_sha256
from .archive import CheckpointError
from .data import batch_at, validation_batches
from .origin import Origin, identify
from .record import Record, Trace
from .restoring import check_allowed, restore
from .settings import Config
from .signals import deferred
from .update import (
    NextTokenLoss,
    evaluating,
    learning_rate,
    make_optimizer,
    optimizer_state,
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
    def resume(cls, path: str | Path, config: Config, allow: Collection[str] = ()) -> Run:
        """The run that `path` is a checkpoint of, in fresh objects, at that step.

        path: the file, or its folder for the newest. When the run has gone on since, its newest
        checkpoint is taken instead, saying so: no step is trained twice.
        allow: what may be other than in the checkpoint; see `restoring.check_allowed`.
        """
        check_allowed(allow)
        path = Path(path).resolve()
        if path.is_dir():
            if not checkpoint.found(path):
                raise CheckpointError(path, "no checkpoint in this folder", "name another")
            path, state = checkpoint.newest(path)
        else:
            state = checkpoint.load(path)
        folder, asked = path.parent, state["step"]
        if folder.parent != config.paths.checkpoints.resolve():
            do = f"put its folder there, or give --set paths.checkpoints={folder.parent}"
            raise CheckpointError(path, f"it is not in {config.paths.checkpoints}", do)
        run = cls.__new__(cls)
        with run._closed_on_failure():
            run.allowed = tuple(allow)
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
        trained and the record is told. Ctrl-C and SIGTERM wait until the update, and what the
        caller does after it, are done; then the run is saved and KeyboardInterrupt raised.
        """
        if self.step > target or (self.step == target and not self._owes_validation(target)):
            after = self.resumed_at or 0
            rows = self.record.between(after, target)
            return progress.tell(rows, self.config.train, self.resumed_at, self.step)
        self._check_live()
        settings, epoch = self.config.train, len(self.corpus.train)
        parameters = sum(p.numel() for p in self.model.parameters())
        progress.forecast(target - self.step, settings, epoch, parameters)
        self._progress = progress.Progress(settings, self.resumed_at, self.step, target)
        try:
            with deferred() as safe_point:
                self._validate(target, safe_point)
                while self.step < target:
                    row = self._update()
                    self.record.add(row)
                    self._amid = False
                    self._progress.show(row)
                    self._validate(target, safe_point)
                    yield self.step
                    if self.step % settings.checkpoint_every == 0 and self.step < target:
                        self.save()
                    safe_point(self.save)
        finally:
            self._progress.close()
            self._progress = None
            self.record.flush()

    def carry_on(self, target: int) -> Trace:
        """Goes on to `target`, unlogged and unsaved: what a run does that never stops.

        Close the run afterwards. The trace is kept, and read again once it is there.
        """
        file = self.folder / "never_stopped.json"
        if file.is_file():
            return Trace.read(file)
        if self._amid:
            self._check_live()
        if self.step >= target and not self.carried:
            what = "this run was not carried on before its resume"
            raise CheckpointError(file, what, "start anew beside it with FRESH=1")
        if self.taken_from == self.step:
            print(f"Note: at step {self.step} this run was itself read from a checkpoint")
        with deferred() as safe_point:
            while self.step < target:
                self.carried.append(self._update()["loss"])
                self._amid = False
                safe_point()
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

        A run that has not begun, was carried on or is closed has nothing to save.
        """
        path = self.checkpoint(self.step)
        if not self.step or self.carried or self.model is None or checkpoint.is_whole(path):
            return
        if self._amid:
            self._check_live()
        self.record.flush()
        state = self._state()
        if wrong := checkpoint.not_finite(state):
            what = f"{wrong[0]} is not finite at step {self.step}, nothing is saved"
            raise NonFiniteError(f"run {self.name}", what, "lower train.learning_rate")
        checkpoint.save(path, state)
        tqdm.write(f"Saved {path.name}", file=sys.stdout)
        settings = self.config.train
        kept = {settings.steps, self.config.last_step, self.resumed_at, self.taken_from}
        checkpoint.prune(self.checkpoints, self.step, settings.keep_checkpoints, kept)

    def sample(self, prompt: str) -> str:
        """`prompt` with its continuation, logged at this step.

        Touches no random state but its own. Takes the bar off the line that will be printed on.
        """
        if self._progress is not None:
            self._progress.clear()
        told = self.record.sample(self.step, prompt)
        if told is not None:
            return told
        self._check_live()
        settings = self.config.sample
        ids = torch.tensor(
            [self.origin.tokenizer.encode(prompt, add_special_tokens=False).ids], device=self.device
        )
        generator = torch.Generator(self.device).manual_seed(self.config.run.seed)
        with evaluating(self.model):
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
        if not self._amid:
            self.save()
        self.close()

    def close(self) -> None:
        """Flushes the record and frees the lock and the tensors. A second call does nothing."""
        if self.record is not None:
            self.record.close()
        if self._lock is not None:
            self._lock.release()
        self.model = self.optimizer = self.loss = None

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        self.step, self.resumed_at, self.taken_from, self.carried = 0, None, None, []
        self.allowed, self._amid = (), False
        self.model = self.record = self._lock = self._progress = None
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _check_live(self) -> None:
        if self.model is None or self.carried or self._amid:
            what = "this run is closed, was carried on unlogged or stopped amid an update"
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
        self._amid = True  # until the row is recorded, this is no state to save
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": value,
            "learning_rate": rate,
            "gradient_norm": size,
            "tokens_per_second": inputs.numel() / (time.perf_counter() - began),
        }

    def _owes_validation(self, target: int) -> bool:
        due = self.step % self.config.train.validate_every == 0 or self.step == target
        return due and self.model is not None and not self.record.has("validation_loss", self.step)

    @torch.no_grad()
    def _validate(self, target: int, safe_point: Callable) -> None:
        """Logs the mean loss on the held-out tokens at this step, if it is due and not there."""
        if not self._owes_validation(target):
            return
        settings, total, count = self.config.train, 0.0, 0
        batches = validation_batches(
            self.corpus.validation,
            settings.validation_tokens,
            settings.batch_size,
            settings.sequence_length,
        )
        with evaluating(self.model):
            for inputs, targets in batches:
                loss = self.loss(inputs.to(self.device), targets.to(self.device))
                total += loss.item() * inputs.numel()
                count += inputs.numel()
                safe_point(self.save)
        self.record.add({"step": self.step, "validation_loss": total / count})

    # --- opening, saving, restoring ---

    def _open(self, config: Config, origin: Origin, name: str | None = None) -> None:
        """Everything but weights, moments and step: data, folders, lock, unfilled objects."""
        self.config, self.origin, self.device = config, origin, config.device
        self.corpus, auto_name = identify(config, origin)
        self.made_of = origin.provenance | self.corpus.origin
        print(self.corpus)
        self.name = name or auto_name
        self.checkpoints = config.paths.checkpoints / self.name
        self.folder = config.paths.runs / self.name
        if earlier := _OPEN.pop(self.checkpoints.resolve(), None):
            earlier.hand_over()
        self._lock = files.lock(self.checkpoints, checkpoint.SETTING)
        _OPEN[self.checkpoints.resolve()] = self
        files.remove_unfinished(self.checkpoints)
        if not (self.checkpoints / "tokenizer.json").is_file():
            texts = {**origin.tokenizer_files, "tokenizer.json": origin.tokenizer.to_str()}
            for file, text in texts.items():
                files.replace_text(self.checkpoints / file, text, checkpoint.SETTING)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # the price of a bit-exact resume on a GPU
        randomness.seed_random_states(config.run.seed)
        self.model = LlamaModel(config.trained).to(self.device)
        self.loss = NextTokenLoss(self.model)
        self.optimizer = make_optimizer(self.model, config.train)
        self._check_room()

    def _check_room(self) -> None:
        """Raises DiskError when the checkpoints of the whole run will not fit."""
        settings, there = self.config.train, len(checkpoint.found(self.checkpoints))
        saves = self.config.last_step // settings.checkpoint_every + 2
        most = min(saves, settings.keep_checkpoints + 2)  # the resumed one, and one being written
        size = 3 * sum(p.nbytes for p in self.model.parameters())
        needed, what = size * max(most - there, 1), f"{most} checkpoints"
        files.check_room(self.checkpoints, needed, what, checkpoint.SETTING)

    def _start(self) -> None:
        if self.config.train.init == "reference":
            load_hf_weights(self.model, self.origin.weights)
        self.record = Record(self.folder, 0, self.made_of | self.corpus.stamp)
        (self.folder / "never_stopped.json").unlink(missing_ok=True)

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
            "optimizer": optimizer_state(self.optimizer),
            "random": randomness.random_states(),
            "reference": self.made_of,
            "environment": randomness.environment(self.device),
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Fills the fresh objects, after everything was compared. Raises CheckpointError."""
        made_with, here = self._made_with(), randomness.environment(self.device)
        inexact = restore(path, state, made_with, self.model, self.optimizer, self.allowed)
        if state["environment"] != here:
            print(f"Note: saved on {state['environment']}, now on {here}: no longer bit-exact")
        if inexact:
            print(f"Note: {', '.join(inexact)} as allowed: no longer the course it was on")
        self.step = self.taken_from = state["step"]
        self.record = Record(self.folder, self.step, self.made_of | self.corpus.stamp)
