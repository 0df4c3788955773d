"""The stamp says which code made a notebook, and which steps were computed when."""

from types import SimpleNamespace

import nbformat
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from conftest import ROOT
from workflow.tools import stamp


def test_the_hash_is_of_the_code_cells_alone(tmp_path):
    story, file = new_notebook(cells=[new_code_cell("a = 1")]), tmp_path / "story.ipynb"
    nbformat.write(story, file)
    before = stamp.cells_sha256(file)
    story.cells[0].outputs = [new_output("stream", text="out")]
    story.cells.append(new_markdown_cell("words"))
    nbformat.write(story, file)
    assert stamp.cells_sha256(file) == before
    story.cells[0].source = "a = 2"
    nbformat.write(story, file)
    assert stamp.cells_sha256(file) != before


def test_steps_are_listed_by_when_and_by_which_commit_they_were_computed():
    rows = [
        {"step": 0, "began": "Monday", "commit": "a"},
        {"step": 1, "loss": 2.0},
        {"step": 7, "began": "Tuesday", "commit": "b"},
    ]
    run = SimpleNamespace(
        config=SimpleNamespace(device=torch.device("cpu")),
        name="ci-12345678",
        provenance={"name": "random weights", "weights_sha256": "1" * 64},
        corpus=SimpleNamespace(name="input.txt", text_sha256="2" * 64),
        history=rows,
        global_step=9,
    )
    lines = stamp.stamp(ROOT / "main.ipynb", run).splitlines()
    assert "steps 1 to 7       from Monday at commit a" in lines
    assert "steps 8 to 9       from Tuesday at commit b" in lines
    assert "weights            random weights, sha256 1111111111111111" in lines
    assert lines[-1] == f"code cells sha256  {stamp.cells_sha256(ROOT / 'main.ipynb')}"
