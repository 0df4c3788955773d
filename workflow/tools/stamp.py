"""Who made this: commit and versions, weights and text, and which steps were computed when."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat

from workflow.training import hardware

ROOT = Path(__file__).parent.parent.parent
CELLS = "code cells sha256"


def commit() -> str:
    """The commit of this code, with a + where tracked files differ from it, if there is one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def cells_sha256(notebook: Path) -> str:
    """The hash of a notebook's code cells, which outputs and text leave as it is."""
    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def stamp(notebook: Path, run: Any) -> str:
    """What an executed notebook says of itself; run: a `Run`, as it ends."""
    made_of = run.made_of
    facts = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {commit()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")]
        ),
        "machine": hardware.machine(run.device),
        "run": f"{run.name} (the end is the hash of settings, weights and text)",
        "weights": f"{made_of['name']}, sha256 {made_of['weights_sha256'][:16]}",
        "text": f"{run.corpus.name}, sha256 {run.corpus.text_sha256[:16]}",
        **hands(run.history, run.step),
        CELLS: cells_sha256(notebook),
    }
    return "\n".join(f"{name:<19}{fact}" for name, fact in facts.items())


def hands(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, str]:
    """Which steps were computed when, and by which commit, up to step `last`."""
    began = [row for row in rows if "began" in row]
    ends = [row["step"] for row in began[1:]] + [last]
    return {
        f"steps {row['step'] + 1} to {end}": f"from {row['began']} at commit {row['commit']}"
        for row, end in zip(began, ends)
        if end > row["step"]
    }
