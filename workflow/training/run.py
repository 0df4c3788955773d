"""A run: a trainer with a folder of checkpoints and a log.

    run = open_run(config, reference, corpus)     # at step 0, or at its newest checkpoint
    for step in run.train(5000):                  # after each step
        if step % 500 == 0:
            print(run.sample("Once upon a time,"))
    run.save_and_close()                          # checkpoints/<run>/checkpoint_5000.pt

After a `break`, an interrupt or a kill, the same lines continue the run.
"""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from workflow.config.load import dump_yaml
from workflow.errors import CheckpointError, ConfigError
from workflow.files import write_text_atomic
from workflow.training import checkpoint, distributed, hardware
from workflow.training.directory import RunDirectory
from workflow.training.metrics import (
    FOLDER_KEY,
    SETTINGS_FILE,
    InMemoryLogger,
    MetricsLogger,
    ProgressBar,
    StepTrace,
    origin,
)
from workflow.training.resume import environment
from workflow.training.signals import DeferredSignals
from workflow.training.step import eval_mode
from workflow.training.trainer import Trainer

UNINTERRUPTED_FILE = "uninterrupted.json"  # in the folder of the log; see uninterrupted.py
GPU_STEPS_AHEAD = 10  # steps that are started on a GPU before waiting for their metrics


