"""The command line of `main.py`: what each command may be told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # options of `generate` that are the model's
REFERENCE = "reference"  # in place of a checkpoint: the original's own weights


def parser(description: str, commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """A parser for `commands`, by name; their docstrings are their help."""
    whole = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    common = common_options()
    for name, function in commands.items():
        summary = function.__doc__.splitlines()[0]
        part = parts.add_parser(name, parents=[common], help=summary, description=summary)
        if add_arguments := ARGUMENTS.get(name):
            add_arguments(part)
    return whole


def common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", help="full, cpu, quick or ci (default: a GPU decides)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=100"
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return common


def verify(part: argparse.ArgumentParser) -> None:
    part.add_argument("--quick", action="store_true", help="without long texts and bf16")
    part.add_argument("--json", action="store_true", help="for machines; the rest goes to stderr")


def resume(part: argparse.ArgumentParser) -> None:
    words = "a file, or a run's folder for its newest"
    part.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=words)
    words = "may differ: a key of train, or random for missing random states"
    part.add_argument("--allow", action="append", default=[], metavar="NAME", help=words)


def generate(part: argparse.ArgumentParser) -> None:
    weights(part)
    stdin = {"type": text_or_stdin, "nargs": "?", "default": "-"}
    part.add_argument("prompt", metavar="PROMPT", help="by default, or for -, stdin", **stdin)
    part.add_argument("--bf16", action="store_true", help="round the weights: faster")
    part.add_argument("--chat", action="store_true", help="ask, in the Instruct model's template")
    part.add_argument("--tokens", type=int, default=64, help="how many new ones (default: 64)")
    words = "0 is greedy, the default; 1 if one of the next is given"
    part.add_argument("--temperature", type=float, help=words)
    part.add_argument("--top-k", type=int, help="draw from the likeliest so many tokens")
    part.add_argument("--top-p", type=float, default=1.0, help="... that reach this share together")
    part.add_argument("--min-p", type=float, default=0.0, help="... of this share of the likeliest")


def text_or_stdin(word: str) -> str:
    """A prompt, or all of stdin without the newline that ends it."""
    return sys.stdin.read().removesuffix("\n") if word == "-" else word


def evaluate(part: argparse.ArgumentParser) -> None:
    part.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or: reference")
    part.add_argument("--data", type=Path, required=True, metavar="TEXT", help="a UTF-8 file")
    part.add_argument("--window", type=int, default=1024, help="tokens (default: 1024)")
    part.add_argument("--stride", type=int, help="tokens (default: the window, without overlap)")
    part.add_argument("--windows", type=int, help="score only the first so many windows of text")


def export(part: argparse.ArgumentParser) -> None:
    part.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or: reference")
    part.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty one")
    part.add_argument("--gguf", choices=("F32", "F16", "Q8_0"), help="also write a GGUF file")


def bench(part: argparse.ArgumentParser) -> None:
    part.add_argument("--rounds", type=int, default=7, help="pairs of calls (default: 7)")
    part.add_argument("--only", default="", metavar="WORDS", help="rows whose name has these words")


def weights(part: argparse.ArgumentParser) -> None:
    words = "its weights (default: the reference's)"
    part.add_argument("--checkpoint", type=Path, default=Path(REFERENCE), help=words)


ARGUMENTS = {
    function.__name__: function for function in (verify, resume, generate, evaluate, export, bench)
}
