"""README.md, docs/, CONTRIBUTING.md, the notebook's texts: commands work; links and names exist."""

import json
import re
import runpy
import shlex

import nbformat
import pytest

import main
from conftest import ROOT, SHORT
from workflow.config import load_config

FILES = ("README.md", "docs/how-to.md", "docs/results.md", "CONTRIBUTING.md", "docs/glossary.md")
PYTHON = re.compile(r"^```python\n(.+?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = {file: (ROOT / file).read_text("utf-8") for file in FILES}
PROGRAMS = PYTHON.findall("\n".join(TEXTS.values()))
CELLS = nbformat.read(ROOT / "main.ipynb", as_version=4).cells
TEXTS["main.ipynb"] = "\n\n".join(c.source for c in CELLS if c.cell_type == "markdown")
FENCED = re.compile(r"^```.+?^```$", re.MULTILINE | re.DOTALL)  # `py`: only an outline
README, HOW_TO, *_ = PROSE = [FENCED.sub("", text) for text in TEXTS.values()]
ALL = "\n".join(PROSE)
CODE = re.findall(r"^ {4,}(\S.*)$", ALL, re.MULTILINE) + re.findall("`([^`]+)`", ALL)
LINES = list(dict.fromkeys(re.findall(r"^ {4}(\S.*)$", README + HOW_TO, re.MULTILINE)))
MAIN = ".venv/bin/python main.py "
NOT_RUN = {  # commands that are not run here, and why; those of main.py are parsed
    r"^make ": "the whole project, or set-up; that its target exists is tested",
    r"pip install ": "installs from the network; that the versions agree is tested",
    r"^(py |\.venv\\Scripts|!)": "what make does, on Windows and Colab",
    r"^\.venv/bin/lm-eval ": "another program, and its tasks come from the Hub",
    r"^\.venv/bin/torchrun ": "needs GPUs; test_distributed.py starts several processes",
    r" tests/peers/": "slow; tested in test_peers.py",
    r" main\.py (run|verify|mutate|bench)\b": "slow; tested in their own test files",
    r" --set (model=|data\.source=hub)": "needs the Hub; test_hub.py imitates it",
}
SHOWN = {  # what a command prints when it has succeeded
    "train": "=== Generation @ step 20 ===",
    "resume": "=== Generation @ step 25 ===",
    "generate": "Once upon a time,",
    "runs": "held out",
    "evaluate": "windows of 64 tokens",
    "export": "Wrote my-model: README.md config.json",
}
SKIPPED = [line for line in LINES if any(re.search(pattern, line) for pattern in NOT_RUN)]
RUN = [line for line in LINES if line not in SKIPPED]


def test_each_command_is_run_or_skipped_for_a_reason():
    assert [line for line in RUN if not line.startswith(MAIN)] == []
    assert {line.split()[2] for line in RUN} == set(SHOWN)
    assert [p for p in NOT_RUN if not any(re.search(p, line) for line in SKIPPED)] == []


def test_every_command_and_setting_is_accepted(monkeypatch):
    monkeypatch.delenv("SMOLLM_PROFILE", raising=False)
    commands = {re.sub(" > .*", "", code).partition("main.py ")[2] for code in CODE} - {""}
    settings = re.findall(r"--set (\w+\.\S+=[^\s`]+)", ALL)
    settings += " ".join(re.findall('SMOLLM_SET="(.+?)"', ALL)).split()
    commands |= {f"train --set {each}" for each in settings if each != "section.key=value"}
    assert len(commands) > 40
    parsed = [
        main.parser().parse_args(shlex.split(command.replace("=NAME", "=small")))
        for command in commands - {"COMMAND --help", "--help"}
    ]
    for profile, changes in {(options.profile, tuple(options.set)) for options in parsed}:
        load_config(ROOT / "SmolLm3_Config.yaml", profile or "full", changes)


@pytest.mark.parametrize("line", RUN)
def test_the_command_works(line, trained, here, project):
    (project / "my.txt").write_text(README, "utf-8")
    (project / "my-folder").mkdir()
    rows = (json.dumps({"content": text}) + "\n" for text in README.splitlines())
    (project / "my-folder" / "rows.jsonl").write_text("".join(rows), "utf-8")
    line = re.sub(r" --profile \S+| --gguf \S+", "", line)  # ci has no GGUF tokenizer
    line = line.replace("rate=1e-5", "rate=1e-3")  # ci has higher rates
    words = shlex.split(re.sub("_50[05]0", "_20", line).replace("RUN", trained.parent.name))[2:]
    if words[0] == "evaluate":
        words += ["--window", "64", "--stride", "32", "--windows", "4"]  # its context is short
    batch = ["train.batch_size=4"] if words[0] == "train" else []  # for --set micro_batch_size
    code, printed, error = here(*words, settings=[*SHORT, *batch])
    assert code == 0 and SHOWN[words[0]] in printed, error


@pytest.mark.parametrize("program", [p for p in PROGRAMS if "load_dataset" not in p])  # the Hub
def test_the_python_code_works(program, trained, here, project, capsys):
    here("export", "reference", "my-model")
    (project / "program.py").write_text(program.replace("RUN", trained.parent.name), "utf-8")
    runpy.run_path(str(project / "program.py"))
    assert len(capsys.readouterr().out) > 20


def test_every_target_of_make_exists():
    targets = {word for code in CODE for word in re.findall(r"(?:^|\s)make ([a-z][a-z-]+)", code)}
    assert targets >= {"run", "test", "test-all", "bench", "lab"}
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_pinned_version_is_the_tested_one():
    tested = (ROOT / "requirements.txt").read_text() + (ROOT / "Makefile").read_text()
    pins = set(re.findall(r"[\w-]+==[\d.]+\d", ALL))
    assert len(pins) >= 2 and [pin for pin in pins if pin not in tested] == []


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", TEXTS)
def test_every_link_leads_somewhere(file):
    links = {link for link in re.findall(r"\]\(([^)\s]+)", TEXTS[file]) if "://" not in link}
    for path, _, anchor in (link.partition("#") for link in links):
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text("utf-8")), anchor


@pytest.mark.parametrize("word", re.findall("^### (.+)$", TEXTS["docs/glossary.md"], re.MULTILINE))
def test_a_word_of_the_glossary_is_a_link_where_it_first_appears(word):
    link, found = f"](docs/glossary.md#{word.lower().replace(' ', '-')})", []
    pattern = rf"(?i)(?<![\w`*./-]){word.split(' and ')[0]}s?(?![\w`/])"
    for text in (TEXTS["README.md"], TEXTS["main.ipynb"]):
        if first := re.search(pattern, text):
            found.append(text[first.start() :][:90])
    assert found and [text for text in found if link not in text] == []


def test_every_message_is_in_the_source():
    source = "".join(path.read_text("utf-8") for path in ROOT.glob("workflow/**/*.py"))
    source += (ROOT / "SmolLm3.py").read_text("utf-8") + (ROOT / "Makefile").read_text("utf-8")
    messages = re.findall(r"^\| `(.+)` \|", README.partition("## Problems")[2], re.MULTILINE)
    messages += re.findall(r"^\| `(.+)` \|", HOW_TO.partition("## More problems")[2], re.MULTILINE)
    parts = {part.strip() for message in messages for part in re.split("[…;:]", message)}
    assert len(messages) == 12 and [part for part in parts if part not in source] == []
