"""What goes wrong outside: one line, its exit code, and nothing is lost. Each as a real process."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, STORY
from workflow.files import sha256_of
from workflow.training import checkpoint

SHORT = ("train.steps=20", "train.resume_steps=5", "train.checkpoint_every=10", "sample.every=10")


def python(
    story, *arguments: str | bytes, settings=SHORT, **options
) -> subprocess.CompletedProcess:
    """`python main.py …` in a folder, with the ci profile."""
    return subprocess.run(
        command(arguments, settings),
        cwd=story,
        env=os.environ | {"SMOLLM_PROFILE": "ci"},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def command(arguments, settings=SHORT) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "main.py", *arguments, *sets]


def files(story) -> dict[str, bytes]:
    """All that a run leaves to keep, by name, temporary files too."""
    kept = (file for file in story.glob("checkpoints/*/*") if not file.name.startswith("."))
    return {str(file.relative_to(story)): file.read_bytes() for file in kept}


def one_line(result: subprocess.CompletedProcess, code: int) -> str:
    """The line of an error; there must be no other on stderr."""
    assert result.returncode == code, result.stdout[-500:] + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and line.count("; ") >= 1
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of the project with a run of 20 steps; its checkpoints are of 10 and 20."""
    folder = tmp_path_factory.mktemp("finished")
    for name in STORY:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    result = python(folder, "train")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def trained(finished, tmp_path):
    """The same, to spoil, and its newest checkpoint."""
    folder = shutil.copytree(finished, tmp_path / "trained")
    (path,) = folder.glob("checkpoints/*/checkpoint_20.pt")
    return folder, path


# --- the YAML -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"  seed: 1234", b"  sead: 1234", "run.sead: there is no such key; did you mean seed?"),
        (b"  seed: 1234", b"  seed: many", "run.seed: 'many' does not fit"),
        (b"  seed: 1234", b"  seed: -1", "run.seed: -1 does not fit: Input should be greater"),
        (b"  seed: 1234", b"  seed: 1\n  seed: 2", 'found duplicate key "seed"'),
        (b"  seed: 1234", b"  seed: !!python/object:os.system x", "not valid YAML here"),
        (b"  seed: 1234", b"  seed: \xff", "it cannot be read: 'utf-8' codec"),
        (b"  betas: [0.9, 0.95]", b"  betas: [0.9, .nan]", "train.betas.1: nan does not fit"),
        (b"hidden_size: 32", b"hidden_size: 33", "hidden_size 33 is not divisible by"),
        (None, b"", "it holds nothing, expected a table of settings"),
        (None, b"- 1", "it holds a list, expected a table of settings"),
    ],
)
def test_a_wrong_yaml_is_named_by_file_key_and_value(finished, tmp_path, old, new, words):
    story = shutil.copytree(finished, tmp_path / "story")
    before, file = files(story), story / "SmolLm3_Config.yaml"
    assert old is None or file.read_bytes().count(old) >= 1
    file.write_bytes(file.read_bytes().replace(old, new) if old else new)
    line = one_line(python(story, "train", settings=()), 2)
    assert words in line and "SmolLm3_Config.yaml" in line
    assert files(story) == before


def test_a_torch_with_a_known_hole_is_refused(finished):
    program = (
        "import sys, torch; torch.__version__ = '2.9.1+cpu'; import main; "
        "sys.exit(main.main(['verify']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=finished, capture_output=True, text=True
    )
    line = one_line(result, 2)
    assert line.startswith("error: torch 2.9.1+cpu: below 2.10 its loader can be made to run")


# --- the text, the prompt -------------------------------------------------------------------------


