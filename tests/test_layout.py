"""Imports go one way, no file is too long, and nothing loads code from a file."""

import re

import nbformat
import pytest

from conftest import ROOT

# from top to bottom; a file may import its own chapter and the chapters after it
ORDER = ["main", "tools", "proof", "training", "analysis", "data", "reference", "config"]
ORDER += ["files", "errors", "SmolLm3"]

PATHS = [ROOT / "main.py", ROOT / "SmolLm3.py", *sorted(ROOT.glob("workflow/**/*.py"))]
FILES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
CELLS = [
    cell.source
    for cell in nbformat.read(ROOT / "main.ipynb", as_version=4).cells
    if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", [])
]


IMPORT = re.compile(r"^ *(?:from|import) (?:workflow\.)?(\w+)(?: import (.+))?", re.MULTILINE)


def imported(source: str) -> set[str]:
    """The chapters that a source imports, also inside functions. Ruff finds relative imports."""
    found = set()
    for module, names in IMPORT.findall(source):
        found |= set(re.findall(r"\w+", names)) if module == "workflow" else {module}
    return found & {*ORDER, "tests", "conftest"}


def violations(file: str, source: str) -> list[str]:
    """What is against the order of imports or the layout."""
    own = re.match(r"(?:workflow/)?(\w+)", file)[1]
    allowed = ORDER[ORDER.index(own) + (own in ("main", "SmolLm3")) :] if own in ORDER else []
    found = [f"{file} imports {name}" for name in sorted(imported(source) - set(allowed))]
    if file.endswith("__init__.py") and not source.startswith('"""'):
        found.append(f"{file} does not say what the chapter is")
    lines, limit = len(source.splitlines()), 500 if own == "SmolLm3" else 350
    return found + [f"{file} has {lines} lines"] * (lines > limit)


def test_imports_go_one_way_and_files_are_short():
    assert len(FILES) > 30
    sources = {**FILES, "main.ipynb": "\n".join(CELLS)}
    assert [found for file, text in sources.items() for found in violations(file, text)] == []


@pytest.mark.parametrize(
    ("file", "source", "violation"),
    [
        ("workflow/data/corpus.py", "from workflow.training.run import Run", "imports training"),
        ("workflow/data/corpus.py", "from workflow import data, analysis", "imports analysis"),
        ("workflow/reference/hub.py", "def f():\n    import workflow.data.text", "imports data"),
        ("workflow/tools/bench.py", "from conftest import ROOT", "imports conftest"),
        ("main.ipynb", "import main", "imports main"),
        ("workflow/data/__init__.py", "x = 1", "does not say what the chapter is"),
        ("main.py", "x = 1\n" * 351, "has 351 lines"),
    ],
)
def test_violation_is_found(file, source, violation):
    assert violations(file, source) == [f"{file} {violation}"]


# ruff finds pickle and unsafe YAML
UNSAFE = re.compile(
    r"torch\.load\((?!.*weights_only=True\))|weights_only=[^T]|torch\.jit|trust_remote_code="
    r"|yaml\.(full|unsafe)_load"
)


def test_no_source_runs_code_from_a_file():
    paths = [path for path in ROOT.glob("tests/**/*.py") if path.name != "test_layout.py"]
    texts = [*FILES.values(), *CELLS, *(path.read_text("utf-8") for path in paths)]
    assert [found[0] for text in texts if (found := UNSAFE.search(text))] == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "read(path, weights_only=unsafe)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_unsafe_code_is_found(source):
    assert UNSAFE.search(source)
