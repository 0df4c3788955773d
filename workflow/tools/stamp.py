"""The provenance of an executed notebook: commit, versions, machine, weights, text and steps."""

import hashlib
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat

from workflow.files import project_file
from workflow.training import hardware
from workflow.training.metrics import git_commit

CELLS_HASH = "code cells sha256"


def stamp(notebook: Path, run: Any) -> str:
    """One fact per line. run: a finished `workflow.training.run.Run`."""
    began = [row for row in run.history if "began" in row]
    ends = [row["step"] for row in began[1:]] + [run.global_step]
    steps = {
        f"steps {row['step'] + 1} to {end}": f"from {row['began']} at commit {row['commit']}"
        for row, end in zip(began, ends)
        if end > row["step"]
    }
    libraries = (f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    facts = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {git_commit()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *libraries]),
        "machine": hardware.describe_device(run.config.device),
        "run": run.name,
        "weights": f"{run.provenance['name']}, sha256 {run.provenance['weights_sha256'][:16]}",
        "text": f"{run.corpus.name}, sha256 {run.corpus.text_sha256[:16]}",
        **steps,
        CELLS_HASH: cells_sha256(notebook),
    }
    return "\n".join(f"{name:<19}{fact}" for name, fact in facts.items())


def cells_sha256(notebook: Path) -> str:
    """The hash of all code cells of a notebook, without their outputs."""
    cells = nbformat.read(project_file(notebook), as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()
