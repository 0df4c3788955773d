"""main.ipynb calls, shows and asserts; `main.py run` executes it and can be stopped."""

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import nbformat
import pytest
from test_layout import CELLS

from conftest import ROOT, popen, python_main, read_losses
from workflow.tools import notebook

RUN = ("run", "--profile", "ci")
SKIP_TAG = "skip-execution"
NOTEBOOK = nbformat.read(ROOT / "main.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXTS = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"][1:]
# parts of cells
SETUP = ("PROFILE = None", "import torch", "load_config(", "load_reference(", "load_corpus(")
SETUP += ("open_run(",)
TRAIN = "run.train(config.train.steps)"
SHORT_RUN = (
    "train.validate_every=100 train.checkpoint_every=100 sample.every=100 sample.new_tokens=8 "
    "mutations.steps=1 proof.quick=true proof.new_tokens=4"
)


def cell_with(part: str) -> nbformat.NotebookNode:
    (found,) = [cell for cell in CODE if part in cell.source]
    return found


def streams(notebook) -> str:
    """All that a notebook printed."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_defines_and_installs_nothing_and_its_cells_are_short():
    nodes = list(ast.walk(ast.parse("\n".join(CELLS))))
    assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in nodes)
    assert not re.search(r"pip install|google\.colab", "\n".join(CELLS))
    lengths = [len(cell.source.splitlines()) for cell in CODE]
    assert len(lengths) <= 32 and max(lengths) <= 15 and median(lengths) <= 6


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.split("\n")[0][:40])
def test_each_text_asks_a_question_says_what_to_see_and_is_short(text):
    paragraphs = [part for part in text.split("\n\n") if not re.match(r"#|\d\. |<|\$\$", part)]
    exercise = "<details>" in text
    assert exercise or re.match(r"\*[A-Z][^*]+\?\*", paragraphs[0])
    assert exercise or paragraphs[-1].startswith("**You should see**")
    for paragraph in paragraphs:
        assert len(re.findall(r"[.?!](?:\s|\*|$)", re.sub("`.+?`", "", paragraph))) <= 6


def test_the_changes_of_the_exercise_exist():
    from workflow.proof import mutations

    line = cell_with("CHANGE = ").source.splitlines()[0]
    names = [*re.findall('"(.+?)"', line), *re.findall('`"(.+?)"`', "".join(TEXTS))]
    assert len(names) >= 6 and [name for name in names if name not in mutations.MUTATIONS] == []


def test_the_committed_output_belongs_to_the_code():
    """Or there is no output: `make notebook-run` makes it, `make notebook-strip` removes it."""
    from workflow.tools import stamp

    counts = [cell.execution_count for cell in CODE]
    if not any(cell.outputs for cell in CODE):
        assert set(counts) == {None}
        return
    assert counts == [*range(1, len(CELLS) + 1), None]  # the last cell is for readers
    kinds = {output.output_type for cell in CODE for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}
    stamped = re.search(rf"^{stamp.CELLS_HASH} +(\w+)$", streams(NOTEBOOK), re.MULTILINE)
    assert stamped[1] == stamp.cells_sha256(ROOT / "main.ipynb")
    assert not re.search(r"^made .*\+$", streams(NOTEBOOK), re.MULTILINE)  # +: uncommitted code
    assert (ROOT / "main.ipynb").stat().st_size < 800_000
    assert "\r" not in streams(NOTEBOOK)


def printed_lines(text: str) -> list[str]:
    """The lines of a text, without progress bars, dates and measured times."""
    lines = (line.rpartition("\r")[2].strip() for line in text.splitlines())
    varying = r"\d+%\||^About | checks in |checks passed|^made |^steps \d"
    return [line for line in lines if line and not re.search(varying, line)]


def write_cells(project, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[-1].metadata["tags"] = [SKIP_TAG] if sources[-1] == "%no" else []
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "main.ipynb")


def test_the_notebook_is_executed_live(here, project, monkeypatch):
    monkeypatch.setenv("SMOLLM_SET", f"{SHORT_RUN} train.steps=200 train.resume_steps=20")
    code, shown, error = here(*RUN, "--in-place")
    assert code == 0, error
    (folder,) = (project / "runs").glob("ci-[0-9a-f]*")
    executed = nbformat.read(folder / "main.ipynb", as_version=4)
    in_place = nbformat.read(project / "main.ipynb", as_version=4)
    code_cells = ([c for c in n.cells if c.cell_type == "code"] for n in (in_place, executed))
    assert next(code_cells) == next(code_cells)  # other cells differ in their links
    lines = printed_lines(streams(executed))
    assert f"Run folder: runs/{folder.name}" in lines
    assert "Found: 20 steps, largest difference of a loss: 0.0" in lines
    parts = re.split("^--- ", shown.partition("\nMade:")[0], flags=re.MULTILINE)[1:]
    silent = [part.split("\n")[0] for part in parts if "\nFound: " not in part]
    assert silent == ["Provenance", "Where to look next"]  # each other section says what it found
    assert set(lines) <= set(printed_lines(shown))  # the terminal shows all of it
    assert f"Made:\n  runs/{folder.name}/main.html" in shown
    sections = re.findall(r"^ +[\d.]+  (.+)$", shown.partition("\nSeconds (")[2], re.MULTILINE)
    titles = [c.source.split("\n")[0][3:] for c in NOTEBOOK.cells if c.source.startswith("## ")]
    assert sections == ["Start", *titles]
    assert (folder / "main.html").stat().st_size > 100_000
    checkpoints = {file.name for file in (project / "checkpoints" / folder.name).glob("*.pt")}
    assert checkpoints == {"checkpoint_200.pt", "checkpoint_220.pt"}
    text = (folder / "main.ipynb").read_text("utf-8")
    assert text.count('"image/png"') >= 3 and text.count('"text/html"') >= 4  # figures, tables


@pytest.mark.slow
def test_nbconvert_executes_the_full_notebook(project):
    """All 5000 + 50 steps of profile ci."""
    command = "-m jupyter nbconvert --to notebook --execute main.ipynb --output executed.ipynb"
    environment = os.environ | {"SMOLLM_PROFILE": "ci"}
    subprocess.run([sys.executable, *command.split()], cwd=project, env=environment, check=True)
    shown = streams(nbformat.read(project / "executed.ipynb", as_version=4))
    (folder,) = re.findall(r"^Run folder: runs/(.+)$", shown, re.MULTILINE)
    checkpoints = {file.name for file in (project / "checkpoints" / folder).glob("*.pt")}
    assert {"checkpoint_5000.pt", "checkpoint_5050.pt"} <= checkpoints
    assert len(re.findall(r"Step: \d+00, Train Loss|Step: \d0, Resume Loss", shown)) == 50 + 5
    assert "Found: 50 steps, largest difference of a loss: 0.0" in shown


def test_a_long_silent_cell_prints_that_it_is_working(here, project, monkeypatch):
    monkeypatch.setattr(notebook, "SILENT_SECONDS", 1)
    source = "import time\ntime.sleep(2.5)\nprint('end')\ntime.sleep(1)"
    title = nbformat.v4.new_markdown_cell("## A long section\n\nWords.")
    cells = [title, nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "main.ipynb")
    code, shown, error = here(*RUN)
    assert code == 0, error
    assert "\n--- A long section\nend\n" in shown
    assert re.match(r"… A long section: working, \d+ s\n", error)


@pytest.mark.slow
def test_every_claim_also_holds_in_bfloat16_and_when_the_log_is_replayed(here, monkeypatch):
    bf16 = "train.precision=bfloat16 train.steps=40 train.resume_steps=10"
    monkeypatch.setenv("SMOLLM_SET", f"{SHORT_RUN} {bf16}")
    code, shown, error = here(*RUN)
    assert code == 0, error
    exact = "Found: 10 steps, largest difference of a loss: 0.0"
    assert exact in shown and "Nothing to train" not in shown
    code, shown, error = here(*RUN)  # again: it is read from the log
    assert code == 0, error
    assert exact in shown and "read from its log" in shown and "Nothing to train" in shown


def test_settings_reach_the_kernel_and_its_error_is_that_of_the_commands(
    here, project, monkeypatch
):
    source = "from workflow.config import load_config\nprint(load_config())\n"
    write_cells(project, source + "load_config(overrides=['train.steps=-1'])", "%no")
    monkeypatch.setenv("SMOLLM_SET", "run.seed=1 train.steps=8")
    code, shown, error = here(*RUN, settings=["train.steps=9"])
    changed = "changed: run.seed=1, train.steps=9"  # what is in force
    assert f"Profile ci: set by SMOLLM_PROFILE; {changed}\n" in shown
    executed = nbformat.read(project / "runs" / "failed.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == shown
    assert executed.cells[1].execution_count is None  # for readers only

    wrong = here("run", settings=["train.steps=-1"])  # refused before a kernel starts
    command_error = wrong[2].removeprefix("error: ").strip()
    assert code == wrong[0] == 2 and "train.steps=-1: -1 does not fit" in command_error
    where = "read the output so far in runs/failed.ipynb"
    assert error.splitlines()[-1] == f"error: main.ipynb: ConfigError: {command_error}; {where}"


def test_a_failed_claim_is_named_in_one_line(here, project):
    write_cells(project, "x = 1\nassert x == 1", "if x:\n    assert x == 3")
    code, _, error = here(*RUN, settings=["paths.runs=out"])
    line = "error: main.ipynb: the claim failed: x == 3; read the output so far in out/failed.ipynb"
    assert code == 1 and error.splitlines()[-1] == line
    assert (project / "out" / "failed.html").is_file()


def test_the_links_of_an_executed_notebook_lead_to_the_project(tmp_path):
    text = "[a](docs/glossary.md#nat) [b](https://example.org) [c](#d)"
    original = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    notebook.write_notebook(original, tmp_path / "runs" / "main")
    written = nbformat.read(tmp_path / "runs" / "main.ipynb", as_version=4).cells[0].source
    link, rest = re.fullmatch(r"\[a\]\((.+)#nat\)(.+)", written).groups()
    assert (tmp_path / "runs" / link).samefile(ROOT / "docs" / "glossary.md")
    assert rest == " [b](https://example.org) [c](#d)" and original.cells[0].source == text


def test_without_main_ipynb_the_error_is_one_line(refused, project):
    (project / "main.ipynb").unlink()
    assert refused(2, "run").startswith("error: main.ipynb: there is no such file; ")


# --- stops ----------------------------------------------------------------------------------------

STOPPED = "Stopped; the same command continues\n"


def running(project) -> list[str]:
    """The other processes that work in a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if place.resolve() == project.resolve() and place.parent.name != str(os.getpid()):
                found.append((place.parent / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_signal_reaches_the_kernel_which_saves_and_the_next_run_continues(here, project):
    cells = [cell_with(part).source for part in (*SETUP, TRAIN)]
    cells[0] = "PROFILE, OVERRIDES = 'ci', ['train.steps=600', 'train.log_every=50']"
    write_cells(project, *cells)
    for moment, number in (("Step: 100,", signal.SIGTERM), ("Step: 300,", signal.SIGINT)):
        with popen(project, python_main(*RUN, settings=())) as process:
            next(line for line in process.stdout if moment in line)
            process.send_signal(number)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert re.search(r"^Saved checkpoint_\d+\.pt$", rest, re.MULTILINE)
        assert re.sub(r"^….*\n", "", errors, flags=re.MULTILINE) == STOPPED  # a busy machine
        assert running(project) == []
    code, _, error = here(*RUN)
    assert code == 0, error
    assert list(read_losses(project)) == list(range(1, 601))


@pytest.mark.slow
def test_a_second_signal_ends_a_kernel_that_does_not_stop(project):
    source = """
import time
for _ in range(3):
    try:
        print("working", flush=True)
        time.sleep(20)
    except KeyboardInterrupt:
        pass"""
    write_cells(project, source)
    with popen(project, python_main(*RUN, settings=())) as process:
        for _ in range(2):
            assert process.stdout.readline() == "working\n"
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.sub(r"^….*\n", "", errors, flags=re.MULTILINE) == STOPPED  # a busy machine
    assert running(project) == []
