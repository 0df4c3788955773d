"""Sources of text: files, folders, and data sets on a local server that acts as the Hub."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import COMMIT, Fault, serve
from test_documents import LINES

from conftest import ROOT, SHORT
from workflow.config.load import load_config
from workflow.data.sources import find_source, read_card
from workflow.errors import DataError, SourceError
from workflow.reference.hub import constants, matching_files

CARD = """\
---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - {split: train, path: wikitext-103-raw-v1/train-*}
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
---
# A small wikitext
"""
TRAIN = [*LINES, " = Three = \n", *[f" line {number} \n" for number in range(60)]]
VALIDATION = [" = Held out = \n", *[f" row {number} \n" for number in range(60)]]

TEST = [" = Test = \n", "", " row \n"]


def settings(**changed):
    data = load_config(ROOT / "SmolLm3_Config.yaml", "quick").data
    return data.model_copy(update={"revision": COMMIT, "source": "hub", **changed})


# --- files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        ("b.txt a.txt", "a.txt b.txt", ""),
        ("train-2.txt train-1.txt valid.txt test.txt", "train-1.txt train-2.txt", "valid.txt"),
        ("A.TXT [1].TXT", "A.TXT [1].TXT", ""),
    ],
)
def test_folder_is_split_by_file_names(tmp_path, files, train, validation, capsys):
    folder = tmp_path / "data [v2]"
    folder.mkdir()
    for name in (*files.split(), "other.jsonl", "photo.png"):
        (folder / name).write_text("x" * len(name) ** 3)
    source = find_source(settings(source=str(folder)))
    assert " ".join(file.name for file in source.train) == train
    assert " ".join(file.name for file in source.validation) == validation
    assert all(file.is_file() for file in source.train + source.validation)
    note = f"Note: 2 files in {folder} are not used, for example other.jsonl\n"
    assert capsys.readouterr().out == note


def test_folder_without_training_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        find_source(settings(source=str(tmp_path)))
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(DataError, match="no training files, only files for: test"):
        find_source(settings(source=str(tmp_path)))


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with a small wikitext, in the layout of the real one. This process uses it."""
    import pandas

    files = {"README.md": CARD.encode(), ".gitattributes": b"x"}
    for split, lines in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        content = pandas.DataFrame({"text": lines}).to_parquet()
        files[f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"] = content
    files["wikitext-103-raw-v1/train-00000-of-00001.parquet"] = content
    with serve({"datasets/Salesforce/wikitext": files}) as hub:
        hub.connect(tmp_path / "hf", monkeypatch)
        yield hub


HUB_RUN = (*SHORT, "data.source=auto", f"data.revision={COMMIT}")


def test_run_on_wikitext_from_the_hub_then_from_its_cache(hub, here, refused, project, tmp_path):
    lines = []
    for _ in range(2):
        hub.requests.clear()
        code, _, error = here("train", settings=HUB_RUN)
        assert code == 0, error
        lines += [line for line in error.splitlines() if line.startswith("Data: ")]
    assert hub.requests == [] and lines[0] == lines[1]
    assert lines[0].startswith("Data: Salesforce/wikitext wikitext-2-raw-v1, 4 documents, ")
    assert f"(revision {COMMIT}, text sha256 " in lines[0]
    # a token is a byte; the end-of-text token replaces the last newline
    sizes = [len("".join(rows)) for rows in (TRAIN, VALIDATION)]
    assert f", {sizes[0]} tokens to train on, {sizes[1]} held out " in lines[0]
    (provenance,) = (project / "runs").glob("*/provenance.json")
    assert f'"text_revision": "{COMMIT}"' in provenance.read_text()
    (checkpoint,) = (project / "checkpoints").glob("*/checkpoint_20.pt")
    shutil.rmtree(tmp_path / "hf")
    hub.fault = Fault(503)  # without the training text, the resume would use input.txt
    assert "data.text_sha256" in refused(3, "resume", str(checkpoint), settings=HUB_RUN)


def test_run_without_the_hub_uses_input_txt_and_is_resumed_on_it(hub, here, project):
    hub.fault = Fault(503)
    code, _, error = here("train", settings=HUB_RUN)
    assert code == 0, error
    reason = "the Hub answered 503 Service Unavailable"
    assert f"The Hub is skipped: Salesforce/wikitext: {reason}\n" in error
    assert "Data: input.txt, " in error
    hub.fault = None
    (checkpoint,) = (project / "checkpoints").glob("*/checkpoint_20.pt")
    code, printed, error = here("resume", str(checkpoint), settings=HUB_RUN)
    assert code == 0, error
    assert "Data: input.txt, " in error and "Saved checkpoint_25.pt" in printed


def test_offline_error_names_the_command_that_downloads_everything(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="not in the cache, and HF_HUB_OFFLINE is set") as caught:
        find_source(settings())
    command, *words = shlex.split(str(caught.value).partition("type: ")[2])
    program = Path(sys.executable).with_name(command)
    subprocess.run([program, *words], check=True, capture_output=True)
    hub.requests.clear()
    source = find_source(settings())
    assert [len(source.train), len(source.validation)] == [1, 1]
    assert hub.requests == []


def test_data_set_that_does_not_exist_is_refused(hub):
    words = "no configuration 'wikitext-9', but wikitext-103-raw-v1, "
    with pytest.raises(DataError, match=words):
        find_source(settings(name="wikitext-9"))
    with pytest.raises(SourceError, match="no id at all: "):
        find_source(settings(dataset="no id at all"))


def test_the_how_to_writes_the_splits_of_wikitext(hub, tmp_path):
    text = (ROOT / "docs" / "how-to.md").read_text("utf-8")
    (program,) = re.findall(
        r"^```python\n([^`]+load_dataset.+?)^```$", text, re.MULTILINE | re.DOTALL
    )
    command = [sys.executable, "-c", program]  # `datasets` reads the server's address at import
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for split, rows in (("validation", VALIDATION), ("test", TEST)):
        written = (tmp_path / f"wikitext-2-raw-v1-{split}.txt").read_bytes()
        assert written.decode() == "".join(row or " \n" for row in rows)


@pytest.mark.parametrize("card", [b"---\nconfigs: [}\n---\n", b"---\nconfigs: [7]\n---\n", b"\xff"])
def test_invalid_card_is_refused_in_one_line(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(DataError, match=r"a/b: its README\.md cannot be read \(") as caught:
        read_card(tmp_path / "README.md", settings(dataset="a/b"))
    assert "\n" not in str(caught.value)


def test_patterns_match_only_files_inside_the_folder(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("out.txt", "in/a/x.txt", "in/.hidden"):
        (tmp_path / name).write_text("x")
    patterns = ["../*", "/*", "*", "a/*", str(tmp_path / "*")]
    assert matching_files(tmp_path / "in", patterns) == [tmp_path / "in" / "a" / "x.txt"]
