"""The story of main.ipynb as commands; `main.py COMMAND --help` explains one.

exit codes:
  0    good
  1    a check or a cell fails, or another process of the run has ended
  2    bad input or configuration
  3    a damaged or foreign checkpoint
  4    numbers that are not finite
  5    weights or data that are not available
  6    a disk that is full or cannot be written
  7    a folder in use by another process
  130  stopped by Ctrl-C
  143  stopped by SIGTERM

An error is one line on stderr: error: WHERE: WHAT is wrong; HOW to fix it.
"""

import inspect
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch

from workflow import analysis, proof, reference, training
from workflow.config import Config, load_config
from workflow.data import load_corpus, read_text
from workflow.errors import ForeignError, WorkflowError, one_line_errors
from workflow.proof import mutations
from workflow.training import distributed
from workflow.training.signals import raise_on_sigterm

REFERENCE = "reference"  # in place of a checkpoint: the original's weights

# --- the commands; the docstring of each is its help ----------------------------------------------


def run(arguments: Namespace) -> None:
    """Execute main.ipynb, and show its output live.

    Every claim is an assert: a run to the end has shown what it says. Run again, it
    reads the results from the record; nothing is trained twice.

    example:
      python main.py run --profile ci
    """
    load_config(profile=arguments.profile, overrides=arguments.set)  # an error before the kernel
    from workflow.tools.notebook import execute  # 1 s that other commands do not need

    execute(arguments.profile, arguments.set, arguments.in_place)


def verify(arguments: Namespace) -> int:
    """Prove that the copy is the original, check by check.

    Each check has a figure and a bound. The exit code is 1 if one fails.

    example:
      python main.py verify --quick
    """
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        original, config = open_reference(arguments)
        settings = config.proof.model_copy(update={"quick": arguments.quick})
        text, _ = read_text(config.data.text)
        checks = proof.verify(proof.copy_reference(original), original, settings, text)
    if arguments.json:
        print(json.dumps(proof.as_json(checks), indent=1, allow_nan=False))
    return 1 if proof.failed_checks(checks) else 0


def mutate(arguments: Namespace) -> None:
    """Make common mistakes on purpose, and show what each does.

    The table names the first check that finds each mistake, and the loss curves
    of training with it: from the record, or trained for mutations.steps steps.

    example:
      python main.py mutate --set mutations.steps=100
    """
    original, config = open_reference(arguments)
    results, curves = mutations.study(proof.copy_reference(original), original, config)
    print(mutations.table(results, curves, config.mutations).to_string())
    print(mutations.curve_table(curves).to_string())


def train(arguments: Namespace) -> None:
    """Train up to step train.steps, or continue the run up to there.

    Ctrl-C or SIGTERM saves a checkpoint; the same command continues from it, also
    after a kill. torchrun splits the batch over several GPUs: see README.md.

    example:
      python main.py train --profile cpu --set data.source=my.txt
    """
    with distributed.main_process_first():  # the others find converted weights and tokens cached
        original, config = open_reference(arguments)
        tokenizer = original.tokenizer.backend_tokenizer
        corpus = load_corpus(config, tokenizer, original.end_of_text)
    train_until(config.train.steps, training.open_run(config, original, corpus), config)


def resume(arguments: Namespace) -> None:
    """Resume CHECKPOINT, up to step train.steps + train.resume_steps.

    Settings that differ from the checkpoint are shown as a table and refused,
    unless they are allowed by name.

    example:
      python main.py resume checkpoints/RUN/checkpoint_5000.pt --profile cpu
    """
    config = configure(arguments)
    run = training.resume_run(arguments.checkpoint, config, arguments.allow)
    train_until(config.last_step, run, config)


