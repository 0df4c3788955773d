"""README.md and CONTRIBUTING.md: commands are run or parsed; links, targets and rules are true."""

import contextlib
import json
import re
import shlex
import shutil

import pytest
from torch.distributed.run import get_args_parser

import main
from conftest import ROOT
from workflow.config import load_config, parse_yaml

README = (ROOT / "README.md").read_text("utf-8")
BOTH = README + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
LINES = re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)
CODE = re.findall(r"^ {4,}(\S.*)$", BOTH, re.MULTILINE) + re.findall("`([^`]+)`", BOTH)
MAIN = ".venv/bin/python main.py "
LEFT_OUT = {  # lines of README.md that are not run here, and why; those of main.py are parsed
    r"^make ": "the whole project, or set-up; that its target exists is tested",
    r"pip install ": "installs from the network; that the versions agree is tested",
    r"^(py |\.venv\\Scripts|!)": "what make does, on Windows and Colab",
    r"^\.venv/bin/lm-eval ": "another program, and its tasks come from the Hub",
    r"^\.venv/bin/torchrun ": "needs GPUs; test_distributed.py starts several processes",
    r" main\.py (break|bench)": "takes minutes; test_main.py and test_bench.py have them in small",
    r" --set (model=|data\.source=hub)": "needs the Hub; test_hub.py and test_sources.py play it",
}
SHORT = "train.steps=20 train.resume_steps=5 train.batch_size=4 train.validation_tokens=320"
SETTINGS = [f"--set={setting}" for setting in (*SHORT.split(), "proof.new_tokens=4")]
SHOWN = {  # what a command prints when it has done its work
    "run": "Run folder: runs/ci-",
    "verify": " checks passed",
    "train": "=== Generation @ step 20 ===",
    "resume": "=== Generation @ step 25 ===",
    "generate": "Once upon a time,",
    "evaluate": "windows of 64 tokens",
    "export": "Wrote my-model: README.md config.json",
}
STAY = [line for line in LINES if any(re.search(pattern, line) for pattern in LEFT_OUT)]
RUN = [line for line in LINES if line.startswith(MAIN) and line not in STAY]


def test_each_line_is_run_or_left_out_for_a_reason():
    assert [line for line in LINES if line not in RUN + STAY] == []
    assert [p for p in LEFT_OUT if not any(re.search(p, line) for line in STAY)] == []
    assert {line.split()[2] for line in RUN} == set(SHOWN)


def understood(words: list[str]) -> bool:
    options = main.parser().parse_args(words)
    config = load_config(ROOT / "SmolLm3_Config.yaml", options.profile, options.set)
    return config.changes == tuple(options.set)


@pytest.mark.parametrize("line", sorted({code for code in CODE if "main.py " in code}))
def test_every_command_and_key_is_known(line, monkeypatch):
    monkeypatch.delenv("SMOLLM_PROFILE", raising=False)
    words = shlex.split(re.sub(" > .*", "", line.replace("=NAME", "=small").replace("RANK", "0")))
    if "torchrun" in words[0]:
        words = ["main.py", *get_args_parser().parse_args(words[1:]).training_script_args]
    assert understood(words[words.index("main.py") + 1 :])


def test_every_setting_in_the_text_is_known():
    settings = set(re.findall(r"--set (\w+\.\S+=[^\s`]+)", BOTH)) - {"section.key=value"}
    settings |= {word for words in re.findall('SMOLLM_SET="(.+?)"', BOTH) for word in words.split()}
    assert len(settings) > 10
    for setting in settings:
        assert understood(["train", "--profile", "cpu", "--set", setting])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of a short run of the ci profile, trained, stopped and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    places = [f"--set=paths.{name}={folder / name}" for name in ("checkpoints", "runs", "cache")]
    common = ["--profile", "ci", *SETTINGS, *places]
    with contextlib.chdir(ROOT):
        assert main.main(["train", *common]) == 0
        (run,) = (folder / "checkpoints").iterdir()
        assert main.main(["resume", str(run), *common]) == 0
    return run


def in_small(line: str, run: str) -> list[str]:
    """A command of README.md on the tiny model of the ci profile, for a few steps."""
    line = re.sub(r" --profile \S+| --gguf \S+", "", line.removeprefix(MAIN))  # it has no GGUF name
    words = shlex.split(line.replace("RUN", run).replace("_5000", "_20").replace("_5050", "_25"))
    windows = ["--window", "64", "--stride", "32", "--windows", "4"]  # its context is short
    return [*words, *(windows if words[0] == "evaluate" else []), "--profile", "ci", *SETTINGS]


@pytest.mark.parametrize("line", RUN)
def test_the_command_works(line, trained, story, here):
    (story / "my.txt").write_text(README, "utf-8")
    (story / "my-folder").mkdir()
    rows = (json.dumps({"content": text}) + "\n" for text in README.splitlines())
    (story / "my-folder" / "rows.jsonl").write_text("".join(rows), "utf-8")
    words = in_small(line, trained.name)
    if "RUN" in line:  # a resume finds the run as it was before one
        ignored = shutil.ignore_patterns("*_25.pt" if words[0] == "resume" else "")
        shutil.copytree(trained, story / "checkpoints" / trained.name, ignore=ignored)
    code, told, error = here(*words)
    assert code == 0 and SHOWN[words[0]] in told, error


def test_every_target_of_make_is_there():
    named = {word for code in CODE for word in re.findall(r"(?:^|\s)make ([a-z][a-z-]+)", code)}
    assert named >= {"run", "test", "test-all", "bench", "lab"}
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_pinned_version_is_the_one_that_is_tested():
    tested = (ROOT / "requirements.txt").read_text() + (ROOT / "Makefile").read_text()
    pins = set(re.findall(r"[\w-]+==[\d.]+\d", BOTH))
    assert len(pins) >= 2 and [pin for pin in pins if pin not in tested] == []


def test_every_link_leads_somewhere():
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", BOTH) if "://" not in link}
    assert len(links) > 20 and [x for x in sorted(links) if not (ROOT / x).exists()] == []


def test_the_citation_can_be_read():
    cited = parse_yaml((ROOT / "CITATION.cff").read_text("utf-8"), "CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0"
    assert {"message", "title", "authors", "references"} < cited.keys()