class Run:
    """A trainer with its directory and its logger. `open_run` and `resume_run` in open.py make one.

    provenance: of the weights. loaded: the checkpoint to continue from, as (path, state), or None.
    resumed_at: the step of the checkpoint given to `resume_run`, or 0. allowed: what may differ
    from the checkpoint. out: for the lines of the steps and of saved files, by default sys.stdout;
    all else is printed to sys.stdout.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        provenance: dict[str, str],
        loaded: tuple[Path, dict[str, Any]] | None,
        resumed_at: int = 0,
        allowed: Collection[str] = (),
        out: TextIO | None = None,
    ):
        self.trainer, self.config, self.corpus = trainer, trainer.config, trainer.corpus
        self.directory, self.resumed_at, self.out = directory, resumed_at, out
        self.name = directory.folder.name
        self.folder = self.config.paths.runs / self.name  # of the log
        self.provenance = provenance | self.corpus.provenance
        print(self.corpus)
        self._check_sample_fits()
        directory.check_free_space(self.config, sum(p.nbytes for p in trainer.model.parameters()))
        if loaded:
            self._load(*loaded, allowed)
        self.loaded_step = trainer.global_step  # 0: no checkpoint was loaded
        self.progress = ProgressBar(self.config.train, resumed_at, out)
        self.signals = DeferredSignals()
        logged = loaded[1]["log"] if loaded else None
        main_process = distributed.is_main_process()
        self.logger = self._open_logger(logged) if main_process else InMemoryLogger()
        directory.close_on_reopen(self)

    @property
    def global_step(self) -> int:
        return self.trainer.global_step

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the log; see `InMemoryLogger`."""
        self._flush_metrics()
        return self.logger.rows

    def train(self, max_steps: int) -> Iterator[int]:
        """Trains until `max_steps` steps are done in total; yields that number after each step.

        Prints, logs, validates and saves. If the run has already reached `max_steps`, its log is
        replayed instead. Ctrl-C and SIGTERM wait until the step and the body of the caller's loop
        are done; then the run is saved, and KeyboardInterrupt is raised. If the body ends the loop,
        `save`, `close` or the next `train` raises it.
        """
        self._flush_metrics()
        settings, done = self.config.train, self.global_step
        if done > max_steps or (done == max_steps and not self._validation_due(max_steps)):
            since = self.resumed_at if self.resumed_at < max_steps else 0  # 0: the whole log
            rows = (r for r in self.logger.rows if not since or since < r["step"])
            rows = (row for row in rows if row["step"] <= max_steps)
            where = f"it is at step {done}, {origin(self._code_since(1))}"
            print(f"Nothing to train: run {self.name} is complete; replaying its log ({where}):")
            self.progress.replay(rows, since, max_steps)
            return
        self._check_open()
        self._print_plan(max_steps)
        self.progress.start(done, max_steps)
        try:
            with self.signals:
                self._validate(max_steps)
                while self.global_step < max_steps:
                    self.trainer.train_step()
                    if self._metrics_due(max_steps):
                        self._flush_metrics()
                    self._validate(max_steps)
                    yield self.global_step
                    due = self.global_step % settings.checkpoint_every == 0
                    if due and self.global_step < max_steps:
                        self._write_checkpoint()
                    self.signals.safe_point(self._stop)
                self.logger.flush()
        finally:
            self.progress.bar.close()

    def sample(self, prompt: str) -> str:
        """Generates a continuation of `prompt`, logs it, and returns both as one text.

        If the log already has one of this step, returns that. Training is not affected.
        """
        self._flush_metrics()
        self.progress.bar.clear()
        logged = self.logger.sample(self.global_step, prompt)
        if logged is not None or not distributed.is_main_process():
            return logged or ""
        self._check_open()
        settings, model, device = self.config.sample, self.trainer.model, self.trainer.device
        ids = self.corpus.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = torch.tensor([ids], device=device)
        generator = torch.Generator(device).manual_seed(self.config.run.seed)
        with eval_mode(model):
            output = model.generate(
                ids, settings.new_tokens, settings.temperature, generator=generator
            )
        text = self.corpus.tokenizer.decode(output[0].tolist())
        self.logger.log({"step": self.global_step, "prompt": prompt, "sample": text})
        return text

    def save(self) -> None:
        """Writes `checkpoint_<global_step>.pt`, unless it exists: it then has the same state."""
        self._write_checkpoint()
        self.signals.raise_pending()

    def _write_checkpoint(self) -> None:
        self._flush_metrics()
        with distributed.main_process_first():  # the others wait until it is written
            path, settings = self.directory.checkpoint(self.global_step), self.config.train
            if not self.directory.locked or not self.global_step or checkpoint.is_valid(path):
                return
            self.logger.flush()
            here = environment(self.trainer.device, settings)
            about = {"reference": self.provenance, "environment": here}
            about["settings"] = self.config.values_in_force()
            about["log"] = self.logger.fingerprint()
            state = self._expected_parts() | about | self.trainer.state_dict()
            milestones = {settings.steps, self.config.last_step, self.resumed_at, self.loaded_step}
            deleted = self.directory.save(state, settings.keep_checkpoints, milestones)
            self.progress.print(f"Saved {path.name}")
            if deleted:
                why = f"train.keep_checkpoints is {settings.keep_checkpoints}"
                self.progress.print(f"Removed {', '.join(deleted)}: {why}")

    def _stop(self) -> None:
        """Saves after Ctrl-C or SIGTERM."""
        self._write_checkpoint()
        saved = ", saved" if self.global_step else ""
        how = "To continue, run the same command or cell again."
        self.progress.print(f"Stopped at step {self.global_step}{saved}. {how}")

    def close(self) -> None:
        """Closes the log and unlocks the folder. A second call does nothing."""
        self.logger.close()
        self.directory.close()
        self.signals.raise_pending()

    def save_and_close(self) -> None:
        """Saves, unless a step stopped in the middle, and closes."""
        if not self.trainer.step_unfinished:
            self._write_checkpoint()
        self.close()

    def trace(self, first_step: int) -> StepTrace:
        """The logged losses from `first_step` on, and the hash of the current weights."""
        rows = [row for row in self.history if "loss" in row and row["step"] >= first_step]
        losses, code = tuple(row["loss"] for row in rows), self._code_since(first_step)
        return StepTrace(first_step, losses, self.trainer.weights_sha256(), code)

    def _code_since(self, first_step: int) -> str | None:
        """The hash of the code that trained all steps from `first_step` on; None if several did."""
        began = [row for row in self.history if "began" in row]
        before = [row for row in began if row["step"] < first_step]
        after = [row for row in began if row["step"] >= first_step]
        lost = [row for row in self.history if "new_log" in row and row["step"] >= first_step]
        codes = {row.get("code") for row in before[-1:] + after + lost}
        return codes.pop() if len(codes) == 1 else None

    def _expected_parts(self) -> dict[str, Any]:
        """The parts of a checkpoint that must equal those of this run."""
        corpus = self.corpus
        tokenizer = {
            "sha256": corpus.tokenizer_sha256,
            "vocabulary": corpus.tokenizer.get_vocab_size(),
            "end_of_text": corpus.end_of_text,
        }
        config = self.config.settings_of_run()
        return {"config": config, "data": corpus.fingerprint, "tokenizer": tokenizer}

    def _load(self, path: Path, state: dict[str, Any], allowed: Collection[str]) -> None:
        self.trainer.load_state_dict(state, path, self._expected_parts(), allowed)
        saved = state["environment"]
        here = environment(self.trainer.device, self.config.train)
        changed = {key: value for key, value in here.items() if saved.get(key) != value}
        if changed:
            before = {key: saved.get(key) for key in changed}
            print(f"Note: saved on {before}, now on {changed}: no longer bit-exact")

    def _open_logger(self, logged: dict[str, Any] | None) -> MetricsLogger:
        provenance = self.provenance | self.corpus.fingerprint
        settings = self.config.settings_of_run()
        tensorboard = not self.config.is_smoke_test  # its few points would hide the curves of runs
        logger = MetricsLogger(
            self.folder, self.global_step, provenance, settings, logged, tensorboard
        )
        if not self.global_step:
            (self.folder / UNINTERRUPTED_FILE).unlink(missing_ok=True)
        in_force = dump_yaml(self.config.values_in_force())
        write_text_atomic(self.folder / SETTINGS_FILE, in_force, FOLDER_KEY)
        return logger

    def _flush_metrics(self) -> None:
        """Waits for the metrics of the steps that were started; logs and shows them."""
        if self.trainer.step_function.pending:
            with self.trainer.critical_section():  # a state is saved only with all rows of its log
                for row in self.trainer.metrics():
                    self.logger.log(row)
                    self.progress.show(row)

    def _metrics_due(self, max_steps: int) -> bool:
        """Whether to wait for the metrics now. A GPU may be `GPU_STEPS_AHEAD` steps ahead."""
        ahead = GPU_STEPS_AHEAD if self.trainer.device.type == "cuda" else 1
        return self.global_step % ahead == 0 or self._is_validation_step(max_steps)

    def _is_validation_step(self, max_steps: int) -> bool:
        step = self.global_step
        return step % self.config.train.validate_every == 0 or step == max_steps

    def _validation_due(self, max_steps: int) -> bool:
        """Whether this process must validate at this step, and has not yet done so."""
        due = self.directory.locked and self._is_validation_step(max_steps)
        return due and not self.logger.has("validation_loss", self.global_step)

    def _validate(self, max_steps: int) -> None:
        """Computes and logs the validation loss, if it is due."""
        if self._validation_due(max_steps):
            alone = distributed.world_size() == 1  # a safe point needs all processes
            stop = partial(self.signals.safe_point, self._stop)
            loss = self.trainer.validation_loss(after_batch=stop if alone else lambda: None)
            self.logger.log_histograms(self.global_step, self.trainer.model)
            row = {"step": self.global_step, "validation_loss": loss}
            self.logger.log(row)
            self.progress.write(row)

    def _print_plan(self, max_steps: int) -> None:
        settings, steps = self.config.train, max_steps - self.global_step
        tokens = steps * settings.batch_size * settings.sequence_length
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        epochs, gigabytes = tokens / len(self.corpus.train), 16 * parameters / 1e9
        size = f"{steps} steps of {settings.batch_size} × {settings.sequence_length} tokens"
        plan = f"{size}: {tokens} tokens" + (f", {epochs:.1f} epochs" if epochs >= 0.05 else "")
        if gigabytes >= 0.005:
            plan += f"; {gigabytes:.2f} GB for weights, gradients and moments"
        print(f"{plan}; {parameters} parameters")
        if max_steps > (end := settings.schedule_steps):
            print(f"Note: from step {end} on, the rate stays {settings.min_learning_rate:g}")
        hint = hardware.precision_hint(self.trainer.device, settings.precision, parameters)
        if hint and steps > 50:  # not for the smoke test and the resume
            print(hint)

    def _check_sample_fits(self) -> None:
        """Raises ConfigError if the first sample would fail, before hours of training."""
        settings, context = self.config.sample, self.trainer.model.config.max_position_embeddings
        prompt = len(self.corpus.tokenizer.encode(settings.prompt, add_special_tokens=False).ids)
        if prompt + settings.new_tokens > context:
            what = f"{settings.new_tokens} tokens after {prompt} of sample.prompt do not fit"
            raise ConfigError("sample.new_tokens", f"{what}: the context is {context}", "lower it")

    def _check_open(self) -> None:
        self.trainer.check_usable()
        if distributed.is_main_process() and not self.directory.locked:
            raise CheckpointError(f"run {self.name}", "it is closed", "open it again: open_run(…)")