def generate(arguments: Namespace) -> None:
    """Continue PROMPT, token by token.

    It is greedy unless a sampling option is given; then run.seed decides.

    example:
      python main.py generate "Once upon a time," --top-k 50 --temperature 0.8
    """
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    model, tokenizer, _, config = open_model(arguments)
    filters = arguments.top_k, arguments.top_p, arguments.min_p
    options = analysis.sampling_options(arguments.temperature, *filters)
    options["generator"] = torch.Generator().manual_seed(config.run.seed)
    with one_line_errors("generate", "change the prompt or the options"):
        ids = analysis.prompt_ids(tokenizer, prompt, arguments.chat)
        precision = torch.bfloat16 if arguments.bf16 else torch.float32
        model = analysis.prepare_for_generation(model, precision)
        print("" if arguments.chat else prompt, end="", flush=True)
        for piece in analysis.stream_text(model, tokenizer, ids, arguments.tokens, options):
            print(piece, end="", flush=True)
    print()


def evaluate(arguments: Namespace) -> None:
    """Measure loss and perplexity of CHECKPOINT on a text.

    The result includes the protocol: the windows' size and stride.

    example:
      python main.py evaluate reference --data input.txt --stride 512
    """
    model, tokenizer, _, _ = open_model(arguments)
    text, digest = read_text(arguments.data)
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if arguments.windows:
        text = tokenizer.decode(tokens := tokens[: arguments.windows * arguments.window])
    with one_line_errors("evaluate", "change --window, --stride or the text"):
        if arguments.window > (context := model.config.max_position_embeddings):
            raise ValueError(f"window {arguments.window} exceeds the model's context of {context}")
        result = analysis.evaluate(model, tokens, arguments.window, arguments.stride, text)
    print(f"{arguments.data} (sha256 {digest[:12]}…): {result}")


def export(arguments: Namespace) -> None:
    """Write CHECKPOINT as a Hugging Face FOLDER, and as GGUF if asked.

    transformers loads the folder without code of this project; llama.cpp reads
    the GGUF file in it.

    example:
      python main.py export checkpoints/RUN/checkpoint_5050.pt my-model --gguf Q8_0
    """
    model, tokenizer, provenance, _ = open_model(arguments)
    folder = reference.export(model, tokenizer, arguments.folder, provenance, arguments.gguf)
    print(f"Wrote {folder}:", *sorted(file.name for file in folder.iterdir()))


def bench(arguments: Namespace) -> None:
    """Measure training and generation against transformers.

    Both sides run in turn, each in its own process. Let nothing else run meanwhile.

    example:
      python main.py bench --profile cpu --only "greedy generation"
    """
    from workflow.tools.bench import report  # transformers: 4 s that other commands do not need

    print(report(configure(arguments), arguments.rounds, arguments.only))


COMMANDS = {"run": run, "verify": verify, "mutate": mutate, "train": train, "resume": resume}
COMMANDS |= {"generate": generate, "evaluate": evaluate, "export": export, "bench": bench}


def configure(arguments: Namespace) -> Config:
    config = load_config(profile=arguments.profile, overrides=arguments.set)
    print(config)
    return config


def open_reference(arguments: Namespace):
    config = configure(arguments)
    source, cache = config.reference.source, config.paths.cache
    return reference.load_reference(source, config.model_entry, cache=cache), config


def open_model(arguments: Namespace):
    """A model, its tokenizer (from transformers), its provenance, and the settings."""
    if arguments.checkpoint == REFERENCE:
        original, config = open_reference(arguments)
        model, provenance = proof.copy_reference(original), asdict(original.provenance)
        return model, original.tokenizer, provenance, config
    try:
        return *training.load_model(Path(arguments.checkpoint)), configure(arguments)
    except ForeignError as error:
        original, config = open_reference(arguments)
        return *training.load_foreign_model(error, original), config


def train_until(max_steps: int, run, config: Config) -> None:
    """The loop of the notebook, with a sample at step 0 and at the last, then a checkpoint."""
    start = [0] if run.global_step == 0 else []
    for step in chain(start, run.train(max_steps)):
        if step % config.sample.every == 0 or step == max_steps:
            text = run.sample(config.sample.prompt)
            print(f"=== Generation @ step {run.global_step} ===\n{text}")
    run.save_and_close()
    distributed.end()


