"""Speed and memory of this project beside other programs: `make bench-peers`.

Each program has its own process, and its own environment if its packages need one. All have the
same weights, tokens, precision, threads and OpenMP settings. A row is only measured if the results
agree: the losses of the first two steps, or the greedy tokens.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

# importing workflow sets OpenMP's variables, also for the programs
from SmolLm3 import LlamaModel  # noqa: E402
from workflow.config import Config, load_config  # noqa: E402
from workflow.data import read_text  # noqa: E402
from workflow.errors import WorkflowError  # noqa: E402
from workflow.reference import export, load_exported  # noqa: E402
from workflow.reference.gguf_file import write_gguf  # noqa: E402
from workflow.tools import bench  # noqa: E402
from workflow.tools.arguments import at_least  # noqa: E402
from workflow.tools.bench import BF16, OURS, Case  # noqa: E402
from workflow.tools.models import open_reference  # noqa: E402
from workflow.tools.terminal import raise_on_signals  # noqa: E402

HERE, PEERS, NODE = Path(__file__).parent, ROOT / ".cache/peers", ROOT / ".cache/node"
STEP, GENERATION = "training step", "greedy generation"
TRAINER, LITGPT, PLAIN = "transformers' Trainer", "litgpt", "plain loop"
LLAMA_CPP = {"llama.cpp, F16": "F16", "llama.cpp, Q8_0": "Q8_0"}
PROMPT = 16  # tokens
LOSS_BOUND = 1e-3  # nats per token, of the first two steps
# How much less likely than the best token the chosen one is, on average, for our float32 model.
# Rounding to 8 bits chooses another token only if two are close; a wrong model is off by nats.
TOKENS_BOUND = 0.05  # nats


@dataclass(frozen=True)
class Workspace:
    """What all programs get: the exported original, a text, and our settings."""

    folder: Path  # in Hugging Face format, and GGUF files
    config: Config
    model: LlamaModel  # ours, float32
    ids: list[int]  # of a text

    def write_task(self, case: Case) -> Path:
        """Writes what a program has to do, as JSON."""
        generates, size, length = case.task == GENERATION, case.batch_size, case.length
        changes = {"batch_size": size, "sequence_length": length, "warmup_steps": 0}
        changes |= {"micro_batch_size": None, "compile": False, "precision": "float32"}
        width = PROMPT if generates else length + 1
        task = {
            "folder": str(self.folder),
            "settings": self.config.train.model_copy(update=changes).model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "new_tokens": length if generates else 0,
            "precision": "bfloat16" if BF16 in case.variant else "float32",
            "ids": [self.ids[i * width : (i + 1) * width] for i in range(size)],
        }
        path = self.folder / f"{case.variant}.json"
        path.write_text(json.dumps(task), "utf-8")
        return path


def cases() -> list[tuple[Case, Case]]:
    """The rows: what is measured, and what it is compared with."""
    sizes, others = [(1, 128), (4, 256)], (TRAINER, LITGPT, PLAIN)
    rows = [(STEP, *size, pair) for size in sizes for pair in ((OURS, other) for other in others)]
    f16, q8_0 = LLAMA_CPP
    pairs = [(OURS, f16), (OURS + BF16, f16), (OURS + BF16, q8_0)]
    rows += [(GENERATION, 1, 128, pair) for pair in pairs]
    return [tuple(Case(*row, variant) for variant in pair) for *row, pair in rows]


@contextmanager
def workspace(config: Config, gguf: tuple[str, ...] = ()) -> Iterator[Workspace]:
    """Exports the original into a temporary folder, which is deleted at the end."""
    with redirect_stdout(sys.stderr):
        reference = open_reference(config)
    config.paths.cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.paths.cache) as parent:
        folder = Path(parent, "model")
        model = bench.our_model(reference).eval()
        export(model, reference.tokenizer, folder, asdict(reference.provenance))
        for kind in gguf:
            write_gguf(model, reference.tokenizer, folder / f"{kind}.gguf", kind, "SmolLM2")
        text, _ = read_text(config.data.fallback_text)
        ids = reference.tokenizer(text).input_ids
        yield Workspace(folder, config, load_exported(folder)[0], ids)


def packages(case: Case) -> Path | None:
    """The folder with the packages of a program; None if it runs in our environment."""
    if case.variant in LLAMA_CPP:
        return NODE
    return PEERS / LITGPT if case.variant == LITGPT else None


def command(case: Case, space: Workspace) -> list[Any]:
    """The command that starts a program."""
    task, folder = space.write_task(case), packages(case)
    if kind := LLAMA_CPP.get(case.variant):
        script = ROOT / "tests/reference/llama_cpp.mjs"
        return ["node", script, NODE, space.folder / f"{kind}.gguf", task]
    python = folder / "bin" / "python" if folder else sys.executable
    return [python, HERE / "worker.py", case.variant, task]


@contextmanager
def program(case: Case, command: list) -> Iterator[tuple[Any, Callable[[bool], float]]]:
    """Starts a program. Gives its first results, and a function as `bench.worker_process` does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, **pipes)

        def answer() -> Any:
            if line := process.stdout.readline():
                return json.loads(line)
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[-1]
            raise WorkflowError(case, f"it ended: {last}", "start it alone, with --only")

        def call(again: bool) -> float:
            if not again:
                return peak_memory(process.pid)
            with suppress(BrokenPipeError):  # `answer` reports why it ended
                process.stdin.write("\n")
                process.stdin.flush()
            return answer()

        try:
            yield answer(), call
        finally:
            process.kill()
            process.wait()


