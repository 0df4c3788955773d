"""A loopback server plays the Hub: the real client against the faults of a network."""

import errno
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import COMMIT, Fault, serve

from conftest import ROOT
from workflow.config.load import load_config
from workflow.errors import DiskError, SourceError
from workflow.reference import hub as module
from workflow.reference.hub import probe, snapshot
from workflow.reference.load import random_model

FILES = {"README.md": b"#", "config.json": b"{}" * 50, "model.safetensors": bytes(range(256)) * 999}


@pytest.fixture
def hub():
    """A server with one repository, org/tiny."""
    with serve({"org/tiny": dict(FILES)}) as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    return hub.client(tmp_path / "hf")


@pytest.fixture
def ask(hub, environment, monkeypatch, capsys):
    """Asks for org/tiny with the real client: its folder, or the error."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": environment["HF_HOME"] + "/hub",
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        "HF_HUB_ETAG_TIMEOUT": 1,
    }
    monkeypatch.setenv("NO_PROXY", environment["NO_PROXY"])
    for name, value in settings.items():
        monkeypatch.setattr(module.constants, name, value)

    def run(*, offline: bool = False) -> str:
        monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", offline)
        try:
            return str(snapshot("org/tiny", COMMIT, ["*.json", "*.safetensors"]))
        except SourceError as error:
            return f"error: {error}"
        finally:
            assert capsys.readouterr().err == ""

    return run


def got(answer: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(answer).iterdir()}


WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


FETCH = "with a network, type: hf download org/tiny --repo-type model --revision"
LATER = "wait some minutes and run again"
LOG_IN = "check its id, or type: hf auth login"
FAULTS = [
    (Fault("hang", "/api/"), f"cannot be reached (no answer within 3 s); {FETCH}"),
    (Fault(401), f"the Hub answered 401 Unauthorized; {LOG_IN}"),
    (Fault(404), "the Hub answered 404 Not Found; fix its id or revision in the YAML"),
    (Fault(429), f"the Hub answered 429 Too Many Requests; {LATER}"),
    (Fault(500), f"the Hub answered 500 Internal Server Error; {LATER}"),
    (Fault(418), f"the Hub answered 418 I'm a Teapot; {FETCH}"),
    (Fault(403, "resolve"), f"the Hub answered 403 Forbidden; {LOG_IN}"),  # gated
    (Fault("hang", "resolve"), f"cannot be reached (no answer within 3 s); {FETCH}"),
    (Fault("cut", "safetensors"), "the download failed (peer closed connection without"),
    (Fault("stall", "safetensors"), "the download failed (timed out); run again, it continues"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_each_fault_is_one_line_and_afterwards_the_files_arrive(hub, ask, fault, words):
    hub.fault, began = fault, time.perf_counter()
    answer = ask()
    assert answer.startswith("error: org/tiny: ") and words in answer
    assert time.perf_counter() - began < 25
    hub.fault = None
    assert got(ask()) == WANTED


@pytest.mark.parametrize("how", ["slow", "cut", "stall"])
def test_a_fault_that_passes_is_retried(hub, ask, how):
    hub.fault = Fault(how, "safetensors", times=2 if how == "slow" else 3)
    assert got(ask()) == WANTED


def named_file(answer: str) -> Path:
    """The file that an error of the form `FILE: its hash is not …; remove it …` names."""
    what = ": its hash is not the Hub's for model.safetensors; remove it and run again"
    assert answer.startswith("error: ") and answer.endswith(what)
    return Path(answer.removeprefix("error: ").removesuffix(what))


def test_a_cached_file_with_another_hash_is_refused_but_not_deleted(hub, ask):
    folder, asked = Path(ask()), list(hub.asked)
    assert got(ask()) == WANTED
    (folder / "model.safetensors").resolve().write_bytes(b"another of any size")
    file = named_file(ask())
    assert hub.asked == asked  # neither with a valid cache nor with a damaged one
    assert file.read_bytes() == b"another of any size"
    file.unlink()
    assert got(ask()) == WANTED


def test_a_downloaded_file_with_another_hash_is_refused_until_it_is_removed(hub, ask):
    hub.fault = Fault("wrong", "safetensors")
    file = named_file(ask())
    hub.fault = None
    assert named_file(ask()) == file
    file.unlink()
    assert got(ask()) == WANTED


def test_a_file_in_the_store_that_repositories_share_has_the_hash_of_its_link(ask):
    """The client moves a Xet file there, under another hash than sha256."""
    folder = Path(ask())
    blob = (folder / "model.safetensors").resolve()
    stored = folder.parents[3] / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    assert got(ask()) == WANTED
    stored.write_bytes(b"another of any size")
    assert named_file(ask()) == stored


def test_a_link_out_of_the_cache_is_refused_and_only_the_link_is_to_be_removed(ask, tmp_path):
    folder, mine = Path(ask()), tmp_path / "mine.bin"
    mine.write_bytes(b"not the cache's")
    link = folder / "model.safetensors"
    link.unlink()
    link.symlink_to(mine)
    assert named_file(ask()) == link
    link.unlink()
    assert got(ask()) == WANTED
    assert mine.read_bytes() == b"not the cache's"


def test_offline_with_an_empty_cache_the_command_that_is_given_fetches_all(hub, ask, environment):
    answer = ask(offline=True)
    assert hub.asked == []
    typed = shlex.split(answer.partition("type: ")[2])
    typed[0] = str(Path(sys.executable).with_name(typed[0]))
    subprocess.run(typed, env=os.environ | environment, check=True, capture_output=True)
    hub.asked.clear()
    assert got(ask(offline=True)) == WANTED
    assert hub.asked == []


def test_the_probe_never_waits_long(hub, monkeypatch):
    monkeypatch.setattr(module.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.fault, began = Fault("hang"), time.perf_counter()
    assert str(probe("org/tiny", COMMIT, "model", 0.3)) == "no answer within 0.3 s"
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "no address", "http://[::bad", "http://name.invalid"]
)
def test_a_hub_that_cannot_be_reached_is_one_line(address, monkeypatch, tmp_path):
    monkeypatch.setattr(module.constants, "ENDPOINT", address)
    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError) as caught:
        snapshot("org/tiny", COMMIT, ["*.json"])
    assert str(caught.value).startswith(f"org/tiny: {address} cannot be reached (")


def test_a_full_disk_is_a_disk_error():
    def fetch():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="the disk is full; free some room, or set HF_HOME"):
        module.download("org/tiny", fetch)


# --- whole commands -------------------------------------------------------------------------------


@pytest.fixture
def tiny(hub, tmp_path):
    """org/tiny is a model of the ci profile, and the settings that ask for it."""
    folder = tmp_path / "served"
    architecture = load_config(ROOT / "SmolLm3_Config.yaml", "ci").model_entry.architecture
    for part in random_model(architecture, seed=11):
        part.save_pretrained(folder)
    hub.repositories["org/tiny"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    settings = ["models.tiny.hub_id=org/tiny", f"models.tiny.revision={COMMIT}"]
    return [part for setting in settings for part in ("--set", setting)]


def test_the_hub_is_asked_once_and_its_cache_afterwards(hub, tiny, command, environment):
    first = command("verify", "--quick", *tiny, "--set", "reference.source=auto", **environment)
    assert first.returncode == 0, first.stderr
    assert f"Reference: org/tiny (from hub, revision {COMMIT}; weights sha256" in first.stdout
    assert any(path.endswith("model.safetensors") for path in hub.asked)

    hub.asked.clear()
    again = command("verify", "--quick", *tiny, "--set", "reference.source=auto", **environment)
    assert again.returncode == 0, again.stderr
    assert hub.asked == []
    assert reference_line(again) == reference_line(first)


def reference_line(result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("Reference")]


def test_a_command_prints_the_error_in_one_line(hub, tiny, command, environment):
    hub.fault = Fault(503)
    result = command("generate", "x", *tiny, "--set", "reference.source=hub", **environment)
    assert result.returncode == 5
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: org/tiny: the Hub answered 503 Service Unavailable; wait")
