"""The stamp tells which code, and which steps were computed when."""

import nbformat
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


def test_steps_are_told_by_who_computed_them():
    rows = [
        {"step": 0, "began": "Monday", "commit": "a"},
        {"step": 1, "loss": 2.0},
        {"step": 7, "began": "Tuesday", "commit": "b"},
    ]
    assert stamp.hands(rows, 9) == {
        "steps 1 to 7": "from Monday at commit a",
        "steps 8 to 9": "from Tuesday at commit b",
    }


def test_the_commit_is_that_of_the_checkout_or_said_to_be_unknown(tmp_path, monkeypatch):
    known = stamp.commit()
    assert len(known.rstrip("+")) == 10 if (ROOT / ".git").exists() else "unknown" in known
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    assert stamp.commit() == "unknown (no git checkout)"
