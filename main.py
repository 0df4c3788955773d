"""The story of main.ipynb as commands; `main.py COMMAND --help` explains one."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

from workflow.arguments import REFERENCE, SAMPLING, parser
from workflow.config.load import load_config
from workflow.config.settings import Config
from workflow.errors import WorkflowError, one_line_errors
from workflow.training import distributed
from workflow.training.signals import raise_on_sigterm


def story(arguments: argparse.Namespace) -> int:
    """Tell the whole story of main.ipynb, without Jupyter."""
    from workflow.tools.notebook import run_cells

    run_cells(parameters={"PROFILE": arguments.profile, "OVERRIDES": arguments.set})
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prove that the copy is the original, rung by rung."""
    from workflow.data.documents import read_text
    from workflow.proof import bounds as ladder
    from workflow.proof import checks as proof

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        reference, config = open_reference(arguments)
        settings = config.proof.model_copy(update={"quick": arguments.quick})
        model, (text, _) = proof.copy_reference(reference), read_text(config.data.text)
        rungs = proof.verify(model, reference, settings, text)
    if arguments.json:
        print(json.dumps(ladder.as_json(rungs), indent=1, allow_nan=False))
    return 1 if ladder.failed(rungs) else 0


def break_it(arguments: argparse.Namespace) -> int:
    """Make the usual mistakes on purpose, and show what each does."""
    from workflow.proof import mutations as breaking
    from workflow.proof.checks import copy_reference

    reference, config = open_reference(arguments)
    broken, curves = breaking.study(copy_reference(reference), reference, config)
    print(breaking.table(broken, curves, config.breaking), breaking.curve_table(curves), sep="\n")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train up to step train.steps, or go on where the run stands."""
    reference, config = open_reference(arguments)
    from workflow.training.run import Run

    return run_until(Run(config, reference), config.train.steps)


def resume(arguments: argparse.Namespace) -> int:
    """Resume CHECKPOINT, up to step train.steps + train.resume_steps."""
    config = configure(arguments)
    from workflow.training.run import Run

    return run_until(Run.resume(arguments.checkpoint, config, arguments.allow), config.last_step)


def generate(arguments: argparse.Namespace) -> int:
    """Continue PROMPT, token by token."""
    import torch

    from workflow.analysis.generation import Decoder, prompt_ids, sampling, text_pieces

    model, tokenizer, _, config = open_model(arguments)
    options = sampling(**{name: getattr(arguments, name) for name in SAMPLING})
    options["generator"] = torch.Generator().manual_seed(config.run.seed)
    with one_line_errors("generate", "change the prompt or the options"):
        ids = prompt_ids(tokenizer, arguments.prompt, arguments.chat)
        decoder = Decoder(model, torch.bfloat16 if arguments.bf16 else torch.float32)
        print("" if arguments.chat else arguments.prompt, end="", flush=True)
        for piece in text_pieces(decoder, tokenizer, ids, arguments.tokens, options):
            print(piece, end="", flush=True)
    print()
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write CHECKPOINT as a Hugging Face FOLDER, and as GGUF if asked."""
    from workflow.reference.export import export as write

    model, tokenizer, provenance, _ = open_model(arguments)
    folder = write(model, tokenizer, arguments.folder, provenance, arguments.gguf)
    print(f"Wrote {folder}:", *sorted(file.name for file in folder.iterdir()))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure loss and perplexity of CHECKPOINT on a text."""
    from workflow.analysis.evaluation import evaluate as score
    from workflow.data.documents import read_text

    model, tokenizer, _, _ = open_model(arguments)
    text, digest = read_text(arguments.data)
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if arguments.windows:
        text = tokenizer.decode(tokens := tokens[: arguments.windows * arguments.window])
    with one_line_errors("evaluate", "change --window, --stride or the text"):
        if arguments.window > (context := model.config.max_position_embeddings):
            raise ValueError(f"window {arguments.window} exceeds the model's context of {context}")
        result = score(model, tokens, arguments.window, arguments.stride, text)
    print(f"{arguments.data} (sha256 {digest[:12]}…): {result}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure training and generation against transformers."""
    from workflow.tools.bench import report

    print(report(configure(arguments), arguments.rounds, arguments.only))
    return 0


def configure(arguments: argparse.Namespace) -> Config:
    config = load_config(profile=arguments.profile, overrides=arguments.set)
    print(config)
    return config


def open_reference(arguments: argparse.Namespace):
    config = configure(arguments)  # a mistake in it is told before the slow import
    from workflow.reference.load import load_reference

    return load_reference(config.reference.source, config.member, cache=config.paths.cache), config


def open_model(arguments: argparse.Namespace):
    """A model, its tokenizer (transformers'), what it is, and the settings."""
    from workflow.proof import checks as proof
    from workflow.training import origin

    if str(arguments.checkpoint) != REFERENCE:
        try:
            return *origin.load_model(arguments.checkpoint), configure(arguments)
        except origin.ForeignError as error:
            reference, config = open_reference(arguments)
            return *origin.foreign_model(error, reference), config
    reference, config = open_reference(arguments)
    model = proof.copy_reference(reference)
    return model, reference.tokenizer, asdict(reference.provenance), config


def run_until(run, target: int) -> int:
    """The loop of the notebook, with a sample at step 0 and at the last, then a checkpoint."""
    if run.step == 0:
        show_sample(run)
    for step in run.until(target):
        if step % run.config.sample.every == 0 or step == target:
            show_sample(run)
    run.hand_over()
    distributed.end()
    return 0


def show_sample(run) -> None:
    print(f"=== Generation @ step {run.step} ===\n{run.sample(run.config.sample.prompt)}")


COMMANDS = {
    "run": story,
    "verify": verify,
    "break": break_it,
    "train": train,
    "resume": resume,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> int:
    raise_on_sigterm()
    options = parser(__doc__, COMMANDS).parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # a log file can be followed
    try:
        distributed.start(options.command in ("train", "resume"))
        return COMMANDS[options.command](options)
    except WorkflowError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
