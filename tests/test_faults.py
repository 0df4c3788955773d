"""What goes wrong outside: one line, its exit code, and nothing is lost."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time

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


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def keep_weights_only(path) -> None:
    torch.save(checkpoint.load(path)["model"], path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, r": record \S+ is damaged; resume from checkpoint_10\.pt, the newest good"),
        (keep_weights_only, "it has 20 weights, but no moments, .* it can be evaluated, not"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(refused, trained, project, damage, words):
    damage(trained)
    before = files(project)
    line = refused(3, "resume", str(trained), settings=SHORT)
    assert str(trained) in line and re.search(words, line), line
    assert files(project) == before


def test_training_settings_that_differ_are_a_table_and_can_be_allowed(here, trained):
    settings = (*SHORT, "train.learning_rate=0.001", "train.betas=[0.9, 0.99]")
    resume = ("resume", str(trained), "--allow", "train.betas")
    code, _, error = here(*resume, settings=settings)
    assert code == 3 and "--set train.learning_rate=0.001 --allow train.learning_rate" in error
    assert re.search(r"^config.train.learning_rate +0.003 +0.001$", error, re.MULTILINE)
    assert re.search(r"^config.train.betas.1 +0.95 +0.99$", error, re.MULTILINE)
    code, _, notes = here(*resume, "--allow", "train.learning_rate", settings=settings)
    assert code == 0 and "train.betas.1 as allowed: the resume is not exact" in notes
    saved = checkpoint.load(trained.with_name("checkpoint_25.pt"))
    assert saved["config"]["train"]["betas"] == [0.9, 0.99]


def test_what_is_only_unusual_is_noted_and_resumed(here, trained):
    state = checkpoint.load(trained)
    state["model"] = {
        f"module._orig_mod.{name.removeprefix('model.')}": tensor  # as in LlamaModel
        for name, tensor in state["model"].items()
    }
    state["environment"]["device"] = "NVIDIA H100"
    state["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    state["random"].pop("python")
    checkpoint.save(trained, state)
    code, _, notes = here("resume", str(trained.parent), "--allow", "random", settings=SHORT)
    assert code == 0
    assert "Note: the prefixes `module.` and `_orig_mod.` in checkpoint_20.pt are" in notes
    assert "NVIDIA H100" in notes and "no longer bit-exact" in notes


def test_a_checkpoint_is_evaluated_also_if_it_holds_only_weights(here, refused, trained):
    words = ("--data", "input.txt", "--window", "64", "--stride", "32", "--windows", "9")
    pattern = r"loss (\d\.\d{4}), perplexity .* bits per byte .*every 32\)$"

    def loss(model: str) -> float:
        code, printed, _ = here("evaluate", model, *words)
        assert code == 0
        return float(re.search(pattern, printed, re.MULTILINE)[1])

    own = loss(str(trained))
    assert own < loss("reference")
    keep_weights_only(trained)
    assert loss(str(trained)) == own
    one_layer = ["models.tiny.architecture.num_hidden_layers=1"]
    assert "model.layers.1" in refused(3, "evaluate", str(trained), *words, settings=one_layer)


def change_tokenizer(path) -> None:
    file = path.with_name("tokenizer.json")
    content = json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(content))


def change_dtype(path) -> None:
    state = checkpoint.load(path)
    state["model"]["model.norm.weight"] = state["model"]["model.norm.weight"].bfloat16()
    checkpoint.save(path, state)


@pytest.mark.parametrize("words", [("evaluate", "--data", "input.txt"), ("export", "out")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tokenizer, "json: this is not the tokenizer that the run was trained with"),
        (change_dtype, "model.norm.weight is torch.bfloat16, expected torch.float32"),
    ],
)
def test_a_changed_tokenizer_or_dtype_of_a_run_is_refused(refused, trained, change, message, words):
    change(trained)
    assert message in refused(3, words[0], str(trained), *words[1:])


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


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda process: process.send_signal(signal.SIGTERM), 143),
        (lambda process: process.send_signal(signal.SIGHUP), 129),
        (lambda process: process.stdout.close(), 141),  # as `| head` does
    ],
)
def test_a_stop_saves_at_the_next_safe_point(project, stop, code):
    with popen(project, python_main("train", settings=LONG)) as process:
        assert any("Step: 30," in text for text in process.stdout)
        stop(process)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == code and "Traceback" not in errors
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
    "settings",
    [
        ("train.validate_every=1", "train.validation_tokens=20000"),
        ("sample.every=1", "sample.new_tokens=400"),
    ],
)
def test_sigterm_while_evaluating_or_sampling_saves(project, settings):
    process = fork_main(project, "train", settings=(*LONG, *settings))
    process.wait_for("Step: 3,")
    process.send_signal(signal.SIGTERM)
    code, printed = process.finish()
    (step,) = re.findall(r"^Saved checkpoint_(\d+)", printed, re.MULTILINE)
    assert code == 143 and 3 <= int(step) < 9
    (path,) = project.glob("checkpoints/*/checkpoint_*.pt")
    assert checkpoint.load(path)["step"] == int(step)


def test_a_run_in_use_is_refused_naming_the_process(refused, project):
    first = fork_main(project, "train", settings=LONG)
    first.wait_for("Step: 1,")
    line = refused(7, "train", settings=LONG)
    assert f"in use by process {first.pid} on {socket.gethostname()}; wait for it" in line
    first.send_signal(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL


@pytest.mark.parametrize(("presses", "saved"), [(1, ["checkpoint_1.pt"]), (2, [])])
def test_ctrl_c_once_saves_and_twice_ends_at_once(project, presses, saved):
    """A step takes seconds: the second Ctrl-C comes before its end."""
    settings = ("train.batch_size=6000", "train.micro_batch_size=100", "train.steps=3")
    process = fork_main(project, "train", settings=(*settings, "train.validation_tokens=64"))
    process.wait_for("3 steps of 6000")
    for _ in range(presses):
        time.sleep(0.3)  # into the step; two within one call of torch are one to Python
        process.send_signal(signal.SIGINT)
    code, printed = process.finish()
    assert code == 130 and "Traceback" not in printed
    assert re.findall(r"^Saved (.*)", printed, re.MULTILINE) == saved
    assert [path.name for path in project.glob("checkpoints/*/*.pt*")] == saved


# --- disks ----------------------------------------------------------------------------------------


WAIT = "for i in $(seq 300); do ls small/*/.lock && break; sleep 0.1; done; sleep 1;"
FILL = f"({WAIT} cat /dev/zero > small/fill) >/dev/null 2>&1 &"


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="no namespace to mount a small file system in",
)
@pytest.mark.parametrize(
    ("size", "before", "settings", "words"),
    [
        (  # too small from the start
            "1m",
            "",
            (*SHORT, "paths.checkpoints=small"),
            r"small/ci-\w+: 4 checkpoints need 1\.3 MB, .* MB are free; .*paths.checkpoints=PATH",
        ),
        (  # filled by another process, during a save
            "6m",
            FILL,
            ("train.steps=9000", "train.checkpoint_every=100", "paths.checkpoints=small"),
            r"checkpoint_\d+\.pt: it cannot be written \(.+\), it takes 0\.3 MB, 0\.0 MB",
        ),
        # filled by the log
        ("64k", "", ("train.steps=9000", "paths.runs=small"), "--set paths.runs=PATH"),
    ],
)
def test_a_full_disk_is_one_line(project, size, before, settings, words):
    """Trains with a file system of `size` mounted at `small`, in a namespace of its own."""
    (project / "small").mkdir()
    script = f'mount -t tmpfs -o size={size} none small && {before} exec "$@"'
    train = python_main("train", settings=settings)
    result = run_process(project, ["unshare", "-Urm", "sh", "-c", script, "sh", *train])
    assert result.returncode == 6, result.stdout[-500:] + result.stderr
    (line,) = re.findall("^error: .*", result.stderr, re.MULTILINE)
    assert re.search(words, line) and "Traceback" not in result.stderr


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
