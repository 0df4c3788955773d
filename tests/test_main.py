"""The commands, their sentences and their exit codes, each as a real process."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import main
from workflow.proof import BOUNDS
from workflow.training import load_model

SHORT = ("train.steps=20", "train.resume_steps=5", "train.log_every=10", "sample.every=10")


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def checkpoints(story) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in story.glob("checkpoints/*/*.pt")}


def sampled(result: subprocess.CompletedProcess) -> list[str]:
    """The steps at which it has shown a text."""
    return re.findall(r"^=== Generation @ step (\d+) ===$", result.stdout, re.MULTILINE)


def test_help_names_every_command_and_exit_code(command):
    result = command("--help", COLUMNS="80")
    assert result.returncode == 0
    for name in (*main.COMMANDS, *range(8), 130, 143):
        assert re.search(rf"^ +{name} +\w", result.stdout, re.MULTILINE)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for command in main.COMMANDS.values():
        assert command.__doc__.splitlines()[0] in result.stdout  # not wrapped


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_fits_a_terminal_and_states_every_default(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main.main([name, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    usage, *options = re.split(r"^  (?=-)", printed.partition("\nexample:")[0], flags=re.MULTILINE)
    usage = " ".join(usage.split())  # which is broken where the program's name is long
    for option in options:
        valued = re.match(r"--[\w-]+ [A-Z]", option) and f" {option.split()[0]} " not in usage
        assert "(default" in option or not valued
    examples = re.findall(r"^  python main\.py (.+)$", printed, re.MULTILINE)
    assert examples
    for example in examples:
        assert main.parser().parse_args(shlex.split(example)).command == name


def test_train_then_resume_then_both_again(command, story):
    trained = command("train", *options(*SHORT))
    assert trained.returncode == 0, trained.stderr
    assert "Step: 20, Train Loss: " in trained.stdout
    assert sampled(trained) == ["0", "10", "20"]
    assert "=== Generation @ step 20 ===\nOnce upon a time," in trained.stdout
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    resumed = command("resume", str(path), *options(*SHORT))
    assert resumed.returncode == 0, resumed.stderr
    assert "Loaded checkpoint_20.pt" in resumed.stdout
    assert "Step: 5, Resume Loss: " in resumed.stdout
    assert sampled(resumed) == ["25"]
    kept = checkpoints(story)
    assert set(kept) == {"checkpoint_20.pt", "checkpoint_25.pt"}
    for words in (["train"], ["resume", str(path)]):
        again = command(*words, *options(*SHORT))
        assert again.returncode == 0, again.stderr
        assert "already at step 25" in again.stdout
        assert sampled(again) in (["10", "20"], ["25"])
    assert checkpoints(story) == kept
    edited = command("train", *options(*SHORT, "train.learning_rate=1e-4"))
    assert edited.returncode == 0
    assert len(list(story.glob("checkpoints/ci-*"))) == 2


def test_verify_is_for_people_and_for_machines(here):
    code, printed, _ = here("verify", "--quick")
    assert code == 0
    assert "Model loaded. Total params: 26816" in printed
    assert re.search(r"^18 of 22 checks passed, 4 skipped, in \d+ s$", printed, re.MULTILINE)
    code, printed, aside = here("verify", "--json")
    checks = {check["name"]: check for check in json.loads(printed)}
    assert code == 0 and list(checks) == list(BOUNDS)
    assert checks["logits match"]["value"] == 0.0 and checks["logits match"]["passed"] is True
    assert checks["logits match, 8192 tokens"]["passed"]
    assert "Model loaded" in aside


def test_verify_exits_with_1_when_a_check_fails(here, monkeypatch):
    monkeypatch.setitem(BOUNDS, "cache matches no cache", ("<=", -1.0))
    code, printed, _ = here("verify", "--quick")
    assert code == 1 and "checks passed, 1 failed (cache matches no cache)" in printed


def test_mutate_names_the_first_check_that_fails(here, story):
    code, printed, _ = here(
        "mutate", *options("mutations.steps=2", "mutations.other_learning_rates=[0.1]")
    )
    assert code == 0
    assert re.search(r"^no mutation +none ", printed, re.MULTILINE)
    assert re.search(r"^random head +tensor names match", printed, re.MULTILINE)
    assert re.search(r"^random head +0.1 ", printed, re.MULTILINE)
    assert (story / "runs" / "mutations-ci.json").is_file()


def test_generate_is_greedy_unless_asked_and_reads_stdin(here, monkeypatch):
    greedy = here("generate", "Once", "--tokens", "8")
    assert greedy[0] == 0 and "\nOnce" in greedy[1]
    sampling = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.001")
    drawn = [here("generate", "Once", "--tokens", "8", *sampling) for _ in range(2)]
    assert drawn[0] == drawn[1] != greedy
    other = here("generate", "Once", "--tokens", "8", *sampling, "--set", "run.seed=5")
    assert other[1] != drawn[0][1]
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert here("generate", "--tokens", "8")[1] == greedy[1]


def test_what_cannot_be_generated_is_said_in_one_line(here):
    for arguments, words in (
        ([""], "the prompt is empty, give at least one token; change the prompt or the options"),
        (["x", "--chat"], "this tokenizer has no chat template; choose an Instruct model, or omit"),
        (["x", "--temperature", "1", "--top-p", "2"], "top_p is 2.0, it must be above 0"),
        (["x", "--tokens", "600"], "600 new tokens do not fit: the context is 512, the prompt 1"),
    ):
        code, _, error = here("generate", *arguments)
        assert code == 2 and error.startswith(f"error: generate: {words}"), error
        assert error.count("\n") == 1


def test_evaluate_says_how(here, story):
    (story / "text.txt").write_text("a text to be scored " * 20)
    windows = ("--window", "64", "--stride", "32")
    _, printed, _ = here("evaluate", "reference", "--data", "text.txt", *windows)
    assert re.search(
        r"loss \d\.\d{4}, perplexity \d.*, word perplexity \d.*, \d.* bits a byte", printed
    )
    assert "windows of 64 tokens every 32" in printed


def test_a_checkpoint_is_exported_for_transformers(here, story):
    assert here("train", *options(*SHORT))[0] == 0
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    code, _, error = here("export", str(path), "out", "--gguf", "F16")
    assert code == 2 and "cannot name how this tokenizer cuts a text" in error
    code, printed, _ = here("export", str(path), "out")
    assert code == 0
    assert "Wrote out: README.md config.json generation_config.json model.safetensors" in printed
    card = (story / "out" / "README.md").read_text()
    assert f"# {path.parent.name}, 20 steps" in card
    assert "| started from | random weights with a byte tokenizer |" in card
    ids, (model, _, _) = torch.arange(40)[None], load_model(path)
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(story / "out")
        assert torch.equal(back(ids).logits, model(ids))
    code, _, error = here("export", str(path), "out")
    assert code == 2 and error.startswith("error: out: it exists and is not an empty folder")


@pytest.mark.slow
def test_a_checkpoint_generates_and_is_evaluated_with_its_own_weights(command, story):
    command("train", *options(*SHORT))
    (path,) = story.glob("checkpoints/*/checkpoint_20.pt")
    (story / "text.txt").write_text("a text to be scored " * 20)
    own = command("evaluate", str(path), "--data", "text.txt", "--window", "64")
    reference = command("evaluate", "reference", "--data", "text.txt", "--window", "64")
    figures = [re.search(r"loss (\d+\.\d+)", result.stdout)[1] for result in (own, reference)]
    assert float(figures[0]) < float(figures[1])
    assert command("generate", "Once", "--checkpoint", str(path)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "train.stepz=1"], 2, "train.stepz: there is no such key; did you mean steps?"),
        (["--set", "profile=cpu"], 2, "--set profile=cpu: this is no setting; choose with"),
        (["--set", "train.steps=many"], 2, "train.steps: 'many' does not fit"),
        (["--profile", "huge"], 2, "profile 'huge'; choose one of full, cpu, pretrain, quick, ci"),
        (["--set", "data.source=absent.txt"], 2, "absent.txt: there is no such file"),
        (["--set", "data.source=short.txt"], 2, "tokens to train on, one sequence needs 33"),
        (["--set", "reference.source=absent"], 5, "absent: there is no config.json"),
        (["--set", "train.learning_rate=1e30"], 4, "lower train.learning_rate"),
    ],
)
def test_bad_input_is_one_line_and_a_code(command, story, arguments, code, words):
    (story / "short.txt").write_text("short")
    result = command("train", *arguments)
    assert result.returncode == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert checkpoints(story) == {}


def recorded(story, folder: str = "runs") -> list[float]:
    (file,) = story.glob(f"{folder}/ci-*/metrics.jsonl")
    return [row["loss"] for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]


def test_killed_five_times_and_run_again_every_loss_is_that_of_a_run_left_alone(command, story):
    """SIGKILL to the real command, in steps, saves and samples; torture.py does it exactly."""
    settings = ("train.steps=800", "train.checkpoint_every=40", "sample.every=400")
    words = [sys.executable, "main.py", "train", *options(*settings)]
    environment = os.environ | {"SMOLLM_PROFILE": "ci"}
    moments = ("Step: 100,", "Saved checkpoint_200", "Step: 300,", "=== Gen", "Saved checkpoint_6")
    for line in moments:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(words, cwd=story, env=environment, **pipes)
        assert any(line in text for text in process.stdout)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finished = command("train", *options(*settings))
    assert finished.returncode == 0 and "resuming from checkpoint_6" in finished.stdout
    alone = command("train", *options(*settings, "paths.checkpoints=a", "paths.runs=a"))
    assert alone.returncode == 0, alone.stderr
    assert len(recorded(story)) == 800
    assert recorded(story) == recorded(story, "a")


def test_debug_shows_the_traceback(command):
    result = command("train", "--debug", "--set", "train.stepz=1")
    assert "Traceback" in result.stderr
