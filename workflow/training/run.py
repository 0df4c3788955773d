"""`Run`: the loop and its schedule.

    for step in run.until(5000):          # yields after each update; step = updates done
        if step % 500 == 0:
            print(run.sample("Once upon a time,"))
    run.save()                            # checkpoints/<run>/checkpoint_5000.pt

All state is on `run`, none in the loop: a break, an interrupt, or running a notebook cell again
goes on where it was.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from SmolLm3 import LlamaModel, hf_state_dict, load_hf_weights
from workflow import files
from workflow.config.settings import Config
from workflow.data.corpus import batch_at, validation_batches
from workflow.errors import CheckpointError, NonFiniteError
from workflow.files import weights_sha256
from workflow.training import checkpoint, distributed, hardware, progress, randomness
from workflow.training.origin import Origin, identify
from workflow.training.record import Record, RowsAlone, Trace
from workflow.training.restoring import check_allowed, restore
from workflow.training.signals import deferred
from workflow.training.step import TrainStep, evaluating, optimizer_state

GPU_STEPS_AHEAD = 10  # updates that are launched before the numbers of the first are waited for
_OPEN = weakref.WeakValueDictionary()  # this process's runs, by folder of checkpoints


class Run:
    """A training run with its folder of checkpoints and its record.

    Takes up the newest whole checkpoint of its folder, saying so, or starts at step 0. `step`
    counts updates done; `history` holds the record's rows, `corpus` the data, `model` the model.
    One process at a time may hold a run.
    Raises CheckpointError, DataError, BusyError or DiskError when it cannot go on exactly.
    """

    def __init__(self, config: Config, reference):
        with self._closed_on_failure(), distributed.first_first():
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
        path, state = checkpoint.within(config.paths.checkpoints, Path(path).resolve())
        folder, asked = path.parent, state["step"]
        run = cls.__new__(cls)
        with run._closed_on_failure(), distributed.first_first():
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
        self._settle()
        return self.record.rows

    # --- the loop ---

    def until(self, target: int) -> Iterator[int]:
        """Trains up to `target` updates in all, yielding the count after each.

        Prints, logs, validates and saves on the way. When the run is there already, nothing is
        trained and the record is told. Ctrl-C and SIGTERM wait until the update, and what the
        caller does after it, are done; then the run is saved and KeyboardInterrupt raised.
        """
        self._settle()
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
            with deferred(distributed.agreed) as safe_point:
                self._validate(target, safe_point)
                while self.step < target:
                    self._update()
                    if self._waits(target):
                        self._settle()
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
        self._settle()
        with deferred(distributed.agreed) as safe_point:
            while self.step < target:
                self._update()
                self.carried += [row["loss"] for row in self._rows()]
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
        self._settle()
        with distributed.first_first():  # nobody leaves before it is written
            if not self.step or self.carried or self.model is None or distributed.rank():
                return
            if checkpoint.is_whole(path):
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
        self._settle()
        if self._progress is not None:
            self._progress.clear()
        told = self.record.sample(self.step, prompt)
        if told is not None:
            return told
        self._check_live()
        if distributed.rank():
            return ""
        settings = self.config.sample
        ids = self.origin.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = torch.tensor([ids], device=self.device)
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
        self.model = self.optimizer = self.updater = None

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
        """Inputs and targets (B, T) of update `step` (0, 1, …); B: this process's share."""
        settings, seed = self.config.train, self.config.run.seed
        size = settings.batch_size, settings.sequence_length
        whole = batch_at(self.corpus.train, step, *size, seed)
        inputs, targets = (part[self.updater.share] for part in whole)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return tuple(part.to(self.device, non_blocking=True) for part in (inputs, targets))

    def _update(self) -> None:
        inputs, targets = self.batch(self.step)
        self._amid = True  # no state to save
        with distributed.told():
            self.updater(self.step, inputs, targets)
        self.step += 1
        self._amid = False

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the updates that were launched; waits for them."""
        waiting = self.updater.waiting
        try:
            return self.updater.rows(self.name)
        except NonFiniteError as error:
            self.step, self._amid = error.step, waiting > 1
            raise

    def _settle(self) -> None:
        """Records and shows the updates that were launched, if there are any."""
        if self._amid or self.model is None or not self.updater.waiting:
            return
        self._amid = True  # half a record is no state to save
        for row in self._rows():
            self.record.add(row)
            if self._progress is not None:
                self._progress.show(row)
        self._amid = False

    def _waits(self, target: int) -> bool:
        """Whether this step's numbers are waited for; else a GPU has the next step launched."""
        ahead = GPU_STEPS_AHEAD if self.device.type == "cuda" else 1
        return self.step % ahead == 0 or self._validates(target)

    def _validates(self, target: int) -> bool:
        return self.step % self.config.train.validate_every == 0 or self.step == target

    def _owes_validation(self, target: int) -> bool:
        here = self.model is not None and not distributed.rank() and self._validates(target)
        return here and not self.record.has("validation_loss", self.step)

    @torch.no_grad()
    def _validate(self, target: int, safe_point: Callable) -> None:
        """Logs the mean loss on the held-out tokens at this step, if it is due and not there."""
        if not self._owes_validation(target):
            return
        settings, total, count = self.config.train, 0.0, 0
        size = settings.micro_batch_size or settings.batch_size, settings.sequence_length
        batches = validation_batches(self.corpus.validation, settings.validation_tokens, *size)
        with evaluating(self.model):
            for inputs, targets in batches:
                loss = self.updater.loss(inputs.to(self.device), targets.to(self.device))
                total += loss.item() * inputs.numel()
                count += inputs.numel()
                if distributed.count() == 1:  # the others are not here to agree
                    safe_point(self.save)
        self.record.add_histograms(self.step, self.model)
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
        _OPEN[self.checkpoints.resolve()] = self
        if not distributed.rank():
            self._take_folder()
        hardware.prepare(self.device)
        randomness.seed_random_states(config.run.seed)
        self.model = LlamaModel(config.trained).to(self.device)
        self.updater = TrainStep(self.model, config.train, self.device)
        self.optimizer = self.updater.optimizer
        self._check_room()

    def _take_folder(self) -> None:
        self._lock = files.lock_folder(self.checkpoints, checkpoint.SETTING)
        files.remove_temporary_files(self.checkpoints)
        if not (self.checkpoints / "tokenizer.json").is_file():
            tokenizer = {"tokenizer.json": self.origin.tokenizer.to_str()}
            for file, text in {**self.origin.tokenizer_files, **tokenizer}.items():
                files.write_text_atomic(self.checkpoints / file, text, checkpoint.SETTING)

    def _check_room(self) -> None:
        """Raises DiskError when the checkpoints of the whole run will not fit."""
        settings, there = self.config.train, len(checkpoint.found(self.checkpoints))
        saves = self.config.last_step // settings.checkpoint_every + 2
        most = min(saves, settings.keep_checkpoints + 2)  # the resumed one, and one being written
        size = 3 * sum(p.nbytes for p in self.model.parameters())
        needed, what = size * max(most - there, 1), f"{most} checkpoints"
        files.check_free_space(self.checkpoints, needed, what, checkpoint.SETTING)

    def _start(self) -> None:
        if self.config.train.init == "reference":
            load_hf_weights(self.model, self.origin.weights)
        self._open_record()
        if not distributed.rank():
            (self.folder / "never_stopped.json").unlink(missing_ok=True)

    def _open_record(self) -> None:
        kind = RowsAlone if distributed.rank() else Record
        settings, made_of = self.config.settings_of_run(), self.made_of | self.corpus.stamp
        self.record = kind(self.folder, self.step, made_of, settings)

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
        self._open_record()
