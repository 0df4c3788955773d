"""The Hub, played on loopback: the real client against all that a network does."""

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
from workflow.reference.hub import probe
from workflow.reference.load import random_model

FILES = {"README.md": b"#", "config.json": b"{}" * 50, "model.safetensors": bytes(range(256)) * 999}
ASK = f"""
import sys
from workflow.errors import SourceError
from workflow.reference.hub import snapshot

for _ in sys.stdin:
    try:
        print(snapshot("org/tiny", "{COMMIT}", ["*.json", "*.safetensors"]))
    except SourceError as error:
        print("error:", error)
"""


@pytest.fixture
def hub():
    """A server with one repository, org/tiny."""
    with serve({"org/tiny": dict(FILES)}) as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    return hub.client(tmp_path / "hf")


@pytest.fixture
def ask(environment):
    """What a process that wants org/tiny says last: its folder, or the error."""

    def run(**more: str) -> str:
        call = [sys.executable, "-c", ASK]
        pipes = {"input": "\n", "capture_output": True, "text": True}
        result = subprocess.run(call, cwd=ROOT, env=os.environ | environment | more, **pipes)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return result.stdout.splitlines()[-1]

    return run


def got(answer: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(answer).iterdir()}


WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


FETCH = "with a network, type: hf download org/tiny --revision"
LOG_IN = "check its id, or type: hf auth login"
TROUBLES = [
    (Fault("hang", "/api/"), f"did not answer within 3 s; {FETCH}"),
    (Fault("hang", "config"), f"did not answer within 3 s; {FETCH}"),
    (Fault(401), f"the Hub answered 401 Unauthorized; {LOG_IN}"),
    (Fault(403, "config.json"), f"the Hub answered 403 Forbidden; {LOG_IN}"),
    (Fault(404), "the Hub answered 404 Not Found; mend its id or revision in the YAML"),
    (Fault(429), "the Hub answered 429 Too Many Requests; wait some minutes and run again"),
    (Fault(500), "the Hub answered 500 Internal Server Error; run again later"),
    (Fault(418), f"the Hub answered 418 I'm a Teapot; {FETCH}"),
    (Fault("wrong"), "config.json, model.safetensors arrived with another sha256 than the Hub's"),
    (Fault(403, "safetensors"), "Client error '403 Forbidden' for url"),
    (Fault("cut", "safetensors"), "the download failed (peer closed connection without"),
    (Fault("stall", "safetensors"), "the download failed (timed out); run again, it goes on there"),
]


def test_each_trouble_is_one_line_and_once_it_is_over_all_is_well(hub, environment):
    call, pipes = [sys.executable, "-u", "-c", ASK], {"stdin": subprocess.PIPE, "text": True}
    pipes |= {"stdout": subprocess.PIPE, "env": os.environ | environment, "cwd": ROOT}
    with subprocess.Popen(call, **pipes) as client:
        for fault, words in [*TROUBLES, (None, COMMIT)]:
            hub.fault, began = fault, time.perf_counter()
            client.stdin.write("\n")
            client.stdin.flush()
            answer = client.stdout.readline()
            while answer.startswith("Fetching"):
                answer = client.stdout.readline()
            assert words in answer and (fault is None or answer.startswith("error: org/tiny: "))
            assert time.perf_counter() - began < 25
        client.stdin.close()
    assert got(answer.strip()) == WANTED


@pytest.mark.parametrize("how", ["slow", "cut", "stall"])
def test_a_bad_line_is_no_obstacle(hub, ask, how):
    hub.fault = Fault(how, "safetensors", times=2 if how == "slow" else 3)
    assert got(ask()) == WANTED


def test_a_cached_file_that_is_not_what_the_hub_said_is_never_used(hub, ask):
    folder, asked = Path(ask()), list(hub.asked)
    assert got(ask()) == WANTED
    (folder / "model.safetensors").resolve().write_bytes(b"another of any size")
    answer = ask(HF_HUB_OFFLINE="1")
    assert answer.startswith("error: org/tiny: not in the cache, and HF_HUB_OFFLINE is set; ")
    assert hub.asked == asked  # with a whole cache it was not asked either
    assert not (folder / "model.safetensors").exists()
    assert got(ask()) == WANTED


def test_a_link_out_of_the_cache_is_not_followed(hub, ask, tmp_path):
    folder, mine = Path(ask()), tmp_path / "mine.bin"
    mine.write_bytes(b"not the cache's")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(mine)
    assert got(ask()) == WANTED
    assert mine.read_bytes() == b"not the cache's"


def test_offline_with_an_empty_cache_the_command_that_is_given_fetches_all(hub, ask, environment):
    answer = ask(HF_HUB_OFFLINE="1")
    assert hub.asked == []
    typed = shlex.split(answer.partition("type: ")[2])
    typed[0] = str(Path(sys.executable).with_name(typed[0]))
    subprocess.run(typed, env=os.environ | environment, check=True, capture_output=True)
    hub.asked.clear()
    assert got(ask(HF_HUB_OFFLINE="1")) == WANTED
    assert hub.asked == []


def test_the_probe_asks_as_the_user_whose_token_the_client_would_send(hub, ask):
    ask(HF_TOKEN="hf_of_somebody")  # noqa: S106
    assert [hub.tokens[0], hub.tokens[1]] == 2 * ["Bearer hf_of_somebody"]


def test_an_answer_that_leads_elsewhere_is_an_answer(hub, ask):
    hub.fault = Fault(307, "config.json", times=1)
    assert got(ask()) == WANTED


def test_the_probe_says_what_is_wrong_and_never_waits_long(hub):
    hub.fault = Fault("hang")
    began = time.perf_counter()
    what, status = probe(hub.url, seconds=0.3)
    assert what.endswith("did not answer within 0.3 s") and status is None
    assert time.perf_counter() - began < 2
    for address in ("http://127.0.0.1:1", "no address", "http://[::bad", "http://name.invalid"):
        assert "cannot be reached" in probe(address, seconds=20)[0]


# --- whole commands -------------------------------------------------------------------------------


@pytest.fixture
def tiny(hub, tmp_path):
    """org/tiny is a model of the ci profile, and the settings that ask for it."""
    folder = tmp_path / "served"
    architecture = load_config(ROOT / "SmolLm3_Config.yaml", "ci").member.architecture
    for part in random_model(architecture, seed=11):
        part.save_pretrained(folder)
    hub.repositories["org/tiny"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    settings = ["members.tiny.hub_id=org/tiny", f"members.tiny.revision={COMMIT}"]
    return [part for setting in settings for part in ("--set", setting)]


def test_the_hub_is_asked_once_and_its_cache_afterwards(hub, tiny, command, environment):
    first = command("verify", *tiny, "--set", "reference.source=auto", **environment)
    assert first.returncode == 0, first.stderr
    assert f"Reference: org/tiny (from hub, revision {COMMIT}; weights sha256" in first.stdout
    assert any(path.endswith("model.safetensors") for path in hub.asked)

    hub.asked.clear()
    again = command("verify", *tiny, "--set", "reference.source=auto", **environment)
    assert again.returncode == 0, again.stderr
    assert hub.asked == []
    assert reference_line(again) == reference_line(first)


def reference_line(result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("Reference")]


def test_a_command_says_it_in_one_line(hub, tiny, command, environment):
    hub.fault = Fault("wrong", "/config.json")
    result = command("generate", "x", *tiny, "--set", "reference.source=hub", **environment)
    assert result.returncode == 5
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: org/tiny: config.json arrived with another sha256 than the")
