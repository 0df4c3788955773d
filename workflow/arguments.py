"""The command line of `main.py`: what each command may be told, and what its help says."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # options of `generate` that are the model's
REFERENCE = "reference"  # in place of a checkpoint: the original's own weights
COLUMNS = 78  # of a terminal, as argparse leaves two of its 80 free

EXIT_CODES = """\
exit codes:
  0    good
  1    a proof fails, or another process of the run has ended
  2    bad input or configuration
  3    a damaged or foreign checkpoint
  4    numbers that are not finite
  5    weights or data that cannot be had
  6    a disk that is full or cannot be written
  7    a folder in use by another process
  130  stopped by Ctrl-C
  143  stopped by SIGTERM

An error is one line on stderr: error: WHERE: WHAT is wrong; DO this."""

# What the help of a command adds to the first line of its docstring, and examples.
DETAILS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (
        "Every claim is an assert: if it runs to the end, it has shown what it says. Run again, "
        "it tells the story from the record and trains nothing twice.",
        ("run --profile ci",),
    ),
    "verify": (
        "Each rung has a figure, a bound and a verdict. The exit code is 1 if one fails.",
        ("verify --quick", "verify --set model=SmolLM2-360M-Instruct --profile cpu"),
    ),
    "break": (
        "It names the first rung that finds each mistake, and tells how training with it goes: "
        "from the record, unless breaking.steps says how many steps to train.",
        ("break", "break --set breaking.steps=100"),
    ),
    "train": (
        "Ctrl-C or SIGTERM finishes the update at hand and writes a checkpoint. The same command "
        "goes on from the newest whole checkpoint, also after a kill. torchrun shares the batch "
        "out over several GPUs; README.md has the lines.",
        ("train --profile cpu", "train --profile cpu --set data.source=my.txt"),
    ),
    "resume": (
        "What differs from the checkpoint is shown as a table and refused, unless it is allowed "
        "by name.",
        ("resume checkpoints/RUN/checkpoint_5000.pt --profile cpu",),
    ),
    "generate": (
        "It is greedy, unless an option says that tokens are to be drawn; then run.seed decides.",
        (
            'generate "Once upon a time," --tokens 40',
            'generate "Once upon a time," --top-k 50 --temperature 0.8',
        ),
    ),
    "evaluate": (
        "The result comes with its protocol: the size of the windows, and how far apart they "
        "start.",
        (
            "evaluate reference --data input.txt --stride 512",
            "evaluate checkpoints/RUN/checkpoint_5050.pt --data my.txt",
        ),
    ),
    "export": (
        "transformers loads the folder with no code of this project; llama.cpp reads the GGUF "
        "file in it.",
        ("export checkpoints/RUN/checkpoint_5050.pt my-model --gguf Q8_0",),
    ),
    "bench": (
        "Calls are made in turn, each side in its own process. Let nothing else run meanwhile.",
        ("bench --profile cpu", 'bench --only "greedy generation"'),
    ),
}


def parser(description: str, commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """A parser for `commands`, by name; their docstrings are their help."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    filled = textwrap.fill(description, COLUMNS)
    whole = argparse.ArgumentParser(description=filled, epilog=EXIT_CODES, **layout)
    names = {"title": "commands", "metavar": "COMMAND", "dest": "command"}
    parts = whole.add_subparsers(required=True, **names)
    common = common_options()
    for name, function in commands.items():
        summary = function.__doc__.splitlines()[0]
        details, examples = DETAILS[name]
        texts = {
            "help": summary,
            "description": textwrap.fill(f"{summary} {details}", COLUMNS),
            "epilog": "\n".join(["examples:", *(f"  python main.py {line}" for line in examples)]),
        }
        part = parts.add_parser(name, parents=[common], **texts, **layout)
        if add_arguments := ARGUMENTS.get(name):
            add_arguments(part)
    return whole


def common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("options of every command")
    words = (
        "the settings to start from: full, pretrain, cpu, quick or ci (default: what "
        "SMOLLM_PROFILE says, else the YAML; its auto is full with a CUDA GPU, else quick)"
    )
    group.add_argument("--profile", metavar="NAME", help=words)
    words = (
        "change any key of SmolLm3_Config.yaml, such as train.steps=100; may be repeated "
        "(default: what SMOLLM_SET says, else nothing)"
    )
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=words)
    words = "show the traceback of an error, not one line"
    group.add_argument("--debug", action="store_true", help=words)
    return common


