"""The story of main.ipynb as commands.

`python main.py COMMAND --help` explains one. Exit codes: 0 good, 1 a proof
that fails, 2 bad input or configuration, 3 a damaged or foreign checkpoint,
4 numbers that are not finite, 5 the weights cannot be had, 6 the disk, 7 a
folder in use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from workflow import WorkflowError, refused
from workflow.config import load_config
from workflow.settings import Config


def story(arguments: argparse.Namespace) -> int:
    """The whole story of main.ipynb, without Jupyter."""
    from workflow.notebook import run_cells

    run_cells(parameters={"PROFILE": arguments.profile, "OVERRIDES": arguments.set})
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prove that the copy is the original; exit 1 if a rung fails."""
    from workflow import proof

    reference, config = open_reference(arguments)
    rungs = proof.verify(proof.copy_reference(reference), reference, config.proof)
    print(proof.table(rungs))
    return 0 if all(rung.holds for rung in rungs) else 1


def train(arguments: argparse.Namespace) -> int:
    """Train up to train.steps, or go on where the run stands."""
    from workflow.training import Run

    reference, config = open_reference(arguments)
    return run_until(Run(config, reference), config.train.steps)


def resume(arguments: argparse.Namespace) -> int:
    """Resume CHECKPOINT in fresh objects, up to train.steps + train.resume_steps."""
    from workflow.training import Run

    config = configure(arguments)
    return run_until(Run.resume(arguments.checkpoint, config), config.last_step)


def generate(arguments: argparse.Namespace) -> int:
    """Continue PROMPT, token by token, with the reference's weights or a checkpoint's."""
    import torch

    model, tokenizer, config = open_model(arguments)
    generator, shown = torch.Generator().manual_seed(config.run.seed), ""
    with refused("generate", "change the prompt or --tokens"):
        ids = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
        prompt = torch.tensor([ids], dtype=torch.long)
        options = {"temperature": arguments.temperature, "generator": generator}
        for token in model.stream(prompt, arguments.tokens, **options):
            ids.append(token.item())
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for more
                print(text.removeprefix(shown), end="", flush=True)
                shown = text
    print()
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Loss and perplexity on a text, with the reference's weights or a checkpoint's."""
    from workflow.data import read_text
    from workflow.evaluation import evaluate as score

    model, tokenizer, _ = open_model(arguments)
    text, digest = read_text(arguments.data)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if arguments.windows:
        tokens = tokens[: arguments.windows * arguments.window]
    context = model.config.max_position_embeddings
    with refused("evaluate", "change --window, --stride or the text"):
        if arguments.window > context:
            raise ValueError(f"window {arguments.window} exceeds the model's context of {context}")
        result = score(model, tokens, arguments.window, arguments.stride)
    print(f"{arguments.data} (sha256 {digest[:12]}…): {result}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure a training step and generation against transformers, interleaved."""
    from workflow.bench import generation, table, training_step

    reference, config = open_reference(arguments)
    rounds = arguments.rounds
    rows = [generation(reference, 64, rounds)]
    rows.append(training_step(reference, config.train, 1, 128, rounds))
    print(table(rows))
    return 0


# --- what the commands share ----------------------------------------------------------------------


def configure(arguments: argparse.Namespace) -> Config:
    config = load_config(profile=arguments.profile, overrides=arguments.set)
    print(config)
    return config


def open_reference(arguments: argparse.Namespace):
    from workflow.reference import load_reference

    config = configure(arguments)
    return load_reference(config.reference.source, config.member, cache=config.paths.cache), config


def open_model(arguments: argparse.Namespace):
    """A model, its tokenizer and the settings: a checkpoint's, or else the reference's."""
    from workflow.checkpoint import load_model
    from workflow.proof import copy_reference

    if arguments.checkpoint:
        return *load_model(arguments.checkpoint), configure(arguments)
    reference, config = open_reference(arguments)
    return copy_reference(reference), reference.tokenizer.backend_tokenizer, config


def run_until(run, target: int) -> int:
    """The loop of the notebook, then a checkpoint; after Ctrl-C, too."""
    try:
        for step in run.until(target):
            if step % run.config.sample.every == 0:
                print(f"=== Generation @ step {step} ===\n{run.sample(run.config.sample.prompt)}")
    except KeyboardInterrupt:
        run.hand_over()
        raise
    run.hand_over()
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", help="full, cpu, quick or ci (default: a GPU decides)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=100"
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--checkpoint", type=Path, help="its weights (default: the reference's)")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, *more) -> argparse.ArgumentParser:
        summary, parents = function.__doc__.splitlines()[0], [common, *more]
        command = commands.add_parser(name, parents=parents, help=summary, description=summary)
        command.set_defaults(function=function)
        return command

    add("run", story)
    add("verify", verify)
    add("train", train)
    add("resume", resume).add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command = add("generate", generate, weights)
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument("--tokens", type=int, default=64, help="how many new ones (default: 64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    command = add("evaluate", evaluate, weights)
    command.add_argument("data", type=Path, metavar="TEXT")
    command.add_argument("--window", type=int, default=1024, help="tokens (default: 1024)")
    command.add_argument("--stride", type=int, help="tokens (default: the window, without overlap)")
    command.add_argument("--windows", type=int, help="score only the first so many windows of text")
    command = add("bench", bench)
    command.add_argument("--rounds", type=int, default=7, help="pairs of calls (default: 7)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # a log file can be followed
    try:
        return options.function(options)
    except WorkflowError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
