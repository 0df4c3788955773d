"""What a command is to its surroundings: streams, encodings, folders, start-up, other systems."""

import json
import os
import subprocess
import sys

import pytest

import main
from conftest import ROOT, SHORT, options, python_main, run_process

TRAIN = python_main("train")
GENERATE = python_main("generate", "x × 中", "--tokens", "1", settings=())


def shell(command: str, words: list[str]) -> list[str]:
    """A line of a shell, with the words as its arguments."""
    return ["sh", "-c", command, "sh", *words]


@pytest.mark.parametrize(
    ("command", "environment", "code", "printed", "error"),
    [
        (GENERATE, {"PYTHONIOENCODING": "cp1252"}, 0, "x × ?", ""),
        (TRAIN, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, 0, "Step: 20,", ""),
        (shell('"$@" >&- 2>&- <&-', TRAIN), {}, 0, "", ""),
        (shell('"$@" >/dev/full', GENERATE), {}, 6, "", "error: stdout: it cannot be written ("),
        (shell('"$@" <&-', python_main("generate")), {}, 2, "", "error: stdin: "),
    ],
)
def test_a_stream_never_ends_a_command(project, command, environment, code, printed, error):
    environment = os.environ | {"SMOLLM_PROFILE": "ci"} | environment
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert printed in done.stdout.decode("cp1252", "replace")
    assert error in done.stderr.decode("utf-8", "replace") and b"Traceback" not in done.stderr
    if "train" in command:
        assert (next(project.glob("checkpoints/*")) / "checkpoint_20.pt").is_file()
    if printed == "Step: 20,":  # the progress bar is not on stdout
        assert b"\r" not in done.stdout and b"Training: " in done.stderr


def test_a_command_works_in_any_folder(project, tmp_path_factory, monkeypatch, capsys):
    """It reads the YAML, input.txt and the cache next to the code, and writes where the user is."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "input.txt").write_text("another text")
    command = [sys.executable, str(project / "main.py"), "train", *options(*SHORT)]
    done = run_process(folder, command)
    assert done.returncode == 0 and "Data: input.txt, " in done.stderr, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "input.txt", "runs"]
    assert (project / ".cache").is_dir() and not (project / "runs").exists()
    (run,) = (folder / "checkpoints").iterdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("workflow.files.PROJECT", project)
    assert main.main(["resume", run.name]) == 0 and (run / "checkpoint_25.pt").is_file()
    capsys.readouterr()  # what is typed is relative to the user's folder:
    assert main.main(["train", "--profile", "ci", "--set", "data.source=input.txt"]) == 2
    assert "train on, one sequence needs 33" in capsys.readouterr().err


# --- start-up -------------------------------------------------------------------------------------


IMPORTED = """
import json, sys, main
slow = "torch torch._dynamo transformers datasets tensorboard matplotlib pandas".split()
for words in json.loads(sys.argv[1]):
    try:
        code = main.main(words)
    except SystemExit as end:
        code = end.code
    print("found", code, *(name for name in slow if name in sys.modules))
"""


def test_a_command_imports_only_what_it_needs(here, project):
    assert here("export", "reference", "model")[0] == 0
    generate = ["generate", "x", "--tokens", "1", "--set", "reference.source=model"]
    commands = [["--help"], ["train", "--help"], ["trian"], ["train", "--no"]]
    wrong = "train.stepz=1", "train.steps=x", "run.name=.."
    commands += [["train", "--set", setting] for setting in wrong]
    commands += [["train", "--profile", "quik"], generate, ["resume", "absent.pt"]]
    done = run_process(project, [sys.executable, "-c", IMPORTED, json.dumps(commands)])
    found = [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")]
    assert found == ["0", "0", *["2"] * 6, "0 torch", "2 torch tensorboard"], done.stderr


# --- other systems --------------------------------------------------------------------------------

OTHER_SYSTEM = """
import builtins, fcntl, os, signal, stat, warnings
get_flags, fsync, import_module = fcntl.fcntl, os.fsync, builtins.__import__
ours = "workflow", "SmolLm3", "main", "__main__", "conftest", "test", "torture", "filelock"

def strict_fsync(number):
    flags = get_flags(number, 3) & os.O_ACCMODE  # F_GETFL
    if flags == os.O_RDONLY and not stat.S_ISDIR(os.fstat(number).st_mode):
        raise OSError(9, "Bad file descriptor")
    fsync(number)

def no_links(*_, **__):
    raise OSError(1314, "A required privilege is not held by the client")

def import_without(name, globals=None, *rest, **more):
    # for this project only: other libraries know which system this really is
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith(ours):
        raise ImportError(name)
    return import_module(name, globals, *rest, **more)

os.fsync, os.symlink, builtins.__import__ = strict_fsync, no_links, import_without
del os.fork, signal.SIGHUP
with warnings.catch_warnings(action="ignore"):
    import filelock  # it warns that it locks in another way; on Windows it has its own
warnings.filterwarnings("error", category=EncodingWarning, module="workflow|SmolLm3|main|__main__")
"""


@pytest.fixture
def other_system(tmp_path_factory) -> dict[str, str]:
    """The environment of a Python like that of Windows: what it lacks, and its encoding."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "sitecustomize.py").write_text(OTHER_SYSTEM)
    variables = {"PYTHONIOENCODING": "cp1252", "PYTHONWARNDEFAULTENCODING": "1"}
    return variables | {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_commands_work_without_fcntl_resource_links_fork_and_utf_8(project, other_system):
    commands = [
        ["train", *options(*SHORT)],
        ["verify", "--quick"],
        ["evaluate", "reference", "--data", "input.txt", "--window", "64", "--windows", "2"],
        ["export", "reference", "my-model"],
        ["generate", "x", "--tokens", "1", *options("reference.source=my-model")],
        ["runs"],
    ]
    program = "import json, sys, main; print([main.main(w) for w in json.loads(sys.argv[1])])"
    command = [sys.executable, "-c", program, json.dumps(commands)]
    done = run_process(project, command, **other_system)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0]", done.stderr


@pytest.mark.slow
def test_all_tests_can_be_collected_without_fcntl_resource_and_fork(other_system):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = run_process(ROOT, command, **other_system)
    assert done.returncode == 0, done.stdout[-2000:]
