"""The real Hub client on a local server, with simulated network faults."""

import errno
import os
import time
from pathlib import Path

import pytest
from loopback import COMMIT, Fault, serve

from workflow.errors import DiskError, SourceError
from workflow.reference.hub import check_files, download, snapshot
from workflow.reference.load import REQUIRED_FILES

FILES = {"README.md": b"#", "config.json": b"{}" * 50, "model.safetensors": bytes(range(256)) * 999}
WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with one repository, org/tiny. This process uses it."""
    with serve({"org/tiny": dict(FILES)}) as hub:
        hub.connect(tmp_path / "hf", monkeypatch)
        yield hub


@pytest.fixture
def get(hub, capsys):
    """Gets org/tiny with the real client. Returns the folder, or the error."""

    def run() -> str:
        try:
            return str(snapshot("org/tiny", COMMIT, ["*.json", "*.safetensors"]))
        except SourceError as error:
            return f"error: {error}"
        finally:
            assert capsys.readouterr().err == ""

    return run


def contents(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


DOWNLOAD = "with a network, type: hf download org/tiny --repo-type model --revision"
LOG_IN = "check its id, or type: hf auth login"
FAULTS = [
    (Fault(404), "the Hub answered 404 Not Found; fix its id or revision in the YAML"),
    (Fault(418), f"the Hub answered 418 I'm a Teapot; {DOWNLOAD}"),
    (Fault(403, "resolve"), f"the Hub answered 403 Forbidden; {LOG_IN}"),  # gated
    (Fault("hang", "resolve"), f"cannot be reached (no answer within 3 s); {DOWNLOAD}"),
    (Fault("cut", "safetensors"), "bytes, expected 255744)); run again, it continues where"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_network_fault_is_one_line_and_the_next_try_succeeds(hub, get, fault, message):
    hub.fault, start = fault, time.perf_counter()
    answer = get()
    assert answer.startswith("error: org/tiny: ") and message in answer
    if fault.kind == "hang":
        assert time.perf_counter() - start < 25  # the client alone can wait for minutes
    hub.fault = None
    assert contents(get()) == WANTED


def test_download_that_stops_halfway_is_continued(hub, get):
    hub.fault = Fault("stall", "safetensors", times=3)
    assert contents(get()) == WANTED


# --- damaged files --------------------------------------------------------------------------------


def damaged_file(answer: str) -> Path:
    """The file in an error of the form `FILE: its hash is not …; remove it …`."""
    what = ": its hash is not the Hub's for model.safetensors; remove it and run again"
    assert answer.startswith("error: ") and answer.endswith(what)
    return Path(answer.removeprefix("error: ").removesuffix(what))


def test_file_with_a_wrong_hash_is_refused_when_downloaded_and_when_cached(hub, get):
    hub.fault = Fault("wrong", "safetensors")
    file, requests = damaged_file(get()), list(hub.requests)
    hub.fault = None
    assert damaged_file(get()) == file
    assert hub.requests == requests  # the cache is used without a request
    file.unlink()  # the user's decision
    assert contents(get()) == WANTED


def test_file_in_the_shared_store_is_checked_with_the_hash_of_its_link(get):
    """The client moves Xet files there. Their names are not sha256."""
    folder = Path(get())
    blob = (folder / "model.safetensors").resolve()
    stored = folder.parents[3] / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    assert contents(get()) == WANTED
    stored.write_bytes(b"another of any size")
    assert damaged_file(get()) == stored


def test_link_to_a_file_outside_the_cache_is_refused_and_the_file_stays(get, tmp_path):
    folder, mine = Path(get()), tmp_path / "mine.bin"
    mine.write_bytes(b"not from the cache")
    link = folder / "model.safetensors"
    link.unlink()
    link.symlink_to(mine)
    assert damaged_file(get()) == link
    link.unlink()
    assert contents(get()) == WANTED
    assert mine.read_bytes() == b"not from the cache"


def test_snapshot_is_complete_with_all_needed_files_and_all_shards(tmp_path):
    names = [*REQUIRED_FILES[:2], *(f"model-0000{part}-of-00002.safetensors" for part in (1, 2))]
    complete = []
    for name in names:
        (tmp_path / name).touch()
        complete.append(check_files(tmp_path, ["*"], REQUIRED_FILES))
    assert complete == [False, False, False, True]


def test_full_disk_is_a_disk_error():
    def fetch():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="the disk is full; free disk space, or set HF_HOME"):
        download("org/tiny", fetch)


def test_model_comes_from_the_hub_then_from_its_cache(hub, reference, here, refused, tmp_path):
    for part in (reference.model, reference.tokenizer):
        part.save_pretrained(tmp_path / "served")
    files = (tmp_path / "served").iterdir()
    hub.repositories["org/tiny"] = {file.name: file.read_bytes() for file in files}
    settings = ["models.tiny.hub_id=org/tiny", f"models.tiny.revision={COMMIT}"]
    settings += ["reference.source=hub"]
    hub.fault = Fault(503)
    line = refused(5, "generate", "x", settings=settings)
    assert line.startswith("error: org/tiny: the Hub answered 503 Service Unavailable; wait")
    hub.fault = None
    for uses_cache in (False, True):
        hub.requests.clear()
        code, _, error = here("generate", "x", "--tokens", "1", settings=settings)
        assert code == 0, error
        assert f"Reference: org/tiny (from hub, revision {COMMIT})" in error
        assert (hub.requests == []) == uses_cache
    hub.repositories["org/other"] = files = dict(hub.repositories["org/tiny"])
    del files["model.safetensors"]
    line = refused(5, "train", settings=[*settings, "models.tiny.hub_id=org/other"])
    assert f"org/other: its revision {COMMIT} has no *.safetensors; choose a model" in line