def verify(part: argparse.ArgumentParser) -> None:
    words = "leave out texts of 2048 and 8192 tokens, and bfloat16"
    part.add_argument("--quick", action="store_true", help=words)
    words = "print the rungs as JSON, for machines; all else goes to stderr"
    part.add_argument("--json", action="store_true", help=words)


def resume(part: argparse.ArgumentParser) -> None:
    words = "a checkpoint's file, or a run's folder for its newest whole one"
    part.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=words)
    words = (
        "let this differ from the checkpoint: a key of train, such as train.learning_rate, or "
        "random for missing random states; may be repeated; the resume is then no longer exact "
        "(default: nothing may differ)"
    )
    part.add_argument("--allow", action="append", default=[], metavar="NAME", help=words)


def generate(part: argparse.ArgumentParser) -> None:
    stdin = {"type": text_or_stdin, "nargs": "?", "default": "-"}
    words = "the text to go on from (default, and for -: all of stdin)"
    part.add_argument("prompt", metavar="PROMPT", help=words, **stdin)
    words = "the weights: a checkpoint's file, or the word reference (default: reference)"
    part.add_argument(
        "--checkpoint", type=Path, default=Path(REFERENCE), metavar="FILE", help=words
    )
    words = "round the weights to bfloat16: faster, not exact (default: float32)"
    part.add_argument("--bf16", action="store_true", help=words)
    words = "ask PROMPT as a user's turn; needs an Instruct model's template"
    part.add_argument("--chat", action="store_true", help=words)
    words = "how many new tokens at most (default: 64)"
    part.add_argument("--tokens", type=int, default=64, metavar="N", help=words)
    words = "0 is greedy (default: 0, but 1 if one of the next three is given)"
    part.add_argument("--temperature", type=float, metavar="T", help=words)
    words = "draw from the N likeliest tokens (default: from all)"
    part.add_argument("--top-k", type=int, metavar="N", help=words)
    words = "draw from the likeliest tokens that together reach the share P (default: 1, all)"
    part.add_argument("--top-p", type=float, default=1.0, metavar="P", help=words)
    words = "draw from tokens of at least P times the likeliest's probability (default: 0, all)"
    part.add_argument("--min-p", type=float, default=0.0, metavar="P", help=words)


def text_or_stdin(word: str) -> str:
    """A prompt, or all of stdin without the newline that ends it."""
    return sys.stdin.read().removesuffix("\n") if word == "-" else word


def evaluate(part: argparse.ArgumentParser) -> None:
    weights(part)
    words = "the text to score, a UTF-8 file"
    part.add_argument("--data", type=Path, required=True, metavar="TEXT", help=words)
    words = "tokens in a window (default: 1024)"
    part.add_argument("--window", type=int, default=1024, metavar="N", help=words)
    words = "tokens from the start of one window to the next (default: the window: no overlap)"
    part.add_argument("--stride", type=int, metavar="N", help=words)
    words = "score only as many tokens as N windows hold (default: all of the text)"
    part.add_argument("--windows", type=int, metavar="N", help=words)


def export(part: argparse.ArgumentParser) -> None:
    weights(part)
    words = "where to write: a new or an empty folder"
    part.add_argument("folder", type=Path, metavar="FOLDER", help=words)
    kinds = ("F32", "F16", "Q8_0")
    words = f"write a GGUF file, too: {', '.join(kinds)} (default: none)"
    part.add_argument("--gguf", choices=kinds, metavar="TYPE", help=words)


def bench(part: argparse.ArgumentParser) -> None:
    words = "pairs of calls for each row (default: 7)"
    part.add_argument("--rounds", type=int, default=7, metavar="N", help=words)
    words = "measure only rows whose name has these words (default: all)"
    part.add_argument("--only", default="", metavar="WORDS", help=words)


def weights(part: argparse.ArgumentParser) -> None:
    words = "the weights: a checkpoint's file, or the word reference for the original's own"
    part.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=words)


ARGUMENTS = {
    function.__name__: function for function in (verify, resume, generate, evaluate, export, bench)
}
