"""main.ipynb calls, shows and asserts; `main.py run` executes it, and stops when asked to."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from conftest import ROOT
from workflow.tools import stamp
from workflow.tools.notebook import SKIPPED

NOTEBOOK = nbformat.read(ROOT / "main.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
EXECUTED = [cell for cell in CODE if SKIPPED not in cell.metadata.get("tags", [])]


def test_the_notebook_defines_nothing_and_its_cells_are_short():
    for cell in EXECUTED:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in nodes)
    lengths = sorted(len(cell.source.splitlines()) for cell in CODE)
    assert lengths[-1] <= 15
    assert lengths[len(lengths) // 2] <= 7
    assert 20 <= len(CODE) <= 32
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in CODE) == 1


def test_the_notebook_holds_no_installation():
    for cell in CODE:
        assert not re.search(r"pip install|google\.colab", cell.source)


def test_what_the_notebook_shows_was_made_by_the_code_above_it():
    """All of it or nothing: `make notebook-run` executes it, `make notebook-strip` clears it."""
    counts = [cell.execution_count for cell in CODE]
    if not any(cell.outputs for cell in CODE):
        assert set(counts) == {None}
        return
    assert counts == [*range(1, len(EXECUTED) + 1), None]  # the last is for readers
    kinds = {output.output_type for cell in CODE for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}
    stamped = re.search(rf"^{stamp.CELLS} +(\w+)$", outputs(NOTEBOOK), re.MULTILINE)
    assert stamped[1] == stamp.cells_sha256(ROOT / "main.ipynb")
    assert not re.search(r"^made .*\+$", outputs(NOTEBOOK), re.MULTILINE)  # of a commit, as it is
    assert (ROOT / "main.ipynb").stat().st_size < 800_000
    assert "\r" not in outputs(NOTEBOOK)


def printed(text: str) -> list[str]:
    """The lines of a text, without progress bars, dates and measured times."""
    lines = (line.rpartition("\r")[2].strip() for line in text.splitlines())
    return [
        line
        for line in lines
        if line and not re.search(r"\d+%\||^About | checks in |^peak memory|^made |^steps \d", line)
    ]


SMOKE_TEST = r"Smoke test ci-smoke-test-\w+: read from its log"
RUN = ("main.py", "run", "--profile", "ci")


def run(story, *command: str) -> str:
    environment = os.environ | {"SMOLLM_PROFILE": "ci"}
    options = {"cwd": story, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, *command], timeout=400, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def outputs(notebook) -> str:
    streams = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in streams if output.output_type == "stream")


def test_the_notebook_is_executed_then_replayed(story):
    """All 5050 steps of the ci profile, live; the second time nothing is trained."""
    shown = run(story, *RUN, "--in-place")
    (folder,) = (story / "runs").glob("ci-[0-9a-f]*")
    executed = nbformat.read(folder / "main.ipynb", as_version=4)
    assert nbformat.read(story / "main.ipynb", as_version=4) == executed
    kept = printed(outputs(executed))
    assert f"Run folder: runs/{folder.name}" in kept
    assert "Step: 5000, Train Loss" in "\n".join(kept)
    assert "50 steps, largest difference of a loss: 0.0" in kept
    assert set(kept) <= set(printed(shown))  # it could be followed in the terminal
    assert f"Made:\n  runs/{folder.name}/main.html" in shown
    assert (folder / "main.html").stat().st_size > 100_000
    assert {file.name for file in (story / "checkpoints" / folder.name).glob("*.pt")} >= {
        "checkpoint_5000.pt",
        "checkpoint_5050.pt",
    }
    displayed = (output for cell in executed.cells for output in cell.get("outputs", []))
    assert sum("image/png" in output.get("data", {}) for output in displayed) >= 3

    again = printed(run(story, *RUN))
    assert any(line.endswith("resuming from checkpoint_5050.pt") for line in again)
    assert any(line.startswith("already at step 5050; ") for line in again)
    assert any(re.fullmatch(SMOKE_TEST, line) for line in again)
    shown_steps = r"Step: \d+00, Train Loss|.*global step 50\d\d"
    losses = [line for line in kept if re.match(shown_steps, line)]
    assert len(losses) == 50 + 5
    assert set(losses) <= set(again)


def write_cells(story, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), story / "main.ipynb")


def test_profile_and_settings_reach_the_notebook_and_readers_cells_are_skipped(story):
    write_cells(story, "from workflow.config import load_config", "print(load_config())", "%no")
    notebook = nbformat.read(story / "main.ipynb", as_version=4)
    notebook.cells[2].metadata["tags"] = [SKIPPED]
    nbformat.write(notebook, story / "main.ipynb")
    environment = os.environ | {"SMOLLM_SET": "run.seed=1 train.steps=8"}
    command = [sys.executable, *RUN, "--set", "train.steps=9"]
    shown = subprocess.check_output(command, cwd=story, env=environment, text=True)
    changed = "changed: run.seed=1, train.steps=8, train.steps=9"
    assert f"Profile ci: as SMOLLM_PROFILE says; {changed}\n" in shown


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero; see how far"),
        ("raise errors.SourceError('a', 'b', 'c')", 5, "SourceError: a: b; c; see how far"),
    ],
)
def test_a_notebook_that_fails_is_kept_and_its_error_is_one_line(story, source, code, words):
    write_cells(story, f"from workflow import errors\nprint(1)\n{source}")
    result = subprocess.run([sys.executable, *RUN], cwd=story, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stderr.splitlines()[-1].startswith(f"error: main.ipynb: {words}")
    kept = nbformat.read(story / "runs" / "failed.ipynb", as_version=4)
    assert kept.cells[0].outputs[0].text == "1\n"


def test_a_wrong_setting_is_refused_before_the_kernel_starts(here, story):
    code, _, error = here("run", "--set", "train.steps=-1")
    assert code == 2 and "train.steps: -1 does not fit" in error
    assert not (story / "runs").exists()


def test_without_its_notebook_it_says_so_in_one_line(here, story):
    (story / "main.ipynb").unlink()
    code, _, error = here("run")
    assert code == 2 and error.startswith("error: main.ipynb: there is no such file; ")


# --- stops ----------------------------------------------------------------------------------------

OPENING = ("PROFILE = None", "import torch", "load_config(", "load_reference(", "load_corpus(")
OPENING += ("open_run(",)
TRAINING = "run.train(config.train.steps)"
RESUMING, COMPARED = "resume_run(", "assert resumed == "
STOPPED_LINE = "Stopped; the same command continues\n"


def cell_with(part: str) -> nbformat.NotebookNode:
    (found,) = [cell for cell in CODE if part in cell.source]
    return found


def alive(story) -> list[str]:
    """The processes that work in a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if place.resolve() == story.resolve():
                found.append((place.parent / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_signal_is_passed_on_to_the_kernel_which_saves_and_the_next_continues(story):
    cells = [cell_with(part).copy() for part in (*OPENING, TRAINING)]
    cells[0].source = "PROFILE, OVERRIDES = 'ci', ['train.steps=1500', 'train.log_every=50']"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), story / "main.ipynb")
    command = [sys.executable, *RUN]
    for moment, number in (("Step: 300,", signal.SIGTERM), ("Step: 800,", signal.SIGINT)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=story, **pipes) as process:
            next(line for line in process.stdout if moment in line)
            process.send_signal(number)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert re.search(r"^Saved checkpoint_\d+\.pt$", rest, re.MULTILINE)
        assert errors == STOPPED_LINE
        assert alive(story) == []
    run(story, *command[1:])
    (record,) = (story / "runs").glob("ci-[0-9a-f]*/metrics.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 1501))


def test_a_second_signal_ends_a_kernel_that_does_not_stop(story):
    source = """
import time
while True:
    try:
        print("at work", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass"""
    write_cells(story, source)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *RUN], cwd=story, **pipes) as process:
        for _ in range(2):
            assert process.stdout.readline() == "at work\n"
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == STOPPED_LINE
    assert alive(story) == []


