"""No source file may load code from a file. Checked in the syntax tree."""

import ast

import pytest
from test_layout import CELLS

from conftest import ROOT

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("", "workflow/**/", "tests/**/")
    for path in sorted(ROOT.glob(f"{folder}*.py"))
}
SOURCES["main.ipynb"] = "\n".join(CELLS)
FORBIDDEN = {  # functions that can run code from a file
    "pickle": ("load", "loads", "Unpickler"),
    "yaml": ("load", "load_all", "unsafe_load", "full_load"),
}


def violations(source: str) -> list[str]:
    """The forbidden calls and names, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if name in FORBIDDEN.get(module, ()) or (module, name) == ("torch", "jit"):
                found.append(f"line {node.lineno}: {module}.{name}")
        if isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN:
            found += [f"line {node.lineno}: from {node.module} import {a.name}" for a in node.names]
        if isinstance(node, ast.Call):
            arguments = {word.arg: word.value for word in node.keywords}
            safe = arguments.get("weights_only")
            loads = ast.unparse(node.func) == "torch.load"
            if (loads or safe) and not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"line {node.lineno}: weights_only is not True")
            if "trust_remote_code" in arguments:
                found.append(f"line {node.lineno}: trust_remote_code")
    return found


def test_no_source_runs_code_from_a_file():
    assert len(SOURCES) > 50
    assert {name: found for name, text in SOURCES.items() if (found := violations(text))} == {}


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
def test_violation_is_found(source):
    assert len(violations(source)) == 1
