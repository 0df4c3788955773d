"""What an executed notebook says about itself: commit, versions, weights, text, steps."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat

from workflow.training import hardware
from workflow.training.metrics import git_commit

CELLS = "code cells sha256"


def stamp(notebook: Path, run: Any) -> str:
    """The facts, one a line. run: a finished `workflow.training.run.Run`."""
    libraries = (f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    facts = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {git_commit()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *libraries]),
        "machine": hardware.machine(run.config.device),
        "run": f"{run.name} (ends in the hash of settings, weights and text)",
        "weights": f"{run.provenance['name']}, sha256 {run.provenance['weights_sha256'][:16]}",
        "text": f"{run.corpus.name}, sha256 {run.corpus.text_sha256[:16]}",
        **computed_by(run.history, run.global_step),
        CELLS: cells_sha256(notebook),
    }
    return "\n".join(f"{name:<19}{fact}" for name, fact in facts.items())


def computed_by(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, str]:
    """Which steps, up to step `last`, were computed when and by which commit."""
    began = [row for row in rows if "began" in row]
    ends = [row["step"] for row in began[1:]] + [last]
    return {
        f"steps {row['step'] + 1} to {end}": f"from {row['began']} at commit {row['commit']}"
        for row, end in zip(began, ends)
        if end > row["step"]
    }


def cells_sha256(notebook: Path) -> str:
    """The hash of a notebook's code cells; outputs and markdown do not change it."""
    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()