def test_a_text_or_a_prompt_that_cannot_be_used_says_why(finished, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nul.txt").write_bytes(b"abc\0")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"caf\xe9")
    for name, words in (
        ("fifo", "this is a folder or a device"),
        ("nul.txt", "character 3 is a NUL"),
        ("bom.txt", "byte 6 is not UTF-8"),
    ):
        settings = (*SHORT, f"data.source={tmp_path / name}", f"paths.cache={tmp_path}")
        assert words in one_line(python(finished, "train", settings=settings), 2)
    line = one_line(python(finished, "generate", b"half a character: \xed\xa0", settings=()), 2)
    assert line.startswith("error: generate: character 18 of the prompt is half a character")


# --- checkpoints ----------------------------------------------------------------------------------


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def write(content: bytes):
    return lambda path: path.write_bytes(content)


def weights_only(path) -> None:
    torch.save(checkpoint.load(path)["model"], path)


def nothing_known(path) -> None:
    torch.save({"epoch": 1}, path)


def change(mutate):
    """A change of the contents, saved as a run would save it."""

    def apply(path) -> None:
        state = checkpoint.load(path)
        mutate(state)
        checkpoint.save(path, state)

    return apply


def poison(path) -> None:
    """NaN in the weights, with a digest that fits: `checkpoint.save` would refuse it."""
    state = checkpoint.load(path)
    state["model"]["model.embed_tokens.weight"][0] = float("nan")
    torch.save(state | {"digest": sha256_of(checkpoint.flatten(state))}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, r": record \S+ is damaged; resume from checkpoint_10\.pt, the newest good one"),
        (cut, r"it is damaged \(.+\); resume from checkpoint_10\.pt"),
        (write(b""), "it is empty; resume from"),
        (write(b"<html>503</html>"), "it is an HTML page, perhaps of a failed download"),
        (write(b"version https://git-lfs.github.com/spec/v1\n"), "type git lfs pull"),
        (weights_only, "it has 20 weights, but no moments, .* it can be evaluated, not resumed"),
        (nothing_known, r"it is not a checkpoint of this project \(a dict with epoch\)"),
        (change(lambda s: s["model"].pop("model.norm.weight")), "model.norm.weight is missing"),
        (change(lambda s: s["model"].update(more=torch.zeros(1))), "more is extra"),
        (
            change(lambda s: s["model"].update({"lm_head.weight": torch.zeros(257, 32)})),
            "lm_head.weight is tied, but differs from model.embed_tokens.weight",
        ),
        (
            change(lambda s: s["model"].update({"model.norm.weight": torch.ones(3)})),
            r"model.norm.weight is float32 \(3,\), expected float32 \(32,\)",
        ),
        (
            change(lambda s: s["model"].update({"model.norm.weight": torch.ones(32).bfloat16()})),
            r"model.norm.weight is bfloat16 \(32,\), expected float32 \(32,\)",
        ),
        (
            poison,
            "model.model.embed_tokens.weight holds NaN or inf; choose an older one",
        ),
        (
            change(lambda s: s["optimizer"]["param_groups"][0]["param_names"].reverse()),
            "its optimizer has the parameter .* where this one has embed_tokens.weight",
        ),
        (change(lambda s: s["optimizer"].update(kind="SGD")), "its optimizer is SGD, not AdamW"),
        (
            change(lambda s: s["random"].clear()),
            "the random states torch, .* are missing; .* --allow random",
        ),
        (
            change(lambda s: s["data"].update(text_sha256="ab")),
            "data.text_sha256 is 'ab' in the checkpoint and '[0-9a-f]{64}' now",
        ),
        (
            change(lambda s: s["tokenizer"].update(sha256="ab")),
            "tokenizer.sha256 is 'ab' in the checkpoint and '[0-9a-f]{64}' now",
        ),
        (
            change(lambda s: s["config"]["architecture"].update(rope_theta=5.0)),
            "config.architecture.rope_theta is 5.0 in the checkpoint and 10000.0 now",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(trained, spoil, words):
    story, path = trained
    spoil(path)
    before = files(story)
    line = one_line(python(story, "resume", str(path)), 3)
    assert str(path) in line and re.search(words, line), line
    assert files(story) == before


def test_changed_training_keys_are_a_table_and_each_can_be_allowed(trained):
    story, path = trained
    settings = (*SHORT, "train.learning_rate=0.001", "train.weight_decay=0.2")
    refused = python(story, "resume", str(path), settings=settings)
    line = one_line(refused, 3)
    assert "or allow each: --allow train.learning_rate" in line
    assert re.search(r"^config.train.learning_rate +0.003 +0.001$", refused.stdout, re.MULTILINE)
    assert re.search(r"^config.train.weight_decay +0.1 +0.2$", refused.stdout, re.MULTILINE)
    allow = ("--allow", "train.learning_rate", "--allow", "train.weight_decay")
    allowed = python(story, "resume", str(path), *allow, settings=settings)
    assert allowed.returncode == 0, allowed.stderr
    assert "the resume is not exact" in allowed.stdout
    assert (
        checkpoint.load(path.with_name("checkpoint_25.pt"))["config"]["train"]["weight_decay"]
        == 0.2
    )
    assert "this must be as in the checkpoint" in one_line(
        python(story, "resume", str(path), "--allow", "data"), 2
    )


def test_what_is_only_unusual_is_noted_and_resumed(trained):
    story, path = trained
    state = checkpoint.load(path)
    state["model"] = {f"_orig_mod.{name}": tensor for name, tensor in state["model"].items()}
    state["environment"]["device"] = "NVIDIA H100"
    state["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    state["random"].pop("python")
    checkpoint.save(path, state)
    result = python(story, "resume", str(path.parent), "--allow", "random")
    assert result.returncode == 0, result.stderr
    assert (
        "Note: the prefixes `module.` and `_orig_mod.` in checkpoint_20.pt are ignored"
        in result.stdout
    )
    assert "NVIDIA H100" in result.stdout and "no longer bit-exact" in result.stdout


def test_weights_alone_can_be_evaluated(trained):
    story, path = trained
    own = python(story, "evaluate", str(path), "--data", "input.txt", "--window", "64")
    weights_only(path)
    alone = python(story, "evaluate", str(path), "--data", "input.txt", "--window", "64")
    figures = [re.search(r"loss .*", result.stdout) for result in (own, alone)]
    assert figures[0] and figures[1] and figures[0][0] == figures[1][0]
    more = (*SHORT, "models.tiny.architecture.num_hidden_layers=1")
    other = python(
        story, "evaluate", str(path), "--data", "input.txt", "--window", "64", settings=more
    )
    assert "model.layers.1" in one_line(other, 3)


def test_resuming_nothing_and_resuming_the_end_are_said(trained):
    story, _ = trained
    (story / "empty").mkdir()
    assert "no checkpoint in this folder" in one_line(python(story, "resume", "empty"), 3)
    assert "there is no such file" in one_line(python(story, "resume", "absent.pt"), 3)
    before = files(story)
    again = python(story, "train", settings=SHORT)
    assert again.returncode == 0 and "already at step 20" in again.stdout
    assert files(story) == before


# --- signals --------------------------------------------------------------------------------------


def start(story, *settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(("train",), ("train.steps=9000", "train.log_every=1", *settings)),
        cwd=story,
        env=os.environ | {"SMOLLM_PROFILE": "ci"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("phase", "settings", "line"),
    [
        ("loading", (), "Profile ci"),
        ("training", (), "Step: 30,"),
        ("evaluating", ("train.validate_every=1", "train.validation_tokens=20000"), "Step: 3,"),
        ("sampling", ("sample.every=1", "sample.new_tokens=400"), "Step: 3,"),
    ],
)
def test_sigterm_saves_at_the_next_safe_point(story, phase, settings, line):
    process = start(story, *settings)
    assert any(line in text for text in process.stdout)
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")
    saved = [int(step) for step in re.findall(r"^Saved checkpoint_(\d+)\.pt", told, re.MULTILINE)]
    if phase == "loading":
        assert files(story) == {}
    else:
        (path,) = story.glob("checkpoints/*/checkpoint_*.pt")
        assert [checkpoint.load(path)["step"]] == saved and saved[0] >= 3
    assert not list(story.glob("*/*/*.tmp.*"))


def test_a_folder_in_use_is_refused_naming_the_process(story):
    first = start(story)
    assert any("Step: 1," in text for text in first.stdout)
    settings = ("train.steps=9000", "train.log_every=1")
    line = one_line(python(story, "train", settings=settings), 7)
    assert f"in use by process {first.pid} on {socket.gethostname()}; wait for it" in line
    first.kill()
    first.communicate()


def test_ctrl_c_once_saves_and_twice_leaves_at_once(story):
    slow = ("train.batch_size=6000", "train.steps=3")  # a step takes seconds
    process = start(story, *slow)
    assert any("3 steps of 6000" in text for text in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # two that come within one call of torch are one to Python
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert not list(story.glob("*/*/*.tmp.*"))
    for path in story.glob("checkpoints/*/*.pt"):  # if the step ended meanwhile
        assert checkpoint.load(path)["step"] == 1
        path.unlink()
    process = start(story, *slow)
    assert any("3 steps of 6000" in text for text in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "Saved checkpoint_1.pt" in told


# --- disks ----------------------------------------------------------------------------------------


def on_tmpfs(story, size: str, before: str, *settings: str) -> subprocess.CompletedProcess:
    """Trains with a file system of `size` mounted at `small`, in a namespace of its own."""
    (story / "small").mkdir()
    words = command(("train",), settings)
    script = f'mount -t tmpfs -o size={size} none small && {before} exec "$@"'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *words],
        cwd=story,
        env=os.environ | {"SMOLLM_PROFILE": "ci"},
        capture_output=True,
        text=True,
        timeout=120,
    )


can_mount = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="no namespace to mount a small file system in",
)


@can_mount
def test_a_disk_too_small_is_told_before_the_first_step(story):
    result = on_tmpfs(story, "1m", "", *SHORT, "paths.checkpoints=small")
    line = one_line(result, 6)
    assert re.search(r"small/ci-\w+: 4 checkpoints need 1\.3 MB, [01]\.\d MB are free", line)
    assert "--set paths.checkpoints=PATH" in line and "Training" not in result.stdout


@can_mount
def test_a_disk_that_fills_up_during_a_save_loses_nothing(story):
    wait = "for i in $(seq 300); do ls small/*/.lock && break; sleep 0.1; done; sleep 1;"
    fill = f"({wait} cat /dev/zero > small/fill) >/dev/null 2>&1 &"
    settings = ("train.steps=9000", "train.checkpoint_every=100", "paths.checkpoints=small")
    result = on_tmpfs(story, "6m", fill, *settings)
    line = one_line(result, 6)
    assert re.search(
        r"checkpoint_\d+\.pt: it cannot be written \(.+\), it takes 0\.3 MB, 0\.0 MB", line
    )


@can_mount
def test_a_full_disk_under_the_record_is_one_line_too(story):
    result = on_tmpfs(story, "64k", "", "train.steps=9000", "paths.runs=small")
    line = one_line(result, 6)
    assert "--set paths.runs=PATH" in line


def test_a_file_size_limit_during_a_save_keeps_what_was_there(trained):
    story, path = trained
    before = files(story)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    line = one_line(python(story, "resume", str(path), preexec_fn=limit), 6)
    assert re.search(r"checkpoint_25\.pt: it cannot be written \(.+\), it takes 0\.3 MB", line)
    assert files(story) == before


@pytest.mark.parametrize("key", ["checkpoints", "runs", "cache"])
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(story, key):
    (story / "file").touch()
    result = python(story, "train", settings=(*SHORT, f"paths.{key}=file/inside"))
    line = one_line(result, 6)
    assert "file/inside" in line and f"--set paths.{key}=PATH" in line
    assert "Training" not in result.stdout
