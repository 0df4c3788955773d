"""The story, with and without Jupyter.

`python -m workflow.notebook` executes main.ipynb as nbconvert would, shows its output while it
runs, and keeps it in the run's folder as a notebook and as an HTML page. `run_cells` runs the same
cells as a plain script.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat

from workflow.config.load import CHANGES_VARIABLE, PROFILE_VARIABLE
from workflow.errors import WorkflowError
from workflow.files import write_text_atomic
from workflow.training.signals import raise_on_sigterm

STORY = Path("main.ipynb")
RUNS = Path("runs")
SKIPPED = "skip-execution"  # the tag of cells that are for an interactive reader only


def run_cells(path: Path = STORY, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a notebook's code cells in one namespace, without Jupyter, and returns it.

    parameters: values that replace those of the cell tagged `parameters`, as papermill does.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and SKIPPED not in tags:
            code = compile(cell.source, f"{path}, cell {number}", "exec")
            exec(code, namespace)  # noqa: S102, the project's own cells
            if "parameters" in tags:
                namespace.update(parameters or {})
    return namespace


def execute(path: Path = STORY, in_place: bool = False) -> Path:
    """Executes a notebook with nbclient, printing as it goes; returns the folder of the run.

    The last line `Run folder: …` of its output says where that is; a notebook that fails is kept in
    `runs` itself. Ctrl-C and SIGTERM are passed on to the kernel, where the run saves itself.
    in_place: keeps the output in the notebook itself, too.
    """
    from nbclient.exceptions import CellExecutionError

    if not path.is_file():
        raise WorkflowError(path, "there is no such file", "run this in the project's own folder")
    story = nbformat.read(path, as_version=4)
    client = live_client(story)
    try:
        client.execute()
    except (CellExecutionError, RuntimeError) as error:  # the latter of a dead kernel
        if client.stopped_by:
            print("Stopped; run it again, and it goes on", file=sys.stderr)
            sys.exit(128 + client.stopped_by)
        write(story, RUNS / "failed")
        what = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        what = " ".join(what.split())  # one line
        sys.exit(f"error: {path}: {what}; see how far it came in {RUNS / 'failed.ipynb'}")
    folder = run_folder(story) or RUNS
    write(story, folder / path.stem)
    if in_place:
        write_text_atomic(path, nbformat.writes(story) + "\n", "paths.runs")
    return folder


def live_client(story: nbformat.NotebookNode):
    """A client that prints what the kernel prints, and passes signals on to it."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    class LiveClient(NotebookClient):
        stopped_by = 0  # the number of the signal

        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] == "stream":
                print(msg["content"]["text"], end="", flush=True)
            return super().process_message(msg, cell, cell_index)

        async def async_start_new_kernel(self, **options):
            with suppress(NotImplementedError):  # Windows
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, self.stop, number)
            await super().async_start_new_kernel(**options)

        async def async_execute_cell(self, *arguments, **options):
            if self.stopped_by:  # a kernel that is between two cells takes no notice
                raise DeadKernelError("stopped between two cells")
            return await super().async_execute_cell(*arguments, **options)

        def stop(self, number: int) -> None:
            """The first signal interrupts the cell, which saves; a second kills the kernel."""
            again, self.stopped_by = bool(self.stopped_by), number
            if self.km.has_kernel:
                number = signal.SIGKILL if again else signal.SIGINT
                self.stopping = asyncio.ensure_future(self.km.signal_kernel(number))

    return LiveClient(
        story,
        timeout=None,
        kernel_name="python3",
        skip_cells_with_tag=SKIPPED,
        record_timing=False,
        coalesce_streams=True,
        # else each run warns that loopback is not encrypted
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )


def run_folder(story: nbformat.NotebookNode) -> Path | None:
    """What the executed story printed as its run's folder."""
    texts = (output.get("text", "") for cell in story.cells for output in cell.get("outputs", []))
    found = re.findall(r"^Run folder: (.+)$", "\n".join(texts), re.MULTILINE)
    return Path(found[-1]) if found else None


def write(story: nbformat.NotebookNode, stem: Path) -> None:
    """Writes an executed notebook as .ipynb and as .html."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(story)
    write_text_atomic(stem.with_suffix(".ipynb"), nbformat.writes(story) + "\n", "paths.runs")
    write_text_atomic(stem.with_suffix(".html"), page, "paths.runs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute main.ipynb and keep what it shows.")
    parser.add_argument("--profile", help="full, pretrain, cpu, quick or ci")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=100"
    )
    parser.add_argument("--in-place", action="store_true", help="keep it in main.ipynb, too")
    arguments = parser.parse_args()
    if arguments.profile:
        os.environ[PROFILE_VARIABLE] = arguments.profile  # the kernel inherits it
    if arguments.set:
        os.environ[CHANGES_VARIABLE] = shlex.join(arguments.set)
    raise_on_sigterm()
    try:
        folder = execute(in_place=arguments.in_place)
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "exit_code", 130))
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(
        f"\nMade:\n"
        f"  {folder}/main.html   the executed story: open it in a browser\n"
        f"  {folder}/main.ipynb  the same as a notebook\n"
        f"Look:\n"
        f"  make tensorboard   curves and samples\n"
        f"  make lab           the notebook in JupyterLab"
    )


if __name__ == "__main__":
    main()
