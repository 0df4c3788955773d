"""A loopback server that plays the Hub for the real client, with the faults of a network."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".parquet", ".gz")  # kept by sha256; all else by git's hash
NO_ENTRY = {"X-Error-Code": "EntryNotFound"}
PATHS = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/(?P<ask>revision|tree)/[\w.-]+(/(?P<folder>[^?]+))?"
    r"|/(?P<data>datasets/)?(?P<of>[^/]+/[^/]+)/resolve/[\w.-]+/(?P<path>[^?]+)"
)


@dataclass
class Fault:
    """A fault of the server: `how` is a status, or hang, slow, stall, cut or wrong."""

    how: int | str
    where: str = ".*"  # of which requests, as a regular expression on the path
    times: int = 1000  # and how often


@dataclass
class Hub:
    """repositories: "datasets/org/name" or "org/name", with the files of each, by path."""

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    fault: Fault | None = None
    asked: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def client(self, home) -> dict[str, str]:
        """An environment for a client that knows only this server, and is in a hurry."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
        }

    def fault_of(self, path: str) -> int | str | None:
        fault = self.fault
        if fault is None or fault.times == 0 or not re.search(fault.where, path):
            return None
        fault.times -= 1
        return fault.how


def etag(path: str, body: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def tree(files: dict[str, bytes], folder: str | None, recursive: bool) -> list[dict]:
    """The Hub's listing of a folder."""
    start = f"{folder}/" if folder else ""
    inside = {path: body for path, body in files.items() if path.startswith(start)}
    if not recursive:
        direct = {path for path in inside if "/" not in path[len(start) :]}
        folders = {start + path[len(start) :].partition("/")[0] for path in inside.keys() - direct}
        inside = {path: inside.get(path) for path in direct | folders}
    return [
        {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
        if body is None
        else {"type": "file", "path": path, "oid": etag(path, body), "size": len(body)}
        for path, body in sorted(inside.items())
    ]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub: Hub = self.server.hub
        hub.asked.append(self.path)
        how = hub.fault_of(self.path)
        if how == "hang":
            hub.closed.wait(60)
        elif isinstance(how, int):
            self.answer(how, b"{}")
        else:
            self.serve(hub, how)

    do_HEAD = do_GET

    def serve(self, hub: Hub, how: str | None):
        asked = PATHS.match(self.path)
        parts = asked.groupdict() if asked else {}
        prefix = "datasets/" if parts.get("kind") == "datasets" or parts.get("data") else ""
        files = hub.repositories.get(f"{prefix}{parts.get('id') or parts.get('of')}")
        if files is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts["ask"] == "tree":
            rows = tree(files, parts["folder"], "recursive=true" in self.path)
            self.answer(200 if rows else 404, json.dumps(rows).encode(), NO_ENTRY)
        elif parts["ask"] == "revision":
            siblings = [{"rfilename": path} for path in files]
            known = {"id": parts["id"], "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(known).encode())
        elif (path := parts["path"]) in files:
            headers = {"ETag": f'"{etag(path, files[path])}"', "X-Repo-Commit": COMMIT}
            self.answer(200, files[path], headers, how)
        else:
            self.answer(404, b"", NO_ENTRY)

    def answer(self, status, body, headers=None, how=None):
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
            self.send_body(body[start:], how)

    def send_body(self, body: bytes, how: str | None):
        half = len(body) // 2
        if how == "wrong":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        for first in range(0, len(body), size := max(1, len(body) // 10)):
            if how in ("stall", "cut") and first >= half:
                self.wfile.flush()
                self.server.hub.closed.wait(60 if how == "stall" else 0)
                self.close_connection = True
                return
            self.wfile.write(body[first : first + size])
            self.server.hub.closed.wait(0.05 if how == "slow" else 0)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a client that gave up


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
