"""Executes main.ipynb in a Jupyter kernel and shows its output live."""

import asyncio
import copy
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from workflow import errors
from workflow.config.load import OVERRIDES_VARIABLE, PROFILE_VARIABLE
from workflow.errors import WorkflowError
from workflow.files import project_file, write_text_atomic
from workflow.tools.terminal import Stopped, raise_on_signals, stop_signals

NAME = "main.ipynb"
SILENT_SECONDS = 8  # after this, a line says that the notebook is still working
SKIP_TAG = "skip-execution"  # the tag of cells for interactive use only


def execute(profile: str | None, overrides: Sequence[str], runs: Path, in_place: bool) -> None:
    """Executes the notebook and writes it to the folder of its run in `runs`, as .ipynb and .html.

    Ctrl-C and stop signals go to the kernel, where the run saves a checkpoint; then Stopped is
    raised. in_place: also writes the output into main.ipynb.
    If a cell fails, raises WorkflowError with the exit code of the error in the kernel.
    """
    if not (file := project_file(NAME)).is_file():
        raise WorkflowError(file, "there is no such file", "restore it")
    notebook = nbformat.read(file, as_version=4)
    settings = [os.environ.get(OVERRIDES_VARIABLE, ""), shlex.join(overrides)]
    folders = str(file.parent.resolve()), os.environ.get("PYTHONPATH")
    modules = os.pathsep.join(filter(None, folders))  # the kernel then imports this project
    environment = os.environ | {OVERRIDES_VARIABLE: " ".join(settings), "PYTHONPATH": modules}
    # without installed kernels, it is the one of this Python: JUPYTER_PATH can have another python3
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    # without this log level, each run warns that loopback is not encrypted
    options = {"km": kernel, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    options |= {"skip_cells_with_tag": SKIP_TAG, "record_timing": False, "coalesce_streams": True}
    client = LiveClient(notebook, **options)
    try:
        client.execute(env=environment | ({PROFILE_VARIABLE: profile} if profile else {}))
    except (CellExecutionError, RuntimeError) as error:  # RuntimeError: the kernel died
        if client.stopped_by:
            print("Stopped; the same command continues", file=sys.stderr)
            raise Stopped(client.stopped_by) from None
        write_notebook(notebook, runs / "failed")
        raise one_line_error(error, runs / "failed.ipynb") from None
    finally:
        raise_on_signals()  # the end of asyncio's loop has reset them
    folder = run_folder(notebook) or runs
    write_notebook(notebook, folder / file.stem)
    if in_place:
        write_text_atomic(file, nbformat.writes(notebook) + "\n", "paths.runs")
    print(f"\nMade:\n  {folder}/main.html   the executed notebook: open it in a browser")
    print(f"  {folder}/main.ipynb  the same as a notebook\nLook:")
    print("  make tensorboard   curves and samples")
    print("  make lab           the notebook in JupyterLab")
    print(f"\nSeconds ({sum(client.seconds.values()):.0f} in all):")
    for title, seconds in client.seconds.items():
        print(f"{seconds:7.1f}  {title}")


class LiveClient(NotebookClient):
    """Prints what the kernel prints, and sends it the signals that this process gets."""

    stopped_by = 0  # number of the last signal
    section = "Start"  # the title of the section whose cells are executed

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seconds: dict[str, float] = {}  # of each section
        self.last_output = time.monotonic()

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
            self.last_output = time.monotonic()
        return super().process_message(msg, cell, cell_index)

    async def print_if_silent(self, start: float) -> None:
        """Prints a line whenever the kernel has printed nothing for `SILENT_SECONDS`."""
        while True:
            await asyncio.sleep(1)
            if (now := time.monotonic()) - self.last_output >= SILENT_SECONDS:
                self.last_output = now
                print(f"… {self.section}: working, {now - start:.0f} s", file=sys.stderr)

    async def async_start_new_kernel(self, **options):
        with suppress(NotImplementedError):  # Windows
            for number in (signal.SIGINT, *stop_signals()):
                asyncio.get_running_loop().add_signal_handler(number, self.stop, number)
        await super().async_start_new_kernel(**options)

    async def async_execute_cell(self, cell, *arguments, **options):
        if self.stopped_by:  # between two cells, the kernel ignores an interrupt
            raise DeadKernelError("stopped between two cells")
        if title := re.match(r"## (.+)", cell.source):
            self.section = title[1]
            print(f"\n--- {self.section}")
        start = self.last_output = time.monotonic()
        heartbeat = asyncio.ensure_future(self.print_if_silent(start))
        try:
            return await super().async_execute_cell(cell, *arguments, **options)
        finally:
            heartbeat.cancel()
            seconds = self.seconds.get(self.section, 0.0)
            self.seconds[self.section] = seconds + time.monotonic() - start

    def stop(self, number: int) -> None:
        """The first signal interrupts the cell, which saves. A second signal kills the kernel."""
        again, self.stopped_by = bool(self.stopped_by), number
        if self.km.has_kernel:
            number = signal.SIGKILL if again else signal.SIGINT
            self.stopping = asyncio.ensure_future(self.km.signal_kernel(number))


def one_line_error(error: Exception, output: Path) -> WorkflowError:
    """The error of a cell or of a dead kernel; exit code: of a WorkflowError, otherwise 1."""
    name, what = getattr(error, "ename", ""), getattr(error, "evalue", error)
    if name == "AssertionError" and (claim := failed_claim(str(error))):
        name, what = "the claim failed", f"{claim}, {what}".removesuffix(", ")
    fix = f"read the output so far in {output}"
    result = WorkflowError(NAME, f"{name}: {what}".removeprefix(": "), fix)
    result.exit_code = getattr(getattr(errors, name, None), "exit_code", 1)
    return result


def failed_claim(traceback: str) -> str:
    """The condition of the assert that failed in a cell, or "" if something else failed."""
    from nbconvert.filters import strip_ansi  # 1 s, only needed here

    line = re.search(r"^-+> *\d+ +(.*)$", strip_ansi(traceback), re.MULTILINE)
    return line[1].removeprefix("assert ") if line and line[1].startswith("assert ") else ""


def run_folder(notebook: NotebookNode) -> Path | None:
    """The folder of the run, as the executed notebook printed it."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    texts = "\n".join(output.get("text", "") for output in outputs)
    found = re.findall(r"^Run folder: (.+)$", texts, re.MULTILINE)
    return Path(found[-1]) if found else None


def write_notebook(notebook: NotebookNode, stem: Path) -> None:
    """Writes an executed notebook as .ipynb and .html; its links lead to this project's files."""
    from nbconvert import HTMLExporter  # 1 s that a stopped run does not need

    notebook = copy.deepcopy(notebook)
    project = Path(os.path.relpath(project_file("."), stem.parent)).as_posix()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!\w+:|#)", f"]({project}/", cell.source)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    write_text_atomic(stem.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n", "paths.runs")
    write_text_atomic(stem.with_suffix(".html"), page, "paths.runs")