class Kernel:
    """A real kernel, as JupyterLab has one, that runs cells of main.ipynb."""

    def __init__(self, story):
        options = {"cwd": story, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
        self.manager, self.client = start_new_kernel(**options)

    def run(self, source: str, interrupt_at: str | float | None = None) -> tuple[str, str]:
        """What a cell prints, and its error ("" for none).

        interrupt_at: press stop once this is printed, or after so many seconds.
        """
        printed, stop = [], self.manager.interrupt_kernel

        def hook(message):
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
                if isinstance(interrupt_at, str) and interrupt_at in printed[-1]:
                    stop()

        if isinstance(interrupt_at, float):
            threading.Timer(interrupt_at, stop).start()
        reply = self.client.execute_interactive(source, output_hook=hook, timeout=200)["content"]
        error = f"{reply['ename']}: {reply['evalue']}" if reply["status"] == "error" else ""
        return "".join(printed), error

    def run_all(self, **settings) -> str:
        """Run All Cells; nothing may fail."""
        everything = ""
        for cell in EXECUTED:
            printed, error = self.run(self.with_settings(cell.source, **settings))
            assert error == "", f"{cell.source}\n{error}"
            everything += printed
        return everything

    @staticmethod
    def with_settings(source: str, **settings) -> str:
        lines = [f"{name} = {value!r}" for name, value in settings.items()]
        return "\n".join([source, *lines]) if source.startswith("PROFILE") else source


@pytest.fixture
def kernel(story):
    kernel = Kernel(story)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


SETTINGS = {
    "train.steps": 400,
    "train.resume_steps": 300,
    "train.schedule_steps": 700,
    "train.validate_every": 200,
    "train.checkpoint_every": 200,
    "sample.every": 200,
    "mutations.steps": 1,
    "proof.new_tokens": 8,
}
SHORT = {"PROFILE": "ci", "OVERRIDES": [f"{key}={value}" for key, value in SETTINGS.items()]}


def losses(story) -> dict[int, float]:
    """Of the record; no step may be in it twice."""
    (record,) = (story / "runs").glob("ci-[0-9a-f]*/metrics.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(found) == sum("loss" in row for row in rows)
    return found


@pytest.mark.slow
def test_each_long_cell_can_be_stopped_and_run_again_and_all_of_them_too(story, kernel):
    for part in OPENING:
        kernel.run(kernel.with_settings(cell_with(part).source, **SHORT))
    for part, moment, saved in (
        (TRAINING, "Step: 200,", True),
        (TRAINING, None, True),
        (RESUMING, 0.5, False),  # while it continues, unlogged
        (RESUMING, "Resume Loss", True),
        (RESUMING, None, True),
    ):
        shown, error = kernel.run(cell_with(part).source, interrupt_at=moment)
        assert error.startswith("KeyboardInterrupt" if moment else "") and bool(moment) == bool(
            error
        )
        assert saved == ("Saved checkpoint_" in shown), shown
    shown, error = kernel.run(cell_with(COMPARED).source)
    assert error == "" and "300 steps, largest difference of a loss: 0.0" in shown
    stopped = losses(story)
    assert list(stopped) == list(range(1, 701))

    first = kernel.run_all(**SHORT)
    assert "already at step 700; " in first
    again = kernel.run_all(**SHORT)
    assert set(printed(again)) == set(printed(first))
    assert any(re.fullmatch(SMOKE_TEST, line) for line in printed(first))
    alone, error = kernel.run(cell_with(TRAINING).source)
    assert error == "" and alone in first
    assert losses(story) == stopped

    shutil.rmtree(story / "runs"), shutil.rmtree(story / "checkpoints")
    sets = [part for setting in SHORT["OVERRIDES"] for part in ("--set", setting)]
    run(story, "main.py", "train", *sets)
    assert losses(story) == {step: loss for step, loss in stopped.items() if step <= 400}


def test_an_error_has_the_same_words_in_the_notebook_and_on_the_command_line(story, kernel):
    for part in OPENING[:2]:
        kernel.run(kernel.with_settings(cell_with(part).source, OVERRIDES=["train.steps=-1"]))
    _, error = kernel.run(cell_with("load_config(").source)
    command = [sys.executable, "main.py", "train", "--set", "train.steps=-1"]
    result = subprocess.run(command, cwd=story, capture_output=True, text=True)
    assert result.stderr == f"error: {error.partition(': ')[2]}\n"


@pytest.mark.slow
def test_plain_nbconvert_executes_it_too(story):
    command = ["-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "main.ipynb"]
    run(story, *command, "--output", "executed.ipynb")
    assert "Run folder: " in outputs(nbformat.read(story / "executed.ipynb", as_version=4))
