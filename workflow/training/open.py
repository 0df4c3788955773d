"""Opens a run: from its settings, or from one of its checkpoints."""

import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from SmolLm3 import LlamaModel, load_hf_weights
from workflow.config.settings import Config
from workflow.data import Corpus, load_corpus, local_source
from workflow.errors import CheckpointError
from workflow.files import write_text_atomic
from workflow.training import checkpoint, distributed
from workflow.training.directory import RunDirectory
from workflow.training.resume import check_allowed
from workflow.training.run import Run
from workflow.training.trainer import Trainer

Loaded = tuple[Path, dict[str, Any]]  # a checkpoint: its file and its contents


def open_run(config: Config, reference, corpus: Corpus, out: TextIO | None = None) -> Run:
    """The run of these settings, weights and data, at its newest undamaged checkpoint or at step 0.

    reference: a `workflow.reference.Reference`. out: see `Run`.
    Raises CheckpointError, BusyError or DiskError.
    """
    name, provenance = run_name(config, reference, corpus), asdict(reference.provenance)
    if config.train.init == "scratch":
        random = f"{config.train_model} with random weights"
        provenance["name"] = f"{random} and the tokenizer of {provenance['name']}"
    with distributed.main_process_first(), ExitStack() as on_error:
        directory = RunDirectory(config.paths.checkpoints / name)
        on_error.callback(directory.close)
        save_tokenizer(reference.tokenizer, directory)
        loaded = checkpoint.load_newest(directory.folder)
        print(f"Run {name}: {f'resuming from {loaded[0].name}' if loaded else 'starts at step 0'}")
        trainer = Trainer(config, corpus)
        if config.train.init == "reference" and not loaded:
            load_hf_weights(trainer.model, reference.state_dict)
        run = Run(trainer, directory, provenance, loaded, out=out)
        on_error.pop_all()
    return run


def run_name(config: Config, reference, corpus: Corpus) -> str:
    weights_sha256 = reference.provenance.weights_sha256
    return config.run_name(corpus.text_sha256, corpus.tokenizer_sha256, weights_sha256)


def resume_run(
    path: str | Path | Loaded,
    config: Config,
    allow: Collection[str] = (),
    corpus: Corpus | None = None,
    out: TextIO | None = None,
) -> Run:
    """The run of a checkpoint, in new objects.

    path: a checkpoint, or a folder for its newest one, or the result of `load_checkpoint`. If the
    run has later checkpoints, the newest is loaded instead: no step is trained twice. allow: what
    may differ from the checkpoint; see `resume.check_allowed`. corpus: the run's data; None: it is
    loaded again. out: see `Run`.
    Raises CheckpointError if the file is not in a folder of `paths.checkpoints`.
    """
    check_allowed(allow)
    if not isinstance(path, tuple):
        path = load_checkpoint(path, config.paths.checkpoints)
    path, state = path_in(config.paths.checkpoints, path[0]), path[1]
    resumed_at = state["step"]
    with distributed.main_process_first(), ExitStack() as on_error:
        corpus = corpus or reload_corpus(config, path.parent, state)
        directory = RunDirectory(path.parent)
        on_error.callback(directory.close)
        print(f"Loaded {path.name}", file=out)
        if max(checkpoint.steps_in(path.parent), default=0) > resumed_at:
            path, state = checkpoint.load_newest(path.parent)
            print(f"This run has later checkpoints: {path.name} is loaded instead")
        trainer = Trainer(config, corpus)
        loaded = path, state
        run = Run(trainer, directory, state["reference"], loaded, resumed_at, allow, out)
        on_error.pop_all()
    return run


def save_tokenizer(tokenizer, directory: RunDirectory) -> None:
    """Writes transformers' `tokenizer` next to the checkpoints, for a resume."""
    last = checkpoint.TOKENIZER  # written last: if it exists, all files exist
    if directory.locked and not (directory.folder / last).is_file():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            texts = {file.name: file.read_text("utf-8") for file in Path(folder).iterdir()}
        texts.pop(last)
        for name, text in {**texts, last: tokenizer.backend_tokenizer.to_str()}.items():
            write_text_atomic(directory.folder / name, text, checkpoint.FOLDER_KEY)


def reload_corpus(config: Config, folder: Path, state: dict[str, Any]) -> Corpus:
    """Loads the data of a checkpoint's run again, with the tokenizer from the same folder."""
    tokenizer, end_of_text = checkpoint.load_tokenizer(folder), state["tokenizer"]["end_of_text"]
    corpus, settings = load_corpus(config, tokenizer, end_of_text), config.data
    if settings.source == "auto" and corpus.text_sha256 != state["data"].get("text_sha256"):
        # the run was started without the Hub
        source = local_source(settings.fallback_text, settings.column)
        corpus = load_corpus(config, tokenizer, end_of_text, source)
    return corpus


def load_checkpoint(path: str | Path, checkpoints: Path = Path("checkpoints")) -> Loaded:
    """A checkpoint, or the newest one of a run, with its state: see `checkpoint.find`."""
    return checkpoint.find(Path(path), checkpoints)


def path_in(checkpoints: Path, path: Path) -> Path:
    """The path of a checkpoint in a run's folder in `checkpoints`. Both folders can be links.

    Raises CheckpointError if it is in another folder.
    """
    folder = path.parent.resolve()
    for run in checkpoints.glob("*"):
        if run.resolve() == folder:
            return run / path.name
    fix = f"move its folder there, or add --set paths.checkpoints={folder.parent}"
    raise CheckpointError(path, f"it is not in {checkpoints}", fix)


def initial_model(config: Config, reference) -> LlamaModel:
    """The model of a run at step 0. Random states stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = LlamaModel(config.train_architecture)
    if config.train.init == "reference":
        load_hf_weights(model, reference.state_dict)
    return model.eval()
