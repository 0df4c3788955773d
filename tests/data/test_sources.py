"""Where the text comes from: files, folders, and the Hub, played on loopback for `datasets`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from loopback import COMMIT, Fault, serve
from pyarrow import parquet
from test_documents import LINES

from conftest import ROOT
from workflow.config.load import load_config
from workflow.data.sources import find_source, read_card
from workflow.errors import DataError
from workflow.reference.hub import matching

CARD = """\
---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - {split: train, path: wikitext-103-raw-v1/train-*}
- config_name: wikitext-2-v1
  data_files:
  - {split: train, path: wikitext-2-v1/train-*}
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
---
# A small wikitext
"""
TRAIN_FILE = "wikitext-2-raw-v1/train"
TRAIN = [*LINES, " = Three = \n", *[f" line {number} \n" for number in range(60)]]
HELD_OUT = [" = Held out = \n", *[f" row {number} \n" for number in range(60)]]


def settings(**changed):
    data = load_config(ROOT / "SmolLm3_Config.yaml", "quick").data
    return data.model_copy(update=changed)


# --- files and folders ----------------------------------------------------------------------------


def test_a_folder_is_read_as_datasets_splits_it_and_what_is_left_out_is_said(tmp_path, capsys):
    for name in ("train-2.txt", "train-1.txt", "valid.txt", "test.txt", "other.jsonl"):
        (tmp_path / name).write_text("x")
    source = find_source(settings(source=str(tmp_path)))
    assert [file.name for file in source.train] == ["train-1.txt", "train-2.txt"]
    assert [file.name for file in source.validation] == ["valid.txt"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"Note: of {tmp_path}, 1 files of another kind are left out, such as other.jsonl"


def test_a_folder_without_names_of_splits_is_all_trained_on(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    source = find_source(settings(source=str(tmp_path)))
    assert [file.name for file in source.train] == ["a.txt", "b.txt"]
    assert source.validation == ()


def test_an_empty_folder_and_one_without_a_training_part_are_refused_in_one_line(tmp_path):
    with pytest.raises(DataError) as caught:
        find_source(settings(source=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(DataError, match="no files to train on, but of: test"):
        find_source(settings(source=str(tmp_path)))


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A server with a small wikitext, in the layout of the real one."""
    files = {"README.md": CARD.encode(), ".gitattributes": b"x"}
    rows = {"train": TRAIN, "validation": HELD_OUT, "test": ["x"]}
    path = tmp_path / "part.parquet"
    for split, lines in rows.items():
        parquet.write_table(pyarrow.table({"text": lines}), path)
        files[f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"] = path.read_bytes()
    files["wikitext-103-raw-v1/train-00000-of-00001.parquet"] = path.read_bytes()
    with serve({"datasets/Salesforce/wikitext": files}) as hub:
        yield hub


ASK = """
import json
import sys
from workflow.errors import WorkflowError
from workflow.config.load import load_config
from workflow.data.documents import documents
from workflow.data.sources import find_source

for line in sys.stdin:
    settings = load_config(profile="ci", overrides=json.loads(line)).data
    try:
        source = find_source(settings)
        for files in (source.train, source.validation):
            count = sum(ends for _, ends in documents(files, source.column))
            print(source.name, source.revision, count)
    except WorkflowError as error:
        print(f"error {error.exit_code}: {error}")
"""
WIKITEXT = f"Salesforce/wikitext wikitext-2-raw-v1 {COMMIT}"


@pytest.fixture
def client(hub, tmp_path):
    return hub.client(tmp_path / "hf")


@pytest.fixture
def ask(client):
    """What a process finds as its data: lines of name, revision and documents, or the error."""

    def run(*sets: str, source: str = "hub", more=(), **environment: str) -> list[str]:
        common = [f"data.source={source}", f"data.revision={COMMIT}"]
        settings = [[*common, *several] for several in (sets, *more)]
        pipes = {"input": "".join(json.dumps(each) + "\n" for each in settings), "text": True}
        pipes |= {"capture_output": True, "env": os.environ | client | environment, "cwd": ROOT}
        result = subprocess.run([sys.executable, "-c", ASK], **pipes)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return [line for line in result.stdout.splitlines() if not line.startswith("Fetching")]

    return run


def test_a_run_on_wikitext_from_the_hub_and_again_from_its_cache(hub, client, command, story):
    sets = ["train.steps=2", "train.validation_tokens=32", f"data.revision={COMMIT}"]
    options = [word for part in ("data.source=auto", *sets) for word in ("--set", part)]
    told = []
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.asked.clear()
        result = command("train", *options, **client | environment)
        assert result.returncode == 0, result.stderr
        told += [line for line in result.stdout.splitlines() if line.startswith("Data: ")]
    assert hub.asked == [] and told[0] == told[1]
    assert told[0].startswith("Data: Salesforce/wikitext wikitext-2-raw-v1, 4 documents, ")
    assert f"(revision {COMMIT}, text sha256 " in told[0]
    # tokens are bytes, and the end of a text takes the place of its last newline
    assert f", {len(''.join(TRAIN))} tokens to train on, {len(''.join(HELD_OUT))} held " in told[0]
    (provenance,) = (story / "runs").glob("*/provenance.json")
    assert f'"text_revision": "{COMMIT}"' in provenance.read_text()

    (checkpoint,) = (story / "checkpoints").glob("*/checkpoint_2.pt")
    (folder,) = Path(client["HF_HOME"]).glob("hub/datasets--*")
    shutil.rmtree(folder)  # what it was trained on cannot be had any more
    result = command("resume", str(checkpoint), *options, **client | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 3
    assert "data.text_sha256" in result.stderr


def test_a_run_on_the_projects_text_is_resumed_on_it_though_the_hub_is_back(
    hub, client, command, story
):
    sets = ["train.steps=2", "train.resume_steps=1", "train.validation_tokens=32"]
    sets += ["data.source=auto", f"data.revision={COMMIT}"]
    options = [word for part in sets for word in ("--set", part)]
    hub.fault = Fault(503)
    first = command("train", *options, **client)
    assert first.returncode == 0, first.stderr
    assert "Data: input.txt, " in first.stdout
    hub.fault = None
    (checkpoint,) = (story / "checkpoints").glob("*/checkpoint_2.pt")
    again = command("resume", str(checkpoint), *options, **client)
    assert again.returncode == 0, again.stderr
    assert "Data: input.txt, " in again.stdout and "Saved checkpoint_3.pt" in again.stdout


def test_what_datasets_has_in_its_cache_is_found_there(hub, client, ask):
    code = "from datasets import load_dataset\n"
    code += f"load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', revision='{COMMIT}')"
    environment = os.environ | client
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    hub.asked.clear()
    assert ask(HF_HUB_OFFLINE="1") == [f"{WIKITEXT} 3", f"{WIKITEXT} 1"]
    assert hub.asked == []


def test_a_cache_with_one_of_two_parts_is_not_taken_for_the_whole(hub, client, ask):
    files = hub.repositories["datasets/Salesforce/wikitext"]
    body = files.pop(f"{TRAIN_FILE}-00000-of-00001.parquet")
    files |= {f"{TRAIN_FILE}-0000{part}-of-00002.parquet": body for part in (0, 1)}
    for name in ("README.md", f"{TRAIN_FILE}-00000-of-00002.parquet"):
        call = [str(Path(sys.executable).with_name("hf")), "download", "Salesforce/wikitext", name]
        call += ["--repo-type", "dataset", "--revision", COMMIT]
        subprocess.run(call, env=os.environ | client, check=True, capture_output=True)
    assert ask() == [f"{WIKITEXT} 6", f"{WIKITEXT} 1"]


def test_offline_with_an_empty_cache_the_command_that_is_given_fetches_all(hub, client, ask):
    (line,) = ask(HF_HUB_OFFLINE="1")
    typed = shlex.split(line.partition("type: ")[2])
    typed[0] = str(Path(sys.executable).with_name(typed[0]))
    subprocess.run(typed, env=os.environ | client, check=True, capture_output=True)
    hub.asked.clear()
    assert ask(HF_HUB_OFFLINE="1") == [f"{WIKITEXT} 3", f"{WIKITEXT} 1"]
    assert hub.asked == []


def test_without_the_hub_the_projects_own_text_is_taken_and_the_reason_is_printed(hub, ask):
    hub.fault = Fault(503)
    why, taken, _ = ask(source="auto")
    cause = "the Hub answered 503 Service Unavailable"
    assert why == f"The Hub is skipped: Salesforce/wikitext: {cause}"
    assert taken.startswith("input.txt ")


TROUBLES = {
    "data.name=wikitext-9": (2, "no configuration 'wikitext-9', but wikitext-103-raw-v1, "),
    "data.name=null": (2, "no configuration None, but wikitext-103-raw-v1, wikitext-2-v1"),
    "data.name=wikitext-2-v1": (2, "no files to train on"),
    "data.column=content": (2, "no column 'content', but text"),
    "data.dataset=Salesforce/absent": (5, "the Hub answered 404 Not Found; fix its"),
    "data.dataset=no id at all": (5, "no id at all: "),
    "data.revision=..": (5, "Salesforce/wikitext: "),
}


def test_each_setting_that_cannot_be_had_is_one_line(hub, ask):
    first, *more = TROUBLES
    lines = ask(first, more=[[setting] for setting in more])
    for line, (code, words) in zip(lines, TROUBLES.values(), strict=True):
        assert line.startswith(f"error {code}: ") and words in line


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("wrong", "its hash is not the Hub's"),
        ("cut", "the download failed (peer closed connection"),
    ],
)
def test_files_that_do_not_arrive_whole_are_one_line(hub, ask, how, words):
    hub.fault = Fault(how, "train-.*parquet")
    (line,) = ask()
    assert line.startswith("error 5: ") and words in line


