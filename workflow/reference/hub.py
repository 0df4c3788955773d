"""The Hugging Face Hub: asked only where a probe finds it, and not believed without a hash.

What is in the client's cache is taken from there. Else one probe of three seconds decides whether
the client, which can wait for minutes, is let loose at all. In the cache a file bears the name of
its own hash; one that does not match it, downloaded or old, is removed and never used.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

from workflow.errors import DiskError, SourceError

PROBE_SECONDS = 3.0
LOG_IN = "check its id, or type: hf auth login, with an account that may read it"
MENDS = {  # what the Hub answers, and what the user can do; for anything else, fetch it elsewhere
    401: LOG_IN,
    403: LOG_IN,
    404: "mend its id or revision in the YAML",
    429: "wait some minutes and run again",
    500: "run again later",
    502: "run again later",
    503: "run again later",
}


class NoRedirection(urllib.request.HTTPRedirectHandler):
    """A token is for one host alone, and an answer that leads elsewhere is one, too."""

    def redirect_request(self, *_) -> None:
        return None


def snapshot(
    repo_id: str,
    revision: str,
    patterns: list[str],
    *,
    repo_type: str = "model",
    complete: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """The folder of a revision's files in the Hub's cache, downloaded if need be.

    revision: a commit, a branch or a tag; the folder bears the commit's name.
    patterns: which files, `*` for any characters. complete: whether a cached folder has them all.
    Raises SourceError, with what to do.
    """
    wanted = {
        "repo_id": repo_id,
        "revision": revision,
        "repo_type": repo_type,
        "allow_patterns": patterns,
    }
    if (folder := cached(wanted)) and complete(folder):
        return folder
    fetch = f"with a network, type: {fetch_command(repo_id, revision, patterns, repo_type)}"
    if constants.HF_HUB_OFFLINE:
        raise SourceError(repo_id, "not in the cache, and HF_HUB_OFFLINE is set", fetch)
    if trouble := probe(*addresses(repo_id, revision, repo_type)):
        what, status = trouble
        raise SourceError(repo_id, what, MENDS.get(status, fetch))
    return downloaded(wanted)


def cached(wanted: dict) -> Path | None:
    """The folder of a revision in the cache, if it is there and holds nothing wrong."""
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except (ValueError, OSError) as error:  # no possible id or revision
        raise SourceError(wanted["repo_id"], str(error), MENDS[404]) from None
    return None if remove_wrong(folder, wanted["allow_patterns"]) else folder


def downloaded(wanted: dict) -> Path:
    """The same, by the stock client, once the Hub is known to be there."""
    repo_id, revision = wanted["repo_id"], wanted["revision"]
    print(f"Fetching {repo_id}, revision {revision}, from {constants.ENDPOINT}")
    logging.set_verbosity_error()  # what goes wrong is said once, here
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(**wanted))
    except Exception as error:  # the client's own errors, and those of every layer below it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            where, full = constants.HF_HUB_CACHE, "the disk is full"
            raise DiskError(where, full, "free some room, or set HF_HOME=FOLDER") from None
        what, status = cause(error)
        raise SourceError(repo_id, what, MENDS.get(status, "run again, it goes on there")) from None
    if wrong := remove_wrong(folder, wanted["allow_patterns"]):
        what = f"{', '.join(wrong)} arrived with another sha256 than the Hub's, and was removed"
        raise SourceError(repo_id, what, "run again")
    return folder


def fetch_command(repo_id: str, revision: str, patterns: list[str], repo_type: str) -> str:
    """What to type to have all this in the cache."""
    kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
    include = "".join(f" --include {shlex.quote(pattern)}" for pattern in patterns)
    return f"hf download {shlex.quote(repo_id)}{kind} --revision {shlex.quote(revision)}{include}"


def addresses(repo_id: str, revision: str, repo_type: str) -> list[str]:
    """What the client will ask for: what there is, and a file, which may be closed to some."""
    kind, file = ("", "config.json") if repo_type == "model" else (f"{repo_type}s/", "README.md")
    repo_id, revision = quote(repo_id), quote(revision, safe="")
    return [
        f"{constants.ENDPOINT}/api/{repo_type}s/{repo_id}/revision/{revision}",
        f"{constants.ENDPOINT}/{kind}{repo_id}/resolve/{revision}/{file}",
    ]


def probe(*urls: str, seconds: float = PROBE_SECONDS) -> tuple[str, int | None] | None:
    """None if all answer well within `seconds`, else what is wrong, and the status if any.

    In a thread, since a name that does not resolve can outlast any timeout of a socket.
    """
    opener = urllib.request.build_opener(NoRedirection)
    outcome = [(f"{constants.ENDPOINT} did not answer within {seconds:g} s", None)]

    def ask():
        try:
            for url in urls:
                token = get_token()
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                request = urllib.request.Request(url, headers=headers)  # noqa: S310
                opener.open(request, timeout=seconds).close()
            outcome[0] = None
        except urllib.error.HTTPError as error:
            # it knows where else to look, or all but this file
            there = error.code < 400 or error.headers.get("X-Error-Code") == "EntryNotFound"
            what = f"the Hub answered {error.code} {error.reason}"
            outcome[0] = None if there else (what, error.code)
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            if not isinstance(why, TimeoutError):
                outcome[0] = (f"{constants.ENDPOINT} cannot be reached ({why})", None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def cause(error: Exception) -> tuple[str, int | None]:
    """What is at the bottom of the client's error, which is wrapped in advice, and its status."""
    while error.__cause__:
        error = error.__cause__
    words = str(error).strip().splitlines() or [type(error).__name__]
    response = getattr(error, "response", None)
    return f"the download failed ({words[0]})", getattr(response, "status_code", None)


def remove_wrong(folder: Path, patterns: list[str]) -> list[str]:
    """Removes files of a cached snapshot that are not what the Hub said, and returns their names.

    Where the cache has no links (Windows without developer mode), there is no hash to compare.
    Raises SourceError for one that cannot be removed.
    """
    wrong, blobs = [], (folder.parents[1] / "blobs").resolve()
    for link in sorted(folder.rglob("*")):
        name = link.relative_to(folder).as_posix()
        if not (link.is_symlink() and any(fnmatch(name, pattern) for pattern in patterns)):
            continue
        blob = link.resolve()
        try:
            if blob.parent == blobs and blob.is_file() and as_named(blob):
                continue
            link.unlink(missing_ok=True)
            if blob.parent == blobs:  # what lies elsewhere is not the cache's
                blob.unlink(missing_ok=True)
        except OSError as error:
            raise SourceError(
                link, f"it cannot be read or removed ({error})", "remove it"
            ) from None
        wrong.append(name)
    return wrong


def as_named(blob: Path) -> bool:
    """Whether a file's name is its hash: sha256 of a large one, else git's, as the Hub does it."""
    git = len(blob.name) == 40
    digest = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
    if git:
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    with open(blob, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest() == blob.name
