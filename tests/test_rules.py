"""What the source may not do, read from its syntax tree."""

import ast

import nbformat
import pytest

from conftest import ROOT

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(
        [*ROOT.glob("*.py"), *ROOT.glob("workflow/**/*.py"), *ROOT.glob("tests/**/*.py")]
    )
}
CELLS = [
    cell.source
    for cell in nbformat.read(ROOT / "main.ipynb", as_version=4).cells
    if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", [])
]
SOURCES["main.ipynb"] = "\n".join(CELLS)
# functions that run what a file says
FORBIDDEN = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}


def faults(source: str) -> list[str]:
    """Calls and names that are forbidden, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = (node.value.id, node.attr)
            if name in FORBIDDEN or (name[0] == "torch" and name[1] == "jit"):
                found.append(f"line {node.lineno}: {'.'.join(name)}")
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml"):
            found += [f"line {node.lineno}: from {node.module} import {a.name}" for a in node.names]
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            safe = given.get("weights_only")
            loads = ast.unparse(node.func) == "torch.load"
            if (loads or safe) and not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"line {node.lineno}: weights_only is not True")
            trusts = given.get("trust_remote_code")
            if trusts is not None:
                found.append(f"line {node.lineno}: trust_remote_code")
    return found


def test_no_file_can_make_the_project_run_it():
    assert len(SOURCES) > 50
    assert {name: found for name, text in SOURCES.items() if (found := faults(text))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "read(path, weights_only=unsafe)",
        "pickle.load(file)",
        "from pickle import loads",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_rule_bites(source):
    assert len(faults(source)) == 1
