"""`make setup` chooses a build of torch; `make lab` starts with the environment's own kernel."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")
PIP = """#!/bin/sh
# an imitated python: notes what pip should install; download.pytorch.org may be unreachable
case "$*" in *" pip install "*) echo "$*" >> pip.txt; esac
case "$*" in *download.pytorch.org*) exit $UNREACHABLE; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI's torch is small")
@pytest.mark.parametrize(
    ("gpu", "variable", "unreachable", "cpu_build", "said"),
    [
        (False, "", 0, True, "Installing torch's CPU build"),
        (True, "", 0, False, "Installing requirements.txt"),
        (True, "TORCH=cpu", 0, True, "Installing torch's CPU build"),
        (False, "", 1, True, "cannot be reached: pip installs the build of its own index"),
    ],
)
def test_setup_takes_the_cpu_build_without_a_gpu(
    tmp_path, gpu, variable, unreachable, cpu_build, said
):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    executable(tmp_path / ".venv/bin/python", PIP)
    found = "echo GPU 0: NVIDIA H100" if gpu else "exit 9"
    executable(tmp_path / "bin/nvidia-smi", f"#!/bin/sh\n{found}\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "UNREACHABLE": str(unreachable)}
    command = ["make", "setup", *variable.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stderr
    first, *rest = (tmp_path / "pip.txt").read_text().splitlines()
    (pin,) = re.findall(r"^torch==.+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert (first.endswith(f"/whl/cpu {pin}") and "--no-deps" in first) == cpu_build
    assert "-r requirements.txt" in (rest[0] if cpu_build else first)


@pytest.fixture
def foreign_kernel(tmp_path, monkeypatch) -> Path:
    """Another kernel named python3, in JUPYTER_PATH."""
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "foreign"}
    file = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return file


def reply(url: str) -> dict:
    """The JSON of a server that may not listen yet."""
    for _ in range(240):
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url) as answer:  # noqa: S310
            return json.load(answer)
        time.sleep(0.5)
    raise TimeoutError(url)


@pytest.mark.skipif(not (ROOT / ".venv/bin/jupyter").exists(), reason="needs make setup")
def test_lab_starts_also_as_root_with_the_kernel_of_this_python(foreign_kernel, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(ROOT / ".venv" / "bin")
    for name in ("Makefile", "main.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / ".installed").touch()
    environment = os.environ | {"JUPYTER_TOKEN": "secret", "BROWSER": "true"}
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(["make", "lab"], cwd=tmp_path, env=environment, **options) as lab:
        try:
            lines = (line for line in lab.stderr if "://localhost" in line)
            (address,) = re.findall(r"http://localhost:\d+/", next(lines))
            (kernel,) = reply(f"{address}api/kernelspecs?token=secret")["kernelspecs"].values()
        finally:
            os.killpg(lab.pid, signal.SIGKILL)
    assert kernel["name"] == "python3" and kernel["spec"]["display_name"] != "foreign"


def test_run_executes_the_notebook_with_this_python(foreign_kernel, here, project):
    cell = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project / "main.ipynb")
    code, printed, error = here("run", "--profile", "ci")
    assert code == 0 and sys.executable in printed, error
