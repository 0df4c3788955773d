"""The Hub, played on loopback for the real client: a download, then its cache without a server."""

import hashlib
import http.server
import json
import threading

import pytest

from conftest import ROOT
from workflow.config import load_config
from workflow.reference import random_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for org/tiny as the Hub does; its files are `server.files`."""

    def do_GET(self):
        files, name = self.server.files, self.path.rpartition("/")[2]
        self.server.asked.append(self.path)
        if self.path.startswith("/api/models/org/tiny/tree/"):
            sizes = {name: len(body) for name, body in files.items()}
            entries = [
                {"type": "file", "path": name, "size": size, "oid": COMMIT}
                for name, size in sizes.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif self.path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in files]
            known = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(known).encode())
        elif self.path.startswith("/org/tiny/resolve/") and name in files:
            etag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A server with one repository, org/tiny. `asked` lists the requests."""
    folder = tmp_path / "served"
    architecture = load_config(ROOT / "SmolLm3_Config.yaml", "ci").member.architecture
    for part in random_model(architecture, seed=11):
        part.save_pretrained(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_and_its_cache_afterwards(hub, command, tmp_path):
    settings = ["--set", "members.tiny.hub_id=org/tiny", "--set", "reference.source=auto"]
    settings += ["--set", f"members.tiny.revision={COMMIT}"]
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }
    first = command("verify", *settings, **environment)
    assert first.returncode == 0, first.stderr
    assert f"Reference: org/tiny (from hub, revision {COMMIT}; weights sha256" in first.stdout
    assert any(path.endswith("model.safetensors") for path in hub.asked)

    hub.asked.clear()
    again = command("verify", *settings, **environment)
    assert again.returncode == 0, again.stderr
    assert hub.asked == []
    assert [line for line in again.stdout.splitlines() if line.startswith("Reference")] == [
        line for line in first.stdout.splitlines() if line.startswith("Reference")
    ]


def test_a_hub_that_does_not_know_the_model_is_said_in_one_line(hub, command, tmp_path):
    settings = ["--set", "members.tiny.hub_id=org/absent", "--set", "reference.source=hub"]
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }
    result = command("verify", *settings, **environment)
    assert result.returncode == 5
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: org/absent: it answered 404 Not Found; ")
