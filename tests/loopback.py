"""A local server that acts as the Hub for the real client, and can simulate network faults."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".parquet", ".gz")  # named after their sha256; others: git's hash
PATHS = re.compile(  # repository, call, and path of a file
    r"/(?:api/)?(?:models/)?((?:datasets/)?[^/]+/[^/]+)/(revision|tree|resolve)/[\w.-]+/?([^?]*)"
)


@dataclass
class Fault:
    """A fault that the server simulates.

    kind: an HTTP status, or hang (no answer), stall (stops halfway), cut (closes the connection
    halfway) or wrong (one changed bit).
    """

    kind: int | str
    path: str = ".*"  # only for requests that match this regular expression
    times: int = 1000  # only for this many requests


@dataclass
class Hub:
    """The server. repositories: the files of each "org/name" or "datasets/org/name"."""

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    fault: Fault | None = None
    requests: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def connect(self, home, monkeypatch) -> None:
        """Clients use this server, a cache in `home`, and short timeouts; also new processes."""
        for name, value in (("ENDPOINT", self.url), ("HOME", str(home))):
            monkeypatch.setenv(f"HF_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # it has read the environment
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, 1)

    def fault_kind(self, path: str) -> int | str | None:
        fault = self.fault
        if fault is None or fault.times == 0 or not re.search(fault.path, path):
            return None
        fault.times -= 1
        return fault.kind


def etag(path: str, body: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def tree(files: dict[str, bytes], folder: str, everywhere: bool) -> list[dict]:
    """What is in a folder ("": the whole repository); `everywhere`: also in its folders."""
    start = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(start)]
    folders = {start + name.removeprefix(start).partition("/")[0] for name in inside} - {*inside}
    if everywhere:
        folders = ()
    else:
        inside = [name for name in inside if "/" not in name.removeprefix(start)]
    rows = [{"type": "directory", "path": name, "oid": COMMIT} for name in folders]
    for name in inside:
        about = {"oid": etag(name, files[name]), "size": len(files[name])}
        rows.append({"type": "file", "path": name, **about})
    return rows


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub: Hub = self.server.hub
        hub.requests.append(self.path)
        fault = hub.fault_kind(self.path)
        if fault == "hang":
            hub.closed.wait(60)
        elif isinstance(fault, int):
            self.answer(fault, b"{}")
        else:
            self.serve(hub, fault)

    do_HEAD = do_GET

    def serve(self, hub: Hub, fault: str | None):
        match = PATHS.match(self.path)
        repository, call, path = match.groups() if match else ("", "", "")
        files = hub.repositories.get(repository)
        if files is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif call == "tree":
            everywhere = "recursive=false" not in self.path.lower()
            self.answer(200, json.dumps(tree(files, path, everywhere)).encode())
        elif call == "revision":
            name = repository.removeprefix("datasets/")
            self.answer(200, json.dumps({"id": name, "sha": COMMIT}).encode())
        elif path in files:
            headers = {"ETag": f'"{etag(path, files[path])}"', "X-Repo-Commit": COMMIT}
            self.answer(200, files[path], headers, fault)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status, body, headers=None, fault=None):
        start = 0
        if status == 200 and (wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            status, start = 206, int(wanted[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            self.send_body(body[start:], fault)

    def send_body(self, body: bytes, fault: str | None):
        half = len(body) // 2
        if fault == "wrong":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.close_connection = fault in ("stall", "cut")
        self.wfile.write(body[:half] if self.close_connection else body)
        if fault == "stall":
            self.wfile.flush()
            self.server.hub.closed.wait(60)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # the client closed the connection


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub(repositories, f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
