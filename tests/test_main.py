"""The commands, their sentences and their exit codes, each as a real process."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys

import pytest

SHORT = ("train.steps=20", "train.resume_steps=5", "train.print_every=10", "sample.every=10")


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def checkpoints(story) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in story.glob("checkpoints/*/*.pt")}


def test_help_names_every_command(command):
    result = command("--help")
    assert result.returncode == 0
    for name in ("run", "verify", "train", "resume", "generate", "evaluate", "bench"):
        assert re.search(rf"^    {name} +\w", result.stdout, re.MULTILINE)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_train_then_resume_then_both_again(command, story):
    trained = command("train", *options(*SHORT))
    assert trained.returncode == 0, trained.stderr
    assert "Step: 20, Train Loss: " in trained.stdout
    assert "=== Generation @ step 20 ===\nOnce upon a time," in trained.stdout
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    resumed = command("resume", str(path), *options(*SHORT))
    assert resumed.returncode == 0, resumed.stderr
    assert "Loaded checkpoint_20.pt" in resumed.stdout
    assert "Step: 5, Resume Loss: " in resumed.stdout
    kept = checkpoints(story)
    assert set(kept) == {"checkpoint_20.pt", "checkpoint_25.pt"}
    for again in (
        command("train", *options(*SHORT)),
        command("resume", str(path), *options(*SHORT)),
    ):
        assert again.returncode == 0, again.stderr
        assert "already at step 25" in again.stdout
    assert checkpoints(story) == kept
    edited = command("train", *options(*SHORT, "train.learning_rate=1e-4"))
    assert edited.returncode == 0
    assert len(list(story.glob("checkpoints/ci-*"))) == 2


def test_verify_generate_and_evaluate(command, story):
    verified = command("verify")
    assert verified.returncode == 0, verified.stderr
    assert "Model loaded. Total params: 26816" in verified.stdout
    assert verified.stdout.count("holds") == 6
    first, second = (command("generate", "Once", "--tokens", "8") for _ in range(2))
    assert first.stdout == second.stdout
    assert "Once" in first.stdout
    empty = command("generate", "")
    assert empty.returncode == 2
    assert empty.stderr == (
        "error: generate: the prompt is empty, give at least one token; "
        "change the prompt or --tokens\n"
    )
    (story / "text.txt").write_text("a text to be scored " * 20)
    scored = command("evaluate", "text.txt", "--window", "64", "--stride", "32")
    assert re.search(r"loss \d\.\d{4}, perplexity .*windows of 64 tokens every 32", scored.stdout)


@pytest.mark.slow
def test_a_checkpoint_generates_and_is_evaluated_with_its_own_weights(command, story):
    command("train", *options(*SHORT))
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    (story / "text.txt").write_text("a text to be scored " * 20)
    own = command("evaluate", "text.txt", "--checkpoint", str(path), "--window", "64")
    reference = command("evaluate", "text.txt", "--window", "64")
    figures = [re.search(r"loss (\d+\.\d+)", result.stdout)[1] for result in (own, reference)]
    assert float(figures[0]) < float(figures[1])
    assert command("generate", "Once", "--checkpoint", str(path)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "train.stepz=1"], 2, "train.stepz: there is no such key; did you mean steps?"),
        (
            ["--set", "profile=cpu"],
            2,
            "--set profile=cpu: this is no setting; choose with --profile",
        ),
        (["--set", "train.steps=many"], 2, "train.steps: 'many' does not fit"),
        (
            ["--profile", "huge"],
            2,
            "there is no profile 'huge'; choose one of full, cpu, quick, ci",
        ),
        (["--set", "data.text=absent.txt"], 2, "absent.txt: there is no such file"),
        (["--set", "data.text=empty.txt"], 2, "empty.txt: the file is empty"),
        (["--set", "data.text=latin.txt"], 2, "latin.txt: byte 3 is not UTF-8"),
        (["--set", "data.text=short.txt"], 2, "tokens to train on, one sequence needs 33"),
        (["--set", "reference.source=absent"], 5, "absent: there is no config.json"),
        (["--set", "train.learning_rate=1e30"], 4, "lower train.learning_rate"),
    ],
)
def test_bad_input_is_one_line_and_a_code(command, story, arguments, code, words):
    (story / "empty.txt").touch()
    (story / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (story / "short.txt").write_text("short")
    result = command("train", *arguments)
    assert result.returncode == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert checkpoints(story) == {}


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(command, story):
    command("train", *options(*SHORT))
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    result = command("resume", str(path), *options(*SHORT))
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert re.match(r"error: .*checkpoint_20\.pt: record \S+ is damaged; ", line)
    assert checkpoints(story) == {"checkpoint_20.pt": bytes(damaged)}
    absent = command("resume", str(path.with_name("checkpoint_9.pt")))
    assert absent.returncode == 3
    assert "there is no such file" in absent.stderr


def start_training(story, *settings: str) -> subprocess.Popen:
    """`python main.py train` in the background, returned when it has done 100 steps."""
    process = subprocess.Popen(
        [sys.executable, "main.py", "train", *options(*settings)],
        cwd=story,
        env=os.environ | {"SMOLLM_PROFILE": "ci"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("Step: 100," in line for line in process.stdout)
    return process


def recorded(story, folder: str = "runs") -> list[float]:
    (file,) = story.glob(f"{folder}/ci-*/metrics.jsonl")
    return [row["loss"] for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]


def test_killed_or_interrupted_and_run_again_every_loss_is_that_of_a_run_left_alone(command, story):
    settings = ("train.steps=400", "train.checkpoint_every=50")
    killed = start_training(story, *settings)
    killed.kill()
    killed.communicate()
    interrupted = start_training(story, *settings)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate()
    assert (interrupted.returncode, errors) == (130, "")
    assert command("train", *options(*settings)).returncode == 0
    alone = command("train", *options(*settings, "paths.checkpoints=a", "paths.runs=a"))
    assert alone.returncode == 0, alone.stderr
    assert len(recorded(story)) == 400
    assert recorded(story) == recorded(story, "a")


def test_a_folder_in_use_is_refused_naming_the_process(command, story):
    command("train", *options(*SHORT))
    (folder,) = story.glob("checkpoints/*")
    with open(folder / ".lock", "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = command("train", *options(*SHORT))
    assert result.returncode == 7
    assert re.search(r"in use by process \d+ on \S+; wait for it, or stop it", result.stderr)


def test_debug_shows_the_traceback(command):
    result = command("train", "--debug", "--set", "train.stepz=1")
    assert "Traceback" in result.stderr
