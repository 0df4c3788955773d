"""The commands: what they print, what they write, and their exit codes."""

import io
import json
import re
import shlex
import shutil
from contextlib import nullcontext

import pytest

import main
from conftest import SHORT, python_main, read_losses, run_process
from workflow import training
from workflow.errors import ConfigError
from workflow.proof import BOUNDS
from workflow.proof.mistakes import MUTATIONS
from workflow.training.metrics import read_log


def checkpoints(project) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in project.glob("checkpoints/*/*.pt")}


def samples(printed: str) -> list[str]:
    """The steps whose samples were printed."""
    return re.findall(r"^=== Generation @ step (\d+) ===$", printed, re.MULTILINE)


@pytest.mark.parametrize("words", [[], *([name] for name in main.COMMANDS)])
def test_help_fits_a_terminal_and_its_examples_are_valid(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main.main([*words, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    examples = re.findall(r"^  python main\.py (.+)$", printed, re.MULTILINE)
    parsed = [main.parser().parse_args(shlex.split(example)) for example in examples]
    assert [example.command for example in parsed] == words


def test_train_then_resume_then_both_again(here, project):
    code, trained, _ = here("train", settings=SHORT)
    assert code == 0 and "Step: 20, Train Loss: " in trained
    assert "Saved checkpoint_20.pt" in trained and samples(trained) == ["0", "10", "20"]
    assert "=== Generation @ step 20 ===\nOnce upon a time," in trained
    (path,) = project.glob("checkpoints/*/checkpoint_20.pt")
    code, resumed, _ = here("resume", str(path), settings=SHORT)
    assert code == 0 and "Loaded checkpoint_20.pt" in resumed
    assert "Step: 5, Resume Loss: " in resumed and samples(resumed) == ["25"]
    saved = checkpoints(project)
    assert set(saved) == {"checkpoint_20.pt", "checkpoint_25.pt"}
    for words, first in ((["train"], trained), (["resume", str(path)], resumed)):
        code, printed, notes = here(*words, settings=SHORT)
        nothing = f"Nothing to train: run {path.parent.name} is complete; replaying its log"
        assert code == 0 and nothing in notes and samples(printed) == samples(first)
        steps, replayed = (set(re.findall("^Step: .*", text, re.M)) for text in (first, printed))
        assert replayed == steps
    assert checkpoints(project) == saved
    assert here("train", settings=(*SHORT, "train.learning_rate=1e-3"))[0] == 0
    assert len(list(project.glob("checkpoints/ci-*"))) == 2


def test_sixty_steps_teach_something_and_show_the_first_last_and_held_out_loss(here, project):
    code, printed, _ = here("train", settings=("train.steps=60", "sample.new_tokens=8"))
    train, held_out = (
        dict(re.findall(rf"^Step: (\d+), {kind} Loss: ([\d.]+)$", printed, re.MULTILINE))
        for kind in ("Train", "Held-out")
    )
    assert code == 0 and list(train) == ["1", "60"] and list(held_out) == ["0", "60"]
    assert float(held_out["60"]) < float(held_out["0"]) - 1.5
    (path,) = project.glob("checkpoints/*/checkpoint_60.pt")
    schedule = training.load_checkpoint(path)[1]["config"]["train"]
    assert (schedule["warmup_steps"], schedule["schedule_steps"]) == (1, 110)


def test_resume_takes_its_settings_from_the_checkpoint(
    here, refused, trained, project, monkeypatch
):
    monkeypatch.setenv("SMOLLM_PROFILE", "quick")  # of another run
    folder, log = f"checkpoints/{trained.parent.name}", project / "runs" / trained.parent.name
    change = ("train.learning_rate=0.001", "train.betas=[0.9, 0.99]")
    error = refused(3, "resume", folder, settings=change)
    assert len(error) < 500 and "is 0.003 in the checkpoint and 0.001 now, " in error
    words = shlex.split(error.partition("or type: main.py ")[2])
    assert words[:2] == ["resume", folder] and words.count("--allow") == 2
    code, printed, notes = here(*words, "--until", "22")
    assert code == 0 and "Profile ci: settings from the checkpoint; changed: train." in notes
    assert "Saved checkpoint_22.pt" in printed and samples(printed) == ["22"]
    code, printed, _ = here("resume", folder)  # steps + resume_steps of the run
    assert code == 0 and "Saved checkpoint_25.pt" in printed
    rates = {r["step"]: r["learning_rate"] for r in read_log(log / "metrics.jsonl") if "loss" in r}
    assert rates[21] < 0.0004 < 0.0006 < rates[20] and list(rates) == list(range(1, 26))
    code, printed, notes = here("resume", folder, "--until", "30")
    assert "Note: from step 25 on, the rate stays 0.0003" in notes
    assert "Removed checkpoint_22.pt: train.keep_checkpoints is 2" in printed
    assert "step 25: the run is already at 30; use --until N" in refused(2, "resume", folder)
    assert "the profile ci; omit it" in refused(2, "resume", folder, "--profile", "cpu")


def test_a_log_without_a_checkpoint_is_mentioned_and_kept(here, trained, project):
    shutil.rmtree(trained.parent)
    code, printed, notes = here("train", settings=SHORT)
    before, found, _ = notes.partition("metrics.jsonl has 20 steps, but no checkpoint; it is now")
    assert code == 0 and found and "Training" not in before and "Step: 20, Train" in printed
    (kept,) = project.glob("runs/*/metrics-until-*.jsonl")
    steps = [row["step"] for row in read_log(kept) if "loss" in row]
    assert steps == list(read_losses(project)) == list(range(1, 21))


def test_verify_prints_the_checks_as_json(here):
    code, printed, errors = here("verify", "--quick", "--json")
    checks = {check["name"]: check for check in json.loads(printed)}
    assert code == 0 and list(checks) == list(BOUNDS)[: len(checks)] and "Model loaded" in errors
    assert checks["logits match"]["value"] == 0.0 and checks["logits match"]["passed"] is True


def test_verify_exits_with_1_if_a_check_fails(here, monkeypatch):
    monkeypatch.setitem(BOUNDS, "logits match", ("<=", -1.0))
    code, printed, _ = here("verify", "--quick")
    assert code == 1 and "Model loaded. Total params: 26816" in printed
    assert "17 of 22 checks passed, 1 failed (logits match), 4 skipped" in printed


def test_mutate_exits_with_1_if_no_check_finds_a_mistake(here, monkeypatch):
    found = here("mutate", settings=["mutations.steps=0"])
    assert found[0] == 0 and "17 of 17 mutations found" in found[1]
    monkeypatch.setitem(MUTATIONS, "no RoPE", nullcontext)
    missed = here("mutate", settings=["mutations.steps=0"])
    assert missed[0] == 1 and "16 of 17 mutations found" in missed[1]


def test_generate_prints_the_text_alone_and_is_greedy_without_sampling_options(here, trained):
    def generate(*options: str, settings=()) -> str:
        code, printed, notes = here("generate", *options, "--tokens", "8", settings=settings)
        assert code == 0 and printed.startswith("Once") and "train" not in notes
        return printed

    greedy = generate("Once")
    sampling = ("Once", "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.001")
    sampled = generate(*sampling)
    assert sampled == generate(*sampling) != greedy
    assert sampled != generate(*sampling, settings=["run.seed=5"])
    assert generate(*sampling, "--checkpoint", str(trained)) != sampled
    assert here("generate", "Once", "--temperature", "-1")[:2] == (2, "")  # no prompt


@pytest.mark.parametrize("content", [b"Once\nupon", b"\xef\xbb\xbfOnce\r\nupon\r\n"])
def test_a_prompt_on_stdin_has_no_byte_order_mark_and_no_carriage_returns(
    here, monkeypatch, content
):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert here("generate", "--tokens", "8") == here("generate", "Once\nupon", "--tokens", "8")


def test_a_prompt_on_stdin_that_is_not_utf_8_is_refused_by_name(refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "stdin: 'utf-8' codec can't decode byte 0xe9 in position" in refused(2, "generate")


def test_a_checkpoint_is_exported_for_transformers(here, refused, trained, project):
    code, printed, _ = here("export", str(trained), "out")
    assert code == 0
    assert "Wrote out: README.md config.json generation_config.json model.safetensors" in printed
    card = (project / "out" / "README.md").read_text()
    assert f"# {trained.parent.name}, 20 steps" in card
    tokenizer = "the tokenizer of random weights with a byte tokenizer"
    assert f"| started from | tiny with random weights and {tokenizer} |" in card
    assert "error: out: it exists" in refused(2, "export", str(trained), "out")
    measure = ("--data", "input.txt", "--window", "64", "--windows", "4")
    run = trained.parent
    for name, path in (("run", run), ("one.pt", trained)):
        (project / name).symlink_to(path)
    paths = ("out", "run", "one.pt", str(trained), str(run), f"runs/{run.name}", run.name)
    results = {here("evaluate", path, *measure)[1].splitlines()[-1] for path in paths}
    assert len(results) == 1 and "loss" in results.pop()
    _, _, notes = here("evaluate", run.name, *measure, settings=["model=small"])
    assert f"Model {run.name}, 20 steps\n" in notes and "small" not in notes
    assert here("generate", "Once", "--tokens", "2", "--checkpoint", "out")[0] == 0


def test_a_run_is_resumed_through_links(here, trained, project):
    """The folder of the run is on another disk, and the checkpoint has a link in a third place."""
    run, folder = trained.parent, project / "disk" / "any"
    folder.parent.mkdir()
    run.rename(folder).joinpath(trained.name).rename(folder.parent / "one.pt")
    run.symlink_to(folder)
    trained.symlink_to(folder.parent / "one.pt")
    (project / "best.pt").symlink_to(trained)
    for path in (str(trained), "disk/any", "best.pt"):
        code, _, error = here("resume", path, settings=SHORT)
        assert code == 0, error
        assert [file.name for file in (project / "runs").iterdir()] == [run.name]


NOWHERE = ("--set", "reference.source=absent")  # an error if the model is loaded


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ["train", "--set", "sample.new_tokens=500"], "500 tokens after 17 of sample.prompt do"),
        (2, ["train", "--profile", "huge"], "huge (as requested): there is no such profile; choo"),
        (2, ["train", "--steps", "60"], "--steps 60; for a setting, type --set train.steps=60; fo"),
        (2, ["train", "--set", "data.source=absent.txt"], "absent.txt: there is no such file"),
        (2, ["train", "--set", "data.source=short.txt"], "train on, one sequence needs 33"),
        (5, ["train", "--set", "reference.source=absent"], "absent: there is no config.json"),
        (4, ["train", "--set", "train.learning_rate=1e30"], "lower train.learning_rate"),
        (2, ["resume", "runs"], "no checkpoint in this folder"),
        (2, ["resume", "absent.pt"], "there is no such file"),
        (3, ["resume", "x" * 300], "it cannot be read (File name too long)"),
        (2, ["generate", ""], "the prompt is empty, give at least one token; change the prompt"),
        (2, ["generate", "x", "--top-p", "2"], "top_p is 2.0, it must be above 0"),
        (2, ["generate", "x", "--tokens", "600"], "do not fit: the context is 512, the prompt 1"),
        (2, ["generate", "x", "--temperature", "0", "--top-k", "5"], "0 is greedy, and needs no"),
        (2, ["evaluate", "reference", "--data", "x", *NOWHERE], "x: there is no such file"),
        (2, ["export", "reference", "workflow", *NOWHERE], "workflow: it exists and is not an"),
        (2, ["verify", "--set", "proof.wikitext_file=x", *NOWHERE], "x: there is no such file"),
        (2, ["evaluate", "reference", "--data", "short.txt", "--window", "600"], "context of 512"),
        (2, ["bench", "--only", "nothing"], "no row has this name; rows: training step, 1 × 128"),
        (5, ["bench", "--only", "prefill", *NOWHERE], "absent: there is no config.json"),
        (2, ["resume", "x", "--until", "0"], "main.py resume: argument --until: '0' is not a"),
        (2, ["resume"], "the following arguments are required: CHECKPOINT; type main.py resu"),
        (2, ["generate", "x\udced"], "character 1 of the prompt is half a character"),
    ],
)
def test_bad_input_is_one_line_and_a_code(refused, project, code, arguments, words):
    (project / "short.txt").write_text("short")
    (project / "runs").mkdir()
    assert words in refused(code, *arguments)
    assert checkpoints(project) == {}


def test_no_command_starts_if_assert_is_off(project):
    result = run_process(project, python_main("verify"), PYTHONOPTIMIZE="1")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: python: assert is off, so claims would not be checked;")


def test_an_error_of_the_process_is_one_line_and_debug_shows_the_traceback(here, project):
    wrong = ("--set", "train.stepz=1")
    result = run_process(project, python_main("train", *wrong))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    with pytest.raises(ConfigError, match="no such key"):
        here("train", "--debug", *wrong)