def peak_memory(pid: int) -> float:
    """In GB, on Linux. `getrusage` of a program would begin with the memory of this process."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 / 1e9 if found else math.nan


@torch.no_grad()
def regret(model: LlamaModel, prompt: list[int], tokens: list[int]) -> float:
    """How much less likely the tokens are than the most likely ones; mean, nats."""
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.amax(dim=-1) - chosen).mean().item()


def check_results(case: Case, space: Workspace, ours: Any, theirs: Any) -> None:
    """Raises WorkflowError if a program has computed something else."""
    if case.task == STEP:
        differences, bound = [abs(a - b) for a, b in zip(ours, theirs)], LOSS_BOUND
    else:
        texts, bound = [*ours, *theirs], TOKENS_BOUND
        differences = [regret(space.model, space.ids[:PROMPT], tokens) for tokens in texts]
        differences += [math.inf for tokens in texts if len(tokens) != case.length]
    if not all(difference <= bound for difference in differences):  # also NaN
        found = ", ".join(f"{difference:.4f}" for difference in differences)
        what = f"the results differ by {found} nats; at most {bound} is allowed"
        raise WorkflowError(case, what, "another model is no comparison")


def measure(case: Case, other: Case, space: Workspace, rounds: int) -> str:
    """The Markdown row of two programs, which take turns."""
    with (
        program(case, command(case, space)) as (ours, call),
        program(other, command(other, space)) as (theirs, call_other),
    ):
        check_results(other, space, ours, theirs)
        return bench.compare(case, other, call, call_other, rounds)


def versions() -> str:
    """The pinned versions of the other programs."""
    pins = [line for line in (HERE / "litgpt.txt").read_text().splitlines() if "==" in line]
    package = NODE / "node_modules/node-llama-cpp/package.json"
    if package.is_file():
        pins.append(f"node-llama-cpp=={json.loads(package.read_text())['version']}")
    return ", ".join(pins).replace("==", " ")


def report(config: Config, rounds: int, only: str) -> int:
    """Prints date, machine, versions and a Markdown table. The number of rows that failed."""
    chosen = [pair for pair in cases() if only in f"{pair[0]}; {pair[1].variant}"]
    if not chosen:
        rows = "; ".join(f"{case}; {other.variant}" for case, other in cases())
        raise WorkflowError(f"--only {only}", "no row has this name", f"rows: {rows}")
    generates = any(case.task == GENERATION for case, _ in chosen)
    machine, ours, _ = bench.heading(config)
    print(machine, f"{ours}, {versions()}", "", bench.HEADER, "|---" * 7 + "|", sep="\n")
    failed = 0
    with workspace(config, tuple(LLAMA_CPP.values()) if generates else ()) as space:
        for case, other in chosen:
            if (folder := packages(other)) and not (folder / ".installed").is_file():
                print(f"skipped: {other.variant} is not installed", file=sys.stderr)
                continue
            print(f"measuring {case}; {other.variant}", file=sys.stderr)
            try:
                print(measure(case, other, space, rounds), flush=True)
            except WorkflowError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
    return failed


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    words = "pairs of calls in each row (default: %(default)s)"
    parser.add_argument("--rounds", metavar="N", type=at_least(1), default=9, help=words)
    parser.add_argument("--only", metavar="WORDS", default="", help="only rows with these words")
    options = parser.parse_args()
    raise_on_signals()
    try:
        failed = report(load_config(profile="cpu"), options.rounds, options.only)
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
