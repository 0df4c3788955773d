"""The stamp names the code of a notebook, and when each step was computed."""

from types import SimpleNamespace

import nbformat
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from conftest import ROOT
from workflow.tools import stamp


def test_the_hash_depends_only_on_the_code(tmp_path):
    def sha256(source, *more_cells, outputs=()):
        cells = [new_code_cell(source, outputs=list(outputs)), *more_cells]
        nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
        return stamp.cells_sha256(tmp_path / "a.ipynb")

    output = new_output("stream", text="out")
    assert sha256("a = 1") == sha256("a = 1", new_markdown_cell("text"), outputs=[output])
    assert sha256("a = 1") != sha256("a = 2")


def test_each_part_of_a_run_has_its_date_and_commit():
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
