"""`Run`: the loop and its schedule.

    for step in run.until(5000):          # yields after each update; step = updates done
        if step % 500 == 0:
            print(run.sample("Once upon a time,"))
    run.save()                            # checkpoints/<run>/checkpoint_5000.pt

All state is on `run`, none in the loop: a break, an interrupt, or running a notebook cell again goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict, load_hf_weights, weights_sha256

from . import WorkflowError, checkpoint
from .checkpoint import CheckpointError
from .config import Config, TrainSettings
from .data import Corpus, batch_at, load_corpus, validation_batches
from .record import Record


class NonFiniteError(WorkflowError):
    """The loss or the gradient is not a number."""

    exit_code = 4


# --- what an update is made of --------------------------------------------------------------------------------------


class NextTokenLoss(nn.Module):
    """Mean cross entropy of the next token, in nats: inputs and targets (B, T) to a scalar.

    Takes the normed states, not the logits, so that torch is free not to hold the logits of a whole batch.
    """

    def __init__(self, model: LlamaModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden(inputs)
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten()
        )


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of update `step` (0, 1, …): linear warm-up, then a cosine down to the least rate at `schedule_steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    span = max(settings.schedule_steps - settings.warmup_steps, 1)
    done = min((step - settings.warmup_steps) / span, 1.0)
    height = (1 + math.cos(math.pi * done)) / 2
    return settings.min_learning_rate + height * (
        settings.learning_rate - settings.min_learning_rate
    )


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW over exactly the model's parameters, each once; matrices decay, the norms' scales do not."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(name, p) for name, p in named if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    covered = [name for group in groups for name, _ in group["params"]]
    assert sorted(covered) == sorted(name for name, _ in named), (
        "the optimizer misses or repeats a parameter"
    )
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


# --- where a run starts, and how two are compared -------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a run needs of its reference: the tokenizer, what the weights honestly are, and the weights themselves."""

    tokenizer: Tokenizer
    end_of_text: int
    provenance: dict[str, str]
    weights: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, reference) -> Origin:
        """Of a `workflow.reference.Reference`."""
        provenance = asdict(reference.provenance)
        return cls(
            reference.tokenizer.backend_tokenizer,
            reference.end_of_text,
            provenance,
            reference.state_dict,
        )

    @classmethod
    def saved(cls, folder: Path, state: dict[str, Any]) -> Origin:
        """Of a checkpoint; the tokenizer lies beside it, so that a resume needs no reference."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                file, "the run's tokenizer is missing", "open the run with Run(config, reference)"
            )
        return cls(
            Tokenizer.from_file(str(file)), state["tokenizer"]["end_of_text"], state["reference"]
        )


def identify(config: Config, origin: Origin) -> tuple[Corpus, str]:
    """The data of a run, and its name, which settings, data and weights determine."""
    corpus = load_corpus(
        config.data.text,
        origin.tokenizer,
        origin.end_of_text,
        config.data.validation_fraction,
        config.train.sequence_length,
        config.paths.cache,
    )
    return corpus, config.run_name(
        corpus.text_sha256, corpus.tokenizer_sha256, origin.provenance["weights_sha256"]
    )


@dataclass(frozen=True)
class Trace:
    """Some steps of a run as they can be compared bit for bit: first step, losses, and the hash of the weights after."""

    first_step: int
    losses: tuple[float, ...]
    weights_sha256: str

    @classmethod
    def read(cls, file: Path) -> Trace:
        values = json.loads(file.read_text())
        return cls(**values | {"losses": tuple(values["losses"])})

    def write(self, file: Path) -> None:
        unfinished = file.with_name(f"{file.name}.tmp.{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(self)))
        os.replace(unfinished, file)


_OPEN: weakref.WeakValueDictionary[Path, Run] = (
    weakref.WeakValueDictionary()
)  # this process's runs, by folder


class Run:
    """A training run with its folder of checkpoints and its record.

    Takes up the newest whole checkpoint of its folder, saying so, or starts at step 0. `step` counts updates done;
    `history` holds the record's rows, `corpus` the data, `model` the model. One process at a time may hold a run.
    Raises WorkflowError (CheckpointError, DataError, BusyError, DiskError) when it cannot go on exactly.
    """

    def __init__(self, config: Config, reference):
        self._open(config, Origin.of(reference))
        taken = checkpoint.newest(self.checkpoints)
        print(
            f"Run {self.name}: {f'resuming from {taken[0].name}' if taken else 'starts at step 0'}"
        )
        if taken:
            self._restore(*taken)
        else:
            self._start()

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> Run:
        """The run that `path` is a checkpoint of, in fresh objects, at that step.

        When the run has gone on since, its newest checkpoint is taken instead, saying so: no step is trained twice.
        """
        path = Path(path)
        state = checkpoint.load(path)
        asked = state["step"]
        run = cls.__new__(cls)
        run._open(config, Origin.saved(path.parent, state), path.parent.name)
        print(f"Loaded {path.name}")
        if max(checkpoint.found(path.parent)) > asked:
            path, state = checkpoint.newest(path.parent)
            print(f"It has been resumed already: the record goes on to {path.name}")
        run._restore(path, state)
        run.resumed_at = asked
        return run

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.record.rows

    # --- the loop ---

    def until(self, target: int) -> Iterator[int]:
        """Trains up to `target` updates in all, yielding the count after each. Prints, logs, validates and saves.

        When the run is there already, nothing is trained and the record is told.
        """
        if self.step >= target:
            return self._tell(target)
        settings, start = self.config.train, self.resumed_at or 0
        self._forecast(target)
        title = "Training" if self.resumed_at is None else "Resume Training"
        bar = tqdm(
            total=target - start,
            initial=self.step - start,
            desc=title,
            file=sys.stdout,
            mininterval=2.0,
        )
        try:
            while self.step < target:
                row = self._update()
                self.record.add(row)
                bar.update()
                if line := self._line(row):
                    tqdm.write(line, file=sys.stdout)
                if self.step % settings.validate_every == 0 or self.step == target:
                    self._validate()
                yield self.step
                if self.step % settings.checkpoint_every == 0 and self.step < target:
                    self.save()
        finally:
            bar.close()
            self.record.flush()

    def carry_on(self, target: int) -> Trace:
        """Goes on to `target`, unlogged and unsaved: what a run does that never stops. Close the run afterwards.

        The trace is kept; when the run has been at `target` already, it is read again.
        """
        file = self.folder / "never_stopped.json"
        if self.step >= target and file.is_file():
            return Trace.read(file)
        if self.step >= target:
            raise CheckpointError(
                file, "this run was not carried on before its resume", "start anew with FRESH=1"
            )
        self._unlogged, first = True, self.step + 1
        losses = tuple(self._update()["loss"] for _ in range(self.step, target))
        trace = Trace(first, losses, self.weights_sha256())
        trace.write(file)
        return trace

    def trace(self, first_step: int) -> Trace:
        """The record from `first_step` on, and the weights as they are now."""
        losses = tuple(
            row["loss"] for row in self.history if "loss" in row and row["step"] >= first_step
        )
        return Trace(first_step, losses, self.weights_sha256())

    def save(self) -> None:
        """Writes `checkpoint_<step>.pt`. One that is there is this very state, and is left alone."""
        path = self.checkpoint(self.step)
        if not path.exists():
            self.record.flush()
            checkpoint.save(path, self._state())
            tqdm.write(f"Saved {path.name}", file=sys.stdout)
            milestones = {self.config.train.steps, self.config.last_step, self.resumed_at}
            checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints, milestones)

    def sample(self, prompt: str) -> str:
        """`prompt` with its continuation, logged at this step. Touches no random state but its own."""
        told = self.record.sample(self.step, prompt)
        if told is not None:
            return told
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
        """Saves and closes, so that another `Run` of this process, say of a cell run again, goes on from here."""
        if self.model is not None and self.step and not self._unlogged:
            self.save()
        self.close()

    def close(self) -> None:
        """Flushes the record and frees the lock and the tensors. A second call does nothing."""
        self.record.close()
        self._lock.close()
        self.model = self.optimizer = self.loss = None

    # --- one update ---

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of update `step` (0, 1, …), on the run's device."""
        settings, seed = self.config.train, self.config.run.seed
        inputs, targets = batch_at(
            self.corpus.train, step, settings.batch_size, settings.sequence_length, seed
        )
        return inputs.to(self.device), targets.to(self.device)

    def _update(self) -> dict[str, Any]:
        """One update; its row of the record. Numbers that are not finite are refused before the weights change."""
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
            total += (
                self.loss(inputs.to(self.device), targets.to(self.device)).item() * inputs.numel()
            )
            count += inputs.numel()
        self.record.add({"step": self.step, "validation_loss": total / count})

    # --- what is printed ---

    def _line(self, row: dict[str, Any]) -> str | None:
        """What is printed of a row, if anything; after a resume, counted from the checkpoint."""
        settings, step, loss = self.config.train, row["step"], row["loss"]
        if self.resumed_at is None:
            return (
                f"Step: {step}, Train Loss: {loss:.4f}"
                if step % settings.print_every == 0
                else None
            )
        count = step - self.resumed_at
        shown = count % max(settings.resume_steps // 5, 1) == 0
        return f"Step: {count}, Resume Loss: {loss:.4f} (global step {step})" if shown else None

    def _tell(self, target: int) -> None:
        """Prints the record up to `target`, as training printed it."""
        print(f"already at step {self.step}; from the record:")
        for row in self.history:
            if (self.resumed_at or 0) < row["step"] <= target:
                if "sample" in row:
                    print(f"=== Generation @ step {row['step']} ===\n{row['sample']}")
                elif "loss" in row and (line := self._line(row)):
                    print(line)

    def _forecast(self, target: int) -> None:
        """Prints what the steps up to `target` will take."""
        settings, steps = self.config.train, target - self.step
        tokens = steps * settings.batch_size * settings.sequence_length
        parameters = sum(p.numel() for p in self.model.parameters())
        print(
            f"{steps} steps of {settings.batch_size} × {settings.sequence_length} tokens: {tokens} tokens, "
            f"{tokens / len(self.corpus.train):.1f} epochs; {parameters} parameters, "
            f"{16 * parameters / 1e9:.2f} GB for weights, gradients and moments"
        )

    # --- opening, saving, restoring ---

    def _open(self, config: Config, origin: Origin, name: str | None = None) -> None:
        """Everything but weights, moments and step: data, folders, lock, and objects yet to be filled."""
        self.config, self.origin, self.device = config, origin, config.device
        self.resumed_at, self._unlogged = None, False
        self.corpus, auto_name = identify(config, origin)
        self.name = name or auto_name
        self.checkpoints, self.folder = (
            config.paths.checkpoints / self.name,
            config.paths.runs / self.name,
        )
        if earlier := _OPEN.pop(self.checkpoints.resolve(), None):
            earlier.hand_over()
        self._lock = checkpoint.lock(self.checkpoints)
        _OPEN[self.checkpoints.resolve()] = self
        if not (self.checkpoints / "tokenizer.json").is_file():
            origin.tokenizer.save(str(self.checkpoints / "tokenizer.json"))
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # the price of a bit-exact resume on a GPU
        torch.manual_seed(config.run.seed)
        self.model = LlamaModel(config.trained).to(self.device)
        self.loss = NextTokenLoss(self.model)
        self.optimizer = make_optimizer(self.model, config.train)

    def _start(self) -> None:
        if self.config.train.init == "reference":
            load_hf_weights(self.model, self.origin.weights)
        self.step = 0
        self.record = Record(self.folder, self.step)
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
            "optimizer": {"kind": type(self.optimizer).__name__, **self.optimizer.state_dict()},
            "random": checkpoint.random_states(),
            "reference": self.origin.provenance,
            "environment": checkpoint.environment(self.device),
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Fills the fresh objects after everything was compared. Raises CheckpointError; the folder is free then."""
        try:
            now = self._made_with()
            checkpoint.compare(path, {part: state[part] for part in now}, now)
            self._restore_optimizer(path, state["optimizer"])
            load_hf_weights(self.model, state["model"])
            checkpoint.restore_random_states(state["random"])
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            self._lock.close()
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(path, f"it does not fit ({error})", "choose another") from error
        here = checkpoint.environment(self.device)
        if state["environment"] != here:
            print(
                f"Note: saved on {state['environment']}, now on {here}: the rest is not promised bit for bit"
            )
        self.step = state["step"]
        self.record = Record(self.folder, self.step)

    def _restore_optimizer(self, path: Path, saved: dict[str, Any]) -> None:
        ours = self.optimizer.state_dict()["param_groups"]
        names = [group["param_names"] for group in ours]
        places = {place for group in ours for place in group["params"]}
        complete = all(
            set(saved["state"].get(place, ())) == {"step", "exp_avg", "exp_avg_sq"}
            for place in places
        )
        if (
            saved["kind"] != "AdamW"
            or [group["param_names"] for group in saved["param_groups"]] != names
            or not complete
        ):
            raise CheckpointError(
                path, "its optimizer is another, or lacks moments", "choose another checkpoint"
            )
        # the groups stay ours: torch would silently take rate and decay from the file
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})


# --- the rehearsal --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsal:
    """A few steps of the reference's own weights: never stopped, and stopped and resumed in fresh objects."""

    first_batch: tuple[Tensor, Tensor]
    never_stopped: Trace  # the steps after the stop
    recorded: Trace  # all steps, the ones after the stop resumed

    @property
    def exact(self) -> bool:
        """Whether the stop left no trace: losses and weights are the same, bit for bit."""
        after = self.recorded.losses[self.never_stopped.first_step - 1 :]
        return (after, self.recorded.weights_sha256) == (
            self.never_stopped.losses,
            self.never_stopped.weights_sha256,
        )


def rehearse(config: Config, reference) -> Rehearsal:
    """The stop and the resume in small, before the long run. Done once; then its record is told.

    Its checkpoints, 1.6 GB each for the 135M, are deleted once they have shown what they were for.
    """
    config = config.for_rehearsal()
    stop, end = config.train.steps, config.last_step
    corpus, name = identify(config, Origin.of(reference))
    told = config.paths.runs / name / "recorded.json"
    if not told.is_file():
        run = Run(config, reference)
        list(run.until(stop))
        run.save()
        run.carry_on(end)
        run.close()
        run = Run.resume(run.checkpoint(stop), config)
        list(run.until(end))
        run.trace(1).write(told)
        run.close()
    batch = batch_at(
        corpus.train, 0, config.train.batch_size, config.train.sequence_length, config.run.seed
    )
    rehearsal = Rehearsal(batch, Trace.read(told.with_name("never_stopped.json")), Trace.read(told))
    if rehearsal.exact:
        shutil.rmtree(config.paths.checkpoints / name, ignore_errors=True)
    return rehearsal


def model_of(path: Path) -> tuple[LlamaModel, Tokenizer]:
    """The model of a checkpoint and its tokenizer, for use without training."""
    state = checkpoint.load(path)
    model = LlamaModel(ModelConfig(**state["config"]["architecture"]))
    load_hf_weights(model, state["model"])
    return model, Origin.saved(path.parent, state).tokenizer
