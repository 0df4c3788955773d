"""What goes wrong outside: one line, its exit code, and nothing is lost."""

import json
import re
import shutil
import signal
import socket
import subprocess

import pytest
import torch

from conftest import SHORT, fork_main, popen, python_main, run_process
from workflow.training import checkpoint

LONG = ("train.steps=9000", "train.log_every=1")


def files(project) -> dict[str, bytes]:
    """Every file next to checkpoints, by name, also temporary ones."""
    found = (file for file in project.glob("checkpoints/*/*") if not file.name.startswith("."))
    return {str(file.relative_to(project)): file.read_bytes() for file in found}


# --- checkpoints; what exactly is refused: tests/training/test_checkpoint.py, test_resume.py ------


def test_a_checkpoint_is_evaluated_also_if_it_holds_only_weights(here, refused, trained):
    words = ("--data", "input.txt", "--window", "64", "--stride", "32", "--windows", "9")
    pattern = r"loss (\d\.\d{4}), perplexity .* bits per byte .*every 32\)$"

    def loss(model: str) -> float:
        code, printed, _ = here("evaluate", model, *words)
        assert code == 0
        return float(re.search(pattern, printed, re.MULTILINE)[1])

    own = loss(str(trained))
    assert own < loss("reference")
    torch.save(checkpoint.load(trained)["model"], trained)
    assert loss(str(trained)) == own
    one_layer = ["models.tiny.architecture.num_hidden_layers=1"]
    assert "model.layers.1" in refused(3, "evaluate", str(trained), *words, settings=one_layer)
    line = refused(3, "resume", str(trained))
    assert "it has 20 weights, but no moments" in line and "it can be evaluated, not" in line


def test_a_changed_tokenizer_or_dtype_of_a_run_is_refused(refused, trained):
    state = checkpoint.load(trained)
    state["model"]["model.norm.weight"] = state["model"]["model.norm.weight"].bfloat16()
    checkpoint.save(trained, state)
    line = refused(3, "export", str(trained), "out")
    assert "model.norm.weight is torch.bfloat16, expected torch.float32" in line
    checkpoint.save(trained, checkpoint.load(trained.with_name("checkpoint_10.pt")) | {"step": 20})
    file = trained.with_name("tokenizer.json")
    content = json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(content))
    line = refused(3, "export", str(trained), "out")
    assert "json: this is not the tokenizer that the run was trained with" in line


# --- signals --------------------------------------------------------------------------------------


def saved_step(project) -> int:
    """The step of the only checkpoint, which must be sound."""
    assert not list(project.glob("*/*/*.tmp.*"))
    (path,) = project.glob("checkpoints/*/checkpoint_*.pt")
    return checkpoint.load(path)["step"]


def test_sigterm_while_loading_leaves_nothing(project):
    process = popen(project, python_main("train", settings=LONG))
    assert any("Profile ci" in text for text in process.stderr)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (143, "") and "Traceback" not in errors
    assert files(project) == {}


def test_a_closed_pipe_saves(project):
    with popen(project, python_main("train", settings=LONG)) as process:
        assert any("Step: 30," in text for text in process.stdout)
        process.stdout.close()  # as `| head` does
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141 and "Traceback" not in errors
    assert saved_step(project) >= 30


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nohup"), reason="needs nohup")
def test_after_nohup_a_run_goes_on_when_its_terminal_is_closed(project):
    with popen(project, ["nohup", *python_main("train", settings=LONG)]) as process:
        assert any("Step: 30," in text for text in process.stdout)
        process.send_signal(signal.SIGHUP)
        assert any("Step: 60," in text for text in process.stdout)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143 and saved_step(project) >= 60


@pytest.mark.parametrize(
    ("name", "code", "settings"),
    [
        ("SIGINT", 130, ()),
        ("SIGHUP", 129, ()),
        ("SIGTERM", 143, ("train.validate_every=1", "train.validation_tokens=20000")),
        ("SIGTERM", 143, ("sample.every=1", "sample.new_tokens=400")),
    ],
)
def test_a_signal_saves_also_while_evaluating_or_sampling(project, name, code, settings):
    if signal.getsignal(number := getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip("these tests were started with nohup")
    process = fork_main(project, "train", settings=(*LONG, *settings))
    process.wait_for("Step: 3,")
    process.send_signal(number)
    actual, printed = process.finish()
    assert actual == code and "Traceback" not in printed
    assert saved_step(project) in range(3, 60 if settings else 9000)  # also on a busy machine


def test_a_run_in_use_is_refused_naming_the_process(refused, project):
    first = fork_main(project, "train", settings=LONG)
    first.wait_for("Step: 1,")
    line = refused(7, "train", settings=LONG)
    assert f"in use by process {first.pid} on {socket.gethostname()}; wait for it" in line
    first.send_signal(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL


# --- disks ----------------------------------------------------------------------------------------


def test_too_little_space_is_an_error_before_the_first_step(refused, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = refused(6, "train", settings=SHORT)
    words = r"checkpoints/ci-\w+: 4 checkpoints need 1\.3 MB, 1\.0 MB are free; .*"
    assert re.search(f"{words}--set paths.checkpoints=PATH", line)


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="no namespace to mount a small file system in",
)
def test_a_disk_that_the_log_fills_is_one_line(project):
    """Trains with a small file system, mounted in a namespace of its own."""
    (project / "small").mkdir()
    script = 'mount -t tmpfs -o size=64k none small && exec "$@"'
    train = python_main("train", settings=("paths.runs=small", "train.steps=9000"))
    result = run_process(project, ["unshare", "-Urm", "sh", "-c", script, "sh", *train])
    assert result.returncode == 6, result.stdout[-500:] + result.stderr
    (line,) = re.findall("^error: .*", result.stderr, re.MULTILINE)
    assert "--set paths.runs=PATH" in line and "Traceback" not in result.stderr


def test_a_file_size_limit_during_a_save_keeps_what_was_there(refused, trained, project, resource):
    before, limits = files(project), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        line = refused(6, "resume", str(trained), settings=SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"checkpoint_25\.pt: it cannot be written \(.+\), it takes 0\.3 MB", line)
    assert files(project) == before


@pytest.mark.parametrize("key", ["checkpoints", "runs", "cache"])
def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(here, project, key):
    (project / "file").touch()
    code, printed, error = here("train", settings=(*SHORT, f"paths.{key}=file/inside"))
    assert code == 6 and "file/inside" in error and f"--set paths.{key}=PATH" in error
    assert "Training" not in error and printed == ""