def parser() -> ArgumentParser:
    layout = {"formatter_class": RawDescriptionHelpFormatter}
    about, exit_codes = __doc__.split("\n\n", 1)
    whole = ArgumentParser(description=about, epilog=exit_codes, **layout)
    parts = whole.add_subparsers(required=True, title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        about, example = inspect.getdoc(command).split("\n\nexample:\n")
        texts = {"help": about.splitlines()[0], "epilog": f"example:\n{example}"}
        part = parts.add_parser(name, description=about, **texts, **layout)
        add_options(part, name)
        add = part.add_argument_group("options of every command").add_argument
        words = "full, pretrain, cpu, quick or ci (default: SMOLLM_PROFILE, else the YAML's)"
        add("--profile", metavar="NAME", help=words)
        words = "change any setting; may be repeated (default: what SMOLLM_SET says)"
        add("--set", metavar="KEY=VALUE", action="append", default=[], help=words)
        add("--debug", action="store_true", help="show the traceback of an error")
    return whole


def add_options(part: ArgumentParser, command: str) -> None:
    add, flag = part.add_argument, {"action": "store_true"}
    if command == "run":
        add("--in-place", **flag, help="also keep the output in main.ipynb itself")
    elif command == "verify":
        add("--quick", **flag, help="leave out texts of 2048 and 8192 tokens, and bfloat16")
        add("--json", **flag, help="print the checks as JSON; everything else goes to stderr")
    elif command == "resume":
        words = "a checkpoint's file, or a run's folder for its newest one"
        add("checkpoint", metavar="CHECKPOINT", type=Path, help=words)
        words = "let this train.KEY differ, or random (missing states); repeatable (default: none)"
        add("--allow", metavar="KEY", action="append", default=[], help=words)
    elif command == "generate":
        add_generate_options(part)
    elif command in ("evaluate", "export"):
        words = "a checkpoint's file, or the word reference: the original"
        add("checkpoint", metavar="CHECKPOINT", help=words)
    if command == "evaluate":
        add("--data", metavar="TEXT", type=Path, required=True, help="a UTF-8 file to score")
        add("--window", metavar="N", type=int, default=1024, help="tokens (default: 1024)")
        add("--stride", metavar="N", type=int, help="tokens between starts (default: window)")
        add("--windows", metavar="N", type=int, help="score N × WINDOW tokens (default: all)")
    elif command == "export":
        add("folder", metavar="FOLDER", type=Path, help="a new or an empty folder")
        add("--gguf", choices=("F32", "F16", "Q8_0"), help="also write GGUF (default: none)")
    elif command == "bench":
        add("--rounds", metavar="N", type=int, default=7, help="pairs of calls a row (default: 7)")
        add("--only", metavar="WORDS", default="", help="rows with these words (default: all)")


def add_generate_options(part: ArgumentParser) -> None:
    add, flag = part.add_argument, {"action": "store_true"}
    add("prompt", metavar="PROMPT", nargs="?", default="-", help="- is all of stdin (default: -)")
    words = "a checkpoint's file (default: reference, the original)"
    add("--checkpoint", metavar="FILE", default=REFERENCE, help=words)
    add("--bf16", **flag, help="round the weights to bfloat16: faster, not exact")
    add("--chat", **flag, help="ask PROMPT as a user's turn; needs an Instruct model")
    add("--tokens", metavar="N", type=int, default=64, help="new tokens at most (default: 64)")
    words = "0 is greedy (default: 0, but 1 with one of the next three)"
    add("--temperature", metavar="T", type=float, help=words)
    add("--top-k", metavar="N", type=int, help="sample from the N likeliest (default: all)")
    words = "sample from the most likely tokens with a total probability of P (default: 1)"
    add("--top-p", metavar="P", type=float, default=1.0, help=words)
    words = "sample from tokens at least P times as likely as the likeliest (default: 0)"
    add("--min-p", metavar="P", type=float, default=0.0, help=words)


def main(arguments: list[str] | None = None) -> int:
    raise_on_sigterm()
    options = parser().parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # a log file can be followed
    try:
        distributed.start(options.command in ("train", "resume"))
        return COMMANDS[options.command](options) or 0
    except WorkflowError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
