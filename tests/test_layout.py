"""Imports go one way, from main.py down to SmolLm3.py, and no file grows too long."""

import ast
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT

# from top to bottom: a file may import its own chapter and those below it
ORDER = ["main", "tools", "proof", "training", "analysis", "data", "reference", "config"]
ORDER += ["files", "errors", "SmolLm3"]
MAX_LINES = 350
LIGHT = ("config", "data", "reference", "training")  # chapters of the light commands
HEAVY = ("transformers", "datasets", "matplotlib", "pandas")  # seconds each to import

PATHS = [ROOT / "main.py", ROOT / "SmolLm3.py", *sorted(ROOT.glob("workflow/**/*.py"))]
FILES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
CELLS = [
    cell.source
    for cell in nbformat.read(ROOT / "main.ipynb", as_version=4).cells
    if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", [])
]


def chapter(module: str) -> str:
    """`workflow.data.corpus` -> data; other projects' modules, and `workflow` itself: ""."""
    first, _, rest = module.partition(".")
    name = rest.partition(".")[0] if first == "workflow" else first
    return name if name in [*ORDER, "tests", "conftest"] else ""


def imported(source: str) -> set[str]:
    """The chapters that a source imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module != "workflow" else []
            modules |= {*parts, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {chapter(module) for module in modules if module} - {""}


def faults(file: str, source: str) -> list[str]:
    """What a file imports that is not below it, and its lines if they are too many."""
    own = chapter(file.removesuffix(".py").removesuffix(".ipynb").replace("/", "."))
    allowed = ORDER[ORDER.index(own) + (own in ("main", "SmolLm3")) :] if own else []
    found = [f"{file} imports {name}" for name in sorted(imported(source) - set(allowed))]
    relative = [node for node in ast.walk(ast.parse(source)) if getattr(node, "level", 0)]
    found += [f"{file} has a relative import" for _ in relative]
    lines = len(source.splitlines())
    too_long = lines > MAX_LINES and own != "SmolLm3"
    return found + [f"{file} has {lines} lines"] * too_long


def test_imports_go_one_way_and_files_are_short():
    assert len(FILES) > 30
    sources = {**FILES, "main.ipynb": "\n".join(CELLS)}
    assert [fault for file, source in sources.items() for fault in faults(file, source)] == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("workflow/data/corpus.py", "from workflow.training.run import Run", "imports training"),
        ("workflow/data/corpus.py", "from workflow import analysis", "imports analysis"),
        ("workflow/reference/hub.py", "def f():\n    import workflow.data.text", "imports data"),
        ("workflow/training/step.py", "from workflow.proof import verify", "imports proof"),
        ("workflow/errors.py", "import workflow.files", "imports files"),
        ("workflow/tools/bench.py", "import main", "imports main"),
        ("workflow/tools/bench.py", "from tests.conftest import ROOT", "imports tests"),
        ("workflow/tools/bench.py", "from conftest import ROOT", "imports conftest"),
        ("workflow/config/load.py", "from .. import data", "has a relative import"),
        ("workflow/__init__.py", "import workflow.files", "imports files"),
        ("SmolLm3.py", "from workflow import errors", "imports errors"),
        ("main.ipynb", "import main", "imports main"),
        ("main.py", "x = 1\n" * 351, "has 351 lines"),
    ],
)
def test_the_rule_can_fail(file, source, fault):
    assert faults(file, source) == [f"{file} {fault}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("workflow/proof/checks.py", "from workflow.training import load_model\nimport torch"),
        ("workflow/training/run.py", "from workflow import files\nimport workflow.training.step"),
        ("main.ipynb", "from workflow import proof, tools\nimport SmolLm3"),
        ("SmolLm3.py", "x = 1\n" * 351),
    ],
)
def test_imports_from_below_are_allowed(file, source):
    assert faults(file, source) == []


def test_each_chapter_says_what_it_is():
    chapters = [file for file in FILES if file.endswith("__init__.py")]
    assert len(chapters) == 8
    assert [file for file in chapters if not ast.get_docstring(ast.parse(FILES[file]))] == []


def test_light_commands_import_no_heavy_library():
    program = f"""
import sys
for name in {LIGHT}:
    __import__(f"workflow.{{name}}")
print([name for name in {HEAVY} if name in sys.modules])"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n", run.stderr