def test_a_damaged_parquet_is_one_line(hub, ask):
    files = hub.repositories["datasets/Salesforce/wikitext"]
    name = f"{TRAIN_FILE}-00000-of-00001.parquet"
    files[name] = files[name][:-20]
    (line,) = ask()
    assert line.startswith("error 2: ") and "it cannot be read as parquet" in line


@pytest.mark.parametrize(
    "card",
    [
        b"---\nconfigs: [}\n---\n",
        b"---\nconfigs: 7\n---\n",
        b"---\nconfigs: [7]\n---\n",
        b"---\nconfigs:\n- data_files: x\n---\n",
        b"---\nconfigs:\n- {config_name: a, data_files: [{split: [1], path: 2}]}\n---\n",
        b"\xff\xfe",
    ],
)
def test_a_card_that_makes_no_sense_is_one_line(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(DataError, match=r"a/b: its README\.md cannot be read \(") as caught:
        read_card(tmp_path / "README.md", settings(dataset="a/b"))
    assert "\n" not in str(caught.value)


def test_patterns_stay_below_their_folder(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("out.txt", "in/a/x.txt", "in/.hidden"):
        (tmp_path / name).write_text("x")
    patterns = ["../*", "/*", "*", "a/*", str(tmp_path / "*")]
    assert matching(tmp_path / "in", patterns) == [tmp_path / "in" / "a" / "x.txt"]
