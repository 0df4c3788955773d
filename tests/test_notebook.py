"""The notebook tells the story, calls, shows and asserts; it defines nothing."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT
from workflow.notebook import SKIPPED, run_cells

NOTEBOOK = nbformat.read(ROOT / "main.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
EXECUTED = [cell for cell in CODE if SKIPPED not in cell.metadata.get("tags", [])]


def test_the_notebook_defines_nothing_and_its_cells_are_short():
    for cell in EXECUTED:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in nodes)
    lengths = sorted(len(cell.source.splitlines()) for cell in CODE)
    assert lengths[-1] <= 15
    assert lengths[len(lengths) // 2] <= 6
    assert 20 <= len(CODE) <= 25
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in CODE) == 1


def test_the_notebook_holds_no_installation_and_no_outputs():
    for cell in CODE:
        assert cell.outputs == []
        assert not re.search(r"pip install|google\.colab", cell.source)


def printed(text: str) -> list[str]:
    """The lines of a story, without progress bars and measured times."""
    lines = (line.rpartition("\r")[2].strip() for line in text.splitlines())
    return [
        line
        for line in lines
        if line and not re.search(r"\d+%\||^About | rungs in |^peak memory", line)
    ]


def run(story, *command: str) -> str:
    environment = os.environ | {"SMOLLM_PROFILE": "ci"}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=story,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def outputs(notebook) -> str:
    streams = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in streams if output.output_type == "stream")


def test_notebook_and_script_tell_the_same_story(story):
    """Both do all 5050 steps of the ci profile; the notebook then runs again, over its record."""
    shown = run(story, "-m", "workflow.notebook")
    (folder,) = (story / "runs").glob("ci-[0-9a-f]*")
    executed = nbformat.read(folder / "main.ipynb", as_version=4)
    kept = printed(outputs(executed))
    assert f"Run folder: runs/{folder.name}" in kept
    assert "Step: 5000, Train Loss" in "\n".join(kept)
    assert "50 steps, largest difference of a loss: 0.0" in kept
    assert set(kept) <= set(printed(shown))  # it could be followed in the terminal
    assert (folder / "main.html").stat().st_size > 100_000
    assert {file.name for file in (story / "checkpoints" / folder.name).glob("*.pt")} >= {
        "checkpoint_5000.pt",
        "checkpoint_5050.pt",
    }
    pictures = [
        output
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3

    again = printed(run(story, "-m", "workflow.notebook"))
    assert any(line.endswith("resuming from checkpoint_5050.pt") for line in again)
    assert "already at step 5050; from the record:" in again
    assert any(re.fullmatch(r"Rehearsal ci-rehearsal-\w+: told from the record", x) for x in again)
    shown_steps = r"Step: \d+00, Train Loss|.*global step 50\d\d"
    losses = [line for line in kept if re.match(shown_steps, line)]
    assert len(losses) == 50 + 5
    assert set(losses) <= set(again)

    (story / "runs").rename(story / "runs of the notebook")
    (story / "checkpoints").rename(story / "checkpoints of the notebook")
    assert printed(run(story, "main.py", "run")) == kept


def test_cells_run_as_a_script_take_parameters_and_skip_what_is_for_readers(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cells = [("X = 1", ["parameters"]), ("Y = X + 1", []), ("%magic", [SKIPPED])]
    notebook.cells = [
        nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in cells
    ]
    nbformat.write(notebook, tmp_path / "story.ipynb")
    assert run_cells(tmp_path / "story.ipynb")["Y"] == 2
    assert run_cells(tmp_path / "story.ipynb", {"X": 5})["Y"] == 6


def test_a_notebook_that_fails_is_kept_and_said(story):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)\n1 / 0")])
    nbformat.write(notebook, story / "main.ipynb")
    result = subprocess.run(
        [sys.executable, "-m", "workflow.notebook"], cwd=story, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: main.ipynb: ZeroDivisionError: division"
    )
    kept = nbformat.read(story / "runs" / "failed.ipynb", as_version=4)
    assert kept.cells[0].outputs[0].text == "1\n"


@pytest.mark.slow
def test_plain_nbconvert_executes_it_too(story):
    command = ["-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "main.ipynb"]
    run(story, *command, "--output", "executed.ipynb")
    assert "Run folder: " in outputs(nbformat.read(story / "executed.ipynb", as_version=4))
