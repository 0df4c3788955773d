"""The options of the commands, numbers with a smallest value, and errors in one line."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from workflow.errors import ConfigError

REFERENCE = "reference"  # instead of a path: the original's weights
MODEL_WORDS = "a checkpoint file, a run's folder (its newest one), or an exported folder"


class OneLineParser(ArgumentParser):
    """Raises ConfigError for a wrong argument; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        fix = f"type {self.prog} --help"
        if message.startswith("unrecognized arguments: --"):
            fix = f"for a setting, type --set train.steps=60; for options, {fix}"
        raise ConfigError(self.prog, message, fix)


def at_least(smallest: int) -> Callable[[str], int]:
    """The `type=` of an option: a whole number that is not smaller."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.lstrip("-").isdigit() or int(text) < smallest:
            raise ArgumentTypeError(f"{text!r} is not a whole number of {smallest} or more")
        return int(text)

    return parse


def add_options(parser: ArgumentParser, command: str) -> None:
    add, flag = parser.add_argument, {"action": "store_true"}
    if command == "run":
        add("--in-place", **flag, help="also save the output in main.ipynb")
    elif command == "verify":
        add("--quick", **flag, help="skip long texts and bfloat16; at most 32 greedy tokens")
        add("--json", **flag, help="print the checks as JSON on stdout, the rest on stderr")
        add("--candidate", metavar="FILE.py", type=Path, help="execute and check this model")
        words = "check logits that another program computed for --write-inputs"
        add("--candidate-logits", metavar="FILE.npz", type=Path, help=words)
        add("--write-inputs", metavar="FILE.npz", type=Path, help="write token ids, and stop")
    elif command == "resume":
        words = "a checkpoint file, or a run's folder: its newest checkpoint"
        add("checkpoint", metavar="CHECKPOINT", type=Path, help=words)
        words = "train.NAME: it may differ; random: random states may be missing (default: none)"
        add("--allow", metavar="KEY", action="append", default=[], help=words)
        words = "up to step N (default: train.steps + train.resume_steps)"
        add("--until", metavar="N", type=at_least(1), help=words)
    elif command == "generate":
        add_generate_options(parser)
    elif command in ("evaluate", "export"):
        words = f"{MODEL_WORDS}, or `reference`: the original"
        add("checkpoint", metavar="CHECKPOINT", help=words)
    if command == "evaluate":
        add("--data", metavar="TEXT", type=Path, required=True, help="a UTF-8 text file")
        words = "window size (default: 1024, or the model's context if that is shorter)"
        add("--window", metavar="N", type=at_least(2), help=words)
        words = "tokens between window starts (default: the window size)"
        add("--stride", metavar="N", type=at_least(1), help=words)
        words = "only the first N windows of text (default: all)"
        add("--windows", metavar="N", type=at_least(1), help=words)
    elif command == "export":
        add("folder", metavar="FOLDER", type=Path, help="a new or an empty folder")
        add("--gguf", choices=("F32", "F16", "Q8_0"), help="also write GGUF (default: none)")
    elif command == "runs":
        words = "two runs to compare, by name or folder (default: list all)"
        add("names", metavar="RUN", nargs="*", help=words)
    elif command == "bench":
        add("--rounds", metavar="N", type=at_least(1), default=7, help="repetitions (default: 7)")
        add("--only", metavar="WORDS", default="", help="rows named …WORDS… (default: all)")


def add_generate_options(parser: ArgumentParser) -> None:
    add, flag = parser.add_argument, {"action": "store_true"}
    words = "the text to continue; - reads stdin (default: -)"
    add("prompt", metavar="PROMPT", nargs="?", default="-", help=words)
    words = f"{MODEL_WORDS} (default: reference, the original)"
    add("--checkpoint", metavar="PATH", default=REFERENCE, help=words)
    add("--bf16", **flag, help="weights in bfloat16: faster, less exact")
    add("--chat", **flag, help="PROMPT is a user's message; needs an Instruct model")
    words = "at most N new tokens (default: 64)"
    add("--tokens", metavar="N", type=at_least(1), default=64, help=words)
    words = "0 is greedy (default: 0; 1 with --top-k, --top-p or --min-p)"
    add("--temperature", metavar="T", type=float, help=words)
    words = "sample from the N best tokens (default: all)"
    add("--top-k", metavar="N", type=at_least(1), help=words)
    words = "sample from the most likely tokens with a total probability of P (default: 1)"
    add("--top-p", metavar="P", type=float, default=1.0, help=words)
    words = "sample from tokens at least P times as likely as the best (default: 0)"
    add("--min-p", metavar="P", type=float, default=0.0, help=words)
